"""The backend ``make_fx`` gives what ``hooks`` gives, for more models; functions of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kfac_cases import BY_NAME, CASES, setup
from kfac_reference import Setup
from layer_cases import LAYER_CASES, layer_setup
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import (
    DiagonalLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops._random import RandomSource
from curvlinops.computers import kfac_make_fx
from curvlinops.computers.ekfac_hooks import HooksEKFACComputer
from curvlinops.computers.ekfac_make_fx import (
    MakeFxEKFACComputer,
    make_compute_ekfac_eigencorrection_batch,
)
from curvlinops.computers.flat_function import flat_function
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.kfac_make_fx import MakeFxKFACComputer, make_compute_kfac_batch
from curvlinops.computers.make_fx import MakeFxCollector
from curvlinops.computers.tracing import trace_model

# PyTorch's own remarks about an even kernel with padding "same", and about its compiler
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning"),
]

SEED = 2147483647
FISHER_TYPES = [
    {"fisher_type": "mc", "mc_samples": 3},
    {"fisher_type": "type-2"},
    {"fisher_type": "empirical"},
    {"fisher_type": "forward-only"},
]
APPROXIMATIONS = ("expand", "reduce")


# ---- helpers -------------------------------------------------------------------------------------
def entries(value: Any) -> list[Tensor]:
    """Return the tensors of a factor, or of several."""
    if isinstance(value, DiagonalLinearOperator):
        return value.tensors()
    if isinstance(value, list):
        return [tensor for entry in value for tensor in entries(entry)]
    return [] if value is None else [value]


def assert_equal(actual: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Compare dictionaries of factors, relative to the largest entry of each."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        pairs = zip(entries(actual[key]), entries(value), strict=True)
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            assert not ours.requires_grad
            atol = 1e-10 * max(theirs.abs().max().item(), 1e-9)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def compare(problem: Setup, **options: Any) -> None:
    """Compare the factors of both backends."""
    *hooks, mapping = HooksKFACComputer(**problem.kwargs(**options)).compute()
    *traced, ours = MakeFxKFACComputer(**problem.kwargs(**options)).compute()
    assert ours == mapping
    for actual, expected in zip(traced, hooks, strict=True):
        assert_equal(actual, expected)


def problem_of(
    model: nn.Module, inputs: Callable[[int], Any] | None = None, sizes: tuple[int, ...] = (3, 3, 2)
) -> Setup:
    """Return a problem with a model of 3 features and 2 classes, or with other inputs."""
    torch.manual_seed(3)
    X = [torch.rand(n, 3) if inputs is None else inputs(n) for n in sizes]
    X = [x.double() if x.is_floating_point() else x for x in X]
    data = [(x, torch.arange(n) % 2) for x, n in zip(X, sizes, strict=True)]
    return Setup(model.double(), nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


class Two(nn.Module):
    """Two linear layers, another parameter, and any code."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], other: bool = False):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        if other:
            self.w = nn.Parameter(torch.rand(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# ---- equal to hooks ------------------------------------------------------------------------------
@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_cases(name: str, approx: str) -> None:
    for joint in BY_NAME[name].joint:
        for options, loss in zip(FISHER_TYPES, ("ce-all", "mse", "bce", "ce-soft"), strict=True):
            compare(
                setup(name, loss),
                kfac_approx=approx,
                separate_weight_and_bias=not joint,
                **options,
            )


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("name", LAYER_CASES)
def test_layers(name: str, approx: str) -> None:
    for joint in LAYER_CASES[name].joint:
        options = FISHER_TYPES[joint]
        compare(
            layer_setup(name), kfac_approx=approx, separate_weight_and_bias=not joint, **options
        )


class NotingEKFACComputer(HooksEKFACComputer):
    """Notes the factors that are decomposed, and their eigenvectors."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.noted: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)

    def _eigenvectors(self, factor: Any, key: Any, what: str) -> Any:
        Q = super()._eigenvectors(factor, key, what)
        self.noted.append((key, what, factor, Q))
        return Q


class SameBasisEKFACComputer(MakeFxEKFACComputer):
    """Takes over the eigenvectors of factors that are the same up to rounding errors.

    Where eigenvalues of a factor are equal, its eigenvectors depend on these errors.
    """

    noted: Iterator[tuple[Any, ...]]

    def _eigenvectors(self, factor: Any, key: Any, what: str) -> Any:
        *place, expected, Q = next(self.noted)
        assert place == [key, what]
        assert_equal({what: factor}, {what: expected})
        own = super()._eigenvectors(factor, key, what)
        pairs = zip(entries(factor), entries(expected), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            assert_equal({what: own}, {what: Q})
        return Q


def compare_ekfac(name: str, **options: Any) -> None:
    """Compare eigenvalues in one basis, blocks and products of both backends."""
    arguments = layer_setup(name).kwargs(**options)
    hooks, traced = NotingEKFACComputer(**arguments), SameBasisEKFACComputer(**arguments)
    expected = hooks.decomposed()
    traced.noted = iter(hooks.noted)
    actual = traced.decomposed()
    assert next(traced.noted, None) is None
    assert traced.mapping == hooks.mapping
    values = [
        {key: [part[0] for part in parts] for key, parts in found.items()}
        for found in (actual, expected)
    ]
    assert_equal(*values)
    E, H = EKFACLinearOperator._of(traced, actual), EKFACLinearOperator._of(hooks, expected)
    names = [next(iter(group.values())) for group in H.mapping]
    assert_equal(*({n: A.block(n).to_dense() for n in names} for A in (E, H)))
    v = torch.linspace(-1, 2, H.shape[1], dtype=H.dtype)
    assert_equal({"": E @ v}, {"": H @ v})


@pytest.mark.parametrize("approx", ["expand", pytest.param("reduce", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYER_CASES)
def test_ekfac_layers(name: str, approx: str) -> None:
    for joint in LAYER_CASES[name].joint:
        options = FISHER_TYPES[joint]
        compare_ekfac(name, kfac_approx=approx, separate_weight_and_bias=not joint, **options)


@pytest.mark.parametrize("name", ["embedding", "conv2d-groups", "self-attention", "layer-norm-2d"])
def test_empirical_ekfac(name: str) -> None:
    compare_ekfac(name, separate_weight_and_bias=False, fisher_type="empirical")


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_while_operations_are_counted(cls: Any) -> None:
    """PyTorch's counter has hooks on modules, which have hooks on gradients: they only listen."""
    arguments = setup("mlp", "ce").kwargs(backend="make_fx")
    expected = cls(**arguments).to_dense()
    with FlopCounterMode(display=False) as counter:
        actual = cls(**arguments).to_dense()
    torch.testing.assert_close(actual, expected)
    assert counter.get_total_flops() > 0


def test_more_options() -> None:
    problem = setup("attention", "mse")
    for options in ({"loss_terms": "exact"}, {"max_factor_size": 3}):
        for fisher in FISHER_TYPES[:3]:
            compare(problem, **options, **fisher)


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_operators(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computer = MakeFxKFACComputer if cls is KFACLinearOperator else MakeFxEKFACComputer
    monkeypatch.setitem(cls._BACKENDS, "make_fx", computer)
    arguments = setup("cnn", "ce").kwargs(check_deterministic=True)
    expected = cls(**arguments).to_dense()
    assert_equal({"": cls(**arguments, backend="make_fx").to_dense()}, {"": expected})


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_neither_backend_calls_the_other(
    cls: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparisons above would compare a backend with itself."""
    used: set[tuple[str, str]] = set()
    entrances = {
        "hooks": [(HooksCollector, "listening"), (HooksCollector, "backward")],
        "make_fx": [
            (kfac_make_fx, "trace_model"),
            (MakeFxCollector, "forward"),
            (MakeFxCollector, "backward"),
        ],
    }
    for owner, pairs in entrances.items():
        for place, name in pairs:
            monkeypatch.setattr(place, name, noting(used, (owner, name), getattr(place, name)))
    expected = {(backend, name) for _, name in entrances[backend]}
    for name in ("embedding", "gpt", "resnet"):
        cls(**layer_setup(name).kwargs(), fisher_type="type-2", backend=backend)
        assert used == expected
        used.clear()


def noting(used: set[Any], name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that adds a name to a set, and calls another one."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        used.add(name)
        return function(*args, **kwargs)

    return noted


# ---- models that are no modules ------------------------------------------------------------------
def plain(params: dict[str, Tensor], X: Tensor) -> Tensor:
    h = torch.relu_(F.linear(X, params["W"], params["c"]))
    return h @ params["V"].T


def plain_params() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"W": (4, 3), "unused": (5,), "c": (4,), "V": (2, 4)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("joint", [False, True])
def test_plain_function(joint: bool) -> None:
    """The same as a module; a parameter that is not used has zero factors."""
    params = plain_params()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    data = problem_of(model).data
    names = {"0.weight": "W", "0.bias": "c", "2.weight": "V"}
    options = {"separate_weight_and_bias": not joint, "check_deterministic": True}
    arguments = (nn.CrossEntropyLoss(), params, data)
    inputs, gradients, mapping = MakeFxKFACComputer(plain, *arguments, **options).compute()
    ours = {name: params[new] for name, new in names.items()}
    A, B, _ = HooksKFACComputer(model, nn.CrossEntropyLoss(), ours, data, **options).compute()
    assert {"b": "unused"} in mapping
    assert not gradients.pop(("unused",)).any()
    renamed = [
        {tuple(names[name] for name in key): value for key, value in D.items()} for D in (A, B)
    ]
    assert_equal(inputs, renamed[0])
    assert_equal(gradients, renamed[1])


def test_plain_function_of_mapping() -> None:
    params = plain_params()
    data = [({"x": x, "shift": torch.ones(1).double()}, y) for x, y in problem_of(Two(plain)).data]
    options = {"batch_size_fn": lambda X: len(X["x"]), "check_deterministic": True}
    actual = MakeFxKFACComputer(
        lambda p, X: plain(p, X["x"] + X["shift"]), nn.CrossEntropyLoss(), params, data, **options
    ).compute()
    shifted = [(X["x"] + 1, y) for X, y in data]
    expected = MakeFxKFACComputer(plain, nn.CrossEntropyLoss(), params, shifted).compute()
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])


# ---- any code ------------------------------------------------------------------------------------
def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(3 * x)
    return m.b(torch.tanh(m.a(x)) - h)


def relu_of_view(m: Any, x: Tensor) -> Tensor:
    """An in-place activation of a layer's output that is a view."""
    return m.b(F.relu(m.a(x.unsqueeze(1).expand(-1, 2, -1)), inplace=True)).sum(1)


def detached(m: Any, x: Tensor) -> Tensor:
    h = m.a.weight.detach().sum() + F.linear(x, m.a.weight.data)
    return m.b(torch.tanh(m.a(x)) + h)


def branches(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) if x.sum() > 4 else 3 * m.a(x))


def reads_a_list(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) * max(x.flatten().tolist()))


def selects(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    positive = h[h > 0]
    return m.b(torch.tanh(h)) * positive.shape[0] + positive.sum()


@pytest.mark.parametrize(
    "function", [without_gradients, relu_of_view, detached, branches, reads_a_list, selects]
)
def test_any_code(function: Callable[[Any, Tensor], Tensor]) -> None:
    compare(problem_of(Two(function)), fisher_type="type-2")


def test_branches_differ() -> None:
    """What the test above is about: batches of one shape take different branches."""
    sums = [float(X.sum()) > 4 for X, _ in problem_of(Two(branches)).data[:2]]
    assert sums == [False, True] or sums == [True, False]


#: Numbers of rows, or numbers, that depend on entries, of ``x`` with rows of both signs.
READERS: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda x: len(torch.where(x > 0)[0]),
    "nonzero": lambda x: len((x > 0).nonzero()),
    "nonzero as tuple": lambda x: len((x > 0).nonzero(as_tuple=True)[0]),
    "argwhere": lambda x: len(torch.argwhere(x > 0)),
    "mask": lambda x: len(x[x > 0]),
    "masked_select": lambda x: len(x.masked_select(x > 0)),
    "unique": lambda x: len(torch.unique(x > 0, dim=0)),
    "unique_consecutive": lambda x: len(torch.unique_consecutive(x > 0)),
    "bincount": lambda x: len(torch.bincount((x > 0).sum(0))),
    "one_hot": lambda x: F.one_hot((x > 0).sum(0)).shape[-1],
    "combinations": lambda x: len(torch.combinations(x[x > 0])),
    "repeat_interleave": lambda x: len(torch.repeat_interleave((x[:, 0] > 0).long())),
    "repeat_interleave of rows": lambda x: len(x.repeat_interleave((x[:, 0] > 0).long(), 0)),
    "tensor_split": lambda x: len(x.tensor_split((x[:, 0] > 0).sum().cpu())[0]),
    "tensor_split at several": lambda x: len(x.tensor_split((x > 0).sum(0))[0]),
    "pack_padded_sequence": lambda x: len(
        nn.utils.rnn.pack_padded_sequence(
            x.unsqueeze(-1), 1 + (x > 0).sum(1), batch_first=True, enforce_sorted=False
        ).data
    ),
    "unpad_sequence": lambda x: len(nn.utils.rnn.unpad_sequence(x, (x > 0).sum(1), True)[0]),
    "to_sparse": lambda x: x.clamp(min=0).to_sparse()._nnz(),
    "coalesce": lambda x: (
        torch.sparse_coo_tensor((x[:, :1].T > 0).long(), x[:, 0], check_invariants=False)
        .coalesce()
        ._nnz()
    ),
    "split": lambda x: len(x.split([int((x[:, 0] > 0).sum()), int((x[:, 0] <= 0).sum())])[0]),
    "if": lambda x: 2 if (x > 0).sum() > 4 else 1,
    "equal": lambda x: 2 if torch.equal(x[0], x[0].abs()) else 1,
    "allclose": lambda x: 2 if torch.allclose(x[0], x[0].abs()) else 1,
    "in": lambda x: 2 if 3 in (x > 0).sum(1) else 1,
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: sum(x[0].tolist()),
    "numpy": lambda x: float(x.detach().numpy().sum()),
    "dlpack": lambda x: torch.from_dlpack(x.detach()).sum(),
    "tensor of tensors": lambda x: torch.tensor([row.sum() for row in x]).sum(),
    "as_subclass": lambda x: x.as_subclass(Tensor).sum(),
    "Parameter": lambda x: nn.Parameter(x).sum().detach(),
}


@pytest.mark.parametrize("name", READERS)
def test_numbers_that_depend_on_entries(name: str) -> None:
    """A trace is that of another batch of the same shape only if it has the same numbers."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x)) * READERS[name](x))

    problem = problem_of(Two(function), sizes=(3, 3))
    signs = [[1.0, 1, 1], [1, 1, 1], [1, -1, 1]], [[1.0, 1, -1], [-1, 1, 1], [-1, -1, -1]]
    for (X, _), entries in zip(problem.data, signs, strict=True):
        X.mul_(torch.tensor(entries))
    first, second = (READERS[name](X) for X, _ in problem.data)
    assert first != second
    compare(problem, fisher_type="type-2")


class Experts(nn.Module):
    """A mixture of experts: each gets the examples of one sign, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = torch.where((x[:, 0] > 0) == bool(k))[0]
            if len(rows):
                result = result.index_add(0, rows, expert(x[rows]))
        return result[:, :2]


def test_experts_that_are_not_called() -> None:
    problem = problem_of(Experts(), sizes=(3, 3))
    problem.data[1][0].neg_()
    compare(problem, fisher_type="type-2")
    with pytest.raises(NotImplementedError, match="depend on the entries"):
        make_compute_kfac_batch(problem.model, problem.loss, problem.params, *problem.data[0])


def inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = m.a(3 * x)
    return m.b(torch.tanh(m.a(x)) - h.clone())


def other_use_without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = m.a.weight.norm()
        transposed = m.a.weight.T
    return m.b(torch.tanh(m.a(x)) - x @ transposed / norm)


def derivative(m: Any, x: Tensor) -> Tensor:
    """A constant, but one that depends on the input's entries."""
    z = x.detach().requires_grad_()
    (h,) = torch.autograd.grad(torch.tanh(2 * z).sum(), z)
    return m.b(torch.tanh(m.a(x)) - h)


def same_constants(m: Any, x: Tensor) -> Tensor:
    """What :func:`inference` computes; and the other two, up to constants."""
    h = F.linear(3 * x, m.a.weight.detach(), m.a.bias.detach())
    return m.b(torch.tanh(m.a(x)) - h)


def same_use(m: Any, x: Tensor) -> Tensor:
    W = m.a.weight.detach()
    return m.b(torch.tanh(m.a(x)) - x @ W.T / W.norm())


def same_derivative(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) - 2 * (1 - torch.tanh(2 * x) ** 2))


class Rounded(torch.autograd.Function):
    """Rounds without recording gradients, which are disabled already, and with recording them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.round(3 * x)
        with torch.enable_grad():
            return y / 3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@torch.no_grad()
def features(m: Any, x: Tensor) -> Tensor:
    """A part of the model that is not trained."""
    return m.a(3 * x)


def features_in_inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = features(m, x)
    return m.b(torch.tanh(m.a(x)) - h.clone())


def features_twice(m: Any, x: Tensor) -> Tensor:
    """Regions in regions, in each order; some end, others are left as they are."""
    with torch.no_grad(), torch.no_grad():
        features(m, x)
        with torch.inference_mode():
            features(m, x)
            torch.set_grad_enabled(True)
        with torch.enable_grad():
            torch.tanh(m.a(x))
    with torch.inference_mode():
        with torch.no_grad(), torch.inference_mode(), torch.no_grad():
            features(m, x)
        torch.set_grad_enabled(False)
        h = 3 * (m.a(x) - m.a.bias) + m.a.bias
    return m.b(torch.tanh(m.a(x)) - h.clone())


def recording_in_inference(m: Any, x: Tensor) -> Tensor:
    """In inference mode, nothing is recorded after all."""
    with torch.inference_mode(), torch.enable_grad():
        h = m.a(3 * x)
    with torch.inference_mode():
        torch.set_grad_enabled(True)
        k = m.a(3 * x)
    return m.b(torch.tanh(m.a(x)) - (h.clone() + k.clone()) / 2)


def recording_in_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = torch.tanh(m.a(x))
        h = m.a(3 * x)
    return m.b(y - h)


def no_inference_in_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.inference_mode(False):  # enables gradients
            y = torch.tanh(m.a(x))
        h = m.a(3 * x)
    return m.b(y - h)


def raising(m: Any, x: Tensor) -> Tensor:
    h = torch.empty(0)
    try:
        with torch.inference_mode(), torch.no_grad():
            h = m.a(3 * x)
            raise ValueError
    except ValueError:
        return m.b(torch.tanh(m.a(x)) - h.clone())


def called_with_parameters(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode(), torch.no_grad():
        h = functional_call(m.a, dict(m.a.named_parameters()), 3 * x)
    return m.b(torch.tanh(functional_call(m.a, dict(m.a.named_parameters()), x)) - h.clone())


def rounded(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(Rounded.apply(x))))


def same_rounded(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(torch.round(3 * x) / 3)))


def reads_entries_in_inference(m: Any, x: Tensor) -> Tensor:
    """A derivative where nothing else would be recorded."""
    z = x.detach().requires_grad_()
    h = torch.tanh(2 * z).sum()
    with torch.inference_mode():
        torch.set_grad_enabled(False)
        (h,) = torch.autograd.grad(h, z)
    return m.b(torch.tanh(m.a(x)) - h.clone())


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (inference, same_constants),
        (other_use_without_gradients, same_use),
        (derivative, same_derivative),
        (features_in_inference, same_constants),
        (features_twice, same_constants),
        (recording_in_inference, same_constants),
        (recording_in_no_grad, same_constants),
        (no_inference_in_no_grad, same_constants),
        (raising, same_constants),
        (called_with_parameters, same_constants),
        (rounded, same_rounded),
        (reads_entries_in_inference, same_derivative),
    ],
)
def test_constants(function: Any, same: Any) -> None:
    """Code that makes constants, against the same with constants."""
    options = {"fisher_type": "type-2"}
    actual = MakeFxKFACComputer(**problem_of(Two(function)).kwargs(**options)).compute()
    expected = HooksKFACComputer(**problem_of(Two(same)).kwargs(**options)).compute()
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])


@pytest.mark.parametrize("function", [features_in_inference, features_twice, rounded])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_ggn_of_constants(cls: Any, function: Any) -> None:
    """The blocks of biases are those of the GGN."""
    problem = problem_of(Two(function))
    K = cls(**problem.kwargs(), fisher_type="type-2", backend="make_fx")
    G = GGNLinearOperator(**problem.kwargs()).to_dense()
    for name, start in (("a.bias", 9), ("b.bias", 18)):
        end = start + len(problem.params[name])
        expected = G[start:end, start:end]
        torch.testing.assert_close(K.block(name).to_dense(), expected)


def test_checkpointing() -> None:
    def checkpointed(m: Any, x: Tensor) -> Tensor:
        part = lambda x: torch.tanh(m.a(x))  # noqa: E731
        return m.b(torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False))

    actual = MakeFxKFACComputer(**problem_of(Two(checkpointed)).kwargs()).compute()
    model = Two(lambda m, x: m.b(torch.tanh(m.a(x))))
    expected = HooksKFACComputer(**problem_of(model).kwargs()).compute()
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x) * m.w),
        lambda m, x: m.b(m.a(x) + m.w),
        lambda m, x: m.b(torch.tanh(m.a(x)) @ m.a.weight) + m.w.sum(),
        lambda m, x: m.b(F.linear(m.a(x), m.a.weight[:, :2] @ m.a.weight[:2])),
    ],
    ids=["product", "sum", "transposed", "function"],
)
def test_same_errors(function: Callable[[Any, Tensor], Tensor]) -> None:
    """Parameters in no supported layer: the same error, and the same diagonal blocks."""
    arguments = problem_of(Two(function, other=True)).kwargs(check_deterministic=True)
    messages = []
    for cls in (HooksKFACComputer, MakeFxKFACComputer):
        with pytest.raises(NotImplementedError, match="not in supported layers") as caught:
            cls(**arguments)
        messages.append(str(caught.value))
    quoted = [
        {part for part in m.split("'")[1::2] if part in arguments["params"]} for m in messages
    ]
    assert quoted[0] == quoted[1] != set()
    options = {"unsupported": "diagonal", "fisher_type": "type-2"}
    hooks = HooksKFACComputer(**arguments, **options).compute()
    traced = MakeFxKFACComputer(**arguments, **options).compute()
    assert traced[2] == hooks[2]
    assert_equal(traced[0], hooks[0])
    assert_equal(traced[1], hooks[1])


class Sign(torch.autograd.Function):
    """The sign, with the identity's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Constant(torch.autograd.Function):
    """A copy, without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1 * x
        ctx.mark_non_differentiable(y)
        return y


class Doubled(torch.autograd.Function):
    """The input itself, without a function of torch that could be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def reentrant(m: Any, x: Tensor) -> Tensor:
    """A function of autograd's, which calls the layer in ``no_grad``."""
    return m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=True))


