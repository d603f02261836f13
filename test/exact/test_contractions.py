"""Linear layers and convolutions have PyTorch's values, and derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_cases import rand
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.profiler import ProfilerActivity, profile

from curvlinops.contractions import Contractions, _Linear

#: Function, shapes of x, W and bias, options.
CASES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "linear": (F.linear, (3, 2), (4, 2), (4,), {}),
    "linear, no bias": (F.linear, (3, 2), (4, 2), None, {}),
    "linear, one input": (F.linear, (2,), (4, 2), (4,), {}),
    "linear, sequence": (F.linear, (2, 1, 3, 2), (4, 2), (4,), {}),
    "conv1d": (F.conv1d, (2, 2, 5), (3, 2, 2), (3,), {}),
    "conv1d, input that is not used whole": (F.conv1d, (2, 2, 6), (3, 2, 3), (3,), {"stride": 2}),
    "conv2d": (F.conv2d, (2, 2, 4, 3), (3, 2, 2, 3), (3,), {"padding": (1, 2)}),
    "conv2d, groups": (F.conv2d, (2, 4, 3, 3), (2, 2, 2, 2), None, {"groups": 2, "stride": (2,)}),
    "conv2d, dilation": (F.conv2d, (1, 1, 5, 4), (2, 1, 2, 2), (2,), {"dilation": (2, 1)}),
    "conv3d": (F.conv3d, (1, 2, 2, 3, 2), (2, 2, 2, 2, 1), (2,), {"padding": 1, "stride": 2}),
    "conv_transpose1d": (F.conv_transpose1d, (2, 2, 3), (2, 3, 2), (3,), {"padding": 1}),
    "conv_transpose2d": (
        *(F.conv_transpose2d, (1, 2, 2, 2), (2, 2, 2, 3), (4,)),
        {"stride": 2, "output_padding": (1, 0), "groups": 2, "dilation": (1, 2)},
    ),
    "conv_transpose3d": (F.conv_transpose3d, (1, 2, 1, 2, 2), (2, 1, 1, 2, 2), None, {}),
}


def build(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function that calls a layer, and its arguments."""
    layer, *shapes, options = CASES[name]
    tensors = [rand(*shape).requires_grad_() for shape in shapes if shape is not None]
    return lambda x, W, bias=None: layer(x, W, bias, **options), tensors


def used(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function's result comes from a contraction, under the mode."""
    with Contractions():
        return "_Contraction" in type(function(*args).grad_fn).__name__


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str) -> None:
    """Finite differences know them; forward mode runs alone and inside of reverse mode."""
    function, tensors = build(name)

    def contracted(*args: Tensor) -> Tensor:
        with Contractions():
            return function(*args)

    assert used(function, *tensors)
    torch.testing.assert_close(contracted(*tensors), function(*tensors))
    assert gradcheck(contracted, tensors, check_forward_ad=True)
    assert gradgradcheck(contracted, tensors)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_higher_order(name: str) -> None:
    """Finite differences know them; values of parameters' gradients may be left out before."""
    function, tensors = build(name)
    mode, found = Contractions(), []

    def gradients(*args: Tensor, orders: int = 2) -> tuple[Tensor, ...]:
        with mode:
            y = function(*args)
        derivatives: tuple[Tensor, ...] = (y.pow(3),)
        for _ in range(orders):
            # linear in the gradients of parameters
            first, *others = derivatives
            value = first.pow(2).sum() + sum(d.cumsum(0).sum() for d in others)
            derivatives = torch.autograd.grad(value, args, create_graph=True)
        return derivatives

    assert gradgradcheck(gradients, tensors, fast_mode=True)
    for context in (mode.without_parameter_gradients, nullcontext):
        with context():
            for_x, *_ = gradients(*tensors, orders=3)
        found.append(torch.autograd.grad(for_x.sum(), tensors, materialize_grads=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["linear", "linear, sequence", "conv2d"])
def test_several_columns(name: str) -> None:
    """They are multiplied at once, without warnings of vmap that it has no rule for something."""
    function, tensors = build(name)
    with Contractions():
        y = function(*tensors)
    u = rand(*y.shape).requires_grad_()
    gradients = torch.autograd.grad(y, tensors, u, create_graph=True)

    def multiply(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradients, (u, *tensors[:2]), cotangents, retain_graph=True)

    columns = tuple(rand(3, *x.shape) for x in tensors)
    expected = [multiply(column) for column in zip(*columns, strict=True)]
    torch.testing.assert_close(
        torch.vmap(multiply)(columns), tuple(map(torch.stack, zip(*expected, strict=True)))
    )


@pytest.mark.parametrize("constant", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[3] is not None])
def test_constant_arguments(name: str, constant: tuple[int, ...]) -> None:
    """They have no tangent and need no gradient, and cost nothing."""
    function, tensors = build(name)
    for i in constant:
        tensors[i] = tensors[i].detach()

    def contracted(*args: Tensor) -> Tensor:
        with Contractions():
            return function(*args)

    assert gradcheck(contracted, tensors, check_forward_ad=True)


