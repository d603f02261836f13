"""The times of products with the Hessian and the GGN, with and without kept graphs.

Products are of one flat float32 vector over all parameters. All libraries have to agree on them.
"""

from __future__ import annotations

from harness import (
    OURS,
    Library,
    Target,
    Time,
    cells,
    compared,
    fastest,
    relative_to_gradient,
    relative_to_others,
)
from models import PROBLEMS

PEERS = ["curvlinops-for-pytorch", "hessian-eigenthings"]
CASES = ["Hessian", "Hessian, kept graph", "GGN", "GGN, kept graph"]
MEASURED = "relative error to our plain product"
# Largest relative errors to our plain product; that of rounding is about 1e-6. More is allowed to
# peers, which are shown with their error: the Hessian of curvlinops-for-pytorch 3.0.1 is off by
# 4e-3 on the decoder, in float64 too, where finite differences agree with the others.
TOLERANCE, TOLERANCE_PEERS = 1e-4, 2e-2


def compare(libraries: dict[str, Library]) -> dict[str, dict[str, float]]:
    """Return how far other libraries' products, and ours with kept graphs, are from ours."""
    errors: dict[str, dict[str, float]] = {}
    for problem in PROBLEMS:
        for what in ("Hessian", "GGN"):
            reference = libraries[OURS].result(problem, what)["product"]
            others = [(libraries[OURS], f"{what}, kept graph")]
            others += [(libraries[peer], what) for peer in PEERS]
            for library, name in others:
                if library.lacks(problem, name) is None:
                    difference = library.result(problem, name)["product"] - reference
                    error = (difference.norm() / reference.norm()).item()
                    errors.setdefault(f"{name} of {library.name}", {})[problem] = error
    return errors


def disagreements(errors: dict[str, dict[str, float]], quick: bool) -> list[str]:
    """Return the names of products that are those of another matrix."""
    return [
        name
        for name, error in errors.items()
        if not max(error.values())
        < (TOLERANCE if name.endswith(f" of {OURS}") else TOLERANCE_PEERS)
    ]


def tables(versions: dict[str, str], time: Time) -> str:
    """Return the tables.

    Args:
        versions: The libraries' names with their versions.
        time: Returns the seconds of (library, problem, product), or why there are none.
    """
    shown = [(what, OURS, what) for what in CASES]
    shown += [(f"{w} of {versions[peer]}", peer, w) for peer in PEERS for w in ("Hessian", "GGN")]

    def against(what: str, peer: str, other: str, target: Target | None) -> list[str]:
        name = f"{what} / {other} of {versions[peer]}"
        return compared(name, cells(time, OURS, what), cells(time, peer, other), target)

    first, second = PEERS
    rows = [
        against("GGN", first, "GGN", Target(0.8)),
        against("GGN, kept graph", first, "GGN", Target(0.55)),
        against("GGN", second, "GGN", None),
        against("GGN, kept graph", second, "GGN", None),
        *(against("Hessian", peer, "Hessian", None) for peer in PEERS),
    ]
    best = {p: fastest([time(peer, p, "Hessian") for peer in PEERS]) for p in PROBLEMS}
    each = Target(1.0, each=tuple(PROBLEMS))
    for what, target in [("Hessian", each), ("Hessian, kept graph", None)]:
        ours = cells(time, OURS, what)
        rows.append(compared(f"{what} / fastest Hessian of both", ours, best, target))
    return f"{relative_to_gradient(time, shown)}\n\n{relative_to_others(rows)}"
