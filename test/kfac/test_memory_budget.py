"""Memory of Kronecker factors: what is promised before, and passes that keep within a budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kfac_cases import setup
from torch import Tensor, nn

from curvlinops import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    Precision,
    PyTorchLinearOperator,
)
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.memory import GroupMemory, MemoryPlan, split_into_passes

WIDTHS = (20, 30, 10, 40, 3)
#: What is stored takes half as much as what is computed, so that several passes save memory.
HALF = Precision(storage=torch.bfloat16)


def problem() -> tuple[Any, ...]:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    model = nn.Sequential(*layers)
    data = [(torch.rand(n, WIDTHS[0]), torch.rand(n, WIDTHS[-1])) for n in (5, 2)]
    return model, nn.MSELoss(), dict(model.named_parameters()), data


def test_plan_of_kfac() -> None:
    """The bytes are those of the tensors that the operator will hold."""
    args = problem()
    plan = KFACLinearOperator.plan(*args)
    K = KFACLinearOperator(*args)
    names = [tuple(group.values()) for group in K.mapping]
    assert [row.names for row in plan.rows] == names
    for row in plan.rows:
        held = sum(factor.nbytes for factor in K.factors(row.names[0]))
        assert (row.factors, row.stored, row.decompositions) == (held, held, held)
    assert plan.passes == [list(range(8))]
    assert plan.stored == sum(row.stored for row in plan.rows)
    # inputs and output gradients of five examples
    assert plan.rows[0].working_set == 4 * 5 * (20 + 30)
    assert plan.peak == plan.stored + max(row.working_set for row in plan.rows)
    lines = str(plan).splitlines()
    assert lines[0].split()[:2] == ["parameters", "factors"]
    assert lines[2].split()[0] == "0.weight" and lines[-1].endswith("in 1 pass")


def test_plan_of_ekfac() -> None:
    """Eigenvectors and eigenvalues are counted, in the dtypes in which they are held."""
    args = problem()
    precision = Precision(factors=torch.float64)
    plan = EKFACLinearOperator.plan(*args, separate_weight_and_bias=False, precision=precision)
    E = EKFACLinearOperator(*args, separate_weight_and_bias=False)
    for row in plan.rows:
        eigenvalues = E.block(row.names[0]).eigenvalues  # type: ignore[attr-defined]
        held = eigenvalues.nbytes + sum(Q.nbytes for Q in E.factors(row.names[0]))
        assert (row.stored, row.decompositions) == (held, 2 * held)
        assert row.computed == row.factors + row.decompositions


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "joint": (KFACLinearOperator, {"separate_weight_and_bias": False}),
    "reduce": (KFACLinearOperator, {"kfac_approx": "reduce", "fisher_type": "type-2"}),
    "ekfac": (EKFACLinearOperator, {"fisher_type": "mc"}),
    "make_fx": (EKFACLinearOperator, {"fisher_type": "empirical", "backend": "make_fx"}),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case)
        for kind in KINDS
        for case in ("cnn", "attention", "tied-one", "sometimes", "tokens")
        if (kind, case) != ("joint", "tied-one")  # one of its layers has no bias
    ],
)
def test_passes(kind: str, case: str) -> None:
    """With the smallest budget that is accepted, results are the same, in several passes.

    Catches: groups that are forgotten or have the moments of others, other samples in later passes.
    """
    cls, options = KINDS[kind]
    args = setup(case, "mse").kwargs(**options)
    expected = cls(**args)
    whole = cls.plan(**args)
    budget = whole.peak
    while True:  # down to the smallest one
        try:
            plan = cls.plan(**args, memory_budget=int(0.95 * budget))
        except ValueError:
            break
        budget = int(0.95 * budget)
        assert plan.peak <= budget
    plan = cls.plan(**args, memory_budget=budget)
    assert sorted(i for part in plan.passes for i in part) == list(range(len(plan.rows)))
    actual = cls(**args, memory_budget=budget)
    assert torch.allclose(actual.to_dense(), expected.to_dense(), rtol=1e-12, atol=1e-14)
    assert actual.summary() == expected.summary()


def test_number_of_passes() -> None:
    """There are as many passes over the data as planned, and one before them."""
    args = problem()
    passes: list[int] = []

    class Data(list[Any]):
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    args = (*args[:3], Data(args[3]))
    kwargs: dict[str, Any] = {"check_deterministic": False, "num_data": 7, "precision": HALF}
    plan = KFACLinearOperator.plan(*args, **kwargs, memory_budget=21500)
    assert len(plan.passes) == 3
    for budget, expected in ((None, 1), (21500, 4)):
        passes.clear()
        KFACLinearOperator(*args, **kwargs, memory_budget=budget)
        assert len(passes) == expected


def test_held_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass holds the moments of its groups only."""
    args = problem()
    held: list[int] = []
    original = HooksKFACComputer.add_over_ranks

    def note(self: Any, statistic: Any) -> None:
        held.append(sum(moment.total.nbytes for moment in statistic.moments.values()))
        original(self, statistic)

    monkeypatch.setattr(HooksKFACComputer, "add_over_ranks", note)
    plan = KFACLinearOperator.plan(*args, memory_budget=21500, precision=HALF)
    KFACLinearOperator(*args, memory_budget=21500, precision=HALF)
    assert len(held) == len(plan.passes) == 3
    for part, bytes_held in zip(plan.passes, held, strict=True):
        # a bias shares its gradient factor with its weight
        weights = [plan.rows[i] for i in part if plan.rows[i].names[0].endswith("weight")]
        assert bytes_held == sum(row.factors for row in weights)


