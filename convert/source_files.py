"""When the files of a source are there, and when they are no longer needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from threading import Condition, Thread

from . import hub
from .published import PublishedWeights
from .storage import Progress
from .work import Unit

AHEAD = 2  # files of the Hub that are on the disk at once, where each is discarded after its use


class SourceFiles:
    """Files that are there from the beginning and stay."""

    def in_order(self, units: Iterable[Unit]) -> list[Unit]:
        """The units in the order in which their files come."""
        return list(units)

    def wait(self, files: Iterable[str]) -> None:
        """Returns when all of `files` are there. Raises what their download raised."""

    def finished(self, unit: Unit) -> None:
        """A unit is done, and needs its files no more."""

    def stop(self) -> None:
        """Nothing more will be waited for."""


class Stopped(Exception):
    """The work has come to an end elsewhere."""


class HubFiles(SourceFiles):
    """Shards of a Hub repository: one thread downloads them by name, the units that need only what is there go ahead.

    Args:
        weights: the checkpoint, its shards described by their headers.
        directory: where shards go that are removed as soon as no unit needs them; None is the Hub's cache, where they
            stay. What the cache holds already is used from there, and stays.
        done: the names of units that need no files, as far as is known.
        progress: called with the number of bytes that came, from the downloading thread.
    """

    def __init__(
        self, weights: PublishedWeights, directory: Path | None, done: Container[str], progress: Progress
    ):
        assert weights.source.repository
        self._repository = weights.source.repository
        self._files = weights.files
        self._directory = directory
        self._done = done
        self._progress = progress
        self._condition = Condition()
        self._wanted: list[str] = []
        self._left: Counter[str] = Counter()
        self._discardable: dict[str, Path] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._awaited: set[str] = set()

    def in_order(self, units: Iterable[Unit]) -> list[Unit]:
        ordered = sorted(units, key=lambda unit: max(unit.files, default=""))
        self._left = Counter(file for unit in ordered for file in unit.files)
        self._wanted = sorted({file for u in ordered if u.name not in self._done for file in u.files})
        Thread(target=self._download_all, daemon=True).start()
        return ordered

    def wait(self, files: Iterable[str]) -> None:
        with self._condition:
            missing = sorted(name for name in files if not self._files[name].attached)
            unexpected = [name for name in missing if name not in self._wanted]
            self._wanted += unexpected  # of a unit that turned out not to be done
            self._awaited.update(missing)
            self._condition.notify_all()
            self._condition.wait_for(
                lambda: self._stopped or self._error or all(self._files[name].attached for name in missing)
            )
            if self._error:
                raise self._error
            if self._stopped:
                raise Stopped

    def finished(self, unit: Unit) -> None:
        with self._condition:
            for name in unit.files:
                self._left[name] -= 1
                if not self._left[name] and name in self._discardable:
                    self._files[name].detach()
                    self._discardable.pop(name).unlink()
            self._condition.notify_all()

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def _download_all(self) -> None:
        try:
            at = 0
            while True:
                with self._condition:
                    while not (self._stopped or self._may_download(at)):
                        self._condition.wait()
                    if self._stopped:
                        return
                    name = self._wanted[at]
                self._download(name)
                at += 1
        except BaseException as e:
            with self._condition:
                self._error = e
                self._condition.notify_all()

    def _may_download(self, at: int) -> bool:
        # However many files a unit needs at once, it gets them.
        return at < len(self._wanted) and (len(self._discardable) < AHEAD or bool(self._awaited))

    def _download(self, name: str) -> None:
        path = hub.cached(self._repository, name)
        if path:
            hub.check_cached(path, self._repository.file(name))
        else:
            path = hub.download(self._repository, name, self._directory, self._came)
        with self._condition:
            self._files[name].attach(path)
            if self._directory and path.parent == self._directory:
                self._discardable[name] = path
            self._awaited.discard(name)
            self._condition.notify_all()

    def _came(self, nbytes: int) -> None:
        if self._stopped:
            raise Stopped
        self._progress(nbytes)
