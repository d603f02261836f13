"""What must be the same on all ranks, compared when an operator is built."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from curvlinops.distributed import Collective

#: What a rank says of a parameter that it does not have.
_ABSENT = "absent"
#: How many differences an error lists.
_LISTED = 5
#: Entries of a parameter that are converted to float64 at once.
_CHUNK = 2**20


def compare_operators(
    collective: Collective, params: dict[str, Tensor], options: dict[str, Any]
) -> None:
    """Compare parameters (not their values) and options between ranks.

    Fixed-size fingerprints are exchanged; only if they differ, so is what they are made from.

    Args:
        collective: Communication with the other ranks.
        params: The parameters by name.
        options: What else must be the same: name, and a value with an unambiguous ``repr``.

    Raises:
        RuntimeError: If something differs, on all ranks. The message names it.
    """
    if collective.alone:
        return
    own = {what: repr(value) for what, value in options.items()}
    own |= {f"parameter {name!r}": f"{tuple(p.shape)} {p.dtype}" for name, p in params.items()}
    own["order of the parameters"] = ", ".join(params)
    digest = hashlib.sha256(repr(list(own.items())).encode()).digest()
    parts = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]
    others = collective.exchange(parts)
    if all(other == others[0] for other in others):
        return
    described = collective.gather(own)
    differences = []
    for what in dict.fromkeys(what for description in described for what in description):
        ranks_with: dict[str, list[int]] = {}
        for r, description in enumerate(described):
            ranks_with.setdefault(description.get(what, _ABSENT), []).append(collective.name(r))
        if len(ranks_with) > 1:
            values = "; ".join(
                f"{value} on rank(s) {', '.join(map(str, ranks))}"
                for value, ranks in ranks_with.items()
            )
            differences.append(f"{what}: {values}")
    listing = " | ".join(differences[:_LISTED]) + " | ..." * (len(differences) > _LISTED)
    raise RuntimeError(
        "All ranks of a process group must build the same operator, but these differ between "
        f"ranks. {listing}"
    )


def compare_params(collective: Collective, params: dict[str, Tensor]) -> None:
    """Compare the values of parameters between ranks, up to rounding errors.

    Args:
        collective: Communication with the other ranks.
        params: The parameters by name. Sharded ones are left out: they are one tensor on all ranks.

    Raises:
        RuntimeError: If values differ, on all ranks. The message names the parameters.
    """
    whole = {name: p for name, p in params.items() if type(p).__name__ != "DTensor"}
    different = different_values(collective, whole)
    if different:
        names = ", ".join(repr(name) for name in different)
        raise RuntimeError(
            f"The values of parameters differ between ranks: {names}. All ranks need the same "
            "model: broadcast its parameters (torch.distributed.broadcast, or "
            "DistributedDataParallel), or use the same seed. (check_deterministic=False skips this "
            "check.)"
        )


def different_values(collective: Collective, tensors: dict[str, Tensor]) -> list[str]:
    """Return which tensors differ between ranks beyond rounding errors, the same on all ranks.

    Args:
        collective: Communication with the other ranks.
        tensors: Tensors by name. One that a rank lacks counts as different.
    """
    if collective.alone:
        return []
    everybody = collective.gather({name: _statistics(tensor) for name, tensor in tensors.items()})
    different = []
    for name in dict.fromkeys(name for statistics in everybody for name in statistics):
        found = [statistics[name] for statistics in everybody if name in statistics]
        sums, norms, eps = zip(*found, strict=True)
        tolerance = max(eps) ** 0.5 * max(norms)
        # NaN is no difference: it is reported where it does harm.
        differ = any(max(values) - min(values) > tolerance for values in (sums, norms))
        if differ or len(found) < len(everybody):
            different.append(name)
    return different


def _statistics(p: Tensor) -> tuple[float, float, float]:
    """Return an irregularly weighted sum, the norm, and the machine epsilon."""
    total = square = 0.0
    for i, chunk in enumerate(p.detach().reshape(-1).split(_CHUNK)):
        x = chunk.to(torch.float32 if p.device.type == "mps" else torch.float64)
        weights = torch.arange(len(x), device=x.device, dtype=x.dtype).square().cos()
        total += math.cos(i * i) * float(weights @ x)
        square += float(x @ x)
    return total, square**0.5, torch.finfo(p.dtype).eps


__all__ = ["compare_operators", "compare_params", "different_values"]
