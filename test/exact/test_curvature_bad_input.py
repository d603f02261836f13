"""Tests of the errors for bad input: what they say, and that they come before expensive work."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_cases import ALL, JACOBIANS, OPERATORS, Apply, for_each
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    TransposedJacobianLinearOperator,
)

X, Y = torch.rand(4, 3), torch.rand(4, 2)
BATCH = [(X, Y)]
#: Operators that only need the value of a loss.
VALUE_ONLY = (HessianLinearOperator, GGNLinearOperator)


class Model(nn.Module):
    """A model that counts its calls."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), *layers)
        self.register_buffer("offset", torch.zeros(2))
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.net(x) + self.offset


def build(cls: Any, model: Model | None = None, **changes: Any) -> Any:
    """Build an operator with some arguments changed."""
    model = Model() if model is None else model
    arguments = {
        "model_func": model,
        "loss_func": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        "data": BATCH,
        **changes,
    }
    if cls in JACOBIANS:
        del arguments["loss_func"]
    return cls(**arguments)


def params_of(model: Model, **changes: Any) -> dict[Any, Any]:
    """The model's parameters with some changed."""
    changes = {f"net.0.{name}": p for name, p in changes.items()}
    return {**dict(model.named_parameters()), **changes}


def no_reduction(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean()


def reduction_without_default(f: Tensor, y: Tensor, reduction: str) -> Tensor:
    return no_reduction(f, y)


def never_iterated() -> Any:
    yield from BATCH


class Unsized:
    """Data without batches that cannot tell so."""

    def __iter__(self) -> Any:
        return iter([])


# what is known without evaluating the model: changed arguments (of the model), error, message
KNOWN_EARLY: dict[str, tuple[Callable[[Model], dict[str, Any]], type[Exception], str]] = {
    # model and parameters
    "model": (lambda m: {"model_func": "model"}, ValueError, "model_func must be an nn.Module or"),
    "params list": (
        lambda m: {"params": list(m.parameters())},
        TypeError,
        r"params must be a dict .* got list\. .*dict\(model\.named_parameters\(\)\)",
    ),
    "params iterator": (lambda m: {"params": m.parameters()}, TypeError, "must be a dict"),
    "params named iterator": (
        lambda m: {"params": m.named_parameters()},
        TypeError,
        "must be a dict",
    ),
    "no params": (lambda m: {"params": {}}, ValueError, "params is empty"),
    "param type": (
        lambda m: {"params": params_of(m, bias=[0.0, 0.0])},
        TypeError,
        r"'net\.0\.bias': list",
    ),
    "name type": (lambda m: {"params": {0: torch.ones(2)}}, TypeError, "int 0: Tensor"),
    "unknown name": (
        lambda m: {"params": params_of(m, what=torch.ones(2))},
        ValueError,
        r"not parameters of Model: net\.0\.what\. Its parameters: net\.0\.weight, net\.0\.bias",
    ),
    "buffer": (
        lambda m: {"params": {"offset": torch.ones(2)}},
        ValueError,
        "'offset' is a buffer",
    ),
    "param shape": (
        lambda m: {"params": params_of(m, bias=torch.ones(3))},
        ValueError,
        r"'net\.0\.bias' has shape \(3,\) in params, but \(2,\) in Model",
    ),
    "integer param": (
        lambda m: {"params": params_of(m, bias=torch.ones(2, dtype=torch.int64))},
        ValueError,
        "must be floating point, got torch.int64",
    ),
    "mixed dtypes": (
        lambda m: {"params": params_of(m, bias=torch.ones(2, dtype=torch.float64))},
        ValueError,
        r"same dtype, got torch.float32: net\.0\.weight; torch.float64: net\.0\.bias",
    ),
    "mixed devices": (
        lambda m: {"params": params_of(m, bias=torch.ones(2, device="meta"))},
        ValueError,
        r"same device, got cpu: net\.0\.weight; meta: net\.0\.bias",
    ),
    "one tensor twice": (
        lambda m: {"model_func": lambda p, X: p["a"] * p["b"], "params": dict(a=Y, b=Y)},
        ValueError,
        "'a' and 'b' are one tensor",
    ),
    "max_norm": (
        lambda m: {"model_func": nn.Embedding(3, 2, max_norm=1.0), "params": {"weight": Y[:3]}},
        NotImplementedError,
        "Embedding uses max_norm",
    ),
    "scale_grad_by_freq": (
        lambda m: {
            "model_func": nn.Embedding(3, 2, scale_grad_by_freq=True),
            "params": {"weight": Y[:3]},
        },
        NotImplementedError,
        "Embedding uses scale_grad_by_freq",
    ),
    # loss
    "loss class": (
        lambda m: {"loss_func": nn.MSELoss},
        ValueError,
        "is not a loss function.*Pass an instance",
    ),
    "loss type": (lambda m: {"loss_func": "mse"}, ValueError, "'mse' is not a loss function"),
    "loss none": (
        lambda m: {"loss_func": nn.MSELoss(reduction="none")},
        ValueError,
        "MSELoss has reduction 'none'. Supported: 'mean', 'sum'",
    ),
    "no reduction": (
        lambda m: {"loss_func": no_reduction},
        ValueError,
        "no_reduction has no reduction: a loss must be",
    ),
    "no default": (
        lambda m: {"loss_func": reduction_without_default},
        ValueError,
        "has a reduction without a default",
    ),
    "missing loss": (lambda m: {"loss_func": None}, ValueError, "None is not a loss function"),
    # data
    "empty list": (lambda m: {"data": []}, ValueError, "data is empty"),
    "empty iterable": (lambda m: {"data": Unsized()}, ValueError, "data is empty"),
    "iterator": (lambda m: {"data": iter(BATCH)}, ValueError, r"list_iterator.*only once.*list\("),
    "generator": (lambda m: {"data": never_iterated()}, ValueError, "generator.*only once"),
    "zip": (lambda m: {"data": zip([X], [Y], strict=True)}, ValueError, "zip.*only once"),
    "not iterable": (lambda m: {"data": 5}, ValueError, "data must be an iterable.*got int"),
    "no pairs": (lambda m: {"data": [X]}, ValueError, r"pair \(X, y\).*got a Tensor"),
    "triples": (lambda m: {"data": [(X, Y, Y)]}, ValueError, "got a tuple of length 3"),
    "data set": (
        lambda m: {"data": DataLoader(TensorDataset(X), batch_size=2)},
        ValueError,
        "got a list of length 1",
    ),
    "input type": (
        lambda m: {"data": [(X.numpy(), Y)]},
        ValueError,
        "must be a tensor or a mapping.*got ndarray",
    ),
    "mapping": (
        lambda m: {"data": [({"x": X}, Y)]},
        ValueError,
        "inputs X of a batch are a dict.*Pass batch_size_fn",
    ),
    "user mapping": (
        lambda m: {"data": [(UserDict(x=X), Y)]},
        ValueError,
        "UserDict.*Pass batch_size_fn",
    ),
    "scalar input": (lambda m: {"data": [(X[0, 0], Y)]}, ValueError, "scalar. Add a batch dim"),
    "empty batch": (
        lambda m: {"data": [(X[:0], Y[:0])]},
        ValueError,
        r"at least one example, got X\.shape\[0\] = 0",
    ),
    "batch size type": (
        lambda m: {"batch_size_fn": lambda X: 4.0},
        ValueError,
        r"batch_size_fn\(X\) must be an integer, got 4\.0",
    ),
    "batch size": (
        lambda m: {"batch_size_fn": lambda X: -1},
        ValueError,
        r"batch_size_fn\(X\) = -1",
    ),
    "num_data": (lambda m: {"num_data": 0}, ValueError, "num_data must be positive, got 0"),
    "num_data type": (lambda m: {"num_data": 4.0}, TypeError, "integer"),
}


LOSS_CASES = {"loss class", "loss type", "loss none", "missing loss", "no reduction", "no default"}


@pytest.mark.parametrize("check_deterministic", [True, False])
@pytest.mark.parametrize(
    ("cls", "case"),
    [
        (cls, case)
        for cls in ALL
        for case in KNOWN_EARLY
        if cls not in JACOBIANS or case not in LOSS_CASES
    ],
)
def test_known_before_the_model_is_evaluated(
    cls: Any, case: str, check_deterministic: bool
) -> None:
    change, error, message = KNOWN_EARLY[case]
    model = Model()
    with pytest.raises(error, match=message):
        build(cls, model, **change(model), check_deterministic=check_deterministic)
    assert model.calls == 0


@for_each(ALL)
def test_tied_parameter_twice(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    params = {"0.weight": torch.rand(3, 3), "1.weight": torch.rand(3, 3)}
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are tied in Sequential"):
        build(cls, model_func=model, params=params)


# what a module's layers tell: layers, message
RANDOM_LAYERS = {
    "dropout": (nn.Dropout(0.1), r"Dropout in training mode: net\.1 \(Dropout\).*model\.eval"),
    "batch norm": (
        nn.BatchNorm1d(2),
        r"BatchNorm in training mode: net\.1 \(BatchNorm1d\).*model\.eval",
    ),
    "batch norm without statistics": (
        nn.BatchNorm1d(2, track_running_stats=False),
        r"BatchNorm without running statistics: net\.1",
    ),
}


@for_each(ALL)
@pytest.mark.parametrize("layer", RANDOM_LAYERS)
def test_random_layers(cls: Any, layer: str) -> None:
    model = Model(RANDOM_LAYERS[layer][0])
    with pytest.raises(RuntimeError, match=RANDOM_LAYERS[layer][1]):
        build(cls, model)
    assert model.calls == 0
    A = build(cls, model, check_deterministic=False)  # if one really wants to
    assert (A @ torch.ones(A.shape[1])).isfinite().all()


@for_each(ALL)
def test_random_functions_and_data(cls: Any) -> None:
    noisy = Apply(lambda self, x: self.net(x) + torch.randn(len(x), 2), net=nn.Linear(3, 2))
    params = dict(noisy.named_parameters())
    what = "prediction differs" if cls in JACOBIANS else "prediction and the loss differ"
    with pytest.raises(RuntimeError, match=rf"{what}.*not deterministic"):
        build(cls, model_func=noisy, params=params)

    class Augmented:
        def __iter__(self) -> Any:
            return iter([(X + torch.randn_like(X), Y)])

    with pytest.raises(RuntimeError, match=r"data differ between two passes \(X\).*augmentation"):
        build(cls, data=Augmented())


# what only the model's prediction tells: arguments, error, message
KNOWN_LATE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tuple": (
        {"model_func": Apply(lambda self, x: (self.net(x), x), net=nn.Linear(3, 2))},
        TypeError,
        r"must return a tensor, got tuple\. Wrap it in a module(.|\n)*\.logits",
    ),
    "mapping": (
        {"model_func": Apply(lambda self, x: {"logits": self.net(x)}, net=nn.Linear(3, 2))},
        TypeError,
        "must return a tensor, got dict",
    ),
    "shapes": (
        {"data": [(X, Y[:, 0])]},
        ValueError,
        r"MSE: .* predictions of shape \(4, 2\) and targets of shape \(4,\)",
    ),
    "classes": (
        {"loss_func": nn.CrossEntropyLoss(), "data": [(X, torch.zeros(4))]},
        ValueError,
        r"integers\) of shape \(4,\) or class probabilities .*got torch.float32 of shape \(4,\)",
    ),
    "class weight": (
        {
            "loss_func": nn.CrossEntropyLoss(weight=torch.ones(3)),
            "data": [(X, torch.zeros(4, dtype=torch.int64))],
        },
        ValueError,
        r"weight must have shape \(2,\)",
    ),
    "no scalar": (
        {"loss_func": lambda f, y, reduction="sum": (f - y) ** 2},
        ValueError,
        r"with reduction 'sum' must return a scalar, got shape \(4, 2\)",
    ),
    "probability ignore_index": (
        {"loss_func": nn.CrossEntropyLoss(ignore_index=1)},
        ValueError,
        "ignore_index=1 is not supported for probability targets",
    ),
    "number of data": ({"num_data": 5}, ValueError, "had 4 examples, but num_data is 5"),
}


