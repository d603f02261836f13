"""Wrong input to KFAC: the error names what is wrong, before the model is evaluated if possible.

How a model uses its parameters is known from an evaluation of the first batch: what is wrong with
that is found before any other.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    GGNLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
)
from curvlinops.computers.kfac_hooks import HooksKFACComputer


class Counted(nn.Module):
    """Notes evaluations, by the number of their examples, and back-propagations."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.calls: list[int] = []
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        prediction = self.layers(x)
        if prediction.requires_grad:
            prediction.register_hook(self._count)
        return prediction

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    def assert_looked_at(self) -> None:
        """Check that only the first batch was looked at, and nothing back-propagated."""
        assert self.calls in ([1], [2], [1, 2])
        assert not self.backwards


def kfac(model: nn.Module | None = None, **changes: Any) -> KFACLinearOperator:
    """Build KFAC of a small model, with changes of the arguments."""
    model = Counted(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) if model is None else model
    arguments = {
        "model_func": model,
        "loss_func": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        "data": [(torch.rand(n, 2), torch.rand(n, 2)) for n in (2, 3)],
        **changes,
    }
    return KFACLinearOperator(**arguments)


def assert_refused(error: type[Exception], match: str, **changes: Any) -> None:
    """Check the error, and that the model was not evaluated."""
    model = changes.pop("model", None)
    model = Counted(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) if model is None else model
    changes = {key: f(model) if key == "params" else f for key, f in changes.items()}
    with pytest.raises(error, match=match):
        kfac(model, **changes)
    assert not getattr(model, "calls", 0)


