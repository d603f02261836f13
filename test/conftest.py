"""What every test gets: one thread, seeded global generators, reproducible hypothesis examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings

# One thread per process: the tests run in several processes, and small matrices gain nothing.
torch.set_num_threads(1)

# The same examples in every run. No deadline: the first call of a torch function can be slow.
settings.register_profile("curvlinops", derandomize=True, deadline=None)
settings.load_profile("curvlinops")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed the global generators, so that a test does not depend on those run before it."""
    torch.manual_seed(0)
    np.random.seed(0)
