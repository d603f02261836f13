"""The bridge to SciPy: an operator on NumPy vectors, computing in torch on its own device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

_NUMPY_DTYPES = {
    torch.bfloat16: np.float32,
    torch.float16: np.float32,
    torch.complex32: np.complex64,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


def to_scipy(operator: Any, dtype: DTypeLike | None = None) -> LinearOperator:
    """Return a SciPy operator of the same matrix; only vectors are copied between the two.

    Args:
        operator: A :class:`~curvlinops.PyTorchLinearOperator`.
        dtype: The SciPy operator's dtype. Default: the operator's own, with NumPy's nearest
            (float32) for bfloat16 and float16.

    Returns:
        A SciPy operator that supports ``matvec``, ``rmatvec``, ``matmat`` and ``rmatmat``.
    """
    own = operator.dtype
    if own is None:
        own = torch.get_default_dtype() if dtype is None else _as_torch(np.dtype(dtype))
    target = np.dtype(_NUMPY_DTYPES[own] if dtype is None else dtype)
    adjoint = operator.adjoint()

    def multiply(op: Any, x: np.ndarray) -> np.ndarray:
        result = _multiply(op, torch.from_numpy(np.array(x)), own)
        return result.astype(np.result_type(target, x.dtype), copy=False)

    return LinearOperator(
        operator.shape,
        matvec=lambda x: multiply(operator, x.reshape(-1)),
        rmatvec=lambda x: multiply(adjoint, x.reshape(-1)),
        matmat=lambda x: multiply(operator, x),
        rmatmat=lambda x: multiply(adjoint, x),
        dtype=target,
    )


def _multiply(operator: Any, x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Multiply in the operator's dtype; a complex input of a real operator goes in two parts."""
    if x.is_complex() and not dtype.is_complex:
        real, imag = (_multiply(operator, part, dtype) for part in (x.real, x.imag))
        return real + 1j * imag
    result = (operator @ x.to(device=operator.device, dtype=dtype)).cpu()
    return result.to(_as_torch(_NUMPY_DTYPES[dtype])).resolve_conj().numpy()


def _as_torch(dtype: Any) -> torch.dtype:
    """Return the torch dtype of a NumPy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype
