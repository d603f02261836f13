"""Tests of ``curvlinops.diag``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from zoo import C128, F64

from curvlinops._algebra import IdentityLinearOperator
from curvlinops.diag import DiagonalLinearOperator

SHAPES = [(2, 3), (), (4,)]


def diagonal(*, positive: bool = False, dtype: torch.dtype = F64) -> DiagonalLinearOperator:
    """A diagonal on a space of three tensors, away from zero."""
    parts = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    if positive:
        parts = [part.abs() + 0.5 for part in parts]
    return DiagonalLinearOperator(parts)


def flat(operator: DiagonalLinearOperator) -> Tensor:
    return torch.cat([part.flatten() for part in operator.tensors()])


def test_order_of_entries() -> None:
    """The diagonal is in the shape of the space, row-major."""
    D = DiagonalLinearOperator([torch.tensor([[1.0, 2], [3, 4]]), torch.tensor(5.0)])
    assert D.in_shape == D.out_shape == [(2, 2), ()]
    assert torch.equal(D @ torch.ones(5), torch.tensor([1.0, 2, 3, 4, 5]))
    assert torch.equal(D.diagonal(), torch.tensor([1.0, 2, 3, 4, 5]))


def test_one_tensor() -> None:
    """One tensor stands for a list of one."""
    D = DiagonalLinearOperator(torch.ones(2, 2))
    assert D.in_shape == [(2, 2)]
    assert len(D.tensors()) == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "is empty"),
        ([torch.ones(2), torch.ones(2, dtype=F64)], "must share dtype and device"),
        ([torch.ones(2), torch.ones(2, device="meta")], "must share dtype and device"),
    ],
)
def test_constructor_refuses(parts: list[Tensor], message: str) -> None:
    """An empty list, and tensors that cannot be joined."""
    with pytest.raises(ValueError, match=message):
        DiagonalLinearOperator(parts)


def test_closed_under_arithmetic() -> None:
    """+ − × / @, shifts, inverses and powers of diagonal operators are diagonal ones."""
    A, B = diagonal(), diagonal(positive=True)
    a, b = flat(A), flat(B)
    eye = IdentityLinearOperator(SHAPES, "cpu", F64)
    for operator, expected in (
        (A + B, a + b),
        (A - B, a - b),
        (-A, -a),
        (3 * A, 3 * a),
        (torch.tensor(3.0) * A, 3 * a),
        (A / 4, a / 4),
        (A / B, a / b),
        (A @ B, a * b),
        (A @ B @ A, a * b * a),
        (A**3, a**3),
        (A**-2, a**-2),
        (A + 2 * eye, a + 2),
        (eye - A, 1 - a),
        (2 * eye @ A, 2 * a),
        (A.inverse(), 1 / a),
        (B.inverse(0.5), 1 / (b + 0.5)),
        (B.power(-1.5), b**-1.5),
        (A.power(3), a**3),
        (B.sqrt(), b**0.5),
        (A.H, a),
        (A.T, a),
        (A.eigh(), a),
        (sum([A, B, A]), 2 * a + b),
    ):
        assert type(operator) is DiagonalLinearOperator
        assert operator.in_shape == A.in_shape
        assert torch.allclose(operator.diagonal(), expected)


def test_complex() -> None:
    """Entries conjugate in the adjoint, not in the transpose; a complex multiple is complex."""
    A = diagonal(dtype=C128)
    assert torch.equal(A.H.diagonal(), flat(A).conj())
    assert torch.equal(A.T.diagonal(), flat(A))
    assert torch.allclose((A @ A.H).diagonal(), (flat(A).abs() ** 2).to(C128))
    assert torch.allclose((A @ A.H).sqrt().diagonal(), flat(A).abs().to(C128))
    multiple = 2j * diagonal()
    assert type(multiple) is DiagonalLinearOperator
    assert multiple.dtype == C128
    assert not multiple.SELF_ADJOINT
    assert diagonal().SELF_ADJOINT


def test_inverse_ignores_the_strategy() -> None:
    """Without Kronecker factors, every strategy is + damping I."""
    D = diagonal(positive=True)
    for strategy in (
        {},
        {"use_heuristic_damping": True, "min_damping": 10.0},
        {"use_exact_damping": True},
        {"retry_double_precision": False},
    ):
        assert torch.allclose(D.inverse(0.5, **strategy).diagonal(), 1 / (flat(D) + 0.5))


def test_inverse_of_singular() -> None:
    """A zero is refused, also one that damping makes; other damping helps."""
    D = DiagonalLinearOperator([torch.tensor([1.0, 0]), torch.tensor(-0.5)])
    with pytest.raises(
        RuntimeError, match=r"Cannot invert .*Diag\(3\).* with damping 0.0 it has zer"
    ):
        D.inverse()
    with pytest.raises(RuntimeError, match=r"damping 0.5"):
        D.inverse(0.5)
    assert torch.allclose(D.inverse(1.0).diagonal(), torch.tensor([0.5, 1, 2]))
    assert D.logdet() == -torch.inf
    assert D.det() == 0


def test_sign_of_the_determinant() -> None:
    """An odd number of negative entries makes NaN, an even one does not."""
    D = DiagonalLinearOperator([torch.tensor([-1.0, 2, 3])])
    assert torch.isnan(D.logdet())
    assert D.slogdet()[0] == -1
    two = DiagonalLinearOperator([torch.tensor([-1.0, -2, 3])])
    assert torch.allclose(two.logdet(), torch.tensor(6.0).log())


def test_eigh_of_complex() -> None:
    """Complex entries that are real numbers make a Hermitian operator, others do not."""
    values = torch.tensor([1, 2], dtype=C128)
    assert torch.equal(DiagonalLinearOperator([values]).eigh().diagonal(), values)
    with pytest.raises(ValueError, match="complex and not Hermitian"):
        DiagonalLinearOperator([1j * values]).eigh()
    with pytest.raises(ValueError, match="is not real"):
        diagonal().sqrt()


def test_frobenius_norm() -> None:
    """The norm of all entries, over all tensors."""
    D = DiagonalLinearOperator([torch.tensor([3.0]), torch.tensor([[4.0]])])
    assert D.frobenius_norm() == 5


def test_division_by_others() -> None:
    """Numbers divide, a singular diagonal does not, a list does not."""
    D = diagonal()
    with pytest.raises(RuntimeError, match="zeros on its diagonal"):
        D / (0 * D)
    with pytest.raises(TypeError):
        D / [1.0]


NAMES = ["W", "scale", "b"]


def named(operator: DiagonalLinearOperator) -> DiagonalLinearOperator:
    return DiagonalLinearOperator(operator.tensors(), NAMES)


def test_names_survive() -> None:
    """Whatever makes a diagonal operator of one or two keeps the names of the one that has them."""
    A, B = named(diagonal(positive=True)), diagonal(positive=True)
    eye = IdentityLinearOperator(SHAPES, "cpu", F64)
    x = {name: torch.randn(shape, dtype=F64) for name, shape in zip(NAMES, SHAPES, strict=True)}
    flat_x = torch.cat([t.flatten() for t in x.values()])
    for operator in (
        *(A, A + B, B + A, A - B, B - A, A @ B, B @ A, A / B, B / A, 3 * A, -A, A / 4, A**3),
        *(A.inverse(), A.inverse(0.5), A.power(0.3), A.sqrt(), A.eigh(), A.H, A.T, A**-2),
        *(A + 2 * eye, eye - A, 2 * eye @ A, A @ eye, sum([B, A]), A._entrywise_squares()),
        *(A.to(F64), copy.deepcopy(A), A + DiagonalLinearOperator(A.tensors(), ["x", "y", "z"])),
    ):
        result = operator @ dict(reversed(x.items()))
        assert list(result) == NAMES
        expected = operator.diagonal() * flat_x
        assert torch.allclose(torch.cat([t.flatten() for t in result.values()]), expected)
        assert list(x @ operator) == NAMES
    with pytest.raises(ValueError, match="this space has no names"):
        (B + B) @ x


def test_names_of_complex() -> None:
    """The conjugate keeps names, too."""
    A = named(diagonal(dtype=C128))
    x = {name: torch.ones(shape, dtype=C128) for name, shape in zip(NAMES, SHAPES, strict=True)}
    for operator in (A.H, A.T, A._conjugate(), 2j * named(diagonal())):
        assert list(operator @ x) == NAMES


def test_names_are_saved() -> None:
    """Names are part of the file; files without them, of earlier versions, still load."""
    A = named(diagonal())
    file = io.BytesIO()
    torch.save([A, A.inverse(0.1), diagonal()], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert [D._in_names for D in loaded] == [NAMES, NAMES, None]
    assert [D._out_names for D in loaded] == [NAMES, NAMES, None]
    old = DiagonalLinearOperator._from_state({"diagonal": A.tensors()})
    assert old._in_names is None
    assert torch.equal(old.diagonal(), A.diagonal())


@pytest.mark.parametrize(
    "names", [["a", "b"], ["a", "b", "b"], ["a", "b", 3], [*"abca"], "abc", []]
)
def test_wrong_names(names: list[str]) -> None:
    """One name for each tensor, all different, and strings."""
    with pytest.raises(ValueError, match="names must be 3 different strings, got"):
        DiagonalLinearOperator(diagonal().tensors(), names)


def test_names_are_plain_strings() -> None:
    """The safe loader refuses subclasses; the caller's list is not kept."""

    class Name(str):
        pass

    names = [Name(name) for name in NAMES]
    D = DiagonalLinearOperator(diagonal().tensors(), names)
    names.clear()
    assert [type(name) for name in D._in_names or []] == [str] * 3


def test_conjugate_of_real() -> None:
    """A real diagonal is its own adjoint and transpose."""
    D = diagonal()
    assert D.T is D.H is D
