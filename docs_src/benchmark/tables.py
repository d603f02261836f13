"""The benchmark's tables, from what was measured and nothing else: as text, and as Markdown.

What is missing is a cell that says why, and a mean over it is not given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from harness import lack
from models import AXES, PROBLEMS
from suites import (
    BACKPACK,
    CURVLINOPS,
    EIGENTHINGS,
    OFFERED,
    OURS,
    PLAIN,
    POWERS,
    SCALED,
    SEPARATE,
    by_columns,
)

MODELS = list(PROBLEMS)


@dataclass(frozen=True)
class Missing:
    """What is shown in place of a number: why there is none."""

    reason: str

    def __format__(self, spec: str) -> str:
        return f"— ({self.reason})"


Cell = float | Missing  # a time, memory, or a ratio of two
Row = dict[str, Cell]  # by problem


class Target(NamedTuple):
    """A ratio to reach, as the geometric mean of all models or on each of some."""

    limit: float
    each: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "each " if list(self.each) == MODELS else ", ".join(self.each) + " "
        return f"{where if self.each else ''}≤ {self.limit}"

    def judge(self, ratios: Row, mean: Cell) -> str:
        """Say whether it is reached."""
        worst = largest([ratios[problem] for problem in self.each] if self.each else [mean])
        if isinstance(worst, Missing):
            return "not known"
        return "reached" if round(worst, 2) <= self.limit else "MISSED"


# Of our case and a peer's.
TARGETS = {
    ("GGN", CURVLINOPS): Target(0.8),
    ("GGN, kept graph", CURVLINOPS): Target(0.55),
    **{(what, BACKPACK): Target(1.0, each=("MLP",)) for what in SEPARATE},
}
TARGET_OF_HESSIAN = Target(1.0, each=tuple(MODELS))  # against the fastest of two peers

# Of several cases together, and a peer's: the mean over all models and cases that both have.
_KINDS = {"MC": "", "type-2": " type-2", "empirical": " empirical"}
_OTHER = "mixes loss terms"  # ends the reason of peers.py why a case of theirs is not compared
TOGETHER = [("MC",), ("MC", "type-2"), ("MC", "type-2", "empirical")]
TARGET_OF_BOTH = Target(0.6)


class Table(NamedTuple):
    """A title, a header, and rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Align columns: the first to the left, others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(row: list[str]) -> str:
            first, *others = zip(row, widths, strict=True)
            cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, "", line(self.header), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        """Return a table of Markdown."""
        rule = [":--", *("--:" for _ in self.header[1:])]
        rows = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *rows])


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------
def ratio(a: Cell, b: Cell) -> Cell:
    """Divide; what misses a number has none."""
    for cell in (a, b):
        if isinstance(cell, Missing):
            return cell
    return a / b if b else Missing("nothing to compare with")


def smallest(cells: list[Cell]) -> Cell:
    """Return the smallest, if all are known."""
    missing = [cell for cell in cells if isinstance(cell, Missing)]
    return missing[0] if missing else min(cells)


def largest(cells: list[Cell]) -> Cell:
    """Return the largest, if all are known."""
    missing = [cell for cell in cells if isinstance(cell, Missing)]
    return missing[0] if missing else max(cells)


def geometric_mean(cells: Iterable[Cell]) -> Cell:
    """Return the mean over all cells; without one of them there is none."""
    cells = list(cells)
    if not cells or any(isinstance(cell, Missing) for cell in cells):
        return Missing("not available")
    return math.exp(sum(map(math.log, cells)) / len(cells)) if min(cells) > 0 else 0.0


