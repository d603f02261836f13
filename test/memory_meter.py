"""The meter of peak memory on the CPU."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any]) -> int:
    """Return the most bytes on the CPU that a call holds at a time, above what was there before.

    Its result is included, and what kernels need in between. The profiler reports what the
    allocator does; the libraries of kernels have some memory of their own, which nobody reports.
    """
    gc.collect()
    gc.disable()  # garbage in cycles counts: when it would be collected is a matter of luck
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
        del result
    finally:
        gc.enable()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events), default=0)
