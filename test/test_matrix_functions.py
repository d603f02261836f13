"""Powers, roots, pseudo-inverses and determinants, which keep the structure of an operator."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import GROUPS, SHAPES, SPECTRA, STRUCTURES, compose, dense, hermitian
from scipy.linalg import fractional_matrix_power
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo import C128, F32, F64, ZOO, Cumsum, count_calls, general, unitary

from curvlinops import _tensors
from curvlinops._algebra import IdentityLinearOperator, ScaledLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator as BlockDiagonal
from curvlinops.dense import TensorLinearOperator as Dense
from curvlinops.diag import DiagonalLinearOperator as Diagonal
from curvlinops.eigh import EighDecomposedLinearOperator as Eigh
from curvlinops.kfac_utils import FromCanonicalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator as Kron
from curvlinops.outer import OuterProductLinearOperator as LowRank


def assert_close(operator: PyTorchLinearOperator, matrix: Tensor, condition: float = 1.0) -> None:
    """The operator is the matrix, up to rounding errors that a condition number magnifies."""
    scale = torch.linalg.matrix_norm(matrix, 2).item()
    error = torch.linalg.matrix_norm(operator.to_dense() - matrix, 2).item()
    assert error <= 100 * 2.3e-16 * condition * scale


def tensors(item: Any) -> Iterator[Tensor]:
    """All tensors that an operator holds."""
    if isinstance(item, Tensor):
        yield item
    if isinstance(item, PyTorchLinearOperator):
        item = item._state()
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (list, tuple)):
        for value in item:
            yield from tensors(value)


def kinds(operator: PyTorchLinearOperator) -> list[str]:
    """The types of the blocks of a chain P B Pᵀ, without wrappers."""
    assert isinstance(operator, _ChainPyTorchLinearOperator)
    P, B, PT = operator
    assert isinstance(B, BlockDiagonal)
    assert isinstance(P @ PT, IdentityLinearOperator) or isinstance(PT @ P, IdentityLinearOperator)
    result = []
    for block in B:
        while isinstance(block, ScaledLinearOperator):
            block = block.operator
        result.append(type(block).__name__.removesuffix("LinearOperator"))
    return result


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_planted_spectra(structure: str, spectrum: str, dtype: torch.dtype) -> None:
    """Functions of the matrix are functions of the planted eigenvalues.

    Catches a wrong exponent, eigenvectors without conjugation, and eigenvalues in another order
    than the eigenvectors. For singular operators, negative powers are refused and the
    pseudo-inverse is 0 on the null space.
    """
    operator, values, Q = STRUCTURES[structure](SPECTRA[spectrum], dtype)
    matrix = compose(values, Q)
    assert_close(operator, matrix)
    singular = bool((values == 0).any())
    large = values[values > 0]
    condition = (large.max() / large.min()).item()
    # errors of small eigenvalues: eps * λ_max, and as sqrt(λ) at most its root
    root = operator.sqrt()
    assert_close(root @ root, matrix, 10)
    if not singular:
        assert_close(root, compose(values.sqrt(), Q), condition**0.5)
    else:
        expected = compose(values.sqrt(), Q)
        assert torch.allclose(root.to_dense(), expected, atol=1e-6, rtol=0)
    assert_close(operator.power(1.5), compose(values**1.5, Q), condition**0.5)
    assert_close(operator.power(3), compose(values**3, Q), 10)
    assert_close(operator.eigh(), matrix)
    reciprocal = torch.where(values > 0, 1 / torch.where(values > 0, values, 1), 0)
    assert_close(operator.pinv(), compose(reciprocal, Q), 10 * condition)
    if singular:
        for refused in (operator.inverse_sqrt, lambda: operator.power(-1)):
            with pytest.raises(ValueError, match=r"operator .*does not exist: it is singular"):
                refused()
        return
    assert_close(operator.inverse_sqrt(), compose(values**-0.5, Q), 10 * condition)
    assert_close(operator.power(-2), compose(values**-2, Q), 10 * condition**2)
    assert_close(operator.inverse(), compose(1 / values, Q), 10 * condition)
    logdet = operator.logdet()
    assert torch.allclose(logdet.real, values.log().sum(), atol=1e-14 * condition * len(values))


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_fractional_powers_as_in_scipy(structure: str, dtype: torch.dtype) -> None:
    """The independent implementation, by Padé approximants of a Schur form, agrees."""
    operator, values, Q = STRUCTURES[structure](SPECTRA["well"], dtype)
    matrix = compose(values, Q)
    for exponent in (0.5, -0.5, 0.3, -1.7):
        expected = torch.as_tensor(fractional_matrix_power(matrix.numpy(), exponent))
        assert torch.allclose(operator.power(exponent).to_dense(), expected.to(dtype), atol=1e-11)
    assert torch.allclose(operator.pinv().to_dense(), torch.linalg.pinv(matrix), atol=1e-11)


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_indefinite_operators_have_no_roots(structure: str, dtype: torch.dtype) -> None:
    """The error names the operator; integer powers and the pseudo-inverse exist."""
    if dtype == C128 and structure == "diagonal":
        return  # complex entries have complex roots
    spectrum: Callable[[int], Tensor] = lambda d: torch.linspace(-1, 2.5, d, dtype=F64)  # noqa: E731
    operator, values, Q = STRUCTURES[structure](spectrum, dtype)
    for refused in (operator.sqrt, operator.inverse_sqrt, lambda: operator.power(1.5)):
        with pytest.raises(ValueError, match=r"operator .* is not real"):
            refused()
    assert_close(operator.power(2), compose(values**2, Q), 10)
    assert_close(operator.power(-1), compose(1 / values, Q), 1000)
    assert_close(operator.pinv(), compose(1 / values, Q), 1000)


def test_negative_factors_cancel() -> None:
    """Two negative semi-definite factors have a positive product, whose root stays a product."""
    A, _ = hermitian(torch.tensor([-3.0, -1, 0], dtype=F64), F64)
    B, _ = hermitian(torch.tensor([-2.0, -0.5], dtype=F64), F64)
    C, _ = hermitian(torch.tensor([1.0, 2], dtype=F64), F64)
    D = Diagonal([-torch.ones(2, dtype=F64)])
    for factors in ((A, C, B), (B, D)):
        K = Kron(*factors)
        root = K.sqrt()
        assert isinstance(root, Kron)
        assert torch.allclose((root @ root).to_dense(), K.to_dense())
        assert torch.linalg.eigvalsh(root.to_dense()).min() > -1e-12
    for factors in ((A, C), (B, D, B)):
        with pytest.raises(ValueError, match=r"of <.*operator Kron.*not real"):
            Kron(*factors).sqrt()
    zero = torch.zeros(2, 2, dtype=F64)
    root = Kron(B, zero).sqrt()  # the product is 0
    assert torch.equal(root.to_dense(), torch.zeros(4, 4, dtype=F64))


# --------------------------------------------------------------------------------------------------
# What is singular
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F64, F32, C128])
def test_singular_up_to_rounding(dtype: torch.dtype) -> None:
    """A rank-deficient matrix is refused whatever sign its rounding errors have."""
    for seed in range(40):
        torch.manual_seed(seed)
        dim = 2 + 3 * seed
        values = torch.rand(dim, dtype=F64) + 0.1
        values[0] = 0  # a single one, which is computed as positive as often as negative
        matrix = hermitian(values, dtype.to_complex() if dtype.is_complex else F64)[0].to(dtype)
        for operator in (Dense(matrix), Kron(matrix), Kron(torch.eye(2, dtype=dtype), matrix)):
            with pytest.raises(ValueError, match="singular"):
                operator.inverse_sqrt()
        rank = torch.linalg.matrix_rank(Dense(matrix).pinv().matrix, hermitian=True, rtol=1e-3)
        assert rank == dim - 1


def test_ill_conditioned_is_not_singular() -> None:
    """A condition number of 1e5 is not refused in float32 with hundreds of rows, nor cut off."""
    values = torch.logspace(0, -5, 300, dtype=F64)
    matrix, Q = hermitian(values, F64)
    root = Kron(matrix.to(F32)).inverse_sqrt()[0]
    assert torch.allclose(root.to(F64), compose(values**-0.5, Q), atol=0.05 * 1e5**0.5)
    tiny = Diagonal([torch.tensor([1.0, 1e-30])])  # exact numbers, none of them rounding errors
    assert torch.allclose(tiny.inverse_sqrt().diagonal(), torch.tensor([1, 1e15]))
    # K + δI knows its small eigenvalues, however large the others are
    shifted = Kron(torch.diag(torch.tensor([0.0, 1e8]))) + 1e-3 * Kron(torch.eye(2)) ** 0
    expected = torch.tensor([1e-3**-0.5, 1e-4])
    assert torch.allclose(shifted.inverse_sqrt().diagonal().sort().values, expected.sort().values)


def test_negative_entries_among_many() -> None:
    """How much rounding is forgiven depends on decomposed matrices, not on the dimension."""
    values = torch.ones(1_000_000)
    values[7] = -0.5
    basis = Kron(torch.eye(10), IdentityLinearOperator([(100_000,)], "cpu", F32))
    for operator in (Diagonal([values]), Eigh(values, basis)):
        with pytest.raises(ValueError, match="not real"):
            operator.sqrt()
    values[7] = 1e-4
    for operator in (Diagonal([values]), Eigh(values, basis)):
        assert operator.pinv().diagonal()[7].item() == pytest.approx(1e4)


def test_zeros_of_complex_spectra() -> None:
    """They have no negative powers, either."""
    values = torch.tensor([1 + 1j, 0])
    for operator in (Diagonal([values]), Eigh(values, torch.eye(2, dtype=torch.complex64))):
        with pytest.raises(ValueError, match="singular"):
            operator.power(-1)
        assert torch.allclose(operator.pinv().diagonal(), torch.tensor([0.5 - 0.5j, 0]))


def test_empty_tensors() -> None:
    """A layer without parameters has a root."""
    D = Diagonal([torch.ones(0), torch.full((2,), 4.0)])
    assert torch.equal(D.sqrt().diagonal(), torch.full((2,), 2.0))
    assert torch.equal(D.pinv().diagonal(), torch.full((2,), 0.25))
    assert Diagonal([torch.ones(0)]).pinv().shape == (0, 0)
    assert Kron(torch.ones(0, 0)).pinv().shape == (0, 0)
    assert Dense(torch.ones(0, 2)).pinv().shape == (2, 0)


def test_half_precision() -> None:
    """Powers are computed in float32 from beginning to end, and rounded once."""
    exact = hermitian(torch.logspace(0, -1, 40, dtype=F64), F64)[0]
    low = exact.to(torch.bfloat16)
    values, Q = torch.linalg.eigh((low.to(F64) + low.to(F64).T) / 2)
    root = Kron(low).sqrt()[0]
    expected = compose(values.sqrt(), Q)
    assert root.dtype == torch.bfloat16
    # one rounding per entry
    assert torch.allclose(root.to(F64), expected, rtol=2**-8, atol=2**-9 * 0.02)
    pseudo = Kron(low).pinv()[0].to(F64)
    assert torch.linalg.matrix_norm(pseudo @ low.to(F64) - torch.eye(40)) < 0.2


# --------------------------------------------------------------------------------------------------
# Pseudo-inverses
# --------------------------------------------------------------------------------------------------
def penrose(operator: PyTorchLinearOperator, inverse: PyTorchLinearOperator) -> None:
    """The four conditions that define the Moore-Penrose inverse."""
    A, X = operator.to_dense(), inverse.to_dense()
    for left, right in ((A @ X @ A, A), (X @ A @ X, X), ((A @ X).mH, A @ X), ((X @ A).mH, X @ A)):
        assert torch.allclose(left, right, atol=1e-10)
    assert (inverse.in_shape, inverse.out_shape) == (operator.out_shape, operator.in_shape)
    names = operator._out_names, operator._in_names
    assert (inverse._in_names, inverse._out_names) == names


def low(rows: int, columns: int, rank: int, dtype: torch.dtype = F64) -> Tensor:
    return general(rows, rank, dtype) @ general(rank, columns, dtype)


RECTANGULAR: dict[str, Callable[[torch.dtype], tuple[PyTorchLinearOperator, type]]] = {
    "dense": lambda t: (Dense(low(4, 6, 2, t)), Dense),
    "not Hermitian": lambda t: (Dense(low(5, 5, 2, t)), Dense),
    "kronecker": lambda t: (Kron(low(4, 3, 2, t), low(2, 5, 1, t), general(2, 3, t)), Kron),
    "blocks": lambda t: (
        BlockDiagonal([Dense(low(3, 2, 1, t)), Kron(low(2, 4, 1, t))]),
        BlockDiagonal,
    ),
    "flat blocks": lambda t: (
        BlockDiagonal([Dense(low(3, 2, 1, t)), Kron(low(2, 4, 1, t))], flat=True),
        BlockDiagonal,
    ),
    "normal": lambda t: (
        Eigh(torch.tensor([1j, 0, 2 - 1j], dtype=C128), unitary(3, C128)),
        Eigh,
    ),
    "diagonal": lambda t: (Diagonal([torch.tensor([2, 0, -4], dtype=t)], ["w"]), Diagonal),
    "multiple": lambda t: (-3 * Kron(low(4, 3, 2, t)), ScaledLinearOperator),
    "complex multiple": lambda t: (2j * Kron(low(4, 3, 2, t)), ScaledLinearOperator),
    "zero": lambda t: (0 * Kron(low(4, 3, 2, t)), ScaledLinearOperator),
    "shift": lambda t: (Dense(low(4, 4, 2, t)) + 2 * Dense(low(4, 4, 2, t)) ** 0, Dense),
    "low rank": lambda t: (
        LowRank(torch.tensor([2.0, -1, 0]).to(F64), [general(2, 3), general(3, 3)]),
        LowRank,
    ),
}


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", RECTANGULAR)
def test_pinv(name: str, dtype: torch.dtype) -> None:
    """The Penrose conditions hold, in the same structure; adjoints and permutations go along."""
    operator, kind = RECTANGULAR[name](dtype)
    inverse = operator.pinv()
    assert type(inverse) is kind
    penrose(operator, inverse)
    assert torch.allclose(inverse.to_dense(), torch.linalg.pinv(operator.to_dense()))
    penrose(operator.H, operator.H.pinv())
    penrose(operator.T, operator.T.pinv())
    penrose(-2 * operator, (-2 * operator).pinv())


def test_pinv_of_lazy_adjoints() -> None:
    """An operator that knows its pseudo-inverse, but no adjoint in closed form."""

    class Wide(PyTorchLinearOperator):
        def __init__(self) -> None:
            super().__init__([(3,)], [(2,)])
            self.matrix = general(2, 3, C128)

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [self.matrix @ X[0]]

        def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [self.matrix.mH @ X[0]]

        def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
            return Dense(self.matrix).pinv(rtol)

    A = Wide()
    for operator in (A, A.H, A.T, A._conjugate(), 2 * A.H):
        penrose(operator, operator.pinv())


def test_pinv_between_permutations() -> None:
    """(P B Q)⁺ = Qᵀ B⁺ Pᵀ, also with one permutation only, which is its own inverse's adjoint."""
    P = FromCanonicalLinearOperator(SHAPES, GROUPS, "cpu", F64)
    B = BlockDiagonal([Kron(low(3, 3, 2), low(4, 2, 1)), Dense(low(3, 2, 2)), Kron(low(4, 3, 2))])
    square = BlockDiagonal(
        [Kron(low(3, 3, 2), low(4, 4, 1)), Kron(low(3, 3, 1)), Kron(low(4, 4, 2))]
    )
    for operator in (P @ B, B.H @ P.H, P @ square @ P.H, 2 * (P @ B)):
        inverse = operator.pinv()
        penrose(operator, inverse)
        assert max(t.numel() for t in tensors(inverse)) <= 16
    assert isinstance(P.pinv() @ P, IdentityLinearOperator)
    penrose(P, P.pinv())
    eye = IdentityLinearOperator([(2,), (3,)], dtype=F64)
    assert eye.pinv() is eye
    assert (4 * eye).pinv().diagonal().sum() == 5 / 4
    two = FromCanonicalLinearOperator(SHAPES, GROUPS[::-1], "cpu", F64)
    penrose(P.H @ two, (P.H @ two).pinv())


