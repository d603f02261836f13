"""Tests of ``curvlinops.inverse``."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from zoo import C128, F64, general, positive

from curvlinops import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    cg,
    lsmr,
)
from curvlinops.testing import check_operator


class Raw(PyTorchLinearOperator):
    """A self-adjoint matrix on several tensors, without names, and without device or dtype."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor, shapes: list[tuple[int, ...]]):
        super().__init__(shapes, shapes)
        self.rows = matrix.tolist()
        self.products = 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.products += 1
        width = X[0].shape[-1]
        matrix = torch.tensor(self.rows, dtype=X[0].dtype, device=X[0].device)
        result = matrix @ torch.cat([x.reshape(-1, width) for x in X])
        sizes = [x.numel() // width for x in X]
        return [y.reshape(x.shape) for x, y in zip(X, result.split(sizes), strict=True)]


def neumann(A: Tensor, num_terms: int, scale: float, P: Tensor | None = None) -> Tensor:
    """Return the truncated series, term by term."""
    eye = torch.eye(len(A), dtype=A.dtype)
    P = eye if P is None else P
    factor = eye - scale * P @ A
    return scale * sum(torch.linalg.matrix_power(factor, k) for k in range(num_terms + 1)) @ P


# --------------------------------------------------------------------------------------------------
# What every operator does
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F64, C128])
def test_cg_conforms(dtype: torch.dtype) -> None:
    """Products, adjoint, formats, algebra, SciPy, copies and saving are those of the inverse."""
    matrix = positive(7, dtype)
    A = TensorLinearOperator(matrix)
    inverse = torch.linalg.inv(matrix)
    check_operator(CGInverseLinearOperator(A, tolerance=1e-14), inverse)
    M = DiagonalLinearOperator([1 / matrix.diagonal()])
    check_operator(CGInverseLinearOperator(A, tolerance=1e-14, preconditioner=M), inverse)


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("sides", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("damp", [0.0, 0.4])
def test_lsmr_conforms(sides: tuple[int, int], dtype: torch.dtype, damp: float) -> None:
    """The same for pseudo-inverses. Catches adjoints that solve with A, not with its adjoint."""
    matrix = general(*sides, dtype)
    extended = torch.cat([matrix, damp * torch.eye(sides[1], dtype=dtype)])
    expected = torch.linalg.pinv(extended)[:, : sides[0]]
    A_pinv = LSMRInverseLinearOperator(TensorLinearOperator(matrix), atol=0, btol=0, damp=damp)
    check_operator(A_pinv, expected)
    assert not A_pinv.SELF_ADJOINT


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("num_terms", [0, 1, 4])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_neumann_conforms(num_terms: int, preconditioned: bool, dtype: torch.dtype) -> None:
    """The same for series of matrices that do not commute, nor are their own adjoints.

    Catches (I - s A P)ᵏ, P on the wrong side, and a term too many or too few.
    """
    matrix, P = general(6, 6, dtype) / 6, general(6, 6, dtype) if preconditioned else None
    N = NeumannInverseLinearOperator(
        TensorLinearOperator(matrix),
        num_terms,
        0.3,
        preconditioner=None if P is None else TensorLinearOperator(P),
    )
    assert not N.SELF_ADJOINT
    check_operator(N, neumann(matrix, num_terms, 0.3, P))


@pytest.mark.parametrize("kind", ["cg", "lsmr", "neumann"])
def test_raw_self_adjoint_operators(kind: str) -> None:
    """Adjoint, x @ A⁻¹ and SciPy work for an operator that is only its products."""
    matrix = positive(8)
    A = Raw(matrix, [(2, 3), (2,)])
    build = {
        "cg": lambda: CGInverseLinearOperator(A, tolerance=1e-14),
        "lsmr": lambda: LSMRInverseLinearOperator(A, atol=0, btol=0),
        "neumann": lambda: NeumannInverseLinearOperator(A, 3, 0.01, preconditioner=lambda r: 2 * r),
    }
    expected = torch.linalg.inv(matrix)
    if kind == "neumann":
        expected = neumann(matrix, 3, 0.01, 2 * torch.eye(8, dtype=F64))
    inverse = build[kind]()
    assert inverse.SELF_ADJOINT and inverse.adjoint() is inverse
    x = torch.randn(3, 8, dtype=F64)
    assert torch.allclose(x @ inverse, x @ expected)
    parts = inverse @ [x[0, :6].reshape(2, 3), x[0, 6:]]
    assert torch.allclose(torch.cat([p.flatten() for p in parts]), expected @ x[0])
    scipy = inverse.to_scipy("float64")
    assert torch.allclose(torch.from_numpy(scipy @ x[0].numpy()), expected @ x[0])
    assert torch.allclose(torch.from_numpy(scipy.rmatvec(x[0].numpy())), expected @ x[0])
    assert torch.allclose((2 * inverse @ A @ x[0]), 2 * expected @ matrix @ x[0])


@pytest.mark.parametrize("kind", ["cg", "neumann"])
def test_named_tensors(kind: str) -> None:
    """A dict by parameter name goes in and comes out, as with A."""
    A = IdentityLinearOperator([(2,), (1, 3)], "cpu", F64)
    A._names = ["b", "W"]
    v = {"W": torch.ones(1, 3, dtype=F64), "b": torch.zeros(2, dtype=F64)}
    inverse = CGInverseLinearOperator(A) if kind == "cg" else NeumannInverseLinearOperator(A, 2)
    result = inverse @ v
    assert list(result) == ["b", "W"]
    assert torch.allclose(result["W"], v["W"])


# --------------------------------------------------------------------------------------------------
# Solvers
# --------------------------------------------------------------------------------------------------
def test_keywords_reach_the_solver() -> None:
    """Solution and info are those of the functions with the same keywords."""
    matrix, b = positive(9), torch.randn(9, 2, dtype=F64)
    A = TensorLinearOperator(matrix)
    M = DiagonalLinearOperator([1 / matrix.diagonal()])
    for keywords in (
        {},
        {"tolerance": 1e-1},
        {"max_iter": 1, "tolerance": 0.9},
        {"preconditioner": M},
        {"preconditioner": M.__matmul__, "tolerance": 1e-9},
        {"x0": b / 10},
    ):
        inverse = CGInverseLinearOperator(A, **keywords)
        assert inverse.info is None
        x, info = cg(A, b, **keywords)
        assert torch.equal(inverse @ b, x)
        assert torch.equal(inverse.info.iterations, info.iterations)
        assert inverse.info.history == info.history
    for keywords in ({}, {"atol": 1e-1}, {"btol": 0.5}, {"damp": 0.5}, {"max_iter": 90}):
        pinv = LSMRInverseLinearOperator(A, **keywords)
        x, info = lsmr(A, b, **keywords)
        assert torch.equal(pinv @ b, x)
        assert pinv.info.history == info.history
        b.t() @ pinv  # keeps its info, too
        assert len(pinv.info.iterations) == 2


def test_start_for_all_columns() -> None:
    """One x0 serves any number of columns; several must be as many as b has."""
    A = TensorLinearOperator(positive(4))
    x0 = [torch.ones(4, dtype=F64)]
    inverse = CGInverseLinearOperator(A, x0=x0, tolerance=1e-12)
    b = A @ torch.ones(4, 3, dtype=F64)
    assert torch.equal(inverse @ b, torch.ones(4, 3, dtype=F64))
    assert inverse.info.iterations.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="x0 has 2 columns, but b has 3"):
        CGInverseLinearOperator(A, x0=b[:, :2]) @ b
    assert inverse.to(torch.float32).x0[0].dtype == torch.float32


