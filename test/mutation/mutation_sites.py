"""Where the mathematics of the package can be broken, found from its syntax trees.

A mutant is one small change of one expression: another constant, sign, transpose or normalisation.
It is named by module, qualified function, the expression before and after, and which of several
equal ones it is, so that a committed list survives changes of other lines.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: The mathematical core; of some modules only the functions that are named.
MODULES: dict[str, tuple[str, ...]] = {
    "curvlinops/_damping.py": (),
    "curvlinops/blockdiagonal.py": (),
    "curvlinops/computers/eigenvalues.py": (),
    "curvlinops/computers/formats.py": (),
    "curvlinops/computers/group_statistic.py": (),
    "curvlinops/computers/kfoc.py": (),
    "curvlinops/computers/layers.py": (),
    "curvlinops/computers/positions.py": (),
    "curvlinops/computers/products.py": (),
    "curvlinops/computers/singular_vectors.py": (),
    "curvlinops/computers/statistics.py": (),
    "curvlinops/computers/vectors.py": (),
    "curvlinops/diag.py": (),
    "curvlinops/eigh.py": (),
    "curvlinops/kfac_utils.py": (),
    "curvlinops/kronecker.py": (),
    "curvlinops/low_rank.py": (),
    "curvlinops/nearest_kronecker.py": (),
    "curvlinops/outer.py": (),
    "curvlinops/risk/cross_entropy.py": (),
    "curvlinops/risk/elementwise.py": (),
    "curvlinops/risk/empirical_risk.py": (
        "EmpiricalRisk._visit",
        "EmpiricalRisk._scale",
        "EmpiricalRisk.sum_over_data",
        "_widened",
    ),
    "curvlinops/risk/loss.py": (),
    "curvlinops/risk/losses.py": (),
}

#: Groups in which no mutant may survive: functions, by module, "" for all of one.
CRITICAL: dict[str, dict[str, tuple[str, ...]]] = {
    "damping": {
        "curvlinops/_damping.py": ("",),
        "curvlinops/kronecker.py": (
            "KroneckerProductLinearOperator.inverse",
            "KroneckerProductLinearOperator._heuristic_dampings",
        ),
        "curvlinops/eigh.py": ("EighDecomposedLinearOperator.inverse", "_shift"),
        "curvlinops/blockdiagonal.py": (
            "BlockDiagonalLinearOperator.inverse",
            "BlockDiagonalLinearOperator._resolve_damping",
            "_shift",
        ),
        "curvlinops/diag.py": ("DiagonalLinearOperator.inverse", "_shift"),
        "curvlinops/low_rank.py": ("LowRankLinearOperator.inverse", "_shift"),
    },
    "canonicalisation": {
        "curvlinops/kfac_utils.py": (
            "_CanonicalForm.__init__",
            "_CanonicalForm._check",
            "_CanonicalForm._fits",
            "_CanonicalForm._concatenated",
            "_CanonicalForm._rows",
            "_CanonicalForm._pack",
            "_CanonicalForm._unpack",
            "ToCanonicalLinearOperator._matmat",
            "ToCanonicalLinearOperator.inverse",
            "FromCanonicalLinearOperator._matmat",
            "FromCanonicalLinearOperator.inverse",
            "_cancel",
        ),
        "curvlinops/computers/formats.py": (
            "TransposedConvolutionFormat.layout",
            "TransposedConvolutionFormat.widths",
            "EmbeddingFormat.layout",
            "EmbeddingFormat.widths",
            "Format.widths",
        ),
    },
    "scaling": {
        "curvlinops/computers/kfoc.py": ("KFOCComputer._exact", "KFOCComputer._factors"),
        "curvlinops/computers/statistics.py": (
            "CovarianceStatistic.end_of_forward",
            "CovarianceStatistic.factors",
            "CovarianceStatistic._factors",
        ),
        "curvlinops/computers/vectors.py": ("loss_vectors", "num_vectors", "check_terms"),
        "curvlinops/risk/cross_entropy.py": (
            "CrossEntropy.normalizer",
            "CrossEntropy.weight",
        ),
        "curvlinops/risk/elementwise.py": (
            "MSE.normalizer",
            "BCEWithLogits.normalizer",
            "BCEWithLogits.weight",
        ),
        "curvlinops/risk/empirical_risk.py": ("",),
        "curvlinops/risk/losses.py": ("GenericLoss.value", "GenericLoss.normalizer"),
    },
}

#: What decides about speed, memory and messages, not about results: any choice is right, and no
#: test of results can tell them apart. Functions, assignments ("function:target") and conditions.
PERFORMANCE = {
    "_cheapest_order",
    "_num_images",
    "_slices",
    "_block_size",
    "_between_positions",
    "chunks",
    "fits",
    "Loss._in_chunks:rows",
    "loss_vectors:chunk",
    "MSE.sample:entries",
    "BCEWithLogits.sample:entries",
    "CrossEntropy.sample:entries",
    "_CHUNK_ENTRIES",
    "_ENTRIES",
    "CHUNK",
}
PERFORMANCE_CONDITIONS = {"S * i ** 2 + V * S * o ** 2 > V * o * i * (o + i)"}
MESSAGES = {"_formula", "__repr__", "__str__", "display_name"}

#: Calls and keywords whose arguments are messages or bounds of temporary memory.
SKIPPED_CALLS = {"warn", "deprecated", "TypeVar"}
SKIPPED_KEYWORDS = {"name", "entries", "strict", "stacklevel", "desc", "enabled"}

AXIS_METHODS = {
    *("sum", "mean", "amax", "amin", "cumsum", "prod", "any", "all", "max", "min"),
    *("flatten", "unflatten", "unsqueeze", "squeeze", "unbind", "movedim", "transpose", "softmax"),
    *("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "log_softmax"),
}
AXIS_KEYWORDS = {"dim", "dim1", "dim2", "axis"}
DROPPED_ATTRIBUTES = {"T", "mT", "mH", "H"}
DROPPED_METHODS = {
    **dict.fromkeys(("adjoint", "conj", "transpose", "movedim", "permute"), "transpose"),
    **dict.fromkeys(("sqrt", "abs", "square"), "root"),
    **dict.fromkeys(("clamp", "clamp_"), "bound"),
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
KRON_LIKE = {"kron", "nearest_kronecker", "KroneckerProductLinearOperator", "outer"}


@dataclass(frozen=True)
class Site:
    """One possible mutant; ``line`` is for readers, the other fields are its name."""

    module: str
    function: str
    operator: str
    original: str
    mutated: str
    occurrence: int
    line: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What names the mutant, without the line."""
        return (
            self.module,
            self.function,
            self.operator,
            self.original,
            self.mutated,
            self.occurrence,
        )

    @property
    def digest(self) -> str:
        """A number that orders mutants at random, but always in the same way."""
        return hashlib.sha256("\0".join(map(str, self.key)).encode()).hexdigest()

    @property
    def critical(self) -> str | None:
        """The group without survivors that the mutant belongs to, if any."""
        for group, modules in CRITICAL.items():
            if {"", self.function} & set(modules.get(self.module, ())):
                return group
        return None


