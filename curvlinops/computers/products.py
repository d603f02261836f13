"""The map whose leading singular vectors are nearest Kronecker factors, applied in a pass.

The curvature of a group is ``M = c Σ vec(G) vec(G)ᵀ``, with the gradients ``G = Σ_s g_s a_sᵀ``
``[d_out, d_in]`` of an example and a loss vector. Reordered, its entries are those of the linear
map ``R: A ↦ Σ G A Gᵀ``, whose adjoint is ``B ↦ Σ Gᵀ B G``; and ``‖M - B ⊗ A‖`` is smallest for the
leading singular vectors of c R. A pass over the data applies R, or its adjoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlinops.computers.group_statistic import Event, Group, GroupStatistic, chunks, fits, joined
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Tokens


# ---- R and its adjoint, of a few examples --------------------------------------------------------
class _Rows:
    """Inputs ``[n, S, i]``, or output gradients ``[..., n, S, o]``, at all positions."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __getitem__(self, examples: slice) -> _Rows:
        """Return those of some examples."""
        return _Rows(self.rows[..., examples, :, :])

    def kernel(self, X: Tensor) -> Tensor:
        """Return ``x_sᵀ X x_t`` ``[..., n, S, S]`` for a matrix X or the diagonal of one."""
        return _times(self.rows, X) @ self.rows.mT

    def contracted(self, K: Tensor, diagonal: bool) -> Tensor:
        """Return ``Σ K_st x_s x_tᵀ`` over examples and positions, or its diagonal."""
        left = (K @ self.rows).flatten(0, -2)
        right = self.rows.flatten(0, -2)
        return (left * right).sum(0) if diagonal else left.T @ right


class _TokenRows:
    """One-hot inputs, by the places ``[n, S]`` of their ones."""

    def __init__(self, indices: Tensor, size: int):
        self.indices = indices
        self.size = size

    def __getitem__(self, examples: slice) -> _TokenRows:
        """Return those of some examples."""
        return _TokenRows(self.indices[examples], self.size)

    def kernel(self, X: Tensor) -> Tensor:
        """Return ``x_sᵀ X x_t`` ``[n, S, S]``; see :class:`_Rows`."""
        first, second = self.indices.unsqueeze(2), self.indices.unsqueeze(1)
        return X[first, second] if X.ndim == 2 else X[first] * (first == second)

    def contracted(self, K: Tensor, diagonal: bool) -> Tensor:
        """Return ``Σ K_st x_s x_tᵀ``, or its diagonal; see :class:`_Rows`."""
        first, second = self.indices.unsqueeze(2), self.indices.unsqueeze(1)
        if diagonal:
            sums = (K * (first == second)).sum(-1)  # [n, S]
            return K.new_zeros(self.size).index_add(0, self.indices.flatten(), sums.flatten())
        places = (first * self.size + second).flatten()
        total = K.new_zeros(self.size**2).index_add(0, places, K.flatten())
        return total.unflatten(0, (self.size, self.size))


_Inputs = _Rows | _TokenRows


def _times(rows: Tensor, X: Tensor) -> Tensor:
    """Return ``rows @ X`` for a matrix X or the diagonal of one."""
    X = X.to(rows.dtype)
    return rows @ X if X.ndim == 2 else rows * X


def _applied(G: Tensor, X: Tensor, diagonal: bool) -> Tensor:
    """Return ``Σ G X Gᵀ`` for gradients ``[n, p, q]``, or its diagonal ``[p]``."""
    left = _times(G, X)
    if diagonal:
        return (left * G).sum((0, 2))
    p = G.shape[1]
    return left.transpose(0, 1).reshape(p, -1) @ G.transpose(0, 1).reshape(p, -1).T


def _second_moment(rows: Tensor, diagonal: bool) -> Tensor:
    """Return ``Σ u uᵀ`` of rows ``[..., d]``, or its diagonal."""
    rows = rows.flatten(0, -2)
    return (rows**2).sum(0) if diagonal else rows.T @ rows


# ---- one pass over the data ----------------------------------------------------------------------
@dataclass
class _Group(Group):
    """What is gathered of a group; its results are products, or second moments.

    Attributes:
        operands: What R or its adjoint is applied to, by block; None for blocks that want nothing.
        inputs: The inputs of the only call in this batch, by block.
        kernels: The kernels ``[n, S, S]`` of the only call, by block: those of the inputs, or sums
            over loss vectors of those of the gradients.
    """

    operands: list[Tensor | None] = field(default_factory=list)
    inputs: dict[int, _Inputs] = field(default_factory=dict)
    kernels: dict[int, Tensor] = field(default_factory=dict)


