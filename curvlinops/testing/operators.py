"""What every linear operator must do, checked against its dense matrix."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from math import isfinite
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Size, Tensor

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._saving import is_saveable
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator

_RTOL = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
_OTHER = {
    torch.float64: torch.float32,
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex128: torch.complex64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex64,
}


def check_operator(
    op: PyTorchLinearOperator,
    dense: Tensor | None = None,
    *,
    rtol: float | None = None,
    num_columns: int = 3,
    seed: int = 0,
    skip: Collection[str] = (),
) -> None:
    r"""Check that an operator does what every operator must do.

    Call it in the tests of a new operator, with a small instance (ten columns, say) and, if there
    is an independent way to compute it, its matrix. The parameters of a good test space have
    different sizes along every axis, so that swapped axes do not pass. The properties, by group:

    ========================  ===================================================================
    ``"spaces"``              shapes, ``SELF_ADJOINT``, ``device``, ``dtype``, ``repr``
    ``"determinism"``         two equal products; the global random generator, the input and the
                              memory of the input stay untouched; no gradients are recorded; also
                              inside of ``torch.inference_mode()``
    ``"linearity"``           :math:`A (s x + t y) = s A x + t A y`
    ``"products"``            vectors and matrices, with one column and without any
    ``"adjoint"``             :math:`\langle y, A x \rangle = \langle A^* y, x \rangle`, ``A.H``,
                              ``A.T`` (without conjugation), ``x @ A``, and ``SELF_ADJOINT``
    ``"formats"``             lists, tuples and dicts (where there are names), on both sides, are
                              returned as they are given
    ``"errors"``              inputs and operators of a wrong shape, name, dtype, device or type
    ``"to_dense"``            several chunk sizes
    ``"scipy"``               all four products of ``to_scipy()``, of real and complex vectors
    ``"copies"``              ``copy.deepcopy``, ``.to(dtype)``
    ``"algebra"``             multiples, sums, differences, products, powers, and their adjoints
    ``"closed forms"``        ``trace diagonal frobenius_norm slogdet inverse eigh sqrt power``
                              (``det`` and ``logdet`` with ``slogdet``): exact where they do not
                              raise ``NotImplementedError``, also of multiples, adjoints, shifts by
                              :math:`\delta I` and inverses; of a rectangular matrix an error that
                              is both a ``ValueError`` and a ``RuntimeError``
    ``"saving"``              ``torch.save`` and ``torch.load`` with its safe default and with
                              ``map_location``, for types that can be saved
    ========================  ===================================================================

    Nothing is printed, and no global random generator is used.

    Args:
        op: The operator.
        dense: Its matrix ``[rows, columns]``, best computed in another way and in float64 or
            complex128. Without it the matrix comes from ``op @ I``; the properties then still
            check each other.
        rtol: Largest error, relative to the size of a typical result. Default: 1e-9 for float64,
            1e-4 for float32, 2e-2 for float16, 5e-2 for bfloat16.
        num_columns: The number of columns of the matrices to multiply; at least 2.
        seed: Fixes the vectors to multiply.
        skip: Groups from the table, or single closed forms, to leave out.

    Raises:
        AssertionError: If a property does not hold. The message names the first such property and
            says by how much it fails.
        ValueError: If ``skip`` names no group, or arguments do not fit together.

    Example:
        >>> import torch
        >>> from curvlinops import PyTorchLinearOperator
        >>> from curvlinops.testing import check_operator
        >>> class Flip(PyTorchLinearOperator):
        ...     SELF_ADJOINT = True
        ...     def _matmat(self, X):
        ...         return [x.flip(0) for x in X]
        >>> check_operator(Flip([(4,)], [(4,)]), torch.eye(4).flip(0))
        >>> class Wrong(Flip):
        ...     def _matmat(self, X):
        ...         return [x.cumsum(0) for x in X]
        >>> check_operator(Wrong([(4,)], [(4,)]))
        Traceback (most recent call last):
        AssertionError: <4×4 operator Wrong>: adjoint: SELF_ADJOINT needs a Hermitian matrix: ...
    """
    unknown = sorted(set(skip) - set(_GROUPS) - set(_FORMS))
    if unknown:
        raise ValueError(f"Cannot skip {unknown}: choose from {[*_GROUPS, *_FORMS]}.")
    if num_columns < 2:
        raise ValueError(f"num_columns must be at least 2, got {num_columns}.")
    check = _Check(op, dense, rtol, num_columns, seed, frozenset(skip))
    for group, function in _GROUPS.items():
        if group not in skip:
            check.group = group
            function(check)


class _Check:
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
            raise ValueError(f"dense has shape {list(dense.shape)}, but op is {op!r}.")
        self.op, self.num_columns, self.skip = op, num_columns, skip
        self.group, self.name = "spaces", ""
        self.generator = torch.Generator().manual_seed(seed)
        default = torch.get_default_dtype()
        if dense is not None and dense.is_complex():
            default = default.to_complex()
        self.dtype = op.dtype or default
        self.device = op.device or torch.device("cpu")
        self.eps = torch.finfo(self.dtype).eps
        self.rtol = _RTOL[self.dtype.to_real()] if rtol is None else rtol
        with self.property("A @ I"):
            eye = torch.eye(op.shape[1], device=self.device, dtype=self.dtype)
            self.dense = _wide(op @ eye if dense is None else dense)
        self.norm = _norm(self.dense)

    def random(self, *shape: int) -> Tensor:
        """Return normally distributed numbers in the operator's dtype."""
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        numbers = torch.randn(shape, generator=self.generator, dtype=wide)
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
        self.require(shapes[0] == shapes[1], f"has shape {shapes[0]} instead of {shapes[1]}")
        if not actual.numel():
            return
        actual, expected = _wide(actual), _wide(expected)
        # equal infinities do not differ
        difference = torch.where(actual == expected, 0, (actual - expected).abs())
        error, tolerance = difference.max().item(), self.rtol * scale
        within = error <= tolerance  # not so for NaN
        self.require(within, f"max abs error {error:.3e} exceeds the tolerance {tolerance:.3e}")

    def product(self, actual: Tensor, matrix: Tensor, x: Tensor, scale: float = 0.0) -> None:
        """Fail if a tensor is not the product of a matrix (of at least some norm) with x."""
        dtype = torch.promote_types(matrix.dtype, _wide(x).dtype)
        expected = matrix.to(dtype) @ _wide(x).to(dtype)
        self.close(actual, expected, max(_norm(matrix), scale) * _max_abs(x))

    def equals(self, op: PyTorchLinearOperator, matrix: Tensor, scale: float = 0.0) -> None:
        """Fail if an operator does not multiply as a dense matrix does."""
        self.require(
            isinstance(op, PyTorchLinearOperator), f"is a {type(op).__name__}, not an operator"
        )
        self.require(op.shape == matrix.shape, f"is {op!r} instead of {list(matrix.shape)}")
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


