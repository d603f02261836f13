"""Exact curvature matrices of data on several ranks are those of one process with all data."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_ranks import Failure, Ranks, collectives
from rank_cases import CASES, make, part
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlinops.risk.empirical_risk as risk_module
from curvlinops import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    PerExampleGradientLinearOperator,
    ShardSampler,
    TransposedJacobianLinearOperator,
    record_gradients,
)
from curvlinops.distributed import collective_of

SAMPLED = {"mc_samples": 3, "seed": 7}
#: Name, operator, and its options.
OPERATORS: list[tuple[str, Any, dict[str, Any]]] = [
    ("Hessian", HessianLinearOperator, {}),
    ("GGN", GGNLinearOperator, {}),
    ("MC-GGN", GGNLinearOperator, SAMPLED),
    ("EF", EFLinearOperator, {}),
    ("diagonal", GGNDiagonalLinearOperator, {}),
    ("MC-diagonal", GGNDiagonalLinearOperator, SAMPLED),
]
#: First batches of the ranks but one: uneven parts, and a rank without data.
CUTS = {2: [[1], [0], [4]], 4: [[1, 2, 3], [0, 2, 2], [1, 3, 4]]}
#: How construction is told, or finds out, what it has to know.
WAYS: list[dict[str, Any]] = [{}, {"check_deterministic": False}]


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compare; the same bits are on all ranks."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, actual)
    assert all(torch.equal(actual, other) for other in everybody)


def check_products(case_name: str, operator: str, options: dict[str, Any]) -> None:
    """All cuts and reductions; one all-reduce for a product, which must be one."""
    cls, own = next((cls, own) for name, cls, own in OPERATORS if name == operator)
    options = {**own, **options}
    case = make(case_name)
    size = sum(p.numel() for p in case.params.values())
    V = torch.rand(size, 2, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        expected = case.operator(cls, reduction, **own) @ V
        for cut in CUTS[dist.get_world_size()]:
            A = case.shared(cls, cut, reduction, **options)
            num_allreduces = 0 if cls is GGNDiagonalLinearOperator else 1
            for i in range(2):
                with collectives() as seen:
                    product = A @ V
                # Without the check, the loss terms are counted once before samples are drawn.
                lazy = options.get("check_deterministic") is False and "mc_samples" in options
                if not (i == 0 and lazy):
                    assert seen == ["allreduce"] * num_allreduces, seen
                same(product, expected)


def check_grid(names: list[str], options: dict[str, Any]) -> None:
    for name in names:
        for operator, cls, _ in OPERATORS:
            if name != "unknown_loss" or cls is HessianLinearOperator:
                check_products(name, operator, options)


@pytest.mark.parametrize("operator", [name for name, *_ in OPERATORS])
def test_products(two: Ranks, operator: str) -> None:
    """Catches a scale, a normalizer or samples of one rank, and more than one all-reduce."""
    for way in WAYS:
        two(check_products, "tokens", operator, way)
    two(check_products, "classification", operator, {})


def test_loss_without_closed_form(two: Ranks) -> None:
    """Catches counting of terms where there are none, and weights other than n / N."""
    for way in WAYS:
        two(check_products, "unknown_loss", "Hessian", way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_grid_of_two(two: Ranks, name: str, way: dict[str, Any]) -> None:
    """All cases."""
    two(check_grid, [name], way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_grid_of_four(four: Ranks, name: str, way: dict[str, Any]) -> None:
    """All cases, on four ranks. Catches a prefix of the rank before only."""
    four(check_grid, [name], way)


# Arguments and state


class CountedPasses(list[Any]):
    """Data that count how often they are iterated."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def check_num_data() -> None:
    case = make("tokens")
    data = CountedPasses(part(case.data, [1]))
    arguments = {"data": data, "check_deterministic": False, "num_data": 8, **SAMPLED}
    A = case.shared(GGNLinearOperator, [1], **arguments)
    v = torch.rand(A.shape[1], dtype=torch.float64)
    assert data.passes == 0
    same(A @ v, case.operator(GGNLinearOperator, **SAMPLED) @ v)
    assert data.passes == 2  # one counts the terms on the ranks before
    with collectives() as seen:
        A @ v
    assert data.passes == 3 and seen == ["allreduce"]
    assert A.risk.num_data == 8
    for counted in (True, False):  # the number of examples of this rank is not that of all
        with pytest.raises(ValueError, match="had 8 examples, but num_data is 2"):
            case.shared(HessianLinearOperator, [1], num_data=2, check_deterministic=counted) @ v


