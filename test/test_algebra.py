"""Tests of lazy algebra: multiples, adjoints, sums, shifts, products, and rules that join them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import (
    C64,
    C128,
    F32,
    F64,
    ORDER,
    ZOO,
    Cumsum,
    Named,
    canonical_blocks,
    count_calls,
    from_canonical,
    general,
    indefinite,
    kron,
    permutation,
    positive,
)

from curvlinops import record_gradients
from curvlinops._algebra import (
    IdentityLinearOperator,
    ScaledLinearOperator,
    ShiftedLinearOperator,
    SumLinearOperator,
    _AdjointLinearOperator,
    _ConjugateLinearOperator,
)
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator, rule
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kfac_utils import FromCanonicalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.submatrix import SubmatrixLinearOperator
from curvlinops.testing import check_operator


def dense(rows: int, columns: int | None = None, dtype: torch.dtype = F64) -> TensorLinearOperator:
    return TensorLinearOperator(general(rows, rows if columns is None else columns, dtype))


# --------------------------------------------------------------------------------------------------
# Scalars
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "scalar",
    [
        2,
        -0.5,
        True,
        np.float64(2),
        np.float32(-0.5),
        np.int64(3),
        torch.tensor(2.0),
        torch.tensor(-3),
        torch.tensor(0.5, dtype=F64),
    ],
)
def test_scalars(scalar: Any) -> None:
    """Every kind of number, on either side, gives an operator with the operator's dtype."""
    A = dense(2, 3, F32)
    value = float(scalar)
    for product in (scalar * A, A * scalar):
        assert isinstance(product, PyTorchLinearOperator)
        assert product.dtype == F32
        assert torch.allclose(product.to_dense(), value * A.matrix)
    assert torch.allclose((A / scalar).to_dense(), A.matrix / value)


@pytest.mark.parametrize("scalar", [2 - 1j, np.complex128(2 - 1j), torch.tensor(2 - 1j)])
def test_complex_scalars(scalar: Any) -> None:
    """They conjugate in the adjoint but not in the transpose, and make a real operator complex."""
    for dtype, result_dtype in ((F32, C64), (F64, C128), (C128, C128)):
        A = dense(2, 3, dtype)
        matrix = (2 - 1j) * A.matrix
        product = scalar * A
        assert product.dtype == result_dtype
        for operator, expected in (
            (product, matrix),
            (product.H, matrix.mH),
            (product.adjoint(), matrix.mH),
            (product.T, matrix.mT),
            (product.T.H, matrix.conj()),
            (A / scalar, A.matrix / (2 - 1j)),
        ):
            assert operator.dtype == result_dtype
            assert torch.allclose(operator.to_dense(), expected.to(result_dtype), rtol=1e-4)


def test_complex_factors_of_real_and_complex_operators() -> None:
    """A complex multiple of a real operator meets complex operators, in every composition.

    Catches a real operator that is left alone among complex ones when scalars are pulled out.
    """
    A, B, C = dense(3), dense(3), dense(3, dtype=C128)
    a, b, c = A.matrix.to(C128), B.matrix.to(C128), C.matrix
    eye = IdentityLinearOperator([(3,)], dtype=C128)
    for operator, expected in (
        ((1j * A) @ C, 1j * a @ c),
        (C @ (1j * A), 1j * c @ a),
        ((1j * A) @ C @ (2j * B), -2 * a @ c @ b),
        ((1j * A) @ (1j * B), -a @ b),
        (((1j * A) @ (-1j * B)) @ C, a @ b @ c),
        ((1j * (A @ B)) @ C, 1j * a @ b @ c),
        ((2j * A) + eye, 2j * a + torch.eye(3)),
        ((2j * A) + 3 * eye + C, 2j * a + 3 * torch.eye(3) + c),
        ((2j * A + eye) @ C, (2j * a + torch.eye(3)) @ c),
        ((1 + 0j) * A + C, a + c),
    ):
        assert operator.dtype == C128
        for found, wanted in (
            (operator, expected),
            (operator.H, expected.mH),
            (operator.T, expected.mT),
        ):
            assert torch.allclose(found.to_dense(), wanted)


