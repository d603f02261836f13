"""Products with KFAC, EKFAC and KFOC under ``torch.compile``: one graph, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kfac_reference import Setup
from layer_cases import layer_setup
from torch import Tensor
from torch.fx import GraphModule

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator

KINDS: dict[str, Any] = {
    "KFAC": KFACLinearOperator,
    "EKFAC": EKFACLinearOperator,
    "KFOC": KFOCLinearOperator,
}
# Several blocks for one weight; a diagonal factor; one parameter's block after another.
CASES = ("conv2d-groups", "embedding", "head-bias")
FAST = [
    ("KFAC", "conv2d-groups", True, False),
    ("EKFAC", "embedding", False, True),
    ("KFOC", "head-bias", True, True),
]
INVERSES: dict[str, dict[str, Any]] = {
    "KFAC": {"use_heuristic_damping": True},
    "EKFAC": {},
    "KFOC": {"use_exact_damping": True},
}
# PyTorch's own remarks about an even kernel with padding "same", and about itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Know no compiled code, and leave none behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Runs graphs as they are, and remembers them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def num_products(graphs: list[GraphModule]) -> int:
    """Return the number of matrix products in graphs, also in nested ones."""
    modules = [module for graph in graphs for module in graph.modules()]
    nodes = [n for m in modules if isinstance(m, GraphModule) for n in m.graph.nodes]
    names = [getattr(node.target, "__name__", node.target) for node in nodes]
    return sum(name in ("matmul", "einsum") for name in names)


def make(kind: str, name: str, joint: bool, inverse: bool) -> tuple[Any, Setup]:
    """Return an operator, or its inverse, and its problem."""
    problem = layer_setup(name)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": not joint}
    K = KINDS[kind](**problem.kwargs(**options))
    return (K.inverse(damping=1e-2, **INVERSES[kind]) if inverse else K), problem


def formats(problem: Setup) -> dict[str, Any]:
    """Return a vector in each format, and a matrix."""
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in problem.params.items()}
    as_dict = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    flat = torch.cat([v.flatten() for v in as_dict.values()])
    return {
        "vector": flat,
        "matrix": torch.stack([flat, flat.flip(0), flat.cos()], dim=1),
        "list": list(as_dict.values()),
        "dict": as_dict,
    }


def entries(x: Any) -> list[Tensor]:
    return list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else [x]


def check(actual: Any, expected: Any) -> None:
    """Compare products in the same format, relative to the largest entry."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    for ours, theirs in zip(entries(actual), entries(expected), strict=True):
        assert ours.shape == theirs.shape
        atol = 1e-12 * theirs.norm().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def combinations() -> Iterator[Any]:
    """All kinds, cases and blocks, and inverses; three of them are not slow."""
    for kind in KINDS:
        for name in CASES:
            for joint in (True, False):
                for inverse in (True, False):
                    combination = (kind, name, joint, inverse)
                    marks = () if combination in FAST else pytest.mark.slow
                    yield pytest.param(*combination, marks=marks)


@pytest.mark.parametrize(("kind", "name", "joint", "inverse"), list(combinations()))
def test_one_graph_with_the_same_numbers(kind: str, name: str, joint: bool, inverse: bool) -> None:
    """For each format there is one graph, which holds the products with the factors."""
    K, problem = make(kind, name, joint, inverse)
    for x in formats(problem).values():
        torch._dynamo.reset()
        backend = Backend()
        compiled = torch.compile(K.__matmul__, fullgraph=True, backend=backend)
        check(compiled(x), K @ x)
        assert len(backend.graphs) == 1
        assert num_products(backend.graphs) >= len(problem.params)  # at least one for each
        other = [2 * y.flip(0) for y in entries(x)]
        if isinstance(x, dict):
            y: Any = dict(zip(x, other, strict=True))
        else:
            y = other if isinstance(x, list) else other[0]
        check(compiled(y), K @ y)
        assert len(backend.graphs) == 1  # x is an input, and not a constant


@pytest.mark.parametrize(("kind", "name", "joint", "inverse"), list(combinations()))
def test_explain(kind: str, name: str, joint: bool, inverse: bool) -> None:
    """A function of the operator and the vector has no breaks, and is traced."""
    K, problem = make(kind, name, joint, inverse)
    for x in map(formats(problem).get, ("matrix", "dict")):
        torch._dynamo.reset()
        explanation = torch._dynamo.explain(lambda op, v: op @ v)(K, x)
        assert explanation.graph_break_count == 0
        assert len(explanation.graphs) == 1
        assert num_products(explanation.graphs) >= len(problem.params)


def test_factors_are_inputs() -> None:
    """A compiled product follows changes of factors, in place or by others."""
    K, problem = make("KFAC", "conv2d-groups", True, False)
    x = formats(problem)["vector"]
    compiled = torch.compile(K.__matmul__, fullgraph=True, backend="eager")
    before = K @ x
    check(compiled(x), before)
    key = next(iter(problem.params))
    K.factors(key)[0][0].mul_(2)
    block = K.block(key)[1]
    block[1] = 3 * block[1]
    assert (K @ x - before).norm() > 1e-3 * before.norm()
    check(compiled(x), K @ x)


@pytest.mark.slow
def test_numbers_of_columns() -> None:
    """One compiled product takes matrices of any number of columns."""
    K, problem = make("EKFAC", "conv2d-groups", True, False)
    x = formats(problem)["matrix"]
    compiled = torch.compile(K.__matmul__, fullgraph=True, backend="eager")
    for width in (1, 3, 5, 4, 0):
        X = torch.cat([x, x.sin()], dim=1)[:, :width]
        check(compiled(X), K @ X)


@pytest.mark.parametrize("kind", KINDS)
def test_aot_eager(kind: str) -> None:
    """Also after PyTorch has traced the operations."""
    compare("aot_eager", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind: str) -> None:
    """PyTorch's own compiler."""
    compare("inductor", kind)


def compare(backend: str, kind: str) -> None:
    K, problem = make(kind, "conv2d-groups", True, False)
    x = formats(problem)["vector"]
    compiled = torch.compile(K.__matmul__, fullgraph=True, backend=backend)
    check(compiled(x), K @ x)
