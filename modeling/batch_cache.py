"""The cache on a device: parameters which hold the rows that a graph serves together, [B, 1, context, width] or flat,
[B * context, width].

Every graph has cache parameters of its own, one per layer, and they never leave the device. The rows of one batch are
at home in the parameters of the graph that ran on them last; when another graph is to go on with them (a longer
context, decoding after prefill), its parameters take the slots over in one copy. So does a graph that goes from one
batch to another, and what the first one held moves to spare parameters until it is needed again. A step on the same
graph and the same batch copies nothing.

Copies are a compiled graph of their own: assignments from parameters to parameters, with no way through the host.
Nothing here depends on whether ``set_data`` makes a compiled graph use other memory, or whether two reloaded graphs can
share a parameter's: on a device neither has been tried.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops import operations as P

from .cache import Batch, BatchRow, CacheRow
from .parameters import empty_parameter
from .running import NUMPY, name, prepared

_numbers = itertools.count()


class Slots:
    """Cache parameters with `context` slots per row, one per layer, and the batch that is at home in them."""

    def __init__(self, parameters: Sequence[ms.Parameter], context: int) -> None:
        self.parameters = list(parameters)
        self.context = context
        self._owner: weakref.ref[Batch] | None = None
        self._copies: dict[int, nn.Cell] = {}
        number = next(_numbers)
        for layer, parameter in enumerate(self.parameters):
            # A graph that copies has parameters of two graphs, and takes no two of one name.
            parameter.name = f"slots.{number}.{layer}"
            # Zeros, because a masked slot must be finite: its probability is 0, and 0 times NaN is not.
            zeros = np.zeros(parameter.shape, NUMPY[name(parameter.dtype)])
            parameter.set_data(ms.Tensor.from_numpy(zeros))

    @property
    def owner(self) -> Batch | None:
        """The batch whose slots are here; None if there is none, or none that anyone still has."""
        batch = self._owner() if self._owner else None
        return batch if batch is not None and batch.home is self else None

    def take(self, batch: Batch) -> None:
        """Become the home of `batch`; whoever had it must be gone."""
        source, used = batch.home, batch.used
        if source is not None and used:
            if used > self.context:
                raise ValueError(f"cache: {used} slots are used, but the graph has {self.context}")
            if source.context not in self._copies:
                self._copies[source.context] = prepared(
                    CopySlots(self.parameters, self.context, source.context)
                )
            self._copies[source.context].compile_and_run(*source.parameters)
        batch.home, self._owner = self, weakref.ref(batch)

    def like(self) -> Slots:
        """Others of the same sizes."""
        return Slots([empty_parameter(p.shape, p.dtype) for p in self.parameters], self.context)


class CopySlots(nn.Cell):
    """Assigns each row's first slots of the inputs to the parameters, as many as both have.

    Args:
        context: slots per row of the parameters; `source` those of the inputs.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], context: int, source: int) -> None:
        super().__init__()
        self.targets = ms.ParameterTuple(parameters)
        self.context, self.source = context, source
        self.slots = min(context, source)
        self.assign = P.Assign()

    def construct(self, *sources):
        done: tuple = ()
        for i in range(len(self.targets)):
            target, width = self.targets[i], self.targets[i].shape[-1]
            content = ops.reshape(sources[i], (-1, self.source, width))[:, : self.slots]
            if self.context > self.slots:
                rest = ops.reshape(target, (-1, self.context, width))[:, self.slots :]
                content = ops.concat((content, rest), 1)
            done += (ops.depend(0, self.assign(target, ops.reshape(content, target.shape))),)
        return done


class BatchBinding:
    """The cache parameters of one graph, and the batches that it runs on in turn. See ``binding.Binding``."""

    def __init__(self, parameters: Sequence[ms.Parameter], context: int) -> None:
        self._slots = Slots(parameters, context)
        self._spares: list[Slots] = []

    @contextmanager
    def holding(self, rows: Sequence[CacheRow], tokens: int) -> Iterator[None]:
        first = rows[0]
        assert isinstance(first, BatchRow) and list(rows) == first.batch.rows, "rows of one batch, in order"
        batch = first.batch
        if batch.home is not self._slots:
            before = self._slots.owner
            if before is not None and before.used:
                self._spare().take(before)
            self._slots.take(batch)
        yield

    def _spare(self) -> Slots:
        """Slots that nobody is at home in."""
        for spare in self._spares:
            if spare.owner is None:
                return spare
        self._spares.append(self._slots.like())
        return self._spares[-1]
