"""The peak memory of KFAC's construction is bounded by that of a gradient and of the factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from memory_meter import peak_memory
from torch import Tensor, nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator
from curvlinops.computers.recorder import Recorder

Data = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()
CLASSES = 10
BATCHES = 3


class Problem(NamedTuple):
    model: nn.Module
    data: Data


class Block(nn.Module):
    """A transformer block without normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    """Tokens [n, positions] to logits [n, classes, positions]."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.token = nn.Embedding(CLASSES, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(tokens))).mT


def mlp(widths: list[int], rows: int) -> Problem:
    pairs = list(itertools.pairwise([*widths, CLASSES]))
    layers = [layer for d_in, d_out in pairs for layer in (nn.Linear(d_in, d_out), nn.ReLU())]
    data = [(torch.rand(rows, widths[0]), torch.randint(CLASSES, (rows,))) for _ in range(BATCHES)]
    return Problem(nn.Sequential(*layers[:-1]), data)


def wide_mlp() -> Problem:
    """Factors are much larger than activations."""
    return mlp([512, 512, 512], 32)


def linear() -> Problem:
    """A factor is much larger than the weight, too."""
    return mlp([1024], 32)


def deep_mlp() -> Problem:
    """Activations, and gradients with respect to them, are much larger than factors."""
    return mlp([64] * 12, 1024)


def cnn() -> Problem:
    """Unfolded inputs are much larger than activations."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    data = [(torch.rand(16, 3, 24, 24), torch.randint(CLASSES, (16,))) for _ in range(BATCHES)]
    return Problem(model, data)


def transformer() -> Problem:
    """There is a bit of everything."""
    data = [tuple(torch.randint(CLASSES, (2, 16, 32))) for _ in range(BATCHES)]
    return Problem(Transformer(64, 3), data)


def images(layers: list[nn.Module], *shape: int) -> Problem:
    """A convolutional network for images [n, C, ...], and a classifier behind it."""
    channels = shape[1]
    for layer in layers:
        channels = getattr(layer, "out_channels", channels)
    pool = nn.AdaptiveAvgPool3d(1) if len(shape) == 5 else nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, CLASSES))
    data = [(torch.rand(*shape), torch.randint(CLASSES, shape[:1])) for _ in range(BATCHES)]
    return Problem(model, data)


def transposed_convolutions() -> Problem:
    """What output pixels see is much larger than the input."""
    up = nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1)
    return images([up, nn.ReLU(), nn.ConvTranspose2d(16, 8, 5, padding=2)], 8, 8, 16, 16)


def depthwise() -> Problem:
    """There are many small factors."""
    layers = [nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 5, padding=2, groups=64), nn.ReLU()]
    return images([*layers, nn.Conv2d(64, 64, 1)], 16, 3, 24, 24)


def grouped() -> Problem:
    """Factors of several groups are larger than activations."""
    layers = [nn.Conv2d(256, 256, 3, groups=2), nn.ReLU(), nn.Conv2d(256, 256, 1, groups=2)]
    return images(layers, 2, 256, 4, 4)


def conv3d() -> Problem:
    """Few images make most of the unfolded inputs."""
    layers = [nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1, groups=2)]
    return images(layers, 8, 2, 12, 12, 12)


def group_norm() -> Problem:
    """There are normalisations of channels."""
    layers = [
        nn.Conv2d(3, 32, 1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
    ]
    return images(layers, 8, 3, 24, 24)


def layer_norms() -> Problem:
    """The gradients of all normalisations together are much larger than that of a layer."""
    blocks = [(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(64, CLASSES))
    data = [(torch.rand(1024, 64), torch.randint(CLASSES, (1024,))) for _ in range(BATCHES)]
    return Problem(model, data)


VOCABULARY = 2000  # factors are much larger than loss vectors


def language_model(tied: bool) -> Problem:
    """A factor is much larger than all else."""
    token, head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY, bias=False)
    if tied:
        head.weight = token.weight

    class Model(nn.Sequential):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).mT

    data = [tuple(torch.randint(VOCABULARY, (2, 2, 8))) for _ in range(BATCHES)]
    return Problem(Model(token, Block(16), head), data)


