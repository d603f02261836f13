"""Tests of ``curvlinops.testing.check_kfac``: what it requires, what it measures, what it finds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    BlockDiagonalLinearOperator,
    EighDecomposedLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops.kfac_utils import FromCanonicalLinearOperator
from curvlinops.testing import KFACReport, _kfac_checks, check_kfac
from curvlinops.testing._kfac_report import METHODS

F64 = torch.float64
MSE, CE = nn.MSELoss, nn.CrossEntropyLoss


def rand(*shape: int) -> Tensor:
    """Return inputs or targets that no batch statistic makes equal."""
    return torch.rand(*shape, dtype=F64) + 0.1


class Map(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Tensor:
        return self.function(x) if not self._modules else self.function(self, x)


def mean_of_positions() -> nn.Module:
    return Map(lambda h: h.mean(1))


@dataclass
class Case:
    """A model, data, and which blocks theory calls exact.

    Attributes:
        make: Returns the model, the loss and the data.
        exact: For each block, by its first parameter with separate blocks: whether expand and
            reduce must be exact.
        options: Options of the check.
        apart: Whether what holds for KFAC holds for EKFAC and KFOC, too.
        near: Blocks that happen to be exact or nearly so, although theory does not ask for it.
    """

    make: Callable[[], tuple[Any, nn.Module, list[Any]]]
    exact: dict[str, tuple[bool | None, bool | None]]
    options: dict[str, Any] = field(default_factory=dict)
    apart: bool = True
    near: tuple[str, ...] = ()

    def check(self, **changes: Any) -> KFACReport:
        model, loss, data = self.make()
        return check_kfac(
            model, loss, dict(model.named_parameters()), data, **{**self.options, **changes}
        )


def linear_net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double().eval()


def deep_linear(last: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    return linear_net(nn.Linear(3, 4), nn.Linear(4, 2), last())


def regression(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, nn.Module, list[Any]]:
    data = [(X, torch.rand_like(model(X).detach())) for X in inputs]
    return model, MSE(), data


def classification(model: nn.Module, *inputs: Any) -> tuple[nn.Module, nn.Module, list[Any]]:
    data = []
    for X in inputs:
        f = model(X)
        data.append((X, torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))))
    return model, CE(), data


def classifier() -> nn.Module:
    return linear_net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def pooled_convolution(*between: nn.Module, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), groups=groups)
    return linear_net(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *between, nn.Linear(4, 3))


def shared_layer() -> nn.Module:
    model = Map(
        lambda m, x: m.c(m.b(torch.tanh(m.b(m.a(x))))),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 3),
    )
    return model.double()


class Transformer(nn.Module):
    """Tokens to logits [N, V, S]; the last layer may share the weight of the embedding."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, X: Any) -> Tensor:
        h = self.embedding(X["tokens"])
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h).mT


def tokens_case(tied: bool) -> tuple[nn.Module, nn.Module, list[Any]]:
    model = Transformer(tied).double().eval()
    return classification(model, {"tokens": torch.tensor([[0, 1, 3], [4, 4, 2]])})


def num_tokens(X: Any) -> int:
    return len(X["tokens"])


def repeated(x: Tensor) -> Tensor:
    return x.repeat(3, *[1] * (x.ndim - 1))


def copies() -> tuple[nn.Module, nn.Module, list[Any]]:
    """Copies of one input, whose targets differ."""
    return classifier(), CE(), [(repeated(rand(1, 3)), torch.tensor([0, 2, 1]))]


BOTH, NEITHER = (True, True), (False, False)
EXPAND, REDUCE = (True, False), (False, True)
UNKNOWN = (None, None)
DEEP = ("0.weight", "0.bias", "1.weight", "1.bias")

