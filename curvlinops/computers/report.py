"""What a Kronecker-factored operator tells about itself, and checks of its factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from curvlinops import _tensors
from curvlinops._operator import PyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers.attested import is_attested
from curvlinops.computers.plan import GroupPlan
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.sharded import RemoteBlock

# How far an entry may be off, relative to the root of the product of its two diagonal entries: even
# products of float32 may be those of bfloat16, see torch.set_float32_matmul_precision.
_SLACK = 2**-5
_MAX_STRIP = 2**16  # entries that are compared at once with their mirror images: they fit in caches
_CHECK_VALUES = "Check the data, the parameters and the loss for NaN, infinities and overflow."
_ORIGIN = (
    "Factors are sums of outer products: check layers and losses that were registered, and "
    "statistics of your own."
)


def check_finite(names: tuple[str, ...], inputs: Any, gradients: Any) -> None:
    """Raise if factors are not finite, symmetric or positive semi-definite.

    What is beyond rounding is found if entries ``(i, j)`` and ``(j, i)`` differ, or if one of the
    2 × 2 principal minors is negative: this costs O(d²), unlike the eigenvalues.

    Args:
        names: The names of the layer's parameters.
        inputs: The input factor: a matrix ``[d, d]``, a diagonal operator, or None.
        gradients: The gradient factor, as well.

    Raises:
        RuntimeError: If a factor is not. The message names the parameters.
    """
    for what, factor in (("input", inputs), ("gradient", gradients)):
        values = factor.diagonal() if isinstance(factor, DiagonalLinearOperator) else factor
        if isinstance(values, Tensor) and values.numel():
            _check_factor(f"The {factor_name(names, what)}", values)


def factor_name(names: tuple[str, ...], what: str) -> str:
    """Return what messages call the input or gradient factor of a layer's parameters."""
    return f"{what} factor of {_listing(names)}"


def _listing(names: tuple[str, ...]) -> str:
    """Return the names of parameters for messages."""
    return ", ".join(map(repr, names))


def _check_factor(name: str, values: Tensor) -> None:
    """Raise if a matrix ``[d, d]`` or diagonal ``[d]`` cannot be a factor."""
    if values.ndim == 2 and values.shape[0] != values.shape[1]:
        raise RuntimeError(f"{name} is not symmetric: its shape is {list(values.shape)}. {_ORIGIN}")
    diagonal = _tensors.widened(values if values.ndim == 1 else values.diagonal())
    size = len(diagonal)
    limits = torch.finfo(torch.float32)  # in which a float64 factor may have been computed
    underflow = limits.tiny / limits.eps + torch.finfo(values.dtype).tiny
    smallest, largest = torch.stack(diagonal.aminmax()).tolist()
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        _refuse_infinite(name, diagonal)
    rounding = 10 * size * limits.eps * max(largest, 0.0) + underflow
    if smallest < -rounding:
        raise RuntimeError(
            f"{name} is not positive semi-definite: its diagonal entry {int(diagonal.argmin())} is "
            f"{smallest:.3g}. {_ORIGIN}"
        )
    if values.ndim == 1 or is_attested(values):  # each entry is bounded by the diagonal then
        return
    scale = (diagonal.clamp(min=0) + rounding).rsqrt()  # which makes the diagonal (about) 1
    if not _looks_symmetric(values, scale):
        _check_symmetry(name, values, scale)
    _check_minors(name, values, scale)


def _refuse_infinite(name: str, values: Tensor) -> None:
    """Raise if a factor, or a part of it, has values that are not finite."""
    if not _tensors.all_finite(values):
        raise RuntimeError(f"{name} has non-finite values. {_CHECK_VALUES}")


