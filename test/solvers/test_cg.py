"""Tests of ``curvlinops.solvers.cg``."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import cg as scipy_cg
from solver_cases import F64, Counting, Function, hermitian, relative_residuals, spd
from torch import Tensor

from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    FromCanonicalLinearOperator,
    IdentityLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    ToCanonicalLinearOperator,
    record_gradients,
)
from curvlinops.solvers import SolverInfo, cg

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def failing(A: PyTorchLinearOperator, b: Any, **kwargs: Any) -> tuple[Any, SolverInfo]:
    """Solve, and check that there is one warning, with the text of the info."""
    with pytest.warns(UserWarning, match="^cg did not reach the tolerance") as caught:
        x, info = cg(A, b, **kwargs)
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
    """The solution is that of a direct solver.

    Complex: catches inner products without conjugate.
    """
    dim = 12
    matrix, M = spd(dim, dtype=dtype).to(device), spd(dim, 5.0, dtype=dtype).to(device)
    shape = (dim,) if num_columns is None else (dim, num_columns)
    b = torch.randn(shape, dtype=dtype, device=device)
    A, M_op = TensorLinearOperator(matrix), TensorLinearOperator(M)
    before = b.clone()
    x, info = cg(A, b, tolerance=1e-12, preconditioner=M_op if preconditioned else None)
    assert x.shape == b.shape
    assert x.dtype == dtype
    assert x.device == b.device
    assert torch.equal(b, before)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-9)
    for field in (info.iterations, info.residual_norms, info.converged):
        assert field.shape == (num_columns or 1,)
        assert field.device.type == "cpu"
    assert info.converged.all()
    assert info.reason == "converged"


@pytest.mark.parametrize("tolerance", [1e-1, 1e-5, 1e-10])
def test_tolerance_is_met_and_not_exceeded(tolerance: float) -> None:
    """Each column stops by its residual relative to its own b, as soon as that is small enough.

    Catches absolute tolerances, a joint norm of all columns, and squares taken for norms.
    """
    matrix = spd(60, 1e4)
    b = torch.randn(60, 3, dtype=F64) * torch.tensor([1e-6, 1.0, 1e6], dtype=F64)
    x, info = cg(TensorLinearOperator(matrix), b, tolerance=tolerance)
    residuals = relative_residuals(matrix, x, b)
    assert (residuals <= tolerance * (1 + 1e-4)).all()
    assert torch.allclose(info.residual_norms, residuals, rtol=1e-3, atol=1e-13)
    # one step less is not enough
    for column, steps in enumerate(info.iterations.tolist()):
        _, less = failing(
            TensorLinearOperator(matrix), b[:, column], tolerance=tolerance, max_iter=steps - 1
        )
        assert less.residual_norms > tolerance


def test_minimises_the_energy() -> None:
    """After k steps, the error is minimal in the energy norm over the Krylov space from x0.

    Catches steepest descent and other solvers that converge too, and wrong steps with an x0.
    """
    dim, steps = 10, 4
    matrix, M = spd(dim, 1e3), spd(dim, 7.0)
    b, x0 = torch.randn(dim, dtype=F64), torch.randn(dim, dtype=F64)
    x, _ = failing(
        TensorLinearOperator(matrix),
        b,
        x0=x0,
        max_iter=steps,
        preconditioner=TensorLinearOperator(M),
    )
    basis = [M @ (b - matrix @ x0)]
    for _ in range(steps - 1):
        basis.append(M @ (matrix @ basis[-1]))
    Q, _ = torch.linalg.qr(torch.stack(basis, dim=1))
    coefficients = torch.linalg.solve(Q.T @ matrix @ Q, Q.T @ (b - matrix @ x0))
    assert torch.allclose(x, x0 + Q @ coefficients, rtol=1e-8)


def scipy_steps(
    matrix: Tensor, b: Tensor, tolerance: float, M: Tensor | None, x0: Tensor | None
) -> int:
    """Return SciPy's number of iterations on one system."""
    steps: list[int] = []
    name = "rtol" if "rtol" in inspect.signature(scipy_cg).parameters else "tol"
    arrays = {
        "M": None if M is None else LinearOperator(M.shape, lambda v: M.numpy() @ v, dtype=float),
        "x0": None if x0 is None else x0.numpy(),
    }
    _, code = scipy_cg(
        matrix.numpy(), b.numpy(), atol=0.0, callback=lambda _: steps.append(1), **arrays,
        **{name: tolerance},
    )  # fmt: skip
    assert code == 0
    return len(steps)


