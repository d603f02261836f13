"""Dense linear algebra on one matrix: dtypes of decompositions, inverses, eigendecompositions.

Matrices in bfloat16 or float16 are decomposed in float32, silently: LAPACK has nothing smaller.
float32 goes to float64 only when a decomposition fails, with a warning. Eigendecompositions that
still fail are tried on the CPU, and of the matrix plus small multiples of the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from warnings import warn

import torch
from torch import Tensor

_WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}
_MAX_STACKED = 2**18  # entries; copying a larger matrix takes longer than a product of its own
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
# What eigh adds to the diagonal as a last resort, in units of the largest entry, and subtracts from
# the eigenvalues: the eigenvectors stay, and rounding is that of the largest entry with or without.
_JITTERS = (1e-6, 1e-4, 1e-2)

CHECK_ORIGIN = "Check what it was made from for NaN, infinities and overflow."


class NotHermitianError(ValueError):
    """An eigendecomposition was asked of a matrix that is not Hermitian."""


def widened(matrix: Tensor) -> Tensor:
    """Return the matrix in a dtype that has decompositions."""
    return matrix.to(_WIDER.get(matrix.dtype, matrix.dtype))


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the complex dtype of the same precision (complex64 for bfloat16)."""
    return torch.promote_types(dtype, torch.complex32)  # can be compiled, dtype.to_complex cannot


def check_floating(tensor: Tensor, what: str) -> None:
    """Raise if a tensor does not hold floating-point or complex numbers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"{what} needs floating-point or complex numbers, got {tensor.dtype}.")


def all_finite(tensor: Tensor) -> bool:
    """Return whether there is neither NaN nor an infinity in a tensor, without memory for it."""
    if not tensor.numel():
        return True
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if real.ndim == 2 and real.stride(0) == 1:  # eigenvectors: faster in the order of the memory
        real = real.mT
    # the extremes are NaN if any value is
    return all(map(math.isfinite, torch.stack(real.aminmax()).tolist()))


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Stack tensors to multiply them at once, or None if they are of several shapes or large."""
    if tensors[0].numel() > _MAX_STACKED or len({tensor.shape for tensor in tensors}) > 1:
        return None
    return torch.stack(list(tensors))


def is_hermitian(matrix: Tensor) -> bool:
    """Return whether a square matrix ``[d, d]`` equals its adjoint up to rounding."""
    if matrix.shape[0] != matrix.shape[1]:
        return False
    wide = widened(matrix)
    # the entries of a Gram matrix carry rounding errors of its largest entries, times sqrt(d); in
    # low precision they were accumulated in a wider dtype, and rounded once
    rounding, accumulating = (torch.finfo(m.dtype).eps for m in (matrix, wide))
    tolerance = 4 * rounding + 10 * accumulating * matrix.shape[0] ** 0.5
    norm = torch.linalg.matrix_norm(wide)
    limits = torch.finfo(wide.dtype)
    if not limits.tiny**0.5 / limits.eps < norm.item() <= limits.max:  # or squares would underflow
        largest = wide.abs().max() if wide.numel() else norm
        if largest == 0 or not bool(largest.isfinite()):
            return bool(largest == 0)
        return is_hermitian(matrix / largest.to(matrix.dtype))
    return bool(torch.linalg.matrix_norm(wide - wide.mH) <= tolerance * norm)


def is_real(values: Tensor) -> bool:
    """Return whether complex numbers are real up to rounding."""
    return bool((values.imag.abs() <= 4 * torch.finfo(values.dtype).eps * values.abs()).all())


def add_to_diagonal(matrix: Tensor, value: complex | Tensor) -> Tensor:
    """Return ``matrix + value * I`` as a new tensor."""
    result = matrix.clone()
    result.diagonal().add_(value)
    return result


def inverse(
    matrix: Tensor,
    damping: complex | Tensor = 0.0,
    *,
    name: str,
    retry_double_precision: bool = True,
    definite: bool = True,
) -> Tensor:
    """Return ``(matrix + damping * I)⁻¹``: by Cholesky if it is Hermitian, else by LU.

    Args:
        matrix: Square matrix ``[d, d]``.
        damping: Multiple of the identity to add.
        name: What the matrix is, for warnings and errors.
        retry_double_precision: Whether to try again in double precision after a failure.
        definite: Whether a Hermitian matrix must be positive definite; else it may be inverted by
            LU, too.

    Returns:
        The inverse ``[d, d]`` in the matrix's dtype.

    Raises:
        RuntimeError: If the matrix is not finite, or the damped one singular, or not positive
            definite where it must be.
    """
    if not all_finite(matrix):  # the inverse of an infinite entry may be finite
        raise RuntimeError(f"Cannot invert {name}: it has non-finite entries. {CHECK_ORIGIN}")
    damped = add_to_diagonal(widened(matrix), damping)
    # rounding is that of the dtype before widening
    symmetric = is_hermitian(matrix) and not isinstance(_number(damping), complex)
    hermitian = symmetric
    result = _try_inverse(damped, hermitian)
    if result is None and hermitian and not definite:
        hermitian = False
        result = _try_inverse(damped, hermitian)
    if result is None and retry_double_precision and damped.dtype in _DOUBLE:
        double = _DOUBLE[damped.dtype]
        warn(
            f"Inverting {name} with damping {_number(damping)} failed in {damped.dtype}; "
            f"retrying in {double}. More damping avoids this.",
            stacklevel=2,
        )
        result = _try_inverse(add_to_diagonal(matrix.to(double), damping), hermitian)
    if result is None:
        reason = "not positive definite" if hermitian else "singular"
        raise RuntimeError(
            f"Cannot invert {name}: with damping {_number(damping)} it is {reason}. "
            "Increase the damping."
        )
    if symmetric:  # but for rounding errors, which grow with the condition number
        result = (result + result.mH) / 2
    return result.to(matrix.dtype)


