"""`verify-parity envelope`: publishes what a device must meet, before there is one."""

from __future__ import annotations

from pathlib import Path

import click

CASES = ("text", "image", "batch", "chunks", "steps")
"""Prefill, a picture, unequal rows, several chunks, single tokens: every graph of a bundle that generation uses."""


@click.command()
@click.option("--candidate", metavar="DIR", required=True, help="A bundle whose graphs compute in 16 bits.")
@click.option("--seeds", type=click.IntRange(min=1), default=50, show_default=True, help="Runs with noise.")
@click.option(
    "--cases",
    multiple=True,
    metavar="NAME",
    help=f"Only this case of the suite (repeatable).  [default: {', '.join(CASES)}]",
)
@click.option("--out", metavar="FILE", help="[default: envelope.json in the bundle]")
def envelope(candidate: str, seeds: int, cases: tuple[str, ...], out: str | None) -> None:
    """Measures how far rounding may take a bundle's graphs, and writes limits for a device.

    Runs the shipped graphs in the interpreter, rounded, with 1 to 2 units in the last place of noise after every operator
    that computes, and holds each run against the run in fp32. The same seeds give the same file. A minute or two for
    nano on two cores.
    """
    from .cli import errors, require_packages, say

    with errors():
        from .candidates import inspect
        from .cases import DEFAULT_SEED, select, suite
        from .envelope import NAME, measure, save, table
        from .prompts import source_for

        directory = Path(candidate)
        found = inspect(directory, "interpreter", "rounded")
        plans = [p for p in select(suite(found.config, found.limits), cases or CASES) if not p.impossible]
        target = Path(out) if out else directory / NAME
        require_packages("torch")
        click.echo(f"candidate: {candidate} ({found.rounded})\n    seeds: {seeds}")
        click.echo(f"    cases: {', '.join(plan.name for plan in plans)}\n      out: {target}")
        source = source_for(directory, found.config)
        done = iter(range(1, len(plans) + 1))
        made = measure(
            directory, plans, source, seeds, DEFAULT_SEED, lambda t: say(f"[{next(done)}/{len(plans)}] {t}")
        )
        save(made, target)
        click.echo(f"\n{table(made)}\n\nenvelope: {target}")
