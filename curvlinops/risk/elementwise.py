"""Losses with independent entries of a prediction: square loss, binary cross-entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlinops.risk.loss import LOSSES, Columns, Loss, check_floating, constant, unit_vectors


class MSE(Loss):
    r"""Square loss, ``nn.MSELoss``.

    For prediction :math:`f` and target :math:`y` in :math:`\mathbb{R}^C` (the last axis; a 1-d
    output has :math:`C = 1`),

    .. math::
        \ell = \lVert f - y \rVert^2\,,\quad
        \nabla_f \ell = 2 (f - y)\,,\quad
        \nabla_f^2 \ell = 2 I\,,\quad
        S = \sqrt{2} I\,.

    This is the negative log-likelihood of :math:`\mathcal{N}(f, \tfrac{1}{2} I)`, so would-be
    gradients are :math:`\mathcal{N}(0, 2 I)`. ``"mean"`` divides by the number of entries.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(nn.MSELoss())
        >>> F, targets = loss.terms(torch.ones(3, 2), torch.zeros(3, 2))
        >>> loss.value(F, targets, n=3).item(), loss.normalizer(F, targets, n=3)
        (6.0, 6)
    """

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten all axes but the last."""
        _check_same_shape(self.name, f, y)
        return _flatten_to_last(f), _flatten_to_last(y).to(f.dtype)

    def value(self, F: Tensor, targets: Tensor, n: int) -> Tensor:
        """Sum the squared errors."""
        return functional.mse_loss(F, targets, reduction="sum")

    def term_values(self, F: Tensor, targets: Tensor) -> Tensor:
        """Sum the squared errors of each term."""
        return functional.mse_loss(F, targets, reduction="none").sum(-1)

    def normalizer(self, F: Tensor, targets: Tensor, n: int) -> int:
        """Count the entries."""
        return F.numel()

    def grad(self, F: Tensor, targets: Tensor) -> Tensor:
        """Evaluate 2 (f - y)."""
        return 2 * (F - targets)

    def hess_vec(self, F: Tensor, targets: Tensor, V: Tensor) -> Tensor:
        """Multiply by 2."""
        return 2 * V

    def root_columns(self, F: Tensor, targets: Tensor, columns: Columns = None) -> Tensor:
        """Evaluate columns of √2 I."""
        units = unit_vectors(F, columns)  # [V, C]
        return (math.sqrt(2) * units).unsqueeze(1).expand(-1, F.shape[0], -1)

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Transform uniforms to Gaussians of variance 2."""
        entries = max(self._check_uniforms(F, uniforms), 1) * F.numel()

        def draw(F: Tensor, targets: Tensor, u: Tensor) -> Tensor:
            u = u.to(F.device, torch.float64)  # [S, m, C]
            standard_normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
            return (math.sqrt(2) * standard_normal).to(F.dtype)

        return self._in_chunks(draw, F, targets, uniforms.transpose(0, 1), entries=entries)


class BCETargets(NamedTuple):
    """Flattened targets of :class:`BCEWithLogits` with its elementwise options, each ``[m, C]``."""

    labels: Tensor
    weight: Tensor
    pos_weight: Tensor


class BCEWithLogits(Loss):
    r"""Binary cross-entropy of logits, ``nn.BCEWithLogitsLoss``.

    For logits :math:`f \in \mathbb{R}^C` (the last axis; a 1-d output has :math:`C = 1`),
    :math:`\sigma = \mathrm{sigmoid}(f)`, targets :math:`y \in [0, 1]^C`, ``weight`` :math:`w` and
    ``pos_weight`` :math:`v`, all elementwise,

    .. math::
        \ell = -\sum_c w_c \left( v_c y_c \log \sigma_c + (1 - y_c) \log (1 - \sigma_c) \right)\,,
        \qquad
        k = w (1 + (v - 1) y)\,,

    .. math::
        \nabla_f \ell = k \sigma - w v y\,,\quad
        \nabla_f^2 \ell = \mathrm{diag}(k \sigma (1 - \sigma))\,,\quad
        S = \mathrm{diag}(\sqrt{k \sigma (1 - \sigma)})\,.

    Would-be gradients are :math:`\sqrt{k} (\sigma - \tilde{y})` with :math:`\tilde{y}` drawn from
    :math:`\mathrm{Bernoulli}(\sigma)`. ``"mean"`` divides by the number of entries.

    Args:
        weight: Weights of the entries, broadcast to the predictions. Default: all 1.
        pos_weight: Weights of positive targets, broadcast to the predictions. Default: all 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)))
        >>> F, targets = loss.terms(torch.zeros(2), torch.tensor([0.0, 1.0]))
        >>> loss.hess_vec(F, targets, torch.ones(2, 1)).flatten().tolist()
        [0.25, 0.75]
    """

    options = ("weight", "pos_weight")

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        """Store the options."""
        self.entry_weight = constant(weight)
        self.pos_weight = constant(pos_weight)

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor | BCETargets]:
        """Flatten all axes but the last, of the options too."""
        _check_same_shape(self.name, f, y)
        labels = _flatten_to_last(y).to(f.dtype)
        if self.entry_weight is None and self.pos_weight is None:
            return _flatten_to_last(f), labels
        weight = self._flattened_option("weight", self.entry_weight, f)
        pos_weight = self._flattened_option("pos_weight", self.pos_weight, f)
        return _flatten_to_last(f), BCETargets(labels, weight, pos_weight)

    def value(self, F: Tensor, targets: Tensor | BCETargets, n: int) -> Tensor:
        """Sum the binary cross-entropies."""
        return self._binary_cross_entropy(F, targets, "sum")

    def term_values(self, F: Tensor, targets: Tensor | BCETargets) -> Tensor:
        """Sum the binary cross-entropies of each term."""
        return self._binary_cross_entropy(F, targets, "none").sum(-1)

    def normalizer(self, F: Tensor, targets: Tensor | BCETargets, n: int) -> int:
        """Count the entries."""
        return F.numel()

    def weight(self, F: Tensor, targets: Tensor | BCETargets) -> Tensor | None:
        """Evaluate w (1 + (v - 1) y), ``[m, C]``."""
        if isinstance(targets, Tensor):
            return None
        return targets.weight * (1 + (targets.pos_weight - 1) * targets.labels)

    def grad(self, F: Tensor, targets: Tensor | BCETargets) -> Tensor:
        """Evaluate k σ - w v y."""
        if isinstance(targets, Tensor):
            return F.sigmoid() - targets

        def gradient(F: Tensor, t: BCETargets) -> Tensor:
            return self._scaled(F, t, F.sigmoid()) - t.weight * t.pos_weight * t.labels

        return self._in_chunks(gradient, F, targets, entries=F.numel())

    def hess_vec(self, F: Tensor, targets: Tensor | BCETargets, V: Tensor) -> Tensor:
        """Multiply by k σ (1 - σ)."""

        def multiply(F: Tensor, targets: Tensor | BCETargets, V: Tensor) -> Tensor:
            return self._hessian_diagonal(F, targets) * V

        return self._in_chunks(multiply, F, targets, V, entries=V.numel())

    def root_columns(
        self, F: Tensor, targets: Tensor | BCETargets, columns: Columns = None
    ) -> Tensor:
        """Evaluate columns of diag(√(k σ (1 - σ)))."""
        units = unit_vectors(F, columns)  # [V, C]
        return units.unsqueeze(1) * self._hessian_diagonal(F, targets).sqrt()

    def sample(self, F: Tensor, targets: Tensor | BCETargets, uniforms: Tensor) -> Tensor:
        """Compare uniforms with σ and evaluate √k (σ - ỹ)."""
        entries = max(self._check_uniforms(F, uniforms), 1) * F.numel()

        def draw(F: Tensor, targets: Tensor | BCETargets, u: Tensor) -> Tensor:
            u = u.to(F.device, torch.float64)  # [S, m, C]
            sigma = F.to(torch.float64).sigmoid()
            samples = (sigma - (u < sigma).to(torch.float64)).to(F.dtype)
            k = self.weight(F, targets)
            return samples if k is None else samples * k.sqrt()

        return self._in_chunks(draw, F, targets, uniforms.transpose(0, 1), entries=entries)

    def _binary_cross_entropy(
        self, F: Tensor, targets: Tensor | BCETargets, reduction: str
    ) -> Tensor:
        """Evaluate PyTorch's loss with all options on ``[m, C]``."""
        if isinstance(targets, Tensor):
            return functional.binary_cross_entropy_with_logits(F, targets, reduction=reduction)
        return functional.binary_cross_entropy_with_logits(
            F,
            targets.labels,
            weight=targets.weight,
            pos_weight=targets.pos_weight,
            reduction=reduction,
        )

    def _hessian_diagonal(self, F: Tensor, targets: Tensor | BCETargets) -> Tensor:
        """Evaluate k σ (1 - σ), ``[m, C]``."""
        # sigmoid(-f) is accurate where 1 - sigmoid(f) cancels.
        return self._scaled(F, targets, F.sigmoid() * (-F).sigmoid())

    def _scaled(self, F: Tensor, targets: Tensor | BCETargets, x: Tensor) -> Tensor:
        """Multiply ``[m, C]`` by k."""
        k = self.weight(F, targets)
        return x if k is None else k * x

    def _flattened_option(self, option: str, value: Tensor | None, f: Tensor) -> Tensor:
        """Broadcast an option to the predictions and flatten it like them, ``[m, C]``."""
        value = f.new_ones(()) if value is None else value.to(f.device, f.dtype)
        try:
            expanded = value.expand(f.shape)
        except RuntimeError:
            raise ValueError(
                f"{self.name}: {option} of shape {tuple(value.shape)} cannot be broadcast to "
                f"predictions of shape {tuple(f.shape)}."
            ) from None
        return _flatten_to_last(expanded)


def _flatten_to_last(x: Tensor) -> Tensor:
    """Flatten all axes but the last; a 1-d tensor gets a last axis of length 1."""
    return x.unsqueeze(-1) if x.ndim == 1 else x.flatten(0, -2)


def _check_same_shape(name: str, f: Tensor, y: Tensor) -> None:
    """Check predictions and targets of an elementwise loss."""
    check_floating(name, f)
    if f.shape != y.shape:
        raise ValueError(
            f"{name}: targets must have the shape of the predictions, got predictions of shape "
            f"{tuple(f.shape)} and targets of shape {tuple(y.shape)}."
        )
    if f.ndim == 0:
        raise ValueError(f"{name}: predictions are a scalar. Add a batch dimension.")
    if y.is_complex():
        raise ValueError(f"{name}: targets must be real, got {y.dtype}.")


LOSSES[nn.MSELoss] = MSE
LOSSES[functional.mse_loss] = MSE
LOSSES[nn.BCEWithLogitsLoss] = BCEWithLogits
LOSSES[functional.binary_cross_entropy_with_logits] = BCEWithLogits