def _strips(size: int) -> Iterator[tuple[slice, slice]]:
    """Yield a few rows at once, and the columns from their diagonal on."""
    height = max(_MAX_STRIP // size, 1)
    for start in range(0, size, height):
        yield slice(start, start + height), slice(start, None)


def _looks_symmetric(values: Tensor, scale: Tensor) -> bool:
    """Return whether rows and columns have the same products with irregular numbers.

    If so, a comparison of all entries is not worth its time: reading columns is slow.
    """
    numbers = torch.arange(len(scale), device=scale.device, dtype=scale.dtype)
    v = (scale * (1.5 + 0.5 * numbers.square().cos())).to(values.dtype)
    difference = (values @ v - values.mT @ v).to(scale.dtype) * scale
    return bool((difference.abs() <= _SLACK / 4).all())  # which NaN is not


def _check_symmetry(name: str, values: Tensor, scale: Tensor) -> None:
    """Raise if entries differ from their mirror images."""
    _refuse_infinite(name, values)
    for rows, columns in _strips(len(scale)):
        difference = _tensors.widened(values[rows, columns]) - values[columns, rows].mT
        place = _first_beyond(difference, scale[rows], scale[columns], _SLACK)
        if place:
            i, j = sorted(rows.start + index for index in place)
            raise RuntimeError(
                f"{name} is not symmetric: its entries {[i, j]} and {[j, i]} are "
                f"{values[i, j].item():.3g} and {values[j, i].item():.3g}. {_ORIGIN}"
            )


def _check_minors(name: str, values: Tensor, scale: Tensor) -> None:
    """Raise if a 2 × 2 principal minor of a symmetric matrix is negative."""
    largest = torch.empty_like(scale)
    for rows, columns in _strips(len(scale)):
        entries = _tensors.widened(values[rows, columns])
        torch.amax((entries * scale[columns]).abs_(), dim=1, out=largest[rows])
    if bool((largest * scale <= 1 + _SLACK).all()):  # which NaN is not
        return
    _refuse_infinite(name, values)
    for rows, columns in _strips(len(scale)):
        entries = _tensors.widened(values[rows, columns])
        place = _first_beyond(entries, scale[rows], scale[columns], 1 + _SLACK)
        if place:
            i, j = sorted(rows.start + index for index in place)
            raise RuntimeError(
                f"{name} is not positive semi-definite: its entry {[i, j]} is "
                f"{values[i, j].item():.3g}, more than its diagonal entries {i} and {j}, "
                f"{values[i, i].item():.3g} and {values[j, j].item():.3g}, allow. {_ORIGIN}"
            )


def _first_beyond(
    entries: Tensor, left: Tensor, right: Tensor, bound: float
) -> tuple[int, int] | None:
    """Return the place of the largest ``left_i |x_ij| right_j``, if it is not within a bound."""
    scaled = (entries * right).abs_()
    largest = scaled.amax(dim=1) * left
    if bool(largest.max() <= bound):  # which NaN is not
        return None
    row = int(largest.argmax())
    return row, int(scaled[row].argmax())


def check_spectrum(names: tuple[str, ...], what: str, values: Tensor) -> None:
    """Warn if a factor has negative eigenvalues beyond rounding, naming the layer's parameters.

    Args:
        names: The names of the layer's parameters.
        what: Which factor it is, ``"input"`` or ``"gradient"``.
        values: Its eigenvalues ``[d]``, ascending.
    """
    if not len(values):
        return
    eps = torch.finfo(torch.float32).eps  # in which a float64 factor may have been computed
    tolerance = 4 * torch.finfo(values.dtype).eps + max(eps**0.5, 10 * len(values) * eps)
    smallest, largest = values[0].item(), values[-1].item()
    if smallest < -tolerance * max(largest, 0.0) - torch.finfo(values.dtype).tiny:
        warn(
            f"The {factor_name(names, what)} is not positive semi-definite: its eigenvalues are "
            f"between {smallest:.3g} and {largest:.3g}. {_ORIGIN} Or compute it in a higher "
            "precision.",
            stacklevel=2,
        )


def check_eigenvalues(names: tuple[str, ...], values: Tensor) -> None:
    """Raise if eigenvalues are not finite, or negative beyond rounding.

    Args:
        names: The names of the layer's parameters.
        values: The eigenvalues, in any shape.

    Raises:
        RuntimeError: If they are. The message names the parameters.
    """
    if not values.numel():
        return
    if not _tensors.all_finite(values):
        raise RuntimeError(f"The eigenvalues of {_listing(names)} are not finite. {_CHECK_VALUES}")
    smallest, largest = (extreme.item() for extreme in values.aminmax())
    if smallest < -10 * torch.finfo(torch.float32).eps * max(largest, 0.0):
        raise RuntimeError(
            f"The eigenvalues of {_listing(names)} are between {smallest:.3g} and {largest:.3g}, "
            "but sums of squares are not negative. Check layers and losses that were registered, "
            "and statistics of your own."
        )


def describe_groups(
    plans: list[GroupPlan], model: nn.Module | None, counts_tokens: bool
) -> list[dict[str, Any]]:
    """Return plain data about each group, to be kept with the operator.

    Args:
        plans: The groups.
        model: The model, if it is a module.
        counts_tokens: Whether input factors of embeddings are diagonal by themselves.
    """
    names: dict[int, list[str]] = {}
    if model is not None:
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
    shared = {name: ids for ids in names.values() for name in ids}
    entries = []
    for plan in plans:
        owners = [n.rpartition(".")[0] for n in shared.get(plan.key[0], [])]
        entries.append(
            {
                "group": dict(plan.group),
                "type": plan.name,
                "layers": owners,
                "tied": bool(plan.tied),
                "diagonal": plan.diagonal,
                "tokens": counts_tokens and plan.format.is_embedding,
            }
        )
    return entries


def format_summary(report: dict[str, Any], blocks: list[Any]) -> str:
    """Return a table with one row for each group of parameters."""
    header = ("parameters", "layer", "block", "size", "remarks")
    rows = [header]
    for entry, block in zip(report["groups"], blocks, strict=True):
        rows.append(
            (
                " + ".join(entry["group"].values()),
                entry["type"],
                _describe_block(block),
                f"{block.shape[0]:,}",
                _remarks(entry, block),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    total = sum(block.shape[0] for block in blocks)
    options = ", ".join(f"{key}={value}" for key, value in report["options"].items())
    lines.append(f"{len(blocks)} blocks, {total:,} parameters; {options}")
    return "\n".join(line.rstrip() for line in lines)


def _describe_block(block: Any) -> str:
    """Return a block's factors as text."""
    if isinstance(block, RemoteBlock):
        return f"on rank(s) {', '.join(map(str, block.holders))}"
    if isinstance(block, BlockDiagonalLinearOperator):
        parts = [_describe_block(part) for part in block]
        kinds = dict.fromkeys(parts)
        return ", ".join(f"{parts.count(kind)} × ({kind})" for kind in kinds)
    if isinstance(block, DiagonalLinearOperator):
        return _kind(block)
    if isinstance(block, EighDecomposedLinearOperator):
        return " ⊗ ".join(
            f"{Q.shape[0]}×{Q.shape[1]}" if isinstance(Q, Tensor) else _kind(Q)
            for Q in block.eigenvectors  # type: ignore[union-attr]
        )
    return " ⊗ ".join(
        f"{factor.shape[0]}×{factor.shape[1]}" if isinstance(factor, Tensor) else _kind(factor)
        for factor in block
    )


def _factors(block: Any) -> list[Any]:
    """Return a block's Kronecker factors, or those of its eigenvectors."""
    factors: Any = block.eigenvectors if isinstance(block, EighDecomposedLinearOperator) else block
    return list(factors)


def _kind(factor: PyTorchLinearOperator) -> str:
    return f"diag({factor.shape[0]})"


def _remarks(entry: dict[str, Any], block: Any) -> str:
    """Return what is special about a group."""
    remarks = []
    if len(entry["layers"]) > 1:
        remarks.append(f"shared by {', '.join(entry['layers'])}")
    if entry["tied"]:
        remarks.append("nearest Kronecker product to the sum of both")
    parts = block if isinstance(block, BlockDiagonalLinearOperator) else [block]
    if entry["diagonal"]:
        remarks.append("no supported layer: exact diagonal")
    elif isinstance(block, RemoteBlock):
        pass
    elif any(not isinstance(factor, Tensor) for part in parts for factor in _factors(part)):
        tokens = entry["tokens"]
        remarks.append(
            "counts of tokens: diagonal" if tokens else "over-wide factor: diagonal only"
        )
    return "; ".join(remarks)