def _wide(x: Tensor) -> Tensor:
    """Return a tensor on the CPU in double precision."""
    return x.detach().to("cpu", torch.complex128 if x.is_complex() else torch.float64)


def _norm(matrix: Tensor) -> float:
    """Return the Frobenius norm."""
    return torch.linalg.matrix_norm(_wide(matrix)).item()


def _max_abs(x: Tensor) -> float:
    """Return the largest absolute value, 0 if there is none."""
    return _wide(x).abs().max().item() if x.numel() else 0.0


def _split(x: Tensor, shapes: list[Size], leading: bool = False) -> list[Tensor]:
    """Split ``[N]``, ``[N, K]`` or (leading) ``[K, N]`` into the tensors of a space."""
    columns = [x.shape[0 if leading else 1]] if x.ndim == 2 else []
    parts = x.split([shape.numel() for shape in shapes], dim=-1 if leading else 0)
    return [
        part.reshape((*columns, *shape) if leading else (*shape, *columns))
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _leaves(item: Any) -> Iterator[Any]:
    """Iterate over the operators and tensors in an operator (itself the first)."""
    if isinstance(item, (Tensor, PyTorchLinearOperator)):
        yield item
    if isinstance(item, PyTorchLinearOperator):
        item = item._state()
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (list, tuple)):
        for value in item:
            yield from _leaves(value)


