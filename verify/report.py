"""A run and its verdict, shown: a table on the terminal, JSON, and one self-contained HTML page.

Everything shown comes from the run and the verdict, so a saved run gives the same report again. The page holds its
styles and figures in itself: it works offline, and on paper.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from .judge import Profile, Verdict, describe_tap
from .junit import render_junit
from .markdown import render_markdown
from .runner import save_run
from .summary import (
    CASE_HEAD,
    METRIC_WORDS,
    case_cells,
    finding_text,
    first_failures,
    number,
    percent,
    sentence,
    summary,
)

TEMPLATES = Path(__file__).parent / "templates"


# ---- terminal and JSON ----------------------------------------------------------------------------------------------


def terminal_table(run: dict[str, Any], verdict: Verdict) -> str:
    """The cases, what failed, what did not run, and the verdict, as text."""
    shown = summary(run, verdict)
    rows = [CASE_HEAD, *map(case_cells, shown["cases"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(CASE_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += ["", "worst layer, logits: relative L2 distance to the Torch reference, fp32; (n) is the layer"]
    for stage in shown["stages"]:
        lines.append(f"  {stage['stage']}: {stage['where']}")
    lines += [f"note: {note}" for note in verdict.notes]
    return "\n".join([*lines, "", sentence(verdict)])


def verdict_json(run: dict[str, Any], verdict: Verdict) -> str:
    """The verdict with its failures and notes, what ran where, the worst figures, and a row per case."""
    shown = summary(run, verdict)
    cases = [{k: v for k, v in case.items() if k != "failures"} for case in shown["cases"]]
    whole = shown["verdict"] | {"stages": shown["stages"], "worst": shown["worst"], "cases": cases}
    return json.dumps(whole, indent=1, allow_nan=False)


def write_report(directory: Path, run: dict[str, Any], verdict: Verdict, profile: Profile) -> Path:
    """The run, and its verdict in each form, in `directory`; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    save_run(run, directory / "run.json")
    forms = {
        "verdict.json": verdict_json(run, verdict) + "\n",
        "junit.xml": render_junit(run, verdict),
        "report.md": render_markdown(run, verdict),
        "report.html": render_html(run, verdict, profile),
    }
    for name, text in forms.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory / "report.html"


# ---- HTML -----------------------------------------------------------------------------------------------------------


def render_html(run: dict[str, Any], verdict: Verdict, profile: Profile) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent, "tap": describe_tap}
    shown = summary(run, verdict)
    return environment.get_template("report.html.j2").render(
        run=run,
        verdict=verdict,
        profile=profile,
        sentence=sentence(verdict),
        finding_text=finding_text,
        drift=drift_figure(run, profile),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        first_failures=first_failures(verdict, shown["cases"]),
        metric_words=METRIC_WORDS,
        **{k: v for k, v in shown.items() if k != "verdict"},
    )


def drift_figure(run: dict[str, Any], profile: Profile) -> str:
    """SVG: relative L2 distance along the network, a line per case, against what the profile allows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    taps = _drift_taps(run)
    settings: Any = {
        "svg.fonttype": "none",  # text stays text: small, sharp, searchable
        "svg.hashsalt": "kimi_vl",  # the same run gives the same bytes
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(8.6, 3.1))
        _draw_drift(axes, run, profile, taps)
        figure.tight_layout(pad=0.4)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _drift_taps(run: dict[str, Any]) -> list[str]:
    """Taps with a distance, in network order."""
    names: dict[str, None] = {}
    for case in run["cases"]:
        names |= dict.fromkeys(t for t in case["taps"] if t in ("vision_out", "projector_out"))
    for case in run["cases"]:
        names |= dict.fromkeys(t for t in case["taps"] if t.startswith("layers.") or t == "inputs_embeds")
    return [*names, "logits"]


FLOOR = 1e-9  # a logarithm has no place for a distance of exactly 0, so it is not drawn


def _draw_drift(axes: Any, run: dict[str, Any], profile: Profile, taps: list[str]) -> None:
    labels = {"vision_out": "tower", "projector_out": "projector", "inputs_embeds": "embeds"}
    every = max(1, math.ceil(len(taps) / 24))
    worst = [FLOOR] * len(taps)
    for case in run["cases"]:
        points = [(i, case["taps"].get(tap, {}).get("rel_l2")) for i, tap in enumerate(taps)]
        points = [(i, max(value, FLOOR)) for i, value in points if value]
        for i, value in points:
            worst[i] = max(worst[i], value)
        if points:
            axes.plot(*zip(*points), color="#9aa5b1", linewidth=0.9, marker=".", markersize=3, zorder=2)
    axes.plot([], [], color="#9aa5b1", linewidth=0.9, label="each case")
    axes.plot(worst, color="#1f5fa8", linewidth=1.8, marker="o", markersize=4, label="worst case", zorder=3)
    limits = [profile.limit(tap, "rel_l2") for tap in taps]
    if any(limit is not None for limit in limits):
        drawn = [math.nan if limit is None else limit for limit in limits]
        axes.step(range(len(taps)), drawn, where="mid", color="#b3261e", linewidth=1.2, linestyle=(0, (5, 3)))
        axes.plot(
            [], [], color="#b3261e", linewidth=1.2, linestyle=(0, (5, 3)), label=f"allowed ({profile.name})"
        )
    axes.set_yscale("log")
    top = max([*worst, *(limit for limit in limits if limit is not None)])
    axes.set_ylim(min(FLOOR * 30, min(worst) / 3) if min(worst) > FLOOR else FLOOR / 2, top * 6)
    axes.set_xlim(-0.4, len(taps) - 0.6)
    ticks = [i for i, tap in enumerate(taps) if not tap.startswith("layers.") or int(tap[7:]) % every == 0]
    axes.set_xticks(ticks, [labels.get(taps[i], taps[i].removeprefix("layers.")) for i in ticks])
    axes.set_xlabel("along the network; numbers are decoder layers")
    axes.set_ylabel("relative L2 distance")
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper left", ncols=3, fontsize=8.5)
