"""Methods that a subclass must implement: called on one that does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from error_cases import Cases


def add_abstract(cases: Cases, cls: type, *methods: str) -> None:
    """Add a case for each of some methods of a class that raise an error as they are."""
    for method in methods:
        cases(NotImplementedError, "Own does not", rf"implement {method}\.", _without(cls, method))


def _without(cls: type, method: str) -> Callable[[], Any]:
    """Return a function that calls a method of a subclass that has nothing of its own."""
    own = type("Own", (cls,), {})
    _, *arguments = inspect.signature(getattr(cls, method)).parameters
    return lambda: getattr(own.__new__(own), method)(*[None for _ in arguments])
