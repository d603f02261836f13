"""Errors of Kronecker-factored approximations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from abstract_methods import add_abstract
from error_cases import Cases
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvlinops import (
    EKFACAccumulator,
    EKFACLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
    register_layer,
)
from curvlinops.computers import layers
from curvlinops.computers._base import KFACComputer
from curvlinops.computers.accumulation import Accumulator
from curvlinops.computers.encoding import decode, encode
from curvlinops.computers.formats import Format
from curvlinops.computers.group_statistic import GroupStatistic
from curvlinops.computers.kfac_make_fx import make_compute_kfac_batch
from curvlinops.computers.layers import Call
from curvlinops.computers.look import Looking
from curvlinops.computers.recorder import Recorder
from curvlinops.computers.report import _check_factor, check_eigenvalues
from curvlinops.kfac_utils import extract_averaged_patches

cases = Cases()

X, Y = torch.rand(4, 2), torch.rand(4, 2)
MSE = nn.MSELoss()
EMPIRICAL = {"fisher_type": "empirical"}


class Uses(nn.Module):
    """A model made of a function of it and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.function, self.calls = function, 0
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.function(self, x)


def of_nested(m: Any, x: Tensor) -> Tensor:
    """Call a layer with one row for each example, as sequences of different lengths are."""
    rows = torch.nested.nested_tensor_from_jagged(x, torch.arange(len(x) + 1))
    return m.b(torch.nested.to_padded_tensor(m.a(rows), 0.0).sum(1))


def build(model: nn.Module | None = None, cls: Any = KFACLinearOperator, **changes: Any) -> Any:
    """Build KFAC of a small model, with changes of the arguments."""
    model = nn.Linear(2, 2) if model is None else model
    arguments = {"loss_func": MSE, "params": dict(model.named_parameters()), **changes}
    return cls(**{"model_func": model, "data": [(X, Y)], **arguments})


def inner(parser: Any) -> None:
    """Build KFAC of a model with a layer whose arguments a function reads."""
    with patch.object(layers, "LAYERS", list(layers.LAYERS)):
        register_layer(layers.LayerType("Mine", {torch.inner: parser}, {}))
        own = nn.Parameter(torch.rand(2, 3))
        build(Uses(lambda m, x: torch.inner(m.a(x)[:, [0, 1, 1]], m.own), own=own))


