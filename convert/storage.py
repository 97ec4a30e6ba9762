"""Files that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .errors import ConversionError

PART = ".part"
WINDOW = 8 << 20  # bytes of a file that are brought to the disk at once
LAG = 8  # windows that may be under way

# Of Linux 6.14 and later, per file system: what was not in the cache before is not kept there, which spares the search
# for a page for everything that is read once. What is in the cache is read from there, and stays.
RWF_DONTCACHE = 0x80
_uncached = True

Progress = Callable[[int], object]
"""Called with the number of bytes done since the last call."""


class PartFile:
    """A file of known size under a temporary name; :meth:`finish` gives it its own.

    Space is reserved at once, so that a full disk shows when a file is begun and not in the middle of it. What an
    earlier run left under either name is taken over, if it has the right size; its content is the caller's to check.
    Writes of several threads may overlap. :meth:`close` without :meth:`finish` leaves the temporary file there.
    """

    def __init__(self, path: Path, nbytes: int):
        self.path = path
        self.temporary = part_path(path)
        self.nbytes = nbytes
        if path.exists() and not self.temporary.exists():
            os.replace(path, self.temporary)
        # No link is followed: it could lead out of the directory.
        if self.temporary.is_symlink():
            raise ConversionError(f"{self.temporary}: is a link, expected a file that this program wrote")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._fd: int | None = os.open(self.temporary, flags, 0o666)
        self._map: mmap.mmap | None = None
        if os.fstat(self._fd).st_size != nbytes:
            try:
                os.ftruncate(self._fd, 0)
                _reserve(self._fd, nbytes)
            except OSError as e:
                os.ftruncate(self._fd, 0)
                self.close()
                raise OSError(e.errno, e.strerror, str(path)) from None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        left, begin = memoryview(data), offset
        while left:
            try:
                n = os.pwrite(self._descriptor, left, offset)
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(self.path)) from None
            left, offset = left[n:], offset + n
        if hasattr(os, "posix_fadvise"):
            self._bring_to_disk(begin, offset)

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset` on."""
        read_at(self._descriptor, offset, buffer, str(self.temporary))

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A part of the file's map. It says where bytes belong; they are brought there by :meth:`write`."""
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, self.nbytes)
        count = math.prod(shape)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def _bring_to_disk(self, begin: int, end: int) -> None:
        """Lets the system write windows that are complete, and forget those that it has written meanwhile.

        Otherwise every page written is a page of memory that has to be found first, which takes several times as long
        as the writing; so the same few are used again and again, and what others have in the cache stays there.
        """
        for window in range(begin // WINDOW, end // WINDOW):
            for at in {window, max(0, window - LAG)}:
                os.posix_fadvise(self._descriptor, at * WINDOW, WINDOW, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        os.fsync(self._descriptor)
        os.replace(self.temporary, self.path)
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = self._map = None

    @property
    def _descriptor(self) -> int:
        assert self._fd is not None, "the file is closed"
        return self._fd


def part_path(path: Path) -> Path:
    return path.with_name(path.name + PART)


def read_at(fd: int, offset: int, buffer: memoryview, name: str) -> None:
    """Fills `buffer` from `offset` of an open file on. Raises OSError, ConversionError: the file ends before."""
    left = buffer
    while left:
        try:
            n = _read_once(fd, offset, left)
        except OSError as e:
            raise OSError(e.errno, e.strerror, name) from None
        if not n:
            raise ConversionError(f"{name}: ended while it was read; was it changed meanwhile?")
        left, offset = left[n:], offset + n


def _read_once(fd: int, offset: int, buffer: memoryview) -> int:
    global _uncached
    if _uncached:
        try:
            return os.preadv(fd, [buffer], offset, RWF_DONTCACHE)
        except (OSError, NotImplementedError) as e:
            if getattr(e, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            _uncached = False
    return os.preadv(fd, [buffer], offset)


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole or not at all."""
    temporary = part_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


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
