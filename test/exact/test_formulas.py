"""Functions with formulas of their own have PyTorch's values, and right derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_cases import rand
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops.contractions import Contractions

MASK = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)

#: Functions that are evaluated by formulas in forward mode, and shapes of their arguments.
FORWARD: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "softmax": (lambda x: x.softmax(-1), [(2, 3, 4)]),
    "softmax, first axis": (lambda x: F.softmax(x, dim=0), [(3, 4)]),
    "torch.softmax": (lambda x: torch.softmax(x, 1), [(2, 3, 4)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "layer norm, no bias": (lambda x, w: F.layer_norm(x, (4,), w), [(2, 4), (4,)]),
    "layer norm, two axes": (
        lambda x, w, b: F.layer_norm(x, [3, 4], weight=w, bias=b, eps=0.1),
        [(2, 3, 4), (3, 4), (3, 4)],
    ),
    "layer norm, plain": (lambda x: F.layer_norm(x, (4,)), [(3, 4)]),
    "masked fill": (lambda x: x.masked_fill(MASK, -2.5).sin(), [(5, 3, 4)]),
    "masked fill, infinite": (
        lambda x: torch.masked_fill(x, mask=MASK[:1], value=-math.inf).softmax(-1),
        [(2, 3, 4)],
    ),
    "masked fill, axis of size one": (lambda x: x.masked_fill(MASK[:, :1], 1), [(5, 3, 4)]),
    "numbers": (lambda x: (2 * x - 1.5) / 3 + torch.mul(x, 2) + (1 + x), [(2, 3)]),
}


def build(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function under the mode, and its arguments."""
    function, shapes = FORWARD[name]
    return contracted(function), [rand(*shape).requires_grad_() for shape in shapes]


def contracted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function under the mode."""

    def call(*args: Tensor) -> Tensor:
        with Contractions():
            return function(*args)

    return call


class Operations(TorchDispatchMode):
    """Lists the operations that are done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FORWARD)
def test_derivatives(name: str) -> None:
    """Finite differences know them; forward mode runs alone and inside of reverse mode."""
    function, tensors = build(name)
    torch.testing.assert_close(function(*tensors), FORWARD[name][0](*tensors), rtol=0, atol=0)
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("given", range(1, 8))
def test_tangents_and_graph(name: str, given: int) -> None:
    """Some arguments have tangents, all have gradients: of the function, and of its gradient."""
    function, tensors = build(name)
    given %= 2 ** len(tensors)
    tangents = [rand(*x.shape) if given >> i & 1 else None for i, x in enumerate(tensors)]

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [
                x if t is None else forward_ad.make_dual(x, t)
                for x, t in zip(tensors, tangents, strict=True)
            ]
            y, tangent = forward_ad.unpack_dual(function(*duals))
        u = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
        gradients = torch.autograd.grad(y, tensors, u, create_graph=True)
        squares = sum((g**2).sum() for g in gradients)
        second = torch.autograd.grad(
            squares, [*tensors, u], allow_unused=True, materialize_grads=True
        )
        return [y, torch.zeros_like(y) if tangent is None else tangent, *gradients, *second]

    actual, expected = derivatives(function), derivatives(FORWARD[name][0])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "number"), [("softmax", 4), ("layer norm", 9), ("torch.softmax", 4)]
)
def test_few_operations(name: str, number: int) -> None:
    """Forward mode does not take many small steps."""
    function, tensors = build(name)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, rand(*x.shape)) for x in tensors]
        with Operations() as operations:
            function(*duals)
    computing = [name for name in operations.names if "same" not in name]
    assert len(computing) <= number