def test_multiplication_by_one_and_nested_multiples() -> None:
    """1 * A is A, multiples of multiples are one multiple, and double negation disappears."""
    A = ZOO["user_named"]()[0]
    assert 1 * A is A
    negative = -A
    assert -negative is A
    multiple = 2 * (3 * A)
    assert isinstance(multiple, ScaledLinearOperator)
    assert multiple.scalar == 6
    assert multiple.operator is A
    product = (2 * A) @ (A.H * 3)
    assert isinstance(product, ScaledLinearOperator)
    assert product.scalar == 6
    assert isinstance(product.operator, _ChainPyTorchLinearOperator)


@pytest.mark.parametrize("scalar", ["2", [2.0], torch.ones(2), torch.ones(1), np.ones(2), None])
def test_no_scalars(scalar: Any) -> None:
    """What is no number is no factor."""
    A = dense(2)
    for multiply in (lambda: scalar * A, lambda: A * scalar, lambda: A / scalar):
        with pytest.raises(TypeError):
            multiply()


def test_division() -> None:
    """By zero is an error for numbers; an operator is no divisor."""
    A = dense(2)
    with pytest.raises(ZeroDivisionError):
        A / 0
    with pytest.raises(TypeError):
        A / A
    with pytest.raises(TypeError):
        2 / A


def test_scalar_with_gradient() -> None:
    """A 0-d tensor stays in the graph, and on no account is its value read."""
    s = torch.tensor(2.0, requires_grad=True)
    A = TensorLinearOperator(general(2, 3))
    x = torch.ones(3, dtype=F64)
    with record_gradients():
        y = ((s * A) / 3) @ x
    (gradient,) = torch.autograd.grad(y.sum(), s)
    assert torch.allclose(gradient.double(), (A.matrix @ x).sum() / 3)
    meta = torch.tensor(2.0, device="meta")
    composed = meta * (A + meta * A.H.H)  # reading a value of the meta device would raise
    assert composed.shape == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorLinearOperator(positive(3, F32)),
        lambda: KroneckerProductLinearOperator(positive(2, F32), positive(2, F32)),
        lambda: DiagonalLinearOperator([torch.tensor(2.0)]),
        lambda: ZOO["kronecker_bfloat16"]()[0],
    ],
)
def test_scalar_tensors_do_not_widen(make: Any) -> None:
    """Closed forms of ``s A`` and ``A + s I`` have A's dtype, whatever that of the 0-d tensor s."""
    A = make()
    s = torch.tensor(2.0, dtype=F64)
    for operator in (s * A, A + s * A**0, (s * A).H):
        assert operator.dtype == A.dtype
        for value in (
            operator.trace(),
            operator.frobenius_norm(),
            operator.diagonal(),
            *operator.slogdet(),
            operator.inverse().trace(),
        ):
            assert value.dtype == A.dtype


def test_real_scalar_tensors_stay_real() -> None:
    """A real multiple of a complex Hermitian operator is Hermitian, with roots of the same kind."""
    K = ZOO["kronecker_positive_complex"]()[0]
    E = K.eigh()
    for scalar in (2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=F64)):
        assert (scalar * E).SELF_ADJOINT
        assert not (1j * scalar * E).SELF_ADJOINT
        assert isinstance((scalar * K).sqrt(), ScaledLinearOperator)
        assert torch.allclose((scalar * K).to_dense(), 2 * K.to_dense())


@pytest.mark.parametrize("scalar", [torch.tensor(2.0, dtype=F64), torch.tensor(2j), 2j, 2.0])
def test_scalars_follow_their_operator(scalar: Any) -> None:
    """``to`` moves and casts a scalar with its operator; a complex one stays complex."""
    K = ZOO["kronecker_positive"]()[0]
    real = not (scalar.is_complex() if isinstance(scalar, Tensor) else isinstance(scalar, complex))
    for operator in (scalar * K, (K if real else 1j * K) + scalar * K**0):
        cast = operator.to(F32)
        assert cast.dtype == (F32 if real else C64)
        assert cast.trace().dtype == cast.dtype
        assert torch.allclose(cast.trace().to(operator.dtype), operator.trace(), rtol=1e-4)
        moved = operator.to("meta")
        kept = getattr(moved, "scalar", getattr(moved, "shift", None))
        assert kept.is_meta if isinstance(scalar, Tensor) else kept == scalar
        assert moved.device == torch.device("meta")
        assert repr(moved).startswith("<12×12 operator ")


