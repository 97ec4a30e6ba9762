"""What a bundle needs on a device: weights once, the graphs' caches, and the largest set of tensors of a graph at once.

Before an export that is found by tracing. A formula would have to be trusted, and would follow no change of the kernels;
tracing the largest graph of each kind takes ten seconds for 27 layers. But layers run one after the other, and those of a
kind hold the same: a network with the first layers alone, of which one comes after the tables that all share are made,
needs the same memory to the byte, and is traced in three seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..convert.planning import size_text
from .errors import ExportError
from .plan import DECODE, VISION, BundlePlan


@dataclass(frozen=True)
class DeviceMemory:
    """In bytes. Not counted: what kernels need while they work, and what the runtime itself takes.

    Attributes:
        live: inputs, outputs and intermediates of `graph`, the one that has most at once.
    """

    weights: int
    caches: int
    live: int
    graph: str

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.live

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total": self.total}

    def check(self, gigabytes: float) -> None:
        """Raises ExportError: a device of so many GB is too small; the message names what to reduce."""
        if self.total <= gigabytes * 1e9:
            return
        if self.weights > gigabytes * 1e9:
            reduce = "the weights alone are too large for one device"
        elif self.caches >= self.live:
            reduce = "reduce --seq or --batch"
        elif self.graph.startswith(VISION):
            reduce = "reduce --image-patches or --seq"
        else:
            reduce = (
                "reduce --seq or --batch"
                if self.graph.startswith(DECODE)
                else "reduce --prefill-chunk or --seq"
            )
        raise ExportError(f"--device-memory: {gigabytes:g} GB, but {self}; {reduce}")

    def __str__(self) -> str:
        return (
            f"{size_text(self.total)} are needed on the device: {size_text(self.weights)} of weights, "
            f"{size_text(self.caches)} of cache, and {size_text(self.live)} live at once in {self.graph}"
        )


def of_graphs(plan: BundlePlan, live_bytes: Mapping[str, int]) -> DeviceMemory:
    """From the live bytes of graphs by name. Those with taps, which only verification runs, are left out."""
    shipped = {
        name: n for name, n in live_bytes.items() if name in {g.name for g in plan.graphs if not g.taps}
    }
    graph = max(shipped, key=lambda name: shipped[name])
    return DeviceMemory(plan.weight_bytes, plan.cache_bytes, shipped[graph], graph)


def estimate(plan: BundlePlan, progress: Callable[[str], object] = lambda name: None) -> DeviceMemory:
    """Before an export; see the module. `progress` is called with each graph's name."""
    from .liveness import live
    from .nodes import read_nodes
    from .trace import Tracer

    short = plan.shortened()
    tracer = Tracer(short.config, plan.target, plan.batch, plan.weights.dtype)
    found = {}
    for graph in short.graphs:
        progress(graph.name)
        found[graph.name] = live(read_nodes(tracer.trace(graph))).nbytes
    return of_graphs(plan, found)
