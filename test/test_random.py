"""Tests of ``curvlinops._random``."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlinops._random import PURPOSES, RandomSource, _open_uniforms

SEED = 2147483647


def _correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of two samples in standard errors."""
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    return abs(correlation) * a.numel() ** 0.5


def test_uniforms_shape_dtype_device() -> None:
    """Numbers are float64 on the CPU."""
    for draw in (RandomSource(SEED).uniforms, RandomSource(SEED).signs):
        numbers = draw("samples", 3, 5, 2)
        assert numbers.shape == (5, 2)
        assert numbers.dtype == torch.float64
        assert numbers.device.type == "cpu"


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("sizes", [[3, 7], [1] * 10, [0, 4, 5, 1], [10]])
def test_independent_of_chunks(purpose: str, draws: int, sizes: list[int]) -> None:
    """A loss term's numbers do not depend on the batch it is in.

    Catches advancing by numbers instead of counter steps, or rounding to whole steps.
    """
    source = RandomSource(SEED)
    for draw in (source.uniforms, source.signs):
        whole = draw(purpose, 0, sum(sizes), draws)
        assert whole.unique(dim=0).shape[0] > 1
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        chunks = [
            draw(purpose, start, size, draws) for start, size in zip(starts, sizes, strict=True)
        ]
        assert torch.equal(whole, torch.cat(chunks))
        # in any order
        assert torch.equal(whole[4:6], draw(purpose, 4, 2, draws))


def test_stream_of_philox() -> None:
    """The numbers are those of Philox with key (seed, purpose code), in order.

    Pins the numbers, so that runs can be repeated with later versions.
    """
    for purpose, code in {"samples": 0, "signs": 1, "eigenvalue-signs": 2}.items():
        key = np.array([SEED, code], dtype=np.uint64)
        raw = [int(r) for r in np.random.Philox(key=key).random_raw(12)]
        expected = [((r >> 12) + 0.5) / 2**52 for r in raw]
        uniforms = RandomSource(SEED).uniforms(purpose, 0, 4, 3)
        assert uniforms.flatten().tolist() == expected
    uniforms = RandomSource(0).uniforms("samples", 0, 1, 2).flatten().tolist()
    assert uniforms == [0.011546754286331562, 0.24154919656271823]


def test_numbers_of_different_terms_differ() -> None:
    """No number occurs twice, neither in a chunk nor in different ones."""
    source = RandomSource(SEED)
    uniforms = torch.cat([source.uniforms("samples", 100 * i, 100, 7) for i in range(10)])
    assert uniforms.unique().numel() == uniforms.numel()


def test_open_interval_for_extreme_raw_values() -> None:
    """The smallest and largest 64-bit integers are mapped inside (0, 1), without rounding."""
    raw = np.array([0, 1, 2**12 - 1, 2**12, 2**63, 2**64 - 2**12, 2**64 - 1], dtype=np.uint64)
    before = raw.copy()
    uniforms = _open_uniforms(raw)
    assert (raw == before).all()
    assert uniforms.dtype == np.float64
    smallest = 2.0**-53
    assert uniforms.tolist() == [
        smallest,
        smallest,
        smallest,
        3 * smallest,
        0.5 + smallest,
        1.0 - smallest,
        1.0 - smallest,
    ]
    assert torch.from_numpy(2 * uniforms - 1).erfinv().isfinite().all()


