#!/usr/bin/env python
"""What an open bundle holds in memory, and whether its decoding slows down as more of its graphs are open.

    python scripts/bench_bundle.py --bundle ./mindir --rounds 3

Graphs are opened one after the other: loaded, and run once, which compiles them. Memory is that of a fresh process less
what it held when MindSpore was imported: anonymous, and of the weights' files as far as they are mapped and read.
Decoding is the smallest decode graph, a token after a token, in seconds and in processor time, which other programs
disturb less. Each number of open graphs is measured in a process of its own; they take turns, so that all share whatever
else the machine does. Needs Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))
from bench_kit.measure import memory

if TYPE_CHECKING:
    from kimi_vl.export import MindIRModel
    from kimi_vl.export.bundle import GraphRecord

MB = 1e6
WARM = 3  # decode steps that are not timed


@dataclass(frozen=True)
class Opened:
    """After one more graph was opened: its name, seconds that took, and bytes of the process, see the module."""

    name: str
    seconds: float
    anonymous: int
    mapped: int


@dataclass(frozen=True)
class Session:
    """One process. `weights` is the bytes of all weights in the graphs' dtype, `steps` each token's seconds, `cpu` likewise."""

    weights: int
    opened: list[Opened]
    steps: list[float]
    cpu: list[float]


def session(directory: Path, graphs: int, steps: int) -> Session:
    """Opens the first `graphs` graphs and decodes `steps` tokens. To be run in a fresh process."""
    import mindspore as ms
    import numpy as np

    from kimi_vl.convert.transforms import DTYPES
    from kimi_vl.export import MindIRModel

    ms.Tensor(np.zeros(1, np.float32)).asnumpy()
    before = memory(os.getpid())
    model = MindIRModel.from_bundle(directory)
    opened = []
    for name in order(model)[:graphs]:
        start = time.perf_counter()
        run(model, model.bundle.graphs[name])
        now = memory(os.getpid())
        opened.append(
            Opened(
                name,
                time.perf_counter() - start,
                now["RssAnon"] - before["RssAnon"],
                now["RssFile"] - before["RssFile"],
            )
        )
    dtype = model.bundle.parameter_dtype
    weights = sum(
        record.nbytes
        if dtype is None
        else record.nbytes // DTYPES[record.dtype].itemsize * DTYPES[dtype].itemsize
        for record in model.bundle.weights.values()
    )
    times = list(decoding(model, steps))
    return Session(weights, opened, [s for s, _ in times], [cpu for _, cpu in times])


def order(model: MindIRModel) -> list[str]:
    """The smallest decode graph first, then decode and prefill graphs in turns, then vision graphs; no graphs with taps."""
    from kimi_vl.export.plan import DECODE, VISION

    graphs = [(n, g) for n, g in model.bundle.graphs.items() if not g.taps]
    graphs.sort(key=lambda i: (i[1].kind == VISION, i[1].context or i[1].patches, i[1].kind != DECODE))
    return [name for name, _ in graphs]


def run(model: MindIRModel, graph: GraphRecord) -> None:
    """Runs a graph once, on nothing."""
    import numpy as np

    from kimi_vl.export.plan import PREFILL

    inputs = {port.name: np.zeros(port.shape, port.dtype) for port in graph.inputs}
    if graph.patches is not None:
        inputs["valid"][:] = graph.patches
        model.engine.graphs.vision(graph.patches, inputs, taps=False)
        return
    assert graph.tokens and graph.context, "a text graph has both"
    rows = model.engine.new_cache(model.bundle.batch).rows
    all_logits = graph.kind != PREFILL
    model.engine.graphs.text(graph.tokens, graph.context, rows, inputs, all_logits, taps=False)


def decoding(model: MindIRModel, steps: int) -> Iterator[tuple[float, float]]:
    """Seconds, and those of the processor, of each of `steps` tokens in the smallest context."""
    import numpy as np

    from kimi_vl.modeling.engine import Row

    batch = model.bundle.batch
    cache = model.engine.new_cache(batch)
    for step in range(WARM + steps):
        rows = [Row(np.array([step + 1])) for _ in range(batch)]
        start, cpu = time.perf_counter(), time.process_time()
        model.engine.extend(cache, rows)
        if step >= WARM:
            yield time.perf_counter() - start, time.process_time() - cpu


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True, help="exported with --target cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="decode steps that are timed in each process")
    parser.add_argument(
        "--open", type=int, nargs="*", default=[1, 3, 6], help="numbers of open graphs, beside all"
    )
    args = parser.parse_args(argv)
    numbers = sorted({*args.open, sys.maxsize})
    context = multiprocessing.get_context("spawn")
    sessions: dict[int, list[Session]] = {n: [] for n in numbers}
    for turn in range(args.rounds):
        for n in numbers:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                sessions[n].append(pool.submit(session, args.bundle, n, args.steps).result())
            step = statistics.median(sessions[n][-1].steps)
            print(
                f"{turn + 1}/{args.rounds} {len(sessions[n][-1].opened)} open: {step:.3f} s", file=sys.stderr
            )
    print("\n".join(tables(sessions)))
    return 0


def tables(sessions: dict[int, list[Session]]) -> Iterator[str]:
    """Memory as the last process with all graphs saw it, and decoding by the number of open graphs."""
    whole = sessions[max(sessions)][-1]
    yield f"weights in the graphs' dtype: {whole.weights / MB:.0f} MB\n"
    yield "| open | opened | s | anonymous, MB | mapped, MB | both over the weights |"
    yield "|---|---|---|---|---|---|"
    for i, graph in enumerate(whole.opened):
        held = graph.anonymous + graph.mapped
        yield (
            f"| {i + 1} | {graph.name} | {graph.seconds:.1f} | {graph.anonymous / MB:.0f} | {graph.mapped / MB:.0f} "
            f"| {held / whole.weights:.3f} |"
        )
    yield "\n| open | decode step, ms: median of each process | median of all | processor, ms: median of all |"
    yield "|---|---|---|---|"
    for runs in sessions.values():
        medians = ", ".join(f"{1e3 * statistics.median(run.steps):.0f}" for run in runs)
        seconds = statistics.median(step for run in runs for step in run.steps)
        cpu = statistics.median(step for run in runs for step in run.cpu)
        yield f"| {len(runs[0].opened)} | {medians} | {1e3 * seconds:.0f} | {1e3 * cpu:.0f} |"


if __name__ == "__main__":
    sys.exit(main())
