"""The units of a conversion: each entry of the table is one, written as a whole or done again.

A unit reads its tensors piece by piece, turns them, hashes what it reads and what it writes, and puts the result at
its final place in the target's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import blake3
import numpy as np

from .converted import ConvertedWeights
from .errors import ConversionError
from .journal import Done
from .manifest import content_hash
from .mapping import Entry
from .planning import Plan, PlannedTensor
from .published import PublishedWeights
from .storage import PartFile, Progress
from .tensor_io import Buffers, Place, TensorReader, TensorWriter, address
from .transforms import DTYPES, Block, Losses, scatter, stream

Parts = Callable[[str], PartFile]
"""Gives a file of the target by its name."""


@dataclass(frozen=True)
class Unit:
    """What writes `targets` from the source's `files`; `run` gives the hashes of all that it read and wrote."""

    name: str
    targets: tuple[PlannedTensor, ...]
    files: frozenset[str]
    run: Callable[[Parts, Buffers, Progress], Done]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


def conversion_units(todo: Plan, weights: PublishedWeights, allow_overflow: bool) -> Iterator[Unit]:
    """Published to ours, in the table's order."""
    places = {tensor.name: tensor for tensor in todo.tensors}
    for entry in weights.entries:
        targets = tuple(places[side.name] for side in entry.ours)
        files = frozenset(weights.file_of(side.name) for side in entry.published)
        run = _Conversion(entry, targets, weights, allow_overflow) if targets else _Keeping(entry, weights)
        yield Unit(entry.published[0].name, targets, files, run)


def reversal_units(todo: Plan, weights: ConvertedWeights) -> Iterator[Unit]:
    """Ours to published, in the table's order."""
    places = {tensor.name: tensor for tensor in todo.tensors}
    for entry in weights.published_entries:
        targets = tuple(places[side.name] for side in entry.published)
        files = frozenset(weights.location(side.name)[0] for side in entry.ours)
        yield Unit(entry.published[0].name, targets, files, _Reversal(entry, targets, weights))


@dataclass(frozen=True)
class _Conversion:
    entry: Entry
    targets: tuple[PlannedTensor, ...]
    weights: PublishedWeights
    allow_overflow: bool

    def __call__(self, parts: Parts, buffers: Buffers, progress: Progress) -> Done:
        blocks = self.entry.blocks([self.weights.array(side.name) for side in self.entry.published])
        places = [self.weights.place(side.name) for side in self.entry.published]
        reader = TensorReader(places, buffers, _width(blocks), _refuse_nan)
        written: dict[str, str] = {}
        overflowed: dict[str, int] = {}
        underflowed: dict[str, int] = {}
        for target, target_blocks in zip(self.targets, blocks):
            part, offset = parts(target.file), target.offset
            digest, losses = blake3.blake3(), Losses()
            for piece in stream(target_blocks, DTYPES[target.dtype], losses, reader):
                if losses.overflowed and not self.allow_overflow:
                    raise ConversionError(
                        f"{target.name}: has values as large as {losses.largest:.3g}, too large for {target.dtype}; "
                        "convert to bf16 or fp32, or make them its largest value with --allow-overflow"
                    )
                data = piece.view(np.uint8).data
                digest.update(data)
                part.write(offset, data)
                offset += len(data)
                progress(len(data))
            written[target.name] = digest.hexdigest()
            if losses.overflowed:
                overflowed[target.name] = losses.overflowed
            if losses.underflowed:
                underflowed[target.name] = losses.underflowed
        return Done(written, reader.hashes(), overflowed, underflowed)


@dataclass(frozen=True)
class _Keeping:
    """Of tensors that are dropped: their content, for the way back."""

    entry: Entry
    weights: PublishedWeights

    def __call__(self, parts: Parts, buffers: Buffers, progress: Progress) -> Done:
        places = [self.weights.place(side.name) for side in self.entry.published]
        reader = TensorReader(places, buffers)
        kept = {p.name: reader(self.weights.array(p.name)).tobytes().hex() for p in places}
        return Done({}, reader.hashes(), kept=kept)


@dataclass(frozen=True)
class _Reversal:
    entry: Entry
    targets: tuple[PlannedTensor, ...]
    weights: ConvertedWeights

    def __call__(self, parts: Parts, buffers: Buffers, progress: Progress) -> Done:
        if not self.entry.ours:
            return self._put_back(parts, progress)
        views = [
            parts(t.file).view(self.weights.published[t.file][t.name].dtype, t.shape, t.offset)
            for t in self.targets
        ]
        places = [
            Place(t.name, address(view), t.nbytes, parts(t.file), t.offset)
            for t, view in zip(self.targets, views)
        ]
        blocks = self.entry.blocks(views)
        width = _width(blocks)
        reader = TensorReader([self.weights.place(side.name) for side in self.entry.ours], Buffers())
        writer = TensorWriter(places, buffers, width)

        def flush() -> None:
            progress(writer.flush())

        for side, side_blocks in zip(self.entry.ours, blocks):
            scatter(side_blocks, self.weights.mapped(side.name), side.name, reader, writer, flush)
        for name, hash_ in reader.hashes().items():
            self.weights.check_hash(name, hash_)
        return Done(writer.hashes())

    def _put_back(self, parts: Parts, progress: Progress) -> Done:
        """A dropped tensor, whose content the manifest keeps."""
        (target,) = self.targets
        data = bytes.fromhex(self.weights.manifest.dropped[target.name].data)
        parts(target.file).write(target.offset, data)
        progress(len(data))
        return Done({target.name: content_hash(data)})


def _width(blocks: list[list[Block]]) -> int:
    """How many views stand side by side in a block."""
    return max(len(block) for target in blocks for block in target)


# The bits of infinity; what is larger than these, with or without the sign, is NaN.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def _refuse_nan(name: str, dtype: np.dtype, data: np.ndarray) -> None:
    """Two maxima find out whether there is a NaN, faster than `isnan`. Raises ConversionError."""
    infinity = _INFINITY[dtype.name]
    unsigned = data.view(f"u{dtype.itemsize}")
    sign = 1 << 8 * dtype.itemsize - 1
    if unsigned.max() > (sign | infinity) or unsigned.view(f"i{dtype.itemsize}").max() > infinity:
        count = int(np.isnan(data.view(dtype)).sum())
        raise ConversionError(
            f"{name}: holds {count} values that are no numbers (NaN), with which no network computes; "
            "is the file damaged? download it again"
        )
