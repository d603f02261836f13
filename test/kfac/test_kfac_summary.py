"""What KFAC tells about itself, and the limit on the size of factors."""

from __future__ import annotations

import pytest
import torch
from kfac_cases import setup
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import DiagonalLinearOperator, KFACLinearOperator

WIDE = 2  # the largest factor that is kept dense


def test_table():
    K = KFACLinearOperator(
        **setup("cnn", "mse").kwargs(), fisher_type="type-2", kfac_approx="reduce"
    )
    lines = K.summary().splitlines()
    assert lines[0].split() == ["parameters", "layer", "block", "size", "remarks"]
    cells = {
        line.split("  ")[0]: [c.strip() for c in line.split("  ") if c] for line in lines[2:-1]
    }
    assert list(cells) == [f"{i}.{p}" for i in (0, 2, 5) for p in ("weight", "bias")]
    assert cells["0.weight"] == ["0.weight", "Conv2d", "3×3 ⊗ 12×12", "36"]
    assert cells["2.bias"] == ["2.bias", "Conv2d", "2×2", "2"]
    total = sum(p.numel() for p in setup("cnn", "mse").params.values())
    assert lines[-1] == f"6 blocks, {total} parameters; fisher_type=type-2, kfac_approx=reduce"
    assert all(line == line.rstrip() for line in lines)


def test_joint_and_shared():
    K = KFACLinearOperator(**setup("tied-one", "mse").kwargs(), separate_weight_and_bias=False)
    first, second = K.summary().splitlines()[2:-1]
    assert (
        first.startswith("a.weight + a.bias  Linear  3×3 ⊗ 4×4  12") and "shared by a, b" in first
    )
    assert second.startswith("c.weight + c.bias") and "shared" not in second
    assert K.mapping == [{"W": "a.weight", "b": "a.bias"}, {"W": "c.weight", "b": "c.bias"}]


def test_diagonal_blocks_of_parameters_in_no_layer():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)
            self.scale = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x)) * self.scale

    model = Model()
    data = [(torch.rand(4, 2), torch.rand(4, 3))]
    arguments = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    K = KFACLinearOperator(*arguments, fisher_type="type-2", unsupported="diagonal")
    lines = K.summary().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[:-1]]
    assert cells == [
        ["scale", "any", "diag(3)", "3", "no supported layer: exact diagonal"],
        ["lin.weight", "Linear", "3×3 ⊗ 2×2", "6"],
        ["lin.bias", "Linear", "3×3", "3"],
        ["norm.weight", "LayerNorm", "3×3", "3"],
        ["norm.bias", "LayerNorm", "3×3", "3"],
    ]
    assert lines[-1].startswith("5 blocks, 18 parameters")
    assert [list(group.values()) for group in K.mapping] == [[row[0]] for row in cells]


def test_parts_of_a_weight():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.w[:2], self.w[2:3], self.w[3:]]
            return torch.cat([F.linear(x, part) for part in parts], dim=-1)

    model = Model()
    arguments = (
        nn.MSELoss(),
        dict(model.named_parameters()),
        [(torch.rand(4, 2), torch.rand(4, 5))],
    )
    (line,) = KFACLinearOperator(model, *arguments).summary().splitlines()[2:-1]
    assert " ".join(line.split()) == "w Linear 2 × (2×2 ⊗ 2×2), 1 × (1×1 ⊗ 2×2) 10"


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "forward-only"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("case", ["mlp", "cnn", "tied-one", "attention", "uncalled"])
def test_wide_factors_keep_their_diagonal(case: str, joint: bool, fisher_type: str, approx: str):
    problem = setup(case, "mse")
    arguments = {
        "fisher_type": fisher_type,
        "kfac_approx": approx,
        "separate_weight_and_bias": not joint,
    }
    whole = KFACLinearOperator(**problem.kwargs(), **arguments)
    K = KFACLinearOperator(**problem.kwargs(), **arguments, max_factor_size=WIDE)
    rows = dict(zip(map(str, K.mapping), K.summary().splitlines()[2:-1], strict=True))
    for group in K.mapping:
        name = next(iter(group.values()))
        wide = False
        for factor, dense in zip(K.factors(name), whole.factors(name), strict=True):
            if len(dense) > WIDE:
                wide = True
                assert isinstance(factor, DiagonalLinearOperator)
                torch.testing.assert_close(factor.diagonal(), dense.diagonal())
            else:
                torch.testing.assert_close(factor, dense)
        assert ("diagonal only" in rows[str(group)]) == wide
    if fisher_type != "forward-only":
        assert not torch.equal(K.to_dense(), whole.to_dense())
    torch.testing.assert_close(K.trace(), whole.trace())
    torch.testing.assert_close(K.diagonal(), whole.diagonal())
    K.inverse(damping=0.1, use_heuristic_damping=True) @ torch.rand(len(K.diagonal())).double()


def test_wide_factors_are_never_formed():
    """A vocabulary: neither its input factor nor its gradient factor is made."""
    wide = 30_000  # a square factor would take 7 GB
    model = nn.Sequential(nn.Linear(wide, 2, bias=False), nn.Linear(2, wide, bias=False))
    data = [(torch.rand(2, wide), torch.rand(2, wide))]
    params = dict(model.named_parameters())
    for fisher_type in ("mc", "empirical", "forward-only"):
        K = KFACLinearOperator(
            model, nn.MSELoss(), params, data, fisher_type=fisher_type, check_deterministic=False
        )
        assert K.factors("0.weight")[1].shape == (wide, wide)
        assert K.factors("1.weight")[0].shape == (wide, wide)
        assert K.trace().isfinite()
