"""Models, losses and data on which KFAC is compared with the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from kfac_reference import Setup, summed
from torch import Tensor, nn
from torch.nn import functional as F

C = 3  # entries of one prediction
POSITIONS = 4


class Lambda(nn.Module):
    """A model from modules and a function of them and the input."""

    def __init__(self, function: Callable[[Any, Any], Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Tensor:
        return self.function(self, x)


class ClassesSecond(nn.Module):
    """Moves classes from the last axis to the second, where cross-entropy wants them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        return self.model(x).movedim(-1, 1)


def _images(n: int) -> Tensor:
    return torch.rand(n, 2, 5, 4)


def _vectors(n: int) -> Tensor:
    return torch.rand(n, 3)


def _sequences(n: int) -> Tensor:
    return torch.rand(n, POSITIONS, 3)


def _lengths(n: int) -> Tensor:
    """Sequences whose length differs between batches."""
    return torch.rand(n, n, 3)


def mlp() -> nn.Module:
    widths = (3, 4, 2, 3, 4, 3, 4, C)
    acts = (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.Softplus())
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(d_in, d_out, bias=i % 3 != 1), *acts[i : i + 1]]
    return nn.Sequential(*layers)


def inplace() -> nn.Module:
    """In-place activations of a layer's output, and of what it reads."""
    layers = (nn.Linear(3, 4), nn.LeakyReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, C))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.act(m.a(x))
        z = m.b(h)
        return m.c(F.elu(z.mul_(2).add_(h.sub(1)), inplace=True))

    return Lambda(forward, a=layers[0], act=layers[1], b=layers[2], c=layers[3])


def cnn(**second: Any) -> nn.Module:
    first = nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    options = {"kernel_size": (2, 3), **second}
    return nn.Sequential(
        first, nn.ReLU(inplace=True), nn.Conv2d(3, 2, **options), nn.Tanh(), nn.Flatten(),
        nn.LazyLinear(C),
    )  # fmt: skip


def pixels() -> nn.Module:
    """A prediction for each pixel, with convolutions that mix pixels."""
    return Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x))).movedim(1, -1),
        a=nn.Conv2d(2, 2, (2, 1)),
        b=nn.Conv2d(2, C, (1, 3), padding="same", bias=False),
    )


def unbatched() -> nn.Module:
    """Layers that are called without a batch axis, for batches of one example."""
    return Lambda(
        lambda m, x: m.b(m.a(x[0]).relu_().flatten()).unsqueeze(0),
        a=nn.Conv2d(2, 2, 3),
        b=nn.Linear(12, C),
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))


def attention() -> nn.Module:
    """Positions that mix."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        return m.out(x + F.softmax(q @ k.mT, dim=-1) @ v)

    return Lambda(forward, qkv=nn.Linear(3, 9, bias=False), out=nn.Linear(3, C))


def flattened() -> nn.Module:
    """Positions become examples in the middle of the model."""
    return Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x)).flatten(0, -2)), a=nn.Linear(3, 4), b=nn.Linear(4, C)
    )


def mapping() -> nn.Module:
    return Lambda(
        lambda m, x: m.a(x["first"]) * torch.tanh(m.b(input=x["second"])),
        a=nn.Linear(3, C),
        b=nn.Linear(2, C),
    )


def residual() -> nn.Module:
    """Parallel branches from the input, and a skip connection."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x)) + m.b(2 * x) + x
        return m.d(h + m.c(torch.sigmoid(h)))

    return Lambda(forward, **{name: nn.Linear(3, 3) for name in "abcd"})


def repeated() -> nn.Module:
    """A module that is called several times, on different numbers of positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        h = torch.tanh(m.a(torch.stack([h, x], dim=1)))
        return m.b(m.a(h.sum(1)))

    return Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, C))


def tied(bias: str) -> nn.Module:
    """One weight in two modules, with the same bias, different ones, or one in the first only."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3, bias=bias != "one")
    b.weight = a.weight
    if bias == "same":
        b.bias = a.bias
    return Lambda(
        lambda m, x: m.c(torch.sigmoid(m.b(torch.tanh(m.a(x))))), a=a, b=b, c=nn.Linear(3, C)
    )


def without_gradients() -> nn.Module:
    """A layer that is also called under ``no_grad``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = m.a(3 * x)
        return m.b(torch.tanh(m.a(x)) - target)

    return Lambda(forward, a=nn.Linear(3, 2), b=nn.Linear(2, C))


def uncalled() -> nn.Module:
    """A layer that is never called, and one on which the prediction does not depend."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.b(x)
        return m.a(x)

    return Lambda(forward, a=nn.Linear(3, C), b=nn.Linear(3, 2), c=nn.Linear(3, 2))


def sometimes() -> nn.Module:
    """A layer that only long sequences reach."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.c(h + m.b(h) if x.shape[1] > 1 else h)

    return Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, C))


def hooked() -> nn.Module:
    """The user's own hooks change a layer's input and output."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, C))
    model[0].register_forward_hook(lambda module, args, output: torch.sin(2 * output))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    model[1].register_forward_pre_hook(
        lambda module, args, kwargs: ((), {"input": args[0] + 1}), with_kwargs=True
    )
    model[1].register_forward_hook(lambda module, args, output: output**2, prepend=True)
    return model