def test_python_scalars_keep_their_digits() -> None:
    """0.1 is not rounded to float32 on its way into float64 results."""
    A = ZOO["kronecker_positive"]()[0]
    sign, logabsdet = (0.1 * A).slogdet()
    assert sign == 1
    assert torch.allclose(logabsdet, A.logdet() + 12 * np.log(0.1), rtol=1e-14)
    eye = 0.1 * IdentityLinearOperator([(3,)], dtype=F64)
    assert torch.allclose(eye.logdet(), torch.tensor(3 * np.log(0.1), dtype=F64), rtol=1e-14)
    assert torch.allclose(eye.power(-0.5).trace(), torch.tensor(3 * 0.1**-0.5).to(F64), rtol=1e-7)


def test_scaled_closed_forms_of_negative_multiples() -> None:
    """The sign of a multiple counts D times, and a negative definite operator can be inverted."""
    A = TensorLinearOperator(positive(3))
    assert (-A).slogdet()[0] == -1
    assert (-2 * A).det().item() == pytest.approx(-8 * A.det().item())
    assert torch.isnan((-A).logdet())
    B = -TensorLinearOperator(-positive(3))
    assert torch.allclose(
        B.inverse(0.5).to_dense(), torch.linalg.inv(B.to_dense() + torch.eye(3) / 2)
    )


def test_zero_multiple() -> None:
    """0 A has determinant 0, no inverse, and with damping that of δI."""
    A = ZOO["kronecker_positive"]()[0]
    for zero in (0, 0.0, torch.tensor(0.0)):
        assert (zero * A).logdet() == -torch.inf
        assert (zero * A).det() == 0
        with pytest.raises(RuntimeError, match=r"0 \* Kron.* is zero and has no inverse"):
            (zero * A).inverse()
        assert torch.equal((zero * A).inverse(0.5).to_dense(), 2 * torch.eye(12, dtype=F64))


def test_powers_of_identity_multiples() -> None:
    """Integer powers exist for every sign, others for positive ones."""
    eye = IdentityLinearOperator([(2,)], dtype=F64)
    assert (-2 * eye).power(2).trace() == 8
    assert (-2 * eye).power(-1).trace() == -1
    assert (0 * eye).sqrt().trace() == 0
    assert torch.allclose((torch.tensor(4.0) * eye).sqrt().to_dense(), 2 * torch.eye(2).to(F64))
    with pytest.raises(ValueError, match="is not real"):
        (-2 * eye).sqrt()
    with pytest.raises(ValueError, match="singular"):
        (0 * eye).power(-1)


def test_power_of_what_decomposes_into_itself() -> None:
    """A user's ``eigh`` that returns no decomposition ends in an error, not in a recursion."""

    class Decomposed(Cumsum):
        def eigh(self) -> PyTorchLinearOperator:
            return self

    with pytest.raises(NotImplementedError, match="closed form of power"):
        (-2 * Decomposed([(2,)], [(2,)])).power(2)


# --------------------------------------------------------------------------------------------------
# Adjoint and transpose
# --------------------------------------------------------------------------------------------------
def test_adjoints_cancel() -> None:
    """Adjoint and transpose are undone without growing."""
    A = ZOO["user_named_complex"]()[0]
    assert A.H.H is A
    assert isinstance(A.H, _AdjointLinearOperator)
    assert isinstance(A.T, _ConjugateLinearOperator)
    assert A.T._conjugate()._adjoint() is A
    real = ZOO["user_named"]()[0]
    assert isinstance(real.T, _AdjointLinearOperator)  # no conjugation of real operators


def test_self_adjoint_operators() -> None:
    """An operator that is its own adjoint returns itself, and real multiples and sums inherit."""

    class Symmetric(Cumsum):
        SELF_ADJOINT = True

    A = Symmetric([(1, 2)], [(1, 2)])
    assert A.H is A
    for inherits in (2 * A, A + A, A - 3 * A, A + 2 * A**0, BlockDiagonalLinearOperator([A, A])):
        assert inherits.SELF_ADJOINT
        assert inherits.H is inherits
    for does_not in (2j * A, A + 1j * A, A @ A, A + Cumsum([(1, 2)], [(1, 2)])):
        assert not does_not.SELF_ADJOINT


