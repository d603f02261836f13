"""What the pages of the documentation say is true: their code runs, and prints what they show.

``make docs`` builds the pages, with warnings as errors; this file needs no Sphinx.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import linecache
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curvlinops.computers.layers import LAYERS
from curvlinops.risk.losses import LOSSES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
#: Pages whose code runs. Sphinx-gallery runs the tutorials, and other tests the examples.
PAGES = sorted(
    page.relative_to(DOCS).as_posix()
    for page in DOCS.rglob("*.md")
    if "```python\n" in page.read_text(encoding="utf-8")
)
DISTRIBUTED = "how_to/distributed.md"
#: What numbers may differ by: relative, or a rounding error.
TOLERANCE = {"rel": 1e-2, "abs": 1e-12}
NUMBER = r"[-+]?(?<![\w.])\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"


@dataclass
class Block:
    """A block of Python code of a page, where it starts, and what it prints, if the page says."""

    code: str
    line: int
    output: str | None


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of Python code of a page, with the ``text`` blocks directly after them."""
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        after = re.match(r"\s*^```text\n(.*?)^```$", text[match.end() :], re.DOTALL | re.MULTILINE)
        line = text[: match.start()].count("\n") + 1
        found.append(Block(match[1], line, after[1] if after else None))
    return found


def differences(printed: str, shown: str) -> list[str]:
    """Return how lines differ: words must be equal, numbers up to a relative tolerance."""
    have, want = printed.rstrip().splitlines(), shown.rstrip().splitlines()
    if len(have) != len(want):
        return [f"{len(have)} lines instead of {len(want)}:\n{printed}"]
    return [f"{a!r} instead of {b!r}" for a, b in zip(have, want, strict=True) if not same(a, b)]


def same(a: str, b: str) -> bool:
    """Compare two lines; how many spaces there are between words, tables aside, is not compared."""
    if [x.split() for x in re.split(NUMBER, a)] != [x.split() for x in re.split(NUMBER, b)]:
        return False
    numbers = [[float(x) for x in re.findall(NUMBER, line)] for line in (a, b)]
    return numbers[0] == pytest.approx(numbers[1], **TOLERANCE)


def run_page(text: str, name: str) -> None:
    """Run the blocks of a page one after another, and compare what they print."""
    # Code that is looked up by name (torch.compile, pickle) finds it in a module.
    namespace = {"__name__": "__main__"}
    for block in blocks_of(text):
        # Empty lines in front: a traceback tells the line of the page.
        source = "\n" * block.line + block.code
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
        if block.output is not None:
            wrong = differences(printed.getvalue(), block.output)
            assert not wrong, f"{name}, line {block.line} prints " + "; ".join(wrong)


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this checkout's package, and this file."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "test")])
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path.lstrip(os.pathsep)} | loopback


@pytest.fixture
def _clean(tmp_path, monkeypatch) -> Iterator[None]:
    """Run in an empty folder, and restore what pages register."""
    monkeypatch.chdir(tmp_path)
    layers, losses = list(LAYERS), dict(LOSSES)
    yield
    LAYERS[:] = layers
    LOSSES.clear()
    LOSSES.update(losses)


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("page", [page for page in PAGES if page != DISTRIBUTED])
def test_code_of_page_runs_and_prints_what_it_shows(page):
    """Catches names, arguments and results that are no longer those of the library."""
    run_page((DOCS / page).read_text(encoding="utf-8"), page)


def test_page_about_several_processes(tmp_path):
    """The same for code that needs a process group: in a process of its own, with a group of one.

    Process groups and sharded models leave traces.
    """
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
    code = f"import test_docs as t; t.run_page((t.DOCS / {DISTRIBUTED!r}).read_text('utf-8'), 'it')"
    result = subprocess.run(
        [sys.executable, *warnings, "-c", code],
        cwd=tmp_path,
        env=environment() | group,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_page_about_several_processes_holds_on_two(tmp_path):
    """Catches code that is right for a group of one process only."""
    blocks = blocks_of((DOCS / DISTRIBUTED).read_text(encoding="utf-8"))
    script = tmp_path / "script.py"
    # A file for each rank: what both print at once would be mixed up.
    apart = "import os, sys; sys.stdout = open(os.environ['RANK'] + '.txt', 'w')"
    script.write_text("\n".join([apart, *(block.code for block in blocks)]), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, "--nproc_per_node=2", str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    shown = "".join(block.output or "" for block in blocks)
    for rank in range(2):
        assert differences((tmp_path / f"{rank}.txt").read_text(encoding="utf-8"), shown) == []


# ---- the tests above can fail


PAGE = """
```python
x = 2
print("two", x / 3)
```

```text
two {number}
```

```python
print(x)
```

Not directly after the code:

```text
3
```
"""


def test_blocks_and_what_they_print_are_found():
    first, second = blocks_of(PAGE)
    assert (first.code, first.line) == ('x = 2\nprint("two", x / 3)\n', 2)
    assert first.output == "two {number}\n"
    assert second.output is None


@pytest.mark.parametrize("number", ["0.6667", "0.67"])
def test_close_numbers_are_the_same(number):
    run_page(PAGE.replace("{number}", number), "page")


@pytest.mark.parametrize("number", ["0.65", "-0.6667", "0.6667 0.6667", "0.6667\nmore", "x"])
def test_other_output_is_found(number):
    with pytest.raises(AssertionError, match="page, line 2 prints "):
        run_page(PAGE.replace("{number}", number), "page")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("tensor([ 1.00, -2e-3])", "tensor([ 1.001, -2.001e-03])", True),
        ("tensor([1, 2])", "tensor([1, 3])", False),
        ("0.weight  12", "0.bias    12", False),
        ("0.weight  12", "1.weight  12", False),
        ("= 1.7e-16 / 1.000", "= 3.1e-17 / 1.000", True),
        ("1e-3", "1e-2", False),
        ("True", "False", False),
        ("conv2d", "conv3d", False),
        ("a    b", "a b", True),
    ],
)
def test_lines_are_compared(a, b, equal):
    assert same(a, b) == equal