CASES = {
    "deep linear": Case(
        lambda: regression(deep_linear(), rand(2, 3), rand(1, 3)), dict.fromkeys(DEEP, BOTH)
    ),
    "deep linear, empirical": Case(
        lambda: regression(deep_linear(), rand(2, 3), rand(1, 3)),
        {"0.weight": NEITHER, "0.bias": BOTH, "1.weight": NEITHER, "1.bias": BOTH},
        {"fisher_type": "empirical"},
    ),
    "deep linear, Monte-Carlo": Case(
        lambda: regression(deep_linear(), rand(2, 3), rand(1, 3)),
        {"0.weight": NEITHER, "0.bias": BOTH, "1.weight": NEITHER, "1.bias": BOTH},
        {"fisher_type": "mc", "mc_samples": 2},
    ),
    "deep linear, forward-only": Case(
        lambda: regression(deep_linear(), rand(2, 3), rand(1, 3)),
        dict.fromkeys(DEEP, NEITHER),
        {"fisher_type": "forward-only"},
        near=("1.weight", "1.bias"),  # the last layer's curvature is the identity
    ),
    "positions and as many terms": Case(
        lambda: regression(deep_linear(), rand(2, 3, 3), rand(1, 3, 3)),
        {"0.weight": EXPAND, "0.bias": BOTH, "1.weight": EXPAND, "1.bias": BOTH},
    ),
    "positions and as many terms, signs": Case(
        lambda: regression(deep_linear(), rand(2, 3, 3)),
        dict.fromkeys(DEEP, EXPAND),
        {"loss_terms": "signs"},
        apart=False,
    ),
    "positions that mix, signs": Case(
        lambda: regression(
            linear_net(nn.Linear(3, 4), Map(lambda h: h.cumsum(1)), nn.Linear(4, 2)), rand(2, 3, 3)
        ),
        {"0.weight": NEITHER, "0.bias": NEITHER, "2.weight": EXPAND, "2.bias": EXPAND},
        {"loss_terms": "signs"},
        apart=False,
    ),
    "final pooling": Case(
        lambda: regression(deep_linear(mean_of_positions), rand(2, 3, 3), rand(1, 3, 3)),
        dict.fromkeys(DEEP, REDUCE),
    ),
    "pooling inside": Case(
        lambda: regression(
            linear_net(nn.Linear(3, 4), mean_of_positions(), nn.Linear(4, 2)), rand(4, 3, 3)
        ),
        {"0.weight": REDUCE, "0.bias": REDUCE, "2.weight": BOTH, "2.bias": BOTH},
    ),
    "pooled convolution": Case(
        lambda: regression(pooled_convolution(), rand(3, 2, 3, 5)),
        {"0.weight": REDUCE, "0.bias": REDUCE, "3.weight": BOTH, "3.bias": BOTH},
    ),
    "pooled grouped convolution": Case(
        lambda: regression(pooled_convolution(groups=2), rand(3, 2, 3, 5)),
        {"0.weight": REDUCE, "0.bias": REDUCE, "3.weight": BOTH, "3.bias": BOTH},
    ),
    "pooled convolution, one datum": Case(
        lambda: classification(pooled_convolution(nn.Tanh()), rand(1, 2, 3, 5)),
        {"0.weight": REDUCE, "0.bias": REDUCE, "4.weight": BOTH, "4.bias": BOTH},
    ),
    "nonlinear convolution": Case(
        lambda: classification(
            linear_net(
                nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2),
                nn.GroupNorm(2, 4),
                nn.Flatten(),
                nn.Linear(28, 3),
            ),
            rand(3, 4, 3),
        ),
        {
            "0.weight": NEITHER,
            "0.bias": REDUCE,
            "1.weight": BOTH,
            "1.bias": BOTH,
            "3.weight": NEITHER,
            "3.bias": BOTH,
        },
    ),
    "one datum": Case(
        lambda: classification(classifier(), rand(1, 3)),
        dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), BOTH),
    ),
    "one datum, Monte-Carlo": Case(
        lambda: classification(classifier(), rand(1, 3)),
        dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), BOTH),
        {"fisher_type": "mc"},
    ),
    "copies": Case(copies, dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), BOTH)),
    "copies, empirical": Case(
        copies,
        dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), BOTH),
        {"fisher_type": "empirical"},
    ),
    "several data": Case(
        lambda: classification(classifier(), 5 * rand(2, 3), -5 * rand(2, 3)),
        {"0.weight": NEITHER, "0.bias": BOTH, "2.weight": NEITHER, "2.bias": BOTH},
    ),
    "one datum with positions": Case(
        lambda: classification(
            linear_net(nn.Linear(3, 4), nn.Tanh(), mean_of_positions(), nn.Linear(4, 3)),
            5 * torch.randn(1, 3, 3, dtype=F64),
        ),
        {"0.weight": NEITHER, "0.bias": REDUCE, "3.weight": BOTH, "3.bias": BOTH},
    ),
    "shared layer": Case(
        lambda: classification(shared_layer(), rand(2, 3)),
        {
            "a.weight": NEITHER,
            "a.bias": BOTH,
            "b.weight": NEITHER,
            "b.bias": REDUCE,
            "c.weight": NEITHER,
            "c.bias": BOTH,
        },
        near=("a.weight", "c.weight"),
    ),
    "transformer": Case(
        lambda: tokens_case(tied=False),
        {
            "embedding.weight": NEITHER,
            "attention.in_proj_weight": NEITHER,
            "attention.in_proj_bias": REDUCE,
            "attention.out_proj.weight": NEITHER,
            "attention.out_proj.bias": BOTH,
            "norm.weight": BOTH,
            "norm.bias": BOTH,
            "head.weight": NEITHER,
            "head.bias": BOTH,
        },
        {"batch_size_fn": num_tokens},
    ),
    "tied embedding": Case(
        lambda: tokens_case(tied=True),
        {
            "embedding.weight": UNKNOWN,
            "attention.in_proj_weight": NEITHER,
            "attention.in_proj_bias": REDUCE,
            "attention.out_proj.weight": NEITHER,
            "attention.out_proj.bias": BOTH,
            "norm.weight": BOTH,
            "norm.bias": BOTH,
            "head.bias": BOTH,
        },
        {"batch_size_fn": num_tokens},
    ),
    "narrow factors": Case(
        lambda: regression(deep_linear(), rand(2, 3), rand(1, 3)),
        {"0.weight": NEITHER, "0.bias": NEITHER, "1.weight": NEITHER, "1.bias": BOTH},
        {"max_factor_size": 2},
    ),
}
FAST = {
    "deep linear",
    "deep linear, empirical",
    "positions and as many terms",
    "pooling inside",
    "pooled grouped convolution",
    "copies, empirical",
    "several data",
}