def test_structure_survives_adjoints() -> None:
    """Adjoint and transpose of structured operators are of the same type."""
    for name in (
        "dense_general_complex",
        "diagonal_complex",
        "eigendecomposed_normal",
        "kronecker_general_complex",
        "blocks_general_complex",
        "low_rank_complex",
        "submatrix_rectangular",
        "canonical_chain_complex",
    ):
        A, matrix = ZOO[name]()
        for operator, expected in ((A.H, matrix.mH), (A.T, matrix.mT)):
            assert type(operator) is type(A)
            assert torch.allclose(operator.to_dense(), expected)


# --------------------------------------------------------------------------------------------------
# Sums and shifts
# --------------------------------------------------------------------------------------------------
def test_sums_are_flat() -> None:
    """Sums of sums are one sum; ``sum`` and 0 work."""
    A, B, C = dense(2, 3), dense(2, 3), dense(2, 3)
    for total in ((A + B) + C, A + (B + C), sum([A, B, C]), 0 + A + B + C + 0):
        assert isinstance(total, SumLinearOperator)
        assert total.operators == [A, B, C]
    difference = A - (B - C)
    matrix = A.matrix - (B.matrix - C.matrix)
    assert torch.allclose(difference.to_dense(), matrix)
    assert sum([A]) is A
    with pytest.raises(ValueError, match="A sum needs at least one"):
        SumLinearOperator([])


def test_sums_fold_terms_that_are_apart() -> None:
    """A rule joins terms wherever they are in a sum, in either order of the types."""
    K, D, E = (ZOO[name]()[0] for name in ("kronecker_general", "diagonal", "kronecker_general"))
    D = DiagonalLinearOperator([torch.arange(6).to(F64)])
    total = D + K + D + E + D
    assert isinstance(total, SumLinearOperator)
    assert [type(term) for term in total.operators] == [type(D), type(K), type(E)]
    assert torch.equal(total.operators[0].diagonal(), 3 * D.diagonal())


def test_shifts_are_collected() -> None:
    """Multiples of the identity are added up, wherever they stand."""
    A, B = dense(3), dense(3)
    eye = IdentityLinearOperator([(3,)], dtype=F64)
    total = eye + A + 2 * eye + (B - 0.5 * eye) + torch.tensor(1.0) * eye
    assert isinstance(total, ShiftedLinearOperator)
    assert float(total.shift) == 3.5
    assert isinstance(total.operator, SumLinearOperator)
    assert torch.allclose(total.to_dense(), A.matrix + B.matrix + 3.5 * torch.eye(3))
    shifted = 2 * A + 3 * eye  # 2 (A + 1.5 I)
    assert torch.allclose(shifted.to_dense(), 2 * A.matrix + 3 * torch.eye(3))


def test_identities_stay_identities() -> None:
    """Sums, multiples, products, inverses and powers of the identity."""
    eye = IdentityLinearOperator([(2,), ()], "cpu", F64)
    three = eye + 2 * eye
    assert isinstance(three, ScaledLinearOperator)
    assert three.operator is eye
    assert eye @ eye is eye
    assert eye.inverse() is eye
    assert (eye**5) is eye
    assert eye.eigh() is eye
    assert eye.sqrt() is eye
    assert (three @ three).trace() == 27
    assert torch.allclose(three.inverse(1.0).trace(), torch.tensor(0.75, dtype=F64))
    with pytest.raises(RuntimeError, match=r"I> with damping -1 is zero and has no inverse"):
        eye.inverse(-1)
    A = dense(3)
    B = KroneckerProductLinearOperator(A.matrix)
    one = IdentityLinearOperator([(3,)], dtype=F64)
    assert one @ A is A
    assert A @ one is A
    assert (A @ (2 * one) @ B).scalar == 2


def test_lazy_shift_of_kronecker_product() -> None:
    """(A⊗B) + δI is decomposed only when a closed form needs it, not for arithmetic or products."""
    A, B = positive(2), indefinite(3)
    K = KroneckerProductLinearOperator(A, B)
    with count_calls(torch.linalg, "eigh") as calls:
        shifted = 2 * (K + 0.5 * K**0) + 3 * K**0
        shifted @ torch.ones(6, dtype=F64)
        shifted.H.trace()
        shifted.diagonal()
        shifted.frobenius_norm()
        assert not calls
        matrix = 2 * kron(A, B) + 4 * torch.eye(6)
        assert torch.allclose(shifted.to_dense(), matrix)
        assert not calls
        assert torch.allclose(shifted.slogdet()[1], matrix.slogdet()[1])
        assert len(calls) == 2
    for decomposed, expected in (
        ((K + 0.5 * K**0).inverse(), torch.linalg.inv(kron(A, B) + torch.eye(6) / 2)),
        ((K + 20 * K**0).sqrt() @ (K + 20 * K**0).sqrt(), kron(A, B) + 20 * torch.eye(6)),
    ):
        assert torch.allclose(decomposed.to_dense(), expected)
    assert isinstance((K + 0.5 * K**0).inverse(), EighDecomposedLinearOperator)
    assert isinstance((K + 0.5 * K**0).eigh(), EighDecomposedLinearOperator)


