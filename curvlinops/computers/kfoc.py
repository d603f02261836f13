"""The Kronecker product nearest to each block of the curvature, without forming any block.

The curvature of a group is ``M = c Σ vec(G) vec(G)ᵀ``, with the gradients ``G = Σ_s g_s a_sᵀ``
``[d_out, d_in]`` of an example and a loss vector. Reordered, its entries are those of the linear
map ``R: A ↦ Σ G A Gᵀ``, whose adjoint is ``B ↦ Σ Gᵀ B G``; and ``‖M - B ⊗ A‖`` is smallest for the
leading singular vectors of c R. A pass over the data applies R, or its adjoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._scalars import as_integer
from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Positions, Tokens, widened
from curvlinops.computers.statistics import Factor
from curvlinops.computers.usages import Usage
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac_utils import FisherType

_ENTRIES = 2**22  # entries of per-example gradients held at once
_PATIENCE = 5  # iterations in which a residual near rounding errors may fail to fall
_SUPPORTED = (FisherType.TYPE2, FisherType.MC)


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
        operands: What R or its adjoint is applied to, by block; None for blocks that want nothing.
        totals: The result for each block; None before the first call.
        calls: Number of calls of its layers in this batch.
        events: The calls whose gradients have come in this back-propagation.
        inputs: The inputs of the only call in this batch, by block.
        kernels: The kernels ``[n, S, S]`` of the only call, by block: those of the inputs, or sums
            over loss vectors of those of the gradients.
    """

    plan: GroupPlan
    operands: list[Tensor | None]
    totals: list[Tensor | None]
    calls: int = 0
    events: list[_Event] = field(default_factory=list)
    inputs: dict[int, _Inputs] = field(default_factory=dict)
    kernels: dict[int, Tensor] = field(default_factory=dict)


