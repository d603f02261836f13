"""Computes the diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops._scalars import as_integer
from curvlinops.computers.diagonal_by_examples import ExamplesDiagonal, zeros
from curvlinops.computers.diagonal_by_layers import LayersDiagonal
from curvlinops.computers.diagonal_vectors import LossVectors
from curvlinops.distributed import collective_of
from curvlinops.risk import Batch, EmpiricalRisk, Loss, loss_entry
from curvlinops.risk.data import TermCounter
from curvlinops.risk.model import ModelFunction, device_of, refuse_sharded


class GGNDiagonalComputer:
    """Computes the diagonal of the generalized Gauss-Newton matrix, or of its Monte-Carlo estimate.

    The arguments are those of :class:`~curvlinops.GGNDiagonalLinearOperator`, and described there.

    Parameters of supported layers of an ``nn.Module`` are done by ``LayersDiagonal``, as long as it
    finds that its results are right. All others are done by ``ExamplesDiagonal``, which warns if
    that takes longer than usual.

    Args:
        names: The parameters whose entries are computed. Default: all of them.
    """

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        *,
        chunk_size: int | None = None,
        process_group: Any = None,
        names: Iterable[str] | None = None,
    ):
        collective = collective_of(process_group, device_of(params))
        with collective.together():
            self.mc_samples = as_integer("mc_samples", mc_samples, 0)
            at_once = None if chunk_size is None else as_integer("chunk_size", chunk_size, 1)
            self._chunk_size = at_once
            random = RandomSource(seed)
            self.loss: Loss = loss_entry(loss_func)[0]
            if not self.loss.closed_form:
                raise NotImplementedError(
                    f"{self.loss.name} has no closed form of its Hessian, which the diagonal of "
                    "the GGN needs: use nn.MSELoss, nn.CrossEntropyLoss or nn.BCEWithLogitsLoss, "
                    "or add the loss with register_loss."
                )
            refuse_sharded("GGNDiagonalLinearOperator", model_func, params)
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            needs_fixed_order=self.mc_samples > 0,
            collective=collective,
            purpose=f"GGNDiagonal, mc_samples={self.mc_samples}, seed={random.seed}",
        )
        self._vectors = LossVectors(self.loss, self.mc_samples, random)
        self._names = list(self.risk.params if names is None else names)
        is_module = self.risk.model is not None
        self._layers = LayersDiagonal(self.risk, self._names, self._vectors) if is_module else None
        self._examples: dict[tuple[str, ...], ExamplesDiagonal] = {}  # by names of parameters
        self._warned = False

    def compute(self) -> dict[str, Tensor]:
        """Compute the diagonal in one pass over the data.

        Returns:
            For each parameter name, the entries in the parameter's shape and dtype.
        """
        counter = self.risk.term_counter() if self.mc_samples else TermCounter()
        like = None
        if not self.risk.collective.alone:
            with torch.inference_mode(False):
                like = list(zeros(self._params).values())
        sums = self.risk.sum_over_data(
            lambda batch: self._batch(batch, counter), "GGN diagonal", like=like
        )
        pairs = zip(self._params.items(), sums, strict=True)
        with torch.inference_mode(False):
            return {name: total.to(p.dtype) for (name, p), total in pairs}

    @property
    def _params(self) -> dict[str, Tensor]:
        """The parameters whose entries are computed."""
        return {name: self.risk.params[name] for name in self._names}

    def _batch(self, batch: Batch, counter: TermCounter) -> tuple[list[Tensor], Tensor | float]:
        """Return the diagonal summed over a batch's loss terms, and the loss's normalizer."""
        squares: dict[str, Tensor] = {}
        found = None
        if self._layers is not None:
            found = self._layers.squares(batch, counter.position)
        if found is not None:
            squares, F, targets = found
        rest = tuple(name for name in self._names if name not in squares)
        if rest:
            added, F, targets = self._by_examples(rest).squares(batch, counter.position)
            squares = squares | added
        counter.advance(len(F))
        total = [squares[name] for name in self._names]
        if self.mc_samples > 1:
            total = [t / self.mc_samples for t in total]
        return total, self.loss.normalizer(F, targets, batch.n)

    def _by_examples(self, names: tuple[str, ...]) -> ExamplesDiagonal:
        """Return what computes the diagonal for any parameters."""
        if names not in self._examples:
            self._examples[names] = ExamplesDiagonal(
                self.risk, names, self._vectors, self._chunk_size, self._warn
            )
        return self._examples[names]

    def _warn(self, message: str) -> None:
        """Warn once."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)
