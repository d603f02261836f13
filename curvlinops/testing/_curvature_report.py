"""How the checks of curvature matrices compare, complain, and report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from curvlinops.testing._check import wide

#: Largest relative error of a result, by the dtype of the parameters.
RTOL = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True)
class CurvatureProperty:
    """One property of :func:`~curvlinops.testing.check_curvature`.

    Attributes:
        name: What was checked: an operator, and of what of it.
        error: The largest relative error, or what the property says otherwise; None if skipped.
        tolerance: What the error was allowed to be; None if skipped.
        skipped: Why the property was not checked; empty if it was.
    """

    name: str
    error: float | None = None
    tolerance: float | None = None
    skipped: str = ""


@dataclass
class CurvatureReport:
    """What :func:`~curvlinops.testing.check_curvature` has checked; ``str`` of it is a table.

    Attributes:
        properties: All properties, in the order in which they were checked.
    """

    properties: list[CurvatureProperty] = field(default_factory=list)

    @property
    def checked(self) -> list[CurvatureProperty]:
        """The properties that hold."""
        return [p for p in self.properties if not p.skipped]

    @property
    def skipped(self) -> list[CurvatureProperty]:
        """The properties that could not be checked, with reasons."""
        return [p for p in self.properties if p.skipped]

    def __str__(self) -> str:
        width = max((len(p.name) for p in self.properties), default=8)
        lines = [f"{'property':<{width}}  {'error':>8}  tolerance"]
        for p in self.properties:
            if p.skipped:
                lines.append(f"{p.name:<{width}}  skipped: {p.skipped}")
            else:
                lines.append(f"{p.name:<{width}}  {p.error:8.1e}  {p.tolerance:.1e}")
        return "\n".join(lines)


class Recorder:
    """Checks properties one after the other, and keeps the report."""

    def __init__(self, rtol: float):
        self.rtol = rtol
        self.report = CurvatureReport()
        self._name = ""
        self._worst: tuple[float, float] | None = None

    @contextmanager
    def property(self, name: str) -> Iterator[None]:
        """Name what is checked inside, also if an operator raises an error.

        ``NotImplementedError``, with which operators refuse what they cannot do, skips it.
        """
        self._name, self._worst = name, None
        try:
            with warnings.catch_warnings():
                # Operators warn of what takes long, also in tests that make errors of warnings.
                warnings.simplefilter("ignore", UserWarning)
                warnings.filterwarnings("error", message=_NO_EFFECT)
                yield
        except AssertionError:
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) or str(error).startswith(_NO_EFFECT):
                self.skip(name, _first_sentence(error))
                return
            raise AssertionError(f"{name}: raised {type(error).__name__}: {error}") from error
        if self._worst is not None:
            self.report.properties.append(CurvatureProperty(name, *self._worst))

    def skip(self, name: str, reason: str) -> None:
        """Note that a property is not checked."""
        self.report.properties.append(CurvatureProperty(name, skipped=reason))

    def fail(self, reason: str) -> NoReturn:
        """Raise the error that names the property."""
        raise AssertionError(f"{self._name}: {reason}")

    def require(self, condition: bool, reason: str) -> None:
        """Fail unless a condition holds."""
        self.at_most(0.0 if condition else 1.0, 0.0, reason)

    def at_most(self, error: float, tolerance: float, reason: str = "") -> None:
        """Fail if an error exceeds its tolerance; the worst error is reported."""
        if not error <= tolerance:  # also for NaN
            self.fail(reason or f"error {error:.3e} exceeds the tolerance {tolerance:.3e}")
        if self._worst is None or error * self._worst[1] > self._worst[0] * tolerance:
            self._worst = error, tolerance

    def close(self, actual: Tensor, expected: Tensor, scale: float = 0.0, what: str = "") -> None:
        """Fail if Frobenius norms differ relative to that of what is expected, or to a scale."""
        what = f"{what}: " if what else ""
        if actual.shape != expected.shape:
            self.fail(f"{what}has shape {list(actual.shape)} instead of {list(expected.shape)}")
        actual, expected = wide(actual), wide(expected)
        error = torch.linalg.vector_norm(actual - expected).item()
        scale = max(torch.linalg.vector_norm(expected).item(), scale)
        error = error / scale if error else 0.0
        text = f"{what}relative error {error:.3e} exceeds the tolerance {self.rtol:.3e}"
        self.at_most(error, self.rtol, text)


# The warning of operators that cannot keep graphs.
_NO_EFFECT = "keep_graph=True has no effect"


def _first_sentence(error: Exception) -> str:
    """Return the beginning of an error's text, on one line."""
    return " ".join(str(error).split()).split(". ")[0].removesuffix(".")
