"""What a network does with each example, from autograd alone: the evidence that KFAC is judged by.

Nothing here is shared with the computers of Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian

from curvlinops._random import RandomSource
from curvlinops.risk import EmpiricalRisk, loss_entry
from curvlinops.risk.data import Batch, fresh_mapping
from curvlinops.testing._check import wide
from curvlinops.testing._kfac_layers import LayerCall, Recorder


@dataclass
class Example:
    """What is known of one example, in float64 on the CPU.

    Attributes:
        calls: Its calls of layers.
        jacobian: Derivatives of all entries of the prediction by the parameters ``[P, D]``.
        F: The prediction ``[R, C]``, P = R · C.
        curvature: The matrix ``[P, P]`` in the middle of ``Jᵀ C J``, without the loss's scale.
        normalizer: What the example adds to the denominator of the reduction ``"mean"``.
    """

    calls: list[LayerCall]
    jacobian: Tensor
    F: Tensor
    curvature: Tensor
    normalizer: float

    @property
    def num_terms(self) -> int:
        """The number R of loss terms."""
        return len(self.F)

    @cached_property
    def root(self) -> Tensor:
        """A matrix L ``[P, V]`` with ``C = L Lᵀ``."""
        values, vectors = torch.linalg.eigh(self.curvature)
        return vectors * values.clamp(min=0).sqrt()


@dataclass
class Evidence:
    """What is known of all examples.

    Attributes:
        examples: The examples, in the order of the data.
        places: For each parameter, where its entries are in the parameter vector.
        norms: The names of parameters of normalisation layers.
        scale: The scale c of the loss.
    """

    examples: list[Example]
    places: dict[str, Tensor]
    norms: set[str]
    scale: float

    def owner(self, places: Tensor | None) -> str | None:
        """Return the parameter that places belong to."""
        if places is None:
            return None
        first = int(places.flatten()[0])
        return next(n for n, own in self.places.items() if own[0] <= first <= own[-1])

    def pairs(self) -> list[tuple[str, str]]:
        """Return the weights and biases that are always used with each other, and whole."""
        partners: dict[str, set[str | None]] = {}
        whole: dict[str, bool] = {}
        for example in self.examples:
            for call in example.calls:
                names = self.owner(call.weight), self.owner(call.bias)
                for name, places, other in zip(
                    names, (call.weight, call.bias), names[::-1], strict=True
                ):
                    if name is not None and places is not None:
                        partners.setdefault(name, set()).add(other)
                        complete = places.numel() == len(self.places[name])
                        whole[name] = whole.get(name, True) and complete
        return [
            (weight, bias)
            for example in self.examples[:1]
            for call in example.calls
            if (weight := self.owner(call.weight)) and (bias := self.owner(call.bias))
            if partners[weight] == {bias} and partners[bias] == {weight}
            if whole[weight] and whole[bias]
        ]


def gather_evidence(
    risk: EmpiricalRisk,
    loss_func: Any,
    fisher_type: str,
    mc_samples: int,
    seed: int,
    rtol: float,
) -> Evidence:
    """Evaluate and differentiate the model on one example after the other.

    Args:
        risk: The model and the data, whose order is fixed.
        loss_func: The loss.
        fisher_type: As of KFAC. ``"forward-only"`` has the curvature of ``"type-2"``.
        mc_samples: The number of Monte-Carlo samples.
        seed: Fixes the samples, which are those of the operators.
        rtol: Tolerance for the predictions of an example alone and in its batch.

    Raises:
        ValueError: If examples cannot be told apart, or depend on the others of their batch.
    """
    leaves = {
        name: p.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in risk.params.items()
    }
    sizes = [p.numel() for p in leaves.values()]
    parts = torch.arange(sum(sizes)).split(sizes)
    evidence = Evidence([], dict(zip(leaves, parts, strict=True)), set(), 1.0)
    entry, reduction = loss_entry(loss_func)
    random, first_term, normalizer = RandomSource(seed), 0, 0.0
    for batch in risk.batches("Examples"):
        predictions = []
        for X, y in single_examples(batch):
            recorder = Recorder(leaves, evidence.places)
            with recorder:
                f = risk.predict(leaves, X)
            evidence.norms |= recorder.norms
            F, targets = entry.terms(f, y)
            shifts = [shift for _, shift in recorder.calls]
            J = _jacobians(F, [*shifts, *leaves.values()])
            for (call, _), derivative in zip(recorder.calls, J, strict=False):
                call.jacobian = call.rows(derivative)
            own = [derivative.flatten(1) for derivative in J[len(recorder.calls) :]]
            uniforms = None
            if fisher_type == "mc":
                draws = entry.draws(F.shape[1])
                uniforms = random.uniforms("samples", first_term, len(F), mc_samples * draws)
                uniforms = uniforms.reshape(len(F), mc_samples, draws)
            first_term += len(F)
            calls = [call for call, _ in recorder.calls]
            example = Example(
                calls,
                torch.cat(own, dim=1),
                wide(F),
                _curvature(entry, F.detach(), targets, fisher_type, uniforms),
                float(entry.normalizer(F.detach(), targets, 1)),
            )
            evidence.examples.append(example)
            predictions.append(example.F)
            normalizer += example.normalizer
        expected = wide(entry.terms(risk.evaluate(batch.X), batch.y)[0])
        actual = torch.cat(predictions)
        same = actual.shape == expected.shape
        if not same or (actual - expected).abs().max() > rtol * (1 + expected.abs().max()):
            raise ValueError(
                "The model predicts something else for an example alone than in its batch: "
                "check_kfac needs models without dependence between examples, in evaluation mode."
            )
    if reduction == "mean":
        evidence.scale = 1 / normalizer
    return evidence


# ---- examples ------------------------------------------------------------------------------------
def single_examples(batch: Batch) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets of the single examples of a batch.

    Raises:
        ValueError: If no input has the examples along its first axis.
    """
    n = batch.n
    if n > 1 and not any(t.ndim and t.shape[0] == n for t in _tensors(batch.X)):
        raise ValueError(
            f"No input has its {n} examples along the first axis: check_kfac cannot evaluate the "
            "model on a single one. Check batch_size_fn."
        )
    for i in range(n):
        yield _example(batch.X, i, n, False), _example(batch.y, i, n, True)


