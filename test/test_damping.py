"""Damping of inverses: a number, one for each block, by parameter name, or from the block."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import C128, F64, ZOO, count_calls, general, kron, positive

from curvlinops import EKFACLinearOperator, KFACLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator as BlockDiagonal
from curvlinops.dense import TensorLinearOperator as Dense
from curvlinops.diag import DiagonalLinearOperator as Diagonal
from curvlinops.eigh import EighDecomposedLinearOperator as Eigh
from curvlinops.kfac_utils import FromCanonicalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator as Kron

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
EXACT: dict[str, Any] = {"use_exact_damping": True}
STRATEGIES: list[dict[str, Any]] = [{}, {"use_heuristic_damping": True}, EXACT]


def relative(block: PyTorchLinearOperator) -> Tensor:
    """A thousandth of the mean eigenvalue."""
    return 1e-3 * block.trace() / block.shape[0]


def blocks() -> list[PyTorchLinearOperator]:
    return [
        Kron(positive(2), positive(3)),
        Dense(positive(2)),
        Diagonal([torch.rand(2, dtype=F64) + 1]),
        Eigh(torch.rand(4, dtype=F64) + 1, Kron(torch.eye(2, dtype=F64), torch.eye(2, dtype=F64))),
    ]


def damped(matrix: Tensor, damping: Any) -> Tensor:
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def network(kind: type[KFACLinearOperator] = KFACLinearOperator, **kwargs: Any) -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(6, 3, dtype=F64), torch.tensor([0, 1, 0, 1, 1, 0]))]
    params = dict(model.named_parameters())
    return kind(model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2", **kwargs)


# --------------------------------------------------------------------------------------------------
# Values for each block
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("flat", [False, True])
def test_one_for_each_block(flat: bool, strategy: dict[str, Any]) -> None:
    """Each block gets its own value, together with the strategy; in every kind of sequence."""
    parts = blocks()
    B = BlockDiagonal(parts, flat)
    values = [0.1, 0.2, 0.4, 0.8]
    expected = torch.block_diag(
        *(b.inverse(v, **strategy).to_dense() for b, v in zip(parts, values, strict=True))
    )
    sequences: list[Any] = [values, tuple(values), torch.tensor(values), np.array(values)]
    sequences.append([0.1, torch.tensor(0.2, dtype=F64), lambda _: Fraction(2, 5), np.float64(0.8)])
    for sequence in sequences:
        inverse = B.inverse(sequence, **strategy)
        assert isinstance(inverse, BlockDiagonal) and inverse.flat == flat
        assert torch.allclose(inverse.to_dense(), expected, rtol=1e-6)
    exact = torch.block_diag(*(damped(b.to_dense(), v) for b, v in zip(parts, values, strict=True)))
    assert torch.allclose(B.inverse(values, **EXACT).to_dense(), exact)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_function_of_the_block(strategy: dict[str, Any]) -> None:
    """It is called once with each block itself, before anything is inverted."""
    parts = blocks()
    B = BlockDiagonal(parts)
    seen = []

    def rule(block: PyTorchLinearOperator) -> Tensor:
        seen.append(block)
        return relative(block)

    inverse = B.inverse(rule, **strategy)
    assert len(seen) == len(parts) and all(a is b for a, b in zip(seen, parts, strict=True))
    values = [1e-3 * b.to_dense().trace() / len(b.to_dense()) for b in parts]
    expected = B.inverse(values, **strategy).to_dense()
    assert torch.allclose(inverse.to_dense(), expected)
    assert not torch.allclose(B.inverse(values[0], **strategy).to_dense(), expected, rtol=1e-6)


def test_nested_blocks() -> None:
    """A function reaches the innermost blocks; the value of a nested block is that of all its."""
    inner = [Kron(positive(2), positive(2)), Kron(3 * positive(2), positive(2))]
    outer = Dense(positive(3))
    B = BlockDiagonal([BlockDiagonal(inner, flat=True), outer])
    parts = [*inner, outer]

    def expected(values: list[Any]) -> Tensor:
        return torch.block_diag(
            *(damped(b.to_dense(), v) for b, v in zip(parts, values, strict=True))
        )

    result = B.inverse(relative, **EXACT)
    assert torch.allclose(result.to_dense(), expected([relative(b) for b in parts]))
    assert torch.allclose(B.inverse([0.1, 0.2], **EXACT).to_dense(), expected([0.1, 0.1, 0.2]))
    result = B.inverse([[0.1, 0.3], lambda _: 0.2], **EXACT)
    assert torch.allclose(result.to_dense(), expected([0.1, 0.3, 0.2]))
    with pytest.raises(ValueError, match="one damping for each of its 2 blocks, got 3"):
        B.inverse([[0.1, 0.3, 0.4], 0.2])


def test_through_arithmetic() -> None:
    """Of a multiple, a shift, an adjoint and a chain, the blocks are those of the result."""
    shapes = {"a": (2, 3), "b": (2,)}
    P = FromCanonicalLinearOperator(shapes, [{"W": "a"}, {"b": "b"}], "cpu", F64)
    B = BlockDiagonal([Kron(positive(2), positive(3)), Kron(positive(2))])
    K = P @ B @ P.H
    eye = torch.eye(8, dtype=F64)
    order = P.to_dense()
    for operator, inside in (
        (K, B),
        (2 * K, 2 * B),
        (torch.tensor(2.0) * K, 2 * B),
        (K + 3 * K**0, B + 3 * B**0),
        (K.H.T, B),
        (-(-1 * K), B),
    ):
        for damping in (
            [0.1, 0.7],
            {"a": 0.1, "b": 0.7},
            lambda block: 0.1 if block.shape[0] == 6 else 0.7,
        ):
            result = operator.inverse(damping, **EXACT)
            assert isinstance(result, _ChainPyTorchLinearOperator)
            diagonal = torch.tensor([0.1] * 6 + [0.7] * 2).to(F64)
            expected = order @ torch.linalg.inv(inside.to_dense() + eye * diagonal) @ order.T
            assert torch.allclose(result.to_dense(), expected)
        traces = [relative(block) for block in inside]
        expected = operator.inverse(traces, **EXACT).to_dense()
        assert torch.allclose(operator.inverse(relative, **EXACT).to_dense(), expected)
    # of an inverse, the blocks are the inverses of the blocks
    result = K.inverse().inverse({"b": 0.7, "a": 0.1}, **EXACT).to_dense()
    expected = torch.linalg.inv(torch.linalg.inv(B.to_dense()) + eye * diagonal)
    assert torch.allclose(result, order @ expected @ order.T)


def test_wrappers() -> None:
    """A multiple, shift or adjoint around an operator resolves what its blocks look like."""

    class Blocks(PyTorchLinearOperator):
        """A user's operator, whose inverse knows numbers only."""

        def __init__(self, matrix: Tensor):
            super().__init__([(3,)], [(3,)])
            self.matrix = matrix

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [self.matrix @ X[0]]

        def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [self.matrix.mH @ X[0]]

        def trace(self) -> Tensor:
            return self.matrix.trace()

        def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
            assert not callable(damping)
            return Blocks(damped(self.matrix, damping))

    A = Blocks(general(3, 3, C128) + 4 * torch.eye(3))

    def rule(block: PyTorchLinearOperator) -> Tensor:
        return (0.1 + 0.2j) * block.trace()

    for operator in (2 * A, (1 + 1j) * A, A.H, A.T, A._conjugate(), 3 * A.H):
        matrix = operator.to_dense()
        result = operator.inverse(rule).to_dense()
        assert torch.allclose(result, damped(matrix, (0.1 + 0.2j) * matrix.trace()))
    B = BlockDiagonal([A, 2 * A])
    expected = torch.block_diag(*(damped(b.to_dense(), rule(b)) for b in B))
    assert torch.allclose(B.inverse(rule).to_dense(), expected)
    shifted = Kron(positive(2, C128)) + 0.5 * Kron(positive(2, C128)) ** 0
    result = shifted.inverse(relative).to_dense()
    assert torch.allclose(result, damped(shifted.to_dense(), relative(shifted)))


