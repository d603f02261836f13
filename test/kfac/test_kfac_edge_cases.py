"""Cases in which KFAC was, or could be, wrong without a word; parameters in parts or no layers."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    LayerType,
    register_layer,
)
from curvlinops.computers.formats import Format, NormFormat
from curvlinops.computers.layers import LAYERS, Call

F64 = torch.float64


def linear_problem(dtype: torch.dtype = F64, scale: float = 1.0, rows: int = 6):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    data = [((scale * torch.rand(rows, 4)).to(dtype), torch.rand(rows, 2).to(dtype))]
    return model, nn.MSELoss(), dict(model.named_parameters()), data


def test_transpose_after_replacing_a_factor():
    """A user may put in a factor that is not symmetric: the operator is then not self-adjoint."""
    K = KFACLinearOperator(*linear_problem())
    assert K.SELF_ADJOINT and K.H is K
    K = copy.deepcopy(K)
    K[1][0][0] = torch.rand(3, 3, dtype=F64)
    dense, v = K.to_dense(), torch.rand(K.shape[0], dtype=F64)
    assert not K.SELF_ADJOINT
    torch.testing.assert_close(v @ K, v @ dense)
    torch.testing.assert_close(K.T @ v, dense.T @ v)
    torch.testing.assert_close((2 * K).T @ v, 2 * dense.T @ v)
    torch.testing.assert_close(torch.as_tensor(K.to_scipy().rmatvec(v.numpy())), dense.T @ v)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_refused(use_reentrant: bool):
    """Hooks do not see the gradients of a checkpointed layer: its factors would be zero."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=use_reentrant)
            return self.b(hidden)

    _, loss, _, data = linear_problem(torch.float32)
    model = Checkpointed()
    with pytest.raises(NotImplementedError, match=r"layer of 'a.weight' and 'a.bias'.*checkpoint"):
        KFACLinearOperator(model, loss, dict(model.named_parameters()), data)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(("scale", "rows"), [(10.0, 1000), (1.0, 40_000)])
def test_half_precision_sums_do_not_overflow(scale: float, rows: int, kfac_approx: str):
    """Raw sums over a batch exceed float16's 65504, although the factors do not."""
    problem = linear_problem(torch.float16, scale, rows)
    model, loss, params, data = problem
    options = {"fisher_type": "type-2", "kfac_approx": kfac_approx}
    half = KFACLinearOperator(*problem, **options)
    wide = {name: p.detach().float() for name, p in params.items()}
    single = KFACLinearOperator(
        copy.deepcopy(model).float(),
        loss,
        wide,
        [(X.float(), y.float()) for X, y in data],
        **options,
    )
    for actual, expected in zip(half.factors("0.weight"), single.factors("0.weight"), strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=1e-3)


def test_half_precision_pooling_does_not_overflow():
    """reduce sums an example's inputs over positions before it averages them."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x).mean(1)

    model = Pooled().half()
    X = (50 * torch.rand(2, 3000, 4)).half()  # sums over positions exceed 65504, means do not
    params, data = dict(model.named_parameters()), [(X, torch.rand(2, 2).half())]
    K = KFACLinearOperator(model, nn.MSELoss(), params, data, kfac_approx="reduce")
    mean = X.float().mean(1)
    torch.testing.assert_close(
        K.factors("linear.weight")[1].float(), mean.T @ mean / 2, rtol=2e-2, atol=0
    )


# ---- parameters in parts -------------------------------------------------------------------------
# What the package gets wrong; to be removed.


class Uses(nn.Module):
    """A model from a function of it and the input, with its modules and parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def batches(*sizes: int, d_in: int = 2, d_out: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(n, 3, d_in, dtype=F64), torch.rand(n, 3, d_out, dtype=F64)) for n in sizes]