def hooked(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda g: 2 * g)
    return m.b(h)


def differentiated(m: Any, x: Tensor) -> Tensor:
    z = x.detach().requires_grad_()
    return m.b(torch.autograd.grad(torch.tanh(m.a(z)).sum(), z, create_graph=True)[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.b(Sign.apply(m.a(x))), "custom autograd function"),
        (lambda m, x: m.b(Doubled.apply(m.a(x))), "custom autograd function"),
        (lambda m, x: m.b(m.a(x) + Constant.apply(m.a(2 * x))), "custom autograd function"),
        (reentrant, "custom autograd function"),
        (hooked, "register_hook"),
        (differentiated, "create_graph"),
        (lambda m, x: torch.func.vmap(lambda row: m.b(m.a(row)))(x), "torch.func"),
    ],
    ids=["sign", "doubled", "constant", "checkpointed", "hooked", "differentiated", "vmap"],
)
def test_not_traced(function: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    """Derivatives that are not those of the operations are refused."""
    arguments = problem_of(Two(function)).kwargs()
    with pytest.raises(NotImplementedError, match=reason):
        MakeFxKFACComputer(**arguments).compute()


def scripted(part: Any) -> Any:
    """Return a part that ``torch.jit`` has compiled, and differentiated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.jit.script(part.double() if isinstance(part, nn.Module) else part)
    for _ in range(3):
        compiled(torch.rand(3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    return compiled


def test_scripted_modules() -> None:
    """Both backends name the parameters; diagonal blocks would not mend those of other layers."""
    model = Two(lambda m, x: m.b(m.c(torch.tanh(m.a(x)))))
    model.c = scripted(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    arguments = problem_of(model).kwargs(fisher_type="type-2")
    match = r"layers: 'c.0.weight' \(used by Recursive\w+\), 'c.0.bias' \(used by \w+\). Supported"
    for cls in (HooksKFACComputer, MakeFxKFACComputer):
        with pytest.raises(NotImplementedError, match=match):
            cls(**arguments).compute()
    with pytest.raises(NotImplementedError, match=r"torch\.jit computes derivatives"):
        MakeFxKFACComputer(**arguments, unsupported="diagonal").compute()


@pytest.mark.parametrize("kind", ["function", "module"])
def test_scripted_parts_without_parameters(kind: str) -> None:
    """The gradients of the layers before them were zero."""

    def activation(x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.sin(x)

    part = scripted(activation if kind == "function" else nn.Sequential(nn.Tanh(), nn.Sigmoid()))
    problem = problem_of(Two(lambda m, x: m.b(part(m.a(x)))))
    with pytest.raises(NotImplementedError, match=r"torch\.jit computes derivatives"):
        MakeFxKFACComputer(**problem.kwargs()).compute()


def test_scripted_constants() -> None:
    """Nothing is missing where scripted parts are constants: their derivatives are not wanted."""
    part = scripted(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    model = Two(lambda m, x: m.b(torch.tanh(m.a(part(x)))))
    compare(problem_of(model), fisher_type="type-2")
    model.part = part
    problem = problem_of(model)
    problem.params = {name: p for name, p in problem.params.items() if "part" not in name}
    compare(problem, fisher_type="type-2")


def test_jit_traced_modules() -> None:
    """Operations of what ``torch.jit.trace`` returns are seen."""

    def layers(m: Any, x: Tensor) -> Tensor:
        return m.b(m.c(torch.tanh(m.a(x))))

    plain, traced = Two(layers), Two(layers)
    plain.c = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced.c = torch.jit.trace(plain.c, torch.rand(3, 3).double())
    options = {"fisher_type": "type-2"}
    actual = MakeFxKFACComputer(**problem_of(traced).kwargs(**options)).compute()
    expected = HooksKFACComputer(**problem_of(plain).kwargs(**options)).compute()
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])


def test_conflicting_biases() -> None:
    problem = setup("tied-different", "mse")
    for cls in (HooksKFACComputer, MakeFxKFACComputer):
        with pytest.raises(ValueError, match="conflicting biases"):
            cls(**problem.kwargs(separate_weight_and_bias=False)).compute()


# ---- traces --------------------------------------------------------------------------------------
@pytest.fixture
def traced_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The shapes for which models were traced."""
    shapes: list[Any] = []
    original = kfac_make_fx.trace_model

    def counting(predict: Any, params: Any, X: Any) -> Any:
        shapes.append(tuple(X.shape))
        return original(predict, params, X)

    monkeypatch.setattr(kfac_make_fx, "trace_model", counting)
    return shapes


def test_one_trace_for_each_shape(traced_shapes: list[Any]) -> None:
    """Besides batches of one and two examples, which show where examples are."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    problem = problem_of(model, sizes=(5, 5, 3, 5, 2))
    computer = MakeFxEKFACComputer(**problem.kwargs(check_deterministic=True))
    computer.compute()
    computer.compute()
    assert sorted(traced_shapes) == [(1, 3), (2, 3), (3, 3), (5, 3)]


def test_trace_follows_the_model(traced_shapes: list[Any]) -> None:
    """The flags and other tensors of the model may change between passes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    problem = problem_of(model, sizes=(4,))
    problem.params = {name: p for name, p in problem.params.items() if name.startswith("2")}
    computer = MakeFxKFACComputer(**problem.kwargs())
    for change in (lambda: None, lambda: setattr(model[0], "bias", nn.Parameter(torch.ones(4)))):
        change()
        model.double()
        expected = HooksKFACComputer(**problem.kwargs()).compute()
        assert_equal(computer.compute()[0], expected[0])
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_equal(computer.compute()[0], HooksKFACComputer(**problem.kwargs()).compute()[0])


def test_input_is_cloned() -> None:
    X = torch.ones(2, 3)
    trace_model(lambda params, x: x.mul_(2) @ params["W"], {"W": torch.ones(3, 1)}, X)
    assert torch.equal(X, torch.ones(2, 3))


def test_nothing_changes() -> None:
    """Neither the model and its buffers, nor the data, nor the random generators."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            torch.rand(3)
            return self.linear(x)

    problem = problem_of(Counts())
    before = [
        t.clone() for t in (*problem.model.state_dict().values(), *(X for X, _ in problem.data))
    ]
    state = torch.get_rng_state()
    with torch.inference_mode():
        MakeFxKFACComputer(**problem.kwargs()).compute()
    make_compute_kfac_batch(problem.model, problem.loss, problem.params, *problem.data[0])
    after = (*problem.model.state_dict().values(), *(X for X, _ in problem.data))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in problem.params.values())


# ---- functions of one batch ----------------------------------------------------------------------
def other_batch(problem: Setup) -> tuple[Any, ...]:
    """Return parameters and a batch of the same shapes as those of a problem's first one."""
    X, y = problem.data[0]
    torch.manual_seed(7)
    params = {name: torch.randn_like(p) for name, p in problem.params.items()}
    if isinstance(X, dict):
        return params, {key: torch.rand_like(x) for key, x in X.items()}, y.flip(0)
    return params, (torch.randn_like(X) if X.is_floating_point() else X.flip(0)), y.flip(0)


def uniforms_of(problem: Setup, options: dict[str, Any], purpose: str = "signs") -> Tensor | None:
    """Return the numbers that the operators use for the first batch; None if they use none."""
    X, y = problem.data[0]
    n = y.shape[0] if problem.batch_size_fn is None else problem.batch_size_fn(X)
    num_terms = y.numel()  # class indices
    num_classes = problem.model(X).shape[1]
    kind = options["fisher_type"]
    if kind == "forward-only" or (kind != "mc" and num_terms == n):
        return None
    draws = {"mc": options.get("mc_samples", 1), "type-2": num_classes - 1, "empirical": 1}[kind]
    return RandomSource(SEED).uniforms("samples" if kind == "mc" else purpose, 0, num_terms, draws)


BATCH_CASES = [
    ("mlp", 0, "expand", True),
    ("cnn", 1, "reduce", False),
    ("attention", 1, "expand", False),
    ("attention", 0, "expand", True),
    ("tokens", 2, "reduce", True),
    ("mapping", 3, "expand", True),
    ("inplace", 0, "expand", False),
    ("repeated", 2, "reduce", False),
    ("constants", 0, "expand", True),
]


def batch_problem(name: str, index: int, approx: str, separate: bool) -> tuple[Setup, Any]:
    """Return a problem of one batch, and options."""
    problem = setup(name, "ce-all")
    options = {
        **FISHER_TYPES[index],
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
    }
    data = problem.data[:1]
    return Setup(problem.model, problem.loss, problem.params, data, problem.batch_size_fn), options


def covariance_function(problem: Setup, options: Any) -> tuple[Any, Any]:
    """Return the function of a batch, made with another one."""
    return make_compute_kfac_batch(
        problem.model,
        problem.loss,
        *other_batch(problem),
        **options,
        batch_size_fn=problem.batch_size_fn,
    )


@pytest.mark.parametrize(("name", "index", "approx", "separate"), BATCH_CASES)
def test_batch_covariances(name: str, index: int, approx: str, separate: bool) -> None:
    problem, options = batch_problem(name, index, approx, separate)
    fn, mapping = covariance_function(problem, options)
    inputs, gradients = fn(problem.params, *problem.data[0], uniforms_of(problem, options))
    expected = HooksKFACComputer(**problem.kwargs(**options)).compute()
    assert mapping == expected[2]
    assert_equal(inputs, expected[0])
    assert_equal(gradients, expected[1])


@pytest.mark.parametrize(("name", "index", "approx", "separate"), BATCH_CASES)
def test_batch_eigenvalues(name: str, index: int, approx: str, separate: bool) -> None:
    if index == 3:
        return
    problem, options = batch_problem(name, index, approx, separate)
    expected = HooksEKFACComputer(**problem.kwargs(**options)).compute()
    fn, mapping = make_compute_ekfac_eigencorrection_batch(
        problem.model,
        problem.loss,
        *other_batch(problem),
        **options,
        batch_size_fn=problem.batch_size_fn,
    )
    assert mapping == expected[3]
    uniforms = uniforms_of(problem, options, "eigenvalue-signs")
    actual = fn(problem.params, *problem.data[0], *expected[:2], uniforms)
    assert_equal(actual, expected[2])


@pytest.mark.parametrize("name", ["embedding", "conv2d-groups", "self-attention", "batch-norm"])
def test_batch_of_layers(name: str) -> None:
    """Diagonal factors, several blocks, and buffers."""
    problem = layer_setup(name)
    problem.data = problem.data[:1]
    options = {"fisher_type": "type-2", "loss_terms": "exact"}
    expected = HooksEKFACComputer(**problem.kwargs(**options)).compute()
    covariances = HooksKFACComputer(**problem.kwargs(**options)).compute()
    arguments = (problem.model, problem.loss, *other_batch(problem))
    fn, _ = make_compute_kfac_batch(*arguments, **options)
    for actual, wanted in zip(fn(problem.params, *problem.data[0]), covariances, strict=False):
        assert_equal(actual, wanted)
    fn, _ = make_compute_ekfac_eigencorrection_batch(*arguments, **options)
    assert_equal(fn(problem.params, *problem.data[0], *expected[:2]), expected[2])


def test_random_numbers_of_a_batch() -> None:
    """By default they are those of torch's global generator; others are as wanted."""
    problem, options = batch_problem("attention", 1, "expand", True)
    fn, _ = covariance_function(problem, options)
    arguments = (problem.params, *problem.data[0])
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(fn(*arguments)[1])
    assert_equal(results[0], results[1])
    with pytest.raises(AssertionError):
        assert_equal(results[0], results[2])
    torch.manual_seed(0)
    uniforms = torch.rand(8, 2, dtype=torch.float64)
    assert_equal(fn(*arguments, uniforms)[1], results[0])
    with pytest.raises(ValueError, match="uniforms must have"):
        fn(*arguments, uniforms[:3])
    fn, _ = covariance_function(*batch_problem("mlp", 1, "expand", True))
    mlp = setup("mlp", "ce-all")
    with pytest.raises(ValueError, match="uniforms must have"):
        fn(mlp.params, *mlp.data[0], uniforms)


def test_arguments_of_a_batch() -> None:
    problem, options = batch_problem("mlp", 0, "expand", True)
    fn, _ = covariance_function(problem, options)
    X, y = problem.data[0]
    with pytest.raises(ValueError, match=r"X must have .* \[2, 3\], but has \[1, 3\]"):
        fn(problem.params, X[:1], y)
    with pytest.raises(ValueError, match="y must have"):
        fn(problem.params, X, y[:1])
    with pytest.raises(ValueError, match="params must have"):
        fn({"W": X}, X, y)
    reordered = dict(reversed(problem.params.items()))
    uniforms = uniforms_of(problem, options)
    assert_equal(fn(reordered, X, y, uniforms)[0], fn(problem.params, X, y, uniforms)[0])
    with pytest.raises(ValueError, match="diagonal"):
        make_compute_kfac_batch(
            problem.model, problem.loss, problem.params, X, y, unsupported="diagonal"
        )


@pytest.mark.parametrize("function", [branches, reads_a_list, derivative])
def test_no_function_of_a_batch(function: Callable[[Any, Tensor], Tensor]) -> None:
    """The graph would be wrong for other batches."""
    problem = problem_of(Two(function))
    with pytest.raises(NotImplementedError, match="depend on the entries"):
        make_compute_kfac_batch(problem.model, problem.loss, problem.params, *problem.data[0])


def test_parameters_elsewhere() -> None:
    params = plain_params()
    problem = problem_of(Two(plain))
    model = lambda p, X: F.linear(F.linear(X, p["W"]), params["V"])  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"\['V'\] elsewhere"):
        make_compute_kfac_batch(model, problem.loss, params, *problem.data[0])