def test_traces_of_complex_blocks() -> None:
    """They are complex numbers without imaginary part, but a damping that is real.

    Else eigenvalues would become complex, Cholesky's decomposition would not apply, and the
    heuristic would refuse them.
    """
    K = Kron(positive(2, C128), positive(3, C128))
    assert relative(K).is_complex()
    assert K.inverse(relative, **EXACT).SELF_ADJOINT
    with count_calls(torch.linalg, "cholesky_ex") as calls:
        K.inverse(relative)
    assert len(calls) == 2
    expected = K.inverse(relative(K).real.item(), use_heuristic_damping=True).to_dense()
    assert torch.allclose(K.inverse(relative, use_heuristic_damping=True).to_dense(), expected)


ALONE = [
    "dense_positive",
    "diagonal",
    "diagonal_real_in_complex",
    "eigendecomposed_complex",
    "identity",
    "identity_multiple",
    "kronecker_positive_complex",
    "kronecker_with_diagonal",
    "multiple_zero",
    "shifted_kronecker_complex",
    "shifted_dense",
]


@pytest.mark.parametrize("name", ALONE)
def test_operator_without_blocks(name: str) -> None:
    """It is its own block; a function of it stays real if the trace is, also for complex dtypes."""
    operator, matrix = ZOO[name]()
    value = (matrix.trace() / len(matrix)).item() + 1.0
    if not abs(value.imag) > 1e-9:  # the result of a real damping is Hermitian
        value = value.real
    rule: Callable[[Any], Any] = lambda op: op.trace() / op.shape[0] + 1.0  # noqa: E731
    for strategy in (EXACT, {}):
        result = operator.inverse(rule, **strategy)
        assert torch.allclose(
            result.to_dense(), operator.inverse(value, **strategy).to_dense(), rtol=1e-6
        )
    assert torch.allclose(operator.inverse(rule, **EXACT).to_dense(), damped(matrix, value))
    with pytest.raises(ValueError, match=r"operator .* has no blocks, must be a number"):
        operator.inverse([0.1, 0.2])
    with pytest.raises(ValueError, match="by parameter name needs an operator that knows"):
        operator.inverse({"weight": 0.1})


