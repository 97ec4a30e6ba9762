"""A bundle's graphs in MindSpore: loaded with the bundle's own weights, held once, and run on the caches of sequences."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = "REF::"  # a node's op_type: this and the primitive's name
NUMPY = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "bfloat16": np.uint16}


class DeviceBundle:
    """A bundle's manifest and files, without MindSpore. What it does not know in the manifest it leaves alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: dict = json.loads((directory / "bundle.json").read_text(encoding="utf-8"))
        self.graphs: dict[str, dict] = self.manifest["graphs"]
        self.weights: dict[str, dict] = self.manifest["weights"]

    def ports(self, graph: str) -> list[dict]:
        return self.graphs[graph]["inputs"]

    def of_kind(self, *kinds: str, taps: bool = False) -> list[str]:
        """Graphs of some kinds, smallest first: by patches or context, then by tokens."""
        found = [n for n, g in self.graphs.items() if g["kind"] in kinds and g["taps"] == taps]

        def size(name: str) -> tuple[int, int, str]:
            graph = self.graphs[name]
            return graph["patches"] or graph["context"], graph["tokens"] or 0, name

        return sorted(found, key=size)

    def parameter_dtype(self, name: str) -> str:
        return self.manifest["parameter_dtype"] or self.weights[name]["dtype"]

    def array(self, name: str) -> np.ndarray:
        """A weight: as it is stored if that is fp32 or fp16, widened to fp32 if it is bf16."""
        w = self.weights[name]
        stored = np.memmap(
            self.directory / w["file"], NUMPY[w["dtype"]], "r", w["offset"], tuple(w["shape"]) or (1,)
        )
        return widened(stored) if w["dtype"] == "bfloat16" else stored

    @property
    def weight_bytes(self) -> int:
        """Of all weights once, in the dtype that the graphs hold them in."""
        return sum(
            int(np.prod(w["shape"])) * np.dtype(NUMPY[self.parameter_dtype(n)]).itemsize
            for n, w in self.weights.items()
        )


def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 held as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class DeviceGraphs:
    """Graphs of a bundle on the device that MindSpore was set to.

    Weights are tensors that all graphs share. A graph's caches are brought to it from the sequences, and back, only when
    another graph or other sequences ran in between: between two calls of one graph they stay where it wrote them.
    """

    def __init__(self, bundle: DeviceBundle) -> None:
        import mindspore as ms

        self.bundle = bundle
        self._ms = ms
        self._tensors: dict[str, Any] = {}
        self._loaded: dict[str, Graph] = {}
        self._held: tuple[Graph, list, list[int]] | None = None

    def graph(self, name: str) -> Graph:
        if name not in self._loaded:
            record = self.bundle.graphs[name]
            model = read_model(self.bundle.directory / record["file"])
            self._loaded[name] = self.build(model, record)
        return self._loaded[name]

    def build(self, model: Any, record: dict) -> Graph:
        """A graph of a proto, its parameters set: weights from those that are shared, caches to zero."""
        cell = load_bare(model)
        caches = {port["name"]: port for port in record["caches"]}
        held = []
        for name, parameter in cell.parameters_dict().items():
            if name in caches:
                held.append(name)
                parameter.set_data(
                    self.tensor_of(np.zeros(caches[name]["shape"], np.float32), caches[name]["dtype"])
                )
            elif name in self.bundle.weights:
                parameter.set_data(self.weight(name))
            else:
                raise ValueError(f"{record['file']}: {name} has no data in bundle.json; export again")
        return Graph(cell, record, [p for p in record["caches"] if p["name"] in held], self)

    def weight(self, name: str) -> Any:
        """A weight as a tensor, the same one every time."""
        if name not in self._tensors:
            self._tensors[name] = self.tensor_of(self.bundle.array(name), self.bundle.parameter_dtype(name))
        return self._tensors[name]

    def tensor_of(self, array: np.ndarray, dtype: str) -> Any:
        """A tensor on the device of an array in fp32, fp16 or int32; numpy has no bf16, so MindSpore rounds to it."""
        ms = self._ms
        if dtype == "bfloat16":
            tensor = ms.Tensor(np.ascontiguousarray(array, np.float32)).astype(ms.bfloat16)
        else:
            tensor = ms.Tensor.from_numpy(np.array(array, NUMPY[dtype], order="C"))
        target = ms.get_context("device_target")
        return tensor if target == "CPU" else tensor.move_to(target)

    def run(self, name: str, inputs: dict[str, np.ndarray], rows: list) -> list[np.ndarray]:
        """As ``device_play.Run``."""
        graph = self.graph(name)
        if rows:
            self._bring(graph, rows)
        out = graph(inputs)
        if rows:
            self._held = (graph, rows, [row.length + graph.record["tokens"] for row in rows])
        return out

    def _bring(self, graph: Graph, rows: list) -> None:
        if self._held and self._held[0] is graph and all(a is b for a, b in zip(self._held[1], rows)):
            return
        if self._held:
            before, held, filled = self._held
            before.read_caches(held, filled)
            self._held = None
        graph.write_caches(rows)

    def forget(self) -> None:
        """Drops every graph; after a failed kernel a compiled graph is dead."""
        self._held = None
        self._loaded.clear()
        gc.collect()


