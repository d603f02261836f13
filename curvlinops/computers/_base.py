"""What the computers of Kronecker factors share: arguments, the pass over the data, results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops._scalars import as_integer
from curvlinops.computers.across_ranks import (
    add_moments,
    assign,
    check_same_steps,
    connected,
    known_to_any,
)
from curvlinops.computers.arrangement import BATCH_FIRST
from curvlinops.computers.encoding import decode, encode
from curvlinops.computers.events import Collector, Statistic
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.computers.listeners import Bundled, Measure, Precise, Selected
from curvlinops.computers.look import Looking
from curvlinops.computers.memory import MemoryPlan, memory_of, split_into_passes
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.statistics import CovarianceStatistic, Factor
from curvlinops.computers.usages import Usage
from curvlinops.computers.vectors import check_terms, loss_vectors, num_vectors
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.distributed import collective_of
from curvlinops.kfac_utils import FisherType, KFACType, ParamGroup, Precision
from curvlinops.risk import Batch, EmpiricalRisk, Loss, loss_entry
from curvlinops.risk.data import TermCounter
from curvlinops.risk.model import FunctionalModel, Predict

__all__ = ["Increment", "KFACComputer", "ParamGroup", "Statistic", "stacked"]

Key = tuple[str, ...]
"""The names of a group's parameters."""


S = TypeVar("S", bound=Statistic)


class Increment(NamedTuple):
    """What a batch adds, besides sums.

    Attributes:
        num_data: The number of examples.
        next_term: The index of the first loss term after its own.
        normalizer: What it adds to the denominator of the loss's mean.
    """

    num_data: int
    next_term: int
    normalizer: Tensor | float