@pytest.mark.parametrize("name", [*ALONE, "blocks", "canonical_chain", "chain_square"])
def test_wrong_values(name: str) -> None:
    """NaN and what is no number are ValueErrors; negative and complex numbers stay allowed."""
    operator = ZOO[name]()[0]
    for wrong in (torch.nan, torch.tensor(torch.nan), np.float64("nan"), lambda _: torch.nan):
        with pytest.raises(ValueError, match=r"damping of <.* is NaN"):
            operator.inverse(wrong)
    for wrong in ("1e-3", None, lambda _: "x", lambda _: None, object()):
        with pytest.raises(ValueError, match=r"damping of <.* must be a number"):
            operator.inverse(wrong)


# --------------------------------------------------------------------------------------------------
# KFAC
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_by_parameter_name(kind: type[KFACLinearOperator], strategy: dict[str, Any]) -> None:
    """Names find their blocks in any order, also in multiples, shifts and inverses of K."""
    K = network(kind)
    by_name = {name: 0.1 + index for index, name in enumerate(NAMES)}
    reordered = dict(reversed(by_name.items()))
    inverse = K.inverse(reordered, **strategy)
    B = inverse[1]
    for group, block in zip(K.mapping, B, strict=True):
        (name,) = group.values()
        expected = K.block(name).inverse(by_name[name], **strategy)
        assert torch.allclose(block.to_dense(), expected.to_dense())
    for operator in (2 * K, K + 0.5 * K**0):
        values = [by_name[name] for group in K.mapping for name in group.values()]
        expected = operator.inverse(values, **strategy).to_dense()
        assert torch.allclose(operator.inverse(reordered, **strategy).to_dense(), expected)
    twice = K.inverse(1.0, **strategy).inverse(reordered, **EXACT)
    assert isinstance(twice, _ChainPyTorchLinearOperator)