class L1(nn.L1Loss):
    """A loss without closed forms."""


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"'fisher' is not a FisherType.*'type-2', 'mc', 'empirical', 'forward-only'",
         {"fisher_type": "fisher"}),
        (ValueError, r"'spread' is not a KFACType.*'expand', 'reduce'", {"kfac_approx": "spread"}),
        (ValueError, r"must be one of \['hooks', 'make_fx'\], got 'hook'", {"backend": "hook"}),
        (ValueError, "loss_terms must be 'signs' or 'exact', got 'none'", {"loss_terms": "none"}),
        (ValueError, "unsupported must be 'raise' or 'diagonal', got 'skip'",
         {"unsupported": "skip"}),
        (ValueError, "mc_samples=2 has no meaning for .*'type-2'",
         {"mc_samples": 2, "fisher_type": "type-2"}),
        (ValueError, "mc_samples must be an integer, at least 1, got 0", {"mc_samples": 0}),
        (ValueError, "mc_samples must be an integer, at least 1, got 1.5", {"mc_samples": 1.5}),
        (ValueError, "num_per_example_loss_terms must be an integer, at least 1, got 0",
         {"num_per_example_loss_terms": 0}),
        (ValueError, "max_factor_size must be an integer, at least 1, got 0",
         {"max_factor_size": 0}),
        (ValueError, "seed must be between 0", {"seed": -1}),
        (ValueError, "seed must be an integer, got 0.5", {"seed": 0.5}),
        (ValueError, "num_data must be positive, got 0", {"num_data": 0}),
        (ValueError, "hooks.*needs an nn.Module, got function", {"model_func": lambda p, x: x}),
        (ValueError, "model_func must be", {"model_func": 3}),
        (TypeError, r"params must be a dict.*dict\(model.named_parameters\(\)\)",
         {"params": lambda m: list(m.parameters())}),
        (TypeError, "params must be a dict", {"params": lambda m: {"layers.0.weight": [1.0]}}),
        (ValueError, "params is empty", {"params": lambda m: {}}),
        (ValueError, "not parameters of Counted: nose",
         {"params": lambda m: {"nose": torch.ones(1)}}),
        (ValueError, r"'layers.0.bias' has shape \(4,\) in params, but \(3,\)",
         {"params": lambda m: {"layers.0.bias": torch.ones(4)}}),
        (ValueError, "floating point",
         {"params": lambda m: {"layers.0.bias": torch.ones(3).long()}}),
        (ValueError, "same dtype", {"params": lambda m: {
            "layers.0.bias": torch.ones(3), "layers.2.bias": torch.ones(2).double()}}),
        (NotImplementedError, "L1Loss has no closed forms.*nn.MSELoss", {"loss_func": nn.L1Loss()}),
        (NotImplementedError, "L1 has no closed forms", {"loss_func": L1()}),
        (NotImplementedError, "l1_loss has no closed forms", {"loss_func": F.l1_loss}),
        (ValueError, "None is not a loss function", {"loss_func": None}),
        (ValueError, "reduction 'none'", {"loss_func": nn.MSELoss(reduction="none")}),
        (ValueError, "no reduction", {"loss_func": lambda f, y: (f - y).sum()}),
        (ValueError, "data is empty", {"data": []}),
        (ValueError, "iterated only once", {"data": iter([(torch.rand(2, 2), torch.rand(2, 2))])}),
        (ValueError, "data must be an iterable of batches", {"data": 3}),
        (ValueError, r"pair \(X, y\)", {"data": [torch.rand(2, 2)]}),
        (ValueError, "must be a tensor or a mapping", {"data": [([1.0], torch.rand(1, 2))]}),
        (ValueError, "batch_size_fn", {"data": [({"x": torch.rand(1, 2)}, torch.rand(1, 2))]}),
        (ValueError, "at least one example", {"data": [(torch.rand(0, 2), torch.rand(0, 2))]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("check_deterministic", [False, True])
def test_refused(
    error: type[Exception], match: str, changes: dict[str, Any], check_deterministic: bool
):
    assert_refused(error, match, **changes, check_deterministic=check_deterministic)


def test_options_know_their_values():
    assert "mc" in FisherType and FisherType.MC in FisherType and "fisher" not in FisherType
    assert "reduce" in KFACType and "type-2" not in KFACType
    by_name = kfac(fisher_type="type-2", kfac_approx="reduce")
    by_member = kfac(fisher_type=FisherType.TYPE2, kfac_approx=KFACType.REDUCE)
    assert by_name.summary() == by_member.summary()


# ---- layers --------------------------------------------------------------------------------------
class Uses(nn.Module):
    """A layer from a function of it and the input, with its modules and parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class OwnForward(nn.Linear):
    """A Linear that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class OwnWeight(nn.Linear):
    """A Linear with another weight than its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class OwnConvolution(nn.Conv1d):
    """A Conv1d that does something else."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Inherited(nn.Linear):
    """A Linear under another name."""


def _patched() -> nn.Linear:
    layer = nn.Linear(2, 2, bias=False)
    layer.forward = lambda input: F.linear(2 * input, layer.weight)  # type: ignore[method-assign]
    return layer


class Multiply(torch.autograd.Function):
    """A differentiable function of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class Scale(torch.autograd.Function):
    """Another one, of a function that no layer computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(2, 2))


def _named(function: str, *names: str) -> str:
    """Return a pattern for parameters of layer 1 that a function uses, and no others."""
    listing = ", ".join(f"'layers.1.{name}' \\(used by {function}[ \\w.]*\\)" for name in names)
    return f"not in supported layers: {listing}. Supported"


RECURRENT = ("r.weight_ih_l0", "r.weight_hh_l0", "r.bias_ih_l0", "r.bias_hh_l0")

UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "recurrent": (
        lambda: Uses(lambda m, x: m.r(x)[0], r=nn.LSTM(2, 2)), _named("lstm", *RECURRENT)
    ),
    "gated": (lambda: Uses(lambda m, x: m.r(x)[0], r=nn.GRU(2, 2)), _named("gru", *RECURRENT)),
    "bilinear": (
        lambda: Uses(lambda m, x: m.b(x, x), b=nn.Bilinear(2, 2, 2)),
        _named("bilinear", "b.weight", "b.bias"),
    ),
    "activation": (nn.PReLU, _named("prelu", "weight")),
    "bag": (
        lambda: Uses(lambda m, x: m.e(x.long()), e=nn.EmbeddingBag(3, 2)),
        _named("embedding_bag", "e.weight"),
    ),
    "batch statistics": (
        lambda: Uses(
            lambda m, x: F.batch_norm(x, None, None, m.w, m.b, True),
            w=torch.rand(2), b=torch.rand(2),
        ),
        _named("batch_norm", "w", "b"),
    ),
    "own weight": (lambda: OwnWeight(2, 2), _named("mul", "weight")),
    "own convolution": (
        lambda: Uses(lambda m, x: m.c(x.unsqueeze(-1)).squeeze(-1), c=OwnConvolution(2, 2, 1)),
        _named("mul", "c.weight"),
    ),
    "parametrised": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
        _named(r"\w+", "parametrizations.weight.original"),
    ),
    "normalised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        _named("_weight_norm", *(f"parametrizations.weight.original{i}" for i in (0, 1))),
    ),
    "scale": (lambda: Uses(lambda m, x: m.s * x, s=torch.rand(2)), _named("mul", "s")),
    "shift": (lambda: Uses(lambda m, x: x + m.s, s=torch.rand(2)), _named("add", "s")),
    "in place": (lambda: Uses(lambda m, x: x.clone().add_(m.s), s=torch.rand(2)),
                 _named("add_", "s")),
    "scalar": (lambda: Uses(lambda m, x: x / m.s, s=torch.tensor(2.0)), _named("div", "s")),
    "sum of products": (
        lambda: Uses(lambda m, x: torch.einsum("ni,io->no", x, m.w), w=torch.rand(2, 2)),
        _named("einsum", "w"),
    ),
    "from the left": (
        lambda: Uses(lambda m, x: (m.w @ x.T).T, w=torch.rand(2, 2)), _named("matmul", "w")
    ),
    "batch of weights": (
        lambda: Uses(lambda m, x: (x @ m.w).sum(0), w=torch.rand(3, 2, 2)), _named("matmul", "w")
    ),
    "vector": (
        lambda: Uses(lambda m, x: (x @ m.w).unsqueeze(1) + x, w=torch.rand(2)),
        _named("matmul", "w"),
    ),
    "scaled sum": (
        lambda: Uses(
            lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), w=torch.rand(2, 2), b=torch.rand(2)
        ),
        _named("addmm", "w", "b"),
    ),
    "dtype": (
        lambda: Uses(lambda m, x: F.linear(x.double(), m.w.double()).float(), w=torch.rand(2, 2)),
        _named("double", "w"),
    ),
    "permuted": (
        lambda: Uses(lambda m, x: F.linear(x, m.w[[1, 0]]), w=torch.rand(2, 2)),
        _named("__getitem__", "w"),
    ),
    "columns": (
        lambda: Uses(lambda m, x: F.linear(x[:, :1], m.w[:, :1]), w=torch.rand(2, 2)),
        _named("linear", "w"),
    ),
    "every other row": (
        lambda: Uses(lambda m, x: F.linear(x, m.w[::2]), w=torch.rand(4, 2)), _named("linear", "w")
    ),
    "weight as input": (
        lambda: Uses(lambda m, x: x @ F.linear(m.v, m.w), v=torch.rand(2, 2), w=torch.rand(2, 2)),
        _named("linear", "v", "w"),
    ),
    "scaled norm": (
        lambda: Uses(lambda m, x: F.layer_norm(x, (2,), m.w[:1].expand(2)), w=torch.rand(2)),
        _named("layer_norm", "w"),
    ),
    "own function": (
        lambda: Uses(lambda m, x: Scale.apply(x, m.s), s=torch.rand(2)), _named("mul", "s")
    ),
    "own product": (
        lambda: Uses(lambda m, x: Multiply.apply(x, m.w), w=torch.rand(2, 2)), _named(r"\w+", "w")
    ),
    "vectorised": (
        lambda: Uses(
            lambda m, x: torch.vmap(lambda w: x @ w)(m.w).sum(0), w=torch.rand(3, 2, 2)
        ),
        _named(r"\w+", "w"),
    ),
    "differentiated": (
        lambda: Uses(
            lambda m, x: x * torch.func.grad(lambda w: F.linear(x, w).sin().sum())(m.w).sum(),
            w=torch.rand(2, 2),
        ),
        _named(r"\w+", "w"),
    ),
    "compiled": (
        lambda: Uses(lambda m, x: m.lin(x), lin=_scripted()),
        _named(r"\w+", "lin.weight", "lin.bias"),
    ),
    "reshaped": (
        lambda: Uses(lambda m, x: F.linear(x, m.w.view(2, 2)), w=torch.rand(4)),
        _named("linear", "w"),
    ),
    # ---- used in several ways
    "overlapping rows": (
        lambda: Uses(
            lambda m, x: F.linear(x, m.w[:2]) + F.linear(2 * x, m.w[1:]), w=torch.rand(3, 2)
        ),
        r"'layers.1.w' \(used in parts that overlap, or leave a part out\)",
    ),
    "rows and all": (
        lambda: Uses(
            lambda m, x: F.linear(x, m.w)[:, 1:] + F.linear(x, m.w[:2]), w=torch.rand(3, 2)
        ),
        r"'layers.1.w' \(used in parts that overlap, or leave a part out\)",
    ),
    "not all rows": (
        lambda: Uses(lambda m, x: F.linear(x, m.w[:2]), w=torch.rand(3, 2)),
        r"'layers.1.w' \(used in parts that leave a part out\)",
    ),
    "not the middle": (
        lambda: Uses(
            lambda m, x: F.linear(x, m.w[:2]) + F.linear(x, m.w[3:]), w=torch.rand(5, 2)
        ),
        r"'layers.1.w' \(used in parts that overlap, or leave a part out\)",
    ),
    "not all of the bias": (
        lambda: Uses(lambda m, x: m.lin(F.linear(x, torch.eye(2), m.b[1:])), b=torch.rand(3),
                     lin=nn.Linear(2, 2)),
        r"'layers.1.b' \(used in parts that leave a part out\)",
    ),
    "transposed": (
        lambda: Uses(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), w=torch.rand(3, 2)),
        r"'layers.1.w' \(used transposed, and as it is\)",
    ),
    "two kinds": (
        lambda: Uses(
            lambda m, x: F.linear(m.c(x.unsqueeze(-1)).squeeze(-1), m.c.weight[:, :, 0]),
            c=nn.Conv1d(2, 2, 1),
        ),
        r"'layers.1.c.weight' \(shared by Conv1d and Linear\)",
    ),
    "two roles": (
        lambda: Uses(lambda m, x: m.norm(F.linear(x, torch.eye(2), m.norm.weight)),
                     norm=nn.LayerNorm(2)),
        r"'layers.1.norm.weight' \(used as weight and as bias\)",
    ),
    "two roles at once": (
        lambda: Uses(lambda m, x: F.linear(x, m.w, m.w[0]), w=torch.rand(2, 2)),
        _named("linear", "w"),
    ),
}  # fmt: skip

