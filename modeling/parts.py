"""The network in parts, on a machine that cannot hold it whole: one decoder layer at a time.

The cells are the network's own (`graphs`). A part is compiled once for each shape; the next layer's weights are set into
the same parameters. What a part is fed with, and in which order, is the caller's.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from . import running
from .binding import Binding, bind
from .buckets import contexts, patch_buckets
from .cache import CacheRow
from .configuration import ModelConfig
from .engine import Arrays, Engine, Row, RowOutput
from .forward import spread
from .graphs import HeadGraph, LayersGraph, VisionGraph
from .kernels import get_kernels, library
from .language import LanguageModel
from .parameters import no_init_parameters
from .shapes import Ports, layers_inputs, vision_inputs
from .vision import MoonViT, Projector

LAYER = "language_model.model.layers."


class NetworkInParts:
    """Runs the vision tower, a decoder layer or the head. One part holds weights, from `hold_...` to :meth:`release`.

    Args:
        weights: a converted directory's, see `convert.converted`.
        max_context, prefill_chunk, max_image_patches: as of `KimiVLForConditionalGeneration`.
    """

    def __init__(self, weights: Any, max_context: int, prefill_chunk: int, max_image_patches: int) -> None:
        self.config: ModelConfig = weights.config
        self._weights = weights
        self._kernels = get_kernels("cpu" if library.available() else "plain")
        self._sizes = contexts(max_context), patch_buckets(max_image_patches), min(prefill_chunk, max_context)
        self._kinds: dict[str, PartGraphs] = {}

    # Holding weights ---------------------------------------------------------------------------------------------

    def hold_vision(self) -> None:
        """The vision tower and the projector."""
        self._turn_to("vision", self.config)
        self._fill("", "")

    def hold_layer(self, layer: int) -> None:
        """Decoder layer `layer`; graphs that were compiled for another one of its kind serve it too."""
        moe = self.config.text.is_moe(layer)
        # Of the vocabulary nothing is used here.
        text = replace(self.config.text, num_hidden_layers=1, vocab_size=1, moe_layer_freq=1)
        alone = replace(self.config, text=replace(text, first_k_dense_replace=0 if moe else 1))
        self._turn_to("moe" if moe else "dense", alone)
        self._fill("model.layers.0.", f"{LAYER}{layer}.")

    def hold_head(self) -> None:
        """The final norm and the head."""
        self._turn_to("head", replace(self.config, text=replace(self.config.text, num_hidden_layers=0)))
        for name in ("model.norm.", "lm_head."):
            self._fill(name, f"language_model.{name}")

    def release(self) -> None:
        """Gives the weights' memory back. Compiled graphs stay, for the next part of the same kind."""
        self._part.room.release()

    def _turn_to(self, kind: str, config: ModelConfig) -> None:
        if kind not in self._kinds:
            self._kinds[kind] = PartGraphs(kind, config, self._kernels, *self._sizes)
        self._part = self._kinds[kind]

    def _fill(self, ours: str, stored: str) -> None:
        """Sets the part's parameters whose path begins with `ours` from the weights that begin with `stored`."""
        for path, parameter in self._part.cell.parameters_and_names():
            if path.startswith(ours):
                name = stored + path.removeprefix(ours)
                buffer = self._part.room.buffer(
                    path, parameter.shape, running.NUMPY[running.name(parameter.dtype)]
                )
                buffer[...] = self._weights.read(name)
                self._weights.forget(name)
                parameter.set_data(ms.Tensor.from_numpy(buffer))

    # Running -----------------------------------------------------------------------------------------------------

    def vision(self, pixel_values: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all pictures, the tower's output [N / 4, 4, D] and the projected features [N / 4, H]."""
        features, towers = Engine(self.config, self._part).encode_images(pixel_values, grids, taps=True)
        return np.concatenate(towers), np.concatenate(features)

    def embed(self, ids: np.ndarray, mask: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        """The first layer's input [B, S, H] for ids [B, S], zeros where `mask` [B, S] is False.

        Only the table's rows for these ids are read; no part has to hold weights.
        """
        name = "language_model.model.embed_tokens.weight"
        out = self._weights.read(name)[np.where(mask, ids, 0)].astype(np.float32)
        self._weights.forget(name)
        if features is not None:
            out[mask & (ids == self.config.media_placeholder_token_id)] = features
        out[~mask] = 0
        return out

    def layer(
        self, x: np.ndarray, mask: np.ndarray, calls: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The layer's output [B, S, H] and the chosen experts [B, S, k] of x [B, S, H], sorted by number.

        Args:
            mask: [B, S] bool, True = a token; elsewhere the results are 0 and -1.
            calls: columns of x that each call takes; all continue one cache, which begins empty.
        """
        rows = self._calls(x, mask, calls, taps=True)
        hidden = spread([[h[0] for h in r.hidden_states] for r in rows], mask, x.shape[-1])
        if not self._part.config.text.moe_layers:
            return hidden, None
        chosen = [[np.sort(c[0], -1) for c in r.router_topk_indices] for r in rows]
        return hidden, spread(chosen, mask, self.config.text.num_experts_per_tok, fill=-1)

    def head(self, x: np.ndarray, mask: np.ndarray, calls: Sequence[int]) -> np.ndarray:
        """Logits [B, S, V], zeros where `mask` is False, in the same calls as the layers."""
        rows = self._calls(x, mask, calls, taps=False)
        return spread([r.logits for r in rows], mask, self.config.text.vocab_size)

    def _calls(self, x: np.ndarray, mask: np.ndarray, calls: Sequence[int], taps: bool) -> list[RowOutput]:
        engine = Engine(self._part.config, self._part)
        cache, at = engine.new_cache(len(x)), 0
        outputs = [RowOutput() for _ in x]
        for n in calls:
            columns = slice(at, at + n)
            rows = []
            for of_row, tokens in zip(x[:, columns], mask[:, columns]):
                count = int(tokens.sum())
                rows.append(Row(np.zeros(count, np.int64), of_row[tokens], np.ones(count, np.int64)))
            for whole, more in zip(outputs, engine.extend(cache, rows, all_logits=True, taps=taps)):
                whole.logits += more.logits
                whole.hidden_states += more.hidden_states
                whole.router_topk_indices += more.router_topk_indices
            at += n
        return outputs


class Room:
    """Memory for a part's weights: the same for each layer, and the system's as long as none is held.

    A compiled graph keeps a parameter's memory until it runs with another one, so memory that comes and goes with the
    tensors would be that of two layers.
    """

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The array of a name; its content is what was written since the last release, else zeros."""
        if name not in self._maps:
            nbytes = math.prod(shape) * dtype.itemsize
            self._maps[name] = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(self._maps[name], dtype, math.prod(shape)).reshape(shape)

    def release(self) -> None:
        """Gives the pages back; whoever has the arrays still may read them, as zeros."""
        for room in self._maps.values():
            room.madvise(mmap.MADV_DONTNEED)


class PartGraphs:
    """The graphs of one part, compiled when they are first needed. See `engine.Graphs`."""

    def __init__(
        self,
        kind: str,
        config: ModelConfig,
        kernels: Any,
        contexts: Sequence[int],
        patches: Sequence[int],
        chunk: int,
    ) -> None:
        self.kind, self.config = kind, config
        self.contexts, self.patches, self.chunk = contexts, patches, chunk
        self.smaller_chunks: Sequence[int] = ()
        self.together = len(kernels.cache_shapes(2, 1, 1)) == 1
        dtype = running.DTYPES[config.dtype]
        held, self._activation = kernels.parameter_dtype(dtype), kernels.activation_dtype(dtype)
        self._kernels = kernels
        self.room = Room()
        self._graphs: dict[tuple[int, ...], nn.Cell] = {}
        self._bindings: dict[tuple[int, ...], Binding] = {}
        with no_init_parameters():
            if kind == "vision":
                tower, projector = MoonViT(kernels, held, config.vision), Projector(kernels, held, config)
                self.cell: nn.Cell = VisionGraph(tower, projector, config, taps=True)
            else:
                self.cell = LanguageModel(kernels, held, config.text)

    def batch(self, rows: int) -> int:
        return rows

    def vision(self, patches: int, inputs: Arrays, taps: bool) -> list[np.ndarray]:
        cells = self.cell.vision_tower, self.cell.multi_modal_projector
        graph = self._graph((patches,), lambda: VisionGraph(*cells, self.config, taps=True))
        return self._run(graph, vision_inputs(self.config, patches), inputs)

    def text(
        self,
        tokens: int,
        context: int,
        rows: Sequence[CacheRow],
        inputs: Arrays,
        all_logits: bool,
        taps: bool,
    ) -> list[np.ndarray]:
        batch = len(rows)
        ports = layers_inputs(self.config, batch, tokens)
        if self.kind == "head":
            graph = self._graph((batch, tokens), lambda: HeadGraph(self.cell))
            return self._run(graph, {"embeds": ports["embeds"]}, inputs)
        sizes = batch, tokens, context
        graph = self._graph(
            sizes,
            lambda: LayersGraph(self.cell, self._kernels, self.config, *sizes, self._activation, taps=True),
        )
        if sizes not in self._bindings:
            self._bindings[sizes] = bind(graph.caches, context, self.together)
        with self._bindings[sizes].holding(rows, tokens):
            out = self._run(graph, ports, inputs)
        return [np.empty((batch, tokens, 0), np.float32), *out]  # a layer has no logits

    def _graph(self, sizes: tuple[int, ...], build: Callable[[], nn.Cell]) -> nn.Cell:
        if sizes not in self._graphs:
            self._graphs[sizes] = running.prepared(build())
        return self._graphs[sizes]

    def _run(self, graph: nn.Cell, ports: Ports, inputs: Arrays) -> list[np.ndarray]:
        activation = running.name(self._activation)
        dtypes = {name: activation if dtype == "float" else dtype for name, (_, dtype) in ports.items()}
        return running.run_cell(graph, dtypes, inputs)
