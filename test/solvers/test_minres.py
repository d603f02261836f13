"""Tests of ``curvlinops.solvers.minres``."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import minres as scipy_minres
from solver_cases import (
    F64,
    Counting,
    Function,
    Late,
    alternating,
    hermitian,
    relative_residuals,
    spd,
)
from torch import Tensor

from curvlinops import (
    DiagonalLinearOperator,
    IdentityLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    minres,
    record_gradients,
)
from curvlinops.solvers import SolverInfo

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def indefinite(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with eigenvalues between -2 and 5, none near 0."""
    below = dim // 3
    values = [torch.linspace(-2, -1, below), torch.linspace(1, 5, dim - below)]
    return hermitian(torch.cat(values).double(), dtype)


def failing(A: PyTorchLinearOperator, b: Any, **kwargs: Any) -> tuple[Any, SolverInfo]:
    """Solve, and check that there is one warning, with the text of the info."""
    with pytest.warns(UserWarning, match="^minres did not reach the tolerance") as caught:
        x, info = minres(A, b, **kwargs)
    assert [str(w.message) for w in caught] == [info.reason]
    assert caught[0].filename == __file__  # the warning points to the caller
    assert not info.converged.all()
    return x, info


# --------------------------------------------------------------------------------------------------
# Solutions
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("num_columns", [None, 1, 4])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_solution(
    dtype: torch.dtype, num_columns: int | None, preconditioned: bool, device: str
) -> None:
    """The solution of an indefinite system is that of a direct solver.

    Complex: catches inner products without conjugate.
    """
    dim = 12
    matrix, M = indefinite(dim, dtype).to(device), spd(dim, 5.0, dtype).to(device)
    shape = (dim,) if num_columns is None else (dim, num_columns)
    b = torch.randn(shape, dtype=dtype, device=device)
    A, M_op = TensorLinearOperator(matrix), TensorLinearOperator(M)
    before = b.clone()
    x, info = minres(A, b, tolerance=1e-12, preconditioner=M_op if preconditioned else None)
    assert (x.shape, x.dtype, x.device) == (b.shape, dtype, b.device)
    assert torch.equal(b, before)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-9)
    for field in (info.iterations, info.residual_norms, info.converged, info.normal_residual_norms):
        assert field.shape == (num_columns or 1,)
        assert field.device.type == "cpu"
    assert info.reason == "converged"
    assert info.reasons == ["converged"] * (num_columns or 1)
    # known one step late, as in the recurrence
    assert (info.normal_residual_norms <= 1).all() and (info.normal_residual_norms > 0).all()


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_minimises_the_residual(preconditioned: bool, dtype: torch.dtype) -> None:
    """After k steps, rᴴ M r is minimal over the Krylov space from x0, and the info is true.

    Catches other solvers (conjugate gradients, SYMMLQ), wrong rotations, and a residual norm in
    the wrong norm.
    """
    dim = 11
    matrix, M = indefinite(dim, dtype), torch.eye(dim, dtype=dtype)
    if preconditioned:
        M = spd(dim, 50.0, dtype)
    b, x0 = torch.randn(dim, dtype=dtype), torch.randn(dim, dtype=dtype)
    root = torch.linalg.cholesky(M).mH  # ‖root r‖² = rᴴ M r
    M_op = TensorLinearOperator(M) if preconditioned else None
    basis = [M @ (b - matrix @ x0)]
    for steps in range(1, 7):
        x, info = failing(
            TensorLinearOperator(matrix),
            b,
            x0=x0,
            max_iter=steps,
            preconditioner=M_op,
            tolerance=1e-9,
        )
        Q, _ = torch.linalg.qr(torch.stack(basis, dim=1))
        best = x0 + Q @ torch.linalg.lstsq(
            root @ matrix @ Q, root @ (b - matrix @ x0).unsqueeze(1)
        ).solution.squeeze(1)
        assert torch.allclose(x, best, rtol=1e-7, atol=1e-8)
        assert torch.allclose(info.residual_norms, relative_residuals(matrix, x, b), rtol=1e-8)
        assert info.history[-1] == info.residual_norms
        assert info.iterations == steps
        basis.append(M @ (matrix @ basis[-1]))