# --------------------------------------------------------------------------------------------------
# Finding and applying
# --------------------------------------------------------------------------------------------------
def find_sites(source: str, module: str, functions: tuple[str, ...] = ()) -> list[Site]:
    """Return all mutants of a module's source, in the order of the source."""
    return [site for site, _, _ in _walk(ast.parse(source), module, functions)]


def mutate(source: str, sites: Iterable[Site]) -> dict[Site, ast.Module]:
    """Return the syntax trees of a module with one mutant in each.

    Raises:
        LookupError: If the source has not all of these places (any more).
    """
    tree = ast.parse(source)
    wanted = {site.key: site for site in sites}
    trees = {}
    for found, node, new in _walk(tree, next(iter(wanted.values())).module, ()):
        site = wanted.pop(found.key, None)
        if site is not None:
            # a copy, as what is left of an expression stays in the other trees where it was
            changed = _replaced(tree, node, ast.copy_location(copy.copy(new), node))
            assert isinstance(changed, ast.Module)
            trees[site] = ast.fix_missing_locations(changed)
    for site in wanted.values():
        raise LookupError(f"{site.module} has no place {site.function}: {site.original}.")
    return trees


def all_sites() -> list[Site]:
    """Return all mutants of the mathematical core."""
    return [
        site
        for module, functions in MODULES.items()
        for site in find_sites((ROOT / module).read_text(encoding="utf-8"), module, functions)
    ]


def choose(sites: list[Site], per_stratum: int) -> list[Site]:
    """Return all critical mutants, and so many of every other module and operator.

    Which ones is decided by their names, so that a change of one function does not change what is
    chosen of the others.
    """
    strata: dict[tuple[str, str], list[Site]] = {}
    chosen = []
    for site in sites:
        if site.critical:
            chosen.append(site)
        else:
            strata.setdefault((site.module, site.operator), []).append(site)
    for members in strata.values():
        chosen += sorted(members, key=lambda site: site.digest)[:per_stratum]
    return sorted(chosen, key=lambda site: (site.module, site.line, site.operator, site.mutated))