# ---- options -------------------------------------------------------------------------------------
cases(
    ValueError,
    "'fisher' is not a FisherType",
    "Choose one of 'type-2'",
    lambda: build(fisher_type="fisher"),
)
cases(
    ValueError,
    "got 'hook'",
    r"must be one of \['hooks', 'make_fx'\]",
    lambda: build(backend="hook"),
)
cases(ValueError, "no parameter 'nose'", r"Parameters: ", lambda: build().block("nose"))
cases(
    ValueError,
    "mc_samples=2 has no meaning for the Fisher type 'type-2'",
    "leave mc_samples at 1",
    lambda: build(mc_samples=2, fisher_type="type-2"),
)
cases(
    ValueError,
    "got 1.0",
    "num_per_example_loss_terms must be an integer, at least 1",
    lambda: build(num_per_example_loss_terms=1.0),
)
cases(ValueError, "got 'none'", "must be 'signs' or 'exact'", lambda: build(loss_terms="none"))
cases(
    ValueError,
    "got 2.5",
    "max_factor_size must be an integer, at least 1",
    lambda: build(max_factor_size=2.5),
)
cases(
    ValueError, "got 2", "worker_fraction must be between 0 and 1", lambda: build(worker_fraction=2)
)
cases(TypeError, "got dtype", "must be a Precision", lambda: build(precision=torch.float32))
cases(
    NotImplementedError,
    "HuberLoss has no closed forms",
    "register_loss",
    lambda: build(loss_func=nn.HuberLoss()),
)
cases(
    ValueError,
    "fisher_type='forward-only'",
    "Use another one",
    lambda: build(cls=EKFACLinearOperator, fisher_type="forward-only"),
)
cases(
    ValueError,
    "got 'empirical'",
    "needs fisher_type='type-2' or 'mc'",
    lambda: build(cls=KFOCLinearOperator, fisher_type="empirical"),
)
cases(
    ValueError,
    "no memory_budget",
    "Leave it out",
    lambda: build(cls=KFOCLinearOperator, memory_budget=10**9),
)
cases(
    ValueError,
    "got 2",
    "tol must be between 0 and 1, or None",
    lambda: build(cls=KFOCLinearOperator, tol=2),
)
cases(ValueError, "got 'skip'", "must be 'raise' or 'diagonal'", lambda: build(unsupported="skip"))
cases(
    ValueError,
    "memory_budget=1 bytes is too small",
    "Give more, use smaller batches",
    lambda: build(memory_budget=1),
)
cases(
    ValueError,
    "batch of 4 examples has 6 loss terms",
    "Check batch_size_fn",
    lambda: build(Uses(lambda m, x: m.a(x)[[0, 1, 2, 3, 0, 1]]), data=[(X, Y[[0, 1, 2, 3, 0, 1]])]),
)
cases(
    ValueError,
    "num_per_example_loss_terms=2",
    "Pass 1, or leave it out",
    lambda: build(num_per_example_loss_terms=2),
)
cases(TypeError, "got type", "takes a LayerType", lambda: register_layer(nn.Linear))  # type: ignore[arg-type]
cases(
    TypeError,
    "got 3",
    "name of a LayerType must be a string",
    lambda: register_layer(layers.LayerType(3, {}, {})),  # type: ignore[arg-type]
)
cases(
    TypeError,
    "got list",
    "must be a dict from functions",
    lambda: register_layer(layers.LayerType("Mine", [], {})),  # type: ignore[arg-type]
)
cases(
    TypeError,
    r"'Mine', .*<lambda>, returned something of type tuple",
    "It must return a Call",
    lambda: inner(lambda x, weight: (x, weight)),
)
cases(
    RuntimeError,
    r"'Mine', .*<lambda>, failed with TypeError",
    "Correct it, or let it return None",
    lambda: inner(lambda x, weight: Call(x, weight)),  # type: ignore[call-arg]
)
cases(
    ValueError,
    r"'own' was read as Linear with a weight of shape \[3, 2\]",
    "Check what reads its arguments",
    lambda: inner(lambda x, weight: Call(x, weight.T, None, Format())),
)
cases(
    ValueError,
    r"'own' was read as Linear with a bias of shape \[2, 3\]",
    "must have an entry for each of the 2",
    lambda: inner(lambda x, weight: Call(x, None, weight, Format())),
)
cases(
    NotImplementedError,
    r"dilation \* \(kernel_size - 1\) = 1",
    "use padding=0",
    lambda: extract_averaged_patches(torch.ones(1, 1, 3, 3), 2, 1, "same", 1, 1),
)
add_abstract(cases, KFACComputer, "_run")
add_abstract(cases, Looking, "_observe")
add_abstract(cases, GroupStatistic, "_add_vectors", "_add_matrices", "_add_calls", "_finish_batch")
add_abstract(cases, Accumulator, "_new_sums", "_parts", "_add_over_ranks", "_encoded", "_decoded")


