"""What ``curvlinops._tensors`` does when a decomposition fails, and with extreme values.

Failures are planted: ``torch.linalg.eigh`` raises, or returns what is not finite, a few times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import BF16, C64, C128, F32, F64, general, indefinite, positive

from curvlinops import KroneckerProductLinearOperator, _tensors

NO_CONVERGENCE = torch.linalg.LinAlgError("no convergence")
RUNGS = {F32: [F32, F64], C64: [C64, C128], BF16: [F32, F64], F64: [F64], C128: [C128]}


def plant(
    monkeypatch: pytest.MonkeyPatch, count: int, failure: Any = NO_CONVERGENCE
) -> list[Tensor]:
    """Let the first calls of ``torch.linalg.eigh`` fail; return the list of all its arguments."""
    right, seen = torch.linalg.eigh, []

    def eigh(matrix: Tensor) -> Any:
        seen.append(matrix.clone())
        if len(seen) > count:
            return right(matrix)
        if isinstance(failure, Exception):
            raise failure
        return failure(*right(matrix))

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return seen


def caught(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return a result and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function()
    return result, [str(each.message) for each in record]


# ---- the rungs -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "count"), [(dtype, n) for dtype in RUNGS for n in range(len(RUNGS[dtype]) + 3)]
)
def test_rungs(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch):
    """Double precision, then growing jitter, with one warning; the result is right each time."""
    matrix = indefinite(5, dtype if dtype != BF16 else F64).to(dtype)
    matrix = matrix / 2 + matrix.mH / 2  # exactly, as one triangle is decomposed
    names = RUNGS[dtype]
    dtypes = names + [names[-1]] * 3
    wide = matrix.to(torch.promote_types(dtype, F64))
    expected = torch.linalg.eigvalsh(wide)
    seen = plant(monkeypatch, count)
    (values, vectors), texts = caught(
        lambda: _tensors.eigh(matrix, name="layer one", keep_wide=True)
    )
    assert [each.dtype for each in seen] == dtypes[: count + 1]
    assert values.dtype == dtypes[count].to_real() and vectors.dtype == dtypes[count]
    # what is added to the diagonal grows, and is subtracted: to the rounding of the wider dtype
    added = [(each.to(wide.dtype) - wide).diagonal().real for each in seen[len(names) :]]
    largest = wide.abs().max()
    for shift, multiple in zip(added, (1e-6, 1e-4, 1e-2), strict=False):
        assert torch.allclose(shift, multiple * largest)
    tolerance = 40 * torch.finfo(values.dtype).eps * torch.linalg.matrix_norm(wide)
    assert torch.allclose(values.to(F64), expected, rtol=0, atol=float(tolerance))
    recomposed = ((vectors * values) @ vectors.mH).to(wide.dtype)
    assert torch.allclose(recomposed, wide, rtol=0, atol=float(tolerance))
    if not count:
        assert not texts
        return
    (text,) = texts
    assert text.startswith(f"Eigendecomposing layer one failed in {names[0]}")
    failed, succeeded = text.split("; ")
    assert failed.count(f"in {names[-1]}") == count - (len(names) - 1)
    if count < len(names):
        assert succeeded == f"retrying in {names[-1]} succeeded."
    else:
        shift = float((1e-6, 1e-4, 1e-2)[count - len(names)] * largest)
        end = f"retrying in {names[-1]} with {shift:.1e} added to the diagonal succeeded."
        assert succeeded == end


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rungs_on_other_devices(device: str, dtype: torch.dtype):
    """The CPU comes after double precision; MPS does not have that. Both ends of the ladder."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device(device)

    matrix = positive(3, dtype).as_subclass(Elsewhere)
    hows, matrices, shifts = zip(*_tensors._attempts(matrix), strict=True)
    expected = [f"in {dtype}"]
    if device == "cuda" and dtype == F32:
        expected.append("in torch.float64")
    expected.append("in torch.float64 on the CPU")
    assert list(hows[:-3]) == expected
    assert all(how.startswith("in torch.float64 on the CPU with ") for how in hows[-3:])
    assert matrices[0].dtype == dtype
    assert {each.dtype for each in matrices[1:]} == {F64}
    assert list(shifts) == sorted(shifts) and len(set(shifts)) == 4


