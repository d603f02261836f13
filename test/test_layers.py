"""The layer rule: a file imports only from lower layers, or from its own without cycles.

The imports are read from the source, wherever they stand: at the top of a file or in a function.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# Modules and folders at the top of the package, by layer; docs/architecture.md shows the same.
# `distributed` is below everything. What is in TOP may import anything, and nothing imports it.
TOP = "top"
LAYERS = {
    "distributed": ["distributed"],
    "L0": ["_damping", "_formats", "_random", "_rules", "_saving", "_scalars", "_tensors"],
    "L1": [
        "_algebra",
        "_operator",
        "_scipy",
        "_torch_base",
        "blockdiagonal",
        "dense",
        "diag",
        "eigh",
        "estimators",
        "inverse",
        "kfac_utils",
        "kronecker",
        "low_rank",
        "nearest_kronecker",
        "outer",
        "sharded",
        "solvers",
        "submatrix",
    ],
    "L2": ["risk"],
    "L3": [
        "autodiff",
        "contractions",
        "curvature",
        "formulas",
        "ggn",
        "gradient_moments",
        "gramian",
        "hessian",
        "jacobian",
        "kept_graphs",
        "linearization",
        "rows",
    ],
    "L4": ["accumulators", "computers", "ekfac", "ggn_diagonal", "kfac", "kfoc"],
    TOP: ["__init__", "plotting", "testing"],
}

LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

# Where alone in the package a third-party module may be imported (for types: anywhere).
CONFINED = {
    "einconv": ["computers", "kfac_utils"],
    "scipy": ["_scipy", "estimators", "solvers"],
    "torch.fx": ["computers"],
    "tqdm": ["risk"],
}


@dataclass(frozen=True)
class Import:
    """One name that an import statement asks for, and where the statement stands."""

    line: int
    target: str  # absolute dotted name; for `from a import b` it is "a.b"
    in_function: bool
    for_types: bool  # under `if TYPE_CHECKING:`, thus never executed


def read_imports(source: str, package: str) -> list[Import]:
    """List the imports of a file that belongs to ``package`` (which resolves relative ones)."""
    found: list[Import] = []

    def add(node: ast.AST, target: str, in_function: bool, for_types: bool) -> None:
        found.append(Import(node.lineno, target, in_function, for_types))

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node, alias.name, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(parts if node.level else []), *([node.module] if node.module else [])]
            for alias in node.names:
                add(node, ".".join([*base, alias.name]), in_function, for_types)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {
            "__import__",
            "import_module",
        }:
            add(node, "<by name>", in_function, for_types)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CONFINED:
            add(node, ast.unparse(node), in_function, for_types)  # torch.fx, used as an attribute
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_types)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, in_function, for_types)

    visit(ast.parse(source), False, False)
    return found


def is_within(target: str, module: str) -> bool:
    """Is ``target`` the module, or something in it?"""
    return target == module or target.startswith(f"{module}.")


def check_layers(folder: Path, declared: set[str]) -> list[str]:
    """Check all files of the package in ``folder``; return the violations, each with its place.

    Args:
        folder: Folder of the package, named as the package is.
        declared: Third-party packages that may be imported when the package is.
    """
    package = folder.name
    order = list(LAYERS)
    violations: list[str] = []

    # Dotted name -> file. A folder's name stands for its __init__.
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules = {".".join(n.split(".")[: i + 1]) for n in files for i in range(n.count(".") + 1)}

    def top_name(module: str) -> str:
        return module.split(".")[1] if "." in module else "__init__"

    def place(module: str, line: int) -> str:
        return f"{files[module].relative_to(folder.parent)}:{line}"

    def executed(module: str, target: str) -> Iterator[str]:
        # The module that has the name, and the folders' __init__ that run before it. Those around
        # the importing module run in any case, whatever it imports.
        while target not in modules:
            target = target.rpartition(".")[0]
        yield target
        while (target := target.rpartition(".")[0]) and not is_within(module, target):
            yield target

    edges: dict[str, dict[str, int]] = {module: {} for module in modules}  # in a layer: line
    for module, path in files.items():
        if top_name(module) not in LAYER_OF:
            violations.append(f"{place(module, 1)}: the module is in no layer")
            continue
        is_folder = path.name == "__init__.py"
        for found in read_imports(
            path.read_text(encoding="utf-8"), module if is_folder else module.rpartition(".")[0]
        ):
            where = place(module, found.line)
            if is_within(found.target, package):
                for target in executed(module, found.target):
                    name, own = top_name(target), LAYER_OF[top_name(module)]
                    if name not in LAYER_OF:
                        continue  # reported above, as a module that is in no layer
                    if order.index(LAYER_OF[name]) > order.index(own):
                        violations.append(
                            f"{where}: {own} imports {target} of {LAYER_OF[name]}, which is above"
                        )
                    elif LAYER_OF[name] == own and not found.for_types:
                        edges[module].setdefault(target, found.line)
            else:
                violations += [
                    f"{where}: {violation}"
                    for violation in check_third_party(found, top_name(module), declared)
                ]

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += edges[module]
        return seen

    violations += [
        f"{place(module, line)}: the import of {target} closes a cycle"
        for module in files
        for target, line in edges[module].items()
        if module in reachable(target)
    ]
    return violations


def check_third_party(found: Import, name: str, declared: set[str]) -> Iterator[str]:
    """Check an import from outside the package, made by ``name`` at the top of the package."""
    if found.target == "<by name>":
        yield "a module is imported by name, which no test can follow"
        return
    for confined, places in CONFINED.items():
        if is_within(found.target, confined) and name not in places and not found.for_types:
            yield f"{confined} is imported outside of {', '.join(places)}"
    root = found.target.partition(".")[0]
    known = root in sys.stdlib_module_names or root in declared
    if not (known or found.in_function or found.for_types):
        yield f"{root} is not a run-time dependency, so import it where it is used"


def declared_dependencies() -> set[str]:
    """Read the names of the run-time dependencies from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {requirement.split()[0] for requirement in project["dependencies"]}


