"""Releases of MindSpore and of CANN that belong together, and which of them run a graph for Ascend.

The front ends of 2.7.0, 2.7.1, 2.7.2, 2.9.0 and 2.10.0 trace the graphs for Ascend to the same nodes, and read each
other's, but for one: GroupedMatmulV4 has an operand more from 2.7.1 on, and a front end refuses a graph that has
another number. See ``docs/ascend-operators.md``.
"""

from __future__ import annotations

from typing import Any

from .lint import operator

# MindSpore -> the CANN that its release notes name. Of 2.10.0 no pair is known.
CANN = {"2.7.0": "8.2.RC1", "2.7.1": "8.3.RC1", "2.7.2": "8.5.0", "2.9.0": "9.0.0"}
# Operands of operators that have not as many in every release.
OPERANDS = {"GroupedMatmulV4": {release: 16 if release == "2.7.0" else 17 for release in CANN}}


def run_by(model: Any) -> set[str]:
    """The releases of MindSpore that take a graph, of those in `CANN`."""
    return {
        release
        for release in CANN
        if all(
            len(node.input) == OPERANDS[operator(node)][release]
            for node in model.graph.node
            if operator(node) in OPERANDS
        )
    }
