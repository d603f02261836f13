"""Where the package raises errors: found in its source, and for an error that was caught.

A site is named by its module, its function and its number among the ``raise`` statements of this
function, as in ``_damping.one_damping#1``: edits elsewhere do not change that.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

import curvlinops

PACKAGE = Path(curvlinops.__file__).parent


@dataclass
class Module:
    """The ``raise`` statements of one module.

    Attributes:
        name: Its name, without that of the package.
        lines: The site of each line that belongs to such a statement.
        re_raised: Sites that raise an error which exists already, by its name.
        classes: The name of the class that a site raises, where that is in the statement.
    """

    name: str
    lines: dict[int, str] = field(default_factory=dict)
    re_raised: set[str] = field(default_factory=set)
    classes: dict[str, str] = field(default_factory=dict)

    def visit(self, node: ast.AST, scope: tuple[str, ...], counts: dict[str, int]) -> None:
        """Note the statements below a node, in the order of the source."""
        for child in ast.iter_child_nodes(node):
            inside = scope
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = (*scope, child.name)
            elif isinstance(child, ast.Raise) and child.exc is not None:  # no bare `raise`
                function = ".".join((self.name, *scope))
                counts[function] = counts.get(function, 0) + 1
                site = f"{function}#{counts[function]}"
                assert child.end_lineno is not None
                for line in range(child.lineno, child.end_lineno + 1):
                    self.lines[line] = site
                raised = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
                if isinstance(raised, ast.Name):
                    self.classes[site] = raised.id
                    if raised.id.islower():
                        self.re_raised.add(site)
            self.visit(child, inside, counts)


@cache
def modules() -> dict[Path, Module]:
    """Return what each module of the package raises."""
    result = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = Module(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        module.visit(ast.parse(path.read_text(encoding="utf-8")), (), {})
        result[path] = module
    return result


def all_sites() -> set[str]:
    """Return every site of the package."""
    return {site for module in modules().values() for site in module.lines.values()}


def raised_classes() -> dict[str, str]:
    """Return the name of the class that each site raises, where that is in the statement."""
    return {site: name for module in modules().values() for site, name in module.classes.items()}


def caught_classes() -> set[str]:
    """Return the names of the classes that the package catches, or asks what it caught for."""
    found: set[str] = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked: ast.expr | None = None
            if isinstance(node, ast.ExceptHandler):
                asked = node.type
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith("isinstance(error, "):
                asked = node.args[1]
            if asked is not None:
                found |= {name.id for name in ast.walk(asked) if isinstance(name, ast.Name)}
    return found


def sites_of(error: BaseException) -> set[str]:
    """Return where an error was raised: empty if that was outside of the package.

    An error that passes a statement ``raise error`` was raised there, too.
    """
    result: set[str] = set()
    innermost: str | None = None
    tb: TracebackType | None = error.__traceback__
    while tb is not None:
        module = modules().get(Path(tb.tb_frame.f_code.co_filename))
        innermost = None if module is None else module.lines.get(tb.tb_lineno)
        if module is not None and innermost in module.re_raised:
            result.add(innermost)
        tb = tb.tb_next
    return result if innermost is None else result | {innermost}
