"""One node of a graph as its kernel sees it, and what a rule can say of it.

A rule is a function of a :class:`Call` that gives None, or what the call has and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .nodes import Tensor


@dataclass(frozen=True)
class Call:
    """An operator, its operands and its results.

    An operand is a tuple of tensors (of one, unless it is a list of tensors) or a constant: a number, a word, None, or a
    tuple of these.
    """

    operator: str
    operands: tuple[Any, ...]
    results: tuple[Tensor, ...]

    def tensors(self, place: int) -> tuple[Tensor, ...]:
        """Of an operand; none if it is a constant or not there."""
        operand = self.operands[place]
        held = operand if isinstance(operand, tuple) else ()
        return held if all(isinstance(t, Tensor) for t in held) else ()

    def dims(self, place: int) -> tuple[int, ...]:
        """Of an operand that is one tensor."""
        (one,) = self.tensors(place)
        return one.shape


Rule = Callable[[Call], "str | None"]


# Rules ---------------------------------------------------------------------------------------------------------------


def dimensions(place: int, least: int, most: int) -> Rule:
    """An operand has so many dimensions."""

    def check(call: Call) -> str | None:
        for t in call.tensors(place):
            if not least <= len(t.shape) <= most:
                expected = f"{least}" if least == most else f"{least} to {most}"
                return f"operand {place} has {len(t.shape)} dimensions, expected {expected}"
        return None

    return check


def size(place: int, axis: int, least: int = 0, most: float = math.inf, step: int = 1) -> Rule:
    """A dimension of an operand is within these, and a multiple of `step`."""

    def check(call: Call) -> str | None:
        for t in call.tensors(place):
            n = t.shape[axis]
            if not least <= n <= most or n % step:
                wanted = [f"a multiple of {step}"] if step > 1 else []
                wanted += [f"at least {least}"] if least else []
                wanted += [f"at most {most}"] if most < math.inf else []
                return f"operand {place} is {t}, expected its dimension {axis} to be {' and '.join(wanted)}"
        return None

    return check


def bytes_of(place: int, axis: int, least: int = 0, step: int = 1) -> Rule:
    """As :func:`size`, in bytes."""

    def check(call: Call) -> str | None:
        for t in call.tensors(place):
            n = t.shape[axis] * t.itemsize
            if n < least or n % step:
                wanted = f"a multiple of {step}" if step > 1 else f"at least {least}"
                return f"operand {place} is {t}, expected its dimension {axis} to be {wanted} bytes, not {n}"
        return None

    return check


def setting(place: int, name: str, *allowed: Any) -> Rule:
    """A constant operand is one of these."""

    def check(call: Call) -> str | None:
        value = call.operands[place]
        if value not in allowed:
            return f"has {name} {value}, expected {' or '.join(map(str, allowed))}"
        return None

    return check


def dtype(place: int, *allowed: str) -> Rule:
    """An operand is of one of these dtypes, which are fewer than the operator takes elsewhere."""

    def check(call: Call) -> str | None:
        for t in call.tensors(place):
            if t.dtype not in allowed:
                return f"operand {place} is {t.dtype}, expected {' or '.join(allowed)}"
        return None

    return check
