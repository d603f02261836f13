"""Tests of ``curvlinops.risk.losses``: every formula against PyTorch's own losses and autograd."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from curvlinops._random import RandomSource
from curvlinops.risk.loss import CHUNK
from curvlinops.risk.losses import MSE, BCEWithLogits, CrossEntropy, GenericLoss, Loss, loss_entry

DOUBLE = torch.float64
IGNORED = -100


def _rand(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in (0, 1)."""
    generator = torch.Generator().manual_seed(seed + 17 * len(shape))
    return torch.rand(*shape, generator=generator, dtype=DOUBLE)


def _logits(*shape: int, seed: int = 1) -> Tensor:
    """Numbers of both signs and of different size."""
    return 6 * _rand(*shape, seed=seed) - 3


def _classes(num: int, *shape: int, ignored: int | None = None) -> Tensor:
    """Class indices; every third is ``ignored`` if given."""
    y = (num * _rand(*shape, seed=2)).long()
    if ignored is not None:
        y.view(-1)[1::3] = ignored
    return y


def _probabilities(*shape: int) -> Tensor:
    """Probability targets with classes in dimension 1."""
    return _logits(*shape, seed=3).softmax(1)


@dataclass
class Case:
    """A loss with data, and everything about it from PyTorch's loss and autograd."""

    name: str
    loss_cls: type[nn.Module]
    f: Tensor
    y: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def module(self, reduction: str) -> nn.Module:
        return self.loss_cls(reduction=reduction, **self.options)

    @cached_property
    def entry(self) -> Loss:
        return loss_entry(self.module("mean"))[0]

    @property
    def n(self) -> int:
        return self.f.shape[0]

    def terms(self, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Any]:
        return self.entry.terms(self.f.to(dtype), self.y)

    @cached_property
    def positions(self) -> Tensor:
        """Where a term's entries lie in the flattened prediction, ``[m, C]``, example-major."""
        where = torch.arange(self.f.numel()).reshape(self.f.shape)
        if self.loss_cls is not nn.CrossEntropyLoss:
            return where.reshape(-1, 1 if where.ndim == 1 else where.shape[-1])
        rows = [
            where[n].reshape(where.shape[1], -1)[:, position]
            for n in range(self.n)
            for position in range(where[0, 0].numel())
        ]
        return torch.stack(rows)

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the summed loss, ``[m, C]``."""
        # Before torch 2.7, the square loss of integers can be evaluated, but not differentiated.
        y = self.y.to(self.f.dtype) if self.loss_cls is nn.MSELoss else self.y
        return grad(lambda f: self.module("sum")(f, y))(self.f).flatten()[self.positions]

    @cached_property
    def hessians(self) -> Tensor:
        """Blocks of the Hessian of the summed loss, ``[m, C, C]``."""
        dim = self.f.numel()
        H = jacrev(jacrev(lambda f: self.module("sum")(f, self.y)))(self.f).reshape(dim, dim)
        blocks = torch.stack([H[p][:, p] for p in self.positions])
        assert torch.isclose(blocks.square().sum(), H.square().sum(), rtol=1e-12)
        return blocks

    def term_values(self) -> Tensor:
        """Un-averaged loss of each term, ``[m]``."""
        values = self.module("none")(self.f, self.y)
        if self.loss_cls is nn.CrossEntropyLoss:
            return values.flatten()
        return values.flatten()[self.positions].sum(-1)


def _ce(name: str, f: Tensor, y: Tensor, **options: Any) -> Case:
    return Case(f"CE-{name}", nn.CrossEntropyLoss, f, y, options)


def _bce(name: str, f: Tensor, y: Tensor, **options: Any) -> Case:
    return Case(f"BCE-{name}", nn.BCEWithLogitsLoss, f, y, options)


_W = 0.2 + _rand(4)
_ALL_INDEX = {"weight": _W, "ignore_index": 2, "label_smoothing": 0.3}
CASES = [
    Case("MSE-1d", nn.MSELoss, _logits(5), _rand(5)),
    Case("MSE-2d", nn.MSELoss, _logits(5, 3), _rand(5, 3)),
    Case("MSE-3d", nn.MSELoss, _logits(2, 4, 3), _rand(2, 4, 3)),
    Case("MSE-integers", nn.MSELoss, _logits(4, 3), _classes(5, 4, 3)),
    _ce("2d", _logits(6, 4), _classes(4, 6)),
    _ce("one-class", _logits(3, 1), _classes(1, 3)),
    _ce("sequence", _logits(2, 4, 3), _classes(4, 2, 3)),
    _ce("image", _logits(2, 3, 2, 3), _classes(3, 2, 2, 3)),
    _ce("image-square", _logits(2, 2, 2, 2), _classes(2, 2, 2, 2)),
    _ce("ignored", _logits(2, 4, 4), _classes(4, 2, 4, ignored=IGNORED)),
    _ce("ignored-a-class", _logits(8, 4), _classes(4, 8), ignore_index=1),
    _ce("weight", _logits(6, 4), _classes(4, 6), weight=_W),
    _ce("smoothing", _logits(6, 4), _classes(4, 6), label_smoothing=0.3),
    _ce("smoothing-1", _logits(6, 4), _classes(4, 6), label_smoothing=1.0),
    _ce("ignored-smoothing", _logits(6, 4), _classes(4, 6, ignored=IGNORED), label_smoothing=0.3),
    _ce("weight-smoothing", _logits(6, 4), _classes(4, 6), weight=_W, label_smoothing=0.3),
    _ce("all", _logits(2, 4, 5), _classes(4, 2, 5, ignored=2), **_ALL_INDEX),
    _ce(
        "all-outside", _logits(7, 4), _classes(4, 7, ignored=9), **{**_ALL_INDEX, "ignore_index": 9}
    ),
    _ce("prob", _logits(5, 4), _probabilities(5, 4)),
    _ce("prob-float32", _logits(5, 4), _probabilities(5, 4).float()),
    _ce("prob-unnormalised", _logits(5, 4), _rand(5, 4, seed=4)),
    _ce("prob-smoothing", _logits(5, 4), _rand(5, 4, seed=4), label_smoothing=0.3),
    _ce("prob-negative-ignore", _logits(5, 4), _probabilities(5, 4), ignore_index=-1),
    _ce("prob-image", _logits(2, 4, 3, 2), _probabilities(2, 4, 3, 2), weight=_W),
    _ce("prob-all", _logits(2, 4, 3), _rand(2, 4, 3), weight=_W, label_smoothing=0.3),
    _bce("1d", _logits(6), _rand(6)),
    _bce("2d", _logits(5, 3), _rand(5, 3)),
    _bce("3d", _logits(2, 4, 3), _rand(2, 4, 3).round()),
    _bce("weight-scalar", _logits(5, 3), _rand(5, 3), weight=torch.tensor(0.7, dtype=DOUBLE)),
    _bce("weight", _logits(2, 4, 3), _rand(2, 4, 3), weight=_rand(3)),
    _bce("weight-middle", _logits(2, 4, 3), _rand(2, 4, 3), weight=_rand(4, 1)),
    _bce("weight-batch", _logits(2, 4, 3), _rand(2, 4, 3), weight=_rand(2, 1, 3)),
    _bce("weight-batch-1d", _logits(6), _rand(6), weight=_rand(6, seed=5)),
    _bce("pos", _logits(2, 4, 3), _rand(2, 4, 3), pos_weight=3 * _rand(3)),
    _bce("pos-middle", _logits(2, 4, 3), _rand(2, 4, 3), pos_weight=3 * _rand(4, 3)),
    _bce("all", _logits(2, 4, 3), _rand(2, 4, 3), weight=_rand(4, 1), pos_weight=3 * _rand(3)),
]
OF_EACH_KIND = [
    case
    for case in CASES
    if case.name in {"MSE-3d", "CE-all", "CE-all-outside", "CE-prob-all", "BCE-3d", "BCE-all"}
]
all_cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
each_kind = pytest.mark.parametrize("case", OF_EACH_KIND, ids=[case.name for case in OF_EACH_KIND])


# --- terms, values and reductions


@all_cases
def test_terms(case: Case) -> None:
    """Terms are example-major and hold the loss's axis; gradients flow to the prediction."""
    f = case.f.clone().requires_grad_()
    F, targets = case.entry.terms(f, case.y)
    assert torch.equal(F, case.f.flatten()[case.positions])
    (gradient,) = torch.autograd.grad(F[1, 0], f)
    assert gradient.flatten().nonzero().tolist() == [[case.positions[1, 0]]]
    for leaf in targets if isinstance(targets, tuple) else [targets]:
        assert leaf.shape in {F.shape, F.shape[:1]}
    if not case.entry.options or case.name in {"BCE-1d", "BCE-2d", "BCE-3d"}:
        assert torch.equal(targets, case.y.flatten()[case.positions].to(DOUBLE))


