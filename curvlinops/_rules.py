"""The registry of algebra: what is known about types, and how operations are done otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = Callable[[Any, Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])
_RULES: dict[tuple[str, type, type], Rule] = {}
_OPERATIONS: dict[str, Rule] = {}
_BATCHED: dict[type, Callable[..., Any]] = {}


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


def batched(kind: type) -> Callable[[Function], Function]:
    """Register how several operators of exactly this type, on equal spaces, multiply at once.

    The function gets the g operators, tensors ``[g, *N_i, K]``, one slice for each operator, and
    whether the adjoints multiply. It returns tensors ``[g, *M_j, K]`` or ``NotImplemented``.
    Subclasses do not inherit it, as they may multiply in another way.
    """

    def register(function: Function) -> Function:
        _BATCHED[kind] = function
        return function

    return register


def apply_batched(operators: list[Any], X: Any, adjoint: bool) -> Any | None:
    """Return what operators of one type make of their tensors, or None if nobody knows."""
    function = _BATCHED.get(type(operators[0]))
    if function is None or any(type(op) is not type(operators[0]) for op in operators):
        return None
    result = function(operators, X, adjoint)
    return None if result is NotImplemented else result


def operation(name: str) -> Callable[[Function], Function]:
    """Register how an operation is done on any operators (lazily, where no rule applies)."""

    def register(function: Function) -> Function:
        _OPERATIONS[name] = function
        return function

    return register


def combine(name: str, left: Any, right: Any = None) -> Any:
    """Apply an operation; the lazy algebra registers them, which the base class does not know."""
    return _OPERATIONS[name](left, right)