def check_state() -> None:
    """The model and the generators are left alone; and products work in every mode."""
    case = make("classification")
    before = {name: p.clone() for name, p in case.model.state_dict().items()}
    v = torch.rand(31, dtype=torch.float64)
    expected = case.operator(GGNLinearOperator, **SAMPLED) @ v
    state = torch.get_rng_state()
    A = case.shared(GGNLinearOperator, [4], check_deterministic=False, **SAMPLED)
    with torch.inference_mode():
        product = A @ v
    same(product.clone(), expected)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in case.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())
    copied = copy.deepcopy(A)
    assert copied.risk.collective is A.risk.collective
    same(copied @ v, expected)
    L, gradient = A.risk.loss_and_gradient()
    L1, gradient1 = case.operator(GGNLinearOperator).risk.loss_and_gradient()
    same(L, L1)
    with collectives() as seen:
        scale = A.risk.for_each_batch(lambda batch: 0.1 * batch.n)
    assert seen == ["allreduce"] and abs(scale - 1.0) < 1e-15
    for g, g1 in zip(gradient, gradient1, strict=True):
        same(g, g1)


def check_keep_graph() -> None:
    case = make("classification")
    calls = []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    for cls, options in ((HessianLinearOperator, {}), (GGNLinearOperator, SAMPLED)):
        A = case.shared(cls, [0], keep_graph=True, chunk_size=1, **options)
        V = torch.rand(31, 3, dtype=torch.float64)
        expected = case.operator(cls, **options) @ V
        same(A @ V, expected)
        calls.clear()
        with collectives() as seen:
            product = A @ V
        assert not calls and seen == ["allreduce"]
        same(product, expected)


class Bars:
    """Notes the bars that are made."""

    made = 0

    def __init__(self, data: Any, **options: Any) -> None:
        type(self).made += 1
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def check_progressbar() -> None:
    case = make("regression")
    before, risk_module.tqdm = risk_module.tqdm, Bars
    Bars.made = 0
    try:
        case.shared(EFLinearOperator, [1], progressbar=True)
    finally:
        risk_module.tqdm = before
    assert Bars.made == (2 if dist.get_rank() == 0 else 0)


def check_recording() -> None:
    case = make("regression")
    A = case.shared(GGNLinearOperator, [1])
    v = torch.rand(A.shape[1], dtype=torch.float64, requires_grad=True)
    with collectives() as seen, record_gradients(), pytest.raises(NotImplementedError) as info:
        A @ v
    assert not seen and "record_gradients" in str(info.value)
    L, _ = A.risk.loss_and_gradient()  # with gradients enabled
    assert not L.requires_grad


def check_float32() -> None:
    """In float32 and bfloat16, sums are communicated in float32."""
    case = make("classification")
    v = torch.rand(31)
    expected = case.operator(GGNLinearOperator) @ v.double()
    case.model.float()
    case.data = [(X.float(), y) for X, y in case.data]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.7, 0.9]))
    A = case.shared(GGNLinearOperator, [0], loss_func=loss)
    assert (A @ v).dtype == torch.float32
    same(A @ v, expected.float(), 1e-5)
    case.model.bfloat16()
    case.data = [(X.bfloat16(), y) for X, y in case.data]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.7, 0.9]).bfloat16())
    A = case.shared(GGNLinearOperator, [0], loss_func=loss)
    product = A @ v.bfloat16()
    assert product.dtype == torch.bfloat16
    same(product.double(), expected, 0.1)


