"""Problems (model, loss, data) and their dense matrices, by autodiff and without the package.

The references know nothing of what the package has to get right: a batch is nothing special
(PyTorch's own loss averages over all data at once), there are no loss terms (the Gauss-Newton
matrix is JᵀHJ with the Hessian H of the loss of all predictions) but those that PyTorch returns
for the reduction "none", and derivatives are those of reverse mode.
"""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    PerExampleGradientLinearOperator,
    TransposedJacobianLinearOperator,
)

OPERATORS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]
aten = torch.ops.aten
JACOBIANS = [JacobianLinearOperator, TransposedJacobianLinearOperator]
ALL = [*OPERATORS, PerExampleGradientLinearOperator, *JACOBIANS]
Params = dict[str, Tensor]
LossFunction = Callable[[Any, Any], Tensor]
C = 3  # classes


# --------------------------------------------------------------------------------------------------
# The reference
# --------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """What an operator is built from, and what its reference needs to know besides."""

    model: Any
    loss: Callable[[str], LossFunction]  # of the reduction
    data: list[tuple[Any, Tensor]]
    params: Params | None = None  # default: all of the model's
    batch_size_fn: Callable[[Any], int] | None = None
    # Reference: the prediction of a batch (default: the model's), and the axis of the classes, by
    # which all data are brought together; None for a loss that PyTorch averages batch by batch.
    predict: Callable[[Params, Any], Tensor] | None = None
    classes: int | None = -1

    def __post_init__(self) -> None:
        if self.params is None:
            self.params = dict(self.model.named_parameters())

    def operator(self, cls: Any, reduction: str = "mean", **options: Any) -> Any:
        """Build an operator; Jacobians get no loss."""
        loss = () if cls in JACOBIANS else (self.loss(reduction),)
        return cls(
            self.model,
            *loss,
            self.params,
            options.pop("data", self.data),
            batch_size_fn=self.batch_size_fn,
            **options,
        )

    def to(self, dtype: torch.dtype) -> None:
        """Round all numbers."""
        self.model.to(dtype)
        self.params = dict(self.model.named_parameters())
        self.data = [
            (X.to(dtype), y.to(dtype) if y.is_floating_point() else y) for X, y in self.data
        ]

    @property
    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.params.values()]

    def flat(self) -> Tensor:
        """The parameters as one vector, of float64."""
        return torch.cat([p.detach().double().reshape(-1) for p in self.params.values()])

    def named(self, theta: Tensor) -> Params:
        """Cut a flat vector into parameters."""
        parts = theta.split([prod(shape) for shape in self.shapes])
        tensors = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return dict(zip(self.params, tensors, strict=True))

    def predictions(self, theta: Tensor) -> list[Tensor]:
        predict = self.predict or (lambda p, X: functional_call(self.model, p, (X,)))
        params = self.named(theta)
        return [predict(params, X) for X, _ in self.data]

    def objective(self, predictions: Sequence[Tensor], reduction: str) -> Tensor:
        """The loss of all data."""
        loss = self.loss(reduction)
        targets = [y for _, y in self.data]
        if self.classes is not None:
            return loss(self._together(predictions), self._together(targets))
        sizes = [len(f) for f in predictions]
        weights = [n / sum(sizes) if reduction == "mean" else 1.0 for n in sizes]
        losses = [loss(f, y) for f, y in zip(predictions, targets, strict=True)]
        return torch.stack(losses) @ torch.tensor(weights, dtype=torch.float64)

    def _together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate to ``[terms, C]``; indices, which have no axis of classes, to ``[terms]``."""
        if not tensors[0].is_floating_point() or tensors[0].ndim == 1:
            return torch.cat([t.reshape(-1) for t in tensors])
        tensors = [t.movedim(self.classes, -1) for t in tensors]  # type: ignore[arg-type]
        return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors])

    def hessian(self, reduction: str = "mean") -> Tensor:
        def objective(theta: Tensor) -> Tensor:
            return self.objective(self.predictions(theta), reduction)

        return jacrev(grad(objective))(self.flat())

    def ggn(self, reduction: str = "mean") -> Tensor:
        shapes = [f.shape for f in self.predictions(self.flat())]

        def predict(theta: Tensor) -> Tensor:
            return torch.cat([f.reshape(-1) for f in self.predictions(theta)])

        def objective(z: Tensor) -> Tensor:
            parts = z.split([prod(shape) for shape in shapes])
            pairs = zip(parts, shapes, strict=True)
            return self.objective([part.reshape(shape) for part, shape in pairs], reduction)

        J = jacrev(predict)(self.flat())
        return J.T @ jacrev(grad(objective))(predict(self.flat())) @ J

    def jacobian(self) -> Tensor:
        """The Jacobian of all predictions, batch by batch."""

        def predict(theta: Tensor) -> Tensor:
            return torch.cat([f.reshape(-1) for f in self.predictions(theta)])

        return jacrev(predict)(self.flat())

    def gradients(self) -> Tensor:
        """The gradients of the loss terms, one per row."""

        def terms(theta: Tensor) -> Tensor:
            predictions = self._together(self.predictions(theta))
            values = self.loss("none")(predictions, self._together([y for _, y in self.data]))
            return values.reshape(len(values), -1).sum(1)

        return jacrev(terms)(self.flat())

    def scale(self, reduction: str = "mean") -> Tensor:
        """The factor between the sum of the loss terms and the loss."""
        predictions = self.predictions(self.flat())
        return self.objective(predictions, reduction) / self.objective(predictions, "sum")

    def ef(self, reduction: str = "mean") -> Tensor:
        A = self.gradients()
        return self.scale(reduction) * A.T @ A

    def dense(self, cls: Any, reduction: str = "mean") -> Tensor:
        """The matrix of an operator class."""
        if cls in JACOBIANS:
            return self.jacobian() if cls is JacobianLinearOperator else self.jacobian().T
        if cls is PerExampleGradientLinearOperator:
            return self.gradients()
        matrices = {
            HessianLinearOperator: self.hessian,
            GGNLinearOperator: self.ggn,
            EFLinearOperator: self.ef,
        }
        return matrices[cls](reduction)


def assert_matrix(operator: Any, dense: Tensor, tolerance: float = 1e-12) -> None:
    """Compare the products with three random vectors with those of a dense matrix."""
    V = rand(dense.shape[1], 3).to(operator.dtype)
    scale = (dense.norm() * V.norm()).item()
    assert_close(operator @ V, dense @ V.double(), tolerance, scale)


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float = 1e-12, scale: float | None = None
) -> None:
    """Compare relative to a scale, by default the expected tensor's Frobenius norm."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm().item()
    scale = expected.norm().item() if scale is None else scale
    assert error <= tolerance * scale, f"relative error {error / scale:.1e} > {tolerance:.1e}"


