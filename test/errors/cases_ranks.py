"""Errors of several ranks: in a group of one process, or with another rank that is made up."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from error_cases import Cases
from torch import Tensor, nn

from curvlinops import (
    EKFACAccumulator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    PerExampleGradientLinearOperator,
    ShardSampler,
    record_gradients,
)
from curvlinops.computers.across_ranks import add_moments, add_totals, check_same_steps
from curvlinops.computers.statistics import Moment
from curvlinops.distributed.collective import Collective
from curvlinops.distributed.process_group import ProcessGroupCollective
from curvlinops.risk.empirical_risk import EmpiricalRisk, _uncompiled
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.ranks import compare_operators, compare_params
from curvlinops.sharded import RemoteBlock, ShardedBlockDiagonalLinearOperator

cases = Cases()

X, Y = torch.rand(4, 3), torch.rand(4, 2)
MSE = nn.MSELoss()
MODEL = nn.Linear(3, 2)
PARAMS = dict(MODEL.named_parameters())
NO_GROUP_MEMBER = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None


class TwoRanks(Collective):
    """Two ranks, the second of which has what a function makes of what the first one has."""

    alone, rank, size = False, 0, 2

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self.other = other

    def exchange(self, values: list[int]) -> list[list[int]]:
        return [values, self.other(values)]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other(value)]


@contextmanager
def group_of_one() -> Iterator[Any]:
    """Make a process group of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def with_group(function: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a function that calls another one with a process group of this process alone."""

    def call() -> Any:
        with group_of_one() as group:
            return function(group)

    return call


def build(cls: Any, model: nn.Module = MODEL, **options: Any) -> Any:
    """Build an operator of a model."""
    return cls(model, MSE, dict(model.named_parameters()), [(X, Y)], **options)


# ---- communication -------------------------------------------------------------------------------
cases(
    RuntimeError,
    r"\(\(2,\), torch.float32\)\] on rank 0, but .* on rank 1",
    "must be the same",
    lambda: TwoRanks(lambda own: [((3,), torch.float32)]).sum([torch.ones(2)]),
)
cases(
    RuntimeError,
    r"Rank\(s\) 1 failed",
    "the cause is the error raised there",
    lambda: Collective().raise_failures([1], None),
)
cases(
    RuntimeError,
    r"product differs in size: 3 numbers on rank\(s\) 0; 4 numbers on rank\(s\) 1",
    "must make the same calls",
    lambda: Collective().check_same("The product", [3, 4]),
)
cases(
    ValueError,
    "got 0",
    "num_data must be positive",
    with_group(lambda group: build(HessianLinearOperator, num_data=0, process_group=group)),
)


@cases(ValueError, "process_group", "needs a PyTorch that was built with distributed")
def not_built() -> None:
    with mock.patch("torch.distributed.is_available", return_value=False):
        ProcessGroupCollective(None)  # type: ignore[arg-type]


cases(
    ValueError,
    "This process is not in process_group",
    "on the group's ranks only",
    lambda: build(HessianLinearOperator, process_group=NO_GROUP_MEMBER),
)
cases(
    TypeError,
    "got str",
    r"such as torch\.distributed\.group\.WORLD",
    lambda: build(HessianLinearOperator, process_group="world"),
)
cases(
    ValueError,
    "does not communicate tensors on meta",
    "Use gloo for the CPU",
    with_group(lambda group: ProcessGroupCollective(group, torch.device("meta"))),
)


@cases(RuntimeError, "process group was destroyed", "after the last use")
def destroyed() -> None:
    with group_of_one() as group:
        H = build(HessianLinearOperator, process_group=group)
        del group
    H @ torch.ones(8)


cases(
    TypeError,
    "process_group belongs to this process and cannot be saved",
    r"such as curvlinops\.sharded\.gathered\(K\)",
    with_group(lambda group: pickle.dumps(build(HessianLinearOperator, process_group=group))),
)
cases(
    NotImplementedError,
    "PerExampleGradient.* does not support process_group",
    "use GGNLinearOperator",
    with_group(lambda group: build(PerExampleGradientLinearOperator, process_group=group)),
)
cases(
    RuntimeError,
    "ShardSampler needs num_replicas and rank",
    "pass them",
    lambda: ShardSampler(range(3)),
)
cases(
    ValueError,
    "got rank=2, num_replicas=2",
    "must be at least 0 and below num_replicas",
    lambda: ShardSampler(range(3), 2, 2),
)
# ---- risks ---------------------------------------------------------------------------------------
cases(
    RuntimeError,
    r"order of the parameters: weight, bias on rank\(s\) 0; changed on rank\(s\) 1",
    "must build the same operator",
    lambda: compare_operators(
        TwoRanks(
            lambda own: (
                {**own, "order of the parameters": "changed"} if isinstance(own, dict) else [0]
            )
        ),
        PARAMS,
        {},
    ),
)
cases(
    RuntimeError,
    "differ between ranks: 'weight'",
    "broadcast its parameters",
    lambda: compare_params(TwoRanks(lambda own: {**own, "weight": (1e3, 1.0, 1e-7)}), PARAMS),
)


@cases(
    NotImplementedError,
    "record_gradients is not supported",
    "Build the operator without process_group",
)
@with_group
def differentiate(group: Any) -> None:
    with record_gradients():
        build(GGNLinearOperator, process_group=group) @ torch.ones(8, requires_grad=True)


def risk(group: Any) -> EmpiricalRisk:
    """Return a risk of a process group."""
    return EmpiricalRisk(MODEL, MSE, PARAMS, [(X, Y)], collective=ProcessGroupCollective(group))


LIKE = [torch.ones(2)]
cases(
    NotImplementedError,
    "record_gradients is not supported",
    "Build the operator without process_group",
    with_group(
        lambda group: risk(group).sum_over_data(
            lambda batch: ([torch.ones(2, requires_grad=True)], 1.0), "", like=LIKE
        )
    ),
)
cases(
    ValueError,
    "a rank|one without data",
    "like is needed",
    with_group(lambda group: risk(group).sum_over_data(lambda batch: (LIKE, 1.0), "")),
)
cases(
    ValueError,
    r"got \[torch.Size\(\[3\]\)\]",
    "must have the shapes of like",
    with_group(
        lambda group: risk(group).sum_over_data(lambda batch: ([torch.ones(3)], 1.0), "", like=LIKE)
    ),
)


@cases(NotImplementedError, "cannot be compiled as one graph", "compile with fullgraph=False")
def compiled() -> None:
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        _uncompiled(print)


# ---- models --------------------------------------------------------------------------------------
class FullyShardedDataParallel(nn.Linear):
    """A module that is called as FSDP's."""


class Pair(nn.Linear):
    """A module that returns a pair."""

    def forward(self, input: Tensor) -> Any:
        return input, input


cases(
    NotImplementedError,
    "Hessian.* sharded by FSDP",
    "Gather the full parameters",
    lambda: build(HessianLinearOperator, FullyShardedDataParallel(3, 2)),
)
cases(
    TypeError,
    "got tuple",
    "Wrap it in a module",
    lambda: FunctionalModel(Pair(3, 2), PARAMS)._predict_sharded(X),
)
cases(
    NotImplementedError,
    r"DistributedDataParallel inside \('0'\)",
    r"around its \.module",
    with_group(
        lambda group: build(
            HessianLinearOperator,
            nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(3, 2))),
        )
    ),
)
# ---- Kronecker factors ---------------------------------------------------------------------------
SAME_MODEL = "must have the same model"
cases(
    ValueError,
    r"they have \[1, 2\]",
    "Split the data otherwise",
    lambda: check_same_steps(TwoRanks(lambda own: [2]), [(X, Y)]),
)


