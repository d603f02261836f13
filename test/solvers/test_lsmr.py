"""Tests of ``curvlinops.solvers.lsmr``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import lsmr as scipy_lsmr
from solver_cases import F64, Late, spd, with_singular_values
from torch import Tensor

from curvlinops import DiagonalLinearOperator, PyTorchLinearOperator, TensorLinearOperator, lsmr
from curvlinops.solvers import SolverInfo

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIDES = [(25, 15), (15, 25), (20, 20)]


class Counting(PyTorchLinearOperator):
    """A matrix between spaces of tensors that notes the columns of each product."""

    def __init__(self, matrix: Tensor, in_shape: list[Any], out_shape: list[Any]):
        super().__init__(in_shape, out_shape)
        self.matrix, self.late, self.late_adjoint = matrix, None, None
        self.widths: list[int] = []
        self.adjoint_widths: list[int] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def _state(self) -> dict[str, Any]:
        return {"matrix": self.matrix}

    def _product(self, matrix: Any, X: list[Tensor], shapes: list[Any]) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        width = X[0].shape[-1]
        flat = torch.cat([x.reshape(-1, width) for x in X])
        result = matrix(flat) if isinstance(matrix, Late) else matrix @ flat
        parts = result.split([shape.numel() for shape in shapes])
        return [y.reshape((*shape, width)) for y, shape in zip(parts, shapes, strict=True)]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.widths.append(X[0].shape[-1])
        return self._product(self.late or self.matrix, X, self.out_shape)

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.adjoint_widths.append(X[0].shape[-1])
        return self._product(self.late_adjoint or self.matrix.mH, X, self.in_shape)


def counting(matrix: Tensor) -> Counting:
    """Return a matrix on flat vectors that counts its products."""
    rows, columns = matrix.shape
    return Counting(matrix, [(columns,)], [(rows,)])


def failing(A: PyTorchLinearOperator, b: Any, **kwargs: Any) -> tuple[Any, SolverInfo]:
    """Solve, and check that there is one warning, with the text of the info."""
    with pytest.warns(UserWarning, match="^lsmr did not reach atol=.* or btol=") as caught:
        x, info = lsmr(A, b, **kwargs)
    assert [str(w.message) for w in caught] == [info.reason]
    assert caught[0].filename == __file__  # the warning points to the caller
    assert not info.converged.all()
    return x, info


def extended(A: Tensor, b: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return the system [A; damp I] x = [b; 0]."""
    columns = A.shape[1]
    eye = torch.eye(columns, dtype=A.dtype, device=A.device)
    return torch.cat([A, damp * eye]), torch.cat([b, b.new_zeros(columns, *b.shape[1:])])


# --------------------------------------------------------------------------------------------------
# Solutions
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize("rank", [15, 8, 1])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_solution(
    dtype: torch.dtype, sides: tuple[int, int], rank: int, damp: float, device: str
) -> None:
    """The shortest least-squares solution, of one or several systems, of any shape and rank.

    Complex: catches a transpose in place of the adjoint.
    """
    matrix = with_singular_values(*sides, torch.linspace(1, 9, rank), dtype).to(device)
    A = TensorLinearOperator(matrix)
    for columns in ((), (1,), (4,)):
        b = torch.randn(sides[0], *columns, dtype=dtype, device=device)
        if columns == (4,):
            b[:, 1] = matrix @ torch.randn(sides[1], dtype=dtype, device=device)
        before = b.clone()
        x, info = lsmr(A, b, atol=1e-13, btol=1e-13, damp=damp)
        assert (x.shape, x.dtype, x.device) == ((sides[1], *columns), dtype, b.device)
        assert torch.equal(b, before)
        B, c = extended(matrix, b, damp)
        best = torch.linalg.pinv(B, rtol=1e-10) @ c
        assert torch.allclose(x, best, rtol=1e-9, atol=1e-10)
        residuals = torch.linalg.vector_norm(c - B @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)
        assert torch.allclose(info.residual_norms, residuals.cpu().reshape(-1), atol=1e-11)
        assert info.reason == "converged"
        assert info.converged.all()
        for k, reason in enumerate(info.reasons):
            solved = info.residual_norms[k] < 1e-10
            assert reason == ("converged" if solved else "converged to a least-squares solution")