def test_pinv_is_missing() -> None:
    """The error names the operator and what to use instead, also of rectangular ones."""
    D = Dense(general(3, 3))
    for operator in (
        Cumsum([(3,)], [(3,)]),
        ZOO["user_named"]()[0],
        D @ D,
        D + D,
        ZOO["low_rank_complex"]()[0],
        ZOO["submatrix_rectangular"]()[0],
        Kron(general(2, 2)) + 2 * Kron(general(2, 2)) ** 0,
    ):
        with pytest.raises(NotImplementedError, match=r"<.*no closed form of pinv.*lsmr"):
            operator.pinv()


def test_cutoff() -> None:
    """It is relative to the largest singular value of each factor or block."""
    values = torch.tensor([1, 1e-2, 1e-5], dtype=F64)
    matrix = torch.diag(values)

    def kept(operator: PyTorchLinearOperator, rtol: float | None = None) -> int:
        return int((operator.pinv(rtol).to_dense().diagonal() != 0).sum())

    for operator in (Dense(matrix), Diagonal([values]), Eigh(values, torch.eye(3, dtype=F64))):
        assert [kept(operator, rtol) for rtol in (None, 1e-3, 0.5, 0.0, 1.0)] == [3, 2, 1, 3, 0]
        for rtol in (-1e-3, 2.0, torch.nan):
            with pytest.raises(ValueError, match="rtol must be between 0 and 1"):
                operator.pinv(rtol)
    asymmetric = torch.cat([matrix, torch.zeros(1, 3, dtype=F64)])
    pseudo = Dense(asymmetric).pinv(1e-3).matrix
    assert torch.linalg.matrix_rank(pseudo) == 2
    assert kept(Kron(matrix, 1e6 * matrix), 1e-3) == 4  # of each factor
    assert kept(Kron(matrix, matrix).eigh(), 1e-3) == 3  # of the product: 1, 1e-2, 1e-2
    assert kept(BlockDiagonal([Dense(matrix), Dense(1e-9 * matrix)]), 1e-3) == 4  # of each block
    assert kept(Diagonal([values, 1e-9 * values]), 1e-3) == 2  # of all tensors
    vectors = [torch.eye(3, dtype=F64)]
    assert torch.linalg.matrix_rank(LowRank(values, vectors).pinv(1e-3).to_dense()) == 2
    with pytest.raises(ValueError, match=r"factor 1 of .*non-finite"):
        Kron(matrix, matrix * torch.nan).pinv()


