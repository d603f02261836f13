"""Tests of ``curvlinops._torch_base``: the operator contract, and chains."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Size, Tensor
from zoo import (
    C64,
    C128,
    F32,
    F64,
    ZOO,
    Cumsum,
    Named,
    canonical_blocks,
    general,
    indefinite,
    positive,
)

from curvlinops import record_gradients
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import (
    PyTorchLinearOperator,
    RectangularError,
    _ChainPyTorchLinearOperator,
)
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.outer import OuterProductLinearOperator
from curvlinops.submatrix import SubmatrixLinearOperator


# --------------------------------------------------------------------------------------------------
# A user's operator in ten lines
# --------------------------------------------------------------------------------------------------
class Flip(PyTorchLinearOperator):
    """Without device and dtype."""

    SELF_ADJOINT = True

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [x.flip(0) for x in X]


class Dense(PyTorchLinearOperator):
    """With a tensor, thus with device and dtype, but no adjoint."""

    def __init__(self, matrix: Tensor):
        super().__init__([(matrix.shape[1],)], [(matrix.shape[0],)])
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix @ X[0]]


@pytest.mark.parametrize("dtype", [F32, F64, C64, torch.bfloat16])
def test_user_operator_without_dtype(dtype: torch.dtype) -> None:
    """It multiplies tensors of any dtype, also in compositions with each other and with others."""
    A = Flip([(3,)], [(3,)])
    assert A.dtype is None
    assert A.device is None
    x = torch.arange(3).to(dtype)
    assert torch.equal(A @ x, x.flip(0))
    assert torch.equal((2 * A) @ x, 2 * x.flip(0))
    assert torch.equal((A + 2 * A**0) @ x, x.flip(0) + 2 * x)
    assert torch.equal((A @ A - A) @ x, x - x.flip(0))
    assert (A + 2 * A**0).dtype is None
    B = TensorLinearOperator(general(3, 3).to(dtype))
    for composed in (A @ B, B @ A, A + B, B + A):
        assert composed.dtype == dtype
        assert (composed @ x).dtype == dtype
    assert torch.equal(torch.tensor(2.0, dtype=F64) * A @ x, 2 * x.flip(0))


def test_user_operator_without_dtype_keeps_precision_in_scipy() -> None:
    """With a dtype for SciPy it computes in that dtype, not in torch's default."""
    x = np.array([1, 1 / 3, 0])
    assert np.array_equal(Flip([(3,)], [(3,)]).to_scipy(np.float64) @ x, x[::-1])


def test_user_operator_with_dtype() -> None:
    """Device and dtype are those of its tensors."""
    A = Dense(general(2, 3))
    assert A.dtype == F64
    assert A.device == torch.device("cpu")
    assert A.to(F32).matrix.dtype == F32
    assert A.matrix.dtype == F64
    assert A.to("meta").device == torch.device("meta")


def test_operator_of_integers_has_no_dtype() -> None:
    """Integer tensors, such as indices, say nothing about the numbers that are multiplied."""

    class Gather(PyTorchLinearOperator):
        def __init__(self, index: Tensor):
            super().__init__([(3,)], [index.shape])
            self.index = index

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [X[0][self.index]]

    A = Gather(torch.tensor([2, 0]))
    assert A.dtype is None
    assert torch.equal(A @ torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 1]))
    moved = A.to(F64)
    assert moved.index.dtype == torch.int64
    assert A.to(device="meta").index.device == torch.device("meta")


def test_missing_adjoint() -> None:
    """Without an adjoint, products from the right work and others say what to implement."""
    A = Dense(general(2, 3))
    x = torch.randn(3, dtype=F64)
    assert torch.equal(A @ x, A.matrix @ x)
    assert torch.equal(A.H.H @ x, A @ x)
    for multiply in (lambda: torch.ones(2, dtype=F64) @ A, lambda: A.H @ torch.ones(2, dtype=F64)):
        with pytest.raises(NotImplementedError, match="implement _adjoint_matmat, or set SELF_ADJ"):
            multiply()


