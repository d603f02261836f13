"""Peak memory of a product in plain mode: a small multiple of a gradient's, and of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cost_models import PROBLEMS, gradient, operator, vectors
from memory_meter import peak_memory
from torch import Tensor, nn

from curvlinops import GGNLinearOperator, HessianLinearOperator

Meter = Callable[[Callable[[], Any]], int]
MIB = 2**20


# --------------------------------------------------------------------------------------------------
# The meter
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def peak() -> Meter:
    """Return the function that measures."""
    return peak_memory


def test_meter_knows_a_chain_of_allocations(peak: Meter):
    before = torch.empty(7 * MIB, dtype=torch.uint8)

    def work() -> Tensor:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(4 * MIB, dtype=torch.uint8)  # 2 + 4 is the most
        del second
        return third[:1].clone()

    assert peak(work) == 6 * MIB
    assert peak(work) == 6 * MIB  # and nothing of a measurement stays
    assert peak(lambda: before[1:]) == 0
    assert peak(before.zero_) == 0
    assert peak(before.clone) == 7 * MIB


def test_meter_sees_inside_of_kernels_and_backward(peak: Meter):
    x = torch.rand(MIB)
    assert peak(lambda: x.sum(dtype=torch.float64)) >= 8 * MIB  # a copy that no tensor shows

    parameter = nn.Parameter(x)

    def backward() -> tuple[Tensor, ...]:
        a = parameter.exp()  # kept for its derivative
        b = a.exp()  # kept for its derivative
        return torch.autograd.grad(b.sum(), parameter)

    # a, b, and the gradients with respect to a and then the parameter
    assert peak(backward) in range(3 * 4 * MIB, 4 * 4 * MIB + 1024)


def test_meter_counts_garbage_in_cycles(peak: Meter):
    def work() -> None:
        for _ in range(3):
            cycle: list[Any] = [torch.empty(MIB, dtype=torch.uint8)]
            cycle.append(cycle)

    assert peak(work) == 3 * MIB


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("cls", "gradients"), [(HessianLinearOperator, 2.6), (GGNLinearOperator, 2.8)]
)
def test_peak_relative_to_a_gradient(cls: Any, gradients: float, name: str, peak: Meter):
    problem = PROBLEMS[name]()
    A, v = operator(cls, problem), vectors(problem)
    assert peak(lambda: A @ v) <= gradients * peak(lambda: gradient(problem))


VOCABULARY, TOKENS, WIDTH = 50_000, 512, 16


class Head(nn.Module):
    """Logits of tokens, as [tokens, vocabulary] or [1, vocabulary, tokens]."""

    def __init__(self, bias: bool, transposed: bool):
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.transposed = transposed

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.embedding(tokens))  # [1, tokens, vocabulary]
        return logits.transpose(1, 2) if self.transposed else logits.flatten(0, 1)


@pytest.mark.parametrize(
    ("bias", "transposed"), [(False, False), (True, True)], ids=["flat", "bias, transposed"]
)
@pytest.mark.parametrize(
    ("cls", "options"),
    [(HessianLinearOperator, {}), (GGNLinearOperator, {}), (GGNLinearOperator, {"mc_samples": 1})],
    ids=["Hessian", "GGN", "Monte-Carlo"],
)
def test_large_vocabulary(
    cls: Any, options: dict[str, Any], bias: bool, transposed: bool, peak: Meter
):
    """The loss's Hessian is never formed, and few tensors of the logits' size are held at once."""
    model = Head(bias, transposed).eval()
    X = torch.randint(0, 100, (1, TOKENS))
    y = torch.randint(0, VOCABULARY, X.shape)
    params = dict(model.named_parameters())
    A = cls(
        model,
        nn.CrossEntropyLoss(),
        params,
        [(X, y if transposed else y.flatten())],
        check_deterministic=False,
        num_data=1,
        **options,
    )
    v = torch.randn(A.shape[1])
    assert peak(lambda: A @ v) <= 6 * TOKENS * VOCABULARY * v.itemsize