TIED_CASES = [  # with 5 tokens and 3 features
    ("head", "expand", True, 4),
    ("head", "reduce", False, 8192),
    ("head-bias", "expand", False, 8192),
    ("head-bias", "reduce", True, 4),
    ("head-padding", "expand", False, 2),
]


def tied_problem(name: str, approx: str, separate: bool, size: int) -> tuple[Setup, Any]:
    """Return a batch for a model whose head has the weight of its embedding, and options."""
    problem = layer_setup(name)
    problem.data = problem.data[:1]
    return problem, {
        "fisher_type": "type-2",
        "loss_terms": "exact",
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
        "max_factor_size": size,
    }


@pytest.mark.parametrize(("name", "approx", "separate", "size"), TIED_CASES)
def test_batch_of_tied_embedding(name: str, approx: str, separate: bool, size: int) -> None:
    """The nearest Kronecker product is one of these data, whatever it was traced with."""
    problem, options = tied_problem(name, approx, separate, size)
    K = KFACLinearOperator(**problem.kwargs(**options))
    fn, mapping = make_compute_kfac_batch(
        problem.model, problem.loss, *other_batch(problem), **options
    )
    inputs, gradients = fn(problem.params, *problem.data[0])
    assert mapping == K.mapping
    expected = [K.factors(key[0]) for key in gradients]
    assert_equal(gradients, {key: B for key, (B, *_) in zip(gradients, expected, strict=True)})
    with_inputs = zip(gradients, expected, strict=True)
    assert_equal(inputs, {key: A[0] for key, (_, *A) in with_inputs if A})
    tied = next(key for key in gradients if key[0].endswith("table.weight"))
    assert isinstance(gradients[tied], DiagonalLinearOperator) == (size < 5)