# --------------------------------------------------------------------------------------------------
# Data: batches of unequal size
# --------------------------------------------------------------------------------------------------
SIZES = (3, 1, 4)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) - 0.5


def classes(*shape: int) -> Tensor:
    return torch.randint(C, shape)


def vectors(targets: Callable[..., Tensor] = classes, *shape: int) -> list[tuple[Any, Tensor]]:
    """Inputs ``[n, 3]`` and targets ``[n, *shape]``."""
    return [(rand(n, 3), targets(n, *shape)) for n in SIZES]


def sequences(
    inputs: Callable[..., Tensor], targets: Callable[..., Tensor], *shape: int
) -> list[tuple[Any, Tensor]]:
    """Sequences whose length differs between batches; targets ``[n, S, *shape]``."""
    lengths = (2, 5, 3)
    pairs = zip(SIZES, lengths, strict=True)
    return [(inputs(n, s), targets(n, s, *shape)) for n, s in pairs]


def tokens(*shape: int) -> Tensor:
    """Indices 0 to 4, with paddings 1."""
    x = torch.randint(5, shape)
    x.view(-1)[::4] = 1
    return x


def ignoring(*shape: int) -> Tensor:
    """Class indices with ignored ones; everything is ignored where there is one example."""
    y = classes(*shape)
    y.view(-1)[::3] = -7
    if shape[0] == 1:
        y[:] = -7
    return y


