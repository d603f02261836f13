"""KFAC's blocks for every layer from their definition: slow, in loops, one example after the other.

Nothing here is shared with the package. Each use of a layer is written as ``y = W a`` with the
canonical weight W and one row a for each sharing position, built by indexing; norm layers as
``y = w * x_hat + b``. That this is what the layer computes is asserted each time. Derivatives come
from autograd, one entry of the prediction at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from kfac_reference import Groups, Setup, _entries, _targets, summed
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

UNLIMITED = 10**9
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)


# ---- what is known of an example -----------------------------------------------------------------
@dataclass
class Usage:
    """One use of a weight and/or bias in the model.

    Attributes:
        form: How the weight becomes the canonical matrix: ``"rows"`` (it is that matrix),
            ``"columns"`` (its transpose), ``"transposed"`` (transposed convolution), or ``"norm"``
            (there is no matrix).
        weight: Name of the weight.
        bias: Name of the bias.
        inputs: For each convolution group its inputs ``[S, d_in]``, or ``[x_hat]`` of a norm layer.
        width: Number of output features d_out.
        weight_start: The first row of the canonical weight that is used.
        bias_start: The first entry of the bias that is used.
        axis: The axis of output features, from behind.
        shift: Zeros that are added to the output.
        jacobian: The derivatives ``[R, C, S, d_out]`` by the output.
    """

    form: str
    weight: str
    bias: str | None
    inputs: list[Tensor]
    width: int
    weight_start: int = 0
    bias_start: int = 0
    axis: int = -1
    shift: Tensor | None = None
    jacobian: Tensor = field(default_factory=lambda: torch.empty(0))

    def rows(self) -> list[tuple[int, int]]:
        """Return which rows of the canonical weight each of the inputs is multiplied with."""
        each = self.width // len(self.inputs)
        starts = [self.weight_start + i * each for i in range(len(self.inputs))]
        return [(start, start + each) for start in starts]


@dataclass
class LayerExample:
    """One example's usages, loss terms and derivatives.

    Attributes:
        usages: All usages. Each layer has one more without any position.
        param_jacobian: The derivatives ``[R, C, D]`` by all parameters.
        F: Predictions ``[R, C]``.
        targets: Targets ``[R]`` or ``[R, C]``.
        hessians: Loss Hessians ``[R, C, C]``.
        gradients: Loss gradients ``[R, C]``.
        prediction: The model's prediction as it returns it, with all replaced layers.
    """

    usages: list[Usage]
    param_jacobian: Tensor
    F: Tensor
    targets: Tensor
    hessians: Tensor
    gradients: Tensor
    prediction: Tensor


def layer_examples(setup: Setup) -> list[LayerExample]:
    """Return what happens for each example; computed once."""
    if "layer_examples" not in setup.__dict__:
        setup.__dict__["layer_examples"] = [
            _differentiate(setup, X, y) for X, y in setup._single_examples()
        ]
    return setup.__dict__["layer_examples"]


def scale(setup: Setup) -> float:
    """Return c: what PyTorch's reduction divides the sum over all loss terms by."""
    predictions = torch.cat([example.F for example in layer_examples(setup)])
    y = torch.cat([example.targets for example in layer_examples(setup)])
    return (setup.loss(predictions, y) / summed(setup.loss)(predictions, y)).item()


def canonical(form: str, weight: Tensor, groups: int = 1) -> Tensor:
    """Return a weight as canonical matrix ``[d_out, d_in]``."""
    if form == "columns":
        return weight.T
    if form == "transposed":  # [C_in, C_out / g, *K] -> [g, C_in / g, C_out / g, K]
        parts = weight.reshape(groups, -1, *weight.shape[1:]).flatten(3).transpose(1, 2)
        return parts.reshape(groups * weight.shape[1], -1)
    return weight.reshape(weight.shape[0], -1)


