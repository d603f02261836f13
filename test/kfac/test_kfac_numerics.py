"""What KFAC, EKFAC and KFOC say about factors and eigenvalues that cannot be right.

Factors are second moments: what is not finite, symmetric or positive semi-definite was planted.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import layer_setup
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops import (
    BlockDiagonalLinearOperator,
    EKFACLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops.computers import report
from curvlinops.computers.containers import flattened
from curvlinops.computers.eigenvalues import EigenvalueStatistic
from curvlinops.computers.kfoc import KFOCComputer
from curvlinops.computers.report import check_eigenvalues, check_finite, check_spectrum
from curvlinops.computers.singular_vectors import positive_part
from curvlinops.computers.statistics import CovarianceStatistic
from curvlinops.diag import DiagonalLinearOperator

OPERATORS = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
NAMES = ("0.weight", "2.weight")
F32, F64 = torch.float32, torch.float64


def build(operator: type[KFACLinearOperator] = KFACLinearOperator, **changes: Any) -> Any:
    """Build an operator of a small model."""
    model = changes.pop("model", None) or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    dtype = next(model.parameters()).dtype
    arguments = {
        "data": [(torch.rand(n, 4).to(dtype), torch.rand(n, 3).to(dtype)) for n in (3, 4)],
        "fisher_type": "type-2",
        "check_deterministic": False,
        **changes,
    }
    return operator(model, nn.MSELoss(), dict(model.named_parameters()), **arguments)


def plant(
    monkeypatch: pytest.MonkeyPatch, what: str, change: Callable[[Any], Any], name: str = NAMES[1]
) -> None:
    """Let the factors of one layer be others than they are."""

    def changed(pairs: list[Any]) -> list[Any]:
        (B, A), *rest = pairs
        return [(change(B), A) if what == "gradient" else (B, change(A)), *rest]

    right, blocks = CovarianceStatistic.factors, KFOCComputer.blocks

    def factors(self: Any, plan: Any, *args: Any) -> Any:
        pairs = right(self, plan, *args)
        return changed(pairs) if name in plan.key else pairs

    def kfoc_blocks(self: Any) -> Any:
        found = blocks(self)
        return {key: changed(x) if name in key else x for key, x in found.items()}

    monkeypatch.setattr(CovarianceStatistic, "factors", factors)
    monkeypatch.setattr(KFOCComputer, "blocks", kfoc_blocks)


def entry(i: int, j: int, value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that changes an entry to a multiple of the largest one."""

    def change(factor: Tensor) -> Tensor:
        result = factor.clone()
        result[i, j] = value * factor.diagonal().max()
        return result

    return change


