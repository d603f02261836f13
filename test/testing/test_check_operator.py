"""Tests of ``curvlinops.testing.check_operator``: what is right passes, defects are found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Size, Tensor
from zoo import C128, F64, SKIP, ZOO, general, indefinite, positive

from curvlinops import _saving
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.testing import check_operator

SPLIT = [(2,), (1, 2)]  # the input space of the operators below
NAMES = ["w", "v"]


class Right(PyTorchLinearOperator):
    """A dense matrix on a space of two named tensors; every defect is a subclass."""

    def __init__(self, matrix: Tensor):
        super().__init__(SPLIT, SPLIT)
        self.matrix = matrix

    @property
    def _in_names(self) -> list[str]:
        return NAMES

    @property
    def _out_names(self) -> list[str]:
        return NAMES

    def _apply(self, matrix: Tensor, X: list[Tensor]) -> list[Tensor]:
        w, v = X
        y = matrix @ torch.cat([w, v.flatten(0, 1)])
        return [y[:2].clone(), y[2:].unflatten(0, (1, 2)).clone()]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._apply(self.matrix, X)

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._apply(self.matrix.mH, X)

    def _dense(self) -> TensorLinearOperator:
        return TensorLinearOperator(self.matrix)

    def trace(self) -> Tensor:
        return self.matrix.trace()

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.matrix)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        return self._dense().slogdet()

    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return Right(self._dense().inverse(damping, **strategy).matrix)

    def eigh(self) -> PyTorchLinearOperator:
        return RightDecomposed(self._dense().eigh().to_dense())

    def power(self, exponent: float) -> PyTorchLinearOperator:
        return Right(self._dense().power(exponent).to_dense())


class RightDecomposed(Right):
    """Stands for an eigendecomposition; adding a multiple of I is done at once."""

    def __add__(self, other: Any) -> Any:
        return RightDecomposed(self.matrix + other.to_dense())

    def __mul__(self, value: Any) -> Any:
        return RightDecomposed(value * self.matrix)

    __rmul__ = __mul__

    def eigh(self) -> PyTorchLinearOperator:
        return self


@pytest.mark.parametrize("name", ZOO)
def test_zoo_conforms(name: str) -> None:
    """Every operator of the package, and compositions of them, equal their dense matrices."""
    operator, dense = ZOO[name]()
    check_operator(operator, dense, skip=SKIP.get(name, ()))


@pytest.mark.parametrize(
    "name", ["user_named_complex", "kronecker_positive", "canonical_chain", "blocks_rectangular"]
)
def test_without_dense(name: str) -> None:
    """Without a dense matrix, the properties check each other."""
    check_operator(ZOO[name]()[0])


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("make", [general, positive, indefinite])
def test_right_operator_conforms(make: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """What the defects below are derived from passes."""
    matrix = make(4, dtype=dtype) if make is not general else make(4, 4, dtype)
    check_operator(Right(matrix), matrix)


# --------------------------------------------------------------------------------------------------
# Planted defects: name of the property that must be named -> operator
# --------------------------------------------------------------------------------------------------
DEFECTS: dict[type[Right], tuple[str, Callable[[], Tensor]]] = {}


def defect(property_name: str, make: Callable[[], Tensor] = lambda: general(4, 4, C128)) -> Any:
    """Register a broken operator with the property that it lacks, and its matrix."""

    def register(cls: type[Right]) -> type[Right]:
        DEFECTS[cls] = (property_name, make)
        return cls

    return register


def real() -> Tensor:
    return general(4, 4)


def definite() -> Tensor:
    return positive(4)


def negative() -> Tensor:
    """A matrix with negative determinant."""
    matrix = positive(4)
    matrix[0] *= -1
    return matrix


# ---- spaces
@defect("spaces: in_shape: is no list")
class TupleOfShapes(Right):
    def __init__(self, matrix: Tensor):
        super().__init__(matrix)
        self.in_shape = tuple(self.in_shape)


@defect("spaces: in_shape: is no list")
class ListsAsShapes(Right):
    def __init__(self, matrix: Tensor):
        super().__init__(matrix)
        self.in_shape = [list(shape) for shape in self.in_shape]


@defect("spaces: shape: is")
class WrongShape(Right):
    @property
    def shape(self) -> Size:
        return Size((4, 4)) if sys._getframe(1).f_code.co_name != "check_spaces" else Size((4, 5))


@defect("spaces: dtype: is torch.float32, but the matrix is complex")
class RealDtypeOfComplexMatrix(Right):
    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._apply(self.matrix, [x.to(C128) for x in X])


@defect("spaces: repr")
class EmptyRepr(Right):
    def __repr__(self) -> str:
        return ""


@defect("determinism: A @ x leaves x as it is: raised ValueError: broken")
class Raises(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        raise ValueError("broken")


# ---- determinism
@defect("determinism: A @ x twice")
class Random(Right):
    generator = torch.Generator()

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        noise = torch.rand(1, generator=self.generator, dtype=F64)
        return self._apply((1 + 1e-6 * noise) * self.matrix, X)


@defect("determinism: x @ A twice")
class RandomAdjoint(Right):
    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        noise = torch.rand(1, generator=Random.generator, dtype=F64)
        return self._apply((1 + noise) * self.matrix.mH, X)


@defect("determinism: the global random generator: is used")
class UsesGlobalGenerator(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        torch.rand(1)
        return super()._matmat(X)


@defect("determinism: A @ x leaves x as it is")
class ChangesInput(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        result = super()._matmat(X)
        X[0].mul_(2)
        return result


@defect("determinism: A @ x returns memory of its own", lambda: torch.eye(4, dtype=C128))
class ReturnsInput(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return X


@defect("determinism: x @ A returns memory of its own", lambda: torch.eye(4, dtype=C128))
class AdjointReturnsInput(Right):
    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return X


@defect("determinism: A @ x keeps dtype and device", real)
class ReturnsFloat32(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        # exact in float32
        return [y.round().float() for y in super()._matmat([0 * x for x in X])]


@defect("determinism: A @ x records no gradients")
class RecordsGradients(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return super()._matmat(X)


@defect("determinism: A @ x inside of torch.inference_mode(): raised RuntimeError")
class NeedsGradients(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            root = self.matrix.clone().requires_grad_()
            y = torch.cat([y.flatten(0, -2) for y in self._apply(root, X)])
            columns = [
                torch.autograd.grad(column, root, torch.ones_like(column), retain_graph=True)
                for column in y.unbind(-1)
            ]
        assert len(columns) == X[0].shape[-1]
        return [y.detach() for y in super()._matmat(X)]


# ---- linearity
@defect("linearity: A @ (s x + t y) = s A @ x + t A @ y for vectors")
class Square(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [y + 1e-6 * y**2 for y in super()._matmat(X)]


@defect("linearity: A @ (s x + t y) = s A @ x + t A @ y for vectors")
class Affine(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [y + 1e-6 for y in super()._matmat(X)]


@defect("linearity: A @ (s x + t y) = s A @ x + t A @ y for matrices")
class MixesColumns(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [y / max(1, abs(y.sum().item())) * (y.shape[-1] > 1) + y for y in super()._matmat(X)]


@defect("linearity: A @ (s x + t y) = s A @ x + t A @ y for vectors")
class ConjugateLinear(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return super()._matmat([x.conj() for x in X])


# ---- products
@defect("products: A @ x for a matrix: max abs error")
class WrongScale(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [(1 + 1e-7) * y for y in super()._matmat(X)]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [(1 + 1e-7) * y for y in super()._adjoint_matmat(X)]


@defect("products: A @ x for a matrix: max abs error")
class WrongChunks(Right):
    """Computes two columns at once, but starts the second chunk one column early."""

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        columns = range(X[0].shape[-1])
        order = [i if i < 2 else i - 1 for i in columns]
        return super()._matmat([x[..., order] for x in X])


@defect("products: A @ x for a matrix that is transposed in memory")
class IgnoresStrides(Right):
    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 2:
            x = x.as_strided(x.shape, (x.shape[1], 1)) if not x.is_contiguous() else x
        return super().__matmul__(x)


@defect("products: A @ x for a vector")
class WrongForVectors(Right):
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [y * (2 if y.shape[-1] == 1 else 1) for y in super()._matmat(X)]


@defect("products: A @ x for zero columns: raised IndexError")
class NoZeroColumns(Right):
    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 2:
            x[0, 0]
        return super().__matmul__(x)


# ---- adjoint
@defect("adjoint: SELF_ADJOINT needs a Hermitian matrix", real)
class NotSelfAdjoint(Right):
    SELF_ADJOINT = True


@defect("adjoint: SELF_ADJOINT needs a Hermitian matrix")
class SymmetricButNotHermitian(Right):
    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor):
        super().__init__(matrix)
        self.matrix = matrix


@defect("adjoint: dot test")
class AdjointWithoutConjugation(Right):
    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._apply(self.matrix.mT, X)


@defect("adjoint: dot test", real)
class AdjointIsForward(Right):
    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._apply(self.matrix, X)


@defect("adjoint: dot test <y, A @ x> = <A.H @ y, x>: raised NotImplementedError")
class NoAdjoint(PyTorchLinearOperator):
    def __init__(self, matrix: Tensor):
        super().__init__([(4,)], [(4,)])
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix @ X[0]]

    def __rmatmul__(self, x: Any) -> Any:  # hides the defect from the checks before
        return TensorLinearOperator(self.matrix).__rmatmul__(x)


@defect("adjoint: A.T: max abs error")
class TransposeIsAdjoint(Right):
    @property
    def T(self) -> PyTorchLinearOperator:
        return self.H


@defect("adjoint: A.H.H: max abs error")
class AdjointTwice(Right):
    def _adjoint(self) -> PyTorchLinearOperator:
        return SelfInverseAdjoint(self.matrix.mH)


class SelfInverseAdjoint(Right):
    def adjoint(self) -> PyTorchLinearOperator:
        return self


@defect("adjoint: x @ A for a matrix: max abs error")
class LeftProductIsAdjoint(Right):
    def __rmatmul__(self, x: Any) -> Any:
        return (
            (self.H @ x.mT).mT if isinstance(x, Tensor) and x.ndim == 2 else super().__rmatmul__(x)
        )


@defect("adjoint: x @ A for a vector: max abs error")
class LeftProductOfVectorIsAdjoint(Right):
    def __rmatmul__(self, x: Any) -> Any:
        return self.H @ x if isinstance(x, Tensor) and x.ndim == 1 else super().__rmatmul__(x)


# ---- formats
@defect("formats: A @ x for a tuple of vectors: returned a list instead of a tuple")
class ListForTuple(Right):
    def __matmul__(self, x: Any) -> Any:
        result = super().__matmul__(x)
        return list(result) if isinstance(result, tuple) else result


@defect("formats: A @ x for a dict of vectors: returned a list instead of a dict")
class ListForDict(Right):
    def __matmul__(self, x: Any) -> Any:
        result = super().__matmul__(x)
        return list(result.values()) if isinstance(result, dict) else result


@defect("formats: A @ x for a dict of vectors: max abs error")
class DictInGivenOrder(Right):
    def __matmul__(self, x: Any) -> Any:
        if not isinstance(x, dict):
            return super().__matmul__(x)
        values = torch.cat([value.flatten() for value in x.values()])
        result = super().__matmul__([values[:2], values[2:].reshape(1, 2)])
        return dict(zip(NAMES, result, strict=True))


@defect("formats: A @ x for a list of matrices with 1 columns: returned shapes")
class SqueezesOneColumn(Right):
    def __matmul__(self, x: Any) -> Any:
        result = super().__matmul__(x)
        squeeze = isinstance(x, list) and x and x[0].shape == (2, 1)
        return [r.squeeze(-1) for r in result] if squeeze else result


@defect("formats: x @ A for a list of matrices with 3 columns: ")
class TrailingForLeading(Right):
    def __rmatmul__(self, x: Any) -> Any:
        result = super().__rmatmul__(x)
        is_matrix = isinstance(x, list) and x[1].ndim == 3
        return [r.movedim(0, -1) for r in result] if is_matrix else result


# ---- errors
@defect("errors: A @ a vector that is too long is refused: did not raise ValueError")
class TruncatesVectors(Right):
    def __matmul__(self, x: Any) -> Any:
        return super().__matmul__(x[:4] if isinstance(x, Tensor) else x)


@defect("errors: A @ a vector of another dtype is refused")
class CastsVectors(Right):
    def __matmul__(self, x: Any) -> Any:
        return super().__matmul__(x.to(C128) if isinstance(x, Tensor) else x)


@defect("errors: A @ text is refused: raised ValueError")
class WrongErrorType(Right):
    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, str):
            raise ValueError("text")
        return super().__matmul__(x)


@defect("errors: A @ an operator of another shape is refused")
class AcceptsAnyOperator(Right):
    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, PyTorchLinearOperator) and x.out_shape != self.in_shape:
            return x
        return super().__matmul__(x)


@defect("errors: A + 1 is refused")
class AddsNumbers(Right):
    def __add__(self, other: Any) -> Any:
        return self if isinstance(other, int) else super().__add__(other)


# ---- to_dense, scipy, copies
@defect("to_dense: to_dense(chunk_size=3): has shape")
class DropsTrailingChunk(Right):
    def to_dense(self, chunk_size: int = 128) -> Tensor:
        dense = super().to_dense(chunk_size)
        full = 4 - 4 % chunk_size if chunk_size <= 4 else 4
        return dense[:, :full]


@defect("to_dense: to_dense(chunk_size=0) is refused")
class AnyChunkSize(Right):
    def to_dense(self, chunk_size: int = 128) -> Tensor:
        return super().to_dense(max(chunk_size, 1))


@defect("scipy: to_scipy().rmatvec: max abs error")
class WrongScipyAdjoint(Right):
    def to_scipy(self, dtype: Any = None) -> Any:
        exported = super().to_scipy(dtype)
        exported._rmatvec = lambda x: self.matrix.T.numpy() @ x
        return exported


@defect("scipy: to_scipy(): has dtype float64 instead of float32", lambda: general(4, 4).float())
class WrongScipyDtype(Right):
    def to_scipy(self, dtype: Any = None) -> Any:
        return super().to_scipy(np.float64)


@defect("scipy: to_scipy().matvec of complex numbers", real)
class ScipyDropsImaginaryPart(Right):
    def to_scipy(self, dtype: Any = None) -> Any:
        exported = super().to_scipy(dtype)
        exported._matvec = lambda x: self.matrix.numpy() @ x.real
        return exported


@defect("scipy: to_scipy(dtype): has dtype float32", lambda: general(4, 4).float())
class IgnoresScipyDtype(Right):
    def to_scipy(self, dtype: Any = None) -> Any:
        return super().to_scipy()


@defect("copies: copy.deepcopy: shares tensors")
class SharesTensors(Right):
    def __deepcopy__(self, memo: dict[int, Any]) -> SharesTensors:
        return SharesTensors(self.matrix)


@defect("copies: .to(torch.complex64): has dtype torch.complex128")
class IgnoresTo(Right):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


@defect("copies: .to(torch.complex64): max abs error")
class ToLosesValues(Right):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return ToLosesValues((2 * self.matrix).to(*args, **kwargs))


# ---- algebra
@defect("algebra: 2 * A: max abs error")
class WrongMultiple(Right):
    def __rmul__(self, value: Any) -> Any:
        return super().__mul__(value + 1)


@defect("algebra: -A: is a Tensor, not an operator")
class NegativeIsTensor(Right):
    def __neg__(self) -> Any:
        return -self.matrix


@defect("algebra: A ** 2: max abs error")
class EntrywisePower(Right):
    def __pow__(self, exponent: Any) -> Any:
        return super().__pow__(exponent) if exponent < 2 else Right(self.matrix**exponent)


@defect("algebra: names of 2 * A: are")
class MultipleLosesNames(Right):
    def __rmul__(self, value: Any) -> Any:
        class Nameless(Right):
            _in_names = None

        return (
            super().__mul__(value)
            if isinstance(value, np.number)
            else Nameless(value * self.matrix)
        )


# ---- closed forms
@defect("closed forms: trace of A: max abs error", real)
class WrongTrace(Right):
    def trace(self) -> Tensor:
        return self.matrix.sum()


@defect("closed forms: trace of A: is", real)
class TraceIsNumber(Right):
    def trace(self) -> Any:
        return self.matrix.trace().item()


@defect("closed forms: trace of A: has dtype torch.float32", real)
class TraceInFloat32(Right):
    def trace(self) -> Tensor:
        return self.matrix.trace().float()


@defect("closed forms: diagonal of A: max abs error", real)
class WrongDiagonal(Right):
    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().flip(0)


@defect("closed forms: frobenius_norm of A: max abs error", real)
class SquaredNorm(Right):
    def frobenius_norm(self) -> Tensor:
        return super().frobenius_norm() ** 2


@defect("closed forms: slogdet of A: max abs error", real)
class WrongLogarithm(Right):
    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, log = super().slogdet()
        return sign, 2 * log


@defect("closed forms: slogdet of A: max abs error", negative)
class DropsSign(Right):
    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, log = super().slogdet()
        return sign.abs(), log


@defect("closed forms: slogdet of A: log|det| = ", lambda: torch.ones(4, 4))
class SingularIsOne(Right):
    def slogdet(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(1.0), torch.tensor(0.0)


@defect("closed forms: det of A: max abs error", negative)
class DeterminantWithoutSign(Right):
    def det(self) -> Tensor:
        return super().det().abs()


@defect("closed forms: logdet of A: is", negative)
class LogOfAbsoluteDeterminant(Right):
    def logdet(self) -> Tensor:
        return self.slogdet()[1]


@defect("closed forms: logdet of A: max abs error", definite)
class NanForPositiveDeterminant(Right):
    def logdet(self) -> Tensor:
        return torch.tensor(torch.nan, dtype=F64)


@defect("closed forms: inverse() of A: max abs error", real)
class WrongInverse(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return super().inverse(damping, **strategy).T


@defect("closed forms: inverse(damping=", definite)
class InverseIgnoresDamping(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return super().inverse(0.0, **strategy)


@defect("use_heuristic_damping=True) of A: max abs error", definite)
class HeuristicWithoutKroneckerFactors(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        if strategy.get("use_heuristic_damping"):
            damping = damping**0.5
        return super().inverse(damping, **strategy)


@defect("closed forms: inverse of A with two strategies is refused", definite)
class AnyStrategy(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return super().inverse(damping)


@defect("closed forms: inverse() of A: raised RuntimeError", definite)
class RefusesInverse(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        raise RuntimeError("no inverse")


@defect("closed forms: eigh of A: max abs error", definite)
class WrongEigenvectors(Right):
    def eigh(self) -> PyTorchLinearOperator:
        return RightDecomposed(2 * self.matrix)


@defect("closed forms: eigh of A: max abs error", real)
class EighOfLowerTriangle(Right):
    """Takes the lower triangle of a matrix that is not Hermitian."""

    def eigh(self) -> PyTorchLinearOperator:
        values, vectors = torch.linalg.eigh(self.matrix)
        return RightDecomposed(vectors @ torch.diag(values) @ vectors.T)


@defect("closed forms: sqrt of A: max abs error", definite)
class SqrtIsSquare(Right):
    def sqrt(self) -> PyTorchLinearOperator:
        return self @ self


@defect("closed forms: sqrt of A: is not the principal root", definite)
class NegativeSqrt(Right):
    def sqrt(self) -> PyTorchLinearOperator:
        return -self.power(0.5)


@defect("closed forms: power of A: max abs error", definite)
class PowerIgnoresExponent(Right):
    def sqrt(self) -> PyTorchLinearOperator:
        return self.power(0.5)

    def power(self, exponent: float) -> PyTorchLinearOperator:
        return super().power(0.5)


@defect("closed forms: power(-1) of A", definite)
class PowerOfAbsoluteExponent(Right):
    def power(self, exponent: float) -> PyTorchLinearOperator:
        return super().power(abs(exponent))


@defect("closed forms: inverse_sqrt of A: max abs error", definite)
class InverseSqrtIsInverse(Right):
    def inverse_sqrt(self) -> PyTorchLinearOperator:
        return self.inverse()


@defect("closed forms: inverse_sqrt of A: max abs error", definite)
class NegativeInverseSqrt(Right):
    def inverse_sqrt(self) -> PyTorchLinearOperator:
        return -self.power(-0.5)


@defect("closed forms: inverse_sqrt of A: raised ValueError: no", definite)
class RefusedInverseSqrt(Right):
    def inverse_sqrt(self) -> PyTorchLinearOperator:
        raise ValueError("no")


def singular() -> Tensor:
    matrix = positive(4)
    matrix[-1], matrix[:, -1] = 0, 0
    return matrix


@defect("closed forms: pinv of A: max abs error", singular)
class PinvIsAdjoint(Right):
    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        return self.H


@defect("closed forms: pinv of A: has spaces", singular)
class PinvIsFlat(Right):
    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        return self._dense().pinv(rtol)


@defect("closed forms: sample(inverse=False) of A: max abs error", definite)
class SampleHasNoCovariance(Right):
    def sample(
        self, num_samples: int = 1, *, generator: Any = None, inverse: bool = False
    ) -> Tensor:
        return torch.randn(4, num_samples, generator=generator, dtype=self.dtype)


@defect("closed forms: sample(inverse=True) of A: max abs error", definite)
class SampleIgnoresInverse(Right):
    def sample(
        self, num_samples: int = 1, *, generator: Any = None, inverse: bool = False
    ) -> Tensor:
        return super().sample(num_samples, generator=generator)


@defect("closed forms: sample(inverse=False) of A: has shape [3, 4] instead of [4, 3]", definite)
class SampleInRows(Right):
    def sample(
        self, num_samples: int = 1, *, generator: Any = None, inverse: bool = False
    ) -> Tensor:
        return super().sample(num_samples, generator=generator, inverse=inverse).mT


@defect("closed forms: sample(inverse=False) of A: max abs error", definite)
class SampleIgnoresGenerator(Right):
    def sample(
        self, num_samples: int = 1, *, generator: Any = None, inverse: bool = False
    ) -> Tensor:
        return super().sample(num_samples, generator=torch.Generator().manual_seed(5))


@defect("closed forms: sample(inverse=False) of A: is a sample, but", lambda: indefinite(4))
class SampleOfIndefinite(Right):
    def sample(
        self, num_samples: int = 1, *, generator: Any = None, inverse: bool = False
    ) -> Tensor:
        return torch.zeros(4, num_samples, dtype=self.dtype)


@defect("closed forms: trace of A.H: is missing", real)
class AdjointLosesTrace(Right):
    def _adjoint(self) -> PyTorchLinearOperator:
        class NoTrace(Right):
            trace = PyTorchLinearOperator.trace

            def _adjoint(self) -> PyTorchLinearOperator:
                return AdjointLosesTrace(self.matrix.mH)

        return NoTrace(self.matrix.mH)


@defect("closed forms: diagonal of A.inverse(): is missing", definite)
class InverseLosesDiagonal(Right):
    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        class NoDiagonal(Right):
            diagonal = PyTorchLinearOperator.diagonal

        return NoDiagonal(super().inverse(damping, **strategy).matrix)


@pytest.mark.parametrize("cls", DEFECTS, ids=lambda cls: cls.__name__)
def test_finds_defect(cls: type[Right]) -> None:
    """A planted defect is found, and the property that is named is the one it violates.

    Catches checks that are left out, done with too small a tolerance, or on special inputs only.
    """
    property_name, make = DEFECTS[cls]
    matrix = make()
    with pytest.raises(AssertionError) as caught:
        check_operator(cls(matrix), matrix)
    assert property_name in str(caught.value)


def test_finds_defect_without_dense() -> None:
    """Properties that contradict each other are found without a dense matrix."""
    for cls, name in (
        (WrongForVectors, "products: A @ x for a vector"),
        (AdjointIsForward, "adjoint: dot test"),
        (WrongTrace, "closed forms: trace of A"),
    ):
        with pytest.raises(AssertionError, match=name):
            check_operator(cls(general(4, 4)))


class Rectangular(PyTorchLinearOperator):
    """A right rectangular operator."""

    def __init__(self, matrix: Tensor):
        super().__init__([(matrix.shape[1],)], [(matrix.shape[0],)])
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix @ X[0]]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix.mH @ X[0]]


@pytest.mark.parametrize("name", ["trace", "diagonal", "slogdet", "det", "logdet", "inverse"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, None])
def test_finds_closed_form_of_rectangular(name: str, error: type[Exception] | None) -> None:
    """Closed forms of a rectangular matrix raise an error of both types."""

    def form(self: Any, *args: Any, **kwargs: Any) -> Any:
        if error is not None:
            raise error("rectangular")
        return torch.zeros(())

    matrix = general(2, 3)
    broken = type("Broken", (Rectangular,), {name: form})
    check_operator(Rectangular(matrix), matrix)
    with pytest.raises(AssertionError, match=f"{name} of a rectangular A is refused"):
        check_operator(broken(matrix), matrix)


def test_finds_wrong_norm_of_rectangular() -> None:
    """The one closed form that rectangular operators have is checked."""

    class Wrong(Rectangular):
        def frobenius_norm(self) -> Tensor:
            return self.matrix.sum()

    matrix = general(2, 3)
    with pytest.raises(AssertionError, match="frobenius_norm of A: max abs error"):
        check_operator(Wrong(matrix), matrix)


def test_finds_self_adjoint_between_spaces() -> None:
    """An operator between different spaces of equal dimension is not its own adjoint."""

    class Wrong(Rectangular):
        SELF_ADJOINT = True

        def __init__(self, matrix: Tensor):
            super().__init__(matrix)
            self.out_shape = [Size((2, 2))]

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [y.unflatten(0, (2, 2)) for y in super()._matmat(X)]

    with pytest.raises(AssertionError, match="SELF_ADJOINT: is true between"):
        check_operator(Wrong(torch.eye(4)))


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------
class Saved(Rectangular):
    """A matrix in two parts."""

    def __init__(self, low: Tensor, high: Tensor):
        super().__init__(torch.cat([low, high]))
        self.low, self.high = low, high

    def _state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        return cls(state["low"], state["high"])


class LosesPart(Saved):
    def _state(self) -> dict[str, Any]:
        saving = sys._getframe(1).f_code.co_name == "__reduce_ex__"
        return {"low": self.low, "high": self.high if not saving else 0 * self.high}


class LosesKnowledge(Saved):
    """Knows its diagonal from elsewhere."""

    known = 5.0

    def diagonal(self) -> Tensor:
        return torch.full((3,), self.known, dtype=F64)

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        loaded = cls(state["low"], state["high"])
        loaded.known = 0.0
        return loaded


class OtherType(Saved):
    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        loading = sys._getframe(1).f_code.co_name == "rebuild_operator"
        return Saved(**state) if loading else OtherType(**state)


class SavesWholeStorage(Saved):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _saving.reduce_operator(self, self._state())


class CannotMove(Saved):
    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        return cls(
            *(
                torch.empty_like(x, device="cpu").copy_(x) if x.is_meta else x
                for x in state.values()
            )
        )


class PickledByName(Saved):
    def _state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "code": Saved}


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (Saved, None),
        (LosesPart, "saving: torch.load: max abs error"),
        (LosesKnowledge, "saving: torch.load: has diagonal"),
        (OtherType, "saving: torch.load: is a Saved"),
        (SavesWholeStorage, "saving: torch.load: a tensor of"),
        (CannotMove, r"saving: torch.load\(map_location\)"),
        (PickledByName, "saving: torch.load: raised UnpicklingError"),
    ],
)
def test_finds_defect_of_saving(
    cls: type[Saved], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators that can be saved are saved and loaded."""
    monkeypatch.setitem(_saving._TYPES, cls.__name__, cls)
    monkeypatch.setitem(_saving._TYPES, "Saved", Saved)
    matrix = general(8, 3)
    operator, dense = cls(matrix[:1], matrix[1:4]), matrix[:4]
    if name is None:
        check_operator(operator, dense)
    else:
        with pytest.raises(AssertionError, match=name):
            check_operator(operator, dense, skip=["diagonal"])
        check_operator(operator, dense, skip=["diagonal", "saving"])


