"""Communication between the processes that share a data set, through one small interface."""

from __future__ import annotations

from torch import Tensor


class Collective:
    """What processes that each hold a part of the data need from one another.

    This class is the single process: each method is the identity. A distributed collective has the
    same methods and is handed to the empirical risk in its place. All ranks make the same calls in
    the same order.

    Example:
        >>> collective = Collective()
        >>> collective.prefix(7), collective.any(False)
        (0, False)
    """

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Add tensors elementwise over the ranks; every rank gets the sums.

        Args:
            tensors: The summands of this rank. A rank that has no data does not know their shapes:
                it passes an empty list where the others pass tensors, and gets the others' sums.

        Returns:
            The sums, in the same order.
        """
        return tensors

    def prefix(self, value: int) -> int:
        """Add the values of all ranks before this one (the exclusive prefix sum).

        Args:
            value: The value of this rank.

        Returns:
            The sum; 0 on the first rank.
        """
        return 0

    def any(self, flag: bool) -> bool:
        """Tell every rank whether a flag is set on at least one of them.

        Args:
            flag: The flag of this rank.

        Returns:
            Whether any rank's flag is set.
        """
        return flag


__all__ = ["Collective"]
