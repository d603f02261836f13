"""Memory of Kronecker factors: what is promised before, and passes that keep within a budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kfac_cases import setup
from torch import nn

from curvlinops import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    Precision,
)
from curvlinops.computers.kfac_hooks import HooksKFACComputer

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


@pytest.mark.parametrize("case", ["cnn", "attention", "tied-one", "sometimes", "tokens"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (KFACLinearOperator, {"separate_weight_and_bias": False}),
        (KFACLinearOperator, {"kfac_approx": "reduce", "fisher_type": "type-2"}),
        (EKFACLinearOperator, {"fisher_type": "mc"}),
        (EKFACLinearOperator, {"fisher_type": "empirical", "backend": "make_fx"}),
    ],
    ids=["joint", "reduce", "ekfac", "make_fx"],
)
def test_passes(case: str, cls: Any, options: dict[str, Any]) -> None:
    """With the smallest budget that is accepted, results are the same, in several passes.

    Catches: groups that are forgotten or have the moments of others, other samples in later passes.
    """
    separate = options.get("separate_weight_and_bias", True)
    if case == "tied-one" and not separate:
        pytest.skip("one of the layers has no bias")
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
