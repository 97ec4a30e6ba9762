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

from .judge import Finding, Profile, Verdict, describe_tap, network_order
from .runner import save_run, stages

TEMPLATES = Path(__file__).parent / "templates"


# ---- what is shown --------------------------------------------------------------------------------------------------


def summary(run: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The figures of a report, once, for every form of it."""
    cases = [_case_row(case, verdict) for case in run["cases"]]
    return {
        "verdict": verdict.to_dict(),
        "cases": cases,
        "stages": stages(run),
        "routing": _routing_rows(run),
        "worst": {
            "layers": _worst(run, "layers."),
            "logits": _worst(run, "logits"),
            "kl": max((c["kl"] for c in cases if c["kl"] is not None), default=None),
            "top1": _together(run, "logits", "top1_changed"),
            "routing": _together(run, "router.", "flipped"),
            "greedy": (sum(c["greedy_same"] for c in cases), sum(c["greedy_steps"] for c in cases)),
        },
    }


def _case_row(case: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    taps = case["taps"]
    layers = [(m["rel_l2"], int(tap[7:])) for tap, m in taps.items() if tap.startswith("layers.")]
    finite = [x for x in layers if x[0] is not None]
    logits, greedy = taps.get("logits", {}), taps.get("greedy")
    failures = [f for f in verdict.of_case(case["name"]) if not f.ok]
    routers = [m for tap, m in taps.items() if tap.startswith("router.")]
    return {
        "name": case["name"],
        "what": case["what"],
        "size": _size(case),
        "pictures": ", ".join(f"{h} x {w}" for h, w in case["grids"]),
        "calls": _calls(case["calls"]),
        "projector": taps.get("projector_out", {}).get("rel_l2"),
        "worst_layer": max(finite, default=None) if len(finite) == len(layers) else None,
        "has_layers": bool(layers),
        "logits": logits.get("rel_l2"),
        "max_abs": logits.get("max_abs"),
        "kl": logits.get("kl"),
        "top1": logits.get("top1"),
        "routing": min((m["agreement"] for m in routers if m["agreement"] is not None), default=None),
        "greedy_same": sum(greedy["prefix"]) if greedy else 0,
        "greedy_steps": greedy["rows"] * greedy["steps"] if greedy else 0,
        "greedy": f"{min(greedy['prefix'])}/{greedy['steps']}" if greedy else None,
        "ok": not failures,
        "failures": failures,
        "error": case["error"],
    }


def _size(case: dict[str, Any]) -> str:
    tokens = case["tokens"]
    return str(tokens[0]) if len(tokens) == 1 else ", ".join(map(str, tokens))


def _calls(calls: list[int]) -> str:
    """`28, then 16 x 1`."""
    if len(calls) == 1:
        return "one call"
    first, rest = calls[0], calls[1:]
    if len(set(rest)) == 1:
        return f"{first}, then {len(rest)} x {rest[0]}"
    return ", ".join(map(str, calls))


def _metrics_of(run: dict[str, Any], stem: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [(c["name"], t, m) for c in run["cases"] for t, m in c["taps"].items() if t.startswith(stem)]


def _worst(run: dict[str, Any], stem: str) -> dict[str, Any] | None:
    found = [(m["rel_l2"], case, tap) for case, tap, m in _metrics_of(run, stem)]
    if not found or any(value is None for value, _, _ in found):
        return None
    value, case, tap = max(found)
    return {"value": value, "case": case, "where": describe_tap(tap)}


def _together(run: dict[str, Any], stem: str, count: str) -> tuple[int, int] | None:
    """(places that agree, places) over all cases."""
    found = [m for _, _, m in _metrics_of(run, stem)]
    if not found or any(m.get(count) is None for m in found):
        return None
    places = sum(m["places"] for m in found)
    return places - sum(m[count] for m in found), places


def _routing_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for layer in run["suite"]["experts"]:
        found = [m for _, tap, m in _metrics_of(run, "router.") if tap == f"router.{layer['layer']}"]
        gaps = [m["min_gap"] for m in found if m["min_gap"] is not None]
        flips = sorted((f["gap"] for m in found for f in m["flips"]), reverse=True)
        rows.append(
            layer
            | {
                "places": sum(m["places"] for m in found),
                "flipped": sum(m["flipped"] for m in found),
                "ties": sum(m["ties"] for m in found),
                "min_gap": min(gaps, default=None),
                "max_flip": flips[0] if flips else None,
            }
        )
    return rows


# ---- terminal and JSON ----------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """`2.1e-07`, `0`, or a dash where there is none."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """Rounded down, so that 100% means all."""
    return "-" if value is None else f"{math.floor(value * 1000) / 10:g}%"


def terminal_table(run: dict[str, Any], verdict: Verdict) -> str:
    """The cases, what failed, what did not run, and the verdict, as text."""
    shown = summary(run, verdict)
    head = ("case", "tokens", "worst layer", "logits", "max abs", "KL", "top-1", "experts", "greedy", "")
    rows = [head]
    for c in shown["cases"]:
        worst = f"{number(c['worst_layer'][0])} ({c['worst_layer'][1]})" if c["worst_layer"] else "-"
        figures = (number(c["logits"]), number(c["max_abs"]), number(c["kl"]), percent(c["top1"]))
        rows.append(
            (c["name"], c["size"], worst, *figures, percent(c["routing"]), c["greedy"] or "-")
            + ("ok" if c["ok"] else "FAILED",)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
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


def sentence(verdict: Verdict) -> str:
    """The verdict in one line; a failure names the first bad place of the network."""
    bad = verdict.first_bad
    if bad is None:
        return f"PASSED: all {len(verdict.findings)} checks of profile {verdict.profile} hold"
    more = len(verdict.failures) - 1
    return f"FAILED: first bad is {bad.where} in case {bad.case}: {finding_text(bad)}" + (
        f"; {more} more checks failed" if more else ""
    )


METRIC_WORDS = {
    "rel_l2": "relative L2 distance",
    "nmse": "error energy",
    "nmse_settled": "error energy where the experts are the same",
    "max_abs": "largest difference",
    "max_scaled": "largest difference over largest logit",
    "kl": "mean KL (nats)",
    "kl_max": "largest KL (nats)",
    "flipped": "other choices of experts",
    "top1_changed": "other best tokens",
    "wrong": "other choices of experts",
    "top1_changes": "other best tokens",
    "divergences": "rows that leave the reference",
    "excluded_share": "share of tokens not comparable",
    "norm": "largest relative difference of a norm",
    "changed": "other best tokens",
    "left": "rows that leave the reference",
}


def finding_text(finding: Finding) -> str:
    """`relative L2 distance 3.1e-03, allowed 1.0e-05`."""
    if finding.metric in ("raised", "nonfinite", "missing", "cases"):
        return finding.says
    value = number(finding.value) if isinstance(finding.value, float) else str(finding.value)
    limit = number(finding.limit) if isinstance(finding.limit, float) else str(finding.limit)
    text = f"{METRIC_WORDS.get(finding.metric, finding.metric)} {value}, allowed {limit}"
    return f"{text} ({finding.says})" if finding.says else text


def first_failures(verdict: Verdict, cases: list[dict[str, Any]]) -> list[tuple[Finding, int]]:
    """Per failed case the failure that lies first in the network, and how many more there are."""
    of_cases = [c["failures"] for c in cases if c["failures"]]
    found = [(min(fs, key=lambda f: network_order(f.tap)), len(fs) - 1) for fs in of_cases]
    known = {id(f) for fs in of_cases for f in fs}
    return [(f, 0) for f in verdict.failures if id(f) not in known] + found


def write_report(directory: Path, run: dict[str, Any], verdict: Verdict, profile: Profile) -> Path:
    """`run.json`, `verdict.json` and `report.html` in `directory`; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    save_run(run, directory / "run.json")
    (directory / "verdict.json").write_text(verdict_json(run, verdict) + "\n", encoding="utf-8")
    page = directory / "report.html"
    page.write_text(render_html(run, verdict, profile), encoding="utf-8")
    return page


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