# Parameters that other functions of PyTorch hide from those that call layers.


@pytest.mark.parametrize("check_deterministic", [False, True])
@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore:Examples cannot be differentiated:UserWarning")
def test_unsupported_layers(name: str, check_deterministic: bool):
    make, match = UNSUPPORTED[name]
    model = Counted(nn.Linear(2, 2), make(), nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=match) as caught:
        kfac(model, check_deterministic=check_deterministic)
    model.assert_looked_at()
    assert "Supported: Linear, Conv1d, Conv2d" in str(caught.value)
    assert "unsupported='diagonal'" in str(caught.value)
    assert "layers.0" not in str(caught.value)
    # as constants they are no obstacle
    rest = {k: p for k, p in model.named_parameters() if not k.startswith("layers.1")}
    options = {"data": [(torch.rand(3, 2), torch.rand(3, 2))], "fisher_type": "type-2"}
    constant = kfac(model, params=rest, **options)
    assert constant.trace() > 0
    # nor with a diagonal block
    K = kfac(model, unsupported="diagonal", **options)
    for parameter in rest:
        torch.testing.assert_close(K.factors(parameter), constant.factors(parameter))


def test_all_unsupported_parameters_are_listed():
    model = Counted(nn.PReLU(), nn.Linear(2, 2), OwnWeight(2, 2), Uses(lambda m, x: x + m.b,
                    b=torch.rand(2)), nn.PReLU(2))  # fmt: skip
    for check_deterministic in (True, False):
        model.calls.clear()
        with pytest.raises(NotImplementedError) as caught:
            kfac(model, check_deterministic=check_deterministic)
        model.assert_looked_at()
        listing = str(caught.value).split("Supported:")[0].removesuffix(". ")
        assert listing.removeprefix("These parameters are not in supported layers: ").split(
            ", "
        ) == [
            "'layers.0.weight' (used by prelu)",
            "'layers.2.weight' (used by mul)",
            "'layers.3.b' (used by add)",
            "'layers.4.weight' (used by prelu)",
        ]


