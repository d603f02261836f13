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

__all__ = [
    "LOSSES",
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "GenericLoss",
    "Loss",
    "loss_entry",
    "loss_state",
    "register_loss",
]


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
            TypeError: If the loss is not a tensor.
            ValueError: If the loss is not a scalar.
        """
        loss: Any = self.loss_func(F, targets)
        expected = f"{self.name} with reduction {self.reduction!r} must return a scalar"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{expected} tensor, got {type(loss).__name__}.")
        if loss.ndim != 0:
            raise ValueError(f"{expected}, got shape {tuple(loss.shape)}.")
        return n * loss if self.reduction == "mean" else loss

    def normalizer(self, F: Tensor, targets: Any, n: int) -> int:
        """Return the number of examples."""
        return n

    def weight(self, F: Tensor, targets: Any) -> Tensor | None:
        """Raise an error: loss terms are not known."""
        raise self._missing("weight of the loss terms")

    def grad(self, F: Tensor, targets: Any) -> Tensor:
        """Raise an error: loss terms are not known."""
        raise self._missing("gradient")

    def hess_vec(self, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        """Raise an error: loss terms are not known."""
        raise self._missing("Hessian-vector product")

    def sampled_hess_vec(self, F: Tensor, targets: Any, uniforms: Tensor, V: Tensor) -> Tensor:
        """Raise an error: the predictive distribution is not known."""
        raise self._missing("would-be gradient")

    def grad_outer_vec(self, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        """Raise an error: loss terms are not known."""
        raise self._missing("gradient")

    def num_columns(self, C: int) -> int:
        """Raise an error: the Hessian root is not known."""
        raise self._missing("Hessian root")

    def draws(self, C: int) -> int:
        """Raise an error: the predictive distribution is not known."""
        raise self._missing("would-be gradient")

    def _missing(self, what: str, method: str | None = None) -> NotImplementedError:
        """Build the error for something that needs more than the value."""
        return NotImplementedError(
            f"{self.name} has no closed-form {what}. Losses with closed forms: "
            f"{', '.join(sorted(display_name(loss) for loss in LOSSES))}. Use one of these, add "
            "this one to them with curvlinops.register_loss, or use an operator that only needs "
            "the loss's value, such as the Hessian."
        )


def register_loss(loss_func: Any, entry: type[Loss], *, override: bool = False) -> None:
    r"""Tell all curvature operators about a loss function.

    Without it, a loss is known by its value only, which is enough for the Hessian and the exact
    Gauss-Newton matrix. Registered, it also works wherever gradients, samples or Hessian roots of
    single loss terms are needed, as far as the entry implements them; see
    :class:`curvlinops.risk.Loss`. And the reduction ``"mean"`` divides by what the entry says,
    counted over all data, instead of weighting the means of batches by their numbers of examples.

    The entry is instantiated with the options it names in ``options``, which are read from the
    attributes of a module, or from the defaults of a function and the keywords of
    :class:`functools.partial`. Other options of the loss function must have their default value.

    Args:
        loss_func: A subclass of ``nn.Module``, or a function. Instances of the class, and of
            subclasses with the same ``forward``, have this entry.
        entry: A subclass of :class:`curvlinops.risk.Loss`.
        override: Whether to replace the entry of a loss that has one.

    Raises:
        TypeError: If the loss is neither such a class nor a function, or the entry is no such
            subclass.
        ValueError: If the entry lacks a method or does not take its options, or if the loss has an
            entry.

    Example:
        The negative log-likelihood of counts :math:`y` with the logarithm of the rate,
        :math:`\ell = e^f - y f`, has the Hessian :math:`\mathrm{diag}(e^f)`.

        >>> import torch
        >>> from curvlinops import KFACLinearOperator, register_loss
        >>> from curvlinops.risk import Loss
        >>> def poisson_nll(f, y, reduction="mean"):
        ...     values = f.exp() - y * f
        ...     return values.mean() if reduction == "mean" else values.sum()
        >>> class Poisson(Loss):
        ...     def terms(self, f, y):  # the last axis has a loss term's entries
        ...         return f.flatten(0, -2), y.flatten(0, -2).to(f.dtype)
        ...
        ...     def term_values(self, F, targets):
        ...         return (F.exp() - targets * F).sum(-1)
        ...
        ...     def normalizer(self, F, targets, n):  # what "mean" divides by
        ...         return F.numel()
        ...
        ...     def root_columns(self, F, targets, columns=None):
        ...         root = torch.diag_embed((F / 2).exp()).movedim(-1, 0)
        ...         return root if columns is None else root[columns]
        ...
        ...     def sample(self, F, targets, uniforms):  # any with this mean and second moment
        ...         signs = torch.where(uniforms.transpose(0, 1) < 0.5, -1.0, 1.0).to(F)
        ...         return signs * (F / 2).exp()
        >>> register_loss(poisson_nll, Poisson)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> params = {"weight": torch.zeros(1, 1)}
        >>> data = [(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]))]
        >>> K = KFACLinearOperator(model, poisson_nll, params, data, fisher_type="mc")
        >>> K @ torch.ones(1)  # (1 + 9) / 2
        tensor([5.])
    """
    is_module = isinstance(loss_func, type) and issubclass(loss_func, nn.Module)
    if not (is_module or inspect.isfunction(loss_func)):
        hint = ""
        if isinstance(loss_func, nn.Module):
            hint = f" Pass the class {type(loss_func).__name__}."
        elif isinstance(loss_func, functools.partial):
            hint = f" Pass the function {display_name(loss_func)}; the entry gets the keywords."
        raise TypeError(
            f"loss_func must be a subclass of nn.Module or a function, got {loss_func!r}.{hint}"
        )
    if not (isinstance(entry, type) and issubclass(entry, Loss)):
        hint = f" Pass the class {type(entry).__name__}." if isinstance(entry, Loss) else ""
        raise TypeError(f"entry must be a subclass of curvlinops.risk.Loss, got {entry!r}.{hint}")
    _check_entry(entry)
    if loss_func in LOSSES and not override:
        raise ValueError(
            f"{display_name(loss_func)} has the entry {LOSSES[loss_func].__name__} already. Pass "
            "override=True to replace it."
        )
    LOSSES[loss_func] = entry


def _check_entry(entry: type[Loss]) -> None:
    """Check that an entry has what has no default, and takes its options."""
    missing = [
        name for name in ("terms", "normalizer") if getattr(entry, name) is getattr(Loss, name)
    ]
    if entry.value is Loss.value and entry.term_values is Loss.term_values:
        missing.append("term_values (or value)")
    missing += sorted(getattr(entry, "__abstractmethods__", ()))
    if missing:
        raise ValueError(
            f"{entry.__name__} does not implement {', '.join(missing)}. Add what is missing."
        )
    if not isinstance(entry.options, (tuple, list)):
        raise ValueError(
            f"{entry.__name__}.options must be a tuple of names, got {entry.options!r}."
        )
    try:
        inspect.signature(entry).bind(**dict.fromkeys(entry.options))
    except TypeError as error:
        names = ", ".join(entry.options) or "none"
        raise ValueError(
            f"{entry.__name__} cannot be built from its options ({names}): {error}. Its "
            "constructor must take these as keywords, and need no others."
        ) from None


def loss_entry(loss_func: Callable[[Any, Any], Tensor]) -> tuple[Loss, str]:
    """Find the entry of a loss function and its reduction.

    A loss is recognised by what it does: a module must run the ``forward`` of a class in the table
    (a subclass with its own ``forward``, or a module with hooks, is another loss); a function must
    be one in the table, possibly as :class:`functools.partial` with keywords. Any other loss with a
    reduction becomes a ``GenericLoss``. :func:`~curvlinops.register_loss` adds to the table.

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
        return entry(**_module_options(loss_func, known, entry)), reduction
    partial = (
        loss_func if isinstance(loss_func, functools.partial) else functools.partial(loss_func)
    )
    if inspect.isfunction(partial.func) and partial.func in LOSSES:
        entry = LOSSES[partial.func]
        return entry(**_partial_options(partial, entry)), reduction
    return GenericLoss(loss_func, reduction), reduction