def test_budget_too_small() -> None:
    """The error names the layer, what it needs, and what to do."""
    args = problem()
    with pytest.raises(ValueError, match=r"memory_budget=9,000 bytes is too small: \['0\.weight"):
        KFACLinearOperator(*args, memory_budget=9000)
    with pytest.raises(ValueError, match=r"Precision\(device='cpu'\)"):
        EKFACLinearOperator.plan(*args, memory_budget=1)
    with pytest.raises(ValueError, match="memory_budget"):
        KFACLinearOperator(*args, memory_budget=0)
    with pytest.raises(ValueError, match="has no memory_budget"):
        KFOCLinearOperator(*args, memory_budget=10**9)
    with pytest.raises(ValueError, match="backend must be one of"):
        KFACLinearOperator.plan(*args, backend="guess")


# --------------------------------------------------------------------------------------------------
# Numbers of bytes, by hand
# --------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Tokens, channel groups, a tied weight, and a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.mix = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embedding(x).mT)).mT  # [n, 5, 6]
        return nn.functional.linear(self.mix(x) * self.scale, self.embedding.weight).mean(1)


def net() -> dict[str, Any]:
    model = Net()
    data = [(torch.randint(7, (n, 6)), torch.rand(n, 7)) for n in (3, 5, 2)]
    return {
        "model_func": model,
        "loss_func": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        "data": data,
        "unsupported": "diagonal",
        # model, factors and what is stored have 4, 8 and 2 bytes
        "precision": Precision(factors=torch.float64, storage=torch.bfloat16),
    }


ROWS = 5 * 5  # of the largest batch, with 5 positions after the convolution
KFAC_ENTRIES = {
    "embedding.weight": 7**2 + 4**2,  # as a linear layer from 4 to 7, and as an embedding
    "conv.weight": 2 * (3**2 + 4**2),
    "conv.bias": 6**2,
    "mix.weight": 6**2 + 4**2,
    "mix.bias": 4**2,
}
WORKING_SETS = {
    "embedding.weight": 4 * 5 * 6 * (7 + 4),  # the embedding has more positions than the linear map
    "conv.weight": 4 * ROWS * (2 * 4 + 6),
    "conv.bias": 4 * ROWS * 6,
    "mix.weight": 4 * ROWS * (6 + 4),
    "mix.bias": 4 * ROWS * 4,
}
EIGENVALUES = {
    "embedding.weight": 7 * 4,
    "conv.weight": 2 * 3 * 4,
    "conv.bias": 6,
    "mix.weight": 4 * 6,
    "mix.bias": 4,
}


def test_bytes_of_kfac() -> None:
    """Each number is that of its dtype; the operator holds what was promised."""
    plan = KFACLinearOperator.plan(**net())
    K = KFACLinearOperator(**net())
    rows = {row.names[0]: row for row in plan.rows}
    assert list(rows) == [name for group in K.mapping for name in group.values()]
    for name, entries in KFAC_ENTRIES.items():
        row = rows[name]
        held = (row.factors, row.decompositions, row.stored, row.computed)
        assert held == (8 * entries, 2 * entries, 2 * entries, 8 * entries)
        assert row.working_set == WORKING_SETS[name]
        assert _bytes(K.block(name)) == row.stored
    # the diagonal of the GGN is computed in the model's dtype
    assert rows["scale"] == GroupMemory(("scale",), 0, 0, 2 * 4, 0, 4 * 4)
    assert plan.stored == sum(row.stored for row in plan.rows) == _bytes(K[1])


