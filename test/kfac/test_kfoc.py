"""KFOC: the nearest Kronecker product to each block, against a singular value decomposition."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checks import given_samples, kept_apart
from kfac_cases import setup
from kfac_reference import Setup
from layer_cases import LAYER_CASES, layer_setup
from layer_reference import (
    exact_block,
    layer_groups,
    nearest_kronecker,
    reference_blocks,
    without_coupling,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.computers import group_statistic, kfac_make_fx, kfoc, products
from curvlinops.computers.kfoc_hooks import HooksKFOCComputer
from curvlinops.computers.kfoc_make_fx import MakeFxKFOCComputer
from curvlinops.computers.singular_vectors import SingularVectorSearch, positive_part

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

CASES = [(name, joint) for name, case in LAYER_CASES.items() for joint in case.joint]
each_case = pytest.mark.parametrize(("name", "joint"), CASES, ids=lambda x: str(x))


def build(problem: Setup, joint: bool, cls: Any = KFOCLinearOperator, **options: Any) -> Any:
    arguments = {"fisher_type": "type-2", "loss_terms": "exact", **options}
    return cls(**problem.kwargs(), separate_weight_and_bias=not joint, **arguments)


@cache
def built(name: str, joint: bool) -> KFOCLinearOperator:
    return build(layer_setup(name), joint)


def parts_of(block: Any) -> list[Any]:
    return list(block) if isinstance(block, BlockDiagonalLinearOperator) else [block]


def dense(factor: Any) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.to_dense()


def as_map(matrix: Tensor, d_out: int, d_in: int) -> Tensor:
    """Reorder a block to the matrix ``[d_out², d_in²]`` that has rank one for Kronecker ones."""
    entries = matrix.reshape(d_out, d_in, d_out, d_in).transpose(1, 2)
    return entries.reshape(d_out**2, d_in**2)


def check(
    K: KFOCLinearOperator, problem: Setup, joint: bool, fisher_type: str, vectors: Any = None
) -> None:
    """Compare each part of each block with the nearest Kronecker product of the exact one."""
    blocks = reference_blocks(problem, joint, "type-2", "expand")
    assert [dict(sorted(group.items())) for group in K.mapping] == layer_groups(problem, joint)
    for block in blocks:
        exact = exact_block(problem, block.group, fisher_type, vectors)
        start = 0
        parts = parts_of(K.block(next(iter(block.group.values()))))
        if not exact.any():  # without a call, nothing is known of groups
            assert not any(dense(factor).any() for part in parts for factor in part)
            continue
        for part, (B_kfac, A_kfac) in zip(parts, block.parts, strict=True):
            size = part.shape[0]
            own = exact[start : start + size, start : start + size]
            start += size
            scale = max(own.abs().max().item(), 1e-9)
            if A_kfac is None:
                (B,) = part
                torch.testing.assert_close(dense(B), own, rtol=0, atol=1e-10 * scale)
                continue
            if own.any():
                check_part([dense(f) for f in part], own, len(B_kfac), len(A_kfac))
            else:
                assert not any(dense(f).any() for f in part)
        assert start == len(exact)


def check_part(factors: list[Tensor], own: Tensor, d_out: int, d_in: int) -> None:
    """Compare the factors of one part of a block with the nearest ones."""
    B, A = factors
    assert (len(B), len(A)) == (d_out, d_in)
    scale = max(own.norm().item(), 1e-9)
    norms = torch.stack([B.norm(), A.norm()])
    torch.testing.assert_close(norms[0], norms[1])
    for factor in factors:
        assert torch.equal(factor, factor.T)
        assert torch.linalg.eigvalsh(factor).min() >= -1e-14 * norms[0]
    nearest = torch.kron(*nearest_kronecker(own, d_out, d_in))
    distance, least = ((X - own).norm() for X in (torch.kron(B, A), nearest))
    assert distance <= least + 1e-8 * scale
    s = torch.linalg.svdvals(as_map(own, d_out, d_in))
    if len(s) == 1 or s[1] < 0.999 * s[0]:
        torch.testing.assert_close(torch.kron(B, A), nearest, rtol=0, atol=2e-8 * scale)


@each_case
def test_type2(name: str, joint: bool) -> None:
    check(built(name, joint), layer_setup(name), joint, "type-2")


@each_case
def test_never_further_than_kfac(name: str, joint: bool) -> None:
    problem = layer_setup(name)
    kfacs = [build(problem, joint, KFACLinearOperator, kfac_approx=a) for a in ("expand", "reduce")]
    for block in reference_blocks(problem, joint, "type-2", "expand"):
        exact = without_coupling(block, exact_block(problem, block.group, "type-2"))
        first = next(iter(block.group.values()))
        ours, *theirs = (
            (K.block(first).to_dense() - exact).norm() for K in (built(name, joint), *kfacs)
        )
        assert ours <= min(theirs) + 1e-9 * exact.norm()


@pytest.mark.parametrize("name", ["conv2d-groups", "self-attention", "gpt", "head-bias", "pooled"])
@pytest.mark.parametrize("gram", [False, True])
def test_both_ways_to_multiply(name: str, gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of few examples at once, or products between positions; also in small chunks."""
    joint = LAYER_CASES[name].joint[-1]
    monkeypatch.setattr(products, "_between_positions", lambda *sizes: gram)
    for entries in (1, 2**22):
        monkeypatch.setattr(group_statistic, "_ENTRIES", entries)
        K = build(layer_setup(name), joint, loss_terms="signs", kfac_approx="reduce")
        for group in K.mapping:
            first = next(iter(group.values()))
            expected = built(name, joint).block(first).to_dense()
            error = (K.block(first).to_dense() - expected).norm()
            assert error <= 2e-8 * expected.norm()


