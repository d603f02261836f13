"""Tests of the diagonal of the GGN that is computed from the inputs and gradients of layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cost_models import PROBLEMS as MODELS
from cost_models import gradient, num_flops
from cost_models import operator as build_operator
from exact_cases import (
    GENERIC,
    PROBLEMS,
    Apply,
    C,
    Problem,
    assert_close,
    classes,
    cross_entropy,
    mlp,
    mse,
    rand,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from curvlinops import GGNDiagonalLinearOperator
from curvlinops.computers.diagonal_by_examples import ExamplesDiagonal, coarsest
from curvlinops.computers.diagonal_by_layers import LayersDiagonal, _stored
from curvlinops.computers.formats import Format
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.computers.independence import Independence
from curvlinops.computers.layers import LAYERS, Call, LayerType
from curvlinops.computers.per_example import DependentError, Watch
from curvlinops.computers.usages import Part, Usage
from curvlinops.risk.losses import LOSSES, CrossEntropy


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """For which parameters gradients of single examples were computed, batch by batch."""
    names: list[tuple[str, ...]] = []
    squares = ExamplesDiagonal.squares

    def note(self: ExamplesDiagonal, *args: Any) -> Any:
        names.append(tuple(self._examples.theta))
        return squares(self, *args)

    monkeypatch.setattr(ExamplesDiagonal, "squares", note)
    return names


def diagonal(problem: Problem, **options: Any) -> Tensor:
    """Return the diagonal; warnings are errors."""
    return problem.operator(GGNDiagonalLinearOperator, **options).diagonal()


def model(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    return Apply(function, net=mlp(), **modules).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(rand(n, 3), classes(n)) for n in sizes]


# ---- what is done by layers ----------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - GENERIC))
def test_no_gradient_of_an_example_is_needed(name: str, asked: list[tuple[str, ...]]) -> None:
    """The values are tested elsewhere; here, that nothing falls back to what takes longer."""
    problem = PROBLEMS[name]()
    diagonal(problem)
    assert bool(asked) != isinstance(problem.model, nn.Module)


@pytest.mark.parametrize("mc_samples", [0, 2])
def test_both_ways_give_the_same(mc_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the same samples, for several loss terms, groups of channels, and odd kernels."""
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 4, (2, 3), stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, (1, 2), dilation=2, groups=2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, C, 1, bias=False),
    ).double()
    data = [(rand(n, 2, 3, 3), None) for n in (3, 1, 2)]
    data = [(X, classes(len(X), *net(X).shape[2:])) for X, _ in data]
    problem = Problem(net, cross_entropy, data)
    by_layers = diagonal(problem, mc_samples=mc_samples)
    monkeypatch.setattr(LayersDiagonal, "squares", lambda *_: None)
    assert_close(by_layers, diagonal(problem, mc_samples=mc_samples), 1e-13)


def test_layouts_are_undone() -> None:
    """Also one whose order of axes is not its own inverse, which an own format may have."""
    p = rand(6, 4)
    rows = p.reshape(2, 3, 4).permute(1, 2, 0).reshape(3, 8)
    layout = {"view": [2, 3, 4], "order": [1, 2, 0]}
    assert torch.equal(_stored(rows, layout, p.shape), p)


