"""What statistics of whole gradients share: they gather the events of each group of parameters.

The gradients of a group are ``G = Σ_s g_s a_sᵀ`` ``[d_out, d_in]``, one for each example and loss
vector: the sum runs over the positions of all calls of its layers. A bias alone has ``Σ_s g_s``, a
normalisation layer ``[Σ_s a_s ⊙ g_s, Σ_s g_s]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Positions, Tokens, widened
from curvlinops.computers.usages import Usage

# Entries of what is formed for several examples at once; more do not fit into a CPU's caches.
_ENTRIES = 2**20


@dataclass
class Event:
    """A layer's call: inputs, and the output gradients ``[V, n, S, d_out]`` of loss vectors."""

    usage: Usage
    positions: Positions | None
    gradient: Tensor

    def weighted(self) -> Tensor:
        """Return the gradients, without those of tokens whose input is zero."""
        gradient = widened(self.gradient)
        if isinstance(self.positions, Tokens):
            gradient = gradient * self.positions.weights.unsqueeze(-1)
        return gradient

    def inputs(
        self,
        plan: GroupPlan,
        dtype: torch.dtype,
        examples: slice = slice(None),
        constant: bool = True,
    ) -> Tensor:
        """Return the inputs ``[n, S, groups, d_in]``, with the constant one of a joint bias."""
        assert self.positions is not None
        rows = self.positions.expanded()[examples].to(dtype)
        rows = rows.unflatten(-1, (plan.format.groups, -1))
        if not plan.joint or not constant:
            return rows
        ones = rows.new_full((*rows.shape[:-1], 1), float(self.usage.bias is not None))
        if rows.stride(-1) == 1:
            return torch.cat([rows, ones], dim=-1)
        # patches are stored by columns, which are then copied line by line
        return torch.cat([rows.movedim(-1, 0), ones.movedim(-1, 0)]).movedim(0, -1)


@dataclass
class Group:
    """What is gathered of a group.

    Attributes:
        plan: The group's plan.
        totals: The result for each block; None for those never called.
        calls: Number of calls of its layers in this batch.
        events: The calls whose gradients have come in this back-propagation.
    """

    plan: GroupPlan
    totals: list[Tensor | None]
    calls: int = 0
    events: list[Event] = field(default_factory=list)

    def add(self, block: int, new: Tensor) -> None:
        """Add to the result for a block, which may become the memory of the first summand."""
        before = self.totals[block]
        self.totals[block] = new.contiguous() if before is None else before.add_(new)


G = TypeVar("G", bound=Group)


