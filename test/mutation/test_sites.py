"""The list of mutants is of this source, complete where it must be, and finds what it says."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter

import pytest
from mutation_list import FILE, UNEXPLAINED, Entry, read, updated, write
from mutation_runner import Finder
from mutation_sites import (
    CRITICAL,
    MODULES,
    PERFORMANCE,
    ROOT,
    Site,
    all_sites,
    choose,
    find_sites,
    mutate,
)

SOURCE = '''
"""Module, 1 + 1."""
SIZE: int = 3


class Thing:
    """Class, 2 * 2."""

    def norm(self, x, n=2, *, flag: "0 + 1" = True):
        """Method, 3 - 3."""
        assert n > 0, "1 < 2"
        if n < 1 and x is None:
            raise ValueError(f"n must be {n + 1}, got" + str(n - 1))

        def inner(y):
            return y.mT @ y

        y = inner(x).sum(-1) / n
        y -= kron(x, y).sqrt()
        y *= n
        warn("of" + "this", stacklevel=2)
        return max(y, -y), reduce(x, dim=0, keepdim=True)


def chunks(n):
    return n // 2


def root(z):
    return z**0.5 * z.abs() ** 2
'''


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return all_sites()


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return read(FILE.read_text(encoding="utf-8"))


def test_what_is_found() -> None:
    found = [(s.function, s.operator, s.original, s.mutated) for s in find_sites(SOURCE, "m.py")]
    norm = "Thing.norm"
    total = "inner(x).sum(-1) / n"
    result = "(max(y, -y), reduce(x, dim=0, keepdim=True))"
    expected = [
        ("", "constant", "3", "4"),
        (norm, "constant", "2", "3"),
        (norm, "comparison", "n < 1 and x is None", "n < 1 or x is None"),
        (norm, "comparison", "n < 1 and x is None", "n <= 1 and x is None"),
        (norm, "constant", "n < 1 and x is None", "n < 0 and x is None"),
        (norm, "constant", "n < 1 and x is None", "n < 2 and x is None"),
        (norm, "comparison", "n < 1 and x is None", "n < 1 and x is not None"),
        (norm, "order", "y.mT @ y", "y @ y.mT"),
        (norm, "transpose", "y.mT @ y", "y @ y"),
        (norm, "product", total, "inner(x).sum(-1) * n"),
        (norm, "normalisation", total, "inner(x).sum(-1)"),
        (norm, "normalisation", total, "inner(x).mean(-1) / n"),
        (norm, "axis", total, "inner(x).sum(-2) / n"),
        (norm, "root", "y -= kron(x, y).sqrt()", "y -= kron(x, y)"),
        (norm, "order", "y -= kron(x, y).sqrt()", "y -= kron(y, x).sqrt()"),
        (norm, "product", "y *= n", "y /= n"),
        (
            norm,
            "order",
            f"return {result}",
            "return (reduce(x, dim=0, keepdim=True), max(y, -y))",
        ),
        (norm, "bound", result, result.replace("max", "min")),
        (norm, "sign", result, result.replace("-y", "y")),
        (norm, "axis", result, result.replace("0", "1")),
        (norm, "flag", result, result.replace("True", "False")),
        ("root", "product", "z ** 0.5 * z.abs() ** 2", "z ** 0.5 / z.abs() ** 2"),
        ("root", "root", "z ** 0.5 * z.abs() ** 2", "z * z.abs() ** 2"),
        ("root", "root", "z ** 0.5 * z.abs() ** 2", "z ** 0.5 * z.abs()"),
        ("root", "root", "z ** 0.5 * z.abs() ** 2", "z ** 0.5 * z ** 2"),
        ("root", "constant", "z ** 0.5 * z.abs() ** 2", "z ** 0.5 * z.abs() ** 3"),
    ]
    assert Counter(found) == Counter(expected)


def test_equal_places_are_counted() -> None:
    source = "def f(x):\n    a = x + 1\n    b = x + 1\n    return a @ b"
    plus = [site for site in find_sites(source, "m.py") if site.operator == "sign"]
    assert [site.occurrence for site in plus] == [1, 2]
    mutant = mutate(source, plus)[plus[1]]
    assert ast.unparse(mutant) == source.replace("b = x + 1", "b = x - 1")
    with pytest.raises(LookupError, match=r"m.py has no place f: x \+ 1"):
        mutate("def f(x):\n    return x", plus)


def test_each_mutant_is_one_change() -> None:
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    trees = mutate(SOURCE, find_sites(SOURCE, "m.py"))
    mutants = [ast.unparse(tree).splitlines() for tree in trees.values()]
    assert len({tuple(lines) for lines in mutants}) == len(mutants)
    for lines in mutants:
        assert sum(a != b for a, b in zip(plain, lines, strict=True)) == 1


def test_a_mutant_is_what_is_imported() -> None:
    module = "curvlinops/_damping.py"
    source = (ROOT / module).read_text(encoding="utf-8")
    (site,) = (s for s in find_sites(source, module) if s.function == "_checked")
    original = importlib.import_module("curvlinops._damping")
    finder = Finder(ROOT, {module: mutate(source, [site])[site]}, {"given": 1})
    spec = finder.find_spec("curvlinops._damping")
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    assert mutant.given == 1
    with pytest.raises(ValueError, match="is NaN"):
        mutant._checked(1.0, "op")  # damping == damping
    assert finder.find_spec("curvlinops.kfac") is None
    assert sys.modules["curvlinops._damping"] is original
    assert original._checked(1.0, "op") == 1.0


def test_names_that_the_rules_use_exist() -> None:
    """A misspelt or renamed function would silently leave its group."""
    trees = {module: ast.parse((ROOT / module).read_text("utf-8")) for module in MODULES}
    for group, modules in CRITICAL.items():
        for module, names in modules.items():
            missing = set(names) - {""} - _functions(trees[module])
            assert not missing, f"{group} in {module}: there are no {missing}"
    for module, names in MODULES.items():
        assert set(names) <= _functions(trees[module])
    known = set().union(*map(_functions, trees.values()))
    known |= {name.split(".")[-1] for name in known}
    targets = {
        ast.unparse(target)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    for name in PERFORMANCE:
        function, _, target = name.partition(":")
        assert function in known | targets, name
        assert not target or target in targets, name


def _functions(tree: ast.Module) -> set[str]:
    """Return the names of functions and methods."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return names