class ProductStatistic(GroupStatistic[_Group]):
    """One application of ``A ↦ Σ G A Gᵀ``, or of ``B ↦ Σ Gᵀ B G``, to a matrix for each block.

    For groups without input factor: the second moment of the gradients, whatever is given.
    Gradients of single examples are formed for a few examples at once, and only where that is
    cheaper than products between positions, so that they have at most some 2²⁰ entries (or one
    example's). Besides, the inputs of the layers of one batch are held, ``n S d_in`` numbers each.

    Args:
        plans: The groups.
        shapes: The parameters' shapes.
        operands: For some groups, by their names: a matrix or the diagonal of one for each block,
            or None where nothing is wanted.
        adjoint: Whether the matrices are of the size of the gradient factor.
        max_factor_size: Of wider results only the diagonal is computed.
    """

    def __init__(
        self,
        plans: Sequence[GroupPlan],
        shapes: Mapping[str, Sequence[int]],
        operands: Mapping[tuple[str, ...], list[Tensor | None]],
        adjoint: bool,
        max_factor_size: int,
    ):
        self._adjoint = adjoint
        self._max_factor_size = max_factor_size
        groups = [
            _Group(plan, [None] * len(operands[plan.key]), operands=operands[plan.key])
            for plan in plans
            if plan.key in operands
        ]
        super().__init__(plans, groups, shapes)

    def _wide(self, width: int) -> bool:
        """Return whether a factor of this width is diagonal."""
        return width > self._max_factor_size

    def _add_vectors(self, group: _Group, block: int, rows: Tensor) -> None:
        """Add the second moment of gradients ``[V, n, d]``."""
        group.add(block, _second_moment(rows, self._wide(rows.shape[-1])))

    def _add_matrices(self, group: _Group, block: int, matrices: Tensor) -> None:
        """Add the product of gradients ``[n, o, i]``."""
        X = group.operands[block]
        if X is not None:
            matrices = matrices.mT if self._adjoint else matrices
            group.add(block, _applied(matrices, X, self._wide(matrices.shape[1])))

    def _add_calls(self, group: _Group, first: int, events: list[Event]) -> None:
        """Add the products for a weight, of blocks ``first, ..., first + groups - 1``."""
        plan = group.plan
        # the calls of shared weights are further positions
        g = joined([event.weighted() for event in events], dim=2)  # [V, n, S, groups * o]
        inputs = group.inputs
        if first not in inputs:
            inputs = dict(enumerate(_inputs(plan, events, g.dtype), start=first))
            if group.calls == 1:  # the inputs are the same for all vectors
                group.inputs |= inputs
        for j, part in enumerate(g.unflatten(-1, (plan.format.groups, -1)).unbind(-2)):
            if group.operands[first + j] is not None:
                self._add_positions(group, first + j, part, inputs[first + j])

    def _add_positions(self, group: _Group, block: int, g: Tensor, a: _Inputs) -> None:
        """Add the products of a block.

        Args:
            group: The group.
            block: The block.
            g: Output gradients ``[V, n, S, o]``.
            a: The inputs.
        """
        _, n, S, o = g.shape
        i = group.plan.d_in
        if isinstance(a, _Rows) and not _between_positions(S, o, i):
            for v in range(len(g)):
                for examples in chunks(n, o * i):
                    self._add_matrices(group, block, g[v, examples].mT @ a.rows[examples])
            return
        # Σ G A Gᵀ = Σ_st g_s (a_sᵀ A a_t) g_tᵀ
        X = group.operands[block]
        assert X is not None
        keep = group.calls == 1 and fits(n * S**2)
        for examples in chunks(n, len(g) * S**2) if not keep else [slice(n)]:
            rows = _Rows(g[:, examples])
            if self._adjoint:
                kernel = rows.kernel(X).sum(0)
                if keep:
                    group.kernels[block] = kernel + group.kernels.get(block, 0)
                else:
                    group.add(block, a[examples].contracted(kernel, self._wide(i)))
                continue
            kernel = group.kernels[block] if block in group.kernels else a[examples].kernel(X)
            if keep:
                group.kernels[block] = kernel
            group.add(block, rows.contracted(kernel.to(g.dtype), self._wide(o)))

    def _finish_batch(self, group: _Group) -> None:
        """Add the products of the inputs with sums over all vectors, and forget the batch."""
        if self._adjoint:
            for block, kernel in group.kernels.items():
                wide = self._wide(group.plan.d_in)
                group.add(block, group.inputs[block].contracted(kernel, wide))
        group.inputs, group.kernels = {}, {}


def _between_positions(S: int, o: int, i: int) -> bool:
    """Return whether products between positions are cheaper than gradients ``[o, i]``."""
    return S * (o**2 + i**2 + S * (o + i)) <= S * o * i + o * i * (o + i)


def _inputs(plan: GroupPlan, events: list[Event], dtype: torch.dtype) -> list[_Inputs]:
    """Return the inputs of each channel group."""
    tokens = [event.positions for event in events if isinstance(event.positions, Tokens)]
    if len(tokens) == len(events):
        return [_TokenRows(joined([each.indices for each in tokens], dim=1), plan.d_in)]
    rows = joined([event.inputs(plan, dtype) for event in events], dim=1)
    return [_Rows(part) for part in rows.unbind(2)]  # [n, S, groups, i]


__all__ = ["ProductStatistic"]