# ---- models --------------------------------------------------------------------------------------
def tied_weights() -> nn.Module:
    """Return two layers that share a weight, with biases of their own."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    return model


def later(number: int, cls: Any, **options: Any) -> None:
    """Build an operator of a model that calls another layer from some call on."""
    model = Uses(lambda m, x: m.a(x) if m.calls < number else m.b(m.a(x)))
    build(model, cls, check_deterministic=False, **options)


def ekfac_later() -> None:
    """Build EKFAC of such a model, without room for the first pass."""
    with patch.object(Recorder, "_BYTES", 0):
        later(2, EKFACLinearOperator, data=[(X[:1], Y[:1])])  # one example is not looked for


def kfoc_later() -> None:
    """Build KFOC of a model that uses a parameter in another way from some call on."""
    model = Uses(lambda m, x: m.a(x) if m.calls < 4 else m.a(x) * m.b.bias)
    build(model, KFOCLinearOperator, check_deterministic=False, unsupported="diagonal")


def force(m: Any, x: Tensor) -> Tensor:
    """Use a derivative by the input."""
    z = x.detach().requires_grad_()
    return torch.autograd.grad(m.b(torch.tanh(m.a(z))).sum(), z, create_graph=True)[0]


cases(
    NotImplementedError,
    r"'weight' \(used by prelu\)",
    "unsupported='diagonal'",
    lambda: build(nn.PReLU()),
)
cases(
    ValueError,
    "share '0.weight' have conflicting biases",
    "separate_weight_and_bias=True",
    lambda: build(tied_weights(), separate_weight_and_bias=False),
)
cases(
    ValueError,
    "sees a tensor of shape .* for 4 examples",
    "Check batch_size_fn",
    lambda: build(nn.Conv1d(4, 4, 1)),  # takes the examples for channels
)
cases(
    ValueError,
    r"predictions have shape \[8, 2\] for 4 examples, which cannot be told apart",
    "let the model return predictions with the examples in the first axis",
    lambda: build(
        Uses(lambda m, x: m.b(m.a(x)).repeat(2, 1) if len(x) > 3 else 1 / 0),
        data=[(X, Y.repeat(2, 1))],
        fisher_type="type-2",
        loss_terms="exact",
    ),
)
cases(
    NotImplementedError,
    r"'a.weight' and 'a.bias' is inside of torch.utils.checkpoint",
    "disable activation checkpointing",
    lambda: build(Uses(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)))),
)
cases(
    NotImplementedError,
    "layer of 'a.weight' and 'a.bias' gets a nested tensor",
    "pad it",
    lambda: build(Uses(of_nested)),
)
cases(
    NotImplementedError,
    "differentiates .* in its forward pass",
    "use backend='make_fx'",
    lambda: build(Uses(force)),
)
cases(RuntimeError, "have changed between two passes", "must see the same", kfoc_later)
cases(
    RuntimeError,
    "'b.weight' .*have changed between two passes",
    "must see the same",
    ekfac_later,
)
cases(
    RuntimeError,
    "have changed between two passes",
    "must see the same",
    lambda: later(3, KFACLinearOperator, memory_budget=500),
)
cases(ValueError, "got function", "pass the module", lambda: build(model_func=lambda p, x: x))
# ---- models that are traced ----------------------------------------------------------------------
HOOKS = "Use backend='hooks'"


class Doubled(torch.autograd.Function):
    """A function with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Same(torch.autograd.Function):
    """A function without an operation on its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(4, 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def hooked(m: Any, x: Tensor) -> Tensor:
    """Use a hook on gradients."""
    h = m.a(x)
    h.register_hook(lambda g: 2 * g)
    return m.b(h)


def traced(function: Callable[[Any, Tensor], Any]) -> None:
    """Build KFAC of a model by tracing it."""
    build(Uses(function), backend="make_fx")


cases(NotImplementedError, "calls register_hook", HOOKS, lambda: traced(hooked))
cases(
    NotImplementedError,
    "transform of torch.func",
    HOOKS,
    lambda: traced(lambda m, x: torch.func.vmap(m.a)(x)),
)
cases(NotImplementedError, "autograd.grad with create_graph", HOOKS, lambda: traced(force))
cases(
    NotImplementedError,
    "custom autograd function",
    HOOKS,
    lambda: traced(lambda m, x: Doubled.apply(m.a(x))),
)
cases(
    NotImplementedError,
    r"custom autograd function \(Same\)",
    HOOKS,
    lambda: traced(lambda m, x: Same.apply(m.a(x))),
)


def of_jit() -> None:
    """Trace a function that ``torch.jit`` differentiates itself, after some calls."""
    function = torch.jit.script(activation)
    for _ in range(3):
        function(torch.rand(4, 2, requires_grad=True)).sum().backward()
    traced(lambda m, x: m.b(function(m.a(x))))


def activation(x: Tensor) -> Tensor:
    """Two functions, which are differentiated together."""
    return torch.tanh(x) * torch.sin(x)


cases(NotImplementedError, "torch.jit computes derivatives", HOOKS, of_jit)


def one_batch(function: Callable[[Any, Tensor], Any], **options: Any) -> None:
    """Make a function of one batch for a model."""
    model = Uses(function)
    make_compute_kfac_batch(model, MSE, dict(model.named_parameters()), X, Y, **options)


def changing(m: Any, x: Tensor) -> Tensor:
    h = x.sin()
    return m.a(h) + h.add_(1)


def ekfac_of_changed() -> None:
    """Compute EKFAC of a model that changes a layer's input afterwards."""
    model = Uses(changing)
    params = dict(model.named_parameters())
    EKFACLinearOperator(model, MSE, params, [(X, Y)], check_deterministic=False)


