"""The rungs about memory and time: where a cache is written, what graphs share, what a launch costs."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import device_play
import numpy as np
from device_graphs import to_numpy, zeros
from device_machine import Context, Items, Skipped, bad, good, memory

RUNS = 5  # of which a time is the median
GARBAGE = 1000.0  # in a cache slot that must be written before it is read
SLOT = 3  # that a call writes first, where there is room


def cache(context: Context) -> Items:
    """The smallest prefill and decode graphs, on caches of known content."""
    bundle = context.bundle
    names = [n for kind in ("prefill", "decode") for n in bundle.of_kind(kind)[:1]]

    def filled(graph: Any, fill: float | None) -> list[np.ndarray]:
        """Random content, with `fill` in the slots that the next call writes; as the parameters then hold it."""
        rng = np.random.default_rng(0)
        before = []
        for port, parameter in zip(graph.ports, graph.caches):
            content = rng.standard_normal(port["shape"], np.float32)
            if fill is not None:
                by_row(content, graph)[:, written(graph)] = fill
            parameter.set_data(context.graphs.tensor_of(content, port["dtype"]))
            before.append(by_row(to_numpy(parameter), graph))
        return before

    def in_place(name: str) -> dict:
        graph = context.graphs.graph(name)
        before = filled(graph, None)
        graph(at_slot(graph.record))
        for port, parameter, old in zip(graph.ports, graph.caches, before):
            new, slots = by_row(to_numpy(parameter), graph), written(graph)
            if any(np.array_equal(a[slots], b[slots]) for a, b in zip(new, old)):
                return bad(f"{port['name']} does not hold what {name} wrote; it is not written in place")
            same = np.ones(new.shape[1], bool)
            same[slots] = False
            if not np.array_equal(new[:, same], old[:, same]):
                return bad(f"{port['name']}: {name} changed slots that it does not write")
        return good("every cache is written in place, and only where it should be", answer="in place")

    def before_read(name: str) -> dict:
        graph = context.graphs.graph(name)
        outputs = []
        for fill in (0.0, GARBAGE):
            filled(graph, fill)
            outputs.append(graph(at_slot(graph.record)))
        if not all(np.array_equal(a, b) for a, b in zip(*outputs)):
            return bad(
                f"what {name} gives depends on what its slots held before; the cache is read before it is written"
            )
        return good("what the slots held before changes nothing", answer="written before it is read")

    return [
        (f"{what}, {name}", partial(check, name))
        for what, check in (("in place", in_place), ("before its read", before_read))
        for name in names
    ]


def first_slot(record: dict) -> int:
    """Where a call writes: not at the beginning, if the graph's tokens fit behind it."""
    return min(SLOT, record["context"] - record["tokens"])


def written(graph: Any) -> slice:
    """The slots of each row that a call writes."""
    first = first_slot(graph.record)
    return slice(first, first + graph.record["tokens"])


def by_row(content: np.ndarray, graph: Any) -> np.ndarray:
    """A cache of any layout as [rows, slots, width]."""
    return content.reshape(-1, graph.record["context"], content.shape[-1])


def at_slot(record: dict) -> dict[str, np.ndarray]:
    made = zeros(record)
    made["start"][:] = first_slot(record)
    return made


