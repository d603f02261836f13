"""Dense curvature matrices by plain reverse-mode autograd, for the conformance kit.

They know nothing of what the operators have to get right: derivatives are rows, one call of
``torch.autograd.grad`` each; there is no entry of the table of losses, but the user's loss function
on whole predictions; and the scale is what that function divides by if all data are one batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlinops.risk.losses import loss_entry
from curvlinops.risk.model import ModelFunction, at_places, places_of

#: What PyTorch's losses do with a prediction: softmax along axis 1, or entries along the last axis.
_KINDS: dict[Any, str] = {
    nn.CrossEntropyLoss: "softmax",
    functional.cross_entropy: "softmax",
    nn.BCEWithLogitsLoss: "sigmoid",
    functional.binary_cross_entropy_with_logits: "sigmoid",
    nn.MSELoss: "square",
    functional.mse_loss: "square",
}


@dataclass
class Example:
    """Inputs, targets and number of examples of one batch, on the device of the parameters."""

    X: Any
    y: Any
    n: int


class LossReference:
    """The user's loss of all data, and its loss terms.

    Attributes:
        kind: ``"softmax"``, ``"sigmoid"`` or ``"square"`` for PyTorch's losses that have closed
            forms, ``"registered"`` for others in the table, ``"value"`` for all other functions.
        reduction: ``"mean"`` or ``"sum"``.
    """

    def __init__(self, loss_func: Callable[[Any, Any], Tensor]):
        self.function = loss_func
        # Of the library, only what the loss is called and whether it is in the table.
        self.entry, self.reduction = loss_entry(loss_func)
        self.kind = "value"
        if self.entry.closed_form:
            inner = loss_func.func if isinstance(loss_func, functools.partial) else loss_func
            candidates = [inner, *type(inner).__mro__]
            self.kind = next((_KINDS[c] for c in candidates if _known(c)), "registered")

    def __call__(self, predictions: Sequence[Tensor], batches: Sequence[Example]) -> Tensor:
        """Evaluate the loss of all data, as if they were one batch."""
        pairs = list(zip(predictions, batches, strict=True))
        if self.kind == "softmax":
            f = torch.cat([self.vectors(f) for f, _ in pairs])
            return self.function(f, torch.cat([self._classes(f, b.y) for f, b in pairs]))
        weights = [1.0] * len(pairs)
        if self.reduction == "mean":
            counts = [self._count(f, b) for f, b in pairs]
            weights = [count / sum(counts) for count in counts]
        losses = [self.function(f, b.y) for f, b in pairs]
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()

    def vectors(self, f: Tensor, classes: int = 1) -> Tensor:
        """Bring predictions (or what has their shape) into the shape ``[m, C]`` of loss terms."""
        if self.kind == "softmax":
            return f.movedim(classes, -1).flatten(0, -2)
        return f.unsqueeze(-1) if f.ndim == 1 else f.flatten(0, -2)

    def values(self, f: Tensor, y: Any) -> Tensor:
        """Return the un-averaged loss, ``[m]`` for softmax, ``[m, C]`` for entries."""
        if self.kind == "registered":
            return self.entry.term_values(*self.entry.terms(f, y))
        function: Any = self.function
        if isinstance(function, nn.Module):
            function = copy.copy(function)
            function.reduction = "none"
        else:
            function = functools.partial(function, reduction="none")
        if self.kind == "softmax":
            return function(self.vectors(f), self._classes(f, y))
        return self.vectors(function(f, y))

    def terms(self, f: Tensor, y: Any) -> Tensor:
        """Return the un-averaged loss of each loss term, ``[m]``."""
        values = self.values(f, y)
        return values.sum(-1) if values.ndim > 1 else values

    def scale(self, predictions: Sequence[Tensor], batches: Sequence[Example]) -> float:
        """Return the factor between the sum of the loss terms and the loss."""
        if self.kind == "registered":
            counts = [self._count(f, b) for f, b in zip(predictions, batches, strict=True)]
            return 1 / sum(counts) if self.reduction == "mean" else 1.0
        # At predictions where no loss term is zero, unless it is not counted.
        if self.kind == "square":
            points = [b.y.to(f.dtype) + 1 for f, b in zip(predictions, batches, strict=True)]
        else:
            points = [torch.zeros_like(f) for f in predictions]
        pairs = zip(points, batches, strict=True)
        total = float(sum(self.terms(f, b.y).double().sum() for f, b in pairs))
        return float(self(points, batches)) / total if total else 1.0

    def hessian_factor(self, f: Tensor, y: Any) -> Tensor:
        """Return what options multiply the Hessian of a term (an entry) by, as :meth:`values`."""
        if self.kind == "square":
            return torch.ones_like(self.vectors(f))
        # At zero, the cross-entropy of C classes is log C times the sum of its coefficients.
        C = self.vectors(f).shape[-1] if self.kind == "softmax" else 2
        return self.values(torch.zeros_like(f), y) / log(max(C, 2))

    def _count(self, f: Tensor, batch: Example) -> float:
        """Return the weight of a batch's mean."""
        if self.kind == "registered":
            return float(self.entry.normalizer(*self.entry.terms(f, batch.y), batch.n))
        return batch.n if self.kind == "value" else f.numel()

    def _classes(self, f: Tensor, y: Tensor) -> Tensor:
        """Return classes ``[m]`` or probabilities ``[m, C]``."""
        return self.vectors(y).to(f.dtype) if y.is_floating_point() else y.flatten().long()


