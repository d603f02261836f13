"""What arguments alone tell is raised before the data are iterated or the model is evaluated.

A pass over the data may take hours, and an iteration may have effects of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    EFLinearOperator,
    EKFACAccumulator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
    PerExampleGradientLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops.computers.ekfac_make_fx import make_compute_ekfac_eigencorrection_batch
from curvlinops.computers.kfac_make_fx import make_compute_kfac_batch

KRONECKER = (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator)
ACCUMULATORS = (KFACAccumulator, EKFACAccumulator)
BATCH_FUNCTIONS = (make_compute_kfac_batch, make_compute_ekfac_eigencorrection_batch)
SQUARE = (HessianLinearOperator, GGNLinearOperator, EFLinearOperator)
JACOBIANS = (JacobianLinearOperator, TransposedJacobianLinearOperator)
ROWS = (*JACOBIANS, PerExampleGradientLinearOperator)
EXACT = (*SQUARE, *ROWS, GGNDiagonalLinearOperator)


class Counted(nn.Linear):
    """A model that counts its evaluations."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Data:
    """Data that count how often they are iterated."""

    def __init__(self) -> None:
        self.iterations = 0
        self.batch = torch.rand(4, 2), torch.rand(4, 2)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.iterations += 1
        return iter([self.batch])


#: Of everything that gathers Kronecker factors: options, and what the error says.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"fisher_type": "fisher"}, "'fisher' is not a FisherType"),
    ({"kfac_approx": "spread"}, "'spread' is not a KFACType"),
    ({"mc_samples": 0}, "mc_samples must be an integer, at least 1, got 0"),
    ({"mc_samples": 2.0}, "mc_samples must be an integer, at least 1, got 2.0"),
    ({"mc_samples": 2, "fisher_type": "type-2"}, "mc_samples=2 has no meaning"),
    ({"num_per_example_loss_terms": 0}, "num_per_example_loss_terms must be .*, got 0"),
    ({"num_per_example_loss_terms": 1.0}, "num_per_example_loss_terms must be .*, got 1.0"),
    ({"loss_terms": "none"}, "loss_terms must be 'signs' or 'exact', got 'none'"),
    ({"max_factor_size": 0}, "max_factor_size must be an integer, at least 1, got 0"),
    ({"max_factor_size": 2.5}, "max_factor_size must be an integer, at least 1, got 2.5"),
    ({"unsupported": "skip"}, "unsupported must be .*got 'skip'"),
    ({"precision": torch.float32}, "precision must be a Precision, got dtype"),
    ({"worker_fraction": 2}, "worker_fraction must be between 0 and 1, got 2"),
    ({"seed": -1}, "seed must be between 0"),
    ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ({"loss_func": nn.HuberLoss()}, "HuberLoss has no closed forms"),
    ({"loss_func": nn.MSELoss(reduction="none")}, "reduction 'none'"),
    ({"params": {}}, "params is empty"),
]
FORWARD_ONLY: tuple[dict[str, Any], str] = (
    {"fisher_type": "forward-only"},
    "EKFAC needs gradients: fisher_type='forward-only'",
)
#: Further ones of operators, of accumulators, and of both; and of single ones.
FURTHER: list[tuple[Any, dict[str, Any], str]] = [
    *(
        (cls, {"memory_budget": value}, f"memory_budget must be an integer.*got {value}")
        for cls in KRONECKER
        for value in (0, 1e9)
    ),
    *((cls, {"num_data": 0}, "num_data must be positive, got 0") for cls in (*KRONECKER, *EXACT)),
    *(
        (cls, {"backend": "hook"}, "backend must be one of .*got 'hook'")
        for cls in (*KRONECKER, *ACCUMULATORS)
    ),
    *((cls, {"decay": 2}, "decay must be at least 0") for cls in ACCUMULATORS),
    *((cls, {"first_term": -1}, "first_term must not be negative") for cls in ACCUMULATORS),
    (EKFACLinearOperator, *FORWARD_ONLY),
    (EKFACAccumulator, *FORWARD_ONLY),
    (make_compute_ekfac_eigencorrection_batch, *FORWARD_ONLY),
    *(
        (KFOCLinearOperator, options, message)
        for options, message in [
            ({"fisher_type": "empirical"}, "KFOC needs .*got 'empirical'"),
            ({"fisher_type": "forward-only"}, "KFOC needs .*got 'forward-only'"),
            ({"memory_budget": 10**9}, "KFOC .* has no memory_budget"),
            ({"max_iter": 0}, "max_iter must be an integer, at least 1, got 0"),
            ({"tol": 2}, "tol must be between 0 and 1, or None, got 2"),
        ]
    ),
    *(
        (cls, {"mc_samples": value}, f"mc_samples must be an integer, at least 0, got {value}")
        for cls in (GGNLinearOperator, GGNDiagonalLinearOperator)
        for value in (-1, 1.5)
    ),
    *((cls, {"seed": -1}, "seed must be") for cls in (GGNLinearOperator, EXACT[-1])),
    *((cls, {"chunk_size": 0}, "chunk_size must be an integer") for cls in EXACT),
]
CASES = [
    (make, options, message)
    for make in (*KRONECKER, *ACCUMULATORS, *BATCH_FUNCTIONS)
    for options, message in OPTIONS
] + FURTHER
BACKENDS = ("hooks", "make_fx")


def build(make: Any, model: nn.Module, data: Data, **changes: Any) -> None:
    """Make an operator, an accumulator, or a function of a batch."""
    arguments = {
        "model_func": model,
        "loss_func": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        **changes,
    }
    if make in BATCH_FUNCTIONS:
        arguments |= {"X": torch.rand(4, 2), "y": torch.rand(4, 2)}
    elif make not in ACCUMULATORS:
        arguments["data"] = data
    if make is EKFACAccumulator:
        other = Counted(2, 2)
        arguments["basis"] = KFACLinearOperator(
            other, nn.MSELoss(), dict(other.named_parameters()), Data()
        )
    if make in JACOBIANS:
        del arguments["loss_func"]
    make(**arguments)


def cases() -> Iterator[Any]:
    """Return what is called, its options and the message, with each backend, and for plans."""
    for make, options, message in CASES:
        name = make.__name__
        ways = [(make, {}, name)]
        if make in (*KRONECKER, *ACCUMULATORS) and "backend" not in options:
            ways = [(make, {"backend": b}, f"{name}-{b}") for b in BACKENDS]
        if make in KRONECKER:
            ways += [(make.plan, more, f"plan-{label}") for _, more, label in ways]
        for way, more, label in ways:
            listing = ",".join(f"{key}={value}" for key, value in options.items())
            yield pytest.param(way, {**options, **more}, message, id=f"{label}-{listing}")


@pytest.mark.parametrize(("make", "options", "message"), list(cases()))
def test_nothing_is_read_or_evaluated(make: Any, options: dict[str, Any], message: str) -> None:
    model, data = Counted(2, 2), Data()
    for check_deterministic in (False, True):
        checked = make not in (*ACCUMULATORS, *BATCH_FUNCTIONS)
        own = {"check_deterministic": check_deterministic} if checked else {}
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            build(make, model, data, **options, **own)
        assert (data.iterations, model.calls) == (0, 0)


def test_they_are_counted() -> None:
    """Without an error, data are iterated and the model is evaluated."""
    for make in (*KRONECKER, *EXACT, KFACLinearOperator.plan):
        model, data = Counted(2, 2), Data()
        build(make, model, data)
        assert data.iterations and model.calls
    for make in BATCH_FUNCTIONS:
        model = Counted(2, 2)
        build(make, model, data)
        assert model.calls
