"""Models, losses and data for every layer that KFAC knows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kfac_cases import ClassesSecond, Lambda
from kfac_reference import Setup
from torch import Tensor, nn
from torch.nn import functional as F

C = 3  # entries of one prediction
E = 4  # features of sequences
T = 3  # positions of sequences
V = 5  # tokens


# ---- inputs --------------------------------------------------------------------------------------
def vectors(n: int) -> Tensor:
    return torch.rand(n, 3)


def sequences(n: int) -> Tensor:
    return torch.rand(n, T, E)


def signals(n: int) -> Tensor:
    """Sequences with channels before positions."""
    return torch.randn(n, 2, 6)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 4, 3)


def volumes(n: int) -> Tensor:
    return torch.randn(n, 2, 2, 3, 2)


def tokens(n: int) -> Tensor:
    return torch.randint(V, (n, T))


def lengths(n: int) -> Tensor:
    """Tokens whose number differs between batches."""
    return torch.randint(V, (n, n))


def token(n: int) -> Tensor:
    return torch.randint(V, (n,))


def pairs(n: int) -> dict[str, Tensor]:
    """Sequences, and others of different length."""
    return {"x": torch.rand(n, T, E), "memory": torch.rand(n, 2, E)}


def triples(n: int) -> dict[str, Tensor]:
    """Queries, keys and values of different numbers of features."""
    return {"q": torch.rand(n, T, E), "k": torch.rand(n, 2, 3), "v": torch.rand(n, 2, 5)}


# ---- models --------------------------------------------------------------------------------------
class Functional(nn.Module):
    """Parameters that are multiplied through ``torch.nn.functional.linear``.

    The function is an attribute, which a reference may replace.
    """

    def __init__(self, tied: bool = False, act: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.linear, self.act = F.linear, act
        self.first = nn.Parameter(torch.rand(3, 3))
        self.offset = nn.Parameter(torch.rand(3))
        self.second = nn.Linear(3, 3, bias=False)
        self.last = nn.Parameter(torch.rand(C, 3))
        if tied:
            self.second.weight = self.first

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.linear(x, self.first, self.offset))
        return self.linear(self.act(self.second(h)), self.last)


def linear_leading() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, C, bias=False))


def mlp_norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.RMSNorm(4),
        nn.Linear(4, C),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), nn.ReLU(inplace=True),
        nn.Conv1d(3, 2, 2, padding="same", bias=False), nn.Tanh(),
        nn.Conv1d(2, C, 2, padding="valid"),
    )  # fmt: skip


def last(model: nn.Module) -> nn.Module:
    """Move features from the second axis to the last."""
    return Lambda(lambda m, x: m.model(x).movedim(1, -1), model=model)


def conv1d_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 3, groups=2, padding="same"),
        nn.Flatten(), nn.Linear(10, C),
    )  # fmt: skip


def conv2d_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (2, 1), groups=2, padding=(1, 0), stride=(1, 2)), nn.SiLU(),
        nn.Conv2d(4, 2, (2, 3), groups=2, padding="same", dilation=(1, 2), bias=False),
        nn.Flatten(), nn.Linear(20, C),
    )  # fmt: skip


def conv2d_circular() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(4, C, 3, padding="same", padding_mode="reflect"),
    )  # fmt: skip


def depthwise() -> nn.Module:
    """A separable convolution."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1, stride=2), nn.Conv2d(4, 2, 1), nn.Tanh(),
        nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(2, C),
    )  # fmt: skip


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 2, (2, 2, 1), padding=(0, 1, 0), stride=(1, 2, 1)), nn.Tanh(),
        nn.Conv3d(2, 2, (1, 2, 2), groups=2, dilation=(2, 1, 1), bias=False), nn.Flatten(),
        nn.LazyLinear(C),
    )  # fmt: skip


def transposed1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 2, 3, stride=2),
        nn.Tanh(),
        nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose1d(3, C, 1, bias=False),
    )


def transposed2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2)), nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 2, (2, 1), output_padding=1, groups=2, dilation=(1, 2)), nn.Tanh(),
        nn.ConvTranspose2d(4, 2, (1, 2), groups=2, padding=(0, 1)), nn.Flatten(), nn.LazyLinear(C),
    )  # fmt: skip


