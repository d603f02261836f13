"""Closed forms of an operator, where it has them, and what arithmetic must keep of them."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from curvlinops._tensors import widened
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.testing._check import Check, leaves, norm, wide


class _Matrix:
    """A square dense matrix, and what its closed forms and their conditioning depend on."""

    def __init__(self, dense: Tensor, eps: float, rtol: float, scale: float):
        self.dense = dense
        self.dim = len(dense)
        self.scale = max(norm(dense), scale)  # of what the matrix was computed from
        self.cutoff = 10 * max(self.dim, 1) * eps * self.scale
        square = self.dim == dense.shape[1]
        self.hermitian = square and norm(dense - dense.mH) <= rtol * self.scale

    @cached_property
    def singular_values(self) -> Tensor:
        return torch.linalg.svdvals(self.dense)

    @property
    def singular(self) -> bool:
        """Whether the matrix is singular up to rounding."""
        return self.singular_values.min().item() <= self.cutoff

    @property
    def condition(self) -> float:
        """How much an inverse magnifies relative errors."""
        return self.scale / self.singular_values.min().item()

    @cached_property
    def smallest_eigenvalue(self) -> float:
        return torch.linalg.eigvalsh(self.dense).min().item()

    @property
    def positive(self) -> bool:
        """Whether the matrix is positive definite, beyond doubt."""
        return self.hermitian and self.smallest_eigenvalue > self.cutoff

    @property
    def semi_definite(self) -> bool:
        """Whether the matrix is positive semi-definite up to rounding."""
        return self.hermitian and self.smallest_eigenvalue >= -self.cutoff


def check_closed_forms(check: Check) -> None:
    op, dense = check.op, check.dense
    if op.shape[0] != op.shape[1]:
        _check_rectangular(check)
        return
    forms = _check_forms(check, "A", op, dense)
    shape, norms = {"trace", "diagonal"}, {"trace", "frobenius_norm"}
    _check_forms(check, "2 * A", 2 * op, 2 * dense, forms)
    _check_forms(check, "(-A)", -op, -dense, forms)
    _check_forms(check, "A.H", op.H, dense.mH, forms)
    _check_forms(check, "(A + A)", op + op, 2 * dense, forms & shape, forms=shape)
    if op.in_shape == op.out_shape:
        shift = check.norm / len(dense) ** 0.5 or 1.0
        needed = forms & shape
        if norms <= forms:
            needed.add("frobenius_norm")
        if "eigh" in forms:
            needed |= {"slogdet", "inverse", *_OF_EIGENVALUES} - ({"pinv"} - forms)
        shifted = op + shift * op**0
        added = dense + shift * torch.eye(len(dense), dtype=dense.dtype)
        _check_forms(check, "(A + shift * I)", shifted, added, needed, 2 * check.norm)
    matrix = _Matrix(dense, check.eps, check.rtol, 0.0)
    if "inverse" in forms and not matrix.singular:
        inverse = _inverse(check, "A", op, matrix, {})
        if inverse is not None:
            kept = {"trace", "diagonal", "frobenius_norm", "slogdet", *_OF_EIGENVALUES}
            expected = torch.linalg.inv(dense)
            scale = matrix.condition * norm(expected)
            _check_forms(check, "A.inverse()", inverse, expected, forms & kept, scale)


def _check_rectangular(check: Check) -> None:
    """Check that closed forms of square matrices are refused."""
    op = check.op
    for name in (*FORMS, "det", "logdet"):
        if name in check.skip or name in ("frobenius_norm", "pinv"):
            continue
        arguments = (2,) if name == "power" else ()
        with check.property(f"{name} of a rectangular A is refused"):
            wanted = (ValueError, RuntimeError)
            check.raises(wanted, lambda n=name, a=arguments: getattr(op, n)(*a))  # type: ignore[misc]
    if "frobenius_norm" not in check.skip:
        try:
            with check.property("frobenius_norm of A", optional=True):
                value = op.frobenius_norm()
                check.close(value, torch.tensor(check.norm, dtype=value.dtype), check.norm)
        except NotImplementedError:
            pass  # a closed form that the operator does not have
    forms = _check_forms(check, "A", op, check.dense, forms={"pinv"})
    _check_forms(check, "2 * A", 2 * op, 2 * check.dense, forms, forms={"pinv"})
    _check_forms(check, "A.H", op.H, check.dense.mH, forms, forms={"pinv"})


def _check_forms(
    check: Check,
    text: str,
    op: PyTorchLinearOperator,
    dense: Tensor,
    needed: Collection[str] = (),
    scale: float = 0.0,
    forms: Collection[str] | None = None,
) -> set[str]:
    """Check (some) closed forms of a square operator; return those that it has."""
    matrix = _Matrix(dense, check.eps, check.rtol, scale)
    found = set()
    for form, function in FORMS.items():
        if form in check.skip or (forms is not None and form not in forms):
            continue
        with check.property(f"{form} of {text}"):
            try:
                if function(check, text, op, matrix):
                    found.add(form)
            except NotImplementedError as error:
                if form in needed:
                    check.fail(f"is missing, although A has what it takes: {error}", error)
    return found


def _scalar(check: Check, value: Tensor, op: PyTorchLinearOperator, real: bool = False) -> Tensor:
    """Check that a number is a 0-d tensor of the right dtype; return it in double precision."""
    if not isinstance(value, Tensor) or value.ndim:
        check.fail(f"is {value!r}, no 0-d tensor")
    wanted = op.dtype.to_real() if op.dtype is not None and real else op.dtype
    check.require(wanted in (None, value.dtype), f"has dtype {value.dtype} instead of {wanted}")
    return wide(value)


def _trace(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    trace = _scalar(check, op.trace(), op)
    check.close(trace, matrix.dense.trace(), matrix.scale * matrix.dim**0.5)
    return True


def _diagonal(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    diagonal = op.diagonal()
    check.require(op.dtype in (None, diagonal.dtype), f"has dtype {diagonal.dtype}")
    check.close(diagonal, matrix.dense.diagonal(), matrix.scale)
    return True


def _frobenius_norm(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    # a norm from differences of squares has few digits if it is small: compare squares
    square = _scalar(check, op.frobenius_norm(), op, real=True) ** 2
    check.close(square, torch.tensor(norm(matrix.dense) ** 2, dtype=square.dtype), matrix.scale**2)
    return True


def _slogdet(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    values = op.slogdet()
    sign, log = _scalar(check, values[0], op), _scalar(check, values[1], op, real=True)
    singular_values = matrix.singular_values
    if matrix.singular:
        bound = singular_values.clamp(min=matrix.cutoff).log().sum().item() + 1
        check.require(
            bool(log <= bound),
            f"log|det| = {log:.3f} of a singular matrix is not below {bound:.3f}",
        )
    else:
        expected_sign, expected = torch.linalg.slogdet(matrix.dense)
        check.close(log, expected, 1 + log.abs().item() + matrix.dim * matrix.condition)
        if check.rtol * matrix.dim * matrix.condition < 0.5:
            check.close(sign, expected_sign, 1 + matrix.dim * matrix.condition)
    with check.property(f"det of {text}"):
        expected = sign * log.exp()
        if isfinite(expected.abs().item()):
            size = expected.abs().item() * (1 + log.abs().item() if log.isfinite() else 1)
            check.close(_scalar(check, op.det(), op), expected, size)
    with check.property(f"logdet of {text}"):
        logdet = _scalar(check, op.logdet(), op)
        size = 1 + log.abs().item()
        if sign.is_complex():
            check.close(logdet.real, log, size)
            if not matrix.singular:
                check.close(torch.exp(1j * logdet.imag), sign, size)
        elif sign.item() < 0:
            check.require(bool(logdet.isnan()), f"is {logdet:.3f}, but det < 0 needs NaN")
        else:
            check.close(logdet, log, size)
    return True


def _inverse(
    check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix, arguments: dict[str, Any]
) -> PyTorchLinearOperator | None:
    """Return an inverse, or None where there need not be one."""
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    with check.property(f"inverse({given}) of {text}", optional=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about retries in double precision
                inverse = op.inverse(**arguments)
        except NotImplementedError:
            raise
        except (RuntimeError, ValueError) as error:
            # Cholesky needs positive definite matrices, and eigendecompositions Hermitian ones
            wrong_type = isinstance(error, ValueError) and matrix.hermitian
            if matrix.positive or wrong_type:
                check.fail(f"raised {type(error).__name__}: {error}", error)
            return None
        spaces = (inverse.in_shape, inverse.out_shape)
        check.require(spaces == (op.out_shape, op.in_shape), f"has spaces {spaces}")
        if not matrix.singular:
            expected = torch.linalg.inv(matrix.dense)
            check.equals(inverse, expected, norm(expected) * matrix.condition)
    return inverse


def _inverses(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    _inverse(check, text, op, matrix, {})
    flags = {"use_heuristic_damping": True, "use_exact_damping": True}
    with check.property(f"inverse of {text} with two strategies is refused"):
        check.raises((ValueError,), lambda: op.inverse(damping=1.0, **flags))
    if op.in_shape != op.out_shape:
        return True
    damping = matrix.scale / matrix.dim**0.5 or 1.0
    eye = torch.eye(matrix.dim, dtype=matrix.dense.dtype)
    damped = _Matrix(matrix.dense + damping * eye, check.eps, check.rtol, 2 * matrix.scale)
    strategies: list[dict[str, Any]] = [{"use_exact_damping": True}]
    if not any(isinstance(part, KroneckerProductLinearOperator) for part in leaves(op)):
        strategies += [{}, {"use_heuristic_damping": True}]
    try:
        for strategy in strategies:
            _inverse(check, text, op, damped, {"damping": damping, **strategy})
    except NotImplementedError:
        pass  # a product of operators has an inverse, but no damped one
    return True


def _eigh(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        decomposed = op.eigh()
    except ValueError:
        if matrix.hermitian:
            raise
        return False
    check.equals(decomposed, matrix.dense, matrix.scale)
    return True


def _sqrt(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        root = op.sqrt()
    except ValueError:
        if matrix.semi_definite:
            raise
        return False
    x = check.random(matrix.dim, check.num_columns)
    check.product(root @ (root @ x), matrix.dense, x, matrix.scale)
    if matrix.semi_definite:
        values, vectors = torch.linalg.eigh(matrix.dense)
        expected = (vectors * values.clamp(min=0).sqrt()) @ vectors.mH
        error = norm(wide(root.to_dense()) - expected)
        bound = matrix.dim * (check.rtol * matrix.scale) ** 0.5
        check.require(
            error <= bound, f"is not the principal root: off by {error:.3e} > {bound:.3e}"
        )
    return True


def _power(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        square = op.power(2)
    except ValueError:
        if matrix.hermitian:
            raise
        return False
    check.equals(square, matrix.dense @ matrix.dense, matrix.scale**2)
    with check.property(f"power(-1) of {text}"):
        try:
            inverse = op.power(-1)
        except ValueError:
            check.require(matrix.singular, "is refused")
            return True
        if not matrix.singular:
            expected = torch.linalg.inv(matrix.dense)
            check.equals(inverse, expected, norm(expected) * matrix.condition)
    return True


def _inverse_sqrt(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        root = op.inverse_sqrt()
    except ValueError:
        if matrix.positive:
            raise
        return False
    if matrix.singular:
        return True  # by so little that the operator does not see it
    expected = torch.linalg.inv(matrix.dense)
    x = check.random(matrix.dim, check.num_columns)
    check.product(root @ (root @ x), expected, x, norm(expected) * matrix.condition)
    if matrix.positive:
        values, vectors = torch.linalg.eigh(matrix.dense)
        expected = (vectors / values.sqrt()) @ vectors.mH
        check.close(wide(root.to_dense()), expected, norm(expected) * matrix.condition)
    return True


def _pinv(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    inverse = op.pinv()
    spaces = (inverse.in_shape, inverse.out_shape)
    check.require(spaces == (op.out_shape, op.in_shape), f"has spaces {spaces}")
    # half precision is decomposed in a wider dtype
    wider = torch.finfo(widened(torch.empty(0, dtype=check.dtype)).dtype).eps
    cutoff = matrix.cutoff * wider / check.eps
    large = matrix.singular_values[matrix.singular_values > cutoff]
    condition = matrix.scale / large.min().item() if large.numel() else 1.0
    expected = torch.linalg.pinv(matrix.dense, atol=cutoff, rtol=0.0)
    check.equals(inverse, expected, norm(expected) * condition)
    return True


def _sample(check: Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    shape, found = (matrix.dim, check.num_columns), False
    for inverse, fits in ((False, matrix.semi_definite), (True, matrix.positive)):
        with check.property(f"sample(inverse={inverse}) of {text}", optional=True):
            generator = torch.Generator(check.device).manual_seed(1)
            try:
                samples = op.sample(shape[1], generator=generator, inverse=inverse)
            except ValueError:
                if fits:
                    raise
                continue
            found = True
            if not inverse:
                check.require(fits, "is a sample, but the matrix is not positive semi-definite")
            check.require(op.dtype in (None, samples.dtype), f"has dtype {samples.dtype}")
            check.require(op.device in (None, samples.device), f"is on {samples.device}")
            generator.manual_seed(1)
            z = torch.randn(shape, generator=generator, dtype=samples.dtype, device=samples.device)
            root = op.inverse_sqrt() if inverse else op.sqrt()
            expected = wide(root @ z)
            check.close(samples, expected, norm(expected))
    return found


FORMS = {
    "trace": _trace,
    "diagonal": _diagonal,
    "frobenius_norm": _frobenius_norm,
    "slogdet": _slogdet,
    "inverse": _inverses,
    "eigh": _eigh,
    "sqrt": _sqrt,
    "power": _power,
    "inverse_sqrt": _inverse_sqrt,
    "pinv": _pinv,
    "sample": _sample,
}
_OF_EIGENVALUES = ("eigh", "sqrt", "power", "inverse_sqrt", "pinv", "sample")
"""What an operator has that can be eigendecomposed."""
