"""The benchmarks run, and their tables say what was measured and what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
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
FOLDER = ROOT / "docs_src" / "benchmark"
OURS = "curvlinops"
CURVLINOPS, BACKPACK, EIGENTHINGS, NNGEOMETRY, KRONFLUENCE = PEERS = [
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "hessian-eigenthings",
    "nngeometry",
    "kronfluence",
]
PROBLEMS = ["MLP", "CNN", "decoder"]
MODULES = ["models", "suites", "meter", "cases", "harness", "worker", "tables", "plots", "bench"]
Modules = dict[str, ModuleType]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """The scripts as modules; they import each other."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: import_module(name) for name in MODULES}
    for name in (*MODULES, "ours"):
        sys.modules.pop(name, None)


# Medians of each case, in seconds or bytes, of the three models.
PRODUCTS = {
    OURS: {
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
CHECKED = [f"{what}, checked" for what in JOINT]
SEPARATE = ["KFAC, separate bias", "KFAC type-2, separate bias"]
CONSTRUCTORS = {
    OURS: {
        "gradient": [1.0, 2.0, 4.0],
        **{what: [2.0, 4.0, 16.0] for what in [*JOINT, *CHECKED]},
        **{what: [3.0, 3.0, 3.0] for what in SEPARATE},
    },
    CURVLINOPS: {
        **{what: [4.0, 4.0, 64.0] for what in JOINT},
        "EKFAC": [4.0, 4.0, 16.0],
        "KFAC empirical": [4.0, 16.0, 16.0],
        **{what: [8.0, 8.0, 16.0] for what in CHECKED},
        "KFAC type-2, checked": [2.0, 4.0, 64.0],
    },
    BACKPACK: {SEPARATE[0]: [3.0, 1.0, 1.0], SEPARATE[1]: [2.0, 9.0, 9.0]},
}
Numbers = dict[str, dict[str, list[float]]]
Lacks = dict[tuple[str, str, str], str]  # (library, problem, case)


def fabricate(
    modules: Modules, numbers: Numbers, missing: Lacks | None = None, memory: bool = False
) -> dict[str, Any]:
    """Return what a suite would have measured.

    The runs of a case are such that neither the fastest nor their mean is the median.
    """
    missing = missing or {}
    found = {}
    libraries = {}
    for library, by_case in numbers.items():
        absent = {
            p: {w: r for (x, q, w), r in missing.items() if (x, q) == (library, p)}
            for p in PROBLEMS
        }
        known = {p: [what for what in by_case if what not in absent[p]] for p in PROBLEMS}
        libraries[library] = {"version": "1.2", "cases": known, "failures": absent}
        found[library] = {p: {w: by_case[w][i] for w in known[p]} for i, p in enumerate(PROBLEMS)}
    summarise = modules["harness"].summarise
    seconds = {
        library: {
            p: {w: summarise([t, 0.5 * t, 0.9 * t, 1.5 * t, 20 * t]) for w, t in cells.items()}
            for p, cells in by_problem.items()
        }
        for library, by_problem in found.items()
    }
    return {
        "problems": PROBLEMS,
        "cases": [what for what in numbers[OURS] if what != "gradient"],
        "peers": [library for library in numbers if library != OURS],
        "libraries": libraries,
        "errors": {},
        "seconds": {} if memory else seconds,
        "bytes": found if memory else {},
    }


def whole(suites: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    """Return what a run would have written."""
    machine = {
        "cpu": "A CPU",
        "cores": 4,
        "gpu": None,
        "system": "Linux",
        "python": "3",
        "torch": "2",
    }
    options = {"threads": 1, "rounds": 5, "repeats": 1, "seconds": 2.0, "quick": quick}
    return {"machine": machine, "options": options, "devices": {"cpu": suites}}


def show(modules: Modules, suite: str, content: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the cells of all tables: by the title's first words, and a row's first cell."""
    return {
        table.title.partition(":")[0]: {row[0]: row[1:] for row in table.rows}
        for table in modules["tables"].tables_of(suite, content)
    }


MEAN = "Geometric mean of MLP, CNN, decoder"
OTHERS = "Relative to other libraries"


def test_times_are_medians_with_quartiles(modules: Modules):
    """Not the fastest run, and not the mean, which one disturbed run decides."""
    summary = modules["harness"].summarise([1.0, 100.0, 3.0, 2.0, 4.0])
    assert summary == {"quartiles": [2.0, 3.0, 4.0], "runs": [1.0, 100.0, 3.0, 2.0, 4.0]}
    content = fabricate(modules, PRODUCTS)
    content["seconds"][OURS]["MLP"]["GGN"] = modules["harness"].summarise([1.0, 1.0, 3.0, 9.0, 9.0])
    assert show(modules, "products", content)["MLP"]["GGN"][0] == "3.00"


def test_products_are_ratios(modules: Modules):
    content = fabricate(modules, PRODUCTS)
    found = show(modules, "products", content)
    titles = [table.title for table in modules["tables"].tables_of("products", content)]
    assert titles[:3] == [
        "MLP: gradient 1000.0 ms",
        "CNN: gradient 2000.0 ms",
        "decoder: gradient 4000.0 ms",
    ]
    assert found["CNN"]["GGN"] == ["2.00", "2.00", "2.00"]
    assert found[MEAN]["GGN"][:2] == ["2.00", "3.17"]
    rows = found[OTHERS]
    ours = f"GGN / that of {CURVLINOPS} 1.2"
    assert rows[ours] == ["0.50", "1.00", "0.50", "0.63", "", "≤ 0.8", "reached"]
    kept = f"GGN, kept graph / GGN of {CURVLINOPS} 1.2"
    assert rows[kept] == ["0.50", "0.50", "0.12", "0.31", "", "≤ 0.55", "reached"]
    # the fastest peer differs from model to model; a mean below 1 would not be enough
    fastest = "Hessian / fastest Hessian of both"
    assert rows[fastest] == ["1.00", "1.00", "1.20", "1.06", "decoder", "each ≤ 1.0", "MISSED"]


def test_peers_that_are_faster_are_marked(modules: Modules):
    """On the model where they are, and in the comparison; equal is not faster."""
    found = show(modules, "products", fabricate(modules, PRODUCTS))
    assert found["decoder"]["GGN"] == ["4.00", "8.00", "2.00 (faster)"]
    assert found["CNN"]["GGN"] == ["2.00", "2.00", "2.00"]
    row = found[OTHERS][f"GGN / that of {EIGENTHINGS} 1.2"]
    assert row == ["0.50", "1.00", "2.00", "1.00", "decoder", "", ""]
    memory = show(modules, "memory", fabricate(modules, PRODUCTS, memory=True))
    assert memory["decoder"]["GGN"] == ["4.00", "8.00", "2.00 (less)"]
    assert memory[OTHERS][f"GGN / that of {EIGENTHINGS} 1.2"] == row[:5]


def test_products_that_are_missing_are_named_and_have_no_mean(modules: Modules):
    missing = {
        (CURVLINOPS, "CNN", "GGN"): "no forward mode",
        (EIGENTHINGS, "decoder", "Hessian"): "RuntimeError: no double backward",
    }
    found = show(modules, "products", fabricate(modules, PRODUCTS, missing))
    assert found["CNN"]["GGN"][1] == "— (no forward mode)"
    assert found[MEAN]["GGN"][1] == "— (not on all models)"
    rows = found[OTHERS]
    ours = f"GGN / that of {CURVLINOPS} 1.2"
    unknown = "— (not available)"
    assert rows[ours][1:4] == ["— (no forward mode)", "0.50", unknown]
    assert rows[ours][-1] == "not known"
    assert rows[f"{ours}, MLP and decoder only"] == ["", "", "", "0.50", "", "", ""]
    ours = f"Hessian / that of {EIGENTHINGS} 1.2"
    assert rows[f"{ours}, MLP and CNN only"][3] == "0.71"
    # the fastest of those that are left is not the fastest
    *ratios, mean, _, _, verdict = rows["Hessian / fastest Hessian of both"]
    assert ratios == ["1.00", "1.00", "— (RuntimeError: no double backward)"]
    assert (mean, verdict) == (unknown, "not known")


def test_absent_peers_and_operations_are_named_cells(modules: Modules):
    content = fabricate(modules, PRODUCTS)
    content["libraries"][EIGENTHINGS] = {"error": "not installed"}
    for what in ("Hessian, kept graph", "GGN, kept graph"):
        assert show(modules, "products", content)["MLP"][what][1:] == [
            "— (not offered)",
            "— (not installed)",
        ]
    rows = show(modules, "products", content)[OTHERS]
    unknown = ["— (not installed)"] * 3 + ["— (not available)", "", "", ""]
    assert rows[f"GGN / that of {EIGENTHINGS}"] == unknown


def test_constructors_are_ratios(modules: Modules):
    found = show(modules, "constructors", fabricate(modules, CONSTRUCTORS))
    assert found["decoder"]["KFAC"] == ["4.00", "16.00", "— (not offered)"]
    assert found[MEAN]["KFAC"] == ["2.52", "5.04", "— (not offered)"]
    rows = found[OTHERS]
    ours = f"KFAC / that of {CURVLINOPS} 1.2"
    assert rows[ours] == ["0.50", "1.00", "0.25", "0.50", "", "", ""]
    ours = f"EKFAC / that of {CURVLINOPS} 1.2"
    assert rows[ours] == ["0.50", "1.00", "1.00", "0.79", "", "", ""]
    ours = f"KFAC empirical / that of {CURVLINOPS} 1.2"
    assert rows[ours] == ["0.50", "0.25", "1.00", "0.50", "", "", ""]
    # the target is one of all of them
    ours = f"KFAC and EKFAC ({{}}) / those of {CURVLINOPS} 1.2, {{}} ratios"
    assert rows[ours.format("MC", 6)] == ["0.50", "1.00", "0.50", "0.63", "", "≤ 0.6", "MISSED"]
    checked = ["0.25", "0.50", "1.00", "0.50", "", "≤ 0.6", "reached"]
    assert rows[ours.format("MC, checked", 6)] == checked
    checked = ["0.35", "0.59", "0.71", "0.53", "", "≤ 0.6", "reached"]
    assert rows[ours.format("MC, type-2, checked", 12)] == checked
    checked = ["0.31", "0.56", "0.79", "0.52", "", "≤ 0.6", "reached"]
    assert rows[ours.format("MC, type-2, empirical, checked", 18)] == checked
    mean = ["0.50", "1.00", "0.35", "0.56", "", "≤ 0.6", "reached"]
    assert rows[ours.format("MC, type-2", 12)] == mean
    rest = ["0.50", "0.79", "0.40", "0.54", "", "≤ 0.6", "reached"]
    assert rows[ours.format("MC, type-2, empirical", 18)] == rest
    # its target concerns one model only
    ours = f"KFAC, separate bias / that of {BACKPACK} 1.2"
    assert rows[ours] == ["1.00", "3.00", "3.00", "2.08", "CNN, decoder", "MLP ≤ 1.0", "reached"]
    ours = f"KFAC type-2, separate bias / that of {BACKPACK} 1.2"
    assert rows[ours] == ["1.50", "0.33", "0.33", "0.55", "MLP", "MLP ≤ 1.0", "MISSED"]
    assert not any(name.endswith(" only") for name in rows)


def test_means_of_several_cases_have_no_unexpected_gaps(modules: Modules):
    """What the peer computes something else for is left out; what failed is not."""
    name = f"KFAC and EKFAC (MC, type-2) / those of {CURVLINOPS} 1.2, {{}} ratios"
    other = "another matrix: mixes loss terms"
    lacks = {(CURVLINOPS, "decoder", f"{k} type-2"): other for k in ("KFAC", "EKFAC")}
    rows = show(modules, "constructors", fabricate(modules, CONSTRUCTORS, lacks))[OTHERS]
    # decoder: √(1/4 · 1); all: (0.5⁴ · 1⁴ · 1/4)^(1/10)
    expected = ["0.50", "1.00", "0.50", "0.66", "", "≤ 0.6", "MISSED"]
    assert rows[name.format(10)] == expected
    lacks[CURVLINOPS, "MLP", "EKFAC"] = "RuntimeError: broken"
    rows = show(modules, "constructors", fabricate(modules, CONSTRUCTORS, lacks))[OTHERS]
    gap = "— (not available)"
    assert rows[name.format(10)] == [gap, "1.00", "0.50", gap, "", "≤ 0.6", "not known"]


def scaling_content(modules: Modules, quick: bool = False) -> dict[str, Any]:
    """Return times in which a case costs as many gradients as the point's value says."""
    suites, summarise = modules["suites"], modules["harness"].summarise
    asked = suites.suite("scaling", quick)

    def seconds(problem: str, what: str) -> Any:
        value = problem.split()[1] if " " in problem else what.split()[1]
        return summarise([2.0 if what == "gradient" else 2.0 * float(value)])

    wanted = {
        p: [w for w in names if p != "columns" or w != "gradient"]
        for p, names in asked.wanted.items()
    }
    times = {p: {w: seconds(p, w) for w in names} for p, names in wanted.items()}
    times["columns"]["gradient"] = summarise([2.0])
    info = {"version": "1.2", "cases": {p: list(t) for p, t in times.items()}, "failures": {}}
    return {
        "problems": list(asked.wanted),
        "cases": asked.cases,
        "peers": asked.peers,
        "libraries": {OURS: info, CURVLINOPS: {"error": "not installed"}},
        "errors": {},
        "seconds": {OURS: times, CURVLINOPS: {p: {} for p in times}},
        "bytes": {},
    }


def test_scaling_has_a_table_for_each_axis(modules: Modules):
    found = show(modules, "scaling", scaling_content(modules))
    values = ["64.00", "128.00", "256.00", "512.00", "1024.00"]
    for what in ("GGN", "Hessian", "KFAC", "KFAC type-2", "EKFAC"):
        assert found["By width"][f"{what}, {OURS}"] == values
        assert found["By width"][f"{what}, {CURVLINOPS}"] == ["— (not installed)"] * 5
    assert found["By classes"][f"KFAC, {OURS}"] == ["10.00", "32.00", "100.00", "320.00"]
    assert len(found["By depth"][f"GGN, {OURS}"]) == 5
    assert found["By batch"][f"GGN, {OURS}"][-1] == "2048.00"
    assert found["By number of columns"][f"GGN, {OURS}"] == [
        f"{k}.00" for k in (1, 2, 4, 8, 16, 32)
    ]
    assert set(found) == {f"By {x}" for x in ("width", "depth", "classes", "batch")} | {
        "By number of columns"
    }


def test_scaled_problems_are_what_they_are_called(modules: Modules):
    points = modules["models"].SCALING
    for axis, attribute in {
        "width": lambda p: p.model[0].out_features,
        "depth": lambda p: sum(isinstance(m, nn.ReLU) for m in p.model),
        "classes": lambda p: p.model[-1].out_features,
        "batch": lambda p: p.num_data,
    }.items():
        for name, make in points[axis].items():
            problem = make()
            assert attribute(problem) == int(name.removeprefix(f"{axis} "))
            X, y = problem.data[0]
            assert problem.model(X).shape == (len(y), problem.model[-1].out_features)
    suite = modules["suites"].suite("scaling")
    assert set(suite.wanted) == {name for values in points.values() for name in values}


def test_markdown_and_text_say_what_was_measured(modules: Modules):
    """Both are made from the numbers that are written, and have the same cells."""
    suites = {
        "products": fabricate(modules, PRODUCTS),
        "constructors": fabricate(modules, CONSTRUCTORS),
        "memory": fabricate(modules, PRODUCTS, memory=True),
        "scaling": scaling_content(modules),
    }
    content = json.loads(json.dumps(whole(suites)))  # as it is read
    markdown, text = (modules["tables"].__dict__[f"as_{x}"](content) for x in ("markdown", "text"))
    for suite, measured in suites.items():
        assert f"]({suite}-cpu.png)" in markdown
        for table in modules["tables"].tables_of(suite, measured):
            assert table.title in markdown
            assert table.title in text
            for row in table.rows:
                assert f"| {' | '.join(row)} |" in markdown
            assert all(len(row) == len(table.header) for row in table.rows)
    assert "| GGN | 4.00 | 8.00 | 2.00 (faster) |" in markdown
    assert "A CPU, 4 cores, 1 thread(s) used" in markdown
    assert "trial run" not in markdown
    assert "trial run" in modules["tables"].as_markdown(whole(suites, quick=True))


def test_a_run_of_some_suites_keeps_the_others(modules: Modules):
    """But not those of another machine, or of other options."""
    complete = modules["bench"].complete
    earlier, new = whole({"products": 1, "scaling": 2}), whole({"scaling": 3, "memory": 4})
    found = complete(new, earlier)["devices"]
    assert found == {"cpu": {"products": 1, "memory": 4, "scaling": 3}}
    assert list(found["cpu"]) == ["products", "memory", "scaling"]
    assert complete(new, whole({"products": 1}, quick=True)) == new
    earlier["machine"]["cpu"] = "Another CPU"
    assert complete(new, earlier) == new


def test_committed_results_are_those_of_the_numbers_beside_them(modules: Modules):
    results = FOLDER / "results"
    if not (results / "results.json").exists():
        assert not list(results.glob("*.png"))
        return
    content = json.loads((results / "results.json").read_text())
    assert (results / "results.md").read_text() == modules["tables"].as_markdown(content)
    pictures = {f"{s}-{device}.png" for device, x in content["devices"].items() for s in x}
    assert {path.name for path in results.glob("*.png")} == pictures
    assert str(ROOT) not in json.dumps(content)


def test_plots_show_medians_and_leave_out_what_is_missing(modules: Modules, tmp_path: Path):
    missing = {(CURVLINOPS, "CNN", "GGN"): "no forward mode"}
    content = fabricate(modules, PRODUCTS, missing)
    plots, measured = modules["plots"], modules["tables"].Measured(content)
    panels = plots.dots(measured, "Products").axes
    assert [axes.get_title() for axes in panels] == PROBLEMS
    dots = [
        {float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() in "osD"}
        for axes in panels
    ]
    assert dots[0] == {1.0, 2.0, 3.0, 6.0}
    assert [sum(len(line.get_xdata()) == 1 for line in axes.lines) for axes in panels] == [8, 7, 8]
    x, y = plots.curve(modules["tables"].Measured(scaling_content(modules)), "depth", OURS, "KFAC")
    assert x == y == [1, 2, 4, 8, 16]
    suites = {"products": content, "scaling": scaling_content(modules, quick=True)}
    modules["bench"].write(whole(suites), tmp_path)
    names = ["products-cpu.png", "results.json", "results.md", "scaling-cpu.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names[::3]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text()) == whole(suites)


class Fake:
    """A library whose results are given, by problem and case."""

    def __init__(self, name: str, results: dict[tuple[str, str], dict[str, Tensor]]):
        self.name, self.results, self.dropped = name, results, {}

    def lacks(self, problem: str, what: str) -> str | None:
        return None if (problem, what) in self.results else "missing"

    def result(self, problem: str, what: str) -> dict[str, Tensor]:
        return self.results[problem, what]

    def drop(self, problem: str, what: str, reason: str) -> None:
        self.dropped[problem, what] = reason


def matrix(product: list[float], number: float) -> dict[str, Tensor]:
    return {"product": torch.tensor(product), "number": torch.tensor(number)}


def test_other_matrices_are_found(modules: Modules):
    """Products are compared where nothing is random, and traces elsewhere."""
    suite, compare = modules["suites"].suite("constructors"), modules["harness"].compare
    ours = {(p, what): matrix([3.0, 4.0], 10.0) for p in PROBLEMS for what in suite.cases}
    theirs = dict(ours)
    theirs["MLP", "KFAC"] = matrix([5.0, 0.0], 10.5)  # other samples
    theirs["CNN", "KFAC"] = matrix([3.0, 4.0], 12.0)
    theirs["MLP", "KFAC type-2"] = matrix([3.0, 4.01], 10.0)
    theirs["decoder", "KFAC type-2"] = matrix([5.0, 0.0], 10.5)  # other signs
    theirs["CNN", "EKFAC empirical"] = matrix([float("nan"), 0.0], 10.0)
    del theirs["decoder", "EKFAC"]
    libraries = {OURS: Fake(OURS, ours), CURVLINOPS: Fake(CURVLINOPS, theirs)}
    errors = compare(libraries, suite, quick=False)
    mc = errors[f"KFAC of {CURVLINOPS}"]
    assert mc == pytest.approx({"MLP": 0.05, "CNN": 0.2, "decoder": 0.0})
    type_2 = errors[f"KFAC type-2 of {CURVLINOPS}"]
    assert type_2 == pytest.approx({"MLP": 0.002, "CNN": 0.0, "decoder": 0.05}, rel=1e-3)
    assert set(errors[f"EKFAC of {CURVLINOPS}"]) == {"MLP", "CNN"}
    assert libraries[CURVLINOPS].dropped == {
        ("CNN", "KFAC"): "another matrix: off by 0.2",
        ("MLP", "KFAC type-2"): "another matrix: off by 0.002",
        ("CNN", "EKFAC empirical"): "another matrix: off by nan",
    }
    libraries[CURVLINOPS].dropped.clear()
    compare(libraries, suite, quick=True)  # traces mean little
    assert ("CNN", "KFAC") not in libraries[CURVLINOPS].dropped
    assert ("MLP", "KFAC type-2") in libraries[CURVLINOPS].dropped


def test_kept_graphs_that_give_other_products_are_an_error(modules: Modules):
    suite = modules["suites"].suite("products")
    ours = {(p, what): matrix([3.0, 4.0], 1.0) for p in PROBLEMS for what in suite.cases}
    modules["harness"].compare({OURS: Fake(OURS, ours)}, suite, quick=True)
    ours["CNN", "GGN, kept graph"] = matrix([3.0, 4.01], 1.0)
    with pytest.raises(ValueError, match="GGN, kept graph on CNN is off by 2e-03"):
        modules["harness"].compare({OURS: Fake(OURS, ours)}, suite, quick=True)


def test_dropped_cases_are_empty_cells(modules: Modules, tmp_path: Path):
    library = modules["harness"].Library(CURVLINOPS, tmp_path / "none", {})
    assert library.lacks("MLP", "GGN") == "not installed"
    library.info = {"cases": {"MLP": ["GGN", "EF"]}, "failures": {"MLP": {}}}
    library.drop("MLP", "GGN", "another matrix")
    assert library.lacks("MLP", "GGN") == "another matrix"
    assert library.lacks("MLP", "EF") is None
    assert library.lacks("MLP", "Jacobian") == "not offered"
    assert library.dropped == {("MLP", "GGN"): "another matrix"}


def test_cases_that_take_too_long_say_so(modules: Modules, monkeypatch: pytest.MonkeyPatch):
    """Where they are offered; and peers are not asked for what they do not offer."""
    bench = modules["bench"]

    class Started:
        def __init__(self, name: str, python: Path, plan: dict[str, Any]):
            self.name, self.wanted = name, plan["wanted"]
            self.info = {"failures": {problem: {} for problem in plan["wanted"]}}

    monkeypatch.setattr(bench, "Library", Started)
    options = argparse.Namespace(quick=True, threads=1, peers=Path())
    started = bench.start("constructors", "cpu", options)
    left_out = {"GGN diagonal": "4160 backward passes per example"}
    for name in (OURS, BACKPACK, NNGEOMETRY):
        assert started[name].info["failures"] == {"MLP": {}, "CNN": {}, "decoder": left_out}
        assert "GGN diagonal" in started[name].wanted["MLP"]
        assert "GGN diagonal" not in started[name].wanted["decoder"]
    assert started[KRONFLUENCE].info["failures"] == {problem: {} for problem in PROBLEMS}
    assert started[KRONFLUENCE].wanted == {problem: ["EKFAC"] for problem in PROBLEMS}
    assert started[OURS].wanted["MLP"][0] == "gradient"


class Clock:
    """A library that takes a given time."""

    def __init__(self, name: str, slow: float, calls: list[str] | None = None):
        self.name, self.slow, self.info = name, slow, {}
        self.calls = [] if calls is None else calls

    def lacks(self, problem: str, what: str) -> None:
        return None

    def ask(self, do: str, problem: str, what: str, repeats: int) -> list[float]:
        self.calls.append(self.name)
        return [self.slow if (problem, what) == ("CNN", "slow") else 1.0] * repeats


def test_slow_cases_have_a_few_rounds_only(modules: Modules):
    libraries = {"a": Clock("a", 1.0), "b": Clock("b", 6.0)}
    measure = modules["harness"].measure
    measured = measure(libraries, PROBLEMS, ["fast", "slow"], 5, 2, seconds=11.0)
    for name in libraries:  # both have as many
        assert len(measured[name]["MLP"]["slow"]["runs"]) == 10
        assert len(measured[name]["CNN"]["fast"]["runs"]) == 10
        assert len(measured[name]["CNN"]["slow"]["runs"]) == 6
    libraries["b"].slow = 6.0 * modules["harness"].TOO_LONG
    measured = measure(libraries, PROBLEMS, ["fast", "slow"], 5, 2, seconds=11.0)
    for name in libraries:
        assert len(measured[name]["MLP"]["slow"]["runs"]) == 10
        assert len(measured[name]["CNN"]["slow"]["runs"]) == 2


def test_libraries_take_turns(modules: Modules):
    """Case by case, in the opposite order every other round."""
    calls: list[str] = []
    libraries = {name: Clock(name, 1.0, calls) for name in "ab"}
    modules["harness"].measure(libraries, ["MLP"], ["first", "second"], 2, 1)
    assert "".join(calls) == "abab" + "baba"


# --------------------------------------------------------------------------------------------------
# Workers
# --------------------------------------------------------------------------------------------------
def worker(modules: Modules, cases: Any, names: list[str], **options: Any) -> Any:
    return modules["worker"].Worker(lambda problem: cases, {"depth 1": names}, **options)


def test_workers_say_what_fails(modules: Modules):
    """Without what is particular to this machine."""

    def fails() -> Any:
        raise RuntimeError(f"cannot read '{ROOT / 'some' / 'file'}'\nmore")

    def long() -> Any:
        raise ValueError("x" * 1000)

    def unusable() -> Any:
        raise modules["cases"].UnusableError("another matrix")

    case = modules["cases"].Case(lambda: 1.0, lambda x: {})
    cases = {"fine": lambda: case, "fails": fails, "long": long, "unusable": unusable}
    found = worker(modules, cases, [*cases, "absent"])
    assert list(found.cases["depth 1"]) == ["fine"]
    assert found.failures["depth 1"] == {
        "fails": "RuntimeError: cannot read '(a path)'",
        "long": f"ValueError: {48 * 'x'}",
        "unusable": "another matrix",
    }
    assert len(found.time("depth 1", "fine", 3)) == 3


def test_long_runs_are_not_repeated_in_a_turn(modules: Modules, monkeypatch: pytest.MonkeyPatch):
    seconds = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    case = modules["cases"].Case(lambda: None, lambda x: {})
    found = worker(modules, {"slow": lambda: case}, ["slow"])
    assert found.time("depth 1", "slow", 3) == [1.0]


def test_memory_is_that_of_the_call_or_of_what_is_fresh(modules: Modules):
    Case, size = modules["cases"].Case, 1000
    large = Case(lambda: torch.ones(size), lambda x: {}, lambda: [torch.ones(size) for _ in "123"])
    cases = {"small": lambda: large._replace(fresh=None), "large": lambda: large}
    found = worker(modules, cases, [*cases], memory=True)
    assert found.bytes["depth 1"] == {"small": 4 * size, "large": 3 * 4 * size}
    assert found.cases["depth 1"] == {}  # nothing is kept


def test_times_and_memory_on_a_gpu_wait_for_it(modules: Modules, monkeypatch: pytest.MonkeyPatch):
    """Kernels run after they are asked for: the clock starts and stops when they are done."""
    done: list[str] = []
    for name, value in {
        "synchronize": None,
        "memory_allocated": 100,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 350,
    }.items():

        def fake(name: str = name, value: Any = value) -> Any:
            done.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, fake)
    case = modules["cases"].Case(lambda: done.append("run"), lambda x: {})
    found = worker(modules, {"case": lambda: case}, ["case"])
    found.device = "cuda"
    done.clear()
    found.time("depth 1", "case", 2)
    assert done == ["synchronize", "run", "synchronize"] * 2
    done.clear()
    assert modules["meter"].peak_memory(case.run, "cuda") == 250
    start = done.index("reset_peak_memory_stats")
    assert done[:start] == ["synchronize", "memory_allocated"]
    assert done[start + 1 :] == ["run", "synchronize", "max_memory_allocated"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_matrices_are_those_of_linear_layers_and_convolutions(problem: str, modules: Modules):
    example = modules["models"].PROBLEMS[problem]()
    kinds = (nn.Embedding, nn.LayerNorm)
    others = {
        id(p) for m in example.model.modules() if isinstance(m, kinds) for p in m.parameters()
    }
    expected = [name for name, p in example.model.named_parameters() if id(p) not in others]
    assert list(example.matrices) == expected
    assert example.terms_per_example == (64 if problem == "decoder" else 1)
    small = example.first_examples()
    assert [len(X) for X, _ in small.data] == [1] * len(example.data)
    assert small.terms_per_example == (8 if problem == "decoder" else 1)


def test_ours_has_all_cases_and_peers_have_none_else(modules: Modules):
    suites = modules["suites"]
    everything = {
        what
        for name in suites.SUITES
        for names in suites.suite(name).wanted.values()
        for what in names
    }
    ours = import_module("ours").cases(modules["models"].perceptron())
    assert set(ours) >= everything
    assert list(suites.OFFERED) == PEERS
    assert all(set(offered) <= everything for offered in suites.OFFERED.values())
    assert set(suites.SAMPLED) | set(suites.SIGNED) <= everything
    for suite in ("products", "constructors", "memory"):
        assert list(suites.suite(suite).wanted) == PROBLEMS
    assert suites.suite("products").peers == [CURVLINOPS, EIGENTHINGS, NNGEOMETRY]
    assert suites.suite("constructors").peers == [CURVLINOPS, BACKPACK, NNGEOMETRY, KRONFLUENCE]
    assert suites.suite("memory").peers == PEERS


def test_the_machine_is_described_and_not_named(modules: Modules):
    machine = modules["harness"].machine()
    assert set(machine) == {"cpu", "cores", "gpu", "system", "python", "torch"}
    assert machine["cpu"] and machine["cores"] >= 1 and machine["torch"] == torch.__version__
    assert platform.node() not in json.dumps(machine)


def test_peers_have_environments():
    """The Makefile makes one for each."""
    (line,) = [x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("PEERS :=")]
    assert sorted(line.removesuffix(")").partition(",")[2].split()) == sorted(PEERS)


# --------------------------------------------------------------------------------------------------
# The whole
# --------------------------------------------------------------------------------------------------
def run(tmp_path: Path, suite: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark without peers; return what was measured, and the page."""
    result = subprocess.run(
        [
            *(sys.executable, FOLDER / "bench.py", "--quick", "--device", "cpu", "--only", suite),
            *("--peers", tmp_path / "none", "--json", tmp_path / "numbers.json"),
            *("--write", "--results", tmp_path / "results"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == content
    assert (tmp_path / "results" / f"{suite}-cpu.png").exists()
    return content["devices"]["cpu"][suite], (tmp_path / "results" / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["products", "constructors", "memory", "scaling"])
def test_suites_run_without_peers(suite: str, tmp_path: Path, modules: Modules):
    measured, page = run(tmp_path, suite)
    asked = modules["suites"].suite(suite, quick=True)
    left_out = {(p, what) for p, x in measured["libraries"][OURS]["failures"].items() for what in x}
    assert left_out == {x for x in modules["suites"].LEFT_OUT if x[1] in asked.cases}
    for problem, names in asked.wanted.items():
        found = measured["bytes" if suite == "memory" else "seconds"][OURS][problem]
        assert sorted(found) == sorted(names)
        values = found if suite == "memory" else {w: t["quartiles"][1] for w, t in found.items()}
        assert min(values.values()) > 0
    for peer in asked.peers:
        assert measured["libraries"][peer] == {"error": "not installed"}
    assert "— (not installed)" in page
    if suite == "products":
        assert max(measured["errors"]["GGN, kept graph of curvlinops"].values()) < 1e-5
