"""How layers use parameters, as plain values that can be saved without code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from curvlinops.computers.formats import Format
from curvlinops.computers.usages import Part, Usage


def encode(value: Any) -> Any:
    """Return plain values for a usage, or for a key of a statistic that has usages in it.

    Raises:
        NotImplementedError: For a format that is not a dataclass of plain values.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, tuple):
        return ["tuple", *map(encode, value)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, (Usage, Part, Format)) and is_dataclass(value):
        compared = {
            f.name: encode(getattr(value, f.name)) for f in fields(value) if f.init and f.compare
        }
        return [type(value).__name__, compared]
    raise NotImplementedError(
        f"A {type(value).__name__} cannot be saved: layers that are registered need formats that "
        "are dataclasses of plain values."
    )


def decode(code: Any) -> Any:
    """Return what :func:`encode` had.

    Raises:
        ValueError: If there is a type in it that is not known here.
    """
    if not isinstance(code, list):
        return code
    kind, *rest = code
    if kind == "tuple":
        return tuple(map(decode, rest))
    if kind == "dtype" and isinstance(getattr(torch, rest[0], None), torch.dtype):
        return getattr(torch, rest[0])
    types = {cls.__name__: cls for cls in (Usage, Part, *_formats(Format))}
    if kind not in types:
        raise ValueError(
            f"The state has a {kind!r}, which is not known here: register the same layers, and "
            "use the same release, as where it was saved."
        )
    return types[kind](**{name: decode(value) for name, value in rest[0].items()})


def _formats(cls: type[Format]) -> Iterator[type[Format]]:
    """Iterate over a class of formats and those that are derived from it."""
    yield cls
    for derived in cls.__subclasses__():
        yield from _formats(derived)


__all__ = ["decode", "encode"]
