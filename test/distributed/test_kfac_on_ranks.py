"""KFAC, EKFAC and KFOC of data on several ranks are those of one process with all data."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_ranks import Failure, Ranks
from rank_cases import Case, make, part
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonalLinearOperator,
    EKFACAccumulator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.computers.ekfac_hooks import HooksEKFACComputer
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.recorder import Recorder
from curvlinops.sharded import RemoteBlock, gathered

#: First batches of the ranks but one: uneven parts, and a rank without data.
CUTS = {2: [[1], [0], [4]], 3: [[0, 3], [2, 2]], 4: [[1, 2, 3], [0, 2, 2]]}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kfac": (KFACLinearOperator, {"fisher_type": "mc", "mc_samples": 2}),
    "kfac-joint": (
        KFACLinearOperator,
        {"fisher_type": "type-2", "separate_weight_and_bias": False, "kfac_approx": "reduce"},
    ),
    "kfac-forward": (KFACLinearOperator, {"fisher_type": "forward-only"}),
    "kfac-make_fx": (KFACLinearOperator, {"fisher_type": "empirical", "backend": "make_fx"}),
    "ekfac": (EKFACLinearOperator, {"fisher_type": "mc"}),
    "ekfac-joint": (
        EKFACLinearOperator,
        {"fisher_type": "empirical", "separate_weight_and_bias": False, "loss_terms": "exact"},
    ),
    "kfoc": (KFOCLinearOperator, {"fisher_type": "type-2"}),
}


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Compare; the same bits are on all ranks."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, actual)
    assert all(torch.equal(actual, other) for other in everybody)


def network() -> Case:
    """Several kinds of layers: channel groups, a normalisation, a joint block, a tied weight."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 2, groups=2)
            self.norm = nn.LayerNorm(16)
            self.wide = nn.Linear(16, 5)
            self.square = nn.Linear(5, 5)
            self.out = nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.wide(self.norm(torch.tanh(self.conv(x)).flatten(1))))
            return self.out(torch.tanh(self.square(self.square(x))))

    data = [(torch.rand(n, 2, 3, 3).double(), torch.randint(3, (n,))) for n in (2, 3, 1, 4)]
    data[1][1][0] = -100
    return Case(Net().double(), lambda reduction: nn.CrossEntropyLoss(reduction=reduction), data)


def case_of(name: str) -> Case:
    return network() if name == "network" else make(name)


def check_everything(case_name: str, kind: str, fractions: tuple[float, ...]) -> None:
    """The operator, its closed forms and what is made of it, for all cuts."""
    cls, options = KINDS[kind]
    case = case_of(case_name)
    expected = case.operator(cls, **options)
    dense = expected.to_dense()
    tolerance = 1e-6 if kind == "kfoc" else 1e-9
    size = dist.get_world_size()
    for cut in CUTS[size]:
        for fraction in fractions:
            K = case.shared(cls, cut, **options, worker_fraction=fraction)
            held = max(1, round(fraction * size))
            blocks = list(K[1])
            assert all(len(ranks) == held for ranks in K[1].holders)
            here = sum(not isinstance(block, RemoteBlock) for block in blocks)
            assert here == sum(dist.get_rank() in ranks for ranks in K[1].holders)
            same(K.to_dense(), dense, tolerance)
            same(K.trace(), expected.trace(), tolerance)
            same(K.diagonal(), expected.diagonal(), tolerance)
            same(K.frobenius_norm(), expected.frobenius_norm(), tolerance)
            assert K.mapping == expected.mapping
            assert K.shape == expected.shape and K.SELF_ADJOINT
            same((2 * K + K).to_dense(), 3 * dense, tolerance)
            same((K @ K).to_dense(), dense @ dense, tolerance)
            same(copy.deepcopy(K).to_dense(), dense, tolerance)
            if kind == "kfoc":  # with its tolerance, inverses differ too much
                continue
            for strategy in [{}, {"use_heuristic_damping": True}, {"use_exact_damping": True}]:
                if strategy and kind.startswith("ekfac"):
                    continue
                inverse = K.inverse(1e-2, **strategy)
                reference = expected.inverse(1e-2, **strategy)
                same(inverse.to_dense(), reference.to_dense(), 1e-7)
                same(inverse.logdet(), reference.logdet(), 1e-7)
            by_block = K.inverse(lambda block: 1e-3 + block.trace() / block.shape[0])
            reference = expected.inverse(lambda block: 1e-3 + block.trace() / block.shape[0])
            same(by_block.to_dense(), reference.to_dense(), 1e-7)
            shifted, reference = (A + 1e-2 * A**0 for A in (K, expected))
            same(shifted.inverse_sqrt().to_dense(), reference.inverse_sqrt().to_dense(), 1e-7)
            same(shifted.slogdet()[1], reference.slogdet()[1], 1e-7)
            sample = shifted.sample(2, generator=torch.Generator().manual_seed(3), inverse=True)
            assert sample.shape == (K.shape[0], 2)
            local = gathered(inverse)
            assert type(local[1]) is BlockDiagonalLinearOperator
            assert not any(isinstance(block, RemoteBlock) for block in local[1])
            same(local.to_dense(), inverse.to_dense())


