"""Times one library; ``bench.py`` runs it, in the library's own environment.

Libraries are used through their documented interface alone. Requests come as lines of JSON on the
standard input, answers go the same way, and in between the process waits: so workers of several
libraries take turns on the same machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from models import PROBLEMS, Problem, gradient
from torch import Tensor, nn


class Case(NamedTuple):
    """What is timed, and what it gives, which libraries have to agree on."""

    run: Callable[[], Any]
    result: Callable[[Any], dict[str, Tensor]]


Cases = dict[str, Callable[[], Case]]  # by name; what makes everything ready
Suite = dict[str, Callable[[Problem], Cases]]  # by library


class UnusableError(Exception):
    """A library has a case, but not as it is compared here."""


def random_vector(length: int) -> Tensor:
    """Return the same vector in every library."""
    return torch.randn(length, generator=torch.Generator().manual_seed(1))


def gradient_case(problem: Problem) -> Case:
    """Compute the gradient over all data, with which all is compared."""
    return Case(lambda: gradient(problem), lambda gradients: {})


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
def product_case(problem: Problem, build: Callable[[], Callable[[Tensor], Tensor]]) -> Case:
    """Multiply with an operator, which is built and warm: graphs that it keeps are made."""
    product, v = build(), random_vector(problem.num_params)
    product(v)
    return Case(lambda: product(v), lambda result: {"product": result.detach()})


def our_products(problem: Problem) -> Cases:
    """Use this package; its worker also computes the gradient."""
    import curvlinops

    arguments = (nn.CrossEntropyLoss(), dict(problem.model.named_parameters()), problem.data)
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def case(cls: Any, **more: Any) -> Callable[[], Case]:
        return lambda: product_case(
            problem, lambda: cls(problem.model, *arguments, **options, **more).__matmul__
        )

    H, G = curvlinops.HessianLinearOperator, curvlinops.GGNLinearOperator
    return {
        "gradient": lambda: gradient_case(problem),
        "Hessian": case(H),
        "Hessian, kept graph": case(H, keep_graph=True),
        "GGN": case(G),
        "GGN, kept graph": case(G, keep_graph=True),
    }


def products_of_curvlinops_for_pytorch(problem: Problem) -> Cases:
    """Use another package whose module has our name."""
    import curvlinops

    arguments = (nn.CrossEntropyLoss(), list(problem.model.parameters()), problem.data)
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def case(cls: Any) -> Callable[[], Case]:
        return lambda: product_case(
            problem, lambda: cls(problem.model, *arguments, **options).__matmul__
        )

    return {
        "Hessian": case(curvlinops.HessianLinearOperator),
        "GGN": case(curvlinops.GGNLinearOperator),
    }


def products_of_hessian_eigenthings(problem: Problem) -> Cases:
    """Average over batches, which have the same size here."""
    import hessian_eigenthings as he

    model, data, loss_func = problem.model, problem.data, nn.CrossEntropyLoss()

    def hessian() -> Callable[[Tensor], Tensor]:
        return he.HessianOperator(model, data, he.supervised_loss(loss_func)).matvec

    def ggn() -> Callable[[Tensor], Tensor]:
        forward, loss_of_output = he.supervised_forward, he.supervised_loss_of_output(loss_func)
        return he.GGNOperator(model, data, forward, loss_of_output).matvec

    return {
        "Hessian": lambda: product_case(problem, hessian),
        "GGN": lambda: product_case(problem, ggn),
    }


# --------------------------------------------------------------------------------------------------
# Constructors
# --------------------------------------------------------------------------------------------------
FISHER_TYPES = {"": "mc", " type-2": "type-2", " empirical": "empirical"}


def our_constructors(problem: Problem) -> Cases:
    """Use this package; its worker also computes the gradient."""
    import curvlinops

    params = dict(problem.matrices)

    def case(cls: Any, fisher_type: str, separate: bool) -> Callable[[], Case]:
        def build() -> Any:
            return cls(
                problem.model,
                nn.CrossEntropyLoss(),
                params,
                problem.data,
                check_deterministic=False,
                fisher_type=fisher_type,
                num_per_example_loss_terms=problem.terms_per_example,
                separate_weight_and_bias=separate,
                num_data=problem.num_data,
                backend="hooks",
            )

        def result(K: Any) -> dict[str, Tensor]:
            return {"product": K @ random_vector(K.shape[1]), "trace": K.trace()}

        return lambda: Case(build, result)

    K, E = curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator
    cases: Cases = {"gradient": lambda: gradient_case(problem)}
    for suffix, fisher_type in FISHER_TYPES.items():
        cases[f"KFAC{suffix}"] = case(K, fisher_type, separate=False)
        cases[f"EKFAC{suffix}"] = case(E, fisher_type, separate=False)
    for suffix in ("", " type-2"):
        cases[f"KFAC{suffix}, separate bias"] = case(K, FISHER_TYPES[suffix], separate=True)
    return cases


class Flat(nn.Module):
    """Logits [n, vocabulary, positions] as [n * positions, vocabulary]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Evaluate the model."""
        return self.model(tokens).transpose(1, 2).flatten(0, 1)


def constructors_of_curvlinops_for_pytorch(problem: Problem) -> Cases:
    """Use another package whose module has our name; asked for its trace, it does all work."""
    import curvlinops

    params, several_terms = list(problem.matrices.values()), problem.terms_per_example > 1

    def case(cls: Any, fisher_type: str) -> Callable[[], Case]:
        model, data = problem.model, problem.data
        if several_terms and cls is curvlinops.EKFACLinearOperator:  # it takes 2d outputs only
            model, data = Flat(model), [(X, y.flatten()) for X, y in data]

        def build() -> Any:
            K = cls(
                model,
                nn.CrossEntropyLoss(),
                params,
                data,
                check_deterministic=False,
                fisher_type=fisher_type,
                num_per_example_loss_terms=problem.terms_per_example,
                separate_weight_and_bias=False,
                num_data=problem.num_data,
            )
            _ = K.trace
            return K

        def result(K: Any) -> dict[str, Tensor]:
            trace = torch.as_tensor(K.trace)
            return {"product": K @ random_vector(K.shape[1]), "trace": trace}

        def make() -> Case:
            if several_terms and fisher_type == "type-2":
                # at initialisation KFAC's trace is 1.3 times, and EKFAC's 6 times the one with its
                # own Monte-Carlo samples, which has the same expectation
                raise UnusableError("another matrix: mixes loss terms")
            return Case(build, result)

        return make

    cases = {}
    for suffix, fisher_type in FISHER_TYPES.items():
        cases[f"KFAC{suffix}"] = case(curvlinops.KFACLinearOperator, fisher_type)
        cases[f"EKFAC{suffix}"] = case(curvlinops.EKFACLinearOperator, fisher_type)
    return cases


def constructors_of_backpack(problem: Problem) -> Cases:
    """Average the factors of batches; its backward pass always computes the gradient, too."""
    import backpack
    from backpack.extensions import KFAC, KFLR

    Factors = dict[str, list[Tensor]]
    params = problem.matrices
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)

    def case(extension: Any) -> Callable[[], Case]:
        def build() -> Factors:
            factors: Factors = {}
            for X, y in problem.data:
                for p in params.values():
                    p.grad = None
                try:
                    with backpack.backpack(extension()):
                        loss_func(model(X), y).backward()
                except NotImplementedError as error:
                    raise UnusableError("layers not supported") from error
                share = len(X) / problem.num_data
                for name, p in params.items():
                    new = getattr(p, extension().savefield)
                    if name in factors:
                        torch._foreach_add_(factors[name], new, alpha=share)
                    else:
                        factors[name] = [factor * share for factor in new]
            return factors

        def result(factors: Factors) -> dict[str, Tensor]:
            v = random_vector(sum(p.numel() for p in params.values()))
            products, trace = [], torch.zeros(())
            parts = v.split([p.numel() for p in params.values()])
            for part, (B, *A) in zip(parts, factors.values(), strict=True):
                rows = B @ part.reshape(len(B), -1)
                products.append((rows @ A[0] if A else rows).flatten())
                trace = trace + B.trace() * (A[0].trace() if A else 1)
            return {"product": torch.cat(products), "trace": trace}

        def make() -> Case:
            nonlocal model, loss_func
            model = backpack.extend(problem.model)
            loss_func = backpack.extend(nn.CrossEntropyLoss())
            return Case(build, result)

        model, loss_func = problem.model, nn.CrossEntropyLoss()
        return make

    return {"KFAC, separate bias": case(KFAC), "KFAC type-2, separate bias": case(KFLR)}


SUITES: dict[str, Suite] = {
    "products": {
        "curvlinops": our_products,
        "curvlinops-for-pytorch": products_of_curvlinops_for_pytorch,
        "hessian-eigenthings": products_of_hessian_eigenthings,
    },
    "constructors": {
        "curvlinops": our_constructors,
        "curvlinops-for-pytorch": constructors_of_curvlinops_for_pytorch,
        "backpack-for-pytorch": constructors_of_backpack,
    },
}


# --------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------
class Worker:
    """The cases of a library on all problems, and their results."""

    def __init__(self, library: str, suite: str, quick: bool):
        self.cases: dict[str, dict[str, Case]] = {}
        self.failures: dict[str, dict[str, str]] = {}
        self.results: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, make in PROBLEMS.items():
            torch.manual_seed(0)  # the same parameters and data in every library
            problem = make()
            if quick:
                problem = problem._replace(data=[(X[:1], y[:1]) for X, y in problem.data])
            self.cases[name], self.failures[name] = {}, {}
            for what, prepare in SUITES[suite][library](problem).items():
                try:
                    case = prepare()
                    self.results[name, what] = case.result(case.run())  # warms up
                    self.cases[name][what] = case
                except UnusableError as error:
                    self.failures[name][what] = str(error)
                except Exception as error:
                    self.failures[name][what] = f"{type(error).__name__}: {error}"[:60]

    def save(self, problem: str, what: str, path: str) -> None:
        """Save the result of a case, to be compared with that of other libraries."""
        torch.save(self.results[problem, what], path)

    def time(self, problem: str, what: str, repeats: int) -> list[float]:
        """Return the seconds that each of some runs took."""
        run = self.cases[problem][what].run
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            result = run()
            times.append(time.perf_counter() - start)
            del result  # lest two of them are held
        return times


def main(library: str, suite: str, threads: str, mode: str) -> None:
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
    worker = Worker(library, suite, mode == "quick")
    answer(
        {
            "version": release,
            "torch": version("torch"),
            "cases": {name: list(cases) for name, cases in worker.cases.items()},
            "failures": worker.failures,
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(worker, request.pop("do"))(**request))


if __name__ == "__main__":
    main(*sys.argv[1:])
