"""GPT-2, BERT and a ResNet of Hugging Face, end to end, against a slow reference.

They have all their parameters: tied heads, embeddings of positions that all examples share,
attention, normalisation layers, and convolutions with strides. Those of 1 x 1 pixels are in skip
connections.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from block_checks import check_ekfac, check_kfac, given_samples, kept_apart
from layer_reference import (
    layer_examples,
    layer_groups,
    layer_places,
    reference_blocks,
    usage_gradients,
)
from torch import nn
from whole_models import NAMES, model_setup

from curvlinops import EKFACLinearOperator, KFACLinearOperator

SAMPLES, SEED = 2, 11
each_model = pytest.mark.parametrize("name", NAMES)
each_approx = pytest.mark.parametrize("approx", ["expand", "reduce"])


@cache
def problem_of(name: str) -> Any:
    """Return a model with data, whose derivatives are computed once."""
    return model_setup(name)


def build(cls: Any, name: str, joint: bool, approx: str, fisher_type: str, **options: Any) -> Any:
    if fisher_type == "mc":
        options.update(mc_samples=SAMPLES, seed=SEED)
    return cls(
        **problem_of(name).kwargs(),
        fisher_type=fisher_type,
        kfac_approx=approx,
        separate_weight_and_bias=not joint,
        **{"loss_terms": "exact", "unsupported": "raise", **options},
    )


def reference(name: str, fisher_type: str) -> tuple[str, Any]:
    """Return Fisher type and vectors for the reference."""
    if fisher_type == "mc":
        return "given", kept_apart(given_samples(problem_of(name), SAMPLES, SEED))
    return fisher_type, None


def remarks(K: Any) -> list[str]:
    """Return what the summary says of each group of parameters."""
    return K.summary().splitlines()[2:-1]


# ---- the reference -------------------------------------------------------------------------------
@each_model
def test_reference(name: str) -> None:
    """It sees every use of every parameter: these make autograd's derivatives; and all is used."""
    problem = problem_of(name)
    assert set(problem.params) == {name for name, _ in problem.model.named_parameters()}
    for group in layer_groups(problem, True):
        own = layer_places(problem, group)
        gradients = usage_gradients(problem, group)
        for example, actual in zip(layer_examples(problem), gradients, strict=True):
            expected = example.param_jacobian[..., own]
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        # softmax does not see the biases of keys
        assert max(g.abs().max() for g in gradients) > 1e-3 or "key.bias" in str(group)


@each_model
def test_reference_predicts_what_the_model_does(name: str) -> None:
    """For whole batches."""
    problem = problem_of(name)
    with torch.no_grad():
        expected = [prediction for X, _ in problem.data for prediction in problem.model(X)]
    for example, prediction in zip(layer_examples(problem), expected, strict=True):
        torch.testing.assert_close(example.prediction[0], prediction, rtol=1e-10, atol=1e-12)


# ---- blocks --------------------------------------------------------------------------------------
# Type-2 back-propagates C R vectors; two of the combinations have to do for language models.
COMBINATIONS = [
    (name, joint, approx, fisher_type)
    for name in NAMES
    for joint in (False, True)
    for approx in ("expand", "reduce")
    for fisher_type in ("type-2", "mc", "empirical", "forward-only")
    if fisher_type != "type-2" or (approx == "expand") == joint or name in ("bert", "resnet")
]


@pytest.mark.parametrize(("name", "joint", "approx", "fisher_type"), COMBINATIONS)
def test_kfac(name: str, joint: bool, approx: str, fisher_type: str) -> None:
    K = build(KFACLinearOperator, name, joint, approx, fisher_type)
    check_kfac(K, problem_of(name), joint, *_order(name, fisher_type, approx))
    for line in remarks(K):
        assert "diagonal" not in line or "counts of tokens" in line


@pytest.mark.parametrize(
    ("name", "joint", "approx", "fisher_type"),
    [combination for combination in COMBINATIONS if combination[-1] != "forward-only"],
)
def test_ekfac(name: str, joint: bool, approx: str, fisher_type: str) -> None:
    E = build(EKFACLinearOperator, name, joint, approx, fisher_type)
    check_ekfac(E, problem_of(name), joint, *_order(name, fisher_type, approx))
    for line in remarks(E):
        assert "diagonal" not in line or "counts of tokens" in line


def _order(name: str, fisher_type: str, approx: str) -> tuple[str, str, Any]:
    """Return the last arguments of a comparison."""
    kind, vectors = reference(name, fisher_type)
    return kind, approx, vectors


@each_approx
@pytest.mark.parametrize("name", ["gpt2", "bert-mlm"])
def test_wide_factors(name: str, approx: str) -> None:
    """Vocabularies, and the hidden features of the MLP, are wider than the limit."""
    size = 10
    K = build(KFACLinearOperator, name, False, approx, "empirical", max_factor_size=size)
    check_kfac(K, problem_of(name), False, "empirical", approx, max_factor_size=size)
    blocks = reference_blocks(problem_of(name), False, "empirical", approx)
    for line, block in zip(remarks(K), blocks, strict=True):
        wide = any(len(f) > size for part in block.parts for f in part if f is not None)
        assert ("over-wide factor: diagonal only" in line) == wide
    assert sum("over-wide" in line for line in remarks(K)) >= 3


@each_model
def test_tied_weights(name: str) -> None:
    """The summary names both layers of a tied head."""
    K = build(KFACLinearOperator, name, True, "expand", "empirical")
    tied = [line for line in remarks(K) if "nearest Kronecker product" in line]
    assert len(tied) == (name in ("gpt2", "bert-mlm"))
    for line in tied:
        assert "Linear + Embedding" in line
        assert ".wte, " in line or "word_embeddings, " in line


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n.startswith("bert") else []) for n in NAMES],
)
def test_make_fx(name: str) -> None:
    """The other backend; also with the check, and signs."""
    options = {"loss_terms": "signs", "check_deterministic": True}
    for cls in (KFACLinearOperator, EKFACLinearOperator):
        arguments = problem_of(name).kwargs(**options)
        hooks, traced = (
            cls(**arguments, fisher_type="empirical", backend=b) for b in ("hooks", "make_fx")
        )
        assert traced.mapping == hooks.mapping
        assert traced.summary() == hooks.summary()
        expected = hooks.to_dense()
        atol = 1e-10 * expected.abs().max().item()
        torch.testing.assert_close(traced.to_dense(), expected, rtol=0, atol=atol)


# ---- the models ----------------------------------------------------------------------------------
def test_models_are_what_they_should_be() -> None:
    """Tied heads; a norm layer with statistics; strided convolutions of one pixel."""
    for name, head, table in (
        ("gpt2", "lm_head", "transformer.wte"),
        ("bert-mlm", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ):
        model: Any = problem_of(name).model.model
        assert model.get_submodule(head).weight is model.get_submodule(table).weight
    resnet = problem_of("resnet").model
    convolutions = [layer for layer in resnet.modules() if isinstance(layer, nn.Conv2d)]
    assert any(c.kernel_size == (1, 1) and c.stride == (2, 2) for c in convolutions)
    norms = [layer for layer in resnet.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all(layer.running_mean.abs().max() > 0.01 for layer in norms)
