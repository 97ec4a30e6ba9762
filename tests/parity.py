"""A candidate that is the Torch reference itself, right or spoilt: what it shows, the judgement must see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimi_vl.verify.cases import Limits, SeededSource, select, suite
from kimi_vl.verify.oracle import Oracle
from kimi_vl.verify.runner import run_suite

LIMITS = Limits(contexts=(128, 256), chunk=64, patches=256)


class OracleCandidate:
    """`spoil(taps, case inputs, calls)` and `spoil_greedy(tokens)` change what it gives, in place."""

    name = "oracle"
    limits = LIMITS

    def __init__(
        self,
        oracle: Oracle,
        spoil: Callable[..., None] = lambda taps, inputs, calls: None,
        spoil_greedy: Callable[..., None] = lambda tokens: None,
        taps: bool = True,
    ):
        self.oracle, self.spoil, self.spoil_greedy, self.taps = oracle, spoil, spoil_greedy, taps

    def describe(self):
        return {
            "kind": "converted directory" if self.taps else "bundle",
            "stage": "network" if self.taps else "bundle",
            "path": "ckpt",
            "runs_on": "Torch on CPU",
            "on_device": False,
            "dtype": "float32",
            "taps": self.taps,
        }

    def run(self, inputs, calls):
        taps = self.oracle.run(inputs)
        taps = {k: v.copy() for k, v in taps.items() if k not in ("router_gap", "router_topk_weights")}
        taps["tapped_logits_differ"] = np.zeros(())
        self.spoil(taps, inputs, calls)
        return taps if self.taps else {k: v for k, v in taps.items() if k in ("logits", "projector_out")}

    def greedy(self, inputs, n):
        tokens = self.oracle.greedy(inputs, n).tokens.copy()
        self.spoil_greedy(tokens)
        return tokens


def run(oracle: Oracle, candidate, names=()):
    """A whole run, its provenance made up."""
    plans = select(suite(oracle.config, candidate.limits), names)
    made = run_suite(oracle, candidate, plans, SeededSource(oracle.config), seed=1)
    made["header"] |= {"date": "2025-01-01", "took_seconds": 1.0, "machine": "a machine"}
    file = {"config.json": {"bytes": 12, "sha256": "ab" * 32}}
    made["candidate"]["files"] = file
    made["reference"] = {"path": "src", "revision": None, "runs_on": "Torch on CPU", "files": file}
    made["reference"] |= {"dtype": "float32", "stored": "float32"}
    made["environment"] = {"python": "3", "kimi-vl": "0", "mindspore": None}
    return made
