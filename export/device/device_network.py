"""The rungs that hold the network against the reference: parts, graphs, and what they give together."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import device_operators
import device_play
import numpy as np
from device_graphs import cell_of, first_layers, read_model, to_numpy, zeros
from device_machine import Context, Items, Skipped, bad, good, memory

# ---- parts ----------------------------------------------------------------------------------------------------------


def load(context: Context) -> Items:
    """`ms.load` as it is, with weights that MindSpore finds by itself."""
    name = context.bundle.of_kind("decode")[0]
    record = context.bundle.graphs[name]
    if not record["external_data"]:
        raise Skipped(
            "the graphs of this bundle do not name their data: its weights are widened, and set one by one"
        )

    def check() -> dict:
        context.mindspore()
        started = time.perf_counter()
        cell = cell_of(context.bundle.directory / record["file"])
        seconds = time.perf_counter() - started
        held = cell.parameters_dict()
        small = sorted((n for n in held if n in context.bundle.weights), key=lambda n: held[n].size)
        for weight in {*small[:8], *small[-1:]}:
            if not np.array_equal(to_numpy(held[weight]), context.bundle.array(weight).astype(np.float32)):
                return bad(f"{weight} of {name} is not what the weights file has")
        return good(
            f"{name}: {len(held)} parameters in {seconds:.1f} s, contents as in the weights file",
            memory=memory(),
        )

    return [(name, check)]


def operators(context: Context) -> Items:
    context.mindspore()
    run = device_operators.Runner()

    def check(call: Any) -> dict:
        found = device_operators.check(call, run)
        return found | {"graph": call.graph, "milliseconds": run.milliseconds}

    return [(call.name, partial(check, call)) for call in device_operators.calls(context.bundle)]


def layer(context: Context) -> Items:
    """The prefill graph with taps, cut behind its first dense layer, and behind its first layer with experts."""
    pack = context.pack()
    case = pack.cases[0]
    call = next(c for c in case["calls"] if c["kind"] != "vision")
    if call["taps_graph"] is None:
        raise Skipped("the bundle has no graphs with taps; export with --taps to judge single layers")
    record = context.bundle.graphs[call["taps_graph"]]
    routing = pack.array(case["expected"].get("routing"))
    first_moe = pack.index["layers"] - (0 if routing is None else len(routing))

    def check(count: int) -> dict:
        model = first_layers(read_model(context.bundle.directory / record["file"]), count)
        graph = context.graphs.build(model, record)
        inputs = device_play.inputs_of(pack, call, record["inputs"])
        hidden = graph(inputs)[-1].reshape(len(call["rows"]), record["tokens"], -1)
        value = device_play.layer_distance(pack, case, call, count - 1, hidden)
        limit = case["limits"][f"layers.{count - 1}"]["rel_l2"]
        says = f"relative L2 {value:.1e}, allowed {limit:.1e}"
        return {"ok": value <= limit, "says": says, "figures": {f"layers.{count - 1}": {"rel_l2": value}}}

    wanted = {1: "the first layer"}
    if 0 < first_moe < pack.index["layers"]:
        wanted[first_moe + 1] = f"layers 0 to {first_moe}, the first with experts"
    return [(what, partial(check, count)) for count, what in wanted.items()]


def graphs(context: Context) -> Items:
    def check(name: str) -> dict:
        graph = context.graphs.graph(name)
        loaded = memory()
        started = time.perf_counter()
        out = graph(zeros(graph.record))
        seconds = time.perf_counter() - started
        finite = all(np.isfinite(o).all() for o in out)
        held = [
            f"{loaded[where]} MB on the {where}" for where in ("host", "device") if loaded[where] is not None
        ]
        says = ", ".join([f"first run {seconds:.1f} s", *held])
        return {
            "ok": finite,
            "says": says if finite else "gives NaN or infinity for zeros",
            "memory": memory(),
        }

    return [(name, partial(check, name)) for name in context.bundle.graphs]


# ---- against the reference ------------------------------------------------------------------------------------------


def against_the_pack(stage: str) -> Callable[[Context], Items]:
    """Items of every case that has calls of this stage."""

    def items(context: Context) -> Items:
        pack = context.pack()
        graphs = context.graphs

        def check(case: dict) -> dict:
            ports = context.bundle.ports
            plain = device_play.play(pack, case, graphs.run, ports, stage=stage)
            tapped = (
                device_play.play(pack, case, graphs.run, ports, True, stage) if pack.index["taps"] else {}
            )
            figures = device_play.figures(pack, case, plain, tapped)
            return _judged(case, figures) | {"observed": {"plain": plain, "tapped": tapped}}

        kinds = {"vision": ("vision",), "prefill": ("prefill", "prefill-logits"), "decode": ("decode",)}[
            stage
        ]
        found = [c for c in pack.cases if any(call["kind"] in kinds for call in c["calls"])]
        if not found:
            raise Skipped(f"the pack has no case with a {stage} graph")
        return [(case["name"], partial(check, case)) for case in found]

    return items


def _judged(case: dict, figures: dict) -> dict:
    """In the sentence: what is first wrong along the network, or what is nearest to its limit."""
    findings = device_play.judge(case, figures)
    wrong = [f for f in findings if not f["ok"]]
    near = max(findings, key=lambda f: f["value"] / f["limit"] if f["limit"] else 0.0)
    shown = wrong[0] if wrong else near
    says = f"{shown['tap']}: {shown['metric']} {shown['value']:.2g}, allowed {shown['limit']:.2g}"
    return {"ok": not wrong, "says": ("first wrong " if wrong else "nearest ") + says, "figures": figures}


def tokens(context: Context) -> Items:
    pack = context.pack()
    graphs = context.graphs

    def check(case: dict) -> dict:
        found = device_play.play_greedy(pack, case, graphs.run, context.bundle.ports)
        figures = device_play.figures(pack, case, {}, {}, found)
        same, of = figures["greedy"]["same"], figures["greedy"]["places"]
        judged = _judged(case, figures) | {"observed": {"tokens": found}}
        return judged | {"says": f"{same} of {of} tokens before the first other one; {judged['says']}"}

    return [(case["name"], partial(check, case)) for case in pack.cases if case["greedy"]]