def _storages(op: PyTorchLinearOperator) -> set[int]:
    """Return the addresses of the memory of an operator's tensors."""
    tensors = [x for x in _leaves(op) if isinstance(x, Tensor)]
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
def _check_spaces(check: _Check) -> None:
    op = check.op
    for space in ("in_shape", "out_shape"):
        with check.property(space):
            shapes = getattr(op, space)
            good = isinstance(shapes, list) and all(isinstance(s, Size) for s in shapes)
            check.require(good and len(shapes) > 0, f"is no list of torch.Size: {shapes!r}")
    with check.property("shape"):
        sizes = [sum(s.numel() for s in shapes) for shapes in (op.out_shape, op.in_shape)]
        check.require(list(op.shape) == sizes, f"is {list(op.shape)} instead of {sizes}")
    with check.property("dtype"):
        real = op.dtype is not None and not op.dtype.is_complex
        check.require(
            not (real and check.dense.is_complex()), f"is {op.dtype}, but the matrix is complex"
        )
    with check.property("SELF_ADJOINT"):
        same = op.in_shape == op.out_shape
        check.require(
            not op.SELF_ADJOINT or same, f"is true between {op.in_shape} and {op.out_shape}"
        )
    with check.property("repr"):
        check.require(bool(repr(op).strip()) and repr(op) == repr(op), f"is {op!r}")


def _check_determinism(check: _Check) -> None:
    before = torch.random.get_rng_state()
    _check_side(check, "A @ x", check.op.__matmul__, check.op.in_shape, leading=False)
    _check_side(check, "x @ A", check.op.__rmatmul__, check.op.out_shape, leading=True)
    with check.property("the global random generator"):
        same = torch.equal(before, torch.random.get_rng_state())
        check.require(same, "is used by products, which are then not reproducible")


def _check_side(
    check: _Check, side: str, multiply: Callable[[Any], Any], shapes: list[Size], leading: bool
) -> None:
    """Check that products on one side are reproducible and leave no traces."""
    dim = sum(shape.numel() for shape in shapes)
    x = check.random(check.num_columns, dim) if leading else check.random(dim, check.num_columns)
    copied, scale = x.clone(), check.norm * _max_abs(x)
    with check.property(f"{side} twice"):
        first = multiply(x)
        check.close(multiply(x), first, scale)
    with check.property(f"{side} leaves x as it is"):
        check.require(torch.equal(x, copied), "x was changed in place")
    with check.property(f"{side} returns memory of its own"):
        parts = [part.clone() for part in _split(x, shapes, leading)]
        given = {part.untyped_storage().data_ptr() for part in parts}
        returned = {part.untyped_storage().data_ptr() for part in multiply(parts)}
        check.require(not given & returned, "the result shares memory with x")
    with check.property(f"{side} keeps dtype and device"):
        found, wanted = (first.dtype, first.device), (x.dtype, x.device)
        check.require(found == wanted, f"returned {found} for {wanted}")
    with check.property(f"{side} records no gradients"):
        result = multiply(x.clone().requires_grad_())
        check.require(not result.requires_grad, "the result requires a gradient")
    with check.property(f"{side} inside of torch.inference_mode()"), torch.inference_mode():
        check.close(multiply(x.clone()), first.clone(), scale)


def _check_linearity(check: _Check) -> None:
    op, columns = check.op, check.op.shape[1]
    s, t = (2 - 1j, -30 + 1j) if check.dtype.is_complex else (2.0, -30.0)
    for name, shape in (("vectors", [columns]), ("matrices", [columns, check.num_columns])):
        with check.property(f"A @ (s x + t y) = s A @ x + t A @ y for {name}"):
            x, y = check.random(*shape), check.random(*shape)
            separate = s * _wide(op @ x) + t * _wide(op @ y)
            scale = check.norm * (abs(s) * _max_abs(x) + abs(t) * _max_abs(y))
            check.close(op @ (s * x + t * y), separate, scale)


def _check_products(check: _Check) -> None:
    op, x = check.op, check.random(check.op.shape[1], check.num_columns)
    cases = {
        "a matrix": x,
        "a matrix that is transposed in memory": x.T.contiguous().T,
        "a vector": x[:, 0],
        "one column": x[:, :1],
        "zero columns": x[:, :0],
    }
    for name, given in cases.items():
        with check.property(f"A @ x for {name}"):
            check.product(op @ given, check.dense, given)


