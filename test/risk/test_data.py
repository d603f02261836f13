"""What data may be, sizes of batches, and how tensors are moved."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from curvlinops.risk.data import BatchSource, TermCounter, to_device

CPU, META = torch.device("cpu"), torch.device("meta")
PAIR = (torch.zeros(3, 2), torch.zeros(3))


class BatchEncoding(UserDict[str, Any]):
    """Like the class in Hugging Face's transformers: values are also attributes."""

    def __init__(self, data: dict[str, Any], origin: str) -> None:
        super().__init__(data)
        self.origin = origin

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


# Data


@pytest.mark.parametrize("kind", ["generator", "zip", "map", "list_iterator"])
def test_one_shot_data(kind: str) -> None:
    """They are refused before anything is taken from them."""
    data: Iterator[Any] = {
        "generator": (pair for pair in [PAIR]),
        "zip": zip([PAIR[0]], [PAIR[1]], strict=True),
        "map": map(tuple, [PAIR]),
        "list_iterator": iter([PAIR]),
    }[kind]
    with pytest.raises(ValueError, match=f"{kind}, which can be iterated only once.*a DataLoader"):
        BatchSource(data, CPU)
    assert len(next(data)) == 2


def test_construction_does_not_iterate() -> None:
    """To iterate a DataLoader starts its workers and draws a random number."""

    class Data:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    assert BatchSource(Data(), CPU).length is None


@pytest.mark.parametrize("data", [None, 1, lambda: PAIR])
def test_data_must_be_iterable(data: Any) -> None:
    """Anything else is an error."""
    with pytest.raises(ValueError, match="data must be an iterable of batches"):
        BatchSource(data, CPU)


def test_length() -> None:
    """The number of batches, where it is known without iterating."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield PAIR

    class Sequence:
        def __getitem__(self, i: int) -> Any:
            return [PAIR, PAIR][i]

    assert BatchSource([PAIR, PAIR], CPU).length == 2
    assert BatchSource(DataLoader(TensorDataset(*PAIR), batch_size=2), CPU).length == 2
    assert BatchSource(DataLoader(Stream()), CPU).length is None
    source = BatchSource(Sequence(), CPU)  # type: ignore[arg-type]
    assert source.length is None
    assert len(list(source.data)) == 2


# Elements


@pytest.mark.parametrize(
    ("element", "got"),
    [
        ({"X": PAIR[0], "y": PAIR[1]}, "a dict"),
        (torch.zeros(2, 3), "a Tensor"),
        ("Xy", "a str"),
        (None, "a NoneType"),
        ((PAIR[0],), "a tuple of length 1"),
        ([*PAIR, None], "a list of length 3"),
    ],
)
def test_not_a_pair(element: Any, got: str) -> None:
    """Things of length two that are no pairs are not taken apart."""
    with pytest.raises(ValueError, match=rf"must be a pair \(X, y\).*got {got}\."):
        BatchSource([element], CPU).batch(element)


@pytest.mark.parametrize("X", [np.zeros((3, 2)), [PAIR[0]], None])
def test_wrong_inputs(X: Any) -> None:
    """Inputs are a tensor or a mapping."""
    with pytest.raises(ValueError, match=f"tensor or a mapping.*got {type(X).__name__}"):
        BatchSource([], CPU).batch((X, None))


# Batch size


def test_default_batch_size() -> None:
    """It is the length of the first axis."""
    batch = BatchSource([], CPU).batch(list(PAIR))
    assert batch.n == 3
    assert batch.X is PAIR[0]
    assert batch.y is PAIR[1]


@pytest.mark.parametrize("result", [5, np.int64(5), torch.tensor(5)])
def test_batch_size_fn(result: Any) -> None:
    """Integers of any kind become int; the function gets the inputs."""
    seen = []
    source = BatchSource([], CPU, lambda X: (seen.append(X), result)[1])
    batch = source.batch(({"x": PAIR[0]}, PAIR[1]))
    assert batch.n == 5
    assert type(batch.n) is int
    assert seen == [batch.X]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (0, r"at least one example, got batch_size_fn\(X\) = 0"),
        (-1, "at least one example"),
        (2.0, r"batch_size_fn\(X\) must be an integer, got 2.0"),
        ("2", "must be an integer"),
        (None, "must be an integer, got None"),
        (torch.ones(2), "must be an integer"),
    ],
)
def test_wrong_batch_size(result: Any, message: str) -> None:
    """Anything but a positive integer is an error."""
    with pytest.raises(ValueError, match=message):
        BatchSource([], CPU, lambda X: result).batch(PAIR)


def test_batch_without_size() -> None:
    """Mappings need ``batch_size_fn``; tensors need a non-empty first axis."""
    source = BatchSource([], CPU)
    for X in ({"x": PAIR[0]}, UserDict(x=PAIR[0])):
        with pytest.raises(ValueError, match=f"{type(X).__name__}.*Pass batch_size_fn"):
            source.batch((X, PAIR[1]))
    with pytest.raises(ValueError, match=r"scalar\. Add a batch dimension"):
        source.batch((torch.zeros(()), torch.zeros(())))
    with pytest.raises(ValueError, match=r"at least one example, got X.shape\[0\] = 0"):
        source.batch((torch.zeros(0, 2), torch.zeros(0)))


# Moving


class Pair(NamedTuple):
    """A named tuple of targets."""

    start: Tensor
    end: Tensor


@pytest.mark.parametrize(
    "value",
    [
        {"x": torch.zeros(2), "name": "a", "none": None},
        OrderedDict(x=torch.zeros(2)),
        UserDict(x=torch.zeros(2), deep={"x": torch.zeros(1)}),
        BatchEncoding({"x": torch.zeros(2)}, origin="tokenizer"),
        [torch.zeros(2), 3],
        (torch.zeros(2), [torch.zeros(1)]),
        Pair(torch.zeros(2), torch.zeros(1)),
    ],
)
def test_containers_are_moved(value: Any) -> None:
    """They keep their type and other entries, and the user's object stays as it is."""

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, (dict, UserDict)):
            value = list(value.values())
        return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []

    before = tensors(value)
    moved = to_device(value, META)
    assert type(moved) is type(value)
    assert len(moved) == len(value)
    assert [t.device for t in tensors(moved)] == [META] * len(before)
    assert all(a is b for a, b in zip(before, tensors(value), strict=True))
    if isinstance(value, BatchEncoding):
        assert moved.origin == "tokenizer"
        assert moved.x is moved["x"]
    if isinstance(value, dict):
        assert list(moved) == list(value)


def test_mapping_is_copied_also_on_its_device() -> None:
    """A model may change its inputs (``X.pop("labels")``); the user's mapping is not changed."""
    for X in ({"x": PAIR[0]}, UserDict(x=PAIR[0])):
        moved = to_device(X, CPU)
        assert moved["x"] is PAIR[0]
        moved.pop("x")
        assert "x" in X


def test_other_values_are_returned() -> None:
    """What holds no tensors is not touched."""
    for value in (None, 3, "text", object()):
        assert to_device(value, META) is value


def test_inference_tensors_are_cloned() -> None:
    """Autograd cannot use them."""
    with torch.inference_mode():
        x = torch.ones(2)
    moved = to_device({"x": x, "y": PAIR[0]}, CPU)
    assert not moved["x"].is_inference()
    assert torch.equal(moved["x"], x)
    assert moved["y"] is PAIR[0]


def test_term_counter() -> None:
    """The first index of each batch, and those of another rank further on."""
    counter = TermCounter()
    assert [counter.advance(m) for m in (3, 1, 4)] == [0, 3, 4]
    assert TermCounter(10).advance(5) == 10
