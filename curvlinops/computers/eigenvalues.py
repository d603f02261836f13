"""The eigenvalues of EKFAC: the exact diagonal of each block in the Kronecker factors' eigenbasis.

The curvature of a group is ``c Σ vec(G) vec(G)ᵀ``, with the gradients ``G = Σ_s g_s a_sᵀ`` of an
example and a loss vector. In the basis ``Q_g ⊗ Q_a`` its diagonal is ``c Σ (Q_gᵀ G Q_a)²``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from curvlinops.computers.group_statistic import Event, Group, GroupStatistic, chunks, joined
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Tokens, flat_rows

#: Eigenvectors of the gradient and the input factor; None for an identity, or if there is none.
Basis = tuple[Tensor | None, Tensor | None]


@dataclass
class _Group(Group):
    """What is gathered of a group; its results are sums of squares.

    Attributes:
        bases: The basis of each block.
        rotated: The inputs ``[n, S, d_in]`` of the only call in the basis, by block.
        squares: Sums over loss vectors of squared gradients ``[n, d_out]``, by block, where a
            single call at a single position is all there is; and squared inputs ``[n, d_in]``.
    """

    bases: list[Basis] = field(default_factory=list)
    rotated: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class EigenvalueStatistic(GroupStatistic[_Group]):
    """Sums of squared gradients in given bases, ``[d_out, d_in]`` or ``[d_out]`` for each block.

    Gradients of single examples are formed for a few examples at once, so that they have at most
    some 2²⁰ entries (or one example's). Besides, the inputs of the layers of one batch are held:
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
        self._num_vectors = num_vectors
        groups = [
            _Group(plan, [None] * len(bases[plan.key]), bases=bases[plan.key])
            for plan in plans
            if not plan.diagonal and plan.key in bases
        ]
        super().__init__(plans, groups, shapes)

    def _add_vectors(self, group: _Group, block: int, rows: Tensor) -> None:
        """Add the squares of gradients ``[V, n, d]``."""
        group.add(block, _squared(rows, group.bases[block][0]).sum((0, 1)))

    def _add_matrices(
        self, group: _Group, block: int, matrices: Tensor, last: Tensor | None = None
    ) -> None:
        """Add the squares of gradients ``[n, o, i]``, which are overwritten.

        Args:
            group: The group.
            block: The block.
            matrices: The gradients.
            last: Their last column ``[n, o]``, if they lack it.
        """
        Q_g, Q_a = group.bases[block]
        matrices = _rotated_inputs(matrices, Q_a, last=last)
        if Q_g is not None:
            matrices = Q_g.to(matrices.dtype).T @ matrices
        self._add_squares(group, block, matrices.square_().sum(0))

    def _add_squares(self, group: _Group, block: int, squares: Tensor) -> None:
        """Add sums of squares ``[o, i]``, or more columns of zeros."""
        Q_a = group.bases[block][1]
        group.add(block, squares if Q_a is None else squares[:, : len(Q_a)])

    def _add_calls(self, group: _Group, first: int, events: list[Event]) -> None:
        """Add the squares for a weight, of blocks ``first, ..., first + groups - 1``."""
        plan = group.plan
        groups = plan.format.groups
        if plan.format.is_embedding and group.bases[first][1] is None:
            group.add(first, _token_squares(events, group.bases[first][0], plan.d_in))
            return
        # the calls of shared weights are further positions
        g = joined([event.weighted() for event in events], dim=2)  # [V, n, S, groups * o]
        g = g.unflatten(-1, (groups, -1))
        if all(first + j in group.rotated for j in range(groups)):
            for j in range(groups):
                self._add_positions(group, first + j, g[:, :, :, j], None)
            return
        rotating = all(group.bases[first + j][1] is not None for j in range(groups))
        # then the constant one of a bias needs no copy of the inputs with one more column
        one = plan.joint and rotating and all(event.usage.bias is not None for event in events)
        a = joined([event.inputs(plan, g.dtype, constant=not one) for event in events], dim=1)
        for j in range(groups):  # a: [n, S, groups, i]
            Q_g, Q_a = group.bases[first + j]
            if g.shape[2] > 1:
                self._add_positions(group, first + j, g[:, :, :, j], a[:, :, j], one)
                continue
            squares = _squared(g[:, :, 0, j], Q_g).sum(0)  # [n, o]
            if group.calls == 1:  # the inputs are the same for all vectors
                before, inputs = group.squares.get(first + j, (0, None))
                if inputs is None:
                    inputs = _squared_inputs(a[:, 0, j], Q_a, one)  # [n, i]
                group.squares[first + j] = before + squares, inputs
            else:
                inputs = _squared_inputs(a[:, 0, j], Q_a, one)
                self._add_squares(group, first + j, squares.T @ inputs)

    def _add_positions(
        self, group: _Group, block: int, g: Tensor, a: Tensor | None, one: bool = False
    ) -> None:
        """Add the squares ``(Q_gᵀ G Q_a)²`` of a block with several positions.

        Args:
            group: The group.
            block: The block.
            g: Output gradients ``[V, n, S, o]``.
            a: Inputs ``[n, S, i]``; None if they were rotated for another vector.
            one: Whether the inputs lack a constant one, which is the last.
        """
        Q_g, Q_a = group.bases[block]
        if a is None:
            self._add_squares(group, block, _squares(_rotated(g, Q_g), group.rotated[block]))
            return
        S, o, i = g.shape[2], g.shape[3], a.shape[-1] + one
        V = max(self._num_vectors(), 1)
        if S * i**2 + V * S * o**2 > V * o * i * (o + i):  # else the gradients are rotated
            for v in range(len(g)):
                for examples in chunks(len(a), o * i):
                    part = g[v, examples]
                    last = part.sum(1) if one else None
                    self._add_matrices(group, block, part.mT @ a[examples], last)
            return
        a = _rotated_inputs(a, Q_a, one)
        if group.calls == 1 and V > 1:
            group.rotated[block] = a
        self._add_squares(group, block, _squares(_rotated(g, Q_g), a))

    def _finish_batch(self, group: _Group) -> None:
        """Add the products of squares, and forget the batch."""
        for block, (squares, inputs) in group.squares.items():
            self._add_squares(group, block, squares.T @ inputs)
        group.squares, group.rotated = {}, {}


def _rotated(rows: Tensor, Q: Tensor | None) -> Tensor:
    """Return the coordinates of rows ``[..., d]`` in a basis."""
    return rows if Q is None else rows @ Q.to(rows.dtype)


def _squared(rows: Tensor, Q: Tensor | None) -> Tensor:
    """Return the squares of the coordinates of rows ``[..., d]`` in a basis."""
    return rows.square() if Q is None else _rotated(rows, Q).square_()


def _rotated_inputs(
    rows: Tensor, Q: Tensor | None, one: bool = False, last: Tensor | None = None
) -> Tensor:
    """Return the coordinates of inputs, or of rows of gradients, in a basis of inputs.

    Args:
        rows: Tensor ``[..., r, d]``, or ``[..., r, d - 1]`` without the last column.
        Q: The basis ``[d, d]``; None for an identity, where no column lacks.
        one: Whether the last column lacks, and is one.
        last: The last column ``[..., r]``, if it lacks, and is something else.

    Returns:
        Tensor ``[..., r, d]``, or more columns, of zeros: where there are many rows, products with
        widths that are multiples of 8 take up to a third less time.
    """
    if Q is None:
        return rows
    Q, d = Q.to(rows.dtype), len(Q)
    if rows.shape[:-1].numel() > 4 * d:
        Q = functional.pad(Q, (0, -d % 8))
    if last is not None:
        return (rows @ Q[:-1]).addcmul_(last.unsqueeze(-1), Q[-1])
    if not one:
        return rows @ Q
    if rows.ndim == 3 and rows.stride(-1) != 1 and rows.shape[1] >= 64:
        # patches of an image are stored by columns: to make one matrix of all would be a copy
        return torch.baddbmm(Q[-1], rows, Q[:-1].expand(len(rows), -1, -1))
    return torch.addmm(Q[-1], flat_rows(rows), Q[:-1]).unflatten(0, rows.shape[:-1])


def _squared_inputs(rows: Tensor, Q: Tensor | None, one: bool) -> Tensor:
    """Return the squares of the coordinates of inputs, which may lack a constant one."""
    return rows.square() if Q is None else _rotated_inputs(rows, Q, one).square_()


def _squares(g: Tensor, a: Tensor) -> Tensor:
    """Return ``Σ (Σ_s g_s a_sᵀ)²`` ``[o, i]`` of ``g`` ``[V, n, S, o]`` and ``a`` ``[n, S, i]``."""
    o, i = g.shape[-1], a.shape[-1]
    total = g.new_zeros(o, i)
    for v in range(len(g)):
        for examples in chunks(len(a), o * i):
            total += (g[v, examples].mT @ a[examples]).square_().sum(0)  # no copy: it is large
    return total


def _token_squares(events: list[Event], Q_g: Tensor | None, size: int) -> Tensor:
    """Return the squares ``[o, V]`` for an embedding: equal tokens of an example add up first."""
    tokens = [event.positions for event in events if isinstance(event.positions, Tokens)]
    index = joined([each.indices for each in tokens], dim=1)  # [n, S]
    value = joined([_rotated(event.weighted(), Q_g) for event in events], dim=2)  # [V, n, S, o]
    equal = (index.unsqueeze(2) == index.unsqueeze(1)).to(value.dtype)  # [n, S, S]
    # (Σ_s g_s)² for each token is Σ_s g_s (Σ_t g_t) over the positions with that token
    products = (value * (equal @ value)).sum(0).flatten(0, 1)  # [n S, o]
    total = value.new_zeros(size, value.shape[-1])
    # a sum that is all but zero may be negative by rounding
    return total.index_add(0, index.flatten(), products).clamp(min=0).T


__all__ = ["Basis", "EigenvalueStatistic"]
