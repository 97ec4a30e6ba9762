"""The host side: feeds static graphs, keeps the cache, knows nothing about where graphs or weights come from.

A `Graphs` object provides the graphs: compiled from the network (`modeling_kimi_vl`) or reloaded from a bundle
(`export`). Every row of a batch is stored from slot 0 on with its own length. A row that has nothing to do in a call
runs against a scratch cache where rows are stored apart; where they are stored together it writes beyond its own
length, into slots that are not read before they are written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .buckets import TooLongError, pick, quickest_chunk
from .cache import CacheRow, LatentCache, RowCache
from .configuration import ModelConfig
from .positions import merge_order, position_taps, text_rope, vision_rope

Arrays = dict[str, np.ndarray]


class Graphs(Protocol):
    """Where static graphs come from."""

    contexts: Sequence[int]  # cache lengths, ascending
    patches: Sequence[int]  # patch counts, ascending
    chunk: int  # tokens of the largest prefill graphs
    # of the others, ascending, for what would leave much of the largest empty; forward asks for all sizes too
    smaller_chunks: Sequence[int]
    together: bool  # whether a cache parameter holds all rows of a batch

    def batch(self, rows: int) -> int:
        """The batch size of the graphs that serve `rows` rows."""

    def vision(self, patches: int, inputs: Arrays, taps: bool) -> list[np.ndarray]:
        """Run the vision graph of a bucket."""

    def text(
        self,
        tokens: int,
        context: int,
        rows: Sequence[CacheRow],
        inputs: Arrays,
        all_logits: bool,
        taps: bool,
    ) -> list[np.ndarray]:
        """Run the prefill (tokens > 1) or decode graph on these rows' caches."""


@dataclass
class Row:
    """New tokens of one sequence: ids [n] and, where `embeds_mask` [n] is 1, rows [n, H] that replace embeddings."""

    ids: np.ndarray
    embeds: np.ndarray | None = None
    embeds_mask: np.ndarray | None = None
    positions: np.ndarray | None = None  # for the rotary tables; default: the slots


@dataclass
class RowOutput:
    """Of one row: logits [n, V] (or [1, V], the last token's), and with taps hidden_states [L, n, H], experts [Lm, n, k]."""

    logits: list[np.ndarray] = field(default_factory=list)
    hidden_states: list[np.ndarray] = field(default_factory=list)
    router_topk_indices: list[np.ndarray] = field(default_factory=list)


