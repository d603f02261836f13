"""KFAC's factors from their definition: slow, in Python loops, one example after the other.

Nothing here is shared with the package. Derivatives come from autograd, one entry of the
prediction at a time; loss Hessians from autograd through PyTorch's own losses; patches of images
from indexing; the scale c from the ratio of PyTorch's mean and sum.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

Data = list[tuple[Any, Tensor]]


@dataclass
class Setup:
    """A model, a loss and data, as KFAC gets them."""

    model: nn.Module
    loss: nn.Module
    params: dict[str, Tensor]
    data: Data
    batch_size_fn: Callable[[Any], int] | None = None

    def kwargs(self, **changes: Any) -> dict[str, Any]:
        """Return the arguments of an operator, without the check to save time."""
        arguments = {
            "model_func": self.model,
            "loss_func": self.loss,
            "params": self.params,
            "data": self.data,
            "batch_size_fn": self.batch_size_fn,
            "check_deterministic": False,
        }
        return {**arguments, **changes}

    @cached_property
    def examples(self) -> list[Example]:
        """What happens for each example."""
        return [_differentiate(self, X, y) for X, y in self._single_examples()]

    def _single_examples(self) -> Iterator[tuple[Any, Tensor]]:
        for X, y in self.data:
            n = X.shape[0] if self.batch_size_fn is None else self.batch_size_fn(X)
            for i in range(n):
                yield _rows(X, i, n), _rows(y, i, n)

    def scale(self) -> float:
        """Return c: what PyTorch's reduction divides the sum over all loss terms by."""
        F = torch.cat([example.F for example in self.examples])
        y = torch.cat([example.targets for example in self.examples])
        return (self.loss(F, y) / summed(self.loss)(F, y)).item()


@dataclass
class Example:
    """One example's calls of layers, loss terms and derivatives.

    Attributes:
        calls: For each call of a layer: its name and its inputs ``[S, d_in]``.
        jacobians: For each call: the derivatives ``[R, C, S, d_out]`` by its outputs.
        param_jacobian: The derivatives ``[R, C, D]`` by all parameters.
        F: Predictions ``[R, C]``.
        targets: Targets ``[R]`` or ``[R, C]``.
        hessians: Loss Hessians ``[R, C, C]``.
        gradients: Loss gradients ``[R, C]``.
    """

    calls: list[tuple[str, Tensor]]
    jacobians: list[Tensor]
    param_jacobian: Tensor
    F: Tensor
    targets: Tensor
    hessians: Tensor
    gradients: Tensor


def summed(loss: nn.Module) -> nn.Module:
    """Return the same loss with reduction "sum"."""
    loss = copy.deepcopy(loss)
    loss.reduction = "sum"
    return loss


def _rows(x: Any, i: int, n: int) -> Any:
    """Return the rows of example i of n."""
    if isinstance(x, dict):
        return {key: _rows(value, i, n) for key, value in x.items()}
    each = x.shape[0] // n
    return x[i * each : (i + 1) * each].detach().clone()


def _entries(loss: nn.Module, shape: torch.Size) -> list[list[int]]:
    """Return the flat entries of each loss term in a prediction."""
    numbers = torch.arange(shape.numel()).reshape(shape)
    axis = 1 if isinstance(loss, nn.CrossEntropyLoss) else max(len(shape) - 1, 1)
    if axis == len(shape):
        numbers = numbers.unsqueeze(-1)
    others = [range(size) for a, size in enumerate(shape) if a != axis]
    return [
        numbers[(*place[:axis], slice(None), *place[axis:])].tolist()
        for place in itertools.product(*others)
    ]