@all_cases
def test_value(case: Case) -> None:
    """The value is PyTorch's sum, term by term."""
    F, targets = case.terms()
    torch.testing.assert_close(
        case.entry.value(F, targets, case.n), case.module("sum")(case.f, case.y)
    )
    torch.testing.assert_close(case.entry.term_values(F, targets), case.term_values())


@all_cases
@pytest.mark.parametrize("split", [1, None])
def test_normalizer_reproduces_mean(case: Case, split: int | None) -> None:
    """Values over normalizers of uneven batches are PyTorch's mean over all data at once."""
    f, y = case.f, case.y
    batches = [(f, y)] if split is None else [(f[:split], y[:split]), (f[split:], y[split:])]
    if split is not None and "weight-batch" in case.name:
        with pytest.raises(ValueError, match="cannot be broadcast"):
            [case.entry.terms(*batch) for batch in batches]
        return
    value, normalizer = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    for f_b, y_b in batches:
        F, targets = case.entry.terms(f_b, y_b)
        value += case.entry.value(F, targets, len(f_b))
        normalizer += case.entry.normalizer(F, targets, len(f_b))
    torch.testing.assert_close(value / normalizer, case.module("mean")(f, y))


def test_normalizer_when_everything_is_ignored() -> None:
    """The sum of no weights is 0, so the mean is PyTorch's nan."""
    loss = nn.CrossEntropyLoss()
    f, y = _logits(3, 4), torch.full((3,), IGNORED)
    entry, _ = loss_entry(loss)
    F, targets = entry.terms(f, y)
    mean = entry.value(F, targets, 3) / entry.normalizer(F, targets, 3)
    assert mean.isnan() and loss(f, y).isnan()
    for zero in (
        entry.grad(F, targets),
        entry.hess_vec(F, targets, F),
        entry.root_columns(F, targets),
        entry.sample(F, targets, _rand(3, 2, 1)),
    ):
        assert (zero == 0).all()


def test_normalizer_counts_exactly_in_low_precision() -> None:
    """More terms than bfloat16 can count are counted."""
    f, y = torch.zeros(1001, 2, dtype=torch.bfloat16), torch.zeros(1001, dtype=torch.long)
    for weight in (None, torch.ones(2)):
        entry, _ = loss_entry(nn.CrossEntropyLoss(weight=weight))
        # a comparison of tensors would round 1001 as well
        assert float(entry.normalizer(*entry.terms(f, y), 1001)) == 1001


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_type(dtype: torch.dtype) -> None:
    """Indices that PyTorch would refuse for their dtype alone are the same indices."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    f, y = _logits(6, 4), _classes(4, 6)
    F, targets = entry.terms(f, y.to(dtype))
    torch.testing.assert_close(
        entry.value(F, targets, 6), functional.cross_entropy(f, y, reduction="sum")
    )
    assert torch.equal(entry.grad(F, targets), entry.grad(*entry.terms(f, y)))


# --- derivatives


@all_cases
def test_grad(case: Case) -> None:
    """Closed-form gradients are autograd's, also of the entry's own value."""
    F, targets = case.terms()
    gradient = case.entry.grad(F, targets)
    torch.testing.assert_close(gradient, case.gradient)
    torch.testing.assert_close(gradient, grad(lambda F: case.entry.value(F, targets, case.n))(F))


@all_cases
def test_hess_vec(case: Case) -> None:
    """Closed-form products are those with autograd's Hessian, for any leading axes."""
    F, targets = case.terms()
    for leading in [(), (3,), (2, 3)]:
        V = _logits(*leading, *F.shape)
        truth = torch.einsum("mij,...mj->...mi", case.hessians, V)
        torch.testing.assert_close(case.entry.hess_vec(F, targets, V), truth)


@all_cases
def test_root(case: Case) -> None:
    """S Sᵀ is autograd's Hessian, and a selection of columns is what it says."""
    F, targets = case.terms()
    m, C = F.shape
    S = case.entry.root_columns(F, targets)
    V = case.entry.num_columns(C)
    assert S.shape == (V, m, C)
    torch.testing.assert_close(torch.einsum("vmi,vmj->mij", S, S), case.hessians)
    for columns in (
        slice(None),
        slice(1, None),
        slice(0, 0),
        torch.tensor([V - 1, 0, V - 1]),
        [V - 1, 0],
    ):
        expected = S[columns]
        torch.testing.assert_close(
            case.entry.root_columns(F, targets, columns), expected, rtol=0, atol=0
        )


@all_cases
def test_root_is_the_documented_one(case: Case) -> None:
    """Column c has the form of the formulas; S Sᵀ alone would allow any rotation."""
    F, targets = case.terms()
    S, H = case.entry.root_columns(F, targets), case.hessians
    if case.loss_cls is not nn.CrossEntropyLoss:
        expected = torch.diag_embed(H.diagonal(dim1=1, dim2=2).sqrt())
        torch.testing.assert_close(S, expected.permute(2, 0, 1))
        return
    k = case.entry.weight(F, targets)
    for p, weight, columns in zip(F.softmax(-1), k, S.unbind(1), strict=True):
        M, last = int(p.argmax()), len(p) - 1
        q = p / (1 + p[M].sqrt())
        q[M] = p[M].sqrt()
        unit = torch.eye(len(p), dtype=p.dtype)
        for v, column in enumerate(columns):  # the last class takes the place of the likeliest
            c = last if v == M else v
            torch.testing.assert_close(column, (weight * p[c]).sqrt() * (unit[c] - q))


