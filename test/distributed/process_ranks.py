"""Real processes with a gloo group between them, that run functions of a test module.

They are started once and asked again and again. Nothing can block: the group has a timeout, and
processes that do not answer in time are killed, which fails the test.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds after which gloo gives up waiting for another rank.
GROUP_TIMEOUT = 20
#: Seconds after which a rank that does not answer is killed.
ANSWER_TIMEOUT = 90
START_TIMEOUT = 180


@dataclass
class Failure:
    """An exception in another process."""

    kind: str
    message: str
    trace: str


class HangError(AssertionError):
    """A rank did not answer in time."""


class Ranks:
    """Processes of one gloo group.

    Args:
        size: Their number.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function on all ranks; return their results, or fail as one of them did.

        Args:
            function: A function of a test module.
            args: Its arguments, which can be pickled.
        """
        answers = self.answers(function, *args)
        failures = [(r, a) for r, a in enumerate(answers) if isinstance(a, Failure)]
        if failures:
            self.stop()  # some may wait for others that have failed
            raise AssertionError("\n".join(f"On rank {r}:\n{a.trace}" for r, a in failures))
        return answers

    def answers(
        self, function: Callable[..., Any], *args: Any, timeout: float = ANSWER_TIMEOUT
    ) -> list[Any]:
        """Call a function on all ranks; an exception is a result, a :class:`Failure`."""
        self.start()
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return self._receive(timeout)

    def start(self) -> None:
        """Start the processes, unless they run."""
        if self._processes:
            return
        # A process that has imported everything is forked, which is faster than to import again.
        kind = "forkserver" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(["torch", "curvlinops", __name__])
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._receive(START_TIMEOUT)

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []

    def _receive(self, timeout: float) -> list[Any]:
        """Wait for one answer of each rank."""
        answers: list[Any] = [None] * self.size
        waiting = set(range(self.size))
        end = time.monotonic() + timeout
        while waiting:
            pipes = {self._pipes[r]: r for r in waiting}
            ready = multiprocessing.connection.wait(list(pipes), max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise HangError(f"No answer of rank(s) {sorted(waiting)} within {timeout} seconds.")
            for pipe in ready:
                r = pipes[pipe]
                waiting.remove(r)
                try:
                    answers[r] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[r] = Failure("EOFError", "The process died.", "The process died.")
        return answers


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    """Call functions on demand."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=GROUP_TIMEOUT),
        )
    warnings.simplefilter("error")
    # As in pyproject.toml: what a dependency says about itself.
    warnings.filterwarnings("ignore", ".torch.jit", DeprecationWarning, "torch.jit._script")
    pipe.send_bytes(pickle.dumps(None))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(message)
            torch.manual_seed(0)
            answer = function(*args)
        except BaseException as error:  # also those of pytest.fail
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


#: What all functions of torch.distributed call in the end.
_METHODS = [
    *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced"),
    *("broadcast", "reduce", "reduce_scatter", "_reduce_scatter_base", "gather", "scatter"),
    *("alltoall", "alltoall_base", "send", "recv", "barrier"),
]


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Yield a list that fills with the names of the collective operations made inside."""
    seen: list[str] = []

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(*args, **kwargs)

        return call

    methods = {name: vars(dist.ProcessGroup)[name] for name in _METHODS}
    for name in methods:
        setattr(dist.ProcessGroup, name, noted(name, getattr(dist.ProcessGroup, name)))
    try:
        yield seen
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)