def _differentiate(setup: Setup, X: Any, y: Tensor) -> Example:
    """Evaluate everything that is needed of one example."""
    model = copy.deepcopy(setup.model)
    calls: list[tuple[str, Tensor]] = []
    shifts: list[Tensor] = []

    def listen(name: str, layer: nn.Module) -> None:
        own = type(layer).forward

        def forward(input: Tensor) -> Tensor:
            output = own(layer, input)
            if not torch.is_grad_enabled():
                return output
            calls.append((name, _inputs(layer, input.detach())))
            shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + shifts[-1]

        layer.forward = forward  # type: ignore[method-assign]

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            listen(name, layer)
    params = {name: p.detach().clone().requires_grad_() for name, p in setup.params.items()}
    f = functional_call(model, params, (X,))

    entries = _entries(setup.loss, f.shape)
    leaves = [*shifts, *params.values()]
    derivatives = [
        [
            torch.autograd.grad(f.flatten()[e], leaves, retain_graph=True, materialize_grads=True)
            for e in term
        ]
        for term in entries
    ]
    by_leaf = [
        torch.stack([torch.stack([gradients[i] for gradients in term]) for term in derivatives])
        for i in range(len(leaves))
    ]  # [R, C, *shape]

    def value(flat: Tensor) -> Tensor:
        return summed(setup.loss)(flat.reshape(f.shape), y)

    flat = f.detach().flatten()
    full = hessian(value, flat)
    gradient = jacobian(value, flat)
    remainder = full.clone()
    for term in entries:
        remainder[torch.tensor(term).unsqueeze(1), term] = 0
    assert not remainder.any(), "loss terms of one example must be independent"
    return Example(
        calls=calls,
        jacobians=[
            _outputs(model.get_submodule(name), J)
            for J, (name, _) in zip(by_leaf[: len(shifts)], calls, strict=True)
        ],
        param_jacobian=torch.cat([j.flatten(2) for j in by_leaf[len(shifts) :]], dim=2),
        F=torch.stack([flat[term] for term in entries]),
        targets=_targets(setup.loss, f, y, entries),
        hessians=torch.stack([full[term][:, term] for term in entries]),
        gradients=torch.stack([gradient[term] for term in entries]),
    )


def _targets(loss: nn.Module, f: Tensor, y: Tensor, entries: list[list[int]]) -> Tensor:
    """Return the targets of the terms, ``[R]`` or ``[R, C]``."""
    if y.shape != f.shape:
        return y.flatten()
    return torch.stack([y.flatten()[term] for term in entries])


def _outputs(layer: nn.Module, jacobian: Tensor) -> Tensor:
    """Bring a derivative by a layer's output to ``[R, C, S, d_out]``."""
    if isinstance(layer, nn.Conv2d):
        jacobian = jacobian.movedim(-3, -1)
    return jacobian.reshape(*jacobian.shape[:2], -1, jacobian.shape[-1])


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's inputs ``[S, d_in]``: rows of a Linear, patches of a Conv2d."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    images = x if x.ndim == 4 else x.unsqueeze(0)
    return torch.stack([patch for image in images for patch in _patches(layer, image)])


