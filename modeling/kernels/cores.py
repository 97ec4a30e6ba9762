"""How many threads the CPU operators share their work among."""

from __future__ import annotations

import math
import os
from pathlib import Path


def thread_count() -> int:
    """OMP_NUM_THREADS if the user set it, else the cores that this process may use.

    `os.environ` is what the process was started with. The C library's environment is not: MindSpore writes a figure of
    its own there where the user has none (1 on two cores), which child processes inherit unless they are given
    `env=os.environ`.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested regions
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return usable_cores()


def usable_cores() -> int:
    """The cores of the affinity mask, or as many as a container's quota pays for, part of one counting as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the process's control groups allow, the least of all levels; infinity if none limits it.

    Each line of `groups` reads number:controllers:path, without controllers in version 2 of the interface
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max). In a container the path may be the host's while the
    mount shows what is below it: levels that are not there say nothing.
    """
    quota = math.inf
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = mount
        elif "cpu" in controllers.split(","):
            root = mount / "cpu"  # a link where the mount has all its controllers' names
        else:
            continue
        level = root / path.lstrip("/")
        for place in (level, *level.parents):
            if place.is_relative_to(root):
                quota = min(quota, _quota_of(place))
    return quota


def _quota_of(group: Path) -> float:
    """cpu.max holds "max 100000" or "150000 100000": microseconds of each period; version 1 has a file for either."""
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        words = [word for name in ("quota", "period") for word in _lines(group / f"cpu.cfs_{name}_us")]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return math.inf
    return int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
