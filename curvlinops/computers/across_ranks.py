"""How Kronecker factors of data on several ranks become one, and which rank decomposes which."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.encoding import decode, encode
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Moment
from curvlinops.computers.usages import Usage
from curvlinops.distributed import Collective
from curvlinops.distributed.transfers import BucketedSums


def check_same_steps(collective: Collective, data: Any) -> None:
    """Raise if ranks have different numbers of batches, with which FSDP would wait for ever.

    Args:
        collective: The ranks.
        data: The batches of this one; nothing is known if they have no length.
    """
    number = len(data) if hasattr(data, "__len__") else -1
    numbers = [other for (other,) in collective.exchange([number])]
    if len(set(numbers) - {-1}) > 1:
        raise ValueError(
            "With parameters that are sharded by FSDP, all ranks evaluate the model together, and "
            f"need the same number of batches, but they have {numbers}. Split the data otherwise; "
            "batches may differ in size."
        )


def known_to_any(
    collective: Collective, usages: Iterable[Usage], diagonal: Iterable[str]
) -> tuple[list[Usage], list[str]]:
    """Return the usages, and the parameters with other uses, that any rank has seen."""
    if collective.alone:
        return list(usages), list(diagonal)
    seen = collective.gather(([encode(usage) for usage in usages], sorted(diagonal)))
    found = dict.fromkeys(decode(code) for codes, _ in seen for code in codes)
    return list(found), sorted({name for _, names in seen for name in names})


def assign(
    plans: Sequence[GroupPlan],
    keys: Mapping[tuple[str, ...], Iterable[Hashable]],
    size: int,
    num_holders: int,
) -> list[list[int]]:
    """Return the ranks that hold the block of each group, its owner first.

    The cost of a block is that of decomposing its factors. The most expensive ones come first, each
    to the rank that has least so far: no rank has more than the mean and the largest one. Groups
    that need the same moments have one owner.

    Args:
        plans: The groups.
        keys: By group: the keys of the moments that it needs.
        size: The number of ranks.
        num_holders: The number of ranks that hold a block.
    """
    units = connected([set(keys[plan.key]) for plan in plans])
    costs = [
        sum(width**3 for i in unit for widths in plans[i].sizes for width in widths)
        for unit in units
    ]
    loads = [0] * size
    holders: list[list[int]] = [[] for _ in plans]
    for number in sorted(range(len(units)), key=lambda i: -costs[i]):
        owner = min(range(size), key=loads.__getitem__)
        loads[owner] += costs[number]
        for i in units[number]:
            holders[i] = [(owner + j) % size for j in range(num_holders)]
    return holders


def connected(sets: Sequence[set[Hashable]]) -> list[list[int]]:
    """Return the numbers of sets, those that have something in common together."""
    units: list[tuple[set[Hashable], list[int]]] = []
    for i, keys in enumerate(sets):
        joined, members, others = set(keys), [i], []
        for other_keys, other_members in units:
            if other_keys & joined:
                joined |= other_keys
                members = other_members + members
            else:
                others.append((other_keys, other_members))
        units = [*others, (joined, members)]
    return [sorted(members) for _, members in units]


def add_moments(
    collective: Collective,
    moments: dict[Hashable, Moment],
    owners: Mapping[Hashable, int | None],
    like: Tensor,
) -> None:
    """Add moments over the ranks, in place; those that other ranks own are dropped.

    Args:
        collective: The ranks.
        moments: The moments of this rank.
        owners: The rank that needs a moment, None if all do.
        like: A tensor on the moments' device.

    Raises:
        RuntimeError: If ranks have different moments by one key.
    """
    if collective.alone:
        return
    own = [(encode(key), _described(moment)) for key, moment in moments.items()]
    described: dict[Hashable, Any] = {}
    counts: dict[Hashable, float] = {}
    for rank, entries in enumerate(collective.gather(own)):
        for code, (count, *form) in entries:
            key = decode(code)
            if described.setdefault(key, form) != form:
                raise RuntimeError(
                    f"The factors of {key} differ between ranks: {described[key]}, and {form} on "
                    f"rank {collective.name(rank)}. All ranks must have the same model."
                )
            counts[key] = counts.get(key, 0.0) + count
    sums = BucketedSums(collective)
    for key, (shape, dtype, diagonal, groups) in described.items():
        if key not in moments:
            moments[key] = Moment(diagonal, groups, dtype)
        moment = moments[key]
        moment.count = counts[key]
        if moment.total is None:
            moment.total = torch.zeros(shape, dtype=dtype, device=like.device)
        sums.add(moment.total, owners.get(key), symmetric=not diagonal)
    sums.finish()
    for key in list(moments):
        moments[key].complete()
        if owners.get(key) not in (None, collective.rank):
            del moments[key]


def add_totals(
    collective: Collective,
    plans: Iterable[tuple[GroupPlan, list[Tensor | None]]],
    owners: Mapping[tuple[str, ...], int | None],
    like: Tensor,
) -> None:
    """Add the results of a statistic of whole gradients over the ranks, in place.

    Args:
        collective: The ranks.
        plans: The groups, and their results by block.
        owners: The rank that needs those of a group, None if all do.
        like: A tensor of the results' dtype and device.
    """
    if collective.alone:
        return
    own = {plan.key: totals for plan, totals in plans}
    described = collective.gather(
        {key: [None if t is None else tuple(t.shape) for t in ts] for key, ts in own.items()}
    )
    sums = BucketedSums(collective)
    for key, totals in own.items():
        for block, total in enumerate(totals):
            shapes = {others[key][block] for others in described} - {None}
            if len(shapes) > 1:
                raise RuntimeError(
                    f"The results for {', '.join(map(repr, key))} differ between ranks: they have "
                    f"the shapes {sorted(shapes)}. All ranks must have the same model."
                )
            for shape in shapes:  # none if no rank has called the layer
                summand = like.new_zeros(shape) if total is None else total.to(like.dtype)
                totals[block] = summand = summand.contiguous()
                sums.add(summand, owners.get(key))
    sums.finish()


def _described(moment: Moment) -> tuple[Any, ...]:
    """Return a moment's count, and what must be the same on all ranks."""
    total = moment.total
    assert total is not None
    return moment.count, tuple(total.shape), total.dtype, moment.diagonal, moment.groups


__all__ = ["add_moments", "add_totals", "assign", "check_same_steps", "connected", "known_to_any"]
