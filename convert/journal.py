"""What a run has done already, kept in the target while it is being written, so that the next run can go on.

A journal is lines of JSON: the first says which work it belongs to and which files that work writes, each further one
names a finished unit and the hashes of what it read and wrote. It is a claim, not a proof: power may have failed
between a line and the data behind it. So the next run believes a line only once the hashes of what stands in the files
confirm it. A torn last line is a unit that was not finished.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any

from .errors import ConversionError
from .manifest import plain_name
from .storage import part_path

JOURNAL = "conversion.partial.json"
DOWNLOADS = "conversion.source"  # a folder beside it, of files that are removed after use


@dataclass(frozen=True)
class Done:
    """A finished unit: BLAKE3 of the tensors that it wrote and of those that it read, by their names.

    `overflowed` and `underflowed` count, by target, the values that became the largest finite one or 0. `kept` is the
    content, in hexadecimal, of tensors that are dropped.
    """

    written: Mapping[str, str]
    read: Mapping[str, str] = field(default_factory=dict)
    overflowed: Mapping[str, int] = field(default_factory=dict)
    underflowed: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """The journal of `directory`, locked against other runs until it is closed.

    Args:
        identity: what the work is and what it is made from; another identity's leftovers are not continued.
        files: everything that the work writes, by name.
        resume: False clears what an earlier run left.

    Attributes:
        done: the units that an earlier run claims to have finished.

    Raises:
        ConversionError: another run is writing there, or the leftovers are of other work.
    """

    def __init__(self, directory: Path, identity: str, files: Sequence[str], resume: bool = True):
        self._path = directory / JOURNAL
        self._files = tuple(files)
        self._lock = Lock()
        self.done: dict[str, Done] = {}
        self._fd = self._open_locked()
        try:
            content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            head, self.done, self._end = _parse(content)
            if head is not None and not resume:
                remove_files(directory, head["files"])
                head, self.done, self._end = None, {}, 0
            if head is not None and head["identity"] != identity:
                raise ConversionError(
                    f"{directory}: holds an unfinished conversion of another source or with other options; "
                    "give the same ones to go on, or --no-resume to start over"
                )
            self._check_strangers(directory)
            os.ftruncate(self._fd, self._end)  # a torn line would spoil the next one
            if head is None:
                self._append({"identity": identity, "files": list(self._files)})
        except BaseException:
            if os.fstat(self._fd).st_size == 0:
                self._path.unlink()
            self.close()
            raise

    def add(self, unit: str, done: Done) -> None:
        self._append({"unit": unit, **asdict(done)})

    def clear(self) -> None:
        """Removes what the work has written, the journal last."""
        remove_files(self._path.parent, self._files)
        shutil.rmtree(self._path.parent / DOWNLOADS, ignore_errors=True)
        self._path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The work is done and everything is under its name."""
        shutil.rmtree(self._path.parent / DOWNLOADS, ignore_errors=True)
        self._path.unlink()

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, value: Any) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._end += os.pwrite(self._fd, line, self._end)

    def _open_locked(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            fd = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise ConversionError(
                    f"{self._path.parent}: another run is writing there; wait for its end, or choose another directory"
                ) from None
            try:
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # of a run that ended between our open and our lock

    def _check_strangers(self, directory: Path) -> None:
        mine = {JOURNAL, DOWNLOADS, *self._files, *(part_path(Path(name)).name for name in self._files)}
        strangers = sorted(path.name for path in directory.iterdir() if path.name not in mine)
        if strangers:
            raise ConversionError(
                f"{directory}: is not empty, it holds {strangers[0]}; choose a new or an empty directory to write to"
            )


def remove_files(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        for path in (directory / name, part_path(directory / name)):
            path.unlink(missing_ok=True)


def _parse(content: bytes) -> tuple[dict[str, Any] | None, dict[str, Done], int]:
    """The first line, the units, and how many bytes of the content are whole lines of those."""
    head: dict[str, Any] | None = None
    units: dict[str, Done] = {}
    end = 0
    for line in content.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
            if head is None:
                if not isinstance(value["identity"], str) or not all(map(plain_name, value["files"])):
                    break
                head = {"identity": value["identity"], "files": list(value["files"])}
            else:
                units[str(value["unit"])] = Done(**{f.name: dict(value[f.name]) for f in fields(Done)})
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        end += len(line) + 1
    return head, units, end
