"""How far Kronecker-factored approximations are from what they approximate, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

from torch import Tensor

#: The name of an approximation, and how it treats positions.
Method = tuple[str, "str | None"]

METHODS: tuple[Method, ...] = (
    ("KFAC", "expand"),
    ("KFAC", "reduce"),
    ("EKFAC", "expand"),
    ("EKFAC", "reduce"),
    ("KFOC", None),
)
"""The approximations that are compared, from the simplest to the most expensive."""

ALL = "all blocks"


@dataclass(frozen=True)
class KFACReport:
    r"""What :func:`~curvlinops.testing.check_kfac` has measured; ``str(report)`` is a table.

    Attributes:
        rows: One dict for each block and approximation, and for all blocks together, with

            - ``"parameters"``: tuple of the names of the block's parameters; ``("all blocks",)``
              for the block diagonal,
            - ``"method"``: ``"KFAC"``, ``"EKFAC"`` or ``"KFOC"``,
            - ``"approx"``: ``"expand"``, ``"reduce"``, or None for KFOC,
            - ``"distance"``: :math:`\|K_b - G_b\|_F / \|G_b\|_F` (0 if both vanish),
            - ``"cosine"``: :math:`\langle K_b, G_b \rangle / (\|K_b\| \|G_b\|)` (1 if both
              vanish, 0 if one does),
            - ``"exact"``: whether the block must be exact; None where the network's use of the
              parameters could not be followed,
            - ``"reason"``: why, or why not,
            - ``"size"``: the number of parameters,
            - ``"positions"``: how many positions of an example share the weight, at most; None
              where this is not known.

        title: What was approximated.
    """

    rows: list[dict[str, Any]]
    title: str

    def __str__(self) -> str:
        columns = [pair for pair in METHODS if any(_pair(row) == pair for row in self.rows)]
        header = ["parameters", "size", "S", *(" ".join(filter(None, c)) for c in columns)]
        table = [[*header, "nearest"]]
        names = dict.fromkeys(row["parameters"] for row in self.rows)
        for parameters in names:
            own = {_pair(row): row for row in self.rows if row["parameters"] == parameters}
            first = next(iter(own.values()))
            positions = "-" if first["positions"] is None else str(first["positions"])
            cells = [_cell(own.get(column)) for column in columns]
            table.append(
                [" + ".join(parameters), str(first["size"]), positions, *cells, nearest(own)]
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.insert(0, self.title)
        lines += [
            "Cells: relative Frobenius distance / cosine; = where the block must be exact, and is.",
            "S: positions that share the weight. nearest: the smallest distance (ties: the first).",
        ]
        return "\n".join(line.rstrip() for line in lines)


def _pair(row: dict[str, Any]) -> Method:
    """Return the approximation of a row."""
    return row["method"], row["approx"]


def _cell(row: dict[str, Any] | None) -> str:
    """Return distance and cosine as text."""
    if row is None:
        return ""
    mark = "= " if row["exact"] else ""
    return f"{mark}{row['distance']:.1e} / {row['cosine']:.3f}"


def nearest(rows: dict[Method, dict[str, Any]]) -> str:
    """Return the name of the approximation with the smallest distance; the first of equal ones."""
    best = min(row["distance"] for row in rows.values())
    for pair in METHODS:
        if pair in rows and rows[pair]["distance"] <= best * (1 + 1e-6) + 1e-9:
            return " ".join(filter(None, pair))
    raise AssertionError(
        "All distances are NaN: check model and data for NaN, infinities and overflow."
    )


class Distances:
    """Gathers the blocks of one approximation."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, K: Tensor, G: Tensor) -> tuple[float, float]:
        """Return distance and cosine of a block ``[d, d]``."""
        new = [
            float(value) for value in ((K - G).square().sum(), (K * G).sum(), K.norm(), G.norm())
        ]
        new[2:] = new[2] ** 2, new[3] ** 2
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)]
        return _measure(*new)

    def total(self) -> tuple[float, float]:
        """Return distance and cosine of all blocks together."""
        return _measure(*self._sums)


def _measure(difference: float, inner: float, K: float, G: float) -> tuple[float, float]:
    """Return relative distance and cosine from squared norms and an inner product."""
    if K == 0 == G:
        return 0.0, 1.0
    return sqrt(difference / G) if G else inf, inner / sqrt(K * G) if K and G else 0.0


__all__ = ["ALL", "METHODS", "Distances", "KFACReport", "Method"]
