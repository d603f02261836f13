"""Every error that the package raises, as a user meets it: it names the cause and the way out.

A table of cases provokes them. What is raised is found in the package's source, so that a new error
without a case is a failure, too.
"""

from __future__ import annotations

import warnings

import cases_algebra
import cases_curvature
import cases_kfac
import cases_ranks
import cases_risk
import cases_solvers
import cases_testing
from error_cases import Case
from raise_sites import all_sites, caught_classes, raised_classes, sites_of

TABLES = (
    cases_algebra,
    cases_curvature,
    cases_kfac,
    cases_ranks,
    cases_risk,
    cases_solvers,
    cases_testing,
)

#: Errors that the package always catches itself, so that nobody reads them; and what it does then.
SIGNALS = {
    "CannotRebatchError": "check_curvature skips a check, and its report says why",
    "DependentError": "the diagonal of the GGN is computed in another way, and a warning says so",
    "MisfitError": "the parameters are listed in the error for layers that are not supported",
    "_StartAnew": "the derivative is computed with other means",
}


def test_every_error_names_the_cause_and_the_way_out() -> None:
    """Fails for an error that nobody provokes, one of another type, and one that helps nobody."""
    complaints, seen = [], set()
    for table in TABLES:
        for number, case in enumerate(table.cases, 1):
            complaint, sites = outcome(case)
            seen |= sites
            if complaint is not None:
                complaints.append(f"{table.__name__}, case {number} ({case.cause!r}): {complaint}")
    signals = {site for site, name in raised_classes().items() if name in SIGNALS}
    unseen = all_sites() - seen - signals
    complaints += [f"{site} is raised in no case" for site in sorted(unseen)]
    assert not complaints, "\n".join(complaints)


def outcome(case: Case) -> tuple[str | None, set[str]]:
    """Provoke an error; return what is wrong with it, or None, and where it was raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some errors come after a warning
            case.provoke()
    except Exception as error:
        sites = sites_of(error)
        complaint = case.complaint(error) if sites else "the package does not raise it"
        where = ", ".join(sorted(sites))
        return complaint and f"{complaint}: {where}: {type(error).__name__}: {error}", sites
    return "there was no error", set()


def test_signals_are_caught() -> None:
    """Fails if an error is left out that leaves the package."""
    assert set(raised_classes().values()) >= set(SIGNALS) <= caught_classes()