@pytest.mark.parametrize("function", [torch.add, torch.sub, Tensor.mul, Tensor.div])
def test_numbers_have_no_tangents(function: Any) -> None:
    """They are not taken for tensors with tangents of zeros."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(rand(3), rand(3))
        with Contractions(), Operations() as operations:
            function(x, 2.0)
    assert not any("zerotensor" in name for name in operations.names)


@pytest.mark.parametrize("transposing", [False, True])
@pytest.mark.parametrize("variable", range(1, 8))
def test_second_derivatives_of_layer_norm(variable: int, transposing: bool) -> None:
    """Of all gradients there are, where only some arguments are variables."""
    shapes = FORWARD["layer norm, two axes"][1]
    tensors = [rand(*s).requires_grad_(bool(variable >> i & 1)) for i, s in enumerate(shapes)]
    variables = [x for x in tensors if x.requires_grad]
    cotangents = [rand(*x.shape) for x in variables]
    u = rand(*shapes[0]).requires_grad_()

    def derivatives(mode: Any) -> list[Tensor]:
        with mode:
            y = F.layer_norm(tensors[0], [3, 4], tensors[1], tensors[2], 0.1)
            assert mode is not by_formula or "_LayerNorm" in type(y.grad_fn).__name__
            gradients = torch.autograd.grad(y, variables, u, create_graph=True)
        wanted = [u] if transposing else [u, *variables]
        return list(
            torch.autograd.grad(
                gradients, wanted, cotangents, allow_unused=True, materialize_grads=True
            )
        )

    by_formula = Contractions()
    with by_formula.constant_layers() if transposing else nullcontext():
        actual = derivatives(by_formula)
    torch.testing.assert_close(actual, derivatives(nullcontext()))


@pytest.mark.parametrize("name", ["layer norm", "layer norm, two axes", "layer norm, no bias"])
def test_without_gradients_of_parameters(name: str) -> None:
    """They are zero, but have their derivatives."""
    shapes = FORWARD[name][1]
    tensors, cotangents = ([rand(*s) for s in shapes] for _ in range(2))
    products = []
    for skipping in (False, True):
        x, *parameters = (t.clone().requires_grad_() for t in tensors)
        mode = Contractions()
        with mode:
            y = FORWARD[name][0](x, *parameters).pow(3).sum()
        with mode.without_parameter_gradients() if skipping else nullcontext():
            gradients = torch.autograd.grad(y, (x, *parameters), create_graph=True)
        assert not skipping or not any(g.any() for g in gradients[1:])
        products.append(torch.autograd.grad(gradients, (x, *parameters), cotangents))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("computed", [0, 1])
def test_gradients_of_computed_parameters_are_not_skipped(computed: int) -> None:
    """Their values take part in derivatives by what a parameter was computed from."""
    x, parameters = rand(3, 4), [rand(4).requires_grad_() for _ in range(2)]
    squared = [p**2 if i == computed else p for i, p in enumerate(parameters)]
    mode, gradients = Contractions(), []
    for context in (mode, nullcontext()):
        with context:
            y = F.layer_norm(x, (4,), *squared)
        with mode.without_parameter_gradients():
            loss = y.pow(2).sum()
            gradients += torch.autograd.grad(loss, parameters[computed], create_graph=True)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["layer norm", "layer norm, two axes", "layer norm, plain"])
def test_third_derivatives_of_layer_norm(name: str) -> None:
    """Those of PyTorch are wrong, so that finite differences have to tell."""
    function, tensors = build(name)
    u = rand(*tensors[0].shape)

    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        y = function(*arguments).tanh()
        return torch.autograd.grad(y, arguments, u, create_graph=True)

    assert gradgradcheck(gradients, tensors)
    # which does not tell whether the second ones are right that are differentiated
    cotangents = [rand(*x.shape) for x in tensors]
    second, expected = (
        torch.autograd.grad(
            gradients(*tensors), tensors, cotangents, create_graph=record, materialize_grads=True
        )
        for record in (True, False)
    )
    torch.testing.assert_close(second, expected)


def test_masked_entries_have_no_gradients() -> None:
    """Not even where those of the output are infinite or no numbers; also not for columns."""
    x = rand(5, 3, 4).requires_grad_()
    u = rand(5, 3, 4)
    u[:, MASK], u[0, ~MASK] = math.nan, math.inf
    y = contracted(lambda x: x.masked_fill(MASK, 0))(x)
    assert "_MaskedFill" in type(y.grad_fn).__name__
    (gradient,) = torch.autograd.grad(y, x, u, retain_graph=True)
    assert torch.equal(gradient, u.masked_fill(MASK, 0))
    pull = lambda u: torch.autograd.grad(y, x, u, retain_graph=True)[0]  # noqa: E731
    assert torch.equal(torch.vmap(pull)(torch.stack([u, -u])), torch.stack([gradient, -gradient]))


def test_gelu() -> None:
    """It has right derivatives up to the third order."""
    gelu = contracted(F.gelu)
    x = (3 * rand(7)).requires_grad_()
    assert "_Gelu" in type(gelu(x).grad_fn).__name__
    torch.testing.assert_close(gelu(x), F.gelu(x), rtol=0, atol=0)
    assert gradcheck(gelu, x)
    assert gradgradcheck(gelu, x)

    def third(function: Callable[..., Tensor]) -> Tensor:
        y = function(x).pow(2)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y

    torch.testing.assert_close(third(gelu), third(F.gelu))
    with forward_ad.dual_level():  # left to PyTorch
        tangent = rand(7)
        y = gelu(forward_ad.make_dual(x, tangent))
        expected = F.gelu(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(*(forward_ad.unpack_dual(z).tangent for z in (y, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivative_of_gelu_in_place(dtype: torch.dtype) -> None:
    """Without a graph, it is computed in place, and leaves what it is computed from alone."""
    x = torch.linspace(-6, 6, 41, dtype=dtype).requires_grad_()
    g, c = torch.cos(3 * x).detach().requires_grad_(), torch.sin(x).detach()
    results = []
    for function in (contracted(F.gelu), F.gelu):
        (gradient,) = torch.autograd.grad(function(x), x, g, create_graph=True)
        results += [torch.autograd.grad(gradient, (x, g), c, retain_graph=True) for _ in range(2)]
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposing", [False, True])
def test_the_slope_of_gelu_is_computed_once(transposing: bool) -> None:
    """It takes longer than all else: for the gradient, and for products with its derivatives."""
    mode, x, u = Contractions(), rand(4).requires_grad_(), rand(4).requires_grad_()
    with Operations() as operations:
        with mode:
            y = F.gelu(x)
        with mode.constant_layers() if transposing else nullcontext():
            (gradient,) = torch.autograd.grad(y, x, u, create_graph=True)
        wanted = (u,) if transposing else (u, x)
        for _ in range(2):
            torch.autograd.grad(gradient, wanted, rand(4), retain_graph=True)
        (again,) = torch.autograd.grad(y, x, u, retain_graph=True)
    assert operations.names.count("aten.gelu_backward.default") == 1
    torch.testing.assert_close(again, gradient)
    torch.testing.assert_close(again, torch.autograd.grad(F.gelu(x), x, u)[0])


def test_the_slope_of_gelu_is_not_a_constant() -> None:
    """It was computed before a derivative is asked for that depends on it."""
    x, u = rand(5).requires_grad_(), rand(5).requires_grad_()
    y = contracted(F.gelu)(x)
    torch.autograd.grad(y, x, u, create_graph=True)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(y, x, u, create_graph=True)
        (for_u,) = torch.autograd.grad(gradient.sin().sum(), u, create_graph=True)
        return torch.autograd.grad(for_u.cos().sum(), (x, u), retain_graph=True)

    torch.testing.assert_close(second(y), second(F.gelu(x)))


def test_second_derivative_of_gelu_of_several_columns() -> None:
    """They are multiplied at once, not one after the other after an error."""
    x, g, C = rand(5).requires_grad_(), rand(5).requires_grad_(), rand(3, 5)
    (gradient,) = torch.autograd.grad(contracted(F.gelu)(x), x, g, create_graph=True)

    def multiply(c: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient, (x, g), c, retain_graph=True)

    expected = [torch.stack(parts) for parts in zip(*map(multiply, C), strict=True)]
    torch.testing.assert_close(list(torch.vmap(multiply)(C)), expected)


def test_constant_layers() -> None:
    """A gradient that shall depend on those of the output only does not depend on inputs."""
    mode, x, u = Contractions(), rand(4).requires_grad_(), rand(4).requires_grad_()
    with mode:
        y = F.gelu(x)
    with mode.constant_layers():
        (gradient,) = torch.autograd.grad(y, x, u, create_graph=True)
    for_x, for_u = torch.autograd.grad(gradient.sum(), (x, u), allow_unused=True)
    assert for_x is None
    assert for_u is not None


def hooked(x: Tensor) -> Tensor:
    with save_on_cpu():
        return F.gelu(x)


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.gelu(x)


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "approximation": lambda x: F.gelu(x, approximate="tanh"),
    "half precision": lambda x: F.gelu(x.bfloat16()),
    "saved tensor hooks": hooked,
    "autocast": autocast,
    "two tensors": lambda x: x * x,
    "option": lambda x: torch.add(x, 1, alpha=2),
    "dtype": lambda x: x.softmax(0, dtype=torch.float32),
    "mask of all entries": lambda x: x.masked_fill(torch.tensor([0, 1, 0, 1, 1]).bool(), 0),
    "mask with more axes": lambda x: x.masked_fill(torch.tensor([[True]]), 0),
    "mask that the input is broadcast to": lambda x: (
        x[:1].expand(1, 8, 1).masked_fill(torch.tensor([True, False]), 1)
    ),
    "filled with a tensor": lambda x: x.expand(4, 5).masked_fill(torch.tensor([True]), x[0]),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("forward", [False, True])
def test_what_is_left_to_pytorch(name: str, forward: bool) -> None:
    """Values and tangents are PyTorch's own."""
    with forward_ad.dual_level() if forward else nullcontext():
        x = rand(5).requires_grad_()
        x = forward_ad.make_dual(x, rand(5)) if forward else x
        y, expected = contracted(LEFT[name])(x), LEFT[name](x)
        assert type(y.grad_fn) is type(expected.grad_fn)
        assert torch.equal(y, expected)
        if forward:
            a, b = (forward_ad.unpack_dual(z).tangent for z in (y, expected))
            assert torch.equal(a, b)
