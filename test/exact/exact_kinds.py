"""The kinds of matrices that are multiplied batch by batch, and their dense references."""

from __future__ import annotations

from typing import Any

import torch
from exact_cases import Problem
from torch import Tensor
from torch.func import jacrev

from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Hessian": (HessianLinearOperator, {}),
    "GGN": (GGNLinearOperator, {}),
    "EF": (EFLinearOperator, {}),
    "MC": (GGNLinearOperator, {"mc_samples": 2, "seed": 3}),
}


def build(kind: str, problem: Problem, **options: Any) -> Any:
    cls, own = KINDS[kind]
    return problem.operator(cls, **own, **options)


def dense(kind: str, problem: Problem) -> Tensor:
    """The dense matrix, by autodiff; for Monte-Carlo, of a new operator without kept graphs."""
    if kind == "Hessian":
        return problem.hessian()
    if kind == "GGN":
        return problem.ggn()
    if kind == "EF":
        return empirical_fisher(problem)
    return build(kind, problem).to_dense()


def empirical_fisher(problem: Problem) -> Tensor:
    """The mean of the outer products of the gradients of single losses (cross-entropies)."""

    def losses(theta: Tensor) -> Tensor:
        pairs = zip(problem.predictions(theta), problem.data, strict=True)
        return torch.cat([problem.loss("none")(f, y).flatten() for f, (_, y) in pairs])

    G = jacrev(losses)(problem.flat())
    return G.T @ G / len(G)
