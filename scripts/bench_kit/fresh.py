"""Work in a process of its own, whose memory is watched."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from kimi_vl.convert import EnvironmentProblem

from .measure import INTERVAL, memory


class ProcessFailed(RuntimeError):
    """The process ended with an error."""


VALUE, DONE = "value", "done"
FAILURES: dict[str, type[Exception]] = {
    f.__name__: f for f in (ValueError, EnvironmentProblem, ProcessFailed)
}


class Fresh:
    """Runs a generator function in a fresh process; iterating gives what it yields.

    Attributes:
        peaks: the most bytes seen so far, by the system's names: RssAnon, that no file backs; VmHWM, with pages of files.

    Raises (while iterating):
        ValueError, EnvironmentProblem: the function raised one, with its message; or the process was killed.
        ProcessFailed: the function raised something else; the message is its traceback.
    """

    def __init__(self, function: Callable[..., Iterator[Any]], *args: Any) -> None:
        self.function, self.args = function, args
        self.peaks = {"RssAnon": 0, "VmHWM": 0}

    def __iter__(self) -> Iterator[Any]:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, self.function, *self.args), daemon=True)
        process.start()
        sender.close()
        try:
            while True:
                self._look(process.pid)
                if not receiver.poll(INTERVAL):
                    continue
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    raise EnvironmentProblem(
                        f"the measuring process ended with {process.exitcode}; was memory short?"
                    ) from None
                if kind == DONE:
                    return
                if kind != VALUE:
                    raise FAILURES[kind](value)
                yield value
        finally:
            receiver.close()
            process.terminate()
            process.join()

    def _look(self, pid: int | None) -> None:
        if pid is not None:
            now = memory(pid)
            self.peaks = {name: max(peak, now.get(name, 0)) for name, peak in self.peaks.items()}


def _work(sender: Connection, function: Callable[..., Iterator[Any]], *args: Any) -> None:
    try:
        for value in function(*args):
            sender.send((VALUE, value))
        sender.send((DONE, None))
    except tuple(FAILURES.values()) as e:
        kind = next(kind for kind, failure in FAILURES.items() if isinstance(e, failure))
        sender.send((kind, str(e)))
    except Exception:
        sender.send((ProcessFailed.__name__, traceback.format_exc()))
