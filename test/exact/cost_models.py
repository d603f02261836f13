"""The models whose costs are promised, and how floating-point operations are counted.

The models are those of the benchmark, ``docs_src/benchmark/models.py``: it runs in environments
that do not hold this package or its tests, so that file is on its own, and is loaded here by path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_PATH = Path(__file__).parents[2] / "docs_src" / "benchmark" / "models.py"
_spec = spec_from_file_location("benchmark_models", _PATH)
models = sys.modules[_spec.name] = module_from_spec(_spec)
_spec.loader.exec_module(models)

PROBLEMS: dict[str, Callable[[], Any]] = models.PROBLEMS
gradient = models.gradient


class FlopCounter(TorchDispatchMode):
    """Sums PyTorch's own formulas over everything that is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:  # maybe a composite, which inference mode does not take apart
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out


def num_flops(function: Callable[[], Any]) -> int:
    with FlopCounter() as counter:
        function()
    return counter.total


def operator(cls: Any, problem: Any, **options: Any) -> Any:
    """Build an operator that does not look at the data at construction."""
    return cls(
        problem.model,
        nn.CrossEntropyLoss(),
        dict(problem.model.named_parameters()),
        problem.data,
        check_deterministic=False,
        num_data=problem.num_data,
        **options,
    )


def vectors(problem: Any, *columns: int) -> torch.Tensor:
    """Return a flat vector over all parameters, or ``columns`` of them, in float32."""
    return torch.randn(problem.num_params, *columns)