def transposed3d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose3d(2, 2, (1, 2, 2), (1, 1, 2), (0, 1, 1), (0, 0, 1)), nn.Tanh(),
        nn.ConvTranspose3d(
            2, 2, (2, 1, 2), (2, 1, 1), (1, 0, 1), (1, 0, 0), 2, bias=False, dilation=(1, 1, 2)
        ),
        nn.Flatten(), nn.LazyLinear(C),
    )  # fmt: skip


def embedding(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(V, E, **options), nn.Tanh(), nn.Linear(E, C))


def embedding_pooled() -> nn.Module:
    """An embedding whose padding is left out of the mean."""

    def forward(m: Any, x: Tensor) -> Tensor:
        kept = (x != 0).unsqueeze(-1)
        h = torch.tanh(m.table(x)) * kept
        return m.head(h.sum(1) / kept.sum(1).clamp(min=1))

    return Lambda(forward, table=nn.Embedding(V, E, padding_idx=0), head=nn.Linear(E, C))


def layer_norm_2d() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm((T, E)), nn.Linear(E, 2), nn.LayerNorm((T, 2), bias=False), nn.Tanh(),
        nn.Linear(2, C),
    )  # fmt: skip


def rms_norm() -> nn.Module:
    return nn.Sequential(
        nn.RMSNorm((T, E)), nn.Linear(E, 2), nn.Tanh(), nn.RMSNorm(2, eps=1e-2), nn.Linear(2, C)
    )


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(24, 4),
        nn.GroupNorm(1, 4), nn.Tanh(), nn.GroupNorm(1, 4, affine=False), nn.Linear(4, C),
    )  # fmt: skip


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(2), nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(),
        nn.Linear(15, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, C),
    )  # fmt: skip


def resnet() -> nn.Module:
    """One residual block with a projection in its skip connection."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.norm1(m.conv1(x)))
        h = F.relu(m.norm2(m.conv2(h)) + m.norm3(m.skip(x)))
        return m.head(h.mean((2, 3)))

    return Lambda(
        forward,
        conv1=nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        norm1=nn.BatchNorm2d(3),
        conv2=nn.Conv2d(3, 3, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(3),
        skip=nn.Conv2d(2, 3, 1, stride=2, bias=False),
        norm3=nn.BatchNorm2d(3),
        head=nn.Linear(3, C),
    )


def self_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(x + m.attention(x, x, x)[0])

    attention = nn.MultiheadAttention(E, 2, batch_first=True)
    return Lambda(forward, attention=attention, head=nn.Linear(E, C))


def causal_attention() -> nn.Module:
    """Positions first, without biases, with a mask."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x)).triu(1).bool()
        x = m.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return m.head(x).transpose(0, 1)

    return Lambda(forward, attention=nn.MultiheadAttention(E, 2, False), head=nn.Linear(E, C))


def cross_attention() -> nn.Module:
    """Key and value are the same tensor."""

    def forward(m: Any, x: Any) -> Tensor:
        h, _ = m.attention(x["x"], x["memory"], x["memory"])
        return m.head(torch.tanh(h))

    attention = nn.MultiheadAttention(E, 2, batch_first=True)
    return Lambda(forward, attention=attention, head=nn.Linear(E, C))


def three_attention() -> nn.Module:
    """Query, key and value are different tensors."""

    def forward(m: Any, x: Any) -> Tensor:
        h, _ = m.attention(x["x"], torch.sin(x["memory"]), value=x["memory"])
        return m.head(torch.tanh(h))

    attention = nn.MultiheadAttention(E, 1, batch_first=True)
    return Lambda(forward, attention=attention, head=nn.Linear(E, C))


def separate_attention(bias: bool = True) -> nn.Module:
    """Query, key and value have weights of their own."""

    def forward(m: Any, x: Any) -> Tensor:
        return m.head(m.attention(x["q"], x["k"], x["v"])[0])

    attention = nn.MultiheadAttention(E, 2, bias=bias, kdim=3, vdim=5, batch_first=True)
    return Lambda(forward, attention=attention, head=nn.Linear(E, C))


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(3, E), nn.Tanh(), Conv1D(C, 3))