def test_adjoint_by_method() -> None:
    """``_adjoint`` alone suffices, as does ``_adjoint_matmat`` alone."""

    class WithAdjoint(Dense):
        def _adjoint(self) -> PyTorchLinearOperator:
            return WithAdjoint(self.matrix.mH)

    A = WithAdjoint(general(2, 3, C128))
    y = torch.randn(2, dtype=C128)
    assert torch.allclose(y @ A, y @ A.matrix)
    assert torch.allclose(A.T @ y, A.matrix.T @ y)


def test_missing_matmat() -> None:
    """The base class multiplies nothing."""
    with pytest.raises(NotImplementedError, match="PyTorchLinearOperator does not implement _mat"):
        PyTorchLinearOperator([(1,)], [(1,)]) @ torch.ones(1)


def test_wrong_result_of_matmat() -> None:
    """A result of wrong shapes is reported, with those that are needed."""

    class Wrong(Flip):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [X[0][1:]]

    with pytest.raises(ValueError, match=r"Wrong returned tensors of shapes \[\(2, 1\)\] instead"):
        Wrong([(3,)], [(3,)]) @ torch.ones(3)


@pytest.mark.parametrize(("in_shape", "out_shape"), [([], [(1,)]), ([(1,)], [])])
def test_empty_spaces(in_shape: list[Any], out_shape: list[Any]) -> None:
    """An operator needs a tensor in each space."""
    with pytest.raises(ValueError, match=r"(in|out)_shape is empty"):
        Flip(in_shape, out_shape)


def test_shape() -> None:
    """Rows and columns, in this order, of the product of all dimensions."""
    A = PyTorchLinearOperator([(2, 3), ()], [(5,), (0,), (2,)])
    assert A.shape == Size((7, 7))
    assert PyTorchLinearOperator([(2, 3)], [(4,)]).shape == Size((4, 6))
    assert isinstance(A.shape, Size)


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, C128])
def test_wrong_dtype(dtype: torch.dtype) -> None:
    """The error names both dtypes."""
    A = TensorLinearOperator(general(3, 3))
    for multiply in (A.__matmul__, A.__rmatmul__):
        with pytest.raises(ValueError, match=f"Dtype mismatch.*Dense.*torch.float64.*{dtype}"):
            multiply(torch.ones(3, dtype=dtype))


def test_wrong_device() -> None:
    """The error names both devices."""
    A = TensorLinearOperator(general(3, 3))
    with pytest.raises(ValueError, match=r"Device mismatch.*Dense.*cpu.*meta"):
        A @ torch.ones(3, dtype=F64, device="meta")


def test_numpy_array_is_refused() -> None:
    """A NumPy array on either side is no silent loop over its entries."""
    A = TensorLinearOperator(general(3, 3))
    for multiply in (lambda: A @ np.ones(3), lambda: np.ones(3) @ A):
        with pytest.raises(TypeError, match=r"ndarray.*to_scipy"):
            multiply()


def test_products_record_no_gradients() -> None:
    """Neither input nor factors record by default, and the caller's grad mode is left alone."""
    A = TensorLinearOperator(general(3, 3).requires_grad_())
    x = torch.ones(3, dtype=F64, requires_grad=True)
    assert not (A @ x).requires_grad
    assert not (x @ A).requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad():
        A @ x
        assert not torch.is_grad_enabled()


def test_record_gradients_of_input_and_factors() -> None:
    """Gradients through a product equal those of plain PyTorch code."""
    S1, S2 = general(2, 2).requires_grad_(), general(3, 3).requires_grad_()
    x = torch.randn(6, dtype=F64, requires_grad=True)
    c = torch.randn(6, dtype=F64)
    with record_gradients():
        K = KroneckerProductLinearOperator(S1, S2)
        y = (2 * K + K @ K.H) @ x
    gradients = torch.autograd.grad(c @ y, [S1, S2, x])
    dense = torch.kron(S1, S2)
    expected = torch.autograd.grad(c @ ((2 * dense + dense @ dense.T) @ x), [S1, S2, x])
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted)


def test_record_gradients_ends() -> None:
    """Recording ends with the context, also after an exception, and respects ``no_grad``."""
    A, x = TensorLinearOperator(general(3, 3)), torch.ones(3, dtype=F64, requires_grad=True)

    def fail() -> None:
        with record_gradients():
            assert (A @ x).requires_grad
            with record_gradients():
                pass
            assert (A @ x).requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (A @ x).requires_grad
    with record_gradients(), torch.no_grad():
        assert not (A @ x).requires_grad