class Scaled(nn.Module):
    """A layer, a parameter in no layer, and one that is in a layer and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4) + 0.1)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        """Use them."""
        h = torch.tanh(self.first(x)) * self.scale.exp()
        return self.last(h) + self.last.bias.sin()


@pytest.mark.parametrize("other_values", [False, True])
@pytest.mark.parametrize("mc_samples", [0, 1])
def test_only_the_others_are_done_by_examples(
    asked: list[tuple[str, ...]], mc_samples: int, other_values: bool
) -> None:
    net = Scaled().double()
    problem = Problem(net, cross_entropy, batches(3, 1, 4))
    if other_values:  # of which the module knows nothing
        problem.params = {name: p + rand(*p.shape) for name, p in problem.params.items()}
    actual = diagonal(problem, mc_samples=mc_samples)
    assert asked == [("scale", "last.bias")] * 3
    if not mc_samples:
        assert_close(actual, problem.ggn().diagonal(), 1e-13)
        return
    problem.model = lambda params, X: torch.func.functional_call(net, params, (X,))
    assert_close(actual, diagonal(problem, mc_samples=1), 1e-13)


def test_names_are_those_of_other_parameters() -> None:
    """Given the parameters of KFAC without factors, only those are returned, at all values."""
    problem = Problem(Scaled().double(), cross_entropy, batches(3, 2))
    problem.params = {name: p + rand(*p.shape) for name, p in problem.params.items()}
    entries = problem.operator(GGNDiagonalComputer, names=["scale"]).compute()
    assert list(entries) == ["scale"]
    assert_close(entries["scale"], problem.named(problem.ggn().diagonal())["scale"], 1e-13)


def test_parameters_used_elsewhere_in_a_later_batch() -> None:
    """Sums of batches are added up, however each of them was computed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x) * self.net[2].bias.exp() if x[0, 0] > 0 else self.net(x)

    net = model(forward)
    data = [(X.abs() * sign, y) for sign, (X, y) in zip((-1, 1, -1), batches(3, 3, 2), strict=True)]
    problem = Problem(net, cross_entropy, data)
    with pytest.warns(UserWarning, match="one after the other"):
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


def test_layers_that_a_later_batch_uses() -> None:
    net = model(
        lambda self, x: self.net(x) + self.extra(x) if x[0, 0] > 0 else self.net(x),
        extra=nn.Linear(3, C),
    )
    data = [(X.abs() * sign, y) for sign, (X, y) in zip((-1, 1), batches(3, 3), strict=True)]
    problem = Problem(net, cross_entropy, data)
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


def test_a_single_example_first() -> None:
    """It tells nothing of where examples are; the next batch is of the same structure."""
    net = Apply(
        lambda self, x: self.net(x.transpose(0, 1)).cumsum(0).permute(1, 2, 0), net=mlp()
    ).double()
    data = [(rand(n, 4, 3), classes(n, 4)) for n in (1, 4, 2)]
    problem = Problem(net, cross_entropy, data, classes=1)
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


