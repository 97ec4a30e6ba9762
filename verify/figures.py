"""The pictures of a report, as SVG whose text stays text: small, sharp, searchable, and the same for the same run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from .judge import Judgement
from .metrics import GAP_EDGES, ROUTING_TIE
from .runs import stage_name

COLOURS = (
    "#1f5fa8",
    "#c2571a",
    "#2e7d4f",
    "#7b4aa0",
    "#00798c",
    "#8a6d00",
)  # of links; told apart in grey by marks
MARKS = ("o", "s", "^", "D", "v", "P")
NOISE, LIMIT = "#9aa5b1", "#b3261e"
FLOOR = 1e-9  # a logarithm has no place for a distance of exactly 0, so it is not drawn


def drift(run: dict[str, Any], judgement: Judgement) -> str:
    """Relative L2 distance along the network, of each link the worst case, over the reference's own noise."""
    taps = _drift_taps(run)
    return _svg(lambda axes: _draw_drift(axes, run, judgement, taps), 3.3)


def margins(links: list[dict[str, Any]]) -> str | None:
    """How near the reference's choices of experts are to another one, per MoE layer, and where a link chose another.

    None where no link has routing.
    """
    shown = [link for link in links if any(row["places"] for row in link["routing"])]
    return _svg(lambda axes: _draw_margins(axes, shown), 2.6) if shown else None


def _svg(draw: Callable[[Any], None], height: float) -> str:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kimi_vl",  # the same run gives the same bytes
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(8.6, height))
        draw(axes)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout(pad=0.4)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


# ---- drift ----------------------------------------------------------------------------------------------------------


def _drift_taps(run: dict[str, Any]) -> list[str]:
    """Taps with a distance, in network order."""
    cases = [case for link in run["links"] for case in link["cases"]]
    names: dict[str, None] = {}
    for case in cases:
        names |= dict.fromkeys(t for t in case["taps"] if t in ("vision_out", "projector_out"))
    for case in cases:
        names |= dict.fromkeys(t for t in case["taps"] if t.startswith("layers.") or t == "inputs_embeds")
    return [*names, "logits"]


def _draw_drift(axes: Any, run: dict[str, Any], judgement: Judgement, taps: list[str]) -> None:
    labels = {"vision_out": "tower", "projector_out": "projector", "inputs_embeds": "embeds"}
    every = max(1, math.ceil(len(taps) / 24))
    lowest, highest = math.inf, FLOOR
    noise = [_worst([case.get("noise", {}).get(tap) for case in _cases(run)]) for tap in taps]
    own = [
        _worst([case.get("calibration", {}).get(tap, {}).get("rel_l2") for case in _cases(run)])
        for tap in taps
    ]
    for values, label, alpha in (
        (own, "Torch itself, rounded", 0.2),
        (noise, "Torch itself, other kernels", 0.45),
    ):
        points = _points(values)
        if points:
            axes.fill_between(*zip(*points), FLOOR / 10, color=NOISE, alpha=alpha, linewidth=0, label=label)
            lowest, highest = min(lowest, *(y for _, y in points)), max(highest, *(y for _, y in points))
    for n, link in enumerate(run["links"]):
        points = _points(
            [_worst([case["taps"].get(tap, {}).get("rel_l2") for case in link["cases"]]) for tap in taps]
        )
        colour, mark = COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]
        label = stage_name(link["candidate"])
        axes.plot(
            *(zip(*points) if points else ([], [])),
            color=colour,
            marker=mark,
            markersize=4,
            linewidth=1.4,
            label=label,
        )
        if points:
            lowest, highest = min(lowest, *(y for _, y in points)), max(highest, *(y for _, y in points))
    for profile in judgement.profiles.values():
        limits = [profile.limit(tap, "rel_l2") for tap in taps]
        if any(limit is not None for limit in limits):
            drawn = [math.nan if limit is None else limit for limit in limits]
            style: Any = {"color": LIMIT, "linewidth": 1.2, "linestyle": (0, (5, 3))}
            axes.step(range(len(taps)), drawn, where="mid", label=f"allowed ({profile.name})", **style)
            highest = max(highest, *(limit for limit in limits if limit is not None))
    axes.set_yscale("log")
    axes.set_ylim(max(FLOOR, lowest / 4 if math.isfinite(lowest) else FLOOR), highest * 12)
    axes.set_xlim(-0.4, len(taps) - 0.6)
    ticks = [i for i, tap in enumerate(taps) if not tap.startswith("layers.") or int(tap[7:]) % every == 0]
    axes.set_xticks(ticks, [labels.get(taps[i], taps[i].removeprefix("layers.")) for i in ticks])
    axes.set_xlabel("along the network; numbers are decoder layers")
    axes.set_ylabel("relative L2 distance")
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", ncols=3, fontsize=8.5)


def _cases(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for link in run["links"] for case in link["cases"]]


def _worst(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _points(values: list[float | None]) -> list[tuple[int, float]]:
    return [(i, max(value, FLOOR)) for i, value in enumerate(values) if value]


# ---- margins of routing ---------------------------------------------------------------------------------------------


def _draw_margins(axes: Any, links: list[dict[str, Any]]) -> None:
    layers = [row["layer"] for row in links[0]["routing"]]
    decades = [math.log10(edge) for edge in GAP_EDGES]
    for i, row in enumerate(links[0]["routing"]):
        gaps = row["gaps"] or [0] * (len(GAP_EDGES) + 1)
        most = max(gaps) or 1
        for below, count in zip([decades[0] - 1, *decades], gaps):
            if count:
                axes.barh(below + 0.5, 0.9 * count / most, 0.86, left=i - 0.45 * count / most, color=NOISE)
    for n, link in enumerate(links):
        flips = [
            (i, math.log10(max(g, GAP_EDGES[0] / 10)))
            for i, r in enumerate(link["routing"])
            for g in r["flips"]
        ]
        colour, mark = COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]
        if flips:
            axes.plot(
                *zip(*flips), mark, color=colour, markersize=4, label=f"chosen otherwise: {link['stage']}"
            )
    style: Any = {"color": LIMIT, "linewidth": 1.2, "linestyle": (0, (5, 3))}
    axes.axhline(math.log10(ROUTING_TIE), label="below: a toss-up", **style)
    axes.set_ylim(decades[0] - 1.2, 0.6)
    axes.set_yticks(decades[::2], [f"1e{round(d)}" for d in decades[::2]])
    axes.set_xlim(-0.6, len(layers) - 0.4)
    every = max(1, math.ceil(len(layers) / 28))
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_xlabel("decoder layer; a bar is as wide as the choices of that margin are many")
    axes.set_ylabel("margin of a choice")
    axes.legend(frameon=False, loc="lower left", ncols=3, fontsize=8.5)
