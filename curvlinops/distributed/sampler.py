"""Parts of a data set for each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
import torch.distributed as dist
from torch.utils.data import Sampler


class ShardSampler(Sampler[int]):
    r"""Gives each rank its part of a data set: every example once, none twice.

    For :math:`N` examples and :math:`R` ranks, rank :math:`r` has the examples
    :math:`\lfloor r N / R \rfloor, \dots, \lfloor (r + 1) N / R \rfloor - 1`: parts are contiguous,
    in the order of the ranks, and differ in size by at most one. With fewer examples than ranks,
    some have none: a ``DataLoader`` then yields no batch, which curvature operators with a
    ``process_group`` accept. (PyTorch's ``DistributedSampler`` repeats examples instead, or leaves
    some out, which would change every sum over the data.)

    Loss terms are counted through all ranks in their order. So, without shuffling, Monte-Carlo
    samples are those of a single process that goes through the data set in its own order. With
    shuffling, they are those of one that goes through the permutation; do not change the epoch
    between products of a Monte-Carlo operator.

    Args:
        data_source: The data set.
        num_replicas: Number of ranks. Default: that of ``torch.distributed``.
        rank: The rank of this process. Default: that of ``torch.distributed``.
        shuffle: Whether to permute the data set before it is cut in parts, in the same way on all
            ranks. The permutation depends on ``seed`` and on the epoch, see :meth:`set_epoch`.
        seed: Fixes the permutations; the same on all ranks.

    Raises:
        RuntimeError: If a default is needed, and ``torch.distributed`` is not initialised.
        ValueError: If ``rank`` is not one of ``num_replicas``.

    Example:
        >>> from curvlinops import ShardSampler
        >>> [list(ShardSampler(range(5), num_replicas=3, rank=r)) for r in range(3)]
        [[0], [1, 2], [3, 4]]
    """

    def __init__(
        self,
        data_source: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if num_replicas is None or rank is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise RuntimeError(
                    "ShardSampler needs num_replicas and rank, because torch.distributed is not "
                    "initialised: pass them, or call torch.distributed.init_process_group first."
                )
            num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
            rank = dist.get_rank() if rank is None else rank
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                "rank must be at least 0 and below num_replicas, got "
                f"rank={rank}, num_replicas={num_replicas}."
            )
        self.data_source = data_source
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of examples of this rank."""
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(self._places)
        generator = torch.Generator("cpu").manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.data_source), generator=generator, device="cpu")
        return iter(order[self._places.start : self._places.stop].tolist())

    @property
    def _places(self) -> range:
        """This rank's places in the (permuted) data set."""
        N, R = len(self.data_source), self.num_replicas
        return range(self.rank * N // R, (self.rank + 1) * N // R)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iterations, if ``shuffle``.

        Args:
            epoch: Any integer, the same on all ranks.
        """
        self.epoch = epoch


__all__ = ["ShardSampler"]
