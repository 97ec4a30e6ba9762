"""junit.xml: what the readers of a CI make of it."""

from __future__ import annotations

import copy
import re
from xml.etree import ElementTree as ET

import numpy as np
import parity
import pytest
from junitparser import Failure, JUnitXml, Skipped
from parity import OracleCandidate

from kimi_vl.verify.judge import describe_tap, judge_run
from kimi_vl.verify.junit import render_junit
from kimi_vl.verify.summary import finding_text


def render(run):
    return render_junit(run, judge_run(run))


def read(run):
    """Suite -> test -> its results, by a reader of the format."""
    suites = {suite.name: suite for suite in JUnitXml.fromstring(render(run).encode())}
    return {
        name.removeprefix("MindSpore graphs: ").removeprefix("Reloaded CPU MindIR: "): {
            test.name: test.result for test in suite
        }
        for name, suite in suites.items()
    }


@pytest.mark.parametrize("which", ["good", "bad"])
def test_a_case_is_a_suite_and_a_judged_tap_a_test(which):
    run = getattr(parity, which)()
    (verdict,) = judge_run(run).verdicts
    suites = read(run)
    assert list(suites) == ["chain", "text", "image", "steps"]
    for case in run["links"][0]["cases"]:
        taps = dict.fromkeys(describe_tap(f.tap) for f in verdict.of_case(case["name"]))
        assert list(suites[case["name"]]) == list(taps)
        failed = {describe_tap(f.tap) for f in verdict.of_case(case["name"]) if not f.ok}
        assert {name for name, result in suites[case["name"]].items() if result} == failed


def test_a_failure_says_what_the_finding_says():
    (verdict,) = judge_run(parity.bad()).verdicts
    (layer,) = read(parity.bad())["text"]["decoder layer 2"]
    assert isinstance(layer, Failure)
    assert (layer.type, layer.message) == ("rel_l2", "relative L2 distance 1.0e-02, allowed 1.0e-05")
    (logits,) = read(parity.bad())["text"]["logits"]
    says = [finding_text(f) for f in verdict.of_case("text") if f.tap == "logits" and not f.ok]
    assert len(says) > 1 and logits.text.splitlines() == says and logits.message == says[0]


def test_what_did_not_run_is_skipped_and_says_why():
    run = copy.deepcopy(parity.good())
    why = "the cache has only one length, 256"
    run["links"][0]["suite"]["skipped"] = [{"name": "bucket", "what": "a longer cache", "why": why}]
    suites = read(run)
    chain = suites["chain"]
    assert chain["Torch reference"] == chain["MindSpore graphs"] == []
    ((device,), (bundle,)) = chain["Ascend device"], chain["Reloaded CPU MindIR"]
    assert isinstance(device, Skipped) and isinstance(bundle, Skipped)
    assert device.message == "did not run: no Ascend device took part"
    assert [r.message for r in suites["bucket"]["a longer cache"]] == [why]


def test_a_tap_that_the_candidate_does_not_have_is_skipped_not_passed():
    oracle = parity.oracle()
    run = parity.run(oracle, OracleCandidate(oracle, taps=False), ("text",))
    text = read(run)["text"]
    assert text["logits"] == [] and [type(r) for r in text["decoder layer 0"]] == [Skipped]
    run["links"][0]["candidate"]["taps"] = True  # one that promises it has failed instead
    assert [type(r) for r in read(run)["text"]["decoder layer 0"]] == [Failure]


@pytest.mark.parametrize("which", ["good", "bad"])
def test_the_counts_are_those_of_the_tests(which):
    root = ET.fromstring(render(getattr(parity, which)()))
    for element in (root, *root):
        found = (len(list(element.iter(kind))) for kind in ("testcase", "failure", "error", "skipped"))
        counts = tuple(int(element.get(kind)) for kind in ("tests", "failures", "errors", "skipped"))
        assert counts == tuple(found)
    assert (root.get("failures") == "0") == (which == "good")
    named = [(test.get("classname"), test.get("name")) for test in root.iter("testcase")]
    assert len(set(named)) == len(named)  # GitLab takes two of one name for one


def test_the_versions_are_properties():
    (chain, *_) = JUnitXml.fromstring(render(parity.good()).encode())
    properties = {p.name: p.value for p in chain.properties()}
    assert properties["mindspore"] == "not installed" and properties["python"] == "3"
    assert properties["profile"] == "strict" and properties["candidate"] == "ckpt"


def test_another_day_and_machine_change_the_timestamp_alone():
    later = copy.deepcopy(parity.good())
    later["header"] = {
        "date": "2026-02-03 04:05:06 +0800",
        "took_seconds": 9.0,
        "machine": "other",
        "seconds": {},
    }
    one, two = render(parity.good()), render(later)
    assert 'timestamp="2026-02-03T04:05:06+08:00"' in two and one != two
    assert re.sub(' timestamp=".*?"', "", one, count=1) == re.sub(' timestamp=".*?"', "", two, count=1)


def test_a_candidate_that_raised_or_gave_a_nan_has_failed_whatever_its_words_are():
    def fail(taps, inputs, calls):
        if len(calls) > 1:
            raise RuntimeError("\x1b[31mno <memory> & \ud800\x00")
        taps["logits"][0, -1, 0] = np.nan

    oracle = parity.oracle()
    suites = read(parity.run(oracle, OracleCandidate(oracle, fail), ("image", "steps")))
    (raised,) = suites["steps"]["the candidate's call"]
    assert raised.message == "RuntimeError: \ufffd[31mno <memory> & \ufffd\ufffd"
    (nan,) = suites["image"]["logits"]
    assert nan.type == "nonfinite" and nan.message.startswith("NaN or infinity at 1 places")


def test_a_run_without_cases_has_a_failed_test():
    empty = copy.deepcopy(parity.good())
    empty["links"][0]["cases"] = []
    assert "no case was run at all" in render(empty)
    assert int(ET.fromstring(render(empty)).get("failures")) == 1