# --------------------------------------------------------------------------------------------------
# Structure survives arithmetic
# --------------------------------------------------------------------------------------------------
ARITHMETIC: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "itself": (lambda A: A, lambda v: v),
    "multiple": (lambda A: 3 * A, lambda v: 3 * v),
    "multiple by a tensor": (lambda A: torch.tensor(3.0) * A, lambda v: 3 * v),
    "adjoint": (lambda A: A.H, lambda v: v),
    "conjugate twice": (lambda A: (2 * A.T).T, lambda v: 2 * v),
    "inverse": (lambda A: A.inverse(), lambda v: 1 / v),
    "pinv": (lambda A: A.pinv(), lambda v: 1 / v),
    "shift": (lambda A: A + 0.5 * A**0, lambda v: v + 0.5),
    "shifted multiple": (lambda A: (2 * A + 3 * A**0) / 5, lambda v: (2 * v + 3) / 5),
    "inverse of a shift": (lambda A: (A - 0.1 * A**0).inverse(), lambda v: 1 / (v - 0.1)),
    "multiple of an inverse": (lambda A: 2 * A.inverse() + A**0, lambda v: 2 / v + 1),
    "inverse of a root": (lambda A: A.sqrt().inverse(), lambda v: v**-0.5),
    "twice negative": (lambda A: -(A.inverse() * -1).H, lambda v: 1 / v),
}
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "inverse": (lambda A: A.inverse(), lambda v: 1 / v),
    "damped inverse": (
        lambda A: A.inverse(0.5, use_exact_damping=True),
        lambda v: 1 / (v + 0.5),
    ),
    "pinv": (lambda A: A.pinv(), lambda v: 1 / v),
    "eigh": (lambda A: A.eigh(), lambda v: v),
    "power(0.3)": (lambda A: A.power(0.3), lambda v: v**0.3),
    "power(-2)": (lambda A: A.power(-2), lambda v: v**-2),
    "sqrt": (lambda A: A.sqrt(), lambda v: v**0.5),
    "inverse_sqrt": (lambda A: A.inverse_sqrt(), lambda v: v**-0.5),
}


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "nested_blocks"])
def test_structure_survives(structure: str, arithmetic: str, dtype: torch.dtype) -> None:
    """All closed forms after arithmetic: the numbers, the types, and that nothing went dense.

    Catches a chain whose result is one dense matrix, an eigendecomposition whose eigenvectors are
    multiplied out, and a shift, multiple or inverse that loses a closed form.
    """
    operator, values, Q = STRUCTURES[structure](SPECTRA["well"], dtype)
    combine, values_of = ARITHMETIC[arithmetic]
    combined, values = combine(operator), values_of(values)
    largest = max(
        36 if structure == "nested_blocks" else 16, *(t.numel() for t in tensors(operator))
    )
    assert_close(combined, compose(values, Q), 100)
    logdet = combined.logdet()
    assert torch.allclose(logdet.real, values.log().sum())
    for name, (function, of_value) in FUNCTIONS.items():
        result = function(combined)
        assert_close(result, compose(of_value(values), Q), 1000)
        assert max(t.numel() for t in tensors(result)) <= largest, name
        if structure == "nested_blocks":
            assert isinstance(result, BlockDiagonal)
            assert isinstance(result[0], BlockDiagonal) and result[0].flat
            continue
        found = set(kinds(result))
        shifted = "shift" in arithmetic or "multiple of an" in arithmetic
        if structure == "ekfac" or name in ("eigh", "damped inverse") or shifted:
            assert found <= {"EighDecomposed"}, name
        else:
            assert found == {"KroneckerProduct"}, name
    with torch.random.fork_rng():
        samples = combined.sample(2)
    assert samples.shape == (len(values), 2)


