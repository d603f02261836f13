"""What Kronecker-factored approximations share: their options, canonical form, and patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, EnumMeta
from math import prod
from typing import Any

import torch
from einconv import index_pattern
from einops import reduce
from torch import Size, Tensor

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, like
from curvlinops._rules import rule
from curvlinops._saving import saveable


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------
class _ContainsValues(EnumMeta):
    """Let ``"mc" in FisherType`` be true, and list the values for a wrong one."""

    def __contains__(cls, item: object) -> bool:
        return any(item in (member, member.value) for member in cls)  # type: ignore[var-annotated]


class _Option(str, Enum, metaclass=_ContainsValues):
    """An option with string values; plain strings work in its place."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        known = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"{value!r} is not a {cls.__name__}. Choose one of {known}.")

    def __str__(self) -> str:
        return str(self.value)


class FisherType(_Option):
    """Which vectors KFAC back-propagates for its gradient factors.

    - ``TYPE2``: the columns of the root of the loss's Hessian (the GGN);
    - ``MC``: gradients at targets sampled from the model's likelihood (its estimate);
    - ``EMPIRICAL``: gradients at the data's targets (the empirical Fisher);
    - ``FORWARD_ONLY``: none; the gradient factor is the identity (FOOF/ISAAC).
    """

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(_Option):
    """How KFAC treats positions that share weights (Eschenhagen et al., 2023).

    - ``EXPAND``: every position is an example of its own;
    - ``REDUCE``: inputs are averaged and output gradients summed over positions.
    """

    EXPAND = "expand"
    REDUCE = "reduce"


@dataclass(frozen=True)
class Precision:
    """In which precision, and where, Kronecker factors are computed, decomposed and stored.

    To invert KFAC in another precision, convert it: ``K.to(torch.float64).inverse(1e-8)``.

    Attributes:
        factors: The dtype in which products of inputs and of gradients are formed and added up.
            None: the model's, but at least float32.
        decompositions: The dtype in which EKFAC decomposes factors. None: that of the factors.
        storage: The dtype of the operator's tensors, and of the vectors that it multiplies. None:
            the model's.
        device: Where the operator's tensors are, for instance ``"cpu"`` for a model on a GPU. Each
            factor moves there when it is done. None: the model's.

    Example:
        >>> import torch
        >>> from curvlinops import EKFACLinearOperator, Precision
        >>> model = torch.nn.Linear(3, 2).to(torch.bfloat16)
        >>> data = [(torch.rand(4, 3).to(torch.bfloat16), torch.tensor([0, 1, 0, 1]))]
        >>> params = dict(model.named_parameters())
        >>> precision = Precision(decompositions=torch.float64, storage=torch.float32)
        >>> E = EKFACLinearOperator(
        ...     model, torch.nn.CrossEntropyLoss(), params, data, precision=precision
        ... )
        >>> E.dtype
        torch.float32
    """

    factors: torch.dtype | None = None
    decompositions: torch.dtype | None = None
    storage: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        """Refuse dtypes in which nothing can be decomposed."""
        for name in ("factors", "decompositions"):
            dtype = getattr(self, name)
            if dtype not in (None, torch.float32, torch.float64):
                raise ValueError(f"{name} must be torch.float32 or torch.float64, got {dtype}.")
        if self.storage is not None and not self.storage.is_floating_point:
            raise ValueError(f"storage must be a floating point dtype, got {self.storage}.")


# --------------------------------------------------------------------------------------------------
# Canonical form
# --------------------------------------------------------------------------------------------------
ParamGroup = dict[str, str]
"""Parameters treated together: role (``"W"``, ``"b"``) to parameter name."""

Layout = dict[str, list[int]]
"""How a weight is stored: ``view``, a shape to reshape it to, and ``order``, a permutation of
that shape's axes which brings those of the output first. ``None`` stands for ``[d_out, *d_in]``."""


