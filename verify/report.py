"""A run and its verdict, shown: a table on the terminal, JSON, and one self-contained HTML page.

Everything shown comes from the run and the verdict, so a saved run gives the same report again. The page holds its
styles and figures in itself: it works offline, and on paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures
from .judge import Judgement, describe_tap
from .junit import render_junit
from .markdown import render_markdown
from .runs import save_run
from .summary import (
    CASE_HEAD,
    METRIC_WORDS,
    SHOWN_ON,
    STAGE_HEAD,
    case_cells,
    finding_text,
    first_failures,
    number,
    percent,
    perplexity_cells,
    sentence,
    share,
    stage_cells,
    summary,
)

TEMPLATES = Path(__file__).parent / "templates"


# ---- terminal and JSON ----------------------------------------------------------------------------------------------


def terminal_table(run: dict[str, Any], judgement: Judgement) -> str:
    """The cases of each stage, the chain, what failed, what did not run, and the verdict, as text."""
    shown = summary(run, judgement)
    lines = []
    for link in shown["links"]:
        if len(shown["links"]) > 1:
            lines += [f"{link['stage']}: {link['path']}", ""]
        lines += [*_columns([CASE_HEAD, *map(case_cells, link["cases"])]), ""]
    lines += ["worst layer, logits: relative L2 distance to the Torch reference, fp32; (n) is the layer", ""]
    if shown["perplexity"]:
        head = ("perplexity", "text", "reference", *(link["stage"] for link in shown["links"]))
        lines += [*_columns([head, *map(perplexity_cells, shown["perplexity"])]), ""]
    for stage in shown["stages"]:
        mark = {None: "", True: "  ok", False: "  FAILED"}[stage["ok"]]
        lines.append(f"  {stage['stage']}: {stage['where']}{mark}")
    weights = (
        f"  weights of {link['path']}: {link['weights']['says']}"
        for link in shown["links"]
        if link["weights"]
    )
    lines += dict.fromkeys(weights)
    if len(shown["links"]) > 1:
        lines += ["", *_columns([STAGE_HEAD[:1] + STAGE_HEAD[2:], *map(_short, shown["stages"])])]
    lines += [f"note: {note}" for note in judgement.notes]
    return "\n".join([*lines, "", sentence(run, judgement)])


def _short(stage: dict[str, Any]) -> tuple[str, ...]:
    cells = stage_cells(stage)
    return cells[:1] + cells[2:]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned cells, the first underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def verdict_json(run: dict[str, Any], judgement: Judgement) -> str:
    """The verdict with its failures and notes, what ran where, the worst figures, and of each link a row per case."""
    shown = summary(run, judgement)
    links = []
    for link in shown["links"]:
        cases = [{k: v for k, v in case.items() if k != "failures"} for case in link["cases"]]
        links.append({k: v for k, v in link.items() if k != "routing"} | {"cases": cases})
    whole = {k: shown[k] for k in ("stages", "worst", "perplexity")}
    return json.dumps(shown["verdict"] | whole | {"links": links}, indent=1, allow_nan=False)


def write_report(directory: Path, run: dict[str, Any], judgement: Judgement) -> Path:
    """The run, and its verdict in each form, in `directory`; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    save_run(run, directory / "run.json")
    forms = {
        "verdict.json": verdict_json(run, judgement) + "\n",
        "junit.xml": render_junit(run, judgement),
        "report.md": render_markdown(run, judgement),
        "report.html": render_html(run, judgement),
    }
    for name, text in forms.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory / "report.html"


# ---- HTML -----------------------------------------------------------------------------------------------------------


def render_html(run: dict[str, Any], judgement: Judgement) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent, "share": share, "tap": describe_tap}
    shown = summary(run, judgement)
    candidates = {link["candidate"]["path"]: link["candidate"] for link in run["links"]}
    return environment.get_template("report.html.j2").render(
        run=run,
        judgement=judgement,
        sentence=sentence(run, judgement),
        finding_text=finding_text,
        drift=figures.drift(run, judgement),
        margins=figures.margins(shown["links"]),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        first_failures=first_failures(run, judgement),
        metric_words=METRIC_WORDS,
        shown_on=SHOWN_ON,
        stage_head=STAGE_HEAD,
        stage_cells=stage_cells,
        sides=[(run["reference"], "Reference"), *((side, "Candidate") for side in candidates.values())],
        **{k: v for k, v in shown.items() if k != "verdict"},
    )