@st.composite
def compositions(draw: st.DrawFn) -> tuple[PyTorchLinearOperator, Tensor, Tensor]:
    """A positive definite operator from random arithmetic, with its spectrum and eigenvectors."""
    structure = draw(st.sampled_from(list(STRUCTURES)))
    dtype = draw(st.sampled_from([F64, C128]))
    torch.manual_seed(draw(st.integers(0, 5)))
    operator, values, Q = STRUCTURES[structure](SPECTRA["well"], dtype)
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.sampled_from(["scale", "H", "inverse", "shift", "power", "pinv", "twice"]))
        number = draw(st.floats(0.5, 2))
        if step == "scale":
            operator, values = number * operator, number * values
        elif step == "H":
            operator = operator.H
        elif step == "inverse":
            operator, values = operator.inverse(), 1 / values
        elif step == "shift":
            operator, values = operator + number * operator**0, values + number
        elif step == "power":
            exponent = draw(st.sampled_from([0.5, -0.5, 2, 0.75]))
            operator, values = operator.power(exponent), values**exponent
        elif step == "pinv":
            operator, values = operator.pinv(), 1 / values
        else:
            operator = BlockDiagonal([operator, 2 * operator], flat=draw(st.booleans()))
            values, Q = torch.cat([values, 2 * values]), torch.block_diag(Q, Q)
    return operator, values, Q