def _walk(
    tree: ast.Module, module: str, functions: tuple[str, ...]
) -> Iterator[tuple[Site, ast.AST, ast.AST]]:
    """Yield mutants with the node to replace, and what to replace it with."""
    seen: dict[tuple[str, ...], int] = {}
    for node, parents, function in _nodes(tree):
        if functions and function not in functions:
            continue
        if {function, function.split(".")[-1]} & (PERFORMANCE | MESSAGES):
            continue
        for operator, new in _changes(node, parents):
            shown = _shown(node, parents)
            original = _text(shown)
            mutated = _text(_replaced(shown, node, new))
            place = (function, operator, original, mutated)
            seen[place] = seen.get(place, 0) + 1
            line = getattr(node, "lineno", 0)
            yield Site(module, *place, seen[place], line), node, new


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...], str]]:
    """Yield nodes that may be mutated, with their ancestors and the function they are in."""

    def visit(
        node: ast.AST, parents: tuple[ast.AST, ...], names: tuple[str, ...], inside: bool
    ) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...], str]]:
        function = ".".join(names)
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.Call) and _called(node) in SKIPPED_CALLS:
            return
        if isinstance(node, ast.keyword) and node.arg in SKIPPED_KEYWORDS:
            return
        if isinstance(node, ast.expr) and (
            _text(node) in PERFORMANCE_CONDITIONS or _asks_device(node)
        ):
            return
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            labels = {label for t in targets for label in (_text(t), f"{function}:{_text(t)}")}
            if labels & PERFORMANCE:
                return
        yield node, parents, function
        below = (*parents, node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST):
                    continue
                deeper = names
                # a function inside of a function belongs to the outer one
                is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not (
                    inside or is_function
                ):
                    deeper = (*names, child.name)
                yield from visit(child, below, deeper, inside or is_function)

    yield from visit(tree, (), (), False)


def _asks_device(node: ast.expr) -> bool:
    """Return whether an expression asks for the type of a device: tests have the CPU only."""
    return isinstance(node, ast.Compare) and _text(node.left).endswith("device.type")


def _shown(node: ast.AST, parents: tuple[ast.AST, ...]) -> ast.AST:
    """Return the largest expression around a node that fits into a line."""
    best = node
    for parent in reversed(parents):
        if isinstance(parent, (ast.stmt, ast.Lambda)) and not isinstance(parent, ast.AugAssign):
            break
        if isinstance(parent, (ast.expr, ast.AugAssign)):
            if len(_text(parent)) > 88:
                break
            best = parent
    return best


