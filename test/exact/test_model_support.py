"""Models that lack forward mode, second derivatives, ``torch.func``, or ``vmap``.

Another way to the same numbers is found, without a word; what has none is an error by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_cases import (
    PROBLEMS,
    SIZES,
    Apply,
    C,
    Params,
    Problem,
    assert_close,
    classes,
    cross_entropy,
    rand,
    vectors,
)
from exact_kinds import KINDS, build, dense
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from curvlinops import JacobianLinearOperator, PerExampleGradientLinearOperator

each_kind = pytest.mark.parametrize("kind", KINDS)
each_check = pytest.mark.parametrize("check_deterministic", [True, False])
# Without the check, the first product is the first look at the model.
each_mode = pytest.mark.parametrize(
    "options",
    [{}, {"check_deterministic": False}, {"check_deterministic": False, "keep_graph": True}],
    ids=["checked", "plain", "kept"],
)


# ---- custom functions ----------------------------------------------------------------------------
class OldCube(torch.autograd.Function):
    """Old style, which ``torch.func`` cannot transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cube(torch.autograd.Function):
    """No forward mode, and no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubeForward(Cube):
    """With forward mode, but no rule for vmap."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class CubeVmap(CubeForward):
    """With everything."""

    generate_vmap_rule = True


class OnceCube(Cube):
    """First derivatives in reverse mode only."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class OldOnceCube(torch.autograd.Function):
    """The same in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class OnceCubeForward(OnceCube):
    """First derivatives in both modes."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


def pair(
    inner: Callable[[Any, Tensor], Tensor], other: Callable[[Any, Tensor], Tensor]
) -> tuple[Problem, Problem, list[int]]:
    """The problem of ``tail(inner(head(x)))``; that of ``other`` for ``inner``; and the calls."""
    layers = {"head": nn.Linear(3, 4), "tail": nn.Linear(4, C)}
    calls: list[int] = []

    def counting(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        assert len(calls) < 500  # it tries for ever
        return self.tail(inner(self, self.head(x)))

    model = Apply(counting, **layers).double()
    reference = Apply(lambda self, x: self.tail(other(self, self.head(x))), **layers)
    data = vectors()
    return Problem(model, cross_entropy, data), Problem(reference, cross_entropy, data), calls


def checkpointed(self: Any, h: Tensor, use_reentrant: bool = False) -> Tensor:
    return checkpoint(lambda h: h**3, h, use_reentrant=use_reentrant)


SILENT = {
    "old style": lambda self, h: OldCube.apply(h),
    "no forward mode": lambda self, h: Cube.apply(h),
    "no vmap": lambda self, h: CubeForward.apply(h),
    "all": lambda self, h: CubeVmap.apply(h),
    "checkpoint": checkpointed,
}


def assert_products(A: Any, expected: Tensor) -> None:
    """Products with one column and with several, first and later."""
    for columns in ((), (3,), (1,), (3,)):
        V = rand(A.shape[1], *columns)
        assert_close(A @ V, expected @ V)


@each_kind
@each_mode
@pytest.mark.parametrize("name", SILENT)
def test_another_way(kind: str, options: dict[str, Any], name: str) -> None:
    """Found without a warning, whatever comes first: a vector or a matrix."""
    problem, reference, _ = pair(SILENT[name], lambda self, h: h**3)
    expected = dense(kind, reference)
    assert_products(build(kind, problem, **options), expected)
    V = rand(len(expected), 3)
    assert_close(build(kind, problem, **options) @ V, expected @ V)


@pytest.mark.parametrize("name", SILENT)
def test_another_way_is_remembered(name: str) -> None:
    """Later products do not try again what has failed."""
    problem, _, calls = pair(SILENT[name], lambda self, h: h**3)
    sizes = list(SIZES)
    for kind in ("Hessian", "GGN"):
        A = build(kind, problem)
        v, V = rand(A.shape[1]), rand(A.shape[1], 3)
        A @ v, A @ V, A @ v
        for X in (v, V):
            calls.clear()
            A @ X
            # checkpoints are evaluated again by each derivative
            assert calls == sizes or (name == "no vmap" and len(calls) <= 3 * len(sizes))


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("cls", [JacobianLinearOperator, PerExampleGradientLinearOperator])
def test_rows(cls: Any, name: str) -> None:
    """Jacobians and gradients of loss terms, and their adjoints."""
    problem, reference, _ = pair(SILENT[name], lambda self, h: h**3)

    def operator(p: Problem) -> Any:
        loss = () if cls is JacobianLinearOperator else (p.loss("mean"),)
        return cls(p.model, *loss, p.params, p.data)

    def rows(theta: Tensor) -> Tensor:
        predictions, targets = reference.predictions(theta), [y for _, y in reference.data]
        if cls is JacobianLinearOperator:
            return torch.cat([f.flatten() for f in predictions])
        return reference.loss("none")(torch.cat(predictions), torch.cat(targets))

    expected = torch.func.jacrev(rows)(reference.flat())
    A = operator(problem)
    for columns in ((), (3,), ()):
        V, U = rand(A.shape[1], *columns), rand(A.shape[0], *columns)
        assert_close((A @ V).reshape(-1, *columns), expected @ V)
        assert_close(A.T @ U, expected.T @ U)


@each_kind
@each_mode
@pytest.mark.parametrize("function", [OnceCube, OldOnceCube])
def test_once_differentiable(kind: str, options: dict[str, Any], function: Any) -> None:
    """PyTorch would take the derivative for a constant, without an error. The message names it."""
    problem, _, calls = pair(lambda self, h: function.apply(h), lambda self, h: h**3)
    A = build(kind, problem, **options)
    match = rf"The model uses {function.__name__}, whose backward .*once_differentiable"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing is kept
        for columns in ((), (3,), ()):
            calls.clear()
            with pytest.raises(NotImplementedError, match=match):
                A @ rand(A.shape[1], *columns)
            assert len(calls) < 20


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("function", [OnceCube, pytest.param(OldOnceCube, marks=pytest.mark.slow)])
def test_compiled_once_differentiable(function: Any) -> None:
    """Compiled code sees no custom function: without a look at construction, it returns zeros."""
    problem, _, _ = pair(lambda self, h: function.apply(h), lambda self, h: h**3)
    H = build("Hessian", problem)
    torch.compiler.reset()
    product = torch.compile(lambda v: H @ v, backend="eager")
    with pytest.raises(NotImplementedError, match=rf"The model uses {function.__name__}, whose"):
        product(rand(H.shape[1]))


@each_kind
@each_mode
def test_once_differentiable_with_forward_mode(kind: str, options: dict[str, Any]) -> None:
    """First derivatives suffice for J; the Hessian has none."""
    problem, reference, _ = pair(lambda self, h: OnceCubeForward.apply(h), lambda self, h: h**3)
    A = build(kind, problem, **options)
    v = rand(A.shape[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if kind == "Hessian":
            with pytest.raises(NotImplementedError, match=r"uses OnceCubeForward, whose backward"):
                A @ v
        else:
            expected, V = dense(kind, reference), rand(A.shape[1], 3)
            assert_products(A, expected)
            unseen = build(kind, problem, check_deterministic=False)
            assert_close(unseen @ V, expected @ V)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert ["no effect" in m and "OnceCubeForward" in m for m in messages] == [True] * (
        "keep_graph" in options
    )


@pytest.mark.parametrize("columns", [(), (3,)])
def test_once_differentiable_rows(columns: tuple[int, ...]) -> None:
    """Products with J by forward mode, those with its transpose by reverse mode."""
    problem, reference, _ = pair(lambda self, h: OnceCubeForward.apply(h), lambda self, h: h**3)
    J, other = (JacobianLinearOperator(p.model, p.params, p.data) for p in (problem, reference))
    V, U = rand(J.shape[1], *columns), rand(J.shape[0], *columns)
    assert_close(J @ V, other @ V)
    assert_close(J.T @ U, other.T @ U)
    problem, _, _ = pair(lambda self, h: OnceCube.apply(h), lambda self, h: h**3)
    J = JacobianLinearOperator(problem.model, problem.params, problem.data)
    assert_close(J.T @ U, J.T @ U)  # needs one derivative only
    with pytest.raises(NotImplementedError, match="uses OnceCube, whose backward"):
        J @ V


def test_once_differentiable_in_a_constant_part() -> None:
    """Where no derivative passes through, it does not matter: one of old style is not seen."""
    problem, reference, _ = pair(lambda self, h: h**3, lambda self, h: h**3)
    tail = problem.model.function

    problem.model.function = lambda self, x: tail(self, OldOnceCube.apply(x))
    reference.data = [(X**3, y) for X, y in problem.data]
    assert_products(build("Hessian", problem), reference.hessian())


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_errors_of_the_model_are_not_hidden(kind: str) -> None:
    """A mistake in the model is not taken for something that is missing, and comes once."""
    calls = []

    def fail(self: Any, h: Tensor) -> Tensor:
        calls.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    problem, _, _ = pair(fail, lambda self, h: h)
    for columns in ((), (3,)):
        A = build(kind, problem, check_deterministic=False)
        calls.clear()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            A @ rand(A.shape[1], *columns)
        assert len(calls) <= (2 if columns else 1)


def test_reentrant_checkpoints() -> None:
    """They work with nothing but ``backward``: an error that names the way out, no wrong number."""
    problem, _, _ = pair(lambda self, h: checkpointed(self, h, True), lambda self, h: h**3)
    for kind in ("Hessian", "GGN"):
        for columns in ((), (3,)):
            A = build(kind, problem, check_deterministic=False)
            with pytest.raises(RuntimeError, match="set use_reentrant=False"):
                A @ rand(A.shape[1], *columns)


# ---- attention -----------------------------------------------------------------------------------
def heads(x: Tensor) -> Tensor:
    return x.reshape(len(x), 2, 2, 2)  # examples, heads, positions, width


def by_hand(q: Tensor) -> Tensor:
    return (q @ q.mT / 2**0.5).softmax(-1) @ q


def attention(self: Any, x: Tensor) -> Tensor:
    q = heads(self.a(x))
    return self.o(F.scaled_dot_product_attention(q, q, q).reshape(len(x), -1))


def plain_attention(self: Any, x: Tensor) -> Tensor:
    return self.o(by_hand(heads(self.a(x))).reshape(len(x), -1))


class Attention(nn.Module):
    """PyTorch's layer, with or without weights of attention."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.e, self.o = nn.Linear(3, 8), nn.Linear(8, C)
        self.m = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x).reshape(-1, 2, 4)
        h, weights = self.m(h, h, h, need_weights=self.need_weights)
        return self.o(h.reshape(len(x), -1)) + (weights.sum() if self.need_weights else 0)


