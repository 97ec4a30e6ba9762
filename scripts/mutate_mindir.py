#!/usr/bin/env python
"""Proves that verification sees faults: changes one node or constant of exported graphs at a time, and verifies each.

    python scripts/mutate_mindir.py --count 400 --write docs/faults.md
    python scripts/mutate_mindir.py --target ascend --kinds edge,swap --seed 7

Exit status: 0 at least 99 % of the faults that change what is computed were seen, 1 fewer were, or a fault was seen that is
said to change nothing; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
sys.path.insert(0, str(Path(__file__).parent))

from mutation_kit.bundles import export_for
from mutation_kit.kinds import KINDS
from mutation_kit.proving import Gate, Outcome, outcomes
from mutation_kit.sampling import Graphs
from mutation_kit.table import contradictions, share_caught, tables, unseen, write_section

from kimi_vl.convert.source import fetch, resolve
from kimi_vl.export.plan import TARGETS

LEAST_CAUGHT = 0.99


def prove(published: Path, targets: Sequence[str], count: int, seed: int, kinds: Sequence[str], workers: int) -> list[Outcome]:  # fmt: skip
    """The outcomes of about `count` faults, as many for each target."""
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as room:
        bundles = export_for(published, list(targets), Path(room))
        for target in targets:
            mutants = list(Graphs(bundles[target]).mutants(count // len(targets), seed, kinds))
            gate = Gate.of(bundles[target], published)
            started = time.perf_counter()
            for outcome in outcomes(gate, mutants, workers):
                found.append(outcome)
                if not outcome.stage:
                    print(f"not seen: {outcome.mutant}", file=sys.stderr, flush=True)
            took = time.perf_counter() - started
            print(f"{target}: {len(mutants)} faults in {took:.0f} s", file=sys.stderr, flush=True)
    return found


def section(found: Sequence[Outcome], arguments: argparse.Namespace, seconds: float) -> list[str]:
    versions = ", ".join(f"{p} {version(p)}" for p in ("kimi-vl", "mindspore", "torch"))
    lost = len(unseen(found))
    survived = sum(not o.stage for o in found)
    return [
        "## Mechanical faults",
        f"{len(found)} faults, each one change of one node or constant of a graph of {arguments.src}, exported for "
        f"{' and '.join(arguments.target)}; {share_caught(found):.1%} of those that change what is computed were seen. "
        f"{survived} survived, {survived - lost} of them because they change nothing, {lost} unseen.",
        f"`python scripts/mutate_mindir.py --src {arguments.src} --count {arguments.count} --seed {arguments.seed}`, "
        f"{time.strftime('%Y-%m-%d')}, {versions}, {seconds:.0f} s in {arguments.workers} processes.",
        "",
        *tables(found),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", default="nano", help="published checkpoint (default nano)")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default ascend and cpu")
    parser.add_argument("--count", type=int, default=400, help="about how many faults (default 400)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", help=f"of {','.join(KINDS)} (default all)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="write every fault and what saw it to this file")
    parser.add_argument("--write", type=Path, help="write the tables into this Markdown document")
    arguments = parser.parse_args(argv)
    arguments.target = arguments.target or ["ascend", "cpu"]
    kinds = arguments.kinds.split(",") if arguments.kinds else []
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"--kinds: there is no {kind!r}; choose from {', '.join(KINDS)}")
    source = resolve(arguments.src)
    fetch(source)
    started = time.perf_counter()
    found = prove(
        source.directory, arguments.target, arguments.count, arguments.seed, kinds, arguments.workers
    )
    lines = section(found, arguments, time.perf_counter() - started)
    if arguments.json:
        arguments.json.write_text(json.dumps([o.to_dict() for o in found], indent=1) + "\n")
    if arguments.write:
        write_section(arguments.write, "mechanical faults", lines)
    print("\n".join(lines))
    for outcome in contradictions(found):
        print(f"said to change nothing, but seen by {outcome.stage}: {outcome.mutant}", file=sys.stderr)
    return int(share_caught(found) < LEAST_CAUGHT or bool(contradictions(found)))


if __name__ == "__main__":
    sys.exit(main())
