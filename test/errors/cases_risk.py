"""Errors about models, losses and data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from error_cases import Cases
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, register_loss
from curvlinops.risk import Loss
from curvlinops.risk.cross_entropy import CrossEntropy
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.loss import LOSSES
from curvlinops.risk.losses import GenericLoss, loss_entry

cases = Cases()

X, Y = torch.rand(4, 3), torch.rand(4, 2)
MSE = nn.MSELoss()
CLASSES = torch.tensor([0, 1, 0, 1])


def hessian(model: Any = None, **changes: Any) -> Any:
    """Build a Hessian, with changes of the arguments."""
    model = nn.Linear(3, 2) if model is None else model
    params = dict(model.named_parameters()) if isinstance(model, nn.Module) else {"w": X}
    arguments = {"loss_func": MSE, "params": params, "data": [(X, Y)], **changes}
    return HessianLinearOperator(model, **arguments)


def with_loss(loss_func: Any, y: Tensor = Y) -> Any:
    """Build a Hessian of a loss."""
    return hessian(loss_func=loss_func, data=[(X, y)])


# ---- losses --------------------------------------------------------------------------------------
cases(
    ValueError,
    "got 2",
    "label_smoothing must be between 0 and 1",
    lambda: with_loss(nn.CrossEntropyLoss(label_smoothing=2), CLASSES),
)
cases(
    ValueError,
    r"got \(4,\)",
    "Add a batch dimension",
    lambda: CrossEntropy().terms(torch.ones(4), CLASSES),
)
cases(
    ValueError,
    r"got \(3,\)",
    r"weight must have shape \(2,\)",
    lambda: with_loss(nn.CrossEntropyLoss(weight=torch.ones(3)), CLASSES),
)
cases(
    ValueError,
    "ignore_index=1",
    "Leave it at its default",
    lambda: with_loss(nn.CrossEntropyLoss(ignore_index=1)),
)
cases(
    ValueError,
    r"got torch.float32 of shape \(4,\)",
    r"must be class indices \(integers\) of shape \(4,\)",
    lambda: with_loss(nn.CrossEntropyLoss(), Y[:, 0]),
)
cases(
    ValueError,
    "got no uniforms",
    "needs at least one sample",
    lambda: CrossEntropy().sampled_hess_vec(Y, CLASSES, torch.ones(4, 0, 1), Y),
)
cases(
    ValueError,
    r"pos_weight of shape \(3,\)",
    r"broadcast to predictions of shape \(4, 2\)",
    lambda: with_loss(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
)
cases(
    ValueError,
    r"targets of shape \(4,\)",
    "must have the shape of the predictions",
    lambda: with_loss(MSE, Y[:, 0]),
)
cases(
    ValueError,
    "predictions are a scalar",
    "Add a batch dimension",
    lambda: loss_entry(MSE)[0].terms(torch.ones(()), torch.ones(())),
)
cases(ValueError, "got torch.complex64", "targets must be real", lambda: with_loss(MSE, Y + 0j))
cases(
    ValueError,
    "got torch.int64",
    "must be floating point",
    lambda: loss_entry(MSE)[0].terms(CLASSES, CLASSES),
)


class NoMethods(Loss):
    """An entry without methods."""

    draws = num_columns = lambda self, C: 1


class Terms(Loss):
    """An entry with the least that is needed."""

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return f, y

    def normalizer(self, F: Tensor, targets: Tensor, n: int) -> int:
        return n

    def term_values(self, F: Tensor, targets: Tensor) -> Tensor:
        return (F - targets).sum(-1)

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        return F.expand(uniforms.shape[1], -1, -1)


BARE, TERMS = NoMethods(), Terms()
cases(
    NotImplementedError,
    "NoMethods has no flattening",
    r"implement NoMethods\.terms",
    lambda: BARE.terms(Y, Y),
)
cases(
    NotImplementedError,
    "NoMethods has no values",
    r"implement NoMethods\.term_values",
    lambda: BARE.term_values(Y, Y),
)
cases(
    NotImplementedError,
    "NoMethods has no normalizer",
    r"implement NoMethods\.normalizer",
    lambda: BARE.normalizer(Y, Y, 4),
)
cases(
    NotImplementedError,
    "NoMethods has no Hessian root",
    r"implement NoMethods\.root_columns",
    lambda: BARE.root_columns(Y, Y),
)
cases(
    NotImplementedError,
    "NoMethods has no would-be gradient",
    r"implement NoMethods\.sample",
    lambda: BARE.sample(Y, Y, Y),
)
cases(
    ValueError,
    "got no uniforms",
    "needs at least one sample",
    lambda: TERMS.sampled_hess_vec(Y, Y, torch.ones(4, 0, 2), Y),
)
cases(
    ValueError,
    r"got \(4, 1, 1\)",
    r"must have shape \[4, samples, 2\]",
    lambda: TERMS.sampled_hess_vec(Y, Y, torch.ones(4, 1, 1), Y),
)
cases(
    ValueError,
    r"tensor of shape \(3,\)",
    "Override the method target_rows",
    lambda: TERMS.target_rows(Y, torch.ones(3), slice(0, 1)),
)
cases(
    NotImplementedError,
    "HuberLoss has no closed-form",
    r"curvlinops\.register_loss",
    lambda: EFLinearOperator(*_model(), data=[(X, Y)]),
)


def _model() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return a model, a loss without closed forms, and parameters."""
    model = nn.Linear(3, 2)
    return model, nn.HuberLoss(), dict(model.named_parameters())


