"""What a candidate's graphs hold at named points while a case runs: brought to the layout of the case, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..modeling.cache import LatentCache, RowCache
from ..modeling.configuration import ModelConfig
from ..modeling.engine import Arrays
from .cases import Case
from .interpreted import InterpretedGraph, InterpretedModel
from .mindir.values import Value, to_numpy, wide
from .places import Place, find
from .points import Stage

HIDDEN = -1e29  # a score below it is masked: no other comes near


@dataclass(frozen=True)
class Held:
    """The tokens of one row of the case in a graph call: its tokens `start` to `start + count` are the first of `place`."""

    row: int
    place: int
    start: int
    count: int


@dataclass(frozen=True)
class Seen:
    """One graph call.

    Attributes:
        call: of the case, from 0 on; `picture` of a vision graph.
        rows: of a text graph.
        values: by stage and point, laid out as `arranged` says.
        places: by stage and point, where they are in the graph.
    """

    call: int
    graph: str
    kind: str
    picture: int
    rows: tuple[Held, ...]
    values: dict[str, dict[str, np.ndarray]]
    places: dict[str, dict[str, Place]]


@dataclass
class Watching:
    """Runs a case and keeps the points of some stages. See `interpreted.Watcher`."""

    model: InterpretedModel
    case: Case
    stages: Sequence[Stage]
    calls: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.model.engine.config
        self._places: dict[str, dict[str, dict[str, Place]]] = {}
        self._call = self._pictures = 0
        self.features: np.ndarray | None = None

    def run(self) -> list[Seen]:
        """All graph calls of the case."""
        inputs = self.case.inputs
        self._mask = inputs["attention_mask"].astype(bool)
        self._cache: LatentCache = self.model.engine.new_cache(len(self._mask))
        self.model.watcher = self
        at = 0
        try:
            for call, n in enumerate(self.case.calls):
                self._call = call
                self._until = self._mask[:, : at + n].sum(1)
                arguments: dict[str, Any] = {
                    "input_ids": inputs["input_ids"][:, at : at + n],
                    "attention_mask": inputs["attention_mask"][:, : at + n],
                }
                if at == 0 and "pixel_values" in inputs:
                    arguments |= {k: inputs[k] for k in ("pixel_values", "image_grid_hws")}
                out = self.model(**arguments, past_key_values=self._cache)
                if at == 0 and out.image_hidden_states is not None:
                    self.features = out.image_hidden_states.asnumpy()
                at += n
        finally:
            self.model.watcher = None
        return self.calls

    # As a watcher ----------------------------------------------------------------------------------------------------

    def wanted(self, graph: InterpretedGraph) -> Iterable[str]:
        if graph.name not in self._places:
            vision = graph.record.kind == "vision"
            self._places[graph.name] = {
                stage.name: find(graph.graph, self.config, stage, graph.record.tokens or 0)
                for stage in self.stages
                if vision == stage.of_pictures
            }
        return {v for stage in self._places[graph.name].values() for p in stage.values() for v in p.values}

    def seen(
        self, graph: InterpretedGraph, inputs: Arrays, rows: Sequence[RowCache], values: dict[str, Any]
    ) -> None:
        record = graph.record
        places = self._places[graph.name]
        arranged: dict[str, dict[str, np.ndarray]] = {}
        held = tuple(self._held(rows, record.tokens or 0))
        for stage, points in places.items():
            arranged[stage] = {}
            for name, place in points.items():
                parts = [_given(graph, values, v) for v in place.values]
                if not parts or any(part is None for part in parts):
                    continue
                whole = self._arranged(place.form, [p for p in parts if p is not None], record)
                arranged[stage][name] = whole
        self.calls.append(Seen(self._call, graph.name, record.kind, self._pictures, held, arranged, places))
        if record.kind == "vision":
            self._pictures += 1

    def _held(self, rows: Sequence[RowCache], tokens: int) -> Iterable[Held]:
        for place, row in enumerate(rows):
            known = [b for b, own in enumerate(self._cache.rows) if own is row]
            for b in known:
                yield Held(b, place, row.length, min(tokens, int(self._until[b]) - row.length))

    def _arranged(self, form: str, parts: list[np.ndarray], record: Any) -> np.ndarray:
        """Values of a graph: `tokens` [B, T, D] (or [N, D] of patches), `slots` [B, S, D], `scores`, `probabilities` and
        `added_mask` [B, heads, T, S], `mask` [B, T, S]; `heads` and `latents` of decoding [B, 1, D]."""
        text = self.config.text
        heads = text.num_attention_heads
        if record.kind == "vision":
            return parts[0].reshape(len(parts[0]), -1)
        batch, tokens, context = record.inputs[0].shape[0], record.tokens, record.context
        if form == "heads":  # [heads, 1 or B, D]
            return np.concatenate(parts, 1).swapaxes(0, 1).reshape(batch, 1, -1)
        if form == "latents":
            whole = np.concatenate(parts).reshape(batch, 1, heads, -1)[..., : text.kv_lora_rank]
            return whole.reshape(batch, 1, -1)
        if form in ("scores", "probabilities", "added_mask"):
            each = len(parts) // batch or 1  # blocks of queries of each row
            if tokens > 1:
                rows = [np.concatenate(parts[i : i + each], -2) for i in range(0, len(parts), each)]
            else:
                rows = parts
            return np.concatenate(rows).reshape(batch, heads, tokens, context)
        whole = np.concatenate(parts)
        if form == "mask":
            return whole.reshape(batch, tokens, context)
        return whole.reshape(batch, context if form == "slots" else tokens, -1)


def _given(graph: InterpretedGraph, values: dict[str, Any], name: str) -> np.ndarray | None:
    """What a node gave, or a constant of the graph."""
    value = values.get(name)
    if value is None:
        value = graph.graph.constants.get(name)
    if not isinstance(value, Value):
        return None
    data: torch.Tensor = wide(value.data)
    return to_numpy(data).copy()