def loss_state(loss_func: Any) -> list[Any]:
    """Return what a loss function holds: attributes, options, parameters, buffers, and hooks.

    Args:
        loss_func: A loss function.

    Returns:
        The values. They are the same objects until one of them is replaced.
    """
    if isinstance(loss_func, functools.partial):
        return [*loss_func.args, *loss_func.keywords.values(), *loss_state(loss_func.func)]
    parts = loss_func.modules() if isinstance(loss_func, nn.Module) else [loss_func]
    values = [value for part in parts for value in getattr(part, "__dict__", {}).values()]
    # A module keeps its tensors and hooks in dicts, which are changed in place.
    return values + [x for value in values if isinstance(value, dict) for x in value.values()]


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


def _module_options(loss_func: Any, known: type[nn.Module], entry: type[Loss]) -> dict[str, Any]:
    """Return the options of a module of a known class."""
    absent = [name for name in entry.options if not hasattr(loss_func, name)]
    if absent:
        raise ValueError(
            f"{display_name(loss_func)} does not have the attributes {', '.join(absent)}, which "
            f"{entry.__name__} takes as options. Set them, or change the entry's options."
        )
    handled = (*entry.options, *_REDUCTION_ARGUMENTS)
    unsupported = [
        f"{name}={getattr(loss_func, name)!r}"
        for name, default in _defaults(known).items()
        if name not in handled and _differs(getattr(loss_func, name, default), default)
    ]
    if unsupported:
        raise ValueError(
            f"{display_name(loss_func)} has {', '.join(unsupported)}, which {entry.__name__} does "
            f"not support. Supported options: {', '.join(('reduction', *entry.options))}."
        )
    return {name: getattr(loss_func, name) for name in entry.options}


def _partial_options(partial: functools.partial[Tensor], entry: type[Loss]) -> dict[str, Any]:
    """Return the options of a known loss function that has keywords fixed."""
    defaults = _defaults(partial.func)
    given = {
        name: value
        for name, value in partial.keywords.items()
        if name != "reduction" and _differs(value, defaults.get(name))
    }
    unsupported = [name for name in given if name not in entry.options]
    if partial.args or unsupported:
        fixed = "positional arguments" if partial.args else ", ".join(unsupported)
        supported = ", ".join(("reduction", *entry.options))
        raise ValueError(
            f"functools.partial of {display_name(partial)} fixes {fixed}, which is not supported. "
            f"Supported keywords: {supported}."
        )
    return {name: value for name, value in defaults.items() if name in entry.options} | given


#: Arguments of PyTorch's losses that are about the reduction.
_REDUCTION_ARGUMENTS = ("reduction", "size_average", "reduce")


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function or class that have defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def _differs(value: Any, default: Any) -> bool:
    """Whether an option is not its default; tensors, which have no defaults, always do."""
    return value is not default and (isinstance(value, Tensor) or bool(value != default))
