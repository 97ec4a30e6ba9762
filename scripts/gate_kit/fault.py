"""A fault: one mistake that somebody could make, where it is put in, and where in the network it first shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REFUSED = "refused"  # the place of a fault that ends the command before anything is compared

# What a fault is put into, and what its `change` is called with.
INTO = {
    "weights": "a bundle's tensors by name, to be read and assigned; shards and hashes follow",
    "conversion": "nothing; gives a context in which the checkpoint is converted",
    "network": "the tracer, before it traces the bundle's graphs from its cells",
    "graph": "a MindIR proto of the finished bundle, and the graph's name in the manifest",
    "host": "nothing; gives a context in which the bundle is run",
    "files": "a bundle's directory, whose configuration or processor files it rewrites; hashes follow",
}


@dataclass(frozen=True)
class Fault:
    """Attributes:
    name: short, for ``--only``.
    what: the mistake in words.
    into: one of :data:`INTO`.
    place: the tap at which it must first be seen, or `REFUSED`.
    change: makes the mistake.
    model: the checkpoint, see ``models``.
    target: of the bundle.
    through: what runs it, "interpreter" or "mindspore".
    arithmetic: "lifted" or "rounded"; what rounds is held against the limits for that.
    batch: rows of the bundle's text graphs.
    cases: what is run; empty: the suite as a user's command runs it.
    operator: the first wrong one, "layer: point" as ``verify-parity bisect`` calls them; empty where no graph of the ones
        with taps has it, or nothing but a look at the code says which it must be.
    """

    name: str
    what: str
    into: str
    place: str
    change: Callable[..., Any]
    model: str = "tiny8"
    target: str = "ascend"
    through: str = "interpreter"
    arithmetic: str = "lifted"
    batch: int = 1
    cases: tuple[str, ...] = ()
    operator: str = ""


def layer_of(tap: str) -> str:
    """The part of the network that a tap is of: a router and what its layer gives are one layer."""
    stem, _, number = tap.partition(".")
    return f"layer {number}" if stem in ("router", "layers") else stem