def test_unsupported_use_in_a_later_batch():
    """The first batch does not show it."""
    layer = Uses(lambda m, x: m.lin(x) * (m.lin.bias if len(x) == 3 else 1), lin=nn.Linear(2, 2))
    model = Counted(layer, nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"layers: 'layers.0.lin.bias' \(used by mul\)"):
        kfac(model)
    assert model.calls[-1] == 3


def test_subclasses_with_the_same_forward_are_supported():
    model = Counted(Inherited(2, 3), nn.Linear(3, 2))
    plain = Counted(nn.Linear(2, 3), nn.Linear(3, 2))
    plain.load_state_dict(model.state_dict())
    data = [(torch.rand(3, 2), torch.rand(3, 2))]
    K = kfac(model, data=data)
    assert "layers.0.weight" in K.summary()
    torch.testing.assert_close(K.to_dense(), kfac(plain, data=data).to_dense())


def test_parameters_of_the_model_itself():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x @ self.weight) * self.scale

    with pytest.raises(NotImplementedError, match=r"layers: 'scale' \(used by mul\). Supported"):
        kfac(Own())


# ---- layers that are no modules ------------------------------------------------------------------
class Double(nn.Module):
    """Doubles its input."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _plain(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a Linear with this weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.to(weight.dtype)


def _images(m: Any, x: Tensor) -> Tensor:
    """Call a layer for images with the positions as pixels."""
    return m.c(x.mT.unflatten(-1, (2, -1))).flatten(2).mT


Pair = tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]
#: Layers, and the same as plain modules with the same values.
SUPPORTED: dict[str, Pair] = {
    "own forward": (
        lambda: OwnForward(2, 2), lambda m: nn.Sequential(Double(), _plain(m.weight, m.bias))
    ),
    "patched": (_patched, lambda m: nn.Sequential(Double(), _plain(m.weight))),
    "function": (
        lambda: Uses(lambda m, x: F.linear(x, m.w, m.b), w=torch.rand(2, 2), b=torch.rand(2)),
        lambda m: _plain(m.w, m.b),
    ),
    "keywords": (
        lambda: Uses(
            lambda m, x: F.linear(weight=m.w, input=x, bias=m.b), w=torch.rand(2, 2),
            b=torch.rand(2),
        ),
        lambda m: _plain(m.w, m.b),
    ),
    "product": (lambda: Uses(lambda m, x: x @ m.w, w=torch.rand(2, 2)), lambda m: _plain(m.w.T)),
    "matmul": (
        lambda: Uses(lambda m, x: torch.matmul(x, other=m.w), w=torch.rand(2, 2)),
        lambda m: _plain(m.w.T),
    ),
    "mm": (
        lambda: Uses(lambda m, x: x.flatten(0, 1).mm(m.w).reshape(x.shape), w=torch.rand(2, 2)),
        lambda m: _plain(m.w.T),
    ),
    "mm with keyword": (
        lambda: Uses(
            lambda m, x: torch.mm(x.flatten(0, 1), mat2=m.w).reshape(x.shape), w=torch.rand(2, 2)
        ),
        lambda m: _plain(m.w.T),
    ),
    "addmm": (
        lambda: Uses(
            lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).reshape(x.shape),
            w=torch.rand(2, 2), b=torch.rand(2),
        ),
        lambda m: _plain(m.w.T, m.b),
    ),
    "transposed twice": (
        lambda: Uses(lambda m, x: x @ m.w.T, w=torch.rand(2, 2)), lambda m: _plain(m.w)
    ),
    "transposed once": (
        lambda: Uses(lambda m, x: F.linear(x, m.w.mT), w=torch.rand(2, 2)),
        lambda m: _plain(m.w.T),
    ),
    "convolution as product": (
        lambda: Uses(lambda m, x: F.linear(x, m.c.weight.flatten(1)),
                     c=nn.Conv2d(2, 2, 1, bias=False)),
        lambda m: _plain(m.c.weight.flatten(1)),
    ),
    "conv1d": (
        lambda: Uses(lambda m, x: m.c(x.mT).mT, c=nn.Conv1d(2, 2, 1)),
        lambda m: _plain(m.c.weight[..., 0], m.c.bias),
    ),
    "own convolution": (
        lambda: Uses(lambda m, x: m.c._conv_forward(2 * x.mT, m.c.weight, m.c.bias).mT,
                     c=nn.Conv1d(2, 2, 1)),
        lambda m: nn.Sequential(Double(), _plain(m.c.weight[..., 0], m.c.bias)),
    ),
    "conv2d": (
        lambda: Uses(_images, c=nn.Conv2d(2, 2, 1)),
        lambda m: _plain(m.c.weight[..., 0, 0], m.c.bias),
    ),
    "transposed convolution": (
        lambda: Uses(_images, c=nn.ConvTranspose2d(2, 2, 1)),
        lambda m: _plain(m.c.weight[..., 0, 0].T, m.c.bias),
    ),
    "functional call": (
        lambda: Uses(lambda m, x: functional_call(m.lin, dict(m.lin.named_parameters()), x),
                     lin=nn.Linear(2, 2)),
        lambda m: _plain(m.lin.weight, m.lin.bias),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", SUPPORTED)
def test_layers_that_are_no_modules(name: str, joint: bool, kfac_approx: str):
    """The factors are those of plain layers."""
    make, plain = SUPPORTED[name]
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    layer = make().double()
    models = [
        nn.Sequential(first, nn.Tanh(), part, nn.Tanh(), last).double()
        for part in (layer, plain(layer))
    ]
    data = [(torch.rand(n, 4, 2).double(), torch.rand(n, 4, 2).double()) for n in (3, 2)]
    torch.testing.assert_close(models[0](data[0][0]), models[1](data[0][0]))
    options = {"fisher_type": "type-2", "kfac_approx": kfac_approx}
    actual, expected = (
        kfac(model, data=data, separate_weight_and_bias=not joint, **options) for model in models
    )
    assert_same_factors(actual, expected, models)


def assert_same_factors(
    actual: KFACLinearOperator, expected: KFACLinearOperator, models: list[nn.Module]
) -> None:
    """Check that the parameters of two models, in the same order, have the same factors."""
    for names in zip(*(dict(model.named_parameters()) for model in models), strict=True):
        factors = [K.factors(name) for K, name in zip((actual, expected), names, strict=True)]
        assert any(factor.any() for factor in factors[1])
        torch.testing.assert_close(*factors)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_embedding_is_a_product_with_unit_vectors(kfac_approx: str):
    class OneHot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(x, 5).double()

    embedding, last = nn.Embedding(5, 2), nn.Linear(2, 2)
    data = [(torch.randint(5, (n, 4)), torch.rand(n, 4, 2).double()) for n in (3, 2)]
    models = [
        nn.Sequential(*layers, nn.Tanh(), last).double()
        for layers in ((embedding,), (OneHot(), _plain(embedding.weight.T)))
    ]
    options = {"fisher_type": "type-2", "kfac_approx": kfac_approx, "data": data}
    actual, expected = (kfac(model, **options) for model in models)
    (B, A), (B_plain, A_plain) = actual.factors("0.weight"), expected.factors("1.weight")
    torch.testing.assert_close(B, B_plain)
    A = A if isinstance(A, Tensor) else A.to_dense()
    torch.testing.assert_close(A, A_plain)
    torch.testing.assert_close(actual.factors("2.weight"), expected.factors("3.weight"))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["layer", "root mean square", "group", "batch"])
def test_norms_are_exact(kind: str, joint: bool):
    norm = {
        "layer": lambda: nn.LayerNorm(4),
        "root mean square": lambda: nn.RMSNorm(4),
        "group": lambda: nn.GroupNorm(2, 4),
        "batch": lambda: nn.BatchNorm1d(4),
    }[kind]()
    norm(torch.rand(5, 4))  # statistics
    model = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double().eval()
    data = [(torch.rand(n, 2).double(), torch.rand(n, 2).double()) for n in (3, 2)]
    params = {name: p for name, p in model.named_parameters() if name.startswith("1.")}
    arguments = (model, nn.MSELoss(), params, data)
    K = kfac(model, data=data, fisher_type="type-2", separate_weight_and_bias=not joint)
    G = GGNLinearOperator(*arguments).to_dense()
    names, start = list(params), 0
    for name in names[: 1 if joint else None]:
        (B,) = K.factors(name)
        torch.testing.assert_close(B, G[start : start + len(B), start : start + len(B)])
        start += len(B)
    assert start == len(G)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_channel_groups_are_layers_of_their_own(kfac_approx: str):
    grouped = Uses(_images, c=nn.Conv2d(4, 2, 1, groups=2)).double()
    weights = grouped.c.weight[..., 0, 0].detach()
    split = Uses(
        lambda m, x: torch.cat([m.a(x[..., :2]), m.b(x[..., 2:])], dim=-1),
        a=_plain(weights[:1], grouped.c.bias[:1]),
        b=_plain(weights[1:], grouped.c.bias[1:]),
    ).double()
    first, last = nn.Linear(2, 4), nn.Linear(2, 2)
    models = [
        nn.Sequential(first, nn.Tanh(), m, nn.Tanh(), last).double() for m in (grouped, split)
    ]
    data = [(torch.rand(n, 4, 2).double(), torch.rand(n, 4, 2).double()) for n in (3, 2)]
    options = {"fisher_type": "type-2", "kfac_approx": kfac_approx, "data": data}
    actual, expected = (kfac(model, **options) for model in models)
    blocks = [expected.factors(f"2.{name}.weight") for name in "ab"]
    torch.testing.assert_close(actual.factors("2.c.weight"), blocks)
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        torch.testing.assert_close(actual.factors(name), expected.factors(name))


# ---- usages --------------------------------------------------------------------------------------
class Outside(nn.Module):
    """Uses a layer's parameters without calling the layer."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.lin, self.use = nn.Linear(2, 2), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    ("use", "name", "function"),
    [
        (lambda m, x: m.lin(x) + m.lin.bias, "lin.bias", "add"),
        (lambda m, x: m.lin(x) * torch.stack([m.lin.bias, m.lin.bias]).sum(), "lin.bias", "stack"),
        (lambda m, x: m.lin(x) + (m.lin.weight**2).sum(), "lin.weight", "pow"),
        (lambda m, x: Scale.apply(m.lin(x), m.lin.bias), "lin.bias", "mul"),
        (lambda m, x: Multiply.apply(m.lin(x), m.lin.weight), "lin.weight", r"\w+"),
        (lambda m, x: x.new_zeros(len(x), 2).copy_(m.lin.bias), "lin.bias", "copy_"),
        (lambda m, x: m.lin(x).add_(m.lin.weight[0]), "lin.weight", "add_"),
        (lambda m, x: functional_call(m.lin, dict(m.lin.named_parameters()), x) * m.lin.bias,
         "lin.bias", "mul"),
        (lambda m, x: m.lin(x) + torch.zeros_like(m.lin.bias).add(m.lin.bias), "lin.bias", "add"),
        (lambda m, x: m.lin(x).clamp(max=m.lin.weight.max()), "lin.weight", "max"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fisher_type", ["type-2", "forward-only"])
def test_use_outside_of_the_layer(
    use: Callable[[Any, Tensor], Tensor], name: str, function: str, fisher_type: str
):
    model = Outside(use)
    match = rf"not in supported layers: '{name}' \(used by {function}[ \w.]*\). Supported"
    with pytest.raises(NotImplementedError, match=match):
        kfac(model, fisher_type=fisher_type)
    assert not model.lin._forward_hooks
    if name == "lin.weight":  # as a constant, it may be used anywhere
        assert kfac(model, params={"lin.bias": model.lin.bias}).trace() >= 0


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("use", "same", "alone"),
    [
        (lambda m, x: F.linear(x, m.lin.weight), lambda m, x: m.other(x), False),
        (
            lambda m, x: m.lin(x) + F.linear(2 * x, m.lin.weight),
            lambda m, x: m.lin(x) + m.other(2 * x),
            False,
        ),
        (
            lambda m, x: m.lin(x).tanh() @ m.lin.weight.T,
            lambda m, x: m.other(m.lin(x).tanh()),
            False,
        ),
        (lambda m, x: torch.addmm(m.lin.bias, x, torch.eye(2)), lambda m, x: m.lin(x), True),
    ],
)
def test_layer_of_parameters_without_their_module(
    use: Callable[[Any, Tensor], Tensor],
    same: Callable[[Any, Tensor], Tensor],
    alone: bool,
    joint: bool,
):
    """Equals a model with several modules that share the weight."""
    model = Outside(use)
    plain = Outside(same)
    plain.other = nn.Linear(2, 2, bias=False)
    plain.lin.load_state_dict(model.lin.state_dict())
    plain.other.weight = plain.lin.weight
    if alone:
        plain.lin.weight = nn.Parameter(torch.eye(2))
    data = [(torch.rand(n, 2), torch.rand(n, 2)) for n in (3, 2)]
    names = ["lin.bias"] if alone else ["lin.weight", "lin.bias"]
    K, expected = (
        kfac(
            m,
            data=data,
            params={name: dict(m.named_parameters())[name] for name in names},
            fisher_type="type-2",
            separate_weight_and_bias=not joint,
        )
        for m in (model, plain)
    )
    assert expected.trace() > 0
    torch.testing.assert_close(K.to_dense(), expected.to_dense())


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.lin(x.to(m.lin.weight)),
        lambda m, x: m.lin(x.type_as(m.lin.bias)),
        lambda m, x: m.lin(x + torch.zeros_like(m.lin.bias) + m.lin.weight.new_zeros(2)),
        lambda m, x: m.lin(x) * m.lin.weight.shape[0] / m.lin.weight.dtype.itemsize,
        lambda m, x: m.lin(x) + m.lin.bias.detach() + m.lin.weight.data.sum(),
        lambda m, x: (
            m.lin(x) * m.lin.weight.detach().T[0] + m.lin.weight.data[:1] @ m.lin.bias.data
        ),
        lambda m, x: m.lin(x) * (1 if (m.lin.weight > 0).any() else 2) * m.lin.bias[0].item(),
        lambda m, x: F.linear(x, m.lin.weight.detach()) + m.lin(x),
        lambda m, x: m.lin(x) if m.lin.weight.T[:1].flatten().is_contiguous() else m.lin(2 * x),
    ],
)
def test_harmless_use_outside_of_the_layer(use: Callable[[Any, Tensor], Tensor]):
    model = Outside(use)
    data = [(torch.rand(1, 2), torch.rand(1, 2))]
    for name, p in model.named_parameters():  # exact for one example
        K, G = (
            operator(model, nn.MSELoss(), {name: p}, data, **options)
            for operator, options in (
                (KFACLinearOperator, {"fisher_type": "type-2"}),
                (GGNLinearOperator, {}),
            )
        )
        assert K.trace() > 0
        torch.testing.assert_close(K.to_dense(), G.to_dense())
    assert kfac(model).trace() > 0


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_use_in_a_hook_of_the_layer(kind: str):
    model = Outside(lambda m, x: m.lin(x))
    if kind == "forward_pre_hook":
        model.lin.register_forward_pre_hook(lambda module, args: (args[0] + module.bias,))
        function = "add"
    else:
        model.lin.register_forward_hook(lambda module, args, output: output * module.bias)
        function = "mul"
    match = rf"not in supported layers: 'lin.bias' \(used by {function}[ \w.]*\). Supported"
    with pytest.raises(NotImplementedError, match=match):
        kfac(model)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("batch", "approx"),
    [
        ((1, 3), "expand"),
        ((1, 3), "reduce"),
        ((2, 4), "expand"),
        ((2, 4), "reduce"),
        ((2, 3), "expand"),
        ((2, 3), "reduce"),
    ],
)
@pytest.mark.parametrize(
    "names", [None, ["out_proj.weight", "in_proj_bias"], ["in_proj_weight", "out_proj.bias"]]
)
def test_attention_does_not_call_its_projection(
    names: list[str] | None, batch: tuple[int, int], approx: str, need_weights: bool
):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(2, 1, batch_first=True)
            nn.init.normal_(self.attn.in_proj_bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=need_weights)[0].mean(1)

    class Plain(nn.Module):
        def __init__(self, attn: nn.MultiheadAttention) -> None:
            super().__init__()
            self.qkv = _plain(attn.in_proj_weight, attn.in_proj_bias)
            self.out = _plain(attn.out_proj.weight, attn.out_proj.bias)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return self.out(torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v).mean(1)

    model = Attention().double().eval()
    models: list[nn.Module] = [model, Plain(model.attn)]
    data = [(torch.rand(*batch, 2).double(), torch.rand(batch[0], 2).double())]
    torch.testing.assert_close(*(m(data[0][0]) for m in models))
    options = {"data": data, "fisher_type": "type-2", "kfac_approx": approx}
    plain_names = dict(
        zip(dict(model.named_parameters()), dict(models[1].named_parameters()), strict=True)
    )
    chosen = [f"attn.{name}" for name in names] if names else list(plain_names)
    K = kfac(
        model, params={name: dict(model.named_parameters())[name] for name in chosen}, **options
    )
    expected = kfac(models[1], **options)
    for name in chosen:
        torch.testing.assert_close(K.factors(name), expected.factors(plain_names[name]))