HUBER = GenericLoss(nn.HuberLoss(), "mean")
REGISTER = r"add this one to them with curvlinops\.register_loss"
cases(
    TypeError,
    "got float",
    "must return a scalar tensor",
    lambda: with_loss(lambda f, y, reduction="mean": 1.0),
)
cases(
    ValueError,
    r"got shape \(4, 2\)",
    "must return a scalar",
    lambda: with_loss(lambda f, y, reduction="mean": f - y),
)
cases(NotImplementedError, "no closed-form weight", REGISTER, lambda: HUBER.weight(Y, Y))
cases(NotImplementedError, "no closed-form gradient", REGISTER, lambda: HUBER.grad(Y, Y))
cases(
    NotImplementedError, "no closed-form Hessian-vector", REGISTER, lambda: HUBER.hess_vec(Y, Y, Y)
)
cases(
    NotImplementedError,
    "no closed-form would-be",
    REGISTER,
    lambda: HUBER.sampled_hess_vec(Y, Y, Y, Y),
)
cases(
    NotImplementedError, "no closed-form gradient", REGISTER, lambda: HUBER.grad_outer_vec(Y, Y, Y)
)
cases(NotImplementedError, "no closed-form Hessian root", REGISTER, lambda: HUBER.num_columns(2))
cases(NotImplementedError, "no closed-form would-be", REGISTER, lambda: HUBER.draws(2))


class Own(nn.Module):
    """A loss of a user."""

    reduction = "mean"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).mean()


class WrongOptions(Terms):
    """An entry whose options are no tuple."""

    options = "scale"  # type: ignore[assignment]