def scipy_steps(
    matrix: Tensor, b: Tensor, tolerance: float, M: Tensor | None, x0: Tensor | None
) -> int:
    """Return after how many of SciPy's iterations the residual is below tolerance · ‖b‖.

    SciPy's own criterion is relative to ‖A‖ ‖x‖, so its iterates are taken instead.
    """
    steps: list[bool] = []
    name = "rtol" if "rtol" in inspect.signature(scipy_minres).parameters else "tol"
    scipy_minres(
        matrix.numpy(),
        b.numpy(),
        **{name: 1e-14},
        maxiter=4 * len(b),
        M=None if M is None else LinearOperator(M.shape, lambda v: M.numpy() @ v, dtype=float),
        x0=None if x0 is None else x0.numpy(),
        callback=lambda x: steps.append(
            bool((b - matrix @ torch.from_numpy(x)).norm() <= tolerance * b.norm())
        ),
    )
    assert True in steps
    return 1 + steps.index(True)


@pytest.mark.parametrize("with_x0", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("definite", [False, True])
def test_iterations_of_scipy(
    definite: bool, tolerance: float, preconditioned: bool, with_x0: bool
) -> None:
    """The number of iterations is that of SciPy's iterates, whatever other columns do."""
    dim = 60
    matrix = spd(dim, 300.0) if definite else indefinite(dim)
    b = torch.randn(dim, 3, dtype=F64) * torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    M = spd(dim, 3.0) if preconditioned else None
    x0 = torch.linalg.solve(matrix, b) + 0.1 * torch.randn(dim, 3, dtype=F64) if with_x0 else None
    _, info = minres(
        TensorLinearOperator(matrix),
        b,
        tolerance=tolerance,
        preconditioner=None if M is None else TensorLinearOperator(M),
        x0=x0,
    )
    for k in range(3):
        expected = scipy_steps(matrix, b[:, k], tolerance, M, None if x0 is None else x0[:, k])
        assert abs(info.iterations[k].item() - expected) <= 1


SPECTRA = {
    "even": torch.linspace(-3, 5.1, 50, dtype=F64),
    "many scales": alternating(torch.logspace(-3, 0, 50, dtype=F64)),
    "positive": torch.logspace(-3, 0, 50, dtype=F64),
    "clusters": torch.tensor([-2.0, -1e-4, 1e-2, 1.0, 3.0], dtype=F64).repeat(10),
    "condition 1e8": torch.cat(
        [torch.tensor([1e-8], dtype=F64), torch.linspace(-1, 1.1, 49, dtype=F64)]
    ),
    "condition 1e8, clusters": torch.tensor([-1.0, 1e-8, 2.0], dtype=F64).repeat(16),
}


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name: str, dtype: torch.dtype) -> None:
    """Converged columns have a small residual, in truth, up to a condition number of 1e8.

    Catches least-squares stops of systems that can be solved.
    """
    matrix = hermitian(SPECTRA[name], dtype)
    b = torch.randn(len(matrix), 3, dtype=dtype)
    b[:, 1] = matrix @ b[:, 1]
    x, info = minres(TensorLinearOperator(matrix), b, tolerance=1e-5, max_iter=1000)
    assert info.converged.all()
    residuals = relative_residuals(matrix, x, b)
    assert (residuals <= 1.1e-5).all()
    assert torch.allclose(info.residual_norms, residuals, rtol=1e-2)