def test_info_is_that_of_the_last_product() -> None:
    """Also of a product from the left, of an adjoint, and through algebra and SciPy."""
    matrix = general(5, 3)
    A_pinv = LSMRInverseLinearOperator(TensorLinearOperator(matrix))
    A_pinv @ torch.randn(5, 4, dtype=F64)
    assert len(A_pinv.info.iterations) == 4
    torch.randn(2, 3, dtype=F64) @ A_pinv
    assert len(A_pinv.info.iterations) == 2
    (2 * A_pinv) @ torch.randn(5, dtype=F64)
    assert len(A_pinv.info.iterations) == 1
    before = A_pinv.info
    adjoint = A_pinv.adjoint()
    adjoint @ torch.randn(3, 2, dtype=F64)
    assert len(adjoint.info.iterations) == 2
    assert A_pinv.info is before
    assert copy.deepcopy(A_pinv).info is None


def test_warnings() -> None:
    """An operator warns of each reason once, at the line of the product; the info goes on telling.

    Catches hundreds of warnings from an eigensolver, and silence about another reason.
    """
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=F64))
    inverse = CGInverseLinearOperator(TensorLinearOperator(matrix), max_iter=1)
    b = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64)
    with pytest.warns(UserWarning, match="max_iter = 1 is reached") as caught:
        inverse @ b
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == inverse.info.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            inverse @ torch.rand(4, dtype=F64).mul(b)
            assert "max_iter = 1 is reached" in inverse.info.reason
    with pytest.warns(UserWarning, match="A is not positive definite"):
        inverse @ (1 - b)
    matrix[3, 3] = 4
    converging = CGInverseLinearOperator(TensorLinearOperator(matrix), tolerance=1e-12)
    largest = eigsh(converging.to_scipy(), k=1, return_eigenvectors=False)
    assert largest == pytest.approx(1)


