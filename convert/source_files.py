"""When the files of a source are there, and when they are no longer needed."""

from __future__ import annotations

from collections.abc import Iterable

from .work import Unit


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
