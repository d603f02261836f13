"""The harness itself: results, failures, hangs, and counts of collectives."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_ranks import Failure, HangError, Ranks, collectives


def total(value: float) -> float:
    with collectives() as seen:
        x = torch.tensor(value * (1 + dist.get_rank()))
        dist.all_reduce(x)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, dist.get_rank())
    assert everybody == list(range(dist.get_world_size()))
    assert seen[0] == "allreduce" and "allreduce" not in seen[1:]
    assert "allgather" in seen[1:]
    return float(x)


def fail(who: int) -> int:
    if dist.get_rank() == who:
        raise KeyError("planted")
    return 5


def sleep(seconds: float) -> None:
    time.sleep(seconds * dist.get_rank())


def test_results_and_failures(two: Ranks) -> None:
    """Catches a harness whose ranks do not communicate, or that loses failures or hangs."""
    assert two(total, 2.0) == [6.0, 6.0]
    first, second = two.answers(fail, 1)
    assert first == 5
    assert isinstance(second, Failure) and second.kind == "KeyError"
    with pytest.raises(AssertionError, match=r"On rank 1:\n(.*\n)*.*planted"):
        two(fail, 1)
    assert two(total, 1.0) == [3.0, 3.0]  # started anew
    with pytest.raises(HangError, match=r"rank\(s\) \[1\]"):
        two.answers(sleep, 60.0, timeout=1.0)
    assert two(total, 1.0) == [3.0, 3.0]
