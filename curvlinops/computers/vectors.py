"""The loss vectors that KFAC back-propagates: what each Fisher type means, and mixed loss terms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops.computers.arrangement import of_owners
from curvlinops.kfac_utils import FisherType
from curvlinops.risk import Loss

_CHUNK_ENTRIES = 2**22  # entries of Hessian root columns made at once


def check_terms(num_terms: int, num_examples: int, expected: int | None) -> int:
    """Return the number of loss terms per example, R.

    Raises:
        ValueError: If examples have different numbers of terms, or not as many as expected.
    """
    if num_terms % num_examples:
        raise ValueError(
            f"A batch of {num_examples} examples has {num_terms} loss terms: every example must "
            "have the same number. Check batch_size_fn."
        )
    per_example = num_terms // num_examples
    if expected is not None and per_example != expected:
        raise ValueError(
            f"num_per_example_loss_terms={expected}, but the examples have {per_example} loss "
            f"terms each. Pass {per_example}, or leave it out."
        )
    return per_example


def num_vectors(
    loss: Loss,
    num_classes: int,
    fisher_type: FisherType,
    mc_samples: int,
    per_example: int,
    loss_terms: str,
) -> int:
    """Return how many vectors :func:`loss_vectors` yields; the arguments are its."""
    if fisher_type is FisherType.FORWARD_ONLY:
        return 0
    columns = loss.num_columns(num_classes) if fisher_type is FisherType.TYPE2 else 1
    if fisher_type is FisherType.MC:
        columns = mc_samples
    return columns * (per_example if loss_terms == "exact" else 1)


def mixes_terms(fisher_type: FisherType, per_example: int, loss_terms: str) -> bool:
    """Return whether vectors have random signs, for examples with several loss terms."""
    mixing = fisher_type in (FisherType.TYPE2, FisherType.EMPIRICAL)
    return mixing and per_example > 1 and loss_terms == "signs"


def loss_vectors(
    loss: Loss,
    F: Tensor,
    targets: Any,
    *,
    fisher_type: FisherType,
    mc_samples: int,
    per_example: int,
    loss_terms: str,
    random: RandomSource,
    signs: str,
    first_term: int,
    owners: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield vectors v ``[m, C]`` whose second moment, summed over v, is the loss curvature.

    Terms of one example are independent: products of back-propagated vectors must not mix them.
    ``"exact"`` splits each vector into R with one term per example. ``"signs"`` multiplies the
    terms by random signs, ``E[s_m s_m'] = δ_mm'``, but those of Monte-Carlo vectors: their terms
    are independent, of mean zero, by themselves.

    Args:
        loss: The loss entry.
        F: Predictions ``[m, C]``.
        targets: Targets of the loss terms.
        fisher_type: Which vectors.
        mc_samples: Number of Monte-Carlo samples.
        per_example: Number of loss terms per example, R.
        loss_terms: ``"signs"`` or ``"exact"``.
        random: Source of random numbers.
        signs: What random signs are drawn for, see :data:`~curvlinops._random.PURPOSES`.
        first_term: Index of the first loss term in the whole data.
        owners: The number of the example of each term ``[m]``; by default terms of an example are
            next to each other.
    """
    num_terms, num_classes = F.shape
    if fisher_type is FisherType.FORWARD_ONLY:
        return
    vectors: Iterator[Tensor]
    if fisher_type is FisherType.MC:
        num_vectors = mc_samples
        draws = loss.draws(num_classes)
        uniforms = random.uniforms("samples", first_term, num_terms, mc_samples * draws)
        vectors = (
            loss.sample(F, targets, sample)[0] / mc_samples**0.5
            for sample in uniforms.reshape(num_terms, mc_samples, draws).split(1, dim=1)
        )
    elif fisher_type is FisherType.TYPE2:
        num_vectors = loss.num_columns(num_classes)
        chunk = max(1, _CHUNK_ENTRIES // F.numel())
        vectors = (
            column
            for start in range(0, num_vectors, chunk)
            for column in loss.root_columns(F, targets, slice(start, start + chunk))
        )
    else:
        num_vectors = 1
        vectors = iter([loss.grad(F, targets)])
    if mixes_terms(fisher_type, per_example, loss_terms):
        drawn = random.signs(signs, first_term, num_terms, num_vectors).to(F.device, F.dtype)
        for vector, sign in zip(vectors, drawn.T, strict=True):
            yield sign.unsqueeze(-1) * vector
    elif loss_terms == "signs":
        yield from vectors
    else:
        position = torch.arange(num_terms, device=F.device) % per_example  # [m]
        position = of_owners(position, owners)
        for vector in vectors:
            for index in range(per_example):
                yield vector * (position == index).unsqueeze(-1)
