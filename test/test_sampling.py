"""Samples from N(0, A) and N(0, A⁻¹): their covariance, their random numbers, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import SPECTRA, STRUCTURES, compose
from torch import Tensor, nn
from zoo import C64, C128, F32, F64, ZOO, Cumsum, general, indefinite, positive, unitary

from curvlinops import EKFACLinearOperator, KFACLinearOperator
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._operator import RectangularError
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator as BlockDiagonal
from curvlinops.dense import TensorLinearOperator as Dense
from curvlinops.diag import DiagonalLinearOperator as Diagonal
from curvlinops.eigh import EighDecomposedLinearOperator as Eigh
from curvlinops.kronecker import KroneckerProductLinearOperator as Kron
from curvlinops.outer import OuterProductLinearOperator as LowRank

NUM_SAMPLES = 20_000
Shift = Callable[[PyTorchLinearOperator], PyTorchLinearOperator]


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def standard_errors(whitened: Tensor) -> float:
    """How far samples ``[D, n]`` are from N(0, I): the largest of their errors in standard errors.

    The moments are the mean, the covariance, and for complex numbers the pseudo-covariance
    E[y yᵀ], which is 0.
    """
    n = whitened.shape[1]
    eye = torch.eye(len(whitened), dtype=whitened.dtype)
    variances = torch.ones(len(whitened), len(whitened), dtype=F64)
    moments = [
        (whitened @ whitened.mH / n - eye, variances + (0 if whitened.is_complex() else eye))
    ]
    moments.append((whitened.mean(1), torch.ones(len(whitened), dtype=F64)))
    if whitened.is_complex():
        moments.append((whitened @ whitened.mT / n, variances + eye.real))
    return max(((m.abs() / (v / n).sqrt()).max().item()) for m, v in moments)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance(structure: str, dtype: torch.dtype, shift: float, inverse: bool) -> None:
    """In A's eigenbasis, whitened by its eigenvalues, samples are standard normal.

    So the directions of small eigenvalues count as much as others (condition numbers are at least
    1e4). Catches a root of the wrong operator, one that is no root of the shifted operator, and a
    complex normal with variance 2 or without conjugation.
    """
    operator, values, Q = STRUCTURES[structure](SPECTRA["ill"], dtype)
    values = values + shift
    assert values.max() / values.min() >= (1e4 if shift == 0 else 5e3)
    operator = operator + shift * operator**0
    samples = operator.sample(NUM_SAMPLES, generator=generator(), inverse=inverse)
    assert samples.shape == (len(values), NUM_SAMPLES)
    assert samples.dtype == dtype
    exponent = 0.5 if inverse else -0.5
    assert standard_errors(values.unsqueeze(1) ** exponent * (Q.mH @ samples)) < 5


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_definition(structure: str, dtype: torch.dtype) -> None:
    """Samples are the principal root times the generator's normal numbers, D rows at once.

    Catches another root (Cholesky's has the same covariance), and numbers in another order.
    """
    operator, values, Q = STRUCTURES[structure](SPECTRA["well"], dtype)
    z = torch.randn(len(values), 4, generator=generator(), dtype=dtype)
    for inverse, exponent, root in ((False, 0.5, "sqrt"), (True, -0.5, "inverse_sqrt")):
        samples = operator.sample(4, generator=generator(), inverse=inverse)
        assert torch.equal(samples, getattr(operator, root)() @ z)
        assert torch.allclose(samples, compose(values**exponent, Q) @ z)


def test_random_numbers() -> None:
    """A generator advances and leaves the global one alone; without it, the global one is used."""
    A = STRUCTURES["kfac"](SPECTRA["well"], F64)[0]
    own = generator()
    before = torch.get_rng_state()
    first, second = A.sample(2, generator=own), A.sample(2, generator=own)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(A.sample(2, generator=generator()), first)
    torch.manual_seed(3)
    one = A.sample(2)
    torch.manual_seed(3)
    assert torch.equal(A.sqrt() @ torch.randn(19, 2, dtype=F64), one)
    after = torch.randn(3)
    torch.manual_seed(3)
    torch.randn(19, 2, dtype=F64)
    assert torch.equal(torch.randn(3), after)  # nothing else was drawn
    assert A.sample().shape == (19, 1)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, C64])
def test_dtype(dtype: torch.dtype) -> None:
    """Samples have the operator's dtype."""
    A = Kron(torch.eye(2, dtype=dtype), 4 * torch.eye(3, dtype=dtype))
    samples = A.sample(5, generator=generator())
    assert samples.dtype == dtype
    expected = 2 * torch.randn(6, 5, generator=generator(), dtype=dtype)
    assert torch.allclose(samples, expected, rtol=1e-2)


def test_operator_without_dtype() -> None:
    """It samples in the default dtype."""
    eye = IdentityLinearOperator([(2,), (3,)])
    z = torch.randn(5, 2, generator=generator())
    assert torch.equal(eye.sample(2, generator=generator()), z)
    assert torch.allclose((4 * eye).sample(2, generator=generator(), inverse=True), z / 2)


def test_low_rank() -> None:
    """Samples of a low-rank covariance are in its range."""
    vectors = general(6, 2)
    A = LowRank(torch.tensor([1.0, 3.0]).to(F64), vectors)
    samples = A.sample(NUM_SAMPLES, generator=generator())
    Q, R = torch.linalg.qr(vectors)
    assert torch.allclose(Q @ (Q.T @ samples), samples)
    small = torch.linalg.cholesky((R * A.c) @ R.T)
    whitened = torch.linalg.solve_triangular(small, Q.T @ samples, upper=False)
    assert standard_errors(whitened) < 5
    with pytest.raises(ValueError, match=r"N\(0, A⁻¹\) with A = <6×6 operator LowRank.*singular"):
        A.sample(inverse=True)


WRONG: dict[str, Callable[[], Any]] = {
    "dense": lambda: Dense(indefinite(4)),
    "not Hermitian": lambda: Dense(general(4, 4)),
    "kronecker": lambda: Kron(positive(2), indefinite(3)),
    "kronecker not Hermitian": lambda: Kron(positive(2), general(3, 3)),
    "diagonal": lambda: Diagonal([torch.tensor([1.0, -1.0])]),
    "complex diagonal": lambda: Diagonal([torch.tensor([1, 1j])]),
    "negative in complex": lambda: Diagonal([torch.tensor([1, -1 + 0j])]),
    "normal": lambda: Eigh(torch.tensor([1, 1 + 1j], dtype=C128), unitary(2, C128)),
    "blocks": lambda: BlockDiagonal([Kron(positive(2)), Dense(-positive(2))]),
    "complex blocks": lambda: BlockDiagonal([Diagonal([torch.tensor([1, 1j])])] * 2),
    "complex multiple": lambda: 1j * Kron(positive(2, C128)),
    "complex multiple of I": lambda: 1j * IdentityLinearOperator([(2,)], "cpu", F64),
    "negative multiple of I": lambda: (-1 + 0j) * IdentityLinearOperator([(2,)], "cpu", F64),
    "negative": lambda: -STRUCTURES["kfac"](SPECTRA["well"], F64)[0],
    "negative shift": lambda: (
        STRUCTURES["kfac"](SPECTRA["well"], F64)[0]
        - 0.5 * STRUCTURES["kfac"](SPECTRA["well"], F64)[0] ** 0
    ),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_no_covariance(name: str, inverse: bool) -> None:
    """What is not positive semi-definite is refused by name, also if it has some root."""
    operator = WRONG[name]()
    covariance = "A⁻¹" if inverse else "A"
    text = repr(operator).split("(")[0]
    with pytest.raises(
        ValueError, match=rf"Cannot sample from N\(0, {covariance}\) with A = "
    ) as e:
        operator.sample(inverse=inverse)
    assert text in str(e.value)


def test_singular() -> None:
    """A singular covariance has samples, a singular precision has none."""
    for structure in STRUCTURES:
        operator, values, Q = STRUCTURES[structure](SPECTRA["singular"], F64)
        samples = operator.sample(3, generator=generator())
        null = Q[:, values == 0].mH @ samples
        assert null.abs().max() < 1e-6
        with pytest.raises(ValueError, match=r"Cannot sample from .*singular"):
            operator.sample(inverse=True)


def test_missing() -> None:
    """Operators without root in closed form, and wrong arguments."""
    D = Dense(positive(3))
    for operator in (Cumsum([(3,)], [(3,)]), D + D @ D, ZOO["submatrix_principal"]()[0]):
        with pytest.raises(NotImplementedError, match=r"<.*no closed form of sample: .*to_dense"):
            operator.sample()
    for name in ("dense_wide", "kronecker_rectangular"):
        with pytest.raises(RectangularError, match="sample needs a square"):
            ZOO[name]()[0].sample()
    for number in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="num_samples must be an integer, at least 1"):
            D.sample(number)
    with pytest.raises(TypeError):
        D.sample(1, generator())  # type: ignore[misc]


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_laplace(kind: type[KFACLinearOperator]) -> None:
    """The posterior of a network: flat samples, and lists in the shape of the parameters."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params = dict(model.named_parameters())
    data = [(torch.rand(6, 3, dtype=F64), torch.tensor([0, 1, 0, 1, 1, 0]))]
    K = kind(model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2")
    with pytest.raises(ValueError, match=r"A = <26×26 operator FromCanonical.*is not real"):
        (K - 10 * K**0).sample()
    if kind is KFACLinearOperator:  # the sum of all logits has no influence
        with pytest.raises(ValueError, match=r"A = <26×26 operator KFAC>: .*Kron.*singular"):
            K.sample(inverse=True)
    precision = K + 1e-4 * K**0
    values, Q = torch.linalg.eigh(precision.to_dense())
    assert values.max() / values.min() > 1e3
    samples = precision.sample(NUM_SAMPLES, generator=generator(), inverse=True)
    assert standard_errors(values.unsqueeze(1).sqrt() * (Q.T @ samples)) < 5
    S = precision.inverse_sqrt()
    z = torch.randn(len(values), 1, generator=generator(), dtype=F64)[:, 0]
    flat = precision.sample(generator=generator(), inverse=True)[:, 0]
    sizes = [p.numel() for p in params.values()]
    parts = [x.reshape(p.shape) for x, p in zip(z.split(sizes), params.values(), strict=True)]
    drawn = S @ parts
    assert [x.shape for x in drawn] == [p.shape for p in params.values()]
    assert torch.allclose(torch.cat([x.flatten() for x in drawn]), flat)
    named = S @ dict(zip(params, parts, strict=True))
    assert list(named) == list(params)
