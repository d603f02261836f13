"""What KFAC's factors cost: passes over the data, evaluations of the model, and multiplications."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import EKFACLinearOperator, KFACLinearOperator
from curvlinops.risk.losses import CrossEntropy

WIDTHS = (784, 512, 512, 10)
BATCHES, ROWS = 4, 128


def mlp() -> nn.Sequential:
    pairs = list(itertools.pairwise(WIDTHS))
    layers = [layer for d_in, d_out in pairs for layer in (nn.Linear(d_in, d_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def num_flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def second_moment(d: int) -> int:
    """Return the products for each row: of a wide moment, those on and above the diagonal."""
    if d < 128:
        return d**2
    size = min(128, math.ceil(d / 128) * 32)  # of the blocks along the diagonal
    starts = range(0, d, size)
    assert len(starts) >= 4
    return sum((min(start + size, d) - start) * (d - start) for start in starts)


@pytest.mark.parametrize("check_deterministic", [False, True])
@pytest.mark.parametrize(
    ("fisher_type", "vectors", "gradients"),
    [("mc", 1, 1.22), ("empirical", 1, 1.22), ("type-2", 9, 4.2), ("forward-only", 0, 0.9)],
)
def test_flops(fisher_type: str, vectors: int, gradients: float, check_deterministic: bool):
    """Forward pass, back-propagation to outputs, second moments; no gradient of a weight.

    The check of determinism adds one forward pass.
    """
    model, loss = mlp(), nn.CrossEntropyLoss()
    data = [(torch.rand(ROWS, WIDTHS[0]), torch.randint(0, 10, (ROWS,))) for _ in range(BATCHES)]

    def gradient() -> None:
        for X, y in data:
            loss(model(X), y).backward()

    def factors() -> None:
        KFACLinearOperator(
            model,
            loss,
            dict(model.named_parameters()),
            data,
            fisher_type=fisher_type,
            check_deterministic=check_deterministic,
            num_data=BATCHES * ROWS,
            separate_weight_and_bias=False,
        )

    layers = list(itertools.pairwise(WIDTHS))
    forward = sum(d_in * d_out for d_in, d_out in layers)
    backward = sum(d_in * d_out for d_in, d_out in layers[1:])
    inputs = sum(second_moment(d_in) for d_in, _ in layers)
    outputs = sum(second_moment(d_out) for _, d_out in layers)
    rows = 2 * BATCHES * ROWS
    assert num_flops(gradient) == rows * (2 * forward + backward)
    count = num_flops(factors)
    looks = 2 * forward * (3 if check_deterministic else 1)  # at an example; and at two
    passes = 2 if check_deterministic else 1
    assert count == looks + rows * (passes * forward + inputs + vectors * (backward + outputs))
    assert count <= (gradients + 0.42 * check_deterministic) * num_flops(gradient)


@pytest.mark.parametrize("width", [129, 135, 160, 300])
def test_factors_have_no_gaps(width: int):
    """While factors are summed, there is room between their rows; catches what moves them wrong."""
    rows = torch.rand(50, width - 1, dtype=torch.float64)
    model = nn.Linear(width - 1, 2, dtype=torch.float64)
    K = KFACLinearOperator(
        model,
        nn.MSELoss(),
        dict(model.named_parameters()),
        [(rows[:20], torch.zeros(20, 2).double()), (rows[20:], torch.zeros(30, 2).double())],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    _, A = K.factors("weight")
    assert A.is_contiguous()
    assert A.untyped_storage().nbytes() < 1.15 * A.nbytes
    extended = torch.cat([rows, torch.ones(50, 1)], dim=1)
    assert torch.allclose(A, extended.T @ extended / 50, rtol=1e-12)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_activations_are_not_kept(fisher_type: str):
    """A layer's input, which the gradient of its weight would need, is not saved."""
    rows = 37
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    data = [(torch.rand(rows, 2), torch.rand(rows, 2))]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        KFACLinearOperator(
            model,
            nn.MSELoss(),
            dict(model.named_parameters()),
            data,
            fisher_type=fisher_type,
            check_deterministic=False,
        )
    # the output of the activation alone
    assert [tuple(t.shape) for t in saved if rows in t.shape] == [(rows, 4)]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_columns_of_the_hessian_root_come_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """The memory does not grow with the number of classes squared."""
    model, num_classes, rows = nn.Linear(2, 5), 5, 3
    data = [(torch.rand(rows, 2), torch.arange(rows))]
    arguments = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    whole = KFACLinearOperator(*arguments, fisher_type="type-2")
    asked = []
    right = CrossEntropy.root_columns

    def root_columns(self: CrossEntropy, F: Tensor, y: Tensor, columns: slice) -> Tensor:
        asked.append(right(self, F, y, columns).shape)
        return right(self, F, y, columns)

    monkeypatch.setattr(CrossEntropy, "root_columns", root_columns)
    monkeypatch.setattr(
        "curvlinops.computers.vectors._CHUNK_ENTRIES", chunk * rows * num_classes + 1
    )
    K = KFACLinearOperator(*arguments, fisher_type="type-2")
    torch.testing.assert_close(K.to_dense(), whole.to_dense())
    assert sum(shape[0] for shape in asked) == num_classes - 1
    assert max(shape[0] for shape in asked) == chunk