def test_drift_is_told() -> None:
    """Residuals that are small by the recurrence only are found out, by one more product.

    Catches solvers that report what they updated.
    """
    small = torch.tensor([1e-8, -1e-8, 1e-8], dtype=F64)
    matrix = hermitian(torch.cat([small, torch.linspace(-1, 1.1, 60, dtype=F64)]))
    A, b = Counting(matrix), torch.randn(63, 2, dtype=F64)
    b[:, 1] = matrix @ b[:, 1]  # hardly has anything of the small eigenvalues
    x, info = failing(A, b, tolerance=1e-10, max_iter=2000)
    assert info.converged.tolist() == [False, True]
    assert "1 column (0) of 2: the iteration's residual is small enough, but" in info.reason
    assert info.history[-1] <= 1e-10
    residuals = relative_residuals(matrix, x, b)
    assert residuals[0] > 1e-8
    assert torch.allclose(info.residual_norms, residuals, rtol=0.1)
    assert len(A.widths) == info.iterations.max() + 1


# --------------------------------------------------------------------------------------------------
# Singular systems
# --------------------------------------------------------------------------------------------------
NULL = {
    "one": torch.cat([torch.zeros(1), torch.linspace(-3, -1, 19), torch.linspace(1, 5, 20)]),
    "many": torch.cat([torch.zeros(20), torch.linspace(1, 10, 20)]),
    "clusters": torch.tensor([0.0, -1.0, 2.0, 2.0]).repeat(10),
    "projection": torch.tensor([0.0, 1.0]).repeat(20),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128])
@pytest.mark.parametrize("name", NULL)
def test_singular(name: str, dtype: torch.dtype) -> None:
    """b in the range: solved, by the shortest x. Else: a least-squares solution, honestly told.

    Catches iterating on, where x grows without bound along null vectors.
    """
    matrix = hermitian(NULL[name].double(), torch.promote_types(F64, dtype))
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)
    matrix, inverse = matrix.to(dtype), inverse.to(dtype)
    A = TensorLinearOperator(matrix)
    eps = torch.finfo(dtype).eps
    b = torch.randn(40, 3, dtype=dtype)
    inside = matrix @ b
    tolerance = 100 * eps
    x, info = minres(A, inside, tolerance=tolerance)
    assert info.converged.all()
    assert torch.allclose(x, inverse @ inside, rtol=1e3 * eps, atol=1e3 * eps)

    for mixed in (b, torch.stack([inside[:, 0], b[:, 1], inside[:, 2]], dim=1)):
        outside = relative_residuals(matrix, inverse @ mixed, mixed) > 1e-3
        x, info = failing(A, mixed, tolerance=tolerance, max_iter=1000)
        assert torch.equal(~info.converged, outside)
        assert "A is singular to rounding, and b not in its range; x is about" in info.reason
        assert info.iterations.max() < 120
        assert x.isfinite().all()
        assert x.norm(dim=0).max() < 1e4
        normal = matrix @ (mixed - matrix @ x)
        assert normal.norm(dim=0).max() <= 30 * eps**0.5 * mixed.norm()
        best = relative_residuals(matrix, inverse @ mixed, mixed)
        assert torch.allclose(relative_residuals(matrix, x, mixed), best, rtol=1e-4, atol=1e-4)
        assert torch.allclose(info.residual_norms.to(best.dtype), best, rtol=1e-4, atol=1e-4)
        assert (info.normal_residual_norms[outside] <= 30 * eps**0.5).all()


def test_rhs_in_the_null_space() -> None:
    """x = 0 is the best there is; and so it is for the operator 0."""
    A = DiagonalLinearOperator([torch.tensor([0.0, 1.0, -1.0], dtype=F64)])
    b = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 3.0]], dtype=F64)
    x, info = failing(A, b)
    assert torch.equal(x[:, 0], torch.zeros(3, dtype=F64))
    assert torch.allclose(x[1:, 1], torch.tensor([2.0, -3.0], dtype=F64))
    assert info.iterations[0] == 0
    assert info.normal_residual_norms[0] == 0
    x, info = failing(0 * A, b, x0=torch.ones_like(b))
    assert torch.equal(x, torch.ones_like(b))
    assert info.residual_norms.tolist() == [1, 1]


