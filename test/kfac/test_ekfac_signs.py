"""Independent loss terms: random signs in expectation, and the passes of the exact mode.

All patterns of signs are enumerated for a model whose positions mix. EKFAC's second pass has signs
of its own, so that its basis can be held while they change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import (
    assert_close,
    check_ekfac,
    check_kfac,
    first_name,
    given_samples,
    kept_apart,
    parts_of,
)
from kfac_cases import ClassesSecond, Lambda, setup
from kfac_reference import Setup
from layer_reference import (
    ekfac_eigenvalues,
    exact_block,
    layer_examples,
    layer_places,
    nearest_kronecker,
    reference_blocks,
)
from torch import Tensor, nn

from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops._random import RandomSource
from curvlinops.computers.recorder import Recorder

R, CLASSES = 2, {"mse": 2, "ce": 3}
COLUMNS = {"mse": 2, "ce": 2}
Signs = Callable[..., Tensor]
each_type = pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
each_approx = pytest.mark.parametrize("approx", ["expand", "reduce"])
each_loss = pytest.mark.parametrize("loss", ["mse", "ce"])


def attention(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.conv(m.norm(x).mT)).mT
    return m.out(torch.softmax(h @ h.mT, -1) @ m.inner(h))


def mixing(loss: str) -> Setup:
    """One example of two positions that mix, with two loss terms of two entries."""
    torch.manual_seed(5)
    model: nn.Module = Lambda(
        attention,
        norm=nn.LayerNorm(2),
        conv=nn.Conv1d(2, 2, 1, groups=2),
        inner=nn.Linear(2, 2, bias=False),
        out=nn.Linear(2, CLASSES[loss]),
    )
    model = (model if loss == "mse" else ClassesSecond(model)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    y = torch.randn(1, R, CLASSES[loss]).double() if loss == "mse" else torch.tensor([[0, 1]])
    losses = {"mse": nn.MSELoss(), "ce": nn.CrossEntropyLoss()}
    X = torch.randn(1, R, 2).double()
    return Setup(model, losses[loss], dict(model.named_parameters()), [(X, y)])


def patterns(loss: str, fisher_type: str) -> list[Tensor]:
    """Return all signs ``[R, V]`` of R loss terms and V columns."""
    num_vectors = COLUMNS[loss] if fisher_type == "type-2" else 1
    return [
        torch.tensor(pattern, dtype=torch.float64).reshape(R, num_vectors)
        for pattern in itertools.product([-1.0, 1.0], repeat=R * num_vectors)
    ]


def given_signs(monkeypatch: pytest.MonkeyPatch, **signs: Tensor) -> list[str]:
    """Let signs be given ones, by their purpose; return the purposes for which they are drawn."""
    purposes: list[str] = []

    def draw(self: RandomSource, purpose: str, first: int, m: int, draws: int) -> Tensor:
        purposes.append(purpose)
        given = signs[purpose.replace("-", "_")]
        assert (first, m, draws) == (0, *given.shape)
        return given

    monkeypatch.setattr(RandomSource, "signs", draw)
    return purposes


def mixed(problem: Setup, fisher_type: str, signs: Tensor) -> list[list[Tensor]]:
    """Return the vectors ``[R, C]`` that are back-propagated with some signs; for square loss."""
    (example,) = layer_examples(problem)
    if fisher_type == "empirical":
        return [[signs * example.gradients]]
    columns = example.hessians[0].sqrt()  # it is diagonal
    return [[sign.unsqueeze(-1) * column for sign, column in zip(signs.T, columns, strict=True)]]


@each_approx
@each_type
@each_loss
def test_kfac_is_unbiased(
    loss: str, fisher_type: str, approx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks: also of norm layers and convolution groups, and with reduce."""
    problem = mixing(loss)
    for joint in (False, True):
        options = {"kfac_approx": approx, "separate_weight_and_bias": not joint}
        blocks = reference_blocks(problem, joint, fisher_type, approx)
        mean = [torch.zeros_like(block.dense) for block in blocks]
        differ = [0.0] * len(blocks)
        every = patterns(loss, fisher_type)
        for signs in every:
            purposes = given_signs(monkeypatch, signs=signs)
            K = KFACLinearOperator(**problem.kwargs(), fisher_type=fisher_type, **options)
            assert purposes == ["signs"]
            for i, block in enumerate(blocks):
                actual = K.block(first_name(block)).to_dense()
                mean[i] += actual / len(every)
                differ[i] = max(differ[i], (actual - block.dense).norm() / block.dense.norm())
        for block, average in zip(blocks, mean, strict=True):
            assert_close(average, block.dense)
        # what mixes is not exact with single patterns
        assert sum(difference > 1e-2 for difference in differ) >= len(blocks) - 1 - (not joint)