class KFACComputer(Looking):
    """Computes the Kronecker factors of KFAC.

    The arguments are those of :class:`~curvlinops.KFACLinearOperator`, and described there. A
    subclass implements :meth:`_observe` and :meth:`_run`.
    """

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: dict[str, Tensor],
        data: Any,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        unsupported: str = "raise",
        loss_terms: str = "signs",
        max_factor_size: int = 8192,
        process_group: Any = None,
        worker_fraction: float = 1.0,
        precision: Precision | None = None,
        memory_budget: int | None = None,
    ):
        super().__init__(separate_weight_and_bias, unsupported)
        self.fisher_type = FisherType(fisher_type)
        self.kfac_approx = KFACType(kfac_approx)
        mc_samples = as_integer("mc_samples", mc_samples, 1)
        if mc_samples != 1 and self.fisher_type is not FisherType.MC:
            raise ValueError(
                f"mc_samples={mc_samples} has no meaning for the Fisher type "
                f"{str(self.fisher_type)!r}: use fisher_type='mc', or leave mc_samples at 1."
            )
        if num_per_example_loss_terms is not None:
            num_per_example_loss_terms = as_integer(
                "num_per_example_loss_terms", num_per_example_loss_terms, 1
            )
        if loss_terms not in ("signs", "exact"):
            raise ValueError(f"loss_terms must be 'signs' or 'exact', got {loss_terms!r}.")
        if not 0 <= worker_fraction <= 1:
            raise ValueError(f"worker_fraction must be between 0 and 1, got {worker_fraction}.")
        self.worker_fraction = float(worker_fraction)
        self.precision = Precision() if precision is None else precision
        if not isinstance(self.precision, Precision):
            raise TypeError(f"precision must be a Precision, got {type(precision).__name__}.")
        self.memory_budget = (
            None if memory_budget is None else as_integer("memory_budget", memory_budget, 1)
        )
        self.check_deterministic = check_deterministic
        self.mc_samples = mc_samples
        self.loss_terms = loss_terms
        self.max_factor_size = as_integer("max_factor_size", max_factor_size, 1)
        self._num_per_example_loss_terms = num_per_example_loss_terms
        self._random = RandomSource(seed)
        self._check_options()
        self._largest_batch = 0
        self._num_vectors = 1  # that are back-propagated for a batch
        self._holders: dict[Key, list[int]] = {}  # the ranks that hold each block, its owner first
        model = FunctionalModel(model_func, params)  # raises if they do not fit
        self.collective = collective_of(process_group, model.device)
        self._check_model(model_func)
        if model.sharded:
            check_same_steps(self.collective, data)
        self.loss: Loss = loss_entry(loss_func)[0]
        if not self.loss.closed_form:
            raise NotImplementedError(
                f"{self.loss.name} has no closed forms, which KFAC needs: use nn.MSELoss, "
                "nn.CrossEntropyLoss or nn.BCEWithLogitsLoss, or add the loss with register_loss."
            )
        self._arguments: dict[str, Any] = {
            "model_func": model_func,
            "loss_func": loss_func,
            "data": data,
            "progressbar": progressbar,
            "batch_size_fn": batch_size_fn,
        }
        if check_deterministic:  # first, as this is cheaper
            with self.collective.together():
                if self.collective.alone or _may_have_batches(data):
                    self._look_at_first(params, num_data)
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            confirm_later=True,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            collective=self.collective,
            purpose=self._purpose(),
            predict=self._predict,
        )

    def _purpose(self) -> str:
        """Return what must be the same on all ranks, besides the arguments of the risk."""
        options = {
            "fisher_type": str(self.fisher_type),
            "kfac_approx": str(self.kfac_approx),
            "mc_samples": self.mc_samples,
            "seed": self._random.seed,
            "separate_weight_and_bias": self.separate_weight_and_bias,
            "unsupported": self.unsupported,
            "loss_terms": self.loss_terms,
            "max_factor_size": self.max_factor_size,
            "worker_fraction": self.worker_fraction,
            "memory_budget": self.memory_budget,
            "precision": self.precision,
        }
        listing = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{type(self).__name__}({listing})"

    #: Whether the operator holds eigenvectors and eigenvalues, rather than factors.
    decomposes = False

    def _check_options(self) -> None:
        """Raise if options have no meaning for this approximation; nothing is evaluated yet."""

    # ---- what a backend implements ---------------------------------------------------------------
    def _check_model(self, model_func: Any) -> None:
        """Raise if the backend cannot run the model."""

    #: Evaluates the model in the check, if the backend listens there.
    _predict: Predict | None = None

    def _run(self, statistic: Statistic, batch: Batch) -> tuple[Tensor, Collector]:
        """Evaluate the model on a batch, and give a statistic the inputs of its layers.

        Returns:
            The prediction, and the collector, which back-propagates loss vectors through it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _run.")

    # ---- passes over the data --------------------------------------------------------------------
    def _gather(self, statistic: Statistic, what: str, signs: str) -> Tensor | float:
        """Give a statistic the events of one pass over the data; return the loss's scale.

        Args:
            statistic: The statistic.
            what: What the progress bar says.
            signs: What the random signs are drawn for, see :data:`~curvlinops._random.PURPOSES`.
        """
        counter = self.risk.term_counter()

        def visit(batch: Batch) -> Tensor | float:
            self._look(batch)
            return self._visit(statistic, batch, counter, signs)

        return self.risk.for_each_batch(visit, what)

    def _visit(
        self, statistic: Statistic, batch: Batch, counter: TermCounter, signs: str
    ) -> Tensor | float:
        """Give a statistic the events of one batch; return the loss's normalizer."""
        statistic = Bundled(self._precise(statistic), lambda: self._num_vectors)
        self._largest_batch = max(self._largest_batch, batch.n)
        prediction, collector = self._refusing(batch, lambda: self._run_and_note(statistic, batch))
        if not self._outdated:  # else the pass is repeated, and may be another one
            self.risk.confirm(batch, prediction)
        statistic.end_of_forward()
        F, targets = self.loss.terms(prediction, batch.y)
        owners = self._owners(prediction.detach(), batch, len(F))
        vectors = self._vectors(batch, F, targets, counter, signs, owners)
        for vector, following in pairwise(chain(vectors, [None])):
            assert vector is not None
            collector.backward(F, vector, last=following is None)
            statistic.end_of_backward()
        statistic.end_of_batch()
        with torch.no_grad():
            return self.loss.normalizer(F.detach(), targets, batch.n)

    def _run_and_note(self, statistic: Statistic, batch: Batch) -> tuple[Tensor, Collector]:
        """Evaluate the model on a batch, and note how it uses its parameters."""
        prediction, collector = self._run(statistic, batch)
        self._note(collector.calls, collector.other_uses)
        if self._refuse_mistaken(prediction.detach(), batch):
            self._look(batch)
            return self._run_and_note(statistic, batch)
        return prediction, collector

    def _needs_examples(self, usage: Usage) -> bool:
        """Return whether factors need sums over an example's positions; see the base class."""
        return self.kfac_approx is KFACType.REDUCE or usage.format.is_norm

    def _precise(self, statistic: Statistic) -> Statistic:
        """Return what hands over events in the wanted precision, without autocast."""
        kind, dtype = self.risk.device.type, self.precision.factors
        if dtype is None and not torch.is_autocast_enabled(kind):
            return statistic
        return Precise(statistic, dtype, kind)

    # ---- the stream of events --------------------------------------------------------------------
    def stream(self, statistic: Statistic) -> float:
        """Pass over the data; hand the inputs and output gradients of all layers to a statistic.

        The loss vectors that are back-propagated are those of ``fisher_type``, without the scale c
        of the loss.

        Args:
            statistic: What listens: :class:`~curvlinops.computers.events.Pairs`, or another one.

        Returns:
            The scale c.
        """
        return float(self._gather(statistic, "Layers", "signs"))

    # ---- batches that are not among the data -----------------------------------------------------
    def add_batch(
        self, make: Callable[[], S], X: Any, y: Any, first_term: int, signs: str
    ) -> tuple[S, Increment]:
        """Give the events of a batch to a new statistic.

        Args:
            make: Makes the statistic, once it is known how the model uses its parameters.
            X: The inputs.
            y: The targets.
            first_term: Index of the first loss term among all.
            signs: What the random signs are drawn for, see :data:`~curvlinops._random.PURPOSES`.

        Returns:
            The statistic, and what else the batch adds.
        """
        result: list[tuple[S, Increment]] = []

        def visit(batch: Batch) -> None:
            self._look_anew(batch)
            self._outdated = True
            while self._outdated:  # the batch may show that other parameters have factors
                self._outdated, self._recording = False, True
                statistic, counter = make(), TermCounter(first_term)
                known = set(self._usages)  # other ones have no place in the statistic yet
                normalizer = self._visit(Selected(statistic, known), batch, counter, signs)
                self._outdated |= len(self._usages) > len(known)
            result.append((statistic, Increment(batch.n, counter.position, normalizer)))

        self.risk.visit((X, y), visit)
        return result[0]

    def _look_at_first(self, params: dict[str, Tensor], num_data: int | None) -> None:
        """Find out how the model uses its parameters from the first batch of the data."""
        self.risk = EmpiricalRisk(
            **self._arguments,
            params=params,
            check_deterministic=False,
            num_data=1 if num_data is None else num_data,
        )
        with self.risk.undisturbed():
            for batch in self.risk.batches(None):
                self._look_first(batch)
                break

    # ---- groups of parameters --------------------------------------------------------------------
    @property
    def counts_tokens(self) -> bool:
        """Whether input factors of embeddings are diagonal: the counts of their tokens."""
        return self.kfac_approx is KFACType.EXPAND

    @property
    def mapping(self) -> list[ParamGroup]:
        """The groups of parameters, one for each block; complete after a pass."""
        return [dict(plan.group) for plan in self.plans]

    @property
    def like(self) -> Tensor:
        """An empty tensor of the device and dtype in which factors are stored."""
        device = self.risk.device if self.precision.device is None else self.precision.device
        return torch.empty(0, device=device, dtype=self.precision.storage or self.risk.dtype)

    @property
    def raw(self) -> Tensor:
        """An empty tensor of the device and dtype in which factors are computed."""
        dtype = self.precision.factors or torch.promote_types(self.risk.dtype, torch.float32)
        return torch.empty(0, device=self.risk.device, dtype=dtype)

    # ---- computation -----------------------------------------------------------------------------
    def new_statistic(self) -> CovarianceStatistic:
        """Return a new statistic."""
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        return CovarianceStatistic(
            shapes,
            self.kfac_approx,
            self.max_factor_size,
            self.separate_weight_and_bias,
            frozenset(self._diagonal),  # that more are found must not show within a pass
            self.precision.factors,
        )

    def _vectors(
        self,
        batch: Batch,
        F: Tensor,
        targets: Any,
        counter: TermCounter,
        signs: str = "signs",
        owners: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Return the loss vectors ``[m, C]`` to back-propagate for a batch."""
        num_terms = F.shape[0]
        per_example = check_terms(num_terms, batch.n, self._num_per_example_loss_terms)
        self._num_vectors = num_vectors(
            self.loss, F.shape[1], self.fisher_type, self.mc_samples, per_example, self.loss_terms
        )
        return loss_vectors(
            self.loss,
            F.detach(),
            targets,
            fisher_type=self.fisher_type,
            mc_samples=self.mc_samples,
            per_example=per_example,
            loss_terms=self.loss_terms,
            random=self._random,
            signs=signs,
            first_term=counter.advance(num_terms),
            owners=owners,
        )

    @property
    def _keeps_terms_apart(self) -> bool:
        """Whether terms of an example are back-propagated one by one; see the base class."""
        return self.loss_terms == "exact" and self.fisher_type is not FisherType.FORWARD_ONLY

    def _owners(self, prediction: Tensor, batch: Batch, num_terms: int) -> Tensor | None:
        """Return the example of each loss term ``[m]`` if that matters, None if they are in order.

        Raises:
            ValueError: If it matters and is not known.
        """
        if not self._keeps_terms_apart or num_terms == batch.n:
            return None
        where = self._where_in(prediction, batch)
        if where.axis is None or where == BATCH_FIRST:
            return None
        if not where.known:
            raise ValueError(
                f"The model's predictions have shape {list(prediction.shape)} for {batch.n} "
                "examples, which cannot be told apart in it: to keep the loss terms of an example "
                "apart, let the model return predictions with the examples in the first axis."
            )
        owners = where.owners(prediction, batch.n).double()
        return self.loss.terms(owners, batch.y)[0][:, 0]

    def blocks(self) -> dict[Key, list[tuple[Factor, Factor | None]]]:
        """Compute the factors in one pass over the data, or a few if the memory is limited.

        Returns:
            For each group, by the tuple of its parameters' names: the pairs of gradient and input
            factor of its blocks (one for each channel group, or part of a weight). A bias alone and
            a normalisation layer have no input factor. Groups that other ranks hold are missing.
        """
        result: dict[Key, list[tuple[Factor, Factor | None]]] = {}
        for part in self.parts():
            result |= self.factors(part)
        result |= {(name,): [(block, None)] for name, block in self._diagonal_blocks().items()}
        return {plan.key: result[plan.key] for plan in self.plans if plan.key in result}

    def factors(
        self,
        part: list[Key] | None,
        raw: bool = False,
        hear: Callable[[Statistic], Tensor | float] | None = None,
    ) -> dict[Key, list[tuple[Factor, Factor | None]]]:
        """Compute the factors of some groups in one pass over the data.

        Args:
            part: The groups. None: all.
            raw: Whether the factors stay where they were computed, in the same dtype.
            hear: Gives a statistic the events of the pass, and returns the loss's scale.
        """
        statistic, scale = self._moments(part, hear or self._hear)
        self.add_over_ranks(statistic)
        plans = [plan for plan in self.plans if part is None or plan.key in part]
        held = [plan for plan in plans if self._holds(plan.key)]
        return self.factors_of(statistic, scale, {}, statistic.last_uses(held), plans, raw)

    def _moments(
        self, keys: list[Key] | None, hear: Callable[[Statistic], Tensor | float]
    ) -> tuple[CovarianceStatistic, Tensor | float]:
        """Pass over the data; return the moments for some groups, or all, and the loss's scale."""
        plans = self.plans
        usages = {u for plan in plans if plan.key in (keys or ()) for u in plan.all_usages}
        self._outdated = True
        while self._outdated:  # a later batch may show that other parameters have factors
            self._outdated = self._recording = False
            statistic = self.new_statistic()
            listener = statistic if keys is None else Selected(statistic, usages)
            scale = hear(listener)
            self.share_uses()
        if keys is not None and self.plans != plans:
            raise RuntimeError(
                "The model, or the data, have changed between two passes: parameters are used in "
                "other ways than before. Each pass must see the same."
            )
        return statistic, scale

    def _hear(self, statistic: Statistic) -> Tensor | float:
        """Give a statistic the events of the pass for the factors; return the loss's scale."""
        return self._gather(statistic, "KFAC factors", "signs")

    # ---- memory ----------------------------------------------------------------------------------
    def look_at_all(self) -> Measure:
        """See all batches, without back-propagation, to know how the model uses its parameters."""
        measure = Measure()
        fisher_type, self.fisher_type = self.fisher_type, FisherType.FORWARD_ONLY
        try:
            self._gather(measure, "Layers", "signs")
            self.share_uses()
        finally:
            self.fisher_type = fisher_type
        return measure

    def memory(self) -> MemoryPlan:
        """Look at all batches, and return how much memory is needed for each group."""
        measure, plans = self.look_at_all(), self.plans
        names = list(measure.num_positions)
        seen = self.collective.gather(
            ([encode(u) for u in names], list(measure.num_positions.values()), self._largest_batch)
        )
        num_positions: dict[Usage, int] = {}
        for codes, numbers, _ in seen:
            for code, number in zip(codes, numbers, strict=True):
                usage = decode(code)
                num_positions[usage] = max(num_positions.get(usage, 0), number)
        rows = [
            memory_of(
                plan,
                num_positions,
                batch_size=max(largest for *_, largest in seen),
                itemsizes=(self.risk.dtype.itemsize, self.raw.itemsize, self.like.itemsize),
                max_factor_size=self.max_factor_size,
                counts_tokens=self.counts_tokens,
                decomposed=self.decomposes,
            )
            for plan in plans
        ]
        statistic = self.new_statistic()
        units = connected([set(statistic.keys(plan)) for plan in plans])
        offloads = self.like.device != self.raw.device
        passes = split_into_passes(rows, units, self.memory_budget, offloads)
        return MemoryPlan(rows, passes, offloads)

    def parts(self) -> list[list[Key] | None]:
        """Return the groups of each pass over the data; None for all, whichever they are."""
        if self.memory_budget is None:
            return [None]
        memory = self.memory()
        return [[memory.rows[i].names for i in part] for part in memory.passes]

    # ---- data on several ranks -------------------------------------------------------------------
    def share_uses(self) -> None:
        """Learn how the model uses its parameters on other ranks."""
        if self.collective.alone:
            return
        before = set(self._diagonal)
        self.know(*known_to_any(self.collective, self._usages, self._diagonal))
        self._check_plans()
        self._outdated = self.collective.any(self._outdated or before != self._diagonal)

    def add_over_ranks(self, statistic: CovarianceStatistic) -> None:
        """Add moments over the ranks, which choose who of them holds each block."""
        if self.collective.alone:
            return
        keys = {plan.key: statistic.keys(plan) for plan in self.plans}
        self.assign(keys)
        owners = {key: self.only_holder(group) for group, all_ in keys.items() for key in all_}
        add_moments(self.collective, statistic.moments, owners, self.like)

    def assign(self, keys: dict[Key, list[Hashable]]) -> None:
        """Choose which ranks hold each block.

        Args:
            keys: By group: what it depends on. Those with something in common are held together.
        """
        plans, size = self.plans, self.collective.size
        num_holders = max(1, round(self.worker_fraction * size))
        holders = assign(plans, keys, size, num_holders)
        self._holders = {
            plan.key: list(range(size)) if plan.diagonal else ranks
            for plan, ranks in zip(plans, holders, strict=True)
        }

    def holders(self, key: Key) -> list[int]:
        """Return the ranks that hold a block, the one that decomposes it first."""
        return self._holders.get(key, list(range(self.collective.size)))

    def only_holder(self, key: Key) -> int | None:
        """Return the only rank that holds a block, or None if there are more."""
        holders = self.holders(key)
        return holders[0] if len(holders) == 1 else None

    def _holds(self, key: Key) -> bool:
        """Return whether this rank holds a block."""
        return self.collective.rank in self.holders(key)

    # ---- results ---------------------------------------------------------------------------------
    def factors_of(
        self,
        statistic: CovarianceStatistic,
        scale: Tensor | float,
        diagonals: dict[str, DiagonalLinearOperator],
        last: dict[Key, set[Hashable]] | None = None,
        plans: list[GroupPlan] | None = None,
        raw: bool = False,
    ) -> dict[Key, list[tuple[Factor, Factor | None]]]:
        """Return the factors of each group, as :meth:`blocks` does.

        Args:
            statistic: The moments of the data.
            scale: The scale c of the loss.
            diagonals: The blocks of parameters that are in no supported layer.
            last: By group: keys of moments that may become its factors. Others are copied.
            plans: The groups; None for all.
            raw: Whether factors stay where they were computed, in the same dtype.
        """
        like = self.raw if raw else self.like
        identity = self.fisher_type is FisherType.FORWARD_ONLY
        last = {} if last is None else last
        result: dict[Key, list[tuple[Factor, Factor | None]]] = {}
        for plan in self.plans if plans is None else plans:
            if plan.diagonal and plan.key[0] in diagonals:
                result[plan.key] = [(diagonals[plan.key[0]], None)]
            elif not plan.diagonal and self._holds(plan.key):
                owned = last.get(plan.key, set())
                result[plan.key] = statistic.factors(plan, scale, like, identity, owned)
        return result

    def _diagonal_blocks(self) -> dict[str, DiagonalLinearOperator]:
        """Return the exact diagonal of the GGN for parameters that are in no supported layer."""
        if not self._diagonal:
            return {}
        computer = GGNDiagonalComputer(
            **self._arguments,
            params=self.risk.params,
            check_deterministic=False,
            num_data=self.risk.num_data,
            names=[name for name in self.risk.params if name in self._diagonal],
            process_group=self.collective.process_group,
        )
        entries = computer.compute()
        return {
            name: DiagonalLinearOperator([d.flatten().to(self.like.device, self.like.dtype)])
            for name, d in entries.items()
        }

    def compute(self) -> tuple[dict[Key, Any], dict[Key, Any], list[ParamGroup]]:
        """Compute the factors in one pass over the data.

        Returns:
            Input covariances, gradient covariances (dicts keyed by the tuple of a group's parameter
            names; a bias alone has no input covariance), and the list of groups. A covariance is a
            tensor, or a diagonal operator where it is wider than ``max_factor_size``. For a weight
            with several blocks, it is a tensor ``[g, d, d]``, or a list if they have different
            sizes or are diagonal. Those of groups that other ranks hold are missing.
        """
        inputs, gradients = {}, {}
        for key, blocks in self.blocks().items():
            gradients[key] = stacked([B for B, _ in blocks])
            if blocks[0][1] is not None:
                inputs[key] = stacked([A for _, A in blocks])
        return inputs, gradients, self.mapping


def _may_have_batches(data: Any) -> bool:
    """Return whether there may be data here; other ranks may have some, if there are none."""
    return not hasattr(data, "__len__") or len(data) > 0


def stacked(factors: list[Factor]) -> Any:
    """Return a single factor as it is, and several in one tensor, if they fit into one."""
    if len(factors) == 1:
        return factors[0]
    shapes = {factor.shape for factor in factors if isinstance(factor, Tensor)}
    all_tensors = all(isinstance(factor, Tensor) for factor in factors)
    return torch.stack(factors) if all_tensors and len(shapes) == 1 else factors