@settings(max_examples=60)
@given(compositions())
def test_random_compositions(composition: tuple[PyTorchLinearOperator, Tensor, Tensor]) -> None:
    """Whatever arithmetic came before, the closed forms exist and are right."""
    operator, values, Q = composition
    condition = 10 * (values.max() / values.min()).item() ** 2
    assert_close(operator, compose(values, Q), condition)
    assert torch.allclose(operator.logdet().real, values.log().sum(), atol=1e-9)
    for function, of_value in FUNCTIONS.values():
        assert_close(function(operator), compose(of_value(values), Q), condition**2)
    generator = torch.Generator().manual_seed(3)
    samples = operator.sample(2, generator=generator, inverse=True)
    z = torch.randn(len(values), 2, generator=generator.manual_seed(3), dtype=Q.dtype)
    assert torch.allclose(samples, compose(values**-0.5, Q) @ z, atol=1e-8)


def test_eigh_of_a_shifted_dense_matrix() -> None:
    """It is in eigendecomposed form, and serves further closed forms without decomposing again."""
    A = dense(SPECTRA["well"], F64)[0]
    decomposed = (A + 2 * A**0).eigh()
    assert isinstance(decomposed, Eigh)
    with count_calls(torch.linalg, "eigh") as calls:
        decomposed.sqrt(), decomposed.logdet(), decomposed.inverse_sqrt(), decomposed.sample()
    assert not calls