class Measured:
    """What a suite measured on a device.

    Args:
        content: What ``bench.run`` returned.
    """

    def __init__(self, content: dict[str, Any]):
        self.problems, self.cases = content["problems"], content["cases"]
        self.peers, self.libraries = content["peers"], content["libraries"]
        self._seconds, self._bytes = content["seconds"], content["bytes"]
        self.of_memory = not self._seconds
        self.errors = content["errors"]

    def quartiles(self, library: str, problem: str, what: str) -> list[float] | Missing:
        """Return the quartiles of a case's seconds, or its bytes thrice, or why there are none."""
        why = lack(self.libraries[library], problem, what)
        if why is not None:
            return Missing(why)
        if self.of_memory:
            return [self._bytes[library][problem][what]] * 3
        return self._seconds[library][problem][what]["quartiles"]

    def cell(self, library: str, problem: str, what: str) -> Cell:
        """Return the median of a case."""
        found = self.quartiles(library, problem, what)
        return found if isinstance(found, Missing) else found[1]

    def row(self, library: str, what: str) -> Row:
        """Return the medians of a case on all problems."""
        return {problem: self.cell(library, problem, what) for problem in self.problems}

    def relative(self, library: str, problem: str, what: str) -> Cell:
        """Return the median of a case, divided by that of the gradient."""
        gradient = self.cell(OURS, problem, "gradient")
        return ratio(self.cell(library, problem, what), gradient)

    def label(self, library: str) -> str:
        """Return a library's name and version."""
        info = self.libraries[library]
        return f"{library} {info['version']}" if "version" in info else library


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------
def _unit(gradient: Cell, of_memory: bool) -> str:
    if isinstance(gradient, Missing):
        return f"{gradient}"
    return f"{gradient / 1e6:.1f} MB" if of_memory else f"{1e3 * gradient:.1f} ms"


def _better(of_memory: bool) -> str:
    return "needs less" if of_memory else "is faster"


def _against_gradient(measured: Measured, title: str, of: Callable[[str, str], Cell]) -> Table:
    """Make the table of one model: cases, and what they cost in each library.

    Args:
        measured: What was measured.
        title: The table's title.
        of: Returns the ratio to the gradient of (library, case).
    """
    rows = []
    for what in measured.cases:
        cells = [of(library, what) for library in (OURS, *measured.peers)]
        shown = [f"{cell:.2f}" for cell in cells]
        for i, cell in enumerate(cells[1:], 1):
            relation = ratio(cells[0], cell)
            if not isinstance(relation, Missing) and round(relation, 2) > 1:
                shown[i] += " (less)" if measured.of_memory else " (faster)"
        rows.append([what, *shown])
    names = [OURS, *map(measured.label, measured.peers)]
    return Table(title, ["relative to the gradient", *names], rows)


def against_gradient(measured: Measured) -> list[Table]:
    """Return a table for each model, and one with the means."""
    tables = []
    for p in measured.problems:
        unit = _unit(measured.cell(OURS, p, "gradient"), measured.of_memory)
        title = f"{p}: gradient {unit}"
        tables.append(
            _against_gradient(measured, title, lambda x, w, p=p: measured.relative(x, p, w))
        )

    def mean(library: str, what: str) -> Cell:
        cells = [measured.relative(library, problem, what) for problem in measured.problems]
        reasons = [cell.reason for cell in cells if isinstance(cell, Missing)]
        if len(reasons) == len(cells) and len(set(reasons)) == 1:
            return Missing(reasons[0])
        return Missing("not on all models") if reasons else geometric_mean(cells)

    title = f"Geometric mean of {', '.join(measured.problems)}"
    return [*tables, _against_gradient(measured, title, mean)]


def _compared(
    measured: Measured, name: str, ours: Row, theirs: Row, target: Target | None
) -> list[str]:
    """Return a row of ratios of ours to theirs, the target, and where the other one is better."""
    values = {problem: ratio(ours[problem], theirs[problem]) for problem in ours}
    mean = geometric_mean(values.values())
    better = [p for p, r in values.items() if not isinstance(r, Missing) and round(r, 2) > 1]
    verdict = target.judge(values, mean) if target else ""
    cells = [f"{cell:.2f}" for cell in [*values.values(), mean]]
    return [name, *cells, ", ".join(better), str(target or ""), verdict]


