"""The table of faults, as it stands between two marks of a document, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .fault import Fault
from .workshop import Outcome

BEGIN, END = "<!-- hand-made faults: begin -->", "<!-- hand-made faults: end -->"


def rows(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Markdown."""
    yield "| fault | put into | caught by | first bad place | where it is | right | first wrong operator |"
    yield "|---|---|---|---|---|---|---|"
    for outcome in outcomes:
        fault = outcome.fault
        model = "" if fault.model == "tiny8" else f" ({fault.model})"
        cells = (
            fault.what,
            fault.into + model,
            caught_by(outcome),
            outcome.place or "none",
            fault.place,
            "yes" if outcome.right else "**no**",
            outcome.operator,
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def caught_by(outcome: Outcome) -> str:
    """Case, tap, metric, and value against limit; or what was said before anything ran."""
    if outcome.verdict is None:
        return f"before it runs: {outcome.refused.split('; ')[0]}"
    bad = outcome.verdict.first_bad
    if bad is None:
        return "**nothing**"
    value = f"{bad.value:.2g}" if isinstance(bad.value, int | float) else bad.value
    also = "; weights, bit by bit" if any(f.tap == "weights" for f in outcome.verdict.failures) else ""
    return f"{bad.case}, {bad.tap}: {bad.metric} {value}, at most {bad.limit:g}{also}"


def as_json(outcomes: Sequence[Outcome]) -> str:
    return json.dumps([_record(outcome) for outcome in outcomes], indent=1)


def _record(outcome: Outcome) -> dict[str, Any]:
    fault, verdict = outcome.fault, outcome.verdict
    return {
        "fault": fault.name,
        "what": fault.what,
        "into": fault.into,
        "model": fault.model,
        "caught": outcome.caught,
        "first_bad": outcome.place or None,
        "expected": fault.place,
        "right": outcome.right,
        "operator": outcome.operator or None,
        "refused": outcome.refused or None,
        "failures": [asdict(finding) for finding in verdict.failures] if verdict else [],
    }


def update(page: Path, outcomes: Sequence[Outcome], faults: Sequence[Fault]) -> None:
    """Puts the rows of `outcomes` in the table between the marks, which keeps those of the other `faults`.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: has no {BEGIN} and {END}, between which the table goes; put them in")
    head, line, *new = rows(outcomes)
    known = {row.split(" | ")[0]: row for row in [*rest.partition(END)[0].splitlines(), *new]}
    lines = [head, line, *(known[key] for fault in faults if (key := f"| {fault.what}") in known)]
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after, encoding="utf-8")
