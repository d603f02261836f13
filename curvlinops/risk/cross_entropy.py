"""Cross-entropy of logits, with index or probability targets and all options."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlinops.risk.loss import (
    LOSSES,
    Columns,
    Loss,
    check_floating,
    column_indices,
    constant,
)


class CrossEntropy(Loss):
    r"""Cross-entropy of logits, ``nn.CrossEntropyLoss``, with index or probability targets.

    For logits :math:`f \in \mathbb{R}^C` (axis 1 of the output), :math:`p = \mathrm{softmax}(f)`,
    and non-negative coefficients :math:`a`, whose sum is :math:`k`,

    .. math::
        \ell = -\sum_c a_c \log p_c\,,\quad
        \nabla_f \ell = k p - a\,,\quad
        \nabla_f^2 \ell = k (\mathrm{diag}(p) - p p^\top)\,.

    Adding a constant to all logits changes nothing, so that the Hessian has rank :math:`C - 1`, and
    a root with as many columns: for each class c but the likeliest one, M,

    .. math::
        s_c = \sqrt{k p_c} (e_c - q)\,,\quad
        q_i = \frac{p_i}{1 + \sqrt{p_M}} \text{ for } i \neq M\,,\quad q_M = \sqrt{p_M}\,.

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
        self.class_weight = constant(weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move the classes (axis 1) to the end and flatten all other axes."""
        check_floating(self.name, f)
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
                    "probability targets. Leave it at its default, or pass class indices."
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
        eps = self.label_smoothing
        if targets.is_floating_point():
            # Sums first: smoothed or weighted targets would be as large as the predictions.
            if w is None:
                return (1 - eps) * targets.sum(-1) + eps
            return (1 - eps) * (targets @ w) + eps * w.mean()
        _, kept, target_weight = self._index_targets(F, targets)
        if not eps:
            return target_weight
        mean_weight = 1.0 if w is None else w.mean()
        return (1 - eps) * target_weight + eps * mean_weight * kept.to(F.dtype)

    def grad(self, F: Tensor, targets: Tensor) -> Tensor:
        """Evaluate k p - a."""
        w, eps = self._class_weight(F), self.label_smoothing
        # Its derivatives need p and k only, so it can become the result in place.
        result = self.weight(F, targets).unsqueeze(-1) * F.softmax(-1)
        uniform: Tensor | float = eps / F.shape[-1]
        if targets.is_floating_point():
            result.sub_(targets if w is None else targets * w, alpha=1 - eps)
        else:
            safe, kept, target_weight = self._index_targets(F, targets)
            coefficients = (eps - 1) * target_weight  # [m]
            result.scatter_add_(-1, safe.unsqueeze(-1), coefficients.unsqueeze(-1).to(F.dtype))
            uniform = kept.to(F.dtype).unsqueeze(-1) * uniform  # [m, 1]
        if eps == 0.0:
            return result
        return result.sub_(uniform if w is None else uniform * w)

    def hess_vec(self, F: Tensor, targets: Tensor, V: Tensor) -> Tensor:
        """Evaluate k (p ⊙ v - p pᵀv) = k p ⊙ (u - pᵀu), for u = v - v_M and the likeliest class M.

        Without the shift, which changes nothing, v_M - pᵀv cancels for confident predictions.
        """

        def multiply(F: Tensor, targets: Tensor, V: Tensor) -> Tensor:
            p = F.softmax(-1)
            likeliest = p.argmax(-1, keepdim=True).expand(*V.shape[:-1], 1)
            pu = p * (V - V.gather(-1, likeliest))
            product = torch.addcmul(pu, p, pu.sum(-1, keepdim=True), value=-1)
            return self.weight(F, targets).unsqueeze(-1) * product

        return self._in_chunks(multiply, F, targets, V, entries=V.numel())

    def root_columns(self, F: Tensor, targets: Tensor, columns: Columns = None) -> Tensor:
        """Evaluate columns √(k p_c) (e_c - q); the last class takes the place of M, which has none.

        They are those of √k diag(√p) U, where U has orthonormal columns, all of them orthogonal to
        √p: it is the Householder reflection of √p to -e_M without column M.
        """
        C = F.shape[-1]
        p = F.softmax(-1)
        largest, likeliest = p.max(-1, keepdim=True)  # [m, 1]
        root = largest.sqrt()
        q = (p / (1 + root)).scatter(-1, likeliest, root)
        slots = column_indices(F, columns, self.num_columns(C)).unsqueeze(-1)  # [V, 1]
        classes = torch.where(slots == likeliest.T, C - 1, slots).unsqueeze(-1)  # [V, m, 1]
        kp = (self.weight(F, targets).unsqueeze(-1) * p).expand(len(classes), -1, -1)
        scales = kp.gather(-1, classes).sqrt()  # [V, m, 1]
        return (-scales * q).scatter_add_(-1, classes, scales)

    def num_columns(self, C: int) -> int:
        """One less than classes, as adding a constant to all predictions changes nothing."""
        return max(C - 1, 1)

    def draws(self, C: int) -> int:
        """One uniform draws one class."""
        return 1

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Draw classes by inverting the distribution function and evaluate √k (p - e_y)."""
        u = self._uniforms(F, uniforms).squeeze(-1)  # [m, S]

        def draw(F: Tensor, targets: Tensor, u: Tensor) -> Tensor:
            p = F.softmax(-1, dtype=torch.float64)
            y = _draw_classes(p, u)  # [m, S]
            # p - 1 cancels for confident predictions: subtract in float64, then round.
            entries = (p.gather(-1, y) - 1).to(F.dtype)  # [m, S]
            samples = (
                p.to(F.dtype)
                .expand(u.shape[1], -1, -1)
                .scatter(-1, y.T.unsqueeze(-1), entries.T.unsqueeze(-1))
            )
            return samples * self.weight(F, targets).sqrt().unsqueeze(-1)

        return self._in_chunks(draw, F, targets, u, entries=max(1, u.shape[1]) * F.numel())

    def sampled_hess_vec(self, F: Tensor, targets: Tensor, uniforms: Tensor, V: Tensor) -> Tensor:
        """Evaluate k/S Σ_s (p - e_y) d with d = pᵀv - v_y for the classes y of the samples."""
        u = self._uniforms(F, uniforms).squeeze(-1)  # [m, S]
        if u.shape[1] == 0:
            raise ValueError(f"{self.name}: needs at least one sample, got no uniforms.")

        def multiply(F: Tensor, targets: Tensor, u: Tensor, V: Tensor) -> Tensor:
            # Differences cancel for confident predictions: float64 to the end.
            p = F.softmax(-1, dtype=torch.float64)
            V = V.to(torch.float64)
            y = _draw_classes(p, u).expand(*V.shape[:-1], -1)  # [..., m, S]
            d = (p * V).sum(-1, keepdim=True) - V.gather(-1, y)  # [..., m, S]
            product = (d.sum(-1, keepdim=True) * p).scatter_add(-1, y, -d)
            k = self.weight(F, targets).to(torch.float64) / u.shape[1]  # [m]
            return (k.unsqueeze(-1) * product).to(F.dtype)

        return self._in_chunks(multiply, F, targets, u, V, entries=V.numel())

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

    def _index_targets(self, F: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return classes (0 where ignored), which terms are kept, and w_y (0 where ignored)."""
        kept = targets != self.ignore_index  # [m]
        # An ignored index may lie outside the classes, where nothing can be looked up.
        safe = torch.where(kept, targets, 0)  # [m]
        w = self._class_weight(F)
        target_weight = kept.to(F.dtype) if w is None else w[safe] * kept.to(F.dtype)  # [m]
        return safe, kept, target_weight


def _draw_classes(p: Tensor, u: Tensor) -> Tensor:
    """Draw classes ``[m, S]`` of probabilities ``[m, C]`` by inverse distribution functions."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:].clone()  # [m, 1], 1 up to rounding; searchsorted wants its memory dense
    y = torch.searchsorted(cdf, u * total, right=True)  # first class with cdf > u * total
    # Rounding up to the total would otherwise run past the last class that has any probability.
    last = torch.searchsorted(cdf, total)  # [m, 1]
    return torch.minimum(y, last).clamp(max=p.shape[-1] - 1)


def _is_integer(dtype: torch.dtype) -> bool:
    """Whether a dtype holds integers; booleans are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


LOSSES[nn.CrossEntropyLoss] = CrossEntropy
LOSSES[functional.cross_entropy] = CrossEntropy
