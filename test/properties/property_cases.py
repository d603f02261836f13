"""Networks, losses and dense curvature matrices for properties that hold by mathematics.

The matrices come from `torch.func` applied to all data at once; nothing is shared with the package.
Conventions: parameters are flattened row-major and concatenated; a layer's canonical form is its
weight ``[d_out, d_in]``, row-major, with the bias as last column where both are one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

C = 3  # entries of one prediction
BACKENDS = ("hooks", "make_fx")
REDUCTIONS = ("mean", "sum")
JOINT = (False, True)  # separate and joint bias
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "none": nn.Identity,
}

_WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "mse": lambda r: nn.MSELoss(reduction=r),
    "ce": lambda r: nn.CrossEntropyLoss(reduction=r),
    "ce-options": lambda r: nn.CrossEntropyLoss(_WEIGHT, label_smoothing=0.3, reduction=r),
    "ce-soft": lambda r: nn.CrossEntropyLoss(_WEIGHT, reduction=r),
    "bce": lambda r: nn.BCEWithLogitsLoss(reduction=r),
    "bce-options": lambda r: nn.BCEWithLogitsLoss(_WEIGHT, pos_weight=_WEIGHT.flip(0), reduction=r),
}


def grid(names: str, *axes: Iterable[Any], fast: Iterable[tuple[Any, ...]]) -> Any:
    """Parametrize with a whole grid, whose points are slow except for a few."""
    quick = set(fast)
    points = list(product(*axes))
    assert quick <= set(points), "a fast point is not in the grid"
    marked = [p if p in quick else pytest.param(*p, marks=pytest.mark.slow) for p in points]
    return pytest.mark.parametrize(names.split(), marked)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    generator = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- networks ------------------------------------------------------------------------------------
class Chain(nn.Module):
    """Layers ``l0``, ``l1``, …, with something after each."""

    def __init__(self, layers: list[nn.Module], after: list[Callable[[Tensor], Tensor]]):
        super().__init__()
        assert len(layers) == len(after)
        for i, layer in enumerate(layers):
            self.add_module(f"l{i}", layer)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        for i, function in enumerate(self.after):
            x = function(getattr(self, f"l{i}")(x))
        return x


def chain(*layers: nn.Module, activation: str = "none", **special: Callable[..., Tensor]) -> Chain:
    """Return layers with an activation after each, and then something special after some."""
    act = ACTIVATIONS[activation]()
    after = []
    for i in range(len(layers)):
        extra = special.get(f"l{i}", lambda h: h)
        after.append(lambda h, extra=extra: extra(act(h)))
    return Chain(list(layers), after)


def linears(*widths: int, bias: bool = True) -> list[nn.Module]:
    """Return linear layers of some widths."""
    return [nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)]


class Skip(nn.Module):
    """A skip connection and a branch from the input, with an activation after every layer."""

    def __init__(self, activation: str):
        super().__init__()
        self.l0, self.l1, self.l2, self.l3 = *linears(3, 4, 4), nn.Linear(3, 4), nn.Linear(4, C)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.l0(x))
        return self.act(self.l3(h + self.act(self.l1(h)) + self.act(self.l2(x))))


def classes_second(f: Tensor) -> Tensor:
    """Move classes from the last axis to the second, where cross-entropy wants them."""
    return f.movedim(-1, 1)


# ---- problems ------------------------------------------------------------------------------------
@dataclass
class Problem:
    """A model, a loss and data, and dense curvature matrices."""

    model: Any
    loss: nn.Module
    params: dict[str, Tensor]
    data: list[tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        # as functions of all data at once, and of the flat parameters
        self.X, self.y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        self.theta = torch.cat([p.flatten() for p in self.params.values()])

    def build(self, cls: Any, **options: Any) -> Any:
        """Return an operator, without the check to save time."""
        arguments = {"check_deterministic": False, **options}
        return cls(self.model, self.loss, self.params, self.data, **arguments)

    def predict(self, theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in self.params.values()])
        pairs = zip(self.params.items(), parts, strict=True)
        params = {name: part.reshape(p.shape) for (name, p), part in pairs}
        if isinstance(self.model, nn.Module):
            return functional_call(self.model, params, (self.X,))
        return self.model(params, self.X)

    def with_reduction(self, reduction: str) -> Callable[[Tensor], Tensor]:
        """Return the loss of all predictions."""
        weight = getattr(self.loss, "weight", None)
        options: dict[str, Any] = {} if weight is None else {"weight": weight}
        if isinstance(self.loss, nn.CrossEntropyLoss):
            options["label_smoothing"] = self.loss.label_smoothing
            return lambda f: F.cross_entropy(f, self.y, reduction=reduction, **options)
        if isinstance(self.loss, nn.BCEWithLogitsLoss):
            options["pos_weight"] = self.loss.pos_weight
            return lambda f: F.binary_cross_entropy_with_logits(
                f, self.y, reduction=reduction, **options
            )
        return lambda f: F.mse_loss(f, self.y, reduction=reduction)

    @cached_property
    def jacobian(self) -> Tensor:
        """``[entries of all predictions, D]``."""
        return jacrev(self.predict)(self.theta).reshape(-1, len(self.theta))

    @cached_property
    def loss_hessian(self) -> Tensor:
        """The Hessian of the reduced loss by all predictions, ``[entries, entries]``."""
        f = self.predict(self.theta)
        return hessian(self.with_reduction(self.loss.reduction))(f).reshape(f.numel(), f.numel())

    @cached_property
    def scale(self) -> float:
        """What the reduction multiplies the sum of the loss with."""
        f = self.predict(self.theta)
        values = (self.with_reduction(r)(f) for r in (self.loss.reduction, "sum"))
        return (next(values) / next(values)).item()

    @cached_property
    def ggn(self) -> Tensor:
        return self.jacobian.T @ self.loss_hessian @ self.jacobian

    @cached_property
    def hessian(self) -> Tensor:
        loss = self.with_reduction(self.loss.reduction)
        return hessian(lambda theta: loss(self.predict(theta)))(self.theta)

    @cached_property
    def gradients(self) -> Tensor:
        """Gradients of the un-averaged loss terms, ``[M, D]``."""

        def terms(theta: Tensor) -> Tensor:
            values = self.with_reduction("none")(self.predict(theta))
            return values.flatten() if self.is_cross_entropy else values.sum(-1).flatten()

        return jacrev(terms)(self.theta)

    @property
    def is_cross_entropy(self) -> bool:
        return isinstance(self.loss, nn.CrossEntropyLoss)

    @cached_property
    def ef(self) -> Tensor:
        return self.scale * self.gradients.T @ self.gradients

    def exact(self, fisher_type: str) -> Tensor:
        return {"type-2": self.ggn, "empirical": self.ef}[fisher_type]

    # ---- blocks
    def groups(self, joint: bool) -> list[tuple[str, ...]]:
        """Return the names of the parameters of each block."""
        groups: dict[str, list[str]] = {}
        for name in self.params:
            groups.setdefault(name.rpartition(".")[0] if joint else name, []).append(name)
        return [tuple(names) for names in groups.values()]

    def places(self, names: tuple[str, ...]) -> Tensor:
        """Return where a block's canonical vector is in the parameter vector.

        A transposed convolution has another canonical form; for it, any order will do here.
        """
        columns, start = {}, 0
        for name, p in self.params.items():
            columns[name] = torch.arange(start, start + p.numel()).reshape(len(p), -1)
            start += p.numel()
        if len({len(columns[name]) for name in names}) > 1:
            return torch.cat([columns[name].flatten() for name in names])
        return torch.cat([columns[name] for name in names], dim=1).flatten()

    def blocks(self, matrix: Tensor, joint: bool) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Yield the names and the block of each group."""
        for names in self.groups(joint):
            where = self.places(names)
            yield names, matrix[where][:, where]

    def block_diagonal(self, matrix: Tensor, joint: bool) -> Tensor:
        """Return a matrix without what is between different groups."""
        result = torch.zeros_like(matrix)
        for names in self.groups(joint):
            where = self.places(names)
            result[where[:, None], where] = matrix[where][:, where]
        return result

    def errors(self, actual: Tensor, expected: Tensor, joint: bool) -> dict[str, float]:
        """Return each block's relative Frobenius distance; elsewhere there must be zeros."""
        between = actual - self.block_diagonal(actual, joint)
        assert not between.any(), "blocks are coupled"
        pairs = zip(self.blocks(actual, joint), self.blocks(expected, joint), strict=True)
        result = {}
        for (names, ours), (_, theirs) in pairs:
            assert theirs.norm() > 1e-8, f"the block of {names} says nothing"
            result[names[0]] = ((ours - theirs).norm() / theirs.norm()).item()
        return result

    def assert_exact(self, operator: Any, expected: Tensor, joint: bool) -> None:
        """Check all blocks of an operator to rounding."""
        errors = self.errors(operator.to_dense(), expected, joint)
        assert max(errors.values()) < 1e-10, errors

    def assert_differs(self, operator: Any, expected: Tensor, joint: bool, least: float) -> None:
        """Check that each block of an operator is at a distance."""
        errors = self.errors(operator.to_dense(), expected, joint)
        assert min(errors.values()) > least, errors


