"""EKFAC keeps the events of few data for its second pass; else, it passes over them again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kfac_cases import Lambda
from kfac_reference import Setup
from layer_cases import LAYER_CASES, layer_setup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from curvlinops.computers._base import KFACComputer
from curvlinops.computers.events import Statistic
from curvlinops.computers.formats import EmbeddingFormat, Format
from curvlinops.computers.positions import Positions, Tokens
from curvlinops.computers.recorder import Recorder
from curvlinops.computers.usages import Part, Usage

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
F64 = torch.float64


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the passes over the data are for, as they are made."""
    made: list[str] = []
    gather = KFACComputer._gather

    def noted(self: Any, statistic: Any, what: str, signs: str) -> Any:
        made.append(what)
        return gather(self, statistic, what, signs)

    monkeypatch.setattr(KFACComputer, "_gather", noted)
    return made


ONE, TWO = ["KFAC factors"], ["KFAC factors", "EKFAC eigenvalues"]


def ekfac(setup: Setup, **options: Any) -> EKFACLinearOperator:
    if "fisher_type" not in options:
        options = {"mc_samples": 2, **options}
    return EKFACLinearOperator(**setup.kwargs(**options))


def both(
    setup: Setup, passes: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return EKFAC from one pass, and from two."""
    results = []
    for size, expected in ((Recorder._BYTES, ONE), (0, TWO)):
        passes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "_BYTES", size)
            results.append(ekfac(setup, **options).to_dense())
        assert passes == expected
    return results[0], results[1]


# ---- the same operator ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYER_CASES)
def test_same_operator(name: str, passes: list[str], monkeypatch: pytest.MonkeyPatch):
    """To the last bit: the same sums of the same numbers. Other tests see the first kind only."""
    one, two = both(layer_setup(name), passes, monkeypatch)
    assert torch.equal(one, two) and one.count_nonzero()


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["resnet", "gpt", "head-twice", "cross-attention", "tied-same"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_same_operator_with_all_options(
    fisher_type: str,
    name: str,
    approx: str,
    backend: str,
    passes: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Also if batches have different numbers of vectors, as in the exact mode of sequences."""
    options = {"fisher_type": fisher_type, "kfac_approx": approx, "backend": backend}
    one, two = both(layer_setup(name), passes, monkeypatch, loss_terms="exact", **options)
    assert torch.equal(one, two) and one.count_nonzero()


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_random_signs_need_two_passes(fisher_type: str, passes: list[str]):
    """Those of the eigenvalues are independent of those of the eigenvectors; see its own tests."""
    ekfac(layer_setup("gpt"), fisher_type=fisher_type)
    assert passes == TWO
    passes.clear()
    ekfac(layer_setup("resnet"), fisher_type=fisher_type)  # with one loss term per example
    assert passes == ONE


def test_numbers_of_vectors(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    """A statistic knows how many vectors the batch at hand has; they differ here."""
    from curvlinops.computers.eigenvalues import EigenvalueStatistic

    seen: list[int] = []
    add = EigenvalueStatistic._add_calls

    def noted(self: Any, *args: Any) -> None:
        seen.append(self._num_vectors())
        add(self, *args)

    monkeypatch.setattr(EigenvalueStatistic, "_add_calls", noted)
    setup = layer_setup("embedding-lengths", "ce")  # batches of 3 × 3 and of 2 × 2 tokens
    both(setup, passes, monkeypatch, fisher_type="empirical", loss_terms="exact")
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and set(seen) == {3, 2}


def test_low_precision_and_autocast(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    """Sums of what is replayed are computed without autocast, too."""
    setup = layer_setup("resnet")
    setup.model = copy.deepcopy(setup.model).float()
    setup.params = {name: p.float() for name, p in setup.params.items()}
    setup.data = [(X.float(), y) for X, y in setup.data]
    with torch.autocast("cpu", torch.bfloat16):
        one, two = both(setup, passes, monkeypatch)
    assert torch.equal(one, two)


def test_inference_mode(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    setup = layer_setup("resnet")
    with torch.inference_mode():
        one, two = both(setup, passes, monkeypatch)
    torch.testing.assert_close(one, two)


def test_memory_budget(passes: list[str]):
    """Who sets a budget has no memory for this, and maybe several passes over some groups."""
    setup = layer_setup("resnet")
    expected = ekfac(setup).to_dense()
    assert passes == ONE
    passes.clear()
    budgeted = ekfac(setup, memory_budget=2**30)
    assert passes == ["Layers", *TWO]
    torch.testing.assert_close(budgeted.to_dense(), expected)


# ---- what fits -----------------------------------------------------------------------------------
def linear(X: Tensor, sizes: list[int] | None = None) -> Setup:
    """A linear layer of 3 inputs and 2 outputs."""
    model, torch_loss = nn.Linear(3, 2).double(), nn.MSELoss()
    y = torch.rand(len(X), 2, dtype=F64)
    parts = [len(X)] if sizes is None else sizes
    data = list(zip(X.split(parts), y.split(parts), strict=True))
    return Setup(model, torch_loss, dict(model.named_parameters()), data)


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_size(sizes: list[int], passes: list[str], monkeypatch: pytest.MonkeyPatch):
    """Inputs and output gradients of all batches, in bytes."""
    setup = linear(torch.rand(6, 3, dtype=F64), sizes)
    needed = 6 * (3 + 2) * 8
    for size, expected in ((needed, ONE), (needed - 1, TWO)):
        passes.clear()
        monkeypatch.setattr(Recorder, "_BYTES", size)
        ekfac(setup, mc_samples=1)
        assert passes == expected


# ---- data in another order at each pass ----------------------------------------------------------
class Shuffled:
    """Batches of data in an order of their own at each pass."""

    def __init__(self, setup: Setup):
        self.X, self.y = (torch.cat(parts) for parts in zip(*setup.data, strict=True))
        self.generator = torch.Generator().manual_seed(2)

    def __iter__(self) -> Iterator[Any]:
        for rows in torch.randperm(len(self.X), generator=self.generator).split(4):
            yield self.X[rows], self.y[rows]


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_order_of_the_second_pass(backend: str, monkeypatch: pytest.MonkeyPatch):
    """It must be that of the first one, because samples depend on it; if there is a second one."""
    setup = linear(torch.rand(6, 3, dtype=F64), [4, 2])
    setup.data = Shuffled(setup)
    ekfac(setup, backend=backend)
    monkeypatch.setattr(Recorder, "_BYTES", 0)
    with pytest.raises(RuntimeError, match="order of the data differs between two passes"):
        ekfac(setup, backend=backend, check_deterministic=True)
    ekfac(setup, backend=backend, check_deterministic=False)
    exact = ekfac(setup, backend=backend, check_deterministic=True, fisher_type="type-2")
    setup.data = list(setup.data)
    expected = ekfac(setup, backend=backend, fisher_type="type-2")
    torch.testing.assert_close(exact.to_dense(), expected.to_dense())


@pytest.mark.parametrize("memory_budget", [None, 3000])
def test_order_by_the_global_generator(
    memory_budget: int | None, passes: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Is the same in all passes: with a budget in the first and second one of each part."""
    setup = linear(torch.rand(6, 3, dtype=F64))
    batches = DataLoader(TensorDataset(*setup.data[0]), batch_size=4, shuffle=True)
    monkeypatch.setattr(Recorder, "_BYTES", 0)
    setup.data = batches
    torch.manual_seed(1)
    E = ekfac(setup, check_deterministic=True, memory_budget=memory_budget)
    assert passes[-2:] == TWO
    torch.manual_seed(1)
    setup.data = list(batches)
    torch.testing.assert_close(E.to_dense(), ekfac(setup).to_dense())


def test_order_with_a_memory_budget(passes: list[str]):
    """The passes of every part are compared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    X, y = torch.rand(6, 3, dtype=F64), torch.rand(6, 2, dtype=F64)
    setup = Setup(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    options = {"memory_budget": 18000, "check_deterministic": True}
    ekfac(setup, **options)
    parts = passes.count(TWO[1])
    assert parts > 1
    right = Shuffled(setup)

    class OtherOrder(Shuffled):
        """Has another order in the pass of a number."""

        count, other = 0, -1

        def __iter__(self) -> Iterator[Any]:
            OtherOrder.count += 1
            rows = torch.arange(6)
            rows = rows.flip(0) if OtherOrder.count == OtherOrder.other else rows
            yield right.X[rows], right.y[rows]

    data = OtherOrder(setup)
    setup.data = data
    ekfac(setup, **options)
    total = OtherOrder.count
    for number in range(total - 2 * parts + 1, total + 1):
        OtherOrder.count, OtherOrder.other = 0, number
        with pytest.raises(RuntimeError, match="order of the data differs"):
            ekfac(setup, **options)


def usage(name: str) -> Usage:
    return Usage(Format(), Part(name, 0, 2, 2), None)


def test_shared_memory_counts_once(monkeypatch: pytest.MonkeyPatch):
    """All of it, though, also of what is a view of a large tensor."""
    whole = torch.rand(5, 10)
    x = whole[:, :2].unsqueeze(1)

    def complete(size: int, names: str) -> bool:
        monkeypatch.setattr(Recorder, "_BYTES", size)
        recorder = Recorder(KeepNothing())
        recorder.begin(torch.rand(1))
        for name in names:
            recorder.on_input(usage(name), 0, Positions(1, lambda: x, sources=[x[:]]))
        return recorder.complete

    assert complete(200, "qkv") and not complete(199, "q")


def test_inputs_are_copied_only_if_they_fit(monkeypatch: pytest.MonkeyPatch):
    X = {"x": torch.rand(10), "y": [torch.rand(10)]}
    for size, same in ((80, False), (79, True)):
        monkeypatch.setattr(Recorder, "_BYTES", size)
        begun = Recorder(KeepNothing()).begin(X)
        assert (begun is X) is same
        assert (begun["y"][0].data_ptr() == X["y"][0].data_ptr()) is same
        torch.testing.assert_close(begun, X)


class KeepNothing(Statistic):
    """A statistic that does nothing."""


def test_inputs_that_are_differentiated():
    """As of models whose predictions are derivatives by their inputs."""
    X = [torch.rand(2, requires_grad=True), torch.tensor([1, 2])]
    begun = Recorder(KeepNothing()).begin(X)
    assert [x.requires_grad for x in begun] == [True, False] and begun[0].is_leaf


def test_all_events_in_their_order():
    log: list[Any] = []

    class Log(Statistic):
        def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
            log.append(("input", usage, index, positions.num_positions))

        def end_of_forward(self) -> None:
            log.append("forward")

        def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
            log.append(("gradient", usage, index, gradient.sum().item()))

        def end_of_backward(self) -> None:
            log.append("backward")

        def end_of_batch(self) -> None:
            log.append("batch")

    recorder = Recorder(Log())
    for number in range(3):
        recorder.begin(torch.rand(1))
        for index, name in enumerate("vww"):
            x = torch.rand(1, 1, 1)
            recorder.on_input(usage(name), index, Positions(number, lambda x=x: x, sources=[x]))
        recorder.end_of_forward()
        for vector in range(2):
            recorder.on_gradient(usage("w"), 1, torch.full((1, 1, 1, 1), 2.0 * vector + number))
            recorder.end_of_backward()
        recorder.end_of_batch()
        recorder.end(2)
    heard = log.copy()
    log.clear()
    assert list(recorder.replay(Log())) == [2, 2, 2]
    assert log == heard and len(log) == 3 * (3 + 1 + 4 + 1)


def test_nothing_is_held_when_it_is_too_much(monkeypatch: pytest.MonkeyPatch):
    """Not even what fitted."""
    monkeypatch.setattr(Recorder, "_BYTES", 300)
    recorder = Recorder(KeepNothing())
    recorder.begin(torch.rand(2, 3))
    gradient = torch.rand(1, 2, 1, 3)
    held = weakref.ref(gradient)
    recorder.on_gradient(usage("w"), 0, gradient)
    del gradient
    gc.collect()
    assert held() is not None and recorder.complete
    recorder.on_gradient(usage("v"), 0, torch.rand(1, 100, 1, 1))
    gc.collect()
    assert held() is None and not recorder.complete
    assert recorder.begin(torch.rand(1)) is not None and not recorder.complete


def test_what_was_replayed_is_freed():
    """Gradient by gradient, lest they are held besides what is made of them."""
    recorder = Recorder(KeepNothing())
    alive: list[Any] = []
    for number in range(2):
        recorder.begin(torch.rand(2, 3))
        x = torch.rand(2, 1, 3)
        recorder.on_input(usage("w"), 0, Positions(1, lambda x=x: x, sources=[x]))
        for _ in range(2):
            gradient = torch.rand(1, 2, 1, 3)
            alive.append(weakref.ref(gradient))
            recorder.on_gradient(usage("w"), 0, gradient)
            recorder.end_of_backward()
        recorder.end(number + 5)
    del gradient
    counts: list[Any] = []

    class Counts(Statistic):
        def end_of_backward(self) -> None:
            gc.collect()
            counts.append(sum(each() is not None for each in alive))

        def end_of_batch(self) -> None:
            counts.append("batch")

    assert list(recorder.replay(Counts())) == [5, 6]
    assert counts == [3, 2, "batch", 1, 0, "batch"]


# ---- what cannot be kept -------------------------------------------------------------------------
class Reused:
    """Data whose batches have the same memory, one after the other."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]):
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        X = torch.empty_like(self._parts[0][0])
        for values, y in self._parts:
            X.numpy()[:] = values.numpy()  # which PyTorch does not notice
            yield X, y


def test_memory_that_is_used_again(passes: list[str]):
    setup = linear(torch.rand(6, 3, dtype=F64), [2, 2, 2])
    expected = ekfac(setup).to_dense()
    setup.data = Reused(setup.data)  # type: ignore[assignment]
    passes.clear()
    torch.testing.assert_close(ekfac(setup).to_dense(), expected)
    assert passes == ONE


def test_inputs_that_change_after_the_batch(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    """A model that computes in memory of its own."""
    setup = linear(torch.rand(6, 3, dtype=F64), [2, 2, 2])
    setup.model = Lambda(lambda m, x: m.layer(x.sin()), layer=setup.model)
    setup.params = dict(setup.model.named_parameters())
    expected = ekfac(setup).to_dense()
    memory = torch.empty(2, 3, dtype=F64)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(memory[: len(x)].copy_(x.sin()))

    setup.model.function = forward
    passes.clear()
    torch.testing.assert_close(ekfac(setup).to_dense(), expected)
    assert passes == TWO


class Holder:
    """A container that nobody knows."""

    def __init__(self, x: Tensor):
        self.x = x


class Subclass(Tensor):
    """A tensor that might be anything."""


def test_unknown_containers_and_tensors(passes: list[str]):
    setup = linear(torch.rand(6, 3, dtype=F64), [4, 2])
    expected = ekfac(setup).to_dense()
    assert passes == ONE
    plain, setup.model = setup.data, Lambda(lambda m, X: m.layer(X.x), layer=setup.model)
    setup.params = {f"layer.{name}": p for name, p in setup.params.items()}
    setup.data = [({"x": Holder(X)}, y) for X, y in plain]
    setup.model.function = lambda m, X: m.layer(X["x"].x)
    setup.batch_size_fn = lambda X: len(X["x"].x)
    passes.clear()
    torch.testing.assert_close(ekfac(setup).to_dense(), expected)
    assert passes == TWO
    setup.data = [(X.as_subclass(Subclass), y) for X, y in plain]
    setup.model.function = lambda m, X: m.layer(X.as_subclass(Tensor))
    setup.batch_size_fn = None
    passes.clear()
    torch.testing.assert_close(ekfac(setup).to_dense(), expected)
    assert passes == TWO


def test_formats_that_do_not_tell_what_they_hold(
    passes: list[str], monkeypatch: pytest.MonkeyPatch
):
    """As those of a user may not."""
    setup = linear(torch.rand(6, 3, dtype=F64), [4, 2])
    expected = ekfac(setup).to_dense()
    monkeypatch.setattr(
        Format, "positions", lambda self, x, n, where: Positions(1, lambda: x.unsqueeze(1))
    )
    passes.clear()
    torch.testing.assert_close(ekfac(setup).to_dense(), expected)
    assert passes == TWO


def test_data_in_another_order(passes: list[str]):
    """Without random numbers, the order of the data does not matter: one pass sees all of them."""
    setup = linear(torch.rand(7, 3, dtype=F64), [4, 3])
    expected = ekfac(setup, fisher_type="type-2").to_dense()
    X, y = (torch.cat(parts) for parts in zip(*setup.data, strict=True))
    setup.data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, y), batch_size=4, shuffle=True
    )
    passes.clear()
    found = ekfac(setup, fisher_type="type-2", num_data=7).to_dense()
    torch.testing.assert_close(found, expected)
    assert passes == ONE


# ---- inputs that are changed in place ------------------------------------------------------------
def changing(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    z = m.b(h)
    return m.c(h.mul_(2).add_(z))


def not_changing(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(h * 2 + m.b(h))


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_inputs_changed_in_place(operator: Any, backend: str):
    """KFAC-expand needs them only when a layer is called; the others say so, as autograd would."""
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)}
    model = Lambda(changing, **layers).double()
    params = {name: p for name, p in model.named_parameters() if name.startswith("b")}
    data = [(torch.rand(5, 3, dtype=F64), torch.randint(2, (5,)))]
    arguments: Any = (model, nn.CrossEntropyLoss(), params, data)
    options = {"fisher_type": "type-2", "backend": backend, "check_deterministic": False}
    if operator is KFACLinearOperator:
        found = operator(*arguments, **options).to_dense()
        model.function = not_changing
        torch.testing.assert_close(found, operator(*arguments, **options).to_dense())
        return
    with pytest.raises(RuntimeError, match=r"layer of 'b.weight' and 'b.bias' was .* in place"):
        operator(*arguments, **options)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("positions", [1, 2])
def test_inputs_changed_in_place_reduce(positions: int, backend: str):
    """A single position is averaged with those of later calls, and needed until then."""
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)}
    model = Lambda(changing, **layers).double()
    params = {name: p for name, p in model.named_parameters() if name.startswith("b")}
    X, y = torch.rand(5, positions, 3, dtype=F64), torch.rand(5, positions, 2, dtype=F64)
    options = {"kfac_approx": "reduce", "backend": backend, "check_deterministic": False}

    def kfac() -> Tensor:
        return KFACLinearOperator(model, nn.MSELoss(), params, [(X, y)], **options).to_dense()

    if positions == 1:
        with pytest.raises(RuntimeError, match=r"layer of 'b.weight' and 'b.bias' was .* in place"):
            kfac()
        return
    found = kfac()
    model.function = not_changing
    torch.testing.assert_close(found, kfac())


def test_tokens_changed_in_place():
    tokens = torch.tensor([[0, 1], [1, 2]])
    positions = EmbeddingFormat(size=3).positions(tokens, 2, "The layer of 't'")
    assert isinstance(positions, Tokens) and positions.indices.tolist() == tokens.tolist()
    tokens += 1
    with pytest.raises(RuntimeError, match="The layer of 't' was called with a tensor"):
        _ = positions.indices