def _check_adjoint(check: _Check) -> None:
    op, dense = check.op, check.dense
    x, y = check.random(op.shape[1], check.num_columns), check.random(op.shape[0], 2)
    if op.SELF_ADJOINT:
        with check.property("SELF_ADJOINT needs a Hermitian matrix"):
            check.close(dense, dense.mH, check.norm)
    with check.property("dot test <y, A @ x> = <A.H @ y, x>"):
        scale = check.norm * _max_abs(x) * _max_abs(y) * max(op.shape) ** 0.5
        check.close(_wide(y).mH @ _wide(op @ x), _wide(op.H @ y).mH @ _wide(x), scale)
    with check.property("A.H"):
        adjoint = op.H
        spaces = adjoint.in_shape, adjoint.out_shape
        check.require(spaces == (op.out_shape, op.in_shape), f"has spaces {spaces}")
        found = adjoint.dtype, adjoint.device
        check.require(found == (op.dtype, op.device), f"has {found}")
        check.equals(adjoint, dense.mH)
        check.equals(op.adjoint(), dense.mH)
    for name, transform, matrix in (
        ("A.T", lambda: op.T, dense.mT),
        ("A.H.H", lambda: op.H.H, dense),
        ("A.T.T", lambda: op.T.T, dense),
        ("A.H.T", lambda: op.H.T, dense.conj()),
    ):
        with check.property(name):
            check.equals(transform(), matrix)
    cases = {"a matrix": y, "a vector": y[:, 0], "one row": y[:, :1], "zero rows": y[:, :0]}
    for name, given in cases.items():
        with check.property(f"x @ A for {name}"):
            result = (given.mT if given.ndim == 2 else given) @ op
            check.product(result.mT if given.ndim == 2 else result, dense.mT, given)


def _check_formats(check: _Check) -> None:
    op, dense = check.op, check.dense
    spaces = [(op.in_shape, op._in_names), (op.out_shape, op._out_names)]
    for side, matrix, (given, returned) in (
        ("A @ x", dense, spaces),
        ("x @ A", dense.mT, spaces[::-1]),
    ):
        containers = ["list", "tuple", *([] if given[1] is None else ["dict"])]
        for container in containers:
            for width in ([], [check.num_columns], [1], [0]):
                what = f"matrices with {width[0]} columns" if width else "vectors"
                with check.property(f"{side} for a {container} of {what}"):
                    _check_format(check, container, width, matrix, given, returned, side == "x @ A")


def _check_format(
    check: _Check,
    container: str,
    width: list[int],
    matrix: Tensor,
    given: tuple[list[Size], list[str] | None],
    returned: tuple[list[Size], list[str] | None],
    leading: bool,
) -> None:
    """Check the product in one format, with a column axis if there is a width."""
    (shapes, names), (result_shapes, result_names) = given, returned
    flat = check.random(matrix.shape[1], *width)  # [N] or [N, K]
    parts = _split(flat.mT if leading and width else flat, shapes, leading)
    x: Any = tuple(parts) if container == "tuple" else parts
    if container == "dict":
        assert names is not None
        x = dict(reversed(list(zip(names, parts, strict=True))))  # the order must not matter
        container = "dict" if result_names is not None else "list"
    result = x @ check.op if leading else check.op @ x
    found = type(result).__name__
    check.require(found == container, f"returned a {found} instead of a {container}")
    if container == "dict":
        keys = list(result)
        check.require(keys == result_names, f"returned keys {keys} instead of {result_names}")
        result = list(result.values())
    wanted = [[*width, *s] if leading else [*s, *width] for s in result_shapes]
    sizes = [list(r.shape) for r in result]
    check.require(sizes == wanted, f"returned shapes {sizes} instead of {wanted}")
    columns = [r.movedim(0, -1) if leading and width else r for r in result]
    rows = [c.reshape(s.numel(), *width) for c, s in zip(columns, result_shapes, strict=True)]
    check.product(torch.cat(rows), matrix, flat)


