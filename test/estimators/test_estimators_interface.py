"""What all estimators have in common: arguments, random numbers, chunks, formats, dtypes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimator_cases import (
    BF16,
    C64,
    C128,
    DISTRIBUTIONS,
    ESTIMATORS,
    F32,
    F64,
    PARTS,
    SQUARE,
    Counting,
    exact,
    num_vectors,
    reference_samples,
    with_spectrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import ZOO, count_calls

import curvlinops
from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    IdentityLinearOperator,
    KroneckerProductLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    record_gradients,
    xdiag,
    xtrace,
)

Estimator = Callable[..., Any]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [F64, F32, BF16, torch.float16, C128, C64]


def seeded(estimator: Estimator, A: Any, num_matvecs: int, *args: Any, **kwargs: Any) -> Any:
    """Run an estimator with the same random numbers each time."""
    generator = torch.Generator().manual_seed(3)
    return estimator(A, num_matvecs, *args, generator=generator, **kwargs)


# --------------------------------------------------------------------------------------------------
# Random numbers, products, chunks
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, C128])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_random_numbers(
    estimator: Estimator, distribution: str, dtype: torch.dtype, device: str
) -> None:
    """Vectors are drawn one after another, by the global generator or by one that is given.

    Catches vectors drawn all at once (which differ with their number), a generator that is not
    used everywhere, and global numbers that are used although one is given.
    """
    dim = 17
    matrix = with_spectrum(torch.linspace(1, 2, dim), C128 if dtype.is_complex else F64)
    A = Counting(matrix.to(dtype).to(device))

    def draw() -> Tensor:
        if distribution == "rademacher":
            signs = torch.randint(0, 2, (dim,), device=device, dtype=torch.uint8)
            return signs.to(dtype) * 2 - 1
        return torch.randn(dim, device=device, dtype=F32 if dtype == BF16 else dtype).to(dtype)

    for num_matvecs in (6, 12):
        num = num_vectors(estimator, num_matvecs)
        torch.manual_seed(1)
        expected = torch.stack([draw() for _ in range(num)], dim=1)
        after = torch.rand(3, device=device)

        torch.manual_seed(1)
        A.products.clear()
        result = estimator(A, num_matvecs, distribution)
        assert torch.equal(after, torch.rand(3, device=device))
        first = torch.cat(A.products, dim=1)[:, : num_vectors(estimator, num_matvecs)]
        drawn_first = num // 2 if estimator is hutchpp_trace else num
        assert torch.equal(first[:, :drawn_first], expected[:, :drawn_first])

        torch.manual_seed(2)
        before = torch.get_rng_state()
        generator = torch.Generator(device).manual_seed(1)
        assert torch.equal(estimator(A, num_matvecs, distribution, generator=generator), result)
        assert torch.equal(torch.get_rng_state(), before)
        again = estimator(A, num_matvecs, distribution, generator=generator)
        assert not torch.equal(again, result)  # the generator goes on


def test_vectors_of_hutchpp() -> None:
    """Hutch++'s second vectors are those drawn after the first ones."""
    A, num = torch.randn(11, 11, dtype=F64), 3
    torch.manual_seed(5)
    V = torch.stack([torch.randint(0, 2, (11,)).double() * 2 - 1 for _ in range(2 * num)], dim=1)
    torch.manual_seed(5)
    expected = reference_samples(hutchpp_trace, A, V).mean()
    assert torch.allclose(hutchpp_trace(A, 3 * num), expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_products_and_chunks(estimator: Estimator, distribution: str) -> None:
    """There are exactly num_matvecs products, at most chunk_size at once; results stay the same.

    Catches uncounted products (an extra one per chunk, of the adjoint, of a second pass), chunks
    that are too wide, and means of chunks of different sizes without weights.
    """
    dim, num_matvecs = 23, 12
    for matrix in (torch.randn(dim, dim, dtype=F64), torch.ones(dim, dim, dtype=F64)):
        expected = None
        for chunk_size in (None, 1, 2, 5, 11, 12, 100):
            A = Counting(matrix, [(2, 5), (13,)])
            result, error = seeded(
                estimator,
                A,
                num_matvecs,
                distribution,
                chunk_size=chunk_size,
                return_standard_error=True,
            )
            widths = [X.shape[1] for X in A.products]
            adjoint_widths = [X.shape[1] for X in A.adjoint_products]
            assert sum(widths + adjoint_widths) == num_matvecs
            assert sum(adjoint_widths) == (num_matvecs // 2 if estimator is xdiag else 0)
            if chunk_size is None:
                assert len(widths) + len(adjoint_widths) == PARTS[estimator]
                expected = (result, error)
            else:
                assert max(widths + adjoint_widths) <= chunk_size
                assert len(widths) + len(adjoint_widths) <= PARTS[estimator] * -(
                    -(num_matvecs // PARTS[estimator]) // chunk_size
                )
            assert torch.allclose(result, expected[0], rtol=1e-10, atol=1e-10)
            assert torch.allclose(error, expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", [hutchpp_trace, xtrace, xdiag])
def test_decompositions(estimator: Estimator) -> None:
    """One QR decomposition of the sketch serves all samples, and what follows it is small.

    Catches a decomposition for each vector that is left out.
    """
    with count_calls(torch.linalg, "qr") as qr, count_calls(torch.linalg, "svd") as svd:
        seeded(estimator, torch.randn(50, 50), 12)
    assert [args[0].shape for args in qr] == [(50, 12 // PARTS[estimator])]
    assert [args[0].shape for args in svd] == ([] if estimator is hutchpp_trace else [(6, 6)])


# --------------------------------------------------------------------------------------------------
# Operators, dtypes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ZOO)
def test_every_operator_is_its_matrix(name: str, distribution: str) -> None:
    """An operator of any kind and on any space has the estimates of its matrix.

    Catches entries of a list that are mixed up, and adjoints taken for the operator (XDiag).
    """
    A, dense = ZOO[name]()
    rows, columns = A.shape
    tolerance = {BF16: 3e-2, F32: 1e-4, C64: 1e-4}.get(A.dtype, 1e-10)
    # where products with both have the same vectors
    dense = dense.to(A.dtype or torch.promote_types(torch.get_default_dtype(), dense.dtype))
    if A.dtype is None:
        tolerance, dense = 1e-4, dense.to(torch.get_default_dtype())
    for estimator, parts in PARTS.items():
        if estimator is not hutchinson_squared_fro and rows != columns:
            with pytest.raises(ValueError, match="needs a square matrix"):
                estimator(A, parts)
            continue
        num_matvecs = min(12, (columns - 1) // parts * parts)
        if num_matvecs == 0:
            continue
        result = seeded(estimator, A, num_matvecs, distribution)
        expected = seeded(estimator, dense, num_matvecs, distribution)
        scale = exact(hutchinson_squared_fro, dense.to(C128)).sqrt().real.item()
        scale = scale**2 if estimator is hutchinson_squared_fro else scale
        assert result.dtype == expected.dtype
        assert result.shape == exact(estimator, dense).shape
        assert (result - expected).abs().max() <= tolerance * scale * columns**0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtypes(estimator: Estimator, distribution: str, dtype: torch.dtype, device: str) -> None:
    """Results have the operator's dtype and device, and those of double precision to rounding.

    Catches QR in bfloat16, sums in bfloat16, other vectors in low precision, dropped imaginary
    parts.
    """
    dim = 300
    double = C128 if dtype.is_complex else F64
    A = with_spectrum(torch.linspace(0.1, 1, dim), double).to(dtype)
    A = A + 1j * torch.diag(torch.linspace(1, 2, dim)).to(dtype) if dtype.is_complex else A
    A = A.to(device)
    before = A.clone()
    torch.manual_seed(0)
    result, error = estimator(A, 60, distribution, return_standard_error=True)
    real = estimator is hutchinson_squared_fro
    assert result.dtype == (dtype.to_real() if real else dtype)
    assert error.dtype == dtype.to_real()
    assert result.device == error.device == A.device
    assert result.shape == error.shape == exact(estimator, A).shape
    assert not result.requires_grad
    assert torch.equal(A, before)
    if distribution == "rademacher":
        torch.manual_seed(0)
        expected = estimator(A.to(double), 60, distribution)
        bound = 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(expected)
        assert (result - expected).abs().max() < bound
    else:  # random numbers depend on the precision
        deviation = (result.to(double) - exact(estimator, A.to(double))).abs()
        slack = 8 * torch.finfo(dtype).eps * exact(estimator, A.to(double)).abs()
        assert ((deviation - slack) < 10 * error).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_low_precision_has_the_same_vectors(estimator: Estimator) -> None:
    """In bfloat16, normal vectors are those of float32, rounded."""
    A = Counting(torch.randn(9, 9))
    B = Counting(A.matrix.bfloat16())
    for op in (A, B):
        seeded(estimator, op, 6, "normal")
    assert torch.equal(A.products[0].bfloat16(), B.products[0])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_operator_without_dtype(estimator: Estimator, distribution: str) -> None:
    """Without own device and dtype, vectors have the defaults, and results their products' dtype.

    Catches complex products that lose their imaginary parts.
    """
    A = IdentityLinearOperator([(2, 3), (5,)])
    assert A.dtype is None
    for factor in (3, 2j):
        matrix = factor * torch.eye(11)
        result = seeded(estimator, factor * A, 6, distribution)
        assert result.dtype == exact(estimator, matrix).dtype
        if factor == 3 or distribution == "rademacher":  # normal vectors are not complex here
            assert torch.allclose(result, seeded(estimator, matrix, 6, distribution), rtol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast(estimator: Estimator) -> None:
    """Only products are in low precision under autocast, and here not even these."""
    A = DiagonalLinearOperator([1 / torch.arange(1.0, 31)])
    A = A + KroneckerProductLinearOperator(DiagonalLinearOperator([torch.ones(30)]))
    expected = seeded(estimator, A, 12, "normal", return_standard_error=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = seeded(estimator, A, 12, "normal", return_standard_error=True)
    for one, other in zip(result, expected, strict=True):
        assert one.dtype == F32
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    """Gradients are recorded on request only: that of Hutchinson's method is the mean of v vᵀ."""
    A = torch.randn(6, 6, dtype=F64, requires_grad=True)
    for estimator in PARTS:
        assert not estimator(A, PARTS[estimator]).requires_grad
    V = Counting(A.detach())
    seeded(hutchinson_trace, V, 4)
    with record_gradients():
        seeded(hutchinson_trace, A, 4).backward()
    (drawn,) = V.products
    assert torch.allclose(A.grad, drawn @ drawn.T / 4)


def test_rectangular_norm() -> None:
    """The squared Frobenius norm of a rectangular matrix: vectors are as long as its rows."""
    for rows, columns in ((3, 9), (9, 3), (1, 2), (400, 5)):
        matrix = torch.randn(rows, columns, dtype=F64)
        A = Counting(matrix)
        result = seeded(hutchinson_squared_fro, A, min(columns - 1, 4))
        assert torch.allclose(result, (matrix @ A.products[0]).norm() ** 2 / min(columns - 1, 4))
        with pytest.raises(ValueError, match="not less than"):
            hutchinson_squared_fro(matrix, columns)


# --------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------
@st.composite
def operators(draw: Any) -> PyTorchLinearOperator:
    """A composition of structured operators on a list of tensors with random shapes."""
    shapes = draw(
        st.lists(
            st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple), min_size=1, max_size=3
        )
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([F64, C128]))

    def random() -> PyTorchLinearOperator:
        kind = draw(st.sampled_from(["diagonal", "blocks", "counting"]))
        tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
        if kind == "diagonal":
            return DiagonalLinearOperator(tensors)
        dim = sum(t.numel() for t in tensors)
        if kind == "counting":
            return Counting(torch.randn(dim, dim, dtype=dtype), shapes)
        if any(len(shape) != 2 for shape in shapes):
            return DiagonalLinearOperator(tensors)
        blocks = [
            KroneckerProductLinearOperator(*(torch.randn(d, d, dtype=dtype) for d in shape))
            for shape in shapes
        ]
        blocks = BlockDiagonalLinearOperator(blocks)
        return Counting(blocks.to_dense(), shapes)

    A = random()
    for _ in range(draw(st.integers(0, 2))):
        B = random()
        A = draw(
            st.sampled_from([lambda A, B: A @ B, lambda A, B: A + 2 * B, lambda A, B: A - B.H])
        )(A, B)
    return A


@settings(max_examples=60)
@given(A=operators(), data=st.data())
def test_properties(A: PyTorchLinearOperator, data: st.DataObject) -> None:
    """Shapes, agreement with the matrix, and what holds between estimators, for any composition."""
    dim = A.shape[0]
    distribution = data.draw(st.sampled_from(DISTRIBUTIONS))
    chunk_size = data.draw(st.none() | st.integers(1, 7))
    dense = A.to_dense()
    scale = max(dense.norm().item(), 1e-6)
    for estimator, parts in PARTS.items():
        if dim <= parts:
            with pytest.raises(ValueError, match="not less than"):
                estimator(A, parts, distribution)
            continue
        num_matvecs = parts * data.draw(st.integers(1, (dim - 1) // parts))
        result = seeded(estimator, A, num_matvecs, distribution, chunk_size=chunk_size)
        expected = seeded(estimator, dense, num_matvecs, distribution)
        assert result.shape == exact(estimator, dense).shape
        power = 2 if estimator is hutchinson_squared_fro else 1
        assert (result - expected).abs().max() < 1e-8 * dim * scale**power
        multiple = seeded(estimator, 4 * A, num_matvecs, distribution)
        assert (multiple - 4**power * result).abs().max() < 1e-8 * dim * (4 * scale) ** power
        if estimator is hutchinson_diag:
            trace = seeded(hutchinson_trace, A, num_matvecs, distribution)
            assert (result.sum() - trace).abs() < 1e-8 * dim * scale
        if estimator is hutchinson_squared_fro:
            trace = seeded(hutchinson_trace, A.H @ A, num_matvecs, distribution)
            assert (result - trace).abs() < 1e-8 * dim * scale**2


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_signature(estimator: Estimator) -> None:
    """All are public, documented, and take the same arguments."""
    assert getattr(curvlinops, estimator.__name__) is estimator
    assert estimator.__name__ in curvlinops.__all__
    assert str(inspect.signature(estimator)).startswith(
        "(A: 'Matrix', num_matvecs: 'int', distribution: 'Distribution' = 'rademacher', *, "
        "generator: 'torch.Generator | None' = None, chunk_size: 'int | None' = None, "
        "return_standard_error: 'bool' = False)"
    )
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in (estimator.__doc__ or "")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wrong_arguments(estimator: Estimator) -> None:
    """Errors say what is wrong and what to use instead, before the first product."""
    A, parts = Counting(torch.eye(12)), PARTS[estimator]
    name, good = estimator.__name__, 6
    closed_form = {
        hutchinson_squared_fro: r"A\.frobenius_norm\(\) \*\* 2",
        hutchinson_diag: r"A\.diagonal\(\)",
        xdiag: r"A\.diagonal\(\)",
    }.get(estimator, r"A\.trace\(\)")
    for num_matvecs in (12, 18):
        message = rf"num_matvecs = {num_matvecs} is not less than the 12 columns of .*{closed_form}"
        with pytest.raises(ValueError, match=rf"{message}.*A\.to_dense\(\)"):
            estimator(A, num_matvecs)
    if parts > 1:
        with pytest.raises(ValueError, match=rf"{name} .* divisible by {parts}, got 7; use 6 or"):
            estimator(A, 7)
        with pytest.raises(ValueError, match=rf"divisible by {parts}, got 1; use {parts}\."):
            estimator(A, 1)
    for wrong in (0, -6):
        with pytest.raises(ValueError, match=f"num_matvecs must be at least 1, got {wrong}"):
            estimator(A, wrong)
    for wrong in (6.0, "6", None):
        with pytest.raises(TypeError, match="num_matvecs must be an integer"):
            estimator(A, wrong)
    with pytest.raises(ValueError, match=rf"two samples.*num_matvecs >= {2 * parts}, got {parts}"):
        estimator(A, parts, return_standard_error=True)
    for wrong in ("gaussian", "Normal", None, 3):
        with pytest.raises(ValueError, match=r"choose from \['rademacher', 'normal'\]"):
            estimator(A, good, wrong)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        estimator(A, good, chunk_size=0)
    with pytest.raises(TypeError, match="chunk_size must be an integer"):
        estimator(A, good, chunk_size=1.5)
    for wrong in (A.matrix.numpy(), [[1.0]], None):
        with pytest.raises(TypeError, match="A must be a linear operator or a matrix"):
            estimator(wrong, good)
    for wrong in (torch.ones(12), torch.ones(12, 12, 12)):
        with pytest.raises(ValueError, match="two axes"):
            estimator(wrong, good)
    with pytest.raises(ValueError, match="floating-point"):
        estimator(torch.ones(12, 12, dtype=torch.int64), good)
    assert not A.products
    assert not A.adjoint_products


@pytest.mark.parametrize("estimator", SQUARE)
def test_rectangular(estimator: Estimator) -> None:
    """A rectangular matrix has no trace and no diagonal: the error of the closed forms."""
    for shape in ((12, 13), (13, 12)):
        for A in (torch.ones(shape), TensorLinearOperator(torch.ones(shape))):
            with pytest.raises(RuntimeError, match="needs a square matrix"):
                estimator(A, 6)
            with pytest.raises(ValueError, match="needs a square matrix"):
                estimator(A, 6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_generator_of_another_device(estimator: Estimator) -> None:
    """A generator on another device is refused, with what to use instead."""
    A = torch.ones(12, 12, device="meta")
    with pytest.raises(ValueError, match=r"generator is on cpu.*on meta\. Use torch.Generator"):
        estimator(A, 6, generator=torch.Generator())


def test_xdiag_without_adjoint() -> None:
    """XDiag needs the adjoint, and says so; XTrace does not."""

    class NoAdjoint(PyTorchLinearOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [x.cumsum(0) for x in X]

    A = NoAdjoint([(9,)], [(9,)])
    with pytest.raises(NotImplementedError, match="has no adjoint"):
        xdiag(A, 4)
    assert xtrace(A, 4).isfinite()
