"""Which weight files were found to be whole, so that a bundle is read to the end once and not at every load.

One small file per claim in the user's cache directory. A claim is believed only if nothing about the file has changed
since: size, inode, time of the content and time of the inode, which nobody can set, so that a file put back with its
old date is read again. What changes on the disk itself, without the system knowing, is found by ``verify=True``.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..convert.manifest import content_hash

SETTLED = 2.0  # seconds: a file this young could change again within one tick of its clock


def directory() -> Path:
    """Where claims are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi_vl" / "verified"


@dataclass(frozen=True)
class Claim:
    """A file in one state, and what its content has to be.

    Attributes:
        key: of file and content.
        state: what must not have changed.
        settled: whether the state is old enough to say so.
    """

    key: str
    state: tuple[int, ...]
    settled: bool

    @classmethod
    def of(cls, status: os.stat_result, hashes: Iterable[tuple[str, str]]) -> Claim:
        """That a file of this status has tensors of these names and hashes."""
        identity = json.dumps([status.st_dev, status.st_ino, sorted(hashes)])
        young = time.time() - max(status.st_mtime, status.st_ctime) < SETTLED
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return cls(content_hash(identity.encode()), state, not young)

    def is_remembered(self) -> bool:
        """Whether it was found to hold, and nothing has changed since."""
        try:
            return json.loads((directory() / self.key).read_text(encoding="utf-8")) == list(self.state)
        except (OSError, ValueError, RuntimeError):
            return False

    def remember(self) -> None:
        """It was found to hold. Where nothing can be written it is found again the next time."""
        if not self.settled:
            return
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
            directory().mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=directory(), delete=False, encoding="utf-8") as file:
                json.dump(self.state, file)
            os.replace(file.name, directory() / self.key)
