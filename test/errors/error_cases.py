"""What a test of an error consists of, and tables of such."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """An error that is provoked, and what its message must say.

    Attributes:
        error: The type of the error.
        cause: A regular expression of what was wrong: the name, shape or value that was given.
        way_out: A regular expression of what to do about it, or of what is allowed.
        provoke: Raises the error.
    """

    error: type[BaseException]
    cause: str
    way_out: str
    provoke: Callable[[], Any]

    def complaint(self, error: BaseException) -> str | None:
        """Return what is wrong with an error that was raised; None if it is as it must be."""
        if type(error) is not self.error:
            return f"{self.error.__name__} was expected"
        message = str(error)
        for what, pattern in (("the cause", self.cause), ("the way out", self.way_out)):
            if not re.search(pattern, message):
                return f"its message does not name {what}, {pattern!r}"
        if not any(
            cause.end() <= way.start() or way.end() <= cause.start()
            for cause in re.finditer(self.cause, message)
            for way in re.finditer(self.way_out, message)
        ):
            return "the cause and the way out are the same words"
        return None


class Cases(list[Case]):
    """A table of cases.

    Called with the error's type, the cause and the way out, it adds the function that follows, or
    that it decorates.
    """

    def __call__(
        self,
        error: type[BaseException],
        cause: str,
        way_out: str,
        provoke: Callable[[], Any] | None = None,
    ) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Add a case."""

        def add(function: Callable[[], Any]) -> Callable[[], Any]:
            self.append(Case(error, cause, way_out, function))
            return function

        if provoke is not None:
            add(provoke)
        return add
