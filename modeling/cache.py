"""The latent cache: per token and layer the normed latent and the rotated shared key, in host buffers.

Graphs see prefixes of the buffers as their cache parameters, so every context length works on the same memory and
growing into the next one costs nothing.
"""

from __future__ import annotations

import numpy as np


class RowCache:
    """One sequence's cache: a buffer [context, width] per layer, and how many slots hold tokens.

    Buffers are zero pages that the system provides when they are first written. `writer` is what extended it last, see
    ``binding``.
    """

    def __init__(self, layers: int, context: int, width: int) -> None:
        self.buffers = [np.zeros((context, width), np.float32) for _ in range(layers)]
        self.length = 0
        self.writer: object = None


class LatentCache:
    """The cache of a batch; pass it back as ``past_key_values`` to go on after what it holds."""

    def __init__(self, batch: int, layers: int, context: int, width: int) -> None:
        self.rows = [RowCache(layers, context, width) for _ in range(batch)]
        self.context = context

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
        """Forget everything from slot `length` on; what stays behind in the buffers is never read."""
        for row in self.rows:
            row.length = min(row.length, length)
