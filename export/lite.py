"""A bundle of target lite on a device: MindSpore Lite runs the graphs, the engine feeds them. No MindSpore is imported.

All models of a bundle are in one ModelGroup, so they share weights and the caches, which Lite calls RefData. Those it
finds by name and refuses in another size, so there is one context. They stay on the device from call to call and nothing
reads them back, so there is one sequence at a time.

It has run on no device. Names, signatures and behaviour are those of MindSpore Lite's Python documentation (2.10) and of
its sources (python/api/model.py, context.py, tensor.py; extendrt/delegate/ascend_ge/ge_graph_executor.cc).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.transforms import DTYPES
from ..modeling.cache import CacheRow
from ..modeling.configuration import ModelConfig
from ..modeling.engine import Arrays
from .bundle import MANIFEST, Bundle, GraphRecord
from .errors import BundleError
from .plan import DECODE, PREFILL, PREFILL_LOGITS, VISION

CONFIGURATION = "lite.ini"
# Of the bundle's weights nothing is changed: Lite's own default would make fp16 of bf16.
PRECISION = "enforce_origin"
_NUMPY = DTYPES | {"int32": np.dtype(np.int32)}


class LiteGraphs:
    """See `engine.Graphs`. Models are built when they are first used.

    Args:
        context: cache slots, one of the bundle's contexts. Default: the largest.
        device: the device's number.

    Attributes:
        config: of the model.

    Raises:
        BundleError: it is no bundle, or of another target, or its graphs take several rows.
        ImportError: mindspore_lite is not installed.
    """

    def __init__(self, directory: str | Path, context: int | None = None, device: int = 0) -> None:
        self._directory = Path(directory).resolve()
        self._bundle = Bundle.load(self._directory)
        if self._bundle.target != "lite":
            raise BundleError(f"{directory}: is for {self._bundle.target}; export with --target lite")
        if self._bundle.batch != 1:
            raise BundleError(
                f"{directory}: has graphs for {self._bundle.batch} rows, but a cache that stays on the device holds one "
                "sequence; export with --batch 1"
            )
        if context not in (None, *self._bundle.contexts):
            raise BundleError(f"{directory}: has contexts {self._bundle.contexts}, not {context}")
        self.config = ModelConfig.from_file(self._directory)
        self.contexts: Sequence[int] = (context or self._bundle.contexts[-1],)
        self.patches: Sequence[int] = self._bundle.patches
        self.chunk = self._bundle.prefill_chunk
        self.smaller_chunks: Sequence[int] = self._bundle.smaller_chunks
        self.together = False  # there is one row
        import mindspore_lite

        self._lite: Any = mindspore_lite
        self._group = self._lite.ModelGroup(self._lite.ModelGroupFlag.SHARE_WEIGHT)
        self._context = self._lite.Context()
        self._context.target = ["ascend"]
        self._context.ascend.device_id = device
        self._context.ascend.provider = "ge"
        self._context.ascend.precision_mode = PRECISION
        self._models: dict[str, Any] = {}
        self._row: CacheRow | None = None

    def batch(self, rows: int) -> int:
        return 1

    def vision(self, patches: int, inputs: Arrays, taps: bool) -> list[np.ndarray]:
        return self._run(self._named(VISION, patches, taps), inputs)

    def text(
        self,
        tokens: int,
        context: int,
        rows: Sequence[CacheRow],
        inputs: Arrays,
        all_logits: bool,
        taps: bool,
    ) -> list[np.ndarray]:
        """Raises BundleError: the row's tokens are not those in the device's cache."""
        (row,) = rows
        if row.length and row is not self._row:
            raise BundleError(
                f"{self._directory}: the device's cache holds another sequence; run these {row.length} tokens again first"
            )
        self._row = row
        kind = DECODE if tokens == 1 else PREFILL_LOGITS if all_logits else PREFILL
        return self._run(self._named(kind, context, taps, tokens), inputs)

    def _named(self, kind: str, size: int, taps: bool, tokens: int | None = None) -> str:
        """The graph of a kind, of so many `tokens`, and a size."""
        for name, graph in self._bundle.graphs.items():
            found = (graph.kind, graph.taps, graph.tokens)
            if found == (kind, taps, tokens) and size in (graph.patches, graph.context):
                return name
        raise BundleError(
            f"{self._directory}: has no {kind} graph of size {f'{tokens} x ' if tokens else ''}{size}"
            f"{' with taps' if taps else ''}; export again"
        )

    def _run(self, name: str, inputs: Arrays) -> list[np.ndarray]:
        record = self._bundle.graphs[name]
        model = self._model(name, record)
        tensors = model.get_inputs()
        for tensor, port in zip(tensors, record.inputs, strict=True):
            if tuple(tensor.shape) != port.shape:
                raise BundleError(
                    f"{self._directory / record.file}: takes {port.name} {list(tensor.shape)}, {MANIFEST} has "
                    f"{list(port.shape)}; export again"
                )
            tensor.set_data_from_numpy(np.ascontiguousarray(inputs[port.name], _NUMPY[port.dtype]))
        outputs = [tensor.get_data_to_numpy() for tensor in model.predict(tensors)]
        return [
            np.asarray(output, np.int32 if port.dtype == "int32" else np.float32).reshape(port.shape)
            for output, port in zip(outputs, record.outputs, strict=True)
        ]

    def _model(self, name: str, record: GraphRecord) -> Any:
        if name not in self._models:
            model = self._lite.Model()
            self._group.add_model([model])  # before it is built
            model.build_from_file(
                str(self._directory / record.file),
                self._lite.ModelType.MINDIR,
                self._context,
                str(self._directory / CONFIGURATION),
            )
            self._models[name] = model
        return self._models[name]
