"""Which groups of parameters KFAC approximates together, and how the model uses them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor

from curvlinops.computers.formats import Format, NormFormat, TransposedConvolutionFormat
from curvlinops.computers.usages import Part, Usage
from curvlinops.kfac_utils import Layout, ParamGroup

#: Rows of a parameter in canonical form: start and stop.
Rows = tuple[int, int]


@dataclass(frozen=True)
class GroupPlan:
    """How a group of parameters is treated.

    Attributes:
        group: Role to parameter name.
        usages: How the model uses the weight (or the bias, if it is alone); none if it does not.
        tied: For a weight that is an embedding, too: those usages.
        format: The format of the layers, which gives the canonical form.
        blocks: The rows of each block of the weight (or of the bias alone).
        d_out: Number of rows of all blocks.
        d_in: Width of the input factor, with the bias; 0 if there is none.
        layout: How the weight is stored.
        diagonal: Whether only the diagonal of the block is wanted, computed exactly.
    """

    group: ParamGroup
    usages: tuple[Usage, ...]
    tied: tuple[Usage, ...]
    format: Format
    blocks: tuple[Rows, ...]
    d_out: int
    d_in: int
    layout: Layout | None
    diagonal: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The names of the group's parameters."""
        return tuple(self.group.values())

    @property
    def joint(self) -> bool:
        """Whether weight and bias are approximated together."""
        return len(self.group) == 2

    @property
    def all_usages(self) -> tuple[Usage, ...]:
        """How the model uses the parameters, those of embeddings included."""
        return (*self.usages, *self.tied)

    @property
    def size(self) -> int:
        """The number of rows of the group's block."""
        return sum(prod(sizes) for sizes in self.sizes)

    @property
    def sizes(self) -> list[list[int]]:
        """The sizes of each block's factors: of the gradient factor, and of an input factor."""
        groups = self.format.groups if "W" in self.group else 1
        heights = [
            self.d_out if self.format.is_norm else (stop - start) // groups
            for start, stop in self.blocks
            for _ in range(groups)
        ]
        return [[height, self.d_in] if self.d_in else [height] for height in heights]

    @property
    def name(self) -> str:
        """The name of the layers' kind."""
        if self.diagonal:
            return "any"
        return f"{self.format.name} + Embedding" if self.tied else self.format.name


def plan_groups(
    usages: Iterable[Usage],
    params: dict[str, Tensor],
    separate_weight_and_bias: bool,
    diagonal: Iterable[str] = (),
) -> list[GroupPlan]:
    """Return the groups, in the order of ``params``.

    Args:
        usages: The different ways in which the model uses the parameters.
        params: The parameters to approximate.
        separate_weight_and_bias: Whether weights and biases get blocks of their own.
        diagonal: Names of parameters that are used in other ways, too.

    Raises:
        NotImplementedError: If a parameter is used in ways that do not fit together.
        ValueError: If a joint group has layers with different biases.
    """
    uses = _uses(usages, params, set(diagonal))
    partner = {} if separate_weight_and_bias else _partners(uses, set(diagonal))
    plans: list[GroupPlan] = []
    done: set[str] = set()
    for name in params:
        if name in done:
            continue
        if name in diagonal:
            group, plan = {"W": name}, _diagonal_plan(name, params)
        else:
            group = {_role(name, uses, params): name}
            other = partner.get(name)
            if other is not None:
                group = {"W": name, "b": other} if "W" in group else {"W": other, "b": name}
            plan = _plan_group(group, uses, params)
        done.update(group.values())
        plans.append(plan)
    return plans


Uses = dict[str, list[tuple[str, Usage]]]
"""For each parameter: its role in each usage."""


def _uses(usages: Iterable[Usage], params: dict[str, Tensor], diagonal: set[str]) -> Uses:
    """Return the usages of each parameter; refuse those that do not fit together."""
    uses: Uses = {name: [] for name in params}
    for usage in dict.fromkeys(usages):
        for role, part in (("W", usage.weight), ("b", usage.bias)):
            if part is not None and part.name not in diagonal:
                uses[part.name].append((role, usage))
    problems = {}
    for name, all_ in uses.items():
        problem = _misfit(all_)
        if problem:
            problems[name] = problem
    if problems:
        raise MisfitError(problems)
    return uses


class MisfitError(Exception):
    """Parameters are used in ways that do not fit together; holds the reasons by name."""

    def __init__(self, problems: dict[str, str]):
        super().__init__(str(problems))
        self.problems = problems