@pytest.mark.parametrize("complex_", [False, True])
def test_inverses_of_hermitian_matrices_are_hermitian(complex_: bool) -> None:
    """Rounding errors of an inverse grow with the condition number, but leave it Hermitian."""
    dtype = C128 if complex_ else F64
    values = torch.logspace(0, -13, 30, dtype=F64)
    values[::2] *= -1
    for matrix in (hermitian(values, dtype)[0], hermitian(values.abs(), dtype)[0]):
        inverse = Dense((matrix + matrix.mH) / 2).inverse()
        assert torch.equal(inverse.matrix, inverse.matrix.mH)
        inverse.eigh()


# --------------------------------------------------------------------------------------------------
# Low rank
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_low_rank(rank: int) -> None:
    """Functions of a low-rank operator are of low rank again, and of one on the same space."""
    vectors = [general(2, rank), general(3, rank)]
    A = LowRank(torch.linspace(0.5, 2, rank, dtype=F64), vectors)
    matrix = A.to_dense()
    root = A.sqrt()
    assert isinstance(root, LowRank)
    assert root.c.numel() == min(5, rank)
    assert torch.allclose(root.to_dense() @ root.to_dense(), matrix)
    assert torch.linalg.eigvalsh(root.to_dense()).min() > -1e-7
    assert torch.allclose(A.pinv().to_dense(), torch.linalg.pinv(matrix, hermitian=True))
    assert torch.allclose((3 * A).power(2).to_dense(), 9 * matrix @ matrix)
    assert isinstance(3 * A, LowRank)
    assert isinstance(A.power(0), IdentityLinearOperator)
    if rank < 5:
        with pytest.raises(ValueError, match=r"LowRank.* singular"):
            A.inverse_sqrt()
    else:
        root = A.inverse_sqrt()
        assert torch.allclose(root.to_dense() @ root.to_dense() @ matrix, torch.eye(5, dtype=F64))
    with pytest.raises(ValueError, match=r"LowRank.* not real"):
        (-A).sqrt()
    with pytest.raises(NotImplementedError, match="closed form of power"):
        ZOO["low_rank_complex"]()[0].sqrt()


