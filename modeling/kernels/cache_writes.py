"""Ways to write a chunk's rows into one cache parameter per layer, for backends that run on a device.

Each writes in place, and what comes after takes its result. They differ in which kernel a device has for them and in the
shape of the parameter: KVCacheScatterUpdate takes [B, 1, S, width] and the first slot of each row, ScatterNdUpdate the
same and the place of each token, the others a flat [B * S, width] and the slot of each token. ``docs/ascend-operators.md`` says which product has which.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import auto_generate as generated
from mindspore.ops import operations as P

from .. import shapes


class Starts(nn.Cell):
    """The first slot that each batch row writes, [B] int64."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()

    def construct(self, start):
        return ops.cast(start, ms.int64)


class KVCacheScatterWrite(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = generated.KVCacheScatterUpdate()

    def construct(self, caches, rows, starts):
        new = ops.reshape(rows, (starts.shape[0], 1, -1, rows.shape[-1]))  # (B, 1, T, width)
        return (self.write(caches[0], starts, new, -2, "update"),)


class FlatSlots(nn.Cell):
    """The slot of each token in a flat cache, [B * T] int32."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()
        self.offsets = ms.Tensor([[b * context + t for t in range(tokens)] for b in range(batch)], ms.int32)

    def construct(self, start):
        return ops.reshape(self.offsets + start.expand_dims(1), (-1,))


class NdSlots(nn.Cell):
    """The places (row, 0, slot) of each token in a cache [B, 1, S, width], [B * T, 3] int32."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()
        self.offsets = ms.Tensor([[[b, 0, t] for t in range(tokens)] for b in range(batch)], ms.int32)
        self.slot = ms.Tensor([[[0, 0, 1]]], ms.int32)

    def construct(self, start):
        places = self.offsets + ops.reshape(start, (-1, 1, 1)) * self.slot  # (B, T, 3)
        return ops.reshape(places, (-1, 3))


class ScatterNdWrite(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = P.ScatterNdUpdate()

    def construct(self, caches, rows, slots):
        return (self.write(caches[0], slots, rows),)


class ScatterUpdateWrite(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = P.ScatterUpdate()

    def construct(self, caches, rows, slots):
        return (self.write(caches[0], slots, rows),)


class IndexCopyWrite(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.write = generated.InplaceIndexCopy()

    def construct(self, caches, rows, slots):
        return (self.write(caches[0], 0, slots, rows),)


_FLAT: dict[str, Any] = {"Slots": FlatSlots, "cache_shapes": shapes.cache_of_slots}
# What differs from a backend that writes with KVCacheScatterUpdate.
SCATTER_ND = {"Slots": NdSlots, "CacheWrite": ScatterNdWrite}
SCATTER_UPDATE = _FLAT | {"CacheWrite": ScatterUpdateWrite}
INDEX_COPY = _FLAT | {"CacheWrite": IndexCopyWrite}
