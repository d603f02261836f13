"""Raw sums of Kronecker factors, to which batches are added one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from curvlinops.computers._base import Increment, Key
from curvlinops.computers.encoding import decode, encode
from curvlinops.computers.events import Sums
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.distributed import Collective
from curvlinops.kfac_utils import FisherType, KFACType, Precision
from curvlinops.risk.data import NoData
from curvlinops.risk.model import ModelFunction

S = TypeVar("S", bound=Sums)
_FORMAT_VERSION = 1
_TERMS = 2**40  # more loss terms than a rank will ever see


class Accumulator(Generic[S]):
    """What accumulators of KFAC and EKFAC share: raw sums, to which batches are added.

    Arguments as :class:`KFACAccumulator`. A subclass implements how sums become an operator, and
    plain values.
    """

    _OPERATOR: ClassVar[Any]  # a subclass of KFACLinearOperator
    _SIGNS: ClassVar[str]

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        seed: int = 2147483647,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        batch_size_fn: Callable[[Any], int] | None = None,
        backend: str = "hooks",
        *,
        decay: float | None = None,
        first_term: int | None = None,
        unsupported: str = "raise",
        loss_terms: str = "signs",
        max_factor_size: int = 8192,
        process_group: Any = None,
        worker_fraction: float = 1.0,
        precision: Precision | None = None,
    ):
        computer = self._OPERATOR._computer_of(backend)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, or None, got {decay}.")
        if first_term is not None and first_term < 0:
            raise ValueError(f"first_term must not be negative, got {first_term}.")
        self._computer: Any = computer(
            model_func,
            loss_func,
            params,
            NoData(),
            check_deterministic=False,
            num_data=1,  # there is no pass over the data
            seed=seed,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            kfac_approx=kfac_approx,
            num_per_example_loss_terms=num_per_example_loss_terms,
            separate_weight_and_bias=separate_weight_and_bias,
            batch_size_fn=batch_size_fn,
            unsupported=unsupported,
            loss_terms=loss_terms,
            max_factor_size=max_factor_size,
            process_group=process_group,
            worker_fraction=worker_fraction,
            precision=precision,
        )
        self._arguments: dict[str, Any] = {
            "model_func": model_func,
            "loss_func": loss_func,
            "batch_size_fn": batch_size_fn,
        }
        self.decay = None if decay is None else float(decay)
        #: The number of batches that were added.
        self.num_updates = 0
        #: The number of examples that were added.
        self.num_data = 0
        #: The index of the next loss term, which fixes its random numbers.
        self.next_term = _TERMS * self._collective.rank if first_term is None else first_term
        self._sums: S | None = None
        self._diagonals: dict[str, Tensor] = {}
        self._normalizer: Tensor | float = 0.0
        self._weight = 0.0  # of all updates

    # ---- what a subclass implements --------------------------------------------------------------
    def _new_sums(self) -> S:
        """Return sums without summands."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _new_sums.")

    def _parts(self, sums: S, scale: Tensor | float, diagonals: Any) -> dict[Key, list[Any]]:
        """Return what the blocks of the operator are made of."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _parts.")

    def _add_over_ranks(self, sums: S) -> None:
        """Add sums over the ranks, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _add_over_ranks.")

    def _encoded(self, sums: S) -> list[Any]:
        """Return sums as tensors and plain values."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _encoded.")

    def _decoded(self, code: list[Any]) -> S:
        """Return the sums that :meth:`_encoded` had."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _decoded.")

    # ---- adding batches --------------------------------------------------------------------------
    def update(self, X: Any, y: Any) -> None:
        """Add a batch, with a forward and a backward pass of its own.

        The model and its gradients are left as they are. If there is an error, nothing was added.

        Args:
            X: The inputs, a tensor or a mapping.
            y: The targets.
        """
        computer = self._computer
        sums, increment = computer.add_batch(self._new_sums, X, y, self.next_term, self._SIGNS)
        self._add(sums, increment, X, y)

    @contextmanager
    def observe(self, X: Any, y: Any, loss_scale: float = 1.0) -> Iterator[None]:
        """Add the batch of a training step, whose forward and backward pass happen inside.

        This costs the products of inputs and of gradients only. It is for
        ``fisher_type="empirical"``, whose loss vectors are those of the training step, and one loss
        term per example; for the backend ``"hooks"``; and for parameters that are the module's own.
        If there is an error inside, nothing was added.

        Args:
            X: The inputs, of which the model is evaluated exactly once.
            y: The targets.
            loss_scale: By what the loss is multiplied before its backward pass, to accumulate
                gradients or to train in half precision.

        Raises:
            ValueError: If the step has not what is needed.
            RuntimeError: If the model was not evaluated and differentiated once.

        Example:
            >>> import torch
            >>> from curvlinops import KFACAccumulator
            >>> model, loss_func = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
            >>> params = dict(model.named_parameters())
            >>> K = KFACAccumulator(model, loss_func, params, fisher_type="empirical", decay=0.95)
            >>> X, y = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
            >>> with K.observe(X, y):
            ...     loss_func(model(X), y).backward()
            >>> K.to_operator().shape
            torch.Size([8, 8])
        """
        computer = self._computer
        if not isinstance(computer, HooksKFACComputer):
            raise ValueError("observe() needs backend='hooks'; update(X, y) runs with any.")
        if computer.fisher_type is not FisherType.EMPIRICAL:
            raise ValueError(
                "observe() reuses the gradients of the training step, which are those of "
                f"fisher_type='empirical', not {str(computer.fisher_type)!r}: use update(X, y)."
            )
        with computer.step(self._new_sums, X, y, loss_scale) as found:
            yield
        ((sums, increment),) = found
        terms = increment.num_data  # one per example
        self._add(sums, increment._replace(next_term=self.next_term + terms), X, y)

    def _add(self, sums: S, increment: Increment, X: Any, y: Any) -> None:
        """Add the sums of a batch."""
        n, next_term, normalizer = increment
        names = self._computer.diagonal
        self._check_diagonals("this batch uses")
        diagonals = self._diagonals_of(names, X, y, n, normalizer)
        mean = self._computer.risk.reduction == "mean"
        if self.decay is not None:
            # Each batch has the same weight, however many examples it has.
            sums.scale(1 / n, 1 / n if mean else 1.0)
            normalizer = normalizer / n
            diagonals = {k: d / n if mean else d for k, d in diagonals.items()}
            self._fade(self.decay)
        if self._sums is not None:
            sums.merge(self._sums)  # of batches in which layers may not have been called
        self._sums = sums
        for name, d in diagonals.items():
            self._diagonals[name] = self._diagonals[name] + d if name in self._diagonals else d
        self._normalizer = self._normalizer + normalizer
        self._weight += 1
        self.num_updates += 1
        self.num_data += n
        self.next_term = next_term

    def _fade(self, decay: float) -> None:
        """Multiply all sums."""
        if self._sums is not None:
            self._sums.scale(decay, decay)
        self._diagonals = {name: decay * d for name, d in self._diagonals.items()}
        self._normalizer = decay * self._normalizer
        self._weight *= decay

    def _diagonals_of(
        self, names: list[str], X: Any, y: Any, n: int, normalizer: Tensor | float
    ) -> dict[str, Tensor]:
        """Return the raw diagonal of the GGN for parameters without factors."""
        if not names:
            return {}
        risk = self._computer.risk
        computer = GGNDiagonalComputer(
            **self._arguments,
            params=risk.params,
            data=[(X, y)],
            check_deterministic=False,
            num_data=n,
            names=[name for name in risk.params if name in names],
        )
        scale = float(normalizer) if risk.reduction == "mean" else 1.0
        if scale == 0.0:  # no loss terms
            return {name: torch.zeros_like(risk.params[name].detach()) for name in names}
        return {name: scale * d for name, d in computer.compute().items()}

    # ---- results ---------------------------------------------------------------------------------
    def to_operator(self) -> Any:
        """Return the operator of all batches so far; more can be added afterwards.

        With a process group it is that of the batches of all ranks, which all call this.

        Raises:
            RuntimeError: If no batch was added, or factors have non-finite values; or if ranks
                have other values of ``decay``, or use parameters in other ways.
        """
        computer, collective = self._computer, self._collective
        if not collective.any(self._sums is not None):
            raise RuntimeError("There are no data yet: call update(X, y) first.")
        sums, normalizer, weight, raw = self._sums, self._normalizer, self._weight, self._diagonals
        if not collective.alone:
            self._check_ranks()
            sums, own_sums = self._new_sums(), sums
            if own_sums is not None:
                sums.merge(copy.deepcopy(own_sums))
            self._add_over_ranks(sums)
            weight = max(collective.gather(weight))
            zeros = {n: torch.zeros_like(computer.risk.params[n]) for n in computer.diagonal}
            own = torch.as_tensor(normalizer, dtype=torch.float64, device=collective.device)
            normalizer, *added = collective.sum([own, *(zeros | raw).values()])
            raw = dict(zip(zeros | raw, added, strict=True))
        assert sums is not None
        like = computer.like
        scale: Tensor | float
        if computer.risk.reduction == "mean":
            scale = 1 / normalizer
        else:
            scale = 1.0 if self.decay is None else 1 / weight
        diagonals = {
            name: DiagonalLinearOperator([(d * scale).to(like.device, like.dtype).flatten()])
            for name, d in raw.items()
        }
        with torch.no_grad():
            parts = self._parts(sums, scale, diagonals)
        return self._OPERATOR._of(computer, parts)

    def _check_ranks(self) -> None:
        """Learn how other ranks use parameters, and raise on all if that does not fit together."""
        decays = self._collective.gather(self.decay)
        if any(decay != decays[0] for decay in decays):
            raise RuntimeError(f"Accumulators need the same decay on all ranks, but have {decays}.")
        self._computer.share_uses()
        with self._collective.together():
            self._check_diagonals("another rank uses")

    def _check_diagonals(self, who: str) -> None:
        """Raise if parameters had factors so far that are now used in other ways."""
        new = sorted(set(self._computer.diagonal) - set(self._diagonals))
        if self.num_updates and new:
            raise RuntimeError(
                f"The parameters {new} had factors so far, but {who} them in other ways than in "
                "layers. Leave them out of params, or begin with such a batch."
            )

    @property
    def _collective(self) -> Collective:
        collective: Collective = self._computer.collective
        return collective

    def merge(self, other: Any) -> None:
        """Add the data of another accumulator, for the same parameters and with the same options.

        The result is that of one pass over both data. For random numbers that are not those of the
        other's loss terms, one of them begins with ``first_term`` (or has another ``seed``).

        Args:
            other: The other accumulator. It stays as it is.

        Raises:
            TypeError: If it is of another type.
            ValueError: If their options differ, or there is a moving average, which depends on the
                order of batches.
        """
        if type(other) is not type(self):
            raise TypeError(
                f"Only another {type(self).__name__} can be merged, got {type(other).__name__}."
            )
        self._check_options(other._options())
        if self.decay is not None:
            raise ValueError("Moving averages depend on the order of batches: use decay=None.")
        if other._sums is None:
            return
        if self._sums is not None and sorted(self._diagonals) != sorted(other._diagonals):
            raise ValueError(
                "Different parameters are used in other ways than in layers: "
                f"{sorted(self._diagonals)} and {sorted(other._diagonals)}. Leave these out of "
                "params."
            )
        self._computer.know(other._computer.usages, other._computer.diagonal)
        sums = self._new_sums()
        if self._sums is not None:
            sums.merge(self._sums)
        sums.merge(copy.deepcopy(other._sums))
        self._sums = sums
        for name, d in other._diagonals.items():
            self._diagonals[name] = self._diagonals[name] + d if name in self._diagonals else d
        self._normalizer = self._normalizer + other._normalizer
        self._weight += other._weight
        self.num_updates += other.num_updates
        self.num_data += other.num_data
        self.next_term = max(self.next_term, other.next_term)

    # ---- saving ----------------------------------------------------------------------------------
    def _options(self) -> dict[str, Any]:
        """Return what two accumulators must have in common."""
        computer = self._computer
        risk = computer.risk
        return {
            "type": type(self).__name__,
            "shapes": {name: list(p.shape) for name, p in risk.params.items()},
            "dtype": str(risk.dtype),
            "loss": computer.loss.name,
            "reduction": risk.reduction,
            "fisher_type": str(computer.fisher_type),
            "mc_samples": computer.mc_samples,
            "kfac_approx": str(computer.kfac_approx),
            "separate_weight_and_bias": computer.separate_weight_and_bias,
            "unsupported": computer.unsupported,
            "loss_terms": computer.loss_terms,
            "max_factor_size": computer.max_factor_size,
            "decay": self.decay,
        }

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise if options are not this accumulator's."""
        own = self._options()
        for name in dict.fromkeys([*own, *options]):
            a, b = own.get(name), options.get(name)
            if a != b:
                raise ValueError(
                    f"The accumulators differ in {name}: {a} and {b}. Make them with the same."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return all sums so far, as tensors and plain values, for ``torch.save``.

        Loaded into a new accumulator with the same arguments, they continue where this one stands,
        also in the middle of a pass over the data, with the same random numbers. With a process
        group, each rank has sums of its own data: each saves its own state, and loads that again.
        """
        return {
            "version": _FORMAT_VERSION,
            "options": self._options(),
            "num_updates": self.num_updates,
            "num_data": self.num_data,
            "next_term": self.next_term,
            "weight": self._weight,
            "normalizer": float(self._normalizer),
            "usages": [encode(usage) for usage in self._computer.usages],
            "diagonals": {name: d.clone() for name, d in self._diagonals.items()},
            "sums": None if self._sums is None else self._encoded(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; what was here before is forgotten.

        Args:
            state: The state, loaded on any device.

        Raises:
            ValueError: If it is of a newer format, or of an accumulator with other options.
        """
        if state["version"] > _FORMAT_VERSION:
            raise ValueError(
                f"The state has format {state['version']}, but this release of curvlinops reads "
                f"formats up to {_FORMAT_VERSION}. Update curvlinops to load it."
            )
        self._check_options(state["options"])
        device = self._computer.risk.device
        usages = [decode(code) for code in state["usages"]]
        self._computer.know(usages, state["diagonals"])
        self._sums = None if state["sums"] is None else self._decoded(state["sums"])
        self._diagonals = {n: d.to(device, copy=True) for n, d in state["diagonals"].items()}
        self._normalizer = state["normalizer"]
        self._weight = state["weight"]
        self.num_updates = state["num_updates"]
        self.num_data = state["num_data"]
        self.next_term = state["next_term"]


__all__ = ["Accumulator"]
