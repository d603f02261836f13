"""The benchmarks run, and their tables say what was measured and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs_src" / "benchmarks"
BACKPACK, CURVLINOPS, EIGENTHINGS = PEERS = [
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
]
PROBLEMS = ["MLP", "CNN", "decoder"]
MODULES = ["bench", "constructors", "harness", "models", "products", "worker"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they import each other."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


def read(text: str) -> dict[str, list[str]]:
    """Return the cells of all rows, by their first one; cells are two spaces or more apart."""
    rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


# Seconds of each case, of the three models.
PRODUCTS = {
    "curvlinops": {
        "gradient": [1.0, 2.0, 4.0],
        "Hessian": [3.0, 6.0, 12.0],
        "Hessian, kept graph": [2.0, 4.0, 8.0],
        "GGN": [1.0, 4.0, 16.0],
        "GGN, kept graph": [1.0, 2.0, 4.0],
    },
    CURVLINOPS: {"Hessian": [3.0, 12.0, 12.0], "GGN": [2.0, 4.0, 32.0]},
    EIGENTHINGS: {"Hessian": [6.0, 6.0, 10.0], "GGN": [2.0, 4.0, 8.0]},
}
JOINT = ["KFAC", "KFAC type-2", "KFAC empirical", "EKFAC", "EKFAC type-2", "EKFAC empirical"]
SEPARATE = ["KFAC, separate bias", "KFAC type-2, separate bias"]
CONSTRUCTORS = {
    "curvlinops": {
        "gradient": [1.0, 2.0, 4.0],
        **{what: [2.0, 4.0, 16.0] for what in JOINT},
        **{what: [3.0, 3.0, 3.0] for what in SEPARATE},
    },
    CURVLINOPS: {
        **{what: [4.0, 4.0, 64.0] for what in JOINT},
        "EKFAC": [4.0, 4.0, 16.0],
        "KFAC empirical": [4.0, 16.0, 16.0],
    },
    BACKPACK: {SEPARATE[0]: [3.0, 1.0, 1.0], SEPARATE[1]: [2.0, 9.0, 9.0]},
}
TIMES = {"products": PRODUCTS, "constructors": CONSTRUCTORS}
Missing = dict[tuple[str, str, str], str]


def show(modules: dict[str, ModuleType], suite: str, missing: Missing) -> dict[str, list[str]]:
    times = TIMES[suite]

    def time(library: str, problem: str, what: str) -> float | str:
        if (library, problem, what) in missing:
            return modules["harness"].Missing(missing[library, problem, what])
        return times[library][what][PROBLEMS.index(problem)]

    return read(modules[suite].tables({name: name for name in times}, time))


def test_products_are_ratios(modules: dict[str, ModuleType]):
    rows = show(modules, "products", {})
    assert rows["gradient"] == ["1000.0 ms", "2000.0 ms", "4000.0 ms"]
    assert rows["GGN"] == ["1.00", "2.00", "4.00", "2.00"]
    assert rows[f"GGN of {CURVLINOPS}"] == ["2.00", "2.00", "8.00", "3.17"]
    ours = f"GGN / GGN of {CURVLINOPS}"
    assert rows[ours] == ["0.50", "1.00", "0.50", "0.63", "≤ 0.8", "reached"]
    kept = f"GGN, kept graph / GGN of {CURVLINOPS}"
    assert rows[kept] == ["0.50", "0.50", "0.12", "0.31", "≤ 0.55", "reached"]
    # the fastest peer differs from model to model; a mean below 1 would not be enough
    fastest = "Hessian / fastest Hessian of both"
    assert rows[fastest] == ["1.00", "1.00", "1.20", "1.06", "each ≤ 1.0", "MISSED"]


def test_products_that_are_missing_are_named_and_have_no_mean(modules: dict[str, ModuleType]):
    rows = show(
        modules,
        "products",
        {
            (CURVLINOPS, "CNN", "GGN"): "no GGN",
            (EIGENTHINGS, "decoder", "Hessian"): "RuntimeError: no double backward",
        },
    )
    assert rows[f"GGN of {CURVLINOPS}"] == ["2.00", "— (no GGN)", "8.00", "— (not available)"]
    ours = f"GGN / GGN of {CURVLINOPS}"
    assert rows[ours][1:] == ["— (no GGN)", "0.50", "— (not available)", "≤ 0.8", "not known"]
    # the fastest of those that are left is not the fastest
    *ratios, mean, _, verdict = rows["Hessian / fastest Hessian of both"]
    assert ratios == ["1.00", "1.00", "— (RuntimeError: no double backward)"]
    assert (mean, verdict) == ("— (not available)", "not known")


def test_constructors_are_ratios(modules: dict[str, ModuleType]):
    rows = show(modules, "constructors", {})
    assert rows["gradient"] == ["1000.0 ms", "2000.0 ms", "4000.0 ms"]
    assert rows["KFAC"] == ["2.00", "2.00", "4.00", "2.52"]
    assert rows[f"KFAC of {CURVLINOPS}"] == ["4.00", "2.00", "16.00", "5.04"]
    ours = f"KFAC / that of {CURVLINOPS}"
    assert rows[ours] == ["0.50", "1.00", "0.25", "0.50", "≤ 0.6", "reached"]
    ours = f"EKFAC / that of {CURVLINOPS}"
    assert rows[ours] == ["0.50", "1.00", "1.00", "0.79", "≤ 0.6", "MISSED"]
    ours = f"KFAC empirical / that of {CURVLINOPS}"
    assert rows[ours] == ["0.50", "0.25", "1.00", "0.50"]  # it has no target
    # its target concerns one model only
    ours = f"KFAC, separate bias / that of {BACKPACK}"
    assert rows[ours] == ["1.00", "3.00", "3.00", "2.08", "MLP ≤ 1.0", "reached"]
    ours = f"KFAC type-2, separate bias / that of {BACKPACK}"
    assert rows[ours] == ["1.50", "0.33", "0.33", "0.55", "MLP ≤ 1.0", "MISSED"]
    assert not any(name.startswith("the same") for name in rows)


def test_constructors_that_are_missing_have_a_mean_of_their_own(modules: dict[str, ModuleType]):
    missing = {
        (CURVLINOPS, "decoder", "KFAC"): "no sequences",
        **{(BACKPACK, p, what): "not installed" for p in PROBLEMS for what in SEPARATE},
    }
    rows = show(modules, "constructors", missing)
    ours = f"KFAC / that of {CURVLINOPS}"
    unknown = "— (no sequences)"
    assert rows[ours] == ["0.50", "1.00", unknown, "— (not available)", "≤ 0.6", "not known"]
    assert rows["the same, mean over MLP, CNN only"] == ["0.71"]
    ours = f"KFAC, separate bias / that of {BACKPACK}"
    assert rows[ours] == [*["— (not installed)"] * 3, "— (not available)", "MLP ≤ 1.0", "not known"]
    assert rows["the same, mean over nothing only"] == ["— (not available)"]


class Fake:
    """A library whose results are given, by problem and case."""

    def __init__(self, results: dict[tuple[str, str], dict[str, Tensor]]):
        self.results = results

    def lacks(self, problem: str, what: str) -> str | None:
        return None if (problem, what) in self.results else "missing"

    def result(self, problem: str, what: str) -> dict[str, Tensor]:
        return self.results[problem, what]


def matrix(product: list[float], trace: float) -> dict[str, Tensor]:
    return {"product": torch.tensor(product), "trace": torch.tensor(trace)}


def test_other_matrices_are_found(modules: dict[str, ModuleType]):
    """Products are compared where nothing is random, and traces elsewhere."""
    ours = {
        (problem, what): matrix([3.0, 4.0], 10.0)
        for problem in PROBLEMS
        for what in (*JOINT, *SEPARATE)
    }
    theirs = dict(ours)
    theirs["MLP", "KFAC"] = matrix([5.0, 0.0], 10.5)  # other samples
    theirs["CNN", "KFAC"] = matrix([3.0, 4.0], 12.0)
    theirs["MLP", "KFAC type-2"] = matrix([3.0, 4.01], 10.0)
    theirs["decoder", "KFAC type-2"] = matrix([5.0, 0.0], 10.5)  # other signs
    theirs["CNN", "EKFAC empirical"] = matrix([float("nan"), 0.0], 10.0)
    del theirs["decoder", "EKFAC"]
    constructors = modules["constructors"]
    libraries = {"curvlinops": Fake(ours), CURVLINOPS: Fake(theirs), BACKPACK: Fake(ours)}
    errors = constructors.compare(libraries)
    mc = errors[f"KFAC of {CURVLINOPS}"]
    assert mc == pytest.approx({"MLP": 0.05, "CNN": 0.2, "decoder": 0.0})
    type_2 = errors[f"KFAC type-2 of {CURVLINOPS}"]
    assert type_2 == pytest.approx({"MLP": 0.002, "CNN": 0.0, "decoder": 0.05}, rel=1e-3)
    assert set(errors[f"EKFAC of {CURVLINOPS}"]) == {"MLP", "CNN"}
    found = [
        f"KFAC of {CURVLINOPS} on CNN",
        f"KFAC type-2 of {CURVLINOPS} on MLP",
        f"EKFAC empirical of {CURVLINOPS} on CNN",
    ]
    assert constructors.disagreements(errors, quick=False) == found
    assert constructors.disagreements(errors, quick=True) == found[1:]  # traces mean little


def test_slow_cases_are_not_repeated(modules: dict[str, ModuleType]):
    class Clock:
        def __init__(self, name: str, seconds: float):
            self.name, self.seconds = name, seconds

        def lacks(self, problem: str, what: str) -> None:
            return None

        def ask(self, do: str, problem: str, what: str, repeats: int) -> list[float]:
            return [self.seconds if (problem, what) == ("CNN", "slow") else 1.0] * repeats

    libraries = {"a": Clock("a", 1.0), "b": Clock("b", 6.0)}
    measured = modules["harness"].measure(libraries, ["fast", "slow"], 3, 2, seconds=11.0)
    for name in libraries:  # both have as many
        assert len(measured[name]["MLP"]["slow"]) == 6
        assert len(measured[name]["CNN"]["fast"]) == 6
        assert len(measured[name]["CNN"]["slow"]) == 2


@pytest.mark.parametrize("problem", PROBLEMS)
def test_matrices_are_those_of_linear_layers_and_convolutions(
    problem: str, modules: dict[str, ModuleType]
):
    example = modules["models"].PROBLEMS[problem]()
    kinds = (nn.Embedding, nn.LayerNorm)
    others = {
        id(p) for m in example.model.modules() if isinstance(m, kinds) for p in m.parameters()
    }
    expected = [name for name, p in example.model.named_parameters() if id(p) not in others]
    assert list(example.matrices) == expected
    assert example.terms_per_example == (64 if problem == "decoder" else 1)


def run(tmp_path: Path, suite: str) -> tuple[dict[str, list[str]], Any]:
    """Run a benchmark without peers; return the tables' rows, and what was written."""
    output = tmp_path / "times.json"
    result = subprocess.run(
        [
            *(sys.executable, FOLDER / "bench.py", "--quick", "--rounds", "1", "--repeats", "1"),
            *("--only", suite, "--peers", tmp_path / "none", "--json", output),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return read(result.stdout), json.loads(output.read_text())[suite]


@pytest.mark.slow
def test_products_run_without_peers(tmp_path: Path):
    rows, content = run(tmp_path, "products")
    for what in ("Hessian", "Hessian, kept graph", "GGN", "GGN, kept graph"):
        assert all(float(cell) > 0 for cell in rows[what]) and len(rows[what]) == 4
    for peer in (CURVLINOPS, EIGENTHINGS):
        for what in ("Hessian", "GGN"):
            assert rows[f"{what} of {peer}"] == ["— (not installed)"] * 3 + ["— (not available)"]
    errors = rows["GGN, kept graph of curvlinops"]
    assert all(float(cell) < 1e-5 for cell in errors)
    assert content["libraries"][CURVLINOPS] == {"error": "not installed"}
    for problem in PROBLEMS:
        assert set(content["seconds"]["curvlinops"][problem]) == set(PRODUCTS["curvlinops"])


@pytest.mark.slow
def test_constructors_run_without_peers(tmp_path: Path):
    rows, content = run(tmp_path, "constructors")
    for what in (*JOINT, *SEPARATE):
        assert all(float(cell) > 0 for cell in rows[what]) and len(rows[what]) == 4
    for peer, offered in ((CURVLINOPS, JOINT), (BACKPACK, SEPARATE)):
        for what in offered:
            assert rows[f"{what} of {peer}"] == ["— (not installed)"] * 3 + ["— (not available)"]
    for problem in PROBLEMS:
        assert set(content["seconds"]["curvlinops"][problem]) == set(CONSTRUCTORS["curvlinops"])


def test_peers_have_environments():
    """The Makefile makes one for each."""
    (line,) = [x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("PEERS :=")]
    assert line.removesuffix(")").partition(",")[2].split() == PEERS
