"""One planted cause of a random matrix at a time: the message that users read names it.

What the check itself does is tested in ``test/risk/test_determinism.py``; here, each operator is
built from a model and data as users have them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from curvlinops import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    PerExampleGradientLinearOperator,
    TransposedJacobianLinearOperator,
)

# The diagonal of the GGN treats examples one by one where it can, and says so where it cannot.
pytestmark = pytest.mark.filterwarnings("ignore:Examples cannot be differentiated on their own")

N, D, C = 20, 4, 3

# Hessians and the like are sums over the data in any order; rows have places, samples belong to
# loss terms by their place.
UNORDERED = {
    "Hessian": HessianLinearOperator,
    "GGN": GGNLinearOperator,
    "EF": EFLinearOperator,
    "GGN diagonal": GGNDiagonalLinearOperator,
}
ORDERED = {
    "GGN Monte-Carlo": partial(GGNLinearOperator, mc_samples=1),
    "GGN diagonal Monte-Carlo": partial(GGNDiagonalLinearOperator, mc_samples=1),
    "Jacobian": JacobianLinearOperator,
    "transposed Jacobian": TransposedJacobianLinearOperator,
    "per-example gradients": PerExampleGradientLinearOperator,
}
OPERATORS = {**UNORDERED, **ORDERED}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def build(name: str, model: nn.Module, data: Any, **options: Any) -> Any:
    """Build an operator."""
    loss = [] if "Jacobian" in name else [nn.CrossEntropyLoss()]
    return OPERATORS[name](model, *loss, dict(model.named_parameters()), data, **options)


def build_and_multiply(name: str, model: nn.Module, data: Any, **options: Any) -> Tensor:
    """Build an operator and multiply with numbers that are not the same for all classes."""
    A = build(name, model, data, **options)
    return A @ torch.linspace(0.5, 1.5, A.shape[1])


def states() -> list[Any]:
    """The states of the global generators."""
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]


def check_refused(
    name: str, model: nn.Module, data: Any, message: str, error: type[Exception] = RuntimeError
) -> None:
    """Check the error, and that the global generators are as before."""
    before = states()
    with pytest.raises(error, match=message):
        build(name, model, data)
    assert states() == before


def check_accepted(name: str, model: nn.Module, data: Any, **options: Any) -> None:
    """Check that there is a product, and that the global generators are as before."""
    before = states()
    product = build_and_multiply(name, model, data, **options)
    assert product.isfinite().all() and product.abs().sum() > 0
    assert states() == before


def check_only_refused_by_the_check(name: str, model: nn.Module, data: Any, message: str) -> None:
    """Check the error, that it tells the way around the check, and that this is one."""
    check_refused(
        name, model, data, rf"{message}.*\(check_deterministic=False skips this check\.\)$"
    )
    check_accepted(name, model, data, check_deterministic=False)


def network(*layers: nn.Module) -> nn.Module:
    """A classifier with layers in between, in training mode, as it is after training."""
    return nn.Sequential(nn.Linear(D, 6), *layers, nn.Tanh(), nn.Linear(6, C)).train()


def examples() -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    return torch.randn(N, D), torch.randint(0, C, (N,))


def loader(**options: Any) -> DataLoader[Any]:
    """A DataLoader, whose last batch is smaller, in a fixed order unless told otherwise."""
    return DataLoader(TensorDataset(*examples()), **{"batch_size": 6, **options})


class Passes:
    """Data that are made anew for each pass, by a function of the number of the pass."""

    def __init__(self, function: Callable[[int], list[Any]]) -> None:
        self.function = function
        self.passes = -1

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.function(self.passes))


@each_operator
@pytest.mark.parametrize("shuffle", [False, True])
def test_nothing_planted(name: str, shuffle: bool) -> None:
    """Otherwise the tests below would prove nothing; shuffling matters where there is an order."""
    data, model = loader(shuffle=shuffle), network()
    if shuffle and name in ORDERED:
        message = r"^The order of the data differs .* needs a fixed order\. Use shuffle=False"
        check_only_refused_by_the_check(name, model, data, message)
    else:
        check_accepted(name, model, data)


# --- models


@each_operator
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Dropout(0.3), r"^Dropout in training mode: 1 \(Dropout\)\. .*model\.eval\(\)"),
        (
            lambda: nn.BatchNorm1d(6),
            r"^BatchNorm in training mode: 1 \(BatchNorm1d\)\. .*model\.eval\(\)",
        ),
    ],
)
def test_layers_in_training_mode(name: str, layer: Callable[[], nn.Module], message: str) -> None:
    """The layer is named, and ``model.eval()`` helps."""
    model, data = network(layer()), loader()
    check_only_refused_by_the_check(name, model, data, message)
    check_accepted(name, model.eval(), data)


@each_operator
def test_batch_norm_without_running_statistics(name: str) -> None:
    """``model.eval()`` does not help, so it is said that it does not."""
    model = network(nn.BatchNorm1d(6, track_running_stats=False)).eval()
    message = r"^BatchNorm without running statistics: 1 .* also after model\.eval\(\)"
    check_only_refused_by_the_check(name, model, loader(), message)


@each_operator
def test_hidden_dropout(name: str) -> None:
    """A last layer of zeros, a common initialisation, hides dropout from predictions."""
    model = network(nn.Dropout(0.3))
    nn.init.zeros_(model[-1].weight)
    message = r"^Dropout in training mode: 1 \(Dropout\)"
    check_only_refused_by_the_check(name, model, loader(), message)


class Drops(nn.Module):
    """Dropout as a function: no layer shows it, and ``eval`` only if it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.3, self.training)


