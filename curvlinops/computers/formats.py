"""The weight-sharing format of each kind of layer: what its inputs and output gradients are.

A format knows a layer's configuration, and nothing of modules, functions or graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from einconv import index_pattern
from torch import Tensor
from torch.nn import functional

from curvlinops.computers.positions import Positions, Tokens, flat_rows, split_examples
from curvlinops.kfac_utils import Layout


@dataclass(frozen=True)
class Format:
    """The format of linear layers, and the base class of the others.

    Attributes:
        name: Its name in messages.
        groups: Number of channel groups, each with a block of its own.
        is_norm: Whether weight and bias scale and shift a normalised input: their curvature is
            computed from the gradients of both, instead of as a Kronecker product.
    """

    name: ClassVar[str] = "Linear"
    groups: int = 1
    is_norm: ClassVar[bool] = False
    is_embedding: ClassVar[bool] = False

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """Return how a weight of a shape is stored, if not as ``[d_out, *d_in]``."""
        return None

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return d_out of all groups together, and d_in of one, of a weight of a shape."""
        return shape[0], prod(shape[1:])

    def output_width(self, shape: Sequence[int]) -> int:
        """Return d_out of all groups together, of an output of a shape."""
        return prod(shape[-1:])

    def input_width(self, shape: Sequence[int]) -> int:
        """Return d_in of all groups together, of an input of a shape."""
        return self.output_width(shape)

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return the inputs of n examples in weight-sharing format; ``where`` is for messages."""
        inputs = split_examples(x, n, where)
        return Positions(inputs.shape[1], lambda: inputs, sources=[inputs], layer=where)

    def gradients(self, gradient: Tensor, n: int, where: str) -> Tensor:
        """Return output gradients of n examples, ``[n, S, d_out]``."""
        return split_examples(gradient, n, where)


def _channels_last(tensor: Tensor, spatial: int) -> Tensor:
    """Bring ``[..., C, *spatial]`` to ``[B, pixels, C]``; the batch axis may be missing."""
    if tensor.ndim == spatial + 1:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(2).mT


def _num_channels(shape: Sequence[int], spatial: int) -> int:
    """Return C of a shape ``[..., C, *spatial]``."""
    return prod(shape[-spatial - 1 : -spatial])


@dataclass(frozen=True)
class ConvolutionFormat(Format):
    """The format of convolutions: the patch of every output pixel is a position."""

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name in messages."""
        return f"Conv{len(self.kernel_size)}d"

    def output_width(self, shape: Sequence[int]) -> int:
        """Return the number of channels."""
        return _num_channels(shape, len(self.kernel_size))

    def input_width(self, shape: Sequence[int]) -> int:
        """Return the number of entries of a patch."""
        return self.output_width(shape) * prod(self.kernel_size)

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return the patches of n examples."""
        if x.ndim == len(self.kernel_size) + 1:
            x = x.unsqueeze(0)
        sides = [amount for pair in reversed(self.padding) for amount in pair]
        if any(sides):
            x = functional.pad(x, sides)
        axes = list(zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True))
        num_pixels = prod((i - d * (k - 1) - 1) // s + 1 for i, k, s, d in axes)

        def patterns() -> list[Tensor]:
            options: Any = {"padding": 0, "dtype": x.dtype, "device": x.device}
            return [
                index_pattern(i, k, stride=s, dilation=d, **options).mean(1) for i, k, s, d in axes
            ]

        def unfold(images: Tensor) -> Tensor:
            return _windows(images, axes)

        kernel = prod(self.kernel_size)
        return _patches(x, unfold, num_pixels, patterns, kernel, n, where)

    def gradients(self, gradient: Tensor, n: int, where: str) -> Tensor:
        """Return the gradients of the pixels of n examples."""
        return split_examples(_channels_last(gradient, len(self.kernel_size)), n, where)


def _patches(
    x: Tensor,
    unfold: Callable[[Tensor], Tensor],
    num_pixels: int,
    patterns: Callable[[], Sequence[Tensor]],
    kernel: int,
    n: int,
    where: str,
    backwards: bool = False,
) -> Positions:
    """Return the patches of images ``[B, C, *I]`` of n examples as positions.

    Args:
        x: The images.
        unfold: Returns the patches of some of them, ``[B, pixels, C * kernel]``.
        num_pixels: Of the output of one.
        patterns: Returns, for each axis, the weights of input pixels in the mean patch ``[k, i]``.
        kernel: The number of entries of the kernel.
        n: The number of examples.
        where: What messages call the layer.
        backwards: Whether the last pixel comes first in the patches.
    """

    def rows() -> Tensor:
        patches = unfold(x).flip(1) if backwards else unfold(x)
        return split_examples(patches, n, where)

    def parts() -> Iterator[Tensor]:
        split_examples(x.new_empty(x.shape[0], num_pixels, 0), n, where)  # raises if it cannot
        entries = num_pixels * x.shape[1] * kernel
        for images in x.split(_num_images(x, entries)):
            yield flat_rows(unfold(images))

    def mean() -> Tensor:
        averaged = x
        for pattern in patterns():  # the first axis is contracted and its kernel axis appended
            averaged = torch.tensordot(averaged, pattern, dims=([2], [1]))
        return split_examples(averaged.flatten(1).unsqueeze(1), n, where).mean(1)

    num_positions = num_pixels * x.shape[0] // n
    return Positions(num_positions, rows, mean, parts, sources=[x], layer=where)


def _num_images(x: Tensor, entries: int) -> int:
    """Return of how many images to unfold the patches at once, with so many entries each.

    As many as fit into a processor's cache, but at least an eighth of them, so that traces of this
    are short. Other devices have memory enough, and want fewer operations.
    """
    fitting = (2**20 if x.device.type == "cpu" else 2**26) // max(entries, 1)
    return max(fitting, -(-x.shape[0] // 8), 1)


def _windows(x: Tensor, axes: list[tuple[int, int, int, int]]) -> Tensor:
    """Return all patches of images ``[B, C, *I]``, as ``[B, pixels, C * kernel]``.

    They are stored as ``[C * kernel, B, pixels]``: so images are copied line by line, and the
    second moment of all patches needs no other copy.
    """
    for axis, (_, k, s, d) in enumerate(axes, start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # the kernel's axis is appended
    spatial = len(axes)
    num_images, pixels = x.shape[0], prod(x.shape[2 : 2 + spatial])
    kernel = range(2 + spatial, 2 + 2 * spatial)
    x = x.permute(1, *kernel, 0, *range(2, 2 + spatial))  # [C, *K, B, *O]
    return x.reshape(-1, num_images, pixels).permute(1, 2, 0)


@dataclass(frozen=True)
class TransposedConvolutionFormat(Format):
    """The format of transposed convolutions: the positions are the output pixels.

    An output pixel sees the input pixels that the kernel spreads to it: its patch is that of a
    convolution with the kernel reversed, of an input with zeros between its pixels.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name in messages."""
        return f"ConvTranspose{len(self.kernel_size)}d"

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """Bring ``[C_in, C_out / groups, *K]`` to ``[C_out, C_in / groups * K]``."""
        view = [self.groups, shape[0] // self.groups, shape[1], prod(shape[2:])]
        return {"view": view, "order": [0, 2, 1, 3]}

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return C_out, and the width of a group's patch."""
        return self.groups * shape[1], shape[0] // self.groups * prod(shape[2:])

    def output_width(self, shape: Sequence[int]) -> int:
        """Return the number of channels."""
        return _num_channels(shape, len(self.kernel_size))

    def input_width(self, shape: Sequence[int]) -> int:
        """Return the number of entries of a patch."""
        return self.output_width(shape) * prod(self.kernel_size)

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return what every output pixel of n examples sees."""
        if x.ndim == len(self.kernel_size) + 1:
            x = x.unsqueeze(0)
        options = (self.stride, self.padding, self.output_padding, self.dilation)
        axes = list(zip(x.shape[2:], self.kernel_size, *options, strict=True))
        sizes = [(i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, k, s, p, o, d in axes]

        def patterns() -> list[Tensor]:
            result = []
            for (i, k, s, p, _, d), size in zip(axes, sizes, strict=True):
                starts = torch.arange(i, device=x.device) * s - p
                pixels = starts + d * torch.arange(k, device=x.device).unsqueeze(1)
                result.append(((pixels >= 0) & (pixels < size)).to(x.dtype) / size)
            return result

        def unfold(images: Tensor) -> Tensor:
            # With everything reversed the kernel is not.
            places: Any = (..., *(slice(None, None, s) for s in self.stride))
            spread = [(i - 1) * s + 1 for i, _, s, *_ in axes]
            whole = images.new_zeros(*images.shape[:2], *spread)
            whole[places] = images.flip(*range(2, x.ndim))
            sides = [(d * (k - 1) - p + o, d * (k - 1) - p) for _, k, _, p, o, d in reversed(axes)]
            whole = functional.pad(whole, [amount for pair in sides for amount in pair])
            plain = zip(whole.shape[2:], self.kernel_size, self.dilation, strict=True)
            return _windows(whole, [(i, k, 1, d) for i, k, d in plain])

        kernel = prod(self.kernel_size)
        return _patches(x, unfold, prod(sizes), patterns, kernel, n, where, backwards=True)

    def gradients(self, gradient: Tensor, n: int, where: str) -> Tensor:
        """Return the gradients of the pixels of n examples."""
        return split_examples(_channels_last(gradient, len(self.kernel_size)), n, where)


@dataclass(frozen=True)
class EmbeddingFormat(Format):
    """The format of embeddings, linear layers of one-hot inputs."""

    name: ClassVar[str] = "Embedding"
    is_embedding: ClassVar[bool] = True
    size: int = 0
    padding_idx: int | None = None
    dtype: torch.dtype = torch.float32

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """Transpose ``[V, d]``."""
        return {"view": list(shape), "order": [1, 0]}

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return d and V."""
        return shape[1], shape[0]

    def input_width(self, shape: Sequence[int]) -> int:
        """Return V: inputs are places of ones."""
        return self.size

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return the tokens of n examples; padding counts, but its input is zero."""
        indices = split_examples(x.unsqueeze(-1), n, where).squeeze(-1).long()
        weights = torch.ones_like(indices, dtype=self.dtype)
        if self.padding_idx is not None:
            weights = weights * (indices != self.padding_idx)
        return Tokens(indices, weights, self.size, where)


@dataclass(frozen=True)
class NormFormat(Format):
    """The format of normalisation over the last axes: the inputs are the normalised ones.

    Attributes:
        kind: ``"LayerNorm"`` or ``"RMSNorm"``.
        shape: The normalised shape.
        eps: Added to the variance.
    """

    kind: str = "LayerNorm"
    shape: tuple[int, ...] = ()
    eps: float | None = 1e-5
    is_norm: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name in messages."""
        return self.kind

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the number of weights."""
        return prod(shape), 0

    def output_width(self, shape: Sequence[int]) -> int:
        """Return the number of entries that are normalised together."""
        return prod(shape[-len(self.shape) :])

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return normalised inputs ``[n, S, d]``."""

        def rows() -> Tensor:
            if self.kind == "RMSNorm":
                normalized = functional.rms_norm(x, list(self.shape), None, self.eps)
            else:
                assert self.eps is not None
                normalized = functional.layer_norm(x, list(self.shape), None, None, self.eps)
            return self.gradients(normalized, n, where)

        num_positions = x.numel() // max(n * prod(self.shape), 1)
        return Positions(num_positions, rows, sources=[x], layer=where)

    def gradients(self, gradient: Tensor, n: int, where: str) -> Tensor:
        """Flatten the normalised axes, and split the others."""
        return split_examples(gradient.flatten(-len(self.shape)), n, where)