def build(model: nn.Module, data: Any = None, params: Any = None, **options: Any):
    params = dict(model.named_parameters()) if params is None else params
    data = batches(2, 1) if data is None else data
    return KFACLinearOperator(
        model, nn.MSELoss(), params, data, **{"fisher_type": "type-2", **options}
    )


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [2, 1])
def test_parts_are_layers_of_their_own(rows: int, transposed: bool, joint: bool, kfac_approx: str):
    """Rows of a weight (columns of one that is stored transposed) with different inputs."""
    W, b = torch.rand(4, 2), torch.rand(4)

    def whole(m: Any, x: Tensor) -> Tensor:
        if transposed:  # without bias
            y = torch.tanh(x @ m.w[:, :rows]), torch.sin(2 * x) @ m.w[:, rows:]
        else:
            y = (
                torch.tanh(F.linear(x, m.w[:rows], m.b[:rows])),
                F.linear(torch.sin(2 * x), m.w[rows:], m.b[rows:]),
            )
        return torch.cat(y, dim=-1)

    def split(m: Any, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(m.first(x)), m.second(torch.sin(2 * x))], dim=-1)

    linears = [nn.Linear(2, n, bias=not transposed) for n in (rows, 4 - rows)]
    parts = zip(linears, W.split([rows, 4 - rows]), b.split([rows, 4 - rows]), strict=True)
    for linear, weight, bias in parts:
        linear.load_state_dict({"weight": weight, **({} if transposed else {"bias": bias})})
    models = [
        Uses(whole, **({"w": W.T.clone()} if transposed else {"w": W, "b": b})),
        Uses(split, first=linears[0], second=linears[1]),
    ]
    data = batches(2, 1, d_out=4)
    options = {"kfac_approx": kfac_approx, "separate_weight_and_bias": not joint}
    K, expected = (build(model, data, **options) for model in models)
    assert isinstance(K.block("w"), BlockDiagonalLinearOperator)
    blocks = [expected.factors(f"{name}.weight") for name in ("first", "second")]
    assert len(K.factors("w")) == 2
    torch.testing.assert_close(K.factors("w"), blocks)
    if not transposed and not joint:
        blocks = [expected.factors(f"{name}.bias") for name in ("first", "second")]
        torch.testing.assert_close(K.factors("b"), blocks)
    dense = [expected.block(f"{name}.weight").to_dense() for name in ("first", "second")]
    torch.testing.assert_close(K.block("w").to_dense(), torch.block_diag(*dense))
    # what a part reads and writes is independent of the others: products with vectors, the inverse
    v = torch.rand(K.shape[1], dtype=F64)
    damped = K.to_dense() + 0.1 * torch.eye(len(v), dtype=F64)
    torch.testing.assert_close(
        K.inverse(damping=0.1, use_exact_damping=True) @ v, torch.linalg.solve(damped, v)
    )


@pytest.mark.parametrize("joint", [False, True])
def test_a_part_can_be_used_repeatedly(joint: bool):
    """A part that two layers read is shared by them."""

    def whole(m: Any, x: Tensor) -> Tensor:
        h = F.linear(torch.tanh(F.linear(x, m.w[:2])), m.w[:2])
        return h + F.linear(x, m.w[2:])

    def split(m: Any, x: Tensor) -> Tensor:
        return m.first(torch.tanh(m.first(x))) + m.second(x)

    W = torch.rand(4, 2)
    linears = [nn.Linear(2, 2, bias=False) for _ in range(2)]
    for linear, weight in zip(linears, W.chunk(2), strict=True):
        linear.load_state_dict({"weight": weight})
    data = batches(2, 1)
    K = build(Uses(whole, w=W), data, separate_weight_and_bias=not joint)
    expected = build(Uses(split, first=linears[0], second=linears[1]), data)
    blocks = [expected.factors(f"{name}.weight") for name in ("first", "second")]
    torch.testing.assert_close(K.factors("w"), blocks)


def test_the_transpose_is_a_weight():
    """In the parameter's own order, K is that of the plain layer, permuted."""
    W = torch.rand(2, 3)
    plain = nn.Linear(2, 3, bias=False)
    plain.load_state_dict({"weight": W.T})
    data = batches(2, 1, d_out=3)
    actual = build(Uses(lambda m, x: x @ m.w, w=W), data)
    expected = build(plain.double(), data)
    order = torch.arange(6).reshape(3, 2).T.flatten()
    torch.testing.assert_close(actual.to_dense(), expected.to_dense()[order][:, order])


