"""EKFAC's eigenvectors and eigenvalues, by any backend of KFAC."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvlinops import _tensors
from curvlinops.computers._base import Key, KFACComputer, stacked
from curvlinops.computers.eigenvalues import Basis, EigenvalueStatistic
from curvlinops.computers.report import check_finite
from curvlinops.computers.statistics import Factor
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac_utils import FisherType, ParamGroup


class EKFACComputer(KFACComputer):
    """Computes EKFAC's eigenvectors and eigenvalues.

    The arguments are those of :class:`~curvlinops.EKFACLinearOperator`. A first pass over the data
    gives KFAC's factors, whose eigenvectors are the basis; a second one the eigenvalues.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError(
                "EKFAC needs gradients: fisher_type='forward-only' is one of KFAC's only."
            )

    def bases(self) -> dict[Key, list[Basis]]:
        """Compute KFAC's factors, and return their eigenvectors; None for a diagonal factor."""
        bases: dict[Key, list[Basis]] = {}
        for key, blocks in self.blocks().items():
            bases[key] = []
            for B, A in blocks:
                check_finite(key, A, B)
                bases[key].append((_eigenvectors(B, key), _eigenvectors(A, key)))
        return bases

    def decomposed(self) -> dict[Key, list[Any]]:
        """Compute eigenvectors and eigenvalues in two passes over the data.

        Returns:
            For each group, by the tuple of its parameters' names, its blocks: eigenvalues
            ``[d_out, d_in]`` (``[d_out]`` without input factor), and the eigenvectors of the
            gradient and the input factor (None for an identity, and for an input factor that does
            not exist). For parameters in no supported layer, a diagonal
            operator instead.
        """
        bases = self.bases()
        plans = self.plans
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        statistic = EigenvalueStatistic(plans, bases, shapes, lambda: self._num_vectors)
        scale = self._gather(statistic, "EKFAC eigenvalues", "eigenvalue-signs")
        like = next(iter(self.risk.params.values())).detach()
        diagonals = self._diagonal_blocks()
        totals = {plan.key: totals for plan, totals in statistic.totals()}
        result: dict[Key, list[Any]] = {}
        for plan in plans:
            if plan.diagonal:
                result[plan.key] = [diagonals[plan.key[0]]]
                continue
            groups = plan.format.groups if "W" in plan.group else 1
            result[plan.key] = []
            for total, basis, rows in zip(
                totals[plan.key],
                bases[plan.key],
                [rows for rows in plan.blocks for _ in range(groups)],
                strict=True,
            ):
                height = plan.d_out if plan.format.is_norm else (rows[1] - rows[0]) // groups
                values = like.new_zeros((height, plan.d_in) if plan.d_in else (height,))
                if total is not None:
                    values = (total * scale).to(like.dtype)
                result[plan.key].append((values, *basis))
        return result

    def compute(  # type: ignore[override]
        self,
    ) -> tuple[dict[Key, Any], dict[Key, Any], dict[Key, Any], list[ParamGroup]]:
        """Compute eigenvectors and eigenvalues in two passes over the data.

        Returns:
            Eigenvectors of the input factors, of the gradient factors, corrected eigenvalues (dicts
            keyed by the tuple of a group's parameter names; a bias alone has no input factor), and
            the list of groups. Eigenvectors of a diagonal factor are None, an identity. For a
            weight with several blocks, there is one tensor with a leading axis, or a list.
        """
        inputs: dict[Key, Any] = {}
        gradients: dict[Key, Any] = {}
        values: dict[Key, Any] = {}
        for key, blocks in self.decomposed().items():
            if isinstance(blocks[0], DiagonalLinearOperator):
                values[key], gradients[key] = blocks[0].diagonal(), None
                continue
            values[key] = stacked([value for value, _, _ in blocks])
            gradients[key] = stacked([Q_g for _, Q_g, _ in blocks])
            if self._has_inputs(key):
                inputs[key] = stacked([Q_a for _, _, Q_a in blocks])
        return inputs, gradients, values, self.mapping

    def _has_inputs(self, key: Key) -> bool:
        """Return whether a group has an input factor."""
        return any(plan.d_in for plan in self.plans if plan.key == key)


def _eigenvectors(factor: Factor | None, key: Key) -> Tensor | None:
    """Return a factor's eigenvectors, None for a diagonal one."""
    if factor is None or isinstance(factor, DiagonalLinearOperator):
        return None
    symmetric = (factor + factor.mT) / 2  # up to rounding it is
    return _tensors.eigh(symmetric, name=f"the factor of {', '.join(key)}")[1]


__all__ = ["EKFACComputer"]
