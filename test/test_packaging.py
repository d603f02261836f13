"""What the distribution promises: its lower bounds, and an import that is silent and light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def test_lower_bounds_are_the_tested_ones() -> None:
    """A bound raised or lowered in one of the two files alone would promise what nobody tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / ".github" / "minimum-versions.txt").read_text(encoding="utf-8").splitlines()
    bounds = {requirement.replace(" >= ", "==") for requirement in project["dependencies"]}
    assert bounds == {line for line in pinned if not line.startswith("#")}


def test_types_are_announced() -> None:
    """Without the marker, type checkers ignore the package's annotations."""
    assert (ROOT / "curvlinops" / "py.typed").exists()


def test_import_is_silent_and_light() -> None:
    """An import prints nothing, warns of nothing, and loads no package of the tests or examples.

    It leaves the global random generator and the number of threads as they are.
    """
    program = """
import sys, torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
before = set(sys.modules)
import curvlinops
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"matplotlib", "sklearn", "pytest", "hypothesis"}, loaded
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