@each_approx
@each_type
@each_loss
def test_ekfac_is_unbiased(
    loss: str, fisher_type: str, approx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a basis that some signs gave, the mean over those of the second pass is exact."""
    problem = mixing(loss)
    every = patterns(loss, fisher_type)
    options = {"kfac_approx": approx, "separate_weight_and_bias": False}
    blocks = reference_blocks(problem, True, fisher_type, approx)
    mean: list[Any] = [0] * len(blocks)
    differ = [0.0] * len(blocks)
    bases: dict[int, list[Any]] = {}
    for signs in every:
        purposes = given_signs(monkeypatch, signs=every[1], eigenvalue_signs=signs)
        E = EKFACLinearOperator(**problem.kwargs(), fisher_type=fisher_type, **options)
        assert purposes == ["signs", "eigenvalue-signs"]
        for i, block in enumerate(blocks):
            parts = parts_of(E.block(first_name(block)))
            basis = [list(part.eigenvectors) for part in parts]
            for own, first in zip(basis, bases.setdefault(i, basis), strict=True):
                assert all(torch.equal(Q, same) for Q, same in zip(own, first, strict=True))
            values = torch.cat([part.eigenvalues for part in parts])
            mean[i] = mean[i] + values / len(every)
            exact = eigenvalues(problem, block, basis, fisher_type)
            differ[i] = max(differ[i], ((values - exact).norm() / exact.norm()).item())
            if loss == "mse":
                vectors = mixed(problem, fisher_type, signs)
                assert_close(values, eigenvalues(problem, block, basis, "given", vectors))
    for i, block in enumerate(blocks):
        assert_close(mean[i], eigenvalues(problem, block, bases[i], fisher_type))
        assert_close(mean[i].sum(), exact_block(problem, block.group, fisher_type).trace())
        assert differ[i] > 1e-2  # a sum over terms that mixes them is not exact


def eigenvalues(
    problem: Setup, block: Any, basis: list[Any], fisher_type: str, vectors: Any = None
) -> Tensor:
    """Return the reference's eigenvalues of all parts of a block in a basis."""
    Q_g = [Q[0] for Q in basis]
    Q_a = [Q[1] if len(Q) > 1 else None for Q in basis]
    parts = ekfac_eigenvalues(problem, block, Q_g, Q_a, fisher_type, vectors)
    return torch.cat([part.flatten() for part in parts])


def test_signs_of_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch asks for those of its own terms, for another purpose in the second pass."""
    asked, right = [], RandomSource.signs

    def signs(self: RandomSource, purpose: str, *args: int) -> Tensor:
        asked.append((purpose, *args))
        return right(self, purpose, *args)

    monkeypatch.setattr(RandomSource, "signs", signs)
    problem = setup("attention-lengths", "ce")
    EKFACLinearOperator(**problem.kwargs(), fisher_type="type-2")
    # batches of 2, 1 and 2 sequences of 2, 1 and 2 positions; those with R = 1 draw none
    places = [(0, 4, 2), (5, 4, 2)]
    assert asked == [(p, *place) for p in ("signs", "eigenvalue-signs") for place in places]
    a, b = (right(RandomSource(3), purpose, 0, 8, 8) for purpose in ("signs", "eigenvalue-signs"))
    assert 16 < (a == b).sum() < 48  # they are others


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@each_loss
def test_samples_of_the_exact_mode(loss: str, backend: str) -> None:
    """Terms are kept apart: EKFAC has the trace of the GGN of the same samples, KFOC is nearest.

    By default, EKFAC's eigenvalues sum over the terms of an example before they are squared.
    """
    problem = mixing(loss)
    kwargs = problem.kwargs(separate_weight_and_bias=False, mc_samples=3, backend=backend)
    exact = GGNLinearOperator(**problem.kwargs(), mc_samples=3).to_dense()
    vectors = given_samples(problem, 3, 2147483647)
    apart = kept_apart(vectors)
    assert len(apart[0]) == 3 * R
    E, summed = (EKFACLinearOperator(**kwargs, loss_terms=t) for t in ("exact", "signs"))
    check_ekfac(E, problem, True, "given", "expand", apart)
    check_ekfac(summed, problem, True, "given", "expand", vectors)
    for approx in ("expand", "reduce"):
        K = KFACLinearOperator(**kwargs, loss_terms="exact", kfac_approx=approx)
        check_kfac(K, problem, True, "given", approx, apart)
    C = KFOCLinearOperator(**kwargs)
    differences = 0
    for block in reference_blocks(problem, True, "given", "expand", apart):
        places = layer_places(problem, block.group)
        own, name = exact[places][:, places], first_name(block)
        assert_close(E.block(name).to_dense().trace(), own.trace())
        differences += (summed.block(name).trace() - own.trace()).abs() > 1e-2 * own.trace()
        for part in parts_of(C.block(name)) if len(parts_of(C.block(name))) == 1 else ():
            sizes = [len(factor) for factor in part]
            nearest = torch.kron(*nearest_kronecker(own, *sizes)) if len(sizes) > 1 else own
            torch.testing.assert_close(part.to_dense(), nearest, rtol=1e-6, atol=1e-8)
    assert differences > 1


# ---- passes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"fisher_type": "type-2"}, 2),
        ({"fisher_type": "empirical"}, 1),
        ({"fisher_type": "mc", "mc_samples": 5}, 5),
        ({"fisher_type": "type-2", "loss_terms": "exact"}, 2 * 4),
        ({"fisher_type": "empirical", "loss_terms": "exact"}, 4),
        ({"fisher_type": "mc", "mc_samples": 5, "loss_terms": "exact"}, 5 * 4),
    ],
)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("recorded", [True, False])
def test_number_of_backward_passes(
    recorded: bool, cls: Any, options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are columns (classes less one), gradients or samples; the exact mode has R = 4 times.

    EKFAC needs them twice, with other signs; or else keeps what it needs, if there is room.
    """
    counted: list[int] = []
    signs = options["fisher_type"] != "mc" and "loss_terms" not in options
    passes = 2 if cls is EKFACLinearOperator and (signs or not recorded) else 1
    if not recorded:
        monkeypatch.setattr(Recorder, "_BYTES", 0)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: counted.append(len(gradient)))
        return m.b(torch.tanh(h))

    model = ClassesSecond(Lambda(forward, a=nn.Linear(2, 2), b=nn.Linear(2, 3))).double()
    data = [(torch.rand(n, 4, 2).double(), torch.randint(3, (n, 4))) for n in (2, 3)]
    arguments = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    cls(*arguments, **options, check_deterministic=False)
    assert counted == ([2] * count + [3] * count) * passes