@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_minimises_the_normal_residual(damp: float) -> None:
    """After k steps, ‖Aᴴ r‖ is minimal over the Krylov space, and the estimates are true.

    Catches LSQR, which minimises ‖r‖, and wrong recurrences of the norms.
    """
    matrix = with_singular_values(14, 10, torch.linspace(0.2, 4, 10), torch.complex128)
    b = torch.randn(14, dtype=torch.complex128)
    B, c = extended(matrix, b, damp)
    gram, right = B.mH @ B, B.mH @ c
    basis = [right]
    for steps in range(1, 7):
        x, info = failing(
            TensorLinearOperator(matrix), b, max_iter=steps, damp=damp, atol=0, btol=0
        )
        Q, _ = torch.linalg.qr(torch.stack(basis, dim=1))
        coefficients = torch.linalg.lstsq(gram @ Q, right.unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(x, Q @ coefficients, rtol=1e-8, atol=1e-9)
        r = c - B @ x
        assert info.residual_norms.item() == pytest.approx((r.norm() / b.norm()).item(), rel=1e-9)
        # ‖A‖ is estimated by the Frobenius norm of the bidiagonal matrix
        norm = ((B.mH @ r).norm() / r.norm() / info.normal_residual_norms).item()
        largest = torch.linalg.matrix_norm(matrix, 2)
        assert 0.3 * largest <= norm <= 1.01 * torch.linalg.matrix_norm(matrix)
        basis.append(gram @ basis[-1])


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("tolerances", [(1e-6, 1e-6), (1e-2, 1e-9), (1e-10, 1e-3), (0.0, 1e-8)])
@pytest.mark.parametrize("sides", SIDES)
def test_iterations_of_scipy(
    sides: tuple[int, int], tolerances: tuple[float, float], damp: float, consistent: bool
) -> None:
    """The number of iterations, the reason and the solution are SciPy's."""
    matrix = with_singular_values(*sides, torch.linspace(1, 9, 15))
    b = torch.randn(sides[0], 3, dtype=F64) * torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    if consistent:
        b = matrix @ torch.randn(sides[1], 3, dtype=F64)
    atol, btol = tolerances
    x, info = lsmr(TensorLinearOperator(matrix), b, atol=atol, btol=btol, damp=damp)
    reasons = {1: "converged", 2: "converged to a least-squares solution"}
    for k in range(3):
        expected, stop, steps, *_ = scipy_lsmr(
            matrix.numpy(), b[:, k].numpy(), damp=damp, atol=atol, btol=btol, conlim=0, maxiter=200
        )
        assert abs(info.iterations[k].item() - steps) <= 1
        if atol > 0:
            assert info.reasons[k] == reasons[stop]
        scale = max(atol, btol, 1e-12) * 100 * abs(expected).max()
        assert abs(x[:, k].numpy() - expected).max() <= scale


@pytest.mark.parametrize("sides", SIDES)
def test_ill_conditioned(sides: tuple[int, int]) -> None:
    """A condition number of 1e8 converges where squares of singular values are below rounding."""
    values = torch.tensor([1e-8, 1e-4, 0.5, 1.0], dtype=F64).repeat(3)
    matrix = with_singular_values(*sides, values)
    solution = matrix.mH @ torch.randn(sides[0], 2, dtype=F64)
    A, b = TensorLinearOperator(matrix), matrix @ solution
    x, info = lsmr(A, b, atol=1e-14, btol=1e-14, max_iter=300)
    assert info.converged.all()
    assert (torch.linalg.vector_norm(b - matrix @ x, dim=0) <= 1e-12 * b.norm(dim=0)).all()
    assert torch.allclose(x, solution, atol=1e-7)
    # and a least-squares problem of condition 1e4
    matrix = with_singular_values(*sides, values[values > 1e-5])
    b = torch.randn(sides[0], 2, dtype=F64)
    x, info = lsmr(TensorLinearOperator(matrix), b, atol=1e-13, btol=1e-13, max_iter=300)
    assert set(info.reasons) == {"converged to a least-squares solution"}
    assert torch.allclose(x, torch.linalg.pinv(matrix, rtol=1e-10) @ b, rtol=1e-4, atol=1e-4)


def test_all_precision() -> None:
    """Tolerances of 0 end where the dtype can do no better, and that is convergence."""
    for dtype in (F64, torch.float32):
        matrix = with_singular_values(12, 8, torch.linspace(1, 4, 8)).to(dtype)
        b = torch.stack([torch.randn(12, dtype=dtype), matrix.sum(1)], dim=1)
        x, info = lsmr(TensorLinearOperator(matrix), b, atol=0, btol=0)
        assert info.reason == "converged"
        eps = torch.finfo(dtype).eps
        assert torch.allclose(x, torch.linalg.pinv(matrix) @ b, rtol=0, atol=50 * eps)


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
@pytest.mark.parametrize("what", ["b", "A"])
def test_scales(what: str, factor: float) -> None:
    """The sizes of b and A make no difference, also where squares under- or overflow."""
    matrix, b = with_singular_values(9, 6, torch.linspace(1, 4, 6)).float(), torch.randn(9, 2)
    a, c = (factor if name == what else 1.0 for name in "Ab")
    for damp in (0.0, 0.5):
        x, info = lsmr(TensorLinearOperator(matrix), b, damp=damp)
        scaled, scaled_info = lsmr(TensorLinearOperator(a * matrix), c * b, damp=a * damp)
        assert torch.equal(scaled, c / a * x)
        assert torch.equal(info.residual_norms, scaled_info.residual_norms)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Products are in the operator's dtype, sums and steps are not."""
    matrix = with_singular_values(60, 40, torch.linspace(1, 3, 40)).to(dtype)
    b = (1e-3 * torch.randn(60, 2)).to(dtype)
    x, info = lsmr(TensorLinearOperator(matrix), b, atol=1e-3, btol=1e-3)
    assert x.dtype == dtype
    assert info.converged.all()
    best = torch.linalg.pinv(matrix.double()) @ b.double()
    assert (x.double() - best).norm() <= tolerance * best.norm()


# --------------------------------------------------------------------------------------------------
# Formats and columns
# --------------------------------------------------------------------------------------------------
shapes = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3)


