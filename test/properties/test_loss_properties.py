"""Losses as curvature matrices see them: a model whose parameters are its predictions."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from property_cases import LOSSES, REDUCTIONS, Problem, draw, grid, targets
from torch import Tensor

from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops.risk import loss_entry

#: Shapes of predictions ``[N, *positions, C]``; cross-entropy has C in the second place.
SHAPES = ((4, 3), (2, 4, 3), (3, 2, 2, 3), (2, 2, 1, 3, 3))
each_loss = grid(
    "loss reduction shape",
    LOSSES,
    REDUCTIONS,
    SHAPES,
    fast=product(LOSSES, REDUCTIONS, [(4, 3), (3, 2, 2, 3)]),
)


def identity(loss: str, reduction: str, shape: tuple[int, ...]) -> Problem:
    """Return predictions that are parameters, in two batches of unequal size."""
    if loss.startswith("ce"):
        shape = (shape[0], shape[-1], *shape[1:-1])
    f = draw(*shape, seed=1)
    y = targets(loss, f)
    numbers = torch.arange(len(f)).split([1, len(f) - 1])
    data = [(i, y[i]) for i in numbers]
    return Problem(lambda p, i: p["f"][i], LOSSES[loss](reduction), {"f": f}, data)


def last(case: Problem, t: Tensor) -> Tensor:
    """Move the entries of loss terms of a tensor of predictions to the last axis."""
    return t.movedim(1, -1) if case.is_cross_entropy else t


def closed_form(case: Problem) -> Tensor:
    """Return the Hessian of the reduced loss from formulas written down here, ``[D, D]``."""
    f = last(case, case.params["f"])
    C = f.shape[-1]
    F, M = f.reshape(-1, C), f.numel() // C
    weight = getattr(case.loss, "weight", None)
    weight = torch.ones(C, dtype=f.dtype) if weight is None else weight
    divisor = float(M)
    if case.is_cross_entropy:
        p = F.softmax(-1)
        soft = case.y.is_floating_point()
        epsilon = case.loss.label_smoothing
        if soft:
            Y = last(case, case.y).reshape(-1, C)
        else:
            Y = torch.eye(C, dtype=f.dtype)[case.y.flatten()]
            divisor = weight[case.y].sum().item()
        k = ((1 - epsilon) * Y + epsilon / C) @ weight
        blocks = k[:, None, None] * (p.diag_embed() - p[:, :, None] * p[:, None, :])
    elif isinstance(case.loss, torch.nn.BCEWithLogitsLoss):
        s, positive = F.sigmoid(), case.loss.pos_weight
        positive = torch.ones(C, dtype=f.dtype) if positive is None else positive
        y = case.y.reshape(-1, C)
        blocks = (weight * (1 + (positive - 1) * y) * s * (1 - s)).diag_embed()
        divisor = float(M * C)
    else:
        blocks = 2 * torch.eye(C, dtype=f.dtype).expand(M, C, C)
        divisor = float(M * C)
    blocks = blocks / (divisor if case.loss.reduction == "mean" else 1.0)
    # where the terms' entries are in the flat predictions
    places = last(case, torch.arange(f.numel()).reshape(case.params["f"].shape)).reshape(-1, C)
    result = torch.zeros(f.numel(), f.numel(), dtype=f.dtype)
    for block, where in zip(blocks, places, strict=True):
        result[where[:, None], where] = block
    return result


@each_loss
def test_closed_form_hessians(loss: str, reduction: str, shape: tuple[int, ...]) -> None:
    """The whole Hessian with its reduction: formulas, autograd, GGN and Hessian operator.

    Catches a mean over examples instead of loss terms, a wrong axis of the entries of a term, a
    factor of the number of entries, and a reduction that forgets weights.
    """
    case = identity(loss, reduction, shape)
    expected = closed_form(case)
    torch.testing.assert_close(expected, case.hessian)
    for cls in (GGNLinearOperator, HessianLinearOperator):
        torch.testing.assert_close(case.build(cls).to_dense(), expected)


@each_loss
def test_roots(loss: str, reduction: str, shape: tuple[int, ...]) -> None:
    """c S Sᵀ, term by term, is the Hessian by all predictions, and zero between different terms."""
    case = identity(loss, reduction, shape)
    entry, found = loss_entry(case.loss)
    assert found == reduction
    F, y = entry.terms(case.params["f"], case.y)
    S = entry.root_columns(F, y)  # [V, M, C]
    c = 1.0 if reduction == "sum" else 1 / float(entry.normalizer(F, y, shape[0]))
    assert c == pytest.approx(case.scale, rel=1e-13)
    places = last(case, torch.arange(F.numel()).reshape(case.params["f"].shape))
    expected = torch.zeros_like(case.hessian)
    for m, where in enumerate(places.reshape(F.shape)):
        expected[where[:, None], where] = c * S[:, m].T @ S[:, m]
    torch.testing.assert_close(case.hessian, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_reduction_factors(loss: str) -> None:
    """Mean is sum divided by the number of terms (and entries), or by weights; for all operators.

    Catches a scale that holds for one of the matrices only.
    """
    for shape in SHAPES:
        mean, total = (identity(loss, reduction, shape) for reduction in REDUCTIONS)
        C = shape[-1]
        M = mean.params["f"].numel() // C
        weights = getattr(mean.loss, "weight", None)
        if loss == "ce-options":
            c = 1 / weights[mean.y].sum().item()
        else:
            c = 1 / (M if loss.startswith("ce") else M * C)
        assert mean.scale == pytest.approx(c, rel=1e-13)
        for cls, options in ((GGNLinearOperator, {}), (GGNLinearOperator, {"mc_samples": 2})):
            ours, theirs = (case.build(cls, **options).to_dense() for case in (mean, total))
            torch.testing.assert_close(ours, c * theirs)


def test_formulas_are_of_different_losses() -> None:
    """The checks above distinguish the losses: catches a reference that ignores its options."""
    seen: list[Any] = []
    for loss in ("ce", "ce-options", "ce-soft", "bce", "bce-options", "mse"):
        H = closed_form(identity(loss, "sum", (4, 3)))
        assert all((H - other).norm() > 0.05 * H.norm() for other in seen)
        seen.append(H)
