"""Checks of the slow reference for all layers; they need nothing of KFAC itself."""

from __future__ import annotations

from typing import Any

import kfac_cases
import pytest
import torch
from kfac_cases import Lambda
from kfac_reference import Setup, groups, places, reference_factors
from layer_cases import LAYER_CASES, layer_setup, single
from layer_reference import (
    Block,
    assemble_blocks,
    ekfac_eigenvalues,
    exact_block,
    layer_examples,
    layer_groups,
    layer_places,
    nearest_kronecker,
    reference_blocks,
    scale,
    usage_gradients,
    without_coupling,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

WITH_JOINT = [(name, joint) for name, case in LAYER_CASES.items() for joint in case.joint]
all_cases = pytest.mark.parametrize(("name", "joint"), WITH_JOINT)


def exact_for(kind: str) -> Any:
    """Parametrize with the cases that are exact in some sense, and whether groups are joint."""
    cases = [pair for pair in WITH_JOINT if LAYER_CASES[pair[0]].exact == kind]
    return pytest.mark.parametrize(("name", "joint"), cases)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    size = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * size)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def blocks_of(setup: Setup, joint: bool, approx: str = "expand", **options: Any) -> list[Block]:
    return reference_blocks(setup, joint, options.pop("fisher_type", "type-2"), approx, **options)


def usages_of(setup: Setup, group: dict[str, str]) -> list[Any]:
    """Return the usages of a group in the first example."""
    wanted = group.get("W", group.get("b"))
    usages = layer_examples(setup)[0].usages
    return [usage for usage in usages if wanted in (usage.weight, usage.bias)]


def is_norm(setup: Setup, group: dict[str, str]) -> bool:
    return usages_of(setup, group)[0].form == "norm"


# ---- what happens in the model -------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYER_CASES)
def test_cases(name: str):
    """They are small, called with batches of unequal size, and their derivatives are not 0."""
    setup = layer_setup(name)
    assert sum(p.numel() for p in setup.params.values()) < 400
    assert len({len(y) for _, y in setup.data}) > 1
    assert all(p.dtype == torch.float64 for p in setup.params.values())
    if name != "uncalled":
        for group in layer_groups(setup, False):
            assert exact_block(setup, group, "type-2").trace() > 1e-5


@pytest.mark.parametrize("name", LAYER_CASES)
def test_predictions(name: str):
    """The model of explicit layers predicts what the model does."""
    setup = layer_setup(name)
    inputs = [X for X, _ in setup._single_examples()]
    for X, example in zip(inputs, layer_examples(setup), strict=True):
        expected = functional_call(setup.model, setup.params, (X,)).detach()
        torch.testing.assert_close(example.prediction, expected, rtol=1e-12, atol=1e-12)


@all_cases
def test_chain_rule(name: str, joint: bool):
    """What all usages add to the derivative by a parameter makes autograd's."""
    setup = layer_setup(name)
    for group in layer_groups(setup, joint):
        own = layer_places(setup, group)
        gradients = usage_gradients(setup, group)
        for example, actual in zip(layer_examples(setup), gradients, strict=True):
            assert_close(actual, example.param_jacobian[..., own])


@all_cases
def test_groups_partition_the_parameters(name: str, joint: bool):
    setup = layer_setup(name)
    found = layer_groups(setup, joint)
    own = torch.cat([layer_places(setup, group) for group in found])
    assert torch.equal(own.sort().values, torch.arange(len(own)))
    assert len(own) == sum(p.numel() for p in setup.params.values())
    names = list(setup.params)
    first = [min(map(names.index, group.values())) for group in found]
    assert first == sorted(first)
    assert joint or all(len(group) == 1 for group in found)


def test_conflicting_biases():
    with pytest.raises(ValueError, match="conflicting biases"):
        layer_groups(layer_setup("tied-different"), True)