def test_shift_of_factors_that_are_not_hermitian() -> None:
    """Without an eigendecomposition there is no determinant in closed form, but a trace."""
    K, matrix = ZOO["kronecker_general"]()
    shifted = K + 2 * K**0
    assert torch.allclose(shifted.trace(), matrix.trace() + 12)
    for form in ("slogdet", "logdet", "inverse", "eigh", "sqrt"):
        with pytest.raises(NotImplementedError, match="has no closed form"):
            getattr(shifted, form)()


def test_shift_of_dense_keeps_closed_forms() -> None:
    """A + δI of a dense matrix has the closed forms of a dense matrix, Hermitian or not."""
    for matrix in (general(3, 3), positive(3), indefinite(3), general(3, 3, C128)):
        A = TensorLinearOperator(matrix)
        shifted = A + 0.5 * A**0
        assert isinstance(shifted, ShiftedLinearOperator)
        expected = matrix + 0.5 * torch.eye(3)
        assert torch.allclose(shifted.det(), torch.linalg.det(expected))
        assert torch.allclose(shifted.inverse().to_dense(), torch.linalg.inv(expected))


def test_sum_has_trace_and_diagonal_only() -> None:
    """Other closed forms of a sum do not exist."""
    A, matrix = ZOO["sum_square"]()
    assert torch.allclose(A.trace(), matrix.trace())
    assert torch.allclose(A.diagonal(), matrix.diagonal())
    for form in ("slogdet", "frobenius_norm", "inverse", "eigh"):
        with pytest.raises(NotImplementedError, match=f"closed form of {form}"):
            getattr(A, form)()


# --------------------------------------------------------------------------------------------------
# Mismatches
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("left", "right", "operation", "message"),
    [
        (dense(2, 3), dense(2, 3), "@", r"Shape mismatch in a product.*2×3.*2×3"),
        (dense(2, 3), dense(3, 2), "+", r"Shape mismatch in a sum.*2×3.*3×2"),
        (dense(2, 3), dense(2, 4), "-", r"Shape mismatch in a sum.*2×3.*2×4"),
        (dense(2), dense(2, dtype=F32), "@", r"Dtype mismatch in a product.*float64.*float32"),
        (dense(2), dense(2, dtype=C128), "+", r"Dtype mismatch in a sum.*float64.*complex128"),
        (dense(2), 1j * dense(2), "-", r"Dtype mismatch in a sum.*float64.*complex128"),
        (dense(2), dense(2).to("meta"), "@", r"Device mismatch in a product.*cpu.*meta"),
        (dense(2), dense(2).to("meta"), "+", r"Device mismatch in a sum.*cpu.*meta"),
        (Named(general(4, 5)), Named(general(4, 5)).H, "+", r"Named> has.*Named.H> has"),
    ],
)
def test_mismatch(
    left: PyTorchLinearOperator, right: PyTorchLinearOperator, operation: str, message: str
) -> None:
    """Operators that do not fit are refused when they are composed; the error names both."""
    compose = {"@": lambda: left @ right, "+": lambda: left + right, "-": lambda: left - right}
    with pytest.raises(ValueError, match=message):
        compose[operation]()


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
def test_powers() -> None:
    """A ** k multiplies k times, A ** 0 is the identity, negative powers invert."""
    A = dense(3)
    assert isinstance(A**0, IdentityLinearOperator)
    assert (A**0).dtype == F64
    assert A**1 is A
    assert list(A**3) == [A, A, A]
    assert torch.allclose((A**-2).to_dense(), torch.linalg.inv(A.matrix @ A.matrix))
    assert torch.allclose((A ** np.int64(2)).to_dense(), A.matrix @ A.matrix)
    for exponent in (0.5, "2", None, True):
        with pytest.raises(TypeError):
            A**exponent
    with pytest.raises((ValueError, RuntimeError), match="from a space to itself have powers"):
        dense(2, 3) ** 2
    with pytest.raises((ValueError, RuntimeError), match="from a space to itself"):
        ZOO["to_canonical"]()[0] ** 0