@dataclass(frozen=True)
class ChannelNormFormat(Format):
    """The format of normalisation with a weight per channel, the second axis.

    Attributes:
        kind: ``"GroupNorm"`` or ``"BatchNorm"`` (in evaluation mode).
        num_groups: Of GroupNorm.
        eps: Added to the variance.
        statistics: Mean and variance, of BatchNorm.
    """

    kind: str = "GroupNorm"
    num_groups: int = 1
    eps: float = 1e-5
    statistics: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)
    is_norm: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name in messages."""
        return self.kind

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the number of weights."""
        return prod(shape), 0

    def output_width(self, shape: Sequence[int]) -> int:
        """Return the number of channels."""
        return prod(shape[1:2])

    def positions(self, x: Tensor, n: int, where: str) -> Positions:
        """Return normalised inputs ``[n, S, C]``."""

        def rows() -> Tensor:
            if self.statistics is not None:
                normalized = functional.batch_norm(x, *self.statistics, eps=self.eps)
            else:
                normalized = functional.group_norm(x, self.num_groups, eps=self.eps)
            return self.gradients(normalized, n, where)

        num_positions = x.numel() // max(n * x.shape[1], 1)
        return Positions(num_positions, rows, sources=[x], layer=where)

    def gradients(self, gradient: Tensor, n: int, where: str) -> Tensor:
        """Bring the channels to the end, and split the rest."""
        return split_examples(gradient.movedim(1, -1), n, where)


__all__ = [
    "ChannelNormFormat",
    "ConvolutionFormat",
    "EmbeddingFormat",
    "Format",
    "NormFormat",
    "TransposedConvolutionFormat",
]
