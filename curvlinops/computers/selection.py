"""Functions by which the entries of tensors may decide which rows there are, in which order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.usages import tensors_in

#: Of PyTorch, and operations of traces: they find places, sort, repeat, or return numbers.
_SELECTING = {
    "__index__",
    "__int__",
    "_local_scalar_dense",
    "_pack_padded_sequence",
    "argsort",
    "argwhere",
    "bucketize",
    "embedding",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_put",
    "index_put_",
    "index_select",
    "item",
    "masked_scatter",
    "masked_scatter_",
    "masked_select",
    "multinomial",
    "nonzero",
    "nonzero_numpy",
    "numpy",
    "repeat_interleave",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "searchsorted",
    "sort",
    "take",
    "tensor_split",
    "tolist",
    "topk",
    "unique",
    "unique_consecutive",
}
_INDEXING = {"__getitem__", "index"}
_GATHERING = {"gather": 1, "take_along_dim": 2}  # the place of their axis
_SPLITTING = {"split", "split_with_sizes"}
_JOINING = {"cat", "concat", "concatenate", "hstack", "row_stack", "stack", "vstack"}

#: The names of all functions that :func:`may_select` may be asked about.
NAMES = frozenset(
    _SELECTING | _INDEXING | set(_GATHERING) | _SPLITTING | _JOINING | {"__setitem__", "where"}
)


def may_select(name: str, args: Any, kwargs: Any, n: int) -> bool:
    """Return whether a function may select rows, or put them together example by example.

    Args:
        name: Its name, one of :data:`NAMES`.
        args: Its arguments.
        kwargs: Its arguments by name.
        n: The number of examples.
    """
    if name in _INDEXING:
        indices = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        by_entries = isinstance(args[1], list) or any(
            isinstance(index, (Tensor, list)) for index in indices
        )
        # masks are no inputs of layers
        return by_entries and getattr(args[0], "dtype", None) != torch.bool
    if name in _GATHERING:  # within examples, tokens are gathered in many models
        tensors = tensors_in([args, kwargs])
        place = _GATHERING[name]
        axis = kwargs.get("dim", args[place] if len(args) > place else None)
        return axis in (0, None) or any(x.is_floating_point() for x in tensors)
    if name in _SPLITTING:
        return any(isinstance(x, (list, tuple)) for x in (*args[1:], *kwargs.values()))
    if name in _JOINING:
        return len(tensors_in([args, kwargs])) >= n
    return name != "where" or len(args) + len(kwargs) == 1


__all__ = ["NAMES", "may_select"]
