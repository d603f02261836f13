"""What a later batch shows of a parameter counts for the earlier ones.

A parameter that a layer shares with another function gets a diagonal block. If only a later batch
uses it that way, the events of the earlier ones were gathered for another plan: the bias was the
last column of a joint block, gradients of a pair of weight and bias were put together. Nothing of
that may be left, and nothing of the earlier batches may be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import compare_blocks, compare_eigenvalues
from kfac_reference import Setup
from layer_reference import reference_blocks
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator

LONG = 3  # positions of later batches


class Late(nn.Module):
    """A model that uses one of its parameters in another way, too, for long sequences."""

    def __init__(self, other: Callable[[Any], Tensor]):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.norm(torch.tanh(self.first(x))))
        return h * self.other(self) if x.shape[1] == LONG else h


OTHER_USES: dict[str, Callable[[Any], Tensor]] = {
    "first.weight": lambda m: m.first.weight.sum(1),
    "first.bias": lambda m: m.first.bias * 2,
    "norm.weight": lambda m: m.norm.weight * 2,
    "norm.bias": lambda m: m.norm.bias + 1,
    "last.weight": lambda m: m.last.weight.sum(0),
    "last.bias": lambda m: m.last.bias + 1,
}
BATCHES = {  # examples and positions of each batch, and whether it is looked at the first one
    "one example first": (((1, 2), (2, LONG)), False),
    "several examples first": (((2, 2), (1, 1), (2, LONG), (1, LONG)), False),
    "after the check": (((3, 2), (1, LONG)), True),
}


def problem_with(name: str, sizes: tuple[tuple[int, int], ...]) -> Setup:
    """Return a problem with batches of so many examples and positions."""
    model = Late(OTHER_USES[name]).double()
    for p in model.parameters():
        nn.init.normal_(p)
    data = [(torch.randn(n, S, 3).double(), torch.randn(n, S, 2).double()) for n, S in sizes]
    return Setup(model, nn.MSELoss(), dict(model.named_parameters()), data)


def check(
    name: str, batches: str, cls: Any = KFACLinearOperator, joint: bool = True, **options: Any
) -> None:
    """Compare one parameter's block with the GGN's diagonal, the others with the reference."""
    shapes, deterministic = BATCHES[batches]
    problem, approx = problem_with(name, shapes), options.get("kfac_approx", "expand")
    K = cls(
        **problem.kwargs(check_deterministic=deterministic),
        fisher_type="type-2",
        separate_weight_and_bias=not joint,
        loss_terms="exact",
        unsupported="diagonal",
        **options,
    )
    others = dict(problem.params)
    own = {name: others.pop(name)}
    assert {"W": name} in K.mapping
    D = GGNDiagonalLinearOperator(**problem.kwargs(params=own))
    assert (D.diagonal() > 1e-9).all()
    torch.testing.assert_close(K.block(name).to_dense(), D.to_dense())
    # the others are as if this one was a constant
    rest = Setup(problem.model, problem.loss, others, problem.data)
    sizes = {key: value for key, value in options.items() if key == "max_factor_size"}
    blocks = reference_blocks(rest, joint, "type-2", approx, **sizes)
    assert len(K.mapping) == len(blocks) + 1
    if cls is EKFACLinearOperator:
        compare_eigenvalues(K, rest, blocks, "type-2")
    else:
        compare_blocks(K, blocks)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", OTHER_USES)
def test_later_use(name: str, approx: str, batches: str) -> None:
    check(name, batches, kfac_approx=approx)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_wide_factors(approx: str, batches: str) -> None:
    """The width of a diagonal, too, was that with the bias."""
    check("first.bias", batches, kfac_approx=approx, max_factor_size=1)


@pytest.mark.parametrize("name", ["first.bias", "norm.weight"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_all_computers(cls: Any, backend: str, joint: bool, name: str) -> None:
    for batches in BATCHES:
        check(name, batches, cls, joint, backend=backend, kfac_approx="reduce")


def test_passes() -> None:
    """There is another pass only if a later batch shows something new, and one for the diagonal."""
    problem = problem_with("first.bias", ((1, 2), (2, LONG), (2, LONG)))
    for names, passes in ((["first.weight"], 1), (["first.weight", "first.bias"], 3)):
        started = []

        class Data(list):
            def __iter__(self) -> Any:
                started.append(1)  # noqa: B023
                return super().__iter__()

        arguments = problem.kwargs(
            data=Data(problem.data), params={n: problem.params[n] for n in names}, num_data=5
        )
        KFACLinearOperator(**arguments, unsupported="diagonal", fisher_type="type-2")
        assert len(started) == passes


class Shared(nn.Module):
    """A layer whose input is the same for all examples, for which its outputs are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.layer = nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.code(x.new_ones(1, 2)).sum(0)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_repeated_pass_is_the_one_that_is_checked(backend: str) -> None:
    """Where such a layer got one input for each example, predictions were others: no noise."""
    model = Shared().double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (1, 3)]
    problem = Setup(model, nn.MSELoss(), dict(model.named_parameters()), data)
    options = {"fisher_type": "type-2", "unsupported": "diagonal", "backend": backend}
    K = KFACLinearOperator(**problem.kwargs(check_deterministic=True), **options)
    expected = KFACLinearOperator(**problem.kwargs(check_deterministic=False), **options)
    assert {"W": "code.weight"} in K.mapping
    torch.testing.assert_close(K.to_dense(), expected.to_dense())