class NumPyNoise(nn.Module):
    """Random numbers of NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return x * np.random.rand()


class PythonNoise(nn.Module):
    """Random numbers of Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x + random.random()


DIFFERS = r"^The prediction (and the loss differ|differs) between two passes"


@each_operator
def test_functional_dropout(name: str) -> None:
    """It is found by what it does, and by the generator that it uses."""
    model, data = network(Drops()), loader()
    message = rf"{DIFFERS}: .* torch's global random generator, as dropout .*Call model\.eval\(\)"
    check_only_refused_by_the_check(name, model, data, message)
    check_accepted(name, model.eval(), data)


@each_operator
@pytest.mark.parametrize("layer", [NumPyNoise, PythonNoise])
def test_other_random_numbers(name: str, layer: type[nn.Module]) -> None:
    """Their cause is unknown, so none is made up."""
    message = rf"{DIFFERS}: the model is not deterministic\. "
    check_only_refused_by_the_check(name, network(layer()), loader(), message)


class Normalises(nn.Module):
    """What BatchNorm does, as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)


@each_operator
def test_examples_that_depend_on_each_other(name: str) -> None:
    """In a fixed order, the matrix is well-defined; shuffled, it is not."""
    model = network(Normalises())
    check_accepted(name, model, loader())
    message = (
        "^The order of the data differs"
        if name in ORDERED
        else rf"{DIFFERS}: .* which examples share a batch \(then use shuffle=False\)"
    )
    check_refused(name, model, loader(shuffle=True), message)


# --- data


class Augmented(Dataset[Any]):
    """Inputs get another value each time."""

    def __init__(self) -> None:
        self.X, self.y = examples()

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.X[i] + 0.01 * torch.randn(D), self.y[i]


@each_operator
@pytest.mark.parametrize("shuffle", [False, True])
def test_augmentation(name: str, shuffle: bool) -> None:
    """It is named before the order, which is not the cause."""
    data = DataLoader(Augmented(), 6, shuffle=shuffle)
    message = r"^The data differ between two passes \(X\)\. .* random augmentation \(apply it once"
    check_only_refused_by_the_check(name, network(), data, message)


@each_operator
def test_drop_last(name: str) -> None:
    """With shuffling, other examples are left out each time; in a fixed order, always the same."""
    data = loader(shuffle=True, drop_last=True)
    message = r"^The data differ .* drop_last=True: with shuffling, .* Use drop_last=False\."
    check_only_refused_by_the_check(name, network(), data, message)
    check_accepted(name, network(), loader(drop_last=True))


@each_operator
def test_sampler_with_replacement(name: str) -> None:
    """Other examples are drawn each time."""
    data = loader(sampler=RandomSampler(range(N), replacement=True))
    message = r"^The data differ .* a sampler that draws with replacement\."
    check_only_refused_by_the_check(name, network(), data, message)


@each_operator
@pytest.mark.parametrize(
    "once",
    [
        lambda data: iter(data),
        lambda data: (batch for batch in data),
        lambda data: map(tuple, data),
        lambda data: zip(*zip(*data, strict=True), strict=True),
    ],
)
def test_one_shot_iterator(name: str, once: Callable[[list[Any]], Any]) -> None:
    """It is refused without the check too, and before anything was taken from it."""
    data, model = once([examples()]), network()
    before = states()
    for options in ({}, {"check_deterministic": False}, {"num_data": N}):
        with pytest.raises(ValueError, match="iterated only once"):
            build(name, model, data, **options)
    assert len(list(data)) == 1
    assert states() == before


@each_operator
def test_disguised_one_shot_iterator(name: str) -> None:
    """An object that gives out the same iterator each time."""

    def data() -> Any:
        return Passes(lambda k: [examples()] if k == 0 else [])

    message = r"number of examples differs .*: 20 and 0\. The data can be iterated only once"
    check_refused(name, network(), data(), message)
    with pytest.raises(ValueError, match="data is empty"):
        build_and_multiply(name, network(), data(), check_deterministic=False)


@each_operator
@pytest.mark.parametrize(
    "data", [[], DataLoader(TensorDataset(torch.ones(0, D))), Passes(lambda k: [])]
)
@pytest.mark.parametrize("check", [True, False])
def test_empty_data(name: str, data: Any, check: bool) -> None:
    """They are refused with and without the check."""
    model = network()
    before = states()
    with pytest.raises(ValueError, match="data is empty: there is no batch"):
        build(name, model, data, check_deterministic=check)
    assert states() == before


@each_operator
def test_data_of_changing_size(name: str) -> None:
    """The numbers of examples are given, by the check or else by the first product."""
    X, y = examples()
    message = (
        r"^The number of examples differs between two passes over the data: 15 and 16\. "
        "Each pass must see the same examples"
    )
    check_refused(name, network(), Passes(lambda k: [(X[: 15 + k], y[: 15 + k])]), message)
    data = Passes(lambda k: [(X[: 15 + k], y[: 15 + k])])
    with pytest.raises(ValueError, match="had 16 examples, but num_data is 15"):
        build_and_multiply(name, network(), data, check_deterministic=False)
