"""What operators must leave as it was: parameters, module, global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Traces:
    """A look at everything that must not change."""

    def __init__(self, model: Any, params: dict[str, Tensor]):
        self._module = model if isinstance(model, nn.Module) else None
        self._params = params
        self._before = self._look()

    def changed(self) -> list[str]:
        """Return what differs from the first look, in words."""
        now = self._look()
        names = [*self._before, *(name for name in now if name not in self._before)]
        return [n for n in names if not _same(self._before.get(n), now.get(n))]

    def _look(self) -> dict[str, Any]:
        # The global generators are what users have: read here, and used nowhere in the package.
        state: Any = np.random.get_state()  # noqa: NPY002
        seen: dict[str, Any] = {
            "torch's global random generator": torch.get_rng_state(),
            "NumPy's global random generator": (state[1].tobytes(), *state[2:]),
            "Python's global random generator": random.getstate(),
        }
        if torch.cuda.is_initialized():
            states = torch.cuda.get_rng_state_all()
            seen |= {f"the generator of cuda:{i}": state for i, state in enumerate(states)}
        tensors = [(f"params[{name!r}]", p) for name, p in self._params.items()]
        if self._module is not None:
            own = self._module
            tensors += own.named_parameters(remove_duplicate=False)
            tensors += own.named_buffers(remove_duplicate=False)
            for name, module in own.named_modules():
                hooks = [len(v) for k, v in vars(module).items() if "hooks" in k and v is not None]
                seen[f"the training flag of module {name!r}"] = module.training
                seen[f"the hooks of module {name!r}"] = hooks
        for name, tensor in tensors:
            seen[f"the value of {name}"] = tensor.detach().clone()
            seen[f"the identity of {name}"] = id(tensor)
            grad = tensor.grad if tensor.is_leaf else None
            seen[f"the gradient of {name}"] = None if grad is None else grad.detach().clone()
            seen[f"requires_grad of {name}"] = tensor.requires_grad
            seen[f"the hooks of {name}"] = len(getattr(tensor, "_backward_hooks", None) or ())
        return seen


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
        return same_kind and torch.equal(a.to_dense(), b.to_dense())
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b
