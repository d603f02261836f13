"""What all estimators share: random vectors, products with them, mean and standard error.

An estimator is an integrand, a function of random vectors and of their products, and a sampler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args, overload

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._tensors import complex_dtype, widened
from curvlinops.dense import TensorLinearOperator

Distribution = Literal["rademacher", "normal"]
Matrix: TypeAlias = PyTorchLinearOperator | Tensor
Result: TypeAlias = Tensor | tuple[Tensor, Tensor]
Integrand: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function of vectors V ``[N, K]`` and of the products A V ``[M, K]``, to samples ``[*S, K]``."""


# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------
class Estimator(Protocol):
    """The signature of all estimators: only a requested standard error makes it a pair."""

    @overload
    def __call__(
        self,
        A: Matrix,
        num_matvecs: int,
        distribution: Distribution = ...,
        *,
        generator: torch.Generator | None = ...,
        chunk_size: int | None = ...,
        return_standard_error: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        A: Matrix,
        num_matvecs: int,
        distribution: Distribution = ...,
        *,
        generator: torch.Generator | None = ...,
        chunk_size: int | None = ...,
        return_standard_error: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        A: Matrix,
        num_matvecs: int,
        distribution: Distribution = ...,
        *,
        generator: torch.Generator | None = ...,
        chunk_size: int | None = ...,
        return_standard_error: bool,
    ) -> Result: ...


def estimator(function: Callable[..., Result]) -> Estimator:
    """Return the function unchanged, with the type of all estimators."""
    return cast(Estimator, function)


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
def as_operator(A: Any) -> PyTorchLinearOperator:
    """Return an operator, or a matrix as one."""
    if isinstance(A, PyTorchLinearOperator):
        return A
    if isinstance(A, Tensor):
        return TensorLinearOperator(A)
    raise TypeError(f"A must be a linear operator or a matrix (tensor), got {type(A).__name__}.")


def check_square(A: PyTorchLinearOperator, quantity: str) -> None:
    """Raise the error of the closed form if a matrix is rectangular."""
    A._check_square(quantity)


def split_products(
    A: PyTorchLinearOperator,
    num_matvecs: Any,
    return_standard_error: bool,
    *,
    name: str,
    parts: int,
    exact: str,
) -> int:
    """Return how many samples an estimator has that needs several products for each.

    Args:
        A: The operator.
        num_matvecs: How many products are allowed, to be checked.
        return_standard_error: Whether a standard error is wanted, too.
        name: The estimator.
        parts: How many products each sample needs.
        exact: Code that computes the quantity exactly.
    """
    num_matvecs = _positive("num_matvecs", num_matvecs)
    if num_matvecs % parts:
        below, above = num_matvecs // parts * parts, (num_matvecs // parts + 1) * parts
        options = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"{name} needs num_matvecs to be divisible by {parts}, got {num_matvecs}; use "
            f"{options}."
        )
    columns = A.shape[1]
    if num_matvecs >= columns:
        raise ValueError(
            f"num_matvecs = {num_matvecs} is not less than the {columns} columns of {A!r}: use "
            f"{exact} where it has a closed form, or A.to_dense(), which needs no more products."
        )
    if return_standard_error and num_matvecs == parts:
        raise ValueError(
            f"A standard error needs two samples, which for {name} are num_matvecs >= "
            f"{2 * parts}, got {num_matvecs}."
        )
    return num_matvecs // parts


