"""KFAC and EKFAC of data that come batch by batch."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from kfac_cases import BY_NAME, setup
from kfac_reference import Setup
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import (
    EKFACAccumulator,
    EKFACLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
)

Accumulator = KFACAccumulator | EKFACAccumulator
FISHER_TYPES = ["mc", "type-2", "empirical", "forward-only"]


def arguments(problem: Setup) -> dict[str, Any]:
    """Return the arguments of an accumulator."""
    kwargs = problem.kwargs()
    return {k: v for k, v in kwargs.items() if k not in ("data", "check_deterministic")}


def filled(accumulator: Any, data: Any) -> Any:
    """Add all batches."""
    for X, y in data:
        accumulator.update(X, y)
    return accumulator


def saved(state: Any) -> Any:
    """Save and load by PyTorch, without pickled code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def assert_same(actual: Any, expected: Any) -> None:
    """Compare two operators block by block."""
    assert type(actual) is type(expected)
    assert actual.mapping == expected.mapping
    A, B = actual.to_dense(), expected.to_dense()
    assert B.abs().max() > 0
    assert torch.allclose(A, B, rtol=1e-9, atol=1e-11 * float(B.abs().max()))
    assert actual.summary() == expected.summary()


# --------------------------------------------------------------------------------------------------
# Equal to one pass
# --------------------------------------------------------------------------------------------------
CASES = ["mlp", "cnn", "tokens", "attention", "mapping", "repeated", "tied-one", "sometimes"]
OPTIONS: list[dict[str, Any]] = [
    {"fisher_type": "mc", "mc_samples": 2},
    {"fisher_type": "type-2", "kfac_approx": "reduce", "separate_weight_and_bias": False},
    {"fisher_type": "empirical", "separate_weight_and_bias": False},
    {"fisher_type": "empirical", "loss_terms": "exact"},
    {"fisher_type": "forward-only"},
    {"fisher_type": "mc", "kfac_approx": "reduce", "backend": "make_fx"},
    {"fisher_type": "type-2", "max_factor_size": 3, "backend": "make_fx"},
]


def name_of(options: dict[str, Any]) -> str:
    """Return what a test with these options is called."""
    return "-".join(map(str, options.values()))


def one_pass(case: str, loss: str, reduction: str, options: dict[str, Any]) -> None:
    """Compare both accumulators with operators of all data, also merged and restored."""
    problem = setup(case, loss, reduction)
    kwargs = arguments(problem)
    first, rest = problem.data[:1], problem.data[1:]
    K = KFACLinearOperator(**problem.kwargs(**options))
    assert_same(filled(KFACAccumulator(**kwargs, **options), problem.data).to_operator(), K)
    kinds: list[tuple[Any, Any, Any]] = [(KFACAccumulator, kwargs, K)]
    if options["fisher_type"] != "forward-only":
        E = EKFACLinearOperator(**problem.kwargs(**options))
        kinds += [(EKFACAccumulator, {**kwargs, "basis": basis}, E) for basis in (K, E)]
    for cls, args, expected in kinds:
        start = filled(cls(**args, **options), first)
        again = cls(**args, **options)
        again.load_state_dict(saved(start.state_dict()))
        assert_same(filled(again, rest).to_operator(), expected)
        # by another accumulator, which goes on where the first one stands
        other = filled(cls(**args, **options, first_term=start.next_term), rest)
        start.merge(other)
        assert_same(start.to_operator(), expected)
        assert start.next_term == other.next_term
        assert (start.num_updates, start.num_data) == (len(problem.data), again.num_data)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize(("case", "loss"), [("cnn", "mse"), ("attention", "ce-all")])
def test_equal_to_one_pass(case: str, loss: str, options: dict[str, Any]) -> None:
    """After all batches, of unequal size, the operator is that of a pass over all data.

    Catches: a state with numbers in float32.
    """
    one_pass(case, loss, "mean", options)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "ce-all", "bce"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{name_of(options)}")
        for case in CASES
        for options in OPTIONS
        # layers that share a weight may have different biases
        if all(BY_NAME[case].joint) or options.get("separate_weight_and_bias", True)
    ],
)
def test_equal_to_one_pass_everywhere(
    case: str, loss: str, reduction: str, options: dict[str, Any]
) -> None:
    """So it is for all models, losses and options."""
    one_pass(case, loss, reduction, options)


