"""Tensors in and out of files through buffers that are used again, hashed on the way.

A view of a file's memory map says *where* bytes are; the map is never touched here. Bytes come by pread and go by
pwrite: a failing disk then raises an OSError, where touching the map would kill the process, and no page of a file is
ever counted as ours. Memory is a few buffers: a piece where a tensor passes in its own order, the whole tensor where
it does not (one expert's matrix).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np


@dataclass(frozen=True)
class Place:
    """A tensor in a file: `address` is where views of the file's map say that it begins, `offset` where in the file.

    `file` has ``read(offset, buffer)`` or ``write(offset, data)``.
    """

    name: str
    address: int
    nbytes: int
    file: Any
    offset: int


def address(view: np.ndarray) -> int:
    return view.__array_interface__["data"][0]


_NOTHING = np.empty(0, np.uint8)


class Buffers:
    """Memory that one worker uses again and again, by slots."""

    def __init__(self) -> None:
        self._slots: list[np.ndarray] = []

    def take(self, slot: int, nbytes: int) -> np.ndarray:
        while len(self._slots) <= slot:
            self._slots.append(np.empty(0, np.uint8))
        if self._slots[slot].size < nbytes:
            self._slots[slot] = np.empty(nbytes, np.uint8)
        return self._slots[slot][:nbytes]


class _Tensors:
    """The tensors of one unit of work, found by their addresses.

    `width` of them have a buffer at once, as many as a block has views; the next one takes the buffer of the oldest.
    """

    def __init__(self, places: Iterable[Place], buffers: Buffers, width: int):
        self._places = sorted(places, key=lambda p: p.address)
        self._starts = [p.address for p in self._places]
        self._buffers = buffers
        self._holders: list[str | None] = [None] * width
        self._oldest = 0
        self._passed = dict.fromkeys((p.name for p in self._places), 0)
        self._digests = {p.name: blake3.blake3() for p in self._places}

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of every tensor, once all of them have passed as a whole."""
        missing = [p.name for p in self._places if self._passed[p.name] != p.nbytes]
        assert not missing, f"{missing[0]} has not passed as a whole"
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def _find(self, view: np.ndarray) -> tuple[Place, int]:
        """The tensor that a view is a part of, and where in it the view begins."""
        place = self._places[bisect_right(self._starts, address(view)) - 1]
        return place, address(view) - place.address

    def _buffer(self, place: Place, nbytes: int) -> np.ndarray:
        if place.name not in self._holders:
            self._give_up(self._holders[self._oldest] or "")
            self._holders[self._oldest] = place.name
            self._oldest = (self._oldest + 1) % len(self._holders)
        return self._buffers.take(self._holders.index(place.name), nbytes)

    def _give_up(self, name: str) -> None:
        """Another tensor takes the buffer of this one."""


def _part(buffer: np.ndarray, view: np.ndarray, at: int) -> np.ndarray:
    """What `view` is of its tensor, in a buffer in which it begins at `at`."""
    return np.ndarray(view.shape, view.dtype, buffer.data, at, view.strides)


class TensorReader(_Tensors):
    """Call it with a view of a map, get an array of its content; valid until `width` other tensors were asked for.

    `check` is called with a tensor's name, its dtype and its bytes, as they come.
    """

    def __init__(
        self,
        places: Iterable[Place],
        buffers: Buffers,
        width: int = 1,
        check: Callable[[str, np.dtype, np.ndarray], None] | None = None,
    ):
        super().__init__(places, buffers, width)
        self._check = check
        self._held: dict[
            str, tuple[int, np.ndarray]
        ] = {}  # a part of each tensor, and where in it that begins

    def __call__(self, view: np.ndarray) -> np.ndarray:
        if not view.size:
            return view
        place, at = self._find(view)
        begin, data = self._held.get(place.name, (0, _NOTHING))
        step = view.strides[0]
        end = at + (len(view) - 1) * step + view[0].nbytes if step >= view.strides[-1] else place.nbytes
        if not (begin <= at and end <= begin + data.nbytes):
            if at == self._passed[place.name] and step >= view.strides[-1]:
                # Rows that are left out, every second one, come next: they are read with the others.
                begin, data = at, self._read(place, at, min(len(view) * step, place.nbytes - at), view.dtype)
            else:
                self._digests[place.name], self._passed[place.name] = blake3.blake3(), 0
                begin, data = 0, self._read(place, 0, place.nbytes, view.dtype)
            self._held[place.name] = begin, data
        return _part(data, view, at - begin)

    def _read(self, place: Place, at: int, nbytes: int, dtype: np.dtype) -> np.ndarray:
        data = self._buffer(place, nbytes)
        place.file.read(place.offset + at, data.data)
        if self._check:
            self._check(place.name, dtype, data)
        self._digests[place.name].update(data.data)
        self._passed[place.name] += nbytes
        return data

    def _give_up(self, name: str) -> None:
        self._held.pop(name, None)


class TensorWriter(_Tensors):
    """Call it with a view of a map, get an array to fill; :meth:`flush` writes what was filled since the last time.

    A tensor that is not filled in its own order is written when it is full.
    """

    def __init__(self, places: Iterable[Place], buffers: Buffers, width: int = 1):
        super().__init__(places, buffers, width)
        self._pending: list[tuple[Place, np.ndarray]] = []
        self._whole: dict[str, np.ndarray] = {}
        self._filled: dict[str, int] = {}

    def __call__(self, view: np.ndarray) -> np.ndarray:
        if not view.size:
            return view
        place, at = self._find(view)
        if place.name not in self._whole and view.flags.c_contiguous and at == self._passed[place.name]:
            data = self._buffer(place, view.nbytes)
            self._pending.append((place, data))
            return data.view(view.dtype).reshape(view.shape)
        if place.name not in self._whole:
            self._whole[place.name] = self._buffer(place, place.nbytes)
            self._filled[place.name] = self._passed[place.name]
        self._filled[place.name] += view.nbytes
        if self._filled[place.name] == place.nbytes:
            self._pending.append((place, self._whole[place.name][self._passed[place.name] :]))
        return _part(self._whole[place.name], view, at)

    def _give_up(self, name: str) -> None:
        self._whole.pop(name, None)

    def flush(self) -> int:
        """The number of bytes written."""
        written = 0
        for place, data in self._pending:
            place.file.write(place.offset + self._passed[place.name], data.data)
            self._digests[place.name].update(data.data)
            self._passed[place.name] += data.nbytes
            written += data.nbytes
        self._pending.clear()
        return written