@pytest.mark.parametrize("case", [TIED_CASES[0], TIED_CASES[2]], ids=lambda case: case[0])
def test_batch_eigenvalues_of_tied_embedding(case: tuple[str, str, bool, int]) -> None:
    problem, options = tied_problem(*case)
    expected = HooksEKFACComputer(**problem.kwargs(**options)).compute()
    fn, _ = make_compute_ekfac_eigencorrection_batch(
        problem.model, problem.loss, *other_batch(problem), **options
    )
    assert_equal(fn(problem.params, *problem.data[0], *expected[:2]), expected[2])


def test_tied_embedding_traced_without_factors() -> None:
    """At zero parameters all terms of the sum vanish; elsewhere they do not, and vice versa."""
    problem, options = tied_problem(*TIED_CASES[1])
    zeros = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    arguments = (problem.model, problem.loss)
    for traced, used in ((zeros, problem.params), (problem.params, zeros)):
        fn, _ = make_compute_kfac_batch(*arguments, traced, *problem.data[0], **options)
        problem.params = used
        inputs, gradients, _ = HooksKFACComputer(**problem.kwargs(**options)).compute()
        tied = next(key for key in inputs if key[0].endswith("table.weight"))
        assert bool(inputs[tied].any()) == (used is not zeros)
        for actual, expected in zip(fn(used, *problem.data[0]), (inputs, gradients), strict=True):
            assert_equal(actual, expected)