class Unbuildable(Terms):
    """An entry that does not take its options."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Scaled(Unbuildable):
    """An entry with an option."""

    options = ("scale",)


def own_with_option() -> None:
    """Use a loss without the attribute that its entry takes as an option."""

    class Local(Own):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return (f - y).mean()

    with mock.patch.dict(LOSSES):
        register_loss(Local, Scaled)
        with_loss(Local())


cases(TypeError, "got MSELoss", "Pass the class MSELoss", lambda: register_loss(MSE, Terms))
cases(TypeError, "got <cases_risk.Terms", "Pass the class Terms", lambda: register_loss(Own, TERMS))  # type: ignore[arg-type]
cases(
    ValueError,
    "has the entry MSE already",
    "override=True",
    lambda: register_loss(nn.MSELoss, Terms),
)
cases(
    ValueError,
    "NoMethods does not implement terms, normalizer",
    "Add",
    lambda: register_loss(Own, NoMethods),
)
cases(
    ValueError, "got 'scale'", "must be a tuple of names", lambda: register_loss(Own, WrongOptions)
)
cases(
    ValueError,
    r"Unbuildable cannot be built from its options \(none\)",
    "constructor must take these",
    lambda: register_loss(Own, Unbuildable),
)
cases(ValueError, "None is not a loss function", r"nn\.MSELoss", lambda: with_loss(None))
cases(
    ValueError, "<lambda> has no reduction", r"nn\.MSELoss", lambda: with_loss(lambda f, y: f - y)
)
cases(
    ValueError,
    "<lambda> has a reduction without a default",
    r"functools\.partial",
    lambda: with_loss(lambda f, y, reduction: f - y),
)
cases(
    ValueError,
    "reduction 'none'",
    "Supported: 'mean', 'sum'",
    lambda: with_loss(nn.MSELoss(reduction="none")),
)
cases(ValueError, "Local does not have the attributes scale", "Set them", own_with_option)


def unsupported_option() -> None:
    """Use a registered loss with an option that its entry does not take."""

    class Local(nn.Module):
        def __init__(self, power: int = 2, reduction: str = "mean"):
            super().__init__()
            self.power, self.reduction = power, reduction

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return (f - y).mean()

    with mock.patch.dict(LOSSES):
        register_loss(Local, Terms)
        with_loss(Local(power=3))


cases(ValueError, "Local has power=3", "Supported options: reduction", unsupported_option)
cases(
    ValueError,
    "mse_loss fixes weight",
    "Supported keywords: reduction",
    lambda: with_loss(functools.partial(F.mse_loss, weight=torch.ones(2))),
)


# ---- data ----------------------------------------------------------------------------------------
def with_data(*batches: Any, **changes: Any) -> Any:
    """Build a Hessian of batches."""
    return hessian(data=list(batches), **changes)


cases(
    ValueError,
    "list_iterator, which can be iterated only once",
    r"data=list\(data\)",
    lambda: hessian(data=iter([(X, Y)])),
)
cases(ValueError, "got int", "must be an iterable of batches", lambda: hessian(data=3))
cases(ValueError, "got a Tensor", r"must be a pair \(X, y\)", lambda: with_data(X))
cases(ValueError, "got list", "must be a tensor or a mapping", lambda: with_data(([1.0], Y)))
cases(
    ValueError,
    "inputs X of a batch are a dict",
    "Pass batch_size_fn",
    lambda: with_data(({"x": X}, Y)),
)
cases(
    ValueError,
    "inputs X of a batch are a scalar",
    "Add a batch dimension",
    lambda: with_data((X[0, 0], Y)),
)
cases(
    ValueError,
    "got 'four'",
    r"batch_size_fn\(X\) must be an integer",
    lambda: hessian(batch_size_fn=lambda X: "four"),
)
cases(
    ValueError,
    r"got X.shape\[0\] = 0",
    "must have at least one example",
    lambda: with_data((X[:0], Y[:0])),
)
cases(ValueError, "got 0", "num_data must be positive", lambda: hessian(num_data=0))
cases(ValueError, "data is empty", "pass a list", lambda: hessian(data=[]))
cases(
    ValueError, "had 4 examples, but num_data is 5", "Correct num_data", lambda: hessian(num_data=5)
)


class Passes:
    """Data whose passes differ."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])


OPT_OUT = "check_deterministic=False"
cases(ValueError, "data is empty", "pass a list", lambda: hessian(data=Passes([], [])))
cases(
    RuntimeError,
    "between two passes over the data: 4 and 0",
    "pass a list or a DataLoader",
    lambda: hessian(data=Passes([(X, Y)], [])),
)
cases(
    RuntimeError,
    r"data differ between two passes \(X\)",
    "apply it once and keep",
    lambda: hessian(data=Passes([(X, Y)], [(X + 1, Y)])),
)
cases(
    RuntimeError,
    "order of the data differs",
    "Use shuffle=False",
    lambda: _monte_carlo(Passes([(X, Y), (X + 1, Y)], [(X + 1, Y), (X, Y)])),
)


def _monte_carlo(data: Any) -> None:
    """Build an operator that needs its data in a fixed order."""
    model = nn.Linear(3, 2)
    GGNLinearOperator(model, MSE, dict(model.named_parameters()), data, mc_samples=1)


class Noisy(nn.Module):
    """A model whose predictions differ from call to call."""

    def __init__(self, torch_noise: bool):
        super().__init__()
        self.linear, self.torch_noise, self.calls = nn.Linear(3, 2), torch_noise, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(()) if self.torch_noise else self.calls
        return self.linear(x) + noise