def targets(loss: str, f: Tensor, seed: int = 5) -> Tensor:
    """Return targets for predictions; classes are in the second axis for cross-entropy."""
    if loss == "ce-soft":
        return draw(*f.shape, seed=seed).softmax(1)
    if loss.startswith("ce"):
        return (draw(*f[:, 0].shape, seed=seed).abs() * 10).long() % f.shape[1]
    return draw(*f.shape, seed=seed) if loss == "mse" else draw(*f.shape, seed=seed).sigmoid()


def problem(
    model: nn.Module,
    loss: str,
    reduction: str,
    inputs: list[Tensor],
    seed: int = 0,
    copies: bool = False,
) -> Problem:
    """Return a problem at random parameters that are not the module's own, in float64.

    Args:
        model: The model.
        loss: A name in ``LOSSES``.
        reduction: ``"mean"`` or ``"sum"``.
        inputs: The batches.
        seed: Of parameters and targets.
        copies: Whether all data have the same target.
    """
    model = model.double()
    params = {
        name: 0.6 * draw(*p.shape, seed=seed + i) + 0.1
        for i, (name, p) in enumerate(model.named_parameters())
    }
    f = functional_call(model, params, (torch.cat(inputs),)).detach()
    y = targets(loss, f, seed + 5)
    y = y[:1].expand_as(y).clone() if copies else y
    data = list(zip(inputs, y.split([len(X) for X in inputs]), strict=True))
    return Problem(model, LOSSES[loss](reduction), params, data)


