"""How the benchmark measures: libraries in processes of their own, which take turns.

Each library runs in its own environment, with the same PyTorch, as a process that waits until it is
asked (``worker.py``). In every round, each library times a case a few times before the next case
comes, and every other round in the opposite order; so load on the machine and its clock rate affect
all alike. The median of all rounds counts, and the quartiles are recorded.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from suites import OURS, Suite, agreement

HERE = Path(__file__).parent
FEWEST_ROUNDS = 3  # also of cases that took longer than they should
TOO_LONG = 5  # times as long: one round must do


def machine() -> dict[str, Any]:
    """Return what the times depend on: kinds and versions, and no names of this machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where platform knows the architecture only
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def lack(info: dict[str, Any], problem: str, what: str) -> str | None:
    """Return why a library has no such case, from what its worker said; None if it has."""
    if "error" in info:
        return info["error"]
    if what in info["cases"][problem]:
        return None
    return info["failures"][problem].get(what, "not offered")


class Library:
    """A library's worker.

    Args:
        name: The library.
        python: The interpreter of its environment.
        plan: What it prepares: the arguments of ``worker.Worker``, and the number of threads.
    """

    def __init__(self, name: str, python: Path, plan: dict[str, Any]):
        self.name = name
        self.info: dict[str, Any] = {"error": "not installed"}
        self.dropped: dict[tuple[str, str], str] = {}
        if not python.exists():
            return
        environment = os.environ | {
            "OMP_NUM_THREADS": str(plan["threads"]),
            "NVIDIA_TF32_OVERRIDE": "0",  # float32 is float32, also in convolutions on a GPU
        }
        if name != OURS:  # this may lead to our package, whose name a peer's module has, too
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, HERE / "worker.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._send(plan)
        self.info = self._answer()

    def _send(self, content: Any) -> None:
        print(json.dumps(content), file=self.process.stdin, flush=True)

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "its process stopped"}

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let the worker do something."""
        self._send({"do": do, **arguments})
        return self._answer()

    def lacks(self, problem: str, what: str) -> str | None:
        """Return why it has no such case, or None if it has."""
        return lack(self.info, problem, what)

    def drop(self, problem: str, what: str, reason: str) -> None:
        """Have a case no longer."""
        if self.lacks(problem, what) is None:
            self.info["cases"][problem].remove(what)
            self.info["failures"][problem][what] = reason
            self.dropped[problem, what] = reason

    def result(self, problem: str, what: str) -> dict[str, torch.Tensor]:
        """Return what the worker's case gives, to be compared with other libraries."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/result.pt"
            self.ask("save", problem=problem, what=what, path=path)
            return torch.load(path)

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "process"):
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


# --------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------
Errors = dict[str, dict[str, float]]  # case of a library, problem


def compare(libraries: dict[str, Library], suite: Suite, quick: bool) -> Errors:
    """Return how far others' results are from ours; who has another matrix loses the case.

    Raises:
        ValueError: If our products with kept graphs are not those without.
    """
    errors: Errors = {}
    for library in libraries.values():
        for problem, cases in suite.wanted.items():
            for what in cases:
                reference = what.removesuffix(", kept graph") if library.name == OURS else what
                if what == "gradient" or (library.name == OURS and reference == what):
                    continue
                if library.lacks(problem, what) or libraries[OURS].lacks(problem, reference):
                    continue
                key, limit = agreement(library.name, problem, what, quick)
                ours = libraries[OURS].result(problem, reference)[key]
                theirs = library.result(problem, what)[key]
                assert ours.numel() == theirs.numel()
                error = ((theirs.flatten() - ours.flatten()).norm() / ours.norm()).item()
                errors.setdefault(f"{what} of {library.name}", {})[problem] = error
                if not error < limit:
                    if library.name == OURS:
                        raise ValueError(f"{what} on {problem} is off by {error:.0e}")
                    library.drop(problem, what, f"another matrix: off by {error:.2g}")
    return errors


# --------------------------------------------------------------------------------------------------
# Times
# --------------------------------------------------------------------------------------------------
def summarise(runs: list[float]) -> dict[str, list[float]]:
    """Return all times and their quartiles, the second of which is the median."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = torch.tensor(runs, dtype=torch.float64).quantile(points).tolist()
    return {"quartiles": [round(t, 9) for t in quartiles], "runs": [round(t, 9) for t in runs]}


def measure(
    libraries: dict[str, Library],
    problems: list[str],
    cases: Iterable[str],
    rounds: int,
    repeats: int,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Return times: library, problem, case, and what :func:`summarise` makes of them.

    Args:
        libraries: Who takes turns.
        problems: The models.
        cases: What is timed, of each library that has it.
        rounds: Number of rounds.
        repeats: How often a library runs a case in its turn, at most.
        seconds: A case that has taken so long in one library is not timed in further rounds after
            the third, or after the first if it has taken several times as long.
    """
    cases = list(cases)
    runs: dict[str, dict[str, dict[str, list[float]]]]
    runs = {name: {p: {} for p in problems} for name in libraries}
    for number in range(rounds):
        order = list(libraries.values())[:: 1 if number % 2 == 0 else -1]
        for problem in problems:
            for what in cases:
                spent = [sum(runs[name][problem].get(what, [])) for name in libraries]
                fewest = FEWEST_ROUNDS if max(spent) <= TOO_LONG * seconds else 1
                if number >= fewest and max(spent) > seconds:
                    continue
                for library in order:
                    if library.lacks(problem, what) is None:
                        new = library.ask("time", problem=problem, what=what, repeats=repeats)
                        if isinstance(new, dict):  # an error
                            library.info = new
                            continue
                        runs[library.name][problem].setdefault(what, []).extend(new)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {
        name: {
            problem: {what: summarise(times) for what, times in by_case.items()}
            for problem, by_case in by_problem.items()
        }
        for name, by_problem in runs.items()
    }
