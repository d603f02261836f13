"""How the conformance kit compares and complains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Size, Tensor

from curvlinops._torch_base import PyTorchLinearOperator

RTOL = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
OTHER = {
    torch.float64: torch.float32,
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex128: torch.complex64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex64,
}


class Check:
    """The operator under test, its dense matrix, and how to compare and complain."""

    def __init__(
        self,
        op: PyTorchLinearOperator,
        dense: Tensor | None,
        rtol: float | None,
        num_columns: int,
        seed: int,
        skip: frozenset[str],
    ):
        if dense is not None and dense.shape != op.shape:
            raise ValueError(
                f"dense must have the shape of op, {list(op.shape)}, got {list(dense.shape)}."
            )
        self.op, self.num_columns, self.skip = op, num_columns, skip
        self.group, self.name = "spaces", ""
        self.generator = torch.Generator().manual_seed(seed)
        default = torch.get_default_dtype()
        if dense is not None and dense.is_complex():
            default = default.to_complex()
        self.dtype = op.dtype or default
        self.device = op.device or torch.device("cpu")
        self.eps = torch.finfo(self.dtype).eps
        self.rtol = RTOL[self.dtype.to_real()] if rtol is None else rtol
        with self.property("A @ I"):
            eye = torch.eye(op.shape[1], device=self.device, dtype=self.dtype)
            self.dense = wide(op @ eye if dense is None else dense)
        self.norm = norm(self.dense)

    def random(self, *shape: int) -> Tensor:
        """Return normally distributed numbers in the operator's dtype."""
        double = torch.complex128 if self.dtype.is_complex else torch.float64
        numbers = torch.randn(shape, generator=self.generator, dtype=double)
        return numbers.to(device=self.device, dtype=self.dtype)

    @contextmanager
    def property(self, name: str, optional: bool = False) -> Iterator[None]:
        """Name the property that is checked inside, also if the operator raises an error."""
        outer, self.name = self.name, name
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            if optional and isinstance(error, NotImplementedError):
                raise
            self.fail(f"raised {type(error).__name__}: {error}", error)
        finally:
            self.name = outer

    def fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        """Raise the error that names the property."""
        raise AssertionError(f"{self.op!r}: {self.group}: {self.name}: {reason}") from cause

    def require(self, condition: bool, reason: str) -> None:
        """Fail if a condition does not hold."""
        if not condition:
            self.fail(reason)

    def close(self, actual: Tensor, expected: Tensor, scale: float) -> None:
        """Fail if tensors differ by more than the tolerance, which is relative to a scale."""
        shapes = list(actual.shape), list(expected.shape)
        if shapes[0] != shapes[1]:
            self.fail(f"has shape {shapes[0]} instead of {shapes[1]}")
        if not actual.numel():
            return
        actual, expected = wide(actual), wide(expected)
        # equal infinities do not differ
        difference = torch.where(actual == expected, 0, (actual - expected).abs())
        error, tolerance = difference.max().item(), self.rtol * scale
        if not error <= tolerance:  # also for NaN
            self.fail(f"max abs error {error:.3e} exceeds the tolerance {tolerance:.3e}")

    def product(self, actual: Tensor, matrix: Tensor, x: Tensor, scale: float = 0.0) -> None:
        """Fail if a tensor is not the product of a matrix (of at least some norm) with x."""
        x = wide(x)
        dtype = torch.promote_types(matrix.dtype, x.dtype)
        expected = matrix.to(dtype) @ x.to(dtype)
        self.close(actual, expected, max(norm(matrix), scale) * max_abs(x))

    def equals(self, op: PyTorchLinearOperator, matrix: Tensor, scale: float = 0.0) -> None:
        """Fail if an operator does not multiply as a dense matrix does."""
        if not isinstance(op, PyTorchLinearOperator):
            self.fail(f"is a {type(op).__name__}, not an operator")
        if op.shape != matrix.shape:
            self.fail(f"is {op!r} instead of a matrix {list(matrix.shape)}")
        x = self.random(matrix.shape[1], self.num_columns)
        if matrix.is_complex() and not x.is_complex():
            x = x.to(x.dtype.to_complex())
        self.product(op @ x, matrix, x, scale)

    def raises(self, errors: tuple[type[Exception], ...], function: Callable[[], Any]) -> None:
        """Fail if a function does not raise an error that is of all these types."""
        wanted = " and ".join(error.__name__ for error in errors)
        try:
            function()
        except Exception as error:
            if not all(isinstance(error, kind) for kind in errors):
                self.fail(f"raised {type(error).__name__} ({error}) instead of {wanted}", error)
        else:
            self.fail(f"did not raise {wanted}")


def wide(x: Tensor) -> Tensor:
    """Return a tensor on the CPU in double precision."""
    return x.detach().to("cpu", torch.complex128 if x.is_complex() else torch.float64)


def norm(matrix: Tensor) -> float:
    """Return the Frobenius norm."""
    return torch.linalg.matrix_norm(wide(matrix)).item()


def max_abs(x: Tensor) -> float:
    """Return the largest absolute value, 0 if there is none."""
    return wide(x).abs().max().item() if x.numel() else 0.0


def split(x: Tensor, shapes: list[Size], leading: bool = False) -> list[Tensor]:
    """Split ``[N]``, ``[N, K]`` or (leading) ``[K, N]`` into the tensors of a space."""
    columns = [x.shape[0 if leading else 1]] if x.ndim == 2 else []
    parts = x.split([shape.numel() for shape in shapes], dim=-1 if leading else 0)
    return [
        part.reshape((*columns, *shape) if leading else (*shape, *columns))
        for part, shape in zip(parts, shapes, strict=True)
    ]


def leaves(item: Any) -> Iterator[Any]:
    """Iterate over the operators and tensors in an operator (itself the first)."""
    if isinstance(item, (Tensor, PyTorchLinearOperator)):
        yield item
    if isinstance(item, PyTorchLinearOperator):
        item = item._state()
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (list, tuple)):
        for value in item:
            yield from leaves(value)


def storages(op: PyTorchLinearOperator) -> set[int]:
    """Return the addresses of the memory of an operator's tensors."""
    tensors = [x for x in leaves(op) if isinstance(x, Tensor)]
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