def test_record_gradients_is_of_one_thread() -> None:
    """Products of other threads do not record, as for PyTorch's own grad mode."""
    A, x = TensorLinearOperator(general(3, 3)), torch.ones(3, dtype=F64, requires_grad=True)
    seen = []
    with record_gradients():
        thread = threading.Thread(target=lambda: seen.append((A @ x).requires_grad))
        thread.start()
        thread.join()
        assert (A @ x).requires_grad
    assert seen == [False]


def test_zero_columns_need_no_product() -> None:
    """K = 0 gives K = 0 columns without calling ``_matmat``, which need not handle it."""

    class Never(Flip):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            raise AssertionError("called")

    A = Never([(2, 3), ()], [(2, 3), ()])
    result = A @ [torch.ones(2, 3, 0, dtype=C64), torch.ones(0, dtype=C64)]
    assert [r.shape for r in result] == [(2, 3, 0), (0,)]
    assert result[0].dtype == C64
    assert (torch.ones(0, 7) @ A).shape == (0, 7)


def test_permutation_does_not_alias() -> None:
    """The results of identity and permutations can be changed without changing the input."""
    P, _, PT = canonical_blocks()[0]
    for A in (IdentityLinearOperator([(8,)], dtype=F64), P, PT, P.T, PT.H):
        for x in (torch.ones(8, dtype=F64), torch.ones(8, 2, dtype=F64)):
            (A @ x).zero_()
            (x.mT @ A if x.ndim == 2 else x @ A).zero_()
            assert x.min() == 1


# --------------------------------------------------------------------------------------------------
# Dense matrix, copies, text
# --------------------------------------------------------------------------------------------------
def test_to_dense_chunks() -> None:
    """No more columns than asked for are multiplied at once."""
    widths = []

    class Records(Flip):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            widths.append(X[0].shape[-1])
            return super()._matmat(X)

    dense = Records([(7,)], [(7,)]).to_dense(chunk_size=3)
    assert torch.equal(dense, torch.eye(7).flip(0))
    assert widths == [3, 3, 1]
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Flip([(7,)], [(7,)]).to_dense(chunk_size=0)


def test_to_dense_of_empty_space() -> None:
    """A space may have dimension 0."""
    assert TensorLinearOperator(torch.ones(3, 0)).to_dense().shape == (3, 0)
    assert TensorLinearOperator(torch.ones(0, 3)).to_dense().shape == (0, 3)


def test_deepcopy_keeps_sharing() -> None:
    """A copy is independent of the original; what was one object inside stays one."""
    block = DiagonalLinearOperator([torch.ones(2)])
    A = BlockDiagonalLinearOperator([block, block])
    copied = copy.deepcopy(A)
    assert copied[0] is copied[1]
    copied[0].tensors()[0].mul_(2)
    assert A.trace() == 4
    assert copied.trace() == 8


