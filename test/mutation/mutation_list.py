"""The committed list of mutants and what became of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mutation_sites import Site

FILE = Path(__file__).with_name("mutants.txt")
FATES = ("killed", "timed out", "survived", "equivalent")
UNEXPLAINED = "not explained"

_HEADER = """\
# Mutants of the mathematical core, and what became of them; written by `make mutate
# ARGS=--update`, but for the explanations of those that survived.
#
# Each has a name, the file and line (when it was last run), the function, the kind of change, which
# of several equal places of the function it is, and the group without survivors that it belongs to,
# if any. Then the expression, the mutated expression, and the first test that failed. "equivalent:"
# are survivors that give the same results for all inputs, and say why.
"""
_ENTRY = re.compile(
    r"(?P<name>\w{10}) (?P<module>[^ :]+):(?P<line>\d+) (?P<function>\S+) "
    r"(?P<operator>[a-z]+) #(?P<occurrence>\d+)(?: \[(?P<group>\w+)\])?\n"
    r"  - (?P<original>.*)\n  \+ (?P<mutated>.*)\n"
    r"  (?P<fate>killed|timed out|survived|equivalent): (?P<by>.*)"
)


@dataclass(frozen=True)
class Entry:
    """A mutant, its fate, and the test that killed it or why none can."""

    site: Site
    fate: str
    by: str

    @property
    def allowed(self) -> bool:
        """Whether it was killed, or has an explanation; a critical one must not survive."""
        if self.fate == "survived" and self.site.critical:
            return False
        return self.by != UNEXPLAINED


def name(site: Site) -> str:
    """Return a short name of a mutant."""
    return site.digest[:10]


def read(text: str) -> list[Entry]:
    """Return the entries of a list.

    Raises:
        ValueError: If a part of it is no entry.
    """
    entries = []
    for part in text.split("\n\n"):
        part = part.strip()
        if not part or part.startswith("#"):
            continue
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise ValueError(f"This is no entry of a list of mutants:\n{part}")
        function = "" if match["function"] == "-" else match["function"]
        site = Site(
            match["module"],
            function,
            match["operator"],
            match["original"],
            match["mutated"],
            int(match["occurrence"]),
            int(match["line"]),
        )
        entries.append(Entry(site, match["fate"], match["by"]))
    return entries


def write(entries: Iterable[Entry]) -> str:
    """Return the text of a list."""
    parts = [_HEADER.rstrip()]
    for entry in sorted(entries, key=lambda e: (e.site.module, e.site.line, e.site.key)):
        site = entry.site
        group = f" [{site.critical}]" if site.critical else ""
        parts.append(
            f"{name(site)} {site.module}:{site.line} {site.function or '-'} {site.operator} "
            f"#{site.occurrence}{group}\n"
            f"  - {site.original}\n  + {site.mutated}\n  {entry.fate}: {entry.by}"
        )
    return "\n\n".join(parts) + "\n"


def updated(
    sites: Iterable[Site], fates: Mapping[Site, tuple[str, str]], before: Iterable[Entry]
) -> list[Entry]:
    """Return the entries of mutants with new fates; survivors keep their explanations."""
    old = {entry.site.key: entry for entry in before}
    entries = []
    for site in sites:
        entry = old.get(site.key)
        if site in fates:
            fate, by = fates[site]
            if fate == "survived":
                by = UNEXPLAINED
                if entry is not None and entry.fate in ("survived", "equivalent"):
                    fate, by = entry.fate, entry.by
            entries.append(Entry(site, fate, by))
        elif entry is not None:
            entries.append(Entry(site, entry.fate, entry.by))
    return entries