@given(
    in_shape=shapes,
    out_shape=shapes,
    extra=st.sampled_from([(), (0,), (1,), (3,)]),
    container=st.sampled_from(["tensor", "list", "tuple"]),
    dtype=st.sampled_from([F64, torch.complex128, torch.float32]),
    damp=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 100),
)
def test_any_shapes(
    in_shape: list[tuple[int, ...]],
    out_shape: list[tuple[int, ...]],
    extra: tuple[int, ...],
    container: str,
    dtype: torch.dtype,
    damp: float,
    seed: int,
) -> None:
    """Any shapes, formats and dtypes: the solution comes in the format of b."""
    torch.manual_seed(seed)
    columns, rows = (sum(math.prod(s) for s in space) for space in (in_shape, out_shape))
    values = torch.linspace(1, 3, min(rows, columns))
    matrix = with_singular_values(rows, columns, values, dtype)
    A = Counting(matrix, in_shape, out_shape)
    flat = torch.randn(rows, *extra, dtype=dtype)
    parts = flat.split([math.prod(s) for s in out_shape])
    tensors = [t.reshape((*s, *extra)) for t, s in zip(parts, out_shape, strict=True)]
    b = {"tensor": flat, "list": tensors, "tuple": tuple(tensors)}[container]
    exact = 1e-6 if dtype == torch.float32 else 1e-12
    x, info = lsmr(A, b, damp=damp, atol=exact, btol=exact)
    assert type(x) is type(b)
    if container != "tensor":
        assert [t.shape for t in x] == [(*s, *extra) for s in in_shape]
        sizes = [math.prod(s) for s in in_shape]
        x = torch.cat([t.reshape((n, *extra)) for t, n in zip(x, sizes, strict=True)])
    B, c = extended(matrix, flat, damp)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    expected = torch.linalg.pinv(B) @ c.reshape(rows + columns, -1)
    assert torch.allclose(x, expected.reshape(x.shape), rtol=tolerance, atol=tolerance)
    steps = max(info.iterations.tolist(), default=0)
    assert len(A.widths) == steps
    assert len(A.adjoint_widths) == (steps + 1 if extra != (0,) else 0)