def test_evaluations_of_the_model() -> None:
    """One per batch; for each structure one of a single example, and one of two."""
    calls: list[int] = []

    def count(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return self.net(x)

    problem = Problem(model(count), cross_entropy, batches(4, 4, 2, 1))
    problem.operator(GGNDiagonalComputer, check_deterministic=False).compute()
    # a single example is a structure of its own
    assert calls == [1, 2, 4, 4, 2, 1, 1]


# ---- parameters that are added or multiply ------------------------------------------------------
class Operand(nn.Module):
    """Has a parameter p, and uses it in a sequence model ``[n, S, d]`` with d = 3."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, C)

    def forward(self, x: Tensor) -> Tensor:
        """Predict ``[n, C, S]``."""
        h = self.function(self, self.first(x))
        return self.last(torch.tanh(h).cumsum(1)).transpose(1, 2)


def in_place(self: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h += self.p[:4]
    h.mul_(self.p[1:5])
    return h


OPERANDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "a slice": (lambda self, h: h + self.p[: h.shape[1]], (6, 3)),
    "an axis of length one": (lambda self, h: self.p + h, (1, 4, 3)),
    "a scale": (lambda self, h: h * self.p, (3,)),
    "a number": (lambda self, h: self.p * h, ()),
    "for each position": (lambda self, h: h * self.p, (4, 1)),
    "difference and quotient": (lambda self, h: (self.p - h) / self.p[0], (4, 3)),
    "transposed": (lambda self, h: h + self.p.T, (3, 4)),
    "a stride": (lambda self, h: torch.sub(h, self.p[::2], alpha=0.5), (8, 3)),
    "twice": (lambda self, h: torch.tanh(h * self.p) + self.p, (3,)),
    "changed in place": (in_place, (5, 3)),
    "larger than activations": (lambda self, h: h[:, :1] * self.p, (4, 3)),
    "a bias, too": (lambda self, h: torch.tanh(h) + self.first.bias + self.p, (3,)),
}


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("case", OPERANDS)
def test_operands(case: str, n: int, asked: list[tuple[str, ...]]) -> None:
    """They count as biases, also where there are as many positions or features as examples."""
    function, shape = OPERANDS[case]
    data = [(rand(k, 4, 3), classes(k, 4)) for k in (n, 1, n + 2)]
    problem = Problem(Operand(function, *shape).double(), cross_entropy, data, classes=1)
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert not asked


OTHER_OPERANDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "a weight, too": (lambda self, h: functional.linear(h, self.p) + self.p.mean(0), (3, 3)),
    "of itself": (lambda self, h: h + self.p * self.p, (3,)),
    "a constant, too": (lambda self, h: h * self.p.detach() + h * self.p, (3,)),
    "with an axis for examples": (lambda self, h: h + self.p.expand(len(h), 4, 3), (4, 3)),
    "without examples": (lambda self, h: h + (torch.ones(4, 3, dtype=h.dtype) * self.p), (3,)),
    "of positions in front": (lambda self, h: (h.transpose(0, 1) + self.p).transpose(0, 1), (3,)),
}


@pytest.mark.parametrize("case", OTHER_OPERANDS)
def test_other_operands(case: str) -> None:
    """Whatever else is done with them, the result is right."""
    function, shape = OTHER_OPERANDS[case]
    data = [(rand(n, 4, 3), classes(n, 4)) for n in (4, 3)]
    problem = Problem(Operand(function, *shape).double(), cross_entropy, data, classes=1)
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


def test_large_operands_get_no_copies(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]]
) -> None:
    data = [(rand(n, 4, 3), classes(n, 4)) for n in (2, 5)]
    net = Operand(lambda self, h: h + self.p, 4, 3).double()
    problem = Problem(net, cross_entropy, data, classes=1)
    monkeypatch.setattr("curvlinops.computers.group_statistic._ENTRIES", 4 * 12)
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert asked == [("p",)]


# ---- examples that depend on each other ----------------------------------------------------------
def rolled(self: Any, x: Tensor) -> Tensor:
    h = self.net(x)
    return h + 0.1 * h.roll(1, 0)


def mixed_pairs(self: Any, x: Tensor) -> Tensor:
    """Examples 2k and 2k + 1 are mixed, where there are any."""
    h = self.net(x)
    even = len(h) // 2 * 2
    swapped = h[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return h + 0.1 * torch.cat([swapped, h[even:]])


def averaged(self: Any, x: Tensor) -> Tensor:
    h = self.net(x)
    return h - h.mean(0)


def attention(self: Any, x: Tensor) -> Tensor:
    h = self.net(x)
    return (h @ h.T).softmax(-1) @ h


def flipped(self: Any, x: Tensor) -> Tensor:
    return self.net(x).flip(0)


def one_pair(self: Any, x: Tensor) -> Tensor:
    """Only the last example sees another one."""
    h = self.net(x)
    return torch.cat([h[:-1], h[-1:] + 0.1 * h[:1] * (len(h) > 1)])


def gate_layer(self: Any, x: Tensor) -> Tensor:
    """The gate's value is zero, but not its derivative with respect to the gate's weight."""
    h = self.net(x)
    return h + self.gate(h.mean(0, keepdim=True))


DEPENDENT = [rolled, mixed_pairs, averaged, attention, flipped, one_pair]


@pytest.mark.parametrize("mc_samples", [0, 1])
@pytest.mark.parametrize("function", DEPENDENT)
def test_dependent_examples(function: Callable[..., Tensor], mc_samples: int) -> None:
    problem = Problem(model(function), cross_entropy, batches(5, 4))
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        actual = diagonal(problem, mc_samples=mc_samples)
    if not mc_samples:
        assert_close(actual, problem.ggn().diagonal(), 1e-13)
        return
    problem.model = lambda params, X: torch.func.functional_call(net, params, (X,))
    net = Apply(function, net=mlp())
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        assert_close(actual, diagonal(problem, mc_samples=1), 1e-13)


def test_batch_norm_in_training_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).double().train()
    problem = Problem(net, cross_entropy, batches(3, 5))
    problem.predict = lambda p, X: torch.func.functional_call(copy.deepcopy(net), p, (X,))
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        actual = diagonal(problem, check_deterministic=False)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


def test_only_what_is_used_is_verified(asked: list[tuple[str, ...]]) -> None:
    """Examples depend on each other in a layer whose weight is none of a layer alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(rolled(self.first, x)) * self.first.net.weight.exp().mean()

    first = nn.Module()
    first.net = nn.Linear(3, 3, bias=False)
    problem = Problem(model(forward, first=first), cross_entropy, batches(5, 4))
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)
    assert asked == [("first.net.weight",)] * 2


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_gate(size: float) -> None:
    """At zero, each example's gradients are its own, but inputs of the gate are those of all."""
    net = model(gate_layer, gate=nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        net.gate.weight.mul_(size)
    problem = Problem(net, cross_entropy, batches(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if size else "error")
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dependence_in_a_later_batch(dtype: torch.dtype) -> None:
    """The shapes are those of the first, and only the derivative for some examples changes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.net(x)
        return h + 0.05 * (x[:, :1] > 2) * h.roll(1, 0)

    X, y = rand(6, 3), classes(6)
    problem = Problem(model(forward), cross_entropy, [(X, y), (X + 3, y), (X, y)])
    expected = problem.ggn().diagonal()
    problem.to(dtype)
    with pytest.warns(UserWarning, match="depends on the"):
        actual = diagonal(problem)
    assert_close(actual, expected, 1e-13 if dtype is torch.float64 else 1e-5)


def test_every_pair_of_examples_is_told_apart() -> None:
    """What example j adds to the rows of example i is found for all i and j."""
    n, R, d = 24, 2, 3
    call = Usage(Format(), Part("a", 0, d, d), None), 0

    def verify(i: int, j: int, size: float) -> None:
        check = Independence(n, 1e-7)
        steps = [rand(n * R, d), rand(n * R, d)]
        for step in (0, 1, 2):
            if step < 2:
                check.add(steps[step])
            V = (steps[step] if step < 2 else check.last_vector()).unflatten(0, (n, R))
            g = V.clone()
            g[i] += size * V[j]
            check.on_gradient(*call, g.unsqueeze(0))
        check.verify()

    verify(0, 1, 0.0)
    for i in range(n):
        for j in range(n):
            if i != j:
                with pytest.raises(
                    DependentError, match="the gradient at the output of the layer of 'a' for"
                ):
                    verify(i, j, 0.5)


def test_verification_looks_at_each_layer_and_position() -> None:
    n, S, d = 4, 3, 2
    calls = [(Usage(Format(), Part(f"{k}", 0, d, d), None), k) for k in range(3)]

    def verify(wrong: tuple[int, int, int] | None) -> None:
        check = Independence(n, 1e-7)
        vector = rand(n, d)
        check.add(vector)
        for v in (vector, None):
            v = check.last_vector() if v is None else v
            for k, call in enumerate(calls):
                g = v.unsqueeze(1).repeat(1, S, 1)
                if wrong is not None and wrong[0] == k:
                    g[0, wrong[1], wrong[2]] += 1e-3 * v[1, 0]
                check.on_gradient(*call, (g.mT.contiguous().mT if k == 1 else g).unsqueeze(0))
        check.verify()

    verify(None)
    for wrong in [(k, s, i) for k in range(3) for s in range(S) for i in range(d)]:
        with pytest.raises(DependentError, match=f"layer of '{wrong[0]}'"):
            verify(wrong)


@pytest.mark.parametrize("swap", [False, True])
def test_terms_that_are_not_those_of_examples(monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    """Two examples make one loss term, or the loss exchanges examples."""

    class OwnLoss(nn.CrossEntropyLoss):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return super().forward(f.flip(0), y)

    class OwnEntry(CrossEntropy):
        def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return super().terms(f.flip(0), y)

    monkeypatch.setitem(LOSSES, OwnLoss, OwnEntry)
    if swap:
        problem = Problem(mlp(), lambda r: OwnLoss(reduction=r), [(rand(4, 3), classes(4))])
        reference = Problem(
            Apply(lambda self, x: self.net(x).flip(0), net=problem.model),
            cross_entropy,
            problem.data,
        )
    else:
        data = [(rand(n, 3), classes(n // 2)) for n in (2, 4)]
        net = Apply(lambda self, x: self.net(x).reshape(-1, 2, 3).sum(1), net=mlp())
        problem = reference = Problem(net, cross_entropy, data)
    with pytest.warns(UserWarning, match="the loss terms are not those of single examples"):
        actual = diagonal(problem)
    assert_close(actual, reference.ggn().diagonal(), 1e-13)


# ---- examples that are not along the first axis --------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 5])
def test_positions_first(n: int, asked: list[tuple[str, ...]]) -> None:
    """As many positions as examples, or multiples of them, cannot be told by the shape alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1)))  # [S, n, d]
        return self.b(h + h.cumsum(0)).transpose(0, 1).transpose(1, 2)

    net = Apply(forward, a=nn.Linear(3, 4), b=nn.Linear(4, C)).double()
    for S in (n, 2 * n, 4):
        problem = Problem(net, cross_entropy, [(rand(n, S, 3), classes(n, S))], classes=1)
        assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert not asked


