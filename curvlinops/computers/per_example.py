"""Gradients of each example's prediction: vectorised, one after the other, or through the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import count
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from curvlinops.risk import Batch, EmpiricalRisk
from curvlinops.risk.data import fresh_mapping

# The types of torch do not tell two results from the three with has_aux=True.
vjp: Any = torch.func.vjp

Params = dict[str, Tensor]

#: Yields cotangents ``[E, k, P]`` of a slice of E examples, chunk by chunk.
Cotangents = Callable[[slice], Iterator[Tensor]]


class DependentError(Exception):
    """An example's prediction, or its derivative, is another one without the batch's others."""


class Watch(TorchFunctionMode):
    """Sees the results of the functions of torch that a model calls.

    Attributes:
        largest: The number of entries of the largest floating point result.
        eps: The coarsest machine epsilon among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.eps = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor) and result.is_floating_point():
                self.largest = max(self.largest, result.numel())
                self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return results


class ExampleGradients:
    """Pulls cotangents of predictions back to the parameters, keeping the examples apart.

    The three ways cost more and more, but work for more and more models: :meth:`vectorized`,
    :meth:`one_by_one`, and :meth:`graph` with :meth:`pull_back`. The first two evaluate the model
    on single examples. They raise whatever the model does if it cannot, and
    :class:`DependentError` if the predictions are other ones than in the batch.

    Args:
        risk: The empirical risk, for its model.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        self._risk = risk
        self._batched = True  # until a model's backward pass cannot be vectorised over cotangents

    @property
    def theta(self) -> Params:
        """The parameters as constants, for torch.func."""
        return {name: p.detach() for name, p in self._risk.params.items()}

    def vectorized(
        self, batch: Batch, f: Tensor, tolerance: float, width: int, cotangents: Cotangents
    ) -> Iterator[Params]:
        """Yield gradients ``[E, k, *shape]`` of at most ``width`` examples at once.

        Args:
            batch: The batch.
            f: Its predictions ``[n, P]``, flattened for each example.
            tolerance: Relative tolerance for predictions.
            width: Number of examples, E.
            cotangents: Cotangents of the examples' flattened predictions.
        """
        theta, tensors = self.theta, example_tensors(batch)

        def pull_back(tensors: list[Tensor], U: Tensor) -> tuple[Tensor, Params]:
            def predict(theta: Params) -> Tensor:
                each = iter(tensors)
                X = _map_examples(batch.X, batch.n, lambda _: next(each).unsqueeze(0))
                return self._risk.predict(theta, X).reshape(-1)

            prediction, transposed = vjp(predict, theta)
            return prediction, vmap(lambda u: transposed(u)[0])(U)

        for start in range(0, batch.n, width):
            rows = slice(start, start + width)
            for U in cotangents(rows):
                with _quiet():
                    predictions, gradients = vmap(pull_back)([t[rows] for t in tensors], U)
                check_same("prediction", predictions, f[rows], tolerance)
                yield gradients

    def one_by_one(
        self, batch: Batch, f: Tensor, tolerance: float, cotangents: Cotangents
    ) -> Iterator[Params]:
        """Yield gradients ``[1, k, *shape]`` of one example at once; arguments as vectorized."""
        for i in range(batch.n):
            rows = slice(i, i + 1)
            X = _map_examples(batch.X, batch.n, itemgetter(rows))
            with _quiet():
                prediction, leaves = self.graph(X)
            check_same("prediction", prediction.detach().reshape(1, -1), f[rows], tolerance)
            for U in cotangents(rows):
                gradients = self.pull_back(prediction, leaves, U[0].reshape(-1, *prediction.shape))
                yield {name: g.unsqueeze(0) for name, g in gradients.items()}

    def graph(self, X: Any) -> tuple[Tensor, Params]:
        """Return a prediction with its graph, and the parameters it is a function of."""
        leaves = {name: p.detach().requires_grad_() for name, p in self._risk.params.items()}
        return self._risk.predict(leaves, X), leaves

    def pull_back(self, output: Tensor, leaves: Params, U: Tensor) -> Params:
        """Pull cotangents ``[k, *output.shape]`` back to gradients ``[k, *shape]``.

        Parameters that the output does not depend on are left out.
        """
        if not output.requires_grad:
            return {}
        inputs = list(leaves.values())
        if self._batched and len(U) > 1:
            try:
                with _quiet():
                    found = torch.autograd.grad(
                        output,
                        inputs,
                        U,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                return _used(leaves, found)
            except Exception:  # whatever a backward function does with vectorised tensors
                self._batched = False
        rows = [
            _used(
                leaves,
                torch.autograd.grad(output, inputs, u, retain_graph=True, allow_unused=True),
            )
            for u in U
        ]
        return {name: torch.stack([row[name].to_dense() for row in rows]) for name in rows[0]}


def check_same(
    what: str, actual: Tensor, expected: Tensor, tolerance: float, absolute: float = 0.0
) -> None:
    """Raise if something of single examples is not the same as in their batch."""
    message = f"the {what} of an example depends on the others in its batch"
    wide = torch.promote_types(expected.dtype, torch.float32)
    actual, expected = actual.to(wide), expected.to(wide)
    if actual.shape != expected.shape or not torch.equal(actual.isnan(), expected.isnan()):
        raise DependentError(message)
    difference = (actual - expected).nan_to_num(0.0, float("inf"), float("inf"))
    reference = expected.nan_to_num(0.0, 0.0, 0.0)
    if bool(difference.norm() > tolerance * reference.norm() + absolute):
        raise DependentError(message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what PyTorch says about single examples and about functions vectorised by a loop.

    What else there is to say is said when the model predicts the whole batch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _used(leaves: Params, gradients: tuple[Tensor | None, ...]) -> Params:
    """Name the gradients that exist."""
    pairs = zip(leaves, gradients, strict=True)
    return {name: g for name, g in pairs if g is not None}


def example_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch's input that have an entry for each example."""
    tensors: list[Tensor] = []
    _map_examples(batch.X, batch.n, tensors.append)
    return tensors


