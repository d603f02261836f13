"""Damping: one number, one for each block, or a function of the block that returns it.

Every operator resolves its damping before it computes anything (``_resolve_damping``), so that
wrong values are refused at once. What is left is one number, or a list with an entry for each block
of a block-diagonal operator, which may be such a list again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from curvlinops._scalars import Scalar, as_scalar
from curvlinops._tensors import is_real

Damping = Scalar | Sequence[Any] | Mapping[str, Scalar] | Callable[[Any], Scalar]


def one_damping(damping: Damping, operator: Any) -> Scalar:
    """Return the damping of an operator that is one block.

    Raises:
        ValueError: If there are several, or it is no number.
    """
    if callable(damping):
        value = damping(operator)
        result = as_scalar(value)
        if result is None:
            raise ValueError(
                f"The damping of {operator!r} must be a number, but the function that was given "
                f"returned {value!r}."
            )
        if isinstance(result, Tensor) and result.is_complex() and is_real(result):
            result = result.real  # such as the trace of a complex Hermitian block
    elif isinstance(damping, Mapping):
        raise ValueError(
            "Damping by parameter name needs an operator that knows the names of its blocks, such "
            f"as KFACLinearOperator or its inverse, not {operator!r}."
        )
    else:
        given = as_scalar(damping)
        if given is None:
            raise ValueError(
                f"The damping of {operator!r}, which has no blocks, must be a number or a function "
                f"that returns one, got {damping!r}."
            )
        result = given
    return _checked(result, operator)


def block_dampings(damping: Damping, number: int, operator: Any) -> list[Any]:
    """Return what to give each block of a block-diagonal operator: a number, function or sequence.

    Raises:
        ValueError: If there is not one value for each block, or they go by name.
    """
    scalar = as_scalar(damping)
    if scalar is not None:
        return [_checked(scalar, operator)] * number
    if callable(damping):
        return [damping] * number
    if isinstance(damping, (Mapping, str)) or not hasattr(damping, "__len__"):
        one_damping(damping, operator)  # says what is wrong
    values = list(damping)  # type: ignore[arg-type]
    if len(values) != number:
        raise ValueError(
            f"{operator!r} needs one damping for each of its {number} blocks, got {len(values)}."
        )
    return values


def named_dampings(
    damping: Mapping[str, Scalar], groups: Sequence[Sequence[str]], operator: Any
) -> list[Any]:
    """Return the damping of each block, whose parameters have the names in its group.

    Raises:
        ValueError: If a name is unknown, a block has no value, or several different ones.
    """
    known = [name for group in groups for name in group]
    unknown = [name for name in damping if name not in known]
    if unknown:
        raise ValueError(f"There are no parameters {unknown} in {operator!r}. Parameters: {known}.")
    result = []
    for group in groups:
        values = [damping[name] for name in group if name in damping]
        if not values:
            raise ValueError(
                f"There is no damping for the parameters {list(group)}. Give one of them a damping."
            )
        if any(bool(value != values[0]) for value in values[1:]):
            raise ValueError(
                f"The parameters {list(group)} share one block, but have dampings {values}. "
                "Give them the same, or one of them only."
            )
        result.append(values[0])
    return result


def map_damping(function: Callable[[Scalar], Scalar], damping: Any) -> Any:
    """Apply a function to each number of a damping that is resolved."""
    if isinstance(damping, list):
        return [map_damping(function, value) for value in damping]
    return function(damping)


def _checked(damping: Scalar, operator: Any) -> Scalar:
    """Return a damping that is a number; NaN is none."""
    if bool(damping != damping):
        raise ValueError(f"The damping of {operator!r} is NaN, but must be a number.")
    return damping