def _misfit(uses: list[tuple[str, Usage]]) -> str | None:
    """Return why usages of a parameter do not fit together, or None if they do."""
    if not uses:
        return None
    if len({role for role, _ in uses}) > 1:
        return "used as weight and as bias"
    main, _ = _split(uses)
    if len({(u.format.name, u.format.groups, u.format.is_norm) for u in main}) > 1:
        names = sorted({u.format.name for u in main})
        return f"shared by {' and '.join(names)}"
    role = uses[0][0]
    parts = {u.part(role) for u in main}
    if len({part.transposed for part in parts}) > 1:
        return "used transposed, and as it is"
    ends = sorted({(part.start, part.stop) for part in parts})
    if any(a[1] != b[0] for a, b in pairwise(ends)):
        return "used in parts that overlap, or leave a part out"
    if ends[0][0] != 0 or ends[-1][1] != main[0].part(role).whole:
        return "used in parts that leave a part out"
    return None


def _split(uses: list[tuple[str, Usage]]) -> tuple[list[Usage], list[Usage]]:
    """Return the usages in the main format, and those of an embedding tied to it."""
    others = [u for _, u in uses if not u.format.is_embedding]
    embeddings = [u for _, u in uses if u.format.is_embedding]
    return (others, embeddings) if others else (embeddings, [])


def _role(name: str, uses: Uses, params: dict[str, Tensor]) -> str:
    """Return a parameter's role, a guess if it is not used."""
    if uses[name]:
        return uses[name][0][0]
    return "W" if params[name].ndim > 1 or name.endswith("weight") else "b"


def _plan_group(group: ParamGroup, uses: Uses, params: dict[str, Tensor]) -> GroupPlan:
    """Return how one group is treated."""
    role = "W" if "W" in group else "b"
    p = params[group[role]]
    main, tied = _split(uses[group[role]])
    joint = len(group) == 2
    form = main[0].format if main else _guess(group, params)
    transposed = role == "W" and bool(main) and main[0].part("W").transposed
    layout: Layout | None = None
    if role == "b":
        d_out, d_in = p.numel(), 0
    elif transposed:
        d_out, d_in = p[0].numel(), p.shape[0]
        layout = {"view": [p.shape[0], p[0].numel()], "order": [1, 0]}
    else:
        d_out, d_in = form.widths(p.shape)
        layout = form.layout(p.shape)
    if form.is_norm:
        d_out, d_in = d_out * (1 + joint), 0
    elif role == "W":
        d_in += joint
    blocks = sorted({u.rows(role) for u in main}) or [(0, d_out)]
    if form.is_norm:
        blocks = [(0, d_out)]
    return GroupPlan(group, tuple(main), tuple(tied), form, tuple(blocks), d_out, d_in, layout)


def _guess(group: ParamGroup, params: dict[str, Tensor]) -> Format:
    """Return a format that fits parameters that are not used."""
    if "W" in group and params[group["W"]].ndim == 1:
        return NormFormat()
    if len(group) == 1:
        return Format()
    weight, bias = (params[group[role]] for role in ("W", "b"))
    if weight.ndim < 3 or weight.shape[0] == bias.numel():
        return Format()
    groups = max(1, bias.numel() // weight.shape[1])
    return TransposedConvolutionFormat(groups, tuple(weight.shape[2:]))


def _diagonal_plan(name: str, params: dict[str, Tensor]) -> GroupPlan:
    """Return the plan of a parameter whose block is diagonal."""
    size = params[name].numel()
    return GroupPlan({"W": name}, (), (), Format(), ((0, size),), size, 0, None, diagonal=True)


def _sibling(name: str) -> str:
    """Return the usual name of the bias of a weight, or of the weight of a bias."""
    for own, other in (("weight", "bias"), ("bias", "weight")):
        if name.endswith(own):
            return name.removesuffix(own) + other
    return ""


def _partners(uses: Uses, diagonal: set[str]) -> dict[str, str]:
    """Return the weight of each bias and the bias of each weight that form joint groups.

    A bias whose parts belong to different weights (that of attention can) stays alone.
    """
    partners: dict[str, str] = {}
    alone = diagonal | {
        usage.part("b").name
        for all_ in uses.values()
        for _, usage in all_
        if usage.weight is not None and usage.bias is not None and not usage.joint
    }
    for name, all_ in uses.items():
        main, _ = _split(all_)
        if name in alone:
            continue
        if not main:  # unused: by their names
            other = _sibling(name)
            if other in uses and not uses[other]:
                partners[name] = other
            continue
        role = all_[0][0]
        opposite = {"W": "b", "b": "W"}[role]
        found = {_other(u, opposite) for u in main}
        found = {None if part is None or part.name in alone else part for part in found}
        # a usage without bias is fine, but not one of the bias with a weight that is a constant
        if len(found) > 1 and role == "W":
            found.discard(None)
        names = {None if part is None else part.name for part in found}
        if len(names) > 1:
            others = sorted(other or "one that is not in params" for other in names)
            raise ValueError(
                f"The layers that share {name!r} have conflicting biases or weights: {others}. Use "
                "separate_weight_and_bias=True."
            )
        (only,) = names
        if only is not None:
            partners[name] = only
    return partners


def _other(usage: Usage, role: str) -> Part | None:
    return usage.weight if role == "W" else usage.bias


__all__ = ["GroupPlan", "MisfitError", "plan_groups"]