def by_block(report: KFACReport) -> dict[str, dict[tuple[str, str | None], dict[str, Any]]]:
    """Return rows by first parameter, method and approximation."""
    result: dict[str, dict[tuple[str, str | None], dict[str, Any]]] = {}
    for row in report.rows:
        result.setdefault(row["parameters"][0], {})[row["method"], row["approx"]] = row
    return result


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_decisions(name: str):
    """Fails if a condition is forgotten or too strict, or if what is not exact looks exact."""
    case = CASES[name]
    blocks = by_block(case.check())
    total = blocks.pop("all blocks")
    assert list(blocks) == list(case.exact)
    for block, rows in blocks.items():
        expected = dict(zip(("expand", "reduce"), case.exact[block], strict=True))
        for (method, approx), row in rows.items():
            wanted = expected[approx] if approx else expected["expand"] or expected["reduce"]
            if method != "KFAC" and not case.apart:
                wanted = False
            assert row["exact"] is wanted, (block, method, approx, row["reason"])
            if wanted:
                assert row["distance"] < 1e-8
                assert row["cosine"] == pytest.approx(1, abs=1e-8)
            elif method == "KFAC" and wanted is False and block not in case.near:
                assert row["distance"] > 1e-4, (block, approx)
    verdicts = [rows["KFAC", "reduce"]["exact"] for rows in blocks.values()]
    assert total["KFAC", "reduce"]["exact"] is (
        None if None in verdicts and False not in verdicts else all(verdicts)
    )


@pytest.mark.parametrize(
    "name",
    [
        "pooled grouped convolution",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in sorted({*CASES} - {"pooled grouped convolution"})
        ),
    ],
)
def test_joint_blocks(name: str):
    """Fails if the constant input of a joint bias is forgotten in what is required."""
    case = CASES[name]
    report = case.check(separate_weight_and_bias=False)
    for block, rows in by_block(report).items():
        if block in case.exact and block.endswith("weight") and block != "embedding.weight":
            assert len(rows["KFAC", "expand"]["parameters"]) == 2
            exact = tuple(rows["KFAC", approx]["exact"] for approx in ("expand", "reduce"))
            assert exact == case.exact[block]


def functional_model(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x @ params["a"], params["W"].reshape(2, 4), params["b"])