def transformer() -> nn.Module:
    """In evaluation mode, its layer has a fused fast path of inference, without derivatives."""
    return Apply(
        lambda self, x: self.o(self.t(self.e(x).reshape(-1, 2, 4))).mean(1),
        e=nn.Linear(3, 8),
        t=nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        o=nn.Linear(4, C),
    )


def attention_problem(model: nn.Module, reference: Any = None) -> tuple[Problem, Problem]:
    problem = Problem(model.double().eval(), cross_entropy, vectors())
    if reference is None:
        return problem, problem
    other = Apply(reference, **dict(model.named_children()))
    return problem, Problem(other, cross_entropy, problem.data)


ATTENTION: dict[str, tuple[Callable[[], tuple[Problem, Problem]], bool]] = {
    "function": (
        lambda: attention_problem(
            Apply(attention, a=nn.Linear(3, 8), o=nn.Linear(8, C)), plain_attention
        ),
        True,
    ),
    "layer": (lambda: attention_problem(Attention(need_weights=False)), True),
    "layer with weights": (lambda: attention_problem(Attention(need_weights=True)), False),
    "transformer": (lambda: attention_problem(transformer()), True),
}


def attention_dense(kind: str, reference: Problem) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return dense(kind, reference)


@each_kind
@each_mode
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(kind: str, options: dict[str, Any], name: str) -> None:
    """Fused kernels are replaced for derivatives, with one warning per operator."""
    build_problem, warned = ATTENTION[name]
    problem, reference = build_problem()
    expected = attention_dense(kind, reference)
    settings = attention_settings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for _ in range(2):
            A = build(kind, problem, **options)
            assert_products(A, expected)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert ["fused attention" in m and "math kernel" in m for m in messages] == [True] * 2 * warned
    assert attention_settings() == settings