def test_inverse_does_not_grow_a_chain() -> None:
    """K K⁻¹ of K = P B Pᵀ is again a chain of three, as are sums, multiples and powers."""
    (P, B, PT), matrices = canonical_blocks()
    K = P @ B @ PT
    eye = torch.eye(8, dtype=F64)
    matrix = torch.linalg.multi_dot(matrices)
    for operator, expected in (
        (K @ K.inverse(), eye),
        (K.inverse() @ K @ K, matrix),
        (K**3, matrix @ matrix @ matrix),
        (K + K, 2 * matrix),
        (2 * K - K / 2, 1.5 * matrix),
        ((2 * K) @ (3 * K), 6 * matrix @ matrix),
        (K + 0.5 * K**0, matrix + eye / 2),
        (3 * (K + 0.5 * K**0), 3 * matrix + 1.5 * eye),
        (K.eigh(), matrix),
        (K.sqrt() @ K.sqrt(), matrix),
        (K.inverse(0.5, use_exact_damping=True), torch.linalg.inv(matrix + eye / 2)),
        ((K + K.inverse()).H, matrix + torch.linalg.inv(matrix)),
    ):
        assert isinstance(operator, _ChainPyTorchLinearOperator)
        assert len(operator) == 3
        assert isinstance(operator[0] @ PT @ operator, _ChainPyTorchLinearOperator)
        assert len(PT @ operator) == 2
        assert isinstance(operator[1], BlockDiagonalLinearOperator)
        assert torch.allclose(operator.to_dense(), expected)
    blocks = (K @ K.inverse())[1]
    assert all(isinstance(block, KroneckerProductLinearOperator) for block in blocks)


def test_folding_sees_through_multiples() -> None:
    """Rules apply to multiples inside a chain, too."""
    P, _, PT = canonical_blocks()[0]
    S = positive(8)
    shapes = PT.out_shape
    A = BlockDiagonalLinearOperator(
        [TensorLinearOperator(S[:6, :6]), TensorLinearOperator(S[6:, 6:])]
    )
    assert A.in_shape == shapes
    K = _ChainPyTorchLinearOperator(P, 2 * A, PT)
    product = K @ K
    matrix = K.to_dense()
    assert torch.allclose(product.to_dense(), matrix @ matrix)
    left, right = KroneckerProductLinearOperator(S), KroneckerProductLinearOperator(S)
    folded = _ChainPyTorchLinearOperator(2 * left) @ right
    assert isinstance(folded, ScaledLinearOperator)
    assert isinstance(folded.operator, KroneckerProductLinearOperator)


def test_different_permutations_do_not_fold() -> None:
    """P B Pᵀ and Q C Qᵀ with different P and Q are neither added nor multiplied inside."""
    K, a = ZOO["canonical_chain"]()
    Q, q = from_canonical()
    C = BlockDiagonalLinearOperator(
        [TensorLinearOperator(positive(2)), TensorLinearOperator(positive(6))]
    )
    L = Q @ C @ Q.H
    b = q @ C.to_dense() @ q.T
    assert torch.allclose((K + L).to_dense(), a + b)
    assert torch.allclose((K @ L).to_dense(), a @ b)
    assert len(K @ L) == 6
    # between different permutations, nothing is similar to what is inside
    mixed = _ChainPyTorchLinearOperator(*K, *L, *K)
    assert torch.allclose(mixed.to_dense(), a @ b @ a)
    with pytest.raises(NotImplementedError, match="closed form of trace"):
        (K @ L).trace()