def _patches(layer: nn.Conv2d, image: Tensor) -> Iterator[Tensor]:
    """Yield the patches of one image ``[C, I, J]``, pixel by pixel."""
    before = []
    after = []
    for axis in (0, 1):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            before.append(total // 2)
            after.append(total - total // 2)
        else:
            amount = 0 if layer.padding == "valid" else layer.padding[axis]
            before.append(int(amount))
            after.append(int(amount))

    def pixel(channel: int, i: int, j: int) -> Tensor:
        """Look a pixel up that may be in the padding."""
        place = []
        for axis, index in enumerate((i, j)):
            size = image.shape[1 + axis]
            if layer.padding_mode == "circular":
                index = index % size
            elif layer.padding_mode == "reflect":
                index = abs(index)
                index = 2 * (size - 1) - index if index >= size else index
            elif layer.padding_mode == "replicate":
                index = min(max(index, 0), size - 1)
            elif not 0 <= index < size:
                return image.new_zeros(())
            place.append(index)
        return image[channel, place[0], place[1]]

    numbers = []
    for axis in (0, 1):
        size = image.shape[1 + axis] + before[axis] + after[axis]
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        numbers.append((size - extent) // layer.stride[axis] + 1)
    for o, p in itertools.product(*map(range, numbers)):
        yield torch.stack(
            [
                pixel(
                    channel,
                    o * layer.stride[0] + k * layer.dilation[0] - before[0],
                    p * layer.stride[1] + q * layer.dilation[1] - before[1],
                )
                for channel in range(layer.in_channels)
                for k in range(layer.kernel_size[0])
                for q in range(layer.kernel_size[1])
            ]
        )


# ---- the factors ---------------------------------------------------------------------------------
Groups = list[dict[str, str]]
Factors = tuple[Tensor, Tensor | None]


def groups(setup: Setup, joint: bool) -> Groups:
    """Return the groups of parameters."""
    owned = _owners(setup)
    result: Groups = []
    for name in setup.params:
        if any(name in group.values() for group in result):
            continue
        role = "W" if "W" in {role for _, role in owned[name]} else "b"
        group = {role: name}
        if joint:
            layers = {layer for layer, _ in owned[name]}
            for other, uses in owned.items():
                if other != name and layers & {layer for layer, _ in uses}:
                    group["b" if role == "W" else "W"] = other
        result.append(dict(sorted(group.items())))
    return result


def _owners(setup: Setup) -> dict[str, list[tuple[str, str]]]:
    """Return the layers and roles of each parameter."""
    tensors = dict(setup.model.named_parameters(remove_duplicate=False))
    return {
        name: [
            (layer, "W" if attribute == "weight" else "b")
            for layer, module in setup.model.named_modules()
            for attribute in ("weight", "bias")
            if getattr(module, attribute, None) is tensors[name]
        ]
        for name in setup.params
    }


def reference_factors(
    setup: Setup, group: dict[str, str], fisher_type: str, approx: str, vectors: Any = None
) -> Factors:
    """Return gradient and input factor of a group.

    Args:
        setup: The model, loss and data.
        group: The group.
        fisher_type: ``"type-2"``, ``"empirical"``, ``"forward-only"``, or ``"given"``.
        approx: ``"expand"`` or ``"reduce"``.
        vectors: For ``"given"``: a list of vectors ``[R, C]`` for each example. All loss terms of
            an example are back-propagated together.
    """
    owned = _owners(setup)
    layers = {layer for layer, _ in owned[group.get("W", group.get("b", ""))]}
    biased = {layer for layer, _ in owned[group["b"]]} if "b" in group else set()
    joint = set(group) == {"W", "b"}
    main = setup.params[group.get("W", group.get("b", ""))]
    d_out, d_in = main.shape[0], main[0].numel() + joint
    B = torch.zeros(d_out, d_out, dtype=torch.float64)
    A, positions = torch.zeros(d_in, d_in, dtype=torch.float64), 0
    for index, example in enumerate(setup.examples):
        used = [i for i, (layer, _) in enumerate(example.calls) if layer in layers]
        if not used:
            continue
        J = torch.cat([example.jacobians[i] for i in used], dim=2)  # [R, C, S, d_out]
        if approx == "reduce":
            J = J.sum(2, keepdim=True)
        if fisher_type == "given":
            for vector in vectors[index]:
                g = torch.einsum("rcso,rc->so", J, vector)
                B += torch.einsum("so,sp->op", g, g)
        elif fisher_type == "empirical":
            g = torch.einsum("rcso,rc->rso", J, example.gradients)
            B += torch.einsum("rso,rsp->op", g, g)
        else:
            B += torch.einsum("rcso,rcd,rdsp->op", J, example.hessians, J)
        if "W" not in group:
            continue
        rows = []  # the inputs of all positions of all usages
        for i in used:
            layer, inputs = example.calls[i]
            ones = inputs.new_full((len(inputs), joint), float(layer in biased))
            rows.append(torch.cat([inputs, ones], dim=1))
        a = torch.cat(rows)
        if approx == "reduce":
            a = a.mean(0, keepdim=True)
        A += torch.einsum("si,sj->ij", a, a)
        positions += len(a)
    B = (
        torch.eye(d_out, dtype=torch.float64)
        if fisher_type == "forward-only"
        else B * setup.scale()
    )
    return B, A / max(positions, 1) if "W" in group else None


def places(params: dict[str, Tensor], group: dict[str, str]) -> Tensor:
    """Return where the entries of a group's canonical vector are in the parameter vector."""
    numbers, start = {}, 0
    for name, p in params.items():
        numbers[name] = torch.arange(start, start + p.numel()).reshape(p.shape[0], -1)
        start += p.numel()
    return torch.cat([numbers[name] for _, name in sorted(group.items())], dim=1).flatten()


def assemble(params: dict[str, Tensor], blocks: list[tuple[dict[str, str], Tensor]]) -> Tensor:
    """Return the dense matrix of groups' dense blocks."""
    total = sum(p.numel() for p in params.values())
    matrix = torch.zeros(total, total, dtype=torch.float64)
    for group, block in blocks:
        where = places(params, group)
        matrix[where.unsqueeze(1), where] = block
    return matrix


def dense(setup: Setup, fisher_type: str = "type-2") -> Tensor:
    """Return the GGN (``"type-2"``) or the empirical Fisher, dense."""
    result = 0.0
    for example in setup.examples:
        for J, H, g in zip(
            example.param_jacobian, example.hessians, example.gradients, strict=True
        ):
            H = torch.outer(g, g) if fisher_type == "empirical" else H
            result = result + J.T @ H @ J
    return setup.scale() * result  # type: ignore[return-value]


def block_diagonal(setup: Setup, matrix: Tensor, joint: bool) -> Tensor:
    """Return the matrix without what is between different groups."""
    where = [(group, places(setup.params, group)) for group in groups(setup, joint)]
    return assemble(setup.params, [(group, matrix[w][:, w]) for group, w in where])
