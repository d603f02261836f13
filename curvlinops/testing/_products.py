"""Properties of an operator's products, and of the operator as an object."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._saving import is_saveable
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.testing._check import OTHER, RTOL, Check, leaves, max_abs, split, storages, wide


def check_spaces(check: Check) -> None:
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


def check_determinism(check: Check) -> None:
    before = torch.random.get_rng_state()
    _check_side(check, "A @ x", check.op.__matmul__, check.op.in_shape, leading=False)
    _check_side(check, "x @ A", check.op.__rmatmul__, check.op.out_shape, leading=True)
    with check.property("the global random generator"):
        same = torch.equal(before, torch.random.get_rng_state())
        check.require(same, "is used by products, which are then not reproducible")


def _check_side(
    check: Check, side: str, multiply: Callable[[Any], Any], shapes: list[Size], leading: bool
) -> None:
    """Check that products on one side are reproducible and leave no traces."""
    dim = sum(shape.numel() for shape in shapes)
    x = check.random(check.num_columns, dim) if leading else check.random(dim, check.num_columns)
    copied, scale = x.clone(), check.norm * max_abs(x)
    with check.property(f"{side} leaves x as it is"):
        first = multiply(x)
        check.require(torch.equal(x, copied), "x was changed in place")
    with check.property(f"{side} twice"):
        check.close(multiply(x), first, scale)
    with check.property(f"{side} returns memory of its own"):
        parts = [part.clone() for part in split(x, shapes, leading)]
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


def check_linearity(check: Check) -> None:
    op, columns = check.op, check.op.shape[1]
    s, t = (2 - 1j, -30 + 1j) if check.dtype.is_complex else (2.0, -30.0)
    for name, shape in (("vectors", [columns]), ("matrices", [columns, check.num_columns])):
        with check.property(f"A @ (s x + t y) = s A @ x + t A @ y for {name}"):
            x, y = check.random(*shape), check.random(*shape)
            separate = s * wide(op @ x) + t * wide(op @ y)
            scale = check.norm * (abs(s) * max_abs(x) + abs(t) * max_abs(y))
            check.close(op @ (s * x + t * y), separate, scale)


def check_products(check: Check) -> None:
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


def check_adjoint(check: Check) -> None:
    op, dense = check.op, check.dense
    x, y = check.random(op.shape[1], check.num_columns), check.random(op.shape[0], 2)
    if op.SELF_ADJOINT:
        with check.property("SELF_ADJOINT needs a Hermitian matrix"):
            check.close(dense, dense.mH, check.norm)
    with check.property("dot test <y, A @ x> = <A.H @ y, x>"):
        scale = check.norm * max_abs(x) * max_abs(y) * max(op.shape) ** 0.5
        check.close(wide(y).mH @ wide(op @ x), wide(op.H @ y).mH @ wide(x), scale)
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


def check_formats(check: Check) -> None:
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
    check: Check,
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
    parts = split(flat.mT if leading and width else flat, shapes, leading)
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


def check_errors(check: Check) -> None:
    op, columns = check.op, check.op.shape[1]
    parts = split(check.random(columns), op.in_shape)
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
        other = check.random(columns).to(OTHER[op.dtype])
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


def check_to_dense(check: Check) -> None:
    op, columns = check.op, check.op.shape[1]
    for chunk_size in sorted({1, 2, max(columns - 1, 1), max(columns, 1), columns + 3}):
        with check.property(f"to_dense(chunk_size={chunk_size})"):
            check.close(op.to_dense(chunk_size=chunk_size), check.dense, check.norm)
    with check.property("to_dense()"):
        check.close(op.to_dense(), check.dense, check.norm)
    with check.property("to_dense(chunk_size=0) is refused"):
        check.raises((ValueError,), lambda: op.to_dense(chunk_size=0))


def check_scipy(check: Check) -> None:
    op, dense = check.op, check.dense
    with check.property("to_scipy()"):
        exported = op.to_scipy()
        check.require(tuple(exported.shape) == tuple(op.shape), f"has shape {exported.shape}")
        small = torch.finfo(check.dtype).bits < 32
        nearest = torch.empty(0, dtype=OTHER[check.dtype] if small else check.dtype).numpy().dtype
        same = op.dtype is None or exported.dtype == nearest
        check.require(same, f"has dtype {exported.dtype} instead of {nearest}")
    x, y = wide(check.random(op.shape[1], 2)), wide(check.random(op.shape[0], 3))
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


def check_copies(check: Check) -> None:
    op = check.op
    with check.property("copy.deepcopy"):
        copied = copy.deepcopy(op)
        check.require(type(copied) is type(op), f"is a {type(copied).__name__}")
        check.equals(copied, check.dense)
        check.require(not storages(op) & storages(copied), "shares tensors with the original")
    other = OTHER[check.dtype]
    try:
        with check.property(f".to({other})", optional=True):
            cast = op.to(other)
            check.require(type(cast) is type(op), f"is a {type(cast).__name__}")
            kept = cast.dtype is None if op.dtype is None else cast.dtype == other
            check.require(kept, f"has dtype {cast.dtype}")
            check.require(op.dtype in (None, check.dtype), "changed the original")
            x = check.random(op.shape[1], check.num_columns).to(other)
            coarser = max(1.0, RTOL[other.to_real()] / check.rtol)
            check.product(cast @ x, check.dense, x, coarser * check.norm)
    except NotImplementedError:
        pass  # an operator of a model cannot be cast without its model


def _check_same_forms(check: Check, other: PyTorchLinearOperator) -> None:
    """Check that a copy has the closed forms of the operator (that these are right: elsewhere)."""
    for form in ("trace", "diagonal", "frobenius_norm", "slogdet"):
        try:
            value = getattr(check.op, form)()
        except Exception:  # there is none
            continue
        copied = getattr(other, form)()
        parts = zip(value, copied, strict=True) if form == "slogdet" else [(value, copied)]
        for wanted, found in parts:
            same = torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
            check.require(same, f"has {form} {found} instead of {wanted}")


def check_saving(check: Check) -> None:
    op = check.op
    operators = [part for part in leaves(op) if isinstance(part, PyTorchLinearOperator)]
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
        _check_same_forms(check, loaded)
        for tensor in leaves(loaded):
            if isinstance(tensor, Tensor):
                stored, needed = tensor.untyped_storage().nbytes(), tensor.nbytes
                check.require(stored <= needed, f"a tensor of {needed} bytes takes {stored}")
    with check.property("torch.load(map_location)"):
        file.seek(0)
        loaded = torch.load(file, map_location="meta", weights_only=True)
        wanted = None if op.device is None else torch.device("meta")
        check.require(loaded.device == wanted, f"is on {loaded.device} instead of {wanted}")
        check.require(bool(repr(loaded)), "has no repr")