def test_preconditioned_least_squares() -> None:
    """With a preconditioner M, the least squares are those of ‖·‖_M."""
    matrix = hermitian(torch.cat([torch.zeros(5), torch.linspace(-2, 3.3, 15)]).double())
    M = spd(20, 1e4)
    root = torch.linalg.cholesky(M).mH
    b = torch.randn(20, 2, dtype=F64)
    x, _ = failing(TensorLinearOperator(matrix), b, preconditioner=TensorLinearOperator(M))
    best = torch.linalg.pinv(root @ matrix, rtol=1e-10) @ (root @ b)
    assert torch.allclose(matrix @ x, matrix @ best, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
@pytest.mark.parametrize("what", ["b", "A", "M"])
def test_scales(what: str, factor: float) -> None:
    """The sizes of b, A and M make no difference, also where squares under- or overflow."""
    matrix, M = indefinite(9).float(), spd(9, 4.0).float()
    b, start = torch.randn(2, 9, 2)
    x, info = minres(TensorLinearOperator(matrix), b, preconditioner=TensorLinearOperator(M))
    factors = {name: factor if name == what else 1.0 for name in "bAM"}
    A, P = (TensorLinearOperator(factors[n] * m) for n, m in zip("AM", (matrix, M), strict=True))
    ratio = factors["b"] / factors["A"]
    scaled, scaled_info = minres(A, factors["b"] * b, preconditioner=P)
    assert torch.equal(scaled, ratio * x)
    assert torch.equal(info.residual_norms, scaled_info.residual_norms)
    expected = minres(TensorLinearOperator(matrix), b, x0=start)[0]
    assert torch.equal(minres(A, factors["b"] * b, x0=ratio * start)[0], ratio * expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_low_precision(dtype: torch.dtype, tolerance: float, preconditioned: bool) -> None:
    """Products are in the operator's dtype, sums and steps are not."""
    dim = 300
    diagonal = torch.cat([torch.linspace(-3, -1, 100), torch.linspace(1, 4, 200)]).to(dtype)
    A = DiagonalLinearOperator([diagonal])
    b = (1e-3 * torch.randn(dim, 2)).to(dtype)
    seen = []

    def precondition(r: Tensor) -> Tensor:
        seen.append(r.dtype)
        return r / diagonal.abs().sqrt().unsqueeze(1)

    M = precondition if preconditioned else None
    x, info = minres(A, b, tolerance=1e-4, preconditioner=M)
    assert x.dtype == dtype
    assert info.converged.all()
    assert set(seen) <= {dtype}
    matrix = torch.diag(diagonal.double())
    assert relative_residuals(matrix, x.double(), b.double()).max() < tolerance


def test_overflow() -> None:
    """A solution that its dtype cannot hold is not returned as infinity."""
    tiny = DiagonalLinearOperator([torch.full((3,), 1e-44)])
    half = DiagonalLinearOperator([torch.full((3,), 1e-4, dtype=torch.float16)])
    for A, b in ((tiny, torch.ones(3)), (half, torch.full((3,), 100.0, dtype=torch.float16))):
        x, info = failing(A, b)
        assert torch.equal(x, torch.zeros_like(b))
        assert info.residual_norms.tolist() == [1]
        assert "the solution is too large for its dtype" in info.reason


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tolerance_zero(dtype: torch.dtype) -> None:
    """A tolerance of 0 goes on to what rounding allows, without 0 / 0."""
    matrix = indefinite(10).to(dtype)
    b = torch.randn(10, 3, dtype=dtype)
    x, info = minres(TensorLinearOperator(matrix), b, tolerance=0)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e3 * eps, atol=1e3 * eps)
    assert info.converged.all()


# --------------------------------------------------------------------------------------------------
# Formats, preconditioner, start
# --------------------------------------------------------------------------------------------------
@given(
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3),
    extra=st.sampled_from([(), (0,), (1,), (3,)]),
    container=st.sampled_from(["tensor", "list", "tuple"]),
    dtype=st.sampled_from([F64, torch.complex128, torch.float32]),
    preconditioned=st.booleans(),
    with_x0=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shapes(
    shapes: list[tuple[int, ...]],
    extra: tuple[int, ...],
    container: str,
    dtype: torch.dtype,
    preconditioned: bool,
    with_x0: bool,
    seed: int,
) -> None:
    """Any shapes, formats and dtypes: the solution comes in the format of b."""
    torch.manual_seed(seed)
    sizes = [math.prod(shape) for shape in shapes]
    matrix = indefinite(sum(sizes), dtype)
    A = Counting(matrix, shapes)
    flat = torch.randn(sum(sizes), *extra, dtype=dtype)

    def pack(v: Tensor) -> Any:
        parts = [t.reshape((*s, *extra)) for t, s in zip(v.split(sizes), shapes, strict=True)]
        return {"tensor": v, "list": parts, "tuple": tuple(parts)}[container]

    b = pack(flat)
    x, info = minres(
        A,
        b,
        x0=pack(torch.randn_like(flat)) if with_x0 else None,
        preconditioner=(lambda r: 3 * r) if preconditioned else None,
        tolerance=1e-5 if dtype == torch.float32 else 1e-10,
    )
    assert type(x) is type(b)
    tensors = [x] if container == "tensor" else x
    assert [t.shape for t in tensors] == [t.shape for t in ([b] if container == "tensor" else b)]
    solution = (
        x
        if container == "tensor"
        else torch.cat([t.reshape((s, *extra)) for t, s in zip(x, sizes, strict=True)])
    )
    expected = torch.linalg.solve(matrix, flat.reshape(sum(sizes), -1)).reshape(flat.shape)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    assert torch.allclose(solution, expected, rtol=tolerance, atol=tolerance)
    assert len(info.iterations) == (extra[0] if extra else 1)
    steps = max(info.iterations.tolist(), default=0)
    assert len(A.widths) == steps + (with_x0 and extra != (0,))


def test_preconditioner() -> None:
    """An operator and a function do the same, and a good one saves iterations.

    Catches a preconditioner that approximates A instead of its inverse, and one that is ignored.
    """
    dim = 30
    scale = torch.logspace(-3, 3, dim, dtype=F64)
    matrix = scale[:, None] * indefinite(dim) * scale
    A, b = TensorLinearOperator(matrix), torch.randn(dim, 3, dtype=F64)
    widths: list[int] = []

    def multiply(r: Tensor) -> Tensor:
        widths.append(r.shape[1])
        return scale[:, None] ** -2 * r

    M = DiagonalLinearOperator([scale**-2])
    x, info = minres(A, b, preconditioner=M)
    with_function, function_info = minres(A, b, preconditioner=multiply)
    assert torch.equal(x, with_function)
    assert torch.equal(info.iterations, function_info.iterations)
    assert len(widths) == info.iterations.max() + 1
    assert info.iterations.max() <= 2 * dim
    _, plain = failing(A, b, max_iter=4 * dim)
    assert plain.residual_norms.min() > 1e-5
    # the inverse of the absolute value: two iterations
    values, Q = torch.linalg.eigh(matrix)
    _, info = minres(A, b, preconditioner=lambda r: Q @ ((Q.T @ r) / values.abs()[:, None]))
    assert info.iterations.tolist() == [2, 2, 2]


def test_preconditioner_of_many_scales() -> None:
    """What counts as singular is the preconditioned operator, not A or the preconditioner.

    Catches directions that are measured in the Euclidean norm.
    """
    scale = torch.logspace(-9, 9, 30, dtype=F64)
    A = TensorLinearOperator(scale[:, None] * indefinite(30) * scale)
    b = scale[:, None] * torch.randn(30, 2, dtype=F64)
    x, info = minres(A, b, preconditioner=DiagonalLinearOperator([scale**-2]), tolerance=1e-8)
    assert info.converged.all()
    assert relative_residuals(A.matrix, x, b).max() <= 1.1e-8


def test_identity_returns_its_argument() -> None:
    """Functions that return what they are given, or a view, do no harm."""
    diagonal = torch.linspace(-3, 5, 7, dtype=F64)
    A, b = DiagonalLinearOperator([diagonal]), torch.randn(7, 2, dtype=F64)
    expected, _ = minres(A, b, tolerance=1e-12)
    for M in (lambda r: r, lambda r: r[:], IdentityLinearOperator([(7,)], "cpu", F64)):
        x, _ = minres(A, b, tolerance=1e-12, preconditioner=M, x0=torch.zeros_like(b))
        assert torch.allclose(x, expected, rtol=1e-12)
    x, info = minres(Function(lambda x: x, 7), b)
    assert torch.allclose(x, b, rtol=1e-15)
    assert info.iterations.tolist() == [1, 1]


def test_start() -> None:
    """A start at the solution takes no steps and is returned; a close one saves steps."""
    matrix = indefinite(30)
    A, b = Counting(matrix), torch.randn(30, 2, dtype=F64)
    solution, cold = minres(A, b, tolerance=1e-8)
    A.widths.clear()
    x, info = minres(A, b, tolerance=1e-6, x0=solution)
    assert torch.equal(x, solution)
    assert A.widths == [2]
    assert info.iterations.tolist() == [0, 0]
    start = solution + torch.tensor([[1e-6, 0.0]], dtype=F64)
    x, info = minres(A, b, tolerance=1e-8, x0=start)
    assert torch.equal(x[:, 1], solution[:, 1])
    assert 0 < info.iterations[0] < cold.iterations[0]
    assert info.history[0] == pytest.approx(relative_residuals(matrix, start, b).max().item())


# --------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------
def uneven_columns(matrix: Tensor) -> Tensor:
    """Return right-hand sides that take many, one, no and three iterations."""
    _, Q = torch.linalg.eigh(matrix)
    zero = torch.zeros(len(matrix), dtype=matrix.dtype)
    return torch.stack([Q @ torch.ones_like(zero), Q[:, 3], zero, Q[:, :3].sum(1)], dim=1)


def test_products() -> None:
    """One product per iteration for all columns together, on those that go on; one for x0."""
    matrix = indefinite(40)
    A, b = Counting(matrix), uneven_columns(matrix)
    x, info = minres(A, b)
    assert info.iterations.tolist()[1:] == [1, 0, 3]
    last = info.iterations[0].item()
    assert last > 10
    assert A.widths == [3] + 2 * [2] + (last - 3) * [1]
    assert torch.allclose(matrix @ x, b, atol=1e-4)
    A.widths.clear()
    _, info = minres(A, b, x0=torch.randn(40, 4, dtype=F64))
    assert len(A.widths) == 1 + info.iterations.max()


@pytest.mark.parametrize("preconditioned", [False, True])
def test_stopped_columns_stay(preconditioned: bool) -> None:
    """Columns that converged do not change any more, to the last bit."""
    matrix = indefinite(40)
    A = TensorLinearOperator(matrix)
    M = TensorLinearOperator(spd(40, 9.0)) if preconditioned else None
    b = torch.cat([uneven_columns(matrix), torch.randn(40, 3, dtype=F64)], dim=1)
    b[:, 4] += 2 * matrix @ b[:, 4]
    x, info = minres(A, b, tolerance=1e-2, preconditioner=M)
    assert len(info.iterations.unique()) >= 4
    for steps in info.iterations.unique().tolist()[:-1]:
        early, early_info = failing(A, b, tolerance=1e-2, max_iter=steps, preconditioner=M)
        done = early_info.converged
        assert torch.equal(done, info.iterations <= steps)
        assert torch.equal(early[:, done], x[:, done])
        assert torch.equal(early_info.iterations[done], info.iterations[done])


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("with_x0", [False, True])
def test_together_as_alone(with_x0: bool, preconditioned: bool) -> None:
    """A column's solution and info do not depend on the others, nor on its place.

    Catches numbers of one column that are taken for another's when columns stop.
    """
    matrix = indefinite(40)
    A = TensorLinearOperator(matrix)
    M = TensorLinearOperator(spd(40, 9.0)) if preconditioned else None
    b = torch.cat([uneven_columns(matrix), torch.randn(40, 2, dtype=F64)], dim=1)
    sizes = torch.logspace(-4, 4, 6, dtype=F64)
    b = b * sizes
    x0 = sizes * torch.randn(40, 6, dtype=F64) if with_x0 else None
    tolerance = 0.05  # few steps, so that rounding is not yet magnified
    x, info = minres(A, b, tolerance=tolerance, x0=x0, preconditioner=M)
    for k in range(6):
        start = None if x0 is None else x0[:, k]
        alone, one = minres(A, b[:, k], tolerance=tolerance, x0=start, preconditioner=M)
        assert torch.allclose(x[:, k], alone, rtol=0, atol=1e-5 * alone.norm().item())
        assert torch.equal(one.iterations, info.iterations[k : k + 1])
        assert torch.allclose(one.residual_norms, info.residual_norms[k : k + 1], rtol=1e-3)


@pytest.mark.parametrize("with_x0", [False, True])
def test_zero_rhs(with_x0: bool) -> None:
    """b = 0 gives x = 0 among others, also from another start, and takes no product."""
    matrix = indefinite(10)
    A, b = Counting(matrix), torch.randn(10, 3, dtype=F64)
    b[:, 1] = 0
    x0 = torch.randn(10, 3, dtype=F64) if with_x0 else None
    x, info = minres(A, b, x0=x0, tolerance=1e-10)
    assert torch.equal(x[:, 1], torch.zeros(10, dtype=F64))
    assert (info.iterations[1], info.residual_norms[1]) == (0, 0)
    assert torch.allclose(x, torch.linalg.solve(matrix, b))
    A.widths.clear()
    x, info = minres(A, b[:, 1])
    assert torch.equal(x, b[:, 1])
    assert A.widths == []
    assert info.reason == "converged"


# --------------------------------------------------------------------------------------------------
# What can go wrong
# --------------------------------------------------------------------------------------------------
def test_not_converging() -> None:
    """Too few iterations: the iterate so far, and one warning that tells why and for which."""
    matrix = indefinite(40)
    A, b = TensorLinearOperator(matrix), uneven_columns(matrix)
    x, info = failing(A, b, max_iter=2)
    assert info.converged.tolist() == [False, True, True, False]
    assert info.iterations.tolist() == [2, 1, 0, 2]
    assert "2 columns (0, 3) of 4: max_iter = 2 is reached (relative residual " in info.reason
    assert "of the normal equations " in info.reason
    late = "max_iter = 2 is reached"
    assert info.reasons == [late, "converged", "converged", late]
    x, info = failing(A, b[:, 0], max_iter=0)
    assert torch.equal(x, torch.zeros_like(x))
    assert info.history == [1.0]


def test_default_max_iter() -> None:
    """By default, there are 5·D iterations."""
    A = DiagonalLinearOperator([torch.logspace(-7, 0, 30, dtype=F64)])
    _, info = failing(A, torch.ones(30, dtype=F64), tolerance=1e-14)
    assert info.iterations.tolist() == [150]


def test_indefinite_preconditioner() -> None:
    """The reason names the preconditioner, at the start and later."""
    A, b = TensorLinearOperator(indefinite(6)), torch.randn(6, 2, dtype=F64)
    for M in (lambda r: -r, torch.zeros_like):
        x, info = failing(A, b, preconditioner=M)
        assert torch.equal(x, torch.zeros_like(b))
        assert "2 columns (0, 1) of 2: the preconditioner M is not positive" in info.reason
    signs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0], dtype=F64).unsqueeze(1)
    b[5] = 1e-3
    x, info = failing(A, b, preconditioner=lambda r: signs * r)
    assert "the preconditioner M is not positive" in info.reason
    assert x.isfinite().all()
    assert torch.allclose(info.residual_norms, relative_residuals(A.matrix, x, b))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    """What is not finite stops its columns, of which a finite iterate is returned."""
    matrix = indefinite(8)
    b = torch.randn(8, 3, dtype=F64)
    solution = torch.linalg.solve(matrix, b)
    A = TensorLinearOperator(matrix)
    broken = b.clone()
    broken[2, 1] = value
    x, info = failing(A, broken, tolerance=1e-10)
    assert torch.allclose(x[:, [0, 2]], solution[:, [0, 2]])
    assert torch.equal(x[:, 1], torch.zeros(8, dtype=F64))
    assert info.residual_norms[1] == math.inf
    assert "1 column (1) of 3: b is not finite" in info.reason
    x0 = torch.zeros_like(b)
    x0[4, 0] = value
    x, info = failing(A, b, x0=x0, tolerance=1e-10)
    assert torch.allclose(x[:, 1:], solution[:, 1:])
    assert "1 column (0) of 3: the product of A with x0 is not finite" in info.reason

    expected, _ = failing(A, b, max_iter=2)
    # the third product with A is that of the third step; with M, that of the second one
    for operator, M, steps in (
        (Function(Late(matrix, value), 8), None, 2),
        (A, Late(torch.eye(8, dtype=F64), value, 4), 2),
        (A, Late(torch.eye(8, dtype=F64), value, 1), 0),
    ):
        x, info = failing(operator, b, tolerance=1e-10, preconditioner=M)
        assert torch.allclose(x[:, 0], expected[:, 0] if steps else torch.zeros(8, dtype=F64))
        assert torch.allclose(x[:, 1:], solution[:, 1:])
        assert info.iterations[0] == steps
        assert info.residual_norms[0] == pytest.approx(relative_residuals(matrix, x, b)[0].item())
        assert "1 column (0) of 3: a product with A or the preconditioner" in info.reason