# ---- against the reference for Linear and Conv2d -------------------------------------------------
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", kfac_cases.CASES, ids=lambda case: case.name)
def test_agrees_with_the_other_reference(case: Any, approx: str):
    setup = kfac_cases.setup(case.name, "mse")
    vectors = [
        [torch.randn(e.F.shape, dtype=torch.float64) for _ in range(2)]
        for e in layer_examples(setup)
    ]
    for joint in case.joint:
        expected = groups(setup, joint)
        assert layer_groups(setup, joint) == expected
        for fisher_type in ("type-2", "empirical", "forward-only", "given"):
            blocks = reference_blocks(setup, joint, fisher_type, approx, vectors)
            for block, group in zip(blocks, expected, strict=True):
                assert torch.equal(block.places, places(setup.params, group))
                factors = reference_factors(setup, group, fisher_type, approx, vectors)
                ((B, A),) = block.parts
                assert_close(B, factors[0])
                assert (A is None) == (factors[1] is None)
                if A is not None:
                    assert_close(A, factors[1])


# ---- exact cases ---------------------------------------------------------------------------------
ONE_POSITION = {  # how many of the joint groups have one position
    "mlp-norms": 3,
    "depthwise": 2,
    "conv3d": 2,
    "functional": 3,
    "functional-tied": 1,
    "embedding-pooled": 1,
    "group-norm": 2,
    "batch-norm": 2,
    "resnet": 1,
    "tied-same": 1,
    "bert": 2,
    "single-images": 4,
    "single-token": 3,
}


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "given"])
@pytest.mark.parametrize("name", ONE_POSITION)
def test_exact_for_one_datum_and_position(name: str, fisher_type: str):
    """For any network and loss, but for what is between groups of a convolution."""
    setup = single(layer_setup(name))
    (example,) = layer_examples(setup)
    assert len(example.F) == 1
    vectors = [[torch.randn(example.F.shape, dtype=torch.float64) for _ in range(2)]]
    for joint in (False, True):
        checked = 0
        for approx in ("expand", "reduce"):
            for block in reference_blocks(setup, joint, fisher_type, approx, vectors):
                positions = sum(u.jacobian.shape[2] for u in usages_of(setup, block.group))
                if positions != 1 or is_norm(setup, block.group):
                    continue
                checked += 1
                exact = exact_block(setup, block.group, fisher_type, vectors)
                assert_close(block.dense, without_coupling(block, exact))
        assert not joint or checked == 2 * ONE_POSITION[name]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "name",
    ["mlp-norms", "layer-norm-2d", "rms-norm", "group-norm", "batch-norm", "norms-frozen",
     "resnet", "twice", "gpt", "bert", "single-images"],
)  # fmt: skip
def test_norm_layers_are_exact(name: str, joint: bool, approx: str):
    """For all data, as loss terms are kept apart."""
    setup = layer_setup(name)
    for fisher_type in ("type-2", "empirical"):
        blocks = [
            block
            for block in reference_blocks(setup, joint, fisher_type, approx)
            if is_norm(setup, block.group)
        ]
        assert blocks
        for block in blocks:
            assert_close(block.dense, exact_block(setup, block.group, fisher_type))


@exact_for("expand")
def test_deep_linear_networks_are_exact(name: str, joint: bool):
    setup = layer_setup(name)
    for block in blocks_of(setup, joint):
        exact = exact_block(setup, block.group, "type-2")
        assert_close(block.dense, without_coupling(block, exact))


@exact_for("reduce")
def test_reduce_is_exact_with_pooling(name: str, joint: bool):
    setup = layer_setup(name)
    for block in blocks_of(setup, joint, "reduce"):
        exact = exact_block(setup, block.group, "type-2")
        assert_close(block.dense, without_coupling(block, exact))


@pytest.mark.parametrize(
    ("name", "group", "one"),
    [
        ("pooled", {"W": "a.weight"}, False),  # expand with pooling
        ("pooled", {"b": "a.bias"}, False),
        ("functional", {"W": "model.first"}, False),  # cross-entropy with several data
        ("resnet", {"W": "model.conv2.weight"}, True),  # several positions, nonlinear
    ],
)
def test_not_exact(name: str, group: dict[str, str], one: bool):
    setup = single(layer_setup(name)) if one else layer_setup(name)
    (block,) = (block for block in blocks_of(setup, False) if block.group == group)
    assert distance(block.dense, exact_block(setup, group, "type-2")) > 1e-3


