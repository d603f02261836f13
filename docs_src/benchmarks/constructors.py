"""The times of KFAC's and EKFAC's construction: all passes over the data, and decompositions.

Expand, one Monte-Carlo sample, the weights and biases of linear layers and convolutions; a bias is
treated with its weight, or separately where the peer knows nothing else. All libraries have to
agree on products with one flat float32 vector; on the trace alone where random numbers are drawn:
for Monte-Carlo samples, or the signs of several loss terms.
"""

from __future__ import annotations

from harness import (
    OURS,
    Cell,
    Library,
    Missing,
    Target,
    Time,
    cells,
    compared,
    geometric_mean,
    ratios,
    relative_to_gradient,
    relative_to_others,
)
from models import PROBLEMS

CURVLINOPS, BACKPACK = PEERS = ["curvlinops-for-pytorch", "backpack-for-pytorch"]
SAMPLED = ["KFAC", "EKFAC", "KFAC, separate bias"]  # Monte-Carlo
JOINT = ["KFAC", "KFAC type-2", "KFAC empirical", "EKFAC", "EKFAC type-2", "EKFAC empirical"]
SEPARATE = ["KFAC, separate bias", "KFAC type-2, separate bias"]
CASES = [*JOINT, *SEPARATE]
OFFERED = {CURVLINOPS: JOINT, BACKPACK: SEPARATE}
MEASURED = "relative difference to ours"
# Largest relative differences: of products, and of traces of random matrices. In a trial run there
# is an example per batch only, and traces are far apart.
TOLERANCE, TOLERANCE_RANDOM, TOLERANCE_RANDOM_QUICK = 1e-3, 0.1, 1.0


def is_random(problem: str, what: str) -> bool:
    """Return whether a case depends on random numbers: samples, or signs of tokens."""
    return what in SAMPLED or problem == "decoder"


def compare(libraries: dict[str, Library]) -> dict[str, dict[str, float]]:
    """Return how far other libraries' matrices are from ours."""
    errors: dict[str, dict[str, float]] = {}
    for peer, offered in OFFERED.items():
        for what in offered:
            for problem in PROBLEMS:
                if libraries[peer].lacks(problem, what) is None:
                    ours = libraries[OURS].result(problem, what)
                    theirs = libraries[peer].result(problem, what)
                    assert ours["product"].shape == theirs["product"].shape
                    key = "trace" if is_random(problem, what) else "product"
                    error = (theirs[key] - ours[key]).norm() / ours[key].norm()
                    errors.setdefault(f"{what} of {peer}", {})[problem] = error.item()
    return errors


def disagreements(errors: dict[str, dict[str, float]], quick: bool) -> list[str]:
    """Return the names of other matrices than ours."""
    tolerance_random = TOLERANCE_RANDOM_QUICK if quick else TOLERANCE_RANDOM
    return [
        f"{name} on {problem}"
        for name, error in errors.items()
        for problem, value in error.items()
        if not value
        < (tolerance_random if is_random(problem, name.split(" of ")[0]) else TOLERANCE)
    ]


def mean_of_both(ours: dict[str, Cell], others: dict[str, Cell]) -> list[str]:
    """Return a row with the mean over those models alone that both libraries have."""
    known = {p: r for p, r in ratios(ours, others).items() if not isinstance(r, Missing)}
    mean = f"{geometric_mean(known.values()):.2f}"
    label = f"  the same, mean over {', '.join(known) or 'nothing'} only"
    return [label, *("" for _ in PROBLEMS), mean, "", ""]


def tables(versions: dict[str, str], time: Time) -> str:
    """Return the tables.

    Args:
        versions: The libraries' names with their versions.
        time: Returns the seconds of (library, problem, case), or why there are none.
    """
    shown = [(what, OURS, what) for what in CASES]
    shown += [
        (f"{what} of {versions[peer]}", peer, what) for peer in PEERS for what in OFFERED[peer]
    ]
    targets = {
        "KFAC": Target(0.6),
        "EKFAC": Target(0.6),
        **dict.fromkeys(SEPARATE, Target(1.0, each=("MLP",))),
    }
    rows = []
    for peer, offered in OFFERED.items():
        for what in offered:
            ours, theirs = cells(time, OURS, what), cells(time, peer, what)
            name = f"{what} / that of {versions[peer]}"
            rows.append(compared(name, ours, theirs, targets.get(what)))
            if any(isinstance(cell, Missing) for cell in theirs.values()):
                rows.append(mean_of_both(ours, theirs))
    return f"{relative_to_gradient(time, shown)}\n\n{relative_to_others(rows)}"