@pytest.mark.parametrize(
    ("use", "size"),
    [
        (lambda m, x: F.linear(x, m.w[:2], m.b[2:]) + F.linear(x, m.w[2:], m.b[:2]), 4),
        (lambda m, x: F.linear(x, m.w[:2], m.b) + F.linear(x, m.w[2:]), 2),
        (lambda m, x: F.linear(x, m.w[:2], m.b) + F.linear(x, m.w[2:], m.b), 2),
    ],
    ids=["crossed", "of one part", "of both parts"],
)
def test_bias_of_other_rows(use: Callable[[Any, Tensor], Tensor], size: int):
    """A joint block would put the wrong rows of weight and bias together: they stay separate."""
    model = Uses(use, w=torch.rand(4, 2), b=torch.rand(size))
    data = batches(2, 1)
    separate, joint = (build(model, data, separate_weight_and_bias=s) for s in (True, False))
    assert joint.mapping == separate.mapping == [{"W": "w"}, {"b": "b"}]
    torch.testing.assert_close(joint.to_dense(), separate.to_dense())
    assert joint.trace() > 0


# ---- parameters that are in no layer -------------------------------------------------------------
def scaled(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) * m.scale + m.shift)


def scaled_model() -> Uses:
    return Uses(
        scaled, scale=torch.rand(3), a=nn.Linear(2, 3), shift=torch.rand(3), b=nn.Linear(3, 2)
    )


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical", "forward-only"])
def test_diagonal_blocks(fisher_type: str, joint: bool, kfac_approx: str):
    model, data = scaled_model(), batches(2, 3)
    params = dict(model.named_parameters())
    options = {
        "fisher_type": fisher_type,
        "kfac_approx": kfac_approx,
        "separate_weight_and_bias": not joint,
    }
    K = build(model, data, unsupported="diagonal", **options)
    layers = {name: p for name, p in params.items() if name[0] in "ab"}
    others = {name: p for name, p in params.items() if name not in layers}
    assert list(others) == ["scale", "shift"]
    expected = build(model, data, layers, **options)
    for name in layers:
        torch.testing.assert_close(K.factors(name), expected.factors(name), rtol=0, atol=0)
    assert [g for g in K.mapping if g not in expected.mapping] == [{"W": "scale"}, {"W": "shift"}]
    diagonal = GGNDiagonalLinearOperator(model, nn.MSELoss(), others, data).diagonal()
    G = GGNLinearOperator(model, nn.MSELoss(), others, data).to_dense()
    torch.testing.assert_close(diagonal, G.diagonal())
    for name, entries in zip(others, diagonal.split(3), strict=True):
        (factor,) = K.factors(name)
        assert isinstance(factor, DiagonalLinearOperator)
        assert entries.all()
        torch.testing.assert_close(K.block(name).to_dense(), entries.diag())

    # in the whole matrix, at the parameters' places
    dense, start = K.to_dense(), 0
    torch.testing.assert_close(dense, dense.T)
    for name, p in params.items():
        rows = slice(start, start + p.numel())
        start += p.numel()
        if name in others:
            torch.testing.assert_close(dense[rows, rows], K.block(name).to_dense())
            assert dense[rows].count_nonzero() == p.numel()
    torch.testing.assert_close(K.trace(), dense.trace())
    torch.testing.assert_close(K.diagonal(), dense.diagonal())

    v = torch.rand(len(dense), dtype=F64)
    torch.testing.assert_close(K @ v, dense @ v)
    damped = dense + 0.1 * torch.eye(len(dense), dtype=F64)
    inverse = K.inverse(damping=0.1, use_exact_damping=True)
    torch.testing.assert_close(inverse @ v, torch.linalg.solve(damped, v))
    for heuristic in ({}, {"use_heuristic_damping": True}):
        product = K.inverse(damping=0.1, **heuristic) @ v
        torch.testing.assert_close(product[:6], v[:6] / (dense.diagonal()[:6] + 0.1))


