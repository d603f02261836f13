"""How much memory Kronecker factors take, and passes over the data that keep within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.usages import Usage


@dataclass(frozen=True)
class GroupMemory:
    """Bytes for a group of parameters.

    Attributes:
        names: The parameters.
        factors: Of the factors while they are computed.
        decompositions: Of an inverse (KFAC, which is made later and not counted in a budget), or of
            eigenvectors and eigenvalues (EKFAC).
        stored: Of what the operator holds.
        working_set: Of the inputs and output gradients of its layers, unfolded, for the largest
            batch and one loss vector.
        computed: Of what a pass over the data holds for the group, without the working set.
    """

    names: tuple[str, ...]
    factors: int
    decompositions: int
    stored: int
    working_set: int
    computed: int


class MemoryPlan:
    """How many bytes an operator takes, by group of parameters, before it is computed.

    ``print`` it to see a table.

    Attributes:
        rows: One for each group.
        passes: For each pass over the data (of two, for EKFAC): the numbers of its groups.
    """

    def __init__(
        self, rows: Sequence[GroupMemory], passes: Sequence[Sequence[int]], offloads: bool = False
    ):
        self.rows = list(rows)
        self.passes = [list(part) for part in passes]
        self._offloads = offloads

    @property
    def stored(self) -> int:
        """Bytes of the operator."""
        return sum(row.stored for row in self.rows)

    @property
    def peak(self) -> int:
        """Bytes that are held at most, of results so far, of a pass, and its working set.

        Without a budget, EKFAC may hold the events of a short pass besides: 64 MiB at most.
        """
        parts = [[self.rows[i] for i in part] for part in self.passes]
        before = [
            0 if self._offloads else sum(row.stored for part in parts[:k] for row in part)
            for k in range(len(parts))
        ]
        return max(held + _need(part) for held, part in zip(before, parts, strict=True))

    def __str__(self) -> str:
        header = ("parameters", "factors", "decompositions", "stored", "working set", "pass")
        number = {i: k for k, part in enumerate(self.passes, start=1) for i in part}
        lines: list[tuple[str, ...]] = [header]
        for i, row in enumerate(self.rows):
            sizes = (row.factors, row.decompositions, row.stored, row.working_set)
            lines.append((" + ".join(row.names), *map(_text, sizes), f"{number[i]}"))
        widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
        texts = [
            "  ".join(
                cell.ljust(width) if k == 0 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        texts.insert(1, "  ".join("-" * width for width in widths))
        passes = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        total = f"stored {_text(self.stored)}, at most {_text(self.peak)} meanwhile, in {passes}"
        return "\n".join([*texts, total])


def memory_of(
    plan: GroupPlan,
    num_positions: Mapping[Usage, int],
    *,
    batch_size: int,
    itemsizes: tuple[int, int, int],
    max_factor_size: int,
    counts_tokens: bool,
    decomposed: bool,
) -> GroupMemory:
    """Return the bytes of a group.

    Args:
        plan: The group.
        num_positions: The number of positions of an example in the layers.
        batch_size: The number of examples in the largest batch.
        itemsizes: Bytes of a number: of the model, of factors, and of what is stored.
        max_factor_size: Wider factors are diagonal.
        counts_tokens: Whether those of embeddings are.
        decomposed: Whether blocks are decomposed, as EKFAC's.
    """
    model, raw, storage = itemsizes
    if plan.diagonal:
        return GroupMemory(plan.key, 0, 0, plan.size * storage, 0, plan.size * model)
    matrices = eigenvalues = 0
    for sizes in plan.sizes:
        for side, width in enumerate(sizes):
            tokens = side == 1 and counts_tokens and plan.format.is_embedding
            wide = width > max_factor_size or tokens
            matrices += width if wide else width**2
        eigenvalues += sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
    entries = matrices + eigenvalues if decomposed else matrices
    working = 0
    for usage in (*plan.usages, *plan.tied):
        rows = num_positions.get(usage, 0) * batch_size
        width = plan.d_in * plan.format.groups + plan.d_out
        working = max(working, rows * width * model)
    factors, decompositions = matrices * raw, entries * (raw if decomposed else storage)
    computed = factors + decompositions if decomposed else factors
    return GroupMemory(plan.key, factors, decompositions, entries * storage, working, computed)


def split_into_passes(
    rows: Sequence[GroupMemory], units: Sequence[Sequence[int]], budget: int | None, offloads: bool
) -> list[list[int]]:
    """Return the numbers of the groups of each pass over the data.

    Args:
        rows: The groups.
        units: Numbers of groups that need the same sums, and stay together.
        budget: Bytes that may be used; None for a single pass.
        offloads: Whether what is stored is elsewhere, and does not count.

    Raises:
        ValueError: If a single layer does not fit.
    """
    if budget is None:
        return [list(range(len(rows)))]
    stored = 0  # by earlier passes
    passes: list[list[int]] = []
    for unit in sorted(units, key=min):
        if passes and stored + _need([rows[i] for i in (*passes[-1], *unit)]) <= budget:
            passes[-1] += unit
            continue
        if passes and not offloads:
            stored += sum(rows[i].stored for i in passes[-1])
        need = _need([rows[i] for i in unit])
        if stored + need > budget:
            names = [name for i in unit for name in rows[i].names]
            raise ValueError(
                f"memory_budget={budget:,} bytes is too small: {names} need {need:,} bytes"
                + (f", besides {stored:,} for what is stored by then" if stored else "")
                + ". Give more, use smaller batches or a smaller max_factor_size, or store factors "
                "elsewhere, for instance with precision=Precision(device='cpu')."
            )
        passes.append(list(unit))
    return passes


def _need(rows: Sequence[GroupMemory]) -> int:
    """Return the bytes that a pass over the data needs."""
    return sum(row.computed for row in rows) + max(row.working_set for row in rows)


def _text(size: int) -> str:
    """Return a number of bytes as text."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


__all__ = ["GroupMemory", "MemoryPlan", "memory_of", "split_into_passes"]
