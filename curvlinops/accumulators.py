"""KFAC and EKFAC of data that come batch by batch, in a training loop for instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.accumulation import Accumulator
from curvlinops.computers.eigenvalues import Basis, EigenvalueStatistic
from curvlinops.computers.ekfac import basis_of
from curvlinops.computers.encoding import decode, encode
from curvlinops.computers.positions import Moment
from curvlinops.computers.report import factor_name
from curvlinops.computers.statistics import CovarianceStatistic
from curvlinops.ekfac import EKFACLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.risk.model import ModelFunction
from curvlinops.risk.ranks import different_values
from curvlinops.sharded import gathered


class KFACAccumulator(Accumulator[CovarianceStatistic]):
    r"""Gathers KFAC's factors batch by batch, over data that do not fit one pass.

    It holds raw sums and counts, so that batches only add: after any batches the operator is that
    of :class:`~curvlinops.KFACLinearOperator` on all of them. Parameters that change between two
    updates, as in training, are taken at the time of each.

    With ``decay`` :math:`\beta`, factors are moving averages over updates :math:`i = 1, \dots, t`,

    .. math::
        \frac{1 - \beta}{1 - \beta^t} \sum_i \beta^{t - i} F_i\,,

    of the factors :math:`F_i` of each batch as if it were all the data: the denominator corrects
    the bias towards the first zeros (Martens & Grosse, 2015). Batches of different size have the
    same weight. If their examples have different numbers of positions, or of loss terms that are
    not ignored, a batch counts in proportion to the number per example: sums over positions and
    over terms are averaged, and then divided by the average of their numbers. With class weights
    and ``reduction="mean"``, the number of terms is the sum of their weights.

    Arguments up to ``batch_size_fn``, and those not listed below, are those of
    :class:`~curvlinops.KFACLinearOperator`.

    Args:
        backend: How factors are gathered, as there.
        decay: The factor by which an update lowers the weight of those before it, at least 0 and
            below 1. None: all batches count the same, and together they are the data.
        first_term: The number of loss terms before the first one, for the same random numbers as
            in a pass over all data, if these are split between accumulators. Default: 0; on the
            ranks of a process group, numbers that are far from one another.
        process_group: A ``torch.distributed`` process group, whose ranks add batches of their own.
            Only :meth:`to_operator` communicates.
        worker_fraction: Which ranks hold a block, as for :class:`~curvlinops.KFACLinearOperator`.

    Example:
        >>> import torch
        >>> from curvlinops import KFACAccumulator, KFACLinearOperator
        >>> model, loss_func = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> params = dict(model.named_parameters())
        >>> data = [(torch.rand(n, 3), torch.randint(0, 2, (n,))) for n in (4, 4, 1)]
        >>> accumulator = KFACAccumulator(model, loss_func, params)
        >>> for X, y in data:
        ...     accumulator.update(X, y)
        >>> K = KFACLinearOperator(model, loss_func, params, data)
        >>> v = torch.rand(8)
        >>> torch.allclose(accumulator.to_operator() @ v, K @ v, atol=1e-6)
        True
    """

    _OPERATOR = KFACLinearOperator
    _SIGNS = "signs"

    def _new_sums(self) -> CovarianceStatistic:
        computer: KFACComputer = self._computer
        return computer.new_statistic()

    def _parts(
        self, sums: CovarianceStatistic, scale: Tensor | float, diagonals: Any
    ) -> dict[Key, list[Any]]:
        result: dict[Key, list[Any]] = self._computer.factors_of(sums, scale, diagonals)
        return result

    def _add_over_ranks(self, sums: CovarianceStatistic) -> None:
        self._computer.add_over_ranks(sums)

    def _encoded(self, sums: CovarianceStatistic) -> list[Any]:
        return [[encode(key), moment.state()] for key, moment in sums.moments.items()]

    def _decoded(self, code: list[Any]) -> CovarianceStatistic:
        sums = self._new_sums()
        for key, state in code:
            sums.moments[decode(key)] = Moment.from_state(state, self._computer.risk.device)
        return sums


class EKFACAccumulator(Accumulator[EigenvalueStatistic]):
    r"""Gathers EKFAC's eigenvalues batch by batch, in the eigenbasis of given factors.

    After any batches, the operator has the blocks of :class:`~curvlinops.EKFACLinearOperator`,

    .. math::
        (Q_B \otimes Q_A) \, \mathrm{diag}(\lambda) \, (Q_B \otimes Q_A)^\top, \qquad
        \lambda = c \sum_m \sum_v (Q_B^\top G_{m, v} Q_A)^{\odot 2},

    with eigenvalues of the batches, and eigenvectors of the ``basis`` (George et al., 2018, "Fast
    approximate natural gradient descent in a Kronecker-factored eigenbasis"). These are usually
    made anew much less often.

    Args:
        model_func: As for :class:`KFACAccumulator`.
        loss_func: As there.
        params: As there.
        basis: KFAC, whose factors are decomposed, or EKFAC, whose eigenvectors are taken over; for
            the same parameters, with the same ``separate_weight_and_bias``.
        options: All further arguments of :class:`KFACAccumulator`, by name. EKFAC's random signs
            are others than KFAC's, and its Monte-Carlo samples are the same.

    Raises:
        ValueError: If the basis does not fit the model's layers; on the first batch.
        RuntimeError: If ranks of a process group have different bases.

    Example:
        >>> import torch
        >>> from curvlinops import EKFACAccumulator, EKFACLinearOperator
        >>> model, loss_func = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> params = dict(model.named_parameters())
        >>> data = [(torch.rand(n, 3), torch.randint(0, 2, (n,))) for n in (4, 4, 1)]
        >>> E = EKFACLinearOperator(model, loss_func, params, data)
        >>> accumulator = EKFACAccumulator(model, loss_func, params, basis=E)
        >>> for X, y in data:
        ...     accumulator.update(X, y)
        >>> v = torch.rand(8)
        >>> torch.allclose(accumulator.to_operator() @ v, E @ v, atol=1e-6)
        True
    """

    _OPERATOR = EKFACLinearOperator
    _SIGNS = "eigenvalue-signs"

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        basis: KFACLinearOperator,
        **options: Any,
    ):
        if not isinstance(basis, KFACLinearOperator):
            raise TypeError(
                "basis must be a KFACLinearOperator or EKFACLinearOperator, got "
                f"{type(basis).__name__}."
            )
        super().__init__(model_func, loss_func, params, **options)
        groups = basis.mapping
        names = {name for group in groups for name in group.values()}
        if names != set(params):
            missing = sorted(names ^ set(params))
            raise ValueError(
                f"basis and params have different parameters: {missing}. They must have the same."
            )
        self._bases: dict[Key, list[Basis]] = {}
        self._sizes: dict[Key, list[list[int]]] = {}
        for group, block in zip(groups, gathered(basis)[1], strict=True):
            key = tuple(group.values())
            self._bases[key], self._sizes[key] = basis_of(block)
        self._check_bases()

    def _check_bases(self) -> None:
        """Raise if ranks have different bases, in which eigenvalues cannot be added."""
        vectors = {
            f"the {factor_name(key, what)}{f', block {i}' if len(bases) > 1 else ''}": Q
            for key, bases in self._bases.items()
            for i, basis in enumerate(bases)
            for what, Q in zip(("gradient", "input"), basis, strict=True)
            if Q is not None
        }
        different = different_values(self._collective, vectors)
        if different:
            listing = ", ".join(different[:3]) + ", ..." * (len(different) > 3)
            raise RuntimeError(
                f"Ranks have different eigenvectors of {listing}: pass the same basis on all of "
                "them, KFAC or EKFAC of all data, with the same process_group."
            )

    def _new_sums(self) -> EigenvalueStatistic:
        for plan in self._computer.plans:
            if not plan.diagonal and self._sizes.get(plan.key) != plan.sizes:
                raise ValueError(
                    f"The basis has no block that fits {', '.join(map(repr, plan.key))}: it must "
                    "be made for the same model, with the same separate_weight_and_bias."
                )
        statistic: EigenvalueStatistic = self._computer.eigenvalue_statistic(self._bases)
        return statistic

    def _parts(
        self, sums: EigenvalueStatistic, scale: Tensor | float, diagonals: Any
    ) -> dict[Key, list[Any]]:
        complete = self._new_sums()  # also of layers that were not called in any batch
        complete.merge(sums)
        result: dict[Key, list[Any]] = self._computer.decomposition_of(
            complete, self._bases, scale, diagonals
        )
        return result

    def _add_over_ranks(self, sums: EigenvalueStatistic) -> None:
        self._computer.assign({plan.key: [plan.key] for plan in self._computer.plans})
        self._computer.add_totals_over_ranks(sums)

    def _encoded(self, sums: EigenvalueStatistic) -> list[Any]:
        return [
            [list(plan.key), [None if t is None else t.clone() for t in totals]]
            for plan, totals in sums.totals()
        ]

    def _decoded(self, code: list[Any]) -> EigenvalueStatistic:
        sums = self._new_sums()
        device = self._computer.risk.device
        saved = {tuple(key): totals for key, totals in code}
        for plan, totals in sums.totals():
            loaded = saved.get(plan.key, totals)
            totals[:] = [None if t is None else t.to(device, copy=True) for t in loaded]
        return sums
