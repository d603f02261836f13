"""Formats of the things an operator multiplies, and their conversion to one internal format.

A space is a list of tensor shapes, ``[*N_1], [*N_2], ...``, with an optional name for each.
Its elements come as one flat tensor, a list or tuple of tensors, or a dict keyed by name;
as one vector or as a matrix with an extra column axis, which trails in ``A @ x`` and leads in
``x @ A``. Operators see only the internal format: a list of tensors ``[*N_i, K]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

Columns = list[Tensor]
"""The internal format: tensors ``[*N_i, K]``, one for each shape of a space."""


@dataclass(frozen=True)
class Format:
    """How a vector or matrix was given, so that the result is returned in the same way."""

    container: str  # "tensor", "list", "tuple" or "dict"
    is_vector: bool
    leading: bool  # whether the column axis leads (``x @ A``)


def as_shapes(shapes: Sequence[Sequence[int]], what: str) -> list[Size]:
    """Return the shapes as a list of ``torch.Size``; refuse an empty list."""
    result = [Size(shape) for shape in shapes]
    if not result:
        raise ValueError(f"{what} is empty: an operator needs at least one tensor in each space.")
    return result


def numel(shapes: Sequence[Size]) -> int:
    """Return the dimension of a space."""
    return sum(prod(shape) for shape in shapes)


def describe(shapes: Sequence[Size], names: Sequence[str] | None = None) -> str:
    """Return a space as readable text."""
    if names is None:
        return "[" + ", ".join(str(tuple(shape)) for shape in shapes) + "]"
    pairs = zip(names, shapes, strict=True)
    return "{" + ", ".join(f"{name!r}: {tuple(shape)}" for name, shape in pairs) + "}"


def split_flat(flat: Tensor, shapes: Sequence[Size]) -> Columns:
    """Split flat matrices ``[..., N, K]`` into tensors ``[..., *N_i, K]``."""
    *batch, _, num_columns = flat.shape
    parts = flat.split([prod(shape) for shape in shapes], dim=-2)
    return [
        part.reshape(*batch, *shape, num_columns) for part, shape in zip(parts, shapes, strict=True)
    ]


def concatenate(columns: Columns, batch_dims: int = 0) -> Tensor:
    """Concatenate tensors ``[*N_i, K]`` into a flat matrix ``[N, K]``, after axes of a batch."""
    flat = [
        c.reshape(*c.shape[:batch_dims], prod(c.shape[batch_dims:-1]), c.shape[-1]) for c in columns
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=batch_dims)


def to_columns(
    x: Any, shapes: Sequence[Size], names: Sequence[str] | None, leading: bool
) -> tuple[Columns, Format]:
    """Convert ``x`` to the internal format.

    Args:
        x: A tensor, list, tuple or dict; vector or matrix.
        shapes: The shapes of the space that ``x`` lives in.
        names: The names of the space's tensors, if it has names.
        leading: Whether the column axis of a matrix comes first.

    Returns:
        Tensors ``[*N_i, K]`` and the format to return results in.

    Raises:
        TypeError: If ``x`` is of a type that is no vector or matrix.
        ValueError: If the shapes or names do not fit the space.
    """
    if isinstance(x, Tensor):
        return _flat_to_columns(x, shapes, leading)
    if isinstance(x, Mapping):
        return _tensors_to_columns(_in_order(x, shapes, names), "dict", shapes, names, leading)
    if isinstance(x, (list, tuple)):
        container = "tuple" if isinstance(x, tuple) else "list"
        return _tensors_to_columns(list(x), container, shapes, names, leading)
    raise TypeError(
        f"Cannot multiply a linear operator with {type(x).__name__}: pass a torch tensor, a list "
        "or tuple of tensors, a dict keyed by parameter name, or another operator "
        "(for NumPy arrays use A.to_scipy())."
    )


def from_columns(
    columns: Columns, shapes: Sequence[Size], names: Sequence[str] | None, fmt: Format
) -> Any:
    """Convert tensors ``[*N_i, K]`` of a space to a format; the inverse of :func:`to_columns`."""
    if fmt.container == "tensor":
        flat = concatenate(columns)  # [N, K]
        if fmt.is_vector:
            return flat.squeeze(-1)
        return flat.T if fmt.leading else flat
    if fmt.is_vector:
        columns = [c.squeeze(-1) for c in columns]
    elif fmt.leading:
        columns = [c.movedim(-1, 0) for c in columns]
    if fmt.container == "dict" and names is not None:
        return dict(zip(names, columns, strict=True))
    return tuple(columns) if fmt.container == "tuple" else columns


def _flat_to_columns(x: Tensor, shapes: Sequence[Size], leading: bool) -> tuple[Columns, Format]:
    """Split one tensor ``[N]``, ``[N, K]`` or (leading) ``[K, N]``."""
    dim = numel(shapes)
    axis = -1 if leading else 0
    if x.ndim not in (1, 2) or x.shape[axis] != dim:
        matrices = f"[K, {dim}]" if leading else f"[{dim}, K]"
        raise ValueError(
            f"Shape mismatch: a tensor must have shape [{dim}] or {matrices}, got {list(x.shape)}. "
            f"As a list, the tensors' shapes are {describe(shapes)}."
        )
    matrix = x.unsqueeze(-1) if x.ndim == 1 else (x.T if leading else x)
    return split_flat(matrix, shapes), Format("tensor", x.ndim == 1, leading)


def _in_order(
    x: Mapping[str, Tensor], shapes: Sequence[Size], names: Sequence[str] | None
) -> list[Tensor]:
    """Return a dict's tensors in the order of the space's names."""
    if names is None:
        raise ValueError(
            "A dict was given, but this space has no names: pass a list of tensors with shapes "
            f"{describe(shapes)} or one flat tensor."
        )
    if set(x) != set(names):
        missing, unknown = sorted(set(names) - set(x)), sorted(set(x) - set(names))
        raise ValueError(
            f"The dict's keys must be the parameter names. Missing: {missing}. Unknown: {unknown}."
        )
    return [x[name] for name in names]


def _tensors_to_columns(
    x: list[Tensor],
    container: str,
    shapes: Sequence[Size],
    names: Sequence[str] | None,
    leading: bool,
) -> tuple[Columns, Format]:
    """Bring a list of tensors ``[*N_i]``, ``[*N_i, K]`` or ``[K, *N_i]`` to ``[*N_i, K]``."""
    wrong = [type(t).__name__ for t in x if not isinstance(t, Tensor)]
    if wrong:
        raise TypeError(f"A {container} of tensors is needed, but it holds {', '.join(wrong)}.")
    is_vector = bool(x) and x[0].ndim == len(shapes[0])
    extra = None if is_vector or not x or not x[0].ndim else x[0].shape[0 if leading else -1]
    columns: Size = Size(()) if extra is None else Size((extra,))
    expected = [columns + shape if leading else shape + columns for shape in shapes]
    if [t.shape for t in x] != expected:
        axis = "leading" if leading else "trailing"
        raise ValueError(
            f"Shape mismatch: the tensors must have shapes {describe(shapes, names)}, all of them "
            f"with or all without one {axis} column axis of equal size; "
            f"got {describe([t.shape for t in x])}."
        )
    if is_vector:
        x = [t.unsqueeze(-1) for t in x]
    elif leading:
        x = [t.movedim(0, -1) for t in x]
    return x, Format(container, is_vector, leading)
