"""Runs a command and watches what it takes: time, processor, memory of its own, the disk."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02  # seconds between looks at the memory
BLOCK = 512  # bytes that ru_inblock and ru_oublock count in


@dataclass(frozen=True)
class Run:
    """Of a command and all processes that it started.

    Attributes:
        seconds: from start to end.
        cpu_seconds: of all its threads, in user and kernel mode.
        anonymous: the most memory that it held at once and that no file backs, in bytes. Mapped files and the page
            cache are not in it: the system takes those back when others need room.
        read, written: bytes from and to the disk. What came from the page cache was not read.
    """

    seconds: float
    cpu_seconds: float
    anonymous: int
    read: int
    written: int


class CommandFailed(RuntimeError):
    """A command that ended with another status than 0."""


def measure(command: Sequence[str | Path]) -> Run:
    """Runs `command` to its end.

    Raises:
        CommandFailed: it ended with another status than 0; the message holds the end of what it wrote.
    """
    with tempfile.TemporaryFile() as output:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, anonymous(process.pid))
                time.sleep(INTERVAL)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-1000:]
            raise CommandFailed(f"{' '.join(map(str, command))}: ended with {process.returncode}: {said}")
    return Run(
        seconds,
        usage.ru_utime + usage.ru_stime,
        peak,
        usage.ru_inblock * BLOCK,
        usage.ru_oublock * BLOCK,
    )


def anonymous(pid: int) -> int:
    """Bytes of memory that no file backs, of a process and all that it started."""
    return sum(memory(child).get("RssAnon", 0) for child in _family(pid))


def memory(pid: int) -> dict[str, int]:
    """Bytes by the system's names (VmHWM, VmRSS, RssAnon, RssFile, …), of one process; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in fields}


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _family(int(child))
