"""This package's cases."""

from __future__ import annotations

from typing import Any

from cases import Case, Cases, gradient_case, product_case, random_tensor
from models import Problem
from suites import COLUMNS, PLAIN, POWERS, by_columns
from torch import Tensor, nn

import curvlinops

FISHER_TYPES = {"": "mc", " type-2": "type-2", " empirical": "empirical"}
DAMPING = 1e-2


def cases(problem: Problem) -> Cases:
    """Return everything; the gradient is this worker's, too."""
    return {
        "gradient": lambda: gradient_case(problem),
        **_products(problem),
        **_factored_products(problem),
        **_constructors(problem),
    }


def _products(problem: Problem) -> Cases:
    """Products that evaluate the network."""
    params, data = dict(problem.model.named_parameters()), problem.data
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def case(cls: Any, columns: int = 0, **more: Any) -> Any:
        def make() -> Case:
            def build() -> Any:
                loss_func = nn.CrossEntropyLoss()
                return cls(problem.model, loss_func, params, data, **options, **more).__matmul__

            v = random_tensor(problem.device, problem.num_params, *([columns] if columns else []))
            return product_case(v, build, fresh="keep_graph" in more)

        return make

    def jacobian(cls: Any) -> Any:
        def make() -> Case:
            J = cls(problem.model, params, data, **options)
            return product_case(random_tensor(problem.device, J.shape[1]), lambda: J.__matmul__)

        return make

    H, G = curvlinops.HessianLinearOperator, curvlinops.GGNLinearOperator
    found: Cases = {
        "Hessian": case(H),
        "Hessian, kept graph": case(H, keep_graph=True),
        "GGN": case(G),
        "GGN, kept graph": case(G, keep_graph=True),
        "EF": case(curvlinops.EFLinearOperator),
        "MC GGN": case(G, mc_samples=1),
        "Jacobian": jacobian(curvlinops.JacobianLinearOperator),
        "transposed Jacobian": jacobian(curvlinops.TransposedJacobianLinearOperator),
    }
    for what, cls in zip(PLAIN, (H, G), strict=True):
        for k in {*POWERS, COLUMNS}:
            found[by_columns(what, k)] = case(cls, columns=k)
    return found


def _kronecker(problem: Problem, cls: Any, **options: Any) -> Any:
    """Build a Kronecker-factored operator of linear layers and convolutions."""
    return cls(
        problem.model,
        nn.CrossEntropyLoss(),
        dict(problem.matrices),
        problem.data,
        num_per_example_loss_terms=problem.terms_per_example,
        num_data=problem.num_data,
        backend="hooks",
        **{
            "check_deterministic": False,
            "fisher_type": "mc",
            "separate_weight_and_bias": False,
            **options,
        },
    )


def _factored_products(problem: Problem) -> Cases:
    """Products with matrices that are there: the network is not evaluated."""

    def case(cls: Any, inverse: bool) -> Any:
        def make() -> Case:
            K = _kronecker(problem, cls)
            if inverse:
                K = K.inverse(damping=DAMPING, use_exact_damping=True)
            return product_case(random_tensor(problem.device, K.shape[1]), lambda: K.__matmul__)

        return make

    return {
        "KFAC product": case(curvlinops.KFACLinearOperator, False),
        "KFAC inverse product": case(curvlinops.KFACLinearOperator, True),
        "EKFAC product": case(curvlinops.EKFACLinearOperator, False),
        "EKFAC inverse product": case(curvlinops.EKFACLinearOperator, True),
    }


def _constructors(problem: Problem) -> Cases:
    """All passes over the data, and decompositions."""

    def result(K: Any) -> dict[str, Tensor]:
        return {
            "product": K @ random_tensor(problem.device, K.shape[1]),
            "number": K.trace(),
        }

    def case(cls: Any, **options: Any) -> Any:
        return lambda: Case(lambda: _kronecker(problem, cls, **options), result)

    def diagonal(mc_samples: int) -> Any:
        def build() -> Any:
            return curvlinops.GGNDiagonalLinearOperator(
                problem.model,
                nn.CrossEntropyLoss(),
                dict(problem.model.named_parameters()),
                problem.data,
                check_deterministic=False,
                num_data=problem.num_data,
                mc_samples=mc_samples,
            )

        return lambda: Case(build, result)

    K, E = curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator
    found: Cases = {}
    for name, cls in (("KFAC", K), ("EKFAC", E)):
        for suffix, fisher_type in FISHER_TYPES.items():
            options = {"fisher_type": fisher_type}
            found[f"{name}{suffix}"] = case(cls, **options)
            found[f"{name}{suffix}, checked"] = case(cls, check_deterministic=True, **options)
    for suffix in ("", " type-2"):
        found[f"KFAC{suffix}, separate bias"] = case(
            K, fisher_type=FISHER_TYPES[suffix], separate_weight_and_bias=True
        )
    found["KFAC reduce"] = case(K, kfac_approx="reduce")
    found["KFOC"] = case(curvlinops.KFOCLinearOperator)
    found["GGN diagonal"] = diagonal(0)
    found["MC GGN diagonal"] = diagonal(1)
    return found