def test_layouts_of_a_batch() -> None:
    """The arguments' strides may be other ones than those of the trace."""
    torch.manual_seed(4)
    params = {"W": torch.randn(2, 6, dtype=torch.float64)}
    X, y = torch.rand(4, 2, 3, dtype=torch.float64), torch.arange(4) % 2
    model = lambda p, X: F.linear(X.flatten(1), p["W"])  # noqa: E731
    fn, _ = make_compute_kfac_batch(model, nn.CrossEntropyLoss(), params, X, y, "type-2")
    expected = fn(params, X, y)
    X, params = X.mT.contiguous().mT, {"W": params["W"].T.contiguous().T}
    for actual, wanted in zip(fn(params, X, y), expected, strict=True):
        assert_equal(actual, wanted)


def test_views_that_are_changed() -> None:
    """What is changed in place through a view is changed; in another layout there is an error."""

    def function(x: Tensor) -> Tensor:
        result = x.clone()
        result.view(-1)[:2] += 1
        return result

    x = torch.rand(2, 3)
    call = flat_function(function, ["x"], [torch.rand(2, 3)])
    assert torch.equal(call(x), function(x))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        call(x.T.contiguous().T)


# ---- compiled ------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["module", "layer", "function"])
def test_models_that_are_compiled(part: str) -> None:
    """They are traced as they were before they were compiled, also after they have run."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    options: Any = {"fisher_type": "type-2"}
    kinds = (KFACLinearOperator, EKFACLinearOperator)
    expected = [kind(model, loss, params, [(X, y)], **options).to_dense() for kind in kinds]
    compiled: Any
    if part == "module":
        compiled = torch.compile(model, backend="eager")
    elif part == "layer":
        compiled = nn.Sequential(model[0], model[1], torch.compile(model[2], backend="eager"))
    else:
        compiled = torch.compile(lambda p, x: functional_call(model, p, x), backend="eager")
    if part != "function":
        params = dict(compiled.named_parameters())
    for _ in range(2):
        for kind, matrix in zip(kinds, expected, strict=True):
            K = kind(compiled, loss, params, [(X, y)], backend="make_fx", **options)
            torch.testing.assert_close(K.to_dense(), matrix)
        fn, mapping = make_compute_kfac_batch(compiled, loss, params, X, y, **options)
        gradients = fn(params, X, y)[1]
        K = KFACLinearOperator(compiled, loss, params, [(X, y)], backend="make_fx", **options)
        for group in mapping:
            (name,) = group.values()
            torch.testing.assert_close(gradients[name,], K.factors(name)[0])
        with torch.no_grad():
            compiled(X) if part != "function" else compiled(params, X)
    torch.compiler.reset()


def check_compiled(
    problem: Setup, options: Any, uniforms: tuple[Tensor | None, ...], backend: str
) -> None:
    """Compare compiled functions of a batch with those that are not, and with the operators'."""
    made_with = (problem.model, problem.loss, *other_batch(problem))
    arguments, further = (problem.params, *problem.data[0]), {**options}
    further["batch_size_fn"] = problem.batch_size_fn
    torch.compiler.reset()
    fn, _ = make_compute_kfac_batch(*made_with, **further)
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    expected = HooksKFACComputer(**problem.kwargs(**options)).compute()
    for actual, wanted in zip(compiled(*arguments, uniforms[0]), expected, strict=False):
        assert_equal(actual, wanted)
    if uniforms[0] is not None and backend != "inductor":  # compiles again, which takes long
        compiled(*arguments)  # draws the numbers itself
    if options["fisher_type"] == "forward-only":
        return
    *bases, expected, _ = HooksEKFACComputer(**problem.kwargs(**options)).compute()
    fn, _ = make_compute_ekfac_eigencorrection_batch(*made_with, **further)
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    assert_equal(compiled(*arguments, *bases, uniforms[1]), expected)