@pytest.mark.parametrize("with_x0", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(
    ("condition", "tolerance"), [(10.0, 1e-5), (1e3, 1e-5), (1e3, 1e-10), (1e6, 1e-6)]
)
def test_iterations_of_scipy(
    condition: float, tolerance: float, preconditioned: bool, with_x0: bool
) -> None:
    """The number of iterations is SciPy's, whatever other columns do."""
    dim = 80
    matrix = spd(dim, condition)
    b = torch.randn(dim, 3, dtype=F64) * torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    b[:, 2] = matrix @ torch.ones(dim, dtype=F64) / dim
    M = torch.diag(1 / matrix.diagonal()) + 0.1 * spd(dim, 3.0) if preconditioned else None
    x0 = torch.linalg.solve(matrix, b) + 0.1 * torch.randn(dim, 3, dtype=F64) if with_x0 else None
    _, info = cg(
        TensorLinearOperator(matrix),
        b,
        tolerance=tolerance,
        preconditioner=None if M is None else TensorLinearOperator(M),
        x0=x0,
    )
    for k in range(3):
        expected = scipy_steps(matrix, b[:, k], tolerance, M, None if x0 is None else x0[:, k])
        assert abs(info.iterations[k].item() - expected) <= 1
        assert expected > 3


def test_ill_conditioned() -> None:
    """Also a condition number of 1e10 converges, by the default bound on iterations."""
    matrix = torch.diag(torch.logspace(-10, 0, 20, dtype=F64))
    solution = torch.randn(20, 2, dtype=F64)
    b = matrix @ solution
    x, info = cg(TensorLinearOperator(matrix), b, tolerance=1e-13)
    assert info.converged.all()
    assert info.iterations.max() > 20  # more than in exact arithmetic
    assert relative_residuals(matrix, x, b).max() < 1e-12


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scales(factor: float) -> None:
    """The size of b makes no difference, also where its square under- or overflows in float32."""
    A = TensorLinearOperator(spd(9).float())
    b = torch.randn(9, 2)
    power = 2.0 ** round(math.log2(factor))
    x, info = cg(A, b)
    scaled, scaled_info = cg(A, power * b)
    assert torch.equal(scaled, power * x)
    assert torch.equal(info.residual_norms, scaled_info.residual_norms)
    start = torch.randn(9, 2)
    scaled, _ = cg(A, power * b, x0=power * start)
    assert torch.equal(scaled, power * cg(A, b, x0=start)[0])


def test_float32_inner_products() -> None:
    """A long vector in float32 has accurate inner products; naive sums are wrong by permille."""
    diagonal = torch.tensor([1.0, 3.0]).repeat(1_000_000)
    A, b = DiagonalLinearOperator([diagonal]), torch.rand(2_000_000, 2)
    x, info = cg(A, b)
    assert info.iterations.tolist() == [2, 2]
    assert torch.allclose(x, b / diagonal.unsqueeze(1), rtol=1e-5)
    for steps in (0, 1):
        x, info = failing(A, b, max_iter=steps, x0=0.5 * b)
        residual = b.double() - diagonal.unsqueeze(1) * x.double()
        expected = torch.linalg.vector_norm(residual, dim=0) / torch.linalg.vector_norm(
            b.double(), dim=0
        )
        assert torch.allclose(info.residual_norms, expected, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_low_precision(dtype: torch.dtype, tolerance: float, preconditioned: bool) -> None:
    """Products are in the operator's dtype, sums and steps are not.

    Catches iterating in bfloat16, whose residual stays far above its precision. In float16 the
    residual's entries underflow if they are not scaled.
    """
    dim = 500
    diagonal = torch.linspace(1, 20, dim).to(dtype)
    A = DiagonalLinearOperator([diagonal])
    b = (1e-3 * torch.randn(dim, 2)).to(dtype)
    seen = []

    def precondition(r: Tensor) -> Tensor:
        seen.append(r.dtype)
        return r / diagonal.sqrt().unsqueeze(1)

    M = precondition if preconditioned else None
    x, info = cg(A, b, tolerance=1e-9, preconditioner=M)
    assert x.dtype == dtype
    assert info.converged.all()
    assert set(seen) <= {dtype}
    matrix = torch.diag(diagonal.double())
    assert relative_residuals(matrix, x.double(), b.double()).max() < tolerance
    again, info = cg(A, b, tolerance=tolerance, x0=x)
    assert info.iterations.tolist() == [0, 0]
    assert torch.equal(again, x)


def test_low_precision_is_consistent() -> None:
    """Where products and the solution are exact in bfloat16, the solution is found exactly.

    Catches x moving by a direction that is not, to the last bit, the one that A is multiplied with.
    """
    diagonal = (2.0 ** torch.arange(-2, 3)).repeat(100).bfloat16()
    b = torch.randn(500, 3).bfloat16()
    x, _ = cg(DiagonalLinearOperator([diagonal]), b)
    assert torch.equal(x, b / diagonal.unsqueeze(1))


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------
SHAPES = [(2, 3), (4,), ()]


def test_formats() -> None:
    """The solution comes in the format of b: list, tuple; vector, matrix, no columns."""
    dim = 11
    matrix = spd(dim)
    A = Counting(matrix, SHAPES)
    for container in (list, tuple):
        for extra in ((), (1,), (3,)):
            b = container(torch.randn((*shape, *extra), dtype=F64) for shape in SHAPES)
            x, _ = cg(A, b, tolerance=1e-12, x0=b)
            assert type(x) is container
            assert [t.shape for t in x] == [t.shape for t in b]
            flat = torch.cat([t.reshape(-1, *extra) for t in b])
            solution = torch.cat([t.reshape(-1, *extra) for t in x])
            assert torch.allclose(solution, torch.linalg.solve(matrix, flat))
    A.widths.clear()
    for b in (torch.ones(dim, 0), [torch.ones(*shape, 0) for shape in SHAPES]):
        b = b.double() if isinstance(b, Tensor) else [t.double() for t in b]
        x, info = cg(A, b)
        empty = [x] if isinstance(x, Tensor) else x
        assert [t.shape for t in empty] == [t.shape for t in ([b] if x is empty[0] else b)]
        assert info.iterations.shape == info.residual_norms.shape == info.converged.shape == (0,)
        assert info.history == []
        assert info.reason == "converged"
    assert A.widths == []
    empty_space = DiagonalLinearOperator([torch.ones(0, dtype=F64)])
    x, info = cg(empty_space, torch.ones(0, 2, dtype=F64))
    assert x.shape == (0, 2)
    assert info.iterations.tolist() == [0, 0]


def test_dict() -> None:
    """Parameters by name, with an operator of permuted order, and P B⁻¹ Pᵀ as preconditioner."""
    shapes = {"b": (3,), "scale": (2,), "W": (3, 4)}
    groups = [{"W": "W", "b": "b"}, {"b": "scale"}]
    B = BlockDiagonalLinearOperator([TensorLinearOperator(spd(15)), TensorLinearOperator(spd(2))])
    P = FromCanonicalLinearOperator(shapes, groups, dtype=F64)
    PT = ToCanonicalLinearOperator(shapes, groups, dtype=F64)
    A = P @ B @ PT
    b = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    shuffled = {name: b[name] for name in ("W", "scale", "b")}
    dense = torch.linalg.solve(A.to_dense(), torch.cat([t.flatten() for t in b.values()]))
    for given in (b, shuffled):
        x, info = cg(A, given, tolerance=1e-12, x0=given)
        assert {name: t.shape for name, t in x.items()} == {n: t.shape for n, t in b.items()}
        assert torch.allclose(torch.cat([x[name].flatten() for name in shapes]), dense)
        assert info.iterations > 1
    x, info = cg(A, b, preconditioner=A.inverse())
    assert info.iterations.tolist() == [1]
    assert torch.allclose(torch.cat([x[name].flatten() for name in shapes]), dense)


# --------------------------------------------------------------------------------------------------
# Preconditioner and start
# --------------------------------------------------------------------------------------------------
def test_preconditioner() -> None:
    """An operator and a function do the same, and a good one saves iterations.

    Catches a preconditioner that approximates A instead of its inverse, and one that is ignored.
    """
    dim = 11
    matrix = spd(dim, 10.0)
    scale = torch.logspace(-3, 3, dim, dtype=F64)
    matrix = scale[:, None] * matrix * scale
    A = Counting(matrix, SHAPES)
    b = torch.randn(dim, 3, dtype=F64)
    M = DiagonalLinearOperator(
        [t.reshape(s) for t, s in zip((scale**-2).split([6, 4, 1]), SHAPES, strict=True)]
    )
    widths: list[int] = []

    def multiply(r: Tensor) -> Tensor:
        assert r.shape[0] == dim
        widths.append(r.shape[1])
        return scale[:, None] ** -2 * r

    x, info = cg(A, b, tolerance=1e-10, preconditioner=M)
    with_function, function_info = cg(A, b, tolerance=1e-10, preconditioner=multiply)
    assert torch.equal(x, with_function)
    assert torch.equal(info.iterations, function_info.iterations)
    assert len(widths) == info.iterations.max()
    assert info.iterations.max() <= dim + 2
    _, plain = failing(A, b, tolerance=1e-10, max_iter=2 * dim)
    assert plain.residual_norms.min() > 1e-10


def test_inverse_as_preconditioner() -> None:
    """The exact inverse, in any scale, converges in one iteration."""
    matrix = spd(15, 1e5, dtype=torch.complex128)
    A = TensorLinearOperator(matrix)
    b = torch.randn(15, 4, dtype=torch.complex128)
    for M in (A.inverse(), 1e3 * A.inverse(), lambda r: 1e-3 * torch.linalg.solve(matrix, r)):
        x, info = cg(A, b, preconditioner=M)
        assert info.iterations.tolist() == [1] * 4
        assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-4)


def test_identity_returns_its_argument() -> None:
    """Functions that return what they are given, or a view, do no harm.

    Catches steps in place on a tensor that another name stands for.
    """
    diagonal = torch.linspace(1, 5, 7, dtype=F64)
    A, b = DiagonalLinearOperator([diagonal]), torch.randn(7, 2, dtype=F64)
    expected, _ = cg(A, b, tolerance=1e-12)
    for M in (lambda r: r, lambda r: r[:], IdentityLinearOperator([(7,)], "cpu", F64)):
        x, _ = cg(A, b, tolerance=1e-12, preconditioner=M, x0=torch.zeros_like(b))
        assert torch.allclose(x, expected, rtol=1e-12)
    x, info = cg(Function(lambda x: x, 7), b)
    assert torch.equal(x, b)
    assert info.iterations.tolist() == [1, 1]


def test_start() -> None:
    """A start at the solution takes no steps and is returned; a close one saves steps."""
    matrix = spd(30, 1e3)
    A, b = Counting(matrix), torch.randn(30, 2, dtype=F64)
    solution, cold = cg(A, b, tolerance=1e-8)
    A.widths.clear()
    x, info = cg(A, b, tolerance=1e-6, x0=solution)
    assert torch.equal(x, solution)
    assert A.widths == [2]
    assert info.iterations.tolist() == [0, 0]
    assert len(info.history) == 1
    start = solution + torch.tensor([[1e-6, 0.0]], dtype=F64)
    before = start.clone()
    x, info = cg(A, b, tolerance=1e-8, x0=start)
    assert torch.equal(start, before)
    assert torch.equal(x[:, 1], solution[:, 1])
    assert 0 < info.iterations[0] < cold.iterations[0]
    assert info.iterations[1] == 0
    assert info.history[0] == pytest.approx(relative_residuals(matrix, start, b).max().item())


# --------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------
def uneven_columns(matrix: Tensor) -> Tensor:
    """Return right-hand sides that take one, few and many iterations, and one of zeros."""
    _, Q = torch.linalg.eigh(matrix)
    dim = len(matrix)
    zero = torch.zeros(dim, dtype=matrix.dtype)
    return torch.stack([Q @ torch.ones_like(zero), Q[:, 3], zero, Q[:, :3].sum(1)], dim=1)


def test_products() -> None:
    """One product per iteration for all columns together, on those that go on; one for x0."""
    matrix = spd(40, 1e3)
    A = Counting(matrix)
    b = uneven_columns(matrix)
    x, info = cg(A, b)
    assert info.iterations.tolist()[1:] == [1, 0, 3]
    last = info.iterations[0].item()
    assert last > 20
    assert A.widths == [3] + 2 * [2] + (last - 3) * [1]
    assert torch.allclose(matrix @ x, b, atol=1e-4)
    A.widths.clear()
    _, info = cg(A, b, x0=torch.randn(40, 4, dtype=F64))
    assert len(A.widths) == 1 + info.iterations.max()


def test_stopped_columns_stay() -> None:
    """Columns that converged do not change any more, to the last bit.

    Catches columns that are iterated on: at a loose tolerance they would change visibly.
    """
    matrix = spd(40, 1e4)
    A = TensorLinearOperator(matrix)
    b = torch.cat([uneven_columns(matrix), torch.randn(40, 3, dtype=F64)], dim=1)
    x, info = cg(A, b, tolerance=1e-2)
    assert len(info.iterations.unique()) >= 4
    for steps in info.iterations.unique().tolist()[:-1]:
        early, early_info = failing(A, b, tolerance=1e-2, max_iter=steps)
        done = early_info.converged
        assert torch.equal(done, info.iterations <= steps)
        assert torch.equal(early[:, done], x[:, done])
        assert torch.equal(early_info.iterations[done], info.iterations[done])


@pytest.mark.parametrize("with_x0", [False, True])
def test_together_as_alone(with_x0: bool) -> None:
    """A column's solution and info do not depend on the others, nor on its place."""
    matrix = spd(40)
    A = TensorLinearOperator(matrix)
    b = torch.cat([uneven_columns(matrix), torch.randn(40, 2, dtype=F64)], dim=1)
    b = b * torch.logspace(-4, 4, 6, dtype=F64)
    x0 = torch.randn(40, 6, dtype=F64) if with_x0 else None
    x, info = cg(A, b, tolerance=1e-3, x0=x0)
    for k in range(6):
        start = None if x0 is None else x0[:, k]
        alone, one = cg(A, b[:, k], tolerance=1e-3, x0=start)
        assert torch.allclose(x[:, k], alone, rtol=1e-6, atol=1e-9 * alone.norm().item())
        assert torch.equal(one.iterations, info.iterations[k : k + 1])
        assert torch.allclose(one.residual_norms, info.residual_norms[k : k + 1], rtol=1e-6)


@pytest.mark.parametrize("with_x0", [False, True])
def test_zero_rhs(with_x0: bool) -> None:
    """b = 0 gives x = 0 among others, also from another start, and takes no product."""
    matrix = spd(10)
    A, b = Counting(matrix), torch.randn(10, 3, dtype=F64)
    b[:, 1] = 0
    x0 = torch.randn(10, 3, dtype=F64) if with_x0 else None
    x, info = cg(A, b, x0=x0, tolerance=1e-10)
    assert torch.equal(x[:, 1], torch.zeros(10, dtype=F64))
    assert info.iterations[1] == 0
    assert info.residual_norms[1] == 0
    assert torch.allclose(x, torch.linalg.solve(matrix, b))
    A.widths.clear()
    x, info = cg(A, b[:, 1], x0=None if x0 is None else x0[:, 1])
    assert torch.equal(x, b[:, 1])
    assert A.widths == []
    assert info.history == [0.0]
    assert info.reason == "converged"


# --------------------------------------------------------------------------------------------------
# Info, and what can go wrong
# --------------------------------------------------------------------------------------------------
def test_history() -> None:
    """The history holds the largest relative residual at the start and after each iteration."""
    matrix = spd(25, 1e3)
    A, b = TensorLinearOperator(matrix), torch.randn(25, 3, dtype=F64)
    _, info = cg(A, b)
    assert len(info.history) == 1 + info.iterations.max()
    assert info.history[0] == 1
    assert info.history[-1] == info.residual_norms.max() <= 1e-5
    for steps in (0, 1, 5):
        x, early = failing(A, b, max_iter=steps)
        assert early.history == info.history[: steps + 1]
        assert early.history[-1] == pytest.approx(relative_residuals(matrix, x, b).max().item())


def test_not_converging() -> None:
    """Too few iterations: the iterate so far, and one warning that tells why and for which."""
    matrix = spd(40, 1e4)
    b = uneven_columns(matrix)
    A = TensorLinearOperator(matrix)
    x, info = failing(A, b, max_iter=2)
    assert info.converged.tolist() == [False, True, True, False]
    assert info.iterations.tolist() == [2, 1, 0, 2]
    assert "2 columns (0, 3) of 4: max_iter = 2 is reached (relative residual " in info.reason
    assert torch.allclose(info.residual_norms[[0, 1, 3]],
                          relative_residuals(matrix, x, b)[[0, 1, 3]], atol=1e-12)  # fmt: skip
    _, info = failing(A, b[:, 0], max_iter=2)
    assert info.reason == (
        "cg did not reach the tolerance 1e-05. max_iter = 2 is reached "
        f"(relative residual {info.residual_norms.item():.1e})."
    )
    _, info = failing(A, b[:, :1].expand(-1, 7), max_iter=2)
    assert "7 columns (0, 1, 2, 3, 4, …) of 7: max_iter" in info.reason
    x, info = failing(A, b[:, 0], max_iter=0)
    assert torch.equal(x, torch.zeros_like(x))
    assert info.history == [1.0]


def test_default_max_iter() -> None:
    """By default, there are 10·D iterations."""
    A = DiagonalLinearOperator([torch.logspace(-12, 0, 6, dtype=F64)])
    wrong = [0]

    def rotating(r: Tensor) -> Tensor:  # changes in each iteration, which conjugacy does not bear
        wrong[0] += 1
        return r * torch.logspace(0, 12, 6, dtype=F64).roll(wrong[0]).unsqueeze(1)

    _, info = failing(A, torch.ones(6, dtype=F64), preconditioner=rotating)
    assert info.iterations.tolist() == [60]
    assert "max_iter = 60 is reached" in info.reason
    assert len(info.history) == 61


def test_indefinite() -> None:
    """Negative curvature stops a column at its last iterate; others go on."""
    diagonal = torch.tensor([1.0, 2.0, 4.0, -1.0, -2.0], dtype=F64)
    A = DiagonalLinearOperator([diagonal])
    b = torch.eye(5, dtype=F64)
    b = torch.stack([b[0] + b[1] + b[2], b[3], b[0] + b[1] + 0.1 * b[3], b[3] + b[4]], dim=1)
    x, info = failing(A, b)
    assert info.converged.tolist() == [True, False, False, False]
    assert info.iterations.tolist()[:2] == [3, 0]
    assert info.iterations[2] > 0
    assert torch.allclose(x[:, 0], b[:, 0] / diagonal)
    assert torch.equal(x[:, 1], torch.zeros(5, dtype=F64))
    assert "3 columns (1, 2, 3) of 4: A is not positive definite" in info.reason
    # the iterate before the step, whose residual is reported
    early, _ = failing(A, b[:, 2], max_iter=info.iterations[2].item())
    assert torch.allclose(x[:, 2], early, rtol=1e-12)
    residual = relative_residuals(torch.diag(diagonal), x, b)
    assert torch.allclose(info.residual_norms[1:], residual[1:])
    start = torch.randn(5, dtype=F64)
    x, info = failing(-1 * IdentityLinearOperator([(5,)], "cpu", F64), b[:, 0], x0=start)
    assert torch.equal(x, start)
    assert info.iterations.tolist() == [0]
    assert len(info.history) == 1
    x, _ = failing(0 * IdentityLinearOperator([(5,)], "cpu", F64), b)
    assert torch.equal(x, torch.zeros_like(b))


def test_indefinite_preconditioner() -> None:
    """The reason names the preconditioner, not A."""
    A, b = TensorLinearOperator(spd(6)), torch.randn(6, 2, dtype=F64)
    for M in (lambda r: -r, torch.zeros_like):
        x, info = failing(A, b, preconditioner=M)
        assert torch.equal(x, torch.zeros_like(b))
        assert "2 columns (0, 1) of 2: the preconditioner M is not positive" in info.reason
        assert "A is not" not in info.reason


def test_singular() -> None:
    """A singular A works if b is in its range; else the solution is finite, with a warning."""
    eigenvalues = torch.cat([torch.zeros(5, dtype=F64), torch.linspace(1, 9, 15, dtype=F64)])
    matrix = hermitian(eigenvalues)
    A = TensorLinearOperator(matrix)
    b = matrix @ torch.randn(20, 3, dtype=F64)
    x, info = cg(A, b, tolerance=1e-10)
    assert info.converged.all()
    assert torch.allclose(x, torch.linalg.pinv(matrix, hermitian=True) @ b, atol=1e-8)
    x, info = failing(A, torch.randn(20, 3, dtype=F64))
    assert x.isfinite().all()
    assert not info.converged.any()
    assert info.residual_norms.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    """What is not finite stops its columns, of which a finite iterate is returned."""
    matrix = spd(8)
    b = torch.randn(8, 3, dtype=F64)
    solution = torch.linalg.solve(matrix, b)
    A = TensorLinearOperator(matrix)

    broken = b.clone()
    broken[2, 1] = value
    x, info = failing(A, broken, tolerance=1e-10)
    assert torch.allclose(x[:, [0, 2]], solution[:, [0, 2]])
    assert torch.equal(x[:, 1], torch.zeros(8, dtype=F64))
    assert info.converged.tolist() == [True, False, True]
    assert info.residual_norms[1] == math.inf
    assert "1 column (1) of 3: b is not finite" in info.reason

    x0 = torch.zeros_like(b)
    x0[4, 0] = value
    x, info = failing(A, b, x0=x0, tolerance=1e-10)
    assert torch.allclose(x[:, 1:], solution[:, 1:])
    assert torch.equal(x[:, 0], torch.zeros(8, dtype=F64))
    assert info.residual_norms[0] == 1
    assert "1 column (0) of 3: the product of A with x0 is not finite" in info.reason
    # also where only the product shows it, or only x0
    b = torch.ones(2, dtype=F64)
    for operator, start in (
        (1e10 * IdentityLinearOperator([(2,)], "cpu", F64), torch.full((2,), 1e300, dtype=F64)),
        (Function(torch.nan_to_num, 2), torch.tensor([1.0, math.nan], dtype=F64)),
    ):
        x, info = failing(operator, b, x0=start)
        assert torch.equal(x, torch.zeros(2, dtype=F64))
        assert info.residual_norms.tolist() == [1]
        assert "the product of A with x0 is not finite" in info.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_breakdown(value: float) -> None:
    """Products that are not finite stop their columns before the step; others go on."""
    matrix = spd(8)
    b = torch.randn(8, 3, dtype=F64)
    solution = torch.linalg.solve(matrix, b)
    A = TensorLinearOperator(matrix)

    class Late:
        """Multiply with a matrix, and fail in the first column of the third product."""

        def __init__(self, matrix: Tensor):
            self.matrix, self.calls = matrix, 0

        def __call__(self, v: Tensor) -> Tensor:
            self.calls += 1
            result = self.matrix @ v
            if self.calls == 3:
                result[0, 0] = value
            return result

    expected, _ = failing(A, b, max_iter=2)
    for operator, M in ((Function(Late(matrix), 8), None), (A, Late(torch.eye(8, dtype=F64)))):
        x, info = failing(operator, b, tolerance=1e-10, preconditioner=M)
        assert torch.allclose(x[:, 0], expected[:, 0])
        assert torch.allclose(x[:, 1:], solution[:, 1:])
        assert info.iterations[0] == 2
        assert info.residual_norms[0] == pytest.approx(relative_residuals(matrix, x, b)[0].item())
        assert "1 column (0) of 3: a product with A or the preconditioner" in info.reason


def test_overflow() -> None:
    """A step that is not finite, after products that are, is not taken."""
    x, info = failing(DiagonalLinearOperator([torch.full((3,), 1e-44)]), torch.ones(3))
    assert torch.equal(x, torch.zeros(3))
    assert info.residual_norms.tolist() == [1]
    assert "or the iteration overflows" in info.reason


def test_several_reasons() -> None:
    """Each reason is named once, with its columns, in one warning."""
    A = DiagonalLinearOperator([torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=F64)])
    b = torch.ones(4, 4, dtype=F64)
    b[3, :2] = 0
    b[0, 2] = math.nan
    b[:3, 3] = 0
    _, info = failing(A, b, max_iter=1)
    assert info.reason.count("max_iter") == info.reason.count("positive definite") == 1
    residual = info.residual_norms[:2].max().item()
    assert 0 < residual < 0.5  # that of its columns only
    assert "2 columns (0, 1) of 4: max_iter = 1" in info.reason
    assert f"is reached (relative residual {residual:.1e})" in info.reason
    assert "1 column (2) of 4: b is not finite" in info.reason
    assert "1 column (3) of 4: A is not positive definite" in info.reason


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_tolerance_zero(dtype: torch.dtype, preconditioned: bool) -> None:
    """A tolerance of 0 goes on to a negligible residual and stops there, without 0 / 0.

    Catches iterating until numbers underflow, where curvature seems to vanish.
    """
    matrix = spd(10, dtype=dtype)
    b = torch.randn(10, 3, dtype=dtype)
    M = TensorLinearOperator(spd(10, 3.0, dtype=dtype)) if preconditioned else None
    x, info = cg(TensorLinearOperator(matrix), b, tolerance=0, preconditioner=M)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e3 * eps, atol=1e3 * eps)
    assert (info.residual_norms <= eps**2).all()