def _replaced(tree: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """Return a copy of a tree with one node replaced."""
    if tree is old:
        return new
    result = copy.copy(tree)
    for name, value in ast.iter_fields(tree):
        if isinstance(value, list):
            items = [_replaced(v, old, new) if isinstance(v, ast.AST) else v for v in value]
            setattr(result, name, items)
        elif isinstance(value, ast.AST):
            setattr(result, name, _replaced(value, old, new))
    return result


def _text(node: ast.AST) -> str:
    """Return an expression in one line."""
    return " ".join(ast.unparse(node).split())


# --------------------------------------------------------------------------------------------------
# Changes of one node
# --------------------------------------------------------------------------------------------------
def _changes(node: ast.AST, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the changes of a node: what they are, and what stands in its place."""
    if isinstance(node, ast.Constant):
        yield from _constants(node, parents)
    elif isinstance(node, ast.UnaryOp):
        yield from _unary(node, parents)
    elif isinstance(node, ast.BinOp):
        yield from _binary(node)
    elif isinstance(node, ast.AugAssign):
        flip = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
        new = flip.get(type(node.op))
        if new is not None and not isinstance(node.value, (ast.List, ast.ListComp, ast.Call)):
            kind = "sign" if new in (ast.Add, ast.Sub) else "product"
            yield kind, ast.AugAssign(node.target, new(), node.value)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        new_op = COMPARISONS.get(type(node.ops[0]))
        if new_op is not None:
            yield "comparison", ast.Compare(node.left, [new_op()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "comparison", ast.BoolOp(op, node.values)
    elif isinstance(node, ast.Attribute) and node.attr in DROPPED_ATTRIBUTES:
        if isinstance(node.ctx, ast.Load):
            yield "transpose", node.value
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif (
        isinstance(node, ast.Return)
        and isinstance(node.value, ast.Tuple)
        and len(node.value.elts) == 2
    ):
        first, second = node.value.elts
        yield "order", ast.Return(ast.Tuple([second, first], ast.Load()))


def _is_number(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, (int, float))
        and not isinstance(node.value, bool)
    )


def _is_axis(parents: tuple[ast.AST, ...]) -> bool:
    """Return whether a number stands where an axis does."""
    for parent in reversed(parents):
        if isinstance(parent, ast.keyword):
            return parent.arg in AXIS_KEYWORDS
        if isinstance(parent, ast.Call):
            return isinstance(parent.func, ast.Attribute) and _called(parent) in AXIS_METHODS
        if not isinstance(parent, (ast.Tuple, ast.List)):
            return False
    return False


def _constants(node: ast.Constant, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    """Change a number, or a flag that is passed by keyword."""
    parent = parents[-1]
    if isinstance(node.value, bool):
        if isinstance(parent, ast.keyword):
            yield "flag", ast.Constant(not node.value)
        return
    if not _is_number(node):
        return
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub):
        return  # together with its sign
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow) and node.value == 0.5:
        return  # the power is dropped, which is the same as an exponent of 1
    value = node.value
    assert isinstance(value, (int, float))
    if _is_axis(parents):
        yield "axis", ast.Constant(1 if value == 0 else value - 1)
    elif value in (0, 1, 0.5):
        yield "constant", ast.Constant(type(value)(1 if value != 1 else 0))
        if value == 1:
            yield "constant", ast.Constant(type(value)(2))
    else:
        yield "constant", ast.Constant(value + 1 if isinstance(value, int) else value * 2)


def _unary(node: ast.UnaryOp, parents: tuple[ast.AST, ...]) -> Iterator[tuple[str, ast.AST]]:
    """Remove a sign or a negation; change the number of an axis from the end."""
    if isinstance(node.op, ast.Not):
        yield "comparison", node.operand
    elif isinstance(node.op, ast.USub):
        if not _is_number(node.operand):
            yield "sign", node.operand
        elif _is_axis(parents):
            assert isinstance(node.operand, ast.Constant)
            value = node.operand.value
            new = ast.UnaryOp(ast.USub(), ast.Constant(2 if value == 1 else value - 1))
            yield "axis", new
        else:
            yield "constant", node.operand


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    """Flip signs and products, swap the factors of matrix products, drop powers and divisors."""
    left, right = node.left, node.right
    lists = (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr)
    if any(isinstance(side, lists) for side in (left, right)):
        return
    if isinstance(node.op, ast.Add):
        yield "sign", ast.BinOp(left, ast.Sub(), right)
    elif isinstance(node.op, ast.Sub):
        yield "sign", ast.BinOp(left, ast.Add(), right)
    elif isinstance(node.op, ast.Mult):
        yield "product", ast.BinOp(left, ast.Div(), right)
    elif isinstance(node.op, (ast.Div, ast.FloorDiv)):
        yield "product", ast.BinOp(left, ast.Mult(), right)
        if not (isinstance(left, ast.Constant) and left.value == 1):
            yield "normalisation", left
    elif isinstance(node.op, ast.Mod):
        yield "product", ast.BinOp(left, ast.FloorDiv(), right)
    elif isinstance(node.op, ast.MatMult):
        yield "order", ast.BinOp(right, ast.MatMult(), left)
    elif isinstance(node.op, ast.Pow):
        yield "root", left


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    """Exchange sums and means, drop roots and transposes, swap factors and extrema."""
    name, func = _called(node), node.func
    is_method = isinstance(func, ast.Attribute) and not (
        isinstance(func.value, ast.Name) and func.value.id in ("torch", "math", "functional")
    )
    if name in ("sum", "mean") and is_method:
        assert isinstance(func, ast.Attribute)
        other = ast.Attribute(func.value, "mean" if name == "sum" else "sum", ast.Load())
        yield "normalisation", ast.Call(other, node.args, node.keywords)
    if name in DROPPED_METHODS and is_method:
        assert isinstance(func, ast.Attribute)
        yield DROPPED_METHODS[name], func.value
    if name == "sqrt" and not is_method and len(node.args) == 1:
        yield "root", node.args[0]
    if name in ("max", "min") and isinstance(func, ast.Name) and len(node.args) == 2:
        other_name = ast.Name("min" if name == "max" else "max", ast.Load())
        yield "bound", ast.Call(other_name, node.args, node.keywords)
    if name in KRON_LIKE and len(node.args) == 2:
        yield "order", ast.Call(func, node.args[::-1], node.keywords)
    if name == "reduce" and len(node.args) == 2 and _text(node.args[0]) == "torch.kron":
        reverse = ast.Subscript(
            node.args[1],
            ast.Slice(None, None, ast.UnaryOp(ast.USub(), ast.Constant(1))),
            ast.Load(),
        )
        yield "order", ast.Call(func, [node.args[0], reverse], node.keywords)


def _called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    func = node.func
    if isinstance(func, ast.Attribute):
        return func.attr
    return func.id if isinstance(func, ast.Name) else ""