def _positive(what: str, value: Any) -> int:
    """Return an argument as an int of at least 1."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{what} must be an integer, got {value!r}.") from error
    if number < 1:
        raise ValueError(f"{what} must be at least 1, got {number}.")
    return number


# --------------------------------------------------------------------------------------------------
# Vectors and products
# --------------------------------------------------------------------------------------------------
class Sampler:
    """Random vectors v with E[v vᴴ] = I for an operator, and products in chunks.

    Signs do not depend on the dtype, and normal vectors of low precision are rounded ones of
    float32. Vectors for complex operators are real signs, or circular complex normal ones.

    Args:
        A: The operator, whose columns are as many as the entries of a vector. Without a device or
            dtype of its own, the vectors have the generator's device, or PyTorch's defaults.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers; default: the global ones of the device.
        chunk_size: How many columns to multiply at once; default: all.

    Raises:
        ValueError: For an unknown distribution, a wrong chunk size, or if the generator is on
            another device than the operator.
    """

    def __init__(
        self,
        A: PyTorchLinearOperator,
        distribution: str,
        generator: torch.Generator | None,
        chunk_size: int | None,
    ):
        if distribution not in get_args(Distribution):
            raise ValueError(
                f"Unknown distribution {distribution!r}: choose from {[*get_args(Distribution)]}."
            )
        self.dim = A.shape[1]
        self.dtype = torch.get_default_dtype() if A.dtype is None else A.dtype
        self.device = A.device
        if self.device is None:
            self.device = torch.empty(0).device if generator is None else generator.device
        elif generator is not None and not _is_same(generator.device, self.device):
            raise ValueError(
                f"Device mismatch: the generator is on {generator.device}, but {A!r} on "
                f"{self.device}. Use torch.Generator({str(self.device)!r})."
            )
        self._signs = distribution == "rademacher"
        self._generator = generator
        self._chunk_size = None if chunk_size is None else _positive("chunk_size", chunk_size)

    def chunks(self, num: int) -> list[int]:
        """Return the sizes of the chunks of ``num`` columns."""
        size = num if self._chunk_size is None else self._chunk_size
        return [min(size, num - start) for start in range(0, num, size)]

    def draw(self, num: int) -> Tensor:
        """Return the next ``num`` vectors as columns ``[N, num]``.

        They are drawn one after another: the j-th one does not depend on how many are drawn.
        """
        return torch.stack([self._vector() for _ in range(num)], dim=1)

    def _vector(self) -> Tensor:
        """Return the next vector ``[N]``."""
        size, device, generator = (self.dim,), self.device, self._generator
        if self._signs:
            bits = torch.randint(0, 2, size, dtype=torch.uint8, device=device, generator=generator)
            return bits.to(self.dtype) * 2 - 1
        wide = widened(torch.empty(0, dtype=self.dtype)).dtype
        return torch.randn(size, dtype=wide, device=device, generator=generator).to(self.dtype)

    def multiply(self, A: PyTorchLinearOperator, X: Tensor) -> Tensor:
        """Return the products ``[M, K]`` with columns ``[N, K]``, in float32 at least."""
        chunks = X.to(self._dtype_of(X)).split(self.chunks(X.shape[1]), dim=1)
        return torch.cat([widened(A @ chunk) for chunk in chunks], dim=1)

    def rounded(self, X: Tensor) -> Tensor:
        """Return columns as they are multiplied, in float32 at least."""
        return widened(X.to(self._dtype_of(X)))

    def _dtype_of(self, X: Tensor) -> torch.dtype:
        """Return in which dtype columns are multiplied."""
        # products with real vectors can be complex, if the operator has no dtype
        is_surprise = X.is_complex() and not self.dtype.is_complex
        return complex_dtype(self.dtype) if is_surprise else self.dtype


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; without an index there is only one."""
    indices = {device.index for device in (one, other) if device.index is not None}
    return one.type == other.type and len(indices) <= 1


# --------------------------------------------------------------------------------------------------
# Mean and standard error
# --------------------------------------------------------------------------------------------------
class Mean:
    """The mean of samples that come in chunks, and its standard error.

    The sum of squared deviations from the mean is updated, which does not cancel as the mean of
    squares does (Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance).
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0  # [*S]
        self._squares: Any = 0.0  # [*S], squared deviations

    def update(self, samples: Tensor) -> None:
        """Add samples ``[*S, K]``."""
        number = samples.shape[-1]
        mean = samples.mean(-1)
        squares = (samples - mean.unsqueeze(-1)).abs().square().sum(-1)
        before, self._count = self._count, self._count + number
        if before:
            difference = mean - self._mean
            self._mean = self._mean + difference * (number / self._count)
            between = difference.abs().square() * (before * number / self._count)
            self._squares = self._squares + squares + between
        else:
            self._mean, self._squares = mean, squares

    def result(
        self,
        dtype: torch.dtype | None,
        return_standard_error: bool,
        offset: Tensor | float = 0.0,
    ) -> Result:
        """Return the mean plus a constant, and on request its standard error, in an own dtype.

        Args:
            dtype: Dtype of the operator, whose precision the results have; None: any.
            return_standard_error: Whether to return the standard error, which is real, too.
            offset: What to add to the mean.
        """
        mean = _narrowed(self._mean + offset, dtype)
        if not return_standard_error:
            return mean
        variance = self._squares / (self._count * (self._count - 1))
        return mean, _narrowed(variance.sqrt(), dtype)


def _narrowed(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return real or complex values in the precision of a dtype."""
    if dtype is None:
        return values
    return values.to(dtype if values.is_complex() else dtype.to_real())


def sample_mean(A: PyTorchLinearOperator, sampler: Sampler, num: int, integrand: Integrand) -> Mean:
    """Return the mean of an integrand over ``num`` vectors, without holding them all."""
    mean = Mean()
    for width in sampler.chunks(num):
        V = sampler.draw(width)
        mean.update(integrand(widened(V), sampler.multiply(A, V)))
    return mean


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """Return xᴴ y of each pair of columns ``[N, K]``: ``[K]``."""
    return (X.conj() * Y).sum(0)
