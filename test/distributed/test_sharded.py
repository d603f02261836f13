"""Blocks that are spread over processes: who holds them, who computes, and what is sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_ranks import Ranks, collectives
from torch import Tensor

from curvlinops import (
    BlockDiagonalLinearOperator,
    KroneckerProductLinearOperator,
    PyTorchLinearOperator,
)
from curvlinops.distributed import ProcessGroupCollective
from curvlinops.sharded import RemoteBlock, ShardedBlockDiagonalLinearOperator, gathered

SHAPES = [(2, 2), (3,), (2, 3), (4,), (1, 2), (2, 2), (3, 1)]
SIZES = [4, 3, 6, 4, 2, 4, 3]


def holders_of() -> list[list[int]]:
    """Return the ranks that hold each block, its owner first: all, one, or some, in any order."""
    size = dist.get_world_size()
    of_three = [[0, 1, 2], [1], [2, 0], [2], [0], [1, 2], [2, 1, 0]]
    return [[r for r in ranks if r < size] or [0] for ranks in of_three]


def plain(seed: int = 0, definite: bool = False) -> BlockDiagonalLinearOperator:
    """Return a block-diagonal operator, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)

    def factor(d: int) -> Tensor:
        matrix = torch.randn(d, d, dtype=torch.float64, generator=generator)
        return matrix @ matrix.T + torch.eye(d) if definite else matrix

    blocks = [KroneckerProductLinearOperator(*map(factor, shape)) for shape in SHAPES]
    return BlockDiagonalLinearOperator(blocks)


def sharded(
    whole: BlockDiagonalLinearOperator, holders: list[list[int]] | None = None
) -> ShardedBlockDiagonalLinearOperator:
    """Spread blocks over the ranks; where they are not held, there are others."""
    holders = holders_of() if holders is None else holders
    collective = ProcessGroupCollective(dist.group.WORLD)
    blocks = [
        block if dist.get_rank() in ranks else torch.nan * block
        for block, ranks in zip(whole, holders, strict=True)
    ]
    return ShardedBlockDiagonalLinearOperator(blocks, holders, collective)


def assert_held(operator: Any, holders: list[list[int]]) -> None:
    """Each rank has its blocks, and no others."""
    assert isinstance(operator, ShardedBlockDiagonalLinearOperator)
    here = [not isinstance(block, RemoteBlock) for block in operator]
    assert here == [dist.get_rank() in ranks for ranks in holders]


