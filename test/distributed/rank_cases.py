"""Models, losses and data that are cut in parts, one for each rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Data = list[tuple[Any, Tensor]]


@dataclass
class Case:
    """What an operator is built from, on all data.

    Attributes:
        model: The model.
        loss: Makes the loss function of a reduction.
        data: The batches, of different sizes.
        options: Further arguments.
    """

    model: nn.Module
    loss: Callable[[str], Any]
    data: Data
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def operator(self, cls: Any, reduction: str = "mean", **changes: Any) -> Any:
        """Build an operator; of one process on all data, unless changes say otherwise."""
        arguments = {"model_func": self.model, "params": self.params, "data": self.data}
        arguments |= {"loss_func": self.loss(reduction), **self.options, **changes}
        return cls(**arguments)

    def shared(self, cls: Any, cut: list[int], reduction: str = "mean", **changes: Any) -> Any:
        """Build an operator from this rank's part of the data."""
        changes = {"process_group": dist.group.WORLD, "data": part(self.data, cut), **changes}
        return self.operator(cls, reduction, **changes)


def part(data: Data, cut: list[int]) -> Data:
    """Return this rank's batches; cut holds the index of the first batch of all ranks but one."""
    bounds = [0, *cut, len(data)]
    r = dist.get_rank()
    return data[bounds[r] : bounds[r + 1]]


class Tokens(nn.Module):
    """Classifies tokens; its input is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 4)

    def forward(self, X: dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.linear(self.embedding(X["ids"]))).movedim(-1, 1)


def dense(num_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, num_out)).double()


def batches(target: Callable[[int], Tensor]) -> Data:
    return [(torch.randn(n, 3, dtype=torch.float64), target(n)) for n in (2, 3, 1, 4)]


def regression() -> Case:
    data = batches(lambda n: torch.randn(n, 2, dtype=torch.float64))
    return Case(dense(2), lambda reduction: nn.MSELoss(reduction=reduction), data)


def classification() -> Case:
    """The normalizer is no number of examples: class weights, and targets that are ignored."""
    weight = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)
    data = batches(lambda n: torch.randint(3, (n,)))
    data[1][1][0] = data[3][1][2] = -100
    return Case(
        dense(3), lambda reduction: nn.CrossEntropyLoss(weight=weight, reduction=reduction), data
    )


def binary() -> Case:
    pos_weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    data = batches(lambda n: torch.randint(2, (n, 2)).double())
    return Case(
        dense(2),
        lambda reduction: nn.BCEWithLogitsLoss(pos_weight=pos_weight, reduction=reduction),
        data,
    )


def tokens() -> Case:
    """Several loss terms for each example, padded sequences of different lengths, in a mapping."""
    data: Data = []
    for n, length in ((2, 3), (1, 5), (3, 2), (2, 4)):
        y = torch.randint(4, (n, length))
        y[0, -1] = -100
        data.append(({"ids": torch.randint(5, (n, length))}, y))
    return Case(
        Tokens().double(),
        lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
        data,
        {"batch_size_fn": lambda X: len(X["ids"])},
    )


def unknown_loss() -> Case:
    """A loss without closed forms, whose mean is over examples."""
    data = batches(lambda n: torch.randn(n, 2, dtype=torch.float64))
    return Case(dense(2), lambda reduction: nn.HuberLoss(reduction=reduction), data)


CASES = {case.__name__: case for case in (regression, classification, binary, tokens, unknown_loss)}


def make(name: str) -> Case:
    """Make a case; the same on all ranks."""
    torch.manual_seed(0)
    return CASES[name]()