def _mean_of_both(name: str, ours: Row, theirs: Row, width: int) -> list[str]:
    """Return a row with the mean over those models alone that both libraries have."""
    values = {problem: ratio(ours[problem], theirs[problem]) for problem in ours}
    known = {p: r for p, r in values.items() if not isinstance(r, Missing)}
    mean = f"{geometric_mean(known.values()):.2f}"
    label = f"{name}, {' and '.join(known)} only"
    return [label, *("" for _ in ours), mean, *("" for _ in range(width - len(ours) - 2))]


def _together(measured: Measured, peer: str, kinds: Sequence[str], checked: bool) -> list[str]:
    """Return a row of the means over KFAC and EKFAC of some kinds, checked by default or not.

    Left out is what the peer computes something else for; with another gap there is no mean. That
    of all models is the mean of all ratios: a model with fewer of them does not count more.
    """
    by_problem: Row = {}
    everything: list[Cell] = []
    for problem in measured.problems:
        cells = [
            ratio(measured.cell(OURS, problem, what), measured.cell(peer, problem, what))
            for what in _cases_of(kinds, checked)
        ]
        comparable = [x for x in cells if not (isinstance(x, Missing) and _OTHER in x.reason)]
        by_problem[problem] = geometric_mean(comparable)
        everything += comparable
    mean = geometric_mean(everything)
    label, number = measured.label(peer), len(everything)
    which = ", ".join([*kinds, *(["checked"] if checked else [])])
    name = f"KFAC and EKFAC ({which}) / those of {label}, {number} ratios"
    cells = [f"{cell:.2f}" for cell in [*by_problem.values(), mean]]
    return [name, *cells, "", str(TARGET_OF_BOTH), TARGET_OF_BOTH.judge(by_problem, mean)]


def _cases_of(kinds: Sequence[str], checked: bool) -> list[str]:
    """Return the cases of KFAC and EKFAC of some kinds."""
    suffix = ", checked" if checked else ""
    return [f"{K}{_KINDS[kind]}{suffix}" for kind in kinds for K in ("KFAC", "EKFAC")]


def against_others(measured: Measured) -> Table:
    """Return the table of ratios to other libraries."""
    verb = _better(measured.of_memory)
    header = ["ours / theirs", *measured.problems, "geometric mean", f"the other {verb} on"]
    header += [] if measured.of_memory else ["target", "verdict"]
    rows: list[list[str]] = []

    def add(ours: str, peer: str, theirs: str) -> None:
        a, b = measured.row(OURS, ours), measured.row(peer, theirs)
        target = None if measured.of_memory else TARGETS.get((ours, peer))
        name = f"{ours} / {'that' if ours == theirs else theirs} of {measured.label(peer)}"
        rows.append(_compared(measured, name, a, b, target))
        missing = [isinstance(cell, Missing) for cell in b.values()]
        if any(missing) and not all(missing):
            rows.append(_mean_of_both(name, a, b, len(header)))

    for peer in measured.peers:
        for what in measured.cases:
            if what in OFFERED[peer]:
                add(what, peer, what)
            elif (plain := what.removesuffix(", kept graph")) != what and plain in OFFERED[peer]:
                add(what, peer, plain)
    if not measured.of_memory and "Hessian" in measured.cases:
        both = [measured.row(peer, "Hessian") for peer in (CURVLINOPS, EIGENTHINGS)]
        best = {p: smallest([row[p] for row in both]) for p in measured.problems}
        for what, target in [("Hessian", TARGET_OF_HESSIAN), ("Hessian, kept graph", None)]:
            name = f"{what} / fastest Hessian of both"
            rows.append(_compared(measured, name, measured.row(OURS, what), best, target))
    if not measured.of_memory and "KFAC" in measured.cases and CURVLINOPS in measured.peers:
        for checked, kinds in product((True, False), TOGETHER):
            if set(_cases_of(kinds, checked)) <= set(measured.cases):
                rows.append(_together(measured, CURVLINOPS, kinds, checked))
    title = f"Relative to other libraries: below 1, ours {verb}"
    return Table(title, header, [row[: len(header)] for row in rows])


