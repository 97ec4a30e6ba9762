"""The network's graphs as MindIR, traced from parameters that own no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import mindspore as ms
from mindspore import nn
from mindspore.common.api import _cell_graph_executor as executor
from mindspore.ops import auto_generate as generated

from ..convert.errors import EnvironmentProblem
from ..modeling.configuration import ModelConfig
from ..modeling.graphs import LastLogitsGraph, TextGraph, VisionGraph
from ..modeling.kernels import get_kernels, library
from ..modeling.language import LanguageModel
from ..modeling.shapes import Ports
from ..modeling.vision import MoonViT, Projector
from . import mindir
from .errors import ExportError
from .operators import GE
from .plan import CPU_OPERATORS, VISION, GraphPlan, Target
from .proto import pb
from .scaling import Lengths, Unlike, scaled

_DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16, "int32": ms.int32}


class Tracer:
    """Builds the network once, without weights, and traces its graphs one by one.

    Args:
        stored: dtype of the weights as they are stored; default: what the target computes in.

    Raises:
        EnvironmentProblem: the installed MindSpore is too old for an operator that was asked for, or the library of
            operators cannot be used.
    """

    def __init__(self, config: ModelConfig, target: Target, batch: int, stored: str | None = None) -> None:
        if target.cache_write == "index-copy" and not hasattr(generated, "InplaceIndexCopy"):
            raise EnvironmentProblem(
                f"MindSpore {ms.__version__}: has no InplaceIndexCopy for --cache-write index-copy; choose another write, or "
                "install 2.10"
            )
        self.config = config
        self.target = target
        self.batch = batch
        if target.kernels == CPU_OPERATORS and (reason := library.why_not()):
            raise EnvironmentProblem(f"CPU operators: {reason}; or export with {library.SWITCH}=off")
        self.dtype = _DTYPES[target.dtype]
        held = _DTYPES[target.parameter_dtype(stored or target.dtype)]
        self.kernels = get_kernels(target.kernels, **target.variants)
        self.vision_tower = MoonViT(self.kernels, held, config.vision)
        self.projector = Projector(self.kernels, held, config)
        self.language_model = LanguageModel(self.kernels, held, config.text)

    def cell(self, graph: GraphPlan) -> nn.Cell:
        """The cell that `graph` is the plan of."""
        if graph.kind == VISION:
            return VisionGraph(self.vision_tower, self.projector, self.config, graph.taps)
        assert graph.tokens and graph.context, "a text graph has both"
        build = TextGraph if graph.all_logits else LastLogitsGraph
        return build(
            self.language_model,
            self.kernels,
            self.config,
            self.batch,
            graph.tokens,
            graph.context,
            self.dtype,
            graph.taps,
        )

    def trace(self, graph: GraphPlan) -> Any:
        """The normalised ModelProto of a graph; its parameters have no data.

        Raises:
            ExportError: the traced graph is not what the plan says.
        """
        model = _trace(self.cell(graph), graph.inputs)
        if self.target.runtime == GE:
            mindir.numbers_as_tensors(model)
        mindir.normalise(model)
        return _checked(graph, model)

    def family(self, graphs: Sequence[GraphPlan]) -> Iterator[tuple[GraphPlan, Any]]:
        """Graphs of one kind, ascending, and the ModelProto of each, which the caller may change.

        The smallest and the largest are traced, and what lies between follows where these two differ in nothing but their
        length (see ``scaling``); what does not is the smallest of the next round.
        """
        *left, last = graphs
        largest = self.trace(last)
        while left:
            first, *others = left
            model = self.trace(first)
            left = []
            for graph in others:
                try:
                    between = scaled(model, largest, Lengths(first.length, last.length, graph.length))
                except Unlike:
                    left.append(graph)
                else:
                    yield graph, _checked(graph, between)
            yield first, model
        yield last, largest


def _checked(graph: GraphPlan, model: Any) -> Any:
    """`model`. Raises ExportError: it is not what the plan says."""
    found = mindir.inputs(model)
    if list(found.items()) != list(graph.inputs.items()):
        raise ExportError(f"{graph.name}: the traced graph takes {found}, expected {graph.inputs}")
    given = mindir.outputs(model)
    if given != list(graph.outputs.values()):
        raise ExportError(f"{graph.name}: the traced graph gives {given}, expected {graph.outputs}")
    caches = {n: spec for n, spec in mindir.parameters(model).items() if n in graph.caches}
    if caches != graph.caches:
        raise ExportError(f"{graph.name}: the traced graph has caches {caches}, expected {graph.caches}")
    return model


def _trace(cell: nn.Cell, inputs: Ports) -> Any:
    """Compile for export and describe as a proto; no parameter's data is read."""
    cell.set_train(False)
    # MindSpore 2.7 would give the parameters memory after it has compiled.
    object.__setattr__(cell, "init_parameters_data", lambda **_: {})
    # Without the meta device MindSpore 2.10 allocates the inputs; before 2.10 there is none and nothing is allocated.
    with ms.DeviceCtx("meta") if hasattr(ms, "DeviceCtx") else nullcontext():
        tensors = [ms.Tensor(shape=shape, dtype=_DTYPES[dtype]) for shape, dtype in inputs.values()]
    phase, _ = executor.compile(cell, *tensors, phase="export.mindir", do_convert=False)
    model = pb.ModelProto()
    model.ParseFromString(executor._get_func_graph_proto(cell, phase, "mind_ir", incremental=False))
    return model
