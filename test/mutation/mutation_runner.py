"""Runs tests with one mutated module, in a fork of a process that has all dependencies loaded.

Nothing is written to the checkout: a finder of modules gives the child a changed syntax tree.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from _pytest.config import default_plugins
from mutation_sites import MODULES, ROOT

MEMORY = 12 * 2**30  # of a child: a mutant must not take the whole machine with it

#: What takes long to import and is not mutated.
PRELOADED = (
    *("numpy", "scipy.linalg", "scipy.sparse.linalg", "torch", "torch.func", "torch._dynamo"),
    *("torch.fx.experimental.proxy_tensor", "einops", "einconv", "tqdm", "hypothesis"),
    "hypothesis.strategies",
)

#: What is copied, so that the checkout may change during a run.
COPIED = ("curvlinops", "test", "pyproject.toml")

#: Tests of results; those of packaging, style, documents and plots cannot see a mutant.
TESTS = (
    *("test/test_*.py", "test/risk/test_*.py", "test/kfac/test_*.py"),
    *("test/exact/test_ggn*.py", "test/exact/test_curvature.py", "test/exact/test_g*.py"),
    *("test/properties/test_*.py", "test/testing/test_check_*.py", "test/solvers/test_nystrom.py"),
)
LEFT_OUT = {
    *("test_packaging", "test_benchmarks", "test_layers", "test_examples", "test_plotting"),
    *("test_scipy", "test_torch_base", "test_kfac_transformers", "test_kfac_memory"),
}


def test_files() -> list[str]:
    """Return the files of tests, and the modules, whose docstrings have examples."""
    files = {path for pattern in TESTS for path in ROOT.glob(pattern)}
    names = sorted(str(path.relative_to(ROOT)) for path in files if path.stem not in LEFT_OUT)
    return [*names, *(module for module in sorted(MODULES) if ">>>" in _source(module))]


def _source(module: str) -> str:
    return (ROOT / module).read_text(encoding="utf-8")


def copy_checkout(work: Path) -> Path:
    """Return a folder with a copy of what the tests need, which replaces an earlier one."""
    target = work / "copy"
    shutil.rmtree(target, ignore_errors=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, target / name)
    return target


# --------------------------------------------------------------------------------------------------
# Modules with other code than their file's
# --------------------------------------------------------------------------------------------------
class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a syntax tree, without a cache."""

    def __init__(self, name: str, path: str, tree: ast.Module, names: Mapping[str, Any]):
        super().__init__(name, path)
        self._tree = tree
        self._names = names

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._names)
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules that are loaded from syntax trees."""

    def __init__(self, root: Path, trees: Mapping[str, ast.Module], names: Mapping[str, Any]):
        self._root = root
        self._trees = {module.removesuffix(".py").replace("/", "."): module for module in trees}
        self._by_path = trees
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        module = self._trees.get(fullname)
        if module is None:
            return None
        file = str(self._root / module)
        loader = _Loader(fullname, file, self._by_path[module], self._names)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def _instrumented(source: str, module: str, name: str) -> ast.Module:
    """Return a tree in which each function first says that it was called."""
    tree = ast.parse(source)

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, (*names, child.name))
            elif isinstance(child, ast.FunctionDef):
                label = f"{module}:{'.'.join((*names, child.name))}"
                (call,) = ast.parse(f"{name}.add({label!r})").body
                child.body.insert(1 if ast.get_docstring(child) else 0, call)

    visit(tree, ())
    return ast.fix_missing_locations(tree)


# --------------------------------------------------------------------------------------------------
# A child
# --------------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """What a run of tests says of a mutant.

    Attributes:
        fate: ``"killed"``, ``"survived"`` or ``"timed out"``.
        by: The first test that failed.
        tests: How many tests were run.
        seconds: How long that took.
    """

    fate: str
    by: str = ""
    tests: int = 0
    seconds: float = 0.0


class _Judge:
    """A plugin of pytest: runs some tests in a given order, and notes the first failure."""

    def __init__(self, wanted: Sequence[str]):
        self._place = {nodeid: place for place, nodeid in enumerate(wanted)}
        self.failed = ""
        self.count = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._place]
        items.sort(key=lambda item: self._place[item.nodeid])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.count += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid


class _Server(_Judge):
    """A plugin of pytest: hands all tests to somebody else, instead of running them."""

    def __init__(self, root: Path, wanted: Sequence[str], work: Callable[[Bench], None]):
        super().__init__(wanted)
        self._root = root
        self._work = work
        self.done = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        if self.failed:
            raise RuntimeError(f"Tests cannot be collected: {self.failed}.")
        self._work(Bench(self._root, session, self))
        self.done = True
        return True


class _Recorder:
    """A plugin of pytest: notes of each test how long it takes and which functions it calls."""

    def __init__(self, reached: set[str]):
        self.reached = reached
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.reached.clear()
        start = time.perf_counter()
        self.tests[item.nodeid] = {"failed": False}
        result = yield
        seconds = round(time.perf_counter() - start, 3)
        self.tests[item.nodeid].update(seconds=seconds, reached=sorted(self.reached))
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.skipped:
            self.tests[report.nodeid]["failed"] = True


def preload() -> None:
    """Import all dependencies, with one thread: a process that may be forked."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = False  # in the copy, so that a child need not compile all tests
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in (*PRELOADED, *(f"_pytest.{name}" for name in default_plugins)):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # pytest collects garbage again and again
    assert not any(name.split(".")[0] == "curvlinops" for name in sys.modules)