# ---- tied parameters -----------------------------------------------------------------------------
def tied(**changes: Any) -> Counted:
    model = Counted(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    for place, tensor in changes.items():
        layer, attribute = int(place[1]), place[2:]
        setattr(model.layers[layer], attribute, tensor(model.layers))
    return model


@pytest.mark.parametrize("names", [None, ["0.weight", "2.bias", "0.bias"]])
def test_conflicting_biases(names: list[str] | None):
    model = tied(_2weight=lambda layers: layers[0].weight)
    params = dict(model.named_parameters())
    if names is not None:
        params = {f"layers.{name}": params[f"layers.{name}"] for name in names}
    with pytest.raises(ValueError, match=r"conflicting biases.*layers.0.bias.*layers.2.bias"):
        kfac(model, params=params, separate_weight_and_bias=False)
    model.assert_looked_at()
    kfac(model, params=params)
    del params["layers.2.bias"]
    kfac(model, params=params, separate_weight_and_bias=False)


def test_a_bias_of_two_weights():
    model = tied(_2bias=lambda layers: layers[0].bias)
    params = dict(model.named_parameters())
    for left_out in ("nothing", "layers.2.weight"):
        params.pop(left_out, None)
        model.calls.clear()
        model.backwards = 0
        with pytest.raises(ValueError, match=r"'layers.0.bias' have conflicting biases or weights"):
            kfac(model, params=params, separate_weight_and_bias=False)
        model.assert_looked_at()
        kfac(model, params=params)
    del params["layers.0.weight"]
    kfac(model, params=params, separate_weight_and_bias=False)


def test_a_tied_parameter_is_given_once():
    model = tied(_2weight=lambda layers: layers[0].weight)
    given = {"layers.0.weight": torch.rand(2, 2), "layers.2.weight": torch.rand(2, 2)}
    with pytest.raises(ValueError, match=r"tied.*under one of its names"):
        kfac(model, params=given)
    by_name = [kfac(model, params={name: given[name]}, fisher_type="type-2") for name in given]
    del given["layers.2.weight"]
    assert by_name[0].mapping == [{"W": "layers.0.weight"}]
    assert by_name[1].mapping == [{"W": "layers.2.weight"}]


# ---- data ----------------------------------------------------------------------------------------
def test_wrong_number_of_loss_terms():
    data = [(torch.rand(2, 3, 2), torch.rand(2, 3, 2))]
    kfac(data=data, num_per_example_loss_terms=3)
    with pytest.raises(ValueError, match=r"num_per_example_loss_terms=2, .* have 3 loss"):
        kfac(data=data, num_per_example_loss_terms=2)


def test_wrong_batch_size_fn():
    data = [(torch.rand(6, 2), torch.rand(6, 2))]
    with pytest.raises(ValueError, match=r"4 examples.*batch_size_fn"):
        kfac(data=data, batch_size_fn=lambda X: 4)
    with pytest.raises(ValueError, match=r"batch_size_fn.*integer"):
        kfac(data=data, batch_size_fn=lambda X: 1.5)
    with pytest.raises(ValueError, match=r"3 examples.*num_data is 6"):
        kfac(data=data, batch_size_fn=lambda X: 3, num_data=6)


@pytest.mark.parametrize(
    ("sizes", "kfac_approx"),
    [
        *(((*sizes,), approx) for sizes in ([3, 2], [2], [4]) for approx in ("expand", "reduce")),
        ((1, 2), "expand"),
        ((1, 2), "reduce"),  # the first batch does not tell
        ((1, 3), "expand"),
    ],
)
def test_positions_before_examples(sizes: tuple[int, ...], kfac_approx: str):
    """Sequences with the positions first are not mixed up."""

    class Transposed(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    models = [kind(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)) for kind in (Transposed, Counted)]
    models[1].load_state_dict(models[0].state_dict())
    data = [(torch.rand(n, 4, 2), torch.rand(n, 4, 2)) for n in sizes]
    options = {"data": data, "fisher_type": "type-2", "kfac_approx": kfac_approx}
    K, expected = (kfac(model, **options) for model in models)
    torch.testing.assert_close(K.to_dense(), expected.to_dense())


def test_examples_that_are_nowhere():
    """Expand takes the rows that the layer sees; what needs those of an example refuses it."""

    class Odd(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([x[:1], x]))[1:]

    model, X = Odd(nn.Linear(2, 2)), torch.rand(3, 2)
    data = [(X, torch.rand(3, 2))]
    rows = torch.cat([X[:1], X])
    _, A = kfac(model, data=data).factors("layers.0.weight")
    torch.testing.assert_close(A, rows.T @ rows / 4)
    message = r"'layers.0.weight' \(its layer's examples cannot be told apart\), 'layers.0.bias'"
    with pytest.raises(NotImplementedError, match=message):
        kfac(model, data=data, kfac_approx="reduce")


def test_wrong_targets():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        kfac(data=[(torch.rand(2, 2), torch.rand(2, 3))])


def test_models_that_are_not_deterministic():
    model = Counted(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match=r"Dropout in training mode: layers.1"):
        kfac(model)
    model.assert_looked_at()
    kfac(model.eval())


class Noisy(nn.Module):
    """A linear layer; what it returns is random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x))


@pytest.mark.parametrize("memory_budget", [None, 10**6])
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_models_that_are_found_random_in_the_pass_for_the_factors(
    cls: Any, backend: str, memory_budget: int | None
):
    model = Noisy()
    data = [(torch.rand(8, 2), torch.rand(8, 2)) for _ in range(2)]
    options = {} if cls is KFOCLinearOperator else {"memory_budget": memory_budget}
    args = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    with pytest.raises(RuntimeError, match=r"It draws from torch's global random generator"):
        cls(*args, backend=backend, **options)
    cls(*args, backend=backend, check_deterministic=False, **options)


class Counting(nn.Module):
    """A linear layer, divided by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) / self.calls


