"""The models and data on which costs are measured, in tests and in the benchmark.

They stand here, and need nothing but PyTorch, because the benchmark's workers import them in
environments that hold other libraries and not this package. The tests of costs load this file, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Causal self-attention with the matrix products written out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: [n, positions, width] to the same shape."""
        n, positions, width = x.shape
        d = width // self.heads
        q, k, v = self.qkv(x).view(n, positions, 3, self.heads, d).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * d**-0.5  # [n, heads, positions, positions]
        future = torch.ones(positions, positions, dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, positions, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention, then the MLP: [n, positions, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A small GPT: tokens [n, positions] to logits [n, vocabulary, positions]."""

    def __init__(
        self,
        vocabulary: int = 65,
        positions: int = 64,
        width: int = 128,
        heads: int = 4,
        blocks: int = 4,
    ):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next tokens' logits."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def _classification(model: nn.Module, batches: int, shape: tuple[int, ...]) -> Problem:
    data = [(torch.rand(*shape), torch.randint(0, 10, shape[:1])) for _ in range(batches)]
    return Problem(model.eval(), data)


def mlp() -> Problem:
    """784-512-512-10 with ReLU; 4 batches of 128 images."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    return _classification(model, 4, (128, 1, 28, 28))


def cnn() -> Problem:
    """Three 3 × 3 convolutions, two of them with stride 2, and pooling; 2 batches of 64 images."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return _classification(model, 2, (64, 3, 32, 32))


def decoder() -> Problem:
    """Four transformer blocks; 2 batches of 8 × 64 tokens."""
    data = [tuple(torch.randint(0, 65, (2, 8, 64))) for _ in range(2)]
    return Problem(Decoder().eval(), data)


class Problem(NamedTuple):
    """A model in eval mode, and its data; the loss is ``CrossEntropyLoss()``."""

    model: nn.Module
    data: Batches

    def to(self, device: str) -> Problem:
        """Move model and data."""
        data = [(X.to(device), y.to(device)) for X, y in self.data]
        return Problem(self.model.to(device), data)

    def first_examples(self) -> Problem:
        """Return the problem with one example per batch, of 8 tokens at most."""
        if self.terms_per_example > 1:
            return self._replace(data=[(X[:1, :8], y[:1, :8]) for X, y in self.data])
        return self._replace(data=[(X[:1], y[:1]) for X, y in self.data])

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.data[0][0].device

    @property
    def num_data(self) -> int:
        """The number of examples."""
        return sum(len(X) for X, _ in self.data)

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def matrices(self) -> dict[str, nn.Parameter]:
        """The parameters of linear layers and convolutions, which all kinds of KFAC have."""
        layers = {m for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        owned = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        return {name: p for name, p in self.model.named_parameters() if id(p) in owned}

    @property
    def terms_per_example(self) -> int:
        """The number of loss terms per example: of tokens, or 1."""
        return self.data[0][1][0].numel()


PROBLEMS: dict[str, Callable[[], Problem]] = {"MLP": mlp, "CNN": cnn, "decoder": decoder}


# --------------------------------------------------------------------------------------------------
# Scaling
# --------------------------------------------------------------------------------------------------
def perceptron(width: int = 256, depth: int = 3, classes: int = 10, batch: int = 128) -> Problem:
    """64 inputs, ``depth`` hidden ReLU layers, ``classes`` outputs; one batch."""
    widths = [64] + [width] * depth
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    return Problem(model.eval(), [(torch.rand(batch, 64), torch.randint(0, classes, (batch,)))])


# What changes, with its values; everything else is the default above.
AXES = {
    "width": [64, 128, 256, 512, 1024],
    "depth": [1, 2, 4, 8, 16],
    "classes": [10, 32, 100, 320],
    "batch": [32, 128, 512, 2048],
}
SCALING: dict[str, dict[str, Callable[[], Problem]]] = {
    axis: {f"{axis} {value}": partial(perceptron, **{axis: value}) for value in values}
    for axis, values in AXES.items()
}
SCALING["columns"] = {"columns": perceptron}  # the same problem: it is the cases that change


def gradient(problem: Problem) -> list[Tensor]:
    """Return the gradient of the mean loss over all data."""
    params = list(problem.model.parameters())
    loss_func = nn.CrossEntropyLoss()
    total: list[Tensor] = []
    for X, y in problem.data:
        loss = loss_func(problem.model(X), y) * (len(X) / problem.num_data)
        batch = list(torch.autograd.grad(loss, params))
        if total:
            torch._foreach_add_(total, batch)
        else:
            total = batch
        del loss, batch  # while the next batch is evaluated, only the sum is held
    return total