# --------------------------------------------------------------------------------------------------
# Costs
# --------------------------------------------------------------------------------------------------
BIG = [(512, 520), (516,)]  # factors of each block


def big_chain() -> PyTorchLinearOperator:
    """A KFAC-like operator with large factors, with dominant diagonals as nothing depends on it."""
    shapes = {"weight": BIG[0], "bias": BIG[1]}
    P = FromCanonicalLinearOperator(shapes, [{"W": "weight"}, {"b": "bias"}], "cpu", F32)
    blocks = []
    for sizes in BIG:
        roots = [torch.randn(d, d) / d**0.5 for d in sizes]
        blocks.append(Kron(*(root @ root.T + torch.eye(len(root)) for root in roots)))
    return P @ BlockDiagonal(blocks) @ P.adjoint()


def products(num_columns: int) -> int:
    """FLOPs of a product with K: 2 K D_b Σ d_i for a block of factors d_i and dimension D_b."""
    return sum(2 * num_columns * prod(sizes) * sum(sizes) for sizes in BIG)


RECOMBINE = sum(2 * d**3 for sizes in BIG for d in sizes)
"""FLOPs of Q f(λ) Qᵀ, once for each factor of size d: 2 d³."""


OTHERS = ("svd", "qr", "inv_ex", "slogdet", "pinv", "eigvalsh", "solve", "matrix_power")
"""Decompositions that nothing here needs."""