def test_all_blocks_can_be_diagonal():
    model = Uses(lambda m, x: x * m.scale + m.shift, scale=torch.rand(2), shift=torch.rand(2))
    data = batches(2)
    K = build(model, data, unsupported="diagonal")
    D = GGNDiagonalLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    torch.testing.assert_close(K.to_dense(), D.to_dense())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("use", "parts", "name"),
    [
        (lambda m, x: m.lin(x) * m.lin.bias, {}, "lin.bias"),
        (lambda m, x: m.lin(x) * m.lin.weight.sum(), {}, "lin.weight"),
        (lambda m, x: m.norm(m.lin(x)) * m.norm.bias, {"norm": nn.LayerNorm}, "norm.bias"),
        (lambda m, x: m.norm(m.lin(x)) * m.norm.weight, {"norm": nn.LayerNorm}, "norm.weight"),
        (lambda m, x: m.lin(F.linear(F.linear(x, m.w).tanh(), m.w.T)), {"w": None}, "w"),
        (lambda m, x: m.lin(F.linear(x, m.w[:2]) * F.linear(x, m.w[1:])), {"w": None}, "w"),
    ],
    ids=["bias", "weight", "norm's bias", "norm's weight", "transposed", "overlapping"],
)  # fmt: skip
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.filterwarnings("ignore:Examples cannot be differentiated:UserWarning")
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_diagonal_block_of_a_parameter_that_is_in_a_layer_too(
    use: Any,
    parts: dict[str, Any],
    name: str,
    joint: bool,
    later: bool,
    kfac_approx: str,
):
    """The other parameters of that layer keep their factors; also if a later batch shows it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if later and len(x) == 2:
            return m.lin(x) if name == "w" else getattr(m, name.split(".")[0])(m.plain(x))
        return use(m, x)

    made = {key: torch.rand(3, 2) if kind is None else kind(2) for key, kind in parts.items()}
    model = Uses(forward, lin=nn.Linear(2, 2), plain=nn.Linear(2, 2), **made)
    for p in model.parameters():
        nn.init.normal_(p)
    params, data = dict(model.named_parameters()), batches(2, 3)
    options = {"separate_weight_and_bias": not joint, "kfac_approx": kfac_approx}
    K = build(model, data, unsupported="diagonal", **options)
    D = GGNDiagonalLinearOperator(model, nn.MSELoss(), {name: params.pop(name)}, data)
    assert D.diagonal().all()
    torch.testing.assert_close(K.block(name).to_dense(), D.to_dense())
    expected = build(model, data, params, **options)
    for other in params:
        torch.testing.assert_close(K.factors(other), expected.factors(other))


def test_non_finite_diagonal_blocks():
    model = scaled_model()
    nn.init.constant_(model.a.bias, torch.nan)
    params = {"scale": model.scale}
    with pytest.raises(RuntimeError, match=r"factor of 'scale' has non-finite"):
        build(model, params=params, unsupported="diagonal", check_deterministic=False)


@pytest.mark.parametrize("joint", [False, True])
def test_norms_whose_bias_is_not_always_used(joint: bool):
    """Batches with and without the bias add up."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.layer_norm(m.lin(x), (2,), m.norm.weight, m.norm.bias if len(x) == 2 else None)

    model = Uses(forward, lin=nn.Linear(2, 2), norm=nn.LayerNorm(2))
    data = [(X[:, 0], y[:, 0]) for X, y in batches(2, 3)]
    params = {name: p for name, p in model.named_parameters() if "norm" in name}
    K = build(model, data, params, separate_weight_and_bias=not joint)
    G = GGNLinearOperator(model, nn.MSELoss(), params, data)
    torch.testing.assert_close(K.diagonal(), G.to_dense().diagonal())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("limit", [2, 4, 100])
def test_wide_ties(limit: int, joint: bool):
    """An embedding that is tied to the output layer, with sides that keep their diagonal."""
    model = Uses(lambda m, x: m.out(m.e(x).tanh()), e=nn.Embedding(5, 3), out=nn.Linear(3, 5))
    model.out.weight = model.e.weight
    data = [(torch.randint(5, (6,)), torch.rand(6, 5, dtype=F64))]
    K = build(model, data, max_factor_size=limit, separate_weight_and_bias=not joint)
    B, A = K.factors("e.weight")
    assert isinstance(B, DiagonalLinearOperator) == (limit < 5)
    assert isinstance(A, DiagonalLinearOperator) == (limit < 3 + joint)
    assert K.trace() > 0


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("shape", [(1,), (6, 4)])
def test_biases_that_are_broadcast(shape: tuple[int, ...], backend: str):
    """They are no biases of outputs: joint blocks were too small, and their curvature wrong."""

    def linear(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.w, m.b)

    def addmm(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b, x, m.w.T)

    data = [(torch.rand(6, 3, dtype=F64), torch.rand(6, 4, dtype=F64))]
    for function in (linear, addmm):
        model = Uses(function, w=torch.rand(4, 3), b=torch.rand(shape))
        with pytest.raises(NotImplementedError, match=rf"'b' \(used by {function.__name__}\)"):
            build(model, data, backend=backend, separate_weight_and_bias=False)