def both(i: int, j: int, value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that changes an entry and its mirror image."""
    return lambda factor: entry(j, i, value)(entry(i, j, value)(factor))


PLANTED = {
    "nan": (entry(1, 2, math.nan), "has non-finite values. Check the data"),
    "inf": (entry(1, 1, math.inf), "has non-finite values. Check the data"),
    "below": (entry(2, 0, 0.9), r"is not symmetric: its entries \[0, 2\] and \[2, 0\] are"),
    "above": (entry(0, 2, -0.9), r"is not symmetric: its entries \[0, 2\] and \[2, 0\] are"),
    "diagonal": (entry(1, 1, -0.1), "is not positive semi-definite: its diagonal entry 1 is -"),
    "minor": (
        both(0, 2, 2.0),
        r"is not positive semi-definite: its entry \[0, 2\] is .* entries 0",
    ),
    "rectangle": (lambda factor: factor[:, :-1], "is not symmetric: its shape is"),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("what", ["input", "gradient"])
@pytest.mark.parametrize("kind", PLANTED)
def test_wrong_factors(operator: Any, what: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    """An error that names the layer, the factor and the entry."""
    change, message = PLANTED[kind]
    plant(monkeypatch, what, change)
    with pytest.raises(RuntimeError, match=f"The {what} factor of '2.weight' {message}"):
        build(operator)


@pytest.mark.parametrize("operator", OPERATORS)
def test_joint_groups_are_named_by_both(operator: Any, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "input", entry(0, 2, -0.9), NAMES[0])
    with pytest.raises(RuntimeError, match=r"input factor of '0.weight', '0.bias' is not sym"):
        build(operator, separate_weight_and_bias=False)


@pytest.mark.parametrize("operator", OPERATORS)
def test_wrong_diagonal_factors(operator: Any, monkeypatch: pytest.MonkeyPatch):
    def change(factor: DiagonalLinearOperator) -> DiagonalLinearOperator:
        values = factor.diagonal().clone()
        values[2] = -values.max()
        return DiagonalLinearOperator([values])

    plant(monkeypatch, "input", change)
    with pytest.raises(RuntimeError, match=r"input factor of '2.weight' is not.* diagonal entry 2"):
        build(operator, max_factor_size=4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_diagonals_that_are_not_finite(value: float):
    for factor in (DiagonalLinearOperator([torch.tensor([1.0, value])]), torch.tensor([[value]])):
        with pytest.raises(RuntimeError, match="gradient factor of 'w' has non-finite values"):
            check_finite(("w",), None, factor)


# ---- what is known not to be wrong ---------------------------------------------------------------
def test_own_sums_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    """Those of a small network would take some of its time. Non-finite ones are found all the same.

    Others are compared: the nearest Kronecker product to a sum of two.
    """
    compared: list[Tensor] = []
    look = report._looks_symmetric

    def noted(values: Tensor, scale: Tensor) -> bool:
        compared.append(values)
        return look(values, scale)

    monkeypatch.setattr(report, "_looks_symmetric", noted)
    build()
    build(EKFACLinearOperator)
    assert not compared
    data = [(torch.full((2, 4), 1e30), torch.rand(2, 3))]
    with pytest.raises(RuntimeError, match=r"input factor of '0.weight' has non-finite"):
        build(data=data)
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    build(model=nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), tied, nn.Linear(4, 3)))
    assert not compared
    setup = layer_setup("head")
    KFACLinearOperator(**setup.kwargs())
    assert compared


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_own_sums_that_somebody_changed(operator: Any, monkeypatch: pytest.MonkeyPatch):
    """In place, so that it is the same tensor."""

    def change(factor: Tensor) -> Tensor:
        factor[0, 2] = -0.9 * factor.diagonal().max()
        return factor

    plant(monkeypatch, "input", change)
    with pytest.raises(RuntimeError, match=r"'2.weight' is not symmetric: its entries \[0, 2\]"):
        build(operator)


@pytest.mark.parametrize("merged", [False, True])
def test_sums_that_were_read_from_a_file(merged: bool):
    """Catches: that they count as sums of this process, also if they are added to such sums."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    arguments: Any = (model, nn.MSELoss(), dict(model.named_parameters()))
    first, other = (KFACAccumulator(*arguments, fisher_type="type-2") for _ in range(2))
    for accumulator in (first, other):
        accumulator.update(torch.rand(6, 4), torch.rand(6, 3))
    state = first.state_dict()
    totals = [total for total in flattened(state) if total.shape == (5, 5)]
    assert totals
    for total in totals:
        total[1, 3] = total[3, 1] = 9 * total.diagonal().max()
    first.load_state_dict(state)
    if merged:
        other.merge(first)
        first = other
    with pytest.raises(RuntimeError, match=r"not positive semi-definite: its entry \[1, 3\]"):
        first.to_operator()


def test_hints_say_where_to_look(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "input", entry(0, 2, -0.9))
    with pytest.raises(RuntimeError, match="sums of outer products: check layers and losses that"):
        build()


# ---- what is no more than rounding ---------------------------------------------------------------
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["few", "constant", "tiny", "large", "graded"])
def test_no_false_alarms(operator: Any, dtype: torch.dtype, joint: bool, kind: str):
    """Singular and badly scaled factors are built without an error or warning."""
    X = torch.rand(2, 4)
    if kind == "constant":
        X = X[:1].expand(60, 4).contiguous()
    X = X * {"tiny": 1e-12, "large": 1e6}.get(kind, 1)
    if kind == "graded":
        X = X * torch.tensor([1e-20, 1e-9, 1.0, 1e5])
    y = torch.rand(len(X), 3)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    with warnings.catch_warnings():  # KFOC may say that it has not converged
        warnings.filterwarnings("ignore", "The nearest Kronecker products", UserWarning)
        K = build(
            operator,
            model=model,
            data=[(X.to(dtype), y.to(dtype))],
            separate_weight_and_bias=not joint,
        )
    assert K.to_dense().isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_how_much_is_rounding(dtype: torch.dtype, scale: float):
    """About 3 % of what the diagonal allows, at every scale; also next to much larger entries."""
    units = torch.tensor([1.0, 0.1, 0.1, 1.0]).to(dtype)

    def factor(upper: float, lower: float) -> Tensor:
        result = torch.eye(4, dtype=dtype)
        result[1, 2], result[2, 1] = upper, lower
        return scale * units.outer(units) * result

    for upper, lower in ((0.5, 0.53), (-0.5, -0.53), (1.03, 1.03), (-1.03, -1.03)):
        check_finite(("w",), factor(upper, lower), None)
    for upper, lower in ((0.5, 0.54), (-0.54, -0.5), (0.02, -0.02)):
        with pytest.raises(RuntimeError, match=r"'w' is not symmetric: its entries \[1, 2\]"):
            check_finite(("w",), factor(upper, lower), None)
    for value in (1.05, -1.05):
        with pytest.raises(RuntimeError, match=r"semi-definite: its entry \[1, 2\] is"):
            check_finite(("w",), None, factor(value, value))