def _map_examples(X: Any, n: int, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors in an input that have an entry for each of n examples."""
    if isinstance(X, Tensor):
        return function(X) if X.ndim and X.shape[0] == n else X
    if isinstance(X, MutableMapping):
        result = fresh_mapping(X)
        for key in list(result):
            result[key] = _map_examples(result[key], n, function)
        return result
    if type(X) in (list, tuple):
        return type(X)([_map_examples(entry, n, function) for entry in X])
    if isinstance(X, tuple) and hasattr(X, "_fields"):
        return type(X)(*(_map_examples(entry, n, function) for entry in X))
    return X


def first_examples(X: Any, n: int, k: int) -> Any | None:
    """Return the input of the first k of n examples; None if no tensor has an entry for each."""
    return _some_examples(X, n, lambda tensor: tensor[:k])


def some_examples(X: Any, n: int, numbers: list[int], shared: int | None = None) -> Any | None:
    """Return the input of some of n examples, by their numbers; None as above.

    One of the tensors that have n entries is that of all examples, if its number is given.
    """
    counter = count()
    return _some_examples(X, n, lambda x: x if next(counter) == shared else x[numbers])


def _some_examples(X: Any, n: int, take: Callable[[Tensor], Tensor]) -> Any | None:
    """Return the input of some of n examples, as taken from each tensor that has all of them."""
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return take(tensor)

    some = _map_examples(X, n, noted)
    return some if found else None


def structure(X: Any) -> Any:
    """Return something hashable that inputs of the same shapes for each example share."""
    if isinstance(X, Tensor):
        return tuple(X.shape[1:]), X.dtype
    if isinstance(X, Mapping):
        return tuple((key, structure(X[key])) for key in X)
    if isinstance(X, (list, tuple)):
        return tuple(map(structure, X))
    return type(X)