def test_operator_at_any_time() -> None:
    """An operator is that of the batches so far, and does not change with further ones."""
    problem = setup("cnn", "mse")
    accumulator = KFACAccumulator(**arguments(problem))
    operators = [filled(accumulator, [batch]).to_operator() for batch in problem.data]
    for i, operator in enumerate(operators):
        data = problem.data[: i + 1]
        assert_same(operator, KFACLinearOperator(**problem.kwargs(data=data)))


def test_parameters_at_the_time() -> None:
    """Each batch is evaluated at the values that the parameters have at its time."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params, loss = dict(model.named_parameters()), nn.MSELoss(reduction="sum")
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 2)]
    accumulator = KFACAccumulator(model, loss, params, fisher_type="empirical")
    factors = []
    for batch in data:
        accumulator.update(*batch)
        K = KFACLinearOperator(model, loss, params, [batch], fisher_type="empirical")
        factors.append(K.factors("2.weight"))
        with torch.no_grad():
            for p in params.values():
                p.add_(torch.randn_like(p))
    (B1, A1), (B2, A2) = factors
    B, A = accumulator.to_operator().factors("2.weight")
    assert torch.allclose(B, B1 + B2)
    assert torch.allclose(A, (3 * A1 + 2 * A2) / 5)


def test_diagonal_blocks() -> None:
    """Parameters in no supported layer have the exact diagonal of all batches."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) * self.scale

    model = Scaled().double()
    params = dict(model.named_parameters())
    data = [(torch.rand(n, 3).double(), torch.tensor([0, -100, 1][:n])) for n in (3, 2)]
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        kwargs: dict[str, Any] = {"unsupported": "diagonal", "fisher_type": "type-2"}
        K = KFACLinearOperator(model, loss, params, data, **kwargs)
        E = EKFACLinearOperator(model, loss, params, data, **kwargs)
        accumulator = filled(KFACAccumulator(model, loss, params, **kwargs), data[:1])
        other = KFACAccumulator(model, loss, params, **kwargs)
        other.load_state_dict(saved(accumulator.state_dict()))
        assert_same(filled(other, data[1:]).to_operator(), K)
        accumulator.merge(filled(KFACAccumulator(model, loss, params, **kwargs), data[1:]))
        assert_same(accumulator.to_operator(), K)
        ekfac = filled(EKFACAccumulator(model, loss, params, E, **kwargs), data)
        assert_same(ekfac.to_operator(), E)
        with pytest.raises(NotImplementedError, match="scale"):
            KFACAccumulator(model, loss, params).update(*data[0])


# --------------------------------------------------------------------------------------------------
# Moving averages
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_moving_average(approx: str, reduction: str, decay: float) -> None:
    """Factors are averages of those of batches, whose weights add up to one.

    Catches: a bias towards zero, weights by the size of a batch, a decay of the newest batch.
    """
    problem = setup("cnn", "mse", reduction)
    options = {"kfac_approx": approx, "fisher_type": "empirical", "separate_weight_and_bias": False}
    accumulator = KFACAccumulator(**arguments(problem), decay=decay, **options)
    t = len(problem.data)
    weights = [(1 - decay) * decay ** (t - 1 - i) / (1 - decay**t) for i in range(t)]
    assert sum(weights) == pytest.approx(1)
    batches = [
        KFACLinearOperator(**problem.kwargs(data=[batch], **options)) for batch in problem.data
    ]
    K = filled(accumulator, problem.data).to_operator()
    for group in K.mapping:
        name = group["W"]
        for i, factor in enumerate(K.factors(name)):
            terms = zip(weights, batches, strict=True)
            expected = sum(w * batch.factors(name)[i] for w, batch in terms)
            assert torch.allclose(factor, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 10.0]], ids=["plain", "weighted"])
