"""Second moments of layer inputs and output gradients, gathered from a collector's events.

A statistic keeps raw sums and counts, so that batches, and later ranks, only add.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.attested import attest
from curvlinops.computers.plan import GroupPlan, Rows
from curvlinops.computers.positions import Moment, Positions, widened
from curvlinops.computers.usages import Part, Usage
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac_utils import KFACType
from curvlinops.nearest_kronecker import nearest_kronecker

Key = tuple[str, ...]
#: A Kronecker factor: a tensor, or a diagonal.
Factor = Any


class CovarianceStatistic:
    """Second moments of inputs and output gradients: the Kronecker factors of KFAC.

    expand: all positions of all usages count, each on its own. reduce: inputs are averaged and
    gradients summed over an example's positions and usages first, so those of all usages are held
    until a batch's pass is over. Normalisation layers: so are the gradients of weight and bias.

    Args:
        shapes: The parameters' shapes.
        kfac_approx: expand or reduce.
        max_factor_size: Wider factors keep their diagonal only.
        separate: Whether weight and bias are approximated separately.
        diagonal: Names of parameters that are not approximated by factors.
        dtype: The dtype of the sums, if not the model's (or float32).
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        kfac_approx: KFACType,
        max_factor_size: int,
        separate: bool,
        diagonal: Set[str],
        dtype: torch.dtype | None = None,
    ):
        self._dtype = dtype
        self._shapes = shapes
        self._reduce = kfac_approx is KFACType.REDUCE
        self._max_factor_size = max_factor_size
        self._separate = separate
        self._diagonal = diagonal
        #: Sums, by what they are about.
        self.moments: dict[Hashable, Moment] = {}
        self._normalized: dict[tuple[Usage, int], Positions] = {}
        self._means: dict[tuple[Any, ...], tuple[Any, float, int]] = {}
        self._sums: dict[tuple[Any, ...], tuple[frozenset[Usage], int, Tensor]] = {}
        self._norm_gradients: dict[Part, Tensor] = {}
        self._norm_pairs: dict[Part, Part] = {}

    # ---- events ----------------------------------------------------------------------------------
    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """A layer was called, for the ``index``-th time in this way in this batch."""
        form = usage.format
        if form.is_norm:
            self._normalized[usage, index] = positions
            return
        if usage.weight is None:
            return
        biased = self._joint(usage)
        if not self._reduce:
            # Whether the group has a bias, of another usage, is not known yet.
            width = self._input_width(usage) + biased
            moment = self._moment(("input", usage), width, form.groups, diagonal=form.is_embedding)
            positions.add_to(moment, 1.0 if biased else None)
            return
        key = ("input", form.is_embedding, form.groups, usage.weight)
        count = positions.num_positions
        total, ones, total_count = self._means.get(key, (0, 0.0, 0))
        self._means[key] = (
            total + count * widened(positions.mean()),
            ones + count * biased,
            total_count + count,
        )

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""
        for key, (total, ones, count) in self._means.items():
            groups = key[2]
            constant = ones / count if ones else None
            width = total.shape[-1] // groups + (constant is not None)
            self._moment(key, width, groups).update(total / count, constant)
        self._means = {}

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """The gradients ``[V, n, S, d_out]`` of V loss vectors at a layer's output exist."""
        form = usage.format
        if form.is_norm:
            self._add_norm(usage, index, gradient)
            return
        wanted: list[tuple[str, Part, int]] = []
        if usage.weight is not None:
            wanted.append(("W", usage.weight, form.groups))
        if usage.bias is not None and not self._joint(usage):
            wanted.append(("b", usage.bias, 1))
        if self._reduce:
            gradient = widened(gradient).sum(2)  # [V, n, d_out]
            for role, part, groups in wanted:
                key = (role, form.is_embedding, part)
                usages, _, before = self._sums.get(key, (frozenset(), groups, None))
                total = gradient if before is None else before + gradient
                self._sums[key] = (usages | {usage}, groups, total)
            return
        for groups in {groups for _, _, groups in wanted}:
            width = gradient.shape[-1] // groups
            moment = self._moment(("gradient", usage, groups), width, groups)
            moment.update(gradient)

    def _add_norm(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Add the gradients of a normalisation layer's weight and bias ``[V, n, d]``."""
        gradient = widened(gradient)
        for part, scale in ((usage.weight, True), (usage.bias, False)):
            if part is None:
                continue
            if scale:
                rows = self._normalized[usage, index].expanded()
                new = torch.einsum("nsd, vnsd -> vnd", rows.to(gradient.dtype), gradient)
            else:
                new = gradient.sum(2)
            before = self._norm_gradients.get(part)
            self._norm_gradients[part] = new if before is None else before + new
        if self._joint(usage):
            assert usage.weight is not None and usage.bias is not None
            self._norm_pairs[usage.weight] = usage.bias

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        done: dict[Hashable, Moment] = {}  # a layer's weight and bias have the same sums
        for key, (usages, groups, total) in self._sums.items():
            width = total.shape[-1] // groups
            if (usages, groups) not in done:
                new = done[usages, groups] = self._new_moment(width, groups)
                new.update(total.flatten(0, 1))
            new = done[usages, groups]
            sums = new.symmetric()
            assert sums is not None
            self._moment(("gradient", *key), width, groups).add(sums, new.count)
        paired = set(self._norm_pairs.values())
        for part, rows in self._norm_gradients.items():
            names = [part.name]
            if part in paired:
                continue
            if part in self._norm_pairs:
                bias = self._norm_pairs[part]
                names.append(bias.name)
                rows = torch.cat([rows, self._norm_gradients[bias]], dim=-1)
            self._moment(("norm", *names), rows.shape[-1], 1).update(rows.flatten(0, 1))
        self._sums, self._norm_gradients, self._norm_pairs = {}, {}, {}

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        self._normalized = {}

    def _moment(self, key: Hashable, width: int, groups: int, diagonal: bool = False) -> Moment:
        """Return the moment of a key."""
        if key not in self.moments:
            self.moments[key] = self._new_moment(width, groups, diagonal)
        return self.moments[key]

    def _new_moment(self, width: int, groups: int, diagonal: bool = False) -> Moment:
        """Return a moment without summands."""
        return Moment(diagonal or width > self._max_factor_size, groups, self._dtype)

    def _joint(self, usage: Usage) -> bool:
        """Return whether weight and bias of a usage are approximated together."""
        if self._separate or not usage.joint:
            return False
        return not {usage.part("W").name, usage.part("b").name} & self._diagonal

    def _input_width(self, usage: Usage) -> int:
        """Return d_in of a usage's weight, without bias."""
        assert usage.weight is not None
        shape = self._shapes[usage.weight.name]
        return shape[0] if usage.weight.transposed else usage.format.widths(shape)[1]

    # ---- sums of several passes ------------------------------------------------------------------
    def merge(self, other: CovarianceStatistic) -> None:
        """Add what another statistic gathered; it must not be used any more."""
        for key, moment in other.moments.items():
            if key in self.moments:
                self.moments[key].merge(moment)
            else:
                self.moments[key] = moment

    def scale(self, inputs: float, gradients: float) -> None:
        """Multiply the sums of products of inputs, and those of products of gradients."""
        for key, moment in self.moments.items():
            moment.scale(inputs if key[0] == "input" else gradients)  # type: ignore[index]

    # ---- results ---------------------------------------------------------------------------------
    def factors(
        self,
        plan: GroupPlan,
        scale: Tensor | float,
        like: Tensor,
        identity: bool = False,
        last: Set[Hashable] = frozenset(),
    ) -> list[tuple[Factor, Factor | None]]:
        """Return the gradient and input factor (if any) of each block of a group.

        Args:
            plan: The group.
            scale: The scale c of the loss, for the gradient factors.
            like: A tensor of the factors' dtype and device.
            identity: Whether gradient factors are identities.
            last: Keys of moments that no other group needs: they become the factors.
        """
        blocks = []
        for rows in plan.blocks:
            groups = plan.format.groups if "W" in plan.group else 1
            width = (rows[1] - rows[0]) // groups if len(plan.blocks) > 1 else plan.d_out // groups
            gradients, keep = self._moments_of(self._gradient_keys(plan, rows), last)
            B = self._identity(width, groups, like) if identity else None
            B = self._factors(gradients, scale, width, groups, like, keep) if B is None else B
            if not plan.d_in:
                blocks += [(b, None) for b in B]
                continue
            moments, keep = self._moments_of(self._input_keys(plan, rows), last)
            count = sum(moment.count for moment in moments)
            A = self._factors(moments, 1 / max(count, 1), plan.d_in, groups, like, keep)
            blocks += list(zip(B, A, strict=True))
        if plan.tied:
            blocks = [self._tie(plan, *blocks[0], scale, like, identity, last)]
        return blocks

    def last_uses(self, plans: Iterable[GroupPlan]) -> dict[Key, set[Hashable]]:
        """Return which of :attr:`moments` each of the groups, in this order, needs last."""
        last = {key: plan.key for plan in plans for key in self.keys(plan)}
        result: dict[Key, set[Hashable]] = {}
        for key, plan_key in last.items():
            result.setdefault(plan_key, set()).add(key)
        return result

    def keys(self, plan: GroupPlan) -> list[Hashable]:
        """Return the keys of the moments that the factors of a group depend on."""
        if plan.diagonal:
            return []
        keys = [
            key
            for rows in plan.blocks
            for key in (*self._gradient_keys(plan, rows), *self._input_keys(plan, rows))
        ]
        return [*keys, *self.keys(self._as_embedding(plan))] if plan.tied else keys

    def _gradient_keys(self, plan: GroupPlan, rows: Rows) -> list[Hashable]:
        """Return the keys of the moments of the output gradients of a block."""
        if plan.format.is_norm:
            keys: list[Hashable] = [("norm", *plan.key)]
            if plan.joint:  # where there was no bias
                keys.append(("norm", plan.group["W"]))
        else:
            role = "W" if "W" in plan.group else "b"
            groups = plan.format.groups if role == "W" else 1
            usages = [u for u in plan.usages if rows == u.rows(role)]
            if self._reduce:
                parts = dict.fromkeys(u.part(role) for u in usages)
                keys = [("gradient", role, plan.format.is_embedding, part) for part in parts]
            else:
                keys = [("gradient", usage, groups) for usage in usages]
        return keys

    def _input_keys(self, plan: GroupPlan, rows: Rows) -> list[Hashable]:
        """Return the keys of the moments of the inputs of a block."""
        if not plan.d_in:
            return []
        used = [u for u in plan.usages if rows == u.rows("W")]
        if self._reduce:
            parts = dict.fromkeys((u.format.is_embedding, u.format.groups, u.weight) for u in used)
            keys: list[Hashable] = [("input", *part) for part in parts]
        else:
            keys = [("input", usage) for usage in used]
        return keys

    def _moments_of(
        self, keys: Sequence[Hashable], last: Set[Hashable]
    ) -> tuple[list[Moment], bool]:
        """Return the moments of keys, of which some may have got none, and whether to keep them."""
        known = [key for key in keys if key in self.moments]
        moments = [self.moments[key] for key in known]
        for key in last & set(known):
            del self.moments[key]
        return moments, not set(known) <= last

    def _tie(
        self,
        plan: GroupPlan,
        B: Factor,
        A: Factor,
        scale: Tensor | float,
        like: Tensor,
        identity: bool,
        last: Set[Hashable],
    ) -> tuple[Factor, Factor]:
        """Return the Kronecker product nearest to the sum of a Linear's and an embedding's."""
        size, _ = self._shapes[plan.group["W"]]
        embedding = self._as_embedding(plan)
        ((gradient, tokens),) = self.factors(embedding, scale, like, identity, last)
        assert tokens is not None
        if plan.joint:  # the bias is the Linear's alone
            gradient = _padded(gradient)
        wide = size > self._max_factor_size
        tall = plan.d_in > self._max_factor_size
        # Moments are semi-definite, and factors that are not finite are refused by name later.
        return nearest_kronecker(
            [(B, A), (tokens, gradient)], keep_diagonal=(wide, tall), check_values=False
        )

    def _as_embedding(self, plan: GroupPlan) -> GroupPlan:
        """Return the plan of a tied weight as an embedding ``[V, d]`` alone."""
        name = plan.group["W"]
        size, d = self._shapes[name]
        form = plan.tied[0].format
        return GroupPlan({"W": name}, plan.tied, (), form, ((0, d),), d, size, None)

    def _identity(self, width: int, groups: int, like: Tensor) -> list[Factor]:
        """Return identities in place of gradient factors."""
        ones = like.new_ones(width)
        wide = width > self._max_factor_size
        return [DiagonalLinearOperator([ones]) if wide else ones.diag() for _ in range(groups)]

    def _factors(
        self,
        moments: Sequence[Moment],
        scale: Tensor | float,
        width: int,
        groups: int,
        like: Tensor,
        keep: bool,
    ) -> list[Factor]:
        """Return the scaled sum of moments as a Kronecker factor for each group.

        Moments may be narrower by one: those of layers without the bias of others. Without moments
        the layer was never called, and the factors are zero.
        """
        diagonal = width > self._max_factor_size or any(m.diagonal for m in moments)
        if len(moments) == 1 and not keep and not diagonal:
            # two copies may be more than all else that is held
            total = _fitting(moments[0].taken(scale), width, groups)
        elif moments:
            sums = [_aligned(moment, width, groups, diagonal) for moment in moments]
            total = (torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]) * scale
        else:
            total = like.new_zeros([groups, width] if diagonal else [groups, width, width])
        total = total.to(like.device, like.dtype)
        if diagonal:
            return [DiagonalLinearOperator([t]) for t in total]
        factors = list(total)
        if all(moment.summed for moment in moments):
            for factor in factors:
                attest(factor)
        return factors


def _padded(factor: Factor) -> Factor:
    """Append a zero row and column."""
    if isinstance(factor, DiagonalLinearOperator):
        diagonal = factor.diagonal()
        return DiagonalLinearOperator([torch.cat([diagonal, diagonal.new_zeros(1)])])
    return torch.nn.functional.pad(factor, (0, 1, 0, 1))


def _aligned(moment: Moment, width: int, groups: int, diagonal: bool) -> Tensor:
    """Return a moment's sum as ``[groups, width(, width)]``."""
    total = moment.symmetric()
    if diagonal and not moment.diagonal and total is not None:
        total = total.diagonal(dim1=-2, dim2=-1)
    return _fitting(total, width, groups, 1 if diagonal else 2)


def _fitting(total: Tensor | None, width: int, groups: int, num_axes: int = 2) -> Tensor:
    """Append zeros to a moment's sum, if it is narrower; return it with an axis of groups."""
    assert total is not None
    missing = width - total.shape[-1]
    if missing:
        total = torch.nn.functional.pad(total, (0, missing) * num_axes)
    return total.unsqueeze(0) if groups == 1 else total


__all__ = ["CovarianceStatistic"]
