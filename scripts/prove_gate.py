#!/usr/bin/env python
"""Proves that parity verification can fail: puts faults into a candidate one by one and runs it on each.

    python scripts/prove_gate.py                     # all of them, and the candidates without a fault
    python scripts/prove_gate.py --only kv-a-eps     # some; --list names all
    python scripts/prove_gate.py --write             # also brings their rows of docs/faults.md up to date

A fault is right if verification fails on it and the first bad place that it names is where the fault is. Exit status 1:
one is not, or a candidate without a fault fails. Checkpoints are small; Torch and MindSpore run on the CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import click

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from gate_kit.fault import Fault
    from gate_kit.workshop import Outcome, Workshop

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--only", multiple=True, metavar="NAME", help="Only this fault (repeatable).  [default: all]")
@click.option("--list", "show", is_flag=True, help="Name the faults, and stop.")
@click.option(
    "--json", "as_json", is_flag=True, help="What became of each as JSON on stdout, all else on stderr."
)
@click.option("--write", is_flag=True, help="Bring their rows of the table in docs/faults.md up to date.")
def cli(only: tuple[str, ...], show: bool, as_json: bool, write: bool) -> None:
    """Puts faults into a candidate, one by one, and runs the ordinary verification on each."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
    from gate_kit import table
    from gate_kit.faults import FAULTS
    from gate_kit.workshop import Workshop

    from kimi_vl.export import verified

    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in only if name not in known]:
        raise click.UsageError(f"--only: there is no fault {unknown[0]!r}; --list names them")
    chosen = [known[name] for name in known if name in only or not only]
    if show:
        for fault in chosen:
            click.echo(f"{fault.name:<26}{fault.into:<12}{fault.place:<15}{fault.what}")
        return
    own_memory = mock.patch.object(verified, "directory", lambda: Path(room, "verified"))  # not the user's
    with tempfile.TemporaryDirectory() as room, own_memory:
        shop = Workshop(Path(room))
        wrong = clean_ones_that_fail(shop, chosen)
        outcomes = list(examined(shop, chosen))
    if as_json:
        click.echo(table.as_json(outcomes))
    if write:
        table.update(PAGE, outcomes, FAULTS)
    right = sum(outcome.right for outcome in outcomes)
    say(f"{right} of {len(outcomes)} faults caught at the right place")
    sys.exit(0 if right == len(outcomes) and not wrong else 1)


def clean_ones_that_fail(shop: Workshop, faults: Sequence[Fault]) -> int:
    """Each candidate that faults are put into, as it is before."""
    failed = 0
    keys = ((f.model, f.target, f.through, f.arithmetic, f.batch, f.cases) for f in faults)
    for key in dict.fromkeys(keys):
        verdict = shop.clean(*key)
        failed += not verdict.passed
        what = " ".join(map(str, (*key[:-1], *key[-1])))
        say(f"{'passes' if verdict.passed else 'FAILS':<7} without a fault: {what}")
    return failed


def examined(shop: Workshop, faults: Sequence[Fault]) -> list[Outcome]:
    from gate_kit.table import caught_by

    outcomes = []
    for number, fault in enumerate(faults, 1):
        started = time.perf_counter()
        outcome = shop.examine(fault)
        outcomes.append(outcome)
        mark = "right" if outcome.right else "WRONG"
        took = time.perf_counter() - started
        say(
            f"{mark:<7}[{number}/{len(faults)}] {fault.name} ({took:.0f} s): {caught_by(outcome)} {outcome.operator}"
        )
    return outcomes


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    cli()
