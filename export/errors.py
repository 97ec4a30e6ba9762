"""What can go wrong with an export and with a bundle."""

from __future__ import annotations


class ExportError(ValueError):
    """A source, target or argument that cannot be exported; one sentence says what it has and what to do."""


class BundleError(ValueError):
    """A bundle that is damaged, or asked for what it does not hold; one sentence says which file and what to do."""
