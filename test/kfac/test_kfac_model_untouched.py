"""KFAC leaves the user's model, data and random generators as found, also after an exception."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlinops import KFACLinearOperator


class Model(nn.Module):
    """A model with all that could be disturbed; it can fail in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.lin = nn.Linear(8, 3)
        self.head = nn.Linear(3, 2)
        self.head.weight.requires_grad_(False)
        self.eval()
        self.head.train()
        self.conv.register_forward_hook(lambda module, args, output: output + 1)
        self.conv.register_forward_pre_hook(lambda module, args: args[0] * 2)
        self.lin.register_forward_hook(self._user_hook, with_kwargs=True)
        self.lin.register_full_backward_hook(lambda module, grad_input, grad_output: None)
        self.fails: tuple[str, int, BaseException] | None = None  # where, at which visit, how

    def _user_hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._visit("hook")

    def _visit(self, where: str) -> None:
        if self.fails is not None and self.fails[0] == where:
            _, left, error = self.fails
            self.fails = (where, left - 1, error)
            if left == 1:
                raise error

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.norm(self.conv(x)))
        self._visit("forward")
        h = self.drop(self.lin(h.flatten(1)))
        if h.requires_grad:
            h.register_hook(lambda gradient: self._visit("backward"))
        return self.head(h)


def snapshot(value: Any) -> Any:
    """Return a comparable picture of a module, tensor or container."""
    if isinstance(value, nn.Module):
        hooks = [name for name in vars(value) if "_hooks" in name]
        return {
            "state": [
                (name, id(t), t.detach().clone(), t.requires_grad, t._version, snapshot(t.grad))
                for name, t in (*value.named_parameters(), *value.named_buffers())
            ],
            "modules": [
                (
                    name,
                    id(module),
                    module.training,
                    sorted(vars(module)),
                    [list((getattr(module, hook) or {}).items()) for hook in hooks],
                )
                for name, module in value.named_modules()
            ],
        }
    if isinstance(value, Tensor):
        return id(value), value.detach().clone(), value.requires_grad, snapshot(value.grad)
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return value


def generators() -> list[Any]:
    return [torch.get_rng_state(), list(np.random.get_state()), random.getstate()]


def equal(a: Any, b: Any) -> bool:
    """Compare pictures."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Watched:
    """A model, parameters of other values, data, and what they looked like."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = Model() if model is None else model
        self.model.lin.weight.grad = torch.rand(3, 8)
        self.params = {
            name: (p + 0.1).detach().requires_grad_()
            for name, p in self.model.named_parameters()
            if name != "norm.bias"
        }
        self.params["lin.bias"].grad = torch.rand(3)
        self.data = [
            (torch.rand(n, 1, 3, 3, requires_grad=n == 1), torch.arange(n) % 2) for n in (2, 1, 3)
        ]
        self.loss = nn.CrossEntropyLoss(torch.rand(2))
        self.before = self.look()

    def look(self) -> list[Any]:
        watched = [self.model, self.params, self.data, self.loss]
        return [snapshot(watched), generators()]

    def kfac(self, **kwargs: Any) -> KFACLinearOperator:
        data = kwargs.pop("data", self.data)
        arguments = {"fisher_type": "type-2", **kwargs}
        return KFACLinearOperator(self.model, self.loss, self.params, data, **arguments)

    def assert_untouched(self) -> None:
        assert equal(self.look(), self.before)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("check_deterministic", [False, True])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical", "forward-only"])
def test_untouched(fisher_type: str, check_deterministic: bool, mode: Any):
    watched = Watched()
    with mode():
        K = watched.kfac(fisher_type=fisher_type, check_deterministic=check_deterministic)
        assert torch.is_grad_enabled() == (mode is nullcontext)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not any(
            factor.requires_grad for name in watched.params for factor in K.factors(name)
        )
        K @ torch.ones(K.shape[1])
    watched.assert_untouched()
    expected = watched.kfac(fisher_type=fisher_type)
    torch.testing.assert_close(K.to_dense(), expected.to_dense())


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("where", ["forward", "hook", "backward"])
@pytest.mark.parametrize("check_deterministic", [False, True])
def test_untouched_after_an_exception(where: str, error: BaseException, check_deterministic: bool):
    watched = Watched()
    visit = 2
    if where != "backward":  # in the second batch of KFAC's own pass, which is the last one
        many = 10**6
        watched.model.fails = (where, many, error)
        watched.kfac(check_deterministic=check_deterministic)
        assert watched.model.fails is not None
        visit = many - watched.model.fails[1] - 1
        assert visit > 2 * len(watched.data) * check_deterministic
    watched.model.fails = (where, visit, error)
    with pytest.raises(type(error)):
        watched.kfac(check_deterministic=check_deterministic)
    watched.assert_untouched()