def test_nesting_is_cheap() -> None:
    """Device and dtype are found in a time that grows with the depth, not exponentially."""
    calls = []

    class Counts(Flip):
        def _state(self) -> dict[str, Any]:
            calls.append(1)
            return super()._state()

    A: PyTorchLinearOperator = Counts([(2,)], [(2,)])
    for _ in range(12):
        A = SubmatrixLinearOperator(A, [1, 0], [0, 1])
    calls.clear()
    assert A.dtype is None
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TensorLinearOperator(general(2, 3)), "<2×3 operator Dense(2×3)>"),
        (lambda: Flip([(3,)], [(3,)]), "<3×3 operator Flip>"),
        (
            lambda: 2 * KroneckerProductLinearOperator(general(2, 3), general(1, 4)),
            "<2×12 operator 2 * Kron(2×3 ⊗ 1×4)>",
        ),
        (
            lambda: (0.5 * Flip([(3,)], [(3,)]) + ZOO["identity_without_dtype"]()[0]).H,
            "<3×3 operator 0.5 * (Flip + 2 * I)>",
        ),
        (
            lambda: Named(general(4, 5)).H @ (Named(general(4, 5)) - Named(general(4, 5))),
            "<5×5 operator Named.H @ (Named + -1 * Named)>",
        ),
        (lambda: -1j * Named(general(4, 5, C128)).T, "<5×4 operator -0-1j * conj(Named.H)>"),
        (
            lambda: BlockDiagonalLinearOperator(
                [DiagonalLinearOperator([torch.ones(2)]), TensorLinearOperator(torch.ones(1, 4))]
            ),
            "<3×6 operator BlockDiag(Diag(2), Dense(1×4))>",
        ),
        (
            lambda: BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.ones(1)])] * 6),
            "<6×6 operator BlockDiag(Diag(1), … 4 more …, Diag(1))>",
        ),
        (lambda: ZOO["low_rank"]()[0], "<5×5 operator LowRank(5, rank 2)>"),
        (lambda: ZOO["eigendecomposed"]()[0], "<4×4 operator Eigh(Dense(4×4))>"),
        (
            lambda: SubmatrixLinearOperator(Flip([(3,)], [(3,)]), [0], [1, 2]),
            "<1×2 operator (Flip)[1 rows, 2 columns]>",
        ),
    ],
)
def test_repr(make: Any, text: str) -> None:
    """Operators read as formulas with shapes."""
    assert repr(make()) == text


# --------------------------------------------------------------------------------------------------
# Closed forms that are missing
# --------------------------------------------------------------------------------------------------
FORMS = ["trace", "det", "logdet", "slogdet", "diagonal", "inverse", "eigh", "sqrt"]
FORMS += ["inverse_sqrt", "sample"]


@pytest.mark.parametrize("form", [*FORMS, "frobenius_norm"])
def test_missing_closed_form_names_a_remedy(form: str) -> None:
    """The error names the operator and what to use instead."""
    words = "estimate|solve|eigsh|Lanczos|expm_multiply|to_dense"
    with pytest.raises(NotImplementedError, match=f"operator Flip>.*closed form.*({words})"):
        getattr(Flip([(3,)], [(3,)]), form)()
    with pytest.raises(NotImplementedError, match=r"operator Flip>.*closed form of power"):
        Flip([(3,)], [(3,)]).power(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "user_named",
        "user_adjoint",
        "dense_wide",
        "kronecker_rectangular",
        "blocks_rectangular",
        "submatrix_rectangular",
        "sum_rectangular",
        "chain_rectangular",
    ],
)
def test_closed_form_of_rectangular(name: str, form: str) -> None:
    """The error is both a ValueError and a RuntimeError, and no NotImplementedError."""
    operator, dense = ZOO[name]()
    sizes = {f"{rows} × {columns}" for rows, columns in (dense.shape, dense.mT.shape)}
    for rectangular in (operator, 2 * operator):
        with pytest.raises(RectangularError, match=f"needs a square .*({'|'.join(sizes)})"):
            getattr(rectangular, form)()
    assert issubclass(RectangularError, ValueError)
    assert issubclass(RectangularError, RuntimeError)


def test_inverse_checks_keywords_first() -> None:
    """A typing mistake, or a contradiction, is no missing closed form."""
    for operator in (Flip([(3,)], [(3,)]), ZOO["blocks"]()[0], ZOO["shifted_kronecker"]()[0]):
        with pytest.raises(TypeError, match=r"unexpected keywords \['dampnig'\]"):
            operator.inverse(dampnig=1.0)
        with pytest.raises(ValueError, match="one of use_heuristic_damping and use_exact_damping"):
            operator.inverse(1.0, use_heuristic_damping=True, use_exact_damping=True)


# --------------------------------------------------------------------------------------------------
# Chains
# --------------------------------------------------------------------------------------------------
def dense_operators(*shapes: tuple[int, int]) -> list[TensorLinearOperator]:
    return [TensorLinearOperator(general(*shape)) for shape in shapes]