def sharing(context: Context) -> Items:
    """A prefill and a decode graph of one context: copies of the weights in memory, and one cache for both."""
    bundle = context.bundle
    pairs = [
        (p, d)
        for p in bundle.of_kind("prefill")
        for d in bundle.of_kind("decode")
        if bundle.graphs[p]["context"] == bundle.graphs[d]["context"] > bundle.graphs[p]["tokens"] + SLOT
    ]
    if not pairs:
        raise Skipped("no prefill and decode graph have one context")
    prefill, decode = pairs[0]

    def weights() -> dict:
        context.forget()
        steps = []
        for name in (prefill, decode):
            graph = context.graphs.graph(name)
            graph(zeros(graph.record))
            steps.append(memory())
        where = "host" if steps[0]["device"] is None else "device"
        more = float(steps[1][where] or 0) - float(steps[0][where] or 0)
        whole = bundle.weight_bytes / 1e6
        says = f"the second graph takes {more:.0f} MB more on the {where}; the weights have {whole:.0f} MB"
        return good(says, answer="one copy" if more < whole / 2 else "a copy for each graph", memory=steps[1])

    def caches() -> dict:
        first, second = context.graphs.graph(prefill), context.graphs.graph(decode)
        written = at_slot(first.record)
        next_slot = zeros(second.record)
        next_slot["start"][:] = SLOT + first.record["tokens"]
        outputs = []
        for through_host in (True, False):
            for graph in (first, second):
                for port, parameter in zip(graph.ports, graph.caches):
                    parameter.set_data(
                        context.graphs.tensor_of(np.zeros(port["shape"], np.float32), port["dtype"])
                    )
            if not through_host:
                for ours, theirs in zip(second.caches, first.caches):
                    ours.set_data(theirs)
            first(written)
            if through_host:
                for port, ours, theirs in zip(second.ports, second.caches, first.caches):
                    ours.set_data(context.graphs.tensor_of(to_numpy(theirs), port["dtype"]))
            outputs.append(second(next_slot))
        if not all(np.array_equal(a, b) for a, b in zip(*outputs)):
            return bad(
                f"{decode} does not see what {prefill} wrote; copy the caches from graph to graph",
                answer="apart",
            )
        slot = SLOT + first.record["tokens"]
        back = all(np.abs(to_numpy(p)[..., slot, :]).max() > 0 for p in first.caches)
        says = f"{decode} sees what {prefill} wrote, " + (
            "and the reverse" if back else "but not the reverse"
        )
        return good(says, answer="one cache" if back else "the second graph has a copy")

    return [("weights", weights), ("caches", caches)]


def capture(context: Context) -> Items:
    """Decoding with kernel launches captured and replayed, against the same without."""
    if context.device == "CPU":
        raise Skipped("a CPU has no launches to capture")
    ms = context.mindspore()
    pack = context.pack()
    if not hasattr(ms.runtime, "set_kernel_launch_capture"):
        raise Skipped(f"MindSpore {ms.__version__} has no ms.runtime.set_kernel_launch_capture")
    case = next((c for c in pack.cases if sum(call["kind"] == "decode" for call in c["calls"]) > 2), None)
    if case is None:
        raise Skipped("the pack has no case of several decode calls")

    def run() -> dict:
        return device_play.play(pack, case, context.graphs.run, context.bundle.ports, stage="decode")

    def check() -> dict:
        off = run()
        context.forget()
        ms.runtime.set_kernel_launch_capture(True)
        try:
            on = run()
        finally:
            ms.runtime.set_kernel_launch_capture(False)
        differ = float(np.abs(off["logits"] - on["logits"]).max())
        if differ != 0 or np.isnan(differ):
            return bad(
                f"with capture the logits of case {case['name']} differ by {differ:.2g}", answer="differs"
            )
        return good("the same logits with capture as without", answer="equal")

    return [("off and on", check)]


def timing(context: Context) -> Items:
    def check(name: str) -> dict:
        graph = context.graphs.graph(name)
        arguments = graph.inputs(zeros(graph.record))
        seconds = []
        for _ in range(RUNS + 1):  # the first compiles
            started = time.perf_counter()
            out = graph.cell(*arguments)
            to_numpy((out if isinstance(out, (tuple, list)) else (out,))[0])
            seconds.append(time.perf_counter() - started)
        value = statistics.median(seconds[1:]) * 1e3
        return good(f"{value:.2f} ms, median of {RUNS}; the first {seconds[0]:.1f} s", milliseconds=value)

    return [(n, partial(check, n)) for n, g in context.bundle.graphs.items() if not g["taps"]]
