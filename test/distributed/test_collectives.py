"""Collectives, exact sums of numbers in float32, and parts of a data set."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_ranks import Ranks, collectives
from torch import Tensor

from curvlinops import ShardSampler
from curvlinops.distributed import Collective, ProcessGroupCollective, Share, add_shares
from curvlinops.distributed.exact import float_digits, float_of, integer_digits, integer_of

# Numbers


def added(values: list[float]) -> float:
    """Send numbers as an all-reduce in float32 would."""
    digits = torch.stack([torch.tensor(float_digits(x), dtype=torch.float32) for x in values])
    return float_of(digits.sum(0).tolist())


def test_sums_of_floats_are_exact() -> None:
    """The sum is rounded once. Catches digits that are lost, carries, signs, wrong powers."""
    rng = random.Random(0)
    tiny, huge = 5e-324, 1.7976931348623157e308
    cases = [[0.1, 0.2, 0.3], [huge, -huge, tiny], [tiny] * 5, [1e20, -1e20, 0.1], [0.0, -0.0]]
    cases += [
        [rng.uniform(-1, 1) * 2.0 ** rng.randint(-80, 80) for _ in range(64)] for _ in range(50)
    ]
    cases += [[2.0**24 + 1.0] * 3]
    for values in cases:
        assert added(values) == float(sum(map(Fraction, values)))
    assert added([huge, huge]) == math.inf and added([-huge, -huge]) == -math.inf
    ranks = 65793
    digits = torch.tensor(float_digits(2.0**53 - 1.0), dtype=torch.float32) * ranks
    assert float_of(digits.tolist()) == float(ranks * (2**53 - 1))


def test_what_is_not_finite() -> None:
    """It survives, as in a sum of floats."""
    assert math.isnan(added([1.0, math.nan, 3.0]))
    assert added([1.0, math.inf]) == math.inf
    assert added([-math.inf, 1.0]) == -math.inf
    assert math.isnan(added([math.inf, -math.inf]))


def test_integers() -> None:
    """Signs and carries."""
    for values in ([2**40 + 1, 3], [255, 1], [-5, 7], [2**63, 2**63 - 1]):
        digits = torch.tensor([integer_digits(x) for x in values], dtype=torch.float32)
        assert integer_of(digits.sum(0).tolist()) == sum(values)


# Collectives


def test_alone() -> None:
    """One process says nothing, and gets what it gives."""
    alone = Collective()
    x = torch.ones(2, dtype=torch.bfloat16)
    assert alone.sum([x])[0] is x and alone.all_reduce(x) is x
    assert (alone.prefix(5), alone.any(True), alone.any(False)) == (0, True, False)
    assert (alone.exchange([1, 2]), alone.gather("a")) == ([[1, 2]], ["a"])
    with alone.together():
        pass
    with pytest.raises(KeyError), alone.together():
        raise KeyError("planted")


def check_methods() -> None:
    collective = ProcessGroupCollective(dist.group.WORLD)
    r, R = dist.get_rank(), dist.get_world_size()
    assert (collective.rank, collective.size, collective.alone) == (r, R, False)
    assert collective.prefix(10 + r) == sum(10 + i for i in range(r))
    assert [collective.any(r == i) for i in (0, R - 1, R)] == [True, True, False]
    big = 2**62 + r
    assert collective.exchange([big, -r]) == [[2**62 + i, -i] for i in range(R)]
    assert collective.gather({"rank": r}) == [{"rank": i} for i in range(R)]


def check_sum() -> None:
    collective = ProcessGroupCollective(dist.group.WORLD, torch.device("cpu"))
    r, R = dist.get_rank(), dist.get_world_size()
    half = torch.full((2, 3), 256.0, dtype=torch.bfloat16) + 2 * r  # 256 + 258 has 9 bits
    integer = torch.tensor([2**60 + r])
    flag = torch.tensor(r == 0)
    double = torch.arange(3.0, dtype=torch.float64).expand(2, 3).mT * 0.1
    given = [half, integer, flag, double]
    sums = collective.sum(given)
    assert [t.dtype for t in sums] == [torch.float32, torch.int64, torch.int64, torch.float64]
    assert torch.equal(sums[0], torch.full((2, 3), 256.0 * R + R * (R - 1)))
    assert sums[1].item() == R * 2**60 + R * (R - 1) // 2 and sums[2].item() == 1
    assert torch.allclose(sums[3], R * double, 1e-15)
    assert integer.item() == 2**60 + r  # the summands are left alone
    for without in range(R):  # a rank without data
        sums = collective.sum([] if r == without else given)
        assert [t.shape for t in sums] == [t.shape for t in given]
        assert torch.allclose(sums[3], (R - 1) * double, 1e-15)
    assert collective.sum([]) == []
    for other in (torch.zeros(2, 2), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="differ between ranks"):
            collective.sum([other if r == 1 else torch.zeros(3)])


def check_together() -> None:
    collective = ProcessGroupCollective(dist.group.WORLD)
    r = dist.get_rank()
    with collectives() as seen, collective.together(5):
        pass
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="What ranks send differs in size"):  # noqa: SIM117
        with collective.together(5 + r):
            pass
    expected = KeyError if r == 0 else RuntimeError
    with pytest.raises(expected, match=r"planted|Rank\(s\) 0 failed"), collective.together(5 + r):
        _ = [{}["planted"] for _ in range(r == 0)]
    for failing in ([0], [1], [0, 1]):
        expected = KeyError if r in failing else RuntimeError
        with pytest.raises(expected) as info, collective.together():
            _ = [{}["planted"] for failing_rank in failing if failing_rank == r]
        if r not in failing:
            assert f"Rank(s) {', '.join(map(str, failing))} failed" in str(info.value)


def check_shares() -> None:
    """Numbers are exact although all is sent in float32, by one all-reduce."""
    collective = ProcessGroupCollective(dist.group.WORLD)
    r, R = dist.get_rank(), dist.get_world_size()
    shapes, dtypes = [torch.Size((2, 2)), torch.Size(())], [torch.bfloat16] * 2
    tensors = [torch.full((2, 2), 1.0 + r), torch.tensor(3.0)]  # half precision, accumulated
    given = [0.1, 2.0**40 + 2.0**-12][r % 2]
    share = Share(list(tensors), 2**40 + r, given)
    with collectives() as seen:
        total = add_shares(collective, share, shapes, dtypes, torch.device("cpu"))
    assert seen == ["allreduce"]
    assert [t.dtype for t in total.tensors] == [torch.float32] * 2
    assert torch.equal(total.tensors[0], torch.full((2, 2), R + R * (R - 1) / 2))
    assert total.num_examples == R * 2**40 + R * (R - 1) // 2
    assert total.normalizer == float(R // 2 * (Fraction(0.1) + Fraction(2.0**40 + 2.0**-12)))
    error = KeyError("planted") if r == R - 1 else None
    with collectives() as seen, pytest.raises((KeyError, RuntimeError)) as info:
        add_shares(collective, Share(error=error), shapes, dtypes, torch.device("cpu"))
    assert seen == ["allreduce"]
    assert info.value is error or f"Rank(s) {R - 1} failed" in str(info.value)


def check_sizes() -> None:
    """Large sums take one all-reduce too, once their size is known; other sizes are an error."""
    collective = ProcessGroupCollective(dist.group.WORLD)
    r, R = dist.get_rank(), dist.get_world_size()

    def add(size: int, error: Exception | None = None) -> tuple[Tensor, int]:
        values = torch.arange(1.0, size + 1) * (1 + r)
        share = Share([] if error else [values], 1, 0.5, error)
        shape = torch.Size((size,))
        with collectives() as seen:
            total = add_shares(collective, share, [shape], [values.dtype], torch.device("cpu"))
        assert set(seen) == {"allreduce"} and total.num_examples == R and total.normalizer == R / 2
        return total.tensors[0], len(seen)

    # small ones, larger ones than before, as large ones, smaller ones
    for size, calls in ((3, 1), (1024, 1), (1025, 2), (1025, 1), (5000, 2), (5000, 1), (4, 1)):
        total, number = add(size)
        assert torch.equal(total, torch.arange(1.0, size + 1) * (R * (R + 1) / 2))
        assert number == calls
    assert add(5000)[1] == 2  # there was room for fewer
    for sizes in ((3, 4), (3, 5000), (7000, 3), (5000, 5001)):
        for odd in range(R):
            size = sizes[r == odd]
            with pytest.raises(RuntimeError, match="What ranks add differs in size") as info:
                add(size)
            assert f"{sizes[1]:,} numbers on rank(s) {odd}" in str(info.value)
            assert "same number of columns" in str(info.value)
            with pytest.raises((KeyError, RuntimeError)) as info:  # is more important
                add(size, KeyError("planted") if r == 0 else None)
            assert r == 0 or "Rank(s) 0 failed" in str(info.value)
    assert add(5000)[1] == 1  # nothing was noted of what failed


def check_sizes_that_float32_rounds() -> None:
    """Catches sizes that are sent as one number."""
    collective = ProcessGroupCollective(dist.group.WORLD)
    size = 2**24 + dist.get_rank()
    share = Share(error=None)
    with pytest.raises(RuntimeError, match=r"16,777,216 numbers on rank.*; 16,777,217 numbers"):
        add_shares(collective, share, [torch.Size((size,))], [torch.float32], torch.device("cpu"))


CHECKS = [check_methods, check_sum, check_together, check_shares, check_sizes]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(two: Ranks, check: Any) -> None:
    """Each catches what its assertions say."""
    two(check)


@pytest.mark.slow
def test_large_sizes(two: Ranks) -> None:
    """Sizes are exact however large they are."""
    two(check_sizes_that_float32_rounds)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(four: Ranks, check: Any) -> None:
    """The same on more ranks."""
    four(check)


# ShardSampler


@pytest.mark.parametrize("shuffle", [False, True])
def test_parts(shuffle: bool) -> None:
    """Every example once, in order; sizes differ by one at most.

    Catches repeated and missing examples, and other orders on other ranks.
    """
    for N in range(12):
        for R in range(1, 6):
            samplers = [ShardSampler(range(N), R, r, shuffle=shuffle) for r in range(R)]
            parts = [list(sampler) for sampler in samplers]
            assert [len(p) for p in parts] == [len(sampler) for sampler in samplers]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            joined = [i for p in parts for i in p]
            assert sorted(joined) == list(range(N))
            assert joined == list(ShardSampler(range(N), 1, 0, shuffle=shuffle))
            if not shuffle:
                assert joined == list(range(N))


def test_shuffling() -> None:
    """Depends on seed and epoch, on nothing else, and leaves the global generator alone."""

    def order(seed: int = 0, epoch: int = 0) -> list[int]:
        sampler = ShardSampler(range(50), 1, 0, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    state = torch.get_rng_state()
    first = order()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert first == order() and first != list(range(50))
    assert first != order(seed=1) and first != order(epoch=1)
    sampler = ShardSampler(range(50), 1, 0, shuffle=True)
    assert list(sampler) == list(sampler)  # within an epoch, the order is fixed


def test_sampler_arguments() -> None:
    """Without torch.distributed, ranks must be given."""
    for given in ({}, {"rank": 0}, {"num_replicas": 2}):
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
            ShardSampler(range(3), **given)
    for num_replicas, rank in ((2, 2), (2, -1), (0, 0)):
        with pytest.raises(ValueError, match="below num_replicas"):
            ShardSampler(range(3), num_replicas, rank)
