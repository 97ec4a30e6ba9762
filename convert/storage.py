"""Files that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np

PART = ".part"
JOURNAL = "conversion.partial.json"  # stands in a directory while it is being written


class PartFile:
    """A file of known size under a temporary name; :meth:`finish` gives it its own.

    Leaving the context without :meth:`finish` removes it. Space is reserved at once, so a full disk shows here and
    not in the middle of the work.
    """

    def __init__(self, path: Path, nbytes: int):
        self.path = path
        self.temporary = path.with_name(path.name + PART)
        self._fd: int | None = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._map: mmap.mmap | None = None
        try:
            _reserve(self._fd, nbytes)
        except OSError as e:
            self.close()
            raise OSError(e.errno, e.strerror, str(path)) from None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            n = os.pwrite(self._descriptor, left, offset)
            left, offset = left[n:], offset + n

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A part of the file as a writable array."""
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0)
        count = int(np.prod(shape, dtype=object))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def finish(self) -> None:
        if self._map is not None:
            self._map.flush()
        os.fsync(self._descriptor)
        os.replace(self.temporary, self.path)
        self.close()

    def close(self) -> None:
        """Gives the file up, unless it is finished."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self.temporary.unlink(missing_ok=True)

    @property
    def _descriptor(self) -> int:
        assert self._fd is not None, "the file is closed"
        return self._fd

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole or not at all."""
    with PartFile(path, len(content)) as part:
        part.write(0, content)
        part.finish()


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    if not nbytes:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, nbytes)
