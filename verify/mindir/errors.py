"""What the interpreter cannot do."""

from __future__ import annotations


class InterpreterError(ValueError):
    """A graph, a parameter or an input that the interpreter cannot take; the message says which and why."""


class Refused(ValueError):
    """A rule's answer to arguments outside the operator's documented semantics; the interpreter adds which node."""


def require(holds: bool, reason: str) -> None:
    """Raises Refused with `reason` unless it holds."""
    if not holds:
        raise Refused(reason)
