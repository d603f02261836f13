"""The check for determinism: every cause is found and named, and nothing else is reported."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvlinops.risk import EmpiricalRisk, determinism
from curvlinops.risk.determinism import preserved_rng, refuse_random_layers

CE = nn.CrossEntropyLoss


LATER = [False]


@pytest.fixture(params=["at once", "later"], autouse=True)
def later(request: pytest.FixtureRequest) -> None:
    """Whether the second pass of the check is one that is made for another reason."""
    LATER[0] = request.param == "later"


def check(
    net: Any, data: Any, loss: Any = None, params: dict[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """Run the check."""
    params = dict(net.named_parameters()) if params is None else params
    (later,) = LATER
    risk = EmpiricalRisk(
        net, CE() if loss is None else loss, params, data, confirm_later=later, **kwargs
    )
    if later:
        confirm(risk)


def confirm(risk: EmpiricalRisk, batches: int = 10**6) -> None:
    """Pass over the data, and hand over the predictions of some batches."""
    count = iter(range(batches))

    def visit(batch: Any) -> float:
        prediction = risk.evaluate(batch.X)
        if next(count, None) is not None:
            risk.confirm(batch, prediction)
        return float(batch.n)

    risk.for_each_batch(visit)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small classifier."""
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def examples(N: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    return torch.randn(N, 4, dtype=dtype), torch.randint(0, 3, (N,))


def loader(X: Tensor, y: Tensor, batch_size: int = 6, **kwargs: Any) -> DataLoader[Any]:
    """A DataLoader, shuffled unless told otherwise; the last batch is smaller."""
    return DataLoader(TensorDataset(X, y), batch_size, **{"shuffle": True, **kwargs})


class Calls:
    """Iterable that calls a function for each pass."""

    def __init__(self, function: Callable[[int], list[Any]]) -> None:
        self.function = function
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.function(self.passes - 1))


# Random generators


def generator_states() -> list[Any]:
    """The states of the global generators."""
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]


def draw() -> tuple[float, float, float]:
    """Draw from all global generators."""
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_preserved_rng(error: type[BaseException] | None) -> None:
    """All states are restored, also after an exception; inside, the generators go on."""
    before = generator_states()

    def run() -> None:
        with preserved_rng():
            assert draw() != draw()
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert generator_states() == before

    with preserved_rng(torch_only=True):
        draw()
    after = generator_states()
    assert after[0] == before[0]
    assert after[2:] != before[2:]


# Layers


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4), r"BatchNorm in training mode: 1\.0 \(BatchNorm1d\).*model\.eval"),
        (nn.SyncBatchNorm(4), r"BatchNorm in training mode: 1\.0 \(SyncBatchNorm\)"),
        (nn.Dropout(0.1), r"Dropout in training mode: 1\.0 \(Dropout\).*model\.eval"),
        (nn.AlphaDropout(0.1), r"Dropout in training mode: 1\.0 \(AlphaDropout\)"),
        (nn.Dropout2d(0.1), r"Dropout in training mode: 1\.0 \(Dropout2d\)"),
        (nn.MultiheadAttention(4, 2, 0.1), r"mode: 1\.0 \(MultiheadAttention\)"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), r"mode: 1\.0 \(LSTM\)"),
        (nn.RReLU(), r"mode: 1\.0 \(RReLU\)"),
    ],
)
def test_layers_in_training_mode(layer: nn.Module, message: str) -> None:
    """They are refused by name in training mode and pass in evaluation mode."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)).train()
    with pytest.raises(RuntimeError, match=message):
        refuse_random_layers(net)
    refuse_random_layers(net.eval())


def test_all_layers_are_named() -> None:
    """The message lists each of them, and the model itself if it is one."""
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout1d())
    with pytest.raises(RuntimeError, match=r"0 \(Dropout\), 2 \(Dropout1d\)"):
        refuse_random_layers(net)
    with pytest.raises(RuntimeError, match=r"the model \(Dropout\)"):
        refuse_random_layers(nn.Dropout())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.0),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(4, 4, num_layers=2),
        nn.RReLU(0.1, 0.1),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.LayerNorm(4),
    ],
)
def test_harmless_layers_in_training_mode(layer: nn.Module) -> None:
    """Training mode alone is no reason."""
    refuse_random_layers(nn.Sequential(layer))


def test_one_layer_lstm_without_dropout() -> None:
    """There is no dropout after the last layer; torch warns about the argument."""
    with pytest.warns(UserWarning, match="dropout"):
        layer = nn.LSTM(4, 4, dropout=0.1)
    refuse_random_layers(layer)


def test_batch_norm_without_statistics() -> None:
    """``eval`` does not help, so the message does not say so."""
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(RuntimeError, match=r"without running statistics: 0 .*also after model\.ev"):
        refuse_random_layers(net)


def test_layers_are_checked_although_predictions_hide_them() -> None:
    """With a last layer of zeros, predictions do not change, but derivatives do."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3))
    nn.init.zeros_(net[2].weight)
    with pytest.raises(RuntimeError, match=r"Dropout in training mode: 1 \(Dropout\)"):
        check(net, [examples()])
    check(net, [examples()], check_deterministic=False)
    check(net.eval(), [examples()])