# ---- layers that users add -----------------------------------------------------------------------
@pytest.fixture
def _restored_layers() -> Iterator[None]:
    before = list(LAYERS)
    yield
    LAYERS[:] = before


def _read_inner(input: Tensor, other: Tensor) -> Call | None:
    return Call(input, other, None, Format()) if other.ndim == 2 else None


def _read_tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Call | None:
    return Call(a, b.T, None, Format()) if dims == 1 and b.ndim == 2 else None


def scaled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A function of one's own, which asks for modes as those of PyTorch do."""
    if has_torch_function((x, weight)):
        return handle_torch_function(scaled_linear, (x, weight), x, weight)
    return F.linear(2 * x, weight)


def _read_scaled(x: Tensor, weight: Tensor) -> Call | None:
    return Call(2 * x, weight, None, Format())


@pytest.mark.usefixtures("_restored_layers")
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("functions", "use", "scale", "transposed"),
    [
        ({torch.inner: _read_inner}, lambda m, x: torch.inner(x, m.w), 1, False),
        ({Tensor.inner: _read_inner}, lambda m, x: x.inner(m.w), 1, False),
        ({torch.tensordot: _read_tensordot}, lambda m, x: torch.tensordot(x, m.w, 1), 1, True),
        ({scaled_linear: _read_scaled}, lambda m, x: scaled_linear(x, m.w), 2, False),
    ],
    ids=["inner", "method", "tensordot", "own"],
)
def test_registered_layers(
    functions: Any, use: Any, scale: float, transposed: bool, kfac_approx: str
):
    W, data = torch.rand(2, 2), batches(2, 3)
    model = Uses(lambda m, x: m.lin(use(m, x).tanh()), w=W, lin=nn.Linear(2, 2))
    plain = Uses(
        lambda m, x: m.lin(m.own(scale * x).tanh()), own=nn.Linear(2, 2, bias=False), lin=model.lin
    )
    plain.own.load_state_dict({"weight": W.T if transposed else W})
    torch.testing.assert_close(model(data[0][0]), plain(data[0][0]))
    with pytest.raises(NotImplementedError, match=r"'w' \(used by \w+\). Supported: Linear"):
        build(model, data)
    register_layer(LayerType("Mine", functions, {}))
    K, expected = (build(m, data, kfac_approx=kfac_approx) for m in (model, plain))
    torch.testing.assert_close(K.factors("w"), expected.factors("own.weight"))
    for name in ("lin.weight", "lin.bias"):
        torch.testing.assert_close(K.factors(name), expected.factors(name))
    model = Uses(lambda m, x: m.a * use(m, x), w=W, a=torch.rand(2))
    with pytest.raises(NotImplementedError, match=r"'a' \(used by mul\). Supported: Mine, Linear"):
        build(model, data)


@pytest.mark.usefixtures("_restored_layers")
def test_registered_layers_can_decline_a_call():
    """A call that the entry does not read is any other use of the parameter."""
    register_layer(LayerType("Mine", {torch.tensordot: _read_tensordot}, {}))
    model = Uses(lambda m, x: x * torch.tensordot(m.w, m.w, 2), w=torch.rand(2, 2))
    with pytest.raises(NotImplementedError, match=r"'w' \(used by tensordot\)"):
        build(model)


@pytest.mark.usefixtures("_restored_layers")
def test_registered_layers_replace_earlier_ones():
    model = Uses(lambda m, x: m.lin(x), lin=nn.Linear(2, 2))
    data = batches(2, 3)
    before = build(model, data)
    calls = []

    def read(*args: Any) -> Call | None:
        calls.append(len(args))
        return None

    register_layer(LayerType("None", {F.linear: read}, {}))
    with pytest.raises(
        NotImplementedError, match=r"'lin.weight' \(used by linear\), 'lin.bias' \(used by linear\)"
    ):
        build(model, data)
    assert set(calls) == {3}
    LAYERS.pop(0)
    torch.testing.assert_close(build(model, data).to_dense(), before.to_dense())


def _forgetful(input: Tensor, other: Tensor) -> Call:
    """Forget the bias."""
    return Call(x=input, weight=other, format=Format())  # type: ignore[call-arg]


