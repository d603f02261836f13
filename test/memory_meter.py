"""The meter of peak memory, which the benchmark has, too.

It is ``docs_src/benchmark/meter.py``: the benchmark runs in environments that do not hold this
package or its tests, so that file is on its own, and is loaded here by path.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PATH = Path(__file__).parents[1] / "docs_src" / "benchmark" / "meter.py"
_spec = spec_from_file_location("benchmark_meter", _PATH)
meter = sys.modules[_spec.name] = module_from_spec(_spec)
_spec.loader.exec_module(meter)

peak_memory = meter.peak_memory