# Random models


class Dropping(nn.Module):
    """Drops features of one example out of all (a special one) or of all of them."""

    def __init__(self, marked: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = network(dtype)
        self.marked = marked

    def forward(self, X: Tensor) -> Tensor:
        h = self.net[1](self.net[0](X))
        dropped = functional.dropout(h, 0.5)
        if self.marked is not None:
            dropped = torch.where(X[:, :1] == self.marked, dropped, h)
        return self.net[2](dropped)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_functional_dropout(shuffle: bool, dtype: torch.dtype) -> None:
    """What no module shows is found by comparing predictions; the draws give the cause away."""
    data = loader(*examples(1000, dtype), 32, shuffle=shuffle)
    with pytest.raises(RuntimeError, match=r"prediction .*draws from torch's global.*model\.eval"):
        check(Dropping(dtype=dtype), data)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_random_example_of_a_thousand(shuffle: bool, dtype: torch.dtype) -> None:
    """A single example is visible."""
    X, y = examples(1000, dtype)
    data = loader(X, y, 32, shuffle=shuffle)
    with pytest.raises(RuntimeError, match=r"The prediction .*differ.* between two passes"):
        check(Dropping(X[567, 0].item(), dtype), data)


@pytest.mark.parametrize("draw_one", [np.random.rand, random.random])
def test_random_model_of_other_libraries(draw_one: Callable[[], float]) -> None:
    """Any generator will do, though the cause is not known then."""
    params, data = {"w": torch.randn(4, 3)}, [examples()]
    before = generator_states()
    with pytest.raises(RuntimeError, match=r"is not deterministic\. Remove what .*\(check_det"):
        check(lambda p, X: X @ p["w"] + draw_one(), data, params=params)
    assert generator_states() == before


def test_model_that_changes_its_input() -> None:
    """The tensors in a list are not compared, but what they lead to is."""
    params = {"w": torch.randn(4, 3)}
    with pytest.raises(RuntimeError, match="prediction"):
        check(lambda p, X: X.mul_(1.5) @ p["w"], [examples()], params=params)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_recorded(loaded: bool) -> None:
    """Of data in a list, nothing; of others, all tensors."""
    X, y = examples()
    data = loader(X, y, shuffle=False) if loaded else [(X, y)]
    net = network()
    risk = EmpiricalRisk(net, CE(), dict(net.named_parameters()), data, confirm_later=True)
    assert risk._unconfirmed is not None
    assert risk._unconfirmed.statistics.keys() == {"prediction", *(["X", "y"] if loaded else [])}


def test_confirmation_by_a_complete_pass() -> None:
    """One that does not hand over all predictions leaves the check open; another one ends it."""
    shift = [0.0]

    def model(p: dict[str, Tensor], X: Tensor) -> Tensor:
        return X @ p["w"] + shift[0]

    data = [examples(), examples(3)]
    before = generator_states()
    for complete in (False, True):
        shift[0] = 0.0
        risk = EmpiricalRisk(model, CE(), {"w": torch.randn(4, 3)}, data, confirm_later=True)
        confirm(risk, 2 if complete else 1)
        shift[0] = 1.0
        if complete:  # later passes are nobody's business
            confirm(risk)
            continue
        with pytest.raises(RuntimeError, match=r"prediction.* between two passes"):
            confirm(risk)
    assert generator_states()[1:] == before[1:]


def test_random_predictions_with_constant_sum() -> None:
    """Probabilities always sum to one, so weights must tell the classes apart."""
    params = {"w": torch.randn(4, 3)}
    data = [(examples(30)[0], torch.full((30, 3), 1 / 3))]
    for shuffled in (False, True):
        passes = Calls(lambda k: [tuple(t[torch.randperm(30)] for t in data[0])])
        with pytest.raises(RuntimeError, match="prediction"):
            check(
                lambda p, X: functional.dropout(X @ p["w"]).softmax(-1),
                passes if shuffled else data,
                loss=nn.L1Loss(),
                params=params,
            )


def test_random_order_of_predictions() -> None:
    """The same predictions in another order; the data come in a fixed order."""
    params = {"w": torch.randn(4, 3)}
    data = [(examples(30)[0], torch.zeros(30, 3))]
    with pytest.raises(RuntimeError, match="The prediction differs"):
        check(lambda p, X: X[torch.randperm(30)] @ p["w"], data, loss=nn.MSELoss(), params=params)


def test_changes_that_cancel() -> None:
    """In the same order, batches are compared one by one."""
    signs = iter([1, -1, -1, 1])
    data = [(X, None) for X, _ in (examples(5), examples(5))]
    params = {"w": torch.randn(4, 3)}
    with pytest.raises(RuntimeError, match="The prediction differs"):
        EmpiricalRisk(lambda p, X: X @ p["w"] + next(signs), None, params, data)


def test_random_loss() -> None:
    """The loss is compared, too."""

    class Noisy(nn.MSELoss):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return super().forward(f, y) * (1 + 0.1 * torch.rand(()))

    X, _ = examples()
    with pytest.raises(RuntimeError, match="The loss differs between two passes"):
        check(network(), [(X, torch.ones(20, 3))], loss=Noisy())


def test_without_loss() -> None:
    """Jacobians have no loss; predictions are compared."""
    params = {"w": torch.randn(4, 3)}
    data = [(X, None) for X, _ in (examples(), examples(7))]
    EmpiricalRisk(lambda p, X: X @ p["w"], None, params, data)
    with pytest.raises(RuntimeError, match="The prediction differs"):
        EmpiricalRisk(lambda p, X: functional.dropout(X) @ p["w"], None, params, data)


@pytest.mark.parametrize("shape", [(), (6,), (6, 0), (6, 2, 0)])
def test_shapes_of_predictions(shape: tuple[int, ...]) -> None:
    """Without a loss, predictions can have any shape."""
    params = {"w": torch.ones(())}
    EmpiricalRisk(lambda p, X: p["w"].expand(shape), None, params, [(torch.zeros(6), None)])


def test_coupled_examples() -> None:
    """Predictions that depend on the rest of the batch are constant only in a fixed order."""
    params = {"w": torch.randn(4, 3)}
    X, y = examples()

    def normalised(p: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional.batch_norm(X, None, None, training=True) @ p["w"]

    check(normalised, loader(X, y, shuffle=False), params=params)
    with pytest.raises(RuntimeError, match=r"which examples share a batch \(then use shuffle=F"):
        check(normalised, loader(X, y), params=params)


# Changing data


def test_number_of_examples() -> None:
    """The numbers are given; no second pass is a cause of its own."""
    X, y = examples()
    more = Calls(lambda k: [(X[: 10 + k], y[: 10 + k])])
    with pytest.raises(RuntimeError, match=r"number of examples differs .*: 10 and 11\. Each pass"):
        check(network(), more)
    with pytest.raises(RuntimeError, match=r"20 and 0\. The data can be iterated only once"):
        check(network(), Calls(lambda k: [(X, y)][k:]))


class Augmented(Dataset[Any]):
    """Inputs or targets get another value each time."""

    def __init__(self, which: str, N: int = 20) -> None:
        self.X, self.y = examples(N)
        self.which = which

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = 1e-3 * torch.rand(()) if i == 3 and self.which == "X" else 0
        y = torch.randint(0, 3, ()) if self.which == "y" else self.y[i]
        return self.X[i] + noise, y


@pytest.mark.parametrize("which", ["X", "y"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("needs_fixed_order", [False, True])
def test_augmentation(which: str, shuffle: bool, needs_fixed_order: bool) -> None:
    """It is named, also for a model whose predictions do not show it, and before the order."""
    net = network()
    nn.init.zeros_(net[2].weight)
    data = DataLoader(Augmented(which), 6, shuffle=shuffle)
    message = rf"The data differ between two passes \({which}\).*random augmentation"
    with pytest.raises(RuntimeError, match=message):
        check(net, data, needs_fixed_order=needs_fixed_order)


def test_augmented_token_ids() -> None:
    """Integers in a mapping are named if results differ as well."""
    params = {"w": torch.randn(10, 3)}
    y = torch.zeros(6, dtype=torch.long)
    data = Calls(lambda k: [({"ids": torch.arange(6) + k}, y)])
    with pytest.raises(RuntimeError, match=r"prediction and the loss differ .*X\['ids'\]\).*augme"):
        check(lambda p, X: p["w"][X["ids"]], data, params=params, batch_size_fn=lambda X: 6)


def test_drop_last() -> None:
    """With shuffling, it leaves out other examples each time; without, the same ones."""
    X, y = examples()
    with pytest.raises(RuntimeError, match=r"data differ .*drop_last=True.*Use drop_last=False"):
        check(network(), loader(X, y, drop_last=True))
    check(network(), loader(X, y, drop_last=True, shuffle=False))
    check(network(), loader(X[:18], y[:18], drop_last=True))


def test_sampler_with_replacement() -> None:
    """It draws other examples each time."""
    X, y = examples()
    sampler = torch.utils.data.RandomSampler(range(20), replacement=True)
    data = DataLoader(TensorDataset(X, y), 6, sampler=sampler)
    with pytest.raises(RuntimeError, match=r"The data differ.*draws with replacement"):
        check(network(), data)


def test_other_pairs() -> None:
    """Inputs and targets are each the same, but paired differently."""
    X, y = examples(1000)
    data = Calls(lambda k: list(zip(X.split(32), y[torch.randperm(1000)].split(32), strict=True)))
    with pytest.raises(RuntimeError, match="The loss differs between two passes"):
        check(network(), data)


def test_other_keys() -> None:
    """A mapping that gets other entries."""
    X, y = examples()
    data = Calls(lambda k: [({"x": X, **({"z": X} if k else {})}, y)])
    params = {"w": torch.randn(4, 3)}
    with pytest.raises(RuntimeError, match=r"The data differ between two passes \(X\['z'\]\)"):
        check(lambda p, X: X["x"] @ p["w"], data, params=params, batch_size_fn=lambda X: 20)


# Order


@pytest.mark.parametrize("batch_size", [6, 20])
def test_order(batch_size: int) -> None:
    """Shuffling matters where a fixed order is needed, also inside of a single batch."""
    X, y = examples()
    check(network(), loader(X, y, batch_size))
    check(network(), loader(X, y, batch_size, shuffle=False), needs_fixed_order=True)
    with pytest.raises(RuntimeError, match=r"order of the data differs.*Use shuffle=False"):
        check(network(), loader(X, y, batch_size), needs_fixed_order=True)


@pytest.mark.parametrize("i", range(7))
def test_order_of_two_similar_examples(i: int) -> None:
    """Two swapped rows are noticed where rows have the same sum and norm and share the label."""
    X, y = torch.eye(8), torch.zeros(8, dtype=torch.long)
    swapped = torch.arange(8)
    swapped[[i, i + 1]] = swapped[[i + 1, i]]
    data = Calls(lambda k: [(X[swapped] if k % 2 else X, y)])
    net = nn.Linear(8, 3)
    check(net, data)
    with pytest.raises(RuntimeError, match="order of the data differs"):
        check(net, data, needs_fixed_order=True)


def test_order_of_batches() -> None:
    """Batches that come in another order, with the same examples each."""
    batches = [examples(5), examples(5)]
    data = Calls(lambda k: batches[:: (-1) ** k])
    check(network(), data)
    with pytest.raises(RuntimeError, match="order of the data differs"):
        check(network(), data, needs_fixed_order=True)


# No false alarms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["flat", "deep", "large", "constant"])
def test_rounding(dtype: torch.dtype, kind: str) -> None:
    """Batches of changing composition and size do not fail by rounding, whatever the numbers."""
    X, y = examples(300, dtype)
    net = network(dtype)
    if kind == "deep":  # amplifies rounding errors
        layers = [layer for _ in range(15) for layer in (nn.Linear(4, 4), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(4, 3)).to(dtype)
        for p in net.parameters():
            p.data *= 3
    elif kind == "large":
        X = 30 * X
    elif kind == "constant":
        X = torch.ones_like(X)
    targets = net(X).detach() if kind == "large" else y  # a loss that is only rounding errors
    loss = nn.MSELoss() if kind == "large" else CE()

    def batches(k: int) -> list[Any]:
        order = torch.randperm(300)
        sizes = [100, 100, 100] if k == 0 else [1] * 20 + [7] * 40
        return list(zip(X[order].split(sizes), targets[order].split(sizes), strict=True))

    check(net, Calls(batches), loss=loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("N", [30, 3000])
def test_noisy_hardware(dtype: torch.dtype, shuffle: bool, N: int) -> None:
    """Random rounding errors, as of atomic additions on a GPU, are no failure."""
    size = {torch.bfloat16: 3, torch.float16: 10}.get(dtype, 100) * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(dtype)

        def forward(self, X: Tensor) -> Tensor:
            f = self.net(X)
            noise = torch.randn(f.shape, generator=generator, dtype=torch.float64)
            return (f * (1 + size * noise)).to(dtype)

    (X, y), net = examples(N, dtype), Noisy()
    exact = net.net(X).detach()  # the loss is nothing but rounding errors then
    for loss, targets in [(CE(), y), (nn.MSELoss(), 0 * exact), (nn.MSELoss(), exact)]:
        check(net, loader(X, targets, N // 6 + 1, shuffle=shuffle), loss=loss)


def test_rounding_of_sums() -> None:
    """Entries that cancel in the sum are compared on the scale of the entries."""
    X = torch.randn(400, 4).repeat(2, 1) * torch.tensor([1e6]).repeat(800, 1)
    X[400:] *= -1
    net = nn.Linear(4, 3, bias=False)
    check(net, loader(X, torch.zeros(800, 3), 50), loss=nn.MSELoss())


class LastToken(nn.Module):
    """Predicts a token for each position; padding is masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7)

    def forward(self, X: Any) -> Tensor:
        ids = X["ids"]
        h = self.embedding(ids)
        positions = torch.arange(ids.shape[1]).unsqueeze(-1) / ids.shape[1]  # what padding gets
        h = torch.where(X["mask"].unsqueeze(-1), h, positions)
        return self.output(h).movedim(-1, 1)  # [N, 7, S]


def padded(order: Any, lengths: list[int]) -> list[Any]:
    """Batches of two sequences, padded to the longer one; on the left, as for generation."""
    tokens = [torch.arange(i, i + n) % 7 for i, n in enumerate(lengths)]
    batches = []
    for pair in torch.as_tensor(order).split(2):
        length = max(len(tokens[i]) for i in pair)
        rows = [functional.pad(tokens[i], (length - len(tokens[i]), 0)) for i in pair]
        ids = torch.stack(rows)
        mask = torch.stack([torch.arange(length) >= length - len(tokens[i]) for i in pair])
        y = torch.where(mask, ids, -100)
        positions = torch.arange(length).expand(len(pair), -1)
        batches.append(({"ids": ids, "mask": mask, "positions": positions}, y))
    return batches


class IgnoringLoss(nn.CrossEntropyLoss):
    """A loss that only its author knows to ignore padding."""

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return super().forward(f, y)


LENGTHS = [1, 4, 2, 3, 5]
AS_GIVEN = [0, 1, 2, 3, 4]
LESS_PADDING = [3, 2, 4, 0, 1]
AS_MUCH_PADDING = [2, 1, 0, 3, 4]  # for other sequences


@pytest.mark.parametrize("order", [LESS_PADDING, AS_MUCH_PADDING])
@pytest.mark.parametrize(
    "loss", [CE(), CE(weight=torch.rand(7)), CE(reduction="sum"), CE(label_smoothing=0.1)]
)
def test_padding(order: list[int], loss: nn.Module) -> None:
    """Sequences are padded to the longest of the batch; what is ignored does not matter."""
    sizes = [sum(y.numel() for _, y in padded(o, LENGTHS)) for o in (AS_GIVEN, order)]
    assert (sizes[0] == sizes[1]) is (order is AS_MUCH_PADDING)
    data = Calls(lambda k: padded(order if k else AS_GIVEN, LENGTHS))
    check(LastToken(), data, loss=loss, batch_size_fn=lambda X: len(X["ids"]))


def test_padding_of_a_generic_loss() -> None:
    """If only the loss knows what is padding, it decides."""
    data = Calls(lambda k: padded(LESS_PADDING if k else AS_GIVEN, LENGTHS))
    loss = IgnoringLoss(reduction="sum")
    check(LastToken(), data, loss=loss, batch_size_fn=lambda X: len(X["ids"]))


def test_padding_that_counts() -> None:
    """If it is not ignored, the order matters."""

    def batches(k: int) -> list[Any]:
        order = LESS_PADDING if k else AS_GIVEN
        return [(X, y.clamp(min=0)) for X, y in padded(order, LENGTHS)]

    with pytest.raises(RuntimeError, match="number of loss terms differ"):
        check(LastToken(), Calls(batches), batch_size_fn=lambda X: len(X["ids"]))


def test_graphs() -> None:
    """Indices of nodes depend on the batch; shuffled graphs are the same graphs."""
    graphs = [(torch.randn(n, 4), torch.randint(0, n, (2, 5))) for n in (2, 5, 3, 4, 6, 2)]
    labels = torch.randint(0, 3, (6,))

    def batches(k: int) -> list[Any]:
        result = []
        for indices in torch.randperm(6).split(2):
            offsets = [0, *torch.tensor([len(graphs[i][0]) for i in indices]).cumsum(0).tolist()]
            x = torch.cat([graphs[i][0] for i in indices])
            pairs = zip(offsets[:-1], indices, strict=True)
            edges = torch.cat([graphs[i][1] + offset for offset, i in pairs], 1)
            sizes = torch.tensor([len(graphs[i][0]) for i in indices])
            graph = torch.arange(len(indices)).repeat_interleave(sizes)
            result.append(({"x": x, "edges": edges, "graph": graph}, labels[indices]))
        return result

    def predict(p: dict[str, Tensor], X: dict[str, Tensor]) -> Tensor:
        h = (X["x"] @ p["w"]).tanh()
        h = h.index_add(0, X["edges"][1], h[X["edges"][0]])
        return torch.zeros(int(X["graph"].max()) + 1, 3).index_add(0, X["graph"], h)

    params = {"w": torch.randn(4, 3)}
    for _ in range(10):
        check(
            predict,
            Calls(batches),
            params=params,
            batch_size_fn=lambda X: int(X["graph"].max()) + 1,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("shuffle", [False, True])
def test_non_finite_numbers(value: float, shuffle: bool) -> None:
    """They are a problem, but another one; they do not hide dropout either."""
    X, y = examples()
    X[7] = value
    y = y.unsqueeze(-1).float().expand(-1, 3)
    check(nn.Linear(4, 3), loader(X, y, shuffle=shuffle), loss=nn.MSELoss())
    if value != 1e30:
        with pytest.raises(RuntimeError, match=r"The prediction .*differ"):
            check(Dropping(), loader(X, y, shuffle=shuffle), loss=nn.MSELoss())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_inputs_of_other_types(dtype: torch.dtype) -> None:
    """Any numbers can be inputs."""
    X = (100 * torch.rand(20, 4)).to(dtype)
    params = {"w": torch.randn(4, 3)}

    def predict(p: dict[str, Tensor], X: Tensor) -> Tensor:
        return (X.real if X.is_complex() else X).float() @ p["w"]

    y = examples()[1]
    check(predict, loader(X, y), params=params)
    with pytest.raises(RuntimeError, match="order of the data differs"):
        check(predict, loader(X, y), params=params, needs_fixed_order=True)


def test_other_entries_of_inputs() -> None:
    """Nested containers, sparse tensors and strings do not disturb."""
    X, y = examples()
    inputs = {"x": X, "more": [X, ("name", X.to_sparse())], "none": None}
    params = {"w": torch.randn(4, 3)}
    predict = lambda p, X: X["x"] @ p["w"]  # noqa: E731
    check(predict, [(inputs, y)], params=params, batch_size_fn=lambda X: 20)
    nested = Calls(lambda k: [({**inputs, "more": [X + k]}, y)])
    with pytest.raises(RuntimeError, match=re.escape("(X['more'][0])")):
        check(predict, nested, params=params, batch_size_fn=lambda X: 20)


# What is recorded


def test_statistics_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are taken in parts; sums are those of the formula."""
    x = torch.randn(50, 3)
    w = torch.arange(3).double().square().cos()
    x64 = x.double()
    expected = torch.stack(
        [torch.tensor(150.0), (x64 @ w).sum(), x64.abs().sum(), x64.square().sum()]
    )
    assert torch.allclose(determinism._statistics(x, None)[:4], expected.double())
    monkeypatch.setattr(determinism, "_CHUNK", 20)
    assert torch.allclose(determinism._statistics(x, None)[:4], expected.double())
    swapped = x.clone()
    swapped[[1, 43]] = x[[43, 1]]  # at the same place of different parts
    ordered = [determinism._statistics(t, None)[4] for t in (x, swapped)]
    assert abs(ordered[0] - ordered[1]) > 1e-3


def test_unused_entries() -> None:
    """They are left out, be they rows or single entries."""
    x = torch.randn(5, 3)
    for used in (torch.rand(5) > 0.5, torch.rand(5, 3) > 0.5):
        mask = used if used.ndim == 2 else used.unsqueeze(1).expand(5, 3)
        result = determinism._statistics(x, used)
        assert torch.equal(result[1:], determinism._statistics(x * mask, None)[1:])
        assert result[0] == mask.sum()
