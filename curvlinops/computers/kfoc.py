"""The Kronecker product nearest to each block of the curvature, by any backend of KFAC.

Its factors are the leading singular vectors of a linear map, which
:class:`~curvlinops.computers.singular_vectors.SingularVectorSearch` finds from products, and
:class:`~curvlinops.computers.products.ProductStatistic` multiplies with in a pass over the data. No
block is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from curvlinops._scalars import as_integer
from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.across_ranks import add_totals
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import widened
from curvlinops.computers.products import ProductStatistic
from curvlinops.computers.singular_vectors import SingularVectorSearch, positive_part
from curvlinops.computers.statistics import Factor
from curvlinops.computers.usages import Usage
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac_utils import FisherType

#: The Fisher types, and what else may keep the search from converging.
_SAMPLES = {
    FisherType.TYPE2: "",
    FisherType.MC: " (All passes must see the data in the same order to have the same samples.)",
}


@dataclass
class _Block:
    """The search for the factors of a block."""

    search: SingularVectorSearch
    d_out: int
    d_in: int


class KFOCComputer(KFACComputer):
    """Computes the factors of the Kronecker product nearest to each block of the curvature.

    The arguments are those of :class:`~curvlinops.KFOCLinearOperator`. All blocks are searched for
    in the same passes over the data. Besides the factors, up to six matrices of the size of each
    factor are held.

    Attributes:
        num_passes: How many passes over the data with back-propagation there were.
    """

    def __init__(
        self,
        *args: Any,
        loss_terms: str = "signs",
        max_iter: int = 100,
        tol: float | None = None,
        **kwargs: Any,
    ):
        self.max_iter, self.tol = check_accuracy(max_iter, tol)
        super().__init__(*args, loss_terms=loss_terms, **kwargs)
        self.loss_terms = "exact"
        self.num_passes = 0

    def _check_options(self) -> None:
        """Raise if an option has no meaning here; see the base class."""
        if self.fisher_type not in _SAMPLES:
            raise ValueError(
                f"KFOC needs fisher_type='type-2' or 'mc', got {str(self.fisher_type)!r}."
            )
        if self.memory_budget is not None:
            raise ValueError(
                "KFOC searches for all blocks at once: it has no memory_budget. Leave it out."
            )

    @property
    def counts_tokens(self) -> bool:
        """Whether input factors of embeddings are diagonal: they are the best matrices."""
        return False

    def _needs_examples(self, usage: Usage) -> bool:
        """Return True: the matrices that are approximated are each example's gradients."""
        return True

    def blocks(self) -> dict[Key, list[tuple[Factor, Factor | None]]]:
        """Compute the factors, in as many passes over the data as are necessary.

        Returns:
            As :meth:`KFACComputer.blocks`.
        """
        self.look_at_all()
        like = self.raw
        plans = self.plans
        searches = {plan.key: self._searches(plan, like) for plan in plans if plan.d_in}
        exact: dict[Key, list[Tensor | None]] = {
            plan.key: [None] * len(plan.blocks)
            for plan in plans
            if not (plan.d_in or plan.diagonal)
        }
        scale: Tensor | float = 1.0
        self.num_passes = 0
        for half in range(2 * self.max_iter):
            adjoint = half % 2 == 1
            operands = _operands(searches)
            if half == 0:  # what has no input factor needs a single pass
                operands |= exact
            if not operands:
                break
            totals, scale = self._products(plans, operands, adjoint)
            if half == 0:
                exact = {key: totals[key] for key in exact}
            self.num_passes += 1
            _hand_over(searches, totals, adjoint)
        if self.plans != plans:
            raise RuntimeError(
                "The model, or the data, have changed between two passes: parameters are used in "
                "other ways than before. Each pass must see the same."
            )
        self._warn_unless_converged(searches)
        diagonals = self._diagonal_blocks()
        result: dict[Key, list[tuple[Factor, Factor | None]]] = {}
        for plan in plans:
            if plan.diagonal:
                result[plan.key] = [(diagonals[plan.key[0]], None)]
            elif plan.d_in:
                result[plan.key] = [
                    self._factors(block, float(scale), self.like) for block in searches[plan.key]
                ]
            else:
                result[plan.key] = self._exact(plan, exact[plan.key], scale, self.like)
        if not self.collective.alone:  # every rank has searched for all blocks
            self.assign({plan.key: [plan.key] for plan in plans})
        return {key: blocks for key, blocks in result.items() if self._holds(key)}

    def _products(
        self, plans: Sequence[GroupPlan], operands: dict[Key, list[Tensor | None]], adjoint: bool
    ) -> tuple[dict[Key, list[Tensor | None]], Tensor | float]:
        """Pass over the data; return the products of all blocks, and the loss's scale."""
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        statistic = ProductStatistic(plans, shapes, operands, adjoint, self.max_factor_size)
        scale = self._gather(statistic, "KFOC factors", "signs")
        add_totals(self.collective, statistic.totals(), {}, self.raw)
        return {plan.key: totals for plan, totals in statistic.totals()}, scale

    def _searches(self, plan: GroupPlan, like: Tensor) -> list[_Block]:
        """Return the searches for the blocks of a group with input factor."""
        one = widened(like.new_ones(()))
        tol = max(1e-9, 32 * torch.finfo(one.dtype).eps) if self.tol is None else self.tol
        identity = one.expand(plan.d_in)
        if plan.d_in <= self.max_factor_size:
            identity = identity.diag()
        groups = plan.format.groups
        return [
            _Block(SingularVectorSearch(identity, tol), (stop - start) // groups, plan.d_in)
            for start, stop in plan.blocks
            for _ in range(groups)
        ]

    # ---- results ---------------------------------------------------------------------------------
    def _exact(
        self, plan: GroupPlan, totals: list[Tensor | None], scale: Tensor | float, like: Tensor
    ) -> list[tuple[Factor, Factor | None]]:
        """Return the blocks of a group without input factor."""
        result: list[tuple[Factor, Factor | None]] = []
        for (start, stop), total in zip(plan.blocks, totals, strict=True):
            if total is None:  # never called
                result.append((self._zeros(stop - start, like), None))
            else:
                result.append((_as_factor((total * scale).to(like.device, like.dtype)), None))
        return result

    def _factors(self, block: _Block, scale: float, like: Tensor) -> tuple[Factor, Factor]:
        """Return the factors of a block, of equal norm."""
        search = block.search
        if search.left is None:
            return self._zeros(block.d_out, like), self._zeros(block.d_in, like)
        root = (scale * search.sigma) ** 0.5
        B, A = (
            _as_factor((positive_part(X) * root).to(like.device, like.dtype))
            for X in (search.left, search.right)
        )
        return B, A

    def _zeros(self, width: int, like: Tensor) -> Factor:
        """Return a factor that is zero."""
        wide = width > self.max_factor_size
        return _as_factor(like.new_zeros(width) if wide else like.new_zeros(width, width))

    def _warn_unless_converged(self, searches: dict[Key, list[_Block]]) -> None:
        """Warn of blocks whose search was cut short."""
        open_ = {
            key: max(block.search.residual for block in parts if not block.search.done)
            for key, parts in searches.items()
            if not all(block.search.done for block in parts)
        }
        if open_:
            names = ", ".join(repr(name) for key in open_ for name in key)
            warn(
                f"The nearest Kronecker products of {names} have not converged in "
                f"max_iter={self.max_iter} iterations: the largest relative residual is "
                f"{max(open_.values()):.1e}. Increase max_iter or tol.{_SAMPLES[self.fisher_type]}",
                stacklevel=2,
            )


def check_accuracy(max_iter: int, tol: float | None) -> tuple[int, float | None]:
    """Return valid limits of the iteration; raise a ValueError otherwise."""
    max_iter = as_integer("max_iter", max_iter, 1)
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, or None, got {tol}.")
    return max_iter, tol


def _operands(searches: dict[Key, list[_Block]]) -> dict[Key, list[Tensor | None]]:
    """Return what the next pass is to multiply, for groups that are not done."""
    operands: dict[Key, list[Tensor | None]] = {}
    for key, parts in searches.items():
        wanted = [None if block.search.done else block.search.operand for block in parts]
        if any(operand is not None for operand in wanted):
            operands[key] = wanted
    return operands


def _hand_over(
    searches: dict[Key, list[_Block]], totals: dict[Key, list[Tensor | None]], adjoint: bool
) -> None:
    """Give each search the result of a pass."""
    for key, parts in searches.items():
        for block, total in zip(parts, totals.get(key, ()), strict=False):
            search = block.search
            if total is None:  # its layer was never called, or it was done before
                search.done, search.residual = True, 0.0
            elif adjoint:
                search.take_adjoint(total.to(search.operand.dtype))
            else:
                search.take_image(total.to(search.operand.dtype))


def _as_factor(tensor: Tensor) -> Factor:
    """Return a matrix as it is, and a diagonal as operator."""
    return DiagonalLinearOperator([tensor]) if tensor.ndim == 1 else tensor


__all__ = ["KFOCComputer", "check_accuracy"]
