"""Second moments of layer inputs and output gradients, gathered from a collector's events.

A statistic keeps raw sums and counts, so that batches, and later ranks, only add.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

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
    gradients summed over an example's positions and usages first. Means of inputs are held until
    all layers were called (where there is one position, the input itself is: that is no copy). Sums
    of gradients are held until a back-propagation is over, but only those of parameters that are
    used repeatedly in a batch. Normalisation layers: so are the gradients of weight and bias.

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
        self._calls: dict[Hashable, int] = {}  # of each part in this batch
        self._sums: dict[tuple[Any, ...], tuple[frozenset[Usage], int, Tensor]] = {}
        self._norm_gradients: dict[Part, Tensor] = {}
        self._norm_pairs: dict[Part, Part] = {}

    # ---- events ----------------------------------------------------------------------------------
    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """A layer was called, for the ``index``-th time in this way in this batch."""
        form = usage.format
        for role, part in usage.parts.items():
            key = (role, form.is_embedding, part)
            self._calls[key] = self._calls.get(key, 0) + 1
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
        inputs = ("input", form.is_embedding, form.groups, usage.weight)
        count = positions.num_positions
        if count == 1 and inputs not in self._means:
            self._means[inputs] = (positions, float(biased), 1)
            return
        total, ones, total_count = self._means.get(inputs, (0, 0.0, 0))
        self._means[inputs] = (
            _mean(total) + count * widened(positions.mean()),
            ones + count * biased,
            total_count + count,
        )

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""
        for key in list(self._means):
            total, ones, count = self._means.pop(key)
            mean = _mean(total) / count
            groups = key[2]
            constant = ones / count if ones else None
            width = mean.shape[-1] // groups + (constant is not None)
            self._moment(key, width, groups).update(mean, constant)

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
            gradient = _summed(widened(gradient))  # [V, n, d_out]
            complete: dict[int, list[tuple[Any, ...]]] = {}
            for role, part, groups in wanted:
                key = (role, form.is_embedding, part)
                if self._calls.get(key) == 1:
                    complete.setdefault(groups, []).append(key)
                    continue
                usages, _, before = self._sums.get(key, (frozenset(), groups, None))
                total = gradient if before is None else before + gradient
                self._sums[key] = (usages | {usage}, groups, total)
            for groups, keys in complete.items():
                self._add_sums(keys, groups, gradient)
            return
        for groups in {groups for _, _, groups in wanted}:
            width = gradient.shape[-1] // groups
            moment = self._moment(("gradient", usage, groups), width, groups)
            moment.update(gradient)

    def _add_sums(self, keys: Sequence[tuple[Any, ...]], groups: int, sums: Tensor) -> None:
        """Add sums of gradients ``[V, n, d]``, the same for a layer's weight and bias."""
        width, rows = sums.shape[-1] // groups, sums.flatten(0, 1)
        *others, last = [self._moment(("gradient", *key), width, groups) for key in keys]
        if not others:
            last.update(rows)
            return
        new = self._new_moment(width, groups)
        new.update(rows)
        total = new.symmetric()
        assert total is not None
        for moment in others:
            moment.add(total, new.count)
        last.merge(new)

    def _add_norm(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Add the gradients of a normalisation layer's weight and bias ``[V, n, d]``."""
        gradient = widened(gradient)
        new: dict[Part, Tensor] = {}
        if usage.weight is not None:
            rows = self._normalized[usage, index].expanded().to(gradient.dtype)
            new[usage.weight] = torch.einsum("nsd, vnsd -> vnd", rows, gradient)
        if usage.bias is not None:
            new[usage.bias] = _summed(gradient)
        pairs = {usage.part("W"): usage.part("b")} if self._joint(usage) else {}
        if all(self._calls.get((role, False, part)) == 1 for role, part in usage.parts.items()):
            self._add_norms(new, pairs)
            return
        for part, summand in new.items():
            before = self._norm_gradients.get(part)
            self._norm_gradients[part] = summand if before is None else before + summand
        self._norm_pairs |= pairs

    def _add_norms(self, gradients: Mapping[Part, Tensor], pairs: Mapping[Part, Part]) -> None:
        """Add the second moments of gradients of normalisation layers' weights and biases."""
        paired = set(pairs.values())
        for part, rows in gradients.items():
            if part in paired:
                continue
            parts = [part, *([pairs[part]] if part in pairs else [])]
            columns = [gradients[p].flatten(0, 1) for p in parts]
            width = len(parts) * rows.shape[-1]
            moment = self._moment(("norm", *(p.name for p in parts)), width, 1)
            # side by side they would be as large as what they are made from
            step = max(-(-len(columns[0]) // 4), 2**16 // width)
            for some in zip(*(column.split(step) for column in columns), strict=True):
                moment.update(torch.cat(some, dim=-1))

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        same: dict[tuple[frozenset[Usage], int], list[tuple[Any, ...]]] = {}
        for key, (usages, groups, _) in self._sums.items():
            same.setdefault((usages, groups), []).append(key)
        for (_, groups), keys in same.items():
            *_, total = self._sums[keys[0]]
            self._add_sums(keys, groups, total)
        self._add_norms(self._norm_gradients, self._norm_pairs)
        self._sums, self._norm_gradients, self._norm_pairs = {}, {}, {}

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        self._normalized, self._calls = {}, {}

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
            [(B, A), (tokens, gradient)],
            keep_diagonal=(wide, tall),
            check_values=False,
            overwrite=True,
            traced=get_proxy_mode() is not None,
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


def _mean(total: Any) -> Any:
    """Return a sum of means of inputs as it is, or the mean of inputs that were held."""
    return widened(total.mean()) if isinstance(total, Positions) else total


def _summed(gradient: Tensor) -> Tensor:
    """Sum ``[V, n, S, d]`` over positions."""
    return gradient.squeeze(2) if gradient.shape[2] == 1 else gradient.sum(2)


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