class ProductStatistic:
    """One application of ``A ↦ Σ G A Gᵀ``, or of ``B ↦ Σ Gᵀ B G``, to a matrix for each block.

    For groups without input factor: the second moment of the gradients, whatever is given.
    Gradients of single examples are formed for a few examples at once, and only where that is
    cheaper than products between positions, so that they have at most some 2²² entries (or one
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
        operands: Mapping[Key, list[Tensor | None]],
        adjoint: bool,
        max_factor_size: int,
    ):
        self._shapes = shapes
        self._adjoint = adjoint
        self._max_factor_size = max_factor_size
        self._groups = [
            _Group(plan, operands[plan.key], [None] * len(operands[plan.key]))
            for plan in plans
            if plan.key in operands
        ]
        self._positions: dict[tuple[Usage, int], Positions] = {}
        self._by_usage: dict[Usage, list[_Group]] = {
            usage: [] for plan in plans for usage in (*plan.usages, *plan.tied)
        }
        for group in self._groups:
            for usage in (*group.plan.usages, *group.plan.tied):
                self._by_usage[usage].append(group)

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
            group.events.append(_Event(usage, self._positions.get((usage, index)), gradient))
            if group.calls == 1:  # there is nothing to wait for
                self._process(group)

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        for group in self._groups:
            self._process(group)

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        for group in self._groups:
            if self._adjoint:
                for block, kernel in group.kernels.items():
                    wide = self._wide(group.plan.d_in)
                    _add(group, block, group.inputs[block].contracted(kernel, wide))
            group.inputs, group.kernels, group.calls = {}, {}, 0
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

    def _wide(self, width: int) -> bool:
        """Return whether a factor of this width is diagonal."""
        return width > self._max_factor_size

    # ---- products --------------------------------------------------------------------------------
    def _process(self, group: _Group) -> None:
        """Add what comes from one back-propagation."""
        events, group.events = group.events, []
        if not events:
            return
        plan = group.plan
        if plan.format.is_norm:
            rows = _norm_gradients(plan, events)
            _add(group, 0, _second_moment(rows, self._wide(rows.shape[-1])))
        elif "W" not in plan.group:
            for block, part in enumerate(plan.blocks):
                gradients = [
                    widened(e.gradient).sum(2) for e in events if e.usage.rows("b") == part
                ]
                if gradients:
                    total = torch.stack(gradients).sum(0)
                    _add(group, block, _second_moment(total, self._wide(total.shape[-1])))
        elif plan.tied:
            for G in self._tied(plan, events):
                self._add_gradients(group, 0, G)
        else:
            for index, part in enumerate(plan.blocks):
                used = [e for e in events if e.usage.rows("W") == part]
                if used:
                    self._weights(group, index * plan.format.groups, used)

    def _weights(self, group: _Group, first: int, events: list[_Event]) -> None:
        """Add the products for a weight, of blocks ``first, ..., first + groups - 1``."""
        plan = group.plan
        # the calls of shared weights are further positions
        g = torch.cat([_gradients(e) for e in events], dim=2)  # [V, n, S, groups * o]
        inputs = group.inputs
        if first not in inputs:
            inputs = dict(enumerate(_inputs(plan, events, g), start=first))
            if group.calls == 1:  # the inputs are the same for all vectors
                group.inputs |= inputs
        for j, part in enumerate(g.unflatten(-1, (plan.format.groups, -1)).unbind(-2)):
            if group.operands[first + j] is not None:
                self._shared(group, first + j, part, inputs[first + j])

    def _shared(self, group: _Group, block: int, g: Tensor, a: _Inputs) -> None:
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
                for examples in _chunks(n, o * i):
                    self._add_gradients(group, block, g[v, examples].mT @ a.rows[examples])
            return
        # Σ G A Gᵀ = Σ_st g_s (a_sᵀ A a_t) g_tᵀ
        X = group.operands[block]
        assert X is not None
        keep = group.calls == 1 and n * S**2 <= _ENTRIES
        for examples in _chunks(n, len(g) * S**2) if not keep else [slice(n)]:
            rows = _Rows(g[:, examples])
            if self._adjoint:
                kernel = rows.kernel(X).sum(0)
                if keep:
                    group.kernels[block] = kernel + group.kernels.get(block, 0)
                else:
                    wide = self._wide(i)
                    _add(group, block, a[examples].contracted(kernel, wide))
                continue
            kernel = group.kernels[block] if block in group.kernels else a[examples].kernel(X)
            if keep:
                group.kernels[block] = kernel
            _add(group, block, rows.contracted(kernel.to(g.dtype), self._wide(o)))

    def _add_gradients(self, group: _Group, block: int, G: Tensor) -> None:
        """Add the product of gradients ``[n, o, i]``."""
        X = group.operands[block]
        if X is not None:
            G = G.mT if self._adjoint else G
            _add(group, block, _applied(G, X, self._wide(G.shape[1])))

    def _tied(self, plan: GroupPlan, events: list[_Event]) -> Iterator[Tensor]:
        """Yield gradients ``[n, V, d (+ 1)]`` of a Linear whose weight is an embedding, too."""
        num_vectors, n = events[0].gradient.shape[:2]
        size = self._shapes[plan.group["W"]][0]
        gradients = [_gradients(event) for event in events]
        for v in range(num_vectors):
            for examples in _chunks(n, size * plan.d_in):
                G: Any = 0
                for event, gradient in zip(events, gradients, strict=True):
                    g = gradient[v, examples]  # [n, S, o]
                    if isinstance(event.positions, Tokens):
                        index = event.positions.indices[examples].unsqueeze(-1).expand_as(g)
                        new = g.new_zeros(len(g), size, plan.d_in)
                        new[..., : g.shape[-1]].scatter_add_(1, index, g)
                    else:
                        (a,) = _inputs(plan, [event], g)
                        assert isinstance(a, _Rows)
                        new = g.mT @ a.rows[examples]
                    G = G + new
                yield G

    # ---- results ---------------------------------------------------------------------------------
    def totals(self) -> dict[Key, list[Tensor | None]]:
        """Return the result for each block of each group; None for those never called."""
        return {group.plan.key: group.totals for group in self._groups}


def _add(group: _Group, block: int, new: Tensor) -> None:
    """Add to a block's result."""
    before = group.totals[block]
    group.totals[block] = new if before is None else before + new