@pytest.mark.parametrize(
    ("cls", "case"),
    [
        (cls, case)
        for cls in ALL
        for case in KNOWN_LATE
        if (cls not in JACOBIANS or case in ("tuple", "mapping", "number of data"))
        and (cls in VALUE_ONLY or case != "no scalar")
    ],
)
def test_known_from_the_prediction(cls: Any, case: str) -> None:
    arguments, error, message = KNOWN_LATE[case]
    if "model_func" in arguments:
        arguments = {**arguments, "params": dict(arguments["model_func"].named_parameters())}
    with pytest.raises(error, match=message):
        build(cls, **arguments)
    A = build(cls, **{"num_data": 4, **arguments}, check_deterministic=False)
    with pytest.raises(error, match=message):
        A @ torch.ones(A.shape[1])
    with pytest.raises(error, match=message):
        torch.ones(A.shape[0]) @ A


VECTORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "size": (lambda: torch.ones(7), ValueError, r"must have shape \[8\] or \[8, K\], got \[7\]"),
    "transposed": (lambda: torch.ones(2, 8), ValueError, r"got \[2, 8\]"),
    "too many axes": (lambda: torch.ones(8, 1, 1), ValueError, r"got \[8, 1, 1\]"),
    "too few tensors": (lambda: [torch.ones(2, 3)], ValueError, r"shapes \{'net\.0\.weight'"),
    "tensor shape": (lambda: [torch.ones(3, 2), torch.ones(2)], ValueError, "Shape mismatch"),
    "mixed columns": (lambda: [torch.ones(2, 3, 4), torch.ones(2)], ValueError, "Shape mismatch"),
    "names": (
        lambda: {"net.0.weight": torch.ones(2, 3), "bias": torch.ones(2)},
        ValueError,
        r"Missing: \['net\.0\.bias'\]\. Unknown: \['bias'\]",
    ),
    "dtype": (lambda: torch.ones(8).double(), ValueError, "Dtype mismatch.*float32.*float64"),
    "integers": (lambda: torch.ones(8, dtype=torch.int64), ValueError, "Dtype mismatch"),
    "device": (lambda: torch.ones(8, device="meta"), ValueError, "Device mismatch.*cpu.*meta"),
    "array": (lambda: torch.ones(8).numpy(), TypeError, r"ndarray.*to_scipy\(\)"),
    "list of arrays": (lambda: [Y.numpy(), X.numpy()], TypeError, "list of tensors is needed"),
    "number": (lambda: 3.0, TypeError, "float"),
}


