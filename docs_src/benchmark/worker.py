"""Runs the cases of one library; ``bench.py`` starts it, in the library's own environment.

What to prepare comes as a line of JSON on the standard input. Then requests come as further lines,
answers go the same way, and in between the process waits: so workers of several libraries take
turns on the same machine.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from cases import Case, Cases, UnusableError
from meter import peak_memory
from models import PROBLEMS, SCALING, Problem, gradient
from torch import Tensor

# The module and function that have a library's cases.
CASES = {
    "curvlinops": ("ours", "cases"),
    "curvlinops-for-pytorch": ("peers", "curvlinops_for_pytorch"),
    "backpack-for-pytorch": ("peers", "backpack"),
    "hessian-eigenthings": ("peers", "hessian_eigenthings"),
    "nngeometry": ("peers", "nngeometry"),
    "kronfluence": ("peers", "kronfluence"),
}
POINTS = {name: make for points in SCALING.values() for name, make in points.items()}
LONGEST_TURN = 0.5  # seconds after which a case is not run again in the same turn


def say(error: Exception) -> str:
    """Return an error's first line, without the paths of this machine; or what we say ourselves."""
    text = (str(error) or "no message").splitlines()[0]
    text = re.sub(r"(/[^\s'\":,]+){2,}", "(a path)", text)
    if isinstance(error, UnusableError):
        return text
    return f"{type(error).__name__}: {text}"[:60]


class Worker:
    """The cases of a library on all problems, and their results.

    Args:
        cases_of: Returns a library's cases on a problem.
        wanted: The names of cases by those of models, or of points of the scaling suite; the
            library need not have them all.
        device: Where models and data are.
        quick: Whether to take one example per batch.
        memory: Whether to measure memory, at once: then cases are not kept.
    """

    def __init__(
        self,
        cases_of: Callable[[Problem], Cases],
        wanted: dict[str, list[str]],
        device: str = "cpu",
        quick: bool = False,
        memory: bool = False,
    ):
        self.device = device
        self.cases: dict[str, dict[str, Case]] = {}
        self.failures: dict[str, dict[str, str]] = {}
        self.bytes: dict[str, dict[str, int]] = {}
        self.results: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, names in wanted.items():
            torch.manual_seed(0)  # the same parameters and data in every library
            problem = (PROBLEMS | POINTS)[name]().to(device)
            if quick and name in PROBLEMS:
                problem = problem.first_examples()
            self.cases[name], self.failures[name], self.bytes[name] = {}, {}, {}
            if memory:
                gradient(problem)  # libraries of kernels allocate their workspace at first use
            try:
                offered = cases_of(problem)
            except Exception as error:
                offered = {}
                self.failures[name] = dict.fromkeys(names, say(error))
            for what in (what for what in names if what in offered):
                try:
                    case = offered[what]()
                    if memory:
                        self.bytes[name][what] = peak_memory(case.fresh or case.run, device)
                    else:
                        result = case.result(case.run())  # warms up
                        self.cases[name][what] = case
                        self.results[name, what] = {k: x.cpu() for k, x in result.items()}
                        del result
                    del case
                except Exception as error:
                    self.failures[name][what] = say(error)

    def _synchronize(self) -> None:
        """Wait until everything that was asked of a GPU is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def save(self, problem: str, what: str, path: str) -> None:
        """Save the result of a case, to be compared with that of other libraries."""
        torch.save(self.results[problem, what], path)

    def time(self, problem: str, what: str, repeats: int) -> list[float]:
        """Return the seconds that each of some runs took."""
        run = self.cases[problem][what].run
        times: list[float] = []
        while len(times) < repeats and sum(times) < LONGEST_TURN:
            self._synchronize()
            start = time.perf_counter()
            result = run()
            self._synchronize()
            times.append(time.perf_counter() - start)
            del result  # lest two of them are held
        return times


def main(library: str) -> None:
    """Say what there is, then answer requests until the input ends."""
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    plan = json.loads(sys.stdin.readline())
    torch.set_num_threads(plan.pop("threads"))
    try:
        release = version(library)
    except PackageNotFoundError:
        answer({"error": "not installed"})
        return
    module, function = CASES[library]
    worker = Worker(getattr(import_module(module), function), **plan)
    answer(
        {
            "version": release,
            "torch": version("torch"),
            "cases": {
                name: list(worker.cases[name]) or list(worker.bytes[name])
                for name in plan["wanted"]
            },
            "failures": worker.failures,
            "bytes": worker.bytes,
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(worker, request.pop("do"))(**request))


if __name__ == "__main__":
    main(*sys.argv[1:])