def _between_positions(S: int, o: int, i: int) -> bool:
    """Return whether products between positions are cheaper than gradients ``[o, i]``."""
    return S * (o**2 + i**2 + S * (o + i)) <= S * o * i + o * i * (o + i)


def _chunks(n: int, entries: int) -> list[slice]:
    """Split n examples, each with so many entries, into parts."""
    size = max(1, _ENTRIES // max(entries, 1))
    return [slice(start, start + size) for start in range(0, n, size)]


def _gradients(event: _Event) -> Tensor:
    """Return output gradients ``[V, n, S, o]``, without those of tokens whose input is zero."""
    gradient = widened(event.gradient)
    if isinstance(event.positions, Tokens):
        gradient = gradient * event.positions.weights.unsqueeze(-1)
    return gradient


def _inputs(plan: GroupPlan, events: list[_Event], like: Tensor) -> list[_Inputs]:
    """Return the inputs of each channel group, with the constant one of a joint bias."""
    if all(isinstance(event.positions, Tokens) for event in events):
        indices = [e.positions.indices for e in events if isinstance(e.positions, Tokens)]
        return [_TokenRows(torch.cat(indices, dim=1), plan.d_in)]
    parts = []
    for event in events:
        assert event.positions is not None
        rows = event.positions.expanded().to(like.dtype).unflatten(-1, (plan.format.groups, -1))
        if plan.joint:
            ones = rows.new_full((*rows.shape[:-1], 1), float(event.usage.bias is not None))
            rows = torch.cat([rows, ones], dim=-1)
        parts.append(rows)
    return [_Rows(rows) for rows in torch.cat(parts, dim=1).unbind(2)]  # [n, S, groups, i]


def _norm_gradients(plan: GroupPlan, events: list[_Event]) -> Tensor:
    """Return the gradients ``[V, n, d]`` of a normalisation layer's group."""
    like = events[0].gradient
    width = plan.d_out // len(plan.group)
    parts = {role: widened(like.new_zeros(*like.shape[:2], width)) for role in plan.group}
    for event in events:
        gradient = widened(event.gradient)
        if "W" in parts and event.usage.weight is not None:
            assert event.positions is not None
            inputs = widened(event.positions.expanded())
            parts["W"] = parts["W"] + torch.einsum("nsd, vnsd -> vnd", inputs, gradient)
        if "b" in parts and event.usage.bias is not None:
            parts["b"] = parts["b"] + gradient.sum(2)
    return torch.cat([parts[role] for role in plan.group], dim=-1)


class _Silent:
    """A statistic of nothing, for a pass that only looks at the model."""

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Ignore a call."""

    def end_of_forward(self) -> None:
        """Ignore the end of a forward pass."""

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Ignore gradients."""

    def end_of_backward(self) -> None:
        """Ignore the end of a back-propagation."""

    def end_of_batch(self) -> None:
        """Ignore the end of a batch."""


# ---- the leading singular vectors ----------------------------------------------------------------
class SingularVectorSearch:
    r"""The leading singular vectors of a linear map R between symmetric matrices (or diagonals).

    The largest eigenvalue of :math:`R^\top R` is sought from the identity, with one step of power
    iteration and an optimal combination with the two last iterates in turn (conjugate gradients of
    the Rayleigh quotient, or LOBPCG without preconditioner: Knyazev, 2001). All iterates are
    polynomials in :math:`R^\top R` applied to the identity, so that the limit is, as that of power
    iteration, the projection of the identity to the leading eigenspace. If R and its adjoint map
    positive semi-definite matrices to such, the limit is one, too.

    Whoever uses it alternates between giving ``R(search.operand)`` to :meth:`take_image`, and
    ``Rᵀ(search.operand)`` to :meth:`take_adjoint`, until ``search.done``.

    Args:
        identity: The start, ``[d, d]`` or ``[d]``, in the dtype of the search.
        tol: The search is done when :math:`\|R^\top R x - \sigma^2 x\| \leq \text{tol}\,\sigma^2`,
            or rounding errors keep it from falling further.

    Attributes:
        done: Whether it has converged.
        residual: The last relative residual.
        operand: What R or its adjoint is to be applied to.
        sigma: The leading singular value.
        left: Its left singular vector, of norm 1; None for R = 0.
        right: Its right singular vector, of norm 1.
    """

    def __init__(self, identity: Tensor, tol: float):
        self._tol = tol
        self.operand = identity / identity.norm()
        self._basis = [self.operand]  # orthonormal
        self._images: list[Tensor] = []  # R of each
        self.done = False
        self.residual = self._best = float("inf")
        self._since_best = 0  # iterations since then
        self.sigma = 0.0
        self.left: Tensor | None = None
        self.right = self.operand

    def take_image(self, image: Tensor) -> None:
        """Take R of the operand."""
        self._images.append(_symmetric(image))
        largest = max(image.abs().max().item() for image in self._images)
        if largest == 0 or largest != largest or largest == float("inf"):
            self.done, self.residual = True, 0.0
            self.left = self._images[0] if largest else None
            self.sigma = largest
            return
        gram = [[_inner(a, b, largest) for b in self._images] for a in self._images]
        coefficients = torch.linalg.eigh(torch.tensor(gram, dtype=torch.float64))[1][:, -1]
        # the best combination, and what is orthogonal to it of the span of it and the last one
        other = -coefficients[0] * coefficients
        other[0] += 1
        kept = [coefficients]
        if other.norm() > 1e-6:
            other = other - (other @ coefficients) * coefficients
            kept.append(other / other.norm())
        self._basis = [_combined(c, self._basis) for c in kept]
        self._images = [_combined(c, self._images) for c in kept]
        if _trace(self._basis[0]) < 0:
            self._basis[0], self._images[0] = -self._basis[0], -self._images[0]
        self.sigma, self.left = _normalized(self._images[0])
        self.operand = self.left

    def take_adjoint(self, z: Tensor) -> None:
        """Take Rᵀ of the operand."""
        z = _symmetric(z)
        x = self._basis[0]
        # for the left vector this is the best right one, and nearer to the limit than x
        self.sigma, self.right = _normalized(z)
        w = z / self.sigma if self.sigma else z
        for _ in range(2):
            for v in self._basis:
                w = w - (w * v).sum() * v
        projection = (z / self.sigma * x).sum()
        residual = (z / self.sigma - x * projection).norm().item() if self.sigma else 0.0
        self._since_best = 0 if residual < self._best else self._since_best + 1
        self._best = min(self._best, residual)
        # rounding errors keep it from falling further
        stalled = self._since_best >= _PATIENCE and residual < torch.finfo(z.dtype).eps ** 0.5
        self.residual = residual
        norm = w.norm().item()
        if not residual > self._tol or stalled or norm == 0:
            self.done = True
            return
        self.operand = w / norm
        self._basis.append(self.operand)


def _symmetric(matrix: Tensor) -> Tensor:
    """Remove rounding errors from a symmetric matrix, or leave a diagonal."""
    return matrix if matrix.ndim == 1 else (matrix + matrix.T) / 2


def _inner(a: Tensor, b: Tensor, scale: float) -> float:
    """Return the inner product of two matrices divided by a number."""
    return ((a / scale) * (b / scale)).sum().item()


def _trace(matrix: Tensor) -> float:
    """Return the trace of a matrix or diagonal."""
    return (matrix if matrix.ndim == 1 else matrix.diagonal()).sum().item()


def _combined(coefficients: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return a linear combination."""
    total = coefficients[0].item() * matrices[0]
    for coefficient, matrix in zip(coefficients[1:].tolist(), matrices[1:], strict=True):
        total.add_(matrix, alpha=coefficient)
    return total


def _normalized(matrix: Tensor) -> tuple[float, Tensor]:
    """Return the Frobenius norm, and the matrix divided by it; squares do not underflow."""
    largest = matrix.abs().max().item()
    if largest == 0:
        return 0.0, matrix
    norm = (matrix / largest).norm().item()
    return largest * norm, matrix / largest / norm


def _clipped(matrix: Tensor) -> Tensor:
    """Return the positive semi-definite part of a symmetric matrix, or of a diagonal."""
    if matrix.ndim == 1:
        return matrix.clamp(min=0)
    values, Q = _tensors.eigh(matrix, name="a Kronecker factor")
    if bool((values >= 0).all()):
        return matrix
    return _symmetric((Q * values.clamp(min=0)) @ Q.T)


# ---- the computer --------------------------------------------------------------------------------
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
        if self.fisher_type not in _SUPPORTED:
            raise ValueError(
                f"KFOC needs fisher_type='type-2' or 'mc', got {str(self.fisher_type)!r}."
            )
        self.loss_terms = "exact"
        self.num_passes = 0

    @property
    def counts_tokens(self) -> bool:
        """Whether input factors of embeddings are diagonal: they are the best matrices."""
        return False

    def blocks(self) -> dict[Key, list[tuple[Factor, Factor | None]]]:
        """Compute the factors, in as many passes over the data as are necessary.

        Returns:
            As :meth:`KFACComputer.blocks`.
        """
        self._look_at_all()
        like = next(iter(self.risk.params.values())).detach()
        plans = [plan for plan in self.plans if not plan.diagonal]
        blocks = {plan.key: self._searches(plan, widened(like.new_ones(()))) for plan in plans}
        exact: dict[Key, list[Tensor | None]] = {}
        scale: Tensor | float = 1.0
        self.num_passes = 0
        for _ in range(self.max_iter):
            for adjoint in (False, True):
                operands = _operands(blocks)
                if not self.num_passes:  # what has no input factor needs a single pass
                    operands |= {k: [None] * self._num_parts(k) for k, b in blocks.items() if not b}
                if not operands:
                    break
                totals, scale = self._products(plans, operands, adjoint)
                if not self.num_passes:
                    exact = {key: totals[key] for key, b in blocks.items() if not b}
                self.num_passes += 1
                self._hand_over(blocks, totals, adjoint)
        self._warn_unless_converged(blocks)
        diagonals = self._diagonal_blocks()
        result: dict[Key, list[tuple[Factor, Factor | None]]] = {}
        for plan in self.plans:
            if plan.diagonal:
                result[plan.key] = [(diagonals[plan.key[0]], None)]
            elif plan.d_in:
                result[plan.key] = [
                    _factors(block, float(scale), like, self.max_factor_size)
                    for block in blocks[plan.key]
                ]
            else:
                result[plan.key] = self._exact(plan, exact[plan.key], scale, like)
        return result

    def _look_at_all(self) -> None:
        """See all batches, without back-propagation, to know how the model uses its parameters."""
        fisher_type, self.fisher_type = self.fisher_type, FisherType.FORWARD_ONLY
        try:
            while True:
                known = len(self._diagonal)
                self._gather(_Silent(), "KFOC layers", "signs")
                if len(self._diagonal) == known:
                    return
        finally:
            self.fisher_type = fisher_type

    def _products(
        self, plans: list[GroupPlan], operands: dict[Key, list[Tensor | None]], adjoint: bool
    ) -> tuple[dict[Key, list[Tensor | None]], Tensor | float]:
        """Pass over the data; return the products of all blocks, and the loss's scale."""
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        statistic = ProductStatistic(plans, shapes, operands, adjoint, self.max_factor_size)
        scale = self._gather(statistic, "KFOC factors", "signs")
        return statistic.totals(), scale

    @staticmethod
    def _hand_over(
        blocks: dict[Key, list[_Block]], totals: dict[Key, list[Tensor | None]], adjoint: bool
    ) -> None:
        """Give each search the result of a pass."""
        for key, parts in blocks.items():
            for block, total in zip(parts, totals.get(key, ()), strict=False):
                search = block.search
                if search.done:
                    continue
                if total is None:  # never called
                    search.done, search.residual = True, 0.0
                elif adjoint:
                    search.take_adjoint(total.to(search.operand.dtype))
                else:
                    search.take_image(total.to(search.operand.dtype))

    def _num_parts(self, key: Key) -> int:
        """Return the number of blocks of a group without input factor."""
        return next(len(plan.blocks) for plan in self.plans if plan.key == key)

    def _searches(self, plan: GroupPlan, one: Tensor) -> list[_Block]:
        """Return the searches for the blocks of a group; none if it has no input factor."""
        if not plan.d_in:
            return []
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

    def _exact(
        self, plan: GroupPlan, totals: list[Tensor | None], scale: Tensor | float, like: Tensor
    ) -> list[tuple[Factor, Factor | None]]:
        """Return the blocks of a group without input factor."""
        result: list[tuple[Factor, Factor | None]] = []
        for (start, stop), total in zip(plan.blocks, totals, strict=True):
            if total is None:
                total = _zeros(stop - start, self.max_factor_size, like)
            result.append((_as_factor((total * scale).to(like.dtype)), None))
        return result

    def _warn_unless_converged(self, blocks: dict[Key, list[_Block]]) -> None:
        """Warn of blocks whose search was cut short."""
        open_ = {
            key: max(block.search.residual for block in parts if not block.search.done)
            for key, parts in blocks.items()
            if not all(block.search.done for block in parts)
        }
        if open_:
            names = ", ".join(repr(name) for key in open_ for name in key)
            warn(
                f"The nearest Kronecker products of {names} have not converged in "
                f"max_iter={self.max_iter} iterations: the largest relative residual is "
                f"{max(open_.values()):.1e}. Increase max_iter or tol.",
                stacklevel=2,
            )


def check_accuracy(max_iter: int, tol: float | None) -> tuple[int, float | None]:
    """Return valid limits of the iteration; raise a ValueError otherwise."""
    max_iter = as_integer("max_iter", max_iter, 1)
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, or None, got {tol}.")
    return max_iter, tol


def _operands(blocks: dict[Key, list[_Block]]) -> dict[Key, list[Tensor | None]]:
    """Return what the next pass is to multiply, for groups that are not done."""
    operands: dict[Key, list[Tensor | None]] = {}
    for key, parts in blocks.items():
        wanted = [None if block.search.done else block.search.operand for block in parts]
        if any(operand is not None for operand in wanted):
            operands[key] = wanted
    return operands


def _factors(
    block: _Block, scale: float, like: Tensor, max_factor_size: int
) -> tuple[Factor, Factor]:
    """Return the factors of a block, of equal norm."""
    search = block.search
    if search.left is None:
        zeros = (_zeros(width, max_factor_size, like) for width in (block.d_out, block.d_in))
        B, A = map(_as_factor, zeros)
        return B, A
    left, right = search.left, search.right
    root = (scale * search.sigma) ** 0.5
    B, A = (_as_factor((_finite_clipped(X) * root).to(like.dtype)) for X in (left, right))
    return B, A


def _finite_clipped(matrix: Tensor) -> Tensor:
    """Return the positive semi-definite part, or non-finite values as they are."""
    return _clipped(matrix) if bool(matrix.isfinite().all()) else matrix


def _zeros(width: int, max_factor_size: int, like: Tensor) -> Tensor:
    """Return a factor that is zero, or its diagonal."""
    return like.new_zeros(width) if width > max_factor_size else like.new_zeros(width, width)


def _as_factor(tensor: Tensor) -> Factor:
    """Return a matrix as it is, and a diagonal as operator."""
    return DiagonalLinearOperator([tensor]) if tensor.ndim == 1 else tensor


__all__ = ["KFOCComputer", "ProductStatistic", "SingularVectorSearch"]
