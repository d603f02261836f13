"""Models for which PyTorch's derivatives are wrong without an error, and models it trips over."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_cases import (
    OPERATORS,
    WEIGHT,
    Apply,
    C,
    Params,
    Problem,
    assert_close,
    assert_matrix,
    classes,
    cross_entropy,
    mlp,
    rand,
    vectors,
)
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    PerExampleGradientLinearOperator,
)

CLOSED = [*OPERATORS, PerExampleGradientLinearOperator]
each_operator = pytest.mark.parametrize("cls", OPERATORS)


def images(model: nn.Module, **options: Any) -> Problem:
    data = [(rand(n, 2, 4, 4), classes(n)) for n in (3, 1, 4)]
    return Problem(model.double(), cross_entropy, data, **options)


def vision_transformer() -> Problem:
    """The tangents of layer normalisation have wrong derivatives."""
    layers = [nn.Conv2d(2, 3, 2, stride=2), nn.Flatten(2), nn.LayerNorm(4), nn.Tanh(), nn.Flatten()]
    return images(nn.Sequential(*layers, nn.Linear(12, C)))


def functional_norm() -> Problem:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.layer_norm(self.a(x), (4,)))

    return Problem(
        Apply(forward, a=nn.Linear(3, 4), b=nn.Linear(4, C)).double(), cross_entropy, vectors()
    )


def determinant() -> Problem:
    def predict(params: Params, X: Tensor) -> Tensor:
        W = params["W"]
        return torch.outer(X.sum(1), W.logsumexp(0)) * torch.linalg.det(W) + X @ W

    W = rand(3, 3) + torch.eye(3, dtype=torch.float64)
    return Problem(predict, cross_entropy, vectors(), params={"W": W}, predict=predict)


def circular_padding() -> Problem:
    """The padding writes in place."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    return images(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(48, C)))


def constant_in_place() -> Problem:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.arange(4.0, dtype=x.dtype)
        scale.mul_(2)
        return self.b((self.a(x) * scale).flatten(1))

    return images(Apply(forward, a=nn.Conv2d(2, 3, 1), b=nn.Linear(48, C)))


def frozen_by_no_grad() -> Problem:
    """Forward mode ignores ``no_grad``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x).tanh()
        return self.b(h)

    return Problem(
        Apply(forward, a=nn.Linear(3, 4), b=nn.Linear(4, C)).double(), cross_entropy, vectors()
    )


def hook_on_gradients() -> Problem:
    """Forward mode ignores hooks."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g / 2)
        return self.b(h.tanh())

    def predict(params: Params, X: Tensor) -> Tensor:
        h = X @ params["a.weight"].T + params["a.bias"]
        h = torch.tanh(h / 2 + (h / 2).detach())
        return h @ params["b.weight"].T + params["b.bias"]

    model = Apply(forward, a=nn.Linear(3, 4), b=nn.Linear(4, C)).double()
    return Problem(model, cross_entropy, vectors(), predict=predict)


def product_of_segments() -> Problem:
    """``scatter_reduce`` has a wrong formula in forward mode."""
    index = torch.tensor([0, 1, 2, 0])

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.ones_like(h[:, :C]).scatter_reduce(1, index.expand(len(x), 4), h, "prod")

    def predict(params: Params, X: Tensor) -> Tensor:
        h = X @ params["a.weight"].T + params["a.bias"]
        return torch.stack([h[:, 0] * h[:, 3], h[:, 1], h[:, 2]], dim=1)

    model = Apply(forward, a=nn.Linear(3, 4)).double()
    return Problem(model, cross_entropy, vectors(), predict=predict)


