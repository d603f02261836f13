r"""Is the empirical risk the same function in each pass over the data?

Two passes are recorded and compared (forward evaluations only). What is recorded of a tensor
:math:`x \in \mathbb{R}^{m \times C}` of a batch is a handful of numbers, accumulated in float64:

- :math:`\sum_{r,c} w_c x_{rc}` for fixed irregular weights :math:`w`, which does not depend on the
  order of the rows, so that its sum over the batches does not change when the data are shuffled;
- :math:`\sum_{r,c} u_r w_c x_{rc}`, which does depend on the order;
- :math:`\sum |x_{rc}|` and :math:`\sum x_{rc}^2`, the scales of rounding errors.

If both passes saw the same data in the same order, the predictions are compared batch by batch,
otherwise their sums over all data. The tolerance asks for half of the digits of the coarsest
numbers that the model computes with, relative to :math:`\sqrt{\sum x_{rc}^2}`. Independent rounding
errors of all entries, which differ when examples meet other examples in a batch, stay far below it;
independent changes of a visible size, such as dropout's, are above, however many entries there are.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops.risk.data import Batch
from curvlinops.risk.losses import Loss

#: Entries that are converted to float64 at once: a quarter of a megabyte fits in caches.
_CHUNK = 2**15
#: Largest number of weights that are kept.
_TABLE = 2**17
_FLOAT32_EPS = torch.finfo(torch.float32).eps
#: Columns of a recorded statistic.
_SIZE, _SUM, _ABSOLUTE, _SQUARE, _ORDERED = range(5)


@contextmanager
def preserved_rng(torch_only: bool = False) -> Iterator[None]:
    """Give the global random generators back as they were, also after an exception.

    Args:
        torch_only: Leave out those of NumPy and Python, whose states are slow to copy (0.1 ms;
            those of torch take a few microseconds).
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    # The global generators are what users have: preserved here, and used nowhere in the package.
    others = None if torch_only else (np.random.get_state(), random.getstate())  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if others is not None:
            np.random.set_state(others[0])  # noqa: NPY002
            random.setstate(others[1])


def advance_rng() -> None:
    """Draw a number from each of the global random generators, so that what follows is another."""
    torch.rand(())
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.rand((), device=f"cuda:{device}")
    np.random.random()  # noqa: NPY002
    random.random()


def refuse_random_layers(model: nn.Module) -> None:
    """Refuse layers that are in a mode in which they are random or couple the examples of a batch.

    They are found by looking at the modules, because predictions can hide them: with a last layer
    initialised to zero, predictions do not change but their derivatives do.

    Args:
        model: The model.

    Raises:
        RuntimeError: If there is such a layer. The message names it.
    """
    batch_norms, untracked, dropouts = [], [], []
    for name, layer in model.named_modules():
        shown = f"{name or 'the model'} ({type(layer).__name__})"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.running_mean is None and layer.running_var is None:
                untracked.append(shown)
            elif layer.training:
                batch_norms.append(shown)
        elif layer.training and _is_random(layer):
            dropouts.append(shown)
    if batch_norms:
        raise RuntimeError(
            f"BatchNorm in training mode: {', '.join(batch_norms)}. Predictions then depend on "
            f"which examples share a batch. Call model.eval() first. {_OPT_OUT}"
        )
    if untracked:
        raise RuntimeError(
            f"BatchNorm without running statistics: {', '.join(untracked)}. It normalises by the "
            "statistics of the batch, also after model.eval(), so predictions depend on which "
            f"examples share a batch. {_OPT_OUT}"
        )
    if dropouts:
        raise RuntimeError(
            f"Dropout in training mode: {', '.join(dropouts)}. Predictions are random. Call "
            f"model.eval() first. {_OPT_OUT}"
        )


def _is_random(layer: nn.Module) -> bool:
    """Whether a layer draws random numbers when it is in training mode."""
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1
    return isinstance(layer, nn.RReLU) and layer.lower < layer.upper