def _tensors(X: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in an input."""
    if isinstance(X, Tensor):
        yield X
    elif isinstance(X, Mapping):
        for key in X:
            yield from _tensors(X[key])
    elif isinstance(X, (list, tuple)):
        for value in X:
            yield from _tensors(value)


def _example(X: Any, i: int, n: int, terms: bool) -> Any:
    """Return the part of example i of n; of targets also where its terms are several rows."""
    if isinstance(X, Tensor):
        if not X.ndim or (X.shape[0] % n if terms else X.shape[0] != n):
            return X
        each = X.shape[0] // n
        return X[i * each : (i + 1) * each]
    if isinstance(X, MutableMapping):
        result = fresh_mapping(X)
        for key in list(result):
            result[key] = _example(result[key], i, n, terms)
        return result
    if type(X) in (list, tuple):
        return type(X)([_example(value, i, n, terms) for value in X])
    return X


# ---- derivatives ---------------------------------------------------------------------------------
def _jacobians(F: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return derivatives ``[P, *shape]`` of all entries of a prediction by each leaf."""
    if not F.requires_grad:
        return [wide(leaf.new_zeros(F.numel(), *leaf.shape)) for leaf in leaves]
    rows = [
        torch.autograd.grad(
            entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in F.flatten()
    ]
    return [torch.stack([wide(gradients[i]) for gradients in rows]) for i in range(len(leaves))]


def _curvature(
    entry: Any, F: Tensor, targets: Any, fisher_type: str, uniforms: Tensor | None
) -> Tensor:
    """Return the curvature of the loss ``[P, P]`` without coupling between terms ``[R, C]``."""
    R, C = F.shape
    if fisher_type in ("type-2", "forward-only"):
        full = hessian(lambda F: entry.value(F, targets, 1), F)
        return wide(full.reshape(R * C, R * C))
    if fisher_type == "empirical":
        F = F.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(entry.value(F, targets, 1), F)
        vectors = gradient.unsqueeze(0)
    else:
        assert uniforms is not None
        vectors = entry.sample(F, targets, uniforms) / uniforms.shape[1] ** 0.5
    vectors = wide(vectors)  # [V, R, C]
    return torch.block_diag(*torch.einsum("vrc, vrd -> rcd", vectors, vectors))


__all__ = ["Evidence", "Example", "gather_evidence", "single_examples"]