def _check_errors(check: _Check) -> None:
    op, columns = check.op, check.op.shape[1]
    parts = _split(check.random(columns), op.in_shape)
    matrices = [torch.stack([p, p, p], dim=-1) for p in parts]
    larger = IdentityLinearOperator([(columns + 1,)], check.device, check.dtype)
    wrong: list[tuple[str, type[Exception], Any]] = [
        ("a vector that is too long", ValueError, check.random(columns + 1)),
        ("a matrix with too many rows", ValueError, check.random(columns + 1, 2)),
        ("a tensor with three axes", ValueError, check.random(columns, 2, 2)),
        ("a list with a tensor too many", ValueError, [*parts, parts[0]]),
        ("a list of tensors with too many axes", ValueError, [m.unsqueeze(-1) for m in matrices]),
        ("an empty list", ValueError, []),
        ("a dict with an unknown name", ValueError, {"no such name": parts[0]}),
        ("an operator of another shape", ValueError, larger),
        ("a list of numbers", TypeError, [1.0]),
        ("text", TypeError, "x"),
    ]
    if len(parts) > 1:
        wrong.append(("a vector and matrices", ValueError, [parts[0], *matrices[1:]]))
        other_width = [matrices[0][..., :2], *matrices[1:]]
        wrong.append(("matrices with different columns", ValueError, other_width))
    if op.dtype is not None:
        other = check.random(columns).to(_OTHER[op.dtype])
        wrong.append(("a vector of another dtype", ValueError, other))
    if op.device is not None:
        elsewhere = torch.empty(columns, device="meta", dtype=check.dtype)
        wrong.append(("a vector on another device", ValueError, elsewhere))
    for given, error, x in wrong:
        with check.property(f"A @ {given} is refused"):
            check.raises((error,), lambda x=x: op @ x)  # type: ignore[misc]
    with check.property("A + an operator of another shape is refused"):
        check.raises((ValueError,), lambda: op + larger)
    with check.property("A + 1 is refused"):
        check.raises((TypeError,), lambda: op + 1)


def _check_to_dense(check: _Check) -> None:
    op, columns = check.op, check.op.shape[1]
    for chunk_size in sorted({1, 2, max(columns - 1, 1), max(columns, 1), columns + 3}):
        with check.property(f"to_dense(chunk_size={chunk_size})"):
            check.close(op.to_dense(chunk_size=chunk_size), check.dense, check.norm)
    with check.property("to_dense()"):
        check.close(op.to_dense(), check.dense, check.norm)
    with check.property("to_dense(chunk_size=0) is refused"):
        check.raises((ValueError,), lambda: op.to_dense(chunk_size=0))


def _check_scipy(check: _Check) -> None:
    op, dense = check.op, check.dense
    with check.property("to_scipy()"):
        exported = op.to_scipy()
        check.require(tuple(exported.shape) == tuple(op.shape), f"has shape {exported.shape}")
        small = torch.finfo(check.dtype).bits < 32
        nearest = torch.empty(0, dtype=_OTHER[check.dtype] if small else check.dtype).numpy().dtype
        same = op.dtype is None or exported.dtype == nearest
        check.require(same, f"has dtype {exported.dtype} instead of {nearest}")
    x, y = _wide(check.random(op.shape[1], 2)), _wide(check.random(op.shape[0], 3))
    for name, matrix, z in (
        ("matvec", dense, x[:, 0]),
        ("rmatvec", dense.mH, y[:, 0]),
        ("matmat", dense, x),
        ("rmatmat", dense.mH, y),
    ):
        for kind, given in (("", z), (" of complex numbers", (1 - 2j) * z)):
            with check.property(f"to_scipy().{name}{kind}"):
                result = getattr(exported, name)(given.numpy())
                check.product(torch.from_numpy(result), matrix, given)
    with check.property("to_scipy(dtype)"):
        double = np.dtype(np.complex128 if check.dtype.is_complex else np.float64)
        found = op.to_scipy(double).dtype
        check.require(found == double, f"has dtype {found} instead of {double}")


def _check_copies(check: _Check) -> None:
    op = check.op
    with check.property("copy.deepcopy"):
        copied = copy.deepcopy(op)
        check.require(type(copied) is type(op), f"is a {type(copied).__name__}")
        check.equals(copied, check.dense)
        check.require(not _storages(op) & _storages(copied), "shares tensors with the original")
    other = _OTHER[check.dtype]
    try:
        with check.property(f".to({other})", optional=True):
            cast = op.to(other)
            check.require(type(cast) is type(op), f"is a {type(cast).__name__}")
            kept = cast.dtype is None if op.dtype is None else cast.dtype == other
            check.require(kept, f"has dtype {cast.dtype}")
            check.require(op.dtype in (None, check.dtype), "changed the original")
            x = check.random(op.shape[1], check.num_columns).to(other)
            coarser = max(1.0, _RTOL[other.to_real()] / check.rtol)
            check.product(cast @ x, check.dense, x, coarser * check.norm)
    except NotImplementedError:
        pass  # an operator of a model cannot be cast without its model


