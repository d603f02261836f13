"""Products under ``torch.compile``: the same numbers, from one graph that holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from exact_cases import Apply, C, Problem, assert_close, classes, cross_entropy, mlp, rand
from exact_kinds import KINDS, build
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

each_kind = pytest.mark.parametrize("kind", KINDS)
# One kind takes the time of many other tests.
slow = pytest.mark.slow


def fast(*kinds: str) -> Any:
    """Parametrize with all kinds, the others of which are slow."""
    params = [pytest.param(kind, marks=() if kind in kinds else slow) for kind in KINDS]
    return pytest.mark.parametrize("kind", params)


SIZES = (3, 2)  # each batch is traced on its own
UNCHECKED = {"check_deterministic": False, "num_data": sum(SIZES)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Know no compiled code, and leave none behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp_problem() -> Problem:
    return Problem(mlp(), cross_entropy, [(rand(n, 3), classes(n)) for n in SIZES])


def cnn_problem() -> Problem:
    layers = [nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, C)]
    model = nn.Sequential(*layers).double().eval()
    return Problem(model, cross_entropy, [(rand(n, 2, 3), classes(n)) for n in SIZES])


def decoder(self: Any, tokens: Tensor) -> Tensor:
    """One layer of causal attention; outputs [N, C, S]."""
    x = self.tokens(tokens)
    n, s, d = x.shape
    q, k, v = self.qkv(self.norm(x)).reshape(n, s, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.projection(h.transpose(1, 2).reshape(n, s, d))
    return self.head(x).transpose(1, 2)


def decoder_problem(padding_idx: int | None = None) -> Problem:
    model = Apply(
        decoder,
        tokens=nn.Embedding(5, 4, padding_idx),
        norm=nn.LayerNorm(4),
        qkv=nn.Linear(4, 12),
        projection=nn.Linear(4, 4),
        head=nn.Linear(4, C),
    ).double()
    data = [(torch.randint(5, (n, 3)), classes(n, 3)) for n in SIZES]
    return Problem(model, cross_entropy, data, classes=1)


def padding_problem() -> Problem:
    """Forward mode is wrong for the embedding."""
    return decoder_problem(padding_idx=1)


def layer_problem() -> Problem:
    """Attention as PyTorch's layer, without a loop over batches."""
    layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def predict(self: Any, x: Tensor) -> Tensor:
        h = self.e(x).reshape(-1, 2, 4)
        return self.o(self.m(h, h, h, need_weights=False)[0].flatten(1))

    model = Apply(predict, e=nn.Linear(3, 8), m=layer, o=nn.Linear(8, C)).double().eval()
    return Problem(model, cross_entropy, [(rand(4, 3), classes(4))])


PROBLEMS: dict[str, tuple[Callable[[], Problem], tuple[str, ...]]] = {
    "MLP": (mlp_problem, ("linear",)),
    "CNN": (cnn_problem, ("conv", "linear")),
    "decoder": (decoder_problem, ("linear", "scaled_dot_product_attention")),
    "padding": (padding_problem, ("linear", "scaled_dot_product_attention")),
}


def operations(graphs: list[GraphModule]) -> str:
    """The names of all functions in the graphs, also in nested ones."""
    modules = [module for graph in graphs for module in graph.modules()]
    graph_modules = [module for module in modules if isinstance(module, GraphModule)]
    return " ".join(str(node.target) for g in graph_modules for node in g.graph.nodes)


class Backend:
    """Runs graphs as they are, and remembers them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def plain_product(kind: str, problem: Problem, v: Tensor, **options: Any) -> Tensor:
    """The product of another operator, so that the compiled one's first look is its own."""
    with sdpa_kernel(SDPBackend.MATH):
        return build(kind, problem, **options) @ v


def combinations() -> Iterator[Any]:
    """All kinds, problems, and modes; a few of them are not slow."""
    fast = [("Hessian", "decoder", False), ("GGN", "padding", False), ("GGN", "MLP", True)]
    fast += [("EF", "CNN", True), ("MC", "MLP", False), ("Hessian", "MLP", True)]
    for combination in product(KINDS, PROBLEMS, (True, False)):
        marks = () if combination in fast else pytest.mark.slow
        yield pytest.param(*combination, marks=marks)


@pytest.mark.parametrize(("kind", "name", "checked"), list(combinations()))
def test_one_graph_with_the_same_numbers(kind: str, name: str, checked: bool) -> None:
    """It has the model's products: a function that is not traced has no breaks, either."""
    make, functions = PROBLEMS[name]
    problem = make()
    A, backend = build(kind, problem, **({} if checked else UNCHECKED)), Backend()
    v, w = rand(A.shape[1]), rand(A.shape[1])
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend=backend)
    assert_close(compiled(v), plain_product(kind, problem, v))
    assert len(backend.graphs) == 1
    for function in functions:
        assert operations(backend.graphs).count(function) >= len(SIZES)
    assert_close(compiled(w), plain_product(kind, problem, w))
    assert len(backend.graphs) == 1  # v is an input, and not a constant