def tied() -> Problem:
    """Two Kronecker products become one."""
    return language_model(tied=True)


def untied() -> Problem:
    """There is an embedding of many tokens."""
    return language_model(tied=False)


PROBLEMS: list[Callable[[], Problem]] = [wide_mlp, linear, deep_mlp, cnn, transformer]


def gradient(problem: Problem) -> list[Tensor]:
    """Return the gradient over all data, as a user would who accumulates it."""
    params = list(problem.model.parameters())
    total = [torch.zeros_like(p) for p in params]
    for X, y in problem.data:
        batch = torch.autograd.grad(LOSS(problem.model(X), y) / BATCHES, params)
        torch._foreach_add_(total, batch)
        del batch  # while the next batch is evaluated, only the sum is held
    return total


def kfac(
    problem: Problem,
    fisher_type: str,
    backend: str = "hooks",
    kfac_approx: str = "expand",
    separate: bool = False,
) -> KFACLinearOperator:
    return KFACLinearOperator(
        problem.model,
        LOSS,
        dict(problem.model.named_parameters()),
        problem.data,
        fisher_type=fisher_type,
        kfac_approx=kfac_approx,
        separate_weight_and_bias=separate,
        backend=backend,
    )


def factor_bytes(K: KFACLinearOperator) -> int:
    """Return the size of all factors."""
    names = [next(iter(group.values())) for group in K.mapping]
    factors = [factor for name in names for factor in flat(K.factors(name))]
    return sum(
        factor.numel() * factor.itemsize
        if isinstance(factor, Tensor)
        else factor.shape[0] * factor.dtype.itemsize
        for factor in factors
    )


def flat(factors: Any) -> list[Any]:
    """Return the factors in nested lists."""
    nested = isinstance(factors, (list, tuple))
    return [leaf for factor in factors for leaf in flat(factor)] if nested else [factors]


NORMS = (nn.LayerNorm, nn.GroupNorm)
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, *NORMS)