@pytest.mark.parametrize("name", ["conv2d-groups", "self-attention", "head-bias", "tied-one"])
def test_eigenvalues_in_small_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What EKFAC and KFOC share."""
    joint = LAYER_CASES[name].joint[-1]
    expected = build(layer_setup(name), joint, EKFACLinearOperator).to_dense()
    monkeypatch.setattr(group_statistic, "_ENTRIES", 1)
    actual = build(layer_setup(name), joint, EKFACLinearOperator).to_dense()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.norm().item())


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example once, and as many at once as there may be."""
    monkeypatch.setattr(group_statistic, "_ENTRIES", 12)
    for n, entries, most in [(7, 4, 3), (6, 4, 3), (3, 5, 2), (2, 13, 1), (4, 0, 4), (1, 1, 1)]:
        parts = [list(range(n)[part]) for part in group_statistic.chunks(n, entries)]
        assert sum(parts, []) == list(range(n))  # noqa: RUF017
        assert max(map(len, parts)) == most


@pytest.mark.parametrize("name", ["mlp-norms", "conv2d-groups", "embedding", "head-bias", "gpt"])
def test_given_samples(name: str) -> None:
    """Also of several loss terms, of the embedding and the transformer, which are kept apart."""
    problem, joint = layer_setup(name), LAYER_CASES[name].joint[-1]
    vectors = kept_apart(given_samples(problem, 3, 11))
    K = build(problem, joint, fisher_type="mc", mc_samples=3, seed=11)
    check(K, problem, joint, "given", vectors)