# --------------------------------------------------------------------------------------------------
# Algebra
# --------------------------------------------------------------------------------------------------
def _check_algebra(check: _Check) -> None:
    op, A, norm = check.op, check.dense, check.norm
    # name, operator, matrix, and the norm of what is computed on the way
    cases: list[tuple[str, Callable[[], Any], Tensor, float]] = [
        ("2 * A", lambda: 2 * op, 2 * A, 0),
        ("A * 0.5", lambda: op * 0.5, A / 2, 0),
        ("numpy.float64(2) * A", lambda: np.float64(2) * op, 2 * A, 0),
        ("torch.tensor(2.0) * A", lambda: torch.tensor(2.0) * op, 2 * A, 0),
        ("A / 2", lambda: op / 2, A / 2, 0),
        ("-A", lambda: -op, -A, 0),
        ("A + A", lambda: op + op, 2 * A, 0),
        ("3 * A - A", lambda: 3 * op - op, 2 * A, 4 * norm),
        ("A - A", lambda: op - op, 0 * A, 2 * norm),
        ("sum([A, A, A])", lambda: sum([op, op, op]), 3 * A, 0),
        ("A @ A.H", lambda: op @ op.H, A @ A.mH, norm**2),
        ("A.H @ A", lambda: op.H @ op, A.mH @ A, norm**2),
        ("A.T @ A", lambda: op.T @ op, A.mT @ A, norm**2),
        ("A @ A.H @ A", lambda: op @ op.H @ op, A @ A.mH @ A, norm**3),
        ("(A @ (2 * A.T)).H", lambda: (op @ (2 * op.T)).H, 2 * (A @ A.mT).mH, 2 * norm**2),
        ("(A + 2 * A).T", lambda: (op + 2 * op).T, 3 * A.mT, 0),
        ("(2j * A).H", lambda: (2j * op).H, -2j * A.mH, 0),
        ("(2j * A).T", lambda: (2j * op).T, 2j * A.mT, 0),
        ("(2j * A) @ (1j * A).H", lambda: (2j * op) @ (1j * op).H, 2 * A @ A.mH, 2 * norm**2),
    ]
    if op.in_shape == op.out_shape:
        eye = torch.eye(len(A), dtype=A.dtype)
        size = norm + 3 * len(A) ** 0.5
        cases += [
            ("A ** 0", lambda: op**0, eye, 0),
            ("A ** 1", lambda: op**1, A, 0),
            ("A ** 2", lambda: op**2, A @ A, norm**2),
            ("A + 3 * A**0", lambda: op + 3 * op**0, A + 3 * eye, size),
            ("3 * A**0 - A", lambda: 3 * op**0 - op, 3 * eye - A, size),
            (
                "(2j * A + 3j * A**0).H",
                lambda: (2j * op + 3j * op**0).H,
                (2j * A + 3j * eye).mH,
                2 * size,
            ),
            ("A @ (A + 3 * A**0)", lambda: op @ (op + 3 * op**0), A @ A + 3 * A, norm * size),
        ]
    for name, combine, matrix, scale in cases:
        with check.property(name):
            result = combine()
            check.equals(result, matrix.to(torch.complex128) if "j" in name else matrix, scale)
            check.require(result.device == op.device, f"is on {result.device}")
            if op.dtype is not None and "j" not in name:
                check.require(result.dtype == op.dtype, f"has dtype {result.dtype}")


# --------------------------------------------------------------------------------------------------
# Closed forms
# --------------------------------------------------------------------------------------------------
class _Matrix:
    """A square dense matrix, and what its closed forms and their conditioning depend on."""

    def __init__(self, dense: Tensor, eps: float, rtol: float, scale: float):
        self.dense = dense
        self.dim = len(dense)
        self.scale = max(_norm(dense), scale)  # of what the matrix was computed from
        self.cutoff = 10 * max(self.dim, 1) * eps * self.scale
        self.hermitian = _norm(dense - dense.mH) <= rtol * self.scale

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


