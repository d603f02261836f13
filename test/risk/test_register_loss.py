"""Registered losses: what an entry must implement, what is derived, and every operator with one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, jvp, vjp, vmap
from torch.nn import functional

from curvlinops import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    PerExampleGradientLinearOperator,
    register_loss,
)
from curvlinops._random import RandomSource
from curvlinops.risk import Loss, loss_entry
from curvlinops.risk.loss import CHUNK
from curvlinops.risk.losses import LOSSES, MSE, GenericLoss

DOUBLE = torch.float64
SEED = 7


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    """Leave the table as it was."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


class Minimal(Loss):
    """The Poisson loss exp(f) - y f, with nothing but what must be there."""

    options: tuple[str, ...] = ("log_input",)

    def __init__(self, log_input: bool = True) -> None:
        if not log_input:
            raise ValueError("Only log_input=True is supported.")

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return f.flatten(0, -2), y.flatten(0, -2).to(f.dtype)

    def term_values(self, F: Tensor, targets: Tensor) -> Tensor:
        return (F.exp() - targets * F).sum(-1)

    def normalizer(self, F: Tensor, targets: Tensor, n: int) -> int:
        return F.numel()


class Full(Minimal):
    """The same with a root and samples, by inverse distribution functions."""

    def root_columns(self, F: Tensor, targets: Tensor, columns: Any = None) -> Tensor:
        root = torch.diag_embed((F / 2).exp()).movedim(-1, 0)
        return root if columns is None else root[columns]

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        rate = F.to(DOUBLE).exp()
        u = self._uniforms(F, uniforms).transpose(0, 1)  # [S, m, C]
        counts = sum(
            (u > torch.special.gammaincc(torch.full_like(rate, k + 1.0), rate)).to(DOUBLE)
            for k in range(40)
        )
        return (rate - counts).to(F.dtype)


def poisson(f: Tensor, y: Tensor, log_input: bool = True, reduction: str = "mean") -> Tensor:
    """The loss as a function."""
    values = f.exp() - y * f
    return values.mean() if reduction == "mean" else values.sum()


class Pair(NamedTuple):
    """Structured targets."""

    y: Tensor
    more: list[Any]


class Structured(Minimal):
    """Targets that are no tensor."""

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        F, targets = super().terms(f, y)
        return F, Pair(targets / 2, [{"half": targets / 2}, torch.tensor(1.0), "name", None])

    def term_values(self, F: Tensor, targets: Any) -> Tensor:
        half = targets.more[0]["half"]
        return super().term_values(F, targets.y + half * targets.more[1])


F = torch.linspace(-2, 1.5, 15, dtype=DOUBLE).reshape(5, 3)
Y = torch.arange(15).reshape(5, 3) % 4
ENTRIES = [Minimal, Full, Structured]
each_entry = pytest.mark.parametrize("entry", ENTRIES)


# --- what is derived


@each_entry
def test_derived(entry: type[Minimal]) -> None:
    """Value, gradient and Hessian follow from the values of the terms, for any leading axes."""
    loss = entry()
    F_, targets = loss.terms(F, Y)
    torch.testing.assert_close(loss.value(F_, targets, 5), (F.exp() - Y * F).sum())
    gradient = F.exp() - Y
    torch.testing.assert_close(loss.grad(F_, targets), gradient)
    for leading in [(), (2,), (2, 3), (0,), (2, 0)]:
        V = torch.rand(*leading, 5, 3, dtype=DOUBLE)
        torch.testing.assert_close(loss.hess_vec(F_, targets, V), F.exp() * V)
        outer = gradient * (gradient * V).sum(-1, keepdim=True)
        torch.testing.assert_close(loss.grad_outer_vec(F_, targets, V), outer)
    assert loss.weight(F_, targets) is None
    assert loss.num_columns(3) == loss.draws(3) == 3
    assert loss.closed_form


