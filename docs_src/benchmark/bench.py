"""Time and peak memory of products and constructors, compared with a gradient and other libraries.

Run it with ``make bench``, which makes the environments. It prints the tables, and writes all that
was measured to ``build/benchmark.json`` or the path given by ``--json``. With ``--write``, tables
and plots are also written to ``docs_src/benchmark/results``, which the documentation shows.

``suites.py`` says what is measured, ``models.py`` on which models, ``ours.py`` and ``peers.py``
with which calls, and ``harness.py`` how; ``tables.py`` and ``plots.py`` show it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import Errors, Library, compare, machine, measure
from suites import COMPARED, LEFT_OUT, OFFERED, OURS, SUITES, suite
from tables import as_markdown, as_text

BUILD = Path(__file__).parents[2] / "build"
RESULTS = Path(__file__).parent / "results"
Wrong = dict[str, dict[tuple[str, str], str]]  # library, problem and case: why not comparable


def offered(library: str, cases: list[str]) -> list[str]:
    """Return those cases that a library has; ours has all."""
    return [what for what in cases if library == OURS or what in OFFERED[library]]


def start(name: str, device: str, options: argparse.Namespace) -> dict[str, Library]:
    """Start all libraries of a suite, one after the other."""
    asked = suite(name, options.quick)
    plan: dict[str, Any] = {
        "threads": options.threads,
        "device": device,
        "quick": options.quick,
        "memory": name == "memory",
    }
    libraries: dict[str, Library] = {}
    for library in (OURS, *asked.peers):
        print(f"{name} on {device}: {library} gets ready", file=sys.stderr)
        peer = options.peers / library / "bin" / "python"
        python = Path(sys.executable) if library == OURS else peer
        plan["wanted"] = {p: offered(library, names) for p, names in asked.wanted.items()}
        libraries[library] = Library(library, python, plan)
        failures = libraries[library].info.get("failures", {})
        for (problem, what), why in LEFT_OUT.items():
            if problem in failures and what in offered(library, asked.cases):
                failures[problem][what] = why
    if "error" in libraries[OURS].info:
        sys.exit(f"{OURS}: {libraries[OURS].info['error']}")
    for library in libraries.values():
        if library.info.get("torch", torch.__version__) != torch.__version__:
            library.info = {"error": f"another PyTorch, {library.info['torch']}"}
    return libraries


def run(name: str, device: str, options: argparse.Namespace, wrong: Wrong) -> dict[str, Any]:
    """Measure a suite on a device, and return everything that is known of it.

    Args:
        name: The suite.
        device: Where models and data are.
        options: Those of the command line.
        wrong: Others' cases that were found to be other matrices; what this suite finds is added.
    """
    asked = suite(name, options.quick)
    libraries = start(name, device, options)
    errors: Errors = {}
    seconds: dict[str, Any] = {}
    try:
        if name in COMPARED:
            errors = compare(libraries, asked, options.quick)
        for library in libraries.values():
            known = wrong.setdefault(library.name, {})
            known.update(library.dropped)
            for (problem, what), why in known.items():
                if problem in asked.wanted:
                    library.drop(problem, what, why)
        if name != "memory":
            cases = ["gradient", *asked.cases]
            limits = options.rounds, options.repeats, options.seconds
            seconds = measure(libraries, list(asked.wanted), cases, *limits)
    finally:
        for library in libraries.values():
            library.close()
    infos = {library.name: dict(library.info) for library in libraries.values()}
    return {
        "problems": list(asked.wanted),
        "cases": asked.cases,
        "peers": asked.peers,
        "bytes": {library: info.pop("bytes", {}) for library, info in infos.items()},
        "libraries": infos,
        "errors": errors,
        "seconds": seconds,
    }


def devices(wanted: str) -> list[str]:
    """Return where to measure."""
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if wanted == "all":
        return present
    if wanted not in present:
        sys.exit(f"There is no device {wanted} here.")
    return [wanted]


def complete(content: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Add what was not measured this time, from an earlier run on the same machine, as it was run.

    Args:
        content: All that was measured.
        earlier: The same of the earlier run.
    """
    if any(content[key] != earlier[key] for key in ("machine", "options")):
        return content
    found: dict[str, Any] = {}
    for device in earlier["devices"] | content["devices"]:
        suites = earlier["devices"].get(device, {}) | content["devices"].get(device, {})
        found[device] = {name: suites[name] for name in SUITES if name in suites}
    return content | {"devices": found}


def write(content: dict[str, Any], folder: Path) -> None:
    """Write results for the documentation: tables, plots, and all numbers."""
    from plots import draw  # it needs matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    draw(content, folder)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "results.md").write_text(as_markdown(content))


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=BUILD / "peers", help="environments")
    parser.add_argument("--json", type=Path, default=BUILD / "benchmark.json", help="all numbers")
    parser.add_argument("--write", action="store_true", help="write tables and plots, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --write writes")
    parser.add_argument("--only", choices=SUITES, nargs="+", default=SUITES, help="some suites")
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case per turn, at most")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="after which a case has no more rounds"
    )
    parser.add_argument("--threads", type=int, default=1, help="for every library")
    parser.add_argument("--quick", action="store_true", help="a trial run on a few examples")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats = 1, 1

    settings = ("threads", "rounds", "repeats", "seconds", "quick")
    content: dict[str, Any] = {
        "machine": machine(),
        "options": {name: getattr(options, name) for name in settings},
        "devices": {device: {} for device in devices(options.device)},
    }
    start = time.perf_counter()
    for device, suites in content["devices"].items():
        wrong: Wrong = {}
        for name in options.only:
            suites[name] = run(name, device, options, wrong)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"{time.perf_counter() - start:.0f} s so far", file=sys.stderr)
    print(as_text(content))
    print(f"\nWrote {options.json}")
    if options.write and options.quick and options.results == RESULTS:
        print("A trial run does not replace the results: give a folder by --results.")
    elif options.write:
        earlier = options.results / "results.json"
        if earlier.exists():
            content = complete(content, json.loads(earlier.read_text()))
        write(content, options.results)
        print(f"Wrote {options.results}")


if __name__ == "__main__":
    main()
