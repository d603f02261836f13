"""What a Kronecker-factored operator tells about itself, and checks of its factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from curvlinops._operator import PyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers.plan import GroupPlan
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.sharded import RemoteBlock


def check_finite(names: tuple[str, ...], inputs: Any, gradients: Any) -> None:
    """Raise if factors have non-finite values, naming the layer's parameters."""
    for what, factor in (("input", inputs), ("gradient", gradients)):
        values = factor.diagonal() if isinstance(factor, DiagonalLinearOperator) else factor
        # the extremes are NaN if any value is, and need no memory
        if (
            isinstance(values, Tensor)
            and values.numel()
            and not all(bool(extreme.isfinite()) for extreme in values.aminmax())
        ):
            raise RuntimeError(
                f"The {what} factor of {', '.join(map(repr, names))} has non-finite values. Check "
                "the data, the parameters and the loss for NaN, infinities and overflow."
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