def uneven_columns(matrix: Tensor) -> Tensor:
    """Return right-hand sides that take many, one, no, and three iterations."""
    U, _, _ = torch.linalg.svd(matrix)
    zero = torch.zeros_like(U[:, 0])
    return torch.stack([torch.ones_like(zero), U[:, 3], zero, U[:, :3].sum(1)], dim=1)


def test_products() -> None:
    """One product with A and one with Aᴴ per iteration, of the columns that go on."""
    matrix = with_singular_values(40, 30, torch.linspace(1, 9, 30))
    A, b = counting(matrix), uneven_columns(matrix)
    _, info = lsmr(A, b)
    assert info.iterations.tolist()[1:] == [1, 0, 3]
    last = info.iterations[0].item()
    assert last > 10
    assert A.widths == [3] + 2 * [2] + (last - 3) * [1]
    assert A.adjoint_widths == [3, *A.widths]


@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_stopped_columns_stay(damp: float) -> None:
    """Columns that converged do not change any more, to the last bit."""
    matrix = with_singular_values(40, 30, torch.linspace(1, 9, 30))
    A = TensorLinearOperator(matrix)
    b = torch.cat([uneven_columns(matrix), matrix @ torch.randn(30, 3, dtype=F64)], dim=1)
    x, info = lsmr(A, b, atol=1e-2, btol=1e-2, damp=damp)
    assert len(info.iterations.unique()) >= 3
    for steps in info.iterations.unique().tolist()[:-1]:
        early, early_info = failing(A, b, atol=1e-2, btol=1e-2, damp=damp, max_iter=steps)
        done = early_info.converged
        assert torch.equal(done, info.iterations <= steps)
        assert torch.equal(early[:, done], x[:, done])


@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_together_as_alone(damp: float) -> None:
    """A column's solution and info do not depend on the others, nor on its place."""
    matrix = with_singular_values(40, 30, torch.linspace(1, 4, 30))
    A = TensorLinearOperator(matrix)
    b = torch.cat([uneven_columns(matrix), torch.randn(40, 2, dtype=F64)], dim=1)
    b = b * torch.logspace(-4, 4, 6, dtype=F64)
    x, info = lsmr(A, b, atol=1e-3, btol=1e-3, damp=damp)
    for k in range(6):
        alone, one = lsmr(A, b[:, k], atol=1e-3, btol=1e-3, damp=damp)
        assert torch.allclose(x[:, k], alone, rtol=0, atol=1e-6 * alone.norm().item())
        assert torch.equal(one.iterations, info.iterations[k : k + 1])
        assert one.reasons == info.reasons[k : k + 1]
        assert torch.allclose(one.residual_norms, info.residual_norms[k : k + 1], rtol=1e-4)


def test_zero() -> None:
    """b = 0, Aᴴ b = 0 and A = 0 give x = 0, in no iteration."""
    matrix = torch.eye(4, 2, dtype=F64)
    b = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 3, 4], [0, 4, 5]], dtype=F64)
    A = counting(matrix)
    x, info = lsmr(A, b)
    assert torch.allclose(x, torch.tensor([[0, 0, 1], [0, 0, 2]], dtype=F64))
    assert info.iterations.tolist() == [0, 0, 1]
    assert info.residual_norms[:2].tolist() == [0, 1]
    assert info.reasons[:2] == ["converged", "converged to a least-squares solution"]
    assert info.reason == "converged"
    x, info = lsmr(counting(0 * matrix), b)
    assert torch.equal(x, torch.zeros(2, 3, dtype=F64))
    A.adjoint_widths.clear()
    x, info = lsmr(A, b[:, 0])
    assert A.adjoint_widths == []
    assert info.history == [0.0]


