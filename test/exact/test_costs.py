"""What products and Kronecker factors cost, relative to a gradient; evaluations of the model.

Multiplications are counted, not timed: the figures are the same on every machine.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from cost_models import PROBLEMS, gradient, num_flops, operator, vectors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)

H, G, E = HessianLinearOperator, GGNLinearOperator, EFLinearOperator
OPERATORS = {H: "Hessian", G: "GGN", E: "EF"}
# per operator, the most that one product may cost, in gradients
PLAIN = {
    H: {"MLP": 2.10, "CNN": 2.61, "decoder": 2.70},
    G: {"MLP": 1.85, "CNN": 1.70, "decoder": 1.68},
    E: {"MLP": 1.85, "CNN": 1.70, "decoder": 1.68},
}
# the same for each further product with a kept graph
KEPT = {
    H: {"MLP": 1.55, "CNN": 2.3, "decoder": 2.05},
    G: {"MLP": 1.20, "CNN": 1.70, "decoder": 1.34},
    E: {"MLP": 1.20, "CNN": 1.70, "decoder": 1.34},
}

each_operator = pytest.mark.parametrize("cls", OPERATORS, ids=OPERATORS.values())
each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_mode = pytest.mark.parametrize("keep_graph", [False, True], ids=["plain", "kept"])
each_chunk_size = pytest.mark.parametrize("chunk_size", [None, 1, 3])


# --------------------------------------------------------------------------------------------------
# The counter
# --------------------------------------------------------------------------------------------------
@cache
def costs(name: str) -> tuple[int, int]:
    """Return the multiplications of a forward pass and of a gradient."""
    problem = PROBLEMS[name]()
    return (
        num_flops(lambda: [problem.model(X) for X, _ in problem.data]),
        num_flops(lambda: gradient(problem)),
    )


def test_counter_knows_the_gradient_of_the_mlp():
    """Weights times inputs, errors times weights, errors times inputs; no error of the data."""
    forward = 784 * 512 + 512 * 512 + 512 * 10
    backward = 512 * 512 + 512 * 10
    rows = 4 * 128
    assert costs("MLP") == (2 * rows * forward, 2 * rows * (2 * forward + backward))


@each_problem
def test_counter_agrees_with_that_of_torch(name: str):
    problem = PROBLEMS[name]()
    with FlopCounterMode(display=False) as counter:
        gradient(problem)
    assert costs(name)[1] == counter.get_total_flops()


def test_counter_sees_every_way_to_differentiate():
    """Function transforms, forward mode, nested ones, and composites in inference mode."""
    n, d_in, d_out = 3, 4, 5
    once = 2 * n * d_in * d_out
    X, W = torch.rand(n, d_in), torch.rand(d_out, d_in)
    linear = nn.functional.linear

    def push(*primals: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(linear, primals, (X, W))

    def forward_mode() -> None:
        with forward_ad.dual_level():
            linear(forward_ad.make_dual(X, X), forward_ad.make_dual(W, W))

    def nested() -> None:
        F, pullback, JV = vjp(push, X, W, has_aux=True)
        pullback(F + JV)

    assert num_flops(lambda: linear(X, W)) == once
    assert num_flops(lambda: torch.func.vmap(linear)(X, W.expand(n, -1, -1))) == once
    assert num_flops(lambda: push(X, W)) == 3 * once
    assert num_flops(forward_mode) == 3 * once
    assert num_flops(nested) == 5 * once
    with torch.no_grad():
        assert num_flops(lambda: linear(X, W)) == once
    with torch.inference_mode():
        assert num_flops(lambda: linear(X, W)) == once


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
def cost(A: Any, v: Tensor, name: str) -> float:
    """Return what a product costs, in gradients."""
    return num_flops(lambda: A @ v) / costs(name)[1]


@each_problem
@each_operator
def test_one_product(cls: Any, name: str):
    problem = PROBLEMS[name]()
    assert round(cost(operator(cls, problem), vectors(problem), name), 2) <= PLAIN[cls][name]


@each_problem
@each_operator
def test_further_products_with_a_kept_graph(cls: Any, name: str):
    problem = PROBLEMS[name]()
    A, v = operator(cls, problem, keep_graph=True), vectors(problem)
    A @ v
    assert round(cost(A, -v, name), 2) <= KEPT[cls][name]


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [*((name, None) for name in PROBLEMS), ("MLP", 1), ("MLP", 3)],
)
@each_operator
@each_mode
def test_many_columns(cls: Any, name: str, keep_graph: bool, chunk_size: int | None):
    """They share one forward pass, and one gradient; with a kept graph, later ones do without.

    A Hessian's columns share the gradient, too: with few columns, that costs more than they save.
    All costs are in proportion to the number of examples: one of them suffices.
    """
    problem = PROBLEMS[name]()
    problem = problem._replace(data=[(X[:1], y[:1]) for X, y in problem.data[:1]])
    A = operator(cls, problem, keep_graph=keep_graph, chunk_size=chunk_size)
    K = 8
    V = vectors(problem, K)
    forward = num_flops(lambda: [problem.model(X) for X, _ in problem.data])
    grad = num_flops(lambda: gradient(problem))
    limit = K * KEPT[cls][name]
    if keep_graph:
        A @ V[:, 0]
    else:
        limit += forward / grad
    assert round(num_flops(lambda: A @ V) / grad, 2) <= round(limit, 2)


@each_operator
@pytest.mark.parametrize("columns", [(), (1,), (5,)], ids=["vector", "K=1", "K=5"])
@each_mode
@each_chunk_size
def test_model_is_called_once_per_batch(
    cls: Any, columns: tuple[int, ...], keep_graph: bool, chunk_size: int | None
):
    """In the first product and, unless the graph is kept, in later ones; never at construction."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    calls: list[int] = []
    model[1].register_forward_hook(lambda module, args, output: calls.append(len(output)))
    rows = [1, 2, 3]
    data = [(torch.rand(n, 2), torch.randint(0, 4, (n,))) for n in rows]
    params = dict(model.named_parameters())

    def build(model_func: Any) -> Any:
        return cls(
            model_func,
            nn.CrossEntropyLoss(),
            params,
            data,
            check_deterministic=False,
            num_data=sum(rows),
            keep_graph=keep_graph,
            chunk_size=chunk_size,
        )

    def function(theta: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(model, theta, (X,))

    for model_func in (model, function):
        calls.clear()
        A = build(model_func)
        V = torch.rand(A.shape[1], *columns)
        assert calls == []
        A @ V
        assert calls == rows
        A @ V
        assert calls == (rows if keep_graph else 2 * rows)


@pytest.mark.parametrize("samples", [1, 3])
def test_monte_carlo_costs_as_much_as_the_exact_matrix(samples: int):
    """It replaces the Hessian of the loss, and nothing else."""
    problem = PROBLEMS["MLP"]()
    v = vectors(problem)
    exact = cost(operator(G, problem), v, "MLP")
    sampled = cost(operator(G, problem, mc_samples=samples), v, "MLP")
    assert sampled == pytest.approx(exact, rel=0.01)


# --------------------------------------------------------------------------------------------------
# Kronecker factors
# --------------------------------------------------------------------------------------------------
K, EK = KFACLinearOperator, EKFACLinearOperator
# per operator and Fisher type, the most that its constructor may cost, in gradients
CONSTRUCTORS = {
    (K, "mc"): {"MLP": 1.65, "CNN": 2.25, "decoder": 1.9},
    (K, "empirical"): {"MLP": 1.65, "CNN": 2.25, "decoder": 1.9},
    (K, "type-2"): {"MLP": 6.2, "CNN": 6.0},
    (EK, "mc"): {"MLP": 3.7, "CNN": 4.3, "decoder": 4.4},
    (EK, "type-2"): {"MLP": 12.6, "CNN": 15.5},
}


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize(
    ("cls", "fisher_type", "name"),
    [(*key, name) for key, limits in CONSTRUCTORS.items() for name in limits],
    ids=lambda x: x if isinstance(x, str) else x.__name__.removesuffix("LinearOperator"),
)
def test_kronecker_factors(cls: Any, fisher_type: str, name: str, backend: str):
    """Embeddings and LayerNorms are left out; the gradient has all parameters."""
    problem = PROBLEMS[name]()
    layers = dict(problem.model.named_modules())
    params = {
        key: p
        for key, p in problem.model.named_parameters()
        if isinstance(layers[key.rpartition(".")[0]], (nn.Linear, nn.Conv2d))
    }
    assert len(params) == (33 if name == "decoder" else len(list(problem.model.parameters())))
    flops = num_flops(
        lambda: cls(
            problem.model,
            nn.CrossEntropyLoss(),
            params,
            problem.data,
            fisher_type=fisher_type,
            num_per_example_loss_terms=64 if name == "decoder" else 1,
            separate_weight_and_bias=False,
            backend=backend,
        )
    )
    assert flops / costs(name)[1] <= CONSTRUCTORS[cls, fisher_type][name]
