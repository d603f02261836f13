"""What users pass to iterative solvers: checked, and brought to flat columns ``[D, K]``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import Size, Tensor

from curvlinops._formats import Format, concatenate, describe, to_columns
from curvlinops._operator import PyTorchLinearOperator, check_same

Preconditioner = PyTorchLinearOperator | Callable[[Tensor], Tensor]
Function = Callable[[Tensor], Tensor]  # of flat columns [D, K]


def check_operator(A: PyTorchLinearOperator) -> None:
    """Raise if A is not an operator."""
    if not isinstance(A, PyTorchLinearOperator):
        raise TypeError(
            f"A must be a linear operator, got {type(A).__name__}; wrap a matrix in "
            "TensorLinearOperator."
        )


def check_square(solver: str, A: PyTorchLinearOperator) -> None:
    """Raise if A is not an operator from a space to itself."""
    check_operator(A)
    if A.in_shape != A.out_shape:
        raise ValueError(
            f"{solver} needs an operator from a space to itself, but {A!r} maps "
            f"{describe(A.in_shape)} to {describe(A.out_shape)}."
        )


def as_bound(name: str, value: float) -> float:
    """Return an argument as a float; raise if it is no finite number of at least 0."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}.") from error
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {number}.")
    return number


def as_max_iter(max_iter: int | None, default: int) -> int:
    """Return the largest number of iterations; raise if it is no integer of at least 0."""
    if max_iter is None:
        return default
    try:
        value = operator.index(max_iter)
    except TypeError as error:
        raise TypeError(f"max_iter must be an integer or None, got {max_iter!r}.") from error
    if value < 0:
        raise ValueError(f"max_iter must be at least 0, got {value}.")
    return value


def as_function(preconditioner: Preconditioner | None, A: PyTorchLinearOperator) -> Function | None:
    """Return the preconditioner as a function of flat columns ``[D, K]``."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, PyTorchLinearOperator):
        for shape in (preconditioner.in_shape, preconditioner.out_shape):
            if shape != A.in_shape:
                raise ValueError(
                    f"Shape mismatch: the preconditioner {preconditioner!r} maps "
                    f"{describe(preconditioner.in_shape)} to "
                    f"{describe(preconditioner.out_shape)}, but {A!r} acts on "
                    f"{describe(A.in_shape)}. Both spaces must be that of A."
                )
        check_same("a preconditioned solve", A, preconditioner)
        return preconditioner.__matmul__
    if not callable(preconditioner):
        raise TypeError(
            "The preconditioner must be a linear operator or a function of flat columns [D, K], "
            f"got {type(preconditioner).__name__}; wrap a matrix in TensorLinearOperator."
        )

    def precondition(r: Tensor) -> Tensor:
        z = preconditioner(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"The preconditioner must return a tensor of shape {list(r.shape)}, as it was "
                f"given, but returned {got}."
            )
        return z

    return precondition


def names_of(A: PyTorchLinearOperator) -> list[str] | None:
    """Return the names of the tensors of the space that A maps to itself."""
    return A._out_names if A._in_names is None else A._in_names


def flatten(
    A: PyTorchLinearOperator, v: Any, what: str, shapes: list[Size], names: list[str] | None
) -> tuple[Tensor, Format]:
    """Return v as flat columns ``[D, K]`` of A's dtype and device, and its format."""
    columns, fmt = to_columns(v, shapes, names, leading=False)
    for attribute in ("dtype", "device"):
        found = {getattr(c, attribute) for c in columns}
        own = getattr(A, attribute)
        wrong = found - {own}
        if own is not None and wrong:
            raise ValueError(
                f"{attribute.capitalize()} mismatch: {A!r} has {own}, but {what} has "
                f"{', '.join(map(str, wrong))}. Convert one of them with .to(...)."
            )
        if len(found) > 1:
            raise ValueError(
                f"{attribute.capitalize()} mismatch: the tensors of {what} have "
                f"{', '.join(sorted(map(str, found)))}. Convert them with .to(...)."
            )
    flat = concatenate(columns)
    if not (flat.is_floating_point() or flat.is_complex()):
        raise ValueError(f"{what} must be of floating-point or complex dtype, got {flat.dtype}.")
    return flat, fmt


def flatten_start(A: PyTorchLinearOperator, x0: Any, b: Tensor) -> Tensor | None:
    """Return x0 as flat columns ``[D, K]`` like those of b."""
    if x0 is None:
        return None
    start, _ = flatten(A, x0, "x0", A.in_shape, names_of(A))
    if start.shape != b.shape:
        raise ValueError(
            f"Shape mismatch: x0 has {start.shape[1]} columns, but b has {b.shape[1]}. x0 "
            "needs as many as b."
        )
    if (start.dtype, start.device) != (b.dtype, b.device):
        raise ValueError(
            f"Dtype or device mismatch: x0 has {start.dtype} on {start.device}, but b has "
            f"{b.dtype} on {b.device}. Convert one of them with .to(...)."
        )
    return start