def test_saving_is_skipped_for_other_types() -> None:
    """A user's operator, also inside another one, need not be saveable."""
    matrix = general(2, 3)
    check_operator(2 * Rectangular(matrix), 2 * matrix)


# --------------------------------------------------------------------------------------------------
# The function itself
# --------------------------------------------------------------------------------------------------
def test_message_says_how_much() -> None:
    """The error names operator, property, error and tolerance."""
    matrix = general(4, 4, C128)
    with pytest.raises(AssertionError) as caught:
        check_operator(WrongScale(matrix), matrix)
    assert str(caught.value).startswith("<4×4 operator WrongScale>: products: ")
    assert "exceeds the tolerance" in str(caught.value)


def test_pseudo_inverse_of_a_rectangle() -> None:
    """It is checked where it exists, also of multiples."""

    class Wrong(TensorLinearOperator):
        def pinv(self, rtol: float | None = None) -> TensorLinearOperator:
            return TensorLinearOperator(self.matrix.mT)

    with pytest.raises(AssertionError, match="closed forms: pinv of A: max abs error"):
        check_operator(Wrong(general(3, 4)))
    check_operator(Wrong(general(3, 4)), skip=["pinv"])


def test_tolerance() -> None:
    """The relative tolerance can be chosen."""
    matrix = general(4, 4, C128)
    check_operator(WrongScale(matrix), matrix, rtol=1e-4, skip=["closed forms"])
    with pytest.raises(AssertionError, match="products"):
        check_operator(Right(matrix), matrix * (1 + 1e-12), rtol=1e-13, skip=["linearity"])