@for_each(OPERATORS)
@pytest.mark.parametrize("case", VECTORS)
def test_vectors(cls: Any, case: str) -> None:
    vector, error, message = VECTORS[case]
    model = Model()
    A = build(cls, model)
    model.calls = 0
    with pytest.raises(error, match=message):
        A @ vector()
    if case != "transposed":
        message = message.replace("8, K", "K, 8")
        with pytest.raises(error, match=message):
            vector() @ A
    assert model.calls == 0


@for_each(OPERATORS)
def test_what_the_matrices_cannot_do(cls: Any) -> None:
    model = Model()
    A = build(cls, model)
    model.calls = 0
    for form in ("trace", "diagonal", "frobenius_norm", "logdet", "inverse", "eigh", "sqrt"):
        with pytest.raises(NotImplementedError, match=r"8×8 operator .* has no closed form of"):
            getattr(A, form)()
    with pytest.raises(NotImplementedError, match=r"8×8 .* cannot be moved.*build it anew"):
        A.to(torch.float64)
    other = build(cls, params={"net.0.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="Shape mismatch"):
        A + other
    with pytest.raises(ValueError, match="Dtype mismatch"):
        A @ build(cls, Model().double(), data=[(X.double(), Y.double())])
    assert model.calls == 0


@for_each(ALL)
def test_functions_without_second_derivatives(cls: Any) -> None:
    bag = nn.EmbeddingBag(5, 2)
    data = [(torch.zeros(4, 3).long(), Y)]
    A = build(cls, model_func=bag, params=dict(bag.named_parameters()), data=data)
    needs_first_only = A.T if cls is TransposedJacobianLinearOperator else A
    with pytest.raises(NotImplementedError, match="embedding_bag"):
        needs_first_only @ torch.ones(10)