def test_curvlinops() -> None:
    """The package itself keeps the rule."""
    violations = check_layers(ROOT / "curvlinops", declared_dependencies())
    assert not violations, "\n" + "\n".join(violations)


def test_table_and_page() -> None:
    """The table names nothing that is gone, and the architecture page names what there is."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name, layer in LAYER_OF.items():
        file, folder = (ROOT / "curvlinops" / f for f in (f"{name}.py", name))
        assert file.exists() or folder.exists(), f"{name} of {layer} does not exist"
        shown = f"{name}.py" if file.exists() else f"{name}/"
        assert shown in page, f"docs/architecture.md does not show {shown}"


# The checker itself: planted violations must be found.


def check_planted(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """Write a package with the given sources and check it."""
    for name, source in files.items():
        path = tmp_path / "curvlinops" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return check_layers(tmp_path / "curvlinops", {"torch", "tqdm", "scipy", "einconv"})


@pytest.mark.parametrize(
    "source",
    [
        "import curvlinops.risk.losses",
        "import curvlinops.risk.losses as losses",
        "from curvlinops import risk",
        "from curvlinops.risk import losses",
        "from curvlinops.risk.losses import Loss",
        "from . import risk",
        "from .risk import losses",
        "from .risk.losses import Loss",
        "def f():\n    from curvlinops.risk import losses",
        "def f():\n    import curvlinops.risk.losses",
        "class A:\n    def f(self):\n        from .risk import losses",
        "try:\n    import curvlinops.risk\nexcept ImportError:\n    pass",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .risk.losses import Loss",
        "from curvlinops import Loss",  # from the package's own __init__
        "import curvlinops",
        "from curvlinops import *",
        "from curvlinops.testing import check_operator",
    ],
)
def test_up_arrow_is_found(tmp_path: Path, source: str) -> None:
    """Every spelling of an import that points up is found, once per line, with file and line."""
    violations = check_planted(
        tmp_path,
        {
            "__init__.py": "",
            "testing.py": "",
            "diag.py": f"import torch\n{source}\n",
            "risk/__init__.py": "",
            "risk/losses.py": "",
        },
    )
    line = 2 + source.count("\n", 0, source.rindex("import"))
    if "try:" in source:
        line = 3
    assert violations
    assert all(v.startswith(f"curvlinops/diag.py:{line}: L1 imports") for v in violations)


def test_up_arrow_from_a_folder_is_found(tmp_path: Path) -> None:
    """Relative imports are resolved against the folder for __init__ and for its modules alike."""
    violations = check_planted(
        tmp_path,
        {
            "risk/__init__.py": "from ..hessian import A",
            "risk/losses.py": "from .. import hessian",
            "risk/deep/model.py": "from ...hessian import A\nfrom ..losses import B",
            "hessian.py": "",
        },
    )
    assert violations == [
        "curvlinops/risk/__init__.py:1: L2 imports curvlinops.hessian of L3, which is above",
        "curvlinops/risk/deep/model.py:1: L2 imports curvlinops.hessian of L3, which is above",
        "curvlinops/risk/losses.py:1: L2 imports curvlinops.hessian of L3, which is above",
    ]


def test_distributed_imports_nothing(tmp_path: Path) -> None:
    """Everybody may import `distributed`, which may not even import the leaves."""
    violations = check_planted(
        tmp_path,
        {
            "distributed/__init__.py": "from curvlinops.distributed.collective import Collective",
            "distributed/collective.py": "from curvlinops._tensors import flatten",
            "_tensors.py": "from curvlinops.distributed import Collective",
            "hessian.py": "from curvlinops.distributed import Collective",
        },
    )
    assert [v.split(":")[0] for v in violations] == ["curvlinops/distributed/collective.py"]


@pytest.mark.parametrize("function", [False, True])
def test_cycle_is_found(tmp_path: Path, function: bool) -> None:
    """All edges of a cycle of three are named, also where a function hides one of them."""
    last = "def f():\n    from curvlinops import diag" if function else "\nfrom .diag import A"
    violations = check_planted(
        tmp_path,
        {
            "diag.py": "import curvlinops.dense",
            "dense.py": "from curvlinops.eigh import B",
            "eigh.py": last,
            "outer.py": "from curvlinops.diag import A",  # leads into the cycle, is not on it
        },
    )
    assert violations == [
        "curvlinops/dense.py:1: the import of curvlinops.eigh closes a cycle",
        "curvlinops/diag.py:1: the import of curvlinops.dense closes a cycle",
        "curvlinops/eigh.py:2: the import of curvlinops.diag closes a cycle",
    ]


def test_cycle_through_a_folder_is_found(tmp_path: Path) -> None:
    """An import of a module in a folder runs the folder's __init__, which may lead back."""
    violations = check_planted(
        tmp_path,
        {
            "kfac.py": "from curvlinops.computers.layers import table",
            "computers/__init__.py": "from curvlinops.computers.hooks import Hooks",
            "computers/hooks.py": "import curvlinops.kfac",
            "computers/layers.py": "",
        },
    )
    assert "curvlinops/kfac.py:1: the import of curvlinops.computers closes a cycle" in violations
    assert len(violations) == 3