def twice() -> nn.Module:
    """Modules that are called twice, on different numbers of positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(torch.tanh(m.conv(x)))
        h = m.norm(torch.tanh(m.conv(h[..., 1:])))
        return m.head(h.flatten(1)) + m.head(x[:, :, :3].flatten(1))

    return Lambda(
        forward,
        conv=nn.Conv1d(2, 2, 2, groups=2),
        norm=nn.GroupNorm(1, 2),
        head=nn.Linear(6, C),
    )


def embedding_twice() -> nn.Module:
    """One table for whole sequences and for their first tokens."""
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.table(x).mean(1) + 2 * m.table(x[:, 0]))),
        table=nn.Embedding(V, E),
        head=nn.Linear(E, C),
    )


def tied(bias: str) -> nn.Module:
    """One weight in two Linears, with the same bias, different ones, or one in the first only."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3, bias=bias in ("same", "different"))
    b.weight = a.weight
    if bias == "same":
        b.bias = a.bias
    elif bias == "none":
        a.bias = None
    return Lambda(
        lambda m, x: m.c(torch.sigmoid(m.b(torch.tanh(m.a(x))))), a=a, b=b, c=nn.Linear(3, C)
    )


def tied_head(bias: bool = False, calls: int = 1, **options: Any) -> nn.Module:
    """A language model whose head has the weight of its embedding."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.inner(m.table(x)))
        for _ in range(calls - 1):
            h = torch.tanh(m.head(h)) @ torch.ones(V, 3).to(h) / V
        return m.head(h)

    table, head = nn.Embedding(V, 3, **options), nn.Linear(3, V, bias=bias)
    head.weight = table.weight
    return Lambda(forward, table=table, inner=nn.Linear(3, 3), head=head)


def gpt() -> nn.Module:
    """One block of GPT-2 with tied head."""
    from transformers.pytorch_utils import Conv1D

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.wte(x) + m.wpe(torch.arange(x.shape[1]).unsqueeze(0))
        q, k, v = m.c_attn(m.ln_1(h)).chunk(3, dim=-1)
        h = h + m.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = h + m.mlp_proj(F.gelu(m.c_fc(m.ln_2(h))))
        return m.lm_head(m.ln_f(h))

    wte, lm_head = nn.Embedding(V, E), nn.Linear(E, V, bias=False)
    lm_head.weight = wte.weight
    return Lambda(
        forward,
        wte=wte,
        wpe=nn.Embedding(T, E),
        ln_1=nn.LayerNorm(E),
        c_attn=Conv1D(3 * E, E),
        c_proj=Conv1D(E, E),
        ln_2=nn.LayerNorm(E),
        c_fc=Conv1D(E, E),
        mlp_proj=Conv1D(E, E),
        ln_f=nn.LayerNorm(E),
        lm_head=lm_head,
    )


def bert() -> nn.Module:
    """One encoder block that classifies from the first token."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.word(x) + m.place(torch.arange(x.shape[1])) + m.kind(torch.zeros_like(x))
        h = m.block(m.norm(h))
        return m.head(torch.tanh(m.pool(h[:, 0])))

    return Lambda(
        forward,
        word=nn.Embedding(V, E, padding_idx=0),
        place=nn.Embedding(T, E),
        kind=nn.Embedding(2, E),
        norm=nn.LayerNorm(E),
        block=nn.TransformerEncoderLayer(E, 2, 3, dropout=0.0, activation="gelu", batch_first=True),
        pool=nn.Linear(E, E),
        head=nn.Linear(E, C),
    )


def uncalled() -> nn.Module:
    """Layers that are never called."""
    return Lambda(
        lambda m, x: m.a(x),
        a=nn.Linear(3, C),
        conv=nn.Conv1d(2, 2, 2, groups=2),
        up=nn.ConvTranspose1d(2, 4, 2, groups=2),
        table=nn.Embedding(2, 3),
        norm=nn.BatchNorm1d(2),
        attention=nn.MultiheadAttention(2, 1),
    )


# ---- models for which KFAC is exact --------------------------------------------------------------
def single_images() -> nn.Module:
    """Convolutions with one output pixel."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (4, 3)), nn.Tanh(), nn.ConvTranspose2d(4, 2, 1), nn.Sigmoid(),
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, C),
    )  # fmt: skip


def single_token() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(nn.Embedding(V, E), nn.Tanh(), Conv1D(3, E), nn.Sigmoid(), nn.Linear(3, C))


def deep_sequence() -> nn.Module:
    """A deep linear network of each token."""
    from transformers.pytorch_utils import Conv1D

    table, conv = nn.Embedding(V, E, padding_idx=1), Conv1D(4, E)
    return nn.Sequential(table, conv, nn.Linear(4, 2, bias=False), nn.Linear(2, C))


def deep_images() -> nn.Module:
    """A deep linear network whose layers have one output pixel."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (4, 3), groups=2), nn.ConvTranspose2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.Linear(2, C),
    )  # fmt: skip