@pytest.mark.parametrize(
    ("visit", "check_deterministic"),
    [(1, False), (1, True), (2, True)],  # two examples are looked at before the check only
)
@pytest.mark.parametrize("where", ["forward", "hook"])
def test_untouched_after_an_exception_while_looking(
    visit: int, where: str, check_deterministic: bool
):
    """A model may be unable to do with few examples, which is no error."""
    watched = Watched()
    expected = watched.kfac().to_dense()
    watched.model.fails = (where, visit, ValueError("few examples"))
    K = watched.kfac(check_deterministic=check_deterministic)
    watched.assert_untouched()
    torch.testing.assert_close(K.to_dense(), expected)
    watched.model.fails = (where, visit, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        watched.kfac(check_deterministic=check_deterministic)
    watched.assert_untouched()


class Scaled(Model):
    """The same with a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@pytest.mark.parametrize("check_deterministic", [False, True])
def test_untouched_when_a_parameter_is_not_supported(check_deterministic: bool):
    watched = Watched(Scaled())
    options = {"check_deterministic": check_deterministic}
    with pytest.raises(NotImplementedError, match=r"layers: 'scale' \(used by mul\)"):
        watched.kfac(**options)
    watched.assert_untouched()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Examples cannot be differentiated", UserWarning)
        K = watched.kfac(unsupported="diagonal", **options)
    assert not any(factor.requires_grad for factor in K.factors("lin.weight"))
    assert not K.block("scale").to_dense().requires_grad
    watched.assert_untouched()


def test_untouched_after_an_exception_in_a_diagonal_block():
    """In the pass for the diagonal, which comes after KFAC's own."""
    watched = Watched(Scaled())
    error = KeyboardInterrupt()
    many = 10**6
    watched.model.fails = ("forward", many, error)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Examples cannot be differentiated", UserWarning)
        watched.kfac(check_deterministic=False, num_data=6, unsupported="diagonal")
    watched.model.fails = ("forward", many - watched.model.fails[1], error)
    with pytest.raises(KeyboardInterrupt):
        watched.kfac(check_deterministic=False, num_data=6, unsupported="diagonal")
    watched.assert_untouched()


def test_untouched_after_an_exception_in_a_layer():
    watched = Watched()
    watched.model.conv.register_forward_hook(lambda module, args, output: output[..., :1])
    watched.before = watched.look()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        watched.kfac(check_deterministic=False, num_data=6)
    watched.assert_untouched()


def test_untouched_when_the_loss_or_the_data_fail():
    watched = Watched()
    wrong = [*watched.data[:2], (torch.ones(2, 1, 3, 3), torch.ones(2))]
    with pytest.raises(ValueError, match="targets must be class indices"):
        watched.kfac(data=wrong, check_deterministic=False)
    watched.assert_untouched()

    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield from watched.data[:2]
            torch.rand(1), np.random.rand(), random.random()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        watched.kfac(data=Broken(), check_deterministic=False, num_data=6)
    watched.assert_untouched()


def test_untouched_when_factors_are_not_finite():
    watched = Watched()
    with pytest.raises(RuntimeError, match=r"conv.weight.*non-finite"):
        watched.kfac(data=[(torch.full((1, 1, 3, 3), torch.inf), torch.tensor([0]))])
    watched.assert_untouched()


def test_the_model_still_trains():
    watched = Watched()
    model = copy.deepcopy(watched.model)
    watched.kfac()
    (X, y) = watched.data[0]
    for m in (model, watched.model):
        m.zero_grad()
        watched.loss(m(X), y).backward()
    for p, q in zip(model.parameters(), watched.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