def _number(damping: complex | Tensor) -> complex:
    """Return a damping value as a Python number, for messages."""
    return damping.item() if isinstance(damping, Tensor) else damping


def _try_inverse(matrix: Tensor, hermitian: bool) -> Tensor | None:
    """Return the inverse, or None if the factorisation fails or is not finite."""
    if hermitian:
        factor, info = torch.linalg.cholesky_ex(matrix)
        result = torch.cholesky_inverse(factor) if info.item() == 0 else None
    else:
        result, info = torch.linalg.inv_ex(matrix)
        result = result if info.item() == 0 else None
    return result if result is not None and all_finite(result) else None


def eigh(
    matrix: Tensor, *, name: str, keep_wide: bool = False, checked: bool = False
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[d]`` and eigenvectors ``[d, d]`` of a Hermitian matrix.

    If the solver fails, or returns what is not finite, it is called again, until it succeeds: with
    the matrix in double precision; there on the CPU; and with growing multiples of the identity
    added, which are subtracted from the eigenvalues. One warning tells how it went.

    Args:
        matrix: Hermitian matrix ``[d, d]``.
        name: What the matrix is, for warnings and errors.
        keep_wide: Whether to return them in the dtype in which they were computed.
        checked: Whether it is known to be finite and Hermitian.

    Returns:
        Ascending eigenvalues and the orthonormal eigenvectors as columns, in the matrix's dtype.

    Raises:
        ValueError: If the matrix is not finite.
        NotHermitianError: If it is not Hermitian.
        RuntimeError: If nothing helps, or the eigenvalues overflow the matrix's dtype.
    """
    if not (checked or all_finite(matrix)):
        raise ValueError(f"Cannot eigendecompose {name}: it has non-finite entries. {CHECK_ORIGIN}")
    if not (checked or is_hermitian(matrix)):
        raise NotHermitianError(
            f"Cannot eigendecompose {name}: it is not Hermitian. If only rounding errors make it "
            "so, use the mean of it and its adjoint."
        )
    values, vectors = _try_until_decomposed(matrix, name)
    if keep_wide:
        return values, vectors
    real = matrix.real.dtype if matrix.is_complex() else matrix.dtype
    narrow = values.to(real)
    if not all_finite(narrow):
        raise RuntimeError(
            f"The eigenvalues of {name} overflow {real}: they are up to "
            f"{values.abs().max().item():.1e}. Divide it by a number, or convert it with .to(...)."
        )
    return narrow, vectors.to(matrix.dtype)


def _try_until_decomposed(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors by the first attempt that works; warn of a later one."""
    failed: list[str] = []
    error: RuntimeError | None = None
    for how, attempt, shift in _attempts(matrix):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.OutOfMemoryError:  # which has nothing to do with the matrix's values
            raise
        except RuntimeError as raised:  # LinAlgError, or one of the solver's library
            error = raised
        else:
            if all_finite(values) and all_finite(vectors):
                if failed:
                    warn(
                        f"Eigendecomposing {name} failed {', '.join(failed)}; retrying {how} "
                        "succeeded.",
                        stacklevel=3,
                    )
                return (values - shift).to(matrix.device), vectors.to(matrix.device)
        failed.append(how)
    reason = f": {error}" if error else "."
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # it is a RuntimeError
        f"Cannot eigendecompose {name}: its entries are finite, up to "
        f"{matrix.abs().max().item():.1e}, but torch.linalg.eigh failed {', '.join(failed)}. "
        f"Multiply it by a number so that its entries are around 1, or add a larger multiple of "
        f"the identity. The last error{reason}"
    ) from error