def test_leaves_the_surroundings_alone() -> None:
    """No gradients, no random numbers, no changed modes; works on inference tensors."""
    matrix = indefinite(6)
    A = TensorLinearOperator(matrix.requires_grad_())
    b = torch.randn(6, 2, dtype=F64, requires_grad=True)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with record_gradients():
        x, _ = minres(A, b, preconditioner=lambda r: r * b.abs().max(), x0=b)
    assert not x.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    with torch.inference_mode():
        again, _ = minres(A, b.clone(), x0=b.clone())
        assert torch.allclose(again, x, rtol=1e-3)


def test_errors() -> None:
    """Errors name what was given, and say what to pass instead."""
    A, b = TensorLinearOperator(indefinite(3)), torch.ones(3, 2, dtype=F64)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "A must be a linear operator, got Tensor; wrap", (A.matrix, b), {}),
        (
            ValueError,
            r"minres needs an operator from a space to itself, but <2×3",
            (TensorLinearOperator(torch.ones(2, 3, dtype=F64)), b),
            {},
        ),
        (ValueError, r"must have shape \[3\] or \[3, K\], got \[4\]", (A, torch.ones(4)), {}),
        (ValueError, "Dtype mismatch.*but b has torch.float32", (A, b.float()), {}),
        (ValueError, "x0 has 1 columns, but b has 2", (A, b), {"x0": b[:, 0]}),
        (ValueError, r"tolerance must be .* at least 0, got -1", (A, b), {"tolerance": -1}),
        (ValueError, r"max_iter must be at least 0, got -1", (A, b), {"max_iter": -1}),
        (TypeError, r"function of flat columns.*Tensor", (A, b), {"preconditioner": A.matrix}),
        (
            ValueError,
            r"must return a tensor of shape \[3, 2\].* returned \[3\]",
            (A, b),
            {"preconditioner": lambda r: r[:, 0]},
        ),
    ]
    for error, message, args, kwargs in cases:
        with pytest.raises(error, match=message):
            minres(*args, **kwargs)