def probabilities(*shape: int) -> Tensor:
    return rand(*shape).softmax(1)


def unit(*shape: int) -> Tensor:
    return rand(*shape) + 0.5


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------
class Apply(nn.Module):
    """A function of modules and an input."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, X: Any) -> Tensor:
        return self.function(self, X)


def mlp(outputs: int = C, *after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs), *after).double()


def mse(reduction: str) -> LossFunction:
    return nn.MSELoss(reduction=reduction)


def cross_entropy(reduction: str) -> LossFunction:
    return nn.CrossEntropyLoss(reduction=reduction)


def mlp_mse() -> Problem:
    return Problem(mlp(2), mse, vectors(rand, 2))


def one_dimensional_output() -> Problem:
    return Problem(
        mlp(1, nn.Flatten(0)), lambda r: nn.BCEWithLogitsLoss(reduction=r), vectors(unit)
    )


def cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=2, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(18, C)
    ).double()
    return Problem(model, cross_entropy, [(rand(n, 2, 5, 4), classes(n)) for n in SIZES])


def pixels() -> Problem:
    """Outputs [N, C, H, W] with probabilities."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Conv2d(2, C, 1)).double()
    data = [(rand(n, 1, 3, 4), probabilities(n, C, 2, 3)) for n in SIZES]
    return Problem(model, cross_entropy, data, classes=1)


def sequence_mse() -> Problem:
    return Problem(mlp(2), mse, sequences(lambda *s: rand(*s, 3), rand, 2))


def sequence_cross_entropy() -> Problem:
    """Outputs [N, C, S]; a batch in which everything is ignored counts nothing."""
    return Problem(
        Apply(lambda self, x: self.net(x).transpose(1, 2), net=mlp()),
        lambda r: nn.CrossEntropyLoss(reduction=r, ignore_index=-7),
        sequences(lambda *s: rand(*s, 3), ignoring),
        classes=1,
    )


def sequence_huber() -> Problem:
    """A loss that is not in the table: a batch's mean counts by examples, not by positions."""
    return Problem(
        mlp(2),
        lambda r: nn.HuberLoss(reduction=r, delta=0.3),
        sequences(lambda *s: rand(*s, 3), rand, 2),
        classes=None,
    )


