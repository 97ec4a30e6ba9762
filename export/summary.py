"""What one graph of a MindIR file consists of and costs, counted in the file itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from ..convert.planning import size_text
from .flops import PRODUCTS, flops
from .liveness import Live, live
from .mindir import plain, read
from .nodes import AFTER, BEFORE, WRITES, Nodes, flat, read_nodes
from .operators import ROWS

# What graphs for the CPU have besides the operators for Ascend and the products.
PLAIN = (
    "BiasAdd", "Range", "ReduceMean", "Rsqrt", "ScalarToTensor", "Square", "TensorMove", "Tile", "TopK", "ZerosLike",
    "kimi_add_layer_norm", "kimi_add_rms_norm", "kimi_embedding", "kimi_interpolate", "kimi_layer_norm",
    "kimi_rms_norm", "kimi_rotate", "kimi_split", "kimi_swiglu",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One graph. Everything follows from the file."""

    nodes: Nodes

    @classmethod
    def of_file(cls, path: Path) -> Summary:
        """Raises BundleError: it is no MindIR."""
        return cls(read_nodes(read(path)))

    @property
    def operators(self) -> Counter[str]:
        """Nodes by operator, without those that start nothing."""
        return Counter(node.operator for node in self.nodes.nodes if not node.free)

    @property
    def unknown(self) -> list[str]:
        """Operators that no graph of this program has; whether they cost FLOPs is not known."""
        known = {*PRODUCTS, *ROWS, *WRITES, *PLAIN}
        return sorted(set(self.operators) - known)

    @cached_property
    def launches(self) -> dict[str, int]:
        """Nodes that start something, by their place: before the layers, in each of them, after them."""
        places = Counter(self.nodes.places[node.output] for node in self.nodes.nodes if not node.free)
        names = {BEFORE: "before", AFTER: "after"}
        return {names.get(place, f"layer {place}"): n for place, n in sorted(places.items())}

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for v, t in self.nodes.parameters.items() if v not in self.nodes.caches)

    @property
    def cache_bytes(self) -> int:
        return sum(self.nodes.parameters[v].nbytes for v in self.nodes.caches)

    @cached_property
    def live(self) -> Live:
        return live(self.nodes)

    @cached_property
    def flops(self) -> Counter[str]:
        return flops(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "inputs": {plain(v) or v: str(t) for v, t in self.nodes.inputs.items()},
            "outputs": self.outputs,
            "operators": dict(self.operators.most_common()),
            "unknown_operators": self.unknown,
            "sub_graphs": self.nodes.calls,
            "launches": self.launches,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "live_bytes": self.live.nbytes,
            "live_at": str(self.live.node),
            "live_tensors": [{"made_by": m, "tensor": t, "bytes": n} for m, t, n in self.live.tensors[:8]],
            "flops": sum(self.flops.values()),
            "flops_by_operator": dict(self.flops.most_common()),
        }

    @property
    def outputs(self) -> list[str]:

        return [str(t) for t in flat(self.nodes.kind(self.nodes.result))]

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to show: a label and a text."""
        yield "inputs", ", ".join(f"{plain(v) or v} {t}" for v, t in self.nodes.inputs.items())
        yield "outputs", ", ".join(self.outputs)
        yield "held", f"{size_text(self.weight_bytes)} of weights, {size_text(self.cache_bytes)} of cache"
        yield "live", f"{size_text(self.live.nbytes)} at most, at {self.live.node}"
        for maker, tensor, nbytes in self.live.tensors[:3]:
            yield "", f"{size_text(nbytes)}  {tensor} of {maker}"
        yield (
            "FLOPs",
            f"{_count_text(sum(self.flops.values()))}: "
            + ", ".join(f"{name} {_count_text(n)}" for name, n in self.flops.most_common()),
        )
        yield "launches", f"{sum(self.operators.values())}: " + ", ".join(self._grouped_launches())
        yield "operators", ", ".join(f"{name} {n}" for name, n in self.operators.most_common())
        if self.unknown:
            yield "unknown", ", ".join(self.unknown) + "; counted as no FLOPs"
        if self.nodes.calls:
            yield "calls", f"{self.nodes.calls} sub-graphs, which are not counted"

    def _grouped_launches(self) -> Iterator[str]:
        """Layers of equal counts as one."""
        for count, group in groupby(self.launches.items(), key=lambda item: item[1]):
            names = [name for name, _ in group]
            yield (
                f"{names[0]} to {names[-1].removeprefix('layer ')} {count} each"
                if len(names) > 1
                else f"{names[0]} {count}"
            )


def _count_text(n: int) -> str:
    value, unit = float(n), ""
    for larger in ("k", "M", "G", "T"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{' ' if unit else ''}{unit}"