def test_bytes_of_ekfac() -> None:
    """Factors and decompositions are held at once while eigenvalues are computed."""
    arguments = net()
    plan = EKFACLinearOperator.plan(**arguments)
    E = EKFACLinearOperator(**arguments)
    rows = {row.names[0]: row for row in plan.rows}
    for name, matrices in KFAC_ENTRIES.items():
        row, entries = rows[name], matrices + EIGENVALUES[name]
        held = (row.factors, row.decompositions, row.stored, row.computed)
        assert held == (8 * matrices, 8 * entries, 2 * entries, 8 * (matrices + entries))
        assert row.working_set == WORKING_SETS[name]
        assert _bytes(E.block(name)) == row.stored


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("limit", [3, 4, 6, 8])
def test_bytes_of_diagonals(limit: int, approx: str) -> None:
    """Wide factors, and counts of tokens, are diagonals; just as wide ones are not."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 8, bias=False), nn.Flatten())
    data = [(torch.randint(6, (3, 2)), torch.rand(3, 16))]
    arguments: Any = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    options: dict[str, Any] = {"max_factor_size": limit, "kfac_approx": approx}
    plan = KFACLinearOperator.plan(*arguments, **options)
    K = KFACLinearOperator(*arguments, **options)

    def entries(width: int, tokens: bool = False) -> int:
        return width if width > limit or tokens else width**2

    tokens = entries(6, tokens=approx == "expand")
    assert [row.stored for row in plan.rows] == [
        4 * (entries(4) + tokens),
        4 * (entries(8) + entries(4)),
    ]
    assert plan.stored == _bytes(K[1])


def _bytes(item: Any) -> int:
    """Return the bytes of the tensors in an operator."""
    if isinstance(item, Tensor):
        return item.nbytes
    if isinstance(item, PyTorchLinearOperator):
        item = list(item._state().values())
    return sum(map(_bytes, item)) if isinstance(item, list | tuple) else 0


def test_largest_numbers_of_positions() -> None:
    """Of all batches and all calls, whichever comes first; of the longest sequence."""
    model = nn.Linear(3, 2, bias=False)
    for lengths in ((2, 5, 3), (5, 2, 3), (3, 2, 5)):
        data = [(torch.rand(4, length, 3), torch.rand(4, length, 2)) for length in lengths]
        plan = KFACLinearOperator.plan(model, nn.MSELoss(), dict(model.named_parameters()), data)
        assert plan.rows[0].working_set == 4 * 4 * 5 * (3 + 2)


# --------------------------------------------------------------------------------------------------
# Passes, by hand and by definition
# --------------------------------------------------------------------------------------------------
def row(number: int, computed: int, stored: int, working_set: int) -> GroupMemory:
    return GroupMemory((f"p{number}",), computed, 0, stored, working_set, computed)


#: Numbers, bytes that are computed, stored, and worked with; all sums of them differ.
ROWS_OF_FOUR = [row(0, 100, 10, 7), row(1, 200, 20, 5), row(2, 50, 3, 90), row(3, 120, 1, 2)]


@pytest.mark.parametrize(
    ("budget", "offloads", "passes", "peak"),
    [
        (None, False, [[0, 1, 2, 3]], 470 + 90),
        (560, False, [[0, 1, 2, 3]], 560),  # just enough
        (559, False, [[0, 1, 2], [3]], 350 + 90),
        (440, False, [[0, 1, 2], [3]], 440),
        (439, False, [[0, 1], [2, 3]], 307),  # 30 are stored, and 170 + 90 needed
        (307, False, [[0, 1], [2, 3]], 307),
        (306, False, [[0], [1], [2, 3]], 30 + 170 + 90),
        (306, True, [[0], [1], [2, 3]], 170 + 90),
        (259, True, [[0], [1], [2], [3]], 205),
    ],
)
def test_split(budget: int | None, offloads: bool, passes: list[list[int]], peak: int) -> None:
    """Passes are as full as they can be, and what is stored by then counts, if it is here."""
    units = [[0], [1], [2], [3]]
    assert split_into_passes(ROWS_OF_FOUR, units, budget, offloads) == passes
    assert MemoryPlan(ROWS_OF_FOUR, passes, offloads).peak == peak


def test_units_stay_together() -> None:
    """In the order of their first groups, each group once."""
    units = [[1, 3], [2], [0]]
    assert split_into_passes(ROWS_OF_FOUR, units, 560, False) == [[0, 1, 3, 2]]
    assert split_into_passes(ROWS_OF_FOUR, units, 427, False) == [[0, 1, 3], [2]]
    assert split_into_passes(ROWS_OF_FOUR, units, 426, True) == [[0], [1, 3], [2]]
    with pytest.raises(ValueError, match=r"\['p1', 'p3'\] need 325 bytes, besides 10 for what"):
        split_into_passes(ROWS_OF_FOUR, units, 330, False)
    with pytest.raises(ValueError, match=r"\['p0'\] need 107 bytes\. Give more"):
        split_into_passes(ROWS_OF_FOUR, units, 106, False)
    with pytest.raises(ValueError, match=r"\['p1', 'p3'\] need 325 bytes\. Give more"):
        split_into_passes(ROWS_OF_FOUR, units, 324, True)


def test_sizes_as_text() -> None:
    """Bytes to gibibytes, in a table with the number of each group's pass."""
    sizes = [row(0, 1023, 1024, 1536), row(1, 2**20, 2**30 - 1, 5 * 2**40)]
    lines = str(MemoryPlan(sizes, [[1], [0]])).splitlines()
    assert lines[2].split() == ["p0", "1023", "B", "0", "B", "1.0", "KiB", "1.5", "KiB", "2"]
    assert lines[3].split() == [
        *("p1", "1.0", "MiB", "0", "B", "1024.0", "MiB", "5120.0", "GiB", "1"),
    ]
    assert lines[4] == "stored 1.0 GiB, at most 5120.0 GiB meanwhile, in 2 passes"
