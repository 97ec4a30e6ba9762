"""Which rows a graph's cache parameters stand for, from call to call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import mindspore as ms
import numpy as np

from .batch_cache import BatchBinding
from .cache import CacheRow, RowCache

# From 2.10 on, set_data makes a parameter of a compiled graph stand for other memory. In 2.7 it copies into the memory
# that the parameter had in the first run (and goes on doing so when that is freed). What holds in between was not
# tried; the way that suits 2.7 is right for all.
SET_DATA_REBINDS = hasattr(ms, "DeviceCtx")


class Binding(Protocol):
    """The cache parameters of one graph."""

    def holding(self, rows: Sequence[CacheRow], tokens: int) -> AbstractContextManager[None]:
        """Within it the graph may run: it reads these rows' slots and writes the next `tokens` of each."""


def bind(parameters: Sequence[ms.Parameter], context: int, together: bool) -> Binding:
    """Cache parameters of a graph with `context` slots: one per layer for all rows (`together`), or one for each row."""
    if together:
        return BatchBinding(parameters, context)
    return CacheBinding(parameters, context)


class CacheBinding:
    """The cache parameters of one graph, layer by layer and then row by row.

    They are prefixes of the rows' own buffers, so a call costs nothing. Before MindSpore 2.10 they are buffers of the
    graph's own, and slots are copied: all of a row when it was extended elsewhere, the new ones back after a call.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], context: int) -> None:
        self._parameters = list(parameters)
        self._context = context
        self._rows: tuple[RowCache, ...] = ()
        self._own: list[np.ndarray] = []
        if not SET_DATA_REBINDS:
            self._own = [np.zeros(p.shape, np.float32) for p in self._parameters]
            for parameter, buffer in zip(self._parameters, self._own):
                parameter.set_data(ms.Tensor.from_numpy(buffer))

    @contextmanager
    def holding(self, rows: Sequence[CacheRow], tokens: int) -> Iterator[None]:
        """See :class:`Binding`."""
        rows = cast("Sequence[RowCache]", rows)
        if SET_DATA_REBINDS:
            self._rebind(tuple(rows))
            yield
            return
        for row, buffer, own in self._pairs(rows):
            if row.writer is not self or self._rows != tuple(rows):
                own[: row.length] = buffer[: row.length]
        yield
        for row, buffer, own in self._pairs(rows):
            new = slice(row.length, row.length + tokens)
            buffer[new] = own[new]
        for row in rows:
            row.writer = self
        self._rows = tuple(rows)

    def _rebind(self, rows: tuple[RowCache, ...]) -> None:
        if self._rows == rows:
            return
        for parameter, (_, buffer, _) in zip(self._parameters, self._pairs(rows)):
            parameter.set_data(ms.Tensor.from_numpy(buffer[: self._context]))
        self._rows = rows

    def _pairs(self, rows: Sequence[RowCache]) -> Iterator[tuple[RowCache, np.ndarray, np.ndarray]]:
        """For each parameter its row, that row's buffer of the layer, and the graph's own."""
        for i in range(len(self._parameters)):
            row = rows[i % len(rows)]
            buffer = row.buffers[i // len(rows)]
            yield row, buffer, self._own[i] if self._own else buffer