def _check_closed_forms(check: _Check) -> None:
    op, dense = check.op, check.dense
    if op.shape[0] != op.shape[1]:
        _check_rectangular(check)
        return
    forms = _check_forms(check, "A", op, dense)
    shape, norms = {"trace", "diagonal"}, {"trace", "frobenius_norm"}
    _check_forms(check, "2 * A", 2 * op, 2 * dense, forms)
    _check_forms(check, "(-A)", -op, -dense, forms)
    _check_forms(check, "A.H", op.H, dense.mH, forms - {"eigh", "sqrt", "power"})
    _check_forms(check, "(A + A)", op + op, 2 * dense, forms & shape)
    if op.in_shape == op.out_shape:
        shift = check.norm / len(dense) ** 0.5 or 1.0
        needed = forms & shape
        if norms <= forms:
            needed.add("frobenius_norm")
        if "eigh" in forms:
            needed |= {"slogdet", "inverse", "eigh", "sqrt", "power"}
        shifted = op + shift * op**0
        added = dense + shift * torch.eye(len(dense), dtype=dense.dtype)
        _check_forms(check, "(A + shift * I)", shifted, added, needed, 2 * check.norm)
    matrix = _Matrix(dense, check.eps, check.rtol, 0.0)
    if "inverse" in forms and not matrix.singular:
        inverse = _inverse(check, "A", op, matrix, {})
        if inverse is not None:
            kept = forms & {"trace", "diagonal", "frobenius_norm", "slogdet"}
            expected = torch.linalg.inv(dense)
            scale = matrix.condition * _norm(expected)
            _check_forms(check, "A.inverse()", inverse, expected, kept, scale)


def _check_rectangular(check: _Check) -> None:
    """Check that closed forms of square matrices are refused."""
    op = check.op
    for name in ("det", "logdet", *_FORMS):
        if name in check.skip or name == "frobenius_norm":
            continue
        arguments = (2,) if name == "power" else ()
        with check.property(f"{name} of a rectangular A is refused"):
            wanted = (ValueError, RuntimeError)
            check.raises(wanted, lambda n=name, a=arguments: getattr(op, n)(*a))  # type: ignore[misc]
    if "frobenius_norm" not in check.skip:
        try:
            with check.property("frobenius_norm of A", optional=True):
                norm = op.frobenius_norm()
                check.close(norm, torch.tensor(check.norm, dtype=norm.dtype), check.norm)
        except NotImplementedError:
            pass  # a closed form that the operator does not have


def _check_forms(
    check: _Check,
    text: str,
    op: PyTorchLinearOperator,
    dense: Tensor,
    needed: Collection[str] = (),
    scale: float = 0.0,
) -> set[str]:
    """Check the closed forms of a square operator; return those that it has."""
    matrix = _Matrix(dense, check.eps, check.rtol, scale)
    found = set()
    for form, function in _FORMS.items():
        if form in check.skip:
            continue
        with check.property(f"{form} of {text}"):
            try:
                if function(check, text, op, matrix):
                    found.add(form)
            except NotImplementedError as error:
                if form in needed:
                    check.fail(
                        f"is missing, although A has the closed forms for it: {error}", error
                    )
    return found


def _scalar(check: _Check, value: Tensor, op: PyTorchLinearOperator, real: bool = False) -> Tensor:
    """Check that a number is a 0-d tensor of the right dtype; return it in double precision."""
    check.require(isinstance(value, Tensor) and value.ndim == 0, f"is {value!r}, no 0-d tensor")
    wanted = op.dtype.to_real() if op.dtype is not None and real else op.dtype
    check.require(wanted in (None, value.dtype), f"has dtype {value.dtype} instead of {wanted}")
    return _wide(value)


