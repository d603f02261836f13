"""Which groups of parameters KFAC approximates together, and which layers use them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from curvlinops.computers.layers import LAYERS, LayerRule, find_rule
from curvlinops.kfac_utils import Layout, ParamGroup


@dataclass(frozen=True)
class GroupPlan:
    """How a group of parameters is treated.

    Attributes:
        group: Role to parameter name.
        layers: Names of the modules that use the weight (or the bias, if it is alone).
        biased: For a joint group, those of them that use its bias too.
        rule: What is known about the layer type.
        d_in: Width of the input factor, with the bias; 0 for a bias alone.
        d_out: Width of the gradient factor.
        layout: How the weight is stored.
    """

    group: ParamGroup
    layers: tuple[str, ...]
    biased: frozenset[str]
    rule: LayerRule
    d_in: int
    d_out: int
    layout: Layout | None

    @property
    def key(self) -> tuple[str, ...]:
        """The names of the group's parameters."""
        return tuple(self.group.values())


@dataclass(frozen=True)
class _Use:
    """A module that owns a parameter."""

    layer: str
    rule: LayerRule
    role: str


def plan_groups(
    model: nn.Module, params: dict[str, Tensor], separate_weight_and_bias: bool
) -> tuple[list[GroupPlan], dict[str, tuple[nn.Module, LayerRule]]]:
    """Return the groups, in the order of ``params``, and the layers that are involved.

    Args:
        model: The model.
        params: The parameters to approximate.
        separate_weight_and_bias: Whether weights and biases get blocks of their own.

    Raises:
        NotImplementedError: If parameters belong to layers that are not supported.
        ValueError: If a joint group has layers with different biases.
    """
    uses = _find_uses(model, params)
    partner = {} if separate_weight_and_bias else _find_partners(uses)
    modules = dict(model.named_modules())
    plans: list[GroupPlan] = []
    done: set[str] = set()
    for name in params:
        if name in done:
            continue
        group: ParamGroup = {uses[name][0].role: name}
        other = partner.get(name)
        if other is not None:
            group = {"W": name, "b": other} if "W" in group else {"W": other, "b": name}
        done.update(group.values())
        plans.append(_plan_group(group, uses, params, modules))
    layers = {use.layer: (modules[use.layer], use.rule) for all_ in uses.values() for use in all_}
    return plans, layers


def _plan_group(
    group: ParamGroup,
    uses: dict[str, list[_Use]],
    params: dict[str, Tensor],
    modules: dict[str, nn.Module],
) -> GroupPlan:
    """Return how one group is treated."""
    main = group["W"] if "W" in group else group["b"]
    layers = tuple(use.layer for use in uses[main])
    rule = uses[main][0].rule
    joint = set(group) == {"W", "b"}
    shape = params[main].shape
    return GroupPlan(
        group=group,
        layers=layers,
        biased=frozenset(use.layer for use in uses[group["b"]]) if joint else frozenset(),
        rule=rule,
        d_in=prod(shape[1:]) + joint if "W" in group else 0,
        d_out=shape[0],
        layout=rule.layout(modules[layers[0]]) if "W" in group else None,
    )


def _find_uses(model: nn.Module, params: dict[str, Tensor]) -> dict[str, list[_Use]]:
    """Return the supported layers that own each parameter; refuse others by name."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    user_name = {id(by_name[name]): name for name in params if name in by_name}
    uses: dict[str, list[_Use]] = {name: [] for name in params}
    problems: dict[str, str] = {}
    for layer, module in model.named_modules():
        rule = find_rule(module)
        for attribute, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            name = user_name.get(id(tensor))
            if name is None:
                continue
            role = {"weight": "W", "bias": "b"}.get(attribute)
            reason = None if rule is None else rule.refuse(module)
            if rule is None or role is None:
                problems[name] = type(module).__name__
            elif reason is not None:
                problems[name] = f"{type(module).__name__} with {reason}"
            elif uses[name] and uses[name][0].rule is not rule:
                problems[name] = f"shared by {uses[name][0].rule.name} and {rule.name}"
            else:
                uses[name].append(_Use(layer, rule, role))
    if problems:
        listing = ", ".join(f"{name!r} ({what})" for name, what in problems.items())
        supported = ", ".join(rule.name for rule in LAYERS)
        raise NotImplementedError(
            f"These parameters are not in supported layers: {listing}. Supported: {supported} "
            "(groups=1). Leave them out of params to treat them as constants."
        )
    return uses


def _find_partners(uses: dict[str, list[_Use]]) -> dict[str, str]:
    """Return the weight of each bias and the bias of each weight that form joint groups."""
    owner = {(use.layer, use.role): name for name, all_ in uses.items() for use in all_}
    partners: dict[str, str] = {}
    for name, all_ in uses.items():
        opposite = {"W": "b", "b": "W"}
        found = {owner.get((use.layer, opposite[use.role])) for use in all_}
        # a usage without bias is fine, but not one of the bias with a weight that is a constant
        if len(found) > 1 and all_[0].role == "W":
            found.discard(None)
        if len(found) > 1:
            others = [other or "one that is not in params" for other in found]
            raise ValueError(
                f"The layers {[use.layer for use in all_]} share {name!r}, but have conflicting "
                f"biases or weights: {sorted(others)}. Use separate_weight_and_bias=True."
            )
        if found != {None}:
            partners[name] = str(found.pop())
    return partners