@dataclass
class PassRecord:
    """What is kept of one pass over the data.

    Attributes:
        fixed_data: Whether each pass sees the same tensors in the same order, as with a list. Then
            nothing is recorded of them: should the model change them, its predictions tell.
        sizes: Number of examples of each batch.
        num_terms: Number of loss terms of each batch; none for losses without closed form.
        shapes: Shape of each batch's prediction.
        losses: Loss of each batch, not averaged.
        normalizers: Normalizer of each batch.
        statistics: For the prediction and each tensor in the data, five numbers per batch.
        eps: The machine epsilon of each of them, 0 for integers.
        structural: Integers in a mapping, such as indices into the batch or masks. They may depend
            on which examples share a batch, so they do not count as a difference.
    """

    fixed_data: bool = False
    sizes: list[int] = field(default_factory=list)
    num_terms: list[int] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    normalizers: list[Tensor] = field(default_factory=list)
    statistics: dict[str, list[Tensor]] = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)
    structural: set[str] = field(default_factory=set)

    @property
    def num_examples(self) -> int:
        """Number of examples in the pass."""
        return sum(self.sizes)

    def table(self, name: str) -> Tensor:
        """Return the statistics of a tensor, ``[batches, 5]``."""
        return torch.stack(self.statistics[name]).cpu()

    def add(self, batch: Batch, prediction: Tensor, loss: Loss | None) -> None:
        """Record a batch.

        Args:
            batch: The batch.
            prediction: The model's prediction.
            loss: The loss, if there is one.
        """
        self.sizes.append(batch.n)
        self.shapes.append(prediction.shape)
        for name, tensor, structural in () if self.fixed_data else _tensors(batch):
            self._record(name, tensor.reshape(-1, 1), None)
            if structural:
                self.structural.add(name)
        rows, used = prediction, None
        if loss is not None:
            rows, targets = loss.terms(prediction, batch.y)
            self.losses.append(_double(loss.value(rows, targets, batch.n)))
            normalizer = loss.normalizer(rows, targets, batch.n)
            self.normalizers.append(_double(torch.as_tensor(normalizer)))
            if loss.closed_form:
                self.num_terms.append(rows.shape[0])
                weight = loss.weight(rows, targets)
                # Padding is ignored, and how much of it there is depends on the batch.
                used = None if weight is None else weight != 0
        width = max(1, rows.shape[-1]) if rows.ndim > 1 else 1
        self._record(PREDICTION, rows.reshape(-1, width), used)

    def _record(self, name: str, x: Tensor, used: Tensor | None) -> None:
        """Record the statistics of ``[m, C]``, of the used rows ``[m]`` or entries ``[m, C]``."""
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
        self.eps[name] = max(eps, self.eps.get(name, 0.0))
        self.statistics.setdefault(name, []).append(_statistics(x, used))


#: Name of the predictions among the statistics.
PREDICTION = "prediction"

_OPT_OUT = "(check_deterministic=False skips this check.)"


def compare_passes(
    first: PassRecord,
    second: PassRecord,
    *,
    needs_fixed_order: bool,
    eps: float,
    draws_random: bool,
    drop_last: bool,
) -> str | None:
    """Compare two passes over the data.

    Args:
        first: The first pass.
        second: The second pass.
        needs_fixed_order: Whether the batches must come in the same order.
        eps: Coarsest machine epsilon that the model computes with.
        draws_random: Whether the model uses torch's global random generator.
        drop_last: Whether the data leave out an incomplete last batch.

    Returns:
        What differs and the likely cause, or None if nothing that matters does.
    """
    if first.num_examples != second.num_examples:
        cause = (
            "The data can be iterated only once: pass a list or a DataLoader."
            if second.num_examples == 0
            else "Each pass must see the same examples."
        )
        return (
            "The number of examples differs between two passes over the data: "
            f"{first.num_examples} and {second.num_examples}. {cause} {_OPT_OUT}"
        )
    same_order = _same_order(first, second)
    changed = [] if same_order else _changed_data(first, second)
    certain = [name for name in changed if name not in first.structural]
    if certain:
        names = ", ".join(certain)
        return f"The data differ between two passes ({names}). {_data_cause(drop_last)}"
    if needs_fixed_order and not same_order:
        return (
            "The order of the data differs between two passes, and this operator needs a fixed "
            f"order. Use shuffle=False (or a fixed sampler) in the DataLoader. {_OPT_OUT}"
        )
    different = _different_results(first, second, same_order, eps)
    if not different:
        return None
    verb = "differs" if len(different) == 1 else "differ"
    what = f"The {' and the '.join(different)} {verb} between two passes"
    if changed:
        return f"{what}, and so do the data ({', '.join(changed)}). {_data_cause(drop_last)}"
    if draws_random:
        return (
            f"{what}: the model is not deterministic. It draws from torch's global random "
            f"generator, as dropout in training mode does. Call model.eval(). {_OPT_OUT}"
        )
    coupling = (
        ""
        if same_order
        else ", or predictions depend on which examples share a batch (then use shuffle=False)"
    )
    return (
        f"{what}: the model is not deterministic{coupling}. Remove what changes from call to call. "
        f"{_OPT_OUT}"
    )


