"""The diagonal of the GGN from gradients of each example, for any model that can be differentiated.

Gradients of several (example, loss vector) pairs are computed at once by vectorising over the
examples. This is verified on the first batch of each structure (shapes of inputs and targets): the
product of the transposed Jacobian and a vector must be that of the whole batch. Where the model
cannot be vectorised, examples are differentiated one after the other; where they depend on each
other, each loss term is back-propagated through its whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.diagonal_vectors import LossVectors, entries_at_once
from curvlinops.computers.per_example import (
    Cotangents,
    DependentError,
    ExampleGradients,
    Watch,
    check_same,
)
from curvlinops.risk import Batch, EmpiricalRisk, Loss

#: Whether the examples of a batch are differentiated all at once, or one after the other, or each
#: loss term in the graph of the whole batch.
VECTORIZED, ONE_BY_ONE, TOGETHER = "vectorized", "one by one", "together"


class ExamplesDiagonal:
    """Sums squares of gradients for single examples, or loss terms.

    Args:
        risk: The empirical risk.
        names: The parameters; the others are constants.
        vectors: Makes the loss vectors.
        chunk_size: Number of gradients that are held at once. None: as fit.
        warn: Called with what is to be said if batches are not treated in the best way.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        names: Iterable[str],
        vectors: LossVectors,
        chunk_size: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self._risk = risk
        self._whole = ExampleGradients(risk)
        self._examples = ExampleGradients(_Restricted(risk, names))  # type: ignore[arg-type]
        self._vectors = vectors
        self._loss = vectors.loss
        self._chunk_size = chunk_size
        self._warn = warn
        self._plans: dict[Any, _Plan] = {}

    def squares(self, batch: Batch, first_term: int) -> tuple[dict[str, Tensor], Tensor, Any]:
        """Sum the squares for all loss vectors of a batch.

        Args:
            batch: The batch.
            first_term: Index of its first loss term in the whole data.

        Returns:
            The sums by name, and the loss terms' predictions ``[m, C]`` and targets.
        """
        watch = Watch()
        with self._risk.watching(), watch:
            f = self._risk.evaluate(batch.X)
        F, targets = self._loss.terms(f, batch.y)  # [m, C]
        key = batch.n, _structure(batch.X), _structure(batch.y)
        if key not in self._plans:
            self._plans[key] = self._plan(batch, f, F, watch)
        plan = self._plans[key]
        while True:
            self._settle(plan, batch, f)
            self._say(plan)
            if plan.way == TOGETHER:
                squares = self._together(plan, batch, first_term)
                break
            try:
                squares = self._separately(plan, batch, f, F, targets, first_term)
                break
            except Exception as error:  # whatever a model does with its examples alone
                plan.give_up(error)
        return squares.total, F, targets

    def _plan(self, batch: Batch, f: Tensor, F: Tensor, watch: Watch) -> _Plan:
        """Plan for batches of this one's structure."""
        params = self._examples.theta.values()
        size = sum(p.numel() for p in params)
        eps = coarsest(watch, f, *params)
        n, at_once = batch.n, self._vectors.at_once(F)
        plan = _Plan(
            tolerance=eps**0.5,
            chunk=self._chunk(size, f.numel() // n, watch.largest // n),
            whole_chunk=self._chunk(size, f.numel(), watch.largest),
        )
        if n > 1:
            plan.order = _order_of_entries(self._loss, batch, f, F)
            if plan.order is None:
                plan.reason = "the loss terms are not those of single examples"
                return plan
            plan.ways.insert(0, ONE_BY_ONE)
            plan.width = plan.chunk // max(1, at_once * len(F) // n)
            if plan.width > 1:
                plan.ways.insert(0, VECTORIZED)
        return plan

    def _settle(self, plan: _Plan, batch: Batch, f: Tensor) -> None:
        """Give up ways until one works for this batch, unless one was found to work before."""
        while not plan.verified and plan.way != TOGETHER:
            try:
                self._verify(plan, batch, f)
                plan.verified = True
            except Exception as error:
                plan.give_up(error)

    def _chunk(self, *sizes: int) -> int:
        """Return how many gradients are held at once, if each comes with tensors of these sizes."""
        return self._chunk_size or max(1, entries_at_once(self._risk.device) // max(sizes))

    def _verify(self, plan: _Plan, batch: Batch, f: Tensor) -> None:
        """Compare a product with the transposed Jacobian with that of the whole batch.

        Equal predictions are not enough: examples may depend on each other in the derivative alone,
        for instance through a gate that is zero.
        """
        numbers = torch.arange(f.numel(), device=f.device, dtype=torch.float32)
        u = numbers.square().cos().to(f.dtype).reshape(f.shape)  # irregular
        expected = self._whole.pull_back(*self._whole.graph(batch.X), u.unsqueeze(0))
        actual = zeros(self._examples.theta)
        U = u.reshape(batch.n, 1, -1)
        for gradients in self._gradients(plan, batch, f, lambda rows: iter([U[rows]])):
            for name, g in gradients.items():
                actual[name] += g.to(actual[name].dtype).sum((0, 1))
        references = zeros(self._whole.theta)
        references |= {name: g[0].to(references[name].dtype) for name, g in expected.items()}
        scale = sum(float(g.norm()) for g in references.values())
        for name, g in actual.items():
            # There is nothing but rounding errors where a parameter does not matter.
            absolute = plan.tolerance**1.5 * scale
            what = f"gradient for {name!r}"
            check_same(what, g, references[name], plan.tolerance, absolute)

    def _separately(
        self, plan: _Plan, batch: Batch, f: Tensor, F: Tensor, targets: Any, first_term: int
    ) -> _Squares:
        """Sum squares, with the model evaluated on single examples."""
        m, C = F.shape
        squares = _Squares(self._examples.theta)
        for vectors in self._vectors.make(F, targets, first_term):
            V = vectors.reshape(-1, batch.n, m // batch.n, C).movedim(0, 1)  # [n, V, R, C]

            def cotangents(rows: slice, V: Tensor = V) -> Iterator[Tensor]:
                for U in _one_term_each(V[rows], plan.chunk):  # [E, k, R, C]
                    yield U.flatten(-2)[..., plan.order]

            for gradients in self._gradients(plan, batch, f, cotangents):
                squares.add(gradients, 2)
        return squares

    def _together(self, plan: _Plan, batch: Batch, first_term: int) -> _Squares:
        """Sum squares, with one loss term after the other in the graph of the whole batch."""
        squares = _Squares(self._examples.theta)
        prediction, leaves = self._examples.graph(batch.X)
        F, targets = self._loss.terms(prediction, batch.y)
        for vectors in self._vectors.make(F.detach(), targets, first_term):
            for U in _one_term_each(vectors, plan.whole_chunk):  # [k, m, C]
                squares.add(self._examples.pull_back(F, leaves, U), 1)
        return squares

    def _gradients(
        self, plan: _Plan, batch: Batch, f: Tensor, cotangents: Cotangents
    ) -> Iterator[dict[str, Tensor]]:
        """Yield gradients for cotangents of single examples in the plan's way."""
        flat = f.reshape(batch.n, -1)  # [n, P]
        if plan.way == ONE_BY_ONE:
            return self._examples.one_by_one(batch, flat, plan.tolerance, cotangents)
        return self._examples.vectorized(batch, flat, plan.tolerance, plan.width, cotangents)

    def _say(self, plan: _Plan) -> None:
        """Say why batches are not treated in the best way, if so."""
        if plan.reason is None:
            return
        how = {
            ONE_BY_ONE: "Examples cannot be differentiated all at once, but one after the other",
            TOGETHER: "Examples cannot be differentiated on their own, but only each loss term in "
            "its whole batch",
        }
        self._warn(
            f"{how[plan.way]}: the diagonal of the GGN takes longer, its values are right. "
            f"The reason: {plan.reason}."
        )


class _Restricted:
    """A risk as a function of some parameters; the others are constants."""

    def __init__(self, risk: EmpiricalRisk, names: Iterable[str]) -> None:
        self._risk = risk
        self.params = {name: risk.params[name] for name in names}

    def predict(self, params: dict[str, Tensor], X: Any) -> Tensor:
        """Evaluate the model."""
        constants = {name: p.detach() for name, p in self._risk.params.items()}
        return self._risk.predict(constants | params, X)


@dataclass
class _Plan:
    """How to treat batches of one structure.

    Attributes:
        tolerance: Relative tolerance for what must be the same in single examples and batches.
        chunk: Number of gradients at once if examples are treated on their own.
        whole_chunk: The same if they are not.
        ways: What is left to try, best first.
        order: For each entry of an example's prediction, its place among the entries of the
            example's loss terms.
        width: Number of examples at once that are vectorised over.
        verified: Whether the present way was compared with the batch's gradient.
        reason: Why better ways were given up.
    """

    tolerance: float
    chunk: int
    whole_chunk: int
    ways: list[str] = field(default_factory=lambda: [TOGETHER])
    order: Tensor | None = None
    width: int = 1
    verified: bool = False
    reason: str | None = None

    @property
    def way(self) -> str:
        """The present way."""
        return self.ways[0]

    def give_up(self, error: Exception) -> None:
        """Go on to the next way."""
        del self.ways[0]
        self.verified = False
        text = shorten(str(error), 200, placeholder=" ...").rstrip(".")
        dependent = isinstance(error, DependentError)
        self.reason = text if dependent else f"{type(error).__name__}: {text}"


class _Squares:
    """Sums of squares of gradients, in float32 at least."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.total = zeros(params)

    def add(self, gradients: dict[str, Tensor], num_axes: int) -> None:
        """Add the squares of gradients ``[..., *shape]`` with leading axes; empty the dict."""
        for name, total in self.total.items():
            if name in gradients:
                g = gradients.pop(name).to(total.dtype)
                total += g.square().sum(tuple(range(num_axes)))


def coarsest(watch: Watch, *tensors: Tensor) -> float:
    """Return the coarsest machine epsilon among those of tensors, and of what a model computed."""
    eps = max(watch.eps, *(torch.finfo(t.dtype).eps for t in tensors))
    if tensors[0].dtype is not torch.float32:
        return eps
    on_gpu = tensors[0].device.type == "cuda"
    products = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
    convolutions = 2.0**-10 if on_gpu and torch.backends.cudnn.allow_tf32 else 0.0
    return max(eps, products[torch.get_float32_matmul_precision()], convolutions)


def zeros(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros to sum in, of float32 at least."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in params.items()
    }


def _one_term_each(vectors: Tensor, chunk: int) -> Iterator[Tensor]:
    """Split loss vectors ``[..., V, T, C]`` into ``[..., k, T, C]`` with one of T terms each."""
    T, C = vectors.shape[-2:]
    flat = vectors.flatten(-3, -2)  # [..., V T, C]
    if T == 1:
        yield from (part.unsqueeze(-2) for part in flat.split(chunk, dim=-2))
        return
    for start in range(0, flat.shape[-2], chunk):
        part = flat[..., start : start + chunk, :]
        k = torch.arange(part.shape[-2], device=flat.device)
        result = part.new_zeros(*part.shape[:-1], T, C)
        result[..., k, (start + k) % T, :] = part
        yield result


def _order_of_entries(loss: Loss, batch: Batch, f: Tensor, F: Tensor) -> Tensor | None:
    """Return where each entry of an example's prediction is among the entries of its loss terms.

    None if loss terms ``[m, C]`` are something else than the examples' predictions in some order.
    """
    n, device = batch.n, f.device
    if f.numel() != F.numel() or f.numel() % n or len(F) % n:
        return None
    # PyTorch has no float64 on Apple's GPUs; what float32 cannot count does not pass the last test.
    exact = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.arange(f.numel(), device=device, dtype=exact).reshape(f.shape)
    places = loss.terms(numbers, batch.y)[0].detach().long().reshape(n, -1)  # [n, P]
    P = places.shape[1]
    places = places - P * torch.arange(n, device=device).unsqueeze(-1)
    found, order = places[0].sort()
    if not torch.equal(found, torch.arange(P, device=device)) or (places != places[0]).any():
        return None
    entries = f.detach().reshape(n, P)[:, places[0]].reshape(F.shape)
    same = torch.isclose(entries, F.detach(), rtol=0.0, atol=0.0, equal_nan=True)
    return order if bool(same.all()) else None


def _structure(value: Any) -> Any:
    """Return the shapes and dtypes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _structure(value[key])) for key in value)
    return tuple(map(_structure, value)) if isinstance(value, (list, tuple)) else None


__all__ = ["ONE_BY_ONE", "TOGETHER", "VECTORIZED", "ExamplesDiagonal", "coarsest", "zeros"]