def _attempts(matrix: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """Yield how to decompose a matrix: in words, the matrix, and a shift of its eigenvalues."""
    wide = widened(matrix)
    how = f"in {wide.dtype}"
    yield how, wide, 0.0
    dtype, device = _DOUBLE.get(wide.dtype, wide.dtype), matrix.device.type
    if dtype != wide.dtype:
        how = f"in {dtype}"
        if device != "mps":  # which has no double precision
            wide = matrix.to(dtype)
            yield how, wide, 0.0
    if device != "cpu":
        how += " on the CPU"
        wide = matrix.cpu().to(dtype)
        yield how, wide, 0.0
    largest = wide.abs().max().item() or 1.0
    for jitter in _JITTERS:
        shift = jitter * largest
        yield f"{how} with {shift:.1e} added to the diagonal", add_to_diagonal(wide, shift), shift


def negligible(values: Tensor, size: int) -> float | Tensor:
    """Return how far from zero rounding can bring eigenvalues that are zero.

    Args:
        values: All eigenvalues, real.
        size: Rows of the largest matrix that was decomposed for them; 1 if there was none.
    """
    if not values.numel():
        return 0.0
    rounding, computing = torch.finfo(values.dtype).eps, torch.finfo(widened(values).dtype).eps
    return (4 * rounding + 10 * size * computing) * values.abs().max()


def real_power(
    values: Tensor, exponent: float, *, name: str, size: int = 1, computed: bool = False
) -> Tensor:
    """Return eigenvalues raised to a real power; rounding below zero counts as zero.

    Args:
        values: Eigenvalues, real or complex.
        exponent: The power.
        name: What has these eigenvalues, for errors.
        size: Rows of the largest matrix that was decomposed for them; 1 if there was none.
        computed: Whether they come straight from the decomposition of one matrix. Then also those
            that are only rounding errors of the largest one count as zero in negative powers.

    Returns:
        The powers, in the shape of the eigenvalues.

    Raises:
        ValueError: If the power is not defined: a non-integer power of a negative eigenvalue,
            or a negative power of zero.
    """
    if not values.is_complex() and exponent != int(exponent):
        if bool((values < -negligible(values, size)).any()):
            raise ValueError(
                f"The power {exponent} of {name} is not real: its smallest eigenvalue is "
                f"{values.min().item():.3e}. Add a multiple of the identity."
            )
        values = values.clamp(min=0)
    if exponent < 0 and values.numel():
        magnitudes = values.abs()
        # what LAPACK's eigenvalues of a singular matrix are at most
        rounding = size**0.5 * torch.finfo(widened(magnitudes).dtype).eps if computed else 0.0
        if bool((magnitudes <= rounding * magnitudes.max()).any()):
            raise ValueError(
                f"The power {exponent} of {name} does not exist: it is singular. "
                "Add a multiple of the identity."
            )
    return values**exponent


def recompose(values: Tensor, vectors: Tensor) -> Tensor:
    """Return ``Q diag(λ) Qᴴ``, exactly Hermitian for real eigenvalues ``[d]``."""
    product = (vectors * values) @ vectors.mH
    return product if values.is_complex() else (product + product.mH) / 2


def relative_cutoff(rtol: float | None, size: int, dtype: torch.dtype) -> float:
    """Return the cutoff of a pseudo-inverse, relative to the largest singular value.

    Args:
        rtol: What the user gave.
        size: Rows or columns, whichever are more, of the matrix that is decomposed; 1 for none.
        dtype: The dtype of the matrix.

    Raises:
        ValueError: If the cutoff is not between 0 and 1.
    """
    if rtol is None:
        return max(size, 1) * torch.finfo(_WIDER.get(dtype, dtype)).eps
    if not 0 <= rtol <= 1:
        raise ValueError(f"rtol must be between 0 and 1, got {rtol}.")
    return float(rtol)


def reciprocals(values: Tensor, cutoff: float | Tensor) -> Tensor:
    """Return ``1 / λ``, and 0 for those of magnitude up to a cutoff."""
    large = values.abs() > cutoff
    return torch.where(large, 1 / torch.where(large, values, 1), 0)


def pinv(matrix: Tensor, rtol: float | None, *, name: str) -> Tensor:
    """Return the Moore-Penrose inverse ``[n, m]`` of a matrix ``[m, n]``.

    Args:
        matrix: The matrix.
        rtol: Singular values up to this multiple of the largest one count as zero. Default:
            ``max(m, n)`` times the machine epsilon of the dtype in which they are computed.
        name: What the matrix is, for errors.

    Raises:
        ValueError: If the matrix is not finite, or the cutoff makes no sense.
    """
    cutoff = relative_cutoff(rtol, max(matrix.shape), matrix.dtype)
    if not all_finite(matrix):
        raise ValueError(f"Cannot invert {name}: it has non-finite entries. {CHECK_ORIGIN}")
    if not is_hermitian(matrix):
        return torch.linalg.pinv(widened(matrix), rtol=cutoff).to(matrix.dtype)
    values, vectors = eigh(matrix, name=name, keep_wide=True)
    largest = values.abs().max() if values.numel() else 0.0
    return recompose(reciprocals(values, cutoff * largest), vectors).to(matrix.dtype)
