"""The published schema of run.json: every kind of run satisfies it, and what is no run does not.

Runs that the command made of MindSpore graphs, bundles, the interpreter and a device are held against it where they are
made: test_verify_cli.py and test_device_report.py.
"""

from __future__ import annotations

import json

import numpy as np
import parity
import pytest
from parity import OracleCandidate

from kimi_vl.verify.runs import save_run


@pytest.fixture
def saved(tmp_path):
    save_run(parity.good(), tmp_path / "run.json")
    return json.loads((tmp_path / "run.json").read_text())


def fails(taps, inputs, calls):
    if len(calls) > 1:
        raise RuntimeError("no memory")
    taps["logits"][0, -1, 0] = np.nan
    taps["tapped_logits_differ"].fill(np.inf)


def other_tokens(tokens):
    tokens[:, 3:] = 0


def other_experts(taps, inputs, calls):
    taps["router_topk_indices"][1] = (taps["router_topk_indices"][1] + 1) % 8
    taps["logits"][..., 0] += 100


@pytest.mark.parametrize(
    "candidate",
    [
        {},
        {"spoil": parity.spoil},
        {"spoil": fails},
        {"spoil": fails, "taps": False},
        {"spoil": other_experts, "spoil_greedy": other_tokens},
    ],
    ids=["right", "wrong", "nan", "without-taps", "other-choices"],
)
def test_a_run_satisfies_the_schema(candidate, tmp_path):
    made = parity.run(
        parity.oracle(), OracleCandidate(parity.oracle(), **candidate), ("image", "steps", "perplexity")
    )
    save_run(made, tmp_path / "run.json")
    parity.valid(tmp_path / "run.json")


def metrics(run, tap):
    return run["links"][0]["cases"][0]["taps"][tap]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda run: run.update(version=3), ["version"]),
        (lambda run: run["links"][0].pop("cases"), ["links", 0]),
        (lambda run: run.update(verdict="passed"), []),
        (lambda run: run["header"].update(date="today"), ["header", "date"]),
        (
            lambda run: run["links"][0]["candidate"].update(stage="elsewhere"),
            ["links", 0, "candidate", "stage"],
        ),
        (
            lambda run: run["reference"]["files"]["config.json"].update(sha256="?"),
            ["reference", "files", "config.json", "sha256"],
        ),
        (
            lambda run: metrics(run, "layers.1").update(rel_l2=-1.0),
            ["links", 0, "cases", 0, "taps", "layers.1", "rel_l2"],
        ),
        (
            lambda run: metrics(run, "logits").update(rel_l2="small"),
            ["links", 0, "cases", 0, "taps", "logits", "rel_l2"],
        ),
        (lambda run: metrics(run, "router.1").pop("flips"), ["links", 0, "cases", 0, "taps", "router.1"]),
        (lambda run: metrics(run, "greedy").update(speed=1), ["links", 0, "cases", 0, "taps", "greedy"]),
        (
            lambda run: run["links"][0]["cases"][0]["taps"].update({"layers.x": {}}),
            ["links", 0, "cases", 0, "taps"],
        ),
    ],
)
def test_what_is_no_run_does_not(saved, change, where):
    parity.schema().validate(saved)
    change(saved)
    (error,) = parity.schema().iter_errors(saved)
    assert list(error.absolute_path) == where
