"""Nonlinear networks with several data, and dense matrices of documented Monte-Carlo samples."""

from __future__ import annotations

import torch
from property_cases import C, Problem, chain, classes_second, draw, linears, problem
from torch import Tensor, nn

from curvlinops._random import RandomSource
from curvlinops.risk import loss_entry


class Attention(nn.Module):
    """Positions that mix, with as many loss terms."""

    def __init__(self, classes_first: bool):
        super().__init__()
        self.l0, self.l1 = linears(3, 3, C)
        self.classes_first = classes_first

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.l0(x))
        f = self.l1(torch.softmax(x @ h.mT, -1) @ h)
        return classes_second(f) if self.classes_first else f


def network(name: str, loss: str, reduction: str) -> Problem:
    """Return a network with five data in two batches: ``"mlp"``, ``"cnn"`` or ``"attention"``."""
    if name == "mlp":
        model: nn.Module = chain(*linears(3, 4, 2, C), activation="tanh")
        shape: tuple[int, ...] = (3,)
    elif name == "cnn":
        layers = [nn.Conv2d(2, 3, 2, padding=(1, 0)), nn.Conv2d(3, 2, (2, 1)), nn.Linear(8, C)]
        model = chain(*layers, l0=torch.tanh, l1=lambda h: torch.sigmoid(h).flatten(1))
        shape = (2, 2, 3)
    else:
        model, shape = Attention(loss.startswith("ce")), (3, 3)
    return problem(model, loss, reduction, [draw(n, *shape, seed=n) for n in (3, 2)])


def sampled(case: Problem, samples: int, seed: int) -> Tensor:
    """Return the GGN with the loss Hessian's estimate from the documented samples, ``[D, D]``.

    Args:
        case: The problem.
        samples: Number of samples of each loss term.
        seed: Of the samples.
    """
    entry, _ = loss_entry(case.loss)
    f = case.predict(case.theta)
    F, y = entry.terms(f, case.y)
    uniforms = RandomSource(seed).uniforms("samples", 0, len(F), samples * entry.draws(C))
    g = entry.sample(F, y, uniforms.reshape(len(F), samples, -1))  # [samples, M, C]
    J = case.jacobian.reshape(*f.shape, -1)
    J = (J.movedim(1, -2) if case.is_cross_entropy else J).reshape(len(F), C, -1)
    u = torch.einsum("smc,mcd->smd", g, J).flatten(0, 1)
    return case.scale / samples * u.T @ u