def _in_child(work: Callable[[], Any], result: Path, log: Path, limit: float) -> bool:
    """Do something in a fork, which writes what it returns; return whether it came to an end."""
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(result.parent / "hypothesis")
            result.write_text(json.dumps(work()))
            code = 0
        except BaseException:
            result.write_text(json.dumps({"error": traceback.format_exc()}))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _pytest(root: Path, files: Sequence[str], plugin: Any, *options: str) -> int:
    os.chdir(root)
    sys.path.insert(0, str(root))
    # assertions are not rewritten: pytest would load the modules with examples by itself
    arguments = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short", "--assert=plain"]
    return int(pytest.main([*arguments, *options, *files], plugins=[plugin]))


def judge(
    root: Path, trees: Mapping[str, ast.Module], wanted: Sequence[str], limit: float, tag: str
) -> Outcome:
    """Run tests, in this order, with other code for some modules until one fails.

    Args:
        root: The copy of the checkout.
        trees: The code of the modules that have another one than their files.
        wanted: The tests.
        limit: Seconds until the run is given up.
        tag: A name for the files of the run.
    """
    files = list(dict.fromkeys(nodeid.split("::")[0] for nodeid in wanted))

    def run() -> dict[str, Any]:
        sys.meta_path.insert(0, Finder(root, trees, {}))
        plugin = _Judge(wanted)
        code = _pytest(root, files, plugin, "-x")
        if code != 0 and not plugin.failed:
            plugin.failed = f"exit status {code} of pytest"
        return asdict(Outcome("killed" if code else "survived", plugin.failed, plugin.count))

    return _outcome(root, run, limit, tag)


def _outcome(root: Path, run: Callable[[], dict[str, Any]], limit: float, tag: str) -> Outcome:
    """Run tests in a fork, and return what they say."""
    result, log = root.parent / f"{tag}.json", root.parent / f"{tag}.log"
    start = time.perf_counter()
    ended = _in_child(run, result, log, limit)
    seconds = round(time.perf_counter() - start, 1)
    if not ended:
        return Outcome("timed out", f"more than {limit:.0f} s", 0, seconds)
    if not result.exists():
        return Outcome("killed", "crash of the process", 0, seconds)
    told = json.loads(result.read_text())
    if "error" in told:  # of the runner: tests catch what a mutant raises
        raise RuntimeError(f"Tests cannot be run:\n{told['error']}")
    return Outcome(**{**told, "seconds": seconds})


