"""Rounded arithmetic is judged by what rounding costs the reference: as much passes, more fails, at the right place."""

from __future__ import annotations

import copy
from dataclasses import replace

import bundles
import numpy as np
import parity
import pytest
import torch
from golden import DATA
from parity import LIMITS, OracleCandidate

from kimi_vl.modeling.kernels import library
from kimi_vl.verify.candidates import inspect, open_candidate
from kimi_vl.verify.cases import SeededSource, select, suite
from kimi_vl.verify.judge import SUITE, ProfileError, judge, judge_run, load_profile
from kimi_vl.verify.metrics import settled_places
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.report import render_html
from kimi_vl.verify.runner import run_suite
from kimi_vl.verify.runs import save_run
from kimi_vl.verify.summary import finding_text, summary

BF16 = load_profile("bf16")
NAMES = ("text", "image")


@pytest.fixture(scope="module")
def oracles():
    return build_oracle(DATA / "tiny8-bf16"), build_oracle(DATA / "tiny8-bf16", torch.bfloat16)


class Rounded(OracleCandidate):
    """As far from the fp32 reference as its own bf16 run, in the same direction, `times` as far."""

    def __init__(self, oracles, times):
        super().__init__(oracles[0])
        self.low, self.times = oracles[1], np.float32(times)

    def run(self, inputs, calls):
        exact, low = self.oracle.run(inputs), self.low.run(inputs)
        far = {k: exact[k] + self.times * (low[k] - exact[k]) for k in low if low[k].dtype == np.float32}
        far["last_logits"] = far["logits"][:, np.cumsum(calls) - 1]
        kept = ("router_gap", "router_topk_weights")
        return {k: v for k, v in (low | far).items() if k not in kept} | {
            "tapped_logits_differ": np.zeros(())
        }

    def describe(self):
        return super().describe() | {"arithmetic": "rounded", "unwitnessed": ["FusedInferAttentionScore"]}


class SameExperts(Rounded):
    """Rounded as the reference is, but every token takes the experts of the fp32 reference."""

    def run(self, inputs, calls):
        experts = self.oracle.run(inputs)["router_topk_indices"]
        taps = self.low.run(inputs, experts)
        return taps | {"last_logits": taps["logits"][:, np.cumsum(calls) - 1]}


class Untold(Rounded):
    """Does not say which experts it takes."""

    def run(self, inputs, calls):
        return {k: v for k, v in super().run(inputs, calls).items() if k in parity.KEPT}

    def describe(self):
        return super().describe() | {"taps": False}


def run(oracles, times, kind=Rounded):
    plans = select(suite(oracles[0].config, LIMITS), NAMES)
    source = SeededSource(oracles[0].config)
    made = run_suite(oracles[0], kind(oracles, times), plans, source, seed=1, rounded=oracles[1])
    made["candidate"]["files"] = parity.FILE
    return made


@pytest.fixture(scope="module")
def clean(oracles):
    return run(oracles, 1)


def test_the_references_own_rounding_passes_and_is_in_the_run(clean, tmp_path):
    save_run(parity.whole(clean), tmp_path / "run.json")
    parity.valid(tmp_path / "run.json")
    verdict = judge(clean, BF16)
    assert verdict.passed and {f.case for f in verdict.findings} == {*NAMES, SUITE}
    for case in clean["cases"]:
        own, taps = case["calibration"], case["taps"]
        assert own["layers.2"]["nmse_settled"] == taps["layers.2"]["nmse_settled"] > 1e-7
    ratios = [f.value for f in verdict.findings if f.tap.startswith("layers.") and f.value != "no places"]
    assert ratios and ratios == pytest.approx([1.0] * len(ratios))


@pytest.mark.parametrize("kind", [SameExperts, Untold])
def test_what_rounding_costs_the_reference_is_measured_where_the_candidate_is_judged(oracles, clean, kind):
    """Also where the reference's own rounded run took another expert, and the candidate did not."""
    flips = [case["calibration"]["router.1"]["flipped"] for case in clean["cases"]]
    assert any(flips)
    made = run(oracles, 1, kind)
    assert judge(made, BF16).passed
    for case in made["cases"]:
        for tap in set(case["taps"]) & {"layers.2", "logits", "last_logits"}:
            own, taps = case["calibration"][tap], case["taps"][tap]
            assert own["nmse_untouched"] == pytest.approx(taps["nmse_untouched"], rel=1e-6)
            assert taps["nmse_untouched"] == taps["nmse"]