def check_nan() -> None:
    """No terms at all give what PyTorch gives; so does NaN on one rank."""
    case = make("classification")
    v = torch.rand(31, dtype=torch.float64)
    case.data[2][1].fill_(-100)
    ignored = [case.data[2]]
    A = case.operator(HessianLinearOperator, data=ignored)
    B = case.operator(HessianLinearOperator, data=ignored, process_group=dist.group.WORLD)
    assert (A @ v).isnan().all() and (B @ v).isnan().all()
    case.data[3][0][0, 0] = torch.nan
    A = case.operator(HessianLinearOperator)
    B = case.shared(HessianLinearOperator, [1])
    assert (A @ v).isnan().any()
    assert torch.equal((A @ v).isnan(), (B @ v).isnan())
    weight = torch.tensor([torch.nan, 1.0, 1.0], dtype=torch.float64)
    y = torch.tensor([0 if dist.get_rank() == 1 else 1])
    part = [(torch.ones(1, 3, dtype=torch.float64), y)]
    options = {"loss_func": nn.CrossEntropyLoss(weight=weight), "data": part}
    B = case.operator(HessianLinearOperator, process_group=dist.group.WORLD, **options)
    assert (B @ v).isnan().all()


def check_subgroup() -> None:
    """A group of one rank is that rank alone; the other is not in it."""
    case = make("regression")
    group = dist.new_group([1])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="not in process_group"):
            case.operator(HessianLinearOperator, process_group=group)
        return
    A = case.operator(HessianLinearOperator, process_group=group)
    v = torch.rand(A.shape[1], dtype=torch.float64)
    assert torch.allclose(A @ v, case.operator(HessianLinearOperator) @ v, 1e-10)
    with pytest.raises(ValueError, match="data is empty"):
        case.operator(HessianLinearOperator, process_group=group, data=[])


@pytest.mark.parametrize(
    "check",
    [
        check_num_data,
        check_state,
        check_keep_graph,
        check_progressbar,
        check_recording,
        check_float32,
        check_nan,
        check_subgroup,
    ],
)
def test_options(two: Ranks, check: Any) -> None:
    """Each catches what its name and its assertions say."""
    two(check)


