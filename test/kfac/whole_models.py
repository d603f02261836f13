"""Whole models with random weights, all of whose parameters have Kronecker factors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kfac_reference import Setup
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

VOCABULARY, LONGEST, CLASSES, IGNORED = 11, 6, 3, -100


class Logits(nn.Module):
    """A model that returns a tensor: logits [N, C], or [N, C, S] for tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, X: Any) -> Tensor:
        logits = self.model(**X).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


@dataclass(frozen=True)
class Size:
    """How large the models are.

    Attributes:
        width: Features of a token.
        inner: Features between the two Linears of a block.
        layers: Number of blocks.
        batches: Number of examples and of tokens of each batch.
    """

    width: int = 8
    inner: int = 12
    layers: int = 2
    batches: tuple[tuple[int, int], ...] = ((2, 4), (1, 5))


SMALL = Size()
#: As small as can be; lengths that are, and are not, multiples of the number of examples.
TINY = Size(width=4, inner=6, layers=1, batches=((2, 4), (3, 6)))
NAMES = ("gpt2", "bert", "bert-mlm", "resnet")


def _make(name: str, size: Size) -> nn.Module:
    if name == "resnet":
        sizes = {"num_channels": 2, "embedding_size": 4, "hidden_sizes": [4, 6]}
        blocks = {"layer_type": "basic", "depths": [size.layers, 1]}
        return ResNetForImageClassification(ResNetConfig(**sizes, **blocks, num_labels=CLASSES))
    if name == "gpt2":
        sizes = {"n_embd": size.width, "n_inner": size.inner, "n_layer": size.layers, "n_head": 2}
        tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, n_positions=LONGEST))
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        num_labels=CLASSES,
    )
    return (BertForMaskedLM if name == "bert-mlm" else BertForSequenceClassification)(config)


def model_setup(name: str, size: Size = SMALL) -> Setup:
    """Return a model of some name and size in float64, with cross-entropy and data."""
    setup = copy.copy(_shared_setup(name, size))
    setup.data = list(setup.data)
    return setup


@cache
def _shared_setup(name: str, size: Size) -> Setup:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Logits(_make(name, size)).double().eval()
        with torch.no_grad():  # the usual initialisation is tiny, or 0 and 1
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 3)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2.0)
        data = [_batch(name, *sizes) for sizes in size.batches]
    return Setup(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, _num_examples)


def _batch(name: str, n: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return n images, or sequences of which the first ends early, and targets."""
    if name == "resnet":
        return {"pixel_values": torch.randn(n, 2, 14, 11).double()}, torch.randint(CLASSES, (n,))
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[0, -1:] = 0
    tokens = torch.randint(VOCABULARY, (n, length))
    X = {"input_ids": tokens, "attention_mask": mask}
    if name == "bert":
        return X, torch.randint(CLASSES, (n,))
    if name == "gpt2":  # the next token; there is none behind the last
        following = torch.cat([tokens[:, 1:], torch.full((n, 1), IGNORED)], dim=1)
        return X, following.masked_fill(mask == 0, IGNORED)
    X["token_type_ids"] = torch.randint(2, (n, length))
    hidden = torch.rand(n, length) < 0.5  # tokens to be found
    return X, tokens.masked_fill(~hidden, IGNORED)


def _num_examples(X: Any) -> int:
    return len(next(iter(X.values())))