def _trace(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    trace = _scalar(check, op.trace(), op)
    check.close(trace, matrix.dense.trace(), matrix.scale * matrix.dim**0.5)
    return True


def _diagonal(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    diagonal = op.diagonal()
    check.require(op.dtype in (None, diagonal.dtype), f"has dtype {diagonal.dtype}")
    check.close(diagonal, matrix.dense.diagonal(), matrix.scale)
    return True


def _frobenius_norm(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    # a norm from differences of squares has few digits if it is small: compare squares
    square = _scalar(check, op.frobenius_norm(), op, real=True) ** 2
    check.close(square, torch.tensor(_norm(matrix.dense) ** 2, dtype=square.dtype), matrix.scale**2)
    return True


def _slogdet(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
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
    check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix, arguments: dict[str, Any]
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
            check.equals(inverse, expected, _norm(expected) * matrix.condition)
    return inverse


def _inverses(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
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
    if not any(isinstance(part, KroneckerProductLinearOperator) for part in _leaves(op)):
        strategies += [{}, {"use_heuristic_damping": True}]
    try:
        for strategy in strategies:
            _inverse(check, text, op, damped, {"damping": damping, **strategy})
    except NotImplementedError:
        pass  # a product of operators has an inverse, but no damped one
    return True


def _eigh(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        decomposed = op.eigh()
    except ValueError:
        if matrix.hermitian:
            raise
        return False
    check.equals(decomposed, matrix.dense, matrix.scale)
    return True


def _sqrt(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
    try:
        root = op.sqrt()
    except ValueError:
        if matrix.semi_definite:
            raise
        return matrix.hermitian
    x = check.random(matrix.dim, check.num_columns)
    check.product(root @ (root @ x), matrix.dense, x, matrix.scale)
    if matrix.semi_definite:
        values, vectors = torch.linalg.eigh(matrix.dense)
        expected = (vectors * values.clamp(min=0).sqrt()) @ vectors.mH
        error = _norm(_wide(root.to_dense()) - expected)
        bound = matrix.dim * (check.rtol * matrix.scale) ** 0.5
        check.require(
            error <= bound, f"is not the principal root: off by {error:.3e} > {bound:.3e}"
        )
    return True


def _power(check: _Check, text: str, op: PyTorchLinearOperator, matrix: _Matrix) -> bool:
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
            check.equals(inverse, expected, _norm(expected) * matrix.condition)
    return True


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------
def _check_saving(check: _Check) -> None:
    op = check.op
    operators = [part for part in _leaves(op) if isinstance(part, PyTorchLinearOperator)]
    if not all(is_saveable(type(part)) for part in operators):
        return
    with check.property("torch.save"):
        file = io.BytesIO()
        torch.save(op, file)
    with check.property("torch.load"):
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        check.require(type(loaded) is type(op), f"is a {type(loaded).__name__}")
        for name in ("in_shape", "out_shape", "_in_names", "_out_names", "dtype", "device"):
            found, wanted = getattr(loaded, name), getattr(op, name)
            check.require(found == wanted, f"has {name} {found} instead of {wanted}")
        check.require(loaded.SELF_ADJOINT == op.SELF_ADJOINT, "has another SELF_ADJOINT")
        check.equals(loaded, check.dense)
        check.require(repr(loaded) == repr(op), f"is {loaded!r}")
        for tensor in _leaves(loaded):
            if isinstance(tensor, Tensor):
                stored, needed = tensor.untyped_storage().nbytes(), tensor.nbytes
                check.require(stored <= needed, f"a tensor of {needed} bytes takes {stored}")
    with check.property("torch.load(map_location)"):
        file.seek(0)
        loaded = torch.load(file, map_location="meta", weights_only=True)
        wanted = None if op.device is None else torch.device("meta")
        check.require(loaded.device == wanted, f"is on {loaded.device} instead of {wanted}")
        check.require(bool(repr(loaded)), "has no repr")


_FORMS = {
    "trace": _trace,
    "diagonal": _diagonal,
    "frobenius_norm": _frobenius_norm,
    "slogdet": _slogdet,
    "inverse": _inverses,
    "eigh": _eigh,
    "sqrt": _sqrt,
    "power": _power,
}
_GROUPS = {
    "spaces": _check_spaces,
    "determinism": _check_determinism,
    "linearity": _check_linearity,
    "products": _check_products,
    "adjoint": _check_adjoint,
    "formats": _check_formats,
    "errors": _check_errors,
    "to_dense": _check_to_dense,
    "scipy": _check_scipy,
    "copies": _check_copies,
    "algebra": _check_algebra,
    "closed forms": _check_closed_forms,
    "saving": _check_saving,
}
