"""Times the products of one library; ``products.py`` runs it, in the library's own environment.

Libraries are used through their documented interface alone. Requests come as lines of JSON on the
standard input, answers go the same way, and in between the process waits: so workers of several
libraries take turns on the same machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from models import PROBLEMS, Problem, gradient
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
Products = dict[str, Callable[[], Product]]  # by name; what builds the operator


def ours(problem: Problem) -> Products:
    """Use this package; its worker also computes the gradient, with which all is compared."""
    import curvlinops

    arguments = (nn.CrossEntropyLoss(), dict(problem.model.named_parameters()), problem.data)
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def build(cls: Any, **more: Any) -> Callable[[], Product]:
        return lambda: cls(problem.model, *arguments, **options, **more).__matmul__

    H, G = curvlinops.HessianLinearOperator, curvlinops.GGNLinearOperator
    return {
        "gradient": lambda: lambda v: torch.cat([g.flatten() for g in gradient(problem)]),
        "Hessian": build(H),
        "Hessian, kept graph": build(H, keep_graph=True),
        "GGN": build(G),
        "GGN, kept graph": build(G, keep_graph=True),
    }


def curvlinops_for_pytorch(problem: Problem) -> Products:
    """Use another package whose module has our name."""
    import curvlinops

    arguments = (nn.CrossEntropyLoss(), list(problem.model.parameters()), problem.data)
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def build(cls: Any) -> Callable[[], Product]:
        return lambda: cls(problem.model, *arguments, **options).__matmul__

    return {
        "Hessian": build(curvlinops.HessianLinearOperator),
        "GGN": build(curvlinops.GGNLinearOperator),
    }


def hessian_eigenthings(problem: Problem) -> Products:
    """Average over batches, which have the same size here."""
    import hessian_eigenthings as he

    model, data, loss_func = problem.model, problem.data, nn.CrossEntropyLoss()

    def hessian() -> Product:
        return he.HessianOperator(model, data, he.supervised_loss(loss_func)).matvec

    def ggn() -> Product:
        forward, loss_of_output = he.supervised_forward, he.supervised_loss_of_output(loss_func)
        return he.GGNOperator(model, data, forward, loss_of_output).matvec

    return {"Hessian": hessian, "GGN": ggn}


LIBRARIES: dict[str, Callable[[Problem], Products]] = {
    "curvlinops": ours,
    "curvlinops-for-pytorch": curvlinops_for_pytorch,
    "hessian-eigenthings": hessian_eigenthings,
}


class Worker:
    """The products of a library on all problems, and a vector for each problem."""

    def __init__(self, library: str, quick: bool):
        self.products: dict[str, dict[str, Product]] = {}
        self.failures: dict[str, dict[str, str]] = {}
        self.vectors: dict[str, Tensor] = {}
        for name, make in PROBLEMS.items():
            torch.manual_seed(0)  # the same parameters, data and vector in every library
            problem = make()
            if quick:
                problem = problem._replace(data=[(X[:1], y[:1]) for X, y in problem.data])
            v = self.vectors[name] = torch.randn(problem.num_params)
            self.products[name], self.failures[name] = {}, {}
            for what, build in LIBRARIES[library](problem).items():
                try:
                    product = build()
                    product(v)  # warms up, and makes the graphs that are kept
                    self.products[name][what] = product
                except Exception as error:
                    self.failures[name][what] = f"{type(error).__name__}: {error}"[:60]

    def save(self, problem: str, what: str, path: str) -> None:
        """Save a product, to be compared with that of other libraries."""
        torch.save(self.products[problem][what](self.vectors[problem]).detach(), path)

    def time(self, problem: str, what: str, repeats: int) -> list[float]:
        """Return the seconds that each of some products took."""
        product, v = self.products[problem][what], self.vectors[problem]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(v)
            times.append(time.perf_counter() - start)
        return times


def main(library: str, threads: str, mode: str) -> None:
    """Say what there is, then answer requests until the input ends."""
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    torch.set_num_threads(int(threads))
    try:
        release = version(library)
    except PackageNotFoundError:
        answer({"error": "not installed"})
        return
    worker = Worker(library, mode == "quick")
    answer(
        {
            "version": release,
            "torch": version("torch"),
            "products": {name: list(products) for name, products in worker.products.items()},
            "failures": worker.failures,
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(worker, request.pop("do"))(**request))


if __name__ == "__main__":
    main(*sys.argv[1:])