@pytest.mark.parametrize("joint", [False, True])
def test_weight_and_bias_share_the_gradient_factor(joint: bool):
    """Separate blocks of a layer do not cost more than a joint one."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    data = [(torch.rand(2, 5), torch.rand(2, 3))]
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    counts = {
        separate: num_flops(
            lambda s=separate: KFACLinearOperator(*arguments, separate_weight_and_bias=s)
        )
        for separate in (joint, not joint)
    }
    assert counts[True] == counts[False]


class CountedData:
    """Counts passes, and the elements that each of them takes."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]):
        self.batches = batches
        self.taken: list[int] = []

    @property
    def passes(self) -> int:
        return len(self.taken)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.taken.append(0)
        for batch in self.batches:
            self.taken[-1] += 1
            yield batch


@pytest.mark.parametrize(
    ("options", "passes", "evaluations"),
    [
        ({}, 3, 2),
        ({"num_data": 6}, 3, 2),
        ({"check_deterministic": False}, 2, 1),
        ({"check_deterministic": False, "num_data": 6}, 1, 1),
    ],
)
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical", "forward-only"])
def test_passes(fisher_type: str, options: dict[str, Any], passes: int, evaluations: int):
    """One pass besides that of the check or of counting; it evaluates each batch once.

    The check compares its pass with KFAC's own. Before it, the model is looked at, with the first
    batch alone.
    """
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    data = CountedData([(torch.rand(n, 2), torch.rand(n, 2)) for n in (1, 2, 3)])
    K = KFACLinearOperator(
        model,
        nn.MSELoss(),
        dict(model.named_parameters()),
        data,
        fisher_type=fisher_type,
        **options,
    )
    looks = passes == 3
    # a single example is looked at before the first batch of several
    expected = [1] * looks + [1, 2, 3] * (evaluations - 1) + [1, 1, 2, 3]
    assert data.passes == passes
    assert data.taken[0] == (1 if looks else 3)
    assert calls == expected
    K @ torch.rand(K.shape[1])
    K.inverse(damping=0.1).trace()
    assert data.passes == passes
    assert calls == expected


@pytest.mark.parametrize("check_deterministic", [False, True])
def test_passes_until_an_error(check_deterministic: bool):
    """What is unsupported is found in the first batch, before the check and the other batches."""
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 2))
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    data = CountedData([(torch.rand(n, 2), torch.rand(n, 2)) for n in (1, 2, 3)])
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    with pytest.raises(NotImplementedError, match=r"1\.weight"):
        KFACLinearOperator(*arguments, check_deterministic=check_deterministic, num_data=6)
    assert calls == [1]
    assert data.taken == [1]


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
def test_progress_bars_are_filled(backend: str, capsys: pytest.CaptureFixture[str]):
    """Catches a bar for the first batch, which would be left at 0 %."""
    model = nn.Linear(3, 2)
    data = [(torch.rand(2, 3), torch.rand(2, 2))] * 3
    params = dict(model.named_parameters())
    EKFACLinearOperator(model, nn.MSELoss(), params, data, progressbar=True, backend=backend)
    shown = dict(re.findall(r"([A-Z][\w ]+): +(\d+)%", capsys.readouterr().err))
    assert {"Determinism check", "KFAC factors"} <= shown.keys() and set(shown.values()) == {"100"}


def test_diagonal_blocks_take_one_more_pass():
    class Scale(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input * self.bias

    model = nn.Sequential(nn.Linear(2, 3), Scale(3, 3), nn.Linear(3, 2))
    data = CountedData([(torch.rand(n, 2), torch.rand(n, 2)) for n in (2, 1, 3)])
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    for options, passes in (
        ({}, [1, 3, 3, 3]),
        ({"check_deterministic": False, "num_data": 6}, [3, 3]),
    ):
        data.taken = []
        KFACLinearOperator(*arguments, unsupported="diagonal", **options)
        assert data.taken == passes


def test_diagonal_blocks_cost_nothing_if_all_is_supported():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    data = CountedData([(torch.rand(n, 2), torch.rand(n, 2)) for n in (1, 2, 3)])
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    KFACLinearOperator(*arguments, unsupported="diagonal")
    assert data.taken == [1, 3, 3]