def test_two_permutations_that_are_no_inverses() -> None:
    """P B Qᵀ is not similar to B, though it looks like P B Pᵀ."""
    layout = [{"view": [2, 2], "order": [1, 0]}]
    P = FromCanonicalLinearOperator({"w": (2, 2)}, [{"W": "w"}], "cpu", F64)
    Q = FromCanonicalLinearOperator({"w": (2, 2)}, [{"W": "w"}], "cpu", F64, layout)
    A = P @ KroneckerProductLinearOperator(positive(4)) @ Q.H
    for form in ("trace", "diagonal", "frobenius_norm", "eigh", "sqrt"):
        with pytest.raises(NotImplementedError, match="has no closed form"):
            getattr(A, form)()
    B = 2 * A + A**0
    assert torch.allclose(B.to_dense(), 2 * A.to_dense() + torch.eye(4))
    assert torch.allclose((A @ A).to_dense(), A.to_dense() @ A.to_dense())


def test_chain_with_one_permutation_has_no_trace() -> None:
    """P B is not similar to B."""
    (P, B, _), _ = canonical_blocks()
    for form in ("trace", "diagonal", "slogdet", "inverse", "eigh"):
        if form == "inverse":  # P and B are invertible
            inverse = torch.linalg.inv((P @ B).to_dense())
            assert torch.allclose((P @ B).inverse().to_dense(), inverse)
        else:
            with pytest.raises(NotImplementedError, match="has no closed form"):
                getattr(P @ B, form)()


def test_registered_rules() -> None:
    """A user's rule is found for subclasses, and may decline."""

    class Base(Cumsum):
        def __init__(self, size: int):
            super().__init__([(size,)], [(size,)])
            self.size = size

    class Derived(Base):
        pass

    @rule("matmul", Base, Base)
    def _fold(left: Base, right: Base) -> Any:
        return right if left.size == 3 else NotImplemented

    @rule("add", Base, DiagonalLinearOperator)
    def _absorb(left: Base, right: DiagonalLinearOperator) -> Any:
        return left

    base, diagonal = Derived(2), DiagonalLinearOperator([torch.ones(2)])
    assert base + diagonal is base
    assert diagonal + base is base  # sums commute
    assert isinstance(Derived(3) @ Base(3), Base)
    assert isinstance(Base(2) @ Derived(2), _ChainPyTorchLinearOperator)


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------
PERMUTATION = permutation(ORDER)


def test_dicts_through_algebra() -> None:
    """Dict vectors survive every composition of operators with named spaces."""
    K, matrix = ZOO["canonical_chain"]()
    flat = torch.randn(8, dtype=F64)
    x = {"weight": flat[2:6].reshape(2, 1, 2), "scale": flat[6:], "bias": flat[:2]}
    eye = torch.eye(8, dtype=F64)
    for operator, expected in (
        (K, matrix),
        (2 * K.H, 2 * matrix),
        (K + K**0, matrix + eye),
        (K**0, eye),
        (K.inverse(0.5, use_exact_damping=True), torch.linalg.inv(matrix + eye / 2)),
        (K + K.T, 2 * matrix),
        (K @ K.inverse(), eye),
        (3 * K**0, 3 * eye),
        (EighDecomposedLinearOperator(flat, K[0]), PERMUTATION.T @ torch.diag(flat) @ PERMUTATION),
    ):
        result = operator @ x
        assert list(result) == ["bias", "weight", "scale"]
        assert result["weight"].shape == (2, 1, 2)
        joined = torch.cat([value.flatten() for value in result.values()])
        assert torch.allclose(joined, expected @ flat)
        assert list(x @ operator) == ["bias", "weight", "scale"]


def test_dict_to_a_space_without_names() -> None:
    """Where the result has no names it is a list, and the way back takes no dict."""
    K = ZOO["canonical_chain"]()[0]
    P = K[2]
    x = {"bias": torch.ones(2, dtype=F64), "weight": torch.ones(2, 1, 2, dtype=F64)}
    x["scale"] = torch.ones(2, dtype=F64)
    result = P @ x
    assert isinstance(result, list)
    assert isinstance(P.H @ tuple(result), tuple)
    with pytest.raises(ValueError, match="no names"):
        P.H @ x


# --------------------------------------------------------------------------------------------------
# Random compositions
# --------------------------------------------------------------------------------------------------
LEAVES = [
    "dense_general",
    "kronecker_general",
    "kronecker_positive_complex",
    "canonical_chain",
    "blocks",
    "diagonal",
    "eigendecomposed_complex",
    "low_rank_complex",
    "user_without_dtype",
    "identity_multiple",
]