def pooled() -> nn.Module:
    """A deep linear network that pools what each layer with positions returns."""

    def forward(m: Any, x: Any) -> Tensor:
        h = m.conv(x["x"]).sum((2, 3)) + m.up(x["x"]).mean((2, 3))
        return m.b(h + m.a(m.table(x["tokens"])).mean(1))

    return Lambda(
        forward,
        conv=nn.Conv2d(2, 4, 2, groups=2, padding=1),
        up=nn.ConvTranspose2d(2, 4, 2, stride=2),
        table=nn.Embedding(V, 3),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, C),
    )


# ---- cases ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerCase:
    """A model, its inputs and loss; its predictions have classes in the last axis.

    Attributes:
        make: Makes the model.
        inputs: Makes a batch.
        loss: ``"mse"``, ``"mse-sum"``, ``"ce"`` or ``"ce-sum"``.
        joint: Which of separate (``False``) and joint groups (``True``) there can be.
        trained: Whether a parameter of some name is trained.
        key: Where the batch is in inputs that are a dict.
        exact: ``"single"`` if KFAC is exact for one datum (all layers have one position),
            ``"expand"`` or ``"reduce"`` if it is exact for all data with this approximation; but
            for norm layers and between groups of convolutions.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any] = vectors
    loss: str = "mse"
    joint: tuple[bool, ...] = (False, True)
    trained: Callable[[str], bool] = lambda name: True
    key: str = ""
    exact: str = ""


LAYER_CASES = {
    "linear-leading": LayerCase(linear_leading, lambda n: torch.rand(n, 2, 2, 3)),
    "mlp-norms": LayerCase(mlp_norms, loss="ce"),
    "conv1d": LayerCase(lambda: last(conv1d()), signals, "ce"),
    "conv1d-groups": LayerCase(conv1d_groups, signals),
    "conv2d-groups": LayerCase(conv2d_groups, images, "ce-sum"),
    "conv2d-circular": LayerCase(lambda: last(conv2d_circular()), lambda n: torch.rand(n, 2, 2, 3)),
    "depthwise": LayerCase(depthwise, images, "mse-sum"),
    "depthwise-frozen": LayerCase(
        depthwise, images, trained=lambda name: name in ("0.bias", "3.weight", "5.weight")
    ),
    "conv3d": LayerCase(conv3d, volumes, "ce"),
    "transposed1d": LayerCase(lambda: last(transposed1d()), signals),
    "transposed2d": LayerCase(transposed2d, images, "ce"),
    "transposed3d": LayerCase(transposed3d, volumes),
    "embedding": LayerCase(embedding, tokens, "ce"),
    "embedding-lengths": LayerCase(lambda: embedding(padding_idx=2), lengths),
    "embedding-pooled": LayerCase(embedding_pooled, tokens, "ce"),
    "embedding-twice": LayerCase(embedding_twice, tokens),
    "layer-norm-2d": LayerCase(layer_norm_2d, sequences, "ce"),
    "rms-norm": LayerCase(rms_norm, sequences, "mse-sum"),
    "group-norm": LayerCase(group_norm, images, "ce"),
    "batch-norm": LayerCase(batch_norm, signals),
    "norms-frozen": LayerCase(
        batch_norm, signals, "ce", trained=lambda name: name in ("0.weight", "2.bias", "6.weight")
    ),
    "resnet": LayerCase(resnet, images, "ce"),
    "self-attention": LayerCase(self_attention, sequences, "ce"),
    "causal-attention": LayerCase(causal_attention, sequences),
    "cross-attention": LayerCase(cross_attention, pairs, key="x"),
    "three-attention": LayerCase(three_attention, pairs, "ce", key="x"),
    "separate-attention": LayerCase(separate_attention, triples, key="q"),
    "separate-attention-no-bias": LayerCase(
        lambda: separate_attention(False), triples, "ce-sum", key="q"
    ),
    "transformers-conv1d": LayerCase(transformers_conv1d, sequences),
    "functional": LayerCase(Functional, loss="ce"),
    "functional-tied": LayerCase(lambda: Functional(tied=True)),
    "twice": LayerCase(twice, signals),
    "tied-same": LayerCase(lambda: tied("same"), loss="ce"),
    "tied-one": LayerCase(lambda: tied("one")),
    "tied-none": LayerCase(lambda: tied("none"), lambda n: torch.rand(n, 2, 3)),
    "tied-different": LayerCase(lambda: tied("different"), joint=(False,)),
    "head": LayerCase(tied_head, tokens, "ce"),
    "head-padding": LayerCase(lambda: tied_head(padding_idx=1), tokens, "ce-sum"),
    "head-bias": LayerCase(lambda: tied_head(bias=True), tokens, "ce"),
    "head-twice": LayerCase(lambda: tied_head(True, 2, padding_idx=0), lengths),
    "gpt": LayerCase(gpt, tokens, "ce"),
    "bert": LayerCase(bert, tokens, "ce"),
    "uncalled": LayerCase(uncalled),
    "single-images": LayerCase(single_images, images, "ce", exact="single"),
    "single-token": LayerCase(single_token, token, "ce", exact="single"),
    "deep-sequence": LayerCase(deep_sequence, tokens, exact="expand"),
    "deep-images": LayerCase(deep_images, images, "mse-sum", exact="expand"),
    "deep-functional": LayerCase(lambda: Functional(act=nn.Identity()), exact="expand"),
    "pooled": LayerCase(
        pooled,
        lambda n: {"x": torch.rand(n, 2, 3, 2), "tokens": tokens(n)},
        key="x",
        exact="reduce",
    ),
}
SIZES = (3, 2)
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "mse-sum": lambda: nn.MSELoss(reduction="sum"),
    "ce": nn.CrossEntropyLoss,
    "ce-sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
}


def layer_setup(name: str, loss: str | None = None) -> Setup:
    """Return a case as in :func:`_shared_setup`, for one test alone."""
    setup = copy.copy(_shared_setup(name, loss))
    setup.data = list(setup.data)
    for cached in ("layer_examples", "examples"):
        setup.__dict__.pop(cached, None)
    return setup


@cache
def _shared_setup(name: str, loss: str | None) -> Setup:
    """Return a case in float64, at parameters and statistics that are not the initial ones.

    With cross-entropy the model is an attribute ``model`` of another that moves classes to the
    second axis, so that parameter names begin with ``"model."``.
    """
    case = LAYER_CASES[name]
    loss = case.loss if loss is None else loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _prepared(case.make(), case)
        data = [case.inputs(n) for n in SIZES]
        data = [_double(x) for x in data]
        prefix = ""
        if loss.startswith("ce"):
            model, prefix = ClassesSecond(model), "model."
        params = {
            key: p.detach() + 0.3 * torch.randn_like(p)
            for key, p in model.named_parameters()
            if case.trained(key.removeprefix(prefix))
        }
        with torch.no_grad():
            pairs = [(x, _targets(loss, model(x))) for x in data]
    batch_size_fn = (lambda X: X[case.key].shape[0]) if case.key else None
    return Setup(model.eval(), LOSSES[loss](), params, pairs, batch_size_fn)


def single(setup: Setup) -> Setup:
    """Return the same with the first datum only."""
    X, y = next(setup._single_examples())
    setup = copy.copy(setup)
    for cached in ("layer_examples", "examples"):
        setup.__dict__.pop(cached, None)
    setup.data = [(X, y)]
    return setup


def _prepared(model: nn.Module, case: LayerCase) -> nn.Module:
    """Materialise lazy layers, and draw running statistics."""
    with torch.no_grad():
        model.eval()(case.inputs(2))
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)
    return model.double()


def _double(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _double(value) for key, value in x.items()}
    return x.double() if x.is_floating_point() else x


def _targets(loss: str, f: Tensor) -> Tensor:
    """Return targets for a prediction, whose classes are in the second axis for cross-entropy."""
    if loss.startswith("mse"):
        return torch.randn_like(f)
    return torch.arange(f[:, 0].numel()).reshape(f[:, 0].shape) * 2 % f.shape[1]