def test_unknown_module_is_found(tmp_path: Path) -> None:
    """A file or folder in no layer is found, also when a known module imports it."""
    violations = check_planted(
        tmp_path,
        {"helpers.py": "", "extra/__init__.py": "", "diag.py": "from curvlinops import helpers"},
    )
    assert violations == [
        "curvlinops/extra/__init__.py:1: the module is in no layer",
        "curvlinops/helpers.py:1: the module is in no layer",
    ]


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("hessian.py", "from tqdm import tqdm", "tqdm is imported outside"),
        ("hessian.py", "def f():\n  from tqdm.auto import tqdm", "tqdm is imported outside"),
        ("risk/model.py", "import torch.fx", "torch.fx is imported outside"),
        ("risk/model.py", "from torch import fx", "torch.fx is imported outside"),
        ("risk/model.py", "from torch.fx.graph import Graph", "torch.fx is imported outside"),
        ("risk/model.py", "import torch\ntorch.fx.symbolic_trace", "torch.fx is imported outside"),
        ("diag.py", "from einconv import index_pattern", "einconv is imported outside"),
        ("diag.py", "import scipy.sparse as s", "scipy is imported outside"),
        ("diag.py", "import matplotlib.pyplot as plt", "matplotlib is not a run-time"),
        ("testing.py", "import matplotlib", "matplotlib is not a run-time"),
        ("diag.py", "from importlib import import_module\nimport_module('x')", "by name"),
    ],
)
def test_misplaced_dependency_is_found(
    tmp_path: Path, file: str, source: str, message: str
) -> None:
    """Third-party packages stay in their places, whatever the spelling."""
    violations = check_planted(tmp_path, {file: source})
    assert len(violations) == 1
    assert violations[0].startswith(f"curvlinops/{file}:{1 + source.count(chr(10))}: ")
    assert message in violations[0]


def test_good_package_passes(tmp_path: Path) -> None:
    """What the rule allows is not reported."""
    violations = check_planted(
        tmp_path,
        {
            "__init__.py": "from curvlinops.kfac import K\nfrom curvlinops.testing import check",
            "testing/__init__.py": "from curvlinops.hessian import H",
            "_torch_base.py": "from curvlinops import _formats\nimport torch, sys, os.path",
            "_formats.py": "from __future__ import annotations",
            "_scipy.py": "from typing import TYPE_CHECKING\nfrom scipy.sparse import linalg\n"
            "if TYPE_CHECKING:\n    from curvlinops._operator import A",
            "_operator.py": "from curvlinops._scipy import to_scipy\nimport typing\n"
            "if typing.TYPE_CHECKING:\n    from scipy.sparse.linalg import LinearOperator",
            "solvers/cg.py": "import scipy",
            "kfac_utils.py": "import einconv",
            "risk/__init__.py": "from curvlinops.risk.losses import L\nfrom .data import D",
            "risk/data.py": "from .losses import L\nfrom curvlinops.risk import losses\n"
            "from tqdm import tqdm",
            "risk/losses.py": "",
            "hessian.py": "from .risk import L\nfrom curvlinops._torch_base import A",
            "kfac.py": "from curvlinops.computers.hooks import H\n"
            "def draw():\n    import matplotlib, scipy_like",
            "computers/hooks.py": "from torch.fx import symbolic_trace\nimport einconv",
        },
    )
    assert not violations
