"""Sides that take turns, so that they share whatever else the machine does."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAUSE = 0.02  # seconds before each run, in which the other side's threads stop spinning
LEAST = 5  # rounds, however long they take
UNSTEADY = 1.2  # median over least of the reference, above which a measurement is repeated
ATTEMPTS = 3

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Turns:
    """What the sides took.

    Attributes:
        times: seconds by side, and by what its runs time.
        attempts: how often it was measured.
        others: processors that other programs kept busy meanwhile, which slows a side whose threads wait for each other
            by more than its share.
    """

    times: dict[str, Times]
    attempts: int
    others: float


def steadiness(seconds: Sequence[float]) -> float:
    """The median over the least: 1 is steady."""
    return statistics.median(seconds) / min(seconds)


def take_turns(
    runs: Mapping[str, Callable[[int], Mapping[str, float]]], reference: str, rounds: int, budget: float
) -> Turns:
    """Runs all in turns. An attempt in which the reference was unsteady is made again, at most ATTEMPTS times; the
    steadiest is taken.

    Args:
        runs: by side; each gets the turn's number and gives the seconds of what it timed, by name.
        reference: the side that has to be steady.
        rounds: turns of each side in an attempt.
        budget: seconds after which an attempt ends with the rounds it has, LEAST at least.
    """
    best: dict[str, Times] = {}
    least, turn, attempts, others = math.inf, 0, 0, 0.0
    while attempts < ATTEMPTS and least > UNSTEADY:
        attempts += 1
        times: dict[str, Times] = {side: {} for side in runs}
        start, busy = time.perf_counter(), others_seconds()
        for done in range(rounds):
            if done >= LEAST and time.perf_counter() > start + budget:
                break
            turn += 1
            for side, run in runs.items():
                time.sleep(PAUSE)
                for name, seconds in run(turn).items():
                    times[side].setdefault(name, []).append(seconds)
        found = max(map(steadiness, times[reference].values()))
        if found < least:
            best, least = times, found
            others = (others_seconds() - busy) / (time.perf_counter() - start)
    return Turns(best, attempts, others)


def others_seconds() -> float:
    """Processor time that was not this process's since the system started, a hypervisor's included; 0 where not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = sum(int(n) for i, n in enumerate(fields[:8]) if i not in (3, 4))  # without idle, iowait
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def timed(run: Callable[[int], object]) -> Callable[[int], dict[str, float]]:
    """`run` with its seconds, under an empty name."""

    def timing(turn: int) -> dict[str, float]:
        start = time.perf_counter()
        run(turn)
        return {"": time.perf_counter() - start}

    return timing


def nmse(got: np.ndarray, wanted: np.ndarray) -> float:
    """Energy of the error over that of `wanted`."""
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())


class Reading:
    """Reads memory and does nothing else: a side whose speed is the limit of what has to read all its weights.

    It takes its turns with the others, because what is left of the memory's speed on a shared machine changes by the
    minute. Torch's threads read.
    """

    def __init__(self, nbytes: int = 1 << 29) -> None:
        import torch

        self._numbers = torch.ones(nbytes // 4)

    def __call__(self, turn: int) -> None:
        self._numbers.sum()

    def speeds(self, seconds: Sequence[float]) -> list[float]:
        """Bytes a second."""
        return [self._numbers.nbytes / s for s in seconds]
