"""Where the examples are inside of a model, which is found by evaluating it on a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlinops.computers.arrangement import (
    BATCH_FIRST,
    UNKNOWN,
    Arrangement,
    Arrangements,
    another_order,
    find_arrangement,
    near,
)
from curvlinops.computers.per_example import example_tensors, some_examples, structure
from curvlinops.computers.planning import Planning
from curvlinops.computers.usages import Parameters, Usage
from curvlinops.distributed import Collective
from curvlinops.risk import Batch

T = TypeVar("T")


class Looking(Planning):
    """Finds out, for a computer of Kronecker factors, what a model does with its examples.

    A subclass implements :meth:`_observe`.

    Args:
        separate_weight_and_bias: Whether weights and biases get blocks of their own.
        unsupported: What becomes of parameters that no supported layer uses.
    """

    collective: Collective

    def __init__(self, separate_weight_and_bias: bool, unsupported: str):
        super().__init__(separate_weight_and_bias, unsupported)
        self._arrangements = Arrangements()
        self._seen: set[Any] = set()  # structures of batches
        # for a few examples, whose numbers are given, by structure
        self._predictions: dict[Any, tuple[Tensor, list[int]]] = {}
        self._prediction_at: dict[Any, Arrangement] = {}  # where they are in predictions
        self._shared: dict[Any, int] = {}  # the tensor of several that is for all examples
        self._trusted: set[Any] = set()  # structures whose predictions for a few are right
        self._reordered: Tensor | None = None  # the prediction for the batch in another order
        self._halves: list[Tensor | None] = []  # those for its halves, if it is to be cut

    def _observe(
        self, X: Any, n: int, on_call: Callable[[Usage, int, Tensor], None]
    ) -> tuple[Tensor, Iterable[Usage], dict[str, str]]:
        """Evaluate the model on n examples without derivatives.

        Args:
            X: Their input.
            n: Their number.
            on_call: Called with the input of each layer: usage, number of the call in this way, and
                the input.

        Returns:
            The prediction, how the model uses its parameters in layers, and the other uses: names
            of parameters, and by which function.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _observe.")

    def _look_anew(self, batch: Batch) -> None:
        """Find out how the model uses its parameters from the first batch of each structure."""
        if self._any_rank(not self._usages or _signature(batch) not in self._seen):
            self._look_first(batch)
        self._look(batch)

    def _look_first(self, batch: Batch) -> None:
        """Find out how the model uses its parameters, from a few examples."""
        n = batch.n
        plain = isinstance(batch.X, Tensor)
        numbers = sorted({0, n - 1} if plain else {0, n // 3, 2 * n // 3, n - 1})
        X = self._some(batch, numbers)
        few = batch if X is None else Batch(X, batch.y, len(numbers))
        self._look(few)
        known = few.n == batch.n or _signature(few) in self._predictions
        if not known and not self.risk.sharded:  # the model cannot do with them
            self._seen.clear()
            few = batch
            self._look(batch)

        def look() -> None:
            try:
                prediction, usages, other_uses = self._observe(few.X, few.n, _ignore)
            except Exception:  # whatever a model does with few examples
                _, usages, other_uses = self._observe(batch.X, batch.n, _ignore)
                self._note(usages, other_uses)
                return
            self._note(usages, other_uses)
            if self._refuse_mistaken(prediction, few):
                self._look(few)
                look()
            self._where_in(prediction, few)

        self._refusing(few, look)
        self._predictions.clear()  # the next batch may have other examples

    def _look(self, batch: Batch) -> None:
        """Find out from a few examples where the examples are inside of the model.

        This is done for the first batch of each structure. If the model may choose rows by what is
        in the examples, or if it cannot do with a few of them, all of them are looked at, in
        another order, for each batch.
        """
        signature = _signature(batch)
        plain = isinstance(batch.X, Tensor) or not example_tensors(batch)
        row = None if batch.n == 1 else self._cut(batch, [0])
        plain = plain and (row is None or self.risk.has_examples(row, 1))  # else: no examples
        self._arrangements.begin(signature, plain, self._may_differ, self._constant_parameters())
        self._reordered, self._halves = None, []
        needed = batch.n > 1 and signature not in self._seen
        if self._any_rank(needed):
            numbers = _few_numbers(batch)
            prediction, inputs = self._look_at_few(batch, numbers)
            if needed:
                self._seen.add(signature)
                if prediction is not None:
                    self._arrangements.learn(inputs, numbers)
                    self._predictions[signature] = prediction, numbers
                elif self._some(batch, numbers) is not None:
                    self._arrangements.entries_matter = True
        verified = batch.n > 1 and self._arrangements.entries_matter and self._wants_examples
        if self._any_rank(verified):
            prediction, inputs = self._look_at(batch, another_order(batch.n))
            halves: list[Tensor | None] = []
            if not isinstance(batch.X, Tensor):  # with other tensors than those of the examples
                halves = [self._look_at(batch, numbers)[0] for numbers in _halves(batch.n)]
            if verified:
                self._reordered, self._halves = prediction, halves
                self._arrangements.expect(inputs)
        self._recording = True

    def _constant_parameters(self) -> Parameters:
        """Return the model's parameters that are constants."""
        model, given = self.risk.model, self.risk.params
        named = () if model is None else model.named_parameters()
        return Parameters({name: p for name, p in named if name not in given})

    def _look_no_more(self) -> None:
        """Take what was found for granted, also in batches of other examples."""
        self._reordered, self._halves = None, []
        self._arrangements.expect(None)

    @property
    def _wants_examples(self) -> bool:
        """Whether examples must be told apart, in a model for which that can be verified."""
        if self.risk.likely_traits.random:
            return False
        return self._keeps_terms_apart or any(map(self._needs_examples, self._usages))

    def _any_rank(self, wanted: bool) -> bool:
        """Return whether to evaluate the model: all ranks do if it is sharded, or none."""
        return self.collective.any(wanted) if self.risk.sharded else wanted

    def _look_at(
        self, batch: Batch, numbers: list[int]
    ) -> tuple[Tensor | None, dict[tuple[Usage, int], Tensor]]:
        """Return the prediction for some examples, by number, and the inputs of layers' calls.

        None and no inputs if there are none.
        """
        X = self._some(batch, numbers)  # None if they are not in the first axis of any tensor
        if not self._any_rank(X is not None):
            return None, {}
        if X is None:  # other ranks need this one to evaluate something
            self._observe(batch.X, batch.n, _ignore)
            return None, {}
        inputs: dict[tuple[Usage, int], Tensor] = {}

        def on_call(usage: Usage, index: int, x: Tensor) -> None:
            # a copy of what few it is: the model may change it afterwards
            inputs[usage, index] = x if len(numbers) == batch.n else x.clone()

        try:
            with self._arrangements.ignored():
                prediction, usages, other_uses = self._observe(X, len(numbers), on_call)
        except Exception:  # whatever a model does with a few examples
            return None, {}
        self._note(usages, other_uses)
        return prediction, inputs

    def _look_at_few(
        self, batch: Batch, numbers: list[int]
    ) -> tuple[Tensor | None, dict[tuple[Usage, int], Tensor]]:
        """Look at a few examples of a batch, by number.

        Which tensors of several have an entry for each example is not known, if there are as many
        entries by chance: if the model fails, one of them may be for all examples.
        """
        signature = _signature(batch)
        seen = self._look_at(batch, numbers)
        if seen[0] is None and not isinstance(batch.X, Tensor) and not self.risk.sharded:
            several = len(example_tensors(batch))
            for shared in range(several if several > 1 else 0):
                self._shared[signature] = shared
                seen = self._look_at(batch, numbers)
                if seen[0] is not None:
                    return seen
            self._shared.pop(signature, None)
        return seen

    def _cut(self, batch: Batch, numbers: list[int]) -> Any | None:
        """Return some rows of a batch's input, by number; None if it has no such rows."""
        X, n = batch.X, batch.n
        some = some_examples(X, n, numbers, self._shared.get(_signature(batch)))
        if some is None and isinstance(X, Tensor) and X.ndim and len(X) % n == 0:
            # positions of an example next to each other in the first axis
            some = some_examples(X.unflatten(0, (n, -1)), n, numbers)
            return None if some is None else some.flatten(0, 1)
        return some

    def _some(self, batch: Batch, numbers: list[int]) -> Any | None:
        """Return the input of some examples of a batch, by number; None if they cannot be had."""
        some = self._cut(batch, numbers)
        known = some is not None and self.risk.has_examples(some, len(numbers))
        return some if known else None

    def _ends(self, batch: Batch) -> tuple[Any, int]:
        """Return the input of the first and the last example, or of all, and their number."""
        X = None if batch.n == 1 else self._some(batch, [0, batch.n - 1])
        return (batch.X, batch.n) if X is None else (X, 2)

    @property
    def _keeps_terms_apart(self) -> bool:
        """Whether it matters which loss terms are those of the same example."""
        return False

    def _where_in(self, prediction: Tensor, batch: Batch) -> Arrangement:
        """Return where the examples of a batch are in its prediction."""
        if batch.n == 1:
            return BATCH_FIRST
        where = self._place_in(prediction, batch)
        return where if self._right_in_another_order(prediction, where, batch.n) else UNKNOWN

    def _place_in(self, prediction: Tensor, batch: Batch) -> Arrangement:
        """Return where examples are in predictions for batches of this structure."""
        n, signature = batch.n, _signature(batch)
        if signature not in self._prediction_at:
            few, numbers = self._predictions.get(signature, (None, []))
            if few is None or few.ndim != prediction.ndim:
                where = BATCH_FIRST if prediction.shape[:1] == (n,) else UNKNOWN
            else:
                tolerance = self._arrangements.tolerance
                where = find_arrangement(few, prediction, numbers, n, tolerance, any_order=True)
            self._prediction_at[signature] = where
        return self._prediction_at[signature]

    def _right_in_another_order(self, prediction: Tensor, where: Arrangement, n: int) -> bool:
        """Return whether the model predicts the same for a batch in another order, if known."""
        other = self._reordered
        if other is None or where.axis is None or not where.known:
            return True
        if self._arrangements.reordered(where, prediction, other, n):
            return True
        # models may bring their examples into an order of their own
        same_shape = other.shape == prediction.shape
        return same_shape and near(prediction, other, self._arrangements.tolerance)

    def _right_alone(self, prediction: Tensor, where: Arrangement, batch: Batch) -> bool:
        """Return whether the model predicts the same for some examples alone, as far as known."""
        if where.axis is None or not where.known:
            return True
        n, signature = batch.n, _signature(batch)
        sets = [*zip(self._halves, _halves(n), strict=False)]
        if signature in self._predictions and signature not in self._trusted:
            sets.append(self._predictions[signature])
        self._trusted.add(signature)
        return all(
            some is not None and self._same_examples(where, some, prediction, numbers, n)
            for some, numbers in sets
        )

    def _same_examples(
        self, where: Arrangement, some: Tensor, prediction: Tensor, numbers: list[int], n: int
    ) -> bool:
        """Return whether predictions for some of n examples are those among all of them."""
        k = len(numbers)
        if some.ndim != prediction.ndim:  # a single one has lost its axis
            return True
        if not (where.divides(some, k) and where.divides(prediction, n)):
            return False
        alone, own = where.examples_of(some, k), where.examples_of(prediction, n)[numbers]
        # models may cut what is padding in all examples
        return alone.shape != own.shape or near(alone, own, self._arrangements.tolerance)

    def _refuse_mistaken(self, prediction: Tensor, batch: Batch) -> bool:
        """Refuse all layers if the model predicts something else for other sets of examples.

        Then examples depend on one another, or a tensor among several has as many entries in its
        first axis as there are examples, but not one for each.
        """
        reason = None
        if not (batch.n == 1 or isinstance(batch.X, Tensor) or self._may_differ):
            where = self._place_in(prediction, batch)
            if not self._right_alone(prediction, where, batch):
                reason = "the model predicts something else for some examples alone"
            elif not self._right_in_another_order(prediction, where, batch.n):
                reason = "the model predicts something else for examples in another order"
        return self._leave([] if reason is None else self._arrangements.calls, reason or "")

    @property
    def _may_differ(self) -> bool:
        """Whether predictions may depend on other examples, or chance, as in training."""
        model = self.risk.model
        layers = [] if model is None else model.modules()
        coupled = any(x.training for x in layers if isinstance(x, nn.modules.batchnorm._BatchNorm))
        return coupled or self.risk.likely_traits.random

    def _refuse_layers(self, batch: Batch) -> bool:
        """Refuse layers whose examples must be told apart, or be there, and are not.

        Returns:
            Whether there were some: what was computed of the batch is wrong then.
        """
        return self._refuse_shared(batch) or self._refuse_unknown()

    def _refuse_shared(self, batch: Batch) -> bool:
        """Refuse layers of inputs without examples if the model cannot do with one for each.

        Returns:
            Whether something was found out, so that the batch must be looked at once more.
        """
        if self._any_rank(self._arrangements.seek()):
            self._seen.clear()
            self._outdated = self._recording
            return True
        shared = self._arrangements.unverified()
        if not self._any_rank(bool(shared)):
            return False
        if self._any_rank(self._arrangements.entries_matter):
            others = self._not_shared(batch, shared)
            if self._any_rank(bool(others)):
                self._arrangements.not_shared(others)
                self._seen.clear()
                self._outdated = self._recording
                return True
        try:
            right = self._can_do_with_one_each(*self._ends(batch))
        except Exception:  # whatever a model does with another shape
            right = False
        calls = [] if right else sorted(shared, key=str)
        return self._leave(calls, "its layer's input has no axis of examples")

    def _not_shared(
        self, batch: Batch, shared: dict[tuple[Usage, int], Tensor]
    ) -> list[tuple[Usage, int]]:
        """Return the calls whose input is not that of one more example alone, if it is not needed.

        An expert may get nothing but the tokens of the examples that were looked at.
        """
        few = _few_numbers(batch)
        one = next(number for number in range(batch.n) if batch.n == 1 or number not in few)
        prediction, inputs = self._look_at(batch, [one])
        if prediction is None:
            return []
        tolerance = self._arrangements.tolerance

        def same(call: tuple[Usage, int], x: Tensor) -> bool:
            other = inputs.get(call)
            return other is not None and other.shape == x.shape and near(other, x, tolerance)

        return [call for call, x in shared.items() if not same(call, x)]

    def _can_do_with_one_each(self, X: Any, n: int) -> bool:
        """Return whether each of n examples has its own output of layers of inputs without them."""
        with self._arrangements.ignored():
            expected, *_ = self._observe(X, n, _ignore)
        actual, *_ = self._observe(X, n, _ignore)
        changes = []
        for example in (0, n - 1):  # as often on all ranks
            with self._arrangements.disturbed(example):
                changes.append((self._observe(X, n, _ignore)[0] - actual).abs().flatten())
        if actual.shape != expected.shape:
            return False
        if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-5):
            return False
        if n == 1:
            return True
        # A model that takes the first output for all examples, or a mean, gives the same. But then
        # what one of them gets changes the prediction for all of them, or for none.
        change = torch.stack(changes)  # [2, entries of the prediction]
        largest = change.amax(1, keepdim=True)
        matters = (largest > 1e-6 * largest.max()).sum()
        owners = (change > 1e-3 * largest).sum(0)
        return int(matters) != 1 and int(owners.max()) <= 1

    def _refuse_unknown(self) -> bool:
        """Refuse layers whose examples cannot be told apart where they must be, if there are."""
        calls = [call for call in self._arrangements.unknown() if self._needs_examples(call[0])]
        return self._leave(calls, "its layer's examples cannot be told apart")

    def _leave(self, calls: list[tuple[Usage, int]], reason: str) -> bool:
        """Refuse the parameters of calls, and leave these alone from now on.

        Those of other ranks, too, if the model is sharded.

        Returns:
            Whether there were any.
        """
        if not self._any_rank(bool(calls)):
            return False
        reasons = {part.name: reason for usage, _ in calls for part in usage.parts.values()}
        if self.risk.sharded:
            for others in self.collective.gather(reasons):
                reasons = {**others, **reasons}
            calls = [
                call
                for call in self._arrangements.calls
                if not reasons.keys().isdisjoint(part.name for part in call[0].parts.values())
            ]
        self._arrangements.refuse(calls)
        self._seen.clear()  # without them, other layers may see something else
        self._note([], reasons)
        self._outdated = self._recording  # also if they had been refused for another reason
        return True

    def _needs_examples(self, usage: Usage) -> bool:
        """Return whether more than sums over all positions of all examples is wanted of a layer."""
        return False

    def _refusing(self, batch: Batch, evaluate: Callable[[], T]) -> T:
        """Evaluate the model on a batch, once more whenever that shows layers to be refused."""
        while True:
            try:
                result = evaluate()
            except NotImplementedError:
                raise
            except Exception:  # whatever a model does with another shape, or by itself
                if not (self._may_cause_errors(batch) and self._refuse_shared(batch)):
                    self._seen.clear()  # not all calls were seen
                    self._arrangements.forget()
                    raise
            else:
                if not self._refuse_layers(batch):
                    return result
            self._look(batch)

    def _may_cause_errors(self, batch: Batch) -> bool:
        """Return whether the model may have failed because of outputs that got another shape."""
        if self.risk.sharded:
            return False
        try:
            with self._arrangements.ignored():
                self._observe(batch.X, batch.n, _ignore)
        except Exception:  # its own
            return False
        return True


def _signature(batch: Batch) -> Any:
    """Return something hashable that batches share whose examples have the same shapes."""
    X = batch.X
    rows = X.shape[0] / batch.n if isinstance(X, Tensor) and X.ndim else None
    return structure(X), rows


def _halves(n: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the first and of the last half of n examples, or twice that of one."""
    numbers = list(range(n))
    return numbers[: n // 2] or numbers, numbers[n // 2 :]


def _few_numbers(batch: Batch) -> list[int]:
    """Return the numbers of a few examples, fewer than there are, that are looked at alone.

    Several show more where it is not certain which tensors of the input have examples.
    """
    n = batch.n
    if isinstance(batch.X, Tensor):
        return [2 * n // 3]  # where few orders leave it
    return list(dict.fromkeys([n - 1, 0, n // 2]))[: max(n - 1, 1)]


def _ignore(usage: Usage, index: int, x: Tensor) -> None:
    """Do nothing about a call."""


__all__ = ["Looking"]
