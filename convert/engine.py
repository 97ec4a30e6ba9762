"""Doing units of work with a few threads, so that reading, turning, hashing and writing overlap.

NumPy's copies, BLAKE3 and the system's reads and writes all leave Python's lock, so threads are enough. A target file
is begun when its first tensor comes, and gets its name when its last one is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock

import blake3

from .journal import Done, Journal
from .planning import PlannedFile
from .source_files import SourceFiles, Stopped
from .storage import PartFile, Progress
from .tensor_io import Buffers
from .transforms import PIECE_BYTES
from .work import Unit


class Engine:
    """Carries out `units` into `files` of `directory`.

    Args:
        journal: what an earlier run has done; what its hashes confirm is not done again.
        sources: waits for the source's files and is told when they are no longer needed.
        progress: called with the number of bytes that are done, by one thread at a time.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        directory: Path,
        files: Sequence[PlannedFile],
        journal: Journal,
        sources: SourceFiles,
        progress: Progress,
    ):
        self._units = sources.in_order(units)
        self._directory = directory
        self._files = {file.name: file for file in files}
        self._journal = journal
        self._sources = sources
        self._progress = progress
        self._left = Counter(target.file for unit in self._units for target in unit.targets)
        self._parts: dict[str, PartFile] = {}
        self._lock = Lock()
        self._stop = Event()
        self.done: dict[str, Done] = {}

    def run(self, workers: int) -> dict[str, Done]:
        """What was done for each unit, by its name. Raises what the first unit that fails raises."""
        queue = deque(self._units)
        try:
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(self._work, queue) for _ in range(workers)]
                try:
                    wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                    self._sources.stop()
            errors = [e for future in futures if (e := future.exception())]
            for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
                raise error
        finally:
            for part in self._parts.values():
                part.close()
        return self.done

    def _work(self, queue: deque[Unit]) -> None:
        buffers = Buffers()
        while True:
            try:
                unit = queue.popleft()
            except IndexError:
                return
            done = self._confirmed(unit, buffers)
            if done is None:
                self._sources.wait(unit.files)
                done = unit.run(self._part, buffers, self._tick)
                self._journal.add(unit.name, done)
            self._sources.finished(unit)
            self._note(unit, done)

    def _confirmed(self, unit: Unit, buffers: Buffers) -> Done | None:
        """What the journal has of a unit, if what stands in the files is that."""
        done = self._journal.done.get(unit.name)
        if done is None or set(done.written) != {target.name for target in unit.targets}:
            return None
        for target in unit.targets:
            digest, part = blake3.blake3(), self._part(target.file)
            for start in range(0, target.nbytes, PIECE_BYTES):
                self._tick(0)
                piece = buffers.take(0, min(PIECE_BYTES, target.nbytes - start))
                part.read(target.offset + start, piece.data)
                digest.update(piece.data)
            if digest.hexdigest() != done.written[target.name]:
                return None
        self._tick(unit.nbytes)
        return done

    def _note(self, unit: Unit, done: Done) -> None:
        whole = []
        with self._lock:
            self.done[unit.name] = done
            for target in unit.targets:
                self._left[target.file] -= 1
                if not self._left[target.file]:
                    whole.append(target.file)
        for name in whole:
            self._part(name).finish()

    def _part(self, name: str) -> PartFile:
        with self._lock:
            if name not in self._parts:
                file = self._files[name]
                self._parts[name] = PartFile(self._directory / name, file.nbytes)
                for offset, piece in file.framing:
                    self._parts[name].write(offset, piece)
            return self._parts[name]

    def _tick(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Stopped
        if nbytes:
            with self._lock:
                self._progress(nbytes)
