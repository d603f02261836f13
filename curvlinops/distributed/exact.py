r"""Numbers as digits, whose sums over ranks are exact in floating point.

A sum of products is communicated in the parameters' precision. Counts and the loss's normalizer
travel in the same buffer, but float32 does not hold them: it has 24 bits. So each is an integer
(a float64 is a multiple of :math:`2^{-1074}`), which is sent as digits of 8 bits. The sum of a
digit over up to 65 793 ranks is below :math:`2^{24}`, thus exact, whatever the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_BITS = 8
#: The smallest positive float64, and the largest, are these powers of two.
_SMALLEST, _LARGEST = 1074, 1024
#: Number of digits of an integer below 2**64.
INTEGER_DIGITS = 8
#: Number of digits of a float64, and one entry for NaN and infinities.
FLOAT_DIGITS = -(-(_SMALLEST + _LARGEST) // _BITS) + 1


def integer_digits(value: int, num_digits: int = INTEGER_DIGITS) -> list[int]:
    """Write an integer as digits; they are negative for a negative one.

    Args:
        value: The integer.
        num_digits: Number of digits, the least significant one first.

    Example:
        >>> integer_digits(-258, 3)
        [-2, -1, 0]
    """
    sign = -1 if value < 0 else 1
    return [sign * digit for digit in abs(value).to_bytes(num_digits, "little")]


def integer_of(digits: Sequence[float]) -> int:
    """Read an integer from (sums of) its digits."""
    return sum(int(digit) << (_BITS * i) for i, digit in enumerate(digits) if digit)


def float_digits(value: float) -> list[float]:
    """Write a float64 as digits, and what is not finite as itself.

    Args:
        value: The number.

    Example:
        >>> float_of([a + b for a, b in zip(float_digits(0.1), float_digits(1e20))])
        1e+20
        >>> float_of([a + b for a, b in zip(float_digits(0.1), float_digits(math.nan))])
        nan
    """
    if not math.isfinite(value):
        return [0.0] * (FLOAT_DIGITS - 1) + [value]
    numerator, denominator = value.as_integer_ratio()
    integer = numerator * (2**_SMALLEST // denominator)
    return [*map(float, integer_digits(integer, FLOAT_DIGITS - 1)), 0.0]


def float_of(digits: Sequence[float]) -> float:
    """Read a float64 from (sums of) its digits: the sum of the numbers, rounded once."""
    *finite, special = digits
    if special != 0:  # NaN is not 0, either
        return special
    total = integer_of(finite)
    try:
        return total / 2**_SMALLEST
    except OverflowError:
        return math.inf if total > 0 else -math.inf


__all__ = ["FLOAT_DIGITS", "INTEGER_DIGITS", "float_digits", "float_of", "integer_digits"]
__all__ += ["integer_of"]
