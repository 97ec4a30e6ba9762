"""What can go wrong with a checkpoint."""

from __future__ import annotations


class ConversionError(ValueError):
    """A checkpoint, directory or argument that cannot be used; one sentence says what it has and what to do."""


class EnvironmentProblem(RuntimeError):
    """The machine lacks something that the work needs (disk space, a package, the network), the input is fine."""