def test_costs() -> None:
    """Roots, samples and inverses cost their matrix products and one decomposition per factor.

    Catches eigenvectors that are applied to the identity (twice the FLOPs), a decomposition for
    every sample, factors that are decomposed again in a product, and dense blocks.
    """
    K, generator = big_chain(), torch.Generator().manual_seed(0)
    factors = sum(map(len, BIG))
    columns = 3

    def cost(function: Callable[[], Any]) -> tuple[int, int, int]:
        others = {name: getattr(torch.linalg, name) for name in OTHERS}
        called: list[str] = []
        with (
            FlopCounterMode(display=False) as counter,
            count_calls(torch.linalg, "eigh") as eigh,
            count_calls(torch.linalg, "cholesky_ex") as cholesky,
        ):
            for name in others:
                setattr(torch.linalg, name, lambda *_, name=name, **__: called.append(name))
            try:
                function()
            finally:
                for name, original in others.items():
                    setattr(torch.linalg, name, original)
        assert not called
        return counter.get_total_flops(), len(eigh), len(cholesky)

    dim = K.shape[0]
    v = torch.randn(dim, columns)
    results: dict[str, Any] = {}

    def keep(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            results[name] = function()

        return run

    assert cost(keep("inverse", K.inverse)) == (0, 0, factors)
    for _ in range(2):  # repeated products
        assert cost(lambda: results["inverse"] @ v) == (products(columns), 0, 0)
    assert cost(keep("sqrt", K.sqrt)) == (RECOMBINE, factors, 0)
    assert cost(lambda: results["sqrt"] @ v) == (products(columns), 0, 0)
    expected = (RECOMBINE + products(columns), factors, 0)
    assert cost(lambda: K.sample(columns, generator=generator)) == expected
    assert cost(lambda: K.sample(columns, generator=generator, inverse=True)) == expected
    # K + δI: nothing is recombined, but a product goes into the eigenbasis and back
    assert cost(keep("posterior", (K + 0.1 * K**0).inverse_sqrt)) == (0, factors, 0)
    assert cost(lambda: results["posterior"] @ v) == (2 * products(columns), 0, 0)
    # a decomposition serves several closed forms
    assert cost(keep("eigh", (K + 0.1 * K**0).eigh)) == (0, factors, 0)
    decomposed = results["eigh"]
    assert cost(lambda: (decomposed.logdet(), decomposed.trace(), decomposed.inverse())) == (
        0,
        0,
        0,
    )
    assert cost(lambda: decomposed.sample(columns)) == (2 * products(columns), 0, 0)


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_results_are_saved(structure: str, dtype: torch.dtype) -> None:
    """Every result is of types that the safe loader rebuilds, with the same closed forms."""
    operator = STRUCTURES[structure](SPECTRA["well"], dtype)[0]
    x = torch.randn(operator.shape[1], 2, dtype=dtype)
    for base in (operator, operator + 0.5 * operator**0, 2 * operator.inverse()):
        for function, _ in FUNCTIONS.values():
            result = function(base)
            file = io.BytesIO()
            torch.save(result, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            assert type(loaded) is type(result) and repr(loaded) == repr(result)
            assert torch.equal(loaded @ x, result @ x)
            assert torch.equal(loaded.inverse_sqrt() @ x, result.inverse_sqrt() @ x)


def test_negligible() -> None:
    """Rounding that is forgiven grows with the matrices, and with coarse rounding of entries."""
    values = torch.tensor([2.0, -1.0])
    eps = torch.finfo(F32).eps
    assert _tensors.negligible(values, 1).item() == pytest.approx(2 * 14 * eps)
    assert _tensors.negligible(values, 100).item() == pytest.approx(2 * 1004 * eps)
    coarse = _tensors.negligible(values.to(torch.bfloat16), 1000)
    assert 0.05 < coarse.item() < 0.08
