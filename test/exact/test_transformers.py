"""Tests on language models of Hugging Face, with random weights, and inputs in a BatchEncoding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from exact_cases import OPERATORS, Problem, assert_matrix
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY, IGNORED = 11, -100
OUTPUT_LAYERS = {"gpt2": "wte.weight", "llama": "lm_head.weight", "bert": "classifier.weight"}


class Logits(nn.Module):
    """A model that returns a tensor: logits [N, C], or [N, C, S] for tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, X: Any) -> Tensor:
        logits = self.model(**X).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


def make(name: str) -> nn.Module:
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2}
        config = GPT2Config(**sizes, n_positions=8, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config)
    if name == "llama":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 6, **heads}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 6, **heads}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


def problem(name: str) -> Problem:
    model = Logits(make(name)).double().eval()
    with torch.no_grad():  # the usual initialisation is tiny
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    data = []
    for n, s in ((2, 5), (3, 4), (1, 6)):
        mask = torch.ones(n, s, dtype=torch.int64)
        mask[0, -2:] = 0  # padding
        tokens = torch.randint(VOCABULARY, (n, s))
        y = torch.randint(3, (n,)) if name == "bert" else tokens.masked_fill(mask == 0, IGNORED)
        data.append((BatchEncoding({"input_ids": tokens, "attention_mask": mask}), y))
    named = dict(model.named_parameters())
    wanted = [n for n in named if (".1." in n and "bias" in n) or n.endswith(OUTPUT_LAYERS[name])]
    return Problem(
        model,
        lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
        data,
        params={n: named[n] for n in wanted} or named,
        batch_size_fn=lambda X: len(X["input_ids"]),
        classes=1,
    )


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize("name", OUTPUT_LAYERS)
def test_equals_autodiff(cls: Any, name: str) -> None:
    case = problem(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        A = case.operator(cls)
        A @ torch.rand(A.shape[1], dtype=torch.float64)
    assert len([w for w in caught if "fused attention" in str(w.message)]) == 1
    with sdpa_kernel(SDPBackend.MATH):
        dense = case.dense(cls)
    assert_matrix(A, dense, 1e-11)
