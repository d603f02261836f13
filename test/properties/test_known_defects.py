"""Defects that implementations of curvature matrices have had, for every operator at once."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from property_cases import (
    BACKENDS,
    JOINT,
    REDUCTIONS,
    C,
    Problem,
    chain,
    draw,
    grid,
    linears,
    problem,
)
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    KroneckerProductLinearOperator,
    PerExampleGradientLinearOperator,
    TransposedJacobianLinearOperator,
)

KRONECKER = {"KFAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator, "KFOC": KFOCLinearOperator}
EXACT: dict[str, Any] = {
    "Hessian": HessianLinearOperator,
    "GGN": GGNLinearOperator,
    "GGN-mc": partial(GGNLinearOperator, mc_samples=2),
    "GGN diagonal": GGNDiagonalLinearOperator,
    "GGN diagonal-mc": partial(GGNDiagonalLinearOperator, mc_samples=2),
    "EF": EFLinearOperator,
    "per-example gradients": PerExampleGradientLinearOperator,
    "Jacobian": JacobianLinearOperator,
    "transposed Jacobian": TransposedJacobianLinearOperator,
}
OPERATORS: dict[str, Any] = {
    **EXACT,
    **{
        f"{name}-{fisher_type}-{backend}": partial(cls, fisher_type=fisher_type, backend=backend)
        for name, cls in KRONECKER.items()
        for fisher_type in ("type-2", "mc", "empirical")
        for backend in BACKENDS
        if (name, fisher_type) != ("KFOC", "empirical")
    },
}
QUICK = [*EXACT, *(f"{name}-type-2-hooks" for name in KRONECKER), "KFAC-mc-hooks", "EKFAC-mc-hooks"]
each_operator = grid("name", OPERATORS, fast=[(name,) for name in QUICK])


def small(loss: str = "ce", **special: Any) -> Problem:
    return problem(chain(*linears(3, 2, C), l0=torch.tanh), loss, "mean", [draw(2, 3), draw(1, 3)])


def build(name: str, case: Problem, **options: Any) -> Any:
    loss = [] if "Jacobian" in name else [case.loss]
    return OPERATORS[name](case.model, *loss, case.params, case.data, **options)


# ---- data that can be read once ------------------------------------------------------------------
@each_operator
def test_one_shot_iterators_are_refused(name: str) -> None:
    """They would silently give a zero matrix in the second pass, or in the first product."""
    case = small()
    for data in (
        iter(case.data),
        (pair for pair in case.data),
        zip(*zip(*case.data, strict=True), strict=True),
    ):
        for options in ({}, {"check_deterministic": False}, {"num_data": 3}):
            once = copy.copy(case)
            once.data = data  # type: ignore[assignment]
            with pytest.raises(ValueError, match="iterated only once"):
                build(name, once, **options)
        assert len(list(data)) == 2  # nothing was taken


# ---- random number generators --------------------------------------------------------------------
def generators() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]


@grid(
    "name check_deterministic",
    OPERATORS,
    [False, True],
    fast=[*((name, True) for name in QUICK), ("KFAC-mc-make_fx", False)],
)
def test_generators_are_not_advanced(name: str, check_deterministic: bool) -> None:
    """By construction, products and dense matrices, with or without Monte-Carlo samples."""
    case, before = small(), generators()
    A = build(name, case, check_deterministic=check_deterministic)
    assert generators() == before
    v = torch.ones(A.shape[1], dtype=torch.float64)
    first, dense = A @ v, A.to_dense()
    assert generators() == before
    torch.rand(3), np.random.rand(), random.random()
    again = build(name, case, check_deterministic=check_deterministic)
    assert torch.equal(again @ v, first) and torch.equal(again.to_dense(), dense)


# ---- what an exception leaves behind -------------------------------------------------------------
class Broken:
    """Data that fail in a batch of a pass."""

    def __init__(self, data: list[Any], fail: int):
        self.data, self.left = data, fail

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.left -= 1
            if self.left == 0:
                raise OSError("disk")
            yield batch


def state(model: nn.Module) -> list[Any]:
    """Return what hooks, patches and modes could change."""
    modules = [
        {
            key: (list(value) if isinstance(value, dict) else value)
            for key, value in vars(module).items()
            if not key.startswith("_is_full") and key not in ("_parameters", "_buffers")
        }
        for module in model.modules()
    ]
    tensors = [
        (id(p), p._version, p.requires_grad, p.grad is None, len(p._backward_hooks or ()))
        for p in model.parameters()
    ]
    patched = [F.linear, F.conv2d, F.embedding, nn.Linear.forward, nn.Module.__call__]
    return [modules, tensors, [id(f) for f in patched], torch.is_grad_enabled()]


@grid(
    "name check_deterministic",
    OPERATORS,
    [False, True],
    fast=[
        ("GGN", True),
        ("KFAC-type-2-hooks", True),
        ("EKFAC-mc-hooks", False),
        ("KFOC-type-2-hooks", False),
        ("KFAC-type-2-make_fx", False),
    ],
)
def test_nothing_is_left_behind_after_an_exception(name: str, check_deterministic: bool) -> None:
    """In any batch of any pass of construction and a product: no hook, patch or mode stays."""
    case = small()
    case.params = dict(case.model.named_parameters())
    before, rng = state(case.model), generators()
    for fail in range(1, 40):
        broken = copy.copy(case)
        broken.data = Broken(case.data, fail)  # type: ignore[assignment]
        try:
            A = build(name, broken, check_deterministic=check_deterministic)
            A @ torch.ones(A.shape[1], dtype=torch.float64)
        except OSError:
            assert state(case.model) == before
            assert generators() == rng
        else:
            break
    assert fail > 2  # there were failures
    assert state(case.model) == before


# ---- products without columns --------------------------------------------------------------------
@each_operator
def test_products_without_columns(name: str) -> None:
    """As a matrix and as a list of tensors, from both sides, also of the adjoint."""
    A = build(name, small())
    rows, columns = A.shape
    empty = {"dtype": torch.float64}
    assert (A @ torch.ones(columns, 0, **empty)).shape == (rows, 0)
    assert (torch.ones(0, rows, **empty) @ A).shape == (0, columns)
    assert (A.T @ torch.ones(rows, 0, **empty)).shape == (columns, 0)
    result = A @ [torch.ones(*shape, 0, **empty) for shape in A.in_shape]
    assert [r.shape for r in result] == [(*shape, 0) for shape in A.out_shape]
    assert (A @ torch.ones(columns, 2, **empty)).shape == (rows, 2)


# ---- determinants --------------------------------------------------------------------------------
@pytest.mark.parametrize("dims", [(3, 3), (1, 3), (3, 5), (2, 3), (1, 1, 3)])
def test_logdet_of_negative_definite_factors(dims: tuple[int, ...]) -> None:
    """Signs cancel in the product: NaN only where its determinant is negative, as in torch."""
    for signs in ((-1, -1), (-1, 1), (1, -1)):
        factors = []
        for i, d in enumerate(dims):
            root = draw(d, d, seed=i)
            factors.append((signs[i % 2]) * (root @ root.T + torch.eye(d, dtype=root.dtype)))
        K = KroneckerProductLinearOperator(*factors)
        dense = factors[0]
        for factor in factors[1:]:
            dense = torch.kron(dense, factor)
        sign, logabsdet = torch.linalg.slogdet(dense)
        torch.testing.assert_close(K.slogdet(), (sign, logabsdet))
        torch.testing.assert_close(K.logdet(), torch.logdet(dense), equal_nan=True)


# ---- sums and means over positions ---------------------------------------------------------------
def repeated_images(times: int, reduction: str) -> Problem:
    """Return a convolution of single pixels, on images that repeat theirs some times."""
    model = chain(nn.Conv2d(2, 4, 1), nn.Linear(4, C), l0=lambda h: h.flatten(2).sum(2))
    inputs = [draw(n, 2, 2, 3, seed=n) for n in (2, 1)]
    case = problem(model, "mse", reduction, inputs)
    data = [(X.repeat(1, 1, 1, times), y) for X, y in case.data]
    return Problem(case.model, case.loss, case.params, data)


@grid(
    "approx backend",
    ["expand", "reduce"],
    BACKENDS,
    fast=[("expand", "hooks"), ("reduce", "hooks"), ("reduce", "make_fx")],
)
def test_positions_are_averaged_in_inputs_and_summed_in_gradients(
    approx: str, backend: str
) -> None:
    """With each pixel t times, inputs' factors stay, and gradients' grow t-fold (reduce: t²-fold).

    Catches a normalisation by the positions that is discarded, applied twice, or to the wrong
    factor; all are compared with closed forms, too.
    """
    for reduction, joint in zip(REDUCTIONS, JOINT, strict=True):
        factors = []
        for times in (1, 3):
            case = repeated_images(times, reduction)
            K = case.build(
                KFACLinearOperator,
                fisher_type="type-2",
                kfac_approx=approx,
                separate_weight_and_bias=not joint,
                backend=backend,
            )
            B, A = K.factors("l0.weight")
            factors.append((B, A))
            pixels = case.X.flatten(2).mT  # [N, S, 2]
            S = pixels.shape[1]
            pixels = torch.cat([pixels, torch.ones(*pixels.shape[:2], 1)], 2) if joint else pixels
            W = case.params["l1.weight"]
            g = 2 * W.T @ W * (len(pixels) if reduction == "sum" else 1 / C)
            if approx == "expand":
                rows = pixels.flatten(0, 1)
                expected = (S * g, rows.T @ rows / len(rows))
            else:
                rows = pixels.mean(1)
                expected = (S**2 * g, rows.T @ rows / len(rows))
            torch.testing.assert_close((B, A), expected)
        (B, A), (B_3, A_3) = factors
        torch.testing.assert_close(A_3, A)
        torch.testing.assert_close(B_3, B * (3 if approx == "expand" else 9))


# ---- grouped and dilated convolutions ------------------------------------------------------------
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(4, 4, (2, 3), groups=2), (4, 2, 3)),
    "groups-dilated": (lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=(2, 1)), (4, 3, 2)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 2, groups=3, dilation=3), (3, 4)),
    "depthwise-multiplied": (lambda: nn.Conv1d(2, 4, 3, groups=2, stride=2), (2, 3)),
    "dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=(1, 2), stride=3), (2, 2, 3)),
    "dilated-3d": (lambda: nn.Conv3d(1, 2, 2, dilation=(1, 2, 1)), (1, 2, 3, 2)),
}


@grid(
    "name loss backend",
    CONVOLUTIONS,
    ["mse", "ce-options", "bce"],
    BACKENDS,
    fast=[(name, "ce-options", "hooks")
          for name in ("groups-dilated", "depthwise", "depthwise-multiplied", "dilated")],
)  # fmt: skip
def test_grouped_and_dilated_convolutions_of_one_datum(name: str, loss: str, backend: str) -> None:
    """With one output pixel, each group's block is exact, and what is between groups is zero.

    Catches groups that are averaged, patches of neighbouring instead of dilated pixels, and inputs
    of another group.
    """
    make, shape = CONVOLUTIONS[name]
    for reduction, joint in ((r, j) for r in REDUCTIONS for j in JOINT):
        conv = make()
        model = chain(conv, nn.Linear(conv.out_channels, C), l0=lambda h: torch.tanh(h).flatten(1))
        case = problem(model, loss, reduction, [draw(1, *shape, seed=3)])
        own = conv.out_channels // conv.groups
        for fisher_type in ("type-2", "empirical"):
            K = case.build(
                KFACLinearOperator,
                fisher_type=fisher_type,
                # with one position both are exact, but patches come in different ways
                kfac_approx="reduce" if joint == (fisher_type == "type-2") else "expand",
                separate_weight_and_bias=not joint,
                backend=backend,
            ).to_dense()
            expected = case.block_diagonal(case.exact(fisher_type), joint)
            where = case.places(("l0.weight", "l0.bias") if joint else ("l0.weight",))
            # rows of one group in canonical form are consecutive
            size = len(where) // conv.groups
            assert size % own == 0
            keep = torch.block_diag(*[torch.ones(size, size)] * conv.groups).to(expected)
            dropped = expected[where[:, None], where] * (1 - keep)
            assert (dropped.norm() > 1e-3 * expected.norm()) == (conv.groups > 1)
            expected[where[:, None], where] = expected[where[:, None], where] * keep
            torch.testing.assert_close(K, expected)


# ---- tied weights --------------------------------------------------------------------------------
class Tied(nn.Module):
    """A weight that is used twice: by two modules, one without bias, or by one called twice."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.l0, self.l1 = nn.Linear(3, 3), nn.Linear(3, C)
        if kind == "modules":
            self.other = nn.Linear(3, 3, bias=False)
            self.other.weight = self.l0.weight

    def forward(self, x: Tensor) -> Tensor:
        second = self.other if self.kind == "modules" else self.l0
        return self.l1(second(torch.tanh(self.l0(x))))