def test_derived_from_the_value() -> None:
    """The value is as good as the terms; a gradient of one's own is the one differentiated."""

    class ByValue(Minimal):
        term_values = Loss.term_values

        def value(self, F: Tensor, targets: Tensor, n: int) -> Tensor:
            return (F.exp() - targets * F).sum()

    class ByGradient(Minimal):
        def grad(self, F: Tensor, targets: Tensor) -> Tensor:
            return 2 * (F.exp() - targets)

    register_loss(poisson, ByValue)
    F_, targets = ByValue().terms(F, Y)
    torch.testing.assert_close(ByValue().grad(F_, targets), F.exp() - Y)
    torch.testing.assert_close(ByValue().hess_vec(F_, targets, F), F.exp() * F)
    torch.testing.assert_close(ByGradient().hess_vec(F_, targets, F), 2 * F.exp() * F)
    with pytest.raises(NotImplementedError, match=r"ByValue has no values .*ByValue\.term_values"):
        ByValue().term_values(F_, targets)


@each_entry
def test_derived_can_be_transformed(entry: type[Minimal]) -> None:
    """Derived derivatives can be differentiated further, mapped and compiled."""
    loss = entry()
    F_, targets = loss.terms(F, Y)
    V = torch.rand(2, 5, 3, dtype=DOUBLE)

    def gradient(F: Tensor) -> Tensor:
        return loss.grad(F, targets)

    def product(F: Tensor) -> Tensor:
        return loss.hess_vec(F, targets, V[0])

    HV = F.exp() * V[0]
    torch.testing.assert_close(vjp(gradient, F_)[1](V[0])[0], HV)
    torch.testing.assert_close(jvp(gradient, (F_,), (V[0],))[1], HV)
    torch.testing.assert_close(vjp(product, F_)[1](V[1])[0], HV * V[1])
    torch.testing.assert_close(jvp(product, (F_,), (V[1],))[1], HV * V[1])
    torch.testing.assert_close(
        vmap(gradient)(V),
        loss.grad(V, Y) if entry is Minimal else torch.stack([gradient(v) for v in V]),
    )
    mapped = vmap(lambda v: loss.hess_vec(F_, targets, v))(V)
    torch.testing.assert_close(mapped, F.exp() * V)
    plain = F.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad((gradient(plain) * V[0]).sum(), plain)[0], HV)

    def everything(F: Tensor, V: Tensor) -> list[Tensor]:
        return [
            loss.value(F, targets, 5),
            loss.grad(F, targets),
            loss.hess_vec(F, targets, V),
            loss.grad_outer_vec(F, targets, V),
        ]

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(F_, V), everything(F_, V))


