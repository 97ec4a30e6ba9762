"""`verify-parity bisect`: names the first wrong operator."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .candidates import CandidateError, Found
from .cases import Case

if TYPE_CHECKING:
    from .bisect import BadPoint, Outcome

CASES = ("image", "steps")
"""A picture and a prompt in one call, then tokens one by one: all operators, as prefill and as decoding."""
JUDGED = "the graphs, weights, configuration and host code, interpreted in fp32; not the kernels of MindSpore or of a device"


@click.command()
@click.option("--reference", required=True, metavar="SRC", help="Published directory, Hub repo id, or nano.")
@click.option(
    "--candidate", required=True, metavar="DIR", help="Bundle of any target, or converted directory."
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="NAME",
    help=f"Case of the suite (repeatable).  [default: {', '.join(CASES)}]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the inputs.  [default: fixed]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout, all else on stderr.")
def bisect(reference: str, candidate: str, cases: tuple[str, ...], seed: int | None, as_json: bool) -> None:
    """Names the first operator that is wrong, the parameters it reads and its nodes in the graph.

    Every layer is given the candidate's own input and compared, value by value in the order of the data, with what Torch
    makes of that input. The graphs of a bundle are interpreted; of a converted directory those that export would write
    for a CPU. Ends with 0 where nothing is wrong, and with 1 where an operator was found.
    """
    from .cli import OK, PARITY_FAILED, about, errors, require_packages, say

    with errors():
        from ..convert.source import fetch, resolve
        from .candidates import inspect, require_same_model
        from .cases import DEFAULT_SEED, build, select, suite
        from .prompts import source_for

        with about("--reference"):
            source = resolve(reference)
        with about("--candidate"):
            other = resolve(candidate)
        bundled = _is_bundle(other.directory)
        found = inspect(other.directory, "interpreter" if bundled else None)
        if found.kind == "published directory":
            raise CandidateError(
                f"--candidate: {candidate} is a published checkpoint, expected a bundle or a converted directory; convert "
                "it first"
            )
        config = require_same_model(source.directory, found)
        plans = select(suite(config, found.limits), cases or CASES)
        seed = DEFAULT_SEED if seed is None else seed
        require_packages("torch", "transformers")
        how = "as it is" if bundled else "through the graphs of --target cpu"
        shown = {
            "reference": reference,
            "candidate": f"{candidate} ({found.kind}, {how})",
            "cases": ", ".join(plan.name for plan in plans),
            "seed": seed,
            "judged": JUDGED,
        }
        for name, value in shown.items():
            click.echo(f"{name:>9}: {value}", err=as_json)
        for plan in plans:
            if plan.impossible:
                say(f"without case {plan.name}: {plan.impossible}")
        plans = [plan for plan in plans if not plan.impossible]
        if not plans:
            raise CandidateError("--case: the candidate can run none of them; export a larger context")
        from .bisect import examine
        from .oracle import build_oracle

        with about("--reference"):
            fetch(source)
        say("loading the Torch reference")
        oracle = build_oracle(source.directory)
        inputs = source_for(source.directory, config)
        outcomes: list[Outcome] = []
        made = [build(plan, inputs, seed) for plan in plans]
        with _bundle(found, made) as directory:
            from .interpreted import InterpretedModel

            model = InterpretedModel.from_bundle(directory, verify=True)
            for case in made:
                say(f"{case.name}: {case.what}")
                outcomes.append(examine(oracle, model, case))
                if outcomes[-1].bad:
                    break
        bad = outcomes[-1].bad
        if as_json:
            click.echo(json.dumps(_as_dict(shown, outcomes), indent=1))
        else:
            click.echo(_shown(outcomes))
        sys.exit(PARITY_FAILED if bad else OK)


def _is_bundle(directory: Path) -> bool:
    from ..export.bundle import MANIFEST

    return (directory / MANIFEST).is_file()


@contextmanager
def _bundle(found: Found, cases: Sequence[Case]) -> Iterator[Path]:
    """The bundle to interpret: the candidate, or a temporary one beside it, where its shards can be linked to.

    It is as large as the cases are: each graph takes seconds to trace.
    """
    if found.kind == "bundle":
        yield found.path
        return
    from ..export import export, plan_export
    from ..export.plan import open_converted

    beside = found.path.resolve().parent
    longest = max(case.inputs["input_ids"].shape[1] for case in cases)
    context = next(n for n in found.limits.contexts if n >= longest)
    grids = [g for case in cases for g in case.inputs.get("image_grid_hws", ())]
    patches = max((int(h * w) for h, w in grids), default=math.prod(found.config.vision.merge_kernel_size))
    with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as room:
        planned = plan_export(
            open_converted(found.path),
            seq=(context,),
            target="cpu",
            prefill_chunk=min(found.limits.chunk, context),
            image_patches=(patches,),
        )
        export(planned, Path(room) / "bundle")
        yield Path(room) / "bundle"


def _as_dict(shown: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For JSON, which has no infinity: a distance to NaN or infinity is null, and so is one that is not visible."""
    bad = outcomes[-1].bad
    found = asdict(bad) if bad else None
    for record in (found, *found["table"]) if found else ():
        if record["distance"] is not None and not math.isfinite(record["distance"]):
            record["distance"] = None
    return shown | {
        "bad": found,
        "hidden": {o.case: o.hidden for o in outcomes},
        "largest_share_of_limit": {
            o.case: {k: v if math.isfinite(v) else None for k, v in o.judged.items()} for o in outcomes
        },
    }


def _shown(outcomes: Sequence[Outcome]) -> str:
    """The bad layer's points and a sentence, or that nothing is bad."""
    bad = outcomes[-1].bad
    lines = [""]
    if bad:
        lines += [*_table(bad), "", str(bad)]
        lines.append(f"  reads: {', '.join(bad.reads) or 'no parameter'}")
        lines.append(f"  nodes: {', '.join(bad.nodes)} of {bad.graph}.mindir")
    else:
        names = ", ".join(o.case for o in outcomes)
        share = max(max(o.judged.values()) for o in outcomes)
        lines.append(f"nothing bad in {names}; the farthest point takes {share:.0%} of its limit")
    hidden: dict[str, list[str]] = {}
    for outcome in outcomes:
        for kind, points in outcome.hidden.items():
            hidden[kind] = sorted({*hidden.get(kind, []), *points})
    for kind, names_of in hidden.items():
        lines.append(f"not visible in {kind} graphs, inside fused operators: {', '.join(names_of)}")
    return "\n".join(lines)


def _table(bad: BadPoint) -> Iterator[str]:
    yield f"{bad.layer}, call {bad.call}, graph {bad.graph}"
    yield f"  {'point':<16}{'distance':>10}{'limit':>10}"
    seen = False
    for row in bad.table:
        if row.distance is None:
            continue
        mark = "" if not row.bad else "bad" if seen else "bad, the first"
        seen = seen or row.bad
        yield f"  {row.point:<16}{row.distance:>10.1e}{row.limit:>10.1e}  {mark}".rstrip()