def test_skip() -> None:
    """Groups and single closed forms can be left out, unknown ones are refused."""
    matrix = general(4, 4)
    check_operator(WrongDiagonal(matrix), matrix, skip=["diagonal"])
    check_operator(WrongDiagonal(matrix), matrix, skip=["closed forms"])
    with pytest.raises(ValueError, match=r"Cannot skip \['tracee'\]: choose from"):
        check_operator(Right(matrix), matrix, skip=["tracee"])


def test_arguments() -> None:
    """A dense matrix of another shape, and too few columns, are refused."""
    with pytest.raises(ValueError, match=r"the shape of op, \[4, 4\], got \[3, 4\]"):
        check_operator(Right(general(4, 4)), general(3, 4))
    with pytest.raises(ValueError, match="num_columns must be at least 2"):
        check_operator(Right(general(4, 4)), num_columns=1)


def test_leaves_no_traces(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed, and the global random generator stays as it is."""
    operator, dense = ZOO["canonical_chain"]()
    before = torch.get_rng_state()
    check_operator(operator, dense)
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr() == ("", "")


def test_seed_changes_vectors() -> None:
    """Another seed takes other vectors, the same seed the same ones."""

    def products(seed: int) -> list[Tensor]:
        seen = []

        class Records(Right):
            def _matmat(self, X: list[Tensor]) -> list[Tensor]:
                seen.append(X[0].clone())
                return super()._matmat(X)

        check_operator(
            Records(torch.eye(4) * 2), torch.eye(4) * 2, seed=seed, skip=["closed forms"]
        )
        return seen

    first, again, other = products(0), products(0), products(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_does_not_need_pytest() -> None:
    """The package's users may test otherwise."""
    code = "import sys, curvlinops.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
