"""In which precision Kronecker factors are computed, decomposed and stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    EKFACAccumulator,
    EKFACLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
    Precision,
)

CLASSES = [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]


class Net(nn.Module):
    """Channel groups, a normalisation, tokens, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embedding(x).mT)).mT
        return self.out(self.norm(x)).mean(1)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    data = [(torch.randint(6, (n, 5)), torch.randint(3, (n,))) for n in (8, 3)]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the same problem in float64."""
    model = copy.deepcopy(args[0]).double()
    return model, args[1], dict(model.named_parameters()), args[3]


def error(actual: Any, expected: Any) -> float:
    difference = actual.to_dense().double() - expected.to_dense()
    return float(difference.norm() / expected.to_dense().norm())


@pytest.mark.parametrize("cls", CLASSES)
def test_storage_and_factors(cls: Any) -> None:
    """float32 and bfloat16 against float64, with bounds; better factors give better results.

    Catches: factors that are rounded to the model's dtype before they are stored or decomposed.
    """
    options: dict[str, Any] = {"fisher_type": "type-2"}
    args = problem()
    expected = cls(*in_float64(args), **options)
    K = cls(*args, **options)
    assert K.dtype == torch.float32
    assert error(K, expected) < 1e-5
    wide = cls(*args, **options, precision=Precision(torch.float64, storage=torch.float64))
    assert wide.dtype == torch.float64
    assert error(wide, expected) < 2e-6  # what is left is the rounding of the passes
    args = problem(torch.bfloat16)
    expected = cls(*in_float64(args), **options)
    half = cls(*args, **options)
    assert half.dtype == torch.bfloat16
    assert error(half, expected) < 0.1
    stored = cls(*args, **options, precision=Precision(storage=torch.float32))
    assert stored.dtype == torch.float32
    assert error(stored, expected) < 0.05
    v = torch.rand(stored.shape[1])
    assert (stored @ v).dtype == torch.float32
    inverse = stored.inverse(1e-3, use_exact_damping=True)
    assert torch.allclose(inverse @ (stored @ v + 1e-3 * v), v, atol=1e-2)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("cls", CLASSES)
def test_narrow_factors_of_tied_weights(cls: Any, backend: str) -> None:
    """float32 factors of a float64 model, whose output layer has the weight of an embedding."""
    torch.manual_seed(0)
    embedding, output = nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 7, bias=False)
    output.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), output).double()
    data = [(torch.randint(7, (5, 3)), torch.randint(7, (5,)))]
    args = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    options: dict[str, Any] = {"fisher_type": "type-2", "backend": backend}
    narrow = cls(*args, **options, precision=Precision(factors=torch.float32))
    assert narrow.dtype == torch.float64
    assert 0 < error(narrow, cls(*args, **options)) < 1e-5


def test_sums_in_float32() -> None:
    """In bfloat16, many small terms are not lost: sums are in float32."""
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    n = 3000
    X = torch.ones(n, 2, dtype=torch.bfloat16)
    data = [(x, torch.zeros(len(x), 1, dtype=torch.bfloat16)) for x in X.split(500)]
    loss, params = nn.MSELoss(reduction="sum"), dict(model.named_parameters())
    precision = Precision(storage=torch.float32)
    K = KFACLinearOperator(model, loss, params, data, fisher_type="type-2", precision=precision)
    B, A = K.factors("weight")
    assert float(B) == pytest.approx(2 * n, rel=0.01)  # bfloat16 stops at 256
    assert torch.equal(A, torch.ones(2, 2))


def test_counts_of_tokens() -> None:
    """So are the counts of tokens, of which bfloat16 would lose some."""
    model = nn.Embedding(2, 3).to(torch.bfloat16)
    X = torch.zeros(20, 100, dtype=torch.long)
    X[0, 0] = 1
    y = torch.zeros(20, 100, 3, dtype=torch.bfloat16)
    params = dict(model.named_parameters())
    K = KFACLinearOperator(
        model, nn.MSELoss(), params, [(X, y)], precision=Precision(storage=torch.float32)
    )
    tokens = K.factors("weight")[1].diagonal()
    assert torch.allclose(tokens, torch.tensor([1999.0, 1.0]) / 2000, rtol=1e-6)


def test_decompositions() -> None:
    """Eigenvectors in float64 diagonalise better, also if they are stored in float32."""
    torch.manual_seed(0)
    model = nn.Linear(40, 2, bias=False)
    scales = torch.logspace(0, -5, 40)  # the condition of the factor is 1e10
    data = [(torch.randn(200, 40) * scales, torch.rand(200, 2))]
    args = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    seen: list[torch.dtype] = []
    original = torch.linalg.eigh

    def eigh(matrix: Tensor, *rest: Any) -> Any:
        seen.append(matrix.dtype)
        return original(matrix, *rest)

    torch.linalg.eigh = eigh  # type: ignore[assignment]
    try:
        precision = Precision(decompositions=torch.float64)
        E = EKFACLinearOperator(*args, precision=precision)
        EKFACLinearOperator(*args)
    finally:
        torch.linalg.eigh = original
    assert seen == [torch.float64] * 2 + [torch.float32] * 2
    assert E.dtype == torch.float32
    _, Q = E.factors("weight")
    K = KFACLinearOperator(*args)
    A = K.factors("weight")[1].double()
    rotated = Q.double().T @ A @ Q.double()
    off_diagonal = rotated - rotated.diag().diag()
    assert off_diagonal.norm() < 1e-6 * A.norm()


@pytest.mark.parametrize("cls", CLASSES)
def test_device(cls: Any) -> None:
    """What is stored is on the wanted device; "meta" stands for another one here."""
    args = problem()
    K = cls(*args, precision=Precision(device="cpu"))
    assert K.device == torch.device("cpu")
    assert torch.equal(K.to_dense(), cls(*args).to_dense())


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls: Any) -> None:
    """The model runs in autocast's dtype, and the factors are float32.

    Catches: products of factors in bfloat16, which the first layer's input would show.
    """
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.rand(50, 6), torch.randint(3, (50,)))]
    args = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    options: dict[str, Any] = {"fisher_type": "type-2"}
    expected = cls(*args, **options)
    with torch.autocast("cpu", torch.bfloat16):
        K = cls(*args, **options)
    assert K.dtype == torch.float32
    dense, reference = K.to_dense(), expected.to_dense()
    difference = float((dense - reference).norm() / reference.norm())
    assert 1e-5 < difference < 0.03  # it was used, and for the model only
    if cls is KFACLinearOperator:
        assert torch.equal(K.factors("0.weight")[1], expected.factors("0.weight")[1])


def test_autocast_of_training() -> None:
    """So it is for the steps of a training loop, and for updates."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    X, y = torch.rand(50, 6), torch.randint(3, (50,))
    loss, params = nn.CrossEntropyLoss(), dict(model.named_parameters())
    options: dict[str, Any] = {"fisher_type": "empirical"}
    expected = KFACLinearOperator(model, loss, params, [(X, y)], **options)
    E = EKFACLinearOperator(model, loss, params, [(X, y)], **options)
    for cls, extra, reference in ((KFACAccumulator, (), expected), (EKFACAccumulator, (E,), E)):
        observed: Any = cls(model, loss, params, *extra, **options)  # type: ignore[operator]
        updated: Any = cls(model, loss, params, *extra, **options)  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            with observed.observe(X, y):
                loss(model(X), y).backward()
            updated.update(X, y)
        for accumulator in (observed, updated):
            K = accumulator.to_operator()
            if cls is KFACAccumulator:
                assert torch.equal(K.factors("0.weight")[1], expected.factors("0.weight")[1])
            dense = reference.to_dense()
            assert 1e-5 < float((K.to_dense() - dense).norm() / dense.norm()) < 0.05


def test_accumulators() -> None:
    """Accumulators take a precision, too."""
    args = problem(torch.bfloat16)
    precision = Precision(torch.float64, storage=torch.float64)
    K = KFACLinearOperator(*args, precision=precision)
    accumulator = KFACAccumulator(*args[:3], precision=precision)
    for X, y in args[3]:
        accumulator.update(X, y)
    operator = accumulator.to_operator()
    assert operator.dtype == torch.float64
    assert torch.allclose(operator.to_dense(), K.to_dense(), rtol=1e-12)


def test_bad_precision() -> None:
    """Wrong dtypes are named."""
    for name, dtype in (("factors", torch.bfloat16), ("decompositions", torch.float16)):
        with pytest.raises(ValueError, match=rf"{name} must be torch\.float32 or torch\.float64"):
            Precision(**{name: dtype})
    with pytest.raises(ValueError, match="storage must be a floating point dtype"):
        Precision(storage=torch.int64)
    with pytest.raises(TypeError, match="precision must be a Precision, got dtype"):
        KFACLinearOperator(*problem(), precision=torch.float64)  # type: ignore[arg-type]