@pytest.mark.parametrize("name", ["mlp-norms", "self-attention", "embedding-twice", "head-bias"])
@pytest.mark.parametrize(("size", "gram"), [(1, False), (3, True), (3, False), (4, True)])
def test_wide_factors(name: str, size: int, gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest product with diagonal factors is that to what such products can see."""
    monkeypatch.setattr(products, "_between_positions", lambda *sizes: gram)
    problem = layer_setup(name)
    K = build(problem, False, max_factor_size=size)
    for block in reference_blocks(problem, False, "type-2", "expand"):
        exact, start = exact_block(problem, block.group, "type-2"), 0
        parts = parts_of(K.block(next(iter(block.group.values()))))
        for part, (B, A) in zip(parts, block.parts, strict=True):
            sizes = [len(f) for f in (B, A) if f is not None]
            seen = [torch.eye(d) if d > size else torch.ones(d, d) for d in sizes]
            mask = torch.kron(*seen) if len(seen) == 2 else seen[0]
            n = part.shape[0]
            own = exact[start : start + n, start : start + n] * mask
            start += n
            assert [isinstance(f, DiagonalLinearOperator) for f in part] == [
                d > size for d in sizes
            ]
            nearest = torch.kron(*nearest_kronecker(own, *sizes)) if len(sizes) == 2 else own
            error = (part.to_dense() - nearest).norm()
            assert error <= 2e-8 * max(own.norm().item(), 1e-9)
    if size == 1:
        assert "over-wide factor: diagonal only" in K.summary()


@each_case
def test_closed_forms(name: str, joint: bool) -> None:
    K = built(name, joint)
    matrix, damping = K.to_dense(), 0.1
    identity = torch.eye(len(matrix), dtype=torch.float64)
    inverse = K.inverse(damping=damping, use_exact_damping=True)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(matrix + damping * identity))
    torch.testing.assert_close(K.trace(), matrix.trace())
    torch.testing.assert_close(K.diagonal(), matrix.diagonal())
    torch.testing.assert_close(K.frobenius_norm(), matrix.norm())
    assert K.SELF_ADJOINT


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", [n for n, case in LAYER_CASES.items() if case.exact == "expand"])
def test_exact(name: str, joint: bool) -> None:
    """Where a block is a Kronecker product, it is found."""
    problem = layer_setup(name)
    for block in reference_blocks(problem, joint, "type-2", "expand"):
        exact = without_coupling(block, exact_block(problem, block.group, "type-2"))
        actual = built(name, joint).block(next(iter(block.group.values()))).to_dense()
        assert (actual - exact).norm() <= 1e-10 * exact.norm()


# ---- the other backend ---------------------------------------------------------------------------
def flat(factors: Any) -> list[Tensor]:
    """Return the matrices in nested lists."""
    if isinstance(factors, list):
        return [matrix for entry in factors for matrix in flat(entry)]
    return [dense(factors)]


def assert_same(actual: KFOCLinearOperator, expected: KFOCLinearOperator) -> None:
    """Compare all factors, and blocks."""
    assert actual.mapping == expected.mapping
    for group in expected.mapping:
        name = next(iter(group.values()))
        pairs = list(zip(flat(actual.factors(name)), flat(expected.factors(name)), strict=True))
        pairs.append((actual.block(name).to_dense(), expected.block(name).to_dense()))
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@each_case
def test_make_fx(name: str, joint: bool) -> None:
    assert_same(build(layer_setup(name), joint, backend="make_fx"), built(name, joint))


@pytest.mark.parametrize(
    "name",
    ["mlp-norms", "transposed2d", "embedding-lengths", "self-attention", "tied-one", "head-twice"],
)
def test_make_fx_with_samples(name: str) -> None:
    """Also where examples have several loss terms, and diagonal factors."""
    options = {"fisher_type": "mc", "mc_samples": 2, "max_factor_size": 5}
    joint = LAYER_CASES[name].joint[-1]
    traced, hooks = (
        build(layer_setup(name), joint, backend=backend, **options)
        for backend in ("make_fx", "hooks")
    )
    assert_same(traced, hooks)


@pytest.mark.parametrize("joint", [False, True])
def test_plain_function(joint: bool) -> None:
    """A function that shares a weight, once without the bias; and the same as a module."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.c, self.V = (
                nn.Parameter(torch.rand(shape, generator=generator, dtype=torch.float64))
                for shape in [(3, 3), (3,), (2, 3)]
            )

        def forward(self, x: Tensor) -> Tensor:
            return function(dict(self.named_parameters()), x)

    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, params["W"], params["c"]))
        return torch.tanh(h @ params["W"].T) @ params["V"].T

    generator = torch.Generator().manual_seed(0)
    module = Module()
    params = {name: p.detach() for name, p in module.named_parameters()}
    data = [(torch.rand(n, 3).double(), torch.arange(n) % 2) for n in (3, 2)]
    options: dict[str, Any] = {"fisher_type": "type-2", "separate_weight_and_bias": not joint}
    with pytest.raises(ValueError, match="make_fx"):
        KFOCLinearOperator(function, nn.CrossEntropyLoss(), params, data, **options)
    actual, expected = (
        KFOCLinearOperator(model, nn.CrossEntropyLoss(), params, data, backend=backend, **options)
        for model, backend in ((function, "make_fx"), (module, "hooks"))
    )
    assert_same(actual, expected)
    exact: Any = 0
    for x in torch.cat([X for X, _ in data]):
        f = function(params, x)
        J = torch.func.jacrev(function)(params, x)
        columns = torch.cat([J["W"], J["c"].unsqueeze(-1)], dim=-1)[..., : 3 + joint].flatten(1)
        p = f.softmax(0)
        exact = exact + columns.T @ (p.diag() - p.outer(p)) @ columns / 5
    B, A = nearest_kronecker(exact, 3, 3 + joint)
    torch.testing.assert_close(actual.block("W").to_dense(), torch.kron(B, A), rtol=0, atol=1e-8)


