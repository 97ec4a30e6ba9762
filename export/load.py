"""`MindIRModel`: a bundle that runs, with the same call and the same `generate` as the network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import mindspore as ms
import numpy as np
from mindspore import nn

from ..modeling import running
from ..modeling.binding import bind
from ..modeling.cache import CacheRow
from ..modeling.configuration import ModelConfig
from ..modeling.engine import Arrays, Engine
from ..modeling.generation import KimiVLGeneration
from ..modeling.kernels import library
from ..modeling.modeling_kimi_vl import mindspore_dtype
from ..modeling.settings import generation_settings
from . import mindir
from .bundle import MANIFEST, Bundle, GraphRecord
from .errors import BundleError
from .plan import CPU_OPERATORS, DECODE, FLAT_WRITES, PREFILL, PREFILL_LOGITS, VISION
from .weights import SharedWeights, check_files


class MindIRModel(KimiVLGeneration):
    """A reloaded bundle. Call it (see :meth:`KimiVLForward.forward`) or :meth:`generate`.

    Graphs are loaded when first used. A batch larger than the bundle's runs in groups. Taps and hidden states need a
    bundle that was exported with them.

    Attributes:
        bundle: its manifest.
        config: its KimiVLConfig.
        dtype: what the weights are rounded to; graphs may hold them wider.
    """

    def __init__(self, directory: Path, bundle: Bundle, weights: SharedWeights) -> None:
        from ..modeling.configuration_kimi_vl import KimiVLConfig

        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = ModelConfig.from_dict(raw)
        self.bundle = bundle
        self.config = KimiVLConfig.from_dict(raw)
        self.dtype = mindspore_dtype(bundle.dtype)
        self.generation_config = generation_settings(directory, config)
        self.weights = weights
        self.cpu_operators = bundle.kernels == CPU_OPERATORS
        self.engine = Engine(config, BundleGraphs(directory, bundle, weights, together=rows_together(bundle)))

    @classmethod
    def from_bundle(cls, directory: str | Path, verify: bool | None = None) -> MindIRModel:
        """A bundle that ``export-mindir`` wrote, for the device that MindSpore runs on, checked against its manifest.

        Sizes, headers, graphs, the configuration and all small tensors are checked each time. Large tensors are read
        and checked by the first load on a machine, which takes as long as reading the files; later loads take that as
        done as long as size, inode and times of a file stay the same.

        Args:
            verify: True reads and checks the large tensors and all other files again, False leaves them unread.

        Raises:
            BundleError: it is no bundle, is damaged, or is for another target; the message says which file and how.
        """
        path = Path(directory)
        bundle = Bundle.load(path)
        _check_device(path, bundle)
        check_files(path, bundle, bool(verify))
        return cls(path, bundle, SharedWeights(path, bundle, verify))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`KimiVLForward.forward`."""
        return self.forward(*args, **kwargs)

    def array(self, name: str) -> np.ndarray:
        return self.weights.array(name)

    @property
    def used(self) -> set[str]:
        """Names of the graphs that ran so far."""
        return set(cast(BundleGraphs, self.engine.graphs).loaded)


def rows_together(bundle: Bundle) -> bool:
    """Whether a cache parameter holds all rows of a batch: it has an axis for them, or their slots follow each other."""
    caches = (port for graph in bundle.graphs.values() for port in graph.caches)
    return bundle.cache_write in FLAT_WRITES or any(len(port.shape) == 4 for port in caches)


def _check_device(directory: Path, bundle: Bundle) -> None:
    """Raises BundleError: MindSpore runs on something that the graphs are not for, or their caches are not kept here."""
    device = running.device()
    if device.lower() == bundle.target:
        if bundle.kernels == CPU_OPERATORS and (reason := library.why_not()):
            raise BundleError(
                f"{directory}: its graphs call the library of CPU operators, which is {reason}; or export again with "
                f"{library.SWITCH}=off"
            )
        return
    if device == "CPU":
        raise BundleError(
            f"{directory}: is for {bundle.target}, whose operators have no CPU kernels, but MindSpore runs on CPU; "
            "export with --target cpu to run it here"
        )
    raise BundleError(
        f"{directory}: is for {bundle.target}, but MindSpore runs on {device}; "
        f"export with --target {device.lower()}, or choose the other device with mindspore.set_device first"
    )


class RunnableGraph(Protocol):
    """One graph of a bundle."""

    def run(self, inputs: Arrays, rows: Sequence[Any] = ()) -> list[np.ndarray]:
        """The outputs for these inputs; a text graph reads and extends the caches of `rows`."""


