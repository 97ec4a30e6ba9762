"""What ``bench_model.py`` measured, as a Markdown table and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .cases import DECODE, HEAD
from .sessions import OURS, Measured
from .turns import UNSTEADY

HEADINGS = (
    "case", "against", "ours, ms: min / median", "reference, ms: min / median", "ratio of min", "ratio of median",
    "ours", "reference", "memory reads", "ours over the limit", "the limit over the reference", "NMSE ours", "NMSE reference", "reference's kernels",
    "others, cores",
)  # fmt: skip


def table(rows: Sequence[Measured]) -> Iterator[str]:
    """A line per row; the limit is what reading all weights and the cache once takes, of least times."""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---" * len(HEADINGS) + "|"
    for row in [*rows, *without_head(rows)]:
        yield "| " + " | ".join(_cells(row)) + " |"


def ratios(row: Measured) -> tuple[float, float]:
    """Ours over the reference, of the least and of the median; below 1 is faster."""
    return min(row.ours) / min(row.theirs), statistics.median(row.ours) / statistics.median(row.theirs)


def without_head(rows: Sequence[Measured]) -> Iterator[Measured]:
    """Decode cases of one row less what the head alone took, where that was measured: its least, its median."""
    heads = {row.reference: row for row in rows if row.case.kind == HEAD and row.case.size == 1}
    for row in rows:
        head = heads.get(row.reference)
        if head and row.case.kind == DECODE and row.case.batch == 1:
            ours, theirs = _less(row.ours, head.ours), _less(row.theirs, head.theirs)
            if min(*ours, *theirs) > 0:
                work = {"work": row.work - head.work, "ours_work": row.ours_work - head.ours_work}
                yield replace(
                    row, part="without the head", ours=ours, theirs=theirs, errors={}, attempts=1, **work
                )


def _less(seconds: Sequence[float], head: Sequence[float]) -> list[float]:
    """The least and the median of a difference."""
    return [min(seconds) - min(head), statistics.median(seconds) - statistics.median(head)]


def _cells(row: Measured) -> Iterator[str]:
    reads = row.case.kind in (DECODE, HEAD)
    least, middle = ratios(row)
    yield row.name
    yield row.reference
    yield _both(row.ours)
    yield _both(row.theirs) + (f", unsteady after {row.attempts}" if row.unsteady > UNSTEADY else "")
    yield f"{least:.2f}"
    yield f"{middle:.2f}"
    unit = "GB/s" if reads else "GFLOP/s"
    yield _rate(row.ours_work, row.ours, unit)
    yield _rate(row.work, row.theirs, unit)
    if row.bandwidth and row.ours_work:
        limit = row.ours_work / max(row.bandwidth)
        yield f"{max(row.bandwidth) / 1e9:.0f} GB/s"
        yield f"{min(row.ours) / limit:.2f}"
        yield f"{limit / min(row.theirs):.2f}"
    else:
        yield from ("", "", "")
    for side in (OURS, row.reference):
        error = row.errors.get(side)
        yield "" if error is None else f"{error:.1e}"
    yield row.variant
    yield f"{row.others:.1f}"


def _both(seconds: Sequence[float]) -> str:
    return f"{1e3 * min(seconds):.1f} / {1e3 * statistics.median(seconds):.1f}"


def _rate(work: float, seconds: Sequence[float], unit: str) -> str:
    return f"{work / min(seconds) / 1e9:.0f} {unit}" if work else ""


def figure(rows: Sequence[Measured], title: str, path: Path) -> None:
    """A bar per case and reference, the ratio of medians, with the ratio of the least as a mark; SVG, PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.name for row in rows))
    references = list(dict.fromkeys(row.reference for row in rows))
    drawing = Figure(figsize=(8, 1 + 0.25 * len(names) * (1 + len(references))), layout="constrained")
    axes = drawing.subplots()
    height = 0.8 / len(references)
    for i, reference in enumerate(references):
        mine = [row for row in rows if row.reference == reference]
        places = [names.index(row.name) + (i + 0.5) * height - 0.4 for row in mine]
        least, middle = zip(*map(ratios, mine))
        axes.barh(places, middle, height, color=f"C{i}", label=f"against {reference}, medians")
        axes.plot(least, places, "|", color="black", label="least times" if i == 0 else None)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="our time over the reference's: below 1 is faster", xlim=(0, None), title=title)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
    drawing.savefig(path)