def _divides(input: Tensor, other: Tensor) -> Call:
    """Divide by zero."""
    return Call(input, other, None, Format(other.ndim // 0))


@pytest.mark.usefixtures("_restored_layers")
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize(
    ("parser", "cause", "message"),
    [
        (
            _forgetful,
            TypeError,
            r"'Mine', _forgetful, failed with TypeError \(.*: 'bias'\)\. Correct it",
        ),
        (_divides, ZeroDivisionError, "'Mine', _divides, failed with ZeroDivisionError"),
        (partial(_divides), ZeroDivisionError, r"'Mine', functools\.partial\(.*, failed with"),
    ],
)
def test_errors_of_what_reads_arguments(parser: Any, cause: type, message: str, backend: str):
    """They were taken for calls that are not those of layers, if they were of type TypeError."""
    register_layer(LayerType("Mine", {torch.inner: parser}, {torch.ops.aten.inner.default: parser}))
    model = Uses(lambda m, x: torch.inner(x, m.w), w=torch.rand(2, 2))
    with pytest.raises(RuntimeError, match=message) as raised:
        build(model, backend=backend)
    assert type(raised.value.__cause__) is cause


@pytest.mark.usefixtures("_restored_layers")
@pytest.mark.parametrize("parser", [lambda input: None, lambda *, out: None])
def test_arguments_that_are_not_read(parser: Any):
    """A call with other arguments than those of the entry is any other use of the parameter."""
    register_layer(LayerType("Mine", {torch.inner: parser}, {}))
    model = Uses(lambda m, x: torch.inner(x, m.w), w=torch.rand(2, 2))
    with pytest.raises(NotImplementedError, match=r"'w' \(used by inner\)"):
        build(model)


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "tuple": (lambda x, w: (x, w, None, Format()), "something of type tuple"),
    "no input": (lambda x, w: Call(None, w, None, Format()), "a Call whose x has type NoneType"),  # type: ignore[arg-type]
    "name": (lambda x, w: Call(x, "w", None, Format()), "a Call whose weight has type str"),  # type: ignore[arg-type]
    "number": (lambda x, w: Call(x, w, 0, Format()), "a Call whose bias has type int"),  # type: ignore[arg-type]
    "class": (lambda x, w: Call(x, w, None, Format), "a Call whose format has type type"),  # type: ignore[arg-type]
    "no format": (lambda x, w: Call(x, w, None, None), "a Call whose format has type NoneType"),  # type: ignore[arg-type]
}


@pytest.mark.usefixtures("_restored_layers")
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("name", RETURNED)
def test_what_reads_arguments_returns_a_call(name: str, backend: str):
    parser, message = RETURNED[name]
    register_layer(LayerType("Mine", {torch.inner: parser}, {torch.ops.aten.inner.default: parser}))
    model = Uses(lambda m, x: torch.inner(x, m.w), w=torch.rand(2, 2))
    with pytest.raises(TypeError, match=f"the layer 'Mine', .*, returned {message}\\. It must"):
        build(model, backend=backend)


MISFITS: dict[str, tuple[Callable[[Tensor, Tensor], Call], str]] = {
    "narrow input": (
        lambda x, w: Call(x[..., :2], w, None, Format()),
        r"Its input of shape \[\d, 2\] has width 2",
    ),
    "wide input": (
        lambda x, w: Call(torch.cat([x, x], -1), w, None, Format()),
        r"for inputs of width 3 .* has width 6",
    ),
    "transposed weight": (
        lambda x, w: Call(x, w.T, None, Format()),
        r"a weight of shape \[3, 4\], for inputs of width 4 and outputs of width 3",
    ),
    "groups of inputs": (
        lambda x, w: Call(x, w, None, Format(2)),
        r"\[4, 3\] and 2 groups, for inputs of width 6",
    ),
    "groups of outputs": (
        lambda x, w: Call(torch.cat([x, x, x], -1), w, None, Format(3)),
        r"\[4, 3\] and 3 groups, for inputs of width 9 and outputs of width 4",
    ),
    "normalisation": (
        lambda x, w: Call(x, w, None, NormFormat(shape=(3,))),
        r"LayerNorm with a weight of shape \[4, 3\]",
    ),
    "bias": (
        lambda x, w: Call(x, None, w, Format()),
        r"a bias of shape \[4, 3\], .* each of the 4 of its output of shape \[\d, 4\]",
    ),
}


@pytest.mark.usefixtures("_restored_layers")
@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("name", MISFITS)
def test_registered_layers_that_do_not_fit(name: str, backend: str):
    """Factors were cut, or filled up with zeros."""
    parser, message = MISFITS[name]
    register_layer(LayerType("Mine", {torch.inner: parser}, {torch.ops.aten.inner.default: parser}))
    model = Uses(lambda m, x: torch.inner(x, m.w), w=torch.rand(4, 3))
    data = [(torch.rand(6, 3, dtype=F64), torch.rand(6, 4, dtype=F64))]
    with pytest.raises(ValueError, match="The layer of 'w' was read as .*" + message):
        build(model, data, backend=backend)


@pytest.mark.usefixtures("_restored_layers")
def test_entries_of_the_same_name():
    """The last one counts; those of the library stay."""
    own = list(LAYERS)
    declines = LayerType("Mine", {torch.inner: lambda input, other: None}, {})
    register_layer(declines)
    register_layer(LayerType("Mine", {torch.inner: _read_inner}, {}))
    assert LAYERS[1:] == own
    model = Uses(lambda m, x: m.lin(torch.inner(x, m.w)), w=torch.rand(2, 2), lin=nn.Linear(2, 2))
    data = batches(2, 3)
    expected = build(model, data)
    LAYERS[:] = own
    register_layer(LayerType("Linear", {torch.inner: _read_inner}, {}))
    torch.testing.assert_close(build(model, data).to_dense(), expected.to_dense())
    register_layer(LayerType("Linear", declines.functions, {}))
    assert LAYERS[1:] == own
    with pytest.raises(NotImplementedError, match=r"Supported: Linear, Conv1d, .*, BatchNorm\."):
        build(model)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerType(torch.inner, {}, {}), "The name of a LayerType must be a string, got <"),  # type: ignore[arg-type]
        (LayerType("Mine", [torch.inner], {}), "functions of the LayerType 'Mine' .* got list"),  # type: ignore[arg-type]
        (LayerType("Mine", {}, None), "operations of the LayerType 'Mine' .* got NoneType"),  # type: ignore[arg-type]
        (LayerType("Mine", {torch.inner: 3}, {}), r"functions of .* got \{<.*>: 3\}"),  # type: ignore[dict-item]
        (LayerType("Mine", {}, {"inner": _read_inner}), r"operations of .* got \{'inner': <"),
    ],
)
def test_wrong_entries(layer: LayerType, message: str):
    before = list(LAYERS)
    with pytest.raises(TypeError, match=message):
        register_layer(layer)
    assert before == LAYERS


