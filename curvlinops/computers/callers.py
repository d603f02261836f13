"""Who has called, where nothing else tells."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType


def called_by(module: ModuleType) -> bool:
    """Return whether the caller runs inside of a function of a module."""
    names = vars(module)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is names:
            return True
        frame = frame.f_back
    return False


__all__ = ["called_by"]
