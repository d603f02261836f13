"""The benchmark of products runs, and its tables say what was measured and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs_src" / "benchmarks"
PEERS = ["curvlinops-for-pytorch", "hessian-eigenthings"]
PROBLEMS = ["MLP", "CNN", "decoder"]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it imports others of its folder."""
    monkeypatch.syspath_prepend(FOLDER)
    import products

    yield products
    for name in ("products", "models"):
        del sys.modules[name]


def read(text: str) -> dict[str, list[str]]:
    """Return the cells of all rows, by their first one; cells are two spaces or more apart."""
    rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


# seconds per product, of the three models
TIMES = {
    "curvlinops": {
        "gradient": [1.0, 2.0, 4.0],
        "Hessian": [3.0, 6.0, 12.0],
        "Hessian, kept graph": [2.0, 4.0, 8.0],
        "GGN": [1.0, 4.0, 16.0],
        "GGN, kept graph": [1.0, 2.0, 4.0],
    },
    PEERS[0]: {"Hessian": [3.0, 12.0, 12.0], "GGN": [2.0, 4.0, 32.0]},
    PEERS[1]: {"Hessian": [6.0, 6.0, 10.0], "GGN": [2.0, 4.0, 8.0]},
}


def show(products: ModuleType, missing: dict[tuple[str, str, str], str]) -> dict[str, list[str]]:
    def time(library: str, problem: str, what: str) -> float | str:
        if (library, problem, what) in missing:
            return products.Missing(missing[library, problem, what])
        return TIMES[library][what][PROBLEMS.index(problem)]

    return read(products.tables({name: name for name in TIMES}, time))


def test_tables_are_ratios(products: ModuleType):
    rows = show(products, {})
    assert rows["gradient"] == ["1000.0 ms", "2000.0 ms", "4000.0 ms"]
    assert rows["GGN"] == ["1.00", "2.00", "4.00", "2.00"]
    assert rows[f"GGN of {PEERS[0]}"] == ["2.00", "2.00", "8.00", "3.17"]
    ours = f"GGN / GGN of {PEERS[0]}"
    assert rows[ours] == ["0.50", "1.00", "0.50", "0.63", "≤ 0.8", "reached"]
    kept = f"GGN, kept graph / GGN of {PEERS[0]}"
    assert rows[kept] == ["0.50", "0.50", "0.12", "0.31", "≤ 0.55", "reached"]
    # the fastest peer differs from model to model; a mean below 1 would not be enough
    fastest = "Hessian / fastest Hessian of both"
    assert rows[fastest] == ["1.00", "1.00", "1.20", "1.06", "each ≤ 1.0", "MISSED"]


def test_what_is_missing_is_named_and_has_no_mean(products: ModuleType):
    rows = show(
        products,
        {
            (PEERS[0], "CNN", "GGN"): "no GGN",
            (PEERS[1], "decoder", "Hessian"): "RuntimeError: no double backward",
        },
    )
    assert rows[f"GGN of {PEERS[0]}"] == ["2.00", "— (no GGN)", "8.00", "— (not available)"]
    ours = f"GGN / GGN of {PEERS[0]}"
    assert rows[ours][1:] == ["— (no GGN)", "0.50", "— (not available)", "≤ 0.8", "not known"]
    # the fastest of those that are left is not the fastest
    *ratios, mean, _, verdict = rows["Hessian / fastest Hessian of both"]
    assert ratios == ["1.00", "1.00", "— (RuntimeError: no double backward)"]
    assert (mean, verdict) == ("— (not available)", "not known")


def test_runs_without_peers(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = tmp_path / "times.json"
    result = subprocess.run(
        [
            *(sys.executable, FOLDER / "products.py", "--quick", "--rounds", "1"),
            *("--repeats", "1", "--peers", tmp_path / "none", "--json", output),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = read(result.stdout)
    for what in ("Hessian", "Hessian, kept graph", "GGN", "GGN, kept graph"):
        assert all(float(cell) > 0 for cell in rows[what]) and len(rows[what]) == 4
    for peer in PEERS:
        for what in ("Hessian", "GGN"):
            assert rows[f"{what} of {peer}"] == ["— (not installed)"] * 3 + ["— (not available)"]
    errors = rows["GGN, kept graph of curvlinops"]
    assert all(float(cell) < 1e-5 for cell in errors)

    content = json.loads(output.read_text())
    assert content["libraries"][PEERS[0]] == {"error": "not installed"}
    for problem in PROBLEMS:
        assert set(content["seconds"]["curvlinops"][problem]) == set(TIMES["curvlinops"])