@pytest.mark.skipif(
    not (library.available() and library.can_round()),
    reason="needs the C++ operators and instructions for bf16",
)
def test_operators_that_round_are_closer_to_fp32_than_torch_in_bf16(oracles):
    """In every case and at every stage, over the tokens before either side's first other expert."""
    found = replace(inspect(bundles.converted("tiny8-bf16"), arithmetic="rounded"), limits=LIMITS)
    plans = select(suite(oracles[0].config, LIMITS), ("images", "steps"))
    source = SeededSource(oracles[0].config)
    made = run_suite(oracles[0], open_candidate(found), plans, source, seed=2, rounded=oracles[1])
    ratios = {}
    for case in made["cases"]:
        for tap, figures in case["taps"].items():
            own = case["calibration"].get(tap, {})
            metric = "nmse_untouched" if "nmse_untouched" in figures else "nmse"
            if figures.get(metric) is not None and own.get(metric):  # none of an embedding
                ratios[case["name"], tap] = figures[metric] / own[metric]
    assert {tap for _, tap in ratios} >= {"vision_out", "projector_out", "layers.0", "layers.2", "logits"}
    assert all(0 < ratio < 1 for ratio in ratios.values()), ratios


def test_a_rule_without_a_witness_is_noted(clean):
    assert any(
        n.startswith("unwitnessed operators: FusedInferAttentionScore;") for n in judge(clean, BF16).notes
    )


def test_three_times_the_energy_is_too_much_for_the_suite_nine_times_for_a_case(oracles):
    three = judge(run(oracles, np.sqrt(3)), BF16)
    layers = [f for f in three.failures if f.tap.startswith("layers.")]
    assert layers and {f.case for f in layers} == {SUITE}
    nine = judge(run(oracles, 3), BF16)
    assert {*NAMES, SUITE} <= {f.case for f in nine.failures if f.tap == "layers.2"}
    says = finding_text(next(f for f in nine.failures if f.tap == "layers.2"))
    assert "9.0e+00, allowed" in says and "times what rounding costs the reference itself" in says


@pytest.mark.parametrize("gate", BF16.gates, ids=lambda g: f"{g.taps}-{g.metric}{'-suite' * g.suite}")
def test_a_value_beyond_the_limit_fails_and_one_at_it_does_not(clean, gate):
    tap = gate.taps.replace("*", "1")
    changed = copy.deepcopy(clean)
    case = next(c for c in changed["cases"] if c["name"] == "image")
    case["taps"]["inputs"] = dict(parity.INPUTS)
    if gate.suite:
        changed["cases"] = [case]
    if gate.times_own and case["calibration"][tap][gate.metric] is None:  # what follows from another expert
        case["calibration"][tap][gate.metric] = 1e-3
    own = case["calibration"][tap][gate.metric] if gate.times_own else 0.0
    limit = max(gate.at_most * own, gate.floor) if gate.times_own else gate.at_most
    case["taps"][tap][gate.metric] = limit
    judged = [f for f in judge(changed, BF16).findings if (f.case == SUITE) == gate.suite]
    assert all(f.ok for f in judged)
    case["taps"][tap][gate.metric] = limit * 1.01 + (1 if limit == int(limit) else 0)
    failures = [f for f in judge(changed, BF16).failures if (f.case == SUITE) == gate.suite]
    assert [(f.tap, f.metric) for f in failures] == [(tap, gate.metric)]


def test_a_run_that_was_not_calibrated_cannot_be_judged_so(clean):
    bare = clean | {"cases": [{k: v for k, v in c.items() if k != "calibration"} for c in clean["cases"]]}
    with pytest.raises(ProfileError, match="run with --arithmetic rounded"):
        judge(bare, BF16)


def test_its_report_says_which_limits_are_relative(clean):
    page = render_html(parity.whole(clean), judge_run(parity.whole(clean)))
    assert "4.0e+00 x own" in page and "2.0e+00 x own, suite" in page


def test_the_worst_figures_of_a_report_are_of_what_computes_in_fp32(clean):
    alone, both = parity.good(), parity.whole(parity.good()["links"][0], clean)
    assert summary(parity.whole(clean), judge_run(parity.whole(clean)))["worst"]["logits"]["value"] > 1e-4
    assert summary(both, judge_run(both))["worst"] == summary(alone, judge_run(alone))["worst"]


def test_a_token_is_settled_until_it_takes_another_expert():
    reference = np.zeros((2, 1, 3, 2), np.int32) + [0, 1]
    candidate = reference.copy()
    candidate[0, 0, 1] = [0, 2]  # in the first layer
    candidate[1, 0, 2] = [1, 0]  # the same set
    got = settled_places(reference, candidate, np.array([[True, True, True]]))
    assert got[:, 0].tolist() == [[True, True, True], [True, False, True], [True, False, True]]
