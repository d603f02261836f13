"""The registry of algebra: what is known about types, and how operations are done otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = Callable[[Any, Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])
_RULES: dict[tuple[str, type, type], Rule] = {}
_OPERATIONS: dict[str, Rule] = {}


def rule(name: str, left: type, right: type) -> Callable[[Function], Function]:
    """Register a mathematical fact about two types, next to the class it is about.

    Names: ``"add"`` and ``"matmul"`` (two operators), ``"scale"`` (operator, scalar) and
    ``"shift"`` (operator, scalar δ, for A + δI). A rule may return ``NotImplemented``.
    """

    def register(function: Function) -> Function:
        _RULES[name, left, right] = function
        return function

    return register


def apply_rule(name: str, left: Any, right: Any) -> Any | None:
    """Return what the most specific rule makes of two operands, or None if there is none."""
    for left_type in type(left).__mro__:
        for right_type in type(right).__mro__:
            found = _RULES.get((name, left_type, right_type))
            result = NotImplemented if found is None else found(left, right)
            if result is not NotImplemented:
                return result
    return None


def operation(name: str) -> Callable[[Function], Function]:
    """Register how an operation is done on any operators (lazily, where no rule applies)."""

    def register(function: Function) -> Function:
        _OPERATIONS[name] = function
        return function

    return register


def combine(name: str, left: Any, right: Any = None) -> Any:
    """Apply an operation; the lazy algebra registers them, which the base class does not know."""
    return _OPERATIONS[name](left, right)