def test_root_of_cross_entropy_for_any_likeliest_class() -> None:
    """One column less than classes, whichever is the likeliest; exact for confident ones, too."""
    entry = CrossEntropy()
    for C in (1, 2, 4):
        F = 3 * torch.eye(C, dtype=torch.float64) + _logits(C, C)
        S = entry.root_columns(F, torch.zeros(C, dtype=torch.long))
        assert S.shape == (max(C - 1, 1), C, C)
        p = F.softmax(-1)
        H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        torch.testing.assert_close(torch.einsum("vmi,vmj->mij", S, S), H)
    # entries between 1e-13 and 1e-4, which must not be lost in rounding errors of 1
    F = torch.tensor([[20.0, 0.0, -10.0], [0.0, 20.0, 10.0]])
    targets = torch.zeros(2, dtype=torch.long)
    S = entry.root_columns(F, targets).double()
    exact = jacrev(lambda F: F.softmax(-1))
    H = torch.stack([exact(f) for f in F.double()])
    torch.testing.assert_close(torch.einsum("vmi,vmj->mij", S, S), H, rtol=1e-5, atol=0)
    units = torch.eye(3).unsqueeze(1).expand(-1, 2, -1)  # [V, m, C]
    columns = entry.hess_vec(F, targets, units).double()
    torch.testing.assert_close(columns.permute(1, 2, 0), H, rtol=1e-5, atol=0)


@all_cases
def test_weight(case: Case) -> None:
    """The weight is the ratio between the Hessians with and without options."""
    F, targets = case.terms()
    k = case.entry.weight(F, targets)
    if k is None:
        assert not case.options
        return
    s = F.sigmoid()
    plain = s * (1 - s) if case.loss_cls is nn.BCEWithLogitsLoss else F.softmax(-1).square().sum(-1)
    traces = case.hessians.diagonal(dim1=1, dim2=2)
    if case.loss_cls is nn.CrossEntropyLoss:
        torch.testing.assert_close(traces.sum(-1), k * (1 - plain))
    else:
        torch.testing.assert_close(traces, k * plain)