class GroupStatistic(Generic[G]):
    """Sums over the gradients of single examples, for each group.

    A group whose layers are called once in a batch is treated as soon as the gradients of its
    output exist; the others when the back-propagation is over. A subclass implements what is added.

    Args:
        plans: All groups of the model.
        groups: Those that are listened to.
        shapes: The parameters' shapes.
    """

    def __init__(
        self,
        plans: Sequence[GroupPlan],
        groups: Sequence[G],
        shapes: Mapping[str, Sequence[int]],
    ):
        self._groups = groups
        self._shapes = shapes
        self._positions: dict[tuple[Usage, int], Positions] = {}
        self._diagonal = {name for plan in plans if plan.diagonal for name in plan.key}
        self._by_usage: dict[Usage, list[G]] = {
            usage: [] for plan in plans for usage in (*plan.usages, *plan.tied)
        }
        for group in groups:
            for usage in (*group.plan.usages, *group.plan.tied):
                self._by_usage[usage].append(group)

    # ---- what a statistic implements -------------------------------------------------------------
    def _add_vectors(self, group: G, block: int, rows: Tensor) -> None:
        """Add gradients ``[V, n, d]`` of a bias or a normalisation layer."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _add_vectors.")

    def _add_matrices(self, group: G, block: int, matrices: Tensor) -> None:
        """Add gradients ``[n, d_out, d_in]`` of a few examples."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _add_matrices.")

    def _add_calls(self, group: G, first: int, events: list[Event]) -> None:
        """Add the calls of the layers of blocks ``first, ..., first + groups - 1``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _add_calls.")

    def _finish_batch(self, group: G) -> None:
        """Add what waited for all vectors, and forget the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _finish_batch.")

    # ---- events ----------------------------------------------------------------------------------
    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """A layer was called, for the ``index``-th time in this way in this batch."""
        groups = self._of(usage)
        if groups:
            self._positions[usage, index] = positions
        for group in groups:
            group.calls += 1

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """The gradients ``[V, n, S, d_out]`` of V loss vectors at a layer's output exist."""
        for group in self._of(usage):
            group.events.append(Event(usage, self._positions.get((usage, index)), gradient))
            if group.calls == 1:  # there is nothing to wait for
                self._process(group)

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        for group in self._groups:
            self._process(group)

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        for group in self._groups:
            self._finish_batch(group)
            group.calls = 0
        self._positions = {}

    def _of(self, usage: Usage) -> list[G]:
        """Return the groups of a usage that are listened to."""
        if usage in self._by_usage:
            return self._by_usage[usage]
        if all(part.name in self._diagonal for part in usage.parts.values()):
            return []  # these parameters have no factors, as they are used elsewhere, too
        raise RuntimeError(
            f"{usage.label} was not called in this way before: the model, or the data, have "
            "changed between two passes. Each pass must see the same."
        )

    # ---- gradients -------------------------------------------------------------------------------
    def _process(self, group: G) -> None:
        """Add what comes from one back-propagation."""
        events, group.events = group.events, []
        if not events:
            return
        plan = group.plan
        if plan.format.is_norm:
            self._add_vectors(group, 0, _norm_gradients(plan, events))
        elif "W" not in plan.group:
            for block, rows in enumerate(plan.blocks):
                gradients = [
                    widened(event.gradient).sum(2)
                    for event in events
                    if event.usage.rows("b") == rows
                ]
                if gradients:
                    self._add_vectors(group, block, sum(gradients[1:], gradients[0]))
        elif plan.tied:
            for matrices in self._tied_gradients(plan, events):
                self._add_matrices(group, 0, matrices)
        else:
            for index, rows in enumerate(plan.blocks):
                used = [event for event in events if event.usage.rows("W") == rows]
                if used:
                    self._add_calls(group, index * plan.format.groups, used)

    def _tied_gradients(self, plan: GroupPlan, events: list[Event]) -> Iterator[Tensor]:
        """Yield gradients ``[n, V, d (+ 1)]`` of a Linear whose weight is an embedding, too."""
        num_vectors, n = events[0].gradient.shape[:2]
        size = self._shapes[plan.group["W"]][0]
        for v in range(num_vectors):
            for examples in chunks(n, size * plan.d_in):
                yield _tied_gradients(plan, events, v, examples, size)

    # ---- sums of several passes ------------------------------------------------------------------
    def merge(self, other: GroupStatistic[G]) -> None:
        """Add what another statistic of some of these groups gathered; it must not be used then."""
        groups = {group.plan.key: group for group in self._groups}
        for others in other._groups:
            for block, total in enumerate(others.totals):
                if total is not None:
                    groups[others.plan.key].add(block, total)

    def scale(self, inputs: float, gradients: float) -> None:
        """Multiply the sums of products of gradients, which all of them are."""
        for group in self._groups:
            group.totals = [None if total is None else total * gradients for total in group.totals]

    # ---- results ---------------------------------------------------------------------------------
    def totals(self) -> Iterator[tuple[GroupPlan, list[Tensor | None]]]:
        """Yield each group and the results for its blocks; None for those never called."""
        for group in self._groups:
            yield group.plan, group.totals


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors one behind the other, and a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def fits(entries: int) -> bool:
    """Return whether so many entries may be held at once, for all examples of a batch."""
    return entries <= _ENTRIES


def chunks(n: int, entries: int) -> list[slice]:
    """Split n examples into parts of at most some 2²⁰ entries, or one example.

    Args:
        n: The number of examples.
        entries: The number of entries of each.
    """
    size = max(1, _ENTRIES // max(entries, 1))
    return [slice(start, start + size) for start in range(0, n, size)]


def _norm_gradients(plan: GroupPlan, events: list[Event]) -> Tensor:
    """Return the gradients ``[V, n, d]`` of a normalisation layer's group."""
    like = events[0].gradient
    width = plan.d_out // len(plan.group)
    parts = {role: widened(like.new_zeros(*like.shape[:2], width)) for role in plan.group}
    for event in events:
        gradient = widened(event.gradient)
        if "W" in parts and event.usage.weight is not None:
            assert event.positions is not None
            inputs = event.positions.expanded().to(gradient.dtype)
            parts["W"] = parts["W"] + torch.einsum("nsd, vnsd -> vnd", inputs, gradient)
        if "b" in parts and event.usage.bias is not None:
            parts["b"] = parts["b"] + gradient.sum(2)
    return torch.cat([parts[role] for role in plan.group], dim=-1)


def _tied_gradients(
    plan: GroupPlan, events: list[Event], v: int, examples: slice, size: int
) -> Tensor:
    """Return gradients ``[n, V, d (+ 1)]`` of some examples for a loss vector."""
    like = widened(events[0].gradient[v, examples])
    matrices = like.new_zeros(len(like), size, plan.d_in)
    for event in events:
        g = widened(event.gradient[v, examples])  # [n, S, o]
        if isinstance(event.positions, Tokens):
            # weights have the model's dtype, which may be wider than that of the gradients
            g = g * event.positions.weights[examples].unsqueeze(-1).to(g.dtype)
            index = event.positions.indices[examples].unsqueeze(-1).expand_as(g)
            # a joint bias is the Linear's alone
            matrices[..., : g.shape[-1]].scatter_add_(1, index, g)
        else:
            matrices.baddbmm_(g.mT, event.inputs(plan, g.dtype, examples)[:, :, 0])
    return matrices


__all__ = ["Event", "Group", "GroupStatistic", "chunks", "fits", "joined"]
