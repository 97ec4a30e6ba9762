"""A file of tensors, mapped into memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .storage import read_at
from .tensor_io import Place, address


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: `offset` is from the file's start, `nbytes` its length there."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int


class MappedFile:
    """A file that is there, or will be: :meth:`attach` opens it.

    Attributes:
        name: the file's, without its directory.
        nbytes: its size.
        tensors: what it holds.
    """

    name: str
    nbytes: int
    tensors: Mapping[str, TensorInfo]
    _file: BinaryIO | None = None
    _map: mmap.mmap | None = None

    def open(self, path: Path) -> None:
        """Maps it; its content is not looked at. Raises OSError."""
        self.name = path.name
        self._file = open(path, "rb")  # noqa: SIM115 (it stays open as long as this lives)
        self.nbytes = self.status().st_size
        if self.nbytes:
            with open(path, "rb") as f:  # of its own, because the advice is not for the map
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(
            os, "posix_fadvise"
        ):  # reads are large and jump: what the system read ahead would be in vain
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def detach(self) -> None:
        """Gives the content up."""
        if self._file:
            self._file.close()
        self._map = self._file = None

    @property
    def attached(self) -> bool:
        """Whether its content can be read."""
        return self._file is not None

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the map. Raises KeyError."""
        info = self.tensors[name]
        assert self._map, f"{self.name} is not there"
        flat = np.frombuffer(self._map, info.dtype, info.nbytes // info.dtype.itemsize, info.offset)
        return flat.reshape(info.shape)

    def forget(self, name: str) -> None:
        """Takes a tensor's pages out of this process's memory; another look at it maps them again. Raises KeyError."""
        info = self.tensors[name]
        assert self._map, f"{self.name} is not there"
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset` on. Raises OSError, ConversionError: the file has become shorter."""
        read_at(self._descriptor, offset, buffer, self.name)

    def place(self, name: str) -> Place:
        """Where a tensor is. Raises KeyError."""
        info = self.tensors[name]
        return Place(name, address(self.array(name)), info.nbytes, self, info.offset)

    def status(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    @property
    def _descriptor(self) -> int:
        assert self._file, f"{self.name} is not there"
        return self._file.fileno()