@grid(
    "kind loss",
    ["modules", "called"],
    ["mse", "ce-options"],
    fast=[("modules", "ce-options")],
)
def test_tied_weights(kind: str, loss: str) -> None:
    """Exact matrices, EKFAC's diagonal and KFAC's factors count both uses.

    Catches an operator that sees the last (or first) use only, or adds blocks of both without
    what is between them.
    """
    case = problem(Tied(kind), loss, "mean", [draw(3, 3, seed=1), draw(2, 3, seed=2)])
    assert "other.weight" not in case.params
    torch.testing.assert_close(case.build(GGNLinearOperator).to_dense(), case.ggn)
    torch.testing.assert_close(case.build(HessianLinearOperator).to_dense(), case.hessian)
    torch.testing.assert_close(case.build(EFLinearOperator).to_dense(), case.ef)
    diagonal = case.build(GGNDiagonalLinearOperator).diagonal()
    torch.testing.assert_close(diagonal, case.ggn.diagonal())
    W, V = case.params["l0.weight"], case.params["l1.weight"]
    a1 = case.X
    h = torch.tanh(a1 @ W.T + case.params["l0.bias"])
    N = len(a1)
    H = case.loss_hessian.reshape(N, C, N, C)
    expected_B = torch.zeros(3, 3, dtype=W.dtype)
    for n in range(N):
        own = H[n, :, n]
        J2 = V  # by the output of the second use
        J1 = V @ W @ (1 - h[n].square()).diag()
        expected_B += J1.T @ own @ J1 + J2.T @ own @ J2
    expected_A = (a1.T @ a1 + h.T @ h) / (2 * N)
    where = case.places(("l0.weight",))
    exact = case.ggn[where][:, where]
    for backend in BACKENDS:
        options = {"fisher_type": "type-2", "backend": backend}
        B, A = case.build(KFACLinearOperator, **options).factors("l0.weight")
        torch.testing.assert_close(A, expected_A)
        torch.testing.assert_close(B, expected_B)
        block = case.build(EKFACLinearOperator, **options).block("l0.weight")
        Q = torch.kron(*block.eigenvectors)
        torch.testing.assert_close(block.eigenvalues, (Q.T @ exact @ Q).diag())