def test_tolerance_of_one() -> None:
    """x = 0 is good enough for a tolerance of 1."""
    A = Counting(spd(4))
    x, info = cg(A, torch.ones(4, dtype=F64), tolerance=1)
    assert torch.equal(x, torch.zeros(4, dtype=F64))
    assert info.converged.all()
    assert A.widths == []


def test_leaves_the_surroundings_alone() -> None:
    """No gradients, no random numbers, no changed modes; works on inference tensors."""
    matrix = spd(6)
    A = TensorLinearOperator(matrix.requires_grad_())
    b = torch.randn(6, 2, dtype=F64, requires_grad=True)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with record_gradients():
        x, _ = cg(A, b, preconditioner=lambda r: r * b.abs().max(), x0=b)
    assert not x.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    with torch.inference_mode():
        again, _ = cg(A, b.clone(), x0=b.clone())
        assert torch.allclose(again, x, rtol=1e-3)
    assert torch.allclose(cg(A, again, x0=again)[0], cg(A, again.clone())[0], rtol=1e-3)


def test_operator_without_dtype() -> None:
    """An operator without tensors takes the dtype of b; another one for x0 is refused."""
    A = Function(lambda x: 2 * x, 3)
    for dtype in (torch.float32, F64, torch.complex64):
        x, _ = cg(A, torch.ones(3, dtype=dtype))
        assert torch.equal(x, torch.full((3,), 0.5, dtype=dtype))
    with pytest.raises(ValueError, match=r"x0 has torch.float64 on cpu, but b has torch.float32"):
        cg(A, torch.ones(3), x0=torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match=r"b must be of floating-point or complex.*torch.int64"):
        cg(A, torch.ones(3, dtype=torch.int64))
    B = Function(lambda x: x, 3)
    B.in_shape = B.out_shape = [torch.Size((1,)), torch.Size((2,))]
    with pytest.raises(ValueError, match=r"tensors of b have torch.float32, torch.float64"):
        cg(B, [torch.ones(1), torch.ones(2, dtype=F64)])


