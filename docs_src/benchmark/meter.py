"""The meter of peak memory, on the CPU and on a GPU; it needs nothing but PyTorch.

It stands here because the benchmark's workers import it in environments that hold other libraries
and not this package. The tests of memory load this file, too.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Return the most bytes on a device that a call holds at a time, above what was there before.

    Its result is included, and what kernels need in between.
    """
    gc.collect()
    gc.disable()  # garbage in cycles counts: when it would be collected is a matter of luck
    try:
        return _peak_on_cuda(function) if device == "cuda" else _peak_on_cpu(function)
    finally:
        gc.enable()


def _peak_on_cpu(function: Callable[[], Any]) -> int:
    """Add up what the allocator does, as the profiler reports it.

    The libraries of kernels have some memory of their own, which nobody reports.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events), default=0)


def _peak_on_cuda(function: Callable[[], Any]) -> int:
    """Ask PyTorch's allocator, which counts tensors' bytes and not those that it keeps to reuse."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
