"""Wall-clock time of curvature products, compared with a gradient and with other libraries.

Models and data are those of ``models.py``. Each library runs in its own environment, with the same
PyTorch, as a process that waits until it is asked (``worker.py``). They take turns: in every round,
each times a few products of a kind before the next kind comes, and the fastest product of all
rounds counts, which other load on the machine disturbs least. Products are of one flat float32
vector over all parameters. All libraries have to agree on them, or there is no table.

Run it with ``make bench``, which makes the environments. It prints the tables, and writes all times
to ``build/benchmarks.json`` or the path given by ``--json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import PROBLEMS

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
OURS = "curvlinops"
PEERS = ["curvlinops-for-pytorch", "hessian-eigenthings"]
PRODUCTS = ["Hessian", "Hessian, kept graph", "GGN", "GGN, kept graph"]
# Largest relative errors to our plain product; that of rounding is about 1e-6. More is allowed to
# peers, which are shown with their error: the Hessian of curvlinops-for-pytorch 3.0.1 is off by
# 4e-3 on the decoder, in float64 too, where finite differences agree with the others.
TOLERANCE, TOLERANCE_PEERS = 1e-4, 2e-2


@dataclass(frozen=True)
class Missing:
    """What is shown in place of a number: why there is none."""

    reason: str

    def __format__(self, spec: str) -> str:
        return f"— ({self.reason})"


Cell = float | Missing  # a time, or a ratio of two


class Target(NamedTuple):
    """A ratio to reach, as the geometric mean of all models or on each of them."""

    limit: float
    each: bool = False

    def __str__(self) -> str:
        return f"{'each ' if self.each else ''}≤ {self.limit}"

    def judge(self, ratios: list[Cell], mean: Cell) -> str:
        """Say whether it is reached."""
        if isinstance(mean, Missing):
            return "not known"
        reached = max(ratios) if self.each else mean
        return "reached" if round(reached, 2) <= self.limit else "MISSED"


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------
class Library:
    """A library's worker."""

    def __init__(self, name: str, python: Path, threads: int, quick: bool):
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
            [python, HERE / "worker.py", name, str(threads), mode],
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
        """Return why it has no such product, or None if it has."""
        if "error" in self.info:
            return Missing(self.info["error"])
        if what in self.info["products"][problem]:
            return None
        return Missing(self.info["failures"][problem].get(what, f"no {what}"))

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


def compare(libraries: dict[str, Library]) -> dict[str, dict[str, float]]:
    """Return how far other libraries' products, and ours with kept graphs, are from ours."""
    errors: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/product.pt"

        def product(library: Library, problem: str, what: str) -> torch.Tensor:
            library.ask("save", problem=problem, what=what, path=path)
            return torch.load(path)

        for problem in PROBLEMS:
            for what in ("Hessian", "GGN"):
                reference = product(libraries[OURS], problem, what)
                others = [(libraries[OURS], f"{what}, kept graph")]
                others += [(libraries[peer], what) for peer in PEERS]
                for library, name in others:
                    if library.lacks(problem, name) is None:
                        difference = product(library, problem, name) - reference
                        error = (difference.norm() / reference.norm()).item()
                        errors.setdefault(f"{name} of {library.name}", {})[problem] = error
    return errors


def measure(libraries: dict[str, Library], rounds: int, repeats: int) -> dict[str, Any]:
    """Return all times: library, problem, product, list of seconds."""
    times: dict[str, Any] = {name: {p: {} for p in PROBLEMS} for name in libraries}
    for number in range(rounds):
        order = list(libraries.values())[:: 1 if number % 2 == 0 else -1]
        for problem in PROBLEMS:
            for what in ["gradient", *PRODUCTS]:
                for library in order:
                    if library.lacks(problem, what) is None:
                        seconds = library.ask("time", problem=problem, what=what, repeats=repeats)
                        times[library.name][problem].setdefault(what, []).extend(seconds)
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


def geometric_mean(cells: list[Cell]) -> Cell:
    """Return the mean over all cells; without one of them there is none."""
    if any(isinstance(cell, Missing) for cell in cells):
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