def test_extreme_logits() -> None:
    """Large logits give finite results, and small curvatures do not cancel."""
    f = torch.tensor([[50.0, -50.0], [1e4, -1e4]], dtype=DOUBLE)
    for loss, y in (
        (nn.CrossEntropyLoss(), torch.tensor([0, 1])),
        (nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
    ):
        entry, _ = loss_entry(loss)
        F, targets = entry.terms(f, y)
        for result in (
            entry.value(F, targets, 2),
            entry.grad(F, targets),
            entry.hess_vec(F, targets, f),
            entry.root_columns(F, targets),
            entry.sample(F, targets, _rand(2, 3, entry.draws(2))),
        ):
            assert result.isfinite().all()
    entry, _ = loss_entry(nn.BCEWithLogitsLoss())
    curvature = entry.hess_vec(*entry.terms(f, f), torch.ones_like(f))[0]
    torch.testing.assert_close(
        curvature, torch.full_like(curvature, 1.9287498479639178e-22), rtol=1e-12, atol=0
    )


# --- transforms


# PyTorch's own warning, when the first forward-mode derivative of a process is computed
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each_kind
def test_function_transforms(case: Case) -> None:
    """Values, gradients and products can be differentiated in F and V, both ways, and vmapped."""
    entry = case.entry
    F, targets = case.terms()
    V, T = _logits(*F.shape, seed=6), _logits(*F.shape, seed=7)
    HV = entry.hess_vec(F, targets, V)

    def value(F: Tensor) -> Tensor:
        return entry.value(F, targets, case.n)

    def gradient(F: Tensor) -> Tensor:
        return entry.grad(F, targets)

    torch.testing.assert_close(jvp(value, (F,), (V,))[1], (entry.grad(F, targets) * V).sum())
    torch.testing.assert_close(jvp(grad(value), (F,), (V,))[1], HV)
    torch.testing.assert_close(jvp(gradient, (F,), (V,))[1], HV)
    torch.testing.assert_close(vjp(gradient, F)[1](V)[0], HV)

    def third_derivative(F: Tensor) -> Tensor:
        return entry.hess_vec(F, targets, V)

    # of autograd's gradient of the entry's value, forward over forward
    truth = jvp(lambda F: jvp(grad(value), (F,), (V,))[1], (F,), (T,))[1]
    torch.testing.assert_close(jvp(third_derivative, (F,), (T,))[1], truth)
    torch.testing.assert_close(vjp(third_derivative, F)[1](T)[0], truth)
    torch.testing.assert_close(
        vjp(lambda V: entry.hess_vec(F, targets, V), V)[1](T)[0], entry.hess_vec(F, targets, T)
    )

    VT = torch.stack([V, T])
    for fn in (
        lambda F: entry.value(F, targets, case.n),
        lambda F: entry.term_values(F, targets),
        lambda F: entry.grad(F, targets),
        lambda F: entry.hess_vec(F, targets, V),
        lambda F: entry.root_columns(F, targets),
    ):
        torch.testing.assert_close(vmap(fn)(VT), torch.stack([fn(V), fn(T)]))
    batched = vmap(lambda V: entry.hess_vec(F, targets, V))(VT)
    torch.testing.assert_close(batched, entry.hess_vec(F, targets, VT))


@each_kind
def test_vmap_over_examples(case: Case) -> None:
    """Per-example values from vmapped terms, the targets a vmapped argument too."""

    def per_example(f: Tensor, y: Tensor) -> Tensor:
        F, targets = case.entry.terms(f.unsqueeze(0), y.unsqueeze(0))
        return case.entry.value(F, targets, 1)

    truth = case.term_values().reshape(case.n, -1).sum(-1)
    torch.testing.assert_close(vmap(per_example)(case.f, case.y), truth)


@each_kind
def test_backward_through_double_backward(case: Case) -> None:
    """Reverse over reverse, as Hessian products use it, works for all options."""
    F, targets = case.terms()
    F = F.detach().requires_grad_()
    V = _logits(*F.shape, seed=6)
    (g,) = torch.autograd.grad(case.entry.value(F, targets, case.n), F, create_graph=True)
    (HV,) = torch.autograd.grad((g * V).sum(), F)
    torch.testing.assert_close(HV, case.entry.hess_vec(F.detach(), targets, V))


@pytest.mark.parametrize(
    "case",
    [case for case in OF_EACH_KIND if case.name in {"MSE-3d", "CE-all", "CE-prob-all", "BCE-all"}],
    ids=lambda case: case.name,
)
def test_compiles_without_graph_breaks(case: Case) -> None:
    """One graph holds everything from predictions and targets to samples."""
    entry = case.entry
    m, C = case.terms()[0].shape
    u = _rand(m, 2, entry.draws(C))

    def everything(f: Tensor, y: Tensor, u: Tensor) -> list[Tensor | float]:
        F, targets = entry.terms(f, y)
        return [
            entry.value(F, targets, f.shape[0]),
            entry.term_values(F, targets),
            entry.normalizer(F, targets, f.shape[0]),
            entry.grad(F, targets),
            entry.hess_vec(F, targets, F),
            entry.root_columns(F, targets, slice(0, 2)),
            entry.sample(F, targets, u),
        ]

    compiled = torch.compile(everything, fullgraph=True, backend="eager")(case.f, case.y, u)
    torch.testing.assert_close(compiled, everything(case.f, case.y, u))


# --- Monte-Carlo


@all_cases
def test_samples_have_mean_zero_and_second_moment_hessian(case: Case) -> None:
    """Would-be gradients match the Hessian within 5 standard errors, and independently of y.

    Catches a wrong scale (for example N(0, I) for the square loss), the empirical Fisher (with the
    given targets), and correlated entries.
    """
    F, targets = case.terms()
    m, C = F.shape
    # few terms suffice, in exchange for many samples
    num_samples, draws = 120_000 // m, case.entry.draws(C)
    uniforms = RandomSource(0).uniforms("samples", 0, m, num_samples * draws)
    samples = case.entry.sample(F, targets, uniforms.reshape(m, num_samples, draws))
    assert samples.shape == (num_samples, m, C)
    assert samples.dtype == DOUBLE

    for statistic, truth in (
        (samples, torch.zeros_like(F)),
        (torch.einsum("smi,smj->smij", samples, samples), case.hessians),
    ):
        error = (statistic.mean(0) - truth).abs()
        standard_error = statistic.std(0) / num_samples**0.5
        assert (error <= 5 * standard_error + 1e-12).all()


@all_cases
def test_samples_are_the_same_in_chunks_and_every_call(case: Case) -> None:
    """Samples are a function of prediction and uniforms, term by term and sample by sample."""
    F, targets = case.terms()
    m, C = F.shape
    u = _rand(m, 3, case.entry.draws(C))
    state = torch.get_rng_state()
    samples = case.entry.sample(F, targets, u)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(samples, case.entry.sample(F, targets, u))
    assert torch.equal(samples[1:2], case.entry.sample(F, targets, u[:, 1:2]))
    for i in range(m):
        one = slice(i, i + 1)
        target = tree_map(lambda leaf, one=one: leaf[one], targets)
        assert torch.equal(samples[:, one], case.entry.sample(F[one], target, u[one]))
    assert case.entry.sample(F, targets, u[:, :0]).shape == (0, m, C)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_samples_are_the_same_for_every_layout(loss: nn.Module) -> None:
    """The same terms as [m, C], as a sequence and as a transposed view give identical samples."""
    entry, _ = loss_entry(loss)
    is_ce = isinstance(loss, nn.CrossEntropyLoss)
    m, C = 64, 37
    flat = _logits(m, C)
    y = _classes(C, m) if is_ce else _rand(m, C)
    u = _rand(m, 5, entry.draws(C))
    F, targets = entry.terms(flat, y)
    samples = entry.sample(F, targets, u)

    f = flat.reshape(8, 8, C)
    f = f.movedim(-1, 1).contiguous() if is_ce else f
    layouts = [entry.terms(f, y.reshape(8, 8, *y.shape[1:]))]
    layouts += [entry.terms(flat.T.contiguous().T, y)]
    assert not layouts[-1][0].is_contiguous()
    for layout in layouts:
        assert torch.equal(samples, entry.sample(*layout, u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_samples_do_not_depend_on_dtype(loss: nn.Module, dtype: torch.dtype) -> None:
    """The same prediction in another dtype gives the same samples, rounded.

    Uniforms stay float64: in bfloat16 many of them would be rounded over a class boundary.
    """
    entry, _ = loss_entry(loss)
    f = _logits(500, 50).to(dtype)
    y = _classes(50, 500) if isinstance(loss, nn.CrossEntropyLoss) else _rand(500, 50)
    u = _rand(500, 4, entry.draws(50))
    samples = entry.sample(*entry.terms(f, y), u)
    assert samples.dtype == dtype
    reference = entry.sample(*entry.terms(f.to(DOUBLE), y), u)
    assert torch.equal(samples, reference.to(dtype))


def test_classes_invert_the_distribution_function() -> None:
    """Uniforms just below and above a boundary draw the class before and after it."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    p = torch.tensor([0.1, 0.25, 0.5, 0.15], dtype=DOUBLE)
    f = p.log().unsqueeze(0)
    near = 1e-13  # a distribution function in float32 is off by more
    below, above = [0.1 - near, 0.35 - near, 0.85 - near], [0.1 + near, 0.35 + near, 0.85 + near]
    u = torch.tensor([1e-300, *below, *above, 1 - 2.0**-53], dtype=DOUBLE)
    F, targets = entry.terms(f, torch.tensor([0]))
    samples = entry.sample(F, targets, u.reshape(1, -1, 1))[:, 0]
    drawn = [0, 0, 1, 2, 1, 2, 3, 3]
    assert samples.argmin(-1).tolist() == drawn
    one_hot = torch.eye(4, dtype=DOUBLE)[drawn]
    torch.testing.assert_close(samples, p - one_hot)


def test_impossible_classes_are_never_drawn() -> None:
    """Classes of probability zero are not drawn at either end, and no index leaves the range."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    inf = float("inf")
    rows = [
        [-inf, 0.3, -inf, 1.1, -inf],
        [-inf, -inf, -inf, -inf, 0.0],
        [0.0, -inf, -inf, -inf, -inf],
        [-1e4, 0.1, -1e4, 0.2, -1e4],
    ]
    f = torch.tensor(rows, dtype=DOUBLE)
    extremes = [0.0, 2.0**-1074, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0]
    u = torch.tensor(extremes, dtype=DOUBLE).reshape(1, -1, 1).expand(4, -1, -1)
    F, targets = entry.terms(f, torch.tensor([1, 4, 0, 1]))
    samples = entry.sample(F, targets, u)
    assert samples.isfinite().all()
    drawn = samples.argmin(-1)  # [S, m]
    assert drawn[:, 0].tolist() == [1, 1, 1, 3, 3, 3]
    # rows 1 and 2 are certain: the would-be gradient vanishes
    assert (samples[:, 1:3] == 0).all()
    assert drawn[:, 3].tolist() == [1, 1, 1, 3, 3, 3]


def test_rounded_distribution_functions_stay_in_range() -> None:
    """The largest uniform draws a valid class where cumulated probabilities round below 1."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    f = _logits(200, 1000)
    assert (f.softmax(-1).cumsum(-1)[:, -1] < 1 - 2.0**-53).any()
    u = torch.full((200, 1, 1), 1 - 2.0**-53, dtype=DOUBLE)
    F, targets = entry.terms(f, _classes(1000, 200))
    assert (entry.sample(F, targets, u)[0].argmin(-1) == 999).all()


def test_not_a_number_is_passed_on() -> None:
    """A nan in the logits gives nan samples instead of an index out of range."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    F, targets = entry.terms(torch.full((1, 3), float("nan")), torch.tensor([0]))
    assert entry.sample(F, targets, _rand(1, 2, 1)).isnan().all()


def test_confident_samples_do_not_cancel() -> None:
    """The entry p_y - 1 is accurate in float32 although p_y rounds to 1."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    F, targets = entry.terms(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    sample = entry.sample(F, targets, torch.full((1, 1, 1), 0.5))
    small = torch.tensor(20.0, dtype=DOUBLE).neg().sigmoid().float()
    torch.testing.assert_close(sample, torch.stack([-small, small])[None, None], rtol=1e-6, atol=0)


def test_square_loss_samples_are_gaussian() -> None:
    """Samples are quantiles of N(0, 2), tails included."""
    entry, _ = loss_entry(nn.MSELoss())
    u = torch.tensor([2.0**-53, 1e-6, 0.1, 0.5, 0.9, 1 - 2.0**-53], dtype=DOUBLE)
    F, targets = entry.terms(_logits(1, 6), _rand(1, 6))
    samples = entry.sample(F, targets, u.reshape(1, 1, 6)).flatten()
    torch.testing.assert_close(samples, 2**0.5 * torch.special.ndtri(u), rtol=1e-6, atol=1e-12)


def test_bernoulli_samples_compare_with_sigmoid() -> None:
    """The would-be target is 1 for uniforms below σ."""
    entry, _ = loss_entry(nn.BCEWithLogitsLoss())
    f = torch.tensor([[1.0, 1.0, -1.0]], dtype=DOUBLE)
    F, targets = entry.terms(f, torch.zeros_like(f))
    sigma = f.sigmoid()[0]
    u = torch.stack([sigma - 1e-12, sigma + 1e-12])[None]
    samples = entry.sample(F, targets, u)[:, 0]
    torch.testing.assert_close(samples, torch.stack([sigma - 1, sigma]))


@each_kind
@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (2, 1)])
def test_wrong_shape_of_uniforms(case: Case, wrong: tuple[int, int]) -> None:
    """Uniforms of another shape are refused instead of broadcast."""
    F, targets = case.terms()
    m, C = F.shape
    draws = case.entry.draws(C)
    shape = [(m + 1, 2, draws), (m, 2, draws + 1), (m, draws)][wrong[0]]
    with pytest.raises(ValueError, match=rf"\[{m}, samples, {draws}\]"):
        case.entry.sample(F, targets, _rand(*shape))


def test_draws_and_columns() -> None:
    """Cross-entropy needs one uniform per sample, the others one per entry."""
    assert [entry.draws(7) for entry in (CrossEntropy(), MSE(), BCEWithLogits())] == [1, 7, 7]
    columns = [entry.num_columns(7) for entry in (CrossEntropy(), MSE(), BCEWithLogits())]
    assert columns == [6, 7, 7]


# --- products with outer products of gradients


@all_cases
def test_sampled_hess_vec(case: Case) -> None:
    """The product is that with the second moment of the samples, for any leading axes."""
    F, targets = case.terms()
    u = _rand(len(F), 5, case.entry.draws(F.shape[1]))
    samples = case.entry.sample(F, targets, u)
    for leading in [(), (3,), (2, 3), (0,)]:
        V = _logits(*leading, *F.shape)
        truth = torch.einsum("smi,smj,...mj->...mi", samples, samples, V) / 5
        torch.testing.assert_close(case.entry.sampled_hess_vec(F, targets, u, V), truth)
        default = Loss.sampled_hess_vec(case.entry, F, targets, u, V)
        torch.testing.assert_close(default, truth)


@all_cases
def test_grad_outer_vec(case: Case) -> None:
    """The product is that with the gradient's outer product, for any leading axes."""
    F, targets = case.terms()
    for leading in [(), (3,), (2, 3), (0,)]:
        V = _logits(*leading, *F.shape)
        truth = torch.einsum("mi,mj,...mj->...mi", case.gradient, case.gradient, V)
        torch.testing.assert_close(case.entry.grad_outer_vec(F, targets, V), truth)


@each_kind
def test_products_are_differentiable(case: Case) -> None:
    """The outer product in the prediction, and both products in the vector."""
    entry = case.entry
    F, targets = case.terms()
    V, T = _logits(*F.shape, seed=6), _logits(*F.shape, seed=7)
    u = _rand(len(F), 2, entry.draws(F.shape[1]))
    g, HT = entry.grad(F, targets), entry.hess_vec(F, targets, T)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    derivative = HT * dot(g, V) + g * dot(HT, V)
    torch.testing.assert_close(
        jvp(lambda F: entry.grad_outer_vec(F, targets, V), (F,), (T,))[1], derivative
    )
    for multiply in (
        partial(entry.grad_outer_vec, F, targets),
        partial(entry.sampled_hess_vec, F, targets, u),
        partial(Loss.sampled_hess_vec, entry, F, targets, u),
    ):
        torch.testing.assert_close(jvp(multiply, (V,), (T,))[1], multiply(T))
        torch.testing.assert_close(vjp(multiply, V)[1](T)[0], multiply(T))


@each_kind
def test_wrong_uniforms_of_products(case: Case) -> None:
    """Uniforms of another shape, or none at all, are refused."""
    F, targets = case.terms()
    m, C = F.shape
    draws = case.entry.draws(C)
    for cls in (type(case.entry), Loss):
        multiply = partial(cls.sampled_hess_vec, case.entry, F, targets)
        for shape in [(m + 1, 2, draws), (m, 2, draws + 1), (m, draws)]:
            with pytest.raises(ValueError, match=rf"\[{m}, samples, {draws}\]"):
                multiply(_rand(*shape), F)
        with pytest.raises(ValueError, match="at least one sample"):
            multiply(_rand(m, 0, draws), F)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_products_in_half_precision(loss: nn.Module) -> None:
    """Sums over many samples and entries are exact; the results are rounded once."""
    entry, _ = loss_entry(loss)
    f = _logits(20, 50).to(torch.bfloat16)
    y = _classes(50, 20) if isinstance(loss, nn.CrossEntropyLoss) else _rand(20, 50)
    V = _logits(20, 50, seed=6).to(torch.bfloat16)
    u = _rand(20, 1000, entry.draws(50))
    for method, args in [("sampled_hess_vec", (u,)), ("grad_outer_vec", ())]:
        result = getattr(entry, method)(*entry.terms(f, y), *args, V)
        assert result.dtype == torch.bfloat16
        truth = getattr(entry, method)(*entry.terms(f.to(DOUBLE), y), *args, V.to(DOUBLE))
        error = (result.to(DOUBLE) - truth).norm() / truth.norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_confident_products_do_not_cancel() -> None:
    """The Monte-Carlo estimate is accurate in float32 although p_y rounds to 1."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    F, targets = entry.terms(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    u = torch.full((1, 2, 1), 0.5, dtype=DOUBLE)
    V = torch.tensor([[1.0, -1.0]])
    small = torch.tensor(20.0, dtype=DOUBLE).neg().sigmoid()
    expected = 2 * small**2 * torch.tensor([[1, -1]])
    product = entry.sampled_hess_vec(F, targets, u, V)
    torch.testing.assert_close(product, expected.float(), rtol=1e-6, atol=0)


# --- memory


def _transform(fn: Callable[[Tensor], Tensor], F: Tensor, V: Tensor) -> list[Tensor]:
    """A function's value and derivatives, alone and mapped."""
    both = torch.stack([F, V])
    outer = vjp(lambda FV: vmap(fn)(FV), both)
    return [
        fn(F),
        vmap(fn)(both),
        vjp(fn, F)[1](fn(F))[0],
        jvp(fn, (F,), (V,))[1],
        vmap(lambda v: vjp(fn, F)[1](fn(v))[0])(both),
        vmap(lambda v: jvp(fn, (F,), (v,))[1])(both),
        outer[1](outer[0])[0],
        torch.autograd.functional.vjp(fn, F, fn(F))[1],
    ]


@each_kind
@pytest.mark.parametrize("chunk", [11])
def test_chunks_do_not_matter(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few loss terms at a time give the same numbers, under all transformations."""
    entry = case.entry
    F, targets = case.terms()
    V, u = _logits(2, *F.shape, seed=6), _rand(F.shape[0], 2, entry.draws(F.shape[1]))

    def everything() -> list[Tensor]:
        results = [entry.sample(F, targets, u[:, :0])]
        for fn in (
            lambda F: entry.grad(F, targets),
            lambda F: entry.hess_vec(F, targets, V),
            lambda F: entry.hess_vec(V[1], targets, F),
            lambda F: entry.sampled_hess_vec(V[1], targets, u, F),
            lambda F: entry.grad_outer_vec(F, targets, V),
        ):
            results += _transform(fn, F, V[0])
        for fn in (
            lambda F: entry.sample(F, targets, u),
            lambda F: entry.sampled_hess_vec(F, targets, u, V),
        ):
            results += [fn(F), vmap(fn)(V)]
        return results

    expected = everything()
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    torch.testing.assert_close(everything(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["CE-ignored-smoothing", "BCE-all"])
def test_chunks_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are part of one graph."""
    (case,) = (case for case in CASES if case.name == name)
    entry = case.entry
    F, targets = case.terms()
    monkeypatch.setitem(CHUNK, "cpu", F.numel() - 1)  # two chunks
    u = _rand(F.shape[0], 2, entry.draws(F.shape[1]))

    def everything(F: Tensor, u: Tensor) -> list[Tensor]:
        return [
            vjp(lambda F: entry.grad(F, targets), F)[1](F)[0],
            entry.sampled_hess_vec(F, targets, u, F),
            entry.grad_outer_vec(F, targets, entry.hess_vec(F, targets, F)),
            entry.sample(F, targets, u),
        ]

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # copies into parts would be copies of the whole, once a compiler has made them functional
        assert not [node for node in graph.graph.nodes if "copy" in str(node.target)]
        return graph.forward

    compiled = torch.compile(everything, fullgraph=True, backend=backend)(F, u)
    torch.testing.assert_close(compiled, everything(F, u))


def test_chunks_are_one_node_in_reverse_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies into parts would each touch the whole gradient, as would slices of the prediction."""
    (case,) = (case for case in CASES if case.name == "BCE-all")
    F, targets = case.terms()
    monkeypatch.setitem(CHUNK, "cpu", 1)
    F = F.clone().requires_grad_()
    names, todo = [], [case.entry.grad(F, targets).grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [following for following, _ in node.next_functions if following is not None]
    assert names.count("CatBackward0") == 1 and "SplitBackward0" in names
    assert not {"CopySlices", "SliceBackward0"} & set(names)


@each_kind
def test_targets_can_be_mapped(case: Case) -> None:
    """One prediction with several targets: results in place would not do."""
    entry = case.entry
    F, targets = case.terms()
    both = tree_map(lambda leaf: torch.stack([leaf, leaf.flip(0)]), targets)
    u = _rand(F.shape[0], 2, entry.draws(F.shape[1]))
    for fn in (
        lambda t: entry.grad(F, t),
        lambda t: entry.hess_vec(F, t, F),
        lambda t: entry.sample(F, t, u),
        lambda t: entry.sampled_hess_vec(F, t, u, F),
        lambda t: entry.grad_outer_vec(F, t, F),
    ):
        each = [fn(tree_map(lambda leaf, i=i: leaf[i], both)) for i in (0, 1)]
        torch.testing.assert_close(vmap(fn)(both), torch.stack(each))


def _peak(path: Path, function: Callable[[], Any]) -> int:
    """The most bytes that a call holds at once, besides what there was, as the allocator sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


_C = 50_000
LARGE = {
    "CE": (nn.CrossEntropyLoss(), 0.1),
    "CE options": (nn.CrossEntropyLoss(weight=torch.rand(_C), label_smoothing=0.1), 1.0),
    "CE probabilities": (nn.CrossEntropyLoss(), 0.1),
    "CE weighted probabilities": (nn.CrossEntropyLoss(weight=torch.rand(_C)), 1.0),
    "BCE": (nn.BCEWithLogitsLoss(), 0.1),
    "BCE options": (nn.BCEWithLogitsLoss(pos_weight=torch.rand(_C)), 2.0),
    "MSE": (nn.MSELoss(), 0.1),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_for_a_large_vocabulary(name: str, tmp_path: Path) -> None:
    """Besides a result, there is at most one tensor as large as the logits; no float64 copy."""
    loss, recorded = LARGE[name]
    entry, _ = loss_entry(loss)
    f = torch.randn(64, _C)
    y = f.softmax(-1) if name.startswith("BCE") or "prob" in name else torch.randn(64, _C)
    y = torch.randint(_C, (64,)) if name in ("CE", "CE options") else y
    F, targets = entry.terms(f, y)
    V = torch.randn(64, _C)
    u = _rand(64, 1, entry.draws(_C))
    logits = 4 * F.numel()

    def besides(result: int, function: Callable[[], Any]) -> float:
        return _peak(tmp_path / "trace.json", function) / logits - result

    assert besides(1, lambda: entry.hess_vec(F, targets, V)) < 0.5
    assert besides(3, lambda: entry.hess_vec(F, targets, torch.stack([V, V]))) < 2.5
    assert besides(1, lambda: entry.sample(F, targets, u)) < 0.7
    assert besides(1, lambda: entry.sampled_hess_vec(F, targets, u, V)) < 1.0
    assert besides(1, lambda: entry.grad_outer_vec(F, targets, V)) < 0.5
    assert besides(1, lambda: entry.grad(F, targets)) < 1.1
    # with a graph: what is saved for the derivatives stays
    G = F.clone().requires_grad_()
    assert besides(1, lambda: entry.grad(G, targets)) < 1.1 + recorded
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        entry.grad(G, targets)
    large = sum(numel for numel in saved) / F.numel()
    assert large < {"MSE": 0.1, "BCE options": 2.1}.get(name, 1.1)


# --- dtypes


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    """Results have the prediction's dtype and its accuracy; options of another dtype are moved."""
    f = case.f.to(dtype)
    F, targets = case.entry.terms(f, case.y)
    F64, targets64 = case.entry.terms(f.to(DOUBLE), case.y)
    u = _rand(F.shape[0], 2, case.entry.draws(F.shape[1]))
    V = _logits(*F.shape, seed=6).to(dtype)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    for fn in (
        lambda F, t: case.entry.value(F, t, case.n),
        case.entry.term_values,
        case.entry.grad,
        lambda F, t: case.entry.hess_vec(F, t, V.to(F.dtype)),
        case.entry.root_columns,
        lambda F, t: case.entry.sample(F, t, u),
        lambda F, t: case.entry.sampled_hess_vec(F, t, u, V.to(F.dtype)),
        lambda F, t: case.entry.grad_outer_vec(F, t, V.to(F.dtype)),
    ):
        result = fn(F, targets)
        assert result.dtype == dtype
        torch.testing.assert_close(result.to(DOUBLE), fn(F64, targets64), **tolerance)


# --- errors of terms


@pytest.mark.parametrize(
    ("loss", "f", "y", "message"),
    [
        (nn.CrossEntropyLoss(), torch.rand(3), torch.tensor(1), r"\(3,\).*Add a batch dimension"),
        (nn.CrossEntropyLoss(), torch.rand(5, 3), torch.zeros(4).long(), r"\(5, 3\).*\(4,\)"),
        (nn.CrossEntropyLoss(), torch.rand(5, 3), torch.zeros(5, 1).long(), r"\(5, 3\).*\(5, 1\)"),
        (nn.CrossEntropyLoss(), torch.rand(5, 3), torch.rand(5), r"int.*\(5, 3\).*float32.*\(5,\)"),
        (nn.CrossEntropyLoss(), torch.rand(5, 3), torch.zeros(5, 3).long(), r"int64.*\(5, 3\)"),
        (nn.CrossEntropyLoss(), torch.rand(5, 3), torch.zeros(5).bool(), r"bool.*\(5,\)"),
        # classes last, as the elementwise losses have them
        (
            nn.CrossEntropyLoss(),
            torch.rand(2, 5, 3),
            torch.zeros(2, 5).long(),
            r"\(2, 3\).*\(2, 5\)",
        ),
        (
            nn.CrossEntropyLoss(),
            torch.rand(2, 5, 3),
            torch.rand(2, 3, 5),
            r"\(2, 5, 3\).*\(2, 3, 5\)",
        ),
        (nn.CrossEntropyLoss(), torch.ones(5, 3).long(), torch.zeros(5).long(), "floating point"),
        (
            nn.CrossEntropyLoss(weight=torch.ones(1)),
            torch.rand(5, 3),
            torch.zeros(5).long(),
            r"weight must have shape \(3,\).*\(1,\)",
        ),
        (
            nn.CrossEntropyLoss(ignore_index=1),
            torch.rand(5, 3),
            torch.rand(5, 3),
            "ignore_index=1 is not supported for probability targets",
        ),
        (nn.MSELoss(), torch.rand(5, 3), torch.rand(5), r"\(5, 3\).*\(5,\)"),
        (nn.MSELoss(), torch.rand(5, 1), torch.rand(5), r"\(5, 1\).*\(5,\)"),
        (nn.MSELoss(), torch.rand(5), torch.rand(5, 1), r"\(5,\).*\(5, 1\)"),
        (nn.MSELoss(), torch.rand(()), torch.rand(()), "Add a batch dimension"),
        (nn.MSELoss(), torch.ones(5).long(), torch.rand(5), "floating point"),
        (nn.MSELoss(), torch.rand(5), torch.rand(5).to(torch.complex64), "real"),
        (nn.BCEWithLogitsLoss(), torch.rand(5, 3), torch.rand(3), r"\(5, 3\).*\(3,\)"),
        (nn.BCEWithLogitsLoss(), torch.ones(5).long(), torch.rand(5), "floating point"),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(2)),
            torch.rand(5, 3),
            torch.rand(5, 3),
            r"weight of shape \(2,\) cannot be broadcast.*\(5, 3\)",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(4, 5, 3)),
            torch.rand(5, 3),
            torch.rand(5, 3),
            r"pos_weight of shape \(4, 5, 3\) cannot be broadcast.*\(5, 3\)",
        ),
    ],
)
def test_wrong_predictions_or_targets(loss: nn.Module, f: Tensor, y: Tensor, message: str) -> None:
    """Shapes and dtypes that do not fit are refused with both of them named."""
    entry, _ = loss_entry(loss)
    with pytest.raises(ValueError, match=message):
        entry.terms(f, y)


def test_targets_out_of_range_are_pytorchs_error() -> None:
    """Class indices outside the range are not accepted silently."""
    entry, _ = loss_entry(nn.CrossEntropyLoss())
    F, targets = entry.terms(torch.rand(2, 3), torch.tensor([0, 3]))
    with pytest.raises((IndexError, RuntimeError)):
        entry.value(F, targets, 2)
    with pytest.raises((IndexError, RuntimeError)):
        entry.grad(F, targets)


# --- recognising losses


class _OwnForward(nn.CrossEntropyLoss):
    """Not the cross-entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class _Renamed(nn.CrossEntropyLoss):
    """The cross-entropy under another name."""


class _CallableLoss:
    """A loss that is no module."""

    reduction = "sum"

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs().sum()


def _l1(f: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    """A loss that PyTorch does not know."""
    return functional.l1_loss(f, y, reduction=reduction)


def _hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, output: 2 * output)
    return loss


def _pre_hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1]))
    return loss


def _patched() -> nn.Module:
    loss = nn.MSELoss()
    loss.forward = lambda f, y: (f - y).abs().mean()
    return loss


@pytest.mark.parametrize(
    ("loss", "entry_type", "reduction"),
    [
        (nn.MSELoss(), MSE, "mean"),
        (nn.MSELoss(reduction="sum"), MSE, "sum"),
        (nn.CrossEntropyLoss(), CrossEntropy, "mean"),
        (nn.CrossEntropyLoss(reduction="sum"), CrossEntropy, "sum"),
        (nn.BCEWithLogitsLoss(), BCEWithLogits, "mean"),
        (nn.BCEWithLogitsLoss(reduction="sum"), BCEWithLogits, "sum"),
        (_Renamed(reduction="sum"), CrossEntropy, "sum"),
        (functional.mse_loss, MSE, "mean"),
        (functional.cross_entropy, CrossEntropy, "mean"),
        (functional.binary_cross_entropy_with_logits, BCEWithLogits, "mean"),
        (partial(functional.mse_loss, reduction="sum"), MSE, "sum"),
        (partial(partial(functional.mse_loss, reduction="sum"), reduction="mean"), MSE, "mean"),
        (partial(functional.cross_entropy, weight=None, size_average=None), CrossEntropy, "mean"),
        (_OwnForward(reduction="sum"), GenericLoss, "sum"),
        (_hooked(), GenericLoss, "mean"),
        (_pre_hooked(), GenericLoss, "mean"),
        (_patched(), GenericLoss, "mean"),
        (nn.L1Loss(), GenericLoss, "mean"),
        (nn.BCELoss(reduction="sum"), GenericLoss, "sum"),
        (_CallableLoss(), GenericLoss, "sum"),
        (_l1, GenericLoss, "sum"),
        (partial(_l1, reduction="mean"), GenericLoss, "mean"),
        (lambda f, y, reduction="mean": f.sum(), GenericLoss, "mean"),
        (lambda f, y, *, reduction="sum": f.sum(), GenericLoss, "sum"),
        (partial(lambda f, y, **options: f.sum(), reduction="sum"), GenericLoss, "sum"),
        (partial(nn.MSELoss()), GenericLoss, "mean"),
    ],
)
def test_recognition(loss: Any, entry_type: type[Loss], reduction: str) -> None:
    """Losses are recognised by what they do, not by name or base class."""
    entry, found = loss_entry(loss)
    assert type(entry) is entry_type
    assert found == reduction
    assert entry.closed_form == (entry_type is not GenericLoss)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_deprecated_reduction() -> None:
    """For modules only the attribute that PyTorch derives from deprecated arguments counts."""
    assert loss_entry(nn.MSELoss(size_average=False))[1] == "sum"
    assert loss_entry(nn.CrossEntropyLoss(reduce=True))[1] == "mean"


def test_options_are_read() -> None:
    """Options come from modules and from functions alike."""
    w = torch.tensor([1.0, 2.0, 3.0])
    ce = {"weight": w, "ignore_index": 1, "label_smoothing": 0.1}
    for loss in (nn.CrossEntropyLoss(**ce), partial(functional.cross_entropy, **ce)):
        entry, _ = loss_entry(loss)
        assert isinstance(entry, CrossEntropy)
        assert torch.equal(entry.class_weight, w)
        assert (entry.ignore_index, entry.label_smoothing) == (1, 0.1)
    bce = {"weight": w, "pos_weight": 2 * w}
    for loss in (
        nn.BCEWithLogitsLoss(**bce),
        partial(functional.binary_cross_entropy_with_logits, **bce),
    ):
        entry, _ = loss_entry(loss)
        assert isinstance(entry, BCEWithLogits)
        assert torch.equal(entry.entry_weight, w)
        assert torch.equal(entry.pos_weight, 2 * w)


def test_options_from_inference_mode_and_with_gradients() -> None:
    """Weights that autograd cannot save or would track are usable constants."""
    with torch.inference_mode():
        w = torch.ones(3)
        inside, _ = loss_entry(nn.CrossEntropyLoss(weight=w))
    outside, _ = loss_entry(nn.CrossEntropyLoss(weight=w))
    tracked, _ = loss_entry(nn.CrossEntropyLoss(weight=torch.ones(3, requires_grad=True)))
    for entry in (inside, outside, tracked):
        f = torch.rand(2, 3, requires_grad=True)
        F, targets = entry.terms(f, torch.tensor([0, 1]))
        entry.value(F, targets, 2).backward()
        torch.testing.assert_close(f.grad, entry.grad(F, targets))
    source = torch.ones(3)
    entry, _ = loss_entry(nn.CrossEntropyLoss(weight=source))
    source.mul_(2)
    assert torch.equal(entry.class_weight, source)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss(reduction="none"), r"MSELoss.*'none'.*'mean', 'sum'"),
        (nn.KLDivLoss(reduction="batchmean"), r"KLDivLoss.*'batchmean'.*'mean', 'sum'"),
        (partial(functional.cross_entropy, reduction="none"), r"cross_entropy.*'none'"),
        (
            lambda f, y: functional.mse_loss(f, y),
            r"a loss must be nn.MSELoss, .* module/function with a `reduction` \('mean' or 'sum'\)",
        ),
        (lambda f, y, **kwargs: f.sum(), "has no reduction: a loss must be"),
        (lambda f, y, reduction: f.sum(), r"reduction without a default.*functools.partial"),
        (max, "has no reduction: a loss must be"),
        (nn.Linear(2, 2), "Linear has no reduction: a loss must be"),
        ("mse", "'mse' is not a loss function: a loss must be"),
        (None, "None is not a loss function: a loss must be"),
        (partial(nn.MSELoss, reduction="sum"), "Pass an instance of the class"),
        (nn.MSELoss, "Pass an instance of the class"),
        (partial(functional.mse_loss, weight=torch.ones(2)), r"mse_loss fixes weight.*reduction\."),
        (
            partial(functional.cross_entropy, size_average=False),
            "fixes size_average.*reduction, weight, ignore_index, label_smoothing",
        ),
        (partial(functional.mse_loss, torch.ones(2)), "fixes positional arguments"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), "label_smoothing must be between 0 and 1"),
    ],
)
def test_unsupported_losses(loss: Any, message: str) -> None:
    """What cannot be honoured is refused, and the error says what is needed."""
    with pytest.raises(ValueError, match=message):
        loss_entry(loss)


# --- generic losses


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_generic_value_and_normalizer(reduction: str) -> None:
    """A mean over a batch counts as often as the batch has examples, whatever its shape."""
    loss = nn.L1Loss(reduction=reduction)
    entry, _ = loss_entry(loss)
    f, y = _logits(7, 3), _rand(7, 3)
    value = torch.zeros((), dtype=DOUBLE)
    normalizer = 0.0
    for batch in (slice(0, 2), slice(2, 7)):
        F, targets = entry.terms(f[batch], y[batch])
        assert F.shape == f[batch].shape
        n = len(F)
        value += entry.value(F, targets, n)
        normalizer += entry.normalizer(F, targets, n)
    assert normalizer == 7
    expected = loss(f, y)
    torch.testing.assert_close(value / normalizer if reduction == "mean" else value, expected)


def test_generic_loss_gets_what_the_model_returns() -> None:
    """Predictions and targets go through untouched, as the same objects."""
    seen = []

    def loss(f: Any, y: Any, reduction: str = "mean") -> Tensor:
        seen.append((f, y))
        return f.sum()

    entry, _ = loss_entry(loss)
    f, y = torch.rand(2, 3), {"labels": [1, 2]}
    F, targets = entry.terms(f, y)
    assert F is f and targets is y
    # the number of examples is the caller's, not the length of the prediction
    torch.testing.assert_close(entry.value(F, targets, 5), 5 * f.sum())
    assert seen[0][0] is f and seen[0][1] is y


def test_generic_loss_must_be_scalar() -> None:
    """A loss that does not reduce is refused."""
    entry, _ = loss_entry(lambda f, y, reduction="mean": f - y)
    with pytest.raises(ValueError, match=r"lambda.*'mean' must return a scalar.*\(2, 3\)"):
        entry.value(torch.rand(2, 3), torch.rand(2, 3), 2)


def test_generic_loss_has_no_closed_forms() -> None:
    """Errors name the loss and the losses with closed forms."""
    f = torch.rand(2, 3)
    for loss, name in ((nn.L1Loss(), "L1Loss"), (partial(_l1, reduction="mean"), "_l1")):
        entry, _ = loss_entry(loss)
        for call in (
            lambda entry: entry.term_values(f, f),
            lambda entry: entry.weight(f, f),
            lambda entry: entry.grad(f, f),
            lambda entry: entry.hess_vec(f, f, f),
            lambda entry: entry.root_columns(f, f),
            lambda entry: entry.sample(f, f, f),
            lambda entry: entry.sampled_hess_vec(f, f, f, f),
            lambda entry: entry.grad_outer_vec(f, f, f),
            lambda entry: entry.num_columns(3),
            lambda entry: entry.draws(3),
        ):
            with pytest.raises(NotImplementedError, match=f"^{name} has no closed.*MSELoss"):
                call(entry)


def test_entries_can_be_copied() -> None:
    """Deep copies keep the options."""
    entry, _ = loss_entry(nn.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.2))
    duplicate = copy.deepcopy(entry)
    assert duplicate.label_smoothing == 0.2
    assert duplicate.class_weight is not entry.class_weight
