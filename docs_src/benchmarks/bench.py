"""Wall-clock time of products and of constructors, compared with a gradient and other libraries.

Models and data are those of ``models.py``, and how time is measured is said in ``harness.py``. The
libraries have to agree on what is timed, or there is no table.

Run it with ``make bench``, which makes the environments. It prints the tables, and writes all times
to ``build/benchmarks.json`` or the path given by ``--json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import constructors
import products
import torch
from harness import OURS, Cell, Library, format_errors, measure

BUILD = Path(__file__).parents[2] / "build"
SUITES = {"products": products, "constructors": constructors}


def run(suite: str, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Time all libraries of a suite, and return its tables and what was measured."""
    module = SUITES[suite]
    pythons = {OURS: Path(sys.executable)}
    pythons |= {peer: options.peers / peer / "bin" / "python" for peer in module.PEERS}
    libraries: dict[str, Library] = {}
    try:
        for name, python in pythons.items():
            libraries[name] = Library(name, python, suite, options.threads, options.quick)
        if "error" in libraries[OURS].info:
            sys.exit(f"{OURS}: {libraries[OURS].info['error']}")
        for library in libraries.values():
            if library.info.get("torch", torch.__version__) != torch.__version__:
                sys.exit(f"{library.name} runs with another PyTorch, {library.info['torch']}")
        errors = module.compare(libraries)
        differences = format_errors(module.MEASURED, errors)
        if wrong := module.disagreements(errors, options.quick):
            sys.exit(f"{differences}\n\nOther matrices: {'; '.join(wrong)}. There is no table.")
        times = measure(
            libraries,
            ["gradient", *module.CASES],
            options.rounds,
            options.repeats,
            options.seconds,
        )
    finally:
        for library in libraries.values():
            library.close()

    def best(library: str, problem: str, what: str) -> Cell:
        missing = libraries[library].lacks(problem, what)
        return min(times[library][problem][what]) if missing is None else missing

    versions = {name: library.label for name, library in libraries.items()}
    content = {
        "libraries": {name: library.info for name, library in libraries.items()},
        "errors": errors,
        "seconds": times,
    }
    return f"{module.tables(versions, best)}\n\n{differences}", content


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=BUILD / "peers", help="environments")
    parser.add_argument("--json", type=Path, default=BUILD / "benchmarks.json", help="all times")
    parser.add_argument("--only", choices=SUITES, help="one kind of tables")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case per round")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which a case has no more rounds"
    )
    parser.add_argument("--threads", type=int, default=1, help="for every library")
    parser.add_argument("--quick", action="store_true", help="one example per batch: a trial run")
    options = parser.parse_args()

    print(f"PyTorch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds")
    if options.quick:
        print("A trial run on a few examples: its ratios are not those of the models.")
    content: dict[str, Any] = {"threads": options.threads, "quick": options.quick}
    for suite in [options.only] if options.only else SUITES:
        text, content[suite] = run(suite, options)
        print(f"\n{suite}\n\n{text}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWrote {options.json}")


if __name__ == "__main__":
    main()
