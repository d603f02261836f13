"""The eigenvalues of EKFAC: the exact diagonal of each block in the Kronecker factors' eigenbasis.

The curvature of a group is ``c Σ vec(G) vec(G)ᵀ``, with the gradients ``G = Σ_s g_s a_sᵀ`` of an
example and a loss vector. In the basis ``Q_g ⊗ Q_a`` its diagonal is ``c Σ (Q_gᵀ G Q_a)²``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Positions, Tokens, widened
from curvlinops.computers.usages import Usage

#: Eigenvectors of the gradient and the input factor; None for an identity, or if there is none.
Basis = tuple[Tensor | None, Tensor | None]

_ENTRIES = 2**22  # entries of per-example gradients held at once


@dataclass
class _Event:
    """A layer's call: inputs, and the output gradients ``[V, n, S, d_out]`` of loss vectors."""

    usage: Usage
    positions: Positions | None
    gradient: Tensor


@dataclass
class _Group:
    """What is gathered of a group.

    Attributes:
        plan: The group's plan.
        bases: The basis of each block.
        totals: The sum of squares of each block, ``[d_out, d_in]`` or ``[d_out]``.
        calls: Number of calls of its layers in this batch.
        events: The calls whose gradients have come in this back-propagation.
        rotated: The inputs ``[n, S, d_in]`` of the only call in the basis, by block.
        squares: Sums over loss vectors of squared gradients ``[n, d_out]``, by block, where a
            single call at a single position is all there is; and squared inputs ``[n, d_in]``.
    """

    plan: GroupPlan
    bases: list[Basis]
    totals: list[Tensor | None]
    calls: int = 0
    events: list[_Event] = field(default_factory=list)
    rotated: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class EigenvalueStatistic:
    """Sums of squared gradients in given bases, for each group.

    Gradients of single examples are formed for a few examples at once, so that they have at most
    some 2²² entries (or one example's). Besides, the inputs of the layers of one batch are held:
    ``n S d_in`` numbers each, as positions share weights, and the output gradients of groups whose
    layers are called several times.

    Args:
        plans: The groups.
        bases: For each group, by its names: the bases of its blocks.
        shapes: The parameters' shapes.
        num_vectors: Returns how many vectors are back-propagated for a batch, to choose the
            cheapest order.
    """

    def __init__(
        self,
        plans: Sequence[GroupPlan],
        bases: Mapping[tuple[str, ...], list[Basis]],
        shapes: Mapping[str, Sequence[int]],
        num_vectors: Callable[[], int] = lambda: 1,
    ):
        self._shapes = shapes
        self._num_vectors = num_vectors
        self._groups = [
            _Group(plan, bases[plan.key], [None] * len(bases[plan.key]))
            for plan in plans
            if not plan.diagonal
        ]
        self._positions: dict[tuple[Usage, int], Positions] = {}
        self._by_usage: dict[Usage, list[_Group]] = {}
        for group in self._groups:
            for usage in (*group.plan.usages, *group.plan.tied):
                self._by_usage.setdefault(usage, []).append(group)

    # ---- events ----------------------------------------------------------------------------------
    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """A layer was called, for the ``index``-th time in this way in this batch."""
        self._positions[usage, index] = positions
        for group in self._of(usage):
            group.calls += 1

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """The gradients ``[V, n, S, d_out]`` of V loss vectors at a layer's output exist."""
        positions = self._positions.get((usage, index))
        for group in self._of(usage):
            group.events.append(_Event(usage, positions, gradient))
            if group.calls == 1:  # there is nothing to wait for
                self._process(group)

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        for group in self._groups:
            self._process(group)

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        for group in self._groups:
            for block, (squares, inputs) in group.squares.items():
                _add(group, block, squares.T @ inputs)
            group.squares, group.rotated = {}, {}
            group.calls = 0
        self._positions = {}

    def _of(self, usage: Usage) -> list[_Group]:
        """Return the groups of a usage."""
        try:
            return self._by_usage[usage]
        except KeyError:
            raise RuntimeError(
                f"{usage.label} was not called in this way before: the model, or the data, have "
                "changed between two passes."
            ) from None

    # ---- sums of squares -------------------------------------------------------------------------
    def _process(self, group: _Group) -> None:
        """Add the squared gradients of one back-propagation."""
        events, group.events = group.events, []
        if not events:
            return
        plan = group.plan
        if plan.format.is_norm:
            _add(group, 0, self._norm(group, events))
        elif "W" not in plan.group:
            for block, rows in enumerate(plan.blocks):
                gradients = [e.gradient.sum(2) for e in events if e.usage.rows("b") == rows]
                if gradients:
                    total = _rotated(_sum(gradients), group.bases[block][0])
                    _add(group, block, (total**2).sum((0, 1)))
        elif plan.tied:
            _add(group, 0, self._tied(group, events))
        else:
            for index, rows in enumerate(plan.blocks):
                used = [e for e in events if e.usage.rows("W") == rows]
                if used:
                    self._weights(group, index * plan.format.groups, used)

    def _norm(self, group: _Group, events: list[_Event]) -> Tensor:
        """Return the sum of squares ``[d]`` for a normalisation layer."""
        parts: dict[str, Tensor] = {}
        for event in events:
            gradient = widened(event.gradient)
            for role in group.plan.group:
                if (event.usage.weight if role == "W" else event.usage.bias) is None:
                    continue
                if role == "W":
                    assert event.positions is not None
                    inputs = widened(event.positions.expanded())
                    new = torch.einsum("nsd, vnsd -> vnd", inputs, gradient)
                else:
                    new = gradient.sum(2)
                parts[role] = parts[role] + new if role in parts else new
        total = torch.cat([parts[role] for role in group.plan.group if role in parts], dim=-1)
        return (_rotated(total, group.bases[0][0]) ** 2).sum((0, 1))

    def _weights(self, group: _Group, first: int, events: list[_Event]) -> None:
        """Add the squares for a weight, of blocks ``first, ..., first + groups - 1``."""
        plan = group.plan
        groups = plan.format.groups
        if plan.format.is_embedding and group.bases[first][1] is None:
            _add(group, first, _token_squares(events, group.bases[first][0], plan.d_in))
            return
        # the calls of shared weights are further positions
        g = torch.cat([widened(e.gradient) for e in events], dim=2)  # [V, n, S, groups * o]
        if all(first + j in group.rotated for j in range(groups)):
            for j, part in enumerate(g.unflatten(-1, (groups, -1)).unbind(-2)):
                self._shared(group, first + j, part, None)
            return
        a = torch.cat([_inputs(plan, e, g) for e in events], dim=1)  # [n, S, groups, i]
        g = g.unflatten(-1, (groups, -1))
        for j in range(groups):
            Q_g, Q_a = group.bases[first + j]
            if g.shape[2] > 1:
                self._shared(group, first + j, g[:, :, :, j], a[:, :, j])
                continue
            squares = (_rotated(g[:, :, 0, j], Q_g) ** 2).sum(0)  # [n, o]
            if group.calls == 1:  # the inputs are the same for all vectors
                before, inputs = group.squares.get(first + j, (0, None))
                inputs = _rotated(a[:, 0, j], Q_a) ** 2 if inputs is None else inputs  # [n, i]
                group.squares[first + j] = before + squares, inputs
            else:
                _add(group, first + j, squares.T @ _rotated(a[:, 0, j], Q_a) ** 2)

    def _shared(self, group: _Group, block: int, g: Tensor, a: Tensor | None) -> None:
        """Add the squares ``(Q_gᵀ G Q_a)²`` of a block with several positions.

        Args:
            group: The group.
            block: The block.
            g: Output gradients ``[V, n, S, o]``.
            a: Inputs ``[n, S, i]``; None if they were rotated for another vector.
        """
        Q_g, Q_a = group.bases[block]
        if a is None:
            _add(group, block, _squares(_rotated(g, Q_g), group.rotated[block], None, None))
            return
        S, o, i = g.shape[2], g.shape[3], a.shape[-1]
        V = max(self._num_vectors(), 1)
        if S * i**2 + V * S * o**2 > V * o * i * (o + i):  # else the gradients are rotated
            _add(group, block, _squares(g, a, Q_g, Q_a))
            return
        a = _rotated(a, Q_a)
        if group.calls == 1 and V > 1:
            group.rotated[block] = a
        _add(group, block, _squares(_rotated(g, Q_g), a, None, None))

    def _tied(self, group: _Group, events: list[_Event]) -> Tensor:
        """Return the squares ``[V, d (+ 1)]`` for a Linear whose weight is an embedding, too."""
        plan = group.plan
        Q_g, Q_a = group.bases[0]
        total: Tensor | None = None
        num_vectors, n = events[0].gradient.shape[:2]
        size = self._shapes[plan.group["W"]][0]
        chunk = max(1, _ENTRIES // (size * plan.d_in))
        for v in range(num_vectors):
            for start in range(0, n, chunk):
                rows = slice(start, start + chunk)
                G = events[0].gradient.new_zeros(min(chunk, n - start), size, plan.d_in)
                for event in events:
                    gradient = event.gradient[v, rows]  # [n, S, o]
                    if isinstance(event.positions, Tokens):
                        tokens = event.positions
                        values = gradient * tokens.weights[rows].unsqueeze(-1)
                        index = tokens.indices[rows].unsqueeze(-1).expand_as(values)
                        G[..., : values.shape[-1]].scatter_add_(1, index, values)
                    else:
                        a = _inputs(plan, event, gradient)[rows, :, 0]
                        G = G + gradient.mT @ a
                squares = (_rotated(_rotated(G, Q_a).mT, Q_g).mT ** 2).sum(0)
                total = squares if total is None else total + squares
        assert total is not None
        return total

    # ---- results ---------------------------------------------------------------------------------
    def totals(self) -> Iterator[tuple[GroupPlan, list[Tensor | None]]]:
        """Yield each group and the sums of squares of its blocks; None for those never called."""
        for group in self._groups:
            yield group.plan, group.totals


def _add(group: _Group, block: int, squares: Tensor) -> None:
    """Add to a block's sum of squares."""
    before = group.totals[block]
    group.totals[block] = squares if before is None else before + squares


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, half precision in float32."""
    total = widened(tensors[0])
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _rotated(rows: Tensor, Q: Tensor | None) -> Tensor:
    """Return the coordinates of rows ``[..., d]`` in a basis."""
    return rows if Q is None else rows @ Q.to(rows.dtype)


def _inputs(plan: GroupPlan, event: _Event, like: Tensor) -> Tensor:
    """Return a call's inputs ``[n, S, groups, d_in]``, with the constant one of a joint bias."""
    assert event.positions is not None
    rows = event.positions.expanded().to(like.dtype).unflatten(-1, (plan.format.groups, -1))
    if not plan.joint:
        return rows
    ones = rows.new_full((*rows.shape[:-1], 1), float(event.usage.bias is not None))
    return torch.cat([rows, ones], dim=-1)


def _squares(g: Tensor, a: Tensor, Q_g: Tensor | None, Q_a: Tensor | None) -> Tensor:
    """Return ``Σ (Q_gᵀ G Q_a)²`` ``[o, i]`` with ``G = Σ_s g_s a_sᵀ``.

    Args:
        g: Output gradients ``[V, n, S, o]``.
        a: Inputs ``[n, S, i]``.
        Q_g: Eigenvectors ``[o, o]``.
        Q_a: Eigenvectors ``[i, i]``.
    """
    num_vectors, n, _, o = g.shape
    i = a.shape[-1]
    chunk = max(1, _ENTRIES // max(o * i, 1))
    total = g.new_zeros(o, i)
    for v in range(num_vectors):
        for start in range(0, n, chunk):
            G = g[v, start : start + chunk].mT @ a[start : start + chunk]  # [n, o, i]
            if Q_a is not None:
                G = G @ Q_a.to(G.dtype)
            if Q_g is not None:
                G = Q_g.to(G.dtype).T @ G
            total = total + (G**2).sum(0)
    return total


def _token_squares(events: list[_Event], Q_g: Tensor | None, size: int) -> Tensor:
    """Return the squares ``[o, V]`` for an embedding: equal tokens of an example add up first."""
    indices, values = [], []
    for event in events:
        assert isinstance(event.positions, Tokens)
        indices.append(event.positions.indices)
        weights = event.positions.weights.unsqueeze(-1)
        values.append(_rotated(widened(event.gradient * weights), Q_g))
    index = torch.cat(indices, dim=1)  # [n, S]
    value = torch.cat(values, dim=2)  # [V, n, S, o]
    equal = (index.unsqueeze(2) == index.unsqueeze(1)).to(value.dtype)  # [n, S, S]
    # (Σ_s g_s)² for each token is Σ_s g_s (Σ_t g_t) over the positions with that token
    products = (value * (equal @ value)).sum(0).flatten(0, 1)  # [n S, o]
    total = value.new_zeros(size, value.shape[-1])
    return total.index_add(0, index.flatten(), products).T


__all__ = ["Basis", "EigenvalueStatistic"]
