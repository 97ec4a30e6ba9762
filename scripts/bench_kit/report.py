"""Runs as a Markdown table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .measure import Run

HEAD = (
    "| layers | GB | source | method | seconds, min / median | time against cp, min / median | processor, s "
    "| anonymous, MB | read, GB | written, GB |"
)


@dataclass(frozen=True)
class Case:
    """One method on one source, measured several times, and the runs of ``cp`` between them."""

    layers: int
    nbytes: int
    source: str  # "warm" or "cold"
    method: str
    runs: Sequence[Run]
    copies: Sequence[Run]

    @property
    def seconds(self) -> tuple[float, float]:
        """The least and the median."""
        return _both([run.seconds for run in self.runs])

    @property
    def ratios(self) -> tuple[float, float]:
        """Of the least times and of the medians; below 1 is faster than ``cp``."""
        copies = _both([run.seconds for run in self.copies])
        return self.seconds[0] / copies[0], self.seconds[1] / copies[1]

    @property
    def anonymous(self) -> int:
        """Bytes, the most of all runs."""
        return max(run.anonymous for run in self.runs)


def table(cases: Sequence[Case]) -> str:
    lines = [HEAD, "|" + " --- |" * (HEAD.count("|") - 1)]
    for case in cases:
        seconds, ratios = case.seconds, case.ratios
        cells = (
            str(case.layers),
            f"{case.nbytes / 1e9:.2f}",
            case.source,
            case.method,
            f"{seconds[0]:.1f} / {seconds[1]:.1f}",
            f"{ratios[0]:.2f} / {ratios[1]:.2f}",
            f"{min(run.cpu_seconds for run in case.runs):.1f}",
            f"{case.anonymous / 1e6:.0f}",
            f"{median(run.read for run in case.runs) / 1e9:.2f}",
            f"{median(run.written for run in case.runs) / 1e9:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(cases: Sequence[Case], path: Path) -> None:
    """Time and memory over the size of the checkpoint, a line per method, dashed where the source is cold; SVG, PNG."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 4), layout="constrained")
    time, memory = drawing.subplots(1, 2)
    time.axhline(1, color="black", linewidth=1, label="cp -r and sync")
    ours = sorted((case for case in cases if case.runs is not case.copies), key=lambda case: case.nbytes)
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(case.method for case in ours))}
    for method, source in dict.fromkeys((case.method, case.source) for case in ours):
        mine = [case for case in ours if (case.method, case.source) == (method, source)]
        sizes = [case.nbytes / 1e9 for case in mine]
        look = ("o-", colours[method]) if source == "warm" else ("o--", "none")
        style = {"color": colours[method], "markerfacecolor": look[1], "label": f"{method}, {source}"}
        time.plot(sizes, [case.ratios[1] for case in mine], look[0], **style)
        memory.plot(sizes, [case.anonymous / 1e6 for case in mine], look[0], **style)
    time.set(ylabel="time against cp and sync, medians", ylim=(0, None))
    memory.set(ylabel="anonymous memory, MB", yscale="log")
    for axes in (time, memory):
        axes.set(xlabel="checkpoint, GB", xlim=(0, None))
        axes.grid(alpha=0.3)
    drawing.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    drawing.savefig(path)


def _both(values: Sequence[float]) -> tuple[float, float]:
    return min(values), median(values)