def functional_arguments() -> dict[str, Any]:
    return {
        "model_func": functional_model,
        "loss_func": MSE(),
        "params": {"a": rand(3, 4), "W": rand(2, 2, 2), "b": rand(2)},
        "data": [(rand(3, 3), rand(3, 2))],
        "backend": "make_fx",
    }


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_functional_model(joint: bool):
    """Fails if transposed weights, or reshaped ones, are not followed."""
    arguments = functional_arguments()
    report = check_kfac(**arguments, separate_weight_and_bias=not joint)
    assert len(report.rows) == 5 * (3 - joint + 1)
    assert all(row["exact"] for row in report.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep linear", "pooled convolution", "transformer"])
def test_backend(name: str):
    assert [r["exact"] for r in CASES[name].check(backend="make_fx").rows] == [
        r["exact"] for r in CASES[name].check().rows
    ]


@pytest.mark.slow
def test_single_precision():
    """Fails if conditions or comparisons are too strict for float32."""
    model, loss, data = CASES["pooling inside"].make()
    model, data = model.float(), [(X.float(), y.float()) for X, y in data]
    blocks = by_block(check_kfac(model, loss, dict(model.named_parameters()), data))
    assert blocks["0.weight"]["KFAC", "reduce"]["exact"] is True
    assert blocks["0.weight"]["KFAC", "expand"]["exact"] is False
    assert blocks["2.weight"]["KFAC", "expand"]["exact"] is True


def test_report():
    """Fails if distances, cosines or the best of them are those of something else."""
    model, loss, data = CASES["several data"].make()
    params = {name: p for name, p in model.named_parameters() if name in ("2.weight", "2.bias")}
    report = check_kfac(model, loss, params, data)
    json.dumps(report.rows)  # plain data
    arguments = (model, loss, params, data)
    G = GGNLinearOperator(*arguments).to_dense()
    G = torch.block_diag(G[:12, :12], G[12:, 12:])
    options: dict[str, Any] = {"fisher_type": "type-2"}
    operators = {
        ("KFAC", "expand"): KFACLinearOperator(*arguments, **options),
        ("EKFAC", "reduce"): EKFACLinearOperator(*arguments, **options, kfac_approx="reduce"),
        ("KFOC", None): KFOCLinearOperator(*arguments, **options),
    }
    blocks = by_block(report)
    for pair, op in operators.items():
        K = op.to_dense()
        for name, part in (("2.weight", slice(12)), ("2.bias", slice(12, 15)), ("all blocks", ...)):
            mine, exact = (A if part is ... else A[part, part] for A in (K, G))
            row = blocks[name][pair]
            distance = (mine - exact).norm() / exact.norm()
            cosine = (mine * exact).sum() / mine.norm() / exact.norm()
            assert row["distance"] == pytest.approx(distance.item(), abs=1e-10)
            assert row["cosine"] == pytest.approx(cosine.item(), abs=1e-10)
            assert (row["size"], row["positions"]) == (len(exact), None if part is ... else 1)
    title, header, ruler, *lines = str(report).splitlines()
    assert "GGN (fisher_type=type-2, N = 4, R = 1)" in title
    assert re.split(r"\s{2,}", header)[3:] == [
        "KFAC expand",
        "KFAC reduce",
        "EKFAC expand",
        "EKFAC reduce",
        "KFOC",
        "nearest",
    ]
    assert set(ruler) == {"-", " "}
    weight, bias, whole = lines[:3]
    assert weight.startswith("2.weight") and weight.endswith("KFOC") and "= " not in weight
    assert bias.startswith("2.bias") and bias.endswith("KFAC expand") and bias.count("= ") == 5
    assert whole.startswith("all blocks  15")
    for line in lines[:3]:  # columns are aligned
        assert all(line[i - 1] == " " for i in (header.index("EKFAC exp"), header.index("KFOC")))


def test_a_parameter_that_is_not_used():
    model = linear_net(nn.Linear(3, 2))
    model.register_module("unused", nn.Linear(2, 3).double())
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    rows = by_block(
        check_kfac(model, MSE(), dict(model.named_parameters()), [(rand(2, 3), rand(2, 2))])
    )
    assert all(row["exact"] for row in rows["unused.weight"].values())
    assert all(row["distance"] == 0 for row in rows["unused.weight"].values())


@pytest.mark.slow
def test_parameters_in_no_layer(monkeypatch: pytest.MonkeyPatch):
    """Fails if diagonal blocks are judged as Kronecker products, or not at all."""
    model = Map(lambda m, x: torch.tanh(m.a(x)) * m.a.bias, a=nn.Linear(3, 2)).double()
    arguments = (model, CE(), dict(model.named_parameters()), [(rand(3, 3), torch.arange(3) % 2)])
    blocks = by_block(check_kfac(*arguments, unsupported="diagonal"))
    assert {row["reason"] for row in blocks["a.bias"].values()} == {"diagonal"}
    (distance,) = {round(row["distance"], 6) for row in blocks["a.bias"].values()}
    assert distance > 1e-2  # to all of the block
    assert all(row["exact"] is False for row in blocks["a.weight"].values())
    own = _kfac_checks._CLASSES["EKFAC"]

    class Wrong(own):  # type: ignore[valid-type, misc]
        def __init__(self, **options: Any):
            super().__init__(**options)
            self[1][1] = 2 * self[1][1]

    monkeypatch.setitem(_kfac_checks._CLASSES, "EKFAC", Wrong)
    with pytest.raises(AssertionError, match=r"diagonal block of 'a\.bias': EKFAC expand"):
        check_kfac(*arguments, unsupported="diagonal")


class TestRefused:
    def test_large_blocks(self):
        model, loss, data = CASES["deep linear"].make()
        params = dict(model.named_parameters())
        message = r"more than max_block=11 parameters.*0\.weight \(12\).*Leave them out of params"
        with pytest.raises(ValueError, match=message):
            check_kfac(model, loss, params, data, max_block=11)
        with pytest.raises(ValueError, match=r"0\.weight \+ 0\.bias \(16\)"):
            check_kfac(model, loss, params, data, max_block=12, separate_weight_and_bias=False)

    def test_approximation(self):
        with pytest.raises(ValueError, match="checks both"):
            CASES["deep linear"].check(kfac_approx="reduce")

    def test_examples_that_depend_on_each_other(self):
        model = linear_net(Map(lambda x: x - x.mean(0)), nn.Linear(3, 2))
        data = [(rand(3, 3), rand(3, 2))]
        with pytest.raises(ValueError, match="something else for an example alone"):
            check_kfac(model, MSE(), dict(model.named_parameters()), data)

    def test_examples_that_cannot_be_told_apart(self):
        model, loss, data = regression(deep_linear(), rand(2, 3, 3))
        with pytest.raises(ValueError, match="along the first axis"):
            check_kfac(model, loss, dict(model.named_parameters()), data, batch_size_fn=lambda X: 6)


def test_nothing_is_touched():
    model, loss, data = CASES["deep linear"].make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    with torch.inference_mode():
        check_kfac(model, loss, dict(model.named_parameters()), data)
    assert all(map(torch.equal, before[0], model.parameters()))
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---- defects -------------------------------------------------------------------------------------
def kfac_blocks(K: Any) -> list[Any]:
    """Return all Kronecker products of an operator."""
    parts: list[Any] = []
    for block in K[1]:
        parts += list(block) if isinstance(block, BlockDiagonalLinearOperator) else [block]
    return parts


def change_factors(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """Return what replaces the factors B and A of weights."""

    def apply(K: Any, options: dict[str, Any]) -> None:
        for block in kfac_blocks(K):
            if len(block) == 2:
                block[0], block[1] = change(block[0], block[1])

    return apply


def only(approx: str, change: Callable[..., None]) -> Callable[..., None]:
    """Return a defect of one way to treat positions."""

    def apply(K: Any, options: dict[str, Any]) -> None:
        if str(options["kfac_approx"]) == approx:
            change(K, options)

    return apply


def no_constant(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    A = A.clone()
    A[-1], A[:, -1] = 0, 0
    return B, A


def asymmetric(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B, A + 1e-3 * torch.ones_like(A).triu(1)


def swapped(K: Any, options: dict[str, Any]) -> None:
    for i, block in enumerate(K[1]):
        if len(block) == 2:
            K[1][i] = KroneckerProductLinearOperator(block[1], block[0])


def in_other_batches(K: Any, options: dict[str, Any]) -> None:
    """The scale depends on the number of batches."""
    if len(options["data"]) > 2:
        change_factors(lambda B, A: (2 * B, A))(K, options)


def bias_as_weight(K: Any, options: dict[str, Any]) -> None:
    """Blocks of biases are scaled by the number of positions."""
    for block in kfac_blocks(K):
        if len(block) == 1:
            block[0] = 3 * block[0]


def wrong_order(K: Any, options: dict[str, Any]) -> None:
    """P takes the first weight for one that is stored by columns."""
    shapes = {name: p.shape for name, p in options["params"].items()}
    layouts = [{"view": [4, 3], "order": [1, 0]}, None, None, None]
    P = FromCanonicalLinearOperator(shapes, K.mapping, K.device, K.dtype, layouts)
    K[0], K[2] = P, P.adjoint()


def wrong_pairs(K: Any, options: dict[str, Any]) -> None:
    """Weights and biases are joined although they should be separate."""
    wrong = KFACLinearOperator(**{**options, "separate_weight_and_bias": False})
    K._assemble(list(wrong), wrong._report)


def wrong_product(K: Any, options: dict[str, Any]) -> None:
    """The first operator of the chain is not the adjoint of the last."""
    K[0] = 2 * K[0]


def kfac_eigenvalues(E: Any, options: dict[str, Any]) -> None:
    """Eigenvalues are those of KFAC's factors."""
    K = KFACLinearOperator(**options)
    for mine, theirs in zip(kfac_blocks(E), kfac_blocks(K), strict=True):
        Q = mine.eigenvectors.to_dense()
        mine.eigenvalues = (Q.T @ theirs.to_dense() @ Q).diag()


def change_eigen(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """Return what replaces dense eigenvectors and eigenvalues of an operator."""

    def apply(E: Any, options: dict[str, Any]) -> None:
        for i, block in enumerate(E[1]):
            values, Q = change(block.eigenvalues, block.eigenvectors.to_dense())
            E[1][i] = EighDecomposedLinearOperator(values, Q)

    return apply


def twist(values: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the first factor are transposed."""
    return values, Q.T.contiguous()


def flipped(values: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues are in the order of another layout: the trace is right."""
    return values.flip(0), Q


def shrunk(values: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Two eigenvalues are a bit wrong: neither trace nor distance show it."""
    shift = torch.zeros_like(values)
    shift[-1], shift[0] = -1e-6, 1e-6
    return values + shift * values.abs().max(), Q


def like_kfac(K: Any, options: dict[str, Any]) -> None:
    """The factors are KFAC's."""
    theirs = KFACLinearOperator(**{k: v for k, v in options.items() if k not in ("tol",)})
    for i, block in enumerate(theirs[1]):  # type: ignore[call-overload]
        K[1][i] = block


def touch_gradients(K: Any, options: dict[str, Any]) -> None:
    for p in options["params"].values():
        p.grad = torch.zeros_like(p)


def leave_hooks(K: Any, options: dict[str, Any]) -> None:
    options["model_func"].register_forward_hook(lambda *_: None)


def train(K: Any, options: dict[str, Any]) -> None:
    options["model_func"].train()


def draw(K: Any, options: dict[str, Any]) -> None:
    torch.rand(1)


@dataclass
class Defect:
    """A defect, and the property that must find it.

    Attributes:
        change: Called with an operator and its arguments.
        finds: What the message must match.
        case: For which case.
        method: In which operators.
        options: Options of the check.
    """

    change: Callable[..., None]
    finds: str
    case: str = "deep linear"
    method: str = "KFAC"
    options: dict[str, Any] = field(default_factory=dict)


JOINT = {"separate_weight_and_bias": False}
DEFECTS = {
    "gradient factor scaled by N": Defect(
        change_factors(lambda B, A: (3 * B, A)),
        r"exact block of '0\.weight': KFAC expand must be exact \(equal curvature at all positions "
        r"of all data\): relative error 2\.000e\+00",
    ),
    "the same where nothing is exact": Defect(
        change_factors(lambda B, A: (3 * B, A)), "definition of '0.weight'", "several data"
    ),
    "inputs are averaged over the wrong number": Defect(
        change_factors(lambda B, A: (B, A * 3 / 2)), "exact block of '0.weight'.*5.000e-01"
    ),
    "no ones for a joint bias": Defect(
        change_factors(no_constant), r"exact block of '0\.weight' \+ '0\.bias'", options=JOINT
    ),
    "a constant that is not one": Defect(
        change_factors(lambda B, A: (B, A + 1e-6 * torch.eye(len(A), dtype=A.dtype))),
        "exact block of '0.weight' .* relative error",
        options=JOINT,
    ),
    "factors in the wrong order": Defect(swapped, "exact block of '0.weight'"),
    "factors that are not symmetric": Defect(
        change_factors(asymmetric), "factors of '0.weight': the input factor of KFAC expand is not"
    ),
    "factors that are negative": Defect(
        change_factors(lambda B, A: (-B, -A)), "gradient factor of KFAC expand has a negative"
    ),
    "reduce divides inputs by S twice": Defect(
        only("reduce", change_factors(lambda B, A: (B, A / 9))),
        "exact block of '0.weight': KFAC reduce must be exact .equal curvature for all data",
        "final pooling",
    ),
    "reduce sums inputs": Defect(
        only("reduce", change_factors(lambda B, A: (B, A * 9))),
        "exact block of '0.weight': KFAC reduce",
        "final pooling",
    ),
    "reduce averages gradients": Defect(
        only("reduce", change_factors(lambda B, A: (B / 9, A))),
        "exact block of '0.weight': KFAC reduce",
        "pooling inside",
    ),
    "expand sums positions before squaring": Defect(
        only("expand", bias_as_weight),
        "exact block of '0.bias': KFAC expand must be exact .positions are not coupled",
        "positions and as many terms",
    ),
    "P stores weights in another order": Defect(
        wrong_order, "canonical form of '0.weight': its entries are in a wrong order"
    ),
    "a chain that is not P B Pᵀ": Defect(wrong_product, "chain: products of KFAC expand"),
    "blocks of weights and biases": Defect(wrong_pairs, "groups: weights and biases are not sep"),
    "a scale that depends on batches": Defect(
        in_other_batches, "batching of '0.weight': KFAC expand with single examples"
    ),
    "EKFAC with KFAC's eigenvalues": Defect(
        kfac_eigenvalues, "EKFAC (trace|eigenvalues) of '0.weight'", "several data", "EKFAC"
    ),
    "EKFAC with scaled eigenvalues": Defect(
        change_eigen(lambda values, Q: (2 * values, Q)),
        "EKFAC trace of '0.weight': EKFAC expand: relative error 1.000e",
        "several data",
        "EKFAC",
    ),
    "EKFAC's eigenvalues in another order": Defect(
        change_eigen(flipped),
        "EKFAC distance of '0.weight': EKFAC expand is at",
        "several data",
        "EKFAC",
    ),
    "EKFAC's eigenvalues a bit wrong": Defect(
        change_eigen(shrunk),
        "EKFAC eigenvalues of '0.weight': EKFAC expand",
        "several data",
        "EKFAC",
    ),
    "EKFAC's eigenvectors transposed": Defect(
        change_eigen(twist),
        "EKFAC basis of '0.weight': that of EKFAC expand does not diagonalise",
        "several data",
        "EKFAC",
    ),
    "EKFAC's eigenvectors not normalised": Defect(
        change_eigen(lambda values, Q: (values / 4, 2 * Q)),
        "EKFAC basis of '0.weight': that of EKFAC expand is not orthogonal",
        "several data",
        "EKFAC",
    ),
    "EKFAC's eigenvectors transposed in an exact case": Defect(
        change_eigen(twist), "exact block of '0.weight': EKFAC expand", method="EKFAC"
    ),
    "KFOC with KFAC's factors": Defect(
        like_kfac,
        "KFOC optimality of '0.weight': the (gradient|input) factor is not the best",
        "several data",
        "KFOC",
    ),
    "KFOC scaled": Defect(
        change_factors(lambda B, A: (3 * B, A)),
        "KFOC distance of '0.weight': KFOC is at",
        "several data",
        "KFOC",
    ),
    "gradients are set": Defect(touch_gradients, "model untouched: the gradient of '0.weight'"),
    "hooks are left": Defect(leave_hooks, "model untouched: the hooks of module ''"),
    "another mode": Defect(train, "model untouched: the mode of module"),
    "random numbers are drawn": Defect(draw, "random generators: PyTorch's has changed"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects(monkeypatch: pytest.MonkeyPatch, name: str):
    """Fails if a property is not checked, or is called by another name."""
    defect = DEFECTS[name]
    own = _kfac_checks._CLASSES[defect.method]

    class Wrong(own):  # type: ignore[valid-type, misc]
        def __init__(self, **options: Any):
            super().__init__(**options)
            defect.change(self, options)

    monkeypatch.setitem(_kfac_checks._CLASSES, defect.method, Wrong)
    if defect.method != "KFOC":  # to save time
        methods = [method for method in METHODS if method[0] != "KFOC"]
        monkeypatch.setattr(_kfac_checks.KFACCheck, "methods", lambda self: methods)
    with pytest.raises(AssertionError, match=defect.finds):
        CASES[defect.case].check(**defect.options)
