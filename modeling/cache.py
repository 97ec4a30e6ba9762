"""The latent cache: per token and layer the normed latent and the rotated shared key.

On a CPU it lives in host buffers, row by row: graphs see prefixes of the buffers as their cache parameters, so every
context length works on the same memory and growing into the next one costs nothing. On a device it lives in parameters
that hold all rows of a batch, see ``batch_cache``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .batch_cache import Slots


class CacheRow:
    """One sequence's cache: how many slots hold tokens."""

    def __init__(self) -> None:
        self.length = 0

    @property
    def together(self) -> Sequence[CacheRow]:
        """The rows that every graph call on this one runs on too, in their order."""
        return (self,)


class RowCache(CacheRow):
    """A row on its own: a buffer [context, width] per layer.

    Buffers are zero pages that the system provides when they are first written. `writer` is what extended it last, see
    ``binding``.
    """

    def __init__(self, layers: int, context: int, width: int) -> None:
        super().__init__()
        self.buffers = [np.zeros((context, width), np.float32) for _ in range(layers)]
        self.writer: object = None


class BatchRow(CacheRow):
    """A row of a batch whose rows are stored together; it does not keep the batch alive."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = weakref.ref(batch)

    @property
    def batch(self) -> Batch:
        batch = self._batch()
        assert batch is not None, "whoever has a row has its cache"
        return batch

    @property
    def together(self) -> Sequence[CacheRow]:
        return self.batch.rows


class Batch:
    """The rows that a graph serves together, as many as it takes; `home` is where their slots are."""

    def __init__(self, size: int) -> None:
        self.rows = [BatchRow(self) for _ in range(size)]
        self.home: Slots | None = None  # nothing was written yet

    @property
    def used(self) -> int:
        """Slots that hold something of any row."""
        return max(row.length for row in self.rows)


class LatentCache:
    """The cache of a batch; pass it back as ``past_key_values`` to go on after what it holds."""

    def __init__(self, rows: Sequence[CacheRow], context: int, batches: Sequence[Batch] = ()) -> None:
        self.rows = rows
        self.context = context
        self._batches = batches  # without cycles: their slots are free as soon as this is gone

    @classmethod
    def of_batches(cls, count: int, size: int, context: int) -> LatentCache:
        """An empty cache of `count` rows in batches of `size`; the last batch may have rows that nobody uses."""
        batches = [Batch(size) for _ in range(0, count, size)]
        return cls([row for batch in batches for row in batch.rows][:count], context, batches)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows)

    def get_max_cache_shape(self) -> int:
        return self.context

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row [B]."""
        return np.array([row.length for row in self.rows])

    def crop(self, length: int) -> None:
        """Forget everything from slot `length` on; what stays behind is never read."""
        for row in self.rows:
            row.length = min(row.length, length)