@fast("GGN")
@pytest.mark.parametrize("name", ["MLP", pytest.param("decoder", marks=slow)])
def test_explain(kind: str, name: str) -> None:
    """A function of the operator and the vector has no breaks, and is traced."""
    make, functions = PROBLEMS[name]
    A = build(kind, make())
    explanation = torch._dynamo.explain(lambda op, v: op @ v)(A, rand(A.shape[1]))
    assert explanation.graph_break_count == 0
    assert any(all(f in operations([graph]) for f in functions) for graph in explanation.graphs)


@fast("GGN")
def test_matrices(kind: str) -> None:
    """Several columns."""
    problem = mlp_problem()
    A = build(kind, problem, chunk_size=2)
    V = rand(A.shape[1], 3)
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend="eager")(V)
    assert_close(compiled, plain_product(kind, problem, V))


@fast("Hessian")
def test_kept_graphs_are_left_alone(kind: str) -> None:
    """An operator that keeps graphs compiles as any other, before and after it has made some."""
    problem = mlp_problem()
    calls: list[int] = []
    expected_of = build(kind, problem)
    A = build(kind, problem, keep_graph=True)
    v = rand(A.shape[1])
    expected = expected_of @ v
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend=(backend := Backend()))
    assert_close(compiled(v), expected)
    assert len(A._kept) == 0
    assert_close(A @ v, expected)
    assert len(A._kept) == len(SIZES)
    torch._dynamo.reset()
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend=backend)
    assert_close(compiled(v), expected)
    for graph in backend.graphs:
        assert operations([graph]).count("linear") >= len(SIZES)
    problem.model.register_forward_pre_hook(lambda *args: calls.append(1))
    assert_close(A @ v, expected)
    assert not calls  # graphs have survived


@fast("GGN")
def test_parameters_are_inputs(kind: str) -> None:
    """A compiled product follows changes of parameters."""
    problem = mlp_problem()
    A = build(kind, problem)
    v = rand(A.shape[1])
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend="eager")
    first = compiled(v)
    with torch.no_grad():
        problem.params["0.weight"].mul_(2)
    second = compiled(v)
    assert (second - first).norm() > 1e-3 * first.norm()
    assert_close(second, plain_product(kind, problem, v))


@slow
def test_monte_carlo_samples_are_those_of_eager() -> None:
    """For each seed: they enter as inputs, and belong to the terms of all batches."""
    problem = mlp_problem()
    products = []
    for seed in (1, 2):
        A, _ = (problem.operator(KINDS["MC"][0], mc_samples=2, seed=seed) for _ in range(2))
        v = torch.ones(A.shape[1], dtype=torch.float64)
        torch._dynamo.reset()
        products.append(torch.compile(A.__matmul__, fullgraph=True, backend="eager")(v))
        assert_close(products[-1], A @ v)
    assert (products[0] - products[1]).norm() > 1e-3 * products[0].norm()


@fast("GGN")
def test_half_precision(kind: str) -> None:
    """Sums over batches are accumulated as in eager mode."""
    problem = mlp_problem()
    problem.model.to(torch.bfloat16)
    problem.data = [(X.to(torch.bfloat16), y) for X, y in problem.data]
    A = build(kind, problem)
    v = rand(A.shape[1]).to(torch.bfloat16)
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend="eager")(v)
    assert compiled.dtype == torch.bfloat16
    assert_close(compiled, A @ v, 1e-2)


@pytest.mark.parametrize(
    ("mode", "reduction"), [(torch.inference_mode, "sum"), (torch.no_grad, "mean")]
)
def test_without_gradients(mode: Callable[[], Any], reduction: str) -> None:
    """The caller's modes, and a progress bar, are no obstacles; each reduction has its scale."""
    problem = mlp_problem()
    A = problem.operator(KINDS["GGN"][0], reduction, progressbar=True)
    v = rand(A.shape[1])
    with mode():
        compiled = torch.compile(A.__matmul__, fullgraph=True, backend="eager")(v)
    assert_close(compiled, problem.ggn(reduction) @ v)


@slow
def test_attention_layers() -> None:
    """Their fused kernels are replaced in the graph, too."""
    problem = layer_problem()
    A = build("GGN", problem)
    v = rand(A.shape[1])
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend="eager")(v)
    assert_close(compiled, plain_product("GGN", problem, v))


@fast("GGN")
@pytest.mark.parametrize("name", ["MLP", pytest.param("decoder", marks=slow)])
def test_aot_eager(kind: str, name: str) -> None:
    """Also after PyTorch has traced the derivatives."""
    compare("aot_eager", kind, name)


@slow
@each_kind
def test_inductor(kind: str) -> None:
    """PyTorch's own compiler."""
    compare("inductor", kind, "MLP")


def compare(backend: str, kind: str, name: str) -> None:
    problem = PROBLEMS[name][0]()
    A = build(kind, problem)
    v = rand(A.shape[1])
    compiled = torch.compile(A.__matmul__, fullgraph=True, backend=backend)(v)
    assert_close(compiled, plain_product(kind, problem, v))
