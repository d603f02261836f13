"""Communication between the processes that share a data set."""

from curvlinops.distributed.collective import Collective
from curvlinops.distributed.process_group import (
    ProcessGroupCollective,
    collective_of,
    refuse_process_group,
)
from curvlinops.distributed.sampler import ShardSampler
from curvlinops.distributed.shares import Share, add_shares

__all__ = [
    "Collective",
    "ProcessGroupCollective",
    "ShardSampler",
    "Share",
    "add_shares",
    "collective_of",
    "refuse_process_group",
]