class Reference:
    """A model, a loss and data, and their dense matrices (of float64, on the CPU)."""

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        batches: list[Example],
    ):
        self.model, self.batches = model_func, batches
        self.loss = LossReference(loss_func)
        with torch.inference_mode(False):
            copies = {name: p.detach().clone() for name, p in params.items()}
        self.params = {name: p.requires_grad_() for name, p in copies.items()}
        self.dim = sum(p.numel() for p in self.params.values())
        self.eps = torch.finfo(next(iter(self.params.values())).dtype).eps

    def predictions(self, batches: Sequence[Example] | None = None) -> list[Tensor]:
        """Evaluate the model on all batches."""
        batches = self.batches if batches is None else batches
        return [self._predict(copy.copy(b.X) if _is_mapping(b.X) else b.X) for b in batches]

    def _predict(self, X: Any) -> Tensor:
        if isinstance(self.model, nn.Module):
            tensors = at_places(self.params, places_of(self.model))
            return functional_call(self.model, tensors, (X,), tie_weights=False)
        return self.model(self.params, X)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The predictions of all batches, detached."""
        with torch.no_grad():
            return self.predictions()

    @property
    def finite(self) -> bool:
        """Whether predictions and the loss are finite numbers."""
        with torch.no_grad():
            loss = self.loss(self.outputs, self.batches)
        return all(bool(x.isfinite().all()) for x in (loss, *self.outputs))

    @cached_property
    def jacobians(self) -> list[Tensor]:
        """The Jacobian ``[P_b, D]`` of each batch's prediction."""
        with plain_autograd():
            return [self._rows(f.flatten()) for f in self.predictions()]

    @cached_property
    def jacobian(self) -> Tensor:
        """The Jacobian ``[P, D]`` of all predictions."""
        return torch.cat(self.jacobians)

    @cached_property
    def loss_hessians(self) -> list[Tensor]:
        """The Hessian ``[P_b, P_b]`` of the loss with respect to each batch's prediction."""
        with plain_autograd():
            leaves = [f.detach().clone().requires_grad_() for f in self.outputs]
            gradients = _gradient(self.loss(leaves, self.batches), leaves)
            pairs = zip(gradients, leaves, strict=True)
            # Loss terms are independent: there are no blocks between batches.
            return [_jacobian(g.flatten(), [leaf]) for g, leaf in pairs]

    def loss_gradient(self, outputs: list[Tensor], batches: list[Example]) -> Tensor:
        """Return the loss's value and its gradient with respect to the predictions, as one vector.

        Predictions are concatenated along their first axis, which is the order of the examples.
        """
        with plain_autograd():
            leaves = [f.detach().clone().requires_grad_() for f in outputs]
            loss = self.loss(leaves, batches)
            return _flat([loss, *_gradient(loss, leaves, create_graph=False)])

    @cached_property
    def ggn(self) -> Tensor:
        """The Gauss-Newton matrix."""
        pairs = zip(self.jacobians, self.loss_hessians, strict=True)
        return sum((J.T @ H @ J for J, H in pairs), torch.zeros(()).double())

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the loss."""
        with plain_autograd():
            loss = self.loss(self.predictions(), self.batches)
            return _flat(_gradient(loss, self._leaves, create_graph=False))

    @cached_property
    def hessian(self) -> Tensor:
        """The Hessian of the loss."""
        with plain_autograd():
            loss = self.loss(self.predictions(), self.batches)
            gradients = _gradient(loss, self._leaves)
            return self._rows(torch.cat([g.flatten() for g in gradients]))

    @cached_property
    def term_gradients(self) -> Tensor:
        """The gradients of the loss terms, as rows ``[M, D]``."""
        with plain_autograd():
            pairs = zip(self.predictions(), self.batches, strict=True)
            return torch.cat([self._rows(self.loss.terms(f, b.y)) for f, b in pairs])

    @cached_property
    def scale(self) -> float:
        """The factor between the sum of the loss terms and the loss."""
        with torch.no_grad():
            return self.loss.scale(self.outputs, self.batches)

    @cached_property
    def empirical_fisher(self) -> Tensor:
        """The empirical Fisher."""
        return self.scale * self.term_gradients.T @ self.term_gradients

    @property
    def _leaves(self) -> list[Tensor]:
        return list(self.params.values())

    def _rows(self, outputs: Tensor) -> Tensor:
        return _jacobian(outputs, self._leaves)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Record gradients, with kernels that have second derivatives."""
    math = sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), math[0], math[1]:
        yield


def _gradient(loss: Tensor, leaves: list[Tensor], create_graph: bool = True) -> list[Tensor]:
    """Return the gradient of a number, dense, differentiably."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(
        loss, leaves, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return [g.to_dense() for g in gradients]


def _jacobian(outputs: Tensor, leaves: list[Tensor]) -> Tensor:
    """Return the Jacobian ``[P, D]`` of ``[P]``, one row after the other."""
    rows = [_flat(_gradient(entry, leaves, create_graph=False)) for entry in outputs]
    return torch.stack(rows)


def _flat(tensors: list[Tensor]) -> Tensor:
    """Concatenate to one vector of float64 on the CPU."""
    return torch.cat([t.detach().flatten().to("cpu", torch.float64) for t in tensors])


def _known(candidate: Any) -> bool:
    """Whether a class or function is one of PyTorch's losses."""
    try:
        return candidate in _KINDS
    except TypeError:  # not hashable
        return False


def _is_mapping(X: Any) -> bool:
    return isinstance(X, Mapping)
