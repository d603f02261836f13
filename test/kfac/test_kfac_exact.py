"""Where KFAC is the GGN or the empirical Fisher, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kfac_cases import C, Lambda, setup
from kfac_reference import Setup, block_diagonal, dense
from torch import Tensor, nn

from curvlinops import KFACLinearOperator

S = 4
BOTH = (False, True)  # separate and joint bias


def distance(problem: Setup, joint: bool, fisher_type: str = "type-2", **kwargs: Any) -> float:
    """Return the relative distance of KFAC and the dense matrix's block diagonal."""
    K = KFACLinearOperator(
        **problem.kwargs(),
        fisher_type=fisher_type,
        separate_weight_and_bias=not joint,
        **kwargs,
    )
    expected = block_diagonal(problem, dense(problem, fisher_type), joint)
    error = torch.linalg.matrix_norm(K.to_dense() - expected)
    return (error / torch.linalg.matrix_norm(expected)).item()


def assert_exact(problem: Setup, joint: tuple[bool, ...] = BOTH, **kwargs: Any) -> None:
    for together in joint:
        assert distance(problem, together, **kwargs) < 1e-10


def assert_differs(problem: Setup, joint: tuple[bool, ...] = BOTH, **kwargs: Any) -> None:
    for together in joint:
        assert distance(problem, together, **kwargs) > 1e-2


def deep_linear(
    between: Callable[[Tensor], Tensor] = lambda h: h,
    reduction: str = "mean",
    loss: type[nn.Module] = nn.MSELoss,
    activation: Callable[[Tensor], Tensor] = lambda h: h,
    X: tuple[Tensor, ...] | None = None,
    first: nn.Module | None = None,
    batch_size_fn: Callable[[Any], int] | None = None,
) -> Setup:
    """A deep linear network with something linear before its last layer."""
    model = Lambda(
        lambda m, x: m.c(between(activation(m.b(activation(m.a(x)))))),
        a=nn.Linear(3, 4) if first is None else first,
        b=nn.Linear(4, 2),
        c=nn.Linear(2, C),
    ).double()
    params = {name: p.detach() + torch.rand_like(p) for name, p in model.named_parameters()}
    X = (torch.rand(2, S, 3), torch.rand(3, S, 3)) if X is None else X
    data = []
    for x in X:
        f = model(x.double()).detach()
        if loss is nn.CrossEntropyLoss:
            data.append((x.double(), torch.arange(len(f)) % C))
        else:
            data.append((x.double(), torch.rand_like(f)))
    return Setup(model, loss(reduction=reduction), params, data, batch_size_fn)


VECTORS = (torch.rand(4, 3), torch.rand(5, 3))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("loss", ["mse", "ce-all", "ce-soft", "bce-weight"])
@pytest.mark.parametrize(
    "case", ["mlp", "mlp-frozen", "inplace", "mapping", "residual", "no-grad", "hooked"]
)
def test_one_datum(case: str, loss: str, fisher_type: str, approx: str):
    """Any network and loss, with one position and one loss term."""
    whole = setup(case, loss)
    (X, y) = whole.data[1]
    assert len(y) == 1
    problem = Setup(whole.model, whole.loss, whole.params, [(X, y)], whole.batch_size_fn)
    assert_exact(problem, fisher_type=fisher_type, kfac_approx=approx)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
class TestDeepLinear:
    """Square loss, any number of data."""

    @pytest.mark.parametrize("approx", ["expand", "reduce"])
    def test_one_position(self, reduction: str, approx: str):
        problem = deep_linear(X=VECTORS, reduction=reduction)
        assert_exact(problem, kfac_approx=approx)
        assert_differs(problem, fisher_type="empirical")

    @pytest.mark.parametrize("loss_terms", ["signs", "exact"])
    def test_as_many_terms_as_positions(self, reduction: str, loss_terms: str):
        assert_exact(deep_linear(reduction=reduction), loss_terms=loss_terms)

    def test_positions_as_examples(self, reduction: str):
        """The model flattens positions, and R = 1."""
        problem = deep_linear(lambda h: h.flatten(0, 1), reduction)
        problem.batch_size_fn = lambda X: X.shape[0]
        assert_exact(problem)  # R = S
        single = deep_linear(lambda h: h.flatten(0, 1), reduction)
        expected = {joint: block_diagonal(single, dense(single), joint) for joint in BOTH}
        for approx in ("expand", "reduce"):
            for joint, matrix in expected.items():
                K = KFACLinearOperator(
                    **single.kwargs(batch_size_fn=lambda X: X.shape[0] * X.shape[1]),
                    fisher_type="type-2",
                    num_per_example_loss_terms=1,
                    separate_weight_and_bias=not joint,
                    kfac_approx=approx,
                )
                torch.testing.assert_close(K.to_dense(), matrix)

    @pytest.mark.parametrize("pool", [lambda h: h.sum(1), lambda h: h.mean(1)], ids=["sum", "mean"])
    def test_reduce_with_pooling(self, reduction: str, pool: Callable[[Tensor], Tensor]):
        assert_exact(deep_linear(pool, reduction), kfac_approx="reduce")

    @pytest.mark.parametrize("pool", [lambda h: h.sum(1), lambda h: h.mean(1)], ids=["sum", "mean"])
    def test_reduce_with_convolution(self, reduction: str, pool: Callable[[Tensor], Tensor]):
        conv = nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2))
        first = nn.Sequential(conv, nn.Flatten(2), Lambda(lambda m, x: x.mT))
        images = (torch.rand(2, 2, 3, 7), torch.rand(1, 2, 3, 7))
        assert_exact(deep_linear(pool, reduction, X=images, first=first), kfac_approx="reduce")


def test_expand_with_pooling_differs():
    problem = deep_linear(lambda h: h.sum(1))
    assert_differs(problem)
    # so does the bias alone: positions' gradients are summed after squaring, not before
    bias = replace(problem, params={"b.bias": problem.params["b.bias"]})
    assert_differs(bias, joint=(False,))
    assert_exact(bias, joint=(False,), kfac_approx="reduce")


def test_cross_entropy_with_several_data_differs():
    assert_differs(deep_linear(X=VECTORS, loss=nn.CrossEntropyLoss))


def test_one_nonlinear_datum_with_several_positions_differs():
    one = (torch.randn(1, S, 3),)
    for approx in ("expand", "reduce"):
        problem = deep_linear(lambda h: h.sum(1), X=one, activation=torch.sin)
        assert_differs(problem, kfac_approx=approx)
