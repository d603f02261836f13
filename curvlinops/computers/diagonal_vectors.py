"""The loss vectors whose back-propagated squares add up to the diagonal of the GGN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops.risk import Loss

# Entries of the gradients, and of the loss vectors, that are held at once. On a CPU, larger tensors
# are slower: they do not fit into the cache, and their memory is taken from the system each time.
_ENTRIES = 2**24
_ENTRIES_CPU = 2**21


def entries_at_once(device: torch.device) -> int:
    """Return the number of entries that are held at once."""
    return _ENTRIES_CPU if device.type == "cpu" else _ENTRIES


class LossVectors:
    """Makes vectors for each loss term, whose second moments add up to the terms' Hessians.

    Args:
        loss: The loss entry.
        mc_samples: Number of Monte-Carlo samples, by which their sum is to be divided; 0 for the
            columns of the Hessians' roots.
        random: Source of random numbers.
    """

    def __init__(self, loss: Loss, mc_samples: int, random: RandomSource) -> None:
        self.loss = loss
        self._mc_samples = mc_samples
        self._random = random

    def make(self, F: Tensor, targets: Any, first_term: int) -> Iterator[Tensor]:
        """Yield ``[V, m, C]`` for loss terms.

        Args:
            F: Predictions ``[m, C]``.
            targets: Targets of the loss terms.
            first_term: Index of the first term in the whole data.
        """
        m, C = F.shape
        width = self.at_once(F)
        if not self._mc_samples:
            num_columns = self.loss.num_columns(C)
            for start in range(0, num_columns, width):
                columns = slice(start, min(start + width, num_columns))
                yield self.loss.root_columns(F, targets, columns)
            return
        draws = self.loss.draws(C)
        uniforms = self._random.uniforms("samples", first_term, m, self._mc_samples * draws)
        for sample in uniforms.reshape(m, self._mc_samples, draws).split(width, dim=1):
            yield self.loss.sample(F, targets, sample)

    def number(self, F: Tensor) -> int:
        """Return how many vectors there are for each term of ``[m, C]``."""
        return self._mc_samples or self.loss.num_columns(F.shape[1])

    def at_once(self, F: Tensor) -> int:
        """Return how many vectors ``[m, C]`` are made at once."""
        return max(1, min(self.number(F), entries_at_once(F.device) // max(1, F.numel())))


__all__ = ["LossVectors", "entries_at_once"]