@pytest.mark.parametrize("name", CASES)
def test_without_parameter_gradients(name: str) -> None:
    """They are zero, but have their derivatives."""
    function, (x, W, *bias) = build(name)
    products = []
    for skip in (False, True):
        mode = Contractions()
        with mode:
            y = function(x, W, *bias)
        mode.skipping = skip
        gradients = torch.autograd.grad(y.pow(3).sum(), (x, W, *bias), create_graph=True)
        mode.skipping = False
        if skip:
            assert not any(g.any() for g in gradients[1:])
        torch.manual_seed(1)
        V = [torch.rand_like(g) for g in gradients]
        products.append(torch.autograd.grad(gradients, (x, W, *bias), V))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0, 1), (1, 2), (2,)])
@pytest.mark.parametrize("name", ["linear, sequence", "conv2d", "conv_transpose2d"])
def test_derivatives_by_gradients_of_outputs_have_no_extra_sums(
    name: str, wanted: tuple[int, ...]
) -> None:
    """Linear layers add a product to a product, and none has to add a bias in a pass of its own."""
    function, tensors = build(name)
    with Contractions():
        y = function(*tensors)
    u = rand(*y.shape).requires_grad_()
    inputs = [tensors[i] for i in wanted]
    gradients = torch.autograd.grad(y, inputs, u, create_graph=True)
    cotangents = [rand(*x.shape) for x in inputs]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (product,) = torch.autograd.grad(gradients, u, cotangents)
    sums = [
        e.name
        for e in profiler.events()
        if e.name in ("aten::add", "aten::add_") and "conv" not in getattr(e.cpu_parent, "name", "")
    ]
    assert sums == ["aten::add_"] * (name != "linear, sequence" and {0, 1} <= {*wanted})
    assert product.is_contiguous()


@pytest.mark.parametrize("computed", [0, 1])
def test_gradients_of_computed_parameters_are_not_skipped(computed: int) -> None:
    """Their values take part in derivatives by what a parameter was computed from."""
    x, W, bias = rand(3, 2), rand(4, 2).requires_grad_(), rand(4).requires_grad_()
    factor = [W, bias][computed]

    def layer() -> Tensor:
        return F.linear(x, *(p**2 if p is factor else p for p in (W, bias)))

    mode = Contractions()
    with mode:
        y = layer()
    with mode.without_parameter_gradients():
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), factor, create_graph=True)
    (expected,) = torch.autograd.grad(layer().pow(2).sum(), factor)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_orders_of_axes(axes: tuple[int, int, int], bias: bool) -> None:
    """Inputs, gradients and sums of products may be stored in any order."""

    def stored(x: Tensor) -> Tensor:
        return x.permute(axes).contiguous().permute([axes.index(i) for i in range(3)])

    x, u = stored(rand(3, 4, 5)).requires_grad_(), stored(rand(3, 4, 2)).requires_grad_()
    parameters = [rand(2, 5).requires_grad_(), rand(2).requires_grad_()][: 1 + bias]
    cotangents = [stored(rand(3, 4, 5)), *(rand(*p.shape) for p in parameters)]
    found = []
    for mode in (Contractions(), nullcontext()):
        with mode:
            y = F.linear(x, *parameters)
        gradients = torch.autograd.grad(y, (x, *parameters), u, create_graph=True)
        found.append(torch.autograd.grad(gradients, (u, x, parameters[0]), cotangents))
    torch.testing.assert_close(*found)


