"""How layers use parameters: what usages are as keys, and which tensors are parameters."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import torch

from curvlinops.computers.formats import Format
from curvlinops.computers.usages import Parameters, Part, Usage, tensors_in

USAGE = Usage(Format(), Part("weight", 0, 3, 3), Part("bias", 0, 3, 3))


def test_equal_usages_are_the_same_key() -> None:
    """Also if the hash of one was computed before, and it is what another was made from."""
    table = {USAGE: 1}
    other = replace(USAGE, bias=None)
    assert table[copy.deepcopy(USAGE)] == 1
    assert other not in table
    assert hash(replace(other, bias=USAGE.bias)) == hash(USAGE)
    assert hash(other) != hash(USAGE)


def test_hashes_do_not_travel_to_other_processes() -> None:
    """There, names have other hashes."""
    assert hash(USAGE) == hash(copy.copy(USAGE))
    loaded = pickle.loads(pickle.dumps(USAGE))
    assert vars(loaded).keys() == {"format", "weight", "bias"}
    assert loaded == USAGE


def test_tensors_that_share_memory_with_parameters() -> None:
    """In any nesting; views do, copies and neighbours in the same memory do not."""
    memory = torch.arange(6.0)
    p, q = memory[:3], memory[3:]
    params = Parameters({"p": p, "q": q})
    view, copied = p.view(1, 3).T, p.clone()
    found = params.sharing([copied, (view,)], {"a": {"b": q[1:]}, "c": 1}, "text", None)
    assert [id(x) for x in found[:1]] == [id(view)]
    assert len(found) == 2
    assert params.involved(found[0]) == {"p"}
    assert params.involved(*found) == {"p", "q"}
    assert params.sharing(copied, [memory.clone()]) == []


def test_tensors_in_order() -> None:
    """They are found in the order in which they are given."""
    a, b, c = (torch.zeros(i) for i in range(3))
    found = tensors_in([a, 1, [b, {"x": c, "y": {}}], "text"])
    assert [id(x) for x in found] == [id(a), id(b), id(c)]