# --------------------------------------------------------------------------------------------------
# What can go wrong
# --------------------------------------------------------------------------------------------------
def test_not_converging() -> None:
    """Too few iterations: the iterate so far, and one warning that tells why and for which."""
    matrix = with_singular_values(40, 30, torch.linspace(1, 9, 30))
    A, b = TensorLinearOperator(matrix), uneven_columns(matrix)
    x, info = failing(A, b, max_iter=2)
    assert info.converged.tolist() == [False, True, True, False]
    assert "lsmr did not reach atol=1e-06 or btol=1e-06. 2 columns (0, 3) of 4:" in info.reason
    assert "max_iter = 2 is reached (relative residual " in info.reason
    assert info.history[0] == 1
    assert len(info.history) == 3
    x, info = failing(A, b[:, 0], max_iter=0)
    assert torch.equal(x, torch.zeros(30, dtype=F64))
    # by default, ten times the smaller side
    A = DiagonalLinearOperator([torch.logspace(-7, 0, 30, dtype=F64)])
    _, info = failing(A, torch.ones(30, dtype=F64), atol=1e-14, btol=1e-14)
    assert info.iterations.tolist() == [300]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    """What is not finite stops its columns, of which a finite iterate is returned."""
    matrix = with_singular_values(9, 7, torch.linspace(1, 9, 7))
    b = torch.randn(9, 3, dtype=F64)
    solution = torch.linalg.pinv(matrix) @ b
    broken = b.clone()
    broken[2, 1] = value
    x, info = failing(TensorLinearOperator(matrix), broken, atol=1e-12, btol=1e-12)
    assert torch.allclose(x[:, [0, 2]], solution[:, [0, 2]])
    assert torch.equal(x[:, 1], torch.zeros(7, dtype=F64))
    assert "1 column (1) of 3: b is not finite" in info.reason
    expected, _ = failing(TensorLinearOperator(matrix), b, max_iter=2)
    for late, number, steps in (("late", 3, 2), ("late_adjoint", 4, 2), ("late_adjoint", 1, 0)):
        A = counting(matrix)
        setattr(A, late, Late(matrix if late == "late" else matrix.mH, value, number))
        x, info = failing(A, b, atol=1e-12, btol=1e-12)
        assert torch.allclose(x[:, 0], expected[:, 0] if steps else torch.zeros(7, dtype=F64))
        assert torch.allclose(x[:, 1:], solution[:, 1:])
        assert info.iterations[0] == steps
        assert info.residual_norms.isfinite().all()
        assert "1 column (0) of 3: a product with A or the preconditioner" in info.reason


def test_overflow() -> None:
    """A solution that its dtype cannot hold is not returned as infinity."""
    A = DiagonalLinearOperator([torch.full((3,), 1e-44)])
    x, info = failing(A, torch.ones(3))
    assert torch.equal(x, torch.zeros(3))
    assert "the solution is too large for its dtype" in info.reason


def test_errors() -> None:
    """Errors name what was given, and say what to pass instead."""
    A, b = TensorLinearOperator(torch.ones(3, 2, dtype=F64)), torch.ones(3, 2, dtype=F64)
    for error, message, args, kwargs in (
        (TypeError, "A must be a linear operator, got Tensor; wrap", (A.matrix, b), {}),
        (ValueError, r"must have shape \[3\] or \[3, K\], got \[4\]", (A, torch.ones(4)), {}),
        (ValueError, "Dtype mismatch.*but b has torch.float32", (A, b.float()), {}),
        (ValueError, r"atol must be .* at least 0, got -1", (A, b), {"atol": -1}),
        (ValueError, r"btol must be .* got nan", (A, b), {"btol": math.nan}),
        (TypeError, r"damp must be a number, got None", (A, b), {"damp": None}),
        (ValueError, r"max_iter must be at least 0, got -1", (A, b), {"max_iter": -1}),
    ):
        with pytest.raises(error, match=message):
            lsmr(*args, **kwargs)

    class NoAdjoint(PyTorchLinearOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return X

    with pytest.raises(NotImplementedError, match="NoAdjoint has no adjoint"):
        lsmr(NoAdjoint([(3,)], [(3,)]), b)
    A = TensorLinearOperator(spd(3).requires_grad_())
    state = torch.get_rng_state()
    x, _ = lsmr(A, b.requires_grad_())
    assert not x.requires_grad
    assert torch.equal(state, torch.get_rng_state())