def test_errors_and_warnings_of_a_page_are_errors():
    for code in ("1 / 0", "import warnings; warnings.warn('careful')"):
        with pytest.raises((ZeroDivisionError, UserWarning)):
            run_page(f"```python\n{code}\n```\n", "page")


# ---- the reference lists every public name


#: Modules whose public names are in the reference: those of ``__all__``, or else the classes and
#: functions that they define.
MODULES = [
    "curvlinops",
    "curvlinops.distributed",
    "curvlinops.estimators",
    "curvlinops.kfac_utils",
    "curvlinops.plotting",
    "curvlinops.risk",
    "curvlinops.sharded",
    "curvlinops.solvers",
    "curvlinops.testing",
    *(
        f"curvlinops.computers.{name}"
        for name in (
            "ekfac_hooks",
            "ekfac_make_fx",
            "events",
            "formats",
            "ggn_diagonal",
            "kfac_hooks",
            "kfac_make_fx",
            "kfoc_hooks",
            "kfoc_make_fx",
            "layers",
            "memory",
        )
    ),
]
#: What the layers of the package say to one another, and users need not know.
MACHINERY = {
    "curvlinops.computers.layers": {"LAYERS", "read_function", "read_operation"},
    "curvlinops.computers.memory": {"memory_of", "split_into_passes"},
}


def public_names(module: Any) -> list[str]:
    """Return the names that a module offers to users."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module.__name__
        ]
    return [name for name in names if name not in MACHINERY.get(module.__name__, ())]


def documented(text: str) -> list[str]:
    """Return the full names that the directives of a page document."""
    found, module = [], ""
    for kind, name in re.findall(r"^\.\. (\w+):: (\S+)$", text, re.MULTILINE):
        if kind == "currentmodule":
            module = f"{name}."
        elif kind in {"autoclass", "autofunction"}:
            found.append(name if name.startswith("curvlinops.") else module + name)
    return found


def resolve(name: str) -> Any:
    """Return what a full name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.fixture(scope="module")
def listed() -> list[str]:
    """All names in the reference."""
    return [n for page in REFERENCE.glob("*.md") for n in documented(page.read_text("utf-8"))]


@pytest.mark.parametrize("module", MODULES)
def test_reference_lists_public_names(module, listed):
    """Catches a public class or function that nobody has added to the reference."""
    known = [resolve(name) for name in listed]
    offered = importlib.import_module(module)
    names = public_names(offered)
    assert names
    assert [n for n in names if not any(getattr(offered, n) is x for x in known)] == []


def test_reference_lists_each_name_once(listed):
    """Two descriptions of one object would be two targets of a reference."""
    objects = Counter(id(resolve(name)) for name in listed)
    assert [name for name in listed if objects[id(resolve(name))] > 1] == []


def test_reference_names_are_read():
    page = ".. currentmodule:: a.b\n\n.. autoclass:: C\n   :members:\n\n.. autofunction:: f\n"
    assert documented(page) == ["a.b.C", "a.b.f"]


# ---- links


def test_links_lead_to_files():
    """Catches links to pages that were moved, which Sphinx would find only in ``make docs``."""
    wrong = []
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            path = (page.parent / link).resolve()
            if path.parent == DOCS / "tutorials":  # made from scripts, when the site is built
                path = ROOT / "docs_src" / "tutorials" / f"{path.stem}.py"
            if not path.exists() and path.stem != "index":
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert wrong == []


@pytest.mark.slow
def test_site_builds(tmp_path):
    """Catches broken markup, references without target, and tutorials that fail."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
    copy = tmp_path / "checkout"
    for folder in ("docs", "docs_src"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "CHANGELOG.md", copy)
    result = subprocess.run(
        [*command, str(copy / "docs"), str(tmp_path / "html")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    html = tmp_path / "html"
    missing = [
        page
        for page in DOCS.rglob("*.md")
        if not (html / page.relative_to(DOCS)).with_suffix(".html").exists()
    ]
    assert missing == []