def test_sums_are_added_to_where_they_are() -> None:
    """Also if a product is stored in another order than usual."""
    form = _Linear(Contractions(), rand(3, 4, 5), rand(2, 5))
    total = rand(4, 3, 2).transpose(0, 1)
    x, W = rand(3, 4, 5), rand(2, 5)
    expected = total + F.linear(x, W)
    assert form.add(total, 0, x, W) is total
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("sizes", [(2, 0), (0, 3), (0, 0)])
def test_layers_without_features(sizes: tuple[int, int]) -> None:
    """PyTorch has them."""
    x, W = rand(4, sizes[0]).requires_grad_(), rand(sizes[1], sizes[0]).requires_grad_()
    bias, u = rand(sizes[1]).requires_grad_(), rand(4, sizes[1]).requires_grad_()
    derivatives = []
    for mode in (Contractions(), nullcontext()):
        with mode:
            y = F.linear(x, W, bias)
        gradients = torch.autograd.grad(y, (x, W, bias), u, create_graph=True)
        cotangents = [torch.ones_like(g) for g in gradients]
        second = torch.autograd.grad(
            gradients, (u, x, W), cotangents, allow_unused=True, materialize_grads=True
        )
        derivatives.append([y, *gradients, *second])
    torch.testing.assert_close(*derivatives)


@pytest.mark.parametrize("cutting", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_graphs_of_tangents(name: str, cutting: bool) -> None:
    """They are recorded unless nobody needs them; functions have graphs in both cases."""
    function, tensors = build(name)
    directions = [rand(*x.shape).requires_grad_() for x in tensors]
    mode = Contractions()
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, tensors, directions)
        with mode, mode.without_graphs_of_tangents() if cutting else nullcontext():
            y, tangent = forward_ad.unpack_dual(function(*duals))
    assert y.requires_grad
    assert tangent.requires_grad is not cutting
    if not cutting:
        found = torch.autograd.grad(tangent.sum(), (*directions, *tensors), allow_unused=True)
        y = function(*tensors)
        u = torch.ones_like(y).requires_grad_()
        expected = torch.autograd.grad(y, tensors, u, create_graph=True)
        second = torch.autograd.grad(expected, tensors, directions, allow_unused=True)
        torch.testing.assert_close(found, (*expected, *second))


def special() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Products in which something else takes part."""

    class Subclass(Tensor):
        pass

    def hooks(x: Tensor, W: Tensor) -> Tensor:
        with save_on_cpu():
            return F.linear(x, W)

    def autocast(x: Tensor, W: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, W)

    return {
        "vector": lambda x, W: F.linear(x, W[0]),
        "subclass": lambda x, W: F.linear(x.as_subclass(Subclass), W),
        "vmap": lambda x, W: torch.vmap(F.linear, (0, None))(x, W),
        "saved tensor hooks": hooks,
        "autocast": autocast,
        "complex": lambda x, W: F.linear(x.to(torch.complex128), W.to(torch.complex128)),
        "unbatched": lambda x, W: F.conv1d(x[:1], W.unsqueeze(1)),
        "same": lambda x, W: F.conv1d(x.unsqueeze(1), W[:, None, :1], padding="same"),
        "other functions": lambda x, W: x @ W.T,
    }


@pytest.mark.parametrize("name", special())
def test_what_is_left_to_pytorch(name: str) -> None:
    function, x, W = special()[name], rand(3, 2), rand(4, 2).requires_grad_()
    assert not used(function, x, W)
    with Contractions():
        actual = function(x, W)
    assert torch.equal(actual, function(x, W))


def test_arguments_by_keyword() -> None:
    x, W, bias = rand(3, 2), rand(4, 2).requires_grad_(), rand(4)
    assert used(lambda: F.linear(bias=bias, weight=W, input=x))
    assert used(nn.Conv1d(2, 3, 2, bias=False).double(), rand(1, 2, 4))
    with Contractions():
        torch.testing.assert_close(F.linear(weight=W, input=x, bias=bias), x @ W.T + bias)


def test_wrong_arguments_have_the_errors_of_pytorch() -> None:
    with Contractions():
        for call in (lambda: F.linear(rand(3, 2), rand(4, 3)), lambda: F.linear(rand(3))):
            with pytest.raises((RuntimeError, TypeError), match=r"shapes|linear\(\)"):
                call()