def test_moving_average_of_sequences(weights: list[float] | None) -> None:
    """A batch counts as much as its examples have positions, and weights of loss terms."""
    torch.manual_seed(0)
    decay = 0.7
    layer = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(layer, nn.Flatten(0, 1)).double()
    data = []
    for n, length, ignored in ((3, 4, 5), (5, 2, 0), (2, 3, 1)):
        y = torch.randint(2, (n * length,))
        y[:ignored] = -100
        data.append((torch.rand(n, length, 3, dtype=torch.float64), y))
    of_classes = torch.tensor(weights or [1.0, 1.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=None if weights is None else of_classes)
    params = {"0.weight": layer.weight}
    options: dict[str, Any] = {"fisher_type": "type-2"}
    sums: list[Any] = [0, 0]
    counts: list[float] = [0, 0]
    for X, y in data:
        factors = KFACLinearOperator(model, loss, params, [(X, y)], **options).factors("0.weight")
        for i, count in enumerate((of_classes[y[y >= 0]].sum().item(), len(y))):
            counts[i] = decay * counts[i] + count / len(X)
            sums[i] = decay * sums[i] + count / len(X) * factors[i]
    accumulator = KFACAccumulator(model, loss, params, decay=decay, **options)
    actual = filled(accumulator, data).to_operator().factors("0.weight")
    for factor, total, count in zip(actual, sums, counts, strict=True):
        torch.testing.assert_close(factor, total / count)


def test_moving_average_of_eigenvalues() -> None:
    """So are EKFAC's eigenvalues, in a fixed basis, and the state restores them."""
    problem, decay = setup("cnn", "ce-weight"), 0.6
    options: dict[str, Any] = {"fisher_type": "type-2"}
    basis = KFACLinearOperator(**problem.kwargs(**options))
    kwargs = {**arguments(problem), "basis": basis, **options}
    accumulator = EKFACAccumulator(**kwargs, decay=decay)
    average, total = 0.0, 0.0
    for batch in problem.data:
        again = EKFACAccumulator(**kwargs, decay=decay)
        again.load_state_dict(saved(accumulator.state_dict()))
        accumulator = filled(again, [batch])
        single = filled(EKFACAccumulator(**kwargs), [batch]).to_operator()
        # the loss's mean divides by weights of the classes, which the average takes into account
        mass = accumulator._computer.loss.normalizer(
            *accumulator._computer.loss.terms(problem.model(batch[0]), batch[1]), len(batch[0])
        )
        mass = float(mass) / len(batch[0])
        average = decay * average + mass * single.block("model.0.weight").eigenvalues
        total = decay * total + mass
    values = accumulator.to_operator().block("model.0.weight").eigenvalues
    assert torch.allclose(values, average / total, rtol=1e-10)  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------
# Steps of a training loop
# --------------------------------------------------------------------------------------------------
def training(reduction: str = "mean") -> tuple[nn.Module, nn.Module, dict[str, Tensor], Any]:
    """Return a network with activations in place, a loss, parameters and data."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 3),
    ).double()
    data = [(torch.rand(n, 2, 3, 3).double(), torch.randint(3, (n,))) for n in (4, 1, 3)]
    return model, nn.CrossEntropyLoss(reduction=reduction), dict(model.named_parameters()), data


@pytest.mark.parametrize("options", [{}, {"kfac_approx": "reduce"}], ids=["expand", "reduce"])
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_observed_steps(reduction: str, separate: bool, options: dict[str, Any]) -> None:
    """A training step gives what update does, and the same gradients as without."""
    model, loss, params, data = training(reduction)
    options = {**options, "fisher_type": "empirical", "separate_weight_and_bias": separate}
    K = KFACLinearOperator(model, loss, params, data, **options)
    E = EKFACLinearOperator(model, loss, params, data, **options)
    accumulators: list[Any] = [
        KFACAccumulator(model, loss, params, **options),
        EKFACAccumulator(model, loss, params, K, **options),
    ]
    for accumulator, expected in zip(accumulators, (K, E), strict=True):
        for X, y in data:
            (3 * loss(model(X), y)).backward()
            gradients = [p.grad for p in params.values()]
            model.zero_grad()
            with accumulator.observe(X, y, loss_scale=3.0):
                (3 * loss(model(X), y)).backward()
            for p, g in zip(params.values(), gradients, strict=True):
                assert p.grad is not None and g is not None
                assert torch.equal(p.grad, g)
            model.zero_grad()
        assert_same(accumulator.to_operator(), expected)
        assert accumulator.next_term == 8


def test_observed_step_costs() -> None:
    """Observing costs the second moments, and no further pass through the model."""
    d, n = 128, 64
    model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
    loss, params = nn.MSELoss(), dict(model.named_parameters())
    X, y = torch.rand(n, d), torch.rand(n, d)
    accumulator = KFACAccumulator(model, loss, params, fisher_type="empirical")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def flops(observed: bool) -> int:
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            if observed:
                with accumulator.observe(X, y):
                    loss(model(X), y).backward()
            else:
                loss(model(X), y).backward()
        return counter.get_total_flops()

    flops(True)  # looks at a few examples first
    calls.clear()
    plain = flops(False)
    assert len(calls) == 1
    observed = flops(True)
    assert len(calls) == 2
    moments = 4 * 2 * n * d**2 * 3 // 4  # two of each layer, three quarters of the products
    assert observed - plain == moments


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_failed_step(where: str) -> None:
    """After an exception nothing was added, and nothing is left behind in the model."""
    model, loss, params, data = training()
    accumulator = KFACAccumulator(model, loss, params, fisher_type="empirical")
    X, y = data[0]
    with accumulator.observe(X, y):
        loss(model(X), y).backward()
    before = saved(accumulator.state_dict())
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"planted|channels"), accumulator.observe(X, y):  # noqa: PT012
        value = model(X[:, :1] if where == "forward" else X)
        if where == "loss":
            raise RuntimeError("planted")
        value.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("planted")))
        loss(value, y).backward()
    assert not model._forward_hooks and not model._forward_pre_hooks
    after = accumulator.state_dict()
    assert {k: v for k, v in after.items() if k != "sums"} == {
        k: v for k, v in before.items() if k != "sums"
    }
    with accumulator.observe(X, y):
        loss(model(X), y).backward()
    twice = KFACLinearOperator(model, loss, params, [(X, y)] * 2, fisher_type="empirical")
    assert_same(accumulator.to_operator(), twice)


def test_steps_that_cannot_be_observed() -> None:
    """Each error says what is wrong, and update does what observe cannot."""
    model, loss, params, data = training()
    X, y = data[0]
    empirical = {"fisher_type": "empirical"}

    def step(accumulator: Any, steps: int = 1, backward: int = 1) -> None:
        with accumulator.observe(X, y):
            for _ in range(steps):
                value = loss(model(X), y)
            for _ in range(backward):
                value.backward(retain_graph=True)

    accumulator = KFACAccumulator(model, loss, params, **empirical)
    with pytest.raises(RuntimeError, match="evaluated more than once"):
        step(accumulator, steps=2)
    with pytest.raises(RuntimeError, match="more than one backward pass"):
        step(accumulator, backward=2)
    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) in the context"):
        step(accumulator, backward=0)
    with pytest.raises(RuntimeError, match="not evaluated"), accumulator.observe(X, y):
        pass
    with pytest.raises(ValueError, match=r"fisher_type='empirical', not 'mc'.*update"):
        step(KFACAccumulator(model, loss, params))
    with pytest.raises(ValueError, match="backend='hooks'"):
        step(KFACAccumulator(model, loss, params, **empirical, backend="make_fx"))
    assert accumulator.num_updates == 0
    sequences = setup("tokens", "mse")
    tokens = KFACAccumulator(
        sequences.model, sequences.loss, dict(sequences.model.named_parameters()), **empirical
    )
    X, y = sequences.data[0]
    with pytest.raises(ValueError, match="several loss terms"), tokens.observe(X, y):
        sequences.loss(sequences.model(X), y).backward()
    tokens.update(X, y)


# --------------------------------------------------------------------------------------------------
# Interruption
# --------------------------------------------------------------------------------------------------
SCRIPT = """
    import sys, time, torch
    from pathlib import Path
    from torch import nn
    from curvlinops import KFACAccumulator

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (3, 1, 2, 4)]
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    accumulator = KFACAccumulator(model, loss, params)
    path, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
    if path.exists():
        accumulator.load_state_dict(torch.load(path))
    for X, y in data[accumulator.num_updates:]:
        accumulator.update(X, y)
        torch.save(accumulator.state_dict(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        if dies and accumulator.num_updates == 2:
            print("waiting", flush=True)
            time.sleep(600)
    torch.save(accumulator.to_operator(), sys.argv[3])
"""


def test_killed_process(tmp_path: Path) -> None:
    """A process that is killed in the middle of a pass is resumed with the same result."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def command(*args: Any) -> list[str]:
        return [sys.executable, str(script), *map(str, args)]

    first = command(tmp_path / "state.pt", "dies", tmp_path / "never.pt")
    with subprocess.Popen(first, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "never.pt").exists()
    subprocess.run(command(tmp_path / "state.pt", "lives", tmp_path / "K.pt"), check=True)
    K = torch.load(tmp_path / "K.pt")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (3, 1, 2, 4)]
    params = dict(model.named_parameters())
    assert_same(K, KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data))


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------
def test_bad_arguments() -> None:
    """Wrong arguments are named before anything is computed."""
    model, loss, params, _ = training()
    for options, message in [
        ({"decay": 1.0}, "decay must be at least 0 and below 1"),
        ({"decay": -0.1}, "decay must be at least 0 and below 1"),
        ({"first_term": -1}, "first_term must not be negative"),
        ({"backend": "guess"}, "backend must be one of"),
        ({"fisher_type": "wrong"}, "wrong"),
        ({"mc_samples": 2, "fisher_type": "type-2"}, "mc_samples=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            KFACAccumulator(model, loss, params, **options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no data yet"):
        KFACAccumulator(model, loss, params).to_operator()
    K = KFACLinearOperator(*training())
    with pytest.raises(TypeError, match="basis must be a KFACLinearOperator"):
        EKFACAccumulator(model, loss, params, basis=params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forward-only"):
        EKFACAccumulator(model, loss, params, K, fisher_type="forward-only")


def test_basis_that_does_not_fit() -> None:
    """A basis of other parameters, or of other groups, is refused."""
    model, loss, params, data = training()
    K = KFACLinearOperator(model, loss, params, data)
    some = {name: p for name, p in params.items() if name != "0.bias"}
    with pytest.raises(ValueError, match=r"different parameters: \['0\.bias'\]"):
        EKFACAccumulator(model, loss, some, K)
    joint = EKFACAccumulator(model, loss, params, K, separate_weight_and_bias=False)
    with pytest.raises(ValueError, match=r"no block that fits '0\.weight', '0\.bias'"):
        joint.update(*data[0])


def test_merge_of_different_ones() -> None:
    """Only accumulators of the same thing are merged; the other one stays as it is."""
    model, loss, params, data = training()
    accumulator = filled(KFACAccumulator(model, loss, params), data[:1])
    other = filled(KFACAccumulator(model, loss, params), data[1:])
    before = other.to_operator().to_dense()
    accumulator.merge(other)
    accumulator.update(*data[0])
    assert torch.equal(other.to_operator().to_dense(), before)
    empty = KFACAccumulator(model, loss, params)
    empty.merge(other)
    assert torch.equal(empty.to_operator().to_dense(), before)
    empty.update(*data[0])
    assert torch.equal(other.to_operator().to_dense(), before)
    accumulator.merge(KFACAccumulator(model, loss, params))  # adds nothing
    K = KFACLinearOperator(model, loss, params, data)
    with pytest.raises(TypeError, match="another KFACAccumulator"):
        accumulator.merge(EKFACAccumulator(model, loss, params, K))
    for name, options in [
        ("kfac_approx", {"kfac_approx": "reduce"}),
        ("fisher_type", {"fisher_type": "type-2"}),
        ("decay", {"decay": 0.5}),
        ("separate_weight_and_bias", {"separate_weight_and_bias": False}),
    ]:
        different = KFACAccumulator(model, loss, params, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"differ in {name}"):
            accumulator.merge(different)
        with pytest.raises(ValueError, match=f"differ in {name}"):
            accumulator.load_state_dict(different.state_dict())
    sums = KFACAccumulator(model, nn.CrossEntropyLoss(reduction="sum"), params)
    with pytest.raises(ValueError, match="differ in reduction"):
        accumulator.merge(sums)
    moving = KFACAccumulator(model, loss, params, decay=0.5)
    with pytest.raises(ValueError, match="order of batches"):
        moving.merge(KFACAccumulator(model, loss, params, decay=0.5))
    state = accumulator.state_dict()
    with pytest.raises(ValueError, match="Update curvlinops"):
        accumulator.load_state_dict({**state, "version": 1000})


def test_failed_update() -> None:
    """If a batch fails, nothing of it was added, and the next one has its random numbers."""
    model, loss, params, data = training()
    for fisher_type in ("empirical", "mc"):
        accumulator = KFACAccumulator(model, loss, params, fisher_type=fisher_type)
        filled(accumulator, data[:1])
        X, y = data[1]
        with pytest.raises((IndexError, RuntimeError)):  # noqa: PT012
            if fisher_type == "empirical":
                accumulator.update(X, y + 7)  # after the forward pass
            else:
                accumulator.update(X[..., :1], y)  # in the middle of it
        filled(accumulator, data[1:])
        K = KFACLinearOperator(model, loss, params, data, fisher_type=fisher_type)
        assert_same(accumulator.to_operator(), K)


def test_global_state_untouched() -> None:
    """Updates leave gradients, flags and the global generator alone."""
    model, loss, params, data = training()
    accumulator = KFACAccumulator(model, loss, params)
    state = torch.get_rng_state()
    filled(accumulator, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in params.values())
    assert not model._forward_hooks


def test_basis_of_kfoc() -> None:
    """The factors of KFOC can be decomposed as those of KFAC."""
    model, loss, params, data = training()
    K = KFOCLinearOperator(model, loss, params, data)
    accumulator = filled(EKFACAccumulator(model, loss, params, K), data)
    assert accumulator.to_operator().shape == K.shape


# --------------------------------------------------------------------------------------------------
# Layers that are called in later batches only
# --------------------------------------------------------------------------------------------------
class Growing(nn.Module):
    """Adds an embedding of positions, the same for all examples, once it is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(3, 4), nn.Linear(4, 3)
        self.positions = nn.Embedding(4, 4)
        self.wanted = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.inputs(x)
        if self.wanted:
            h = h + self.positions(torch.arange(4))
        return self.outputs(torch.relu(h).mean(1))


def growing(cls: Any, approx: str) -> tuple[Growing, nn.Module, list[Any], Any]:
    """Return a model, a loss, batches of which the first lacks a layer, and an accumulator."""
    torch.manual_seed(0)
    model, loss = Growing().double(), nn.CrossEntropyLoss()
    params = dict(model.named_parameters())
    data = [(torch.randn(n, 4, 3).double(), torch.randint(3, (n,))) for n in (4, 5, 3)]
    options: dict[str, Any] = {"fisher_type": "empirical", "kfac_approx": approx}
    basis = {}
    if cls is EKFACAccumulator:
        basis = {"basis": KFACLinearOperator(model, loss, params, data, **options)}
    return model, loss, data, cls(model, loss, params, **basis, **options)


def one_by_one(cls: Any, approx: str) -> Any:
    """Return the operator of batches of one example, where nothing is to be told apart."""
    model, _, data, accumulator = growing(cls, approx)
    for i, (X, y) in enumerate(data):
        model.wanted = i > 0
        filled(accumulator, zip(X.split(1), y.split(1), strict=True))
    return accumulator.to_operator()


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("cls", [KFACAccumulator, EKFACAccumulator])
def test_layer_in_a_later_batch(cls: Any, approx: str) -> None:
    model, _, data, accumulator = growing(cls, approx)
    other = growing(cls, approx)[3]
    for i, (X, y) in enumerate(data):
        model.wanted = i > 0
        accumulator.update(X, y)
    expected = one_by_one(cls, approx)
    assert_same(accumulator.to_operator(), expected)
    other.merge(accumulator)
    assert_same(other.to_operator(), expected)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("cls", [KFACAccumulator, EKFACAccumulator])
def test_layer_in_a_later_step(cls: Any, approx: str) -> None:
    """A step cannot be repeated; nothing of it was added, and an update does."""
    model, loss, data, accumulator = growing(cls, approx)

    def step(X: Tensor, y: Tensor) -> None:
        with accumulator.observe(X, y):
            loss(model(X), y).backward()

    model.wanted = False
    step(*data[0])
    before = accumulator.to_operator().to_dense()
    model.wanted = True
    with pytest.raises(RuntimeError, match=r"'positions.weight' is called .* update\(X, y\)"):
        step(*data[1])
    after = accumulator.to_operator()
    assert accumulator.num_updates == 1
    assert torch.equal(after.to_dense()[: len(before), : len(before)], before)
    loaded = growing(cls, approx)[3]
    loaded.load_state_dict(saved(accumulator.state_dict()))
    assert_same(loaded.to_operator(), after)
    accumulator.update(*data[1])
    step(*data[2])
    assert_same(accumulator.to_operator(), one_by_one(cls, approx))


def test_interrupted_step() -> None:
    """PyTorch calls no hooks after a KeyboardInterrupt, and still nobody listens any more."""
    model, loss, params, data = training()
    accumulator = KFACAccumulator(model, loss, params, fisher_type="empirical")
    X, y = data[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error, accumulator.observe(X, y):  # noqa: PT012
        model[3].register_forward_hook(interrupt)
        model(X)
    assert not _get_current_function_mode_stack()
    assert error.tb is not None  # holds what the step held