# ---- the same network with other layers ----------------------------------------------------------
def replaced(setup: Setup, model: nn.Module, params: dict[str, Tensor]) -> Setup:
    """Return the problem with an equivalent model."""
    result = Setup(model.double().eval(), setup.loss, params, setup.data, setup.batch_size_fn)
    for a, b in zip(layer_examples(result), layer_examples(setup), strict=True):
        assert_close(a.prediction, b.prediction)
    return result


def by_name(blocks: list[Block]) -> dict[str, Block]:
    return {next(iter(block.group.values())): block for block in blocks}


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
def test_embedding_is_a_linear_of_unit_vectors(fisher_type: str, approx: str):
    setup = layer_setup("embedding", "mse")
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.table(F.one_hot(x, 5).double()))),
        table=nn.Linear(5, 4, bias=False),
        head=nn.Linear(4, 3),
    )
    params = {
        "table.weight": setup.params["0.weight"].T,
        "head.weight": setup.params["2.weight"],
        "head.bias": setup.params["2.bias"],
    }
    other = replaced(setup, model, params)
    for joint in (False, True):
        expected = reference_blocks(other, joint, fisher_type, approx)
        for block, same in zip(
            reference_blocks(setup, joint, fisher_type, approx), expected, strict=True
        ):
            assert_close(block.dense, same.dense)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_convolution_groups_are_convolutions_of_their_own(approx: str):
    setup = layer_setup("conv1d-groups")

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(torch.cat([m.a(x[:, :1]), m.b(x[:, 1:])], dim=1))
        return m.head(torch.cat([m.c(h[:, :2]), m.d(h[:, 2:])], dim=1).flatten(1))

    first = {name: nn.Conv1d(1, 2, 2) for name in "ab"}
    second = {name: nn.Conv1d(2, 1, 3, padding="same") for name in "cd"}
    model = Lambda(forward, **first, **second, head=nn.Linear(10, 3))
    params = {}
    for old, new in (("0", "ab"), ("2", "cd")):
        for kind in ("weight", "bias"):
            halves = setup.params[f"{old}.{kind}"].chunk(2)
            params |= {f"{name}.{kind}": half for name, half in zip(new, halves, strict=True)}
    params |= {f"head.{kind}": setup.params[f"4.{kind}"] for kind in ("weight", "bias")}
    other = replaced(setup, model, params)
    for joint in (False, True):
        actual = by_name(blocks_of(setup, joint, approx))
        expected = by_name(blocks_of(other, joint, approx))
        for old, new in (("0.weight", "ab"), ("2.weight", "cd")):
            parts = [expected[f"{name}.weight"] for name in new]
            assert_close(actual[old].dense, torch.block_diag(*(part.dense for part in parts)))
        if not joint:  # the bias has the full factor
            ((B, _),) = actual["0.bias"].parts
            assert_close(B[:2, :2], expected["a.bias"].dense)
            assert B[:2, 2:].abs().max() > 1e-6


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_attention_is_linears(approx: str):
    """Rows of the in-projection are Linears of their own."""
    setup = layer_setup("three-attention", "mse")
    W, b = (setup.params[f"attention.in_proj_{kind}"] for kind in ("weight", "bias"))

    def forward(m: Any, x: Any) -> Tensor:
        q, k, v = m.q(x["x"]), m.k(torch.sin(x["memory"])), m.v(x["memory"])
        return m.head(torch.tanh(m.out(F.softmax(q @ k.mT / 2, dim=-1) @ v)))

    model = Lambda(forward, **{name: nn.Linear(4, 4) for name in ("q", "k", "v", "out")})
    model.head = nn.Linear(4, 3)
    params = {f"{name}.weight": rows for name, rows in zip("qkv", W.chunk(3), strict=True)}
    params |= {f"{name}.bias": rows for name, rows in zip("qkv", b.chunk(3), strict=True)}
    for new, old in (("out", "attention.out_proj"), ("head", "head")):
        params |= {f"{new}.{kind}": setup.params[f"{old}.{kind}"] for kind in ("weight", "bias")}
    other = replaced(setup, model, params)
    for joint in (False, True):
        actual = by_name(blocks_of(setup, joint, approx))
        expected = by_name(blocks_of(other, joint, approx))
        for kind in ("weight", "bias")[: 1 if joint else 2]:
            own = torch.block_diag(*(expected[f"{name}.{kind}"].dense for name in "qkv"))
            assert_close(actual[f"attention.in_proj_{kind}"].dense, own)
            out = expected[f"out.{kind}"].dense
            assert_close(actual[f"attention.out_proj.{kind}"].dense, out)


