r"""What is provably true of Monte-Carlo estimates, for the conformance kit.

Would-be gradients :math:`g` of a loss term are :math:`\sqrt{k} (p - e_y)` with a class :math:`y`
drawn from :math:`p` (cross-entropy), :math:`\sqrt{k} (\sigma - b)` with :math:`b` drawn from
:math:`\mathrm{Bernoulli}(\sigma)` (binary cross-entropy), and :math:`\mathcal{N}(0, 2 I)` (square
loss). Written a second time, from the uniforms that are documented to fix them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops._random import RandomSource


@dataclass
class Terms:
    """The predictions of all loss terms, of float64 on the CPU.

    Attributes:
        kind: As of ``LossReference``, one of PyTorch's losses.
        F: Predictions ``[M, C]``.
        J: Their Jacobians ``[M, C, D]``.
        k: What options multiply the loss Hessians by, ``[M]`` or (of entries) ``[M, C]``.
        c: The factor between the sum of the loss terms and the loss.
    """

    kind: str
    F: Tensor
    J: Tensor
    k: Tensor
    c: float

    def sampled_ggn(self, num_samples: int, seed: int) -> Tensor:
        """Return the matrix ``[D, D]`` of the documented samples."""
        M, C = self.F.shape
        draws = 1 if self.kind == "softmax" else C
        u = RandomSource(seed).uniforms("samples", 0, M, num_samples * draws)
        g = self._gradients(u.reshape(M, num_samples, draws))
        rows = torch.einsum("msc,mcd->msd", g, self.J).flatten(0, 1)
        return self.c / num_samples * rows.T @ rows

    def _gradients(self, u: Tensor) -> Tensor:
        """Transform uniforms ``[M, S, draws]`` to would-be gradients ``[M, S, C]``."""
        if self.kind == "square":
            return 2**0.5 * torch.special.ndtri(u)
        if self.kind == "sigmoid":
            sigma = self.F.sigmoid().unsqueeze(1)
            return self.k.sqrt().unsqueeze(1) * (sigma - (u < sigma).double())
        p = self.F.softmax(-1).unsqueeze(1)  # [M, 1, C]
        y = (u >= p.cumsum(-1)).sum(-1).clamp(max=p.shape[-1] - 1)  # [M, S]
        one_hot = torch.nn.functional.one_hot(y, p.shape[-1])
        return self.k.sqrt()[:, None, None] * (p - one_hot)

    def deviation(self, V: Tensor, num_samples: int, tau: float) -> Tensor:
        r"""Return how far vᵀGv of an estimate can be from its mean, for each column of ``[D, p]``.

        The estimate is a sum of independent :math:`x = \frac{c}{S} (g^\top J v)^2`, which are
        bounded or multiples of :math:`\chi^2_1`. With the sum :math:`\nu` of their variances and a
        scale :math:`b`, the probability of a deviation of :math:`\sqrt{2 \nu \tau} + b \tau` is at
        most :math:`2 e^{-\tau}` (Bernstein's inequality; for :math:`\chi^2`: Laurent & Massart,
        2000): no central limit is invoked, so rare classes raise no false alarm.
        """
        W = torch.einsum("mcd,dp->mcp", self.J, V)
        if self.kind == "square":
            mean = 2 * W.square().sum(1)  # [M, p]
            variance, b = 2 * mean.square(), 2 * mean
        elif self.kind == "sigmoid":
            w2 = self.k.unsqueeze(-1) * W.square()
            q = (self.F.sigmoid() * (-self.F).sigmoid()).unsqueeze(-1)
            mean = (q * w2).sum(1)
            excess = q * (1 - 3 * q) * w2.square() - 3 * (q * w2).square()
            variance, b = excess.sum(1) + 2 * mean.square(), w2.sqrt().sum(1).square() / 3
        else:
            p = self.F.softmax(-1).unsqueeze(-1)
            x = self.k[:, None, None] * ((p * W).sum(1, keepdim=True) - W).square()
            mean = (p * x).sum(1)
            variance, b = (p * x.square()).sum(1) - mean.square(), x.amax(1) / 3
        nu = self.c**2 / num_samples * variance.clamp(min=0).sum(0)
        return (2 * nu * tau).sqrt() + abs(self.c) / num_samples * b.amax(0) * tau


def probes(V: Tensor) -> Tensor:
    """Return columns ``[D, p]``, their pairwise sums and differences, of norm 1.

    With the quadratic forms of all of them, the off-diagonal entries of VᵀGV are known as well.
    """
    i, j = torch.triu_indices(V.shape[1], V.shape[1], 1).unbind()
    V = torch.cat([V, V[:, i] + V[:, j], V[:, i] - V[:, j]], dim=1)
    return V / V.norm(dim=0).clamp(min=torch.finfo(V.dtype).tiny)