def test_products_in_low_precision_count_as_rounding():
    """Those of a constant column are exact, others may not be."""
    rows = torch.rand(50, 6)
    rows[:, 3] = 1 + 2**-8 - 2**-20  # which bfloat16 rounds down most
    low = rows.bfloat16().float()
    joint = torch.zeros(7, 7)
    joint[:6, :6] = low.T @ low
    joint[:6, 6] = joint[6, :6] = rows.sum(0)
    joint[6, 6] = 50
    assert joint[3, 6] ** 2 > joint[3, 3] * joint[6, 6] * 1.001
    check_finite(("w",), joint, None)


@pytest.mark.parametrize("i", [0, 10, 255, 256, 599])
@pytest.mark.parametrize("j", [0, 255, 256, 300, 598])
@pytest.mark.parametrize("mirror", [False, True])
def test_all_entries_are_looked_at(i: int, j: int, mirror: bool):
    """Large factors are compared in tiles; the message has the place of the worst entry."""
    factor = torch.eye(600)
    small, large = sorted((i, j))
    if i == j:
        factor[i, j] = -1
        message = f"its diagonal entry {i} is -1"
    elif mirror:
        factor[i, j] = factor[j, i] = -3
        message = (
            rf"its entry \[{small}, {large}\] is -3, more than .* {small} and {large}, 1 and 1"
        )
    else:
        factor[i, j] = 0.5
        values = "0.5 and 0" if i < j else "0 and 0.5"
        message = rf"its entries \[{small}, {large}\] and \[{large}, {small}\] are {values}"
    with pytest.raises(RuntimeError, match=message):
        check_finite(("w",), None, factor)