def constants() -> nn.Module:
    """Something that is no parameter requires gradients."""
    scale = torch.rand(3, requires_grad=True)
    return Lambda(
        lambda m, x: m.c(torch.tanh(m.a(x * scale.to(x))) + m.b(x.flip(-1) * scale.to(x))),
        **{name: nn.Linear(3, 3) for name in "abc"},
    )


@dataclass(frozen=True)
class Case:
    """A model with inputs; its predictions have C entries in the last axis."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any] = _vectors
    joint: tuple[bool, ...] = (False, True)
    mixing: bool = True  # whether a loss term depends on several positions of a layer
    trained: Callable[[str], bool] = lambda name: True
    batch_size_fn: Callable[[Any], int] | None = None
    sizes: tuple[int, ...] = (2, 1, 2)  # of unequal batches


CASES = [
    Case("mlp", mlp),
    Case("mlp-frozen", mlp, trained=lambda name: name in ("2.weight", "4.bias", "12.weight")),
    Case("inplace", inplace),
    Case("cnn", cnn, _images),
    Case("cnn-frozen", cnn, _images, trained=lambda name: name in ("2.weight", "2.bias")),
    Case("cnn-same", lambda: cnn(padding="same", dilation=(1, 2), bias=False), _images),
    Case("cnn-circular", lambda: cnn(padding=(1, 2), padding_mode="circular"), _images),
    Case("cnn-reflect", lambda: cnn(padding="same", padding_mode="reflect"), _images),
    Case("cnn-valid", lambda: cnn(padding="valid", stride=(1, 2)), _images),
    Case("pixels", pixels, lambda n: torch.rand(n, 2, 3, 2)),
    Case("unbatched", unbatched, _images, sizes=(1, 1)),
    Case("tokens", tokens, _sequences, mixing=False),
    Case("tokens-lengths", tokens, _lengths, mixing=False),
    Case("attention", attention, _sequences),
    Case("attention-lengths", attention, _lengths),
    Case("flattened", flattened, _sequences, mixing=False),
    Case(
        "flattened-input",
        tokens,
        lambda n: torch.rand(n * POSITIONS, 3),
        mixing=False,
        batch_size_fn=lambda X: X.shape[0] // POSITIONS,
    ),
    Case(
        "mapping",
        mapping,
        lambda n: {"first": torch.rand(n, 3), "second": torch.rand(n, 2)},
        batch_size_fn=lambda X: X["first"].shape[0],
    ),
    Case("residual", residual),
    Case("repeated", repeated),
    Case("tied-same", lambda: tied("same")),
    Case("tied-one", lambda: tied("one")),
    Case("tied-different", lambda: tied("different"), joint=(False,)),
    Case("no-grad", without_gradients),
    Case("uncalled", uncalled),
    Case("sometimes", sometimes, _lengths),
    Case("hooked", hooked),
    Case("input-requires-grad", residual, lambda n: _vectors(n).requires_grad_()),
    Case("constants", constants),
]
BY_NAME = {case.name: case for case in CASES}

_WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "ce": nn.CrossEntropyLoss,
    "ce-weight": lambda: nn.CrossEntropyLoss(_WEIGHT),
    "ce-ignore": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "ce-smooth": lambda: nn.CrossEntropyLoss(label_smoothing=0.3),
    "ce-all": lambda: nn.CrossEntropyLoss(_WEIGHT, ignore_index=2, label_smoothing=0.3),
    "ce-soft": lambda: nn.CrossEntropyLoss(_WEIGHT, label_smoothing=0.3),
    "bce": nn.BCEWithLogitsLoss,
    "bce-weight": lambda: nn.BCEWithLogitsLoss(_WEIGHT, pos_weight=_WEIGHT.flip(0)),
}


@cache
def setup(case_name: str, loss_name: str, reduction: str = "mean") -> Setup:
    """Return a case with a loss, in float64, at parameters that are not the module's own."""
    if reduction == "sum":  # the same, but for the scale
        mean = setup(case_name, loss_name)
        result = replace(mean, loss=summed(mean.loss))
        result.examples = mean.examples
        return result
    case = BY_NAME[case_name]
    torch.manual_seed(1)
    model, loss = case.make(), LOSSES[loss_name]()
    X = [case.inputs(n) for n in case.sizes]
    with torch.no_grad():
        model(X[0])  # materialises lazy layers
    if loss_name.startswith("ce"):
        model = ClassesSecond(model)
    model, X = model.double(), [_double(x) for x in X]
    prefix = "model." if isinstance(model, ClassesSecond) else ""
    params = {
        name: p.detach() + 0.3 * torch.randn_like(p)
        for name, p in model.named_parameters()
        if case.trained(name.removeprefix(prefix))
    }
    with torch.no_grad():
        data = [(x, _targets(loss_name, model(x))) for x in X]
    return Setup(model, loss, params, data, case.batch_size_fn)


def _double(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _double(value) for key, value in x.items()}
    return x.detach().double().requires_grad_(x.requires_grad)


def _targets(loss_name: str, f: Tensor) -> Tensor:
    """Return targets for a prediction."""
    if loss_name == "ce-soft":
        return torch.rand_like(f)
    if loss_name.startswith("ce"):
        return torch.arange(f[:, 0].numel()).reshape(f[:, 0].shape) * 2 % C
    return torch.randn_like(f) if loss_name == "mse" else torch.rand_like(f)