def _differentiate(setup: Setup, X: Any, y: Tensor) -> LayerExample:
    """Evaluate everything that is needed of one example."""
    recorder = _Recorder(setup)
    f = recorder.model(X)
    called = list(recorder.usages)
    entries = _entries(setup.loss, f.shape)
    leaves = [usage.shift for usage in called] + [recorder.leaves[name] for name in setup.params]
    by_leaf = _jacobians(f, entries, leaves)
    by_parameter = by_leaf[len(called) :]
    for usage, J in zip(called, by_leaf, strict=False):
        usage.jacobian = _by_position(J, usage.axis, usage.width, 2)
    absent = [usage for layer in recorder.model.modules() for usage in recorder.absent(layer)]
    for usage in absent:
        usage.jacobian = f.new_zeros(len(entries), len(entries[0]), 0, usage.width)
    flat = f.detach().flatten()
    full, gradient = _loss_derivatives(setup.loss, f, y, entries)
    return LayerExample(
        usages=[*called, *absent],
        param_jacobian=torch.cat([J.flatten(2) for J in by_parameter], dim=2),
        F=torch.stack([flat[term] for term in entries]),
        targets=_targets(setup.loss, f, y, entries),
        hessians=torch.stack([full[term][:, term] for term in entries]),
        gradients=torch.stack([gradient[term] for term in entries]),
        prediction=f.detach(),
    )


def _jacobians(f: Tensor, entries: list[list[int]], leaves: list[Any]) -> list[Tensor]:
    """Return the derivatives ``[R, C, *shape]`` by each leaf."""
    flat = f.flatten()
    terms = [
        [
            torch.autograd.grad(flat[e], leaves, retain_graph=True, materialize_grads=True)
            for e in term
        ]
        for term in entries
    ]
    return [
        torch.stack([torch.stack([gradients[i] for gradients in term]) for term in terms])
        for i in range(len(leaves))
    ]