def tables(versions: dict[str, str], time: Callable[[str, str, str], Cell]) -> str:
    """Return the tables.

    Args:
        versions: The libraries' names with their versions.
        time: Returns the seconds of (library, problem, product), or why there are none.
    """
    problems = list(PROBLEMS)

    def cells(library: str, what: str) -> list[Cell]:
        return [time(library, problem, what) for problem in problems]

    gradients = cells(OURS, "gradient")
    rows = [["gradient", *(f"{1e3 * cell:.1f} ms" for cell in gradients), ""]]
    for library in versions:
        for what in PRODUCTS if library == OURS else ["Hessian", "GGN"]:
            ratios = list(map(ratio, cells(library, what), gradients))
            name = what if library == OURS else f"{what} of {versions[library]}"
            rows.append([name, *(f"{r:.2f}" for r in [*ratios, geometric_mean(ratios)])])
    header = [*problems, "geometric mean"]
    first = format_table(["relative to the gradient", *header], rows)

    def compared(what: str, others: str, other: list[Cell], target: Target | None) -> list[str]:
        ratios = list(map(ratio, cells(OURS, what), other))
        mean = geometric_mean(ratios)
        row = [f"{what} / {others}", *(f"{r:.2f}" for r in [*ratios, mean])]
        return [*row, str(target), target.judge(ratios, mean)] if target else [*row, "", ""]

    rows = []
    targets = {PEERS[0]: [Target(0.8), Target(0.55)], PEERS[1]: [None, None]}
    for peer in PEERS:
        for what, target in zip(["GGN", "GGN, kept graph"], targets[peer], strict=True):
            rows.append(compared(what, f"GGN of {versions[peer]}", cells(peer, "GGN"), target))
    for peer in PEERS:
        rows.append(
            compared("Hessian", f"Hessian of {versions[peer]}", cells(peer, "Hessian"), None)
        )
    best = [fastest([time(peer, problem, "Hessian") for peer in PEERS]) for problem in problems]
    for what, target in [("Hessian", Target(1.0, each=True)), ("Hessian, kept graph", None)]:
        rows.append(compared(what, "fastest Hessian of both", best, target))
    second = format_table(["relative to others", *header, "target", ""], rows)
    return f"{first}\n\n{second}"


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=BUILD / "peers", help="environments")
    parser.add_argument("--json", type=Path, default=BUILD / "benchmarks.json", help="all times")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="products of a kind per round")
    parser.add_argument("--threads", type=int, default=1, help="for every library")
    parser.add_argument("--quick", action="store_true", help="one example per batch: a trial run")
    options = parser.parse_args()

    pythons = {OURS: Path(sys.executable)}
    pythons |= {peer: options.peers / peer / "bin" / "python" for peer in PEERS}
    libraries: dict[str, Library] = {}
    try:
        for name, python in pythons.items():
            libraries[name] = Library(name, python, options.threads, options.quick)
        if "error" in libraries[OURS].info:
            sys.exit(f"{OURS}: {libraries[OURS].info['error']}")
        for library in libraries.values():
            if library.info.get("torch", torch.__version__) != torch.__version__:
                sys.exit(f"{library.name} runs with another PyTorch, {library.info['torch']}")

        errors = compare(libraries)
        times = measure(libraries, options.rounds, options.repeats)
    finally:
        for library in libraries.values():
            library.close()

    def best(library: str, problem: str, what: str) -> Cell:
        missing = libraries[library].lacks(problem, what)
        return min(times[library][problem][what]) if missing is None else missing

    versions = {
        name: f"{name} {library.info['version']}" if "version" in library.info else name
        for name, library in libraries.items()
    }
    print(f"PyTorch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds")
    if options.quick:
        print("A trial run on a few examples: its ratios are not those of the models.")
    print(f"\n{tables(versions, best)}\n")
    rows = [
        [name, *(f"{error[p]:.0e}" if p in error else "—" for p in PROBLEMS)]
        for name, error in errors.items()
    ]
    print(format_table(["relative error to our plain product", *PROBLEMS], rows))

    options.json.parent.mkdir(parents=True, exist_ok=True)
    infos = {name: library.info for name, library in libraries.items()}
    content = {
        "threads": options.threads,
        "quick": options.quick,
        "libraries": infos,
        "errors": errors,
        "seconds": times,
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWrote {options.json}")
    for name, error in errors.items():
        tolerance = TOLERANCE if name.endswith(f" of {OURS}") else TOLERANCE_PEERS
        if not max(error.values()) < tolerance:
            sys.exit(f"{name} is another matrix: its times mean nothing. See the errors above.")


if __name__ == "__main__":
    main()