def test_chain_is_a_sequence() -> None:
    """Iteration, indexing, length and unpacking give the operators from left to right."""
    A, B, C = dense_operators((2, 3), (3, 4), (4, 5))
    chain = _ChainPyTorchLinearOperator(A, B, C)
    assert list(chain) == [A, B, C]
    assert len(chain) == 3
    assert chain[0] is A
    assert chain[-1] is C
    assert chain[1:] == [B, C]
    first, second, third = chain
    assert (first, second, third) == (A, B, C)
    assert chain.shape == (2, 5)
    assert torch.allclose(chain.to_dense(), A.matrix @ B.matrix @ C.matrix)


def test_chain_is_flattened() -> None:
    """Chains of chains are chains of operators, in whatever way they are multiplied."""
    A, B, C, D = dense_operators((2, 3), (3, 4), (4, 5), (5, 1))
    for chain in (
        ((A @ B) @ C) @ D,
        A @ (B @ (C @ D)),
        (A @ B) @ (C @ D),
        _ChainPyTorchLinearOperator(_ChainPyTorchLinearOperator(A, B), C @ D),
    ):
        assert isinstance(chain, _ChainPyTorchLinearOperator)
        assert list(chain) == [A, B, C, D]
    assert list((A @ B @ C).H @ A.H.H)[:0] == []


def test_chain_of_one() -> None:
    """A chain may have one operator, but not none."""
    (A,) = dense_operators((2, 3))
    assert torch.equal(_ChainPyTorchLinearOperator(A).to_dense(), A.matrix)
    with pytest.raises(ValueError, match="A chain needs at least one operator"):
        _ChainPyTorchLinearOperator()


def test_chain_does_not_fold_dense_matrices() -> None:
    """A product of low rank keeps its cheap factors."""
    A, B = dense_operators((50, 1), (1, 50))
    assert isinstance(A @ B, _ChainPyTorchLinearOperator)
    assert isinstance(A @ B + A @ B, PyTorchLinearOperator)
    assert len(A @ B) == 2


def test_chain_item_assignment() -> None:
    """An operator is replaced, products and closed forms follow."""
    (P, B, PT), matrices = canonical_blocks()
    K = P @ B @ PT
    trace = K.trace()
    K[1] = 2 * B
    assert torch.allclose(K.trace(), 2 * trace)
    assert torch.allclose(K.to_dense(), 2 * torch.linalg.multi_dot(matrices))
    A, C = dense_operators((2, 3), (3, 2))
    chain = A @ C
    chain[-1] = TensorLinearOperator(torch.ones(3, 2, dtype=F64))
    assert torch.allclose(chain.to_dense(), A.matrix.sum(1, keepdim=True).expand(2, 2))


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        (TensorLinearOperator(torch.ones(3, 3)), ValueError, "Shape mismatch in a chain"),
        (TensorLinearOperator(torch.ones(3, 2)), ValueError, "Dtype mismatch in a chain.*float64"),
        (
            TensorLinearOperator(torch.ones(3, 2, dtype=F64, device="meta")),
            ValueError,
            "Device mismatch in a chain.*cpu.*meta",
        ),
        (torch.ones(3, 2, dtype=F64), TypeError, "The items of a chain are operators, got Tensor"),
    ],
)
def test_chain_item_assignment_is_checked(new: Any, error: type[Exception], message: str) -> None:
    """An operator that does not fit is refused, and the chain stays as it was."""
    A, B = dense_operators((2, 3), (3, 2))
    chain = A @ B
    with pytest.raises(error, match=message):
        chain[1] = new
    assert list(chain) == [A, B]


def test_chain_checks_neighbours() -> None:
    """The constructor refuses what does not fit and names both operands."""
    A, B, C = dense_operators((2, 3), (3, 4), (3, 4))
    with pytest.raises(ValueError, match=r"Shape mismatch.*Dense\(3×4\).*Dense\(3×4\)"):
        _ChainPyTorchLinearOperator(A, B, C)
    with pytest.raises(ValueError, match="Dtype mismatch"):
        _ChainPyTorchLinearOperator(A, TensorLinearOperator(general(3, 4, C128)))
    eye = Flip([(3,)], [(3,)])
    with pytest.raises(ValueError, match=r"Dtype mismatch.*float64.*float32"):
        _ChainPyTorchLinearOperator(A, eye, TensorLinearOperator(torch.ones(3, 4)))


