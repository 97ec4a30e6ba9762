"""MindIR bundles: static graphs of a converted checkpoint, written without weights in memory, and loaded again.

`plan` says which graphs a bundle has (no MindSpore), `trace` makes one from the network or, by `scaling`, from two of
other lengths, `mindir` gives it its final form, `lint` and `legality` hold one for Ascend against what a device needs (the
table of operators is in `operators`), `memory` says what a device needs for them, `writing` puts a bundle together, `bundle`
is its manifest, `load` runs it on weights that `weights` checks, which `verified` remembers, `lite` runs it with MindSpore
Lite, and `cli` is the command ``export-mindir``.

`nodes` reads a graph back as typed nodes; `liveness`, `flops`, `summary` and `drawing` are computed from these, for the
command ``inspect-mindir`` in `inspect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import BundleError, ExportError
from .plan import BundlePlan, plan_export

if TYPE_CHECKING:
    from .load import MindIRModel
    from .writing import export

__all__ = ["BundleError", "BundlePlan", "ExportError", "MindIRModel", "export", "plan_export"]

_LAZY = {"MindIRModel": "load", "export": "writing"}  # these need MindSpore


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
