"""Graphs that differ in one length alone, a context or a number of patches: a third one from two that were traced.

Tracing takes seconds, and what a trace of another length changes are numbers that stand for it. Two traces show which:
where they agree a number does not depend on the length, where they differ it must be proportional to it (a length, or a
multiple), or a table of the places 0, 1, 2, … up to it. Whatever else differs, such as other nodes, makes them unlike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


class Unlike(Exception):
    """Two graphs differ in more than a length."""


@dataclass(frozen=True)
class Lengths:
    """Of the two graphs that were traced, and of the one that is wanted."""

    first: int
    last: int
    wanted: int

    def number(self, first: int, last: int) -> int:
        """What stands for `first` and `last` in the wanted graph."""
        if isinstance(first, bool) or not isinstance(first, int) or first * self.last != last * self.first:
            raise Unlike
        number, rest = divmod(first * self.wanted, self.first)
        if rest:
            raise Unlike
        return number

    def places(self, first: bytes, last: bytes) -> bytes:
        """The same of tensors of places."""
        if first != _places(self.first) or last != _places(self.last):
            raise Unlike
        return _places(self.wanted)


def scaled(first: Any, last: Any, lengths: Lengths) -> Any:
    """The ModelProto of the wanted length.

    Raises:
        Unlike: `first` and `last` differ in more than their lengths, or the wanted one would have a fraction.
    """
    model = type(first)()
    model.CopyFrom(first)
    _scale(first, last, model, lengths)
    return model


def _scale(first: Any, last: Any, out: Any, lengths: Lengths) -> None:
    """Changes `out`, which is a copy of `first`, where `last` differs."""
    a, b = first.ListFields(), last.ListFields()
    if [f.number for f, _ in a] != [f.number for f, _ in b]:
        raise Unlike
    for (field, x), (_, y) in zip(a, b):
        if x == y:
            continue
        inner = getattr(out, field.name)
        if isinstance(x, bytes):
            setattr(out, field.name, lengths.places(x, y))
        elif hasattr(x, "ListFields"):
            _scale(x, y, inner, lengths)
        elif field.enum_type or isinstance(x, str):
            raise Unlike
        elif not hasattr(x, "__len__"):
            setattr(out, field.name, lengths.number(x, y))
        elif len(x) != len(y) or hasattr(x, "keys"):
            raise Unlike
        elif hasattr(x[0], "ListFields"):
            for parts in zip(x, y, inner):
                if parts[0] != parts[1]:
                    _scale(*parts, lengths)
        else:
            inner[:] = [m if m == n else lengths.number(m, n) for m, n in zip(x, y)]


def _places(length: int) -> bytes:
    return np.arange(length, dtype=np.int32).tobytes()
