"""Which tests can see a mutant: those that call its function, nearest and fastest first."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mutation_runner import record, test_files
from mutation_sites import MODULES, ROOT, Site

#: Tests that were written for a module, besides those of its name.
NEAREST = {
    "curvlinops/_damping.py": ("test/test_damping.py",),
    "curvlinops/computers/eigenvalues.py": (
        "test/kfac/test_ekfac_closed_forms.py",
        "test/kfac/test_kfac_exact.py",
    ),
    "curvlinops/computers/formats.py": (
        "test/kfac/test_layer_reference.py",
        "test/kfac/test_kfac_layers.py",
    ),
    "curvlinops/computers/group_statistic.py": (
        "test/kfac/test_ekfac_closed_forms.py",
        "test/kfac/test_kfoc.py",
    ),
    "curvlinops/computers/kfoc.py": ("test/kfac/test_kfoc.py",),
    "curvlinops/computers/layers.py": ("test/kfac/test_layer_reference.py",),
    "curvlinops/computers/positions.py": (
        "test/kfac/test_moment.py",
        "test/kfac/test_kfac_factors.py",
    ),
    "curvlinops/computers/products.py": ("test/kfac/test_kfoc.py",),
    "curvlinops/computers/singular_vectors.py": ("test/kfac/test_kfoc.py",),
    "curvlinops/computers/statistics.py": (
        "test/kfac/test_kfac_factors.py",
        "test/kfac/test_kfac_layers.py",
    ),
    "curvlinops/computers/vectors.py": ("test/kfac/test_loss_terms.py",),
    "curvlinops/risk/cross_entropy.py": ("test/risk/test_losses.py",),
    "curvlinops/risk/elementwise.py": ("test/risk/test_losses.py",),
    "curvlinops/risk/loss.py": ("test/risk/test_losses.py", "test/risk/test_register_loss.py"),
}
SAMPLE_FILES = 2  # of the first run
SAMPLE_SECONDS = 5.0
PROVEN = 6  # tests that have killed neighbours
REST_SECONDS = 40.0  # of the second one, which takes the fastest tests of all files


class Reach:
    """What is known of each test: its time, and the functions of the core that it calls."""

    def __init__(self, root: Path):
        self._root = root  # the copy of the checkout
        self.tests: dict[str, dict[str, Any]] = {}
        self.by_function: dict[str, list[str]] = defaultdict(list)
        self._killers: dict[str, Counter[str]] = defaultdict(Counter)

    def load(self, report: Callable[[str], None], ask: Callable[[str], bool]) -> None:
        """Read what was recorded of each file of tests, and record what is missing or outdated.

        Args:
            report: Takes lines for the user.
            ask: Whether a file is wanted.
        """
        for file in filter(ask, test_files()):
            path = self._root.parent / f"reach-{file.replace('/', '-')}.json"
            if path.exists() and path.stat().st_mtime > (ROOT / file).stat().st_mtime:
                tests = json.loads(path.read_text())
            else:
                report(f"Looking at what {file} tests")
                tests = record(self._root, file)
                if not tests and file not in MODULES:
                    path.unlink(missing_ok=True)
                    report(f"{file} has no tests, or cannot be imported.")
            for nodeid, test in tests.items():
                if test["failed"]:
                    continue  # of which a failure would say nothing
                self.tests[nodeid] = test
                for function in test["reached"]:
                    self.by_function[function].append(nodeid)
                for module in {function.split(":")[0] for function in test["reached"]}:
                    self.by_function[f"{module}:"].append(nodeid)

    def note(self, site: Site, nodeid: str) -> None:
        """Note that a test has killed a mutant: it may kill its neighbours, or the same again."""
        for place in (site.digest, f"{site.module}:{site.function}", f"{site.module}:"):
            self._killers[place][nodeid] += 1

    def _proven(self, site: Site, nodeids: Iterable[str]) -> list[str]:
        """Return a few tests, of at most two files, that have killed this mutant or neighbours."""
        known = set(nodeids)
        places = (site.digest, f"{site.module}:{site.function}", f"{site.module}:")
        ordered = [nodeid for p in places for nodeid, _ in self._killers[p].most_common(PROVEN)]
        ordered = [nodeid for nodeid in dict.fromkeys(ordered) if nodeid in known][:PROVEN]
        files = list(dict.fromkeys(nodeid.split("::")[0] for nodeid in ordered))[:2]
        return [nodeid for nodeid in ordered if nodeid.split("::")[0] in files]

    def runs(self, site: Site) -> list[list[str]]:
        """Return lists of tests: those that have proven good, near ones, and others."""
        nodeids = self.by_function[f"{site.module}:{site.function}"]
        if not nodeids:  # the body of a class, or a function that is called by the import
            nodeids = self.by_function[f"{site.module}:"]
        by_file: dict[str, list[str]] = defaultdict(list)
        for nodeid in sorted(nodeids, key=self._seconds):
            by_file[nodeid.split("::")[0]].append(nodeid)
        stem = Path(site.module).stem.strip("_")
        near = (f"test/test_{stem}.py", site.module, *NEAREST.get(site.module, ()))

        def rank(file: str) -> tuple[bool, float]:
            mean = sum(map(self._seconds, by_file[file])) / len(by_file[file])
            return file not in near, mean - 0.01 * len(by_file[file])

        files = sorted(by_file, key=rank)
        proven = self._proven(site, nodeids)
        taken = set(proven)
        left = {file: [n for n in by_file[file] if n not in taken] for file in files}
        near_files = [file for file in files if left[file]][:SAMPLE_FILES]
        sample = self._fastest(left, near_files, SAMPLE_SECONDS)
        taken |= set(sample)
        left = {file: [n for n in by_file[file] if n not in taken] for file in files}
        rest = self._fastest(left, [file for file in files if left[file]], REST_SECONDS)
        rest.sort(key=self._seconds)  # refusals are fast, and see other mistakes than results do
        return [run for run in (proven, sample, rest) if run]

    def _fastest(
        self, by_file: dict[str, list[str]], files: list[str], seconds: float
    ) -> list[str]:
        """Return tests of all files, with equal times as far as there are so many."""
        chosen: dict[str, list[str]] = {}
        # those that need little come first, and leave their time to the others
        total = {file: sum(map(self._seconds, by_file[file])) for file in files}
        for count, file in enumerate(sorted(files, key=total.__getitem__)):
            share = seconds / (len(files) - count)
            chosen[file] = []
            for nodeid in by_file[file]:
                if chosen[file] and self._seconds(nodeid) > share:
                    break
                chosen[file].append(nodeid)
                share -= self._seconds(nodeid)
                seconds -= self._seconds(nodeid)
        return [nodeid for file in files for nodeid in chosen[file]]

    def expected(self, nodeids: list[str]) -> float:
        """Return how many seconds tests take without a mutant."""
        return sum(map(self._seconds, nodeids)) + len({n.split("::")[0] for n in nodeids})

    def _seconds(self, nodeid: str) -> float:
        return float(self.tests[nodeid]["seconds"])