@pytest.mark.parametrize("num_batches", [1, 2, 3])
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_models_that_count_their_calls(backend: str, num_batches: int):
    """A trace holds the number of one call: the check must compare it with the model itself."""
    model = Counting()
    data = [(torch.rand(8, 2), torch.rand(8, 2)) for _ in range(num_batches)]
    with pytest.raises(RuntimeError, match="the model is not deterministic"):
        kfac(model, data=data, backend=backend)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_data_that_can_be_read_once_or_change(backend: str):
    model = nn.Linear(2, 2)
    args = (model, nn.MSELoss(), dict(model.named_parameters()))

    def batches(scale: float) -> Any:
        return [(scale * torch.ones(3, 2), torch.rand(3, 2)) for _ in range(3)]

    class Changing:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(batches(float(self.passes)))

    iterator = iter(batches(1.0))

    class Once:
        def __iter__(self) -> Any:
            return iterator

    # a look at the model has taken one of the batches
    with pytest.raises(RuntimeError, match=r"differs between two passes.* 6 and 0.*only once"):
        KFACLinearOperator(*args, Once(), backend=backend)
    with pytest.raises(RuntimeError, match=r"The data differ between two passes \(X, y\)"):
        KFACLinearOperator(*args, Changing(), backend=backend)


def test_predictions_that_are_no_tensors():
    class Output(Counted):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    with pytest.raises(TypeError, match="must return a tensor, got dict"):
        kfac(Output(nn.Linear(2, 2)))


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_factors(value: float):
    model = Counted(nn.Linear(2, 3), nn.Linear(3, 2))
    X = torch.rand(2, 2)
    X[1, 0] = value
    with pytest.raises(RuntimeError, match=r"input factor of 'layers.0.weight' has non-finite"):
        kfac(model, data=[(X, torch.rand(2, 2))], check_deterministic=False)
    bias = {"layers.0.bias": torch.full((3,), value)}
    arguments = {"fisher_type": "empirical", "check_deterministic": False}
    with pytest.raises(RuntimeError, match=r"gradient factor of 'layers.0.bias' has non-finite"):
        kfac(model, params=bias, **arguments)
    with pytest.raises(RuntimeError, match=r"factor of 'layers.0.weight', 'layers.0.bias' has non"):
        kfac(
            model,
            data=[(X, torch.rand(2, 2))],
            check_deterministic=False,
            separate_weight_and_bias=False,
            max_factor_size=1,
        )


def test_computers_refuse_the_same():
    model = Counted(nn.Linear(2, 2))
    data = [(torch.rand(2, 2), torch.rand(2, 2))]
    build = partial(HooksKFACComputer, model, params=dict(model.named_parameters()), data=data)
    with pytest.raises(NotImplementedError, match="no closed forms"):
        build(loss_func=nn.L1Loss())
    with pytest.raises(ValueError, match="FisherType"):
        build(loss_func=nn.MSELoss(), fisher_type="type2")
    other = nn.Sequential(copy.deepcopy(model), nn.PReLU())
    arguments = (other, nn.MSELoss(), {"1.weight": torch.ones(1)}, data)
    with pytest.raises(NotImplementedError, match=r"not in supported layers: '1.weight' \(used by"):
        HooksKFACComputer(*arguments)
    computer = HooksKFACComputer(*arguments, check_deterministic=False)
    with pytest.raises(NotImplementedError, match=r"not in supported layers: '1.weight' \(used by"):
        computer.compute()
    with pytest.raises(ValueError, match="unsupported must be 'raise' or 'diagonal'"):
        HooksKFACComputer(*arguments, unsupported="ignore")