cases(
    RuntimeError,
    "layer of 'a.weight' and 'a.bias' was called with a tensor that was changed in place",
    "Let the model change a copy",
    ekfac_of_changed,
)
ELSEWHERE = {"W": torch.rand(2, 2), "V": torch.rand(2, 2)}
cases(
    ValueError,
    "unsupported='diagonal'",
    "use the operator",
    lambda: one_batch(lambda m, x: m.a(x), unsupported="diagonal"),
)
cases(
    NotImplementedError,
    "depend on the entries",
    "backend='hooks'",
    lambda: one_batch(lambda m, x: m.a(x) * x.sum().item()),
)
cases(
    NotImplementedError,
    r"reads the parameters \['V'\]",
    "backend='hooks'",
    lambda: make_compute_kfac_batch(
        lambda p, x: x @ p["W"].T @ ELSEWHERE["V"].T, MSE, ELSEWHERE, X, Y
    ),
)


# ---- factors -------------------------------------------------------------------------------------
def factor(**entries: float) -> Tensor:
    """Return the identity with other entries at some places, such as _01."""
    result = torch.eye(3)
    for place, value in entries.items():
        result[int(place[1]), int(place[2])] = value
    return result


CHECK = "check layers and losses that were registered"
cases(
    RuntimeError,
    r"factor of 'w' is not symmetric: its shape is \[3, 2\]",
    CHECK,
    lambda: _check_factor("The input factor of 'w'", factor()[:, :2]),
)
cases(
    RuntimeError,
    "diagonal entry 1 is -1",
    CHECK,
    lambda: _check_factor("The factor", factor(_11=-1.0)),
)
cases(
    RuntimeError,
    r"entries \[0, 1\] and \[1, 0\] are 0.5 and 0",
    CHECK,
    lambda: _check_factor("The factor", factor(_01=0.5)),
)
cases(
    RuntimeError,
    r"entry \[0, 1\] is 2, more than its diagonal",
    CHECK,
    lambda: _check_factor("The factor", factor(_01=2.0, _10=2.0)),
)
cases(
    RuntimeError,
    "input factor of 'weight' has non-finite values",
    "Check the data",
    lambda: build(data=[(X * torch.nan, Y)], check_deterministic=False),
)
cases(
    RuntimeError,
    "eigenvalues of 'w' are not finite",
    "Check the data",
    lambda: check_eigenvalues(("w",), torch.tensor([torch.nan])),
)
cases(
    RuntimeError,
    "eigenvalues of 'w' are between -1 and 1",
    "Check layers",
    lambda: check_eigenvalues(("w",), torch.tensor([-1.0, 1.0])),
)
# ---- accumulators --------------------------------------------------------------------------------
MODEL = nn.Linear(2, 2)
PARAMS = dict(MODEL.named_parameters())


def kfac_accumulator(model: nn.Module = MODEL, **options: Any) -> Any:
    """Return an accumulator of KFAC."""
    return KFACAccumulator(model, MSE, dict(model.named_parameters()), **options)


def ekfac_accumulator(params: Any = PARAMS, basis: Any = None, **options: Any) -> Any:
    """Return an accumulator of EKFAC."""
    basis = build(MODEL) if basis is None else basis
    return EKFACAccumulator(MODEL, MSE, params, basis, **options)


def diagonal_later() -> None:
    """Use a parameter in another way in the second batch."""
    model = Uses(lambda m, x: m.a(x) * (m.a.bias if len(x) == 3 else 1))
    accumulator = kfac_accumulator(model, unsupported="diagonal")
    accumulator.update(X, Y)
    accumulator.update(X[:3], Y[:3])


def merge_diagonals() -> None:
    """Merge accumulators whose parameters were used in other ways."""
    models = [Uses(lambda m, x: m.a(x)), Uses(lambda m, x: m.a(x) * m.a.bias)]
    first, second = (kfac_accumulator(model, unsupported="diagonal") for model in models)
    first.update(X, Y)
    second.update(X, Y)
    first.merge(second)


def load_newer() -> None:
    """Load a state of a later release."""
    accumulator = kfac_accumulator()
    accumulator.load_state_dict({**accumulator.state_dict(), "version": 999})