class Graph:
    """One loaded graph; called with arrays by name, it gives fp32 and int32 arrays."""

    def __init__(self, cell: Any, record: dict, caches: list[dict], owner: DeviceGraphs) -> None:
        self.cell = cell
        self.record = record
        self.ports = caches
        self._owner = owner
        parameters = cell.parameters_dict()
        self.caches = [parameters[port["name"]] for port in caches]

    def inputs(self, arrays: dict[str, np.ndarray]) -> list[Any]:
        return [self._owner.tensor_of(arrays[p["name"]], p["dtype"]) for p in self.record["inputs"]]

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        out = self.cell(*self.inputs(arrays))
        return [to_numpy(o) for o in (out if isinstance(out, (tuple, list)) else (out,))]

    def write_caches(self, rows: list) -> None:
        """Cache parameters from sequences: one parameter of all rows per layer, or one per row."""
        per_row, context = self._per_row(rows), self.record["context"]
        for i, (port, parameter) in enumerate(zip(self.ports, self.caches)):
            layer = i // len(rows) if per_row else i
            held = [rows[i % len(rows)]] if per_row else rows
            content = np.stack([row.buffers[layer][:context] for row in held]).reshape(port["shape"])
            parameter.set_data(self._owner.tensor_of(content, port["dtype"]))

    def read_caches(self, rows: list, filled: list[int]) -> None:
        """Sequences from cache parameters, as many slots of each as are filled."""
        per_row = self._per_row(rows)
        for i, parameter in enumerate(self.caches):
            layer = i // len(rows) if per_row else i
            held = [i % len(rows)] if per_row else range(len(rows))
            content = to_numpy(parameter).reshape(len(held), self.record["context"], -1)
            for b, slots in zip(held, content):
                rows[b].buffers[layer][: filled[b]] = slots[: filled[b]]

    def _per_row(self, rows: list) -> bool:
        layers = len({port["name"].split(".")[1] for port in self.ports})
        return len(self.ports) == layers * len(rows) and len(self.ports[0]["shape"]) == 2


def to_numpy(tensor: Any) -> np.ndarray:
    """A copy: fp32 of a float tensor, all else as it is. On a CPU `asnumpy` alone would go on changing."""
    if "float" in str(tensor.dtype).lower():
        tensor = tensor.float()
    return np.array(tensor.asnumpy())


def zeros(record: dict) -> dict[str, np.ndarray]:
    """Inputs of a graph: token 0 at slot 0, or an empty picture."""
    made = {
        p["name"]: np.zeros(p["shape"], np.int32 if p["dtype"] == "int32" else np.float32)
        for p in record["inputs"]
    }
    if record["kind"] == "vision":
        made["valid"][:] = record["patches"]
    else:
        made["cos"][:] = 1
    return made


# ---- protos ---------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> Any:
    """The ModelProto of a MindIR file."""
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError:
        raise
    except Exception as e:  # protobuf's own class has another name in each of its versions
        raise ValueError(f"{path.name}: is no MindIR ({e}); export again") from None
    return model


def load_bare(model: Any) -> Any:
    """A GraphCell of a proto whose parameters have no data; whoever calls this sets each one."""
    for parameter in model.graph.parameter:
        parameter.ClearField("external_data")
        parameter.ClearField("raw_data")
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "graph.mindir"
        path.write_bytes(model.SerializeToString())
        return cell_of(path)


def cell_of(path: Path) -> Any:
    """A MindIR file as a cell; on a device it runs kernel by kernel, as its operators are documented for."""
    import mindspore as ms
    from mindspore import nn

    cell = nn.GraphCell(ms.load(str(path)))
    if ms.get_context("device_target") != "CPU":
        cell.set_jit_config(ms.JitConfig(jit_level="O0"))
    return cell


def operator(node: Any) -> str:
    """The operator of a node."""
    return node.op_type.removeprefix(REFERENCE).partition(":")[0]


def first_layers(model: Any, count: int) -> Any:
    """A graph with taps cut behind its first `count` decoder layers: it gives each one's output and nothing else.

    Every node that is left is one of the shipped graph.
    """
    cut = type(model).FromString(model.SerializeToString())
    graph = cut.graph
    makers = {name: node for node in graph.node for name in node.output}
    result = makers[graph.output[0].name]
    while operator(result) != "MakeTuple":  # Depend: (the tuple, writes of all layers to wait for)
        result = makers[result.input[0]]
    hidden = makers[result.input[1]]  # Reshape of Stack of a tuple of the layers' outputs
    while operator(hidden) != "MakeTuple":
        hidden = makers[hidden.input[0]]
    values = list(hidden.input)[:count]
    infos = [graph.output[0].attr_info, *(a for a in result.attribute if a.name == "shape")]
    for info in infos:
        kinds = [next(a for a in makers[v].attribute if a.name == "shape") for v in values]
        del info.values[:]
        for kind in kinds:
            info.values.add().CopyFrom(kind)
    result.input[:] = values
    graph.output[0].name = result.output[0]
    keep_needed(graph, makers)
    return cut


def keep_needed(graph: Any, makers: dict[str, Any]) -> None:
    """Drops nodes and parameters that the output does not need."""
    needed, left = set(), [graph.output[0].name]
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left.extend(makers[name].input if name in makers else ())
    for field, kept in (
        (graph.node, [n for n in graph.node if needed.intersection(n.output)]),
        (graph.parameter, [p for p in graph.parameter if p.name in needed]),
    ):
        kept = [type(m).FromString(m.SerializeToString()) for m in kept]
        del field[:]
        field.extend(kept)