class BundleGraphs:
    """Loads graphs when they are first needed. See `engine.Graphs`.

    `load` makes one of directory, name, bundle and weights; default: :class:`LoadedGraph`. `together` says that it runs
    on rows of one batch, whose cache the graph keeps; if not, on rows with buffers of their own.

    Attributes:
        loaded: graphs by name, each from its first use on.
    """

    def __init__(
        self,
        directory: Path,
        bundle: Bundle,
        weights: SharedWeights,
        load: Callable[[Path, str, Bundle, SharedWeights], RunnableGraph] | None = None,
        together: bool = False,
    ) -> None:
        self._directory = directory
        self._bundle = bundle
        self._weights = weights
        self._load: Callable[[Path, str, Bundle, SharedWeights], RunnableGraph] = load or LoadedGraph
        self.loaded: dict[str, RunnableGraph] = {}
        self.contexts: Sequence[int] = bundle.contexts
        self.patches: Sequence[int] = bundle.patches
        self.chunk = bundle.prefill_chunk
        self.smaller_chunks: Sequence[int] = bundle.smaller_chunks
        self.together = together

    def batch(self, rows: int) -> int:
        return self._bundle.batch

    def vision(self, patches: int, inputs: Arrays, taps: bool) -> list[np.ndarray]:
        return self._graph(VISION, patches, taps).run(inputs)

    def text(
        self,
        tokens: int,
        context: int,
        rows: Sequence[CacheRow],
        inputs: Arrays,
        all_logits: bool,
        taps: bool,
    ) -> list[np.ndarray]:
        kind = DECODE if tokens == 1 else PREFILL_LOGITS if all_logits else PREFILL
        return self._graph(kind, context, taps, tokens).run(inputs, rows)

    def _graph(self, kind: str, size: int, taps: bool, tokens: int | None = None) -> RunnableGraph:
        """The smallest graph of a kind, and of so many `tokens`, with at least `size` patches or cache slots."""
        fit = {
            (g.context or g.patches or 0): name
            for name, g in self._bundle.graphs.items()
            if (g.kind, g.taps, g.tokens) == (kind, taps, tokens) and (g.context or g.patches or 0) >= size
        }
        if not fit:
            raise BundleError(
                f"{self._directory}: has no {kind} graph of size {f'{tokens} x ' if tokens else ''}{size}"
                + (" with taps; export with --taps for taps and hidden states" if taps else "; export again")
            )
        name = fit[min(fit)]
        if name not in self.loaded:
            self.loaded[name] = self._load(self._directory, name, self._bundle, self._weights)
        return self.loaded[name]


class LoadedGraph:
    """One graph, its weights set from those that all graphs share, its caches whatever rows it runs on.

    Raises:
        BundleError: the graph and the manifest contradict each other; a parameter that was not set would be arbitrary
            memory.
    """

    def __init__(self, directory: Path, name: str, bundle: Bundle, weights: SharedWeights) -> None:
        self._record: GraphRecord = bundle.graphs[name]
        self._path = directory / self._record.file
        self._cell = running.prepared(nn.GraphCell(self._load(bundle)))
        parameters = self._cell.parameters_dict()
        caches = {port.name: (port.shape, port.dtype) for port in self._record.caches}
        left = set(caches)
        for parameter_name, parameter in parameters.items():
            found = (tuple(parameter.shape), running.name(parameter.dtype))
            if parameter_name in caches:
                left.discard(parameter_name)
                expected = caches[parameter_name]
            elif parameter_name in weights:
                weight = bundle.weights[parameter_name]
                expected = (weight.shape, bundle.parameter_dtype or weight.dtype)
                parameter.set_data(weights.tensor(parameter_name))
            else:
                raise BundleError(f"{self._path}: {parameter_name} has no data in the bundle; export again")
            if found != expected:
                raise BundleError(
                    f"{self._path}: {parameter_name} is {found[1]} {list(found[0])}, {MANIFEST} has "
                    f"{expected[1]} {list(expected[0])}; export again"
                )
        if left:
            raise BundleError(
                f"{self._path}: does not take {min(left)}, which {MANIFEST} names; export again"
            )
        if caches:
            held = [parameters[port.name] for port in self._record.caches]
            self._caches = bind(held, self._record.context or 0, rows_together(bundle))

    def run(self, inputs: Arrays, rows: Sequence[CacheRow] = ()) -> list[np.ndarray]:
        """The outputs for these inputs; a text graph reads and extends the caches of `rows`."""
        dtypes = {port.name: port.dtype for port in self._record.inputs}
        if self._record.tokens is None:
            return running.run_cell(self._cell, dtypes, inputs)
        with self._caches.holding(rows, self._record.tokens):
            return running.run_cell(self._cell, dtypes, inputs)

    def _load(self, bundle: Bundle) -> Any:
        """MindSpore's graph, without any data of its own: `ms.load` would read a copy of the weights for each graph."""
        if not self._record.external_data and bundle.kernels != CPU_OPERATORS:
            return ms.load(str(self._path))
        model = mindir.read(self._path)
        for name, place in mindir.pointing(model).items():
            weight = bundle.weights.get(name)
            if weight is None or place != (weight.file, weight.offset, weight.nbytes):
                raise BundleError(f"{self._path}: {name} is not where {MANIFEST} says; export again")
        mindir.point_at(model, {})
        mindir.set_library(model, library.path())
        with tempfile.TemporaryDirectory() as temporary:
            bare = Path(temporary) / self._path.name
            bare.write_bytes(mindir.serialise(model))
            return ms.load(str(bare))
