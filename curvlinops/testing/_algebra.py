"""Properties of an operator under arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops.testing._check import Check


def check_algebra(check: Check) -> None:
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
    names = op._in_names, op._out_names
    for text, result, wanted in (
        ("2 * A", 2 * op, names),
        ("A - 3 * A", op - 3 * op, names),
        ("A @ A.H @ A", op @ op.H @ op, names),
        ("A.H", op.H, names[::-1]),
        ("A.T", op.T, names[::-1]),
        ("2j * A", 2j * op, names),
    ):
        with check.property(f"names of {text}"):
            found = result._in_names, result._out_names
            check.require(found == wanted, f"are {found} instead of {wanted}")