def test_transposed_convolution_with_stride_is_a_linear_of_each_pixel():
    """Where kernels do not overlap; positions of the Linear are inputs, so sums are equal."""
    torch.manual_seed(0)
    layer, X = nn.ConvTranspose1d(2, 3, 2, stride=2, bias=False).double(), torch.rand(3, 2, 2)
    data = [(X.double(), torch.rand(3, 3, 4).double())]
    params = {"weight": layer.weight.detach()}
    setup = Setup(layer, nn.MSELoss(reduction="sum"), params, data)
    ((B, A),) = blocks_of(setup, False)[0].parts
    columns = X.double().movedim(1, -1).reshape(-1, 2)  # [positions, C_in]
    square = columns.T @ columns / (2 * len(columns))
    # each input is at one of two offsets of the kernel
    assert_close(A, torch.kron(square, torch.eye(2, dtype=torch.float64)))
    assert_close(B, 2 * 3 * 4 * torch.eye(3, dtype=torch.float64))


# ---- parts, ties, wide factors -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("conv1d-groups", "0.weight", 2),
        ("conv2d-groups", "model.2.weight", 2),
        ("depthwise", "0.weight", 2),
        ("transposed2d", "model.2.weight", 2),
        ("transposed3d", "2.weight", 2),
        ("cross-attention", "attention.in_proj_weight", 2),
        ("three-attention", "model.attention.in_proj_weight", 3),
        ("three-attention", "model.attention.in_proj_bias", 3),
        ("self-attention", "model.attention.in_proj_weight", 1),
        ("twice", "conv.weight", 2),
    ],
)
def test_coupling_of_parts_is_dropped(name: str, key: str, count: int):
    setup = layer_setup(name)
    block = by_name(blocks_of(setup, False))[key]
    assert len(block.parts) == count
    assert torch.equal(block.dense, without_coupling(block, block.dense))
    exact = exact_block(setup, block.group, "type-2")
    assert (distance(without_coupling(block, exact), exact) > 1e-3) == (count > 1)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["head", "head-padding", "head-bias", "head-twice", "gpt"])
@pytest.mark.parametrize("joint", [False, True])
def test_tied_embeddings(name: str, joint: bool, approx: str):
    """The nearest product is positive semi-definite, and combines the two sides of both usages."""
    setup = layer_setup(name)
    (block,) = (
        block
        for block in blocks_of(setup, joint, approx)
        if any(name.endswith(("table.weight", "wte.weight")) for name in block.group.values())
    )
    ((B, A),) = block.parts
    assert_close(block.dense, torch.kron(B, A))
    for factor in (B, A):
        assert_close(factor, factor.T)
        assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()
    left, right = two_products(setup, block, approx)
    total = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    G, H = gram(left), gram(right)  # both products' coefficients in a 2 x 2 problem
    U, s, _ = torch.linalg.svd(root(G).mT @ root(H))
    assert s[0] - s[1] > 1e-6 * s[0]
    own = torch.linalg.solve(root(G).mT, U[:, :1]).squeeze(1)
    direction = sum(c * factor for c, factor in zip(own, left, strict=True))  # of norm 1
    partner = torch.einsum("oipj,op->ij", split(total, len(B)), direction)
    assert_close(block.dense, torch.kron(direction, partner))