def attention_settings() -> list[bool]:
    cuda = torch.backends.cuda
    fused = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
    return [*fused, torch.backends.mha.get_fastpath_enabled()]


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", ["function", "transformer"])
@each_check
def test_no_warning_for_who_has_chosen_already(
    kind: str, name: str, check_deterministic: bool
) -> None:
    """Warnings are errors here."""
    problem, reference = ATTENTION[name][0]()
    expected = attention_dense(kind, reference)
    with sdpa_kernel(SDPBackend.MATH):
        A = build(kind, problem, check_deterministic=check_deterministic)
        assert_products(A, expected)
        assert attention_settings()[:3] == [False, False, True]


def test_attention_settings_after_an_error() -> None:
    problem, _ = ATTENTION["transformer"][0]()
    settings = attention_settings()

    def fail(*args: Any) -> None:
        assert attention_settings() == [False, False, True, False]
        raise KeyboardInterrupt

    A = build("GGN", problem)
    problem.model.o.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        A @ rand(A.shape[1])
    assert attention_settings() == settings


# ---- other layers --------------------------------------------------------------------------------
@each_kind
@each_mode
@pytest.mark.parametrize("function", [False, True])
def test_embedding_bag(kind: str, options: dict[str, Any], function: bool) -> None:
    """PyTorch has its first derivative in reverse mode only. The message names a way out."""
    weight, data = rand(5, C), [(torch.randint(5, (n, 2)), classes(n)) for n in SIZES]
    if function:
        problem = Problem(
            lambda p, X: F.embedding_bag(X, p["w"]), cross_entropy, data, {"w": weight}
        )
    else:
        problem = Problem(nn.EmbeddingBag(5, C, _weight=weight), cross_entropy, data)
    A = build(kind, problem, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing is kept
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"Replace nn\.EmbeddingBag by nn\.Emb"):
                A @ rand(A.shape[1])
    J = JacobianLinearOperator(problem.model, problem.params, data)
    X = torch.cat([X for X, _ in data])
    U = rand(*J.T.in_shape[0])
    (result,) = J.T @ [U]
    expected = torch.zeros(5, C, dtype=torch.float64)
    expected.index_add_(0, X.flatten(), U.repeat_interleave(2, 0) / 2)
    assert_close(result, expected)


