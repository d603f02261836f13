"""What the benchmarks share: libraries in processes of their own, rounds, targets, and tables.

Each library runs in its own environment, with the same PyTorch, as a process that waits until it is
asked (``worker.py``). They take turns: in every round, each times a case a few times before the
next case comes, and the fastest time of all rounds counts, which other load on the machine disturbs
least.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import PROBLEMS

HERE = Path(__file__).parent
OURS = "curvlinops"


@dataclass(frozen=True)
class Missing:
    """What is shown in place of a number: why there is none."""

    reason: str

    def __format__(self, spec: str) -> str:
        return f"— ({self.reason})"


Cell = float | Missing  # a time, or a ratio of two
Time = Callable[[str, str, str], Cell]  # the seconds of (library, problem, case)


class Target(NamedTuple):
    """A ratio to reach, as the geometric mean of all models or on each of some."""

    limit: float
    each: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "each " if list(self.each) == list(PROBLEMS) else ", ".join(self.each) + " "
        return f"{where if self.each else ''}≤ {self.limit}"

    def judge(self, ratios: dict[str, Cell], mean: Cell) -> str:
        """Say whether it is reached."""
        cells = [ratios[problem] for problem in self.each] if self.each else [mean]
        worst = largest(cells)
        if isinstance(worst, Missing):
            return "not known"
        return "reached" if round(worst, 2) <= self.limit else "MISSED"


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------
class Library:
    """A library's worker.

    Args:
        name: The library.
        python: The interpreter of its environment.
        suite: Which cases it prepares, see ``worker.py``.
        threads: Number of threads.
        quick: Whether to take one example per batch.
    """

    def __init__(self, name: str, python: Path, suite: str, threads: int, quick: bool):
        self.name = name
        self.info: dict[str, Any] = {"error": "not installed"}
        if not python.exists():
            return
        # This may lead to our package, whose name a peer's module has, too.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if name != OURS:
            environment.pop("PYTHONPATH", None)
        mode = "quick" if quick else "full"
        self.process = subprocess.Popen(
            [python, HERE / "worker.py", name, suite, str(threads), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.info = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "stopped, see above"}

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let the worker do something."""
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def lacks(self, problem: str, what: str) -> Missing | None:
        """Return why it has no such case, or None if it has."""
        if "error" in self.info:
            return Missing(self.info["error"])
        if what in self.info["cases"][problem]:
            return None
        return Missing(self.info["failures"][problem].get(what, f"no {what}"))

    def result(self, problem: str, what: str) -> dict[str, torch.Tensor]:
        """Return what the worker's case gives, to be compared with other libraries."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/result.pt"
            self.ask("save", problem=problem, what=what, path=path)
            return torch.load(path)

    @property
    def label(self) -> str:
        """Its name and version."""
        return f"{self.name} {self.info['version']}" if "version" in self.info else self.name

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


def measure(
    libraries: dict[str, Library],
    cases: Iterable[str],
    rounds: int,
    repeats: int,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Return all times: library, problem, case, list of seconds.

    Args:
        libraries: Who takes turns.
        cases: What is timed, of each library that has it.
        rounds: Number of rounds.
        repeats: How often a library runs a case in its turn.
        seconds: A case that has taken so long in one library is not timed in further rounds.
    """
    cases = list(cases)
    times: dict[str, Any] = {name: {p: {} for p in PROBLEMS} for name in libraries}
    for number in range(rounds):
        order = list(libraries.values())[:: 1 if number % 2 == 0 else -1]
        for problem in PROBLEMS:
            for what in cases:
                spent = [sum(times[name][problem].get(what, [])) for name in libraries]
                if max(spent) > seconds:
                    continue
                for library in order:
                    if library.lacks(problem, what) is None:
                        new = library.ask("time", problem=problem, what=what, repeats=repeats)
                        times[library.name][problem].setdefault(what, []).extend(new)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return times


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------
def ratio(a: Cell, b: Cell) -> Cell:
    """Divide; what misses a number has none."""
    for cell in (a, b):
        if isinstance(cell, Missing):
            return cell
    return a / b


def fastest(cells: list[Cell]) -> Cell:
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
    return math.exp(sum(map(math.log, cells)) / len(cells))


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Align columns: the first to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: list[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def cells(time: Time, library: str, what: str) -> dict[str, Cell]:
    """Return the seconds of a library's case on each problem."""
    return {problem: time(library, problem, what) for problem in PROBLEMS}


def ratios(a: dict[str, Cell], b: dict[str, Cell]) -> dict[str, Cell]:
    """Divide problem by problem."""
    return {problem: ratio(a[problem], b[problem]) for problem in PROBLEMS}


def row(name: str, values: dict[str, Cell]) -> list[str]:
    """Return a row with ratios and their mean."""
    return [name, *(f"{r:.2f}" for r in [*values.values(), geometric_mean(values.values())])]


def compared(
    name: str, ours: dict[str, Cell], others: dict[str, Cell], target: Target | None
) -> list[str]:
    """Return a row with ratios to others' times, the target, and whether it is reached."""
    values = ratios(ours, others)
    verdict = target.judge(values, geometric_mean(values.values())) if target else ""
    return [*row(name, values), str(target or ""), verdict]


def relative_to_gradient(time: Time, cases: list[tuple[str, str, str]]) -> str:
    """Return the table of times relative to the gradient's.

    Args:
        time: The times.
        cases: The rows: name, library and case.
    """
    gradients = cells(time, OURS, "gradient")
    rows = [["gradient", *(f"{1e3 * cell:.1f} ms" for cell in gradients.values()), ""]]
    for name, library, what in cases:
        rows.append(row(name, ratios(cells(time, library, what), gradients)))
    return format_table(["relative to the gradient", *PROBLEMS, "geometric mean"], rows)


def relative_to_others(rows: list[list[str]]) -> str:
    """Return the table of rows from :func:`compared`."""
    header = ["relative to others", *PROBLEMS, "geometric mean", "target", ""]
    return format_table(header, rows)


def format_errors(title: str, errors: dict[str, dict[str, float]]) -> str:
    """Return the table of differences between libraries, by case and problem."""
    rows = [
        [name, *(f"{error[p]:.0e}" if p in error else "—" for p in PROBLEMS)]
        for name, error in errors.items()
    ]
    return format_table([title, *PROBLEMS], rows)