@pytest.mark.parametrize(
    "failure",
    [
        NO_CONVERGENCE,
        RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
        NotImplementedError("not implemented for this device"),
        lambda values, vectors: (values * torch.nan, vectors),
        lambda values, vectors: (values, vectors * torch.nan),
        lambda values, vectors: (values + torch.inf, vectors),
    ],
)
def test_kinds_of_failures(failure: Any, monkeypatch: pytest.MonkeyPatch):
    """Errors of the solver, and results that are not finite."""
    seen = plant(monkeypatch, 1, failure)
    matrix = positive(3, F32)
    with pytest.warns(UserWarning, match="Eigendecomposing it failed in torch.float32; retrying"):
        values, vectors = _tensors.eigh(matrix, name="it")
    assert len(seen) == 2
    assert torch.allclose((vectors * values) @ vectors.T, matrix, atol=1e-5)


@pytest.mark.parametrize(
    "failure", [NO_CONVERGENCE, lambda values, vectors: (values * torch.nan, vectors)]
)
def test_nothing_helps(failure: Any, monkeypatch: pytest.MonkeyPatch):
    """One error, without a warning: the matrix, all that was tried, the remedy and the cause."""
    seen = plant(monkeypatch, 100, failure)
    with pytest.raises(RuntimeError, match="Cannot eigendecompose layer one: its") as info:
        _tensors.eigh(8 * torch.eye(3), name="layer one")
    text = str(info.value)
    assert isinstance(info.value, torch.linalg.LinAlgError)
    assert "up to 8.0e+00" in text and "Multiply it by a number" in text
    assert "failed in torch.float32, in torch.float64, in torch.float64 with 8.0e-06 added" in text
    assert "with 8.0e-02 added to the diagonal. " in text
    assert len(seen) == 5
    if failure is NO_CONVERGENCE:
        assert text.endswith("The last error: no convergence")
        assert info.value.__cause__ is NO_CONVERGENCE


def test_lack_of_memory_is_no_failure_of_the_solver(monkeypatch: pytest.MonkeyPatch):
    """A wider dtype would make it worse."""
    seen = plant(monkeypatch, 1, torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        _tensors.eigh(positive(3, F32), name="it")
    assert len(seen) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [F32, F64, C64, BF16])