def step(accumulator: Any = None, forwards: int = 1, backwards: int = 1, y: Tensor = Y) -> None:
    """Observe a training step."""
    accumulator = kfac_accumulator(**EMPIRICAL) if accumulator is None else accumulator
    model = accumulator._arguments["model_func"]
    with accumulator.observe(X, y):
        value = torch.zeros(())
        for _ in range(forwards):
            value = MSE(model(X), y)
        for _ in range(backwards):
            value.backward(retain_graph=True)


def other_use() -> None:
    """Observe a step whose model uses a parameter in another way than before it."""
    model = Uses(lambda m, x: m.a(x) * (m.a.bias if m.calls > 2 else 1))
    accumulator = kfac_accumulator(model, unsupported="diagonal", **EMPIRICAL)
    with accumulator.observe(X, Y):
        model.calls = 2
        MSE(model(X), Y).backward()


@cases(RuntimeError, "'b.weight' .*is called in a way that was not seen", r"use update\(X, y\)")
def unseen() -> None:
    """Observe a step that calls a layer for the first time."""
    model = Uses(lambda m, x: m.b(m.a(x)) if m.calls > 2 else m.a(x))
    with kfac_accumulator(model, **EMPIRICAL).observe(X, Y):
        model.calls = 2
        MSE(model(X), Y).backward()


TOKENS = torch.rand(4, 3, 2)


@cases(ValueError, "Examples have several loss terms", r"use update\(X, y\)")
def observe_tokens() -> None:
    with kfac_accumulator(**EMPIRICAL).observe(TOKENS, TOKENS):
        MSE(MODEL(TOKENS), TOKENS).backward()


cases(
    ValueError, "got 2", "decay must be at least 0 and below 1", lambda: kfac_accumulator(decay=2)
)
cases(
    ValueError, "got -1", "first_term must not be negative", lambda: kfac_accumulator(first_term=-1)
)
cases(
    ValueError,
    r"observe\(\)",
    "needs backend='hooks'",
    lambda: step(kfac_accumulator(backend="make_fx", **EMPIRICAL)),
)
cases(ValueError, "not 'mc'", r"use update\(X, y\)", lambda: step(kfac_accumulator()))
cases(
    RuntimeError,
    "There are no data yet",
    r"call update\(X, y\)",
    lambda: kfac_accumulator().to_operator(),
)
cases(
    RuntimeError,
    r"parameters \['a.bias'\] had factors so far",
    "Leave them out of params",
    diagonal_later,
)
cases(
    TypeError,
    "got EKFACAccumulator",
    "Only another KFACAccumulator",
    lambda: kfac_accumulator().merge(ekfac_accumulator()),
)
cases(
    ValueError,
    "Moving averages",
    "use decay=None",
    lambda: kfac_accumulator(decay=0.5).merge(kfac_accumulator(decay=0.5)),
)
cases(ValueError, r"\[\] and \['a.bias'\]", "Leave these out of params", merge_diagonals)
cases(
    ValueError,
    "differ in decay: 0.5 and None",
    "Make them with the same",
    lambda: kfac_accumulator(decay=0.5).merge(kfac_accumulator()),
)
cases(ValueError, "format 999", "Update curvlinops", load_newer)
cases(
    TypeError, "got dict", "must be a KFACLinearOperator", lambda: ekfac_accumulator(basis=PARAMS)
)
cases(
    ValueError,
    r"different parameters: \['bias'\]",
    "must have the same",
    lambda: ekfac_accumulator({"weight": MODEL.weight}),
)
cases(
    ValueError,
    "no block that fits 'weight', 'bias'",
    "same separate_weight_and_bias",
    lambda: ekfac_accumulator(separate_weight_and_bias=False).update(X, Y),
)
cases(RuntimeError, "evaluated more than once", "do each step apart", lambda: step(forwards=2))
cases(RuntimeError, "more than one backward pass", "do each step apart", lambda: step(backwards=2))
cases(
    RuntimeError,
    "not evaluated",
    "evaluate the module itself",
    lambda: step(forwards=0, backwards=0),
)
cases(RuntimeError, "no backward pass", r"call loss\.backward\(\)", lambda: step(backwards=0))
cases(
    RuntimeError,
    r"parameters \['a.bias'\] are used in other ways",
    r"use update\(X, y\)",
    other_use,
)
cases(
    NotImplementedError,
    "A object cannot be saved",
    "dataclasses of plain values",
    lambda: encode(object()),
)
cases(ValueError, "has a 'Gone'", "register the same layers", lambda: decode(["Gone", {}]))