def test_joint_groups() -> None:
    """Weight and bias of one block have one value, given once or twice."""
    K = network(separate_weight_and_bias=False)
    expected = K.inverse([0.1, 0.2]).to_dense()
    for damping in (
        {"0.weight": 0.1, "2.bias": 0.2},
        dict(zip(NAMES, (0.1, 0.1, 0.2, 0.2), strict=True)),
        {"2.weight": torch.tensor(0.2, dtype=F64), "0.bias": 0.1},
    ):
        assert torch.allclose(K.inverse(damping).to_dense(), expected)
    with pytest.raises(ValueError, match=r"\['0.weight', '0.bias'\] share one block.*\[0.1, 0.3\]"):
        K.inverse({"0.weight": 0.1, "0.bias": 0.3, "2.bias": 0.2})


def test_channel_groups() -> None:
    """A function sees each channel group's product; the weight's value is that of all groups."""
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.Flatten()).double()
    data = [(torch.rand(5, 4, 3, 3, dtype=F64), torch.rand(5, 16, dtype=F64))]
    params = dict(model.named_parameters())
    K = KFACLinearOperator(model, nn.MSELoss(), params, data, fisher_type="type-2")
    (weight,) = params
    groups = K.block(weight)
    assert isinstance(groups, BlockDiagonal) and len(groups) == 2
    by_function, by_name = (
        K.inverse(relative, **EXACT)[1][0],
        K.inverse({weight: 0.3}, **EXACT)[1][0],
    )
    for index, group in enumerate(groups):
        matrix = kron(*group)
        expected = damped(matrix, 1e-3 * matrix.trace() / len(matrix))
        assert torch.allclose(by_function[index].to_dense(), expected)
        assert torch.allclose(by_name[index].to_dense(), damped(matrix, 0.3))


WRONG: list[tuple[Any, str]] = [
    ([0.1] * 3, "one damping for each of its 4 blocks, got 3"),
    ([0.1] * 5, "one damping for each of its 4 blocks, got 5"),
    (torch.ones(3), "one damping for each of its 4 blocks, got 3"),
    ([], "one damping for each of its 4 blocks, got 0"),
    ([0.1, 0.1, 0.1, "x"], "must be a number"),
    ([0.1, 0.1, 0.1, torch.nan], "is NaN"),
    ([0.1, 0.1, 0.1, [0.1]], "no blocks, must be a number"),
    ({"0.weight": 0.1}, r"no damping for the parameters \['0.bias'\]"),
    ({}, "no damping for the parameters"),
    (dict.fromkeys([*NAMES, "3.weight"], 0.1), r"no parameters \['3.weight'\].*0.weight"),
    ({**dict.fromkeys(NAMES, 0.1), "2.bias": torch.nan}, "is NaN"),
    ({**dict.fromkeys(NAMES, 0.1), "2.bias": None}, "must be a number"),
    (lambda block: torch.ones(2), "function that was given returned"),
    (lambda block: 0.1 if block.shape[0] > 2 else torch.nan, "is NaN"),
]


@pytest.mark.parametrize(("damping", "message"), WRONG)
def test_wrong_dampings_cost_nothing(damping: Any, message: str) -> None:
    """They are refused before the first block is decomposed."""
    K = network()
    for strategy in STRATEGIES:
        with (
            count_calls(torch.linalg, "cholesky_ex") as cholesky,
            count_calls(torch.linalg, "eigh") as eigh,
            pytest.raises(ValueError, match=message),
        ):
            K.inverse(damping, **strategy)
        assert not cholesky and not eigh


def test_names_of_other_operators() -> None:
    """A block-diagonal operator alone has no names; neither has one that is not P B Pᵀ."""
    B = BlockDiagonal(blocks())
    with pytest.raises(ValueError, match="by parameter name needs"):
        B.inverse(dict.fromkeys("abcd", 0.1))
    with pytest.raises(ValueError, match="by parameter name needs"):
        (Dense(positive(2)) @ Dense(positive(2))).inverse({"a": 0.1})
    with pytest.raises(ValueError, match="Heuristic damping needs a damping >= 0"):
        B.inverse([-0.1, 0.1, 0.1, 0.1], use_heuristic_damping=True)
    assert torch.allclose(B.inverse(-0.1, **EXACT).to_dense(), damped(B.to_dense(), -0.1))