# ---- costs ---------------------------------------------------------------------------------------
class CountedData:
    """Counts passes."""

    def __init__(self, batches: list[Any]):
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from self.batches


COMPUTERS = [HooksKFOCComputer, MakeFxKFOCComputer]


@pytest.mark.parametrize("cls", COMPUTERS)
def test_passes(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to look at the model, and one for each half of an iteration; traces are used again."""
    traces = []
    right = kfac_make_fx.trace_model

    def trace_model(*arguments: Any) -> Any:
        traces.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(kfac_make_fx, "trace_model", trace_model)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = CountedData([(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 3, 2)])
    computer = cls(
        model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False,
        num_data=8,
    )  # fmt: skip
    assert data.passes == 0
    for _ in range(2):
        computer.compute()
        assert computer.num_passes > 2
        assert data.passes == 1 + computer.num_passes
        data.passes = 0
    # a single example, and both shapes of batches
    assert len(traces) == (3 if cls is MakeFxKFOCComputer else 0)


@pytest.mark.parametrize("cls", COMPUTERS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_pass_without_products(cls: Any, bias: bool) -> None:
    """Biases need one, and diagonal blocks none but that of the GGN's diagonal."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    model = Scaled(3, 2, bias=bias).double()
    data = CountedData([(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 2)])
    options = {"unsupported": "diagonal", "check_deterministic": False, "num_data": 5}
    computer = cls(model, nn.MSELoss(), dict(model.named_parameters()), data, **options)
    _, factors, _ = computer.compute()
    assert computer.num_passes == bias
    assert data.passes == 2 + bias
    assert isinstance(factors["weight",], DiagonalLinearOperator)


def num_flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_flops(fisher_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the inputs serve all vectors, and those of the gradients are summed first."""
    pairs = list(itertools.pairwise((9, 8, 7, 5)))
    model = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairs))
    rows, batches = 16, 2
    data = [(torch.rand(rows, 9), torch.rand(rows, 5)) for _ in range(batches)]
    options = {"fisher_type": fisher_type, "check_deterministic": False, "num_data": 32}
    # rounding errors decide whether there is something to do
    monkeypatch.setattr(kfoc, "positive_part", lambda matrix: matrix)
    computer = HooksKFOCComputer(
        model, nn.MSELoss(), dict(model.named_parameters()), data, max_iter=1, **options
    )
    with pytest.warns(UserWarning, match="not converged"):
        count = num_flops(computer.compute)
    forward = sum(i * o for i, o in pairs)
    backward = sum(i * o for i, o in pairs[1:])
    inputs = sum(i**2 + i for i, _ in pairs)
    outputs = sum(o**2 + o for _, o in pairs)
    vectors = 5 if fisher_type == "type-2" else 1
    each = forward + inputs + vectors * (backward + outputs)
    look = forward * (rows * batches + 1)  # also at a single example
    assert count == 2 * (look + 2 * rows * batches * each)


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_cheapest_way(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(6, 4, bias=False)
    data = [(torch.rand(2, positions, 6), torch.rand(2, positions, 4))]
    options = {"check_deterministic": False, "max_iter": 1, "tol": 0.999}
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)

    def flops() -> int:
        return num_flops(lambda: KFOCLinearOperator(*arguments, **options))

    chosen = flops()
    counts = []
    for gram in (False, True):
        monkeypatch.setattr(products, "_between_positions", lambda *sizes, gram=gram: gram)
        counts.append(flops())
    assert chosen == min(counts) < max(counts)


class Largest(TorchDispatchMode):
    """Sees how many entries the largest result with more than two axes has, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # random numbers are made in float64
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.ndim > 2:
            # of the memory: a view may be expanded
            self.entries = max(self.entries, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("gram", [False, True])
def test_memory(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients ``[o, i]`` of 4 examples at once, or products ``[S, S]`` of 2."""
    (o, i), S, n = (16, 8) if not gram else (2, 2), 2 if not gram else 16, 8
    monkeypatch.setattr(group_statistic, "_ENTRIES", 512)
    monkeypatch.setattr(products, "_between_positions", lambda *sizes: gram)
    model = nn.Linear(i, o, bias=False)
    params = {"0.weight": model.weight}
    data = [(torch.rand(n, S, i), torch.rand(n, S * o))]
    model = nn.Sequential(model, nn.Flatten())  # one loss term, back-propagated at once
    options = {"check_deterministic": False, "num_data": n}
    computer = HooksKFOCComputer(model, nn.MSELoss(), params, data, **options)
    with Largest() as largest:
        computer.compute()
    assert largest.entries == 512


# ---- special blocks ------------------------------------------------------------------------------
def linear(X: Tensor, y: Tensor, **options: Any) -> KFOCLinearOperator:
    """Return KFOC of a linear model with square loss; the data in several batches."""
    model = nn.Linear(X.shape[-1], y.shape[-1], bias=False).to(X.dtype)
    data = list(zip(X.split(2), y.split(2), strict=True))
    params = {"weight": model.weight}
    return KFOCLinearOperator(
        model, nn.MSELoss(), params, data, **{"fisher_type": "type-2", **options}
    )


def test_zero_block() -> None:
    K = linear(torch.zeros(4, 3), torch.rand(4, 2))
    for factor in K.factors("weight"):
        assert not factor.any()
    inverse = K.inverse(damping=2.0, use_exact_damping=True)
    torch.testing.assert_close(inverse.to_dense(), torch.eye(6) / 2)


class Select(nn.Module):
    """Has gradients e_k e_kᵀ for the k-th datum: all singular values are equal."""

    def __init__(self, size: int):
        super().__init__()
        self.a = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * x


@pytest.mark.parametrize("size", [2, 5])
def test_degenerate_singular_value(size: int) -> None:
    """The part of the identity in the leading space, which is positive semi-definite."""
    model, X = Select(size).double(), torch.eye(size, dtype=torch.float64)
    data = [(X, torch.zeros_like(X))]
    K = KFOCLinearOperator(
        model, nn.MSELoss(reduction="sum"), dict(model.named_parameters()), data,
        fisher_type="type-2",
    )  # fmt: skip
    B, A = K.factors("a.weight")
    exact = 2 * torch.diag(torch.eye(size, dtype=torch.float64).flatten())
    s = torch.linalg.svdvals(as_map(exact, size, size))
    torch.testing.assert_close(s[:size], torch.full_like(s[:size], 2))
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(torch.kron(B, A), 2 / size * torch.kron(identity, identity))
    least = (torch.kron(*nearest_kronecker(exact, size, size)) - exact).norm()
    torch.testing.assert_close((torch.kron(B, A) - exact).norm(), least)


class Quadratic(nn.Module):
    """Has gradients x xᵀ."""

    def __init__(self, size: int):
        super().__init__()
        self.a = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * x).sum(-1, keepdim=True)


def test_start_from_the_identity() -> None:
    """Which is the limit, for gradients q qᵀ of an orthonormal basis; other starts have others."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.rand(3, 3, dtype=torch.float64)).Q
    model, data = Quadratic(3).double(), [(Q, torch.zeros(3, 1, dtype=torch.float64))]
    K = KFOCLinearOperator(
        model, nn.MSELoss(reduction="sum"), {"a.weight": model.a.weight}, data,
        fisher_type="type-2",
    )  # fmt: skip
    expected = torch.eye(9, dtype=torch.float64) * 2 / 3
    torch.testing.assert_close(K.block("a.weight").to_dense(), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_norm_called_twice(joint: bool) -> None:
    """The block of a normalisation layer is that of the gradients of both calls."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.tanh(self.lin(self.norm(x))))

    torch.manual_seed(0)
    model = Model().double()
    X = torch.rand(5, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters() if "norm" in name}
    data = [(X[:3], torch.tensor([0, 1, 2])), (X[3:], torch.tensor([1, 0]))]
    K = KFOCLinearOperator(
        model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2",
        separate_weight_and_bias=not joint,
    )  # fmt: skip
    exact: Any = 0
    for x in X:
        f, J = (
            torch.func.functional_call(model, params, x),
            torch.func.jacrev(lambda p, x=x: torch.func.functional_call(model, p, x))(params),
        )
        columns, p = torch.cat(list(J.values()), dim=1), f.softmax(0)
        exact = exact + columns.T @ (p.diag() - p.outer(p)) @ columns / 5
    if joint:
        torch.testing.assert_close(K.block("norm.weight").to_dense(), exact)
    else:
        torch.testing.assert_close(K.block("norm.weight").to_dense(), exact[:3, :3])
        torch.testing.assert_close(K.block("norm.bias").to_dense(), exact[3:, 3:])


def test_factors_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are, though what there is to clip is mostly rounding errors."""
    X, y = torch.rand(4, 3), torch.rand(4, 2)
    B, A = linear(X, y).factors("weight")
    monkeypatch.setattr(kfoc, "positive_part", lambda matrix: 2 * matrix)
    for doubled, factor in zip(linear(X, y).factors("weight"), (B, A), strict=True):
        torch.testing.assert_close(doubled, 2 * factor)


def search(matrix: Tensor, tol: float = 1e-9, limit: int = 500) -> tuple[SingularVectorSearch, int]:
    """Return the search for the singular vectors of a matrix, and the number of passes."""
    d, e = (round(n**0.5) for n in matrix.shape)
    found = SingularVectorSearch(torch.eye(e, dtype=matrix.dtype), tol)
    for passes in range(1, 2 * limit, 2):
        found.take_image((matrix @ found.operand.flatten()).reshape(d, d))
        if found.done:
            return found, passes
        found.take_adjoint((matrix.T @ found.operand.flatten()).reshape(e, e))
        if found.done:
            return found, passes + 1
    raise AssertionError("not converged")


def gradients(num: int, d: int, e: int, ratio: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the map of random gradients, two clusters of which compete."""
    generator = torch.Generator().manual_seed(num)
    G = 0.3 * torch.randn(num, d, e, generator=generator, dtype=torch.float64)
    G[::2, 0, 0] += 3
    G[1::2, -1, -1] += 3 * ratio
    vectors = G.flatten(1)
    return as_map(vectors.T @ vectors, d, e).to(dtype)


@pytest.mark.parametrize(("ratio", "most"), [(0.3, 12), (0.8, 16), (0.95, 30)])
def test_number_of_passes(ratio: float, most: int) -> None:
    """Power iteration needs 12, 48 and 162."""
    matrix = gradients(40, 4, 5, ratio)
    found, passes = search(matrix)
    U, s, Vh = torch.linalg.svd(matrix)
    assert passes <= most
    assert found.left is not None
    torch.testing.assert_close(
        found.sigma * found.left.flatten().outer(found.right.flatten()),
        s[0] * U[:, 0].outer(Vh[0]), rtol=0, atol=2e-8 * s[0].item(),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_single_precision(scale: float) -> None:
    matrix = gradients(20, 3, 4, 0.6, torch.float32)
    found, _ = search(scale * matrix, 4e-6)
    U, s, Vh = torch.linalg.svd(matrix.double())
    assert found.left is not None
    actual = found.sigma / scale * found.left.flatten().outer(found.right.flatten()).double()
    expected = s[0] * U[:, 0].outer(Vh[0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * s[0].item())


def test_clipping() -> None:
    """The positive semi-definite part, of what was stopped too early."""
    Q = torch.linalg.qr(torch.rand(3, 3, dtype=torch.float64)).Q
    values = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    clipped = positive_part(Q @ values.diag() @ Q.T)
    torch.testing.assert_close(clipped, Q @ values.clamp(min=0).diag() @ Q.T)
    assert positive_part(values).equal(values.clamp(min=0))


def test_rounding_errors_end_the_search() -> None:
    """Though the tolerance is out of reach."""
    _, passes = search(gradients(20, 3, 4, 0.6, torch.float32), 1e-12)
    assert passes < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    X, y = torch.rand(12, 4), torch.randint(3, (12,))
    results = []
    for each in (dtype, torch.float64):
        params = {k: p.detach().to(dtype).to(each) for k, p in model.named_parameters()}
        data = [(X.to(dtype).to(each), y)]
        K = KFOCLinearOperator(
            model.to(each), nn.CrossEntropyLoss(), params, data, fisher_type="type-2"
        )
        assert K.dtype == each
        results.append(K.to_dense().double())
    accuracy = 1e-5 if dtype == torch.float32 else 0.05
    assert (results[0] - results[1]).norm() <= accuracy * results[1].norm()


def test_uneven_batches_and_chunks_do_not_matter() -> None:
    torch.manual_seed(0)
    X, y = torch.rand(7, 3, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    results = []
    for size in (7, 3, 1):
        data = list(zip(X.split(size), y.split(size), strict=True))
        K = KFOCLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), data,
            separate_weight_and_bias=False,
        )  # fmt: skip
        results.append(K.to_dense())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-8 * results[0].abs().max())


# ---- arguments, results --------------------------------------------------------------------------
def test_not_converged() -> None:
    problem = layer_setup("conv1d")
    with pytest.warns(UserWarning, match=r"model.0.weight.*max_iter=1 .*Increase max_iter or tol"):
        K = build(problem, False, max_iter=1)
    for block in reference_blocks(problem, False, "type-2", "expand"):
        part = K.block(next(iter(block.group.values())))
        for factor in part:
            assert torch.linalg.eigvalsh(factor).min() >= -1e-14 * factor.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose = build(problem, False, tol=0.5)
    assert (loose.to_dense() - built("conv1d", False).to_dense()).norm() > 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "empirical"}, "'type-2' or 'mc', got 'empirical'"),
        ({"fisher_type": "forward-only"}, "'type-2' or 'mc', got 'forward-only'"),
        ({"fisher_type": "wrong"}, "type-2"),
        ({"loss_terms": "wrong"}, "loss_terms"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": 0.0}, "tol must be between 0 and 1"),
        ({"tol": 1.0}, "tol must be between 0 and 1"),
        ({"tol": float("nan")}, "tol must be between 0 and 1"),
        ({"backend": "wrong"}, "backend"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(layer_setup("mlp-norms"), False, **options)


def test_non_finite() -> None:
    X = torch.rand(4, 3)
    X[1, 2] = float("nan")
    with pytest.raises(RuntimeError, match=r"'weight'.*non-finite"):
        linear(X, torch.rand(4, 2))


def test_overflow() -> None:
    with pytest.raises(RuntimeError, match=r"'weight'.*non-finite"):
        linear(torch.full((4, 3), 1e30), torch.rand(4, 2))


def test_layer_first_called_in_a_later_pass() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(2, 2), nn.Linear(2, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) if self.calls < 4 else self.b(self.a(x))

    model = Model()
    data = [(torch.rand(2, 2), torch.rand(2, 2))]
    with pytest.raises(RuntimeError, match="have changed between two passes"):
        KFOCLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False
        )


def test_unsupported_use_in_a_later_pass() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.calls = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) if self.calls < 4 else self.a(x) * self.scale

    model = Model()
    data = [(torch.rand(2, 2), torch.rand(2, 2))]
    with pytest.raises(RuntimeError, match="have changed between two passes"):
        KFOCLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False,
            unsupported="diagonal",
        )  # fmt: skip


def test_computer() -> None:
    problem = setup("tied-one", "ce")
    options = {"fisher_type": "mc", "mc_samples": 2, "separate_weight_and_bias": False}
    computer = HooksKFOCComputer(**problem.kwargs(), **options)
    inputs, factors, mapping = computer.compute()
    assert 2 <= computer.num_passes < 100
    K = KFOCLinearOperator(**problem.kwargs(), **options)
    assert K.mapping == mapping
    for group in mapping:
        key = tuple(group.values())
        for actual, expected in zip((factors[key], inputs[key]), K.factors(key[0]), strict=True):
            assert torch.equal(actual, expected)


def test_unsupported_parameters_get_their_diagonal() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.scale = nn.Linear(2, 3), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * self.scale

    model = Model()
    data = [(torch.rand(4, 2), torch.rand(4, 3))]
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    K, L = (
        cls(*arguments, fisher_type="type-2", unsupported="diagonal")
        for cls in (KFOCLinearOperator, KFACLinearOperator)
    )
    torch.testing.assert_close(K.block("scale").to_dense(), L.block("scale").to_dense())
    with pytest.raises(NotImplementedError, match="not in supported layers"):
        KFOCLinearOperator(*arguments)


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_layer_whose_weight_is_used_elsewhere(cls: Any, backend: str) -> None:
    """Its calls do not count, and other blocks are as if it was a constant."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)) + self.a.weight.sum())

    torch.manual_seed(0)
    model = Model().double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 2)]
    params = dict(model.named_parameters())
    options = {"fisher_type": "type-2", "unsupported": "diagonal", "backend": backend}
    K = cls(model, nn.MSELoss(), params, data, **options)
    others = {name: p for name, p in params.items() if name != "a.weight"}
    expected = cls(model, nn.MSELoss(), others, data, **options)
    for name in others:
        assert torch.equal(K.block(name).to_dense(), expected.block(name).to_dense())
    exact = exact_block(Setup(model, nn.MSELoss(), params, data), {"W": "a.weight"}, "type-2")
    torch.testing.assert_close(K.block("a.weight").to_dense(), exact.diagonal().diag())


def test_signature() -> None:
    """KFAC's arguments with their defaults, and two more by name; nothing else is swallowed."""
    ours, theirs = (
        dict(inspect.signature(cls).parameters) for cls in (KFOCLinearOperator, KFACLinearOperator)
    )
    further = [ours.pop("max_iter"), ours.pop("tol")]
    assert list(ours.values()) == list(theirs.values())
    assert {p.kind for p in further} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match=r"KFOC.*unexpected keyword argument 'max_iters'"):
        build(layer_setup("mlp-norms"), False, max_iters=3)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    num = sum(p.kind is positional for p in ours.values())
    with pytest.raises(TypeError, match=r"KFOC.*positional arguments"):
        KFOCLinearOperator(*[None] * (num + 1))


def test_arguments_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument arrives at the computer under its own name."""

    class Computer(HooksKFOCComputer):
        def __init__(self, *args: Any, **kwargs: Any):
            names = list(inspect.signature(KFACLinearOperator).parameters)
            given.update(zip(names, args, strict=False))
            given.update(kwargs)
            raise InterruptedError

    monkeypatch.setitem(KFOCLinearOperator._BACKENDS, "given", Computer)
    given: dict[str, Any] = {}
    names = [name for name in inspect.signature(KFACLinearOperator).parameters if name != "backend"]
    wanted = {name: object() for name in names}
    with pytest.raises(InterruptedError):
        KFOCLinearOperator(**wanted, backend="given")
    assert given == wanted


@pytest.mark.parametrize("name", ["conv2d-groups", "gpt"])
def test_saving(name: str, tmp_path: Path) -> None:
    K = built(name, False)
    torch.save(K, tmp_path / "K.pt")
    loaded = torch.load(tmp_path / "K.pt")
    assert type(loaded) is KFOCLinearOperator
    assert torch.equal(loaded.to_dense(), K.to_dense())
    assert (loaded.summary(), loaded.mapping, repr(loaded)) == (K.summary(), K.mapping, repr(K))


def test_summary() -> None:
    lines = build(setup("cnn", "mse"), False).summary().splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[2:-1]]
    assert cells[0] == ["0.weight", "Conv2d", "3×3 ⊗ 12×12", "36"]
    assert cells[1] == ["0.bias", "Conv2d", "3×3", "3"]
    assert "fisher_type=type-2" in lines[-1]
