"""Functions of tensors in nested containers as flat graphs of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from curvlinops.computers.containers import flattened, mapped, refilled, reordered, signature
from curvlinops.computers.tracing import READS_ENTRIES, one_fake_mode, reads_entries

aten = torch.ops.aten


def flat_function(
    function: Callable[..., Any], names: Sequence[str], arguments: Sequence[Any]
) -> Callable[..., Any]:
    """Turn a function of tensors in nested containers into a flat graph of operations.

    Derivatives taken inside are operations of the graph, so that ``torch.compile`` can compile it
    as a whole.

    Args:
        function: The function. What it does must not depend on the tensors' entries.
        names: What errors call the arguments.
        arguments: Arguments to trace it with, as :func:`mapped` takes them.

    Returns:
        The function for arguments of the same structures and shapes, in any memory layout. It
        raises ``ValueError`` for others.

    Raises:
        NotImplementedError: If a number or a shape depends on the tensors' entries.

    Example:
        >>> double = flat_function(lambda x: {"twice": 2 * x}, ["x"], [torch.ones(2)])
        >>> double(torch.zeros(2))
        {'twice': tensor([0., 0.])}
    """
    arguments = list(arguments)
    expected = [signature(argument, layout=False) for argument in arguments]
    if None in expected:
        name = names[expected.index(None)]
        raise NotImplementedError(f"{name} holds objects that cannot be traced: use tensors only.")
    shapes = [mapped(argument, lambda t: list(t.shape)) for argument in arguments]
    template: Any = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal template
        results = function(*refilled(arguments, tensors))
        template = mapped(results, lambda t: torch.empty(0))
        return flattened(results)

    with torch.enable_grad(), one_fake_mode():
        tracer = make_fx(flat, tracing_mode="real", _error_on_data_dependent_ops=False)
        graph = tracer(*flattened(arguments))
    if any(map(reads_entries, graph.graph.nodes)):
        raise NotImplementedError(READS_ENTRIES)
    _allow_other_strides(graph.graph)
    graph.recompile()

    def call(*given: Any) -> Any:
        given = tuple(map(reordered, given, arguments))
        for name, argument, wanted, shape in zip(names, given, expected, shapes, strict=True):
            if signature(argument, layout=False) != wanted:
                got = mapped(argument, lambda t: list(t.shape))
                raise ValueError(
                    f"{name} must have the structure, shapes, dtypes and devices that the function "
                    f"was made for, {shape}, but has {got}."
                )
        with torch.no_grad():  # derivatives are operations of the graph
            results = graph(*flattened(list(given)))
        return refilled(template, results)

    return call


def _allow_other_strides(graph: Graph) -> None:
    """Let views copy where a tensor has other strides than when it was traced.

    So have arguments in other layouts, and results of operations that a compiler replaced. Views of
    memory that is changed in place remain views.
    """
    owners: dict[Node, Node] = {}  # whose memory a node returns, if it is not its own
    changed: set[Node] = set()
    for node in graph.nodes:
        inputs = [owners.get(x, x) for x in node.all_input_nodes]
        schema = getattr(node.target, "_schema", None)  # none: an item of several results
        if inputs and (schema is None or any(a.alias_info for a in schema.arguments)):
            owners[node] = inputs[0]
        if schema is not None and schema.is_mutable:
            changed.update(inputs)
    for node in graph.nodes:
        if node.target is aten.view.default and owners[node] not in changed:
            node.target = aten.reshape.default


__all__ = ["flat_function"]
