"""Whole models: language models of Hugging Face with random weights, and a residual network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from curvlinops import EKFACLinearOperator, KFACLinearOperator

VOCABULARY, IGNORED = 11, -100


class Logits(nn.Module):
    """A model that returns a tensor: logits [N, C], or [N, C, S] for tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, X: Any) -> Tensor:
        logits = self.model(**X).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


class Residual(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.skip = nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm1(self.first(x)))
        x = torch.relu(self.norm2(self.second(x)) + self.skip(x))
        return self.head(x.mean((2, 3)))


def make(name: str) -> nn.Module:
    if name == "resnet":
        return Residual()
    if name == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 4, "n_layer": 1, "n_head": 2}
        return Logits(
            GPT2LMHeadModel(GPT2Config(**sizes, n_positions=8, bos_token_id=0, eos_token_id=0))
        )
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 4, "intermediate_size": 6, **heads}
    return Logits(
        BertForSequenceClassification(BertConfig(**sizes, num_labels=3, max_position_embeddings=8))
    )


def arguments(name: str, single: bool = False) -> dict[str, Any]:
    """Return what an operator is built from; examples in batches, or each in one of its own."""
    torch.manual_seed(3)
    model = make(name).double().eval()
    with torch.no_grad():  # the usual initialisation is tiny
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    data = []
    for n, s in ((2, 4), (3, 6)):  # with lengths that are, and are not, multiples of the examples
        if name == "resnet":
            data.append((torch.rand(n, 1, 5, 4).double(), torch.randint(3, (n,))))
            continue
        mask = torch.ones(n, s, dtype=torch.int64)
        mask[0, -2:] = 0  # padding
        tokens = torch.randint(VOCABULARY, (n, s))
        y = torch.randint(3, (n,)) if name == "bert" else tokens.masked_fill(mask == 0, IGNORED)
        data.append(({"input_ids": tokens, "attention_mask": mask}, y))
    if single:
        data = [(rows(X, i), y[i : i + 1]) for X, y in data for i in range(len(y))]
    if name != "resnet":
        data = [(BatchEncoding(X), y) for X, y in data]
    return {
        "model_func": model,
        "loss_func": nn.CrossEntropyLoss(),
        "params": dict(model.named_parameters()),
        "data": data,
        "batch_size_fn": len if name == "resnet" else lambda X: len(X["input_ids"]),
        "loss_terms": "exact",
    }


def rows(X: Any, i: int) -> Any:
    if isinstance(X, dict):
        return {key: value[i : i + 1] for key, value in X.items()}
    return X[i : i + 1]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_batching_does_not_matter(cls: Any, name: str, joint: bool, approx: str) -> None:
    """Embeddings of positions, which all examples of a batch share, have gradients of each.

    With one example in each batch there is nothing that could be mixed.
    """
    options = {"kfac_approx": approx, "separate_weight_and_bias": not joint}
    for fisher_type in ("type-2", "empirical"):
        A, B = (
            cls(**arguments(name, single), **options, fisher_type=fisher_type)
            for single in (False, True)
        )
        torch.testing.assert_close(A.trace(), B.trace())
        if cls is KFACLinearOperator or approx == "expand":  # else the basis is not unique
            torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=1e-8, atol=1e-10)
    assert sum(len(group) for group in A.mapping) == len(arguments(name)["params"])
    for line in A.summary().splitlines()[2:-1]:
        assert "diagonal" not in line or "counts of tokens" in line


@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet"])
def test_inverse(name: str) -> None:
    K = KFACLinearOperator(**arguments(name))
    v = torch.rand(K.shape[1]).double()
    inverse = K.inverse(damping=0.1, use_exact_damping=True)
    torch.testing.assert_close(inverse @ (K @ v + 0.1 * v), v)
