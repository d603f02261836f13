"""EKFAC's eigenvectors and eigenvalues, by any backend of KFAC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers._base import Key, KFACComputer, stacked
from curvlinops.computers.across_ranks import add_totals
from curvlinops.computers.eigenvalues import Basis, EigenvalueStatistic
from curvlinops.computers.events import Statistic
from curvlinops.computers.recorder import Recorder
from curvlinops.computers.report import check_finite, check_spectrum, factor_name
from curvlinops.computers.statistics import Factor
from curvlinops.computers.usages import Usage
from curvlinops.computers.vectors import mixes_terms
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.distributed.transfers import share
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kfac_utils import FisherType, ParamGroup
from curvlinops.risk import Batch
from curvlinops.risk.data import TermCounter


class EKFACComputer(KFACComputer):
    """Computes EKFAC's eigenvectors and eigenvalues.

    The arguments are those of :class:`~curvlinops.EKFACLinearOperator`. A first pass over the data
    gives KFAC's factors, whose eigenvectors are the basis; a second one the eigenvalues.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._recorder: Recorder | None = None  # of the first pass
        super().__init__(*args, **kwargs)
        # the samples of a loss term depend on its place in the data
        same_order = self.check_deterministic and self.fisher_type is FisherType.MC
        self.risk.records_passes = same_order

    decomposes = True

    def _check_options(self) -> None:
        """Raise if there are no gradients; see the base class."""
        if self.fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError(
                "EKFAC needs gradients: fisher_type='forward-only' is one of KFAC's only. "
                "Use another one, or KFACLinearOperator."
            )

    def bases(self, part: list[Key] | None = None) -> dict[Key, list[Basis]]:
        """Compute KFAC's factors, and return their eigenvectors; None for a diagonal factor.

        Args:
            part: The groups whose eigenvectors are wanted. None: all.
        """
        hear = self._hear_and_record if part is None else None
        blocks = self.factors(part, raw=True, hear=hear)
        keys = [
            plan.key
            for plan in self.plans
            if not plan.diagonal and (part is None or plan.key in part)
        ]
        own: dict[int, list[Basis]] = {}
        with self.collective.together():
            for i, key in enumerate(keys):
                if self.holders(key)[0] != self.collective.rank:
                    continue
                own[i] = []
                for B, A in blocks.pop(key):
                    check_finite(key, A, B)
                    Q_B = self._eigenvectors(B, key, "gradient")
                    own[i].append((Q_B, self._eigenvectors(A, key, "input")))
        found = share(self.collective, own, [self.holders(key)[0] for key in keys])
        return {key: found[i] for i, key in enumerate(keys)}

    def decomposed(self) -> dict[Key, list[Any]]:
        """Compute eigenvectors and eigenvalues in two passes over the data, or a few times two.

        A second pass is not made if the first one was recorded, see :class:`Recorder`.

        Returns:
            For each group, by the tuple of its parameters' names, its blocks: eigenvalues
            ``[d_out, d_in]`` (``[d_out]`` without input factor), and the eigenvectors of the
            gradient and the input factor (None for an identity, and for an input factor that does
            not exist). For parameters in no supported layer, a diagonal
            operator instead.
        """
        result: dict[Key, list[Any]] = {}
        for part in self.parts():
            bases = self.bases(part)
            statistic = self.eigenvalue_statistic(bases)
            scale = self._gather_again(statistic)
            self.add_totals_over_ranks(statistic)
            result |= self.decomposition_of(statistic, bases, scale, {})
        for name, block in self._diagonal_blocks().items():
            result[name,] = [block]
        return {plan.key: result[plan.key] for plan in self.plans if plan.key in result}

    def _needs_examples(self, usage: Usage) -> bool:
        """Return True: eigenvalues are those of each example's gradient."""
        return True

    # ---- passes over the data --------------------------------------------------------------------
    def _hear_and_record(self, statistic: Statistic) -> Tensor | float:
        """Give a statistic the events of the first pass, and record them if they are few."""
        self._recorder = Recorder(statistic)
        self._recorder.scale = self._hear(self._recorder)
        return self._recorder.scale

    def _visit(
        self, statistic: Statistic, batch: Batch, counter: TermCounter, signs: str
    ) -> Tensor | float:
        """Give a statistic the events of one batch; see the base class."""
        if statistic is not self._recorder:
            return super()._visit(statistic, batch, counter, signs)
        own = replace(batch, X=self._recorder.begin(batch.X))
        normalizer = super()._visit(statistic, own, counter, signs)
        self._recorder.end(self._num_vectors)
        return normalizer

    def _vectors(self, batch: Batch, F: Tensor, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """Return the loss vectors of a batch; see the base class."""
        vectors = super()._vectors(batch, F, *args, **kwargs)
        if self._recorder is not None and mixes_terms(
            self.fisher_type, len(F) // batch.n, self.loss_terms
        ):
            self._recorder.give_up()  # the eigenvalues need other signs than the eigenvectors
        return vectors

    def _gather_again(self, statistic: Statistic) -> Tensor | float:
        """Give a statistic the events of the second pass; return the loss's scale."""
        recorder, self._recorder = self._recorder, None
        if recorder is None or self.collective.any(not recorder.complete):
            self.risk.repeat()
            return self._gather(statistic, "EKFAC eigenvalues", "eigenvalue-signs")
        with self.collective.together(), torch.no_grad():
            for num_vectors in recorder.replay(self._precise(statistic)):
                self._num_vectors = num_vectors
        return recorder.scale

    # ---- several ranks, and results --------------------------------------------------------------
    def add_totals_over_ranks(self, statistic: EigenvalueStatistic) -> None:
        """Add sums of squares over the ranks."""
        owners = {plan.key: self.only_holder(plan.key) for plan in self.plans}
        add_totals(self.collective, statistic.totals(), owners, self.raw)

    def eigenvalue_statistic(self, bases: Mapping[Key, list[Basis]]) -> EigenvalueStatistic:
        """Return a new statistic of the eigenvalues in given bases."""
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        return EigenvalueStatistic(self.plans, bases, shapes, lambda: self._num_vectors)

    def _eigenvectors(self, factor: Factor | None, key: Key, what: str) -> Tensor | None:
        """Return a factor's eigenvectors, None for a diagonal one."""
        return _eigenvectors(factor, key, what, self.precision.decompositions, checked=True)

    def decomposition_of(
        self,
        statistic: EigenvalueStatistic,
        bases: Mapping[Key, list[Basis]],
        scale: Tensor | float,
        diagonals: dict[str, DiagonalLinearOperator],
    ) -> dict[Key, list[Any]]:
        """Return the eigenvalues and eigenvectors of each group, as :meth:`decomposed` does.

        Args:
            statistic: The squares of the data.
            bases: The eigenvectors.
            scale: The scale c of the loss.
            diagonals: The blocks of parameters that are in no supported layer.
        """
        like = self.like
        totals = {plan.key: totals for plan, totals in statistic.totals()}
        result: dict[Key, list[Any]] = {}
        for plan in self.plans:
            if plan.diagonal and plan.key[0] in diagonals:
                result[plan.key] = [diagonals[plan.key[0]]]
            if plan.diagonal or plan.key not in totals or not self._holds(plan.key):
                continue
            result[plan.key] = []
            triples = zip(totals[plan.key], bases[plan.key], plan.sizes, strict=True)
            for total, basis, sizes in triples:
                values = like.new_zeros(sizes)
                if total is not None:
                    values = (total * scale).to(like.device, like.dtype)
                stored = [None if Q is None else Q.to(like.device, like.dtype) for Q in basis]
                result[plan.key].append((values, *stored))
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


def basis_of(block: Any) -> tuple[list[Basis], list[list[int]]]:
    """Return the eigenvectors of a block's parts, and the sizes of the factors of each."""
    parts: list[Any] = list(block) if isinstance(block, BlockDiagonalLinearOperator) else [block]
    bases: list[Basis] = []
    sizes = []
    for part in parts:
        if isinstance(part, DiagonalLinearOperator):  # of parameters without factors
            continue
        decomposed = isinstance(part, EighDecomposedLinearOperator)
        factors: list[Any] = list(part.eigenvectors if decomposed else part)
        sizes.append([factor.shape[0] for factor in factors])
        vectors = [
            (f if isinstance(f, Tensor) else None)
            if decomposed
            else _eigenvectors(f, ("basis",), what, checked=False)
            for f, what in zip(factors, ("gradient", "input"), strict=False)
        ]
        bases.append((vectors[0], vectors[1] if len(vectors) > 1 else None))
    return bases, sizes


def _eigenvectors(
    factor: Factor | None, key: Key, what: str, dtype: torch.dtype | None = None, *, checked: bool
) -> Tensor | None:
    """Return a factor's eigenvectors, None for a diagonal one; computed in a dtype."""
    if factor is None or isinstance(factor, DiagonalLinearOperator):
        return None
    wide = factor if dtype is None else factor.to(dtype)
    symmetric = (wide + wide.mT).mul_(0.5)  # up to rounding it is
    name = f"the {factor_name(key, what)}"
    values, vectors = _tensors.eigh(symmetric, name=name, checked=checked)
    check_spectrum(key, what, values)
    return vectors.to(factor.dtype)


__all__ = ["EKFACComputer", "basis_of"]
