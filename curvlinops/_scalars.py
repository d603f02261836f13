"""Scalar factors: Python and NumPy numbers, and 0-d tensors; integer arguments."""

from __future__ import annotations

import operator
from numbers import Number
from typing import Any

from torch import Tensor

Scalar = complex | Tensor


def as_scalar(value: Any) -> Scalar | None:
    """Return a number or 0-d tensor as a scalar factor, None for anything else."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else None
    if isinstance(value, (int, float, complex)):
        return value
    if isinstance(value, Number):  # of NumPy, or a fraction
        return value.item() if hasattr(value, "item") else float(value)  # type: ignore[arg-type]
    return None


def as_integer(name: str, value: Any, least: int) -> int:
    """Return an argument as an integer.

    Raises:
        ValueError: If it is none, or less than ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}.")
    return number


def conj(value: Scalar) -> Scalar:
    """Return the complex conjugate of a scalar."""
    return value.conj() if isinstance(value, Tensor) else value.conjugate()


def magnitude(value: Scalar) -> float | Tensor:
    """Return the absolute value of a scalar."""
    return value.abs() if isinstance(value, Tensor) else abs(value)


def is_real(value: Scalar) -> bool:
    """Return whether a scalar is of a real type."""
    return not value.is_complex() if isinstance(value, Tensor) else not isinstance(value, complex)