def layer_bytes(problem: Problem) -> tuple[list[int], list[int]]:
    """Return the sizes of the unfolded inputs [n, S, d_in], and of the outputs [n, S, d_out]."""
    inputs, outputs = [], []

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        outputs.append(output.numel() * output.itemsize)
        if isinstance(module, NORMS):
            inputs.append(outputs[-1])
            return
        weight, channels = module.weight, getattr(module, "out_channels", output.shape[-1])
        if isinstance(module, nn.ConvTranspose2d):
            d_in = weight[:, 0].numel()
        else:
            d_in = weight[0].numel() * getattr(module, "groups", 1)
        inputs.append(outputs[-1] // channels * d_in)

    layers = [m for m in problem.model.modules() if isinstance(m, LAYERS)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        problem.model(problem.data[0][0])
    for handle in handles:
        handle.remove()
    return inputs, outputs


#: For small tensors that have no name in the bound: loss vectors, one example looked at, ...
SLACK = 1.03


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_peak(make: Callable[[], Problem], fisher_type: str, backend: str):
    """At most: gradient + factors + one layer's unfolded inputs + propagated gradients.

    peak(KFAC) ≤ 1.03 (peak(gradient) + Σ (|A| + |B|) + max |a| + max |g|), in bytes, where the
    maxima are over layers, with inputs a [n, S, d_in] and output gradients g [n, S, d_out]. The
    gradient's peak has activations, and the gradients of activations, as one loss vector after the
    other is back-propagated; g is another copy in weight-sharing format. The same bound holds for
    any number of loss vectors, and with the check of determinism.
    """
    check_peak(make(), fisher_type, backend)


OTHERS = [
    (transposed_convolutions, "mc", "expand", False, "hooks"),
    (transposed_convolutions, "type-2", "reduce", True, "make_fx"),
    (depthwise, "mc", "expand", True, "hooks"),
    (grouped, "mc", "expand", False, "hooks"),
    (grouped, "mc", "reduce", True, "hooks"),
    (conv3d, "mc", "expand", False, "hooks"),
    (group_norm, "mc", "expand", False, "hooks"),
    (layer_norms, "mc", "expand", False, "hooks"),
    (layer_norms, "type-2", "expand", True, "hooks"),
    (layer_norms, "mc", "reduce", False, "hooks"),
    (deep_mlp, "type-2", "reduce", False, "hooks"),
    (transformer, "mc", "reduce", True, "hooks"),
    (wide_mlp, "mc", "reduce", True, "hooks"),
    (tied, "mc", "expand", False, "hooks"),
    (tied, "mc", "expand", False, "make_fx"),
    (untied, "mc", "reduce", False, "hooks"),
]


@pytest.mark.parametrize(("make", "fisher_type", "kfac_approx", "separate", "backend"), OTHERS)
def test_peak_of_others(
    make: Callable[[], Problem], fisher_type: str, kfac_approx: str, separate: bool, backend: str
):
    """The same bound for other layers and options; a normalisation's input is that of a layer."""
    check_peak(make(), fisher_type, backend, kfac_approx, separate)


def check_peak(problem: Problem, *options: Any) -> None:
    """Compare the peak with its bound."""
    K = kfac(problem, *options)  # what is made once in a process
    peak = peak_memory(lambda: kfac(problem, *options))
    terms = {"gradient": peak_memory(lambda: gradient(problem)), "factors": factor_bytes(K)}
    terms["input"], terms["output"] = map(max, layer_bytes(problem))
    assert peak <= SLACK * sum(terms.values()), (peak, terms)


# ---- EKFAC ---------------------------------------------------------------------------------------
def ekfac(problem: Problem, backend: str) -> EKFACLinearOperator:
    return EKFACLinearOperator(
        problem.model,
        LOSS,
        dict(problem.model.named_parameters()),
        problem.data,
        mc_samples=2,  # with several vectors, more is held from one to the next
        separate_weight_and_bias=False,
        backend=backend,
    )


def many_rows() -> Problem:
    """One position; inputs and output gradients of layers are much larger than 2²⁰ numbers."""
    return mlp([64] * 12, 4096)


def many_tokens() -> Problem:
    """Several positions; gradients of all single examples are larger than 2²⁰ numbers."""
    data = [tuple(torch.randint(CLASSES, (2, 192, 8))) for _ in range(BATCHES)]
    return Problem(Transformer(64, 1), data)


@pytest.mark.parametrize(
    ("make", "room", "backend"),
    [
        (linear, 0, "hooks"),
        (many_rows, 0, "make_fx"),
        pytest.param(many_rows, 2**22, "hooks", marks=pytest.mark.slow),
        (many_tokens, 0, "hooks"),
    ],
)
def test_peak_of_ekfac(
    make: Callable[[], Problem], room: int, backend: str, monkeypatch: pytest.MonkeyPatch
):
    """At most what the class says: the largest of both passes, and of what is in between.

    - The first pass: KFAC's bound, see above.
    - The decomposition: factors, basis and eigenvalues, and three copies of the largest factor.
    - The second pass: gradient + basis and eigenvalues + all layers' unfolded inputs and output
      gradients + 2²⁰ numbers. (No layer has a gradient of one example that is larger.)

    Besides, there is the room for the events of the first pass, of which there are more.
    """
    monkeypatch.setattr(Recorder, "_BYTES", room)
    problem = make()
    E = ekfac(problem, backend)  # what is made once in a process
    peak = peak_memory(lambda: ekfac(problem, backend))
    grad, factors = peak_memory(lambda: gradient(problem)), factor_bytes(kfac(problem, "mc"))
    inputs, outputs = layer_bytes(problem)
    blocks = [E.block(next(iter(group.values()))) for group in E.mapping]
    basis = 4 * sum(block.eigenvalues.numel() for block in blocks) + factor_bytes(E)
    largest = max(4 * size**2 for block in blocks for size in sizes_of_matrices(block))
    bounds = {
        "first": grad + factors + max(inputs) + max(outputs),
        "between": factors + basis + 3 * largest,
        "second": grad + basis + sum(inputs) + sum(outputs) + 4 * 2**20,
    }
    assert peak <= SLACK * max(bounds.values()) + room, (peak, bounds)


def sizes_of_matrices(block: Any) -> list[int]:
    """Return the widths of a block's factors that are matrices."""
    return [len(Q) for Q in block.eigenvectors if isinstance(Q, Tensor)]