def test_non_finite_matrices_are_not_sent_through(
    value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    seen = plant(monkeypatch, 0)
    matrix = torch.eye(3, dtype=dtype)
    matrix[1, 1] = value
    for function, error in (
        (lambda: _tensors.eigh(matrix, name="it"), ValueError),
        (lambda: _tensors.pinv(matrix, None, name="it"), ValueError),
        (lambda: _tensors.inverse(matrix, 1.0, name="it"), RuntimeError),
    ):
        with pytest.raises(error, match=r"Cannot \w+ it: it has non-finite entries"):
            function()
    assert not seen


def test_zero_matrix(monkeypatch: pytest.MonkeyPatch):
    """Jitter has a size even if the matrix has none."""
    seen = plant(monkeypatch, 2)
    with pytest.warns(UserWarning, match="with 1.0e-06 added"):
        values, _ = _tensors.eigh(torch.zeros(2, 2), name="it")
    assert seen[-1].trace() == 2e-6
    assert values.abs().max() < 1e-20


def test_factors_are_named(monkeypatch: pytest.MonkeyPatch):
    """The warning of a Kronecker product says which factor it was."""
    K = KroneckerProductLinearOperator(positive(2, F32), positive(3, F32))
    seen = plant(monkeypatch, 1)
    with pytest.warns(
        UserWarning, match=r"factor 0 of <6×6 operator Kron.*failed in torch.float32;"
    ):
        decomposed = K.eigh()
    assert len(seen) == 3
    assert torch.allclose(decomposed.to_dense(), K.to_dense(), atol=1e-4)


# ---- real matrices -------------------------------------------------------------------------------
def hilbert(d: int) -> Tensor:
    """A matrix whose smallest eigenvalues are far below the rounding errors of the largest."""
    i = torch.arange(d, dtype=F64)
    return 1 / (i + i.unsqueeze(1) + 1)


@pytest.mark.parametrize(
    "matrix",
    [
        hilbert(60),
        torch.logspace(-30, 10, 20, dtype=F64).diag(),
        torch.ones(40, 40, dtype=F64),
        1e-30 * hilbert(9),
        1e30 * hilbert(9),
        torch.eye(7, dtype=F64),
    ],
    ids=["hilbert", "graded", "rank one", "tiny", "huge", "identity"],
)
def test_ill_conditioned(matrix: Tensor):
    """No warning, and errors of the size of rounding."""
    single = matrix.to(F32)
    values, vectors = _tensors.eigh(single, name="it")
    expected = torch.linalg.eigvalsh(single.double())
    bound = 1e-5 * expected[-1]
    assert (values.double() - expected).abs().max() <= bound
    Q = vectors.double()
    assert ((Q * values) @ Q.T - single.double()).abs().max() <= bound
    assert torch.allclose(Q.T @ Q, torch.eye(len(Q), dtype=F64), atol=1e-4)


def test_eigenvalues_beyond_the_dtype():
    """An error, not infinity; they can be had in the dtype in which they were computed."""
    matrix = torch.full((4, 4), 3e4, dtype=torch.float16)
    with pytest.raises(
        RuntimeError, match=r"of layer one overflow torch.float16: .* up to 1.2e\+05"
    ):
        _tensors.eigh(matrix, name="layer one")
    values, _ = _tensors.eigh(matrix, name="layer one", keep_wide=True)
    assert abs(values[-1].item() / 1.2e5 - 1) < 1e-3
    largest = torch.full((4, 4), 2e38)  # which the solver cannot decompose in float32
    with pytest.warns(UserWarning, match="it failed in torch.float32; retrying in torch.float64"):
        values, _ = _tensors.eigh(largest, name="it", keep_wide=True)
    assert abs(values[-1].item() / 8e38 - 1) < 1e-6


# ---- other functions -----------------------------------------------------------------------------
SCALES = {F32: (1e-37, 1e-30, 1e-22, 1e-15, 1.0, 1e19, 1e30, 1e37), F64: (1e-300, 1e-160, 1e160),
          C64: (1e-30, 1e25), BF16: (1e-30, 1e30), torch.float16: (1e-3, 1e4)}  # fmt: skip


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, all_ in SCALES.items() for s in all_])
def test_symmetry_does_not_depend_on_the_scale(dtype: torch.dtype, scale: float):
    """Squares of entries underflow or overflow."""
    wide = dtype if dtype in (F32, F64, C64) else F32
    matrix = (general(4, 4, wide) * scale).to(dtype)
    assert matrix.abs().max() > 0 and _tensors.all_finite(matrix)
    assert not _tensors.is_hermitian(matrix)
    assert _tensors.is_hermitian(matrix.tril() + matrix.tril(-1).mH if not matrix.is_complex()
                                 else matrix / 2 + matrix.mH / 2)  # fmt: skip


def test_tiny_general_matrices_are_inverted_as_they_are():
    """Not by Cholesky, of one triangle."""
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]]) * 1e-30
    expected = torch.tensor([[1 / 2, -1 / 6], [0.0, 1 / 3]]) * 1e30
    assert torch.allclose(_tensors.inverse(matrix, name="it"), expected)


@pytest.mark.parametrize("dtype", [F32, F64, C64, C128, BF16, torch.float16, torch.int64])
def test_all_finite(dtype: torch.dtype):
    assert _tensors.all_finite(torch.ones(2, 3, dtype=dtype))
    assert _tensors.all_finite(torch.empty(0, 3, dtype=dtype))
    if dtype == torch.int64:
        return
    for place in ((0, 0), (1, 2)):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.ones(2, 3, dtype=dtype)
            x[place] = value
            assert not _tensors.all_finite(x)
            if x.is_complex():
                assert not _tensors.all_finite(x.mH)
                x[place] = complex(1, value)
                assert not _tensors.all_finite(x)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inverse_of_infinity_is_not_zero(value: float):
    """A factor is named, whether it is inverted by Cholesky or by LU."""
    for matrix in (torch.diag(torch.tensor([value, 1.0])), torch.tensor([[1.0, value], [0, 1]])):
        K = KroneckerProductLinearOperator(positive(2, F32), matrix)
        with pytest.raises(RuntimeError, match=r"invert factor 1 of .*it has non-finite entries"):
            K.inverse()
