"""Golden packs of small bundles, recorded once, and what plays them without a device: the interpreter."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import bundles
import numpy as np
from golden import DATA

from kimi_vl.export import export, plan_export
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.device import device_play, device_report
from kimi_vl.export.device.device_pack import Pack, file_hash, read_pack
from kimi_vl.export.plan import open_converted
from kimi_vl.export.weights import SharedWeights
from kimi_vl.verify import golden
from kimi_vl.verify.cases import Limits, SeededSource, select, suite
from kimi_vl.verify.interpreted import InterpretedGraph
from kimi_vl.verify.oracle import Oracle, build_oracle

TINY = DATA / "tiny8-bf16"
CASES = ("image", "pieces")  # a picture and greedy tokens; a chunk and single tokens
STAGES = ("vision", "prefill", "decode")


@functools.cache
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def oracle() -> Oracle:
    return build_oracle(TINY)


@functools.cache
def bundle(target: str, taps: bool = True, batch: int = 1) -> Path:
    """A small bundle, for the CPU of plain graphs, which a device's player takes; not to be changed. Without taps it is the same but for the graphs that have them."""
    path = Path(_room().name) / f"{target}-{taps}-{batch}"
    if not taps:
        shutil.copytree(bundle(target), path)
        bundles.edit(path, _without_taps)
        return path
    sizes: dict[str, Any] = {
        "seq": (128,),
        "prefill_chunk": 64,
        "image_patches": (64,),
        "taps": True,
        "batch": batch,
    }
    with bundles.plain_graphs():
        export(plan_export(open_converted(bundles.converted("tiny8-bf16")), **sizes, target=target), path)
    return path


def _without_taps(manifest: dict[str, Any]) -> None:
    manifest["graphs"] = {n: g for n, g in manifest["graphs"].items() if not g["taps"]}
    manifest["taps"] = False


def record(directory: Path, path: Path, names: tuple[str, ...] = CASES) -> Pack:
    found = Bundle.load(directory)
    plans = select(
        suite(oracle().config, Limits(found.contexts, found.prefill_chunk, found.patches[-1])), names
    )
    return golden.record(oracle(), TINY, directory, plans, SeededSource(oracle().config), 1, path)


@functools.cache
def pack_file(target: str) -> Path:
    path = Path(_room().name) / f"{target}.npz"
    record(bundle(target), path)
    return path


@functools.cache
def pack(target: str) -> Pack:
    return read_pack(pack_file(target))


def observed(
    target: str, case: dict[str, Any], arithmetic: Any = "rounded", swapped: str = ""
) -> golden.Observed:
    """What the interpreted bundle gives; with the experts of the weight `swapped` in reverse."""
    directory = bundle(target)
    manifest = Bundle.load(directory)
    weights = SharedWeights(directory, manifest)
    array = weights.array
    if swapped:
        weights.array = lambda name: np.flip(array(name), 0) if name == swapped else array(name)  # type: ignore[method-assign]
    graphs = functools.cache(lambda name: InterpretedGraph(directory, name, manifest, weights, arithmetic))

    def run(name: str, inputs: dict[str, np.ndarray], rows: list[Any]) -> list[np.ndarray]:
        return graphs(name).run(inputs, rows)

    return golden.observe(pack(target), case, run, lambda name: golden.ports(manifest, name))


def figures(target: str, case: dict[str, Any], found: golden.Observed) -> dict[str, Any]:
    return device_play.figures(pack(target), case, *found)


@functools.cache
def rungs(target: str, swapped: str = "") -> list[dict[str, Any]]:
    """Of a report of a device that computes as the rounded interpreter does."""
    found = {case["name"]: observed(target, case, swapped=swapped) for case in pack(target).cases}

    def rung(name: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {"name": name, "what": name, "status": "passed", "says": "", "seconds": 0.0, "items": items}

    def item(name: str, held: Any) -> dict[str, Any]:
        return {"item": name, "ok": True, "says": "", "seconds": 0.0, "observed": held}

    def encoded(arrays: Any) -> Any:
        return {name: device_report.encode(array) for name, array in arrays.items()}

    made = [rung("environment", []), rung("files", []), rung("pack", [])]
    for stage in STAGES:
        both = [(n, {"plain": encoded(p), "tapped": encoded(t)}) for n, (p, t, _) in found.items()]
        made.append(rung(stage, [item(name, held) for name, held in both]))
    greedy = [item(n, {"tokens": device_report.encode(t)}) for n, (_, _, t) in found.items() if t is not None]
    return [*made, rung("tokens", greedy)]


def report(path: Path, target: str, device: str = "Ascend", swapped: str = "", **changed: Any) -> Path:
    """Writes a device report."""
    name = "Ascend910B" if device == "Ascend" else "CPU"
    held = {
        "bundle": {
            "manifest": file_hash(bundle(target) / "bundle.json"),
            "target": target,
            "dtype": "bfloat16",
        },
        "pack": pack(target).digest,
        "device": {"target": device, "name": name, "mindspore": "2.10.0"},
        "rungs": rungs(target, swapped),
        "questions": [],
    }
    device_report.write_report(path, held | changed)
    return path