def _data_cause(drop_last: bool) -> str:
    """Name the likely cause of changed data."""
    if drop_last:
        return (
            "The DataLoader has drop_last=True: with shuffling, each pass leaves out other "
            f"examples. Use drop_last=False. {_OPT_OUT}"
        )
    return (
        "Likely causes are random augmentation (apply it once and keep the result) or a sampler "
        f"that draws with replacement. {_OPT_OUT}"
    )


def _same_order(first: PassRecord, second: PassRecord) -> bool:
    """Whether both passes saw the same data in the same order and the same batches."""
    if first.sizes != second.sizes or first.statistics.keys() != second.statistics.keys():
        return False
    for name in first.statistics.keys() - {PREDICTION}:
        a, b = first.table(name), second.table(name)
        # The same numbers in the same order: the sums are equal but for a library's whims.
        if a.shape != b.shape or _differ(a, b, 1e-13 * (a[:, [_ABSOLUTE]] + a.abs())):
            return False
    return True


def _changed_data(first: PassRecord, second: PassRecord) -> list[str]:
    """Name the tensors in the data whose entries are not the same, whatever their order."""
    names = first.statistics.keys() | second.statistics.keys()
    changed = []
    for name in sorted(names - {PREDICTION}):
        if name not in first.statistics or name not in second.statistics:
            changed.append(name)
            continue
        a, b = first.table(name).sum(0), second.table(name).sum(0)
        if a[_SIZE] != b[_SIZE]:  # padded to the longest example of a batch
            continue
        # Features may have been computed batch by batch, so floating point data may have rounding
        # errors. Beyond, there is only the summation in float64.
        eps = first.eps[name]
        shared = 8 * min(eps, _FLOAT32_EPS) + 1e-13
        sum_tolerance = 8 * eps * a[_SQUARE].sqrt() + shared * a[_ABSOLUTE]
        square_tolerance = (8 * eps + 1e-13) * a[_SQUARE]
        if _differ(a[_SUM], b[_SUM], sum_tolerance) or _differ(
            a[_SQUARE], b[_SQUARE], square_tolerance
        ):
            changed.append(name)
    return changed