def check_batch_case(case: tuple[str, int, str, bool], backend: str) -> None:
    problem, options = batch_problem(*case)
    purposes = ("signs", "eigenvalue-signs")
    uniforms = tuple(uniforms_of(problem, options, purpose) for purpose in purposes)
    check_compiled(problem, options, uniforms, backend)


@pytest.mark.parametrize(
    "case",
    [
        # one of each kind is enough for a quick run
        pytest.param(BATCH_CASES[i], id=BATCH_CASES[i][0], marks=[pytest.mark.slow][:slow])
        for i, slow in ((0, True), (2, False), (5, False))
    ],
)
def test_compiled(case: tuple[str, int, str, bool]) -> None:
    check_batch_case(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", BATCH_CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_more(case: tuple[str, int, str, bool], backend: str) -> None:
    check_batch_case(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_tied_embedding(backend: str) -> None:
    problem, options = tied_problem("head-bias", "expand", True, 4)
    # alone, for the sake of time
    problem.params = {n: p for n, p in problem.params.items() if n.endswith("table.weight")}
    check_compiled(problem, options, (None, None), backend)


# kinds of layers that are in none of the other cases
COMPILED_LAYERS = (
    *("batch-norm", "group-norm", "layer-norm-2d", "rms-norm", "self-attention"),
    *("separate-attention", "transformers-conv1d", "transposed2d", "conv3d", "depthwise", "twice"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_LAYERS)
def test_compiled_layers(name: str) -> None:
    options = {"fisher_type": "type-2", "loss_terms": "exact"}
    problem = layer_setup(name)
    problem.data = problem.data[:1]
    check_compiled(problem, options, (None, None), "eager")


def test_compiled_diagonal() -> None:
    """A diagonal operator is among the results."""
    problem = layer_setup("embedding")
    arguments = (problem.params, *problem.data[0])
    fn, _ = make_compute_kfac_batch(
        problem.model, problem.loss, *other_batch(problem), fisher_type="empirical",
        loss_terms="exact",
    )  # fmt: skip
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), fn(*arguments), strict=True):
        assert_equal(actual, expected)