cases(
    RuntimeError, "prediction and the loss differ", r"model\.eval\(\)", lambda: hessian(Noisy(True))
)
cases(
    RuntimeError,
    "prediction and the loss differ",
    "Remove what changes",
    lambda: hessian(Noisy(False)),
)
cases(
    RuntimeError,
    r"BatchNorm in training mode: 1 \(BatchNorm1d\)",
    r"model\.eval\(\)",
    lambda: hessian(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))),
)
cases(
    RuntimeError,
    r"without running statistics: 1 \(BatchNorm1d\)",
    OPT_OUT,
    lambda: hessian(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))),
)
cases(
    RuntimeError,
    r"Dropout in training mode: 1 \(Dropout\)",
    r"model\.eval\(\)",
    lambda: hessian(nn.Sequential(nn.Linear(3, 2), nn.Dropout())),
)
cases(
    ValueError,
    "no loss function",
    "pass loss_func",
    lambda: EmpiricalRisk(*_no_loss()).loss_and_gradient(),
)


def _no_loss() -> tuple[Any, ...]:
    """Return the arguments of a risk without loss."""
    model = nn.Linear(3, 2)
    return model, None, dict(model.named_parameters()), [(X, Y)]


# ---- model and parameters ------------------------------------------------------------------------
def with_params(**changes: Any) -> Any:
    """Build a Hessian with other parameters."""
    model = nn.Linear(3, 2)
    return hessian(model, params={**dict(model.named_parameters()), **changes})


class Returns(nn.Module):
    """A model that returns what it is told."""

    def __init__(self, function: Any, **parts: nn.Module):
        super().__init__()
        self.function, self.linear = function, nn.Linear(3, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


cases(ValueError, "got str", r"must be an nn\.Module or a function", lambda: hessian("model"))
cases(
    TypeError,
    "got tuple",
    r"Wrap it in a module",
    lambda: hessian(Returns(lambda m, x: (m.linear(x), x))),
)
cases(TypeError, "got list", r"dict\(model\.named_parameters\(\)\)", lambda: hessian(params=[X]))
cases(ValueError, "params is empty", "Pass at least one parameter", lambda: hessian(params={}))
cases(
    TypeError,
    "got str 'bias': list",
    r"dict\(model\.named_parameters\(\)\)",
    lambda: with_params(bias=[0.0, 0.0]),
)
cases(
    ValueError,
    "got torch.int64",
    "Parameter 'bias' must be floating point",
    lambda: with_params(bias=torch.ones(2).long()),
)
cases(
    ValueError,
    "'a' and 'b' are one tensor",
    "under one of its names",
    lambda: hessian(lambda p, x: x, params={"a": Y, "b": Y}),
)
cases(
    ValueError,
    "got torch.float32: weight; torch.float64: bias",
    "must have the same dtype",
    lambda: with_params(bias=torch.ones(2).double()),
)
cases(
    ValueError,
    "not parameters of Linear: nose",
    "Its parameters: weight, bias",
    lambda: with_params(nose=torch.ones(1)),
)
cases(
    ValueError,
    r"'bias' has shape \(3,\) in params, but \(2,\)",
    "must be the same",
    lambda: with_params(bias=torch.ones(3)),
)


def tied() -> None:
    """Pass a tied parameter under both of its names."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    hessian(model, params={"0.weight": torch.rand(3, 3), "1.weight": torch.rand(3, 3)})


cases(
    ValueError,
    r"'0\.weight' and '1\.weight' are tied in Sequential",
    "under one of its names",
    tied,
)


def embedding(**options: Any) -> None:
    """Build the Hessian of an embedding."""
    hessian(nn.Embedding(3, 2, **options), data=[(CLASSES, Y)])


cases(
    NotImplementedError,
    "Embedding uses max_norm",
    "Build the embedding without",
    lambda: embedding(max_norm=1.0),
)
cases(
    NotImplementedError,
    "Embedding uses scale_grad_by_freq",
    "Build the embedding without",
    lambda: embedding(scale_grad_by_freq=True),
)
cases(
    NotImplementedError,
    "The model uses max_norm",
    "Build the embedding without",
    lambda: hessian(lambda p, x: F.embedding(CLASSES, p["w"][:, :2], max_norm=1.0)),
)