@each_entry
def test_chunks(entry: type[Minimal], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few loss terms at a time give the same, for targets of any structure."""
    loss = entry()
    F_, targets = loss.terms(F, Y)
    V = torch.rand(2, 5, 3, dtype=DOUBLE)
    u = RandomSource(0).uniforms("samples", 0, 5, 4 * 3).reshape(5, 4, 3)

    def everything() -> list[Tensor]:
        results = [loss.hess_vec(F_, targets, V), loss.grad_outer_vec(F_, targets, V)]
        if entry is Full:
            samples = loss.sample(F_, targets, u)
            results += [loss.sampled_hess_vec(F_, targets, u, V)]
            truth = torch.einsum("smi,smj,kmj->kmi", samples, samples, V) / 4
            torch.testing.assert_close(results[-1], truth)
        return results

    expected = everything()
    for chunk in (1, 12, 13):
        monkeypatch.setitem(CHUNK, "cpu", chunk)
        torch.testing.assert_close(everything(), expected, rtol=1e-14, atol=0)


def test_rows_of_targets() -> None:
    """Every tensor has a row per term; what has not is refused instead of guessed."""
    loss = Structured()
    F_, targets = loss.terms(F, Y)
    rows = loss.target_rows(F_, targets, slice(1, 3))
    assert type(rows) is Pair
    assert torch.equal(rows.y, Y[1:3] / 2) and torch.equal(rows.more[0]["half"], rows.y)
    assert rows.more[1:] == [torch.tensor(1.0), "name", None]
    with pytest.raises(ValueError, match=r"Structured: cannot select .*\(4,\).*\(5, 3\).*target_r"):
        loss.target_rows(F_, {"w": torch.ones(4)}, slice(1, 3))


def test_missing_methods_are_named() -> None:
    """What has no default says what to implement, and where."""
    loss = Minimal()
    F_, targets = loss.terms(F, Y)
    u = torch.rand(5, 1, 3, dtype=DOUBLE)
    for call, message in [
        (lambda: loss.root_columns(F_, targets), r"has no Hessian root: .*Minimal\.root_columns\."),
        (lambda: loss.sample(F_, targets, u), r"has no would-be gradient: .*Minimal\.sample\."),
        (lambda: loss.sampled_hess_vec(F_, targets, u, F_), r"implement Minimal\.sample\."),
        (lambda: Loss().terms(F, Y), r"Loss has no flattening .*Loss\.terms\."),
        (lambda: Loss().normalizer(F, Y, 5), r"Loss has no normalizer: implement Loss\.normalizer"),
        (lambda: Loss().value(F, Y, 5), r"implement Loss\.term_values"),
        (lambda: Loss().grad(F, Y), r"implement Loss\.term_values"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            call()


# --- registration


class _Renamed(nn.PoissonNLLLoss):
    """The same loss under another name."""


class _OwnForward(nn.PoissonNLLLoss):
    """Another loss."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(log_input, target)


def test_registered_loss_is_recognised() -> None:
    """Modules, subclasses with the same forward, functions and partials; nothing else."""
    assert type(loss_entry(nn.PoissonNLLLoss())[0]) is GenericLoss
    register_loss(nn.PoissonNLLLoss, Full)
    register_loss(poisson, Minimal)
    for loss, entry, reduction in [
        (nn.PoissonNLLLoss(), Full, "mean"),
        (nn.PoissonNLLLoss(reduction="sum"), Full, "sum"),
        (_Renamed(), Full, "mean"),
        (_OwnForward(), GenericLoss, "mean"),
        (poisson, Minimal, "mean"),
        (partial(poisson, reduction="sum", log_input=True), Minimal, "sum"),
        (functional.poisson_nll_loss, GenericLoss, "mean"),
    ]:
        found, found_reduction = loss_entry(loss)
        assert type(found) is entry
        assert found_reduction == reduction
    register_loss(_OwnForward, Minimal)
    assert type(loss_entry(_OwnForward())[0]) is Minimal
    assert type(loss_entry(nn.PoissonNLLLoss())[0]) is Full


def test_options() -> None:
    """They come from attributes, keywords or defaults; others must have their default."""

    class Options(Minimal):
        options = ("log_input", "eps")

        def __init__(self, log_input: Any, eps: Any) -> None:
            self.given = log_input, eps

    register_loss(nn.PoissonNLLLoss, Options)
    register_loss(functional.poisson_nll_loss, Options)
    for loss, given in [
        (nn.PoissonNLLLoss(), (True, 1e-8)),
        (nn.PoissonNLLLoss(log_input=False, eps=1e-3), (False, 1e-3)),
        (functional.poisson_nll_loss, (True, 1e-8)),
        (partial(functional.poisson_nll_loss, eps=1e-3, full=False), (True, 1e-3)),
        (partial(functional.poisson_nll_loss, log_input=None), (None, 1e-8)),
    ]:
        assert loss_entry(loss)[0].given == given
    for loss, message in [
        (nn.PoissonNLLLoss(full=True), "has full=True, which Options does not support.*log_input"),
        (partial(functional.poisson_nll_loss, full=True), "fixes full, which is not supported"),
        (partial(functional.poisson_nll_loss, other=1), "fixes other, which is not supported"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss_entry(loss)

    register_loss(nn.L1Loss, Options)
    with pytest.raises(ValueError, match="L1Loss does not have the attributes log_input, eps"):
        loss_entry(nn.L1Loss())


def test_options_of_subclasses() -> None:
    """A subclass may have arguments of its own, which the inherited forward does not know."""

    class Named(nn.PoissonNLLLoss):
        def __init__(self, label: str = "") -> None:
            super().__init__()
            self.label = label

    register_loss(nn.PoissonNLLLoss, Minimal)
    assert type(loss_entry(Named("a"))[0]) is Minimal


def test_tensors_as_options_are_not_compared() -> None:
    """A tensor has no truth value."""

    class Weighted(nn.Module):
        def __init__(self, weight: Tensor | float = 1.0, reduction: str = "mean") -> None:
            super().__init__()
            self.weight, self.reduction = weight, reduction

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return poisson(f, y)

    class NoOptions(Minimal):
        options = ()

    register_loss(Weighted, NoOptions)
    assert type(loss_entry(Weighted())[0]) is NoOptions
    with pytest.raises(
        ValueError, match=r"has weight=tensor\(\[1\., 1\.\]\), which NoOptions does"
    ):
        loss_entry(Weighted(torch.ones(2)))


class _NoTerms(Loss):
    def value(self, F: Tensor, targets: Any, n: int) -> Tensor:
        return F.sum()


class _NoValue(Loss):
    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        return f, y

    def normalizer(self, F: Tensor, targets: Any, n: int) -> int:
        return n


class _Abstract(Minimal):
    @property
    @abstractmethod
    def scale(self) -> float: ...


# without ABC as its metaclass, Python does not know
_Abstract.__abstractmethods__ = frozenset({"scale"})


class _NoArguments(Minimal):
    def __init__(self) -> None:
        pass


class _MoreArguments(Minimal):
    def __init__(self, log_input: bool, other: int) -> None:
        pass


class _OneOption(Minimal):
    options = "log_input"


@pytest.mark.parametrize(
    ("loss_func", "entry", "error", "message"),
    [
        (nn.PoissonNLLLoss(), Full, TypeError, r"PoissonNLLLoss\(\)\. Pass the class PoissonNLLLo"),
        (partial(poisson, log_input=True), Full, TypeError, "Pass the function poisson; the entry"),
        ("poisson", Full, TypeError, "a subclass of nn.Module or a function, got 'poisson'"),
        (int, Full, TypeError, "a subclass of nn.Module or a function, got <class 'int'>"),
        (poisson, Full(), TypeError, "a subclass of curvlinops.risk.Loss.*Pass the class Full"),
        (poisson, nn.MSELoss, TypeError, "subclass of curvlinops.risk.Loss, got <class.*MSELoss"),
        (poisson, None, TypeError, "a subclass of curvlinops.risk.Loss, got None"),
        (poisson, Loss, ValueError, r"implement terms, normalizer, term_values \(or value\)\."),
        (poisson, _NoTerms, ValueError, r"_NoTerms does not implement terms, normalizer\."),
        (poisson, _NoValue, ValueError, r"_NoValue does not implement term_values \(or value\)"),
        (poisson, _Abstract, ValueError, "_Abstract does not implement scale"),
        (poisson, _NoArguments, ValueError, r"built from its options \(log_input\): got an unexp"),
        (poisson, _MoreArguments, ValueError, r"_MoreArguments cannot be .*missing .*'other'"),
        (poisson, _OneOption, ValueError, r"_OneOption\.options must be a tuple .*'log_input'"),
        (nn.MSELoss, Full, ValueError, "MSELoss has the entry MSE already. Pass override=True"),
        (functional.mse_loss, Full, ValueError, "mse_loss has the entry MSE already"),
    ],
)
def test_wrong_registrations(
    loss_func: Any, entry: Any, error: type[Exception], message: str
) -> None:
    """They are refused at once, saying what is wrong, and nothing is registered."""
    before = dict(LOSSES)
    with pytest.raises(error, match=message):
        register_loss(loss_func, entry)
    assert before == LOSSES


def test_override() -> None:
    """An entry can be replaced on purpose."""

    class Own(MSE):
        pass

    register_loss(nn.MSELoss, Own, override=True)
    assert type(loss_entry(nn.MSELoss())[0]) is Own
    register_loss(poisson, Minimal, override=True)
    register_loss(poisson, Full, override=True)
    assert type(loss_entry(poisson)[0]) is Full


def test_errors_of_generic_losses_mention_registration() -> None:
    """Where only the value is known, the way out is named, and known losses are listed."""
    register_loss(poisson, Full)
    entry, _ = loss_entry(nn.PoissonNLLLoss())
    with pytest.raises(
        NotImplementedError, match=r"^PoissonNLLLoss has no .*poisson\. .*curvlinops\.register_loss"
    ):
        entry.sample(F, Y, F)


@pytest.mark.parametrize("value", [1.5, None, (torch.zeros(()),)])
def test_generic_loss_must_return_a_tensor(value: Any) -> None:
    """Anything else is an error that names the loss."""

    def counts(f: Tensor, y: Tensor, reduction: str = "sum") -> Any:
        return value

    entry, _ = loss_entry(counts)
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"counts with reduction 'sum' must .* tensor, got {kind}"):
        entry.value(F, Y, 5)
    net, data = problem(N=4, sizes=[4])
    with pytest.raises(TypeError, match="counts with reduction 'sum'"):
        HessianLinearOperator(net, counts, dict(net.named_parameters()), data)


# --- operators


def problem(N: int = 7, sizes: list[int] | None = None) -> tuple[nn.Module, list[Any]]:
    """A network with sequence outputs, and uneven batches."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=DOUBLE) / 2
    X = torch.randn(N, 3, 3, generator=generator, dtype=DOUBLE)
    y = torch.randint(0, 4, (N, 3, 2), generator=generator)
    return net, list(zip(X.split(sizes or [2, 4, 1]), y.split(sizes or [2, 4, 1]), strict=True))


class Dense:
    """Dense matrices of the problem."""

    def __init__(self, reduction: str) -> None:
        self.net, self.data = problem()
        self.params = dict(self.net.named_parameters())
        self.X, self.y = (torch.cat(tensors) for tensors in zip(*self.data, strict=True))
        shapes = [p.shape for p in self.params.values()]
        sizes = [p.numel() for p in self.params.values()]
        self.theta = torch.cat([p.detach().flatten() for p in self.params.values()])

        def predict(theta: Tensor) -> Tensor:
            parts = (t.reshape(s) for t, s in zip(theta.split(sizes), shapes, strict=True))
            return functional_call(self.net, dict(zip(self.params, parts, strict=True)), (self.X,))

        self.predict = predict
        self.F = predict(self.theta).reshape(-1, 2)  # [m, C]
        self.J = jacrev(predict)(self.theta).reshape(-1, 2, len(self.theta))  # [m, C, D]
        self.c = 1 / self.F.numel() if reduction == "mean" else 1.0

    def hessian(self) -> Tensor:
        """Of the loss, by autodiff."""

        def loss(theta: Tensor) -> Tensor:
            return self.c * poisson(self.predict(theta), self.y, reduction="sum")

        return hessian(loss)(self.theta)

    def of_terms(self, M: Tensor) -> Tensor:
        """J' M J for ``[m, C, C]``."""
        return self.c * torch.einsum("mid,mij,mje->de", self.J, M, self.J)

    def ggn(self) -> Tensor:
        """With the loss's Hessian."""
        return self.of_terms(torch.diag_embed(self.F.exp()))

    def samples(self, S: int) -> Tensor:
        """Would-be gradients ``[S, m, C]``, with the numbers that operators use."""
        m, C = self.F.shape
        uniforms = RandomSource(SEED).uniforms("samples", 0, m, S * C).reshape(m, S, C)
        return Full().sample(self.F, None, uniforms)


each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
each_form = pytest.mark.parametrize("form", ["module", "function"])


def registered(form: str, reduction: str, entry: type[Loss]) -> Any:
    """The loss, registered as a module or a function."""
    register_loss(nn.PoissonNLLLoss if form == "module" else poisson, entry)
    if form == "module":
        return nn.PoissonNLLLoss(reduction=reduction)
    return partial(poisson, reduction=reduction)


@each_form
@each_reduction
@each_entry
def test_exact_matrices(entry: type[Loss], reduction: str, form: str) -> None:
    """A minimal entry suffices for Hessian, Gauss-Newton and empirical Fisher matrices."""
    loss, dense = registered(form, reduction, entry), Dense(reduction)
    args = (dense.net, loss, dense.params, dense.data)
    g = dense.F.exp() - dense.y.reshape(-1, 2)
    identity = torch.eye(len(dense.theta), dtype=DOUBLE)
    fisher = dense.of_terms(torch.einsum("mi,mj->mij", g, g))
    for cls, matrix in [
        (HessianLinearOperator, dense.hessian()),
        (GGNLinearOperator, dense.ggn()),
        (EFLinearOperator, fisher),
    ]:
        torch.testing.assert_close(cls(*args) @ identity, matrix)
    A = PerExampleGradientLinearOperator(*args)
    torch.testing.assert_close(A @ identity, torch.einsum("mi,mid->md", g, dense.J))
    torch.testing.assert_close(A.scale * (A.T @ (A @ identity)), fisher)


@each_reduction
def test_monte_carlo_and_diagonal(reduction: str) -> None:
    """With samples and roots, everything works, with the same samples everywhere."""
    loss, dense = registered("module", reduction, Full), Dense(reduction)
    args = (dense.net, loss, dense.params, dense.data)
    identity = torch.eye(len(dense.theta), dtype=DOUBLE)
    g = dense.samples(3)
    sampled = dense.of_terms(torch.einsum("smi,smj->mij", g, g) / 3)
    G = GGNLinearOperator(*args, mc_samples=3, seed=SEED)
    torch.testing.assert_close(G @ identity, sampled)
    exact = GGNDiagonalLinearOperator(*args)
    torch.testing.assert_close(exact @ identity, dense.ggn().diag().diag())
    squares = torch.einsum("smi,mid->smd", g, dense.J).square().sum((0, 1)) * dense.c / 3
    diagonal = GGNDiagonalLinearOperator(*args, mc_samples=3, seed=SEED)
    torch.testing.assert_close(diagonal @ identity, squares.diag())


def test_samples_of_the_test_are_right() -> None:
    """The inverse distribution function of this test has the moments of the Poisson law."""
    F_ = F[:, :1]
    u = RandomSource(0).uniforms("samples", 0, 5, 100_000).reshape(5, -1, 1)
    g = Full().sample(F_, None, u)
    error = (g.mean(0).abs() / g.std(0)).max() * 100_000**0.5
    assert error < 5
    torch.testing.assert_close(g.square().mean(0), F_.exp(), rtol=0.05, atol=0)


@each_form
@each_reduction
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_kfac(reduction: str, form: str, fisher_type: str) -> None:
    """KFAC of a linear layer: factors by hand."""
    loss = registered(form, reduction, Full)
    generator = torch.Generator().manual_seed(5)
    net = nn.Linear(3, 2, bias=False, dtype=DOUBLE)
    X = torch.randn(6, 3, generator=generator, dtype=DOUBLE)
    y = torch.randint(0, 4, (6, 2), generator=generator)
    data = list(zip(X.split([1, 3, 2]), y.split([1, 3, 2]), strict=True))
    mc = {"mc_samples": 4} if fisher_type == "mc" else {}
    params = dict(net.named_parameters())
    K = KFACLinearOperator(net, loss, params, data, fisher_type=fisher_type, seed=SEED, **mc)
    f = net(X).detach()
    if fisher_type == "type-2":
        B = f.exp().sum(0).diag()
    elif fisher_type == "mc":
        uniforms = RandomSource(SEED).uniforms("samples", 0, 6, 4 * 2).reshape(6, 4, 2)
        g = Full().sample(f, None, uniforms).flatten(0, 1)
        B = g.T @ g / 4
    else:
        g = f.exp() - y
        B = g.T @ g
    c = 1 / y.numel() if reduction == "mean" else 1.0
    torch.testing.assert_close(K @ torch.eye(6, dtype=DOUBLE), torch.kron(c * B, X.T @ X / 6))


def test_operators_say_what_is_missing() -> None:
    """With a minimal entry, what needs more names the method."""
    loss = registered("function", "mean", Minimal)
    net, data = problem()
    net, data = net[2], [(torch.ones(2, 4, dtype=DOUBLE), torch.ones(2, 2))]
    args = (net, loss, dict(net.named_parameters()), data)
    with pytest.raises(NotImplementedError, match=r"implement Minimal\.sample"):
        KFACLinearOperator(*args)
    with pytest.raises(NotImplementedError, match=r"implement Minimal\.root_columns"):
        KFACLinearOperator(*args, fisher_type="type-2")
    with pytest.raises(NotImplementedError, match=r"implement Minimal\.sample"):
        GGNLinearOperator(*args, mc_samples=1) @ torch.ones(10, dtype=DOUBLE)
    KFACLinearOperator(*args, fisher_type="empirical")


def test_mean_counts_all_data() -> None:
    """An unregistered loss weighs batches by examples, a registered one by the entries."""
    net, _ = problem()
    params = dict(net.named_parameters())
    X, y = torch.randn(3, 5, 3, dtype=DOUBLE), torch.ones(3, 5, 2)
    # sequences of other lengths in other batches
    data = [(X[:1, :2], y[:1, :2]), (X[1:], y[1:])]
    f = torch.cat([net(x).reshape(-1, 2) for x, _ in data])
    expected = (f.exp() - f).mean().detach()
    before = HessianLinearOperator(net, nn.PoissonNLLLoss(), params, data)
    assert not torch.isclose(before.risk.loss_and_gradient()[0], expected)
    register_loss(nn.PoissonNLLLoss, Minimal)
    after = HessianLinearOperator(net, nn.PoissonNLLLoss(), params, data)
    torch.testing.assert_close(after.risk.loss_and_gradient()[0], expected)