def _different_results(
    first: PassRecord, second: PassRecord, same_order: bool, eps: float
) -> list[str]:
    """Name the results that differ: batch by batch in the same order, else summed over the data."""

    def reduced(values: Tensor) -> Tensor:
        return values if same_order else values.sum(0, keepdim=True)

    different = []
    a, b = (reduced(record.table(PREDICTION)) for record in (first, second))  # [B or 1, 5]
    eps = max(eps, first.eps[PREDICTION])
    noise = math.sqrt(eps)
    # Errors that are common to all entries do not average out, but there are few.
    shared = 8 * min(eps, _FLOAT32_EPS)
    norm = a[:, _SQUARE].sqrt()
    tolerance = noise * norm + shared * a[:, _ABSOLUTE]
    # Other sizes mean that sequences were padded to other lengths; the loss knows what is padding.
    comparable = a[:, _SIZE] == b[:, _SIZE]
    columns = [_SUM, _ORDERED] if same_order else [_SUM]
    for column in columns:
        if _differ(a[comparable, column], b[comparable, column], tolerance[comparable]):
            different.append("prediction")
            break
    if first.losses:
        a_loss, b_loss = (reduced(torch.stack(r.losses).cpu()) for r in (first, second))
        # |δl| <= |gradient| |δf|, where the square loss has the gradient 2 √l.
        size = a_loss.abs()
        tolerance = noise * (size + norm * (1 + size.sqrt())) + shared * a[:, _ABSOLUTE]
        if _differ(a_loss, b_loss, tolerance):
            different.append("loss")
        a_norm, b_norm = (reduced(torch.stack(r.normalizers).cpu()) for r in (first, second))
        if _differ(a_norm, b_norm, 8 * max(eps, _FLOAT32_EPS) * a_norm.abs()):
            different.append("number of loss terms")
    return different


def _differ(a: Tensor, b: Tensor, tolerance: Tensor) -> bool:
    """Whether any finite entries differ by more than the tolerance; NaN is no difference."""
    return bool(((a - b).abs() > tolerance).any())


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, tensor, and whether it is structural, for all tensors in a batch."""

    def walk(name: str, value: Any, in_mapping: bool) -> Iterator[tuple[str, Tensor, bool]]:
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_nested:
                real = torch.view_as_real(value) if value.is_complex() else value
                yield name, real, in_mapping and not real.is_floating_point()
        elif isinstance(value, Mapping):
            for key in value:
                yield from walk(f"{name}[{key!r}]", value[key], True)
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                yield from walk(f"{name}[{i}]", entry, in_mapping)

    yield from walk("X", batch.X, False)
    yield from walk("y", batch.y, False)


def _statistics(x: Tensor, used: Tensor | None) -> Tensor:
    """Evaluate the five numbers of ``[m, C]``; ``used`` ``[m]`` or ``[m, C]`` selects entries."""
    m, C = x.shape
    if used is not None:
        used = (used if used.ndim == 2 else used.unsqueeze(1)).expand(m, C)
    rows = max(1, _CHUNK // C)
    row_weights, column_weights = (_weights(k, x.device) for k in (min(rows, m), C))
    size = row_weights.new_tensor(m * C) if used is None else _double(used.sum())
    values = [row_weights.new_zeros(())] * 4 * (m == 0)  # four of each part
    for k, start in enumerate(range(0, m, rows)):
        part = x[start : start + rows]
        if part.is_floating_point():
            part = part.nan_to_num(0.0, 0.0, 0.0)
        part = _double(part)
        if used is not None:
            part = part * used[start : start + rows].to(part.device)
        sums = part @ column_weights  # [rows]
        ordered = math.cos(1 + k * k) * (sums @ row_weights[: sums.shape[0]])
        entries = part.reshape(-1)
        squares = entries @ entries
        values += [sums.sum(), entries.abs_().sum(), squares, ordered]  # in place: it is a copy
    return torch.cat([size.reshape(1), torch.stack(values).reshape(-1, 4).sum(0)])


def _weights(size: int, device: torch.device) -> Tensor:
    """Return fixed irregular weights ``[size]`` in [-1, 1], in float64."""
    return _weight_table(device)[:size] if size <= _TABLE else _irregular(size, device)


@functools.lru_cache(maxsize=8)
def _weight_table(device: torch.device) -> Tensor:
    """Keep the weights for all small sizes."""
    return _irregular(_TABLE, device)


def _irregular(size: int, device: torch.device) -> Tensor:
    """Evaluate the weights."""
    # A quadratic phase: the difference of two shifted copies is irregular, too.
    return _double(torch.arange(size, device=device)).square_().cos_()


def _double(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device has none."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


__all__ = [
    "PassRecord",
    "advance_rng",
    "compare_passes",
    "preserved_rng",
    "refuse_random_layers",
]
