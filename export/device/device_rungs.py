"""The rungs of the ladder, from the bottom. Each is a list of items, and each item says whether it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from device_machine import Context, Items, device, environment, files, imported, pack
from device_memory import cache, capture, sharing, timing
from device_network import against_the_pack, graphs, layer, load, operators, tokens


@dataclass(frozen=True)
class Rung:
    name: str
    what: str
    items: Callable[[Context], Items]


RUNGS = (
    Rung("environment", "the machine and what is installed", environment),
    Rung("files", "the bundle's files are those that were recorded", files),
    Rung("pack", "the golden pack is whole and for this bundle", pack),
    Rung("import", "MindSpore is imported", imported),
    Rung("device", "the device is there and adds", device),
    Rung("load", "ms.load and GraphCell with the weights that the graphs name", load),
    Rung("operators", "each operator at the bundle's shapes, reloaded alone, against plain numpy", operators),
    Rung("layer", "the first layers alone", layer),
    Rung("graphs", "every graph loaded and run once, memory after each", graphs),
    Rung("vision", "vision graphs against the reference", against_the_pack("vision")),
    Rung("prefill", "prefill graphs against the reference", against_the_pack("prefill")),
    Rung("decode", "cached decoding against the reference", against_the_pack("decode")),
    Rung("cache", "cache writes: in place, and before the read", cache),
    Rung("sharing", "prefill and decode share weights and caches", sharing),
    Rung("tokens", "greedy tokens against the reference", tokens),
    Rung("capture", "kernel-launch capture off and on", capture),
    Rung("timing", "time of each graph (information)", timing),
)
BY_NAME = {rung.name: rung for rung in RUNGS}
