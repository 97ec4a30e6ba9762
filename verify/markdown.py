"""The report in Markdown, short enough for a comment on a pull request.

Nothing in it depends on when or where the run was made, so two runs with the same figures give the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .judge import Verdict
from .summary import CASE_HEAD, case_cells, finding_text, first_failures, sentence, summary

LISTED = 20  # failures and notes, each; a comment on GitHub has at most 65,536 characters
LONGEST = 250  # characters of one of them, each up to 5 when escaped: what a candidate raised can be long
MARKUP = re.compile(r"([\\`*_\[\]|~])")


def render_markdown(run: dict[str, Any], verdict: Verdict) -> str:
    """The whole text."""
    shown = summary(run, verdict)
    word, told = sentence(verdict).split(": ", 1)
    reference, candidate = run["reference"], run["candidate"]
    revision = f", revision {reference['revision']}" if reference["revision"] else ""
    held = f"{candidate['kind']} {candidate['path']} held against the Torch reference of {reference['path']}"
    lines = [f"## Parity: {word}", "", f"**{_plain(told)}**", "", _plain(held + revision), ""]
    lines += _table(("stage", "where it ran"), ((s["stage"], s["where"]) for s in shown["stages"]))
    lines += _table(CASE_HEAD, map(case_cells, shown["cases"]))
    lines += ["Distances are relative L2 against the reference in fp32; (n) is the decoder layer.", ""]
    failures = [
        f"{f.case}, {f.where}: {finding_text(f)}" + (f"; {more} more checks failed" if more else "")
        for f, more in first_failures(verdict, shown["cases"])
    ]
    lines += _list("Failed checks", failures, "verdict.json")
    if "unwitnessed" in candidate:
        lines += [f"Unwitnessed operators: {_plain(', '.join(candidate['unwitnessed']) or 'none')}", ""]
    lines += _list("To be known", verdict.notes, "report.html")
    versions = (f"{name} {version or 'not installed'}" for name, version in run["environment"].items())
    lines.append(_plain(f"Profile {verdict.profile}; {', '.join(versions)}"))
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