def test_positions_that_cannot_be_told_apart(asked: list[tuple[str, ...]]) -> None:
    """A single example fails, so that the examples are looked for in the wrong axis."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("I need two examples")
        return self.net(x.transpose(0, 1)).cumsum(0).permute(1, 2, 0)

    problem = Problem(model(forward), cross_entropy, [(rand(4, 4, 3), classes(4, 4))], classes=1)
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)
    assert asked


@pytest.mark.parametrize("used", ["added", "shaped", "summed"])
def test_inputs_without_examples(used: str) -> None:
    """What a layer makes of an input that is the same for all examples is added, or a weight."""

    def forward(self: Any, x: Tensor) -> Tensor:
        made = self.maker(torch.ones(1, 2, dtype=x.dtype))  # [1, 12]
        if used == "added":
            return self.net(x) + made[:, :C]
        if used == "summed":  # which an axis for the examples would change, without an error
            return self.net(x) * made.sum()
        return self.net(x) + x @ made.reshape(-1, 3)[:3]

    problem = Problem(model(forward, maker=nn.Linear(2, 12)), cross_entropy, batches(3, 2))
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


def test_permuted_inside_of_a_shared_layer() -> None:
    """Each call is a map of examples, but their rows are in another order in the second one."""
    net = Apply(lambda self, x: self.a(torch.tanh(self.a(x)).flip(0)), a=nn.Linear(3, 3)).double()
    problem = Problem(net, cross_entropy, batches(4))
    with pytest.warns(UserWarning, match="only each loss term in its whole batch"):
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


# ---- what hooks cannot see -----------------------------------------------------------------------
def test_hidden_uses_are_found(asked: list[tuple[str, ...]]) -> None:
    """A function that hides from modes uses a weight again, and one that is never seen."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch._C.DisableTorchFunction():
            h = functional.linear(torch.tanh(h), self.a.weight) + functional.linear(x, self.c)
        return self.b(h)

    net = Apply(forward, a=nn.Linear(3, 3), b=nn.Linear(3, C)).double()
    net.c = nn.Parameter(rand(3, 3))
    problem = Problem(net, cross_entropy, batches(3, 4))
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert set(asked) == {("c", "a.weight")}


