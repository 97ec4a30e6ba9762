#!/usr/bin/env python
"""Proves that verification gives no false alarm: candidates without a fault, over many seeds of the suite's inputs.

    python scripts/clean_runs.py --seeds 50 --write docs/faults.md
    python scripts/clean_runs.py --src tests/data/tiny8-bf16 --candidate ascend --candidate ascend-rounded --seeds 10

Exit status: 0 no alarm, 1 an alarm, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
sys.path.insert(0, str(Path(__file__).parent))

from mutation_kit.bundles import export_for
from mutation_kit.remembered import Remembered
from mutation_kit.table import write_section

from kimi_vl.convert.source import fetch, resolve
from kimi_vl.verify.candidates import Found, inspect, open_candidate
from kimi_vl.verify.cases import DEFAULT_SEED, select, suite
from kimi_vl.verify.judge import Finding, judge, suited
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.prompts import source_for
from kimi_vl.verify.runner import run_suite

# What runs a candidate, and how it is judged: the directory, who executes it, the arithmetic.
CANDIDATES: dict[str, tuple[str, str | None, str]] = {
    "network": ("converted", None, "lifted"),
    "cpu": ("cpu", "mindspore", "lifted"),
    "ascend": ("ascend", "interpreter", "lifted"),
    "lite": ("lite", "interpreter", "lifted"),
    "ascend-rounded": ("ascend", "interpreter", "rounded"),
    "lite-rounded": ("lite", "interpreter", "rounded"),
    "network-rounded": ("converted", None, "rounded"),
    "cpu-rounded": ("cpu", "mindspore", "rounded"),
}


@dataclass
class Figures:
    """Of one profile.

    Attributes:
        alarms: checkpoint, candidate, seed and finding of each check that failed.
        worst: by tap (layers and routers as one) and metric, the largest value in units of its limit, and where.
    """

    checks: int = 0
    runs: int = 0
    alarms: list[tuple[str, str, int, Finding]] = field(default_factory=list)
    worst: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)

    def add(self, checkpoint: str, candidate: str, seed: int, findings: Sequence[Finding]) -> None:
        self.runs += 1
        self.checks += len(findings)
        for f in findings:
            if not f.ok:
                self.alarms.append((checkpoint, candidate, seed, f))
            ratio = _ratio(f)
            key = f.tap.split(".")[0] + (" (suite)" if f.case == "suite" else ""), f.metric
            if ratio is not None and ratio >= self.worst.get(key, (0.0, ""))[0]:
                self.worst[key] = ratio, f"{checkpoint}, {candidate}, seed {seed}, {f.case}, {f.tap}"


def _ratio(f: Finding) -> float | None:
    """Value in units of the limit; None where there is nothing to compare, or a floor allowed more than the limit."""
    if isinstance(f.value, str):
        return None
    if f.limit == 0:
        return 0.0 if f.value == 0 else float("inf")
    ratio = f.value / f.limit
    return None if f.ok and ratio > 1 else ratio


def clean_runs(
    seeds: Sequence[int],
    checkpoints: Mapping[str, Path],
    candidates: Sequence[str] = tuple(CANDIDATES),
    cases: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Figures]:
    """Figures by profile of ordinary verification of candidates without a fault; alarms must be none.

    Args:
        checkpoints: published directories by a name for the result.
        candidates: of :data:`CANDIDATES`.
        cases: names; default the default suite.
    """
    figures: dict[str, Figures] = {}
    for checkpoint, published in checkpoints.items():
        with tempfile.TemporaryDirectory(prefix="clean-") as room:
            targets = {CANDIDATES[name][0] for name in candidates} - {"converted"}
            made = export_for(published, sorted(targets), Path(room))
            found = {
                name: inspect(made[what], through, arithmetic)
                for name, (what, through, arithmetic) in CANDIDATES.items()
                if name in candidates
            }
            _verify(checkpoint, published, found, seeds, cases, figures, progress)
    return figures


def _verify(
    checkpoint: str,
    published: Path,
    found: Mapping[str, Found],
    seeds: Sequence[int],
    cases: Sequence[str],
    figures: dict[str, Figures],
    progress: Callable[[str], None],
) -> None:
    import torch

    exact = build_oracle(published)
    dtypes = {f.rounded for f in found.values() if f.rounded}
    low = {dtype: build_oracle(published, getattr(torch, dtype)) for dtype in dtypes}
    opened = {name: open_candidate(f) for name, f in found.items()}
    source = source_for(published, exact.config)
    for seed in seeds:
        reference = Remembered.of(exact)
        own = {dtype: Remembered.of(oracle) for dtype, oracle in low.items()}
        for name, candidate in opened.items():
            plans = select(suite(exact.config, found[name].limits), cases)
            rounded: Any = own.get(found[name].rounded)
            run = run_suite(reference, candidate, plans, source, seed, rounded=rounded)
            profile = suited((), run["candidate"])
            verdict = judge(run, profile)
            figures.setdefault(profile.name, Figures()).add(checkpoint, name, seed, verdict.findings)
            for alarm in verdict.failures:
                progress(f"ALARM: {checkpoint}, {name}, seed {seed}: {alarm}")
        progress(f"{checkpoint}, seed {seed}: done")


def section(figures: Mapping[str, Figures], command: str, cases: Sequence[str], seconds: float) -> list[str]:
    versions = ", ".join(f"{p} {version(p)}" for p in ("kimi-vl", "mindspore", "torch"))
    lines = [
        "## No false alarms",
        "The same verification of candidates without a fault, over seeds of the suite's inputs, "
        f"{'cases ' + ', '.join(cases) if cases else 'the default suite'}.",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {versions}, {seconds:.0f} s.",
        "",
        "| profile | runs | checks | alarms |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {p} | {f.runs} | {f.checks} | {len(f.alarms)} |" for p, f in figures.items()]
    lines += [
        "",
        "| profile | tap | metric | worst, in units of the limit | where |",
        "|---|---|---|---:|---|",
    ]
    for profile, f in figures.items():
        for (tap, metric), (ratio, where) in f.worst.items():
            lines.append(f"| {profile} | {tap} | {metric} | {ratio:.2g} | {where if ratio else ''} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", action="append", help="published checkpoint (repeatable; default nano)")
    parser.add_argument("--candidate", action="append", choices=list(CANDIDATES), help="default all")
    parser.add_argument("--seeds", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--cases", default="", help="names with commas (default the suite)")
    parser.add_argument("--write", type=Path, help="write the figures into this Markdown document")
    arguments = parser.parse_args(argv)
    sources = [resolve(src) for src in arguments.src or ["nano"]]
    for source in sources:
        fetch(source)
    cases = [name for name in arguments.cases.split(",") if name]
    names = arguments.candidate or list(CANDIDATES)
    seeds = range(DEFAULT_SEED, DEFAULT_SEED + arguments.seeds)
    checkpoints = {source.directory.name: source.directory for source in sources}
    started = time.perf_counter()
    figures = clean_runs(
        seeds, checkpoints, names, cases, lambda text: print(text, file=sys.stderr, flush=True)
    )
    given = [a if isinstance(a, str) else "" for a in (argv if argv is not None else sys.argv[1:])]
    command = " ".join(["python scripts/clean_runs.py", *given])
    lines = section(figures, command, cases, time.perf_counter() - started)
    if arguments.write:
        write_section(arguments.write, "clean runs", lines)
    print("\n".join(lines))
    return int(any(f.alarms for f in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