def two_products(setup: Setup, block: Block, approx: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the factors of both usages' blocks, in the Linear's canonical form."""
    B, A = factors_of_form(setup, block.group, "rows", approx)
    inner, outer = factors_of_form(setup, {"W": block.group["W"]}, "columns", approx)
    return [B, outer], [A, F.pad(inner, (0, len(A) - len(inner)) * 2)]


def factors_of_form(
    setup: Setup, group: dict[str, str], form: str, approx: str
) -> tuple[Tensor, Tensor]:
    """Return gradient and input factor of a Linear's or an embedding's usages."""
    B, rows = torch.zeros((), dtype=torch.float64), []
    for example in layer_examples(setup):
        own = [u for u in example.usages if u.weight == group["W"] and u.form == form]
        a = torch.cat([u.inputs[0] for u in own])
        a = F.pad(a, (0, "b" in group), value=1.0)
        J = torch.cat([u.jacobian for u in own], dim=2)
        if approx == "reduce":
            a, J = a.mean(0, keepdim=True), J.sum(2, keepdim=True)
        rows.append(a)
        for term, H in zip(J, example.hessians, strict=True):
            B = B + scale(setup) * sum(g.T @ H @ g for g in term.unbind(1))
    inputs = torch.cat(rows)
    return B, inputs.T @ inputs / len(inputs)


def gram(factors: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack([(a * b).sum() for b in factors]) for a in factors])


def root(G: Tensor) -> Tensor:
    """Return L with ``G = L Lᵀ``."""
    return torch.linalg.cholesky(G)


def split(dense: Tensor, d_out: int) -> Tensor:
    return dense.reshape(d_out, len(dense) // d_out, d_out, -1)


def test_padding_rows_count_as_positions():
    """They are no inputs of an embedding, but of the head to which it is tied."""
    setup = layer_setup("embedding-lengths")
    tokens = torch.cat([X.flatten() for X, _ in setup.data])
    assert (tokens == 2).any()
    ((_, A),) = blocks_of(setup, False)[0].parts
    counts = torch.bincount(tokens, minlength=5).double()
    counts[2] = 0
    assert_close(A, (counts / len(tokens)).diag())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("name", "limit"), [("bert", 4), ("conv1d-groups", 2), ("cross-attention", 4), ("rms-norm", 11)]
)
def test_wide_factors_are_diagonal(name: str, limit: int, joint: bool):
    setup, wide = layer_setup(name), 0
    full = blocks_of(setup, joint)
    for block, other in zip(blocks_of(setup, joint, max_factor_size=limit), full, strict=True):
        for part, unlimited in zip(block.parts, other.parts, strict=True):
            for factor, dense in zip(part, unlimited, strict=True):
                if factor is not None:
                    wide += len(factor) > limit
                    expected = dense.diag().diag() if len(factor) > limit else dense
                    assert torch.equal(factor, expected)
    assert wide


@pytest.mark.parametrize("joint", [False, True])
def test_wide_sides_of_ties_are_diagonal(joint: bool):
    setup = layer_setup("head-bias")
    block = by_name(blocks_of(setup, joint, "reduce", max_factor_size=4))["model.table.weight"]
    ((B, A),) = block.parts
    assert_close(B, B.diag().diag())
    assert distance(A.diag().diag(), A) > 1e-3


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["linear-leading", "transposed1d", "layer-norm-2d", "cross-attention", "gpt", "twice"]
)
def test_given_vectors(name: str, approx: str):
    """Vectors that are zero but for one loss term keep loss terms apart."""
    setup = layer_setup(name)
    vectors: dict[str, list[Any]] = {"type-2": [], "empirical": []}
    for example in layer_examples(setup):
        one = torch.eye(len(example.F), dtype=torch.float64).unsqueeze(-1)  # [R, R, 1]
        vectors["empirical"].append(list(one * example.gradients))
        values, Q = torch.linalg.eigh(example.hessians)
        columns = (Q * values.clamp(min=0).sqrt().unsqueeze(1)).movedim(-1, 0)  # [C, R, C]
        vectors["type-2"].append([v for column in columns for v in one * column])
    for joint in (False, True):
        for fisher_type, given in vectors.items():
            expected = reference_blocks(setup, joint, fisher_type, approx)
            actual = reference_blocks(setup, joint, "given", approx, given)
            for a, b in zip(actual, expected, strict=True):
                assert_close(a.dense, b.dense)
                exact = exact_block(setup, a.group, fisher_type)
                assert_close(exact_block(setup, a.group, "given", given), exact)


@all_cases
def test_uncalled_and_all_other_blocks_are_positive_semidefinite(name: str, joint: bool):
    setup = layer_setup(name)
    for fisher_type in ("type-2", "empirical", "forward-only"):
        matrix = assemble_blocks(setup, reference_blocks(setup, joint, fisher_type, "reduce"))
        assert_close(matrix, matrix.T)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.norm()
    if name == "uncalled":
        for block in blocks_of(setup, joint):
            called = "a.weight" in block.group.values() or "a.bias" in block.group.values()
            assert bool(block.dense.any()) == called


# ---- eigenvalues and nearest products ------------------------------------------------------------
def eigenvectors(factor: Tensor | None) -> Any:
    return None if factor is None else torch.linalg.eigh(factor).eigenvectors


@all_cases
def test_eigenvalues(name: str, joint: bool):
    """They keep the trace of each part, and are never further from it than KFAC."""
    setup = layer_setup(name)
    for block in blocks_of(setup, joint, "reduce" if joint else "expand"):
        Q_g, Q_a = ([eigenvectors(f) for f in side] for side in zip(*block.parts, strict=True))
        eigenvalues = ekfac_eigenvalues(setup, block, Q_g, Q_a, "type-2")
        exact = exact_block(setup, block.group, "type-2")
        assert_close(sum(part.sum() for part in eigenvalues), exact.trace())
        bases = [g if a is None else torch.kron(g, a) for g, a in zip(Q_g, Q_a, strict=True)]
        pairs = zip(bases, eigenvalues, strict=True)
        matrix = torch.block_diag(*(Q @ part.flatten().diag() @ Q.T for Q, part in pairs))
        assert (matrix - exact).norm() <= (block.dense - exact).norm() + 1e-10 * exact.norm()
        nearest = nearest_parts(block, exact)
        own = without_coupling(block, exact)
        assert (nearest - own).norm() <= (block.dense - own).norm() + 1e-10 * exact.norm()


def nearest_parts(block: Block, exact: Tensor) -> Tensor:
    """Return the nearest product to each part of an exact block."""
    result, start = [], 0
    for B, A in block.parts:
        size = len(B) * (1 if A is None else len(A))
        own = exact[start : start + size, start : start + size]
        result.append(own if A is None else torch.kron(*nearest_kronecker(own, len(B), len(A))))
        start += size
    return torch.block_diag(*result)


def test_nearest_kronecker():
    torch.manual_seed(0)
    B, A = (torch.randn(n, n, dtype=torch.float64) for n in (2, 3))
    B, A = B @ B.T, A @ A.T
    assert_close(torch.kron(*nearest_kronecker(torch.kron(B, A), 2, 3)), torch.kron(B, A))
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix @ matrix.T
    B, A = nearest_kronecker(matrix, 2, 3)
    best = (torch.kron(B, A) - matrix).norm()
    for _ in range(20):
        left, right = (factor + 0.1 * torch.randn_like(factor) for factor in (B, A))
        assert (torch.kron(left, right) - matrix).norm() > best
    assert not torch.kron(*nearest_kronecker(0 * matrix, 2, 3)).any()


def test_forward_only_approximates_nothing():
    with pytest.raises(ValueError, match="forward-only"):
        exact_block(layer_setup("functional"), {"W": "model.first"}, "forward-only")
