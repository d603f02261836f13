r"""Loss functions: one entry per loss with everything curvature matrices need to know about it.

The one place that knows

- which axis of a prediction holds a loss term's :math:`C` entries, and the order of the terms
  (:meth:`Loss.terms`; example-major, so that the terms of one example are consecutive);
- the derivatives of a loss term :math:`\ell_m` with respect to its prediction, roots of its
  Hessian, and how to sample gradients whose second moment is this Hessian;
- what the options of PyTorch's losses (``weight``, ``ignore_index``, ...) do to all of these;
- what a batch adds to the denominator of the reduction ``"mean"`` (:meth:`Loss.normalizer`);
- how to recognise a loss function (:func:`loss_entry`).

An entry never averages. With :math:`V_b` the :meth:`Loss.value` and :math:`n_b` the
:meth:`Loss.normalizer` of batch :math:`b`, the loss is :math:`\sum_b V_b / \sum_b n_b` for the
reduction ``"mean"`` and :math:`\sum_b V_b` for ``"sum"``, for each of PyTorch's losses and options.

In all shapes below, ``m`` is the number of loss terms of a batch and ``C`` the number of entries of
one term's prediction. Nothing of size ``m x C x C`` is formed (unless all columns of a root are
asked for at once), no value is read back from the device, and all methods are pure functions that
``torch.func`` and ``torch.compile`` can transform.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Selects columns of a Hessian root; None selects all of them.
Columns = slice | Tensor | Sequence[int] | None


class Loss:
    r"""What curvature matrices need to know about one loss function with its options.

    This base class holds the defaults of losses with closed forms; what has none raises
    ``NotImplementedError``.
    """

    #: Whether derivatives, Hessian roots and samples are available, not only the value.
    closed_form: bool = True
    #: Names of the loss function's options besides the reduction: arguments of the entry.
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the loss in error messages."""
        return type(self).__name__

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """Flatten predictions and targets of a batch into loss terms.

        Args:
            f: Predictions in the layout of the loss function.
            y: Targets in the layout of the loss function.

        Returns:
            Predictions ``[m, C]``, differentiable with respect to ``f``, and the targets of the
            same terms, to be passed on to the other methods. An example's terms are consecutive.

        Raises:
            ValueError: If shapes or dtypes do not fit the loss function.
        """
        raise self._missing("flattening into loss terms")

    def value(self, F: Tensor, targets: Any, n: int) -> Tensor:
        r"""Sum the loss terms, :math:`\sum_m \ell_m`, with all options and without averaging.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            n: Number of examples in the batch.

        Returns:
            Scalar tensor.
        """
        raise self._missing("value")

    def term_values(self, F: Tensor, targets: Any) -> Tensor:
        r"""Evaluate each loss term :math:`\ell_m`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Tensor of shape ``[m]``.
        """
        raise self._missing("values of the loss terms")

    def normalizer(self, F: Tensor, targets: Any, n: int) -> Tensor | float:
        """Return what this batch adds to the denominator of the reduction ``"mean"``.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            n: Number of examples in the batch.

        Returns:
            A Python number where it follows from the shapes, else a scalar tensor on ``F``'s
            device, in ``F``'s dtype or float32 if that is wider.
        """
        raise self._missing("normalizer")

    def weight(self, F: Tensor, targets: Any) -> Tensor | None:
        """Return the factor k by which the options scale each loss term's Hessian.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Factors of shape ``[m]``, or ``[m, C]`` where they differ between a term's entries.
            ``None`` if all of them are 1.
        """
        return None

    def grad(self, F: Tensor, targets: Any) -> Tensor:
        r"""Evaluate the gradients :math:`\nabla_f \ell_m`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Tensor of shape ``[m, C]``.
        """
        raise self._missing("gradient")

    def hess_vec(self, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        r"""Multiply each loss term's Hessian :math:`\nabla_f^2 \ell_m` onto a vector.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            V: Vectors ``[..., m, C]``.

        Returns:
            Tensor of shape ``[..., m, C]``.
        """
        raise self._missing("Hessian-vector product")

    def root_columns(self, F: Tensor, targets: Any, columns: Columns = None) -> Tensor:
        r"""Evaluate columns of :math:`S_m` with :math:`S_m S_m^\top = \nabla_f^2 \ell_m`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            columns: Which of the :meth:`num_columns` columns. Default: all.

        Returns:
            Tensor of shape ``[len(columns), m, C]``; it may be an expanded view.
        """
        raise self._missing("Hessian root")

    def num_columns(self, C: int) -> int:
        """Return the number of columns of the Hessian root of a term with ``C`` entries."""
        return C

    def draws(self, C: int) -> int:
        """Return the number of uniforms that one sample of a term with ``C`` entries needs."""
        return C

    def sample(self, F: Tensor, targets: Any, uniforms: Tensor) -> Tensor:
        r"""Transform uniforms into would-be gradients.

        These are gradients of the loss for targets drawn from the model's own predictive
        distribution: they have mean zero and second moment :math:`\nabla_f^2 \ell_m`.
        They are a function of ``F`` and the uniforms alone, evaluated in float64, so that the same
        uniforms give the same samples for each dtype, batching and layout of the terms.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`; only options depend on them.
            uniforms: Float64 numbers in (0, 1) of shape ``[m, S, draws(C)]`` for ``S`` samples.

        Returns:
            Tensor of shape ``[S, m, C]`` in ``F``'s dtype and on its device.

        Raises:
            ValueError: If the uniforms do not have this shape.
        """
        raise self._missing("would-be gradient")

    def _uniforms(self, F: Tensor, uniforms: Tensor) -> Tensor:
        """Check uniforms ``[m, S, draws]`` and move them to the device of ``F`` ``[m, C]``."""
        m, C = F.shape
        draws = self.draws(C)
        if uniforms.ndim != 3 or uniforms.shape[0] != m or uniforms.shape[2] != draws:
            raise ValueError(
                f"{self.name}: uniforms must have shape [{m}, samples, {draws}] for predictions of "
                f"shape {tuple(F.shape)}, got {tuple(uniforms.shape)}."
            )
        return uniforms.to(F.device, torch.float64)

    def _missing(self, what: str) -> NotImplementedError:
        """Build the error for something that this loss has no formula for."""
        return NotImplementedError(
            f"{self.name} has no closed-form {what}. Losses with closed forms: "
            f"{', '.join(sorted(_display_name(loss) for loss in LOSSES))}. Use one of these, or an "
            "operator that only needs the loss's value, such as the Hessian."
        )


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
        units = _unit_vectors(F, columns)  # [V, C]
        return (math.sqrt(2) * units).unsqueeze(1).expand(-1, F.shape[0], -1)

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Transform uniforms to Gaussians of variance 2."""
        u = self._uniforms(F, uniforms)
        standard_normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return (math.sqrt(2) * standard_normal).transpose(0, 1).to(F.dtype)


class CrossEntropy(Loss):
    r"""Cross-entropy of logits, ``nn.CrossEntropyLoss``, with index or probability targets.

    For logits :math:`f \in \mathbb{R}^C` (axis 1 of the output), :math:`p = \mathrm{softmax}(f)`,
    and non-negative coefficients :math:`a`, whose sum is :math:`k`,

    .. math::
        \ell = -\sum_c a_c \log p_c\,,\quad
        \nabla_f \ell = k p - a\,,\quad
        \nabla_f^2 \ell = k (\mathrm{diag}(p) - p p^\top)\,,\quad
        S = \sqrt{k} (\mathrm{diag}(\sqrt{p}) - p \sqrt{p}^\top)\,.

    Without options, :math:`a = e_y` and :math:`k = 1`. With class weights :math:`w` and smoothing
    :math:`\varepsilon`, index targets have

    .. math::
        a = (1 - \varepsilon) w_y e_y + \tfrac{\varepsilon}{C} w\,,\qquad
        k = (1 - \varepsilon) w_y + \tfrac{\varepsilon}{C} \textstyle\sum_c w_c\,,

    both zero if the target is ``ignore_index``, and ``"mean"`` divides by the sum of :math:`w_y`
    over the terms that are not ignored. Probability targets :math:`y`, which need not sum to one,
    have :math:`a = w \odot y'` with :math:`y' = (1 - \varepsilon) y + \varepsilon / C`; no term is
    ignored, and ``"mean"`` divides by the number of terms.

    Would-be gradients are :math:`\sqrt{k} (p - e_y)` with :math:`y` drawn from :math:`p`.

    Args:
        weight: Class weights of shape ``[C]``. Default: all 1.
        ignore_index: Index targets of this value contribute nothing.
        label_smoothing: Weight of the uniform distribution in the targets, between 0 and 1.

    Raises:
        ValueError: If the label smoothing is not in this range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(nn.CrossEntropyLoss(ignore_index=-1))
        >>> F, targets = loss.terms(torch.zeros(2, 4, 3), torch.tensor([[0, 1, -1], [3, -1, -1]]))
        >>> F.shape, loss.normalizer(F, targets, n=2)
        (torch.Size([6, 4]), tensor(3.))
    """

    options = ("weight", "ignore_index", "label_smoothing")

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        """Store the options."""
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}.")
        self.class_weight = _constant(weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move the classes (axis 1) to the end and flatten all other axes."""
        _check_floating(self.name, f)
        if f.ndim < 2:
            raise ValueError(
                f"{self.name}: predictions must have shape [batch, classes, ...], got "
                f"{tuple(f.shape)}. Add a batch dimension."
            )
        C = f.shape[1]
        if self.class_weight is not None and self.class_weight.shape != (C,):
            raise ValueError(
                f"{self.name}: weight must have shape ({C},) for predictions of shape "
                f"{tuple(f.shape)}, got {tuple(self.class_weight.shape)}."
            )
        F = f.movedim(1, -1).flatten(0, -2)
        if y.shape == f.shape and y.is_floating_point():
            if self.ignore_index >= 0:
                raise ValueError(
                    f"{self.name}: ignore_index={self.ignore_index} is not supported for "
                    "probability targets."
                )
            return F, y.movedim(1, -1).flatten(0, -2).to(f.dtype)
        if y.shape == f.shape[:1] + f.shape[2:] and _is_integer(y.dtype):
            return F, y.flatten().to(torch.int64)
        raise ValueError(
            f"{self.name}: targets must be class indices (integers) of shape "
            f"{tuple(f.shape[:1] + f.shape[2:])} or class probabilities (floating point) of shape "
            f"{tuple(f.shape)} for predictions of shape {tuple(f.shape)}, got {y.dtype} of shape "
            f"{tuple(y.shape)}."
        )

    def value(self, F: Tensor, targets: Tensor, n: int) -> Tensor:
        """Sum the cross-entropies."""
        return self._cross_entropy(F, targets, "sum")

    def term_values(self, F: Tensor, targets: Tensor) -> Tensor:
        """Evaluate the cross-entropy of each term."""
        return self._cross_entropy(F, targets, "none")

    def normalizer(self, F: Tensor, targets: Tensor, n: int) -> Tensor | float:
        """Sum the class weights of non-ignored targets; count terms with probability targets."""
        if targets.is_floating_point():
            return targets.shape[0]
        # Counts above 256 are not exact in bfloat16.
        dtype = torch.promote_types(F.dtype, torch.float32)
        _, kept, target_weight = self._index_targets(F, targets)
        if self.class_weight is None:
            return kept.sum().to(dtype)
        return target_weight.sum(dtype=dtype)

    def weight(self, F: Tensor, targets: Tensor) -> Tensor:
        """Evaluate k, the sum of each term's coefficients, ``[m]``."""
        w = self._class_weight(F)
        if targets.is_floating_point():
            probabilities = self._smoothed(targets)
            return probabilities.sum(-1) if w is None else (probabilities * w).sum(-1)
        _, kept, target_weight = self._index_targets(F, targets)
        mean_weight = 1.0 if w is None else w.mean()
        eps = self.label_smoothing
        return (1 - eps) * target_weight + eps * mean_weight * kept.to(F.dtype)

    def grad(self, F: Tensor, targets: Tensor) -> Tensor:
        """Evaluate k p - a."""
        kp = self.weight(F, targets).unsqueeze(-1) * F.softmax(-1)
        w = self._class_weight(F)
        if targets.is_floating_point():
            probabilities = self._smoothed(targets)
            return kp - (probabilities if w is None else probabilities * w)
        safe, kept, target_weight = self._index_targets(F, targets)
        eps = self.label_smoothing
        result = kp.scatter_add(
            -1, safe.unsqueeze(-1), ((eps - 1) * target_weight).unsqueeze(-1).to(kp.dtype)
        )
        if eps == 0.0:
            return result
        uniform = kept.to(F.dtype).unsqueeze(-1) * (eps / F.shape[-1])  # [m, 1]
        return result - (uniform if w is None else uniform * w)

    def hess_vec(self, F: Tensor, targets: Tensor, V: Tensor) -> Tensor:
        """Evaluate k (p ⊙ v - p pᵀv) = k p ⊙ (v - pᵀv)."""
        p = F.softmax(-1)
        kp = self.weight(F, targets).unsqueeze(-1) * p
        return kp * (V - (p * V).sum(-1, keepdim=True))

    def root_columns(self, F: Tensor, targets: Tensor, columns: Columns = None) -> Tensor:
        """Evaluate columns √(k p_c) (e_c - p)."""
        units = _unit_vectors(F, columns)  # [V, C]
        p = F.softmax(-1)
        scales = (self.weight(F, targets).unsqueeze(-1) * p).sqrt()  # [m, C]
        scales = scales[:, _column_indices(F, columns)].T  # [V, m]
        return scales.unsqueeze(-1) * (units.unsqueeze(1) - p)

    def draws(self, C: int) -> int:
        """One uniform draws one class."""
        return 1

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Draw classes by inverting the distribution function and evaluate √k (p - e_y)."""
        u = self._uniforms(F, uniforms).squeeze(-1)  # [m, S]
        # A fixed memory format makes the rounding independent of the layout of F.
        p = F.to(torch.float64, memory_format=torch.contiguous_format).softmax(-1)
        y = _draw_classes(p, u)  # [m, S]
        # p - 1 cancels for confident predictions: subtract in float64, then round.
        entries = (p.gather(-1, y) - 1).to(F.dtype)  # [m, S]
        samples = (
            p.to(F.dtype)
            .expand(u.shape[1], -1, -1)
            .scatter(-1, y.T.unsqueeze(-1), entries.T.unsqueeze(-1))
        )
        return samples * self.weight(F, targets).sqrt().unsqueeze(-1)

    def _cross_entropy(self, F: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Evaluate PyTorch's loss with all options on ``[m, C]``."""
        return functional.cross_entropy(
            F,
            targets,
            weight=self._class_weight(F),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )

    def _class_weight(self, F: Tensor) -> Tensor | None:
        """Return the class weights ``[C]`` on the device and in the dtype of ``F``."""
        return None if self.class_weight is None else self.class_weight.to(F.device, F.dtype)

    def _smoothed(self, targets: Tensor) -> Tensor:
        """Smooth probability targets ``[m, C]``."""
        eps = self.label_smoothing
        return targets if eps == 0.0 else (1 - eps) * targets + eps / targets.shape[-1]

    def _index_targets(self, F: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return classes (0 where ignored), which terms are kept, and w_y (0 where ignored)."""
        kept = targets != self.ignore_index  # [m]
        # An ignored index may lie outside the classes, where nothing can be looked up.
        safe = torch.where(kept, targets, 0)  # [m]
        w = self._class_weight(F)
        target_weight = kept.to(F.dtype) if w is None else w[safe] * kept.to(F.dtype)  # [m]
        return safe, kept, target_weight


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
        self.entry_weight = _constant(weight)
        self.pos_weight = _constant(pos_weight)

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
        positive = targets.weight * targets.pos_weight * targets.labels
        return self._scaled(F, targets, F.sigmoid()) - positive

    def hess_vec(self, F: Tensor, targets: Tensor | BCETargets, V: Tensor) -> Tensor:
        """Multiply by k σ (1 - σ)."""
        return self._hessian_diagonal(F, targets) * V

    def root_columns(
        self, F: Tensor, targets: Tensor | BCETargets, columns: Columns = None
    ) -> Tensor:
        """Evaluate columns of diag(√(k σ (1 - σ)))."""
        units = _unit_vectors(F, columns)  # [V, C]
        return units.unsqueeze(1) * self._hessian_diagonal(F, targets).sqrt()

    def sample(self, F: Tensor, targets: Tensor | BCETargets, uniforms: Tensor) -> Tensor:
        """Compare uniforms with σ and evaluate √k (σ - ỹ)."""
        u = self._uniforms(F, uniforms).transpose(0, 1)  # [S, m, C]
        sigma = F.to(torch.float64).sigmoid()
        samples = (sigma - (u < sigma).to(torch.float64)).to(F.dtype)
        k = self.weight(F, targets)
        return samples if k is None else samples * k.sqrt()

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


class GenericLoss(Loss):
    r"""A loss that is known by its value only.

    It gets predictions and targets as they are. With reduction ``"mean"`` the average over a batch
    of :math:`n_b` examples is weighted by :math:`n_b / N`.

    Args:
        loss_func: Maps predictions and targets to a scalar.
        reduction: What ``loss_func`` does over the batch, ``"mean"`` or ``"sum"``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(nn.L1Loss())
        >>> f, y = loss.terms(torch.full((4, 2), 3.0), torch.zeros(4, 2))
        >>> loss.value(f, y, n=4).item(), loss.normalizer(f, y, n=4)
        (12.0, 4)
    """

    closed_form = False

    def __init__(self, loss_func: Callable[[Any, Any], Tensor], reduction: str) -> None:
        """Store the loss function and its reduction."""
        self.loss_func = loss_func
        self.reduction = reduction

    @property
    def name(self) -> str:
        """Name of the loss function."""
        return _display_name(self.loss_func)

    def terms(self, f: Tensor, y: Any) -> tuple[Tensor, Any]:
        """Return predictions and targets untouched."""
        return f, y

    def value(self, F: Tensor, targets: Any, n: int) -> Tensor:
        """Evaluate the loss, times the number of examples for the reduction ``"mean"``.

        Raises:
            ValueError: If the loss is not a scalar.
        """
        loss = self.loss_func(F, targets)
        if loss.ndim != 0:
            raise ValueError(
                f"{self.name} with reduction {self.reduction!r} must return a scalar, got shape "
                f"{tuple(loss.shape)}."
            )
        return n * loss if self.reduction == "mean" else loss

    def normalizer(self, F: Tensor, targets: Any, n: int) -> int:
        """Return the number of examples."""
        return n

    def weight(self, F: Tensor, targets: Any) -> Tensor | None:
        """Raise an error: loss terms are not known."""
        raise self._missing("weight of the loss terms")

    def num_columns(self, C: int) -> int:
        """Raise an error: the Hessian root is not known."""
        raise self._missing("Hessian root")

    def draws(self, C: int) -> int:
        """Raise an error: the predictive distribution is not known."""
        raise self._missing("would-be gradient")


#: The losses with closed forms: module class or function -> entry.
LOSSES: dict[Any, type[Loss]] = {
    nn.MSELoss: MSE,
    functional.mse_loss: MSE,
    nn.CrossEntropyLoss: CrossEntropy,
    functional.cross_entropy: CrossEntropy,
    nn.BCEWithLogitsLoss: BCEWithLogits,
    functional.binary_cross_entropy_with_logits: BCEWithLogits,
}


def loss_entry(loss_func: Callable[[Any, Any], Tensor]) -> tuple[Loss, str]:
    """Find the entry of a loss function and its reduction.

    A loss is recognised by what it does: a module must run the ``forward`` of one of PyTorch's
    losses (a subclass with its own ``forward``, or a module with hooks, is another loss); a
    function must be PyTorch's own, possibly as :class:`functools.partial` with keywords. Any other
    loss with a reduction becomes a :class:`GenericLoss`.

    Args:
        loss_func: A module or callable object with a ``reduction`` attribute, or a function with a
            ``reduction`` keyword whose default counts, also as :class:`functools.partial`.

    Returns:
        The entry and the reduction, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If the loss function has no reduction, or one that is not supported, or if a
            known loss function has an option that is not supported.

    Example:
        >>> from functools import partial
        >>> from torch.nn import functional
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(partial(functional.cross_entropy, label_smoothing=0.1))
        >>> loss.name, loss.label_smoothing, reduction
        ('CrossEntropy', 0.1, 'mean')
    """
    reduction = _reduction(loss_func)
    known = _known_module(loss_func)
    if known is not None:
        entry = LOSSES[known]
        return entry(**{name: getattr(loss_func, name) for name in entry.options}), reduction
    partial = (
        loss_func if isinstance(loss_func, functools.partial) else functools.partial(loss_func)
    )
    if inspect.isfunction(partial.func) and partial.func in LOSSES:
        entry = LOSSES[partial.func]
        return entry(**_partial_options(partial, entry)), reduction
    return GenericLoss(loss_func, reduction), reduction


def _reduction(loss_func: Any) -> str:
    """Read the reduction of a loss function and check it."""
    needed = (
        "a loss must be nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, or a "
        "module/function with a `reduction` ('mean' or 'sum')"
    )
    function = loss_func.func if isinstance(loss_func, functools.partial) else loss_func
    if isinstance(function, type) or not callable(function):
        hint = " Pass an instance of the class." if isinstance(function, type) else ""
        raise ValueError(f"{loss_func!r} is not a loss function: {needed}.{hint}")
    if isinstance(loss_func, functools.partial) and "reduction" in loss_func.keywords:
        reduction = loss_func.keywords["reduction"]
    elif hasattr(function, "reduction"):
        reduction = function.reduction
    else:
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # some built-in functions have no signature
            parameters = MappingProxyType({})
        if "reduction" not in parameters:
            raise ValueError(f"{_display_name(loss_func)} has no reduction: {needed}.")
        reduction = parameters["reduction"].default
        if reduction is inspect.Parameter.empty:
            raise ValueError(
                f"{_display_name(loss_func)} has a reduction without a default. Fix it with "
                "functools.partial(..., reduction='mean') or 'sum'."
            )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"{_display_name(loss_func)} has reduction {reduction!r}. Supported: 'mean', 'sum'."
        )
    return reduction


def _known_module(loss_func: Any) -> type[nn.Module] | None:
    """Return the class in the table whose behaviour a module has, or None."""
    if not isinstance(loss_func, nn.Module):
        return None
    cls: Any = type(loss_func)
    for known in cls.__mro__:
        if known in LOSSES:
            same_call = (
                cls.forward is known.forward
                and cls.__call__ is known.__call__
                and "forward" not in vars(loss_func)
                and not loss_func._forward_hooks
                and not loss_func._forward_pre_hooks
            )
            return known if same_call else None
    return None


def _partial_options(partial: functools.partial[Tensor], entry: type[Loss]) -> dict[str, Any]:
    """Return the options that a partial of a known loss function fixes."""
    options = {
        name: value
        for name, value in partial.keywords.items()
        if name != "reduction" and value is not None
    }
    unsupported = [name for name in options if name not in entry.options]
    if partial.args or unsupported:
        given = "positional arguments" if partial.args else ", ".join(unsupported)
        supported = ", ".join(("reduction", *entry.options))
        raise ValueError(
            f"functools.partial of {_display_name(partial)} fixes {given}, which is not supported. "
            f"Supported keywords: {supported}."
        )
    return options


def _display_name(loss_func: Any) -> str:
    """Name a loss function in an error message."""
    if isinstance(loss_func, functools.partial):
        return _display_name(loss_func.func)
    return getattr(loss_func, "__name__", None) or type(loss_func).__name__


def _constant(option: Tensor | None) -> Tensor | None:
    """Detach an option's tensor, as one that autograd may save."""
    if option is None:
        return None
    option = option.detach()
    if not option.is_inference():
        return option
    with torch.inference_mode(False):
        return option.clone()


def _draw_classes(p: Tensor, u: Tensor) -> Tensor:
    """Draw classes ``[m, S]`` of probabilities ``[m, C]`` by inverse distribution functions."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:].contiguous()  # [m, 1], 1 up to rounding
    y = torch.searchsorted(cdf, u * total, right=True)  # first class with cdf > u * total
    # Rounding up to the total would otherwise run past the last class that has any probability.
    last = torch.searchsorted(cdf, total)  # [m, 1]
    return torch.minimum(y, last).clamp(max=p.shape[-1] - 1)


def _column_indices(F: Tensor, columns: Columns) -> Tensor:
    """Return the selected ones ``[V]`` of ``C`` columns."""
    indices = torch.arange(F.shape[-1], device=F.device)
    return indices if columns is None else indices[columns]


def _unit_vectors(F: Tensor, columns: Columns) -> Tensor:
    """Return the unit vectors ``[V, C]`` of the selected columns."""
    indices = torch.arange(F.shape[-1], device=F.device)
    return (_column_indices(F, columns).unsqueeze(-1) == indices).to(F.dtype)


def _flatten_to_last(x: Tensor) -> Tensor:
    """Flatten all axes but the last; a 1-d tensor gets a last axis of length 1."""
    return x.unsqueeze(-1) if x.ndim == 1 else x.flatten(0, -2)


def _is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype holds integers; booleans are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_floating(name: str, f: Tensor) -> None:
    """Check that predictions are real numbers."""
    if not f.is_floating_point():
        raise ValueError(f"{name}: predictions must be floating point numbers, got {f.dtype}.")


def _check_same_shape(name: str, f: Tensor, y: Tensor) -> None:
    """Check predictions and targets of an elementwise loss."""
    _check_floating(name, f)
    if f.shape != y.shape:
        raise ValueError(
            f"{name}: targets must have the shape of the predictions, got predictions of shape "
            f"{tuple(f.shape)} and targets of shape {tuple(y.shape)}."
        )
    if f.ndim == 0:
        raise ValueError(f"{name}: predictions are a scalar. Add a batch dimension.")
    if y.is_complex():
        raise ValueError(f"{name}: targets must be real, got {y.dtype}.")
