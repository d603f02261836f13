r"""The stream of layer inputs and output gradients that Kronecker factors are made of.

A pass over the data runs the model on each batch and back-propagates loss vectors. It reports the
inputs of each layer, and the gradients of its outputs, in weight-sharing format: a layer multiplies
the same weight at S positions of each of n examples. :meth:`KFACComputer.stream` hands these events
to a statistic, of this package or of a user. The sum of outer products of the pairs that
:class:`Pairs` hands out, over positions, is the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from curvlinops.computers.positions import Positions
from curvlinops.computers.usages import Usage


class Statistic(Protocol):
    """What listens to the events of a pass over the data; a subclass overrides what it needs.

    The tensors that are handed over must not be changed. Each method does nothing by itself.
    """

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """A layer was called, for the ``index``-th time in this way in this batch."""
        return

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""
        return

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """The gradients ``[V, n, S, d_out]`` of V loss vectors at a layer's output exist."""
        return

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        return

    def end_of_batch(self) -> None:
        """All vectors of a batch were back-propagated."""
        return


class Sums(Statistic, Protocol):
    """A statistic of raw sums, to which those of other batches can be added."""

    def merge(self, other: Any) -> None:
        """Add what another statistic of this kind gathered; it must not be used any more."""

    def scale(self, inputs: float, gradients: float) -> None:
        """Multiply the sums of products of inputs, and those of products of gradients."""


class Collector(Protocol):
    """What runs a batch, and reports the events of its layers to a statistic."""

    #: How often each usage occurred in this batch.
    calls: dict[Usage, int]
    #: Parameters that are used in other ways in this batch, and by which function.
    other_uses: dict[str, str]

    def backward(self, F: Tensor, vector: Tensor, last: bool) -> Any:
        """Back-propagate a loss vector ``[m, C]`` from predictions; free the graph if the last."""


class Pairs(Statistic):
    r"""Hands out the inputs of each layer together with its output gradients.

    The gradient of a layer's weight ``[d_out, d_in]``, as the layer reads it, for example n and
    loss vector v is :math:`\sum_s g_{v, n, s} a_{n, s}^\top`, and that of its bias
    :math:`\sum_s g_{v, n, s}`. With G channel groups, ``a`` and ``g`` are those of all groups one
    after the other; a normalisation has the normalised inputs, and :math:`a \odot g` in place of
    the outer product.

    The inputs of one batch are held until its end. Gradients come as the backward pass reaches a
    layer, for one loss vector after the other, or for a few of them at once if they are small.

    Args:
        on_pair: Called with how the layer uses parameters (``usage.weight`` and ``usage.bias`` have
            a ``name``, or are None), its inputs ``[n, S, d_in]``, and the gradients of V loss
            vectors ``[V, n, S, d_out]``. It is called for each call of a layer. Without a weight
            among the parameters, the inputs are None.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.computers.events import Pairs
        >>> from curvlinops.computers.kfac_hooks import HooksKFACComputer
        >>> model = nn.Linear(3, 2)
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2)), (torch.rand(1, 3), torch.rand(1, 2))]
        >>> params = dict(model.named_parameters())
        >>> computer = HooksKFACComputer(
        ...     model, nn.MSELoss(), params, data, fisher_type="empirical"
        ... )
        >>> seen = []
        >>> scale = computer.stream(Pairs(lambda usage, a, g: seen.append((usage, a, g))))
        >>> [(usage.weight.name, list(a.shape), list(g.shape)) for usage, a, g in seen]
        [('weight', [4, 1, 3], [1, 4, 1, 2]), ('weight', [1, 1, 3], [1, 1, 1, 2])]
        >>> scale  # of the mean over 5 * 2 numbers
        0.1
    """

    def __init__(self, on_pair: Callable[[Usage, Tensor | None, Tensor], None]):
        self._on_pair = on_pair
        self._inputs: dict[tuple[Usage, int], Positions] = {}

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Hold the inputs of a layer."""
        if usage.weight is not None:
            self._inputs[usage, index] = positions

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Hand out a pair."""
        positions = self._inputs.get((usage, index))
        self._on_pair(usage, None if positions is None else positions.expanded(), gradient)

    def end_of_batch(self) -> None:
        """Forget the inputs."""
        self._inputs = {}


__all__ = ["Collector", "Pairs", "Statistic", "Sums"]
