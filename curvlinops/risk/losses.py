"""Loss functions: recognising them, and those that are known by their value only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from curvlinops.risk.cross_entropy import CrossEntropy
from curvlinops.risk.elementwise import MSE, BCEWithLogits
from curvlinops.risk.loss import LOSSES, Loss, display_name

__all__ = ["LOSSES", "MSE", "BCEWithLogits", "CrossEntropy", "GenericLoss", "Loss", "loss_entry"]


class GenericLoss(Loss):
    r"""A loss that is known by its value only.

    It gets predictions and targets as they are. With reduction ``"mean"`` the average over a batch
    of :math:`n_b` examples is weighted by :math:`n_b / N`.

    Args:
        loss_func: Maps predictions and targets to a scalar.
        reduction: What ``loss_func`` does over the batch, ``"mean"`` or ``"sum"``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(nn.L1Loss())
        >>> f, y = loss.terms(torch.full((4, 2), 3.0), torch.zeros(4, 2))
        >>> loss.value(f, y, n=4).item(), loss.normalizer(f, y, n=4)
        (12.0, 4)
    """

    closed_form = False

    def __init__(self, loss_func: Callable[[Any, Any], Tensor], reduction: str) -> None:
        """Store the loss function and its reduction."""
        self.loss_func = loss_func
        self.reduction = reduction

    @property
    def name(self) -> str:
        """Name of the loss function."""
        return display_name(self.loss_func)

    def terms(self, f: Tensor, y: Any) -> tuple[Tensor, Any]:
        """Return predictions and targets untouched."""
        return f, y

    def value(self, F: Tensor, targets: Any, n: int) -> Tensor:
        """Evaluate the loss, times the number of examples for the reduction ``"mean"``.

        Raises:
            ValueError: If the loss is not a scalar.
        """
        loss = self.loss_func(F, targets)
        if loss.ndim != 0:
            raise ValueError(
                f"{self.name} with reduction {self.reduction!r} must return a scalar, got shape "
                f"{tuple(loss.shape)}."
            )
        return n * loss if self.reduction == "mean" else loss

    def normalizer(self, F: Tensor, targets: Any, n: int) -> int:
        """Return the number of examples."""
        return n

    def weight(self, F: Tensor, targets: Any) -> Tensor | None:
        """Raise an error: loss terms are not known."""
        raise self._missing("weight of the loss terms")

    def num_columns(self, C: int) -> int:
        """Raise an error: the Hessian root is not known."""
        raise self._missing("Hessian root")

    def draws(self, C: int) -> int:
        """Raise an error: the predictive distribution is not known."""
        raise self._missing("would-be gradient")


def loss_entry(loss_func: Callable[[Any, Any], Tensor]) -> tuple[Loss, str]:
    """Find the entry of a loss function and its reduction.

    A loss is recognised by what it does: a module must run the ``forward`` of one of PyTorch's
    losses (a subclass with its own ``forward``, or a module with hooks, is another loss); a
    function must be PyTorch's own, possibly as :class:`functools.partial` with keywords. Any other
    loss with a reduction becomes a :class:`GenericLoss`.

    Args:
        loss_func: A module or callable object with a ``reduction`` attribute, or a function with a
            ``reduction`` keyword whose default counts, also as :class:`functools.partial`.

    Returns:
        The entry and the reduction, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If the loss function has no reduction, or one that is not supported, or if a
            known loss function has an option that is not supported.

    Example:
        >>> from functools import partial
        >>> from torch.nn import functional
        >>> from curvlinops.risk.losses import loss_entry
        >>> loss, reduction = loss_entry(partial(functional.cross_entropy, label_smoothing=0.1))
        >>> loss.name, loss.label_smoothing, reduction
        ('CrossEntropy', 0.1, 'mean')
    """
    reduction = _reduction(loss_func)
    known = _known_module(loss_func)
    if known is not None:
        entry = LOSSES[known]
        return entry(**{name: getattr(loss_func, name) for name in entry.options}), reduction
    partial = (
        loss_func if isinstance(loss_func, functools.partial) else functools.partial(loss_func)
    )
    if inspect.isfunction(partial.func) and partial.func in LOSSES:
        entry = LOSSES[partial.func]
        return entry(**_partial_options(partial, entry)), reduction
    return GenericLoss(loss_func, reduction), reduction


def _reduction(loss_func: Any) -> str:
    """Read the reduction of a loss function and check it."""
    needed = (
        "a loss must be nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, or a "
        "module/function with a `reduction` ('mean' or 'sum')"
    )
    function = loss_func.func if isinstance(loss_func, functools.partial) else loss_func
    if isinstance(function, type) or not callable(function):
        hint = " Pass an instance of the class." if isinstance(function, type) else ""
        raise ValueError(f"{loss_func!r} is not a loss function: {needed}.{hint}")
    if isinstance(loss_func, functools.partial) and "reduction" in loss_func.keywords:
        reduction = loss_func.keywords["reduction"]
    elif hasattr(function, "reduction"):
        reduction = function.reduction
    else:
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # some built-in functions have no signature
            parameters = MappingProxyType({})
        if "reduction" not in parameters:
            raise ValueError(f"{display_name(loss_func)} has no reduction: {needed}.")
        reduction = parameters["reduction"].default
        if reduction is inspect.Parameter.empty:
            raise ValueError(
                f"{display_name(loss_func)} has a reduction without a default. Fix it with "
                "functools.partial(..., reduction='mean') or 'sum'."
            )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"{display_name(loss_func)} has reduction {reduction!r}. Supported: 'mean', 'sum'."
        )
    return reduction


def _known_module(loss_func: Any) -> type[nn.Module] | None:
    """Return the class in the table whose behaviour a module has, or None."""
    if not isinstance(loss_func, nn.Module):
        return None
    cls: Any = type(loss_func)
    for known in cls.__mro__:
        if known in LOSSES:
            same_call = (
                cls.forward is known.forward
                and cls.__call__ is known.__call__
                and "forward" not in vars(loss_func)
                and not loss_func._forward_hooks
                and not loss_func._forward_pre_hooks
            )
            return known if same_call else None
    return None


def _partial_options(partial: functools.partial[Tensor], entry: type[Loss]) -> dict[str, Any]:
    """Return the options that a partial of a known loss function fixes."""
    options = {
        name: value
        for name, value in partial.keywords.items()
        if name != "reduction" and value is not None
    }
    unsupported = [name for name in options if name not in entry.options]
    if partial.args or unsupported:
        given = "positional arguments" if partial.args else ", ".join(unsupported)
        supported = ", ".join(("reduction", *entry.options))
        raise ValueError(
            f"functools.partial of {display_name(partial)} fixes {given}, which is not supported. "
            f"Supported keywords: {supported}."
        )
    return options
