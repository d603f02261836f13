"""What is measured: cases, the models they run on, who offers them, and what they must agree on.

The names of cases are the same in all libraries. A library's worker knows how to run those that it
offers, see ``ours.py`` and ``peers.py``; they are listed here because tables have a cell for them
also where a library is not installed.
"""

from __future__ import annotations

from typing import NamedTuple

from models import AXES, PROBLEMS, SCALING

OURS = "curvlinops"
PEERS = ["curvlinops-for-pytorch", "backpack-for-pytorch", "hessian-eigenthings"]
OPTIONAL = ["nngeometry", "kronfluence"]  # compared in part, see docs/benchmark.md
CURVLINOPS, BACKPACK, EIGENTHINGS = PEERS
NNGEOMETRY, KRONFLUENCE = OPTIONAL

# Of one flat float32 vector over all parameters, or 8; of one as long as all predictions for the
# transposed Jacobian.
COLUMNS = 8
PLAIN = ["Hessian", "GGN"]
KEPT = [f"{what}, kept graph" for what in PLAIN]
BLOCKS = [f"{what}, {COLUMNS} columns" for what in PLAIN]
JACOBIANS = ["Jacobian", "transposed Jacobian"]
FACTORED = [f"{K} {kind}" for K in ("KFAC", "EKFAC") for kind in ("product", "inverse product")]
PRODUCTS = [*PLAIN, *KEPT, "EF", "MC GGN", *BLOCKS, *JACOBIANS, *FACTORED]

JOINT = ["KFAC", "KFAC type-2", "KFAC empirical", "EKFAC", "EKFAC type-2", "EKFAC empirical"]
CHECKED = [f"{what}, checked" for what in JOINT]  # with the library's own check of determinism
SEPARATE = ["KFAC, separate bias", "KFAC type-2, separate bias"]
DIAGONALS = ["GGN diagonal", "MC GGN diagonal"]
CONSTRUCTORS = [*JOINT, *CHECKED, "KFAC reduce", *SEPARATE, "KFOC", *DIAGONALS]

POWERS = [1, 2, 4, 8, 16, 32]  # numbers of columns


def by_columns(what: str, number: int) -> str:
    """Return the name of the product with so many columns; a vector is not a matrix with one."""
    return f"{what}, {number} column{'s' * (number > 1)}"


COLUMNWISE = [by_columns(what, k) for what in PLAIN for k in POWERS]

OFFERED: dict[str, list[str]] = {
    CURVLINOPS: [
        *(what for what in PRODUCTS if what not in KEPT),
        *(*JOINT, *CHECKED, "KFAC reduce", *COLUMNWISE),
    ],
    BACKPACK: [*SEPARATE, *DIAGONALS],
    EIGENTHINGS: ["Hessian", "GGN", "EF"],
    NNGEOMETRY: ["GGN", "KFAC", "KFAC type-2", "EKFAC type-2", *DIAGONALS],
    KRONFLUENCE: ["EKFAC"],
}

# What takes too long to be timed, and why: here, each example has 64 tokens with 65 classes each.
LEFT_OUT = {("decoder", "GGN diagonal"): "4160 backward passes per example"}

# What depends on random numbers: on Monte-Carlo samples, or on the signs of several loss terms.
_MONTE_CARLO = ["KFAC", "EKFAC", "KFAC, checked", "EKFAC, checked"]
SAMPLED = ["MC GGN", *FACTORED, *_MONTE_CARLO, "KFAC reduce", SEPARATE[0], DIAGONALS[1]]
SIGNED = [*JOINT, *CHECKED, *SEPARATE]
ROUGH = ["MC GGN", *FACTORED, "KFAC reduce", DIAGONALS[1]]  # estimates that differ much

SCALED = ["GGN", "Hessian", "KFAC", "KFAC type-2", "EKFAC"]


class Suite(NamedTuple):
    """Cases by problem, all of them, and the peers that are asked for those they offer."""

    wanted: dict[str, list[str]]
    cases: list[str]
    peers: list[str]


def suite(name: str, quick: bool = False) -> Suite:
    """Return what a suite measures; a trial run has shorter axes."""
    if name != "scaling":
        cases = {
            "products": PRODUCTS,
            "constructors": CONSTRUCTORS,
            "memory": [*PRODUCTS, *CONSTRUCTORS],
        }[name]
        peers = [peer for peer, offered in OFFERED.items() if set(offered) & set(cases)]
        wanted = {
            model: ["gradient", *(what for what in cases if (model, what) not in LEFT_OUT)]
            for model in PROBLEMS
        }
        return Suite(wanted, cases, peers)
    steps = 2 if quick else None
    points = [point for axis in AXES for point in list(SCALING[axis])[:steps]]
    columns = [by_columns(what, k) for what in PLAIN for k in POWERS[:steps]]
    wanted = {point: ["gradient", *SCALED] for point in points}
    wanted["columns"] = ["gradient", *columns]
    return Suite(wanted, [*SCALED, *columns], [CURVLINOPS])


SUITES = ["products", "constructors", "memory", "scaling"]
COMPARED = SUITES[:2]  # the others have the same cases


# --------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------
class Agreement(NamedTuple):
    """Which part of the results is compared with ours, and how far it may be from it."""

    key: str
    limit: float


def agreement(library: str, problem: str, what: str, quick: bool) -> Agreement:
    """Return how results are compared.

    Args:
        library: Who computed it.
        problem: The model.
        what: The case.
        quick: Whether there is one example per batch only: estimates are far apart then.
    """
    if library == OURS:  # with kept graphs, against without
        return Agreement("product", 1e-4)
    if what in SAMPLED or (what in SIGNED and problem == "decoder"):
        # random matrices, with the same expectation: of the trace, or of a quadratic form
        return Agreement("number", 3.0 if quick else 0.45 if what in ROUGH else 0.1)
    if what in PRODUCTS:
        # rounding is about 1e-6, but the Hessian of curvlinops-for-pytorch 3.0.1 is off by 4e-3 on
        # the decoder, in float64 too, where finite differences agree with the others
        return Agreement("product", 2e-2)
    return Agreement("product", 1e-3)
