"""How many threads the CPU operators take."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_vl.modeling.kernels import cores


@pytest.mark.parametrize(
    ("asked", "threads"),
    [
        pytest.param("3", 3, id="the user's figure"),
        pytest.param("3,2", 3, id="of nested regions the outermost"),
        pytest.param("0", 2, id="none at all is no wish"),
        pytest.param("many", 2, id="nor is a word"),
        pytest.param(None, 2, id="no wish"),
    ],
)
def test_a_user_says_how_many_threads_there_are(monkeypatch, asked: str | None, threads: int) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores.thread_count() == threads


def test_what_mindspore_puts_into_the_environment_is_no_wish() -> None:
    """It writes past Python, so the process's own environment must not have the variable."""
    script = "import mindspore; from kimi_vl.modeling.kernels import cores; print(cores.thread_count())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    shown = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert int(shown.stdout.split()[-1]) == cores.usable_cores()


@pytest.mark.parametrize(
    ("affinity", "quota", "threads"),
    [(8, math.inf, 8), (8, 3.0, 3), (8, 1.5, 2), (8, 0.2, 1), (2, 4.0, 2)],
)
def test_cores_are_those_of_the_mask_and_those_that_a_quota_pays_for(
    monkeypatch, affinity: int, quota: float, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.usable_cores() == threads


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        pytest.param("0::/", {"cpu.max": "150000 100000\n"}, 1.5, id="version 2, in a container"),
        pytest.param("0::/", {"cpu.max": "max 100000\n"}, math.inf, id="version 2, no limit"),
        pytest.param("0::/", {}, math.inf, id="version 2, the root has no such file"),
        pytest.param(
            "0::/slice/pod",
            {"slice/cpu.max": "200000 100000", "slice/pod/cpu.max": "max 100000"},
            2.0,
            id="the limit of a level above",
        ),
        pytest.param(
            "12:cpu,cpuacct:/docker/b7\n0::/",
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            0.5,
            id="version 1, the path is the host's",
        ),
        pytest.param(
            "4:cpu:/job\n3:cpuset:/",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            math.inf,
            id="version 1, no limit",
        ),
        pytest.param("", {}, math.inf, id="no control groups"),
    ],
)
def test_a_quota_is_the_least_of_the_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
) -> None:
    listed = tmp_path / "cgroup"
    listed.write_text(groups)
    for name, text in files.items():
        place = tmp_path / "mount" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    assert cores.cpu_quota(listed, tmp_path / "mount") == quota
