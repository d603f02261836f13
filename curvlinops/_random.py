"""Random numbers that depend on nothing but (seed, purpose, index of the loss term).

The one place that draws the random numbers of curvature matrices. The numbers of a loss term do
not depend on how the data are batched, on the rank of a distributed run, on the model's dtype or
device, or on what was drawn before. They are uniforms on the open interval (0, 1), in float64 on
the CPU; whoever needs classes or Gaussians transforms them. No global generator is read or moved.
A function compiled by ``torch.compile`` draws the same numbers, with one opaque operation.
"""

from __future__ import annotations

from operator import index

import numpy as np
import torch
from numpy.random import Philox
from numpy.typing import NDArray
from torch import Tensor

#: What random numbers are drawn for; each purpose has a stream of its own.
PURPOSES = {"samples": 0, "signs": 1, "eigenvalue-signs": 2}

# One step of Philox4x64's counter produces this many 64-bit integers.
_NUMBERS_PER_STEP = 4
# 52 random bits and the half below make 53 bits: the result is exact in float64.
_BITS = 52


class RandomSource:
    r"""Stateless source of the random numbers of loss terms.

    Number :math:`i` of the stream of a (seed, purpose) is output :math:`i` of the counter-based
    generator Philox4x64-10 (`Salmon et al., 2011 <https://doi.org/10.1145/2063384.2063405>`_) with
    key (seed, purpose). Loss term :math:`m`, which needs :math:`d` draws, owns the numbers
    :math:`md, \dots, md + d - 1`. The 64-bit integer :math:`r` becomes the uniform

    .. math::
        u = \left(\lfloor r / 2^{12} \rfloor + \tfrac{1}{2}\right) 2^{-52}
        \in [2^{-53}, 1 - 2^{-53}]\,,

    which is never 0 or 1, so inverse distribution functions are finite.

    Args:
        seed: An integer between 0 and :math:`2^{64} - 1`.

    Raises:
        ValueError: If the seed is not such an integer.

    Example:
        >>> from curvlinops._random import RandomSource
        >>> source = RandomSource(seed=0)
        >>> whole = source.uniforms("samples", first_term=0, num_terms=5, draws=3)
        >>> part = source.uniforms("samples", first_term=2, num_terms=3, draws=3)
        >>> bool((whole[2:] == part).all())
        True
    """

    def __init__(self, seed: int) -> None:
        """Store the seed."""
        try:
            self.seed = index(seed)
        except TypeError:
            raise ValueError(f"seed must be an integer, got {seed!r}.") from None
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}.")
        # The same bits as a signed integer, for the operation below.
        self._signed_seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed

    def __repr__(self) -> str:
        """Name the seed."""
        return f"RandomSource(seed={self.seed})"

    def uniforms(self, purpose: str, first_term: int, num_terms: int, draws: int) -> Tensor:
        """Draw uniforms on the open interval (0, 1) for consecutive loss terms.

        Args:
            purpose: One of :data:`PURPOSES`. Different purposes have independent numbers.
            first_term: Index of the first loss term in the whole data.
            num_terms: Number of loss terms.
            draws: Number of uniforms per loss term.

        Returns:
            Uniforms of shape ``[num_terms, draws]`` in float64 on the CPU.

        Raises:
            ValueError: If the purpose is unknown or a number is negative.
        """
        if purpose not in PURPOSES:
            raise ValueError(f"Unknown purpose {purpose!r}. Supported: {sorted(PURPOSES)}.")
        if min(first_term, num_terms, draws) < 0:
            raise ValueError(
                "first_term, num_terms and draws must not be negative, "
                f"got {first_term}, {num_terms} and {draws}."
            )
        code = PURPOSES[purpose]
        if torch.compiler.is_compiling():
            return _traced_uniforms(self._signed_seed, code, first_term, num_terms, draws)
        return _uniforms(self.seed, code, first_term, num_terms, draws)

    def signs(self, purpose: str, first_term: int, num_terms: int, draws: int) -> Tensor:
        """Draw random signs for consecutive loss terms: -1 where the uniform is below 1/2, else 1.

        Args:
            purpose: One of :data:`PURPOSES`. Different purposes have independent numbers.
            first_term: Index of the first loss term in the whole data.
            num_terms: Number of loss terms.
            draws: Number of signs per loss term.

        Returns:
            Signs (-1 or 1) of shape ``[num_terms, draws]`` in float64 on the CPU.

        Raises:
            ValueError: If the purpose is unknown or a number is negative.
        """
        uniforms = self.uniforms(purpose, first_term, num_terms, draws)
        return (uniforms >= 0.5).to(torch.float64).mul_(2).sub_(1)


def _uniforms(seed: int, code: int, first_term: int, num_terms: int, draws: int) -> Tensor:
    """Return the uniforms ``[num_terms, draws]`` of consecutive loss terms."""
    raw = _raw(seed, code, first_term * draws, num_terms * draws)
    return torch.from_numpy(_open_uniforms(raw)).reshape(num_terms, draws)


@torch.library.custom_op("curvlinops::uniforms", mutates_args=())
def _traced_uniforms(
    signed_seed: int, code: int, first_term: int, num_terms: int, draws: int
) -> Tensor:
    """The same as an operation that ``torch.compile`` does not look into; integers are signed."""
    return _uniforms(signed_seed % 2**64, code, first_term, num_terms, draws)


@_traced_uniforms.register_fake
def _(signed_seed: int, code: int, first_term: int, num_terms: int, draws: int) -> Tensor:
    """Tell the result's shape."""
    return torch.empty(num_terms, draws, dtype=torch.float64)


def _raw(seed: int, code: int, start: int, num: int) -> NDArray[np.uint64]:
    """Return numbers ``start, ..., start + num - 1`` of a purpose's stream, ``[num]``."""
    generator = Philox(key=np.array([seed, code], dtype=np.uint64))
    # `advance` moves the counter by whole steps, so the numbers of the step that lie before `start`
    # are generated and dropped.
    steps, dropped = divmod(start, _NUMBERS_PER_STEP)
    generator.advance(steps)
    return generator.random_raw(dropped + num)[dropped:]


def _open_uniforms(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map 64-bit integers to the open interval (0, 1), elementwise."""
    leading_bits = (raw >> np.uint64(64 - _BITS)).astype(np.float64)
    leading_bits += 0.5
    leading_bits *= 2.0**-_BITS
    return leading_bits