def test_errors() -> None:
    """Errors name what was given, and say what to pass instead."""
    A, b = TensorLinearOperator(spd(3)), torch.ones(3, 2, dtype=F64)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "A must be a linear operator, got Tensor; wrap", (A.matrix, b), {}),
        (
            ValueError,
            r"from a space to itself, but <2×3.* maps \[\(3,\)\] to \[\(2,\)\]",
            (TensorLinearOperator(torch.ones(2, 3, dtype=F64)), b),
            {},
        ),
        (ValueError, r"must have shape \[3\] or \[3, K\], got \[4\]", (A, torch.ones(4)), {}),
        (TypeError, "Cannot multiply a linear operator with ndarray", (A, np.ones(3)), {}),
        (
            ValueError,
            r"Dtype mismatch: <3×3.* has torch.float64, but b has torch.float32.*\.to\(",
            (A, b.float()),
            {},
        ),
        (
            ValueError,
            r"Device mismatch: <3×3.* has cpu, but b has meta",
            (A, b.to("meta")),
            {},
        ),
        (ValueError, "Dtype mismatch.*but x0 has torch.float32", (A, b), {"x0": b.float()}),
        (ValueError, "x0 has 1 columns, but b has 2", (A, b), {"x0": b[:, 0]}),
        (ValueError, r"tolerance must be .* at least 0, got -1", (A, b), {"tolerance": -1}),
        (ValueError, r"tolerance must be .* got nan", (A, b), {"tolerance": math.nan}),
        (ValueError, r"tolerance must be .* got inf", (A, b), {"tolerance": math.inf}),
        (TypeError, r"tolerance must be a number, got None", (A, b), {"tolerance": None}),
        (ValueError, r"max_iter must be at least 0, got -1", (A, b), {"max_iter": -1}),
        (TypeError, r"max_iter must be an integer or None, got 2.5", (A, b), {"max_iter": 2.5}),
        (
            TypeError,
            r"a linear operator or a function of flat columns \[D, K\], got Tensor; wrap",
            (A, b),
            {"preconditioner": A.matrix},
        ),
        (
            ValueError,
            r"Shape mismatch: the preconditioner <3×3 .*\(1, 3\).* acts on \[\(3,\)\]",
            (A, b),
            {"preconditioner": IdentityLinearOperator([(1, 3)], "cpu", F64)},
        ),
        (
            ValueError,
            "Dtype mismatch in a preconditioned solve",
            (A, b),
            {"preconditioner": IdentityLinearOperator([(3,)], "cpu", torch.float32)},
        ),
        (
            ValueError,
            r"must return a tensor of shape \[3, 2\].* returned \[3\]",
            (A, b),
            {"preconditioner": lambda r: r[:, 0]},
        ),
        (
            ValueError,
            r"must return a tensor of shape \[3, 2\].* returned tuple",
            (A, b),
            {"preconditioner": lambda r: (r,)},
        ),
    ]
    for error, message, args, kwargs in cases:
        with pytest.raises(error, match=message):
            cg(*args, **kwargs)
    with pytest.raises(TypeError):
        cg(A, b, 1e-3)  # type: ignore[misc]
    # integers of other libraries do
    assert cg(A, b, max_iter=np.int64(30), tolerance=np.float32(1e-3))[1].converged.all()