@pytest.mark.parametrize("kind", ["kfac", "kfac-joint", "ekfac"])
def test_two_ranks(two: Ranks, kind: str) -> None:
    """Catches: local denominators, samples of other terms, blocks that are mixed up, stale ones."""
    two(check_everything, "network", kind, (1.0, 0.0))


def test_kfoc(two: Ranks) -> None:
    """All passes of KFOC see the data of all ranks."""
    two(check_everything, "network", "kfoc", (1.0,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["network", "regression", "classification", "tokens"])
def test_four_ranks(four: Ranks, case: str, kind: str) -> None:
    """So it is for four ranks, one or two of them without data, and all kinds of operators."""
    four(check_everything, case, kind, (1.0, 0.5, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_ranks(three: Ranks, kind: str) -> None:
    """A fraction of the ranks that is no divisor."""
    three(check_everything, "network", kind, (1.0, 0.6, 0.0))


def passes_for_eigenvalues(keeping: list[int]) -> None:
    """All ranks make the second pass if one of them has not kept the first."""
    case = network()
    expected = case.operator(EKFACLinearOperator).to_dense()
    size, gather, made = Recorder._BYTES, HooksEKFACComputer._gather, []

    def noted(self: Any, statistic: Any, what: str, signs: str) -> Any:
        made.append(what)
        return gather(self, statistic, what, signs)

    try:
        HooksEKFACComputer._gather = noted  # type: ignore[method-assign]
        Recorder._BYTES = size if dist.get_rank() in keeping else 0
        same(case.shared(EKFACLinearOperator, [1]).to_dense(), expected)
    finally:
        HooksEKFACComputer._gather = gather  # type: ignore[method-assign]
        Recorder._BYTES = size
    assert len(made) == (1 if len(keeping) == dist.get_world_size() else 2)


@pytest.mark.parametrize("keeping", [[0, 1], [1], [0], []])
def test_second_passes(two: Ranks, keeping: list[int]) -> None:
    """Catches: a rank that waits for the other one's sums of a pass that is not made."""
    two(passes_for_eigenvalues, keeping)


# --------------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------------
@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Count the bytes that are handed to collectives, and the cost of decompositions."""
    counts = {"bytes": 0.0, "cost": 0.0, "largest": 0.0}

    def sent(*tensors: Tensor) -> None:
        counts["bytes"] += sum(t.nbytes for t in tensors)

    def decomposed(matrix: Tensor) -> None:
        counts["cost"] += matrix.shape[-1] ** 3 * matrix.shape[:-2].numel()

    def wrap(module: Any, name: str, note: Any) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(module, name, call)
        undo.append((module, name, original))

    undo: list[Any] = []
    for name in ("all_reduce", "reduce"):
        wrap(dist, name, lambda tensor, *args, **kwargs: sent(tensor))

    def broadcast(tensor: Tensor, *, src: int, **kwargs: Any) -> None:
        if src == dist.get_rank():
            sent(tensor)

    wrap(dist, "broadcast", broadcast)
    wrap(dist, "all_gather", lambda everybody, tensor, **kwargs: sent(tensor))
    wrap(dist, "all_gather_object", lambda everybody, own, **kwargs: sent(_pickled(own)))
    for name in ("eigh", "cholesky", "cholesky_ex", "eigvalsh", "inv", "svd"):
        wrap(torch.linalg, name, lambda matrix, *args, **kwargs: decomposed(matrix))
    try:
        yield counts
    finally:
        for module, name, original in undo:
            setattr(module, name, original)


def _pickled(value: Any) -> Tensor:
    import pickle

    return torch.empty(len(pickle.dumps(value)), dtype=torch.uint8)


WIDTHS = (120, 200, 90, 160, 60, 10)


def costs(kind: str, fraction: float) -> tuple[dict[str, float], dict[str, float], int]:
    """Return the counts of construction and of the inverse, and how many blocks are here."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(*layers)
    data = [(torch.rand(8, WIDTHS[0]), torch.rand(8, WIDTHS[-1])) for _ in range(4)]
    case = Case(model, lambda reduction: nn.MSELoss(reduction=reduction), data)
    cls, options = KINDS[kind]
    cut = CUTS[dist.get_world_size()][0]
    with counted() as construction:
        K = case.shared(cls, cut, **options, worker_fraction=fraction)
    with counted() as inverse:
        I = K.inverse(1e-2)  # noqa: E741
    here = sum(not isinstance(block, RemoteBlock) for block in I[1])
    with counted() as product:
        K @ torch.rand(K.shape[1])
    held_by_all = fraction == 1.0
    assert (product["bytes"] == 0) == held_by_all
    return construction, inverse, here


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_costs(two: Ranks, fraction: float) -> None:
    """Half matrices are sent, and each rank decomposes its share.

    Catches: whole matrices, everything decomposed everywhere, blocks in the order of layers.
    """
    check_costs(two, fraction)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_costs_of_four(four: Ranks, fraction: float) -> None:
    """So it is on four ranks."""
    check_costs(four, fraction)


def check_costs(ranks: Ranks, fraction: float) -> None:
    """Compare what ranks send and decompose with what they must."""
    triangle = 4 * sum(d * (d + 1) / 2 for i, o in itertools.pairwise(WIDTHS) for d in (i, o))
    blocks = [i**3 + o**3 for i, o in itertools.pairwise(WIDTHS)]
    kfac = ranks(costs, "kfac", fraction)
    for construction, inverse, here in kfac:
        assert triangle <= construction["bytes"] <= 1.1 * triangle
        assert construction["cost"] == 0
        assert inverse["cost"] <= sum(blocks) / ranks.size + max(blocks)
        assert here == (len(blocks) if fraction == 1 else here)
    assert sum(inverse["cost"] for _, inverse, _ in kfac) == sum(blocks)
    if fraction == 0:  # what is stored is shared out, and no inverse is sent
        assert sum(here for *_, here in kfac) == len(blocks)
        assert all(inverse["bytes"] < 1000 for _, inverse, _ in kfac)
    ekfac = ranks(costs, "ekfac", fraction)
    assert sum(construction["cost"] for construction, *_ in ekfac) == sum(blocks)
    for construction, *_ in ekfac:
        assert construction["cost"] <= sum(blocks) / ranks.size + max(blocks)


# --------------------------------------------------------------------------------------------------
# Accumulators, computers, errors
# --------------------------------------------------------------------------------------------------
def check_accumulators(decay: float | None) -> None:
    """Each rank adds its batches; the operator is that of all."""
    case = network()
    group = dist.group.WORLD
    kwargs: dict[str, Any] = {"fisher_type": "type-2"}
    args = (case.model, case.loss("mean"), case.params)
    mine = part(case.data, [2])
    K = case.operator(KFACLinearOperator, **kwargs)
    for cls, extra in ((KFACAccumulator, ()), (EKFACAccumulator, (K,))):
        accumulator = cls(*args, *extra, process_group=group, decay=decay, **kwargs)  # type: ignore[operator]
        for X, y in mine:
            accumulator.update(X, y)
        operator = accumulator.to_operator()
        again = accumulator.to_operator()  # which changes nothing
        if decay is None:
            expected: Any = cls(*args, *extra, **kwargs)  # type: ignore[operator]
            for X, y in case.data:
                expected.update(X, y)
            same(operator.to_dense(), expected.to_operator().to_dense())
        same(again.to_dense(), operator.to_dense(), 0.0)


def test_accumulators(two: Ranks) -> None:
    """Catches an accumulator that changes its own sums, or sums up some of them only."""
    two(check_accumulators, None)
    two(check_accumulators, 0.5)


def bases_of_own_data() -> None:
    """Each rank has a basis of its own part of the data."""
    case = network()
    args = (case.model, case.loss("mean"), case.params)
    K = KFACLinearOperator(*args, part(case.data, [2]), fisher_type="type-2")
    with pytest.raises(
        RuntimeError, match="different eigenvectors of the gradient factor of 'conv"
    ):
        EKFACAccumulator(*args, K, process_group=dist.group.WORLD, fisher_type="type-2")


def test_bases_of_own_data_are_refused(two: Ranks) -> None:
    """Catches eigenvalues of different bases that are added."""
    two(bases_of_own_data)


class Sometimes(nn.Module):
    """Uses its weight in a layer; for long sequences in another way, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.linear.weight.sum() if x.shape[-2] > 2 else 1.0
        return (factor * self.linear(x)).mean(-2)


def check_accumulators_that_do_not_fit() -> None:
    """Ranks with other options, or uses of parameters, raise all; none gives wrong numbers."""
    model, rank = Sometimes().double(), dist.get_rank()
    args = (model, nn.MSELoss(), dict(model.named_parameters()))
    options: dict[str, Any] = {"fisher_type": "type-2", "process_group": dist.group.WORLD}
    X, y = torch.rand(4, 2 + rank, 3).double(), torch.rand(4, 2).double()
    accumulator = KFACAccumulator(*args, **options, unsupported="diagonal")
    accumulator.update(X, y)
    message = (
        r"\['linear.weight'\] had factors so far, but another rank uses them in other ways"
        if rank == 0
        else r"Rank\(s\) 0 failed"
    )
    with pytest.raises(RuntimeError, match=message):
        accumulator.to_operator()
    # a rank without data has nothing that would not fit
    accumulator = KFACAccumulator(*args, **options, unsupported="diagonal")
    expected = KFACAccumulator(*args, fisher_type="type-2", unsupported="diagonal")
    if rank == 1:
        accumulator.update(X, y)
    expected.update(*((X, y) if rank == 1 else (torch.rand(4, 3, 3).double(), y)))
    operator = accumulator.to_operator()
    assert operator.mapping == expected.to_operator().mapping
    if rank == 1:
        assert torch.allclose(operator.to_dense(), expected.to_operator().to_dense(), 1e-9)
    accumulator = KFACAccumulator(*args, **options, decay=(0.5, 0.9)[rank])
    accumulator.update(X[:, :2], y)
    with pytest.raises(RuntimeError, match=r"same decay on all ranks, but have \[0\.5, 0\.9\]"):
        accumulator.to_operator()


@pytest.mark.slow
def test_accumulators_that_do_not_fit(two: Ranks) -> None:
    """Catches a sum of some ranks only, and a mean that nobody has asked for."""
    two(check_accumulators_that_do_not_fit)


def check_data_parallel() -> None:
    """A model in DistributedDataParallel, with either names of parameters; also in training."""
    case = network()
    group = dist.group.WORLD
    kwargs: dict[str, Any] = {"fisher_type": "empirical", "check_deterministic": False}
    kinds = (KFACLinearOperator, EKFACLinearOperator)
    expected = {cls: case.operator(cls, **kwargs).to_dense() for cls in kinds}
    model = nn.parallel.DistributedDataParallel(case.model)
    mine, loss = part(case.data, [2]), case.loss("mean")
    for params in (dict(model.named_parameters()), case.params):
        for cls in kinds:
            for backend in ("hooks", "make_fx"):
                K = cls(model, loss, params, mine, **kwargs, process_group=group, backend=backend)
                assert {name for group in K.mapping for name in group.values()} == set(params)
                same(K.to_dense(), expected[cls])
        accumulator = KFACAccumulator(
            model, loss, params, fisher_type="empirical", process_group=group
        )
        for X, y in mine:
            with accumulator.observe(X, y):
                loss(model(X), y).backward()
        same(accumulator.to_operator().to_dense(), expected[KFACLinearOperator])


def test_data_parallel(two: Ranks) -> None:
    """Catches collectives of the wrapper in passes, and hooks on a module that nobody calls."""
    two(check_data_parallel)


class Sequence(nn.Module):
    """Layers on sequences, changed in place; attention; an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.LayerNorm(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embedding(x))
        # FSDP makes copies of arguments: equal ones would be one matrix, or three
        key, value = 1 * x, 2 * x
        return self.out((x + self.attention(x, key, value, need_weights=False)[0]).mean(1))


def check_fsdp() -> None:
    """Parameters that are sharded by fully_shard, of which some layers are units of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Sequence().double()
    data = [(torch.randint(7, (n, 5)), torch.randint(3, (n,))) for n in (2, 3, 1, 4)]
    case = Case(model, lambda reduction: nn.CrossEntropyLoss(reduction=reduction), data)
    group = dist.group.WORLD
    kinds = [
        (KFACLinearOperator, {"fisher_type": "type-2", "kfac_approx": "reduce"}),
        (KFACLinearOperator, {"fisher_type": "mc", "separate_weight_and_bias": False}),
        (EKFACLinearOperator, {"fisher_type": "empirical"}),
    ]
    expected = [case.operator(cls, **options).to_dense() for cls, options in kinds]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # FSDP does not like views that attention returns; nothing changes them in place here
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    for unit in (model.first, model.attention, model):
        fully_shard(unit, mesh=mesh)
    params, mine = dict(model.named_parameters()), part(data, [2])
    loss = case.loss("mean")
    for (cls, options), dense in zip(kinds, expected, strict=True):
        for fraction in (1.0, 0.0):
            K = cls(
                model, loss, params, mine, **options, process_group=group, worker_fraction=fraction
            )
            same(K.to_dense(), dense)
    accumulator = KFACAccumulator(
        model, loss, params, fisher_type="empirical", kfac_approx="reduce", process_group=group
    )
    for X, y in mine:
        with accumulator.observe(X, y):
            loss(model(X), y).backward()
    accumulator.to_operator()
    assert all(p.grad is not None for p in params.values())
    torch.optim.SGD(model.parameters(), 0.1).step()  # training goes on
    loss(model(mine[0][0]), mine[0][1]).backward()
    with pytest.raises(NotImplementedError, match=r"make_fx.*FSDP"):
        KFACLinearOperator(model, loss, params, mine, process_group=group, backend="make_fx")
    with pytest.raises(ValueError, match=r"same number of batches, but they have \[1, 3\]"):
        KFACLinearOperator(model, loss, params, part(data, [1]), process_group=group)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="this PyTorch's fully_shard does not run on the CPU, as that of PyTorch 2.6",
)
def test_fsdp(two: Ranks) -> None:
    """Catches layers that are not recognised, and gradients that lack their weights."""
    two(check_fsdp)
    two.stop()  # the sharded parameters' hooks stay in the process


class Chosen(nn.Module):
    """Tokens whose first feature is positive go through a hidden layer; the first axis may be T."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x[..., 0] > 0).flatten().nonzero()[:, 0]
        h = x.flatten(0, 1)
        h = h.index_add(0, keep, torch.tanh(self.hidden(h[keep])))
        return self.head(h.unflatten(0, x.shape[:2]).cumsum(0).sum(0))


def check_fsdp_looks() -> None:
    """The ranks' examples are in other places, and can be cut on one of the ranks only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Chosen().double()
    data = [(torch.randn(3, n, 3).double(), torch.arange(n) % 2) for n in (3, 2, 2, 3)]
    data[0][0][..., 0] = data[1][0][..., 0] = 1.0  # as many tokens of each example
    arguments = {"batch_size_fn": lambda x: x.shape[1], "fisher_type": "type-2"}
    loss = nn.CrossEntropyLoss()
    K = KFACLinearOperator(model, loss, dict(model.named_parameters()), data, **arguments)
    expected = K.to_dense()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (model.hidden, model):
        fully_shard(unit, mesh=mesh)
    params = dict(model.named_parameters())
    arguments["process_group"] = dist.group.WORLD
    K = KFACLinearOperator(model, loss, params, part(data, [2]), **arguments)
    same(K.to_dense(), expected)
    with pytest.raises(NotImplementedError, match=r"'hidden.weight' \(its layer's examples"):
        KFACLinearOperator(model, loss, params, part(data, [2]), kfac_approx="reduce", **arguments)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="this PyTorch's fully_shard does not run on the CPU, as that of PyTorch 2.6",
)
def test_fsdp_looks(two: Ranks) -> None:
    """Catches: ranks that evaluate the model more often than others, or raise alone."""
    two(check_fsdp_looks)
    two.stop()


def check_computer() -> None:
    """Computers give the factors of all data on each rank, or on the one that holds them."""
    case = network()
    expected = case.operator(HooksKFACComputer).compute()
    inputs, gradients, mapping = case.shared(HooksKFACComputer, [1]).compute()
    assert mapping == expected[2]
    for actual, reference in ((inputs, expected[0]), (gradients, expected[1])):
        assert list(actual) == list(reference)
        for key in reference:
            same(actual[key], reference[key])
    inputs, gradients, _ = case.shared(HooksKFACComputer, [1], worker_fraction=0.0).compute()
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, list(gradients))
    assert sorted(key for keys in everybody for key in keys) == sorted(expected[1])


def test_computer(two: Ranks) -> None:
    """The public computers take a process group, too."""
    two(check_computer)


def remote_messages() -> list[str]:
    """Return what is said about blocks that are elsewhere."""
    case = network()
    K = case.shared(KFACLinearOperator, [1], worker_fraction=0.0)
    messages = []
    for block, ranks in zip(K[1], K[1].holders, strict=True):
        if dist.get_rank() in ranks:
            continue
        for use in (lambda b: b @ torch.ones(b.shape[1]).double(), lambda b: b.trace()):
            with pytest.raises(RuntimeError, match=r"stored on rank\(s\).*gathered") as caught:
                use(block)
            messages.append(str(caught.value))
    with pytest.raises(NotImplementedError, match="gathered"):
        torch.save(K, "/dev/null")
    assert "on rank(s)" in K.summary()
    return messages


def test_remote_blocks(two: Ranks) -> None:
    """A block that is elsewhere says where, and how to get it."""
    assert all(two(remote_messages))


def check_names_of_blocks() -> None:
    """The rank that decomposes a block names its parameters, and the others name the rank."""
    case = network()
    K = case.shared(KFACLinearOperator, [1], worker_fraction=0.0)
    names = [list(group.values()) for group in K.mapping]
    index = names.index(["square.weight"])
    (owner,) = K[1].holders[index]
    if dist.get_rank() == owner:
        K.factors("square.weight")[0].neg_()
    message = (
        "The block of 'square.weight': Cannot invert factor 0"
        if dist.get_rank() == owner
        else rf"Rank\(s\) {owner} failed"
    )
    for invert in (K.inverse, (2 * K).inverse):
        with pytest.raises(RuntimeError, match=message):
            invert(1e-3)


def test_names_of_blocks(two: Ranks) -> None:
    """Catches the numbers of a rank's own blocks."""
    two(check_names_of_blocks)


def unsupported_on_one_rank() -> None:
    case = network()
    model = case.model
    if dist.get_rank() == 1:  # where the model uses a parameter in another way
        model.register_forward_hook(lambda m, x, y: y * m.out.weight.sum())
    case.shared(KFACLinearOperator, [1], check_deterministic=False)


def not_finite() -> None:
    case = network()
    if dist.get_rank() == 1:
        part(case.data, [1])[0][0].fill_(float("nan"))
    case.shared(KFACLinearOperator, [1], worker_fraction=0.0, check_deterministic=False)


def indefinite() -> None:
    case = network()
    K = case.shared(KFACLinearOperator, [1], worker_fraction=0.0)
    K.inverse(-1e9)
    K.inverse(lambda block: 1.0 if dist.get_rank() == 0 else float("nan"))


def random_on_one_rank() -> None:
    """The pass of the check is fine, and that of the factors is other than it was."""
    case = network()
    if dist.get_rank() == 1:
        case.model.register_forward_hook(lambda m, x, y: y * (0.5 + torch.rand(())))
    case.shared(KFACLinearOperator, [1])


def other_options() -> None:
    approx = ("expand", "reduce")[dist.get_rank()]
    with pytest.raises(RuntimeError, match=r"must build the same operator.*kfac_approx=expand"):
        network().shared(KFACLinearOperator, [1], kfac_approx=approx)


def test_other_options(two: Ranks) -> None:
    """Ranks that want different things are told so, before anything is computed."""
    two(other_options)


@pytest.mark.parametrize(
    "failing", [unsupported_on_one_rank, not_finite, indefinite, random_on_one_rank]
)
def test_failures(two: Ranks, failing: Any) -> None:
    """What one rank finds wrong ends in an error on all of them, well before the timeout."""
    answers = two.answers(failing, timeout=60)
    assert all(isinstance(answer, Failure) for answer in answers), answers
    assert not any("timed out" in answer.message.lower() for answer in answers)
    if failing is random_on_one_rank:
        assert "is not deterministic" in answers[1].message
    two.stop()


def check_groups_end() -> None:
    case = network()
    mine, args = part(case.data, [2]), (case.model, case.loss("mean"), case.params)

    def accumulated(**options: Any) -> Any:
        accumulator = KFACAccumulator(*args, **options)
        for batch in mine:
            accumulator.update(*batch)
        return accumulator, accumulator.to_operator()

    def multiplied(cls: Any, **options: Any) -> Any:
        operator = case.operator(cls, data=mine, **options)
        return operator, operator @ torch.ones(operator.shape[1], dtype=torch.float64)

    for make_holders in (
        partial(multiplied, GGNLinearOperator),
        partial(multiplied, GGNDiagonalLinearOperator, mc_samples=2),
        partial(multiplied, KFACLinearOperator, worker_fraction=0.0),
        partial(multiplied, EKFACLinearOperator, backend="make_fx"),
        partial(multiplied, KFOCLinearOperator),
        accumulated,
    ):
        group = dist.new_group()
        alive = weakref.ref(group)
        holders = make_holders(process_group=group)
        dist.destroy_process_group(group)
        del group
        assert alive() is None, make_holders
        del holders


def test_groups_end(two: Ranks) -> None:
    """Groups end when they are destroyed, though operators are alive.

    Threads of gloo that are alive when a process ends abort it now and then.
    """
    two(check_groups_end)


def test_bad_arguments() -> None:
    """Wrong arguments are refused in a single process."""
    case = network()
    with pytest.raises(TypeError, match="process_group must be"):
        case.operator(KFACLinearOperator, process_group="all")
    with pytest.raises(ValueError, match="worker_fraction must be between 0 and 1"):
        case.operator(KFACLinearOperator, worker_fraction=2.0)
    K = case.operator(KFACLinearOperator)
    assert gathered(K) is K
