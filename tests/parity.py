"""A candidate that is the Torch reference itself, right or spoilt: what it shows, the judgement must see."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from golden import DATA
from jsonschema import Draft202012Validator

from kimi_vl.verify.cases import Limits, SeededSource, select, suite
from kimi_vl.verify.oracle import Oracle, build_oracle
from kimi_vl.verify.runner import run_suite

REPORT = {"run.json", "verdict.json", "junit.xml", "report.md", "report.html"}
KEPT = ("logits", "last_logits", "projector_out")  # without graphs with taps
LIMITS = Limits(contexts=(128, 256), chunk=64, patches=256)
# What a candidate with a processor has too, see test_inputs.py.
INPUTS = {"places": 60, "wrong": 0, "tokens_wrong": 0, "patches_wrong": 0, "raised": None}


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
        taps["last_logits"] = taps["logits"][:, np.cumsum(calls) - 1]
        taps["tapped_logits_differ"] = np.zeros(())
        self.spoil(taps, inputs, calls)
        return taps if self.taps else {k: v for k, v in taps.items() if k in KEPT}

    def greedy(self, inputs, n):
        tokens = self.oracle.greedy(inputs, n).tokens.copy()
        self.spoil_greedy(tokens)
        return tokens


FILE = {"config.json": {"bytes": 12, "sha256": "ab" * 32}}


def link(oracle: Oracle, candidate, names=()):
    """A candidate held against the reference."""
    plans = select(suite(oracle.config, candidate.limits), names)
    made = run_suite(oracle, candidate, plans, SeededSource(oracle.config), seed=1)
    made["candidate"]["files"] = FILE
    return made


def whole(*links):
    """A run of links, its provenance made up."""
    seconds = [link.get("header", {}).get("seconds", {}) for link in links]
    return {
        "header": {"date": "2025-01-01 12:00:00 +0000", "took_seconds": 1.0, "machine": "a machine"}
        | {"seconds": seconds},
        "environment": {"python": "3", "kimi-vl": "0", "mindspore": None},
        "reference": {"path": "src", "revision": None, "runs_on": "Torch on CPU", "files": FILE}
        | {"dtype": "float32", "stored": "float32"},
        "links": [{k: v for k, v in link.items() if k != "header"} for link in links],
    }


def run(oracle: Oracle, candidate, names=()):
    """A whole run of one link."""
    return whole(link(oracle, candidate, names))


@functools.cache
def oracle() -> Oracle:
    return build_oracle(DATA / "tiny8-bf16")


def spoil(taps, inputs, calls):
    taps["hidden_states"][2] *= np.float32(1.01)
    taps["logits"] *= np.float32(1.02)


@functools.cache
def good():
    """Three cases that pass; not to be changed."""
    return run(oracle(), OracleCandidate(oracle()), ("text", "image", "steps"))


@functools.cache
def bad():
    """The same, spoilt from decoder layer 2 on; not to be changed."""
    return run(oracle(), OracleCandidate(oracle(), spoil), ("text", "image", "steps"))


@functools.cache
def schema() -> Draft202012Validator:
    """The published schema of run.json."""
    text = (resources.files("kimi_vl.verify") / "schema" / "run.schema.json").read_text(encoding="utf-8")
    Draft202012Validator.check_schema(json.loads(text))
    return Draft202012Validator(json.loads(text))


def valid(path: Path) -> dict:
    """A saved run, after it was held against the schema."""
    saved = json.loads(path.read_text())
    schema().validate(saved)
    return saved