def test_checks_need_little_memory():
    """No copy of a factor is made, nor is it decomposed."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple) else [result]:
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() != own:
                    largest = max(largest, each.numel())
            assert "linalg" not in func.name()
            return result

    rows = torch.rand(8, 600)
    factor = rows.T @ rows
    factor[0, 1] *= 1 + 1e-6
    own = factor.untyped_storage().data_ptr()
    with Watch():
        check_finite(("w",), factor, None)
    assert largest <= 2**16 < factor.numel()


# ---- eigendecompositions -------------------------------------------------------------------------
def indefinite(factor: Tensor) -> Tensor:
    """A matrix with an eigenvalue -0.8, whose 2 × 2 minors are positive."""
    result = torch.eye(len(factor), dtype=factor.dtype)
    result[:3, :3] = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    return result


@pytest.mark.parametrize("what", ["input", "gradient"])
def test_negative_eigenvalues_of_factors(what: str, monkeypatch: pytest.MonkeyPatch):
    """EKFAC warns; KFAC does not look, and cannot be inverted."""
    plant(monkeypatch, what, indefinite)
    message = f"The {what} factor of '2.weight' is not .*definite: its .* between -0.8 and 1.9"
    with pytest.warns(UserWarning, match=message) as record:
        build(EKFACLinearOperator)
    assert len(record) == 1
    K = build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inverting factor", UserWarning)
        with pytest.raises(RuntimeError, match="not positive definite"):
            K.inverse(1e-3)


def test_how_much_of_a_spectrum_is_rounding():
    for values in ([-1e-4, 0.0, 1.0], [0.0, 0.0], [-1e-12, 1e3], []):
        check_spectrum(("w",), "input", torch.tensor(values))
    check_spectrum(("w",), "input", torch.tensor([-0.02, 1.0], dtype=torch.bfloat16))
    check_spectrum(("w",), "input", torch.cat([torch.tensor([-5e-3]), torch.ones(8191)]))
    for values in ([-1e-3, 1.0], [-1.0, -0.5], [-1e-5, 0.0], [-1e-3, 0.5, 1.0]):
        with pytest.warns(UserWarning, match=r"input factor of 'w' is not positive semi-definite"):
            check_spectrum(("w",), "input", torch.tensor(values))


def test_failing_eigendecompositions_name_the_layer(monkeypatch: pytest.MonkeyPatch):
    right = torch.linalg.eigh

    def eigh(matrix: Tensor) -> Any:
        if matrix.dtype == F32:
            raise torch.linalg.LinAlgError("no convergence")
        return right(matrix)

    torch.manual_seed(0)
    expected = build(EKFACLinearOperator).to_dense()
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="failed in torch.float32; retrying") as record:
        E = build(EKFACLinearOperator)
    texts = [str(each.message) for each in record]
    for name in ("0.weight", "2.weight", "0.bias", "2.bias"):
        for what in ("input", "gradient"):
            count = sum(
                f"Eigendecomposing the {what} factor of '{name}' failed" in t for t in texts
            )
            assert count == (what == "gradient" or "weight" in name)
    torch.testing.assert_close(E.to_dense(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * math.nan, "'2.weight' are not finite. Check the data, the parameters"),
        (lambda t: t + math.inf, "'2.weight' are not finite. Check the data, the parameters"),
        (lambda t: -t, "'2.weight' are between -.* but sums of squares are not negative"),
        (lambda t: t - 0.1 * t.max(), "'2.weight' are between -.* but sums of squares are not neg"),
    ],
)
def test_wrong_eigenvalues(change: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    right = EigenvalueStatistic.totals

    def totals(self: Any) -> Any:
        found = right(self)
        return [(p, [*map(change, x)] if NAMES[1] in p.key else x) for p, x in found]

    monkeypatch.setattr(EigenvalueStatistic, "totals", totals)
    with pytest.raises(RuntimeError, match=f"The eigenvalues of {message}"):
        build(EKFACLinearOperator)


def test_how_much_of_an_eigenvalue_is_rounding():
    check_eigenvalues(("w",), torch.tensor([[0.0, -1e-7], [0.5, 1.0]]))
    check_eigenvalues(("w",), torch.zeros(0, 3))
    for values in ([[-1e-5, 1.0]], [[-1e-30, 0.0]], [[-1e-5, 0.1], [0.5, 1.0]]):
        with pytest.raises(RuntimeError, match="eigenvalues of 'w', 'b' are between -1"):
            check_eigenvalues(("w", "b"), torch.tensor(values))


class Balanced(nn.Module):
    """Embeddings of a sequence with weights whose sum is zero, up to rounding."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.embedding = nn.Embedding(2, 3)
        self.weights = nn.Buffer(torch.cat([weights, -weights.sum(0, keepdim=True)]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.embedding(x) * self.weights.unsqueeze(-1)).sum(1)


def test_sums_that_cancel_are_not_negative():
    """The gradients of equal tokens cancel; products of two roundings may have any sign."""
    for _ in range(20):
        weights = torch.randn(199)
        E = build(
            EKFACLinearOperator,
            model=Balanced(weights),
            data=[(torch.zeros(1, 200).long(), torch.rand(1, 3))],
            fisher_type="empirical",
        )
        assert E.block("embedding.weight").eigenvalues.min() >= 0


class Grouped(nn.Module):
    """A convolution with channel groups, whose block has blocks, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 6, 1, groups=2)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(torch.tanh(self.first(x)).unsqueeze(-1)).flatten(1))


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_errors_of_blocks_name_the_parameters(joint: bool) -> None:
    """All forms that look at blocks one by one, also of what was made of the operator.

    Catches: the index of a channel group in place of that of its layer, and the names of another
    block.
    """
    K = build(model=Grouped().double(), separate_weight_and_bias=not joint)
    for name in [name for group in K.mapping for name in group.values()]:
        for part in K.factors(name):
            for factor in part if isinstance(part, list) else [part]:
                factor.copy_(torch.eye(len(factor)))
    for index, group in enumerate(K.mapping):
        names = ", ".join(map(repr, group.values()))
        A = copy.deepcopy(K)
        block: Any = A[1][index]
        if isinstance(block, BlockDiagonalLinearOperator):
            block = block[1]  # of the second channel group
        block[0].fill_diagonal_(-1.0)
        dampings = [math.nan if i == index else 1.0 for i in range(len(A[1]))]
        calls: list[tuple[Any, str, Callable[[], Any]]] = [
            (RuntimeError, "Cannot invert factor 0 of .* not positive definite", A.inverse),
            (RuntimeError, "Cannot invert", lambda A=A: (2 * A).inverse(1e-3)),
            (ValueError, "The power 0.5 .* is not real", A.sqrt),
            (ValueError, "The power -0.5", lambda A=A: A.sample(inverse=True)),
            (ValueError, "is NaN", lambda A=A, d=dampings: A.inverse(d, use_exact_damping=True)),
        ]
        for kind, message, call in calls:
            with pytest.raises(kind, match=message) as info:
                call()
            assert str(info.value).count("The block of ") == 1
            assert f"The block of {names}: " in str(info.value)


def test_errors_of_eigendecompositions_name_the_parameters() -> None:
    """A block that a user has replaced may be no symmetric matrix."""
    K = build(model=Grouped().double())
    index = [list(group.values()) for group in K.mapping].index(["last.weight"])
    K[1][index] = KroneckerProductLinearOperator(torch.rand(3, 3).double(), torch.eye(6).double())
    with pytest.raises(ValueError, match=r"The block of 'last.weight': .* is not Hermitian"):
        K.eigh()


def test_other_errors_have_no_names() -> None:
    """What is not about a block stays as it was: keywords, and operators without parameters."""
    K = build()
    with pytest.raises(TypeError, match=r"^inverse\(\) got unexpected keywords"):
        K.inverse(guess=1)
    with pytest.raises(ValueError, match=r"^<.*> needs one damping for each of its 4 blocks"):
        K.inverse([1.0])
    B = BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.zeros(2)])])
    with pytest.raises(RuntimeError, match=r"^Cannot invert"):
        B.inverse()


def test_positive_parts_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails to be decomposed is not called a factor, which it is not."""

    def fails(matrix: Tensor) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(RuntimeError, match="Cannot eigendecompose a singular vector, as a matrix"):
        positive_part(torch.eye(2))
    with pytest.raises(RuntimeError, match="Cannot eigendecompose the planted one"):
        positive_part(torch.eye(2), "the planted one")
