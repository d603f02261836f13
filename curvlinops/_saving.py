"""Saving and loading of operators without pickled code.

An operator is saved as (format version, type name, state), where the state holds tensors,
operators and plain values only. Loading calls one function, :func:`rebuild_operator`, which is
the only name that the package adds to what ``torch.load(..., weights_only=True)`` allows. It
looks the type up in a fixed table and imports nothing by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

FORMAT_VERSION = 1
"""Version of the saved form. Raise it when an older release could not read the new form."""

_TYPES: dict[str, Any] = {}

T = TypeVar("T", bound=type)


def saveable(cls: T) -> T:
    """Class decorator: operators of exactly this type can be saved and loaded."""
    _TYPES[cls.__name__] = cls
    return cls


def is_saveable(cls: type) -> bool:
    """Return whether operators of exactly this type can be saved."""
    return _TYPES.get(cls.__name__) is cls


def reduce_operator(
    operator: Any, state: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[int, str, dict[str, Any]]]:
    """Return what ``pickle`` stores for an operator."""
    return rebuild_operator, (FORMAT_VERSION, type(operator).__name__, state)


def rebuild_operator(version: int, kind: str, state: dict[str, Any]) -> Any:
    """Rebuild a saved operator; called by ``torch.load``.

    Args:
        version: The format version of the file.
        kind: The name of the operator's type.
        state: Tensors, operators and plain values from which the type rebuilds itself.

    Returns:
        The operator.

    Raises:
        ValueError: If the file is of a newer format, or holds an unknown type.
    """
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The file holds an operator in format {version}, but this release of curvlinops "
            f"reads formats up to {FORMAT_VERSION}. Update curvlinops to load it."
        )
    if kind not in _TYPES:
        raise ValueError(
            f"The file holds an operator of unknown type {kind!r}. Load it with the release of "
            "curvlinops that saved it."
        )
    return _TYPES[kind]._from_state(state)


def compact(tensor: Tensor) -> Tensor:
    """Drop the graph, and copy a view of a larger storage, which would be saved whole."""
    tensor = tensor.detach()
    own = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor


torch.serialization.add_safe_globals([rebuild_operator])