def same(actual: Tensor, expected: Tensor) -> None:
    """Compare; the same bits are on all ranks."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, actual)
    assert all(torch.equal(actual, other) for other in everybody)


def check_products() -> None:
    """Blocks that are not symmetric, in all directions."""
    B, C = plain(), plain(1)
    S, T, holders = sharded(B), sharded(C), holders_of()
    assert_held(S, holders)
    for K in (1, 3):
        X = torch.rand(B.shape[1], K, dtype=torch.float64)
        same(S @ X, B @ X)
        same(X.T @ S, X.T @ B)
        for actual, expected in ((S.adjoint(), B.adjoint()), (S @ T, B @ C), (S + T, B + C)):
            assert_held(actual, holders)
            same(actual @ X, expected @ X)
            same(X.T @ actual, X.T @ expected)
        same((2 * S - T @ S) @ X, (2 * B - C @ B) @ X)
    other = sharded(C, [*holders[1:], holders[0]])  # other ranks hold the same places
    same((S + other) @ X, (B + C) @ X)
    same((S @ other) @ X, B @ (C @ X))
    same(copy.deepcopy(S) @ X, B @ X)


def check_closed_forms() -> None:
    """Each form needs all blocks, and signs of both kinds."""
    B = plain(2)
    S = sharded(B)
    signs = [block.slogdet()[0].item() for block in B]
    assert signs[0] != B.slogdet()[0] and 0 < signs.count(-1) < len(signs)
    for form in ("trace", "diagonal", "frobenius_norm", "det"):
        same(getattr(S, form)(), getattr(B, form)())
    for actual, expected in zip(S.slogdet(), B.slogdet(), strict=True):
        same(actual, expected)


def check_decompositions() -> None:
    """The owner of a block decomposes it, and all its holders get the result."""
    B = plain(definite=True)
    S, holders = sharded(B), holders_of()
    dampings = [0.1 * i for i in range(len(B))]
    forms: list[Any] = [
        lambda A: A.inverse(dampings),
        lambda A: A.inverse(lambda block: block.trace() / block.shape[0]),
        lambda A: A.inverse(0.3, use_exact_damping=True),
        lambda A: A.eigh(),
        lambda A: A.power(-0.5),
        lambda A: A.pinv(),
        lambda A: (A + 0.5 * A**0).inverse(),
    ]
    for form in forms:
        actual = form(S)
        assert_held(actual, holders)
        same(actual.to_dense(), form(B).to_dense())
    own = [ranks[0] for ranks in holders].count(dist.get_rank())
    calls: list[int] = []

    def inverse(block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        calls.append(1)
        return block.inverse()

    with sent() as numbers:
        S._decomposed(inverse)
    assert len(calls) == own
    wanted = [i for i, ranks in enumerate(holders) if len(ranks) > 1]  # by other holders
    mine = [i for i in wanted if holders[i][0] == dist.get_rank()]
    assert sum(numbers) == sum(d**2 for i in mine for d in SHAPES[i])


@contextmanager
def sent() -> Iterator[list[int]]:
    """Yield a list that fills with how many numbers this rank broadcasts."""
    sizes: list[int] = []
    original = dist.broadcast

    def broadcast(tensor: Tensor, src: int, **options: Any) -> Any:
        if src == dist.get_rank():
            sizes.append(tensor.numel())
        return original(tensor, src=src, **options)

    dist.broadcast = broadcast
    try:
        yield sizes
    finally:
        dist.broadcast = original


def check_communication() -> None:
    """Owners send what somebody lacks, at once; where all hold all, nothing is sent."""
    B = plain()
    S, holders, size = sharded(B), holders_of(), dist.get_world_size()
    X = torch.rand(B.shape[1], 5, dtype=torch.float64)
    with sent() as numbers, collectives() as seen:
        S @ X
    own = [i for i, ranks in enumerate(holders) if ranks[0] == dist.get_rank()]
    assert numbers == [5 * sum(SIZES[i] for i in own if len(holders[i]) < size)]
    assert seen == ["allgather"] + ["broadcast"] * size
    everywhere = [[(i + j) % size for j in range(size)] for i in range(len(B))]
    S = sharded(B, everywhere)
    with collectives() as seen:
        product, trace = S @ X, S.trace()
    assert not seen
    same(product, B @ X)
    same(trace, B.trace())
    assert_held(S.inverse(), everywhere)
    same(S.inverse() @ X, B.inverse() @ X)
    with sent() as numbers:
        local = gathered(S)
    assert not numbers and type(local) is BlockDiagonalLinearOperator
    same(local @ X, B @ X)


def check_gathered() -> None:
    """Operators that were made of a sharded one are local, whatever is around it."""
    B = plain(definite=True)
    S = sharded(B)
    X = torch.rand(B.shape[1], 2, dtype=torch.float64)
    for form in (lambda A: A, lambda A: A.inverse(0.1), lambda A: A.eigh(), lambda A: A @ A.T):
        local = gathered(form(S))
        assert type(local) is BlockDiagonalLinearOperator
        with collectives() as seen:
            product = local @ X
        assert not seen
        same(product, form(B) @ X)
    nested = gathered(sharded(B) + sharded(plain(1), [*holders_of()[1:], [0]]))
    with collectives() as seen:
        product = nested @ X
    assert not seen
    same(product, (B + plain(1)) @ X)
    assert gathered(B) is B and gathered("text") == "text"
    with pytest.raises(NotImplementedError, match=r"sharded\.gathered"):
        pickle.dumps(S)


class Brittle(PyTorchLinearOperator):
    """A block without closed forms that cannot multiply."""

    SELF_ADJOINT = True
    dtype = torch.float64

    def _matmat(self, X: Any) -> Any:
        raise ArithmeticError("planted")

    def _entrywise_squares(self) -> Any:
        raise ArithmeticError("planted")


def check_failures() -> None:
    """What one rank cannot do ends in an error on all of them; then they go on."""
    whole = plain(definite=True)
    rank, holders = dist.get_rank(), holders_of()
    X = torch.rand(whole.shape[1], 1, dtype=torch.float64)
    for place in (1, 3):  # of which one rank is the only holder
        (owner,) = holders[place]
        blocks = whole.blocks
        blocks[place] = Brittle([(SIZES[place],)], [(SIZES[place],)])
        S = sharded(BlockDiagonalLinearOperator(blocks)) if rank == owner else sharded(whole)

        def damping(block: Any) -> float:
            if isinstance(block, Brittle):
                raise ArithmeticError("planted")
            return 0.1

        calls: list[Any] = [
            (ArithmeticError, lambda S=S: S @ X),
            (NotImplementedError, lambda S=S: S.inverse()),
            (NotImplementedError, lambda S=S: S.trace()),
            (ArithmeticError, lambda S=S, damping=damping: S.inverse(damping)),
        ]
        for kind, call in calls:
            expected = kind if rank == owner else RuntimeError
            text = None if rank == owner else rf"Rank\(s\) {owner} failed"
            with pytest.raises(expected, match=text):
                call()
            same(sharded(whole).trace(), whole.trace())


def check_columns() -> None:
    """Other numbers of columns on one rank: each rank raises, and nobody gets wrong numbers.

    A rank that owns nothing would otherwise take what is sent for the head of its own buffer.
    """
    B = plain()
    X = torch.rand(B.shape[1], 2, dtype=torch.float64)
    for given in (holders_of(), [[0], [1], [1], [0], [0], [1], [0]]):
        S = sharded(B, given)
        size = dist.get_world_size()
        for odd in range(size):
            K = 5 if dist.get_rank() == odd else 2
            with pytest.raises(RuntimeError, match="differs in size") as info:
                S @ torch.rand(S.shape[1], K, dtype=torch.float64)
            others = ", ".join(str(r) for r in range(size) if r != odd)
            assert f"130 numbers on rank(s) {odd}" in str(info.value)
            assert f"52 numbers on rank(s) {others}" in str(info.value)
            assert "same number of columns" in str(info.value)
            same(S @ X, B @ X)


CHECKS = [
    check_products,
    check_closed_forms,
    check_decompositions,
    check_communication,
    check_gathered,
    check_failures,
    check_columns,
]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(two: Ranks, check: Any) -> None:
    """Catches: blocks of others, mixed up, sent or decomposed needlessly; ranks that wait."""
    two(check)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_three_ranks(three: Ranks, check: Any) -> None:
    """Some of the ranks hold a block, and some own none."""
    three(check)


def check_names() -> str:
    """Return what a rank of a group says about a block of another one."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ""
    whole = plain()
    holders = [[0]] * len(whole)  # rank 1 of all
    S = ShardedBlockDiagonalLinearOperator(list(whole), holders, ProcessGroupCollective(group))
    if dist.get_rank() == 1:
        return repr(S[0])
    with pytest.raises(RuntimeError) as info:
        S[0].trace()
    again = 2 * S
    with pytest.raises(AttributeError, match=r"rank\(s\) \[1\]"):
        _ = again[0].factors
    return str(info.value)


@pytest.mark.slow
def test_names_of_ranks(three: Ranks) -> None:
    """Ranks have the numbers that users know, not those within the group."""
    _, held, remote = three(check_names)
    assert "Kron" in held
    assert "stored on rank(s) [1]" in remote