def test_list_is_of_this_source(entries: list[Entry], sites: list[Site]) -> None:
    known = {site.key for site in sites}
    gone = [f"{e.site.module}:{e.site.function}: {e.site.original}" for e in entries]
    gone = [text for text, e in zip(gone, entries, strict=True) if e.site.key not in known]
    hint = "run `make mutate ARGS=--update` (with --only and the module's name)"
    assert not gone, f"these places are gone, {hint}: {gone}"
    listed = {entry.site.key for entry in entries}
    new = [f"{s.module}:{s.line} {s.original}" for s in sites if s.critical and s.key not in listed]
    assert not new, f"scalings, damping and canonicalisation are to be listed, {hint}: {new}"


def test_list_is_large_and_wide(entries: list[Entry], sites: list[Site]) -> None:
    assert len({entry.site.key for entry in entries}) == len(entries) >= 150
    assert {entry.site.module for entry in entries} == set(MODULES)
    assert {entry.site.operator for entry in entries} == {site.operator for site in sites}
    assert {entry.site.critical for entry in entries} == {None, *CRITICAL}


def test_survivors_are_explained(entries: list[Entry]) -> None:
    fates = Counter(entry.fate for entry in entries)
    assert fates["killed"] + fates["timed out"] >= 150
    for entry in entries:
        place = f"{entry.site.module} {entry.site.function}: {entry.site.mutated}"
        assert entry.by and entry.by != UNEXPLAINED, place
        assert not (entry.fate == "survived" and entry.site.critical), place


def test_list_comes_back(entries: list[Entry]) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert write(read(text)) == text
    with pytest.raises(ValueError, match="no entry"):
        read(text.replace("killed:", "hurt:"))


def test_update_keeps_explanations() -> None:
    first, second, third = choose(find_sites("x = a * b + c * d / e", "m.py"), 9)[:3]
    before = [Entry(first, "equivalent", "why"), Entry(second, "killed", "a test")]
    fates = {site: ("survived", "") for site in (first, second)}
    assert updated([first, second, third], fates, before) == [
        Entry(first, "equivalent", "why"),
        Entry(second, "survived", UNEXPLAINED),
    ]
    assert updated([first], {first: ("killed", "a test")}, before)[0].by == "a test"
    assert not Entry(second, "survived", UNEXPLAINED).allowed