def _loss_derivatives(
    loss: nn.Module, f: Tensor, y: Tensor, entries: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return Hessian and gradient of the summed loss by the flat prediction."""

    def value(flat: Tensor) -> Tensor:
        return summed(loss)(flat.reshape(f.shape), y)

    full = hessian(value, f.detach().flatten())
    remainder = full.clone()
    for term in entries:
        remainder[torch.tensor(term).unsqueeze(1), term] = 0
    assert not remainder.any(), "loss terms of one example must be independent"
    return full, jacobian(value, f.detach().flatten())


def _by_position(t: Tensor, axis: int, width: int, lead: int = 0) -> Tensor:
    """Bring what has an output's shape behind ``lead`` axes to ``[..., S, d_out]``."""
    return t.movedim(axis, -1).reshape(*t.shape[:lead], -1, width)


# ---- layers as explicit functions ----------------------------------------------------------------
class _Recorder:
    """A copy of a model whose layers record what they do."""

    def __init__(self, setup: Setup):
        self.usages: list[Usage] = []
        self.model = copy.deepcopy(setup.model)
        self.leaves = self._install(setup)
        self.names = {id(leaf): name for name, leaf in self.leaves.items()}
        for layer in self.model.modules():
            self._listen(layer)

    def _install(self, setup: Setup) -> dict[str, Tensor]:
        """Replace the parameters by leaves of the graph; return them by name."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        names = {id(p): name for name, p in own.items()}
        names |= {id(own[name]): name for name in setup.params}  # a tied parameter has two names
        leaves = {
            name: setup.params.get(name, own[name]).detach().clone().requires_grad_()
            for name in names.values()
        }
        for module in self.model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = leaves[names[id(p)]]  # type: ignore[assignment]
        return leaves

    def _listen(self, layer: nn.Module) -> None:
        """Replace the forward pass of a layer."""
        if getattr(layer, "linear", None) is F.linear:
            layer.linear = self._functional
        if isinstance(layer, nn.MultiheadAttention):
            layer.forward = lambda *args, **kwargs: self._attention(layer, *args, **kwargs)
        elif _form(layer) is not None:
            layer.forward = lambda *args, **kwargs: self._layer(layer, *args, **kwargs)

    def _name(self, p: Tensor | None) -> str | None:
        """Return the name of a parameter."""
        return None if p is None else self.names[id(p)]

    def absent(self, layer: nn.Module) -> Iterator[Usage]:
        """Yield usages without positions, for layers that are not called."""
        if isinstance(layer, nn.MultiheadAttention):
            for weight, bias_start in _attention_weights(layer):
                inputs = [weight.new_zeros(0, weight.shape[1])]
                names = self.names[id(weight)], self._name(layer.in_proj_bias)
                yield Usage("rows", *names, inputs, len(weight), bias_start=bias_start)
        elif (form := _form(layer)) is not None:
            weight, groups = layer.weight, getattr(layer, "groups", 1)
            matrix = weight.reshape(-1, 1) if form == "norm" else canonical(form, weight, groups)
            columns = len(matrix) if form == "norm" else matrix.shape[1]
            inputs = [weight.new_zeros(0, columns)] * groups
            bias = self._name(getattr(layer, "bias", None))
            yield Usage(form, self.names[id(weight)], bias, inputs, len(matrix))

    def _record(self, usage: Usage, output: Tensor) -> Tensor:
        """Keep a usage, and let its output be differentiated by."""
        usage.shift = torch.zeros_like(output, requires_grad=True)
        self.usages.append(usage)
        return output + usage.shift

    def _layer(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate a layer with one weight and perhaps a bias."""
        output = type(layer).forward(layer, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        x = (args[0] if args else kwargs["input"]).detach().clone()
        form, bias = _form(layer), getattr(layer, "bias", None)
        axis, inputs = _explain(layer, x, output)
        if form == "norm":
            width = layer.weight.numel()
            expected = inputs[0] * layer.weight.flatten() + (0 if bias is None else bias.flatten())
        else:
            matrix = canonical(form, layer.weight, len(inputs))
            width = len(matrix)
            expected = _multiply(inputs, matrix, bias)
        torch.testing.assert_close(_by_position(output, axis, width), expected, **EXACT)
        if getattr(layer, "padding_idx", None) is not None:
            inputs[0][:, layer.padding_idx] = 0  # that row is a constant
        names = self.names[id(layer.weight)], self._name(bias)
        return self._record(Usage(form, *names, inputs, width, axis=axis), output)

    def _functional(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Evaluate ``torch.nn.functional.linear``."""
        if id(weight) not in self.names or not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        return self._linear(x, weight, bias)

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: slice = slice(None),
        bias_rows: slice = slice(None),
    ) -> Tensor:
        """Multiply with some rows of a weight, and add some entries of a bias."""
        output = F.linear(x, weight[rows], None if bias is None else bias[bias_rows])
        inputs = [x.detach().clone().reshape(-1, x.shape[-1])]
        names = self.names[id(weight)], self._name(bias)
        starts = rows.start or 0, bias_rows.start or 0
        return self._record(Usage("rows", *names, inputs, output.shape[-1], *starts), output)

    def _attention(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate ``torch.nn.MultiheadAttention`` with Linears."""
        own = nn.MultiheadAttention.forward(layer, query, key, value, *args, **kwargs)
        if not torch.is_grad_enabled():
            return own
        q, k, v = self._in_projection(layer, query, key, value)
        batched = query.ndim == 3
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        elif not layer.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        names = ("key_padding_mask", "need_weights", "attn_mask")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        heads = _attend(layer, q, k, v, options.get("key_padding_mask"), options.get("attn_mask"))
        if not batched:
            heads = heads.squeeze(0)
        elif not layer.batch_first:
            heads = heads.transpose(0, 1)
        output = self._linear(heads, layer.out_proj.weight, layer.out_proj.bias)
        torch.testing.assert_close(output, own[0], **EXACT)
        return output, own[1]

    def _in_projection(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projected query, key and value."""
        E, bias = layer.embed_dim, layer.in_proj_bias
        thirds = [slice(i * E, (i + 1) * E) for i in range(3)]
        if layer.in_proj_weight is None:
            weights = [weight for weight, _ in _attention_weights(layer)]
            each = zip((query, key, value), weights, thirds, strict=True)
            return tuple(self._linear(x, W, bias, bias_rows=rows) for x, W, rows in each)
        weight = layer.in_proj_weight
        if query is key and key is value:
            return self._linear(query, weight, bias).chunk(3, dim=-1)
        if key is value:
            q = self._linear(query, weight, bias, thirds[0], thirds[0])
            rest = slice(E, 3 * E)
            return q, *self._linear(key, weight, bias, rest, rest).chunk(2, dim=-1)
        each = zip((query, key, value), thirds, strict=True)
        return tuple(self._linear(x, weight, bias, rows, rows) for x, rows in each)


EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _form(layer: nn.Module) -> str | None:
    """Return how a layer's weight becomes canonical; ``None`` for other modules."""
    if getattr(layer, "weight", None) is None:
        return None
    if isinstance(layer, NORMS):
        return "norm"
    if isinstance(layer, _ConvTransposeNd):
        return "transposed"
    if isinstance(layer, (nn.Linear, _ConvNd)):
        return "rows"
    return "columns" if isinstance(layer, nn.Embedding) or _is_conv1d(layer) else None


def _is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is the Conv1D of transformers."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _attention_weights(layer: Any) -> list[tuple[Tensor, int]]:
    """Return the weights of the input projection, and where in the bias they begin."""
    if layer.in_proj_weight is not None:
        return [(layer.in_proj_weight, 0)]
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    return [(weight, i * layer.embed_dim) for i, weight in enumerate(weights)]


def _attend(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return the concatenated heads ``[N, L, E]`` of projected ``[N, L or S, E]``."""
    n, length, E = q.shape
    heads = layer.num_heads
    q, k, v = (t.reshape(n, t.shape[1], heads, E // heads).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / (E // heads) ** 0.5  # [N, heads, L, S]
    if mask is not None:
        mask = mask.reshape(n, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        scores = _masked(scores, mask)
    if ignored is not None:
        scores = _masked(scores, ignored.reshape(n, 1, 1, -1))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(n, length, E)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask, in which True or -inf means "not this one"."""
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _multiply(inputs: list[Tensor], matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[S, d_out]``: each group's inputs times its rows of the canonical weight."""
    parts = zip(inputs, matrix.chunk(len(inputs)), strict=True)
    output = torch.cat([a @ W.T for a, W in parts], dim=1)
    return output if bias is None else output + bias


def _explain(layer: Any, x: Tensor, output: Tensor) -> tuple[int, list[Tensor]]:
    """Return the axis of a layer's output features, and its inputs ``[S, d_in]`` per group."""
    if isinstance(layer, nn.Embedding):
        rows = [[float(i == token) for i in range(layer.num_embeddings)] for token in x.flatten()]
        return -1, [output.new_tensor(rows)]
    if isinstance(layer, NORMS):
        return _explain_norm(layer, x)
    if not isinstance(layer, (_ConvNd, _ConvTransposeNd)):
        return -1, [x.reshape(-1, x.shape[-1])]
    axes = len(layer.kernel_size)
    images = x if x.ndim == axes + 2 else x.unsqueeze(0)
    sizes = output.shape[output.ndim - axes :]
    patches = _transposed_patches if isinstance(layer, _ConvTransposeNd) else _patches
    by_image = [patches(layer, image, sizes) for image in images]
    return -axes - 1, [torch.cat(parts) for parts in zip(*by_image, strict=True)]


def _explain_norm(layer: Any, x: Tensor) -> tuple[int, list[Tensor]]:
    """Return the axis of features, and the normalised input ``[S, d]``."""
    if isinstance(layer, _BatchNorm):
        columns = x.movedim(1, -1)
        x_hat = (columns - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
        return 1 - x.ndim, [x_hat.reshape(-1, layer.num_features)]
    if isinstance(layer, nn.GroupNorm):
        parts = x.reshape(x.shape[0], layer.num_groups, -1)
        x_hat = _standardised(parts, layer.eps).reshape(x.shape).movedim(1, -1)
        return 1 - x.ndim, [x_hat.reshape(-1, layer.num_channels)]
    rows = x.reshape(-1, layer.weight.numel())
    if isinstance(layer, nn.LayerNorm):
        return -1, [_standardised(rows, layer.eps)]
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    return -1, [rows / ((rows**2).mean(-1, keepdim=True) + eps).sqrt()]


def _standardised(rows: Tensor, eps: float) -> Tensor:
    """Return rows (last axis) with mean 0 and variance 1."""
    centered = rows - rows.mean(-1, keepdim=True)
    return centered / ((centered**2).mean(-1, keepdim=True) + eps).sqrt()


def _patches(layer: Any, image: Tensor, sizes: torch.Size) -> list[Tensor]:
    """Return the patches ``[S, C_in / g · K]`` of one image ``[C_in, *I]`` for each group."""
    before = [_padding(layer, axis) for axis in range(len(sizes))]

    def entry(channel: Tensor, position: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
        axes = zip(position, layer.stride, offset, layer.dilation, before, strict=True)
        return _pixel(channel, [p * s + k * d - b for p, s, k, d, b in axes], layer.padding_mode)

    return _rows_of_entries(layer, image, sizes, entry)


def _transposed_patches(layer: Any, image: Tensor, sizes: torch.Size) -> list[Tensor]:
    """Return the inputs ``[S, C_in / g · K]`` of the output pixels for each group."""

    def entry(channel: Tensor, position: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
        place = []
        axes = zip(position, layer.stride, offset, layer.dilation, layer.padding, strict=True)
        for axis, (p, stride, k, dilation, padding) in enumerate(axes):
            solutions = [
                q for q in range(channel.shape[axis]) if p == stride * q + dilation * k - padding
            ]
            if not solutions:
                return channel.new_zeros(())
            place += solutions
        return channel[tuple(place)]

    return _rows_of_entries(layer, image, sizes, entry)


def _rows_of_entries(
    layer: Any, image: Tensor, sizes: torch.Size, entry: Callable[..., Tensor]
) -> list[Tensor]:
    """Collect each group's entries ``[S, C_in / g · K]`` in natural order."""
    offsets = list(itertools.product(*map(range, layer.kernel_size)))
    positions = list(itertools.product(*map(range, sizes)))
    return [
        torch.stack(
            [
                torch.stack([entry(channel, p, k) for channel in channels for k in offsets])
                for p in positions
            ]
        )
        for channels in image.chunk(layer.groups)
    ]


def _padding(layer: Any, axis: int) -> int:
    """Return how many pixels a convolution adds before the first."""
    if layer.padding == "same":
        return layer.dilation[axis] * (layer.kernel_size[axis] - 1) // 2
    return 0 if layer.padding == "valid" else layer.padding[axis]


def _pixel(channel: Tensor, place: list[int], mode: str) -> Tensor:
    """Look a pixel of ``[*I]`` up that may be in the padding."""
    for axis, size in enumerate(channel.shape):
        index = place[axis]
        if mode == "circular":
            place[axis] = index % size
        elif mode == "reflect":
            place[axis] = size - 1 - abs(size - 1 - abs(index))
        elif mode == "replicate":
            place[axis] = min(max(index, 0), size - 1)
        elif not 0 <= index < size:
            return channel.new_zeros(())
    return channel[tuple(place)]


# ---- groups --------------------------------------------------------------------------------------
def layer_groups(setup: Setup, joint: bool) -> Groups:
    """Return the groups of parameters, ordered by their first parameter."""
    result: Groups = []
    for name in setup.params:
        if any(name in group.values() for group in result):
            continue
        role = "W" if any(usage.weight == name for usage in _usages(setup)) else "b"
        group = {role: name}
        if joint and (partner := _partner(setup, name)) is not None:
            group["b" if role == "W" else "W"] = partner
        result.append(dict(sorted(group.items())))
    return result


def _usages(setup: Setup) -> list[Usage]:
    """Return the usages of all examples."""
    return [usage for example in layer_examples(setup) for usage in example.usages]


def _partner(setup: Setup, name: str) -> str | None:
    """Return the trained parameter that shares a joint group with another."""
    partners = set()
    for usage in _usages(setup):
        pair = {usage.weight, usage.bias}
        if name in pair and None not in pair and _fit(setup, usage):
            partners |= pair - {name}
    partners &= set(setup.params)
    if len(partners) > 1:
        raise ValueError(f"conflicting biases: {name!r} with {sorted(map(str, partners))}")
    return partners.pop() if partners else None


def _fit(setup: Setup, usage: Usage) -> bool:
    """Return whether weight and bias of a usage have the same rows."""
    tensors = dict(setup.model.named_parameters(remove_duplicate=False))
    weight, bias = tensors[usage.weight], tensors[usage.bias]
    if usage.form == "norm":
        return weight.shape == bias.shape
    return len(canonical(usage.form, weight, len(usage.inputs))) == bias.numel()


def _of_group(usages: list[Usage], group: dict[str, str]) -> list[Usage]:
    """Return the usages of a group's weight, or of its bias if it has only that."""
    if "W" in group:
        return [usage for usage in usages if usage.weight == group["W"]]
    return [usage for usage in usages if usage.bias == group["b"]]


def _is_tied(usages: list[Usage]) -> bool:
    """Return whether a weight is that of an embedding and of a Linear."""
    return {usage.form for usage in usages} == {"rows", "columns"}


def layer_places(setup: Setup, group: dict[str, str]) -> Tensor:
    """Return where the entries of a group's canonical vector are in the parameter vector."""
    numbers, start = {}, 0
    for name, p in setup.params.items():
        numbers[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    usages = _of_group(_usages(setup), group)
    if "W" not in group or usages[0].form == "norm":
        return torch.cat([numbers[name].flatten() for _, name in sorted(group.items())])
    form = "rows" if _is_tied(usages) else usages[0].form
    matrix = canonical(form, numbers[group["W"]], len(usages[0].inputs))
    if "b" in group:
        matrix = torch.cat([matrix, numbers[group["b"]].reshape(-1, 1)], dim=1)
    return matrix.flatten()


# ---- blocks --------------------------------------------------------------------------------------
Part = tuple[Tensor, "Tensor | None"]


@dataclass
class Block:
    """The approximation of one group's block.

    Attributes:
        group: Role (``"W"``, ``"b"``) to name.
        parts: Gradient factor and input factor of each convolution group or row slice; norm layers
            and biases alone have one matrix and no input factor.
        dense: The block ``[D, D]`` in canonical coordinates.
        places: Where the canonical coordinates are in the parameter vector, ``[D]``.
    """

    group: dict[str, str]
    parts: list[Part]
    dense: Tensor
    places: Tensor


@dataclass(frozen=True)
class _Options:
    """What a block depends on, besides the problem."""

    fisher_type: str
    approx: str
    vectors: Any
    max_factor_size: int

    def clip(self, factor: Tensor) -> Tensor:
        """Keep only the diagonal of a wide factor."""
        return factor.diag().diag() if len(factor) > self.max_factor_size else factor


def reference_blocks(
    setup: Setup,
    joint: bool,
    fisher_type: str,
    approx: str,
    vectors: Any = None,
    max_factor_size: int = UNLIMITED,
) -> list[Block]:
    """Return the blocks of all groups.

    Args:
        setup: The model, loss and data.
        joint: Whether weight and bias of a layer are one group.
        fisher_type: ``"type-2"``, ``"empirical"``, ``"forward-only"``, or ``"given"``.
        approx: ``"expand"`` or ``"reduce"``.
        vectors: For ``"given"``: a list of vectors ``[R, C]`` for each example. All loss terms of
            an example are back-propagated together. Otherwise they are kept apart.
        max_factor_size: Factors that are wider keep only their diagonal.
    """
    options = _Options(fisher_type, approx, vectors, max_factor_size)
    return [_block(setup, group, options) for group in layer_groups(setup, joint)]


def _block(setup: Setup, group: dict[str, str], options: _Options) -> Block:
    """Return the block of one group."""
    usages, places = _of_group(_usages(setup), group), layer_places(setup, group)
    if usages[0].form == "norm":
        parts: list[Part] = [(options.clip(_norm_matrix(setup, group, options)), None)]
    elif "W" in group and _is_tied(usages):
        parts = [_tied_factors(setup, group, options)]
    else:
        forms = {usage.form for usage in usages}
        ranges = _ranges(group, usages)
        columns = len(places) // ranges[-1][1]
        parts = [_factors(setup, group, rows, columns, forms, options) for rows in ranges]
    return Block(group, parts, torch.block_diag(*map(_dense, parts)), places)


def _dense(part: Part) -> Tensor:
    """Return the Kronecker product of two factors."""
    B, A = part
    return B if A is None else torch.kron(B, A)


def _ranges(group: dict[str, str], usages: list[Usage]) -> list[tuple[int, int]]:
    """Return the rows that belong together: those between any two ends of what is used."""
    cuts = set()
    for usage in usages:
        start = usage.bias_start
        for rows in usage.rows() if "W" in group else [(start, start + usage.width)]:
            cuts.update(rows)
    return list(itertools.pairwise(sorted(cuts)))


def _positions(
    example: LayerExample, group: dict[str, str], rows: tuple[int, int], forms: set[str]
) -> tuple[Tensor | None, Tensor] | None:
    """Return inputs ``[S, d_in (+ 1)]`` and derivatives ``[R, C, S, d_out]`` of some rows.

    The positions are those of all usages; ``None`` if there are none.
    """
    inputs, jacobians = [], []
    for usage in _of_group(example.usages, group):
        for start, a, J in _pieces(usage, group):
            if usage.form in forms and start <= rows[0] < rows[1] <= start + J.shape[-1]:
                inputs.append(a)
                jacobians.append(J[..., rows[0] - start : rows[1] - start])
    if not sum(map(len, inputs)):
        return None
    return torch.cat(inputs) if "W" in group else None, torch.cat(jacobians, dim=2)


def _pieces(usage: Usage, group: dict[str, str]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield first row, inputs ``[S, d_in (+ 1)]`` and derivatives ``[R, C, S, d_out]`` of a usage.

    Of a bias alone the inputs are ones.
    """
    ones = usage.jacobian.new_ones(usage.jacobian.shape[2], 1)  # [S, 1]
    if "W" not in group:
        yield usage.bias_start, ones, usage.jacobian
        return
    for (start, stop), a in zip(usage.rows(), usage.inputs, strict=True):
        if "b" in group:
            a = torch.cat([a, ones * float(usage.bias == group["b"])], dim=1)
        first = start - usage.weight_start
        yield start, a, usage.jacobian[..., first : first + stop - start]


def _factors(
    setup: Setup,
    group: dict[str, str],
    rows: tuple[int, int],
    columns: int,
    forms: set[str],
    options: _Options,
) -> Part:
    """Return gradient and input factor of some rows of a group."""
    height = rows[1] - rows[0]
    B = torch.zeros(height, height, dtype=torch.float64)
    A, count = torch.zeros(columns, columns, dtype=torch.float64), 0
    for index, example in enumerate(layer_examples(setup)):
        found = _positions(example, group, rows, forms)
        if found is None:
            continue
        a, J = found
        if options.approx == "reduce":
            a = None if a is None else a.mean(0, keepdim=True)
            J = J.sum(2, keepdim=True)
        B += _curvature(J, example, index, options)
        if a is not None:
            A += torch.einsum("si,sj->ij", a, a)
            count += len(a)
    one = torch.eye(height, dtype=torch.float64)
    B = one if options.fisher_type == "forward-only" else scale(setup) * B
    return options.clip(B), options.clip(A / max(count, 1)) if "W" in group else None


def _curvature(J: Tensor, example: LayerExample, index: int, options: _Options) -> Tensor:
    """Return ``sum_v sum_s g gᵀ`` with ``g = Jᵀ v``, of derivatives ``[R, C, S, d]``."""
    if options.fisher_type == "given":
        vectors = torch.stack(list(options.vectors[index]))  # [V, R, C]
        g = torch.einsum("rcsd,vrc->vsd", J, vectors)
        return torch.einsum("vsd,vse->de", g, g)
    if options.fisher_type == "empirical":
        g = torch.einsum("rcsd,rc->rsd", J, example.gradients)
        return torch.einsum("rsd,rse->de", g, g)
    return torch.einsum("rcsd,rck,rkse->de", J, example.hessians, J)


def _norm_matrix(setup: Setup, group: dict[str, str], options: _Options) -> Tensor:
    """Return the matrix of a norm layer's group, from sums over all positions and usages."""
    if options.fisher_type == "forward-only":
        return torch.eye(len(layer_places(setup, group)), dtype=torch.float64)
    return scale(setup) * sum(
        _curvature(_norm_derivatives(example, group).unsqueeze(2), example, index, options)
        for index, example in enumerate(layer_examples(setup))
    )


def _norm_derivatives(example: LayerExample, group: dict[str, str]) -> Tensor:
    """Return ``[R, C, d or 2 d]``: sums over positions of x_hat times derivative, and of it."""
    sums: dict[str, Tensor] = {}
    for usage in _of_group(example.usages, group):
        products = {usage.weight: usage.inputs[0] * usage.jacobian, usage.bias: usage.jacobian}
        for name in group.values():
            if name in products:
                sums[name] = sums.get(name, 0) + products[name].sum(2)
    return torch.cat([sums[name] for _, name in sorted(group.items())], dim=-1)


def _tied_factors(setup: Setup, group: dict[str, str], options: _Options) -> Part:
    """Return the factors of a weight that is that of a Linear and of an embedding."""
    height, width = setup.params[group["W"]].shape
    columns = width + ("b" in group)
    B, A = _factors(setup, group, (0, height), columns, {"rows"}, options)
    embedding = {"W": group["W"]}
    inner, outer = _factors(setup, embedding, (0, width), height, {"columns"}, options)
    inner = F.pad(inner, (0, columns - width) * 2)  # the bias is the Linear's alone
    B, outer = (options.clip(factor) for factor in (B, outer))
    A, inner = (options.clip(factor) for factor in (A, inner))
    return nearest_kronecker(torch.kron(B, A) + torch.kron(outer, inner), height, columns)


def nearest_kronecker(dense: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the Kronecker product that is nearest in Frobenius norm.

    They are determined up to a scalar; of equal norm here, with positive trace of the first.
    """
    entries = dense.reshape(d_out, d_in, d_out, d_in).transpose(1, 2)
    U, s, Vh = torch.linalg.svd(entries.reshape(d_out**2, d_in**2), full_matrices=False)
    sign = -1 if U[:, 0].reshape(d_out, d_out).trace() < 0 else 1
    B, A = sign * s[0].sqrt() * U[:, 0], sign * s[0].sqrt() * Vh[0]
    return B.reshape(d_out, d_out), A.reshape(d_in, d_in)


# ---- what is approximated ------------------------------------------------------------------------
def exact_block(
    setup: Setup, group: dict[str, str], fisher_type: str, vectors: Any = None
) -> Tensor:
    """Return a group's dense block of the matrix that is approximated, ``[D, D]``.

    Args:
        setup: The model, loss and data.
        group: The group, in whose canonical coordinates the block is.
        fisher_type: ``"type-2"`` (the GGN), ``"empirical"`` (the empirical Fisher) or ``"given"``.
        vectors: For ``"given"``, as in :func:`reference_blocks`.
    """
    if fisher_type == "forward-only":
        raise ValueError("forward-only approximates no matrix")
    options = _Options(fisher_type, "", vectors, UNLIMITED)
    places = layer_places(setup, group)
    return scale(setup) * sum(
        _curvature(example.param_jacobian[..., places].unsqueeze(2), example, index, options)
        for index, example in enumerate(layer_examples(setup))
    )


def ekfac_eigenvalues(
    setup: Setup,
    block: Block,
    Q_g: list[Tensor],
    Q_a: list[Tensor | None],
    fisher_type: str,
    vectors: Any = None,
) -> list[Tensor]:
    """Return each part's EKFAC eigenvalues in given bases of its factors.

    Args:
        setup: The model, loss and data.
        block: A group's block.
        Q_g: Each part's eigenvectors of the gradient factor, as columns.
        Q_a: Each part's eigenvectors of the input factor, or ``None`` where it has none.
        fisher_type: As in :func:`exact_block`.
        vectors: As in :func:`exact_block`.

    Returns:
        For each part the diagonal ``[d_out, d_in]`` (``[d_out]`` without input factor) of the
        exact block in the basis ``kron(Q_g, Q_a)``.
    """
    exact, start, result = exact_block(setup, block.group, fisher_type, vectors), 0, []
    for left, right in zip(Q_g, Q_a, strict=True):
        Q = _dense((left, right))
        own = exact[start : start + len(Q), start : start + len(Q)]
        shape = (len(left),) if right is None else (len(left), len(right))
        result.append((Q.T @ own @ Q).diag().reshape(shape))
        start += len(Q)
    assert start == len(exact)
    return result


def without_coupling(block: Block, matrix: Tensor) -> Tensor:
    """Return a matrix like a block without what is between its parts."""
    keep = torch.block_diag(*(torch.ones_like(_dense(part)) for part in block.parts))
    return matrix * keep


def assemble_blocks(setup: Setup, blocks: list[Block]) -> Tensor:
    """Return the dense matrix of all parameters from its blocks."""
    total = sum(p.numel() for p in setup.params.values())
    matrix = torch.zeros(total, total, dtype=torch.float64)
    for block in blocks:
        matrix[block.places.unsqueeze(1), block.places] = block.dense
    return matrix


def usage_gradients(setup: Setup, group: dict[str, str]) -> list[Tensor]:
    """Return for each example ``[R, C, D]``: the sum of what all usages add to the derivative."""
    usages = _of_group(_usages(setup), group)
    if usages[0].form == "norm":
        return [_norm_derivatives(example, group) for example in layer_examples(setup)]
    tied = "W" in group and _is_tied(usages)
    total = len(layer_places(setup, group))
    return [_summed_products(example, group, tied, total) for example in layer_examples(setup)]


def _summed_products(
    example: LayerExample, group: dict[str, str], tied: bool, total: int
) -> Tensor:
    """Return ``[R, C, D]`` of one example: ``sum_s g aᵀ`` of all usages in canonical form."""
    result = example.F.new_zeros(*example.F.shape, total)
    for usage in _of_group(example.usages, group):
        turned = tied and usage.form == "columns"
        own = {"W": group["W"]} if turned else group
        for start, a, J in _pieces(usage, own):
            product = torch.einsum("rcso,si->rcoi", J, a)
            if turned:  # the bias is the Linear's alone
                product = F.pad(product.mT, (0, "b" in group))
            first = start * product.shape[-1]
            result[..., first : first + product[0, 0].numel()] += product.flatten(2)
    return result