def weight_norm() -> Problem:
    """PyTorch's fused weight norm has a wrong second derivative."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, C).double())
    model = Apply(lambda self, x: self.layer(x), layer=layer)

    def predict(params: Params, X: Tensor) -> Tensor:
        g, v = (params[f"layer.parametrizations.weight.original{i}"] for i in (0, 1))
        return X @ (v * g / v.norm(dim=1, keepdim=True)).T + params["layer.bias"]

    return Problem(model, cross_entropy, vectors(), predict=predict)


def complex_weights() -> Problem:
    def predict(params: Params, X: Tensor) -> Tensor:
        W = params["W"]
        return F.linear(torch.complex(X, X.flip(1)), torch.complex(W, W.sin())).abs() ** 2

    return Problem(predict, cross_entropy, vectors(), params={"W": rand(C, 3)}, predict=predict)


class Cube(torch.autograd.Function):
    """Its tangent takes an intermediate result for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.square = x * x
        return x * ctx.square

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x * x * g

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.square * tangent


def custom_tangent() -> Problem:
    model = Apply(
        lambda self, x: self.b(Cube.apply(self.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, C)
    )

    def predict(params: Params, X: Tensor) -> Tensor:
        h = (X @ params["a.weight"].T + params["a.bias"]) ** 3
        return h @ params["b.weight"].T + params["b.bias"]

    return Problem(model.double(), cross_entropy, vectors(), predict=predict)


def vmap_inside() -> Problem:
    return Problem(
        Apply(lambda self, x: torch.vmap(self.net)(x), net=mlp()).double(),
        cross_entropy,
        vectors(),
        predict=lambda p, x: (
            torch.tanh(x @ p["net.0.weight"].T + p["net.0.bias"]) @ p["net.2.weight"].T
            + p["net.2.bias"]
        ),
    )


def weight_vector() -> Problem:
    def predict(params: Params, X: Tensor) -> Tensor:
        return torch.stack([F.linear(X, params["w"]), F.linear(X, params["w"]).sin()], dim=1)

    data = vectors(lambda *shape: torch.randint(2, shape))
    return Problem(predict, cross_entropy, data, params={"w": rand(3)}, predict=predict)


def expanded() -> Problem:
    params = {"w": rand(1).expand(3)}
    return Problem(
        lambda p, X: torch.outer(X @ p["w"], rand(C) * 0 + torch.arange(C)).tanh(),
        cross_entropy,
        vectors(),
        params=params,
        predict=lambda p, X: torch.outer(X @ p["w"], torch.arange(C).double()).tanh(),
    )


def compiled() -> Problem:
    problem = Problem(mlp(), cross_entropy, vectors())
    reference, params = problem.model, problem.params
    problem.model = torch.compile(problem.model, backend="aot_eager")
    problem.params = {f"_orig_mod.{name}": p for name, p in params.items()}
    problem.predict = lambda p, X: torch.func.functional_call(
        reference, {name.removeprefix("_orig_mod."): t for name, t in p.items()}, (X,)
    )
    return problem


CASES: list[Callable[[], Problem]] = [
    vision_transformer,
    functional_norm,
    determinant,
    circular_padding,
    constant_in_place,
    frozen_by_no_grad,
    hook_on_gradients,
    product_of_segments,
    weight_norm,
    custom_tangent,
    complex_weights,
    vmap_inside,
    weight_vector,
    expanded,
    compiled,
]


@each_operator
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_equals_autodiff(cls: Any, build: Any, keep_graph: bool, check: bool) -> None:
    problem = build()
    dense = problem.dense(cls)
    A = problem.operator(cls, keep_graph=keep_graph, check_deterministic=check)
    for columns in ((), (3,), ()):
        V = rand(dense.shape[1], *columns)
        assert_close(A @ V, dense @ V, 1e-11, scale=(dense.norm() * V.norm()).item())


# Forward mode alone makes no graph, on which there could be a hook.
@pytest.mark.parametrize(
    "build",
    [build for build in CASES if build is not hook_on_gradients],
    ids=lambda build: build.__name__,
)
def test_jacobian(build: Any) -> None:
    problem = build()
    J = JacobianLinearOperator(problem.model, problem.params, problem.data)
    expected = problem.jacobian()
    for columns in ((), (3,)):
        V, U = rand(expected.shape[1], *columns), rand(expected.shape[0], *columns)
        assert_close((J @ V).reshape(-1, *columns), expected @ V, 1e-11)
        assert_close(J.T @ U, expected.T @ U, 1e-11)


@each_operator
def test_threads(cls: Any) -> None:
    """The state of PyTorch's forward mode is shared by all threads."""
    problem = Problem(mlp(), cross_entropy, vectors())
    A, dense = problem.operator(cls), problem.dense(cls)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                assert_matrix(A, dense)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_autocast_inside_of_the_model() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()

    model = Apply(forward, net=mlp()).float()
    data = [(X.float(), y) for X, y in vectors()]
    for cls in OPERATORS:
        A = Problem(model, cross_entropy, data).operator(cls)
        assert (A @ rand(A.shape[1]).float()).isfinite().all()


@each_operator
def test_kept_graphs_are_freed_at_once(cls: Any) -> None:
    problem = Problem(mlp(), cross_entropy, vectors())
    A = problem.operator(cls, keep_graph=True)
    A @ rand(A.shape[1])
    graphs = [weakref.ref(entry.graph) for entry in A._kept._entries.values()]
    gc.collect()
    gc.disable()
    try:
        del A
        assert graphs and all(graph() is None for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.parametrize("cls", [HessianLinearOperator, EFLinearOperator])
def test_kept_graphs_follow_the_options_of_a_loss(cls: Any) -> None:
    from functools import partial

    weight = torch.ones(C, dtype=torch.float64)
    problem = Problem(
        mlp(), lambda r: partial(F.cross_entropy, weight=weight, reduction=r), vectors()
    )
    A = problem.operator(cls, keep_graph=True)
    assert_matrix(A, problem.dense(cls))
    weight[0] = 3
    assert_matrix(A, problem.dense(cls))


def smoothed() -> nn.Module:
    return nn.CrossEntropyLoss(weight=WEIGHT.clone(), label_smoothing=0.1)


def add_hook(loss: nn.Module) -> None:
    loss.register_forward_hook(lambda module, inputs, value: value**2)


#: A loss, a change of it, and the operators for which both are enough.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object], Any]] = {
    "weight": (smoothed, lambda loss: setattr(loss, "weight", WEIGHT.flip(0)), CLOSED),
    "no weight": (smoothed, lambda loss: setattr(loss, "weight", None), CLOSED),
    "smoothing": (smoothed, lambda loss: setattr(loss, "label_smoothing", 0.4), CLOSED),
    "ignore_index": (smoothed, lambda loss: setattr(loss, "ignore_index", 1), CLOSED),
    "reduction": (smoothed, lambda loss: setattr(loss, "reduction", "sum"), CLOSED),
    "generic option": (nn.HuberLoss, lambda loss: setattr(loss, "delta", 0.1), OPERATORS[:2]),
    "generic mean": (nn.HuberLoss, lambda loss: setattr(loss, "reduction", "sum"), OPERATORS[:2]),
    "hook": (nn.CrossEntropyLoss, add_hook, OPERATORS[:2]),
}


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize(
    ("name", "cls"), [(name, cls) for name, (*_, classes) in CHANGES.items() for cls in classes]
)
def test_products_follow_a_loss(name: str, cls: Any, keep_graph: bool) -> None:
    build, change, _ = CHANGES[name]
    loss = build()

    def current(reduction: str) -> Any:
        copied = copy.deepcopy(loss)
        copied.reduction = reduction
        return copied

    targets = [lambda *shape: 3 * rand(*shape), C] if isinstance(loss, nn.HuberLoss) else []
    data = vectors(*targets)
    problem = Problem(mlp(), current, data)
    options = {} if cls is PerExampleGradientLinearOperator else {"keep_graph": keep_graph}
    A = cls(problem.model, loss, problem.params, problem.data, **options)
    assert_matrix(A, before := problem.dense(cls, loss.reduction))
    change(loss)
    problem.classes = None if name == "hook" else -1  # then averaged batch by batch
    after = problem.dense(cls, loss.reduction)
    if cls is PerExampleGradientLinearOperator:
        assert A.scale == pytest.approx(problem.scale(loss.reduction).item())
    else:
        assert not torch.allclose(before, after)
    assert_matrix(A, after)
    assert_matrix(A, after)
    loss.reduction = "none"
    with pytest.raises(ValueError, match="reduction 'none'"):
        assert_matrix(A, after)
