"""What a case is, and what the cases of all libraries have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import Problem, gradient
from torch import Tensor


class Case(NamedTuple):
    """What is timed, and what it gives, which libraries have to agree on.

    ``fresh`` is what peak memory is measured of, where it is not what is timed: with graphs that
    are kept, the operator's construction and its first product.
    """

    run: Callable[[], Any]
    result: Callable[[Any], dict[str, Tensor]]
    fresh: Callable[[], Any] | None = None


Cases = dict[str, Callable[[], Case]]  # by name; what makes everything ready
Product = Callable[[Tensor], Any]


class UnusableError(Exception):
    """A library has a case, but not as it is compared here."""


def random_tensor(device: torch.device, *shape: int) -> Tensor:
    """Return the same numbers in every library."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)


def gradient_case(problem: Problem) -> Case:
    """Compute the gradient over all data, with which all is compared."""
    return Case(lambda: gradient(problem), lambda gradients: {})


def product_case(v: Tensor, build: Callable[[], Product], fresh: bool = False) -> Case:
    """Multiply with an operator, which is built and warm: graphs that it keeps are made.

    Args:
        v: What it is multiplied to.
        build: Makes the operator, and returns its product.
        fresh: Whether the operator's own memory counts.
    """
    product = build()
    product(v)

    def result(output: Any) -> dict[str, Tensor]:
        output = output.detach()
        square = output.shape == v.shape
        return {"product": output} | ({"number": (v * output).sum()} if square else {})

    return Case(lambda: product(v), result, (lambda: build()(v)) if fresh else None)
