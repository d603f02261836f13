"""What a Kronecker-factored operator tells about itself, and checks of its factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops.computers.plan import GroupPlan
from curvlinops.diag import DiagonalLinearOperator


def check_finite(names: tuple[str, ...], inputs: Any, gradients: Any) -> None:
    """Raise if factors have non-finite values, naming the layer's parameters."""
    for what, factor in (("input", inputs), ("gradient", gradients)):
        values = factor.diagonal() if isinstance(factor, DiagonalLinearOperator) else factor
        if isinstance(values, Tensor) and not bool(values.isfinite().all()):
            raise RuntimeError(
                f"The {what} factor of {', '.join(map(repr, names))} has non-finite values. Check "
                "the data, the parameters and the loss for NaN, infinities and overflow."
            )


def describe_groups(plans: list[GroupPlan]) -> list[dict[str, Any]]:
    """Return plain data about each group, to be kept with the operator."""
    return [
        {"group": dict(plan.group), "layers": list(plan.layers), "type": plan.rule.name}
        for plan in plans
    ]


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
    return " ⊗ ".join(
        f"{factor.shape[0]}×{factor.shape[1]}" if isinstance(factor, Tensor) else _kind(factor)
        for factor in block
    )


def _kind(factor: PyTorchLinearOperator) -> str:
    return f"diag({factor.shape[0]})"


def _remarks(entry: dict[str, Any], block: Any) -> str:
    """Return what is special about a group."""
    remarks = []
    if len(entry["layers"]) > 1:
        remarks.append(f"shared by {', '.join(entry['layers'])}")
    if any(isinstance(factor, DiagonalLinearOperator) for factor in block):
        remarks.append("over-wide factor: diagonal only")
    return "; ".join(remarks)