def check_compile() -> None:
    case = make("regression")
    A = case.shared(GGNLinearOperator, [1], **SAMPLED)
    v = torch.rand(A.shape[1], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself, at import
        with pytest.raises(Exception, match="process_group"):
            torch.compile(A.__matmul__, backend="eager", fullgraph=True)(v)
        torch._dynamo.reset()
        compiled = torch.compile(A.__matmul__, backend="eager")
        same(compiled(v), A @ v)


@pytest.mark.slow
def test_compile(two: Ranks) -> None:
    """Compiled products run as they are; one graph is refused by name."""
    two(check_compile)


# Errors


class Brittle(nn.Module):
    """Fails in a certain call on a certain rank, and later ones if that is lasting."""

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.net = net
        self.rank = rank
        self.calls_left = -1
        self.lasting = False
        self.error: type[Exception] = ArithmeticError

    def forward(self, X: Tensor) -> Tensor:
        self.calls_left -= 1
        fails = self.calls_left <= 0 if self.lasting else self.calls_left == 0
        if fails and dist.get_rank() == self.rank:
            raise self.error("planted")
        return self.net(X)


def product_fails(error: type[Exception]) -> None:
    """Fails in the second batch of rank 1; then the group works on."""
    case = make("regression")
    case.model = Brittle(case.model, 1)
    expected = case.operator(HessianLinearOperator)
    A = case.shared(HessianLinearOperator, [1])
    v = torch.rand(A.shape[1], dtype=torch.float64)
    same(A @ v, expected @ v)
    case.model.calls_left, case.model.error = 2, error
    kind, text = (
        (error, "planted")
        if dist.get_rank() == 1
        else (RuntimeError, r"Rank\(s\) 1 failed: the cause is the error raised there")
    )
    with collectives() as seen, pytest.raises(kind, match=text):
        A @ v
    assert seen == ["allreduce"]
    case.model.calls_left = -1
    same(A @ v, expected @ v)


def count_fails() -> None:
    """The number of terms is not taken from a pass that was broken off."""
    case = make("regression")
    expected = case.operator(GGNLinearOperator, **SAMPLED)
    case.model = Brittle(case.model, 0)
    A = case.shared(GGNLinearOperator, [3], check_deterministic=False, **SAMPLED)
    v = torch.rand(A.shape[1], dtype=torch.float64)
    case.model.calls_left = 2
    with pytest.raises((ArithmeticError, RuntimeError)):
        A @ v
    same(A @ v, expected @ v)


def test_failure_in_a_count(two: Ranks) -> None:
    """Catches a count of some batches only, which gives later ranks other samples."""
    two(count_fails)


def test_failure_in_a_product(two: Ranks) -> None:
    """Catches a flag that is not sent or not looked at, and a rank that leaves out a call."""
    two(product_fails, ArithmeticError)
    two(product_fails, torch.OutOfMemoryError)


def build(problem: str) -> None:
    """Build an operator that cannot be built on rank 1, or not on all ranks together."""
    case = make("regression")
    wrong = dist.get_rank() == 1
    changes: dict[str, Any] = {}
    cls: Any = GGNLinearOperator
    if problem == "bad batch" and wrong:
        changes["data"] = [torch.zeros(2, 3)]
    if problem == "bad batch, counted":
        changes = {"data": ["no batch"]} if wrong else {}
        changes["check_deterministic"] = False
    if problem == "iterator" and wrong:
        changes["data"] = iter(case.data)
    if problem == "dropout":
        case.model.insert(1, nn.Dropout(0.5))
        case.model.train(wrong)
    if problem == "random" and wrong:
        case.model.register_forward_hook(lambda *args: args[-1] + torch.rand(1))
    if problem == "terms, later":
        case.model = Brittle(case.model, 1)
        A = case.shared(cls, [1], check_deterministic=False, num_data=10, mc_samples=1)
        case.model.calls_left = 1
        A @ torch.rand(A.shape[1], dtype=torch.float64)
    if problem == "params" and wrong:
        changes["params"] = [1, 2]
    if problem == "loss" and wrong:
        changes["loss_func"] = lambda f, y: f
    if problem == "chunk_size" and wrong:
        changes["chunk_size"] = 0
    if problem == "no closed form":
        cls = EFLinearOperator
        changes["loss_func"] = nn.HuberLoss() if wrong else nn.MSELoss()
    if problem == "diagonal, no closed form":
        cls = GGNDiagonalLinearOperator
        changes["loss_func"] = nn.HuberLoss() if wrong else nn.MSELoss()
    if problem == "diagonal":
        cls = GGNDiagonalLinearOperator
        case.model = Brittle(case.model, 1)
        case.model.calls_left, case.model.lasting = 3, True
        changes["check_deterministic"] = False
    if problem == "empty":
        changes["data"] = []
    if problem == "empty, unsized":
        changes["data"] = DataLoader(EmptyStream(), batch_size=None)
    if problem == "shape" and wrong:
        case.model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    if problem == "names" and wrong:
        changes["params"] = {"0.weight": case.params["0.weight"]}
    if problem == "order" and wrong:
        changes["params"] = dict(reversed(case.params.items()))
    if problem == "dtype" and wrong:
        case.model.float()
    if problem == "reduction" and wrong:
        changes["loss_func"] = nn.MSELoss(reduction="sum")
    if problem == "other loss" and wrong:
        changes["loss_func"] = nn.BCEWithLogitsLoss()
    if problem == "operator" and wrong:
        cls = HessianLinearOperator
    if problem == "samples":
        changes["mc_samples"] = 1 + wrong
    if problem == "seed":
        changes |= {"mc_samples": 1, "seed": 1 + wrong}
    if problem == "num_data":
        changes["num_data"] = 10 if wrong else None
    if problem == "check" and wrong:
        changes["check_deterministic"] = False
    if problem == "values" and wrong:
        with torch.no_grad():
            case.params["2.weight"][0, 0] += 0.1
    case.shared(cls, [1], **changes)


class EmptyStream(torch.utils.data.IterableDataset[Any]):
    """Yields nothing, and has no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


ONE = "Rank(s) 1 failed"
#: Problem, and parts of the messages on rank 0 and on rank 1.
PROBLEMS = {
    "bad batch": (ONE, "must be a pair"),
    "bad batch, counted": (ONE, "must be a pair"),
    "iterator": (ONE, "iterated only once"),
    "dropout": (ONE, "Dropout in training mode"),
    "random": (ONE, "not deterministic"),
    "terms, later": (ONE, "planted"),
    "params": (ONE, "params must be a dict"),
    "loss": (ONE, "reduction"),
    "chunk_size": (ONE, "chunk_size"),
    "no closed form": (ONE, "Huber"),
    "diagonal, no closed form": (ONE, "no closed form"),
    "diagonal": (ONE, "planted"),
    "empty": ("data is empty",) * 2,
    "empty, unsized": ("data is empty",) * 2,
    "shape": ("parameter '0.weight': (4, 3) torch.float64 on rank(s) 0; (5, 3)",) * 2,
    "names": ("parameter '0.bias': (4,) torch.float64 on rank(s) 0; absent on rank(s) 1",) * 2,
    "order": ("order of the parameters: 0.weight, 0.bias",) * 2,
    "dtype": ("torch.float32 on rank(s) 1",) * 2,
    "reduction": ("losses: ('MSE', 'mean') on rank(s) 0; ('MSE', 'sum')",) * 2,
    "other loss": ("losses: ('MSE', 'mean') on rank(s) 0; ('BCE",) * 2,
    "operator": ("operators: 'GGNLinearOperator' on rank(s) 0; 'Hessian",) * 2,
    "samples": ("mc_samples=2",) * 2,
    "seed": ("seed=2",) * 2,
    "num_data": ("num_data: None on rank(s) 0; 10 on rank(s) 1",) * 2,
    "check": ("check_deterministic: ",) * 2,
    "values": ("values of parameters differ between ranks: '2.weight'.",) * 2,
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_construction_fails(two: Ranks, problem: str) -> None:
    """An error on both ranks, with the cause; a rank that was left waiting would have another.

    Catches: errors that are not told, or not on all ranks; operators that differ.
    """
    answers = two.answers(build, problem)
    for answer, text in zip(answers, PROBLEMS[problem], strict=True):
        assert isinstance(answer, Failure)
        assert text in answer.message, answer.trace


def wrong_columns() -> None:
    """Other numbers of columns on one rank, whichever; then the group works on."""
    case = make("regression")
    expected = case.operator(GGNLinearOperator)
    V = torch.rand(expected.shape[1], 100, dtype=torch.float64)
    A = case.shared(GGNLinearOperator, [1])
    for columns in ((1, 2), (2, 1), (1, 100), (100, 1)):
        with pytest.raises(RuntimeError, match="same number of columns everywhere") as info:
            A @ V[:, : columns[dist.get_rank()]]
        for rank, number in enumerate(columns):
            assert f"{26 * number:,} numbers on rank(s) {rank}" in str(info.value)
    same(A @ V, expected @ V)  # more numbers than fit into the first all-reduce


def test_wrong_columns(two: Ranks) -> None:
    """Catches what the backend does of it: it ends one of the processes, without an exception."""
    two(wrong_columns)


def first_product_of_many_parameters() -> None:
    """More numbers than there always is room for, but no more than the operator has columns."""
    model = torch.nn.Linear(100, 50)
    data = [(torch.rand(3 + dist.get_rank(), 100), torch.rand(3 + dist.get_rank(), 50))]
    A = GGNLinearOperator(
        model,
        torch.nn.MSELoss(),
        dict(model.named_parameters()),
        data,
        process_group=dist.group.WORLD,
    )
    for columns, number in ((1, 1), (2, 2), (2, 1), (1, 1)):
        with collectives() as seen:
            A @ torch.ones(A.shape[1], columns)
        assert seen == ["allreduce"] * number, (columns, seen)


def test_first_product_takes_one_all_reduce(two: Ranks) -> None:
    """Catches a first product without room for its sums."""
    two(first_product_of_many_parameters)


def dies() -> None:
    case = make("regression")
    A = case.shared(GGNLinearOperator, [1])
    if dist.get_rank() == 1:
        os._exit(1)
    A @ torch.rand(A.shape[1], dtype=torch.float64)


def goes_missing() -> None:
    case = make("regression")
    A = case.shared(GGNLinearOperator, [1])
    if dist.get_rank() == 0:
        A @ torch.rand(A.shape[1], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("function", [dies, goes_missing])
def test_what_cannot_be_told(function: Any) -> None:
    """Ends in an error of the backend within the group's timeout."""
    ranks = Ranks(2)
    try:
        assert isinstance(ranks.answers(function)[0], Failure)
    finally:
        ranks.stop()


def failure_in_subgroup() -> None:
    """Ranks are named by the numbers that the user knows."""
    group = dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        case = make("regression")
        if dist.get_rank() == 3:
            case.data = [("no batch", 1)]
        with pytest.raises((RuntimeError, ValueError)) as info:
            case.operator(HessianLinearOperator, process_group=group)
        if dist.get_rank() == 1:
            assert "Rank(s) 3 failed" in str(info.value)


@pytest.mark.slow
def test_failure_in_subgroup(four: Ranks) -> None:
    """Catches numbers that count within the group."""
    four(failure_in_subgroup)


@pytest.mark.parametrize(
    "cls",
    [
        JacobianLinearOperator,
        TransposedJacobianLinearOperator,
        PerExampleGradientLinearOperator,
    ],
)
def test_rows_are_refused(cls: Any) -> None:
    """By name, with what to do instead."""
    case = make("regression")
    loss = (nn.MSELoss(),) * (cls is PerExampleGradientLinearOperator)
    with pytest.raises(NotImplementedError, match=f"^{cls.__name__} does not support process_gro"):
        cls(case.model, *loss, case.params, case.data, process_group=object())
    assert cls(case.model, *loss, case.params, case.data, process_group=None).shape


def test_no_process_group() -> None:
    """Something else is refused by its type."""
    case = make("regression")
    with pytest.raises(TypeError, match=r"must be a torch\.distributed process group, .* got str"):
        case.operator(HessianLinearOperator, process_group="gloo")
    assert collective_of(None).alone


# DistributedDataParallel and FSDP


def check_ddp() -> None:
    """Without communication of DDP's own; and training goes on."""
    case = make("regression")
    case.model.insert(1, nn.BatchNorm1d(4).double())
    case.model.eval()
    wrapped = nn.parallel.DistributedDataParallel(case.model)
    v = torch.rand(34, dtype=torch.float64)
    named = [dict(wrapped.named_parameters()), dict(wrapped.module.named_parameters())]
    assert next(iter(named[0])) == "module.0.weight"
    for _, cls, options in OPERATORS:
        expected = case.operator(cls, **options)
        for params in named:
            arguments = {"model_func": wrapped, "params": params}
            A = case.shared(cls, [0], **arguments, **options)
            with collectives() as seen:
                product = A @ v
            assert seen in (["allreduce"], [])
            same(product, expected @ v)
            as_dict = {name: torch.ones_like(p) for name, p in params.items()}
            assert list(A @ as_dict) == list(params)
    J = JacobianLinearOperator(wrapped, named[0], case.data)
    assert torch.equal(J @ v, JacobianLinearOperator(case.model, named[1], case.data) @ v)
    assert all(p.grad is None for p in case.model.parameters())
    (X, y) = case.data[dist.get_rank()]
    nn.functional.mse_loss(wrapped(X), y).backward()
    grads = [p.grad.clone() for p in case.model.parameters()]
    case.model.zero_grad()
    losses = [nn.functional.mse_loss(case.model(X), y) for X, y in case.data[:2]]
    local = torch.autograd.grad(sum(losses) / 2, list(case.model.parameters()))
    for g, expected_g in zip(grads, local, strict=True):
        same(g, expected_g)
    nested = nn.Sequential(wrapped)
    with pytest.raises(NotImplementedError, match="DistributedDataParallel inside"):
        HessianLinearOperator(nested, nn.MSELoss(), dict(nested.named_parameters()), case.data)


def test_ddp(two: Ranks) -> None:
    """Catches a wrapper that is called (it broadcasts buffers), and names that are not taken."""
    two(check_ddp)


def check_fsdp() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = make("regression")
    fully_shard(case.model, mesh=init_device_mesh("cpu", (2,)))
    full = make("regression").params
    for params in (case.params, full):  # the module has hooks of its own
        for _, cls, options in OPERATORS:
            with pytest.raises(NotImplementedError, match=rf"^{cls.__name__} .* FSDP \(DTensor\)"):
                case.shared(cls, [1], params=params, **options)
        for cls in (JacobianLinearOperator, TransposedJacobianLinearOperator):
            with pytest.raises(NotImplementedError, match="FSDP"):
                cls(case.model, params, case.data)


@pytest.mark.slow
def test_fsdp_is_refused(two: Ranks) -> None:
    """By name, instead of derivatives with respect to shards."""
    two(check_fsdp)


# ShardSampler in use


def check_sampler() -> None:
    case = make("classification")
    X, y = (torch.cat([batch[i] for batch in case.data]) for i in (0, 1))
    dataset = TensorDataset(X, y)
    v = torch.rand(31, dtype=torch.float64)
    for shuffle in (False, True):
        sampler = ShardSampler(dataset, shuffle=shuffle)
        assert (sampler.num_replicas, sampler.rank) == (dist.get_world_size(), dist.get_rank())
        loader = DataLoader(dataset, batch_size=3, sampler=sampler)
        alone = ShardSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle)
        everything = DataLoader(dataset, batch_size=4, sampler=alone)
        options = {"process_group": dist.group.WORLD, **SAMPLED}
        A = case.operator(GGNLinearOperator, data=loader, **options)
        same(A @ v, case.operator(GGNLinearOperator, data=everything, **SAMPLED) @ v)
    few = TensorDataset(X[:1], y[:1])  # fewer examples than ranks
    loader = DataLoader(few, batch_size=3, sampler=ShardSampler(few))
    A = case.operator(HessianLinearOperator, data=loader, process_group=dist.group.WORLD)
    same(A @ v, case.operator(HessianLinearOperator, data=[(X[:1], y[:1])]) @ v)


def test_sampler(two: Ranks) -> None:
    """Catches parts out of order (other samples), and a rank without data that fails."""
    two(check_sampler)


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from curvlinops import GGNLinearOperator, ShardSampler
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Linear(3, 2).double()
dataset = TensorDataset(torch.randn(7, 3).double(), torch.randint(2, (7,)))
loss, params = nn.CrossEntropyLoss(), dict(model.named_parameters())
data = DataLoader(dataset, batch_size=2, sampler=ShardSampler(dataset))
G = GGNLinearOperator(model, loss, params, data, process_group=dist.group.WORLD)
alone = GGNLinearOperator(model, loss, params, DataLoader(dataset, batch_size=7))
v = torch.ones(8).double()
assert torch.allclose(G @ v, alone @ v, 1e-10)
dist.destroy_process_group()
print("done on", dist.get_rank() if dist.is_initialized() else "a rank")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """A script that users would write, started as they would."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done on") == 2