@cases(RuntimeError, "factors of k differ between ranks: .* on rank 1", SAME_MODEL)
def other_moment() -> None:
    moment = Moment()
    moment.add(torch.rand(3, 2), 1)
    others = TwoRanks(lambda own: [(code, (count, "other")) for code, (count, *_) in own])
    add_moments(others, {"k": moment}, {}, torch.ones(()))


cases(
    RuntimeError,
    r"results for 'w' differ .* \[\(2,\), \(3,\)\]",
    SAME_MODEL,
    lambda: add_totals(
        TwoRanks(lambda own: {("w",): [(3,)]}),
        [(SimpleNamespace(key=("w",)), [torch.ones(2)])],
        {},
        torch.ones(()),
    ),
)  # type: ignore[list-item]


@cases(RuntimeError, r"have \[0.5, 0.9\]", "need the same decay")
def other_decay() -> None:
    accumulator = KFACAccumulator(MODEL, MSE, PARAMS, decay=0.5)
    accumulator.update(X, Y)
    accumulator._computer.collective = TwoRanks(lambda own: [1] if isinstance(own, list) else 0.9)
    accumulator.to_operator()


@cases(
    RuntimeError, "different eigenvectors of the gradient factor of 'weight'", "pass the same basis"
)
def other_basis() -> None:
    accumulator = EKFACAccumulator(MODEL, MSE, PARAMS, build(KFACLinearOperator))
    accumulator._computer.collective = TwoRanks(lambda own: dict.fromkeys(own, (1e3, 1.0, 1e-7)))
    accumulator._check_bases()


# ---- blocks on several ranks ---------------------------------------------------------------------
REMOTE = RemoteBlock(2, [1], torch.empty(0))
GATHERED = r"Use curvlinops\.sharded\.gathered"
cases(
    AttributeError,
    r"has no matrix here: the block is stored on rank\(s\) \[1\]",
    GATHERED,
    lambda: REMOTE.matrix,
)
cases(
    RuntimeError,
    r"cannot multiply: the block is stored on rank\(s\) \[1\]",
    GATHERED,
    lambda: REMOTE @ torch.ones(2),
)


@cases(NotImplementedError, "is spread over processes", r"save curvlinops\.sharded\.gathered")
def save_sharded() -> None:
    pickle.dumps(ShardedBlockDiagonalLinearOperator([REMOTE], [[1]], TwoRanks(lambda own: own)))
