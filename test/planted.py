"""Operators of every structured kind with planted spectra.

An entry of ``STRUCTURES`` returns an operator, its eigenvalues and its dense eigenvectors, so that
every function of its matrix is known without decomposing it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from zoo import F64, kron, permutation, unitary

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator as BlockDiagonal
from curvlinops.dense import TensorLinearOperator as Dense
from curvlinops.diag import DiagonalLinearOperator as Diagonal
from curvlinops.eigh import EighDecomposedLinearOperator as Eigh
from curvlinops.kfac_utils import FromCanonicalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator as Kron

Planted = tuple[PyTorchLinearOperator, Tensor, Tensor]

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "well": lambda d: torch.linspace(0.5, 2, d, dtype=F64),
    "ill": lambda d: torch.logspace(1, -3, d, dtype=F64),  # a product of two: 1e8
    "clustered": lambda d: torch.tensor([1e-3, 1, 1 + 1e-12, 1 + 1e-6, 1, 1], dtype=F64)[:d],
    "singular": lambda d: torch.linspace(-0.5, 2, d, dtype=F64).clamp(min=0),
}
SHAPES = {"bias": (3,), "conv": (2, 2, 1), "weight": (3, 4)}
GROUPS = [{"W": "weight"}, {"b": "bias"}, {"W": "conv"}]
# where the entries of [weight, bias, conv] are in the parameter space [bias, conv, weight]
ORDER = [*range(12, 15), *range(15, 19), *range(12)]


def hermitian(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix with these eigenvalues, and its eigenvectors."""
    Q = unitary(len(values), dtype)
    return (Q * values) @ Q.mH, Q


def kron_values(*values: Tensor) -> Tensor:
    return kron(*(v.reshape(-1, 1) for v in values)).flatten()


def dense(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    values = spectrum(6)
    matrix, Q = hermitian(values, dtype)
    return Dense(matrix), values, Q


def kronecker(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    values = spectrum(3), spectrum(4)
    (A, Q), (B, R) = (hermitian(v, dtype) for v in values)
    return Kron(A, B), kron_values(*values), kron(Q, R)


def kronecker_with_diagonal(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    values = spectrum(3), spectrum(2)
    A, Q = hermitian(values[0], dtype)
    eye = torch.eye(2, dtype=dtype)
    K = Kron(A, Diagonal([values[1].to(dtype)]), IdentityLinearOperator([(2,)], dtype=dtype))
    return K, kron_values(*values, torch.ones(2, dtype=F64)), kron(Q, eye, eye)


def eigendecomposed(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    values, Q = spectrum(6), unitary(6, dtype)
    return Eigh(values, Q), values, Q


def diagonal(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    values = spectrum(6)
    first, second = values.to(dtype).split([2, 4])
    return Diagonal([first, second.reshape(2, 2)]), values, torch.eye(6, dtype=dtype)


def nested_blocks(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    (K, v, Q), (D, w, R) = kronecker(spectrum, dtype), dense(spectrum, dtype)
    flat = BlockDiagonal([K, D], flat=True)
    return BlockDiagonal([flat, D]), torch.cat([v, w, w]), torch.block_diag(Q, R, R)


def chain(blocks: list[PyTorchLinearOperator], dtype: torch.dtype) -> PyTorchLinearOperator:
    P = FromCanonicalLinearOperator(SHAPES, GROUPS, "cpu", dtype)
    return P @ BlockDiagonal(blocks) @ P.adjoint()


def kfac(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    """P B Pᵀ with Kronecker products, as KFAC."""
    values = [spectrum(d) for d in (3, 4, 3, 2, 2)]
    (B1, A1, B2, B3, A3), (Q1, R1, Q2, Q3, R3) = zip(
        *(hermitian(v, dtype) for v in values), strict=True
    )
    spectra = kron_values(*values[:2]), values[2], kron_values(*values[3:])
    P = permutation(ORDER, dtype)
    Q = P @ torch.block_diag(kron(Q1, R1), Q2, kron(Q3, R3))
    return chain([Kron(B1, A1), Kron(B2), Kron(B3, A3)], dtype), torch.cat(spectra), Q


def ekfac(spectrum: Callable[[int], Tensor], dtype: torch.dtype) -> Planted:
    """P B Pᵀ with eigendecomposed blocks, as EKFAC, and one whose input factor is diagonal."""
    bases = [[unitary(d, dtype) for d in dims] for dims in ((3, 4), (3,), (2, 2))]
    bases[2][1] = torch.eye(2, dtype=dtype)
    values = [spectrum(prod(map(len, basis))) for basis in bases]
    values[0] = spectrum(4).repeat(3)
    blocks = [Eigh(v, Kron(*basis)) for v, basis in zip(values[:2], bases[:2], strict=True)]
    eye = IdentityLinearOperator([(2,)], "cpu", dtype)
    blocks.append(Eigh(values[2], Kron(bases[2][0], eye)))
    Q = permutation(ORDER, dtype) @ torch.block_diag(*(kron(*basis) for basis in bases))
    return chain(blocks, dtype), torch.cat(values), Q


STRUCTURES = {
    f.__name__: f
    for f in (
        dense,
        kronecker,
        kronecker_with_diagonal,
        eigendecomposed,
        diagonal,
        nested_blocks,
        kfac,
        ekfac,
    )
}


def compose(values: Tensor, Q: Tensor) -> Tensor:
    return (Q * values) @ Q.mH
