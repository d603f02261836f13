"""The empirical risk: scale, passes over the data, side effects, progress bars, several ranks."""

from __future__ import annotations

import copy
import random
import threading
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from curvlinops.distributed import Collective
from curvlinops.risk import Batch, EmpiricalRisk, empirical_risk, loss_entry

MSE = nn.MSELoss


class Net(nn.Module):
    """A network that counts its calls."""

    def __init__(self, C: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).to(dtype)
        self.calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return self.net(X)


class Counting:
    """Data that count the passes over them, and have no length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def regression(*sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Batches of the given sizes."""
    return [(torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)) for n in sizes]


def make(data: Any, net: nn.Module | None = None, loss: Any = None, **kwargs: Any) -> EmpiricalRisk:
    """Make the risk of a network, by default a new one and the square loss."""
    net = Net() if net is None else net
    return EmpiricalRisk(
        net, MSE() if loss is None else loss, dict(net.named_parameters()), data, **kwargs
    )


def count(batch: Batch) -> tuple[list[Tensor], float]:
    """A function to sum that needs no model: number of examples, and sum of inputs."""
    return [torch.tensor(float(batch.n)), batch.X.sum(0)], batch.n


# Scale: one loss, whatever the batches


def classification(*sizes: int, shape: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Batches with labels, some of them -100 (in the second batch: all)."""
    data = []
    for i, n in enumerate(sizes):
        y = torch.randint(0, 3, (n, *shape))
        y = torch.where(torch.rand(n, *shape) < (1.0 if i == 1 else 0.3), -100, y)
        data.append((torch.randn(n, 4, dtype=torch.float64), y))
    return data


class Sequences(Net):
    """Predicts five classifications for each example."""

    def __init__(self) -> None:
        super().__init__(15)

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X).unflatten(1, (3, 5))


def binary(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches with three binary labels."""
    return [(X, (y > 0).double()) for X, y in regression(*sizes)]


w = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
CASES = {
    "MSE": (Net, MSE, {}, regression),
    "CE": (Net, nn.CrossEntropyLoss, {}, classification),
    "CE-weight": (Net, nn.CrossEntropyLoss, {"weight": w, "label_smoothing": 0.1}, classification),
    "CE-sequences": (Sequences, nn.CrossEntropyLoss, {"weight": w}, classification),
    "BCE": (Net, nn.BCEWithLogitsLoss, {"weight": w, "pos_weight": w}, binary),
    "L1": (Net, nn.L1Loss, {}, regression),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_on_all_data(case: str, reduction: str) -> None:
    """Loss and gradient are those of PyTorch's loss on one batch with all data."""
    make_net, make_loss, options, make_data = CASES[case]
    net, loss = make_net(), make_loss(**options, reduction=reduction)
    shape = {"shape": (5,)} if case == "CE-sequences" else {}
    data = make_data(4, 2, 7, 1, **shape)  # type: ignore[operator]
    risk = make(data, net, loss)
    L, gradient = risk.loss_and_gradient()

    X, y = (torch.cat(ts) for ts in zip(*data, strict=True))
    expected = loss(net(X), y)
    torch.testing.assert_close(L, expected.detach())
    for g, e in zip(gradient, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(g, e)
    assert not any(t.requires_grad for t in (L, *gradient))
    assert all(p.grad is None for p in net.parameters())
    assert risk.reduction == reduction

    one_batch = make([(X, y)], net, loss)
    torch.testing.assert_close(one_batch.loss_and_gradient(), (L, gradient))


def test_no_loss_terms() -> None:
    """If all terms are ignored, the mean is NaN as in PyTorch, and no exception."""
    data = [(torch.randn(3, 4, dtype=torch.float64), torch.full((3,), -100))]
    L, gradient = make(data, loss=nn.CrossEntropyLoss()).loss_and_gradient()
    assert L.isnan()
    assert all(g.isnan().all() for g in gradient)
    L, gradient = make(data, loss=nn.CrossEntropyLoss(reduction="sum")).loss_and_gradient()
    assert L == 0
    assert not any(g.any() for g in gradient)


def test_evaluates_at_params() -> None:
    """The loss belongs to the values in ``params``, for a subset of the module's parameters."""
    net, data = Net(), regression(3, 4)
    params = {"net.2.bias": torch.ones(3, dtype=torch.float64)}
    L, gradient = EmpiricalRisk(net, MSE(), params, data).loss_and_gradient()
    other = copy.deepcopy(net)
    other.net[2].bias.data.fill_(1)
    X, y = (torch.cat(ts) for ts in zip(*data, strict=True))
    expected = functional.mse_loss(other(X), y)
    torch.testing.assert_close(L, expected.detach())
    torch.testing.assert_close(gradient, list(torch.autograd.grad(expected, [other.net[2].bias])))


def test_function() -> None:
    """A function instead of a module, and a parameter it does not use."""
    params = {"w": torch.randn(4, 3), "unused": torch.randn(2)}
    data = regression(3, 4, dtype=torch.float32)
    risk = EmpiricalRisk(lambda p, X: X @ p["w"], MSE(), params, data)
    assert risk.model is None
    L, (g, unused) = risk.loss_and_gradient()
    X, y = (torch.cat(ts) for ts in zip(*data, strict=True))
    torch.testing.assert_close(L, functional.mse_loss(X @ params["w"], y))
    torch.testing.assert_close(g, 2 / y.numel() * X.T @ (X @ params["w"] - y))
    assert torch.equal(unused, torch.zeros(2))


def test_sum_over_data() -> None:
    """Sums of what the function returns for each batch, times c."""
    data = regression(3, 5)
    X = torch.cat([X for X, _ in data])
    for reduction, c in [("sum", 1), ("mean", 1 / 8)]:
        risk = make(data, loss=MSE(reduction=reduction))
        N, total = risk.sum_over_data(count)
        torch.testing.assert_close(N, torch.tensor(8.0 * c))
        torch.testing.assert_close(total, c * X.sum(0))
        scale = risk.for_each_batch(lambda batch: batch.n)
        assert float(scale) == c
        N, total = risk.sum_over_data(count, scaled=False)
        assert N == 8
        torch.testing.assert_close(total, X.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    """Adding many batches in half precision would stagnate, or overflow before the scale."""
    data = regression(*[1] * 600, dtype=dtype)
    risk = make(data, Net(dtype=dtype), check_deterministic=False)
    (result,) = risk.sum_over_data(lambda batch: ([torch.full((2,), 200.0, dtype=dtype)], 1))
    assert result.dtype == dtype
    assert torch.equal(result, torch.full((2,), 200.0, dtype=dtype))


# Passes over the data


@pytest.mark.parametrize(
    ("kwargs", "passes"),
    [
        ({}, 2),
        ({"num_data": 7}, 2),
        ({"needs_fixed_order": True}, 2),
        ({"check_deterministic": False}, 1),
        ({"check_deterministic": False, "num_data": 7}, 0),
    ],
)
def test_number_of_passes(kwargs: dict[str, Any], passes: int) -> None:
    """At construction as few as needed, then one per sum; the model is evaluated once per batch."""
    data, net = Counting(regression(4, 2, 1)), Net()
    risk = make(data, net, **kwargs)
    assert data.passes == passes
    assert net.calls == (6 if passes == 2 else 0)
    assert risk.num_data == 7
    assert risk.num_terms == (7 if passes == 2 else None)

    net.calls = 0
    risk.loss_and_gradient()
    assert data.passes == passes + 1
    assert net.calls == 3
    risk.loss_and_gradient()
    assert data.passes == passes + 2
    assert net.calls == 6


def test_number_of_terms() -> None:
    """Loss terms are not examples, and count although they are ignored."""
    data = classification(4, 2, shape=(5,))
    assert make(data, Sequences(), nn.CrossEntropyLoss()).num_terms == 30
    assert make(regression(4, 2), loss=nn.L1Loss()).num_terms is None  # terms are not known


@pytest.mark.parametrize("num_data", [6, 8])
def test_wrong_num_data(num_data: int) -> None:
    """It is found at the first pass."""
    data = regression(4, 3)
    message = f"had 7 examples, but num_data is {num_data}"
    with pytest.raises(ValueError, match=message):
        make(data, num_data=num_data)
    risk = make(data, num_data=num_data, check_deterministic=False)
    assert risk.num_data == num_data
    with pytest.raises(ValueError, match=message):
        risk.sum_over_data(count)


@pytest.mark.parametrize("num_data", [0, -1])
def test_num_data_must_be_positive(num_data: int) -> None:
    """Anything else is an error at once."""
    with pytest.raises(ValueError, match=f"num_data must be positive, got {num_data}"):
        make(regression(2), num_data=num_data, check_deterministic=False)


def test_data_that_grow() -> None:
    """A sum over other data than before is an error."""
    data = regression(4, 3)
    risk = make(data)
    data.append(data[0])
    with pytest.raises(ValueError, match="had 11 examples, but num_data is 7"):
        risk.sum_over_data(count)


@pytest.mark.parametrize("check_deterministic", [True, False])
@pytest.mark.parametrize("num_data", [None, 3])
def test_empty_data(check_deterministic: bool, num_data: int | None) -> None:
    """An error at construction if the length or a pass can tell, else at the first pass."""
    kwargs = {"check_deterministic": check_deterministic, "num_data": num_data}
    with pytest.raises(ValueError, match="data is empty"):
        make([], **kwargs)
    with pytest.raises(ValueError, match="data is empty"):
        make(Counting([]), **kwargs).sum_over_data(count)


def test_one_shot_data() -> None:
    """Refused before anything is evaluated."""
    net = Net()
    with pytest.raises(ValueError, match="can be iterated only once"):
        make(iter(regression(3)), net)
    assert net.calls == 0


def test_wrong_loss() -> None:
    """Refused before any pass."""
    data = Counting(regression(3))
    with pytest.raises(ValueError, match="'none'"):
        make(data, loss=MSE(reduction="none"))
    assert data.passes == 0


def test_without_loss() -> None:
    """Jacobians have no loss: c = 1, and no value."""
    risk = EmpiricalRisk(net := Net(), None, dict(net.named_parameters()), regression(3, 4))
    assert risk.loss is None
    assert risk.reduction == "sum"
    assert [batch.n for batch in risk.batches("Batches")] == [3, 4]
    assert risk.sum_over_data(count)[0] == 7
    with pytest.raises(ValueError, match="no loss function"):
        risk.loss_and_gradient()


# Mappings


class Tagger(Net):
    """Takes a mapping, and takes things out of it."""

    def forward(self, X: Any) -> Tensor:
        return super().forward(X.pop("x")) * X["scale"]


@pytest.mark.parametrize("mapping", [dict, UserDict])
@pytest.mark.parametrize("check_deterministic", [True, False])
def test_mappings(mapping: type, check_deterministic: bool) -> None:
    """They need ``batch_size_fn``; the model may change what it gets."""
    pairs, scale = regression(3, 4), torch.tensor(2.0, dtype=torch.float64)
    data = [(mapping({"x": X, "scale": scale}), y) for X, y in pairs]
    net = Tagger()
    kwargs: dict[str, Any] = {"check_deterministic": check_deterministic}
    with pytest.raises(ValueError, match="Pass batch_size_fn"):
        make(data, net, **kwargs)
    unknown = make(data, net, check_deterministic=False, num_data=7)
    with pytest.raises(ValueError, match="Pass batch_size_fn"):
        unknown.loss_and_gradient()

    seen = []
    kwargs["batch_size_fn"] = lambda X: (seen.append(type(X)), len(X["x"]))[1]
    risk = make(data, net, **kwargs)
    L, _ = risk.loss_and_gradient()
    X, y = (torch.cat(ts) for ts in zip(*pairs, strict=True))
    torch.testing.assert_close(L, functional.mse_loss(2 * net.net(X), y).detach())
    assert set(seen) == {mapping}
    for batch in risk.batches("Batches"):
        twice = [risk.predict(risk.params, batch.X) for _ in range(2)]
        assert torch.equal(*twice)
    assert all("x" in X for X, _ in data)


# Side effects


def states() -> list[Any]:
    """The states of all global generators."""
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]


class Drawing(Dataset[Any]):
    """Draws from the generators of torch, NumPy and Python, without an effect."""

    def __init__(self) -> None:
        self.X, self.y = regression(7)[0]

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        torch.rand(()), np.random.rand(), random.random()
        return self.X[i], self.y[i]


@pytest.mark.parametrize(
    "kwargs", [{}, {"check_deterministic": False}, {"check_deterministic": False, "num_data": 7}]
)
def test_generators_are_unchanged(kwargs: dict[str, Any]) -> None:
    """A shuffling DataLoader draws when it is iterated; nobody sees that."""
    net, data = Net(), DataLoader(Drawing(), 3, shuffle=True)
    before = states()
    risk = make(data, net, **kwargs)
    assert states() == before
    risk.loss_and_gradient()
    assert states() == before

    def fail(batch: Batch) -> float:
        random.random()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        risk.for_each_batch(fail)
    assert states() == before


def test_generators_are_unchanged_if_construction_fails() -> None:
    """Also if an exception comes from the model or the check."""
    X, y = regression(7)[0]
    params = {"w": torch.randn(4, 3, dtype=torch.float64)}

    def fail(p: dict[str, Tensor], X: Tensor) -> Tensor:
        torch.rand(()), np.random.rand(), random.random()
        raise ZeroDivisionError

    before = states()
    data = DataLoader(TensorDataset(X, y), 3, shuffle=True)
    for model, error in [
        (fail, ZeroDivisionError),
        (lambda p, X: functional.dropout(X) @ p["w"], RuntimeError),
    ]:
        with pytest.raises(error):
            EmpiricalRisk(model, MSE(), params, data)
        assert states() == before


@pytest.mark.parametrize("check_deterministic", [True, False])
def test_generators_are_unchanged_with_a_list(check_deterministic: bool) -> None:
    """NumPy's and Python's states are saved unless the check found them unused; torch's always."""
    risk = make(regression(3, 4), check_deterministic=check_deterministic)
    before = states()

    def draw(batch: Batch) -> tuple[list[Tensor], float]:
        torch.rand(())
        if not check_deterministic:
            np.random.rand(), random.random()
        return [], 1

    risk.sum_over_data(draw)
    assert states() == before


def test_shuffled_data() -> None:
    """Sums do not depend on the order."""
    X, y = regression(20)[0]
    net = Net()
    shuffled = make(DataLoader(TensorDataset(X, y), 6, shuffle=True), net)
    torch.testing.assert_close(
        shuffled.loss_and_gradient(), make([(X, y)], net).loss_and_gradient()
    )


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_module_is_left_as_found(error: type[BaseException]) -> None:
    """BatchNorm in training mode, in all passes, also if one ends early."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    data = regression(3, 4)
    with pytest.raises(RuntimeError, match="BatchNorm in training mode"):
        make(data, net)
    risk = make(data, net, check_deterministic=False)
    risk.loss_and_gradient()

    def fail(batch: Batch) -> float:
        risk.predict(risk.params, batch.X)
        raise error

    with pytest.raises(error):
        risk.for_each_batch(fail)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in parameters[1:])
    assert net.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context: Callable[[], Any]) -> None:
    """Construction and products work, and results are detached but usable."""
    net, data = Net(), regression(3, 4)
    expected = make(data, net).loss_and_gradient()

    def sums(batch: Batch) -> tuple[list[Tensor], float]:
        assert torch.is_grad_enabled()
        f = risk.predict(risk.params, batch.X)
        assert f.requires_grad
        return [f.sum()], 1

    with context():
        risk = make([(X.clone(), y.clone()) for X, y in data], net)  # inference tensors
        torch.testing.assert_close(risk.loss_and_gradient(), expected)
        (total,) = risk.sum_over_data(sums)
    assert not total.requires_grad
    assert not total.is_inference()
    (total,) = risk.sum_over_data(sums)  # with gradients enabled, the graph is wanted
    assert total.requires_grad


def test_graphs_are_freed() -> None:
    """A sum without gradients keeps no batch's graph until the end."""
    risk = make(regression(3, 4, 2))
    intermediate: list[weakref.ref[Tensor]] = []

    def fn(batch: Batch) -> tuple[list[Tensor], float]:
        assert not any(ref() is not None for ref in intermediate)
        f = risk.predict(risk.params, batch.X)
        intermediate.append(weakref.ref(f))
        return [f.square().sum()], 1  # its graph holds f

    with torch.no_grad():
        risk.sum_over_data(fn)
    assert len(intermediate) == 3


def test_deepcopy() -> None:
    """A copy is independent of the original."""
    net = Net()
    risk = make(regression(3, 4), net)
    before = risk.loss_and_gradient()
    copied = copy.deepcopy(risk)
    net.net[0].weight.data.zero_()
    torch.testing.assert_close(copied.loss_and_gradient(), before)


# Model


def test_attributes() -> None:
    """What operators ask the risk for."""
    net = Net(dtype=torch.float32)
    risk = make(regression(3, dtype=torch.float32), net)
    assert risk.model is net
    assert risk.params == dict(net.named_parameters())
    assert (risk.device, risk.dtype) == (torch.device("cpu"), torch.float32)
    assert type(risk.loss) is type(loss_entry(MSE())[0])


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("check_deterministic", [True, False])
def test_forward_mode_ok(padding_idx: int | None, check_deterministic: bool) -> None:
    """The check looks at the model; without it, the first product does."""
    params = {"w": torch.randn(6, 3)}
    data = [(torch.tensor([0, 2, 5]), torch.randn(3, 3))]
    risk = EmpiricalRisk(
        lambda p, X: functional.embedding(X, p["w"], padding_idx),
        MSE(),
        params,
        data,
        check_deterministic=check_deterministic,
    )
    assert risk.forward_mode_ok is (padding_idx is None or not check_deterministic)
    assert risk.likely_traits.padding_idx is (padding_idx is not None and check_deterministic)
    risk.loss_and_gradient()
    assert risk.forward_mode_ok is (padding_idx is None)
    assert risk.likely_traits.padding_idx is (padding_idx is not None)


def test_forward_mode_ok_after_a_prediction_for_derivatives() -> None:
    """Such a prediction is a look, too; others are none."""
    params, X = {"w": torch.randn(6, 3)}, torch.tensor([0, 2, 5])
    risk = EmpiricalRisk(
        lambda p, X: functional.embedding(X, p["w"], 0),
        MSE(),
        params,
        [(X, torch.randn(3, 3))],
        check_deterministic=False,
    )
    prediction = risk.predict(params, X)
    assert torch.equal(prediction, risk.evaluate(X))
    assert risk.forward_mode_ok
    assert torch.equal(prediction, risk.predict(params, X, any_derivative=True))
    assert not risk.forward_mode_ok


def test_evaluate() -> None:
    """The prediction at the parameters given, without a graph."""
    net = Net()
    risk = make(regression(3), net)
    X = risk._source.data[0][0]
    result = risk.evaluate(X)
    assert torch.equal(result, net(X))
    assert not result.requires_grad


def test_what_a_check_tells() -> None:
    """The shapes of predictions, and how many loss terms each batch has."""
    data = classification(4, 2, shape=(5,))
    risk = make(data, Sequences(), nn.CrossEntropyLoss())
    assert risk.prediction_shapes == [(4, 3, 5), (2, 3, 5)]
    assert risk.batch_terms == [20, 10]
    risk = make(data, Sequences(), nn.CrossEntropyLoss(), check_deterministic=False)
    assert risk.prediction_shapes is None
    assert risk.batch_terms is None


def test_dependencies() -> None:
    """Those of the model, and those of the loss: its buffers, and parameters if it has some."""
    net = Net()
    loss = nn.CrossEntropyLoss(weight=w.clone())
    found = make(classification(3, 2), net, loss).dependencies()
    pointers = {x.data_ptr() for x in found if isinstance(x, Tensor)}
    assert pointers == {t.data_ptr() for t in [*net.parameters(), loss.weight]}
    flags = [x for x in found if not isinstance(x, Tensor)]
    assert flags.count(True) == len(list(net.modules())) + 1
    with torch.autocast("cpu", torch.bfloat16):
        assert make(classification(3, 2), net, loss).dependencies()[-1] != found[-1]
    function = make(regression(3), net, functional.mse_loss).dependencies()
    assert {id(x) for x in function if isinstance(x, Tensor)} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("check_deterministic", [True, False])
def test_refused_embedding(check_deterministic: bool) -> None:
    """At the first prediction, whenever that is."""
    params = {"w": torch.randn(6, 3)}
    data = [(torch.tensor([0, 2, 5]), torch.randn(3, 3))]

    def run() -> None:
        EmpiricalRisk(
            lambda p, X: functional.embedding(X, p["w"], max_norm=1.0),
            MSE(),
            params,
            data,
            check_deterministic=check_deterministic,
        ).loss_and_gradient()

    with pytest.raises(NotImplementedError, match="max_norm"):
        run()


def test_prediction_must_be_a_tensor() -> None:
    """The error comes with the first prediction."""
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        make([(torch.randn(3, 2, 4), torch.randn(3))], nn.LSTM(4, 3))


# Progress bars


class Bar:
    """Stands in for tqdm."""

    made: list[Bar]

    def __init__(self, data: Any, desc: str, total: int | None) -> None:
        self.data, self.desc, self.total, self.seen = data, desc, total, 0
        Bar.made.append(self)

    def __iter__(self) -> Iterator[Any]:
        for element in self.data:
            yield element
            self.seen += 1


@pytest.mark.parametrize("stream", [False, True])
def test_progress_bars(
    stream: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One bar for each pass, with the number of batches if it is known; none unless wanted."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return zip(*regression(7)[0], strict=True)

    torch.manual_seed(0)
    X, y = regression(7)[0]
    fixed = TensorDataset(X, y)

    class FixedStream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(fixed[i] for i in range(7))

    data = DataLoader(FixedStream() if stream else fixed, 3)
    monkeypatch.setattr(empirical_risk, "tqdm", Bar)
    Bar.made = []
    make(data).loss_and_gradient()
    assert not Bar.made

    risk = make(data, progressbar=True)
    risk.loss_and_gradient()
    make(data, progressbar=True, check_deterministic=False)
    assert [bar.desc for bar in Bar.made] == [
        "Determinism check (1/2)",
        "Determinism check (2/2)",
        "Loss and gradient",
        "Counting data",
    ]
    assert [bar.seen for bar in Bar.made] == [3] * 4
    assert [bar.total for bar in Bar.made] == [None if stream else 3] * 4
    assert capfd.readouterr() == ("", "")


def test_real_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    """It is written to standard error, complete."""
    make(regression(3, 4), progressbar=True, check_deterministic=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Counting data: 100%" in err
    assert "2/2" in err


# Several ranks


class Threads(Collective):
    """Ranks that are threads of one process."""

    alone = False

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(shared)
        self.shared, self.barrier = shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        return values

    def exchange(self, values: list[int]) -> list[list[int]]:
        return self.gather(values)

    def all_reduce(self, buffer: Tensor) -> Tensor:
        return torch.stack(self.gather(buffer)).sum(0)


def on_ranks(run: Callable[[int, Collective], Any], size: int) -> list[Any]:
    """Run a function on several ranks; exceptions are results."""
    shared: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=30)

    def target(rank: int) -> None:
        try:
            results[rank] = run(rank, Threads(rank, shared, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "kwargs", [{}, {"check_deterministic": False}, {"check_deterministic": False, "num_data": 7}]
)
def test_ranks(kwargs: dict[str, Any]) -> None:
    """Ranks that hold parts of the data, one of them none, agree with a process that holds all."""
    net, data = Net(), classification(4, 2, 1, shape=())
    loss = nn.CrossEntropyLoss(weight=w)
    parts = [data[:1], [], data[1:]]
    expected = make(data, net, loss).loss_and_gradient()

    def run(rank: int, collective: Collective) -> Any:
        own = copy.deepcopy(net)  # functional_call swaps the parameters of a shared module
        risk = make(parts[rank], own, loss, collective=collective, **kwargs)
        return risk.loss_and_gradient(), risk.num_data, risk.term_counter().advance(1)

    results = on_ranks(run, 3)
    for L_and_gradient, num_data, _ in results:
        torch.testing.assert_close(L_and_gradient, expected)
        assert num_data == 7
    assert [first_term for *_, first_term in results] == [0, 4, 4]


def test_empty_on_all_ranks() -> None:
    """Then it is an error on each of them."""
    errors = on_ranks(lambda rank, collective: make([], collective=collective), 2)
    assert ["data is empty" in str(error) for error in errors] == [True, True]


def test_failed_check_on_one_rank() -> None:
    """All ranks stop, so that none waits for another."""
    params = {"w": torch.randn(4, 3, dtype=torch.float64)}

    def run(rank: int, collective: Collective) -> Any:
        def predict(p: dict[str, Tensor], X: Tensor) -> Tensor:
            return (functional.dropout(X) if rank == 1 else X) @ p["w"]

        return EmpiricalRisk(predict, MSE(), params, regression(5), collective=collective)

    errors = on_ranks(run, 2)
    assert [type(error) for error in errors] == [RuntimeError] * 2
    assert "Rank(s) 1 failed" in str(errors[0])
    assert "prediction" in str(errors[1])


def test_term_counter() -> None:
    """On one rank it starts at zero, whether the terms were counted or not."""
    for check_deterministic in (True, False):
        counter = make(regression(3), check_deterministic=check_deterministic).term_counter()
        assert [counter.advance(3), counter.advance(2)] == [0, 3]


# torch.compile


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    """Leave no compiled code behind."""
    yield
    torch._dynamo.reset()


def make_product(risk: EmpiricalRisk) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Something that is computed like an operator's product: gradients times a vector."""

    def product(v: dict[str, Tensor]) -> list[Tensor]:
        def fn(batch: Batch) -> tuple[list[Tensor], Tensor | float]:
            assert risk.loss is not None
            f, vjp = torch.func.vjp(lambda p: risk.predict(p, batch.X), risk.params)
            F, targets = risk.loss.terms(f, batch.y)
            (gradient,) = vjp(risk.loss.grad(F, targets))
            summands = [v[name] * g for name, g in gradient.items()]
            return summands, risk.loss.normalizer(F, targets, batch.n)

        return risk.sum_over_data(fn)

    return product


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself, at import
def test_compile() -> None:
    """A product is one graph, also for an unchecked model: nothing is inspected or copied."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    loss = nn.CrossEntropyLoss(weight=w)
    risk = make(classification(4, 2), net, loss, check_deterministic=False, num_data=6)
    product, v = make_product(risk), {name: torch.randn_like(p) for name, p in risk.params.items()}
    compiled = torch.compile(product, backend="eager", fullgraph=True)(v)
    torch.testing.assert_close(compiled, product(v))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_anywhere(reduction: str) -> None:
    """Without a break, inside of inference mode, for checked models and a subset of parameters."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = regression(4, 2, 1)
    params = {"0.weight": torch.randn(5, 4, dtype=torch.float64)}
    risk = EmpiricalRisk(net, MSE(reduction=reduction), params, data, progressbar=True)
    product, v = make_product(risk), {"0.weight": torch.randn(5, 4, dtype=torch.float64)}
    assert torch._dynamo.explain(product)(v).graph_break_count == 0
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(product, backend="eager", fullgraph=True)(v)
    torch.testing.assert_close(compiled, product(v))
