"""Communication by ``torch.distributed``."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from curvlinops.distributed.collective import Collective


class ProcessGroupCollective(Collective):
    """Communication between the ranks of a ``torch.distributed`` process group.

    It belongs to the process: a copy is the same object. It does not keep the group alive, whose
    threads ``torch.distributed.destroy_process_group`` can only end, as it must before the process
    does, if nobody else holds it. If a rank does not take part in a call,
    the others get an error from the process group's backend: at once if the connection breaks,
    otherwise after the group's timeout (``timeout`` of ``torch.distributed.init_process_group``).
    Backends do not compare shapes: with gloo, a process whose tensor is smaller than another rank's
    is ended, and one whose tensor is larger gets wrong numbers. So callers compare sizes first; or
    PyTorch does, with the environment variable ``TORCH_DISTRIBUTED_DEBUG=DETAIL``.

    Args:
        group: The process group. Backends: gloo, for the CPU, and NCCL, for GPUs.
        device: The device of the parameters, where sums are communicated. Default: one that the
            group can communicate from.

    Raises:
        TypeError: If ``group`` is no process group.
        ValueError: If this process is not in the group, or the group does not communicate from the
            device.
        RuntimeError: If it communicates after the group was destroyed.
    """

    alone = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device | None = None) -> None:
        if not dist.is_available():
            raise ValueError("process_group needs a PyTorch that was built with distributed.")
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "This process is not in process_group: build the operator on the group's ranks "
                "only."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed process group, such as "
                f"torch.distributed.group.WORLD, got {type(group).__name__}."
            )
        self._process_group = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # For instance "cpu:gloo,cuda:nccl".
        config = str(dist.get_backend_config(group))
        backends = dict(entry.split(":", 1) for entry in config.split(","))
        if device is None:
            kind = "cpu" if "cpu" in backends else next(iter(backends))
            index = torch.cuda.current_device() if kind == "cuda" else None
            device = torch.device(kind) if index is None else torch.device(kind, index)
        if device.type not in backends:
            raise ValueError(
                f"process_group ({config}) does not communicate tensors on {device}, where the "
                "parameters are. Use gloo for the CPU, and NCCL for GPUs."
            )
        self.device = device
        # gloo has no all-gather of tensors on GPUs.
        self._exchange_device = torch.device("cpu") if "cpu" in backends else device

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group."""
        group = self._process_group()
        if group is None:
            raise RuntimeError(
                "The process group was destroyed: call torch.distributed.destroy_process_group "
                "after the last use of the operators that were built with it, or build them anew."
            )
        return group

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "What was built with a process_group belongs to this process and cannot be saved or "
            "sent to another one: build it there, or save a matrix that is complete, such as "
            "curvlinops.sharded.gathered(K) of KFAC."
        )

    def __copy__(self) -> ProcessGroupCollective:
        return self

    def __deepcopy__(self, memo: Any) -> ProcessGroupCollective:
        return self

    def all_reduce(self, buffer: Tensor) -> Tensor:
        """Add one tensor elementwise over the ranks, see the base class."""
        with torch.no_grad(), self._on_device():
            dist.all_reduce(buffer, group=self.process_group)
        return buffer

    def exchange(self, values: list[int]) -> list[list[int]]:
        """Give every rank the integers of all ranks, see the base class."""
        with torch.inference_mode(False), torch.no_grad(), self._on_device():
            own = torch.tensor(values, dtype=torch.int64, device=self._exchange_device)
            everybody = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(everybody, own, group=self.process_group)
            return torch.stack(everybody).tolist()

    def gather(self, value: Any) -> list[Any]:
        """Give every rank the objects of all ranks, see the base class."""
        everybody: list[Any] = [None] * self.size
        with torch.inference_mode(False), torch.no_grad(), self._on_device():
            dist.all_gather_object(everybody, value, group=self.process_group)
        return everybody

    def name(self, rank: int) -> int:
        """Return the rank among all processes of a rank in the group."""
        return dist.get_global_rank(self.process_group, rank)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the device current: NCCL takes objects through the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def collective_of(process_group: Any, device: torch.device | None = None) -> Collective:
    """Return the communication within a process group.

    Args:
        process_group: A ``torch.distributed`` process group; None for a single process.
        device: The device of the parameters; None if it is not known.

    Returns:
        A :class:`ProcessGroupCollective`, or for None the identity.

    Example:
        >>> collective_of(None).size
        1
    """
    if process_group is None:
        return Collective()
    return ProcessGroupCollective(process_group, device)


def refuse_process_group(name: str, process_group: Any) -> None:
    """Refuse a process group for an operator that has rows for the examples.

    Args:
        name: The operator.
        process_group: What the user has passed.

    Raises:
        NotImplementedError: If it is not None.
    """
    if process_group is not None:
        raise NotImplementedError(
            f"{name} does not support process_group: it has rows for each example, and those of "
            "the other ranks are not here. Build it without process_group on each rank's own data "
            "for the rows of that data; or use GGNLinearOperator or EFLinearOperator, which sum "
            "over examples and do support process_group."
        )


__all__ = ["ProcessGroupCollective", "collective_of", "refuse_process_group"]