def test_uniforms_are_uniform() -> None:
    """Mean, variance and the empirical distribution function are the uniform distribution's."""
    num = 200_000
    u = RandomSource(SEED).uniforms("samples", 0, num // 4, 4).flatten()
    assert 0.0 < u.min() < 10 / num
    assert 0.0 < 1.0 - u.max() < 10 / num
    # Kolmogorov-Smirnov: the probability to exceed 2.5 is 7e-6
    grid = torch.arange(1, num + 1, dtype=torch.float64) / num
    assert (u.sort().values - grid).abs().max() * num**0.5 < 2.5
    # neighbours in a term and neighbouring terms are uncorrelated
    assert _correlation(u[:-1], u[1:]) < 5
    assert _correlation(u[:-4], u[4:]) < 5


def test_signs() -> None:
    """Signs are the uniforms compared with 1/2, and balanced."""
    source, num = RandomSource(SEED), 100_000
    signs = source.signs("signs", 0, num // 2, 2)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs < 0, source.uniforms("signs", 0, num // 2, 2) < 0.5)
    assert abs(signs.mean()) * num**0.5 < 5


def test_purposes_and_seeds_are_independent() -> None:
    """Streams of different purposes or seeds share no number and do not correlate.

    Neither do (seed, purpose) pairs with the same sum, which a key ``seed + code`` would confuse.
    """
    streams = [
        RandomSource(seed).uniforms(purpose, 0, 5000, 2)
        for seed in (0, 1, 2, 2**32, 2**63, 2**64 - 1)
        for purpose in PURPOSES
    ]
    assert torch.cat(streams).unique().numel() == sum(stream.numel() for stream in streams)
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert _correlation(a, b) < 5


def test_global_generators_are_untouched() -> None:
    """Drawing neither reads nor moves a global generator."""

    def draw() -> Tensor:
        source = RandomSource(SEED)
        return torch.cat([source.uniforms("samples", 1, 9, 3), source.signs("signs", 1, 9, 3)])

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    first = draw()
    after = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(after[0], expected[0])
    assert (after[1] == expected[1]).all()
    assert after[2] == expected[2]
    assert torch.equal(first, draw())


@pytest.mark.parametrize("first_term", [2**31, 2**53 + 1, 2**64 + 3, 2**70 + 2])
def test_large_first_term(first_term: int) -> None:
    """Positions are exact beyond 64 bits."""
    source = RandomSource(SEED)
    whole = source.uniforms("samples", first_term, 6, 3)
    assert torch.equal(whole[1:], source.uniforms("samples", first_term + 1, 5, 3))
    assert not torch.isin(whole, source.uniforms("samples", 0, 6, 3)).any()


@pytest.mark.parametrize(
    ("backend", "seed"), [("eager", SEED), ("eager", 2**64 - 1), ("aot_eager", 2**63)]
)
def test_compiled(backend: str, seed: int) -> None:
    """A compiled function draws the same numbers, in one graph, wherever a batch starts."""
    source = RandomSource(seed)

    def draw(x: Tensor, first_term: int) -> tuple[Tensor, Tensor]:
        terms, draws = x.shape
        uniforms = source.uniforms("samples", first_term, terms, draws)
        return x * uniforms, source.signs("signs", first_term, terms, draws)

    torch.compiler.reset()
    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    for shape in [(5, 3), (4, 2)]:
        x = torch.rand(shape, dtype=torch.float64)
        for first_term in (0, 7, 2**40 + 3):
            for actual, expected in zip(compiled(x, first_term), draw(x, first_term), strict=True):
                assert torch.equal(actual, expected)
                assert actual.dtype == torch.float64


def test_compiled_source_checks_its_arguments() -> None:
    """Wrong arguments are refused when a function is traced, too."""
    compiled = torch.compile(RandomSource(0).uniforms, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="must not be negative"):
        compiled("samples", -1, 1, 1)


@pytest.mark.parametrize("transform", ["vmap", "vjp", "jvp"])
def test_compiled_inside_transforms(transform: str) -> None:
    """The numbers are constants for the transformations of torch.func."""
    source = RandomSource(SEED)

    def draw(x: Tensor) -> Tensor:
        return x.sin() * source.uniforms("samples", 3, 2, 3)

    def transformed(x: Tensor) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(draw)(x)
        if transform == "jvp":
            return torch.func.jvp(draw, (x,), (x,))[1]
        return torch.func.vjp(draw, x)[1](x)[0]

    x = torch.rand(4, 2, 3, dtype=torch.float64)
    compiled = torch.compile(transformed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformed(x))


def test_operation_is_registered_correctly() -> None:
    """PyTorch's own checks of an operation: its shape function, its schema, tracing."""
    for arguments in [(-1, 0, 5, 3, 2), (7, 1, 0, 0, 4)]:
        torch.library.opcheck(torch.ops.curvlinops.uniforms.default, arguments)


@pytest.mark.parametrize(("num_terms", "draws"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_draw(num_terms: int, draws: int) -> None:
    """Empty requests give empty tensors."""
    assert RandomSource(0).uniforms("samples", 5, num_terms, draws).shape == (num_terms, draws)
    assert RandomSource(0).signs("samples", 5, num_terms, draws).shape == (num_terms, draws)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None])
def test_wrong_seed(seed: object) -> None:
    """Seeds that do not fit the key are refused instead of wrapped."""
    with pytest.raises(ValueError, match="seed must be"):
        RandomSource(seed)


def test_integer_like_seeds() -> None:
    """NumPy integers are seeds; the largest seed works."""
    expected = RandomSource(7).uniforms("samples", 0, 2, 2)
    assert torch.equal(expected, RandomSource(np.int64(7)).uniforms("samples", 0, 2, 2))
    assert repr(RandomSource(2**64 - 1)) == f"RandomSource(seed={2**64 - 1})"


def test_wrong_arguments() -> None:
    """Unknown purposes and negative numbers are refused with the supported ones named."""
    source = RandomSource(0)
    for draw in (source.uniforms, source.signs):
        with pytest.raises(ValueError, match=r"'noise'.*'eigenvalue-signs', 'samples', 'signs'"):
            draw("noise", 0, 1, 1)
        for wrong in [(-1, 1, 1), (0, -1, 1), (0, 1, -1)]:
            with pytest.raises(ValueError, match="must not be negative"):
                draw("samples", *wrong)
