"""Small gradients of several loss vectors are handed over together; large ones at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import layer_setup
from torch import Tensor

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from curvlinops.computers.events import Statistic
from curvlinops.computers.formats import Format
from curvlinops.computers.listeners import Bundled
from curvlinops.computers.usages import Part, Usage

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
FIRST, SECOND = (Usage(Format(), Part(name, 0, 2, 2), None) for name in ("first", "second"))


class Log(Statistic):
    """Notes the gradients of each back-propagation."""

    def __init__(self) -> None:
        self.now: dict[Usage, Tensor] = {}
        self.finished: list[dict[Usage, Tensor]] = []
        self.batches = 0

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        assert usage not in self.now
        self.now[usage] = gradient

    def end_of_backward(self) -> None:
        self.finished.append(self.now)
        self.now = {}

    def end_of_batch(self) -> None:
        self.batches += 1

    def sizes(self) -> list[int]:
        """Return the number of vectors in each back-propagation, the same for both layers."""
        for gradients in self.finished:
            assert len({len(gradient) for gradient in gradients.values()}) == 1
        return [len(next(iter(gradients.values()))) for gradients in self.finished]


def gradient(vector: int, n: int = 2, S: int = 3, d: int = 2) -> Tensor:
    return torch.full((1, n, S, d), float(vector + 1))


def hand_out(listener: Bundled, reached: list[set[Usage]], **shape: int) -> None:
    """Hand out a batch's gradients: of the layers that each vector reaches."""
    for vector, usages in enumerate(reached):
        for usage in (SECOND, FIRST):
            if usage in usages:
                listener.on_gradient(usage, 0, gradient(vector, **shape))
        listener.end_of_backward()
    listener.end_of_batch()


BOTH = {FIRST, SECOND}


@pytest.mark.parametrize(
    ("entries", "rows", "sizes"),
    [
        (2**20, 2**10, [5]),
        (5 * 24, 5 * 6, [5]),  # of both layers, and of one
        (5 * 24 - 1, 2**10, [3, 2]),
        (2**20, 5 * 6 - 1, [3, 2]),
        (2 * 24, 2**10, [2, 2, 1]),
        (2 * 24 - 1, 2**10, [1] * 5),
        (2**20, 2 * 6 - 1, [1] * 5),
    ],
)
def test_sizes(entries: int, rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch):
    """Nothing is lost, nor is anything else put together; bundles are about as large."""
    monkeypatch.setattr(Bundled, "_ENTRIES", entries)
    monkeypatch.setattr(Bundled, "_ROWS", rows)
    log = Log()
    hand_out(Bundled(log, lambda: 5), [BOTH] * 5)
    assert log.sizes() == sizes and log.batches == 1
    for usage in BOTH:
        seen = torch.cat([gradients[usage] for gradients in log.finished])
        torch.testing.assert_close(seen, torch.cat([gradient(v) for v in range(5)]))


@pytest.mark.parametrize("number", [1, 2])
def test_large_gradients_are_not_held(number: int, monkeypatch: pytest.MonkeyPatch):
    """Nor are those of a single vector, for which nobody else comes."""
    monkeypatch.setattr(Bundled, "_ROWS", 7 if number > 1 else 2**10)
    log = Log()
    listener = Bundled(log, lambda: number)
    listener.on_gradient(FIRST, 0, gradient(0))
    assert list(log.now) == [FIRST]


def test_vectors_that_do_not_reach_a_layer_have_zeros():
    """So that gradients of the same vector are at the same place, for layers that are added."""
    log = Log()
    hand_out(Bundled(log, lambda: 4), [{SECOND}, BOTH, {SECOND}, {FIRST}])
    (gradients,) = log.finished
    assert gradients[FIRST][:, 0, 0, 0].tolist() == [0, 2, 0, 4]
    assert gradients[SECOND][:, 0, 0, 0].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["mlp-norms", "linear-leading", "conv1d-groups", "embedding", "twice", "head"]
)
def test_same_operator(operator: Any, approx: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """With bundles and without: the other tests of small networks are with them."""
    setup = layer_setup(name)
    sizes: list[int] = []
    pass_on = Bundled._pass_on

    def noted(self: Bundled) -> None:
        sizes.extend(len(gradients) for gradients in self._held.values())
        pass_on(self)

    monkeypatch.setattr(Bundled, "_pass_on", noted)

    def dense() -> Tensor:
        arguments = (setup.model, setup.loss, setup.params, setup.data)
        options = {"fisher_type": "type-2", "kfac_approx": approx, "check_deterministic": False}
        return operator(*arguments, **options).to_dense()

    expected = dense()
    assert max(sizes) > 1
    monkeypatch.setattr(Bundled, "_ROWS", 0)
    sizes.clear()
    torch.testing.assert_close(dense(), expected)
    assert set(sizes) == {1}
