"""The same data in other batches, for the conformance kit."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from curvlinops.testing._check import wide
from curvlinops.testing._curvature_reference import Example, Reference


class CannotRebatchError(Exception):
    """The data cannot be batched otherwise; the message says why."""


def split(batches: list[Example]) -> list[Example]:
    """Return one batch per example.

    Raises:
        CannotRebatchError: If it is not known how, or there are none to split.
    """
    if all(b.n == 1 for b in batches):
        raise CannotRebatchError("all batches have one example")
    for b in batches:
        _require_rows(b)
    return [
        Example(
            _map(b.X, lambda x, i=i: x[i : i + 1]),  # type: ignore[misc]
            b.y[i : i + 1],
            1,
        )
        for b in batches
        for i in range(b.n)
    ]


def merge(batches: list[Example]) -> list[Example]:
    """Return all data as one batch.

    Raises:
        CannotRebatchError: If it is not known how, or there is only one batch.
    """
    if len(batches) == 1:
        raise CannotRebatchError("there is only one batch")
    for b in batches:
        _require_rows(b)
    y = _concatenate([b.y for b in batches])
    first = batches[0].X
    if isinstance(first, Tensor):
        X = _concatenate([b.X for b in batches])
    else:
        if any(set(b.X) != set(first) for b in batches):
            raise CannotRebatchError("batches have different keys")
        X = copy.copy(first)
        for key in list(first):
            if _has_rows(first[key]):
                X[key] = _concatenate([b.X[key] for b in batches])
    return [Example(X, y, sum(b.n for b in batches))]


def require_same_risk(
    reference: Reference,
    batches: list[Example],
    batch_size_fn: Callable[[Any], int] | None,
    rtol: float,
) -> None:
    """Check that it does not matter to model and loss how the data are batched.

    Raises:
        CannotRebatchError: If it does.
    """
    r = reference
    if batch_size_fn is not None and any(batch_size_fn(b.X) != b.n for b in batches):
        raise CannotRebatchError("batch_size_fn counts other examples in other batches")
    try:
        with torch.no_grad():
            outputs = r.predictions(batches)
    except Exception as error:
        raise CannotRebatchError(f"the model does not allow it ({error})") from None
    new, old = (torch.cat([f.flatten() for f in fs]) for fs in (outputs, r.outputs))
    if not _close(new, old, rtol):
        raise CannotRebatchError("the model's predictions depend on the batches")
    try:
        new, old = r.loss_gradient(outputs, batches), r.loss_gradient(r.outputs, r.batches)
    except Exception as error:
        raise CannotRebatchError(f"the loss does not allow it ({error})") from None
    if not _close(new, old, rtol):
        raise CannotRebatchError("the loss depends on the batches")


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Whether two vectors are equal up to a tolerance."""
    a, b = wide(a), wide(b)
    return a.shape == b.shape and float((a - b).norm()) <= rtol * float(b.norm())


def _map(X: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to a tensor, or to those in a mapping, which keeps its type."""
    if isinstance(X, Tensor):
        return function(X)
    X = copy.copy(X)
    for key in list(X):
        if _has_rows(X[key]):
            X[key] = function(X[key])
    return X


def _has_rows(value: Any) -> bool:
    """Whether a value in a mapping can have an axis of examples; others are the same for all."""
    return isinstance(value, Tensor) and value.ndim > 0


def _require_rows(b: Example) -> None:
    """Raise unless the first axis of everything that has axes counts the examples."""
    if isinstance(b.X, Tensor):
        items = {"inputs": b.X}
    elif isinstance(b.X, MutableMapping):
        items = {f"inputs {key!r}": b.X[key] for key in b.X if _has_rows(b.X[key])}
    else:
        raise CannotRebatchError(f"the inputs are a {type(b.X).__name__}")
    items["targets"] = b.y
    for name, item in items.items():
        if not _has_rows(item) or item.shape[0] != b.n:
            found = list(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise CannotRebatchError(f"the {name} of a batch of {b.n} are {found}")


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first axis."""
    if len({t.shape[1:] for t in tensors}) > 1:
        shapes = ", ".join(str(list(t.shape)) for t in tensors[:3])
        raise CannotRebatchError(f"batches have different shapes: {shapes}")
    return torch.cat(tensors)