@st.composite
def compositions(draw: st.DrawFn) -> tuple[PyTorchLinearOperator, Tensor]:
    """An operator and its dense matrix, from random arithmetic on an operator of the zoo."""
    leaf, leaf_matrix = ZOO[draw(st.sampled_from(LEAVES))]()
    is_complex = leaf_matrix.is_complex()
    leaf_matrix = leaf_matrix.to(C128 if is_complex else F64)
    size = torch.linalg.matrix_norm(leaf_matrix, 2)
    leaf, leaf_matrix = leaf / size.item(), leaf_matrix / size
    operator, matrix = leaf, leaf_matrix
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(draw(st.integers(1, 4))):
        step = draw(
            st.sampled_from(["scale", "H", "T", "add", "subtract", "left", "right", "shift"])
        )
        number = draw(st.sampled_from([2, -1, 0.5, 1, 1 + 2j] if is_complex else [2, -1, 0.5, 1]))
        if step == "scale":
            operator, matrix = number * operator, number * matrix
        elif step == "H":
            operator, matrix = operator.H, matrix.mH
        elif step == "T":
            operator, matrix = operator.T, matrix.mT
        elif step == "add":
            operator, matrix = operator + number * leaf, matrix + number * leaf_matrix
        elif step == "subtract":
            operator, matrix = leaf - operator, leaf_matrix - matrix
        elif step == "left":
            operator, matrix = leaf.H @ operator, leaf_matrix.mH @ matrix
        elif step == "right":
            operator, matrix = operator @ (leaf * number), matrix @ leaf_matrix * number
        else:
            operator, matrix = operator + number * leaf**0, matrix + number * eye
    # rounding errors are not relative to what is left after a cancellation
    assume(torch.linalg.matrix_norm(matrix) > 1e-3)
    return operator, matrix


@settings(max_examples=20)
@given(compositions())
def test_random_compositions(composition: tuple[PyTorchLinearOperator, Tensor]) -> None:
    """Whatever rules apply, products and closed forms are those of the dense arithmetic."""
    operator, matrix = composition
    # inverses of what a cancellation makes nearly singular are all rounding errors
    skip = ["scipy", "formats", "errors", "algebra", "inverse", "pinv"]
    check_operator(operator, matrix, rtol=1e-5, skip=skip)


def test_self_adjointness_follows_replaced_items() -> None:
    """An operator around others must not remember that they were self-adjoint."""
    matrix = torch.rand(3, 3, dtype=F64)
    B = BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.rand(3, dtype=F64)])])
    wrappers = [SumLinearOperator([B, B]), ScaledLinearOperator(B, 2), ShiftedLinearOperator(B, 3)]
    wrappers.append(SubmatrixLinearOperator(B, [0, 1], [0, 1]))
    assert all(op.SELF_ADJOINT for op in [B, *wrappers])
    B[0] = TensorLinearOperator(matrix)
    for op in [B, *wrappers]:
        assert not op.SELF_ADJOINT
        assert torch.allclose(op.T.to_dense(), op.to_dense().T)


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_logdet_of_singular_operators(dtype: torch.dtype) -> None:
    logdet = TensorLinearOperator(torch.zeros(2, 2, dtype=dtype)).logdet()
    assert logdet.real == -torch.inf
    if dtype.is_complex:
        assert logdet.imag == 0


def test_fractions_are_scalars() -> None:
    D = DiagonalLinearOperator([torch.ones(2, dtype=F64)])
    assert torch.equal((Fraction(1, 4) * D).diagonal(), torch.full((2,), 0.25, dtype=F64))


@pytest.mark.parametrize("make", [TensorLinearOperator, lambda t: DiagonalLinearOperator([t])])
def test_integers_are_refused(make) -> None:
    with pytest.raises(ValueError, match="floating-point or complex"):
        make(torch.eye(2, dtype=torch.int64))


def test_results_do_not_share_memory_with_inputs() -> None:
    eye = IdentityLinearOperator([(3,)], "cpu", F64)
    for op in (eye, BlockDiagonalLinearOperator([eye, eye]), KroneckerProductLinearOperator(eye)):
        x = torch.ones(op.shape[1], dtype=F64)
        (op @ x).zero_()
        assert torch.equal(x, torch.ones_like(x))


def test_real_eigenvalues_stay_real() -> None:
    E = TensorLinearOperator(torch.eye(2, dtype=torch.complex64)).eigh().to(torch.complex128)
    assert E.SELF_ADJOINT
    assert E.eigenvalues.dtype == F64