def test_bad_arguments() -> None:
    """They are refused when the operator is built, not in its first product."""
    A = TensorLinearOperator(positive(3))
    rectangular = TensorLinearOperator(general(3, 2))
    cases: list[tuple[type[Exception], str, Any, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "must be a linear operator", CGInverseLinearOperator, (A.matrix,), {}),
        (TypeError, "must be a linear operator", LSMRInverseLinearOperator, (A.matrix,), {}),
        (TypeError, "must be a linear operator", NeumannInverseLinearOperator, (A.matrix,), {}),
        (ValueError, "CGInv.* a space to itself", CGInverseLinearOperator, (rectangular,), {}),
        (ValueError, "Neu.* a space to itself", NeumannInverseLinearOperator, (rectangular,), {}),
        (ValueError, "tolerance must", CGInverseLinearOperator, (A,), {"tolerance": -1}),
        (ValueError, "max_iter must", CGInverseLinearOperator, (A,), {"max_iter": -1}),
        (ValueError, "must have shape", CGInverseLinearOperator, (A,), {"x0": torch.ones(4)}),
        (TypeError, "function of flat", CGInverseLinearOperator, (A,), {"preconditioner": 3}),
        (ValueError, "atol must", LSMRInverseLinearOperator, (A,), {"atol": math.inf}),
        (ValueError, "damp must", LSMRInverseLinearOperator, (A,), {"damp": -1}),
        (ValueError, "num_terms must", NeumannInverseLinearOperator, (A,), {"num_terms": -1}),
        (ValueError, "scale must", NeumannInverseLinearOperator, (A,), {"scale": math.nan}),
        (
            ValueError,
            "Shape mismatch: the preconditioner",
            NeumannInverseLinearOperator,
            (A,),
            {"preconditioner": TensorLinearOperator(positive(2))},
        ),
    ]
    for error, message, kind, args, kwargs in cases:
        with pytest.raises(error, match=message):
            kind(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# Neumann series
# --------------------------------------------------------------------------------------------------
def test_neumann_converges() -> None:
    """With a small scale, to the inverse, with one product per term."""
    matrix = positive(8)
    A = Raw(matrix, [(8,)])
    scale = 1 / torch.linalg.eigvalsh(matrix).max().item()
    b = torch.randn(8, 2, dtype=F64)
    x = NeumannInverseLinearOperator(A, num_terms=2000, scale=scale) @ b
    assert A.products == 2000
    assert torch.allclose(x, torch.linalg.solve(matrix, b))
    A.products = 0
    x = NeumannInverseLinearOperator(A, num_terms=0, scale=0.5) @ b
    assert A.products == 0
    assert torch.equal(x, b / 2)
    P = TensorLinearOperator(torch.linalg.inv(matrix))
    x = NeumannInverseLinearOperator(A, num_terms=1, preconditioner=P) @ b
    assert torch.allclose(x, torch.linalg.solve(matrix, b))


def test_neumann_defaults_and_divergence() -> None:
    """100 terms of scale 1; overflow is an error that tells the term, unless it is not checked."""
    A = DiagonalLinearOperator([torch.tensor([0.1, 0.5], dtype=F64)])
    expected = neumann(torch.diag(A.diagonal()), 100, 1.0).diagonal()
    assert torch.allclose(NeumannInverseLinearOperator(A) @ torch.ones(2, dtype=F64), expected)
    A = DiagonalLinearOperator([torch.tensor([1.0, 1e10])])
    with pytest.raises(ValueError, match="Detected NaNs after application of term 4: the series"):
        NeumannInverseLinearOperator(A) @ torch.ones(2)
    x = NeumannInverseLinearOperator(A, check_nan=False) @ torch.ones(2)
    assert not x.isfinite().all()
    with pytest.raises(ValueError, match="Detected NaNs after application of term 0"):
        NeumannInverseLinearOperator(A) @ torch.tensor([1.0, math.nan])


def test_neumann_low_precision() -> None:
    """Sums are in float32: in bfloat16, small terms would be lost."""
    diagonal = torch.full((4,), 2.0**-7, dtype=torch.bfloat16)
    x = NeumannInverseLinearOperator(DiagonalLinearOperator([diagonal]), 1500) @ torch.ones(
        4, dtype=torch.bfloat16
    )
    assert x.dtype == torch.bfloat16
    assert torch.allclose(x.float(), torch.full((4,), 128.0), rtol=1e-2)


# --------------------------------------------------------------------------------------------------
# Copies, files, text
# --------------------------------------------------------------------------------------------------
def build_all(matrix: Tensor) -> list[PyTorchLinearOperator]:
    """Return one operator of each kind, with preconditioners and starts."""
    A = TensorLinearOperator(matrix)
    M = DiagonalLinearOperator([1 / matrix.diagonal()])
    x0 = {"tolerance": 1e-9, "max_iter": 77, "x0": matrix[0]}
    return [
        CGInverseLinearOperator(A, preconditioner=M, **x0),
        LSMRInverseLinearOperator(2 * A, atol=1e-9, btol=1e-8, max_iter=66, damp=0.5),
        NeumannInverseLinearOperator(A, 3, 0.1, False, preconditioner=M),
        NeumannInverseLinearOperator(A, 3, 0.1),
    ]


def test_saving(tmp_path: Path) -> None:
    """Files load with the safe default, in a fresh process, to the same operator."""
    operators = build_all(positive(5))
    b = torch.randn(5, dtype=F64)
    torch.save([operators, b, [op @ b for op in operators]], tmp_path / "inverses.pt")
    code = """
import sys, torch, curvlinops
operators, b, expected = torch.load(sys.argv[1])
for op, x in zip(operators, expected):
    assert torch.allclose(op @ b, x, rtol=1e-7)
assert operators[0].info.converged and operators[0].max_iter == 77
assert operators[0].preconditioner.trace() > 0 and operators[2].num_terms == 3
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "inverses.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for op in operators:
        file = io.BytesIO()
        torch.save(op, file)
        file.seek(0)
        moved = torch.load(file, map_location="meta")
        assert moved.device == torch.device("meta")


def test_functions_are_not_saved() -> None:
    """The error says so; copies and casts work, and leave the function as it is."""
    A, M = TensorLinearOperator(positive(5)), lambda r: r / 3
    b = torch.randn(5, dtype=F64)
    for op in (
        CGInverseLinearOperator(A, preconditioner=M),
        NeumannInverseLinearOperator(A, 2, 0.1, preconditioner=M),
    ):
        with pytest.raises(pickle.PicklingError, match="its preconditioner is a function, and"):
            torch.save(op, io.BytesIO())
        for other in (copy.copy(op), copy.deepcopy(op)):
            assert torch.equal(other @ b, op @ b)
            assert other.preconditioner is M
        assert (op.to(torch.float32) @ b.float()).dtype == torch.float32


def test_copies() -> None:
    """All arguments are kept; device and dtype follow A, and .to moves what is held."""
    for op in build_all(positive(5)):
        for other in (copy.copy(op), copy.deepcopy(op), op.to(F64)):
            assert type(other) is type(op)
            for name in op._init_args:
                mine, its = getattr(op, name), getattr(other, name)
                if not isinstance(mine, (Tensor, PyTorchLinearOperator)):
                    assert mine == its
        assert copy.deepcopy(op).A is not op.A
        assert op.to(torch.float32).dtype == torch.float32
        assert (op.dtype, op.device) == (F64, torch.device("cpu"))
        narrow = op.to(torch.float32) @ torch.ones(5)
        assert torch.allclose(narrow.double(), op @ torch.ones(5, dtype=F64), rtol=1e-4)


def test_repr() -> None:
    """Formulas that tell A, the method and what it depends on."""
    texts = [repr(op) for op in build_all(positive(3))]
    assert texts == [
        "<3×3 operator CG(Dense(3×3))⁻¹>",
        "<3×3 operator LSMR(2 * Dense(3×3), damp=0.5)⁺>",
        "<3×3 operator 0.1 * Σₖ (I - 0.1 * Diag(3) @ Dense(3×3))ᵏ @ Diag(3) [k ≤ 3]>",
        "<3×3 operator 0.1 * Σₖ (I - 0.1 * Dense(3×3))ᵏ [k ≤ 3]>",
    ]
    A = TensorLinearOperator(positive(3))
    P = NeumannInverseLinearOperator(A + A, 1, preconditioner=lambda r: r)
    assert "(I - 1 * P @ (" in repr(P)
    assert repr(3 * build_all(positive(3))[0]) == "<3×3 operator 3 * CG(Dense(3×3))⁻¹>"


# --------------------------------------------------------------------------------------------------
# Curvature
# --------------------------------------------------------------------------------------------------
def test_curvature() -> None:
    """(GGN + δI)⁻¹ g by conjugate gradients: right, and much faster with KFAC's inverse."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).to(F64)
    X = torch.randn(300, 6, dtype=F64) * torch.logspace(-1.5, 1.5, 6, dtype=F64)
    data = [(X, torch.randn(300, 4, dtype=F64))]
    params, loss = dict(model.named_parameters()), nn.MSELoss()
    GGN = GGNLinearOperator(model, loss, params, data)
    K = KFACLinearOperator(
        model, loss, params, data, fisher_type="type-2", separate_weight_and_bias=False
    )
    A = GGN + 1e-5 * GGN**0
    M = K.inverse(damping=1e-5, use_exact_damping=True)
    g = {name: torch.randn_like(p) for name, p in params.items()}
    plain = CGInverseLinearOperator(A, tolerance=1e-4)
    preconditioned = CGInverseLinearOperator(A, tolerance=1e-4, preconditioner=M)
    dense, flat = A.to_dense(), torch.cat([t.flatten() for t in g.values()])
    for inverse in (plain, preconditioned):
        x = inverse @ g
        assert list(x) == list(params)
        residual = dense @ torch.cat([t.flatten() for t in x.values()]) - flat
        assert residual.norm() <= 1.1e-4 * flat.norm()
    assert preconditioned.info.iterations < plain.info.iterations / 3