class _CanonicalForm(PyTorchLinearOperator):
    """What the maps to and from the canonical form have in common."""

    _IS_PERMUTATION = True

    def __init__(
        self,
        param_shapes: Mapping[str, Sequence[int]],
        param_groups: Sequence[ParamGroup],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ):
        """Store the form; argument documentation is on the public classes."""
        self._shapes = {name: Size(shape) for name, shape in param_shapes.items()}
        self._groups = [dict(group) for group in param_groups]
        self._layouts = [None] * len(self._groups) if layouts is None else list(layouts)
        self._check()
        self._like = like(device, dtype)
        own = list(self._shapes.values())
        canonical = [
            Size([sum(prod(self._shapes[name]) for name in group.values())])
            for group in self._groups
        ]
        to_canonical = isinstance(self, ToCanonicalLinearOperator)
        super().__init__(*((own, canonical) if to_canonical else (canonical, own)))

    def _check(self) -> None:
        """Raise if the groups do not partition the parameters, or shapes do not fit."""
        grouped = [name for group in self._groups for name in group.values()]
        if sorted(grouped) != sorted(self._shapes):
            missing = sorted(set(self._shapes) - set(grouped))
            unknown = sorted(set(grouped) - set(self._shapes))
            repeated = sorted({name for name in grouped if grouped.count(name) > 1})
            raise RuntimeError(
                "The groups must contain every parameter exactly once. "
                f"Missing: {missing}. Unknown: {unknown}. Repeated: {repeated}."
            )
        if len(self._layouts) != len(self._groups):
            raise ValueError(
                f"{len(self._groups)} groups need as many layouts, got {len(self._layouts)}."
            )
        for group, layout in zip(self._groups, self._layouts, strict=True):
            if not group or set(group) - {"W", "b"}:
                raise ValueError(f"A group maps the roles 'W' and 'b' to names, got {group}.")
            if layout is not None and not self._fits(group, layout):
                raise ValueError(
                    f"The layout {layout} does not fit group {group}: 'view' must be a shape of as "
                    "many entries as the weight, and 'order' a permutation of its axes."
                )
            if set(group) == {"W", "b"} and not self._concatenated(group):
                rows, bias = self._rows(group, layout), self._shapes[group["b"]]
                if list(bias) != [rows]:
                    raise ValueError(
                        f"The bias {group['b']!r} of shape {list(bias)} does not fit the weight "
                        f"{group['W']!r} with {rows} output features: it must have shape [{rows}]."
                    )

    def _fits(self, group: ParamGroup, layout: Layout) -> bool:
        """Return whether a layout fits a group's weight."""
        view, order = layout["view"], layout["order"]
        permutes = sorted(order) == list(range(len(view)))
        return "W" in group and permutes and prod(view) == prod(self._shapes[group["W"]])

    def _state(self) -> dict[str, Any]:
        return {
            "param_shapes": self._shapes,
            "param_groups": self._groups,
            "layouts": self._layouts,
            "like": self._like,
        }

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        form = cls(state["param_shapes"], state["param_groups"], layouts=state["layouts"])
        form._like = state["like"]
        return form

    def _arguments(self) -> tuple[Any, ...]:
        return (self._shapes, self._groups, self.device, self.dtype, self._layouts)

    def _conjugate(self) -> PyTorchLinearOperator:
        return self

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        return self if self.dtype is None else self.to(self.dtype.to_real())

    def _concatenated(self, group: ParamGroup) -> bool:
        """Return whether a group is of tensors of the same shape, which are concatenated."""
        return len({self._shapes[name] for name in group.values()}) == 1

    def _rows(self, group: ParamGroup, layout: Layout | None) -> int:
        """Return d_out of a group with a weight."""
        if layout is None:
            return self._shapes[group["W"]][0]
        # the leading axes of the re-ordered weight, as many as make up a bias
        rows, size = 1, prod(self._shapes[group["b"]])
        for axis in layout["order"]:
            if rows >= size:
                break
            rows *= layout["view"][axis]
        return rows

    def _pack(self, group: ParamGroup, layout: Layout | None, tensors: dict[str, Tensor]) -> Tensor:
        """Return a group's canonical vector ``[d, K]``."""
        parts = [tensors[name] for role, name in sorted(group.items())]  # W before b
        columns = parts[0].shape[-1]
        if "W" in group and layout is not None:
            view, order = layout["view"], layout["order"]
            parts[0] = parts[0].reshape(*view, columns).permute(*order, len(order))
        if len(parts) == 2 and not self._concatenated(group):
            rows = self._rows(group, layout)
            parts = [part.reshape(rows, -1, columns) for part in parts]
            return torch.cat(parts, dim=1).reshape(-1, columns)
        return torch.cat([part.reshape(-1, columns) for part in parts])

    def _unpack(
        self, group: ParamGroup, layout: Layout | None, vector: Tensor
    ) -> dict[str, Tensor]:
        """Return a group's parameters from its canonical vector ``[d, K]``."""
        names = [name for _, name in sorted(group.items())]  # W before b
        columns = vector.shape[-1]
        sizes = [prod(self._shapes[name]) for name in names]
        if len(names) == 2 and not self._concatenated(group):
            rows = self._rows(group, layout)
            matrix = vector.reshape(rows, -1, columns)
            parts = list(matrix.split([size // rows for size in sizes], dim=1))
        else:
            parts = list(vector.split(sizes))
        if "W" in group and layout is not None:
            view, order = layout["view"], layout["order"]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            weight = parts[0].reshape(*(view[axis] for axis in order), columns)
            parts[0] = weight.permute(*inverse, len(order))
        return {
            name: part.reshape(*self._shapes[name], columns)
            for name, part in zip(names, parts, strict=True)
        }


@saveable
class ToCanonicalLinearOperator(_CanonicalForm):
    """The permutation from parameter space to the canonical form of groups of parameters.

    The canonical space has one flat vector for each group: the weight as matrix ``[d_out, d_in]``
    in row-major order, with the bias as last column in a joint group. One-dimensional parameters
    of a joint group are concatenated.

    Args:
        param_shapes: Parameter names and shapes, in the order of the parameter space.
        param_groups: The groups, dicts from role to name: ``{"W": ..., "b": ...}`` (joint),
            ``{"W": ...}`` or ``{"b": ...}``. They partition the parameters.
        device: The operator's device.
        dtype: The operator's dtype. Without device and dtype it multiplies tensors of any.
        layouts: How each group's weight is stored where it is not ``[d_out, *d_in]``: a dict of
            ``view`` (a shape to reshape the weight to) and ``order`` (the permutation of its
            axes that brings those of the output first).

    Raises:
        RuntimeError: If the groups do not partition the parameters.
        ValueError: If a bias does not fit its weight.

    Example:
        >>> import torch
        >>> from curvlinops import ToCanonicalLinearOperator
        >>> shapes = {"bias": (2,), "weight": (2, 3)}
        >>> P = ToCanonicalLinearOperator(shapes, [{"W": "weight", "b": "bias"}])
        >>> P @ torch.tensor([10.0, 20, 1, 2, 3, 4, 5, 6])
        tensor([ 1.,  2.,  3., 10.,  4.,  5.,  6., 20.])
    """

    @property
    def _in_names(self) -> list[str] | None:
        return list(self._shapes)

    def _matmat(self, X: Columns) -> Columns:
        tensors = dict(zip(self._shapes, X, strict=True))
        pairs = zip(self._groups, self._layouts, strict=True)
        return [self._pack(group, layout, tensors) for group, layout in pairs]

    def _adjoint(self) -> FromCanonicalLinearOperator:
        return FromCanonicalLinearOperator(*self._arguments())

    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return the inverse, which is the adjoint."""
        return self.adjoint() if damping == 0 else super().inverse(damping, **strategy)


@saveable
class FromCanonicalLinearOperator(_CanonicalForm):
    """The permutation from the canonical form to parameter space.

    Adjoint and inverse of :class:`ToCanonicalLinearOperator`, with the same arguments.
    """

    @property
    def _out_names(self) -> list[str] | None:
        return list(self._shapes)

    def _matmat(self, X: Columns) -> Columns:
        tensors: dict[str, Tensor] = {}
        for group, layout, vector in zip(self._groups, self._layouts, X, strict=True):
            tensors.update(self._unpack(group, layout, vector))
        return [tensors[name] for name in self._shapes]

    def _adjoint(self) -> ToCanonicalLinearOperator:
        return ToCanonicalLinearOperator(*self._arguments())

    def inverse(self, damping: Any = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return the inverse, which is the adjoint."""
        return self.adjoint() if damping == 0 else super().inverse(damping, **strategy)


def _cancel(left: _CanonicalForm, right: _CanonicalForm) -> PyTorchLinearOperator:
    """A map and its inverse cancel."""
    same_order = list(left._shapes.items()) == list(right._shapes.items())
    same_groups = (left._groups, left._layouts) == (right._groups, right._layouts)
    if not (same_order and same_groups):
        return NotImplemented
    identity = IdentityLinearOperator(right.in_shape, right.device, right.dtype)
    identity._names = right._in_names
    return identity


rule("matmul", FromCanonicalLinearOperator, ToCanonicalLinearOperator)(_cancel)
rule("matmul", ToCanonicalLinearOperator, FromCanonicalLinearOperator)(_cancel)


# --------------------------------------------------------------------------------------------------
# Patches of two-dimensional convolutions
# --------------------------------------------------------------------------------------------------
def extract_patches(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the patches that a 2-d convolution multiplies with its kernel, averaged over groups.

    Args:
        x: Input of the convolution ``[B, C_in, I₁, I₂]``.
        kernel_size: Kernel size, as in ``torch.nn.Conv2d``.
        stride: Stride.
        padding: Padding, an integer or pair, ``"valid"`` or ``"same"``.
        dilation: Dilation.
        groups: Number of channel groups, over which patches are averaged.

    Returns:
        Patches ``[B, O₁O₂, C_in / groups · K₁K₂]``.

    Raises:
        NotImplementedError: If ``padding="same"`` would pad both sides differently.
    """
    x = _average_groups(x, groups)
    patterns = _index_patterns(x, kernel_size, stride, padding, dilation)  # [K_i, O_i, I_i]
    # one axis after the other: the first contraction has the smaller result
    patches = torch.einsum("bcij, koi -> bckoj", x, patterns[0])
    patches = torch.einsum("bckoj, lpj -> bopckl", patches, patterns[1])
    return patches.flatten(3).flatten(1, 2)


def extract_averaged_patches(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the mean of :func:`extract_patches` over output positions, without forming patches.

    The arguments are those of :func:`extract_patches`.

    Returns:
        Averaged patches ``[B, C_in / groups · K₁K₂]``.

    Raises:
        NotImplementedError: If ``padding="same"`` would pad both sides differently.
    """
    x = _average_groups(x, groups)
    patterns = _index_patterns(x, kernel_size, stride, padding, dilation)  # [K_i, O_i, I_i]
    first, second = (pattern.mean(dim=1) for pattern in patterns)  # [K_i, I_i]
    rows = torch.einsum("bcij, ki -> bckj", x, first)
    return torch.einsum("bckj, lj -> bckl", rows, second).flatten(1)


def _average_groups(x: Tensor, groups: int) -> Tensor:
    """Average channel groups, ``[B, groups * C, I₁, I₂]`` to ``[B, C, I₁, I₂]``."""
    return x if groups == 1 else reduce(x, "b (g c) h w -> b c h w", "mean", g=groups)


def _pair(value: Any) -> list[Any]:
    return [value, value] if isinstance(value, (int, str)) else list(value)


def _index_patterns(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> list[Tensor]:
    """Return each axis's tensor ``[K, O, I]``: 1 where input meets kernel at the output, else 0."""
    sizes, strides, paddings, dilations = map(_pair, (kernel_size, stride, padding, dilation))
    for size, dilated, pad in zip(sizes, dilations, paddings, strict=True):
        if pad == "same" and (dilated * (size - 1)) % 2:
            raise NotImplementedError(
                "Patches with padding='same' that differs between both sides (an odd "
                f"dilation * (kernel_size - 1) = {dilated * (size - 1)}) are not supported: pad "
                "the input with torch.nn.functional.pad and use padding=0."
            )
    axes = zip(x.shape[2:], sizes, strides, paddings, dilations, strict=True)
    return [
        index_pattern(i, k, stride=s, padding=p, dilation=d, dtype=x.dtype, device=x.device)
        for i, k, s, p, d in axes
    ]