@each_kind
@each_mode
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: str, options: dict[str, Any], layer: Any) -> None:
    model = Apply(lambda self, x: self.l(x.unsqueeze(1))[0][:, 0], l=layer(3, C)).double()
    problem = Problem(model, cross_entropy, vectors())
    A = build(kind, problem, **options)
    assert_products(A, dense(kind, problem))


def potential(self: Any, x: Tensor) -> Tensor:
    """The gradient with respect to the input, as for forces of an energy."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(self.h(x).tanh().sum(), x, create_graph=True)
    return gradient


def plain_potential(self: Any, x: Tensor) -> Tensor:
    return (1 - self.h(x).tanh() ** 2) @ self.h.weight


@each_kind
@each_mode
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradients_inside(kind: str, options: dict[str, Any], mode: Callable[[], Any]) -> None:
    """Models that differentiate with respect to their inputs, also in the determinism check."""
    layer = nn.Linear(3, 4).double()
    data = vectors()
    problem = Problem(Apply(potential, h=layer), cross_entropy, data)
    reference = Problem(Apply(plain_potential, h=layer), cross_entropy, data)
    with mode():
        A = build(kind, problem, **options)
        assert_products(A, dense(kind, reference))


@each_kind
@each_mode
@pytest.mark.parametrize("name", ["sparse_embedding", "embedding", "embedding_function"])
def test_embeddings(kind: str, options: dict[str, Any], name: str) -> None:
    """Forward mode is wrong for ``padding_idx``: the first look finds out in the first product.

    Gradients may be sparse tensors.
    """
    problem = PROBLEMS[name]()
    expected = dense(kind, problem) if kind != "MC" else plain_monte_carlo(problem)
    for columns in ((), (3,)):
        A = build(kind, problem, **options)
        for _ in range(2):
            V = rand(A.shape[1], *columns)
            result = A @ V
            assert result.layout is torch.strided
            assert_close(result, expected @ V)


@each_mode
def test_padding_before_a_convolution(options: dict[str, Any]) -> None:
    """The layers suggest that many columns go through the forward pass together: not so."""

    def predict(self: Any, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.table.weight, padding_idx=1)
        return self.convolution(h.mT).tanh().mean(-1)

    layers = {"table": nn.Linear(2, 5, bias=False), "convolution": nn.Conv1d(2, C, 2)}
    model = Apply(predict, **layers).double()
    data = [(torch.randint(5, (n, 3)), classes(n)) for n in SIZES]
    data[0][0][0, 0] = 1
    problem = Problem(model, cross_entropy, data)
    expected = problem.ggn()  # in reverse mode, PyTorch treats the row as a constant
    for columns in ((3,), ()):
        V = rand(len(expected), *columns)
        assert_close(build("GGN", problem, **options) @ V, expected @ V)


def plain_monte_carlo(problem: Problem) -> Tensor:
    """The matrix of the reference's prediction, which has no embedding."""
    other = Problem(
        problem.predict, problem.loss, problem.data, problem.params, predict=problem.predict
    )
    return dense("MC", other)


def test_scripted_modules() -> None:
    """They cannot be watched; forward mode is not trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        embedding = nn.Embedding(5, C, padding_idx=1, dtype=torch.float64)
        nn.init.normal_(embedding.weight)
        scripted = torch.jit.trace(embedding, torch.tensor([0, 1]))
    row = embedding.weight.detach()[1].clone()

    def predict(params: Params, X: Tensor) -> Tensor:
        return torch.where((X == 1).unsqueeze(-1), row, params["layer.weight"][X])

    data = [(torch.randint(5, (n,)), classes(n)) for n in SIZES]
    data[0][0][0] = 1
    model = Apply(lambda self, x: self.layer(x), layer=scripted)
    problem = Problem(model, cross_entropy, data, predict=predict)
    for check_deterministic in (True, False):
        A = build("GGN", problem, check_deterministic=check_deterministic)
        v = rand(A.shape[1])
        assert_close(A @ v, problem.ggn() @ v)