@pytest.mark.parametrize("layer", [F.linear, LayerType, ("Mine", {}, {}), None])
def test_only_layer_types_are_registered(layer: Any):
    before = list(LAYERS)
    with pytest.raises(TypeError, match="register_layer takes a LayerType, got"):
        register_layer(layer)
    assert before == LAYERS


# ---- derivatives in the forward pass -------------------------------------------------------------
class Force(nn.Module):
    """Returns a derivative by its input, or uses one as a constant."""

    def __init__(self, create_graph: bool):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        energy = self.b(torch.tanh(self.a(z))).sum()
        (force,) = torch.autograd.grad(energy, z, create_graph=self.create_graph)
        return force if self.create_graph else self.b(torch.tanh(self.a(x + force)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_refuse_derivatives_in_the_forward_pass(create_graph: bool):
    """Their gradients would be taken for those of the loss."""
    with pytest.raises(NotImplementedError, match=r"differentiates.*backend='make_fx'"):
        build(Force(create_graph).double())


def test_a_view_made_under_no_grad_is_a_constant():
    class Constant(nn.Module):
        def __init__(self, constant: Callable[[Tensor], Tensor]):
            super().__init__()
            self.a, self.b, self.constant = nn.Linear(2, 2), nn.Linear(2, 2), constant

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.a(x) @ self.constant(self.b.weight)

    def without_gradients(weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight.T

    data = batches(2, 1)
    model = Constant(without_gradients).double()
    actual = build(model, data)
    model.constant = lambda weight: weight.detach().clone().T
    torch.testing.assert_close(actual.to_dense(), build(model, data).to_dense())
