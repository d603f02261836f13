"""Rows that a model selects by the entries of a tensor, with another number for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.usages import tensors_in

#: Functions, of PyTorch and in traces, whose results have as many rows as a tensor has entries that
#: are not zero: it is the last one of their arguments.
_PLACES = {"nonzero", "nonzero_numpy", "argwhere", "where", "masked_select"}
#: Functions that repeat rows, or that take so many rows of each example.
_REPEATS = {"repeat_interleave": "repeats", "_pack_padded_sequence": "lengths"}
#: Functions whose results can have any number of rows.
_OTHERS = {"unique", "unique_dim", "unique_consecutive", "_unique", "_unique2"}
_INDEXING = {"__getitem__", "index"}
#: Functions that put rows together, which may be those of one example each.
_JOINING = {"cat", "concat", "concatenate"}

#: The names of functions that select rows.
SELECTING = frozenset(_PLACES | set(_REPEATS) | _OTHERS | _INDEXING | _JOINING)


def unevenly_selected(name: str, args: Any, kwargs: Any, result: Any, n: int) -> set[int]:
    """Return how many rows a function selects, if not the same number of each example.

    Args:
        name: The function's name, one of :data:`SELECTING`.
        args: Its arguments.
        kwargs: Its arguments by name.
        result: What it returned.
        n: The number of examples; they are the slowest axis of what rows are selected by.

    Returns:
        The numbers of rows that may be meant; none if examples have the same number.
    """
    if name in _OTHERS:
        return {x.shape[0] for x in tensors_in([result]) if x.ndim}
    if name in _JOINING:
        lengths = [len(x) for x in tensors_in([args, kwargs])]
        return {sum(lengths)} if len(lengths) == n and len(set(lengths)) > 1 else set()
    counts = _counts(name, args, kwargs)
    if counts is None or counts.numel() == 0:
        return set()
    if counts.numel() % n == 0:
        of_each = counts.reshape(n, -1).sum(1)
        if bool((of_each == of_each[0]).all()):
            return set()
    total = int(counts.sum())
    if name == "masked_select":  # a mask of all entries of the rows
        return {total, total // counts.shape[-1]} if counts.ndim else {total}
    return {total}


def _counts(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """Return how often each row is selected; None if that depends on no entries."""
    if name in _INDEXING:
        indices = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        first = indices[0] if indices else None
        is_mask = isinstance(first, Tensor) and first.dtype in (torch.bool, torch.uint8)
        return first != 0 if is_mask else None  # type: ignore[return-value]
    if name in _REPEATS:
        counts = kwargs.get(_REPEATS[name], args[min(1, len(args) - 1)] if args else None)
        return counts if isinstance(counts, Tensor) else None
    if name == "where" and len(args) + len(kwargs) > 1:  # chooses between two tensors
        return None
    return tensors_in([args, kwargs])[-1] != 0


__all__ = ["SELECTING", "unevenly_selected"]