def alive(make: Callable[[int], Problem]) -> Problem:
    """Return the problem of the first seed where no block vanishes, as with saturated units.

    Nor is a class nearly impossible: few samples say nothing about it.
    """
    for seed in range(0, 1000, 10):
        case = make(seed)
        f = case.predict(case.theta)
        p = f.softmax(1) if case.is_cross_entropy else f.abs().neg().sigmoid()
        if not isinstance(case.loss, nn.MSELoss) and p.min() < 0.03:
            continue
        for matrix in (case.ggn, case.ef):
            if min(block.norm() for _, block in case.blocks(matrix, False)) < 1e-7:
                break
        else:
            return case
    raise AssertionError("no seed gives a network whose units are alive")


# ---- architectures -------------------------------------------------------------------------------
#: Every layer has one position; what makes the network from an activation, and the shape of inputs.
ONE_POSITION: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda act: chain(*linears(3, 4, 2, C), activation=act), (3,)),
    "no-bias": (
        lambda act: chain(
            nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, C), activation=act
        ),
        (3,),
    ),
    "skip": (Skip, (3,)),
    "conv2d": (  # kernels that cover the image, one of them dilated
        lambda act: chain(
            nn.Conv2d(2, 3, (2, 3), dilation=(2, 1)), nn.Conv2d(3, 4, 1), nn.Linear(4, C),
            activation=act, l1=lambda h: h.flatten(1),
        ),
        (2, 3, 3),
    ),
    "conv1d": (
        lambda act: chain(
            nn.Conv1d(2, 3, 3, stride=2, dilation=2), nn.Conv1d(3, 4, 1, bias=False),
            nn.Linear(4, C), activation=act, l1=lambda h: h.flatten(1),
        ),
        (2, 5),
    ),
}  # fmt: skip

#: Deep linear networks, R = S: positions do not mix.
DEEP_LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: chain(*linears(3, 4, 2, C)), (3,)),
    "vectors-no-bias": (lambda: chain(*linears(3, 4, 2, C, bias=False)), (3,)),
    "conv": (
        lambda: chain(nn.Conv2d(2, 3, (2, 3)), nn.Linear(3, C), l0=lambda h: h.flatten(1)),
        (2, 2, 3),
    ),
    "sequences": (lambda: chain(*linears(3, 4, 2, C)), (4, 3)),
    "grids": (lambda: chain(*linears(3, 2, C)), (2, 3, 3)),
    "pixels": (
        lambda: chain(nn.Conv2d(2, 4, 1), nn.Conv2d(4, C, 1), l1=lambda h: h.movedim(1, -1)),
        (2, 2, 3),
    ),
    "patches": (  # one convolution whose positions are the loss terms
        lambda: chain(nn.Conv1d(2, C, 2, stride=2, padding=1), l0=lambda h: h.mT),
        (2, 5),
    ),
}
SEVERAL_POSITIONS = ("sequences", "grids", "pixels", "patches")


@cache
def one_datum(
    architecture: str,
    activation: str,
    loss: str,
    reduction: str,
    sizes: tuple[int, ...],
    same: bool,
) -> Problem:
    """Return a single datum, or copies of it in batches, with the same or other targets."""
    make, shape = ONE_POSITION[architecture]
    x = draw(1, *shape, seed=3)
    inputs = [x.repeat(n, *[1] * len(shape)) for n in sizes]
    return alive(lambda seed: problem(make(activation), loss, reduction, inputs, seed, same))


@cache
def deep_linear(architecture: str, reduction: str, sizes: tuple[int, ...] = (3, 2)) -> Problem:
    """Return a deep linear network with square loss and different data."""
    make, shape = DEEP_LINEAR[architecture]
    inputs = [draw(n, *shape, seed=7 + i) for i, n in enumerate(sizes)]
    return problem(make(), "mse", reduction, inputs)