def serve(root: Path, wanted: Sequence[str], work: Callable[[Bench], None]) -> None:
    """Collect tests once, and do something with what can run them with mutants."""
    files = list(dict.fromkeys(nodeid.split("::")[0] for nodeid in wanted))
    server = _Server(root, wanted, work)
    _pytest(root, files, server, "--capture=no")
    if not server.done:
        raise RuntimeError("The tests could not be collected, or mutants not be run; see above.")


class Bench:
    """Tests that are collected, whose modules are loaded: a mutant changes them in a fork.

    Functions get the code of the mutant, wherever they are referred to. What runs when a module is
    loaded (constants, default values) cannot be changed in this way: that is for :func:`judge`.
    """

    def __init__(self, root: Path, session: Any, judge: _Judge):
        self._root = root
        self._session = session
        self._judge = judge
        self._items = {item.nodeid: item for item in session.items}
        self._functions: dict[tuple[str, int, str], list[FunctionType]] = {}
        for thing in gc.get_objects():
            if isinstance(thing, FunctionType):
                code = thing.__code__
                key = (code.co_filename, code.co_firstlineno, code.co_name)
                self._functions.setdefault(key, []).append(thing)
        gc.freeze()

    def judge(
        self, module: str, tree: ast.Module, wanted: Sequence[str], limit: float, tag: str
    ) -> Outcome:
        """Run tests with other code for the functions of a module; see :func:`judge`."""
        items = [self._items[nodeid] for nodeid in wanted if nodeid in self._items]
        judge = self._judge
        changes = self._changes(module, tree)

        def run() -> dict[str, Any]:
            for function, code in changes:
                function.__code__ = code
            protocol = self._session.config.hook.pytest_runtest_protocol
            for item, following in zip(items, [*items[1:], None], strict=False):
                protocol(item=item, nextitem=following)
                if judge.failed:
                    break
            return asdict(
                Outcome("killed" if judge.failed else "survived", judge.failed, judge.count)
            )

        return _outcome(self._root, run, limit, tag)

    def _changes(self, module: str, tree: ast.Module) -> list[tuple[FunctionType, CodeType]]:
        """Return functions and their new code; without any, all tests would pass."""
        file = str(self._root / module)
        codes = changed_functions(self._root, module, tree)
        changes = [
            (function, code)
            for code in codes
            for function in self._functions.get((file, code.co_firstlineno, code.co_name), ())
        ]
        if not codes or len({code for _, code in changes}) < len(codes):
            raise RuntimeError(f"A function of {module} that changes was not found.")
        return changes


def changed_functions(root: Path, module: str, tree: ast.Module) -> list[CodeType]:
    """Return the code of functions, not those in others, that differs from that of the source."""
    known = _functions_of_source(root, module)
    mutant = compile(tree, str(root / module), "exec", dont_inherit=True)
    return [code for code in _functions_of(mutant) if code not in known]


@functools.cache
def _functions_of_source(root: Path, module: str) -> frozenset[CodeType]:
    source = (root / module).read_text(encoding="utf-8")
    code = compile(ast.parse(source), str(root / module), "exec", dont_inherit=True)
    return frozenset(_functions_of(code))


def _functions_of(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if (
                constant.co_flags & inspect.CO_NEWLOCALS
                and constant.co_flags & inspect.CO_OPTIMIZED
            ):
                yield constant
            else:  # the body of a class
                yield from _functions_of(constant)


def record(root: Path, file: str, limit: float = 1800.0) -> dict[str, Any]:
    """Run a file of tests, and return of each the time and the functions of the core it calls."""

    def run() -> dict[str, Any]:
        reached: set[str] = set()
        name = "__reached__"
        trees = {
            module: _instrumented((root / module).read_text(encoding="utf-8"), module, name)
            for module in MODULES
        }
        sys.meta_path.insert(0, Finder(root, trees, {name: reached}))
        recorder = _Recorder(reached)
        _pytest(root, [file], recorder)
        return recorder.tests

    tag = "reach-" + file.replace("/", "-")
    result = root.parent / f"{tag}.json"
    if not _in_child(run, result, root.parent / f"{tag}.log", limit) or not result.exists():
        return {}
    return json.loads(result.read_text())
