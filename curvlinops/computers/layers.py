"""The table of layers that KFAC supports: one entry per type says all there is to know about it.

Collectors ask the table only. A new layer type is a new entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from curvlinops.computers.positions import Positions, split_examples
from curvlinops.kfac_utils import Layout, extract_averaged_patches


@dataclass(frozen=True)
class LayerRule:
    """What KFAC must know of a layer type.

    Attributes:
        name: Its name in messages.
        module_type: The module class; subclasses count as long as they keep its forward pass.
        positions: ``(module, input, n, name) -> Positions``: the inputs in weight-sharing format.
        gradients: ``(gradient, n, name) -> [n, S, d_out]``: the output gradients in that format.
        refuse: ``module -> reason or None``: why a module of this type is not supported.
        layout: How the weight is stored if not ``[d_out, *d_in]``.
    """

    name: str
    module_type: type[nn.Module]
    positions: Callable[[Any, Tensor, int, str], Positions]
    gradients: Callable[[Tensor, int, str], Tensor]
    refuse: Callable[[Any], str | None] = lambda _: None
    layout: Callable[[Any], Layout | None] = lambda _: None

    def matches(self, module: nn.Module) -> bool:
        """Return whether the rule is about a module: whether it runs the same code."""
        if "forward" in vars(module):
            return False
        names = ("__call__", "forward", "_conv_forward")
        return isinstance(module, self.module_type) and all(
            getattr(type(module), name, None) is getattr(self.module_type, name, None)
            for name in names
        )


def _linear_positions(module: nn.Linear, x: Tensor, n: int, name: str) -> Positions:
    """Every leading axis but that of the examples is a position."""
    inputs = split_examples(x, n, name)
    return Positions(inputs.shape[1], lambda: inputs)


def _linear_gradients(gradient: Tensor, n: int, name: str) -> Tensor:
    return split_examples(gradient, n, name)


def _conv2d_positions(module: nn.Conv2d, x: Tensor, n: int, name: str) -> Positions:
    """The patch of every output pixel is a position."""
    if x.ndim == 3:  # an input without batch axis
        x = x.unsqueeze(0)
    x = _pad(module, x)
    options: dict[str, Any] = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "dilation": module.dilation,
    }

    def rows() -> Tensor:
        patches = rearrange(functional.unfold(x, **options), "b d o -> b o d")
        return split_examples(patches, n, name)

    def mean() -> Tensor:
        return split_examples(extract_averaged_patches(x, **options).unsqueeze(1), n, name).mean(1)

    sizes = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    num_pixels = prod((i - d * (k - 1) - 1) // s + 1 for i, k, s, d in sizes)
    return Positions(num_pixels * x.shape[0] // n, rows, mean)


def _pad(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad an image as the convolution does."""
    if isinstance(module.padding, str):
        totals = [
            d * (k - 1) if module.padding == "same" else 0
            for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(p), int(p)) for p in module.padding]
    amounts = [amount for side in reversed(sides) for amount in side]
    if not any(amounts):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, amounts, mode=mode)


def _conv2d_gradients(gradient: Tensor, n: int, name: str) -> Tensor:
    if gradient.ndim == 3:
        gradient = gradient.unsqueeze(0)
    return split_examples(rearrange(gradient, "b c h w -> b (h w) c"), n, name)


def _refuse_groups(module: nn.Conv2d) -> str | None:
    return f"groups={module.groups}" if module.groups != 1 else None


LAYERS: list[LayerRule] = [
    LayerRule("Linear", nn.Linear, _linear_positions, _linear_gradients),
    LayerRule("Conv2d", nn.Conv2d, _conv2d_positions, _conv2d_gradients, refuse=_refuse_groups),
]


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the entry about a module, or None if there is none."""
    return next((rule for rule in LAYERS if rule.matches(module)), None)


__all__ = ["LAYERS", "LayerRule", "find_rule"]