def test_chain_between_different_spaces_of_one_dimension() -> None:
    """Spaces must be equal, not only their dimensions."""
    A = Cumsum([(2, 3)], [(2, 3)])
    B = Cumsum([(3, 2)], [(3, 2)])
    with pytest.raises(ValueError, match=r"Shape mismatch.*\(2, 3\).*\(3, 2\)"):
        A @ B
    with pytest.raises(ValueError, match=r"Shape mismatch in a sum.*\(2, 3\).*\(3, 2\)"):
        A + B


def test_chain_of_square_operators() -> None:
    """The determinant and the inverse of a product are those of its square factors."""
    A, B = TensorLinearOperator(general(3, 3)), TensorLinearOperator(general(3, 3, F64))
    chain, matrix = A @ B, A.matrix @ B.matrix
    assert torch.allclose(chain.det(), matrix.det())
    assert torch.allclose(chain.inverse().to_dense(), matrix.inverse())
    with pytest.raises(NotImplementedError, match="closed form of inverse"):
        chain.inverse(damping=1.0)
    rectangular = TensorLinearOperator(general(3, 2)) @ TensorLinearOperator(general(2, 3))
    for form in ("slogdet", "inverse", "trace", "eigh"):
        with pytest.raises(NotImplementedError, match=f"closed form of {form}"):
            getattr(rectangular, form)()


def test_conjugated_operators_are_closed_forms_survivors() -> None:
    """Closed forms of a user's operator survive its lazy adjoint and transpose."""

    class WithForms(Dense):
        def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [self.matrix.mH @ X[0]]

        def trace(self) -> Tensor:
            return self.matrix.trace()

        def slogdet(self) -> tuple[Tensor, Tensor]:
            sign, logabsdet = torch.linalg.slogdet(self.matrix)
            return sign, logabsdet

        def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
            eye = torch.eye(len(self.matrix), dtype=self.dtype)
            return WithForms(torch.linalg.inv(self.matrix + damping * eye))

    matrix = general(3, 3, C128)
    A = WithForms(matrix)
    for operator, dense in ((A.H, matrix.mH), (A.T, matrix.mT), (A.T.H, matrix.conj())):
        assert torch.allclose(operator.trace(), dense.trace())
        assert torch.allclose(operator.det(), torch.linalg.det(dense))
        damped = dense + (1 + 2j) * torch.eye(3)
        assert torch.allclose(operator.inverse(1 + 2j).to_dense(), torch.linalg.inv(damped))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorLinearOperator(torch.ones(3)),
        lambda: TensorLinearOperator([[1.0]]),  # type: ignore[arg-type]
        lambda: OuterProductLinearOperator(torch.ones(2), torch.ones(3, 3)),
        lambda: EighDecomposedLinearOperator(torch.ones(2), torch.ones(2)),
        lambda: DiagonalLinearOperator([]),
        lambda: BlockDiagonalLinearOperator([]),
        lambda: KroneckerProductLinearOperator(),
    ],
)
def test_constructors_refuse(make: Any) -> None:
    """Arguments that make no matrix are refused at once."""
    with pytest.raises(ValueError, match=r".{20}"):
        make()


def test_hermitian_matrices_of_all_kinds_in_to_dense() -> None:
    """The dense matrix has the operator's dtype and device."""
    for make in (positive, indefinite):
        for dtype in (F32, C64):
            A = TensorLinearOperator(make(3, dtype))
            assert A.to_dense().dtype == dtype
            assert torch.equal(A.to_dense(), A.matrix)


# --------------------------------------------------------------------------------------------------
# Compilation
# --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "canonical_chain",
        "canonical_chain_shifted",
        "eigendecomposed_kronecker",
        "kronecker_with_diagonal",
        "multiple_complex_of_real",
        "submatrix_rectangular",
    ],
)
def test_compiled_product(name: str) -> None:
    """Products compile without graph breaks and equal eager ones."""
    operator, _ = ZOO[name]()
    torch._dynamo.reset()
    compiled = torch.compile(operator.__matmul__, fullgraph=True, backend="eager")
    x = torch.randn(operator.shape[1], 2, dtype=F64).to(operator.dtype)
    assert torch.allclose(compiled(x), operator @ x)
    assert torch.allclose(compiled(x[:, 0]), operator @ x[:, 0])