def tied() -> Problem:
    """One weight in two layers, given under its first name."""
    model = Apply(
        lambda self, x: self.b(torch.tanh(self.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3)
    ).double()
    model.b.weight = model.a.weight

    def predict(params: Params, X: Tensor) -> Tensor:
        W = params["a.weight"]
        return torch.tanh(X @ W.T + params["a.bias"]) @ W.T + params["b.bias"]

    return Problem(model, cross_entropy, vectors(), predict=predict)


def embedding(sparse: bool = False) -> Problem:
    """Row 1 of the embedding is constant."""
    model = Apply(
        lambda self, x: self.head(torch.tanh(self.embedding(x)).mean(1)),
        embedding=nn.Embedding(5, 2, padding_idx=1, sparse=sparse),
        head=nn.Linear(2, C),
    ).double()
    nn.init.normal_(model.embedding.weight)
    row = model.embedding.weight.detach()[1].clone()

    def predict(params: Params, X: Tensor) -> Tensor:
        W = params["embedding.weight"]
        embedded = torch.where((X == 1).unsqueeze(-1), row, W[X])
        return torch.tanh(embedded).mean(1) @ params["head.weight"].T + params["head.bias"]

    data = [(x, y[:, 0]) for x, y in sequences(tokens, classes)]
    return Problem(model, cross_entropy, data, predict=predict)


def sparse_embedding() -> Problem:
    """Gradients of the embedding are sparse tensors."""
    return embedding(sparse=True)


def embedding_function() -> Problem:
    """The same in a function, counting the constant row from the end."""

    def predict(params: Params, X: Tensor) -> Tensor:
        embedded = F.embedding(X, params["embedding.weight"], padding_idx=-4)
        return torch.tanh(embedded).mean(1) @ params["head.weight"].T + params["head.bias"]

    problem = embedding()
    problem.model = predict
    return problem


def tied_embedding() -> Problem:
    """An embedding with padding, tied to the output layer; outputs [N, C, S]."""
    model = Apply(
        lambda self, x: self.head(torch.tanh(self.embedding(x))).transpose(1, 2),
        embedding=nn.Embedding(5, 2, padding_idx=1),
        head=nn.Linear(2, 5),
    ).double()
    nn.init.normal_(model.embedding.weight)
    model.head.weight = model.embedding.weight
    row = model.embedding.weight.detach()[1].clone()

    def predict(params: Params, X: Tensor) -> Tensor:
        W = params["embedding.weight"]
        embedded = torch.where((X == 1).unsqueeze(-1), row, W[X])
        return (torch.tanh(embedded) @ W.T + params["head.bias"]).transpose(1, 2)

    data = sequences(tokens, classes)
    return Problem(model, cross_entropy, data, predict=predict, classes=1)


def function_model() -> Problem:
    """A function of parameters, one of them a number."""

    def predict(params: Params, X: Tensor) -> Tensor:
        return params["scale"] * torch.sin(X @ params["A"]) @ params["B"]

    params = {"B": rand(4, 2), "scale": rand() + 2, "A": rand(3, 4)}
    return Problem(predict, mse, vectors(rand, 2), params=params, predict=predict)


def mapping() -> Problem:
    """Inputs in a dict, and a prediction whose first axis is not the batch."""
    model = Apply(lambda self, X: self.net(X["tokens"]).flatten(0, 1), net=mlp())
    pairs = sequences(lambda *s: rand(*s, 3), classes)
    data = [({"tokens": x, "unused": "text"}, y.flatten()) for x, y in pairs]
    return Problem(model, cross_entropy, data, batch_size_fn=lambda X: len(X["tokens"]))


def user_dict() -> Problem:
    """A model that takes its inputs out of the mapping."""
    model = Apply(lambda self, X: self.net(X.pop("x")) + X.pop("y"), net=mlp())
    data = [(UserDict(x=x, y=rand(C)), y) for x, y in vectors()]
    return Problem(
        model,
        cross_entropy,
        data,
        batch_size_fn=lambda X: len(X["x"]),
        predict=lambda p, X: functional_call(model, p, (UserDict(X),)),
    )


def subset() -> Problem:
    """Some parameters only, in another order than the module's."""
    model = mlp()
    named = dict(model.named_parameters())
    return Problem(
        model,
        cross_entropy,
        vectors(),
        params={name: named[name] for name in ("2.bias", "0.weight")},
    )


def frozen() -> Problem:
    """Parameters of a layer in the middle that do not require gradients, between ones that do."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, C))
    model = model.double()
    model[2].requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Problem(model, cross_entropy, vectors(), params=params)


def frozen_but_asked_for() -> Problem:
    """Parameters that do not require gradients, but whose curvature is wanted."""
    return Problem(mlp().requires_grad_(False), cross_entropy, vectors())


def other_values() -> Problem:
    """Parameters that are not those of the module."""
    model = mlp()
    params = {name: rand(*p.shape) for name, p in model.named_parameters() if name != "0.bias"}
    return Problem(model, cross_entropy, vectors(), params=params)


def batch_norm() -> Problem:
    """BatchNorm with statistics that are not the batch's."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C)).double()
    model[1].running_mean += rand(4)
    model[1].running_var *= unit(4) + 0.5
    return Problem(model.eval(), cross_entropy, vectors())


def unused_parameter() -> Problem:
    """A parameter that the prediction does not depend on."""
    model = Apply(lambda self, x: self.net(x), unused=nn.Linear(2, 1), net=mlp()).double()
    return Problem(model, cross_entropy, vectors())


MODELS = [
    mlp_mse,
    one_dimensional_output,
    cnn,
    pixels,
    sequence_mse,
    sequence_cross_entropy,
    sequence_huber,
    tied,
    embedding,
    sparse_embedding,
    embedding_function,
    tied_embedding,
    function_model,
    mapping,
    user_dict,
    subset,
    frozen,
    frozen_but_asked_for,
    other_values,
    batch_norm,
    unused_parameter,
]


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
class OwnCrossEntropy(nn.CrossEntropyLoss):
    """A loss with a forward of its own: known by its value only."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def cubic(f: Tensor, y: Tensor, reduction: str = "mean", power: int = 2) -> Tensor:
    """A loss that is not convex."""
    return getattr((f - y) ** power, reduction)()


def _loss(loss: Any, targets: Callable[..., Tensor], *shape: int, classes: int | None = -1) -> Any:
    return lambda: Problem(
        mlp(), lambda r: loss(reduction=r), vectors(targets, *shape), classes=classes
    )


def _module(cls: type[nn.Module], **options: Any) -> Any:
    return partial(cls, **options)


def _function(function: Any, **options: Any) -> Any:
    return lambda reduction: partial(function, reduction=reduction, **options)


WEIGHT = torch.tensor([0.5, 2.0, 1.2], dtype=torch.float64)
LOSSES = {
    "CE weight": _loss(_module(nn.CrossEntropyLoss, weight=WEIGHT), classes),
    "CE all options": _loss(
        _module(nn.CrossEntropyLoss, weight=WEIGHT, ignore_index=-7, label_smoothing=0.2), ignoring
    ),
    "CE probabilities": _loss(
        _module(nn.CrossEntropyLoss, weight=WEIGHT, label_smoothing=0.2), probabilities, C
    ),
    "BCE options": _loss(
        _module(nn.BCEWithLogitsLoss, weight=WEIGHT, pos_weight=WEIGHT.flip(0)), unit, C
    ),
    "CE function": _loss(_function(F.cross_entropy, label_smoothing=0.1), classes),
    "MSE function": _loss(_function(F.mse_loss), rand, C),
    "CE subclass": _loss(_module(OwnCrossEntropy), classes, classes=None),
    "L1": _loss(_module(nn.L1Loss), rand, C, classes=None),
    "Huber": _loss(_module(nn.HuberLoss, delta=0.2), rand, C, classes=None),
    "Poisson function": _loss(_function(F.poisson_nll_loss, eps=1e-3), unit, C, classes=None),
    "own function": _loss(_function(cubic, power=3), rand, C, classes=None),
}
PROBLEMS = {**{build.__name__: build for build in MODELS}, **LOSSES}
#: Problems whose loss is known by its value only.
GENERIC = {"sequence_huber", "CE subclass", "L1", "Huber", "Poisson function", "own function"}
CLOSED_FORM = [name for name in PROBLEMS if name not in GENERIC]


# --------------------------------------------------------------------------------------------------
# Tests for all operators
# --------------------------------------------------------------------------------------------------
def for_each(operators: Sequence[Any], *names: str) -> Any:
    """Call a test with each operator, and the names of problems whose loss is enough for it."""
    if not names:
        return pytest.mark.parametrize("cls", operators)
    value_only = (HessianLinearOperator, GGNLinearOperator, *JACOBIANS)
    return pytest.mark.parametrize(
        ("cls", "name"),
        [(c, n) for c in operators for n in names if c in value_only or n not in GENERIC],
    )


class Passes:
    """Data that count how often they are iterated."""

    def __init__(self, batches: list[Any]):
        self.batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class LargestProduct(TorchDispatchMode):
    """Knows the most entries of a result of a matrix product while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            self.entries = max(self.entries, out.numel())
        return out


class Costs:
    """What a model on counted data costs: passes, batches' sizes in calls, and progress bars."""

    def __init__(self, data: list[Any], capture: pytest.CaptureFixture[str]):
        self.calls: list[int] = []
        self.model = Apply(lambda self, x: self.net(x), net=mlp())
        self.model.register_forward_pre_hook(lambda _, inputs: self.calls.append(len(inputs[0])))
        self.data, self.capture = Passes(data), capture

    def __call__(self) -> tuple[int, list[int], list[str]]:
        """Return the costs since the last call."""
        text = self.capture.readouterr().err
        finished = re.findall(r"([^\r\n]*): 100%[^\r\n]*3/3[^\r\n]*\n", text)
        assert text.count("\n") == len(finished)
        result = self.data.count, list(self.calls), finished
        self.data.count = 0
        self.calls.clear()
        return result
