"""The result as tables, and its place in a document: between two marks, so that it can be written again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .equivalents import why_equivalent
from .proving import STAGES, Outcome


def unseen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no stage saw although they change what is computed."""
    return [o for o in outcomes if not o.stage and not why_equivalent(o.mutant)]


def contradictions(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that were seen although they are said to change nothing. What a checker refuses says nothing about that."""
    refused = ("lint", "legality")
    return [o for o in outcomes if o.stage and o.stage not in refused and why_equivalent(o.mutant)]


def share_caught(outcomes: Sequence[Outcome]) -> float:
    """Of those that change what is computed."""
    caught = sum(bool(o.stage) for o in outcomes)
    return caught / max(1, caught + len(unseen(outcomes)))


def tables(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Markdown: by operator, by kind of change, and every survivor."""
    for title, key in (("operator", _operator), ("change", _kind)):
        yield from _counts(title, key, outcomes)
        yield ""
    survivors = [o for o in outcomes if not o.stage]
    if not survivors:
        return
    yield "Survivors:"
    yield ""
    reasons = Counter(why_equivalent(o.mutant) for o in survivors)
    for reason, count in sorted(reasons.items(), key=lambda item: (item[0] == "", -item[1])):
        yield f"* {reason or '**changes what is computed, and nothing saw it**'} ({count}):"
        yield from (f"  * {o.mutant}" for o in survivors if why_equivalent(o.mutant) == reason)
    yield ""


def _operator(outcome: Outcome) -> str:
    return outcome.mutant.operator


def _kind(outcome: Outcome) -> str:
    return outcome.mutant.kind


def _counts(title: str, key: Callable[[Outcome], str], outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"| {title} | made | {' | '.join(STAGES)} | equivalent | not seen |"
    yield "|---|" + "---:|" * (len(STAGES) + 3)
    groups = {name: [o for o in outcomes if key(o) == name] for name in sorted(set(map(key, outcomes)))}
    for name, group in (*groups.items(), ("**all**", list(outcomes))):
        by_stage = Counter(o.stage for o in group)
        missed = len(unseen(group))
        cells = [len(group), *(by_stage[stage] for stage in STAGES), by_stage[""] - missed, missed]
        yield f"| {name} | {' | '.join(str(c) if c else '' for c in cells)} |"


def write_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Puts lines between the marks of a name in a document; a document or a mark that is not there is made."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = "\n".join([begin, *lines, end])
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin in text and end in text:
        before, rest = text.split(begin, 1)
        text = before + section + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(text, encoding="utf-8")
