"""EKFAC and KFOC as operators, against dense matrices: closed forms, powers, damped inverses."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from block_checks import parts_of
from layer_cases import layer_setup
from torch import Tensor, nn

from curvlinops import (
    EighDecomposedLinearOperator,
    EKFACLinearOperator,
    IdentityLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.testing import check_operator

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

DAMPING = 0.05
each_class = pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
each_joint = pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
#: Several parts of one weight; diagonal factors; tied weights; norm layers; attention.
SINGULAR = ("conv2d-groups", "transposed1d", "embedding", "gpt", "mlp-norms", "three-attention")


@cache
def full_rank(cls: Any, joint: bool) -> Any:
    """Return an operator of full rank: there are many more data than parameters."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.RMSNorm(2), nn.Linear(2, 2)).double()
    data = [(torch.randn(n, 2, 3).double(), torch.randn(n, 2, 2).double()) for n in (30, 20)]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    params = dict(model.named_parameters())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": not joint}
    return cls(model, nn.MSELoss(reduction="sum"), params, data, **options)


@cache
def singular(cls: Any, name: str) -> Any:
    """Return an operator of some layers, with eigenvalues that are 0."""
    arguments = layer_setup(name).kwargs()
    options = {"loss_terms": "exact", "separate_weight_and_bias": False}
    return cls(**arguments, fisher_type="type-2", **options)


def eye(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


def spectral(matrix: Tensor, function: Any) -> Tensor:
    """Return a function of a symmetric matrix."""
    values, Q = torch.linalg.eigh(matrix)
    return Q @ function(values).diag() @ Q.T


def check_closed_forms(A: Any, matrix: Tensor) -> None:
    """Compare what every structured operator has with the dense matrix."""
    scale = matrix.abs().max()
    torch.testing.assert_close(A.to_dense(), matrix, rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(A.trace(), matrix.trace())
    torch.testing.assert_close(A.diagonal(), matrix.diagonal())
    torch.testing.assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    sign, logabsdet = torch.linalg.slogdet(matrix)
    torch.testing.assert_close(A.logdet(), logabsdet)
    torch.testing.assert_close(A.det(), sign * logabsdet.exp())
    torch.testing.assert_close(A.slogdet(), (sign, logabsdet))
    v = torch.rand(len(matrix), dtype=matrix.dtype)
    torch.testing.assert_close(A @ v, matrix @ v)


@each_joint
@each_class
def test_closed_forms(cls: Any, joint: bool) -> None:
    A = full_rank(cls, joint)
    matrix = A.to_dense()
    assert torch.linalg.cond(matrix) < 1e4
    check_closed_forms(A, matrix)
    check_closed_forms(3 * A, 3 * matrix)
    check_closed_forms(A / 2, matrix / 2)
    check_closed_forms(A.T, matrix)
    check_closed_forms(A + DAMPING * identity(A), matrix + DAMPING * eye(matrix))
    check_closed_forms(A.eigh(), matrix)
    values = torch.cat([block.eigenvalues for block in A.eigh()[1]])
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(matrix))


@each_joint
@each_class
def test_powers(cls: Any, joint: bool) -> None:
    A = full_rank(cls, joint)
    matrix = A.to_dense()
    check_closed_forms(A.sqrt(), spectral(matrix, torch.sqrt))
    for p in (2, 0.5, 1.3, -1, -0.5):
        check_closed_forms(A.power(p), spectral(matrix, lambda values, p=p: values**p))
    torch.testing.assert_close((A.sqrt() @ A.sqrt()).to_dense(), matrix)
    torch.testing.assert_close((A.power(-0.5) @ A @ A.power(-0.5)).to_dense(), eye(matrix))
    torch.testing.assert_close((A**2).to_dense(), matrix @ matrix)
    torch.testing.assert_close((A**0).to_dense(), eye(matrix))


@each_joint
@each_class
def test_inverse(cls: Any, joint: bool) -> None:
    A = full_rank(cls, joint)
    matrix = A.to_dense()
    check_closed_forms(A.inverse(), torch.linalg.inv(matrix))
    exact = {"use_exact_damping": True} if cls is KFOCLinearOperator else {}
    damped = A.inverse(damping=DAMPING, **exact)
    check_closed_forms(damped, torch.linalg.inv(matrix + DAMPING * eye(matrix)))
    check_closed_forms(damped.inverse(), matrix + DAMPING * eye(matrix))
    check_closed_forms(damped.sqrt(), spectral(matrix, lambda x: (x + DAMPING) ** -0.5))
    torch.testing.assert_close((A @ A.inverse()).to_dense(), eye(matrix))


@pytest.mark.parametrize("name", SINGULAR)
@each_class
def test_singular(cls: Any, name: str) -> None:
    A = singular(cls, name)
    matrix = A.to_dense()
    torch.testing.assert_close(A.trace(), matrix.trace())
    torch.testing.assert_close(A.diagonal(), matrix.diagonal())
    torch.testing.assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    assert A.det().abs() < 1e-12
    root = A.sqrt()
    torch.testing.assert_close((root @ root).to_dense(), matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(A.power(2).to_dense(), matrix @ matrix)
    damped = matrix + DAMPING * eye(matrix)
    check_closed_forms(A + DAMPING * identity(A), damped)
    exact = {"use_exact_damping": True} if cls is KFOCLinearOperator else {}
    inverse = A.inverse(damping=DAMPING, **exact)
    check_closed_forms(inverse, torch.linalg.inv(damped))
    assert all(isinstance(p, EighDecomposedLinearOperator) for b in inverse[1] for p in parts_of(b))


@each_joint
@each_class
def test_conforms(cls: Any, joint: bool) -> None:
    A = full_rank(cls, joint)
    check_operator(A, A.to_dense())
    assert A.SELF_ADJOINT


@each_joint
def test_assigned_eigenvalues_count(joint: bool) -> None:
    """Nothing stale is kept when a block's eigenvalues are replaced."""
    E = copy.deepcopy(full_rank(EKFACLinearOperator, joint))
    before = E.to_dense()
    check_closed_forms(E, before)
    for block in E[1]:
        block.eigenvalues = 2 * block.eigenvalues + 1
    check_closed_forms(E, 2 * before + eye(before))
    check_closed_forms(E.inverse(), torch.linalg.inv(2 * before + eye(before)))


def identity(A: Any) -> IdentityLinearOperator:
    return IdentityLinearOperator(A.in_shape, A.device, A.dtype)