def differences(measured: Measured) -> list[Table]:
    """Return the table of how far results are from ours."""
    rows = [
        [name, *(f"{errors[p]:.0e}" if p in errors else "—" for p in measured.problems)]
        for name, errors in measured.errors.items()
    ]
    title = "Relative difference to ours: of products; of traces where matrices are random"
    return [Table(title, ["case", *measured.problems], rows)] if rows else []


def scaling(measured: Measured) -> list[Table]:
    """Return a table for each axis."""
    tables = []
    everyone = [(OURS, OURS), *((peer, measured.label(peer)) for peer in measured.peers)]
    for axis in AXES:
        points = [p for p in measured.problems if p.startswith(f"{axis} ")]
        rows = []
        for library, label in everyone:
            for what in SCALED:
                cells = [measured.relative(library, p, what) for p in points]
                rows.append([f"{what}, {label}", *(f"{cell:.2f}" for cell in cells)])
        header = ["relative to the gradient", *(point.split()[1] for point in points)]
        tables.append(Table(f"By {axis}", header, rows))
    powers = [k for k in POWERS if by_columns("GGN", k) in measured.cases]
    rows = []
    for library, label in everyone:
        for what in PLAIN:
            cells = [measured.relative(library, "columns", by_columns(what, k)) for k in powers]
            rows.append([f"{what}, {label}", *(f"{cell:.2f}" for cell in cells)])
    header = ["relative to the gradient", *map(str, powers)]
    return [*tables, Table("By number of columns", header, rows)]


def tables_of(suite: str, content: dict[str, Any]) -> list[Table]:
    """Return the tables of a suite, from what was measured."""
    measured = Measured(content)
    if suite == "scaling":
        return scaling(measured)
    return [*against_gradient(measured), against_others(measured), *differences(measured)]


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------
TITLES = {
    "products": "Time of products",
    "constructors": "Time of constructors",
    "memory": "Peak memory",
    "scaling": "Scaling",
}
PLACES = {"cpu": "CPU", "cuda": "GPU"}
TRIAL = "A trial run on a few examples: its ratios are not those of the models."


def describe(content: dict[str, Any]) -> str:
    """Say on what was measured, and how often."""
    machine, options = content["machine"], content["options"]
    gpu = f"; {machine['gpu']}" if machine["gpu"] and "cuda" in content["devices"] else ""
    return (
        f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['system']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {options['threads']} thread(s) used{gpu}. "
        f"Medians over at most {options['rounds']} rounds of at most {options['repeats']} runs."
    )


def as_text(content: dict[str, Any]) -> str:
    """Return all tables for a terminal."""
    parts = [describe(content), *([TRIAL] if content["options"]["quick"] else [])]
    for device, suites in content["devices"].items():
        for suite, measured in suites.items():
            parts.append(f"=== {TITLES[suite]}, {PLACES[device]} ===")
            parts += [table.text() for table in tables_of(suite, measured)]
    return "\n\n".join(parts)


def picture(suite: str, device: str) -> str:
    """Return the name of the file with a suite's plot."""
    return f"{suite}-{device}.png"


def as_markdown(content: dict[str, Any]) -> str:
    """Return all tables and plots for the documentation."""
    parts = ["<!-- Written by `make bench`. -->", describe(content)]
    parts += [f"**{TRIAL}**"] if content["options"]["quick"] else []
    for device, suites in content["devices"].items():
        for suite, measured in suites.items():
            title = f"{TITLES[suite]}, {PLACES[device]}"
            parts += [f"### {title}", f"![{title}]({picture(suite, device)})"]
            parts += [table.markdown() for table in tables_of(suite, measured)]
    return "\n\n".join(parts) + "\n"
