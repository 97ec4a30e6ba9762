"""The report in Markdown, short enough for a comment on a pull request.

Nothing in it depends on when or where the run was made, so two runs with the same figures give the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .judge import Judgement
from .summary import (
    CASE_HEAD,
    SHOWN_ON,
    STAGE_HEAD,
    case_cells,
    finding_text,
    first_failures,
    perplexity_cells,
    sentence,
    stage_cells,
    summary,
)

LISTED = 20  # failures and notes, each; a comment on GitHub has at most 65,536 characters
LONGEST = 250  # characters of one of them, each up to 5 when escaped: what a candidate raised can be long
MARKUP = re.compile(r"([\\`*_\[\]|~])")


def render_markdown(run: dict[str, Any], judgement: Judgement) -> str:
    """The whole text."""
    shown = summary(run, judgement)
    word, told = sentence(run, judgement).split(": ", 1)
    reference = run["reference"]
    revision = f", revision {reference['revision']}" if reference["revision"] else ""
    named = (f"{link['candidate']['kind']} {link['candidate']['path']}" for link in run["links"])
    held = (
        f"{', '.join(dict.fromkeys(named))} held against the Torch reference of {reference['path']}{revision}"
    )
    lines = [f"## Parity: {word}", "", f"**{_plain(told)}**", "", _plain(held), ""]
    lines += _table(STAGE_HEAD, map(stage_cells, shown["stages"]))
    for link in shown["links"]:
        if len(shown["links"]) > 1:
            lines += [f"#### {_plain(link['stage'])}: {_plain(link['path'])}", ""]
        lines += _table(CASE_HEAD, map(case_cells, link["cases"]))
    lines += ["Distances are relative L2 against the reference in fp32; (n) is the decoder layer.", ""]
    if shown["perplexity"]:
        head = ("perplexity", "text", "reference", *(link["stage"] for link in shown["links"]))
        lines += _table(head, map(perplexity_cells, shown["perplexity"]))
    failures = [
        (f"{stage}: " if len(run["links"]) > 1 else "")
        + f"{f.case}, {f.where}: {finding_text(f)}"
        + (f"; {more} more checks failed" if more else "")
        for stage, f, more in first_failures(run, judgement)
    ]
    lines += _list("Failed checks", failures, "verdict.json")
    unwitnessed = [
        link["candidate"]["unwitnessed"] for link in run["links"] if "unwitnessed" in link["candidate"]
    ]
    if unwitnessed:
        operators = sorted({name for names in unwitnessed for name in names})
        lines += [f"Unwitnessed operators: {_plain(', '.join(operators) or 'none')}", ""]
    lines += _list("To be known", judgement.notes, "report.html")
    versions = (f"{name} {version or 'not installed'}" for name, version in run["environment"].items())
    lines += [SHOWN_ON, ""]
    lines.append(_plain(f"Profile {' and '.join(judgement.profiles)}; {', '.join(versions)}"))
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]


def _list(title: str, items: Sequence[str], rest: str) -> list[str]:
    if not items:
        return []
    more = len(items) - LISTED
    lines = [f"- {_plain(item)}" for item in items[:LISTED]]
    if more > 0:
        lines.append(f"- and {more} more, in {rest}")
    return [f"### {title}", "", *lines, ""]


def _plain(text: str) -> str:
    """One line in which nothing is markup."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = line[:LONGEST] + " ..."
    return MARKUP.sub(r"\\\1", html.escape(line, quote=False))