def test_wrong_entries_of_layers_are_found(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]]
) -> None:
    """An entry that forgets a factor of the input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return _scaled_linear(self.net(x), self.last.weight)

    entry = LayerType(
        "Scaled", {_scaled_linear: lambda x, weight: Call(x, weight, None, Format())}, {}
    )
    monkeypatch.setattr("curvlinops.computers.layers.LAYERS", [entry, *LAYERS])
    net = model(forward, last=nn.Linear(C, C, bias=False))
    problem = Problem(net, cross_entropy, batches(3, 2))
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert asked == [("last.weight",)] * 2


def _scaled_linear(x: Tensor, weight: Tensor) -> Tensor:
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(_scaled_linear, (x, weight), x, weight)
    return functional.linear(1.5 * x, weight)


def test_checkpoints(asked: list[tuple[str, ...]]) -> None:
    """Hooks refuse them; then it is as it was."""
    net = model(lambda self, x: checkpoint(self.net, x, use_reentrant=False))
    problem = Problem(net, cross_entropy, batches(3, 2))
    with pytest.warns(UserWarning, match="one after the other"):
        actual = diagonal(problem)
    net.function = lambda self, x: self.net(x)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)
    assert len(asked) == 2


def test_random_models_are_one_function_per_batch() -> None:
    """The passes of all loss vectors go through the graph of one evaluation."""
    net = model(lambda self, x: self.net(x) * (1 + 4 * torch.randint(2, ())))
    problem = Problem(net, cross_entropy, batches(4))

    def expected(factor: int) -> Tensor:
        fixed = model(lambda self, x: factor * self.net(x))
        fixed.load_state_dict(net.state_dict())
        return Problem(fixed, cross_entropy, problem.data).ggn().diagonal()

    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        actual = diagonal(problem, check_deterministic=False)
        errors = [(actual - expected(factor)).norm().item() for factor in (1, 5)]
        assert min(errors) < 1e-12
        found.add(min(errors) == errors[0])
    assert found == {True, False}


def test_autocast() -> None:
    """Squares are added up without it, and rounding errors are no dependence."""
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, C))
    data = [(X.float(), y) for X, y in batches(40, 30)]
    problem = Problem(net, cross_entropy, data)
    with torch.autocast("cpu", torch.bfloat16):
        actual = diagonal(problem)
    problem.to(torch.float64)
    expected = problem.ggn().diagonal()
    assert_close(actual, expected, 0.02)


def test_tolerance_is_that_of_the_coarsest_products() -> None:
    """Numbers of float32 may be multiplied in a coarser format, as the user wants."""
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = [
                coarsest(Watch(), torch.empty(1, dtype=dtype))
                for dtype in (torch.float64, torch.float32, torch.bfloat16)
            ]
    finally:
        torch.set_float32_matmul_precision(before)
    wide, single, half = 2.0**-52, 2.0**-23, 2.0**-7
    assert found == {
        "highest": [wide, single, half],
        "high": [wide, 2.0**-10, half],
        "medium": [wide, half, half],
    }


# ---- costs ---------------------------------------------------------------------------------------
#: For model and number of samples: the most that the diagonal may cost, in gradients.
LIMITS = {("MLP", 0): 2.7, ("MLP", 1): 1.2, ("MLP", 3): 1.6, ("CNN", 0): 7.35, ("CNN", 1): 1.4}


@pytest.mark.parametrize(("name", "mc_samples"), LIMITS)
def test_multiplications(name: str, mc_samples: int) -> None:
    problem = MODELS[name]()
    if name == "CNN":  # takes longer: fewer images, of which the looks at a few are a larger part
        problem = problem._replace(data=[(X[:24], y[:24]) for X, y in problem.data])
    flops = num_flops(
        lambda: build_operator(GGNDiagonalLinearOperator, problem, mc_samples=mc_samples)
    )
    limit = LIMITS[name, mc_samples]
    assert flops / num_flops(lambda: gradient(problem)) <= limit


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradients of all examples, or for all loss vectors, are held at once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.untyped_storage().nbytes() // result.itemsize)
            return result

    monkeypatch.setattr("curvlinops.computers.group_statistic._ENTRIES", 1000)
    n, S, d = 20, 6, 30
    net = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
    for shape in ((n, d), (n, S, d)):
        problem = Problem(net, mse, [(torch.rand(shape), torch.rand(shape))])
        with Largest() as mode:
            diagonal(problem, check_deterministic=False, num_data=n, mc_samples=1)
        assert mode.numel <= max(n * S * d, 2 * d * d)  # instead of n * d * d