class Engine:
    def __init__(self, config: ModelConfig, graphs: Graphs) -> None:
        self.config = config
        self.graphs = graphs
        self._scratch: RowCache | None = None

    @property
    def max_context(self) -> int:
        return self.graphs.contexts[-1]

    def new_cache(self, batch: int) -> LatentCache:
        """An empty cache for `batch` rows of up to `max_context` tokens."""
        if self.graphs.together:
            return LatentCache.of_batches(batch, self.graphs.batch(batch), self.max_context)
        return LatentCache([self._row() for _ in range(batch)], self.max_context)

    # Images ------------------------------------------------------------------------------------------------------

    def encode_images(
        self, pixel_values: np.ndarray, grids: np.ndarray, taps: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Projected features [h * w / 4, H] of each image, and with taps the tower's outputs [h * w / 4, 4, D].

        Args:
            pixel_values: patches of all images one after the other [N, 3, 14, 14], row-major within an image.
            grids: patch rows and columns of each image [n, 2].

        Raises:
            TooLongError: an image has more patches than the largest vision graph takes.
        """
        features, towers = [], []
        kh, kw = self.config.vision.merge_kernel_size
        at = 0
        for h, w in np.asarray(grids, np.int64).tolist():
            n = h * w
            bucket = pick(self.graphs.patches, n, f"patches of a {h} x {w} image")
            inputs = self.vision_inputs(pixel_values[at : at + n], h, w, bucket)
            out = self.graphs.vision(bucket, inputs, taps)
            merged = n // (kh * kw)
            features.append(np.array(out[0][:merged]))
            if taps:
                towers.append(np.array(out[1][:merged]))
            at += n
        return features, towers

    def vision_inputs(self, patches: np.ndarray, h: int, w: int, bucket: int) -> Arrays:
        """A vision graph's inputs for one image, padded with zeros to `bucket` patches."""
        v = self.config.vision
        order = merge_order(h, w, v.merge_kernel_size)
        taps, weights = position_taps(h, w, (v.init_pos_emb_height, v.init_pos_emb_width))
        cos, sin = vision_rope(h, w, v.head_dim)

        def padded(a: np.ndarray) -> np.ndarray:
            out = np.zeros((bucket, *a.shape[1:]), a.dtype)
            np.take(a, order, axis=0, out=out[: h * w], mode="clip")  # any other mode takes a copy
            return out

        flat = np.asarray(patches, np.float32).reshape(h * w, v.patch_dim)
        return {
            "patches": padded(flat),
            "taps": padded(taps),
            "tap_weights": padded(weights),
            "cos": padded(cos),
            "sin": padded(sin),
            "valid": np.array([h * w], np.int32),
        }

    # Text --------------------------------------------------------------------------------------------------------

    def extend(
        self, cache: LatentCache, rows: Sequence[Row], all_logits: bool = False, taps: bool = False
    ) -> list[RowOutput]:
        """Run each row's new tokens after what its cache holds; the cache then holds them too.

        A row's last logits are always computed; rows may have different numbers of tokens, or none.

        Raises:
            TooLongError: a row would exceed the context; nothing was run.
        """
        for row, held in zip(rows, cache.rows):
            if held.length + len(row.ids) > self.max_context:
                raise TooLongError(
                    f"a sequence of {held.length + len(row.ids)} tokens exceeds the context of {self.max_context} by "
                    f"{held.length + len(row.ids) - self.max_context}; shorten the prompt or use a larger max_context"
                )
        outputs = [RowOutput() for _ in rows]
        size = self.graphs.batch(len(rows))
        for first in range(0, len(rows), size):
            group = list(range(first, min(first + size, len(rows))))
            done = dict.fromkeys(group, 0)
            while left := [b for b in group if done[b] < len(rows[b].ids)]:
                active, tokens = self._fitting(cache, {b: len(rows[b].ids) - done[b] for b in left})
                self._run(cache, rows, outputs, active, done, size, tokens, all_logits, taps)
        return outputs

    def _fitting(self, cache: LatentCache, left: dict[int, int]) -> tuple[list[int], int]:
        """Which rows run next, and how many tokens of each, when so many are `left` of each.

        A chunk must not write past the cache's end, not even that of a row that only runs along: what does not fit runs in
        a smaller one, or token by token.
        """
        sizes = [*self.graphs.smaller_chunks, self.graphs.chunk]
        best = quickest_chunk(max(left.values()), sizes)
        for chunk in reversed([n for n in sizes if n <= best]):
            fit = [
                b
                for b, n in left.items()
                if n > 1 and all(row.length + chunk <= self.max_context for row in cache.rows[b].together)
            ]
            if fit:
                return fit, chunk
        return list(left), 1

    def _run(
        self,
        cache: LatentCache,
        rows: Sequence[Row],
        outputs: list[RowOutput],
        active: list[int],
        done: dict[int, int],
        batch: int,
        tokens: int,
        all_logits: bool,
        taps: bool,
    ) -> None:
        """One graph call: up to `tokens` more tokens of every active row."""
        text = self.config.text
        ids = np.full((batch, tokens), self.config.pad_token_id, np.int32)
        embeds = np.zeros((batch, tokens, text.hidden_size), np.float32)
        mask = np.zeros((batch, tokens), np.int32)
        held = list(dict.fromkeys(row for b in active for row in cache.rows[b].together))
        held += [self._idle_row()] * (batch - len(held))
        places = [held.index(cache.rows[b]) for b in active]
        start, count = np.array([row.length for row in held], np.int32), np.zeros(batch, np.int32)
        context = pick(
            self.graphs.contexts, min(int(start.max()) + tokens, self.max_context), "cached tokens"
        )
        # Of a row that runs along and is full, the last slot may go: no token can follow that would see it.
        start = np.minimum(start, context - tokens)
        positions = start[:, None].astype(np.int64) + np.arange(tokens)
        for i, b in zip(places, active):
            row, at = rows[b], done[b]
            n = count[i] = min(tokens, len(row.ids) - at)
            ids[i, :n] = row.ids[at : at + n]
            if row.positions is not None:
                positions[i, :n] = row.positions[at : at + n]
            if row.embeds is not None and row.embeds_mask is not None:
                mask[i, :n] = row.embeds_mask[at : at + n]
                embeds[i, :n] = row.embeds[at : at + n]
        cos, sin = text_rope(positions, text.rope_theta, text.qk_rope_head_dim)
        inputs: Arrays = {
            "input_ids": ids, "embeds": embeds, "embeds_mask": mask, "cos": cos, "sin": sin, "start": start,
        }  # fmt: skip
        keep_all, all_logits = all_logits, all_logits or tokens == 1
        if not all_logits:
            inputs["last"] = np.maximum(count - 1, 0).astype(np.int32)
        out = self.graphs.text(tokens, context, held, inputs, all_logits, taps)
        for i, b in zip(places, active):
            n = int(count[i])
            if keep_all or done[b] + n == len(rows[b].ids):
                outputs[b].logits.append(np.array(out[0][i, :n] if all_logits else out[0][i]))
            if taps:
                outputs[b].hidden_states.append(np.array(out[1][:, i, :n]))
                if len(out) > 2:
                    outputs[b].router_topk_indices.append(np.array(out[2][:, i, :n]))
            cache.rows[b].length += n
            done[b] += n

    def _row(self) -> RowCache:
        text = self.config.text
        return RowCache(text.num_hidden_layers, self.max_context, text.latent_dim)

    def _idle_row(self) -> RowCache:
        if self._scratch is None:
            self._scratch = self._row()
        return self._scratch
