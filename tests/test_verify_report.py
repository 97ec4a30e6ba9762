"""What a reader sees of a run: the terminal table and the page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import parity
import pytest
from parity import OracleCandidate, run

from kimi_vl.verify.judge import judge_run
from kimi_vl.verify.report import render_html, terminal_table, write_report
from kimi_vl.verify.runs import load_run, stages
from kimi_vl.verify.summary import number, percent, sentence


@pytest.fixture(scope="module")
def oracle():
    return parity.oracle()


@pytest.fixture(scope="module")
def good():
    return parity.good()


@pytest.fixture(scope="module")
def bad():
    return parity.bad()


def page(made):
    return render_html(made, judge_run(made))


class Outside(HTMLParser):
    """Collects whatever a browser would fetch, and whether tags are closed."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [values[k] for k in ("src", "href", "data") if values.get(k, "#")[0] != "#"]
        self.fetched += [values["xlink:href"]] if values.get("xlink:href", "#")[0] != "#" else []
        if tag == "script":
            self.fetched.append("script")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("which", ["good", "bad"])
def test_the_page_needs_nothing_from_outside(which, request):
    html = page(request.getfixturevalue(which))
    parser = Outside()
    parser.feed(html)
    assert parser.fetched == [] and parser.open == []
    assert "url(http" not in html and "@import" not in html


def test_the_page_says_what_passed_and_what_ran_where(good):
    html = page(good)
    assert "PASSED" in html and "FAILED" not in html
    assert "did not run: no Ascend device took part" in html
    for case in good["links"][0]["cases"]:
        assert case["name"] in html and case["what"] in html
    assert good["reference"]["files"]["config.json"]["sha256"] in html
    assert "mindspore</td><td>not installed" in html


def test_the_page_shows_the_perplexities(oracle, good):
    made = run(oracle, OracleCandidate(oracle, parity.spoil), ("perplexity",))
    figures = made["links"][0]["cases"][0]["taps"]["perplexity"]
    html = page(made)
    for row in [*figures["by_row"], figures]:
        assert f">{row['reference']:.6g}<" in html and f">{row['candidate']:.6g}<" in html
        assert row["reference"] != row["candidate"]
    assert "Perplexity" not in page(good)


def test_the_page_names_the_first_bad_place(bad):
    html = page(bad)
    assert "FAILED" in html
    assert "first bad is decoder layer 2 in case text: relative L2 distance 1.0e-02, allowed 1.0e-05" in html
    assert html.count('class="failed"') == 3 + 1  # cases, and the stage


def test_the_figure_draws_every_case_and_the_limit(good):
    svg = re.search(r"<svg.*?</svg>", page(good), re.S).group()
    for label in ("tower", "projector", "embeds", "logits", "MindSpore graphs", "allowed (strict)"):
        assert f">{label}<" in svg
    assert svg.count('id="line2d_') > len(good["links"][0]["cases"])


def test_the_same_run_gives_the_same_page(good):
    assert page(good) == page(copy.deepcopy(good))


def test_what_comes_from_files_is_escaped(good):
    changed = copy.deepcopy(good)
    changed["links"][0]["candidate"]["path"] = "<img src=x onerror=alert(1)>"
    html = page(changed)
    assert "<img src=x" not in html and "&lt;img src=x" in html


def test_a_run_without_taps_or_with_errors_can_be_shown(oracle):
    def fail(taps, inputs, calls):
        if len(calls) > 1:
            raise RuntimeError("no <memory>")
        taps["logits"][0, -1, 0] = np.nan

    for candidate in (OracleCandidate(oracle, fail), OracleCandidate(oracle, fail, taps=False)):
        made = run(oracle, candidate, ("image", "steps"))
        verdict = judge_run(made)
        assert "NaN or infinity at 1 places, first at [0, 29, 0]" in page(made)
        assert "no &lt;memory&gt;" in page(made)
        assert "steps" in terminal_table(made, verdict) and "FAILED" in terminal_table(made, verdict)


def test_the_terminal_table_has_a_line_per_case_and_ends_with_the_verdict(good, bad):
    for made, last in ((good, "PASSED: all"), (bad, "FAILED: first bad is decoder layer 2 in case text")):
        verdict = judge_run(made)
        lines = terminal_table(made, verdict).splitlines()
        assert lines[-1].startswith(last) and lines[-1] == sentence(made, verdict)
        for case in made["links"][0]["cases"]:
            line = next(line for line in lines if line.startswith(case["name"] + " "))
            assert line.endswith("ok" if verdict.passed else "FAILED")
        assert "  Ascend device: did not run: no Ascend device took part" in lines
        assert "  Reloaded CPU MindIR: did not run" in lines
        assert max(map(len, lines[: len(made["links"][0]["cases"]) + 2])) <= 110


def test_notes_are_shown(good):
    changed = copy.deepcopy(good)
    changed["links"][0]["suite"]["skipped"] = [
        {"name": "bucket", "what": "", "why": "the cache has only one length, 256"}
    ]
    note = "case bucket did not run: the cache has only one length, 256"
    assert note in page(changed) and f"note: {note}" in terminal_table(changed, judge_run(changed))


def test_a_bundle_and_a_device_have_their_own_stage(good):
    def ran(**candidate):
        link = good["links"][0] | {"candidate": good["links"][0]["candidate"] | candidate}
        chain = stages(good | {"links": [link]})
        return [stage["stage"] for stage in chain if stage["ran"]]

    assert ran() == ["Torch reference", "MindSpore graphs"]
    assert ran(stage="bundle") == ["Torch reference", "Reloaded CPU MindIR"]
    assert ran(stage="interpreter", target="ascend") == ["Torch reference", "Ascend MindIR, interpreted"]
    assert ran(on_device=True, runs_on="MindSpore on Ascend")[-1] == "Ascend device"


def test_the_report_directory_holds_the_run_the_verdict_and_the_page(bad, tmp_path):
    verdict = judge_run(bad)
    path = write_report(tmp_path / "a" / "b", bad, verdict)
    assert {p.name for p in path.parent.iterdir()} == parity.REPORT
    saved = json.loads((path.parent / "verdict.json").read_text())
    assert saved["passed"] is False and saved["first_bad"]["tap"] == "layers.2"
    assert saved["worst"]["logits"]["value"] == pytest.approx(0.02, rel=1e-3)
    assert [case["ok"] for case in saved["links"][0]["cases"]] == [False] * 3
    assert judge_run(load_run(path.parent / "run.json")) == verdict


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0, "0"), (0.0, "0"), (1.24e-7, "1.2e-07"), (1, "1.0e+00")]
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (1.0, "100%"), (0.99999, "99.9%"), (0.5, "50%")])
def test_100_percent_means_all(value, shown):
    assert percent(value) == shown
