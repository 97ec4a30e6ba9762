"""report.md: a comment on a pull request."""

from __future__ import annotations

import copy

import parity
import pytest
from markdown_it import MarkdownIt

from kimi_vl.verify.judge import Finding, judge_run
from kimi_vl.verify.markdown import LISTED, render_markdown
from kimi_vl.verify.summary import sentence

GITHUB = 65536  # characters of a comment


def render(run):
    return render_markdown(run, judge_run(run))


def tables(text):
    """The cells of each table, by rows, as a reader of Markdown sees them."""
    found, in_cell = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and in_cell:
            found[-1][-1].append("".join(child.content for child in token.children))
        in_cell = token.type in ("th_open", "td_open")
    return found


def test_it_says_the_verdict_what_ran_where_and_each_case():
    run = parity.good()
    text = render(run)
    assert text.startswith("## Parity: PASSED\n")
    assert "held against the Torch reference of src" in text and "mindspore not installed" in text
    chain, cases = tables(text)
    assert ["Ascend device", "did not run: no Ascend device took part"] in [row[:2] for row in chain]
    assert ["Reloaded CPU MindIR", "did not run"] in [row[:2] for row in chain]
    assert [row[0] for row in cases[1:]] == [case["name"] for case in run["links"][0]["cases"]]
    assert {row[-1] for row in cases[1:]} == {"ok"} and {len(row) for row in cases} == {10}


def test_it_names_the_first_bad_place_of_each_case():
    text = render(parity.bad())
    assert text.startswith("## Parity: FAILED\n")
    assert "first bad is decoder layer 2 in case text: relative L2 distance 1.0e-02, allowed 1.0e-05" in text
    for case in ("text", "image", "steps"):
        assert f"\n- {case}, decoder layer 2: relative L2 distance 1.0e-02" in text
    assert {row[-1] for row in tables(text)[1][1:]} == {"FAILED"}


def test_it_tells_the_notes_and_the_operators_without_a_witness():
    run = copy.deepcopy(parity.good())
    run["links"][0]["suite"]["skipped"] = [{"name": "bucket", "what": "", "why": "too short"}]
    assert "- case bucket did not run: too short\n" in render(run)
    assert "Unwitnessed" not in render(run)
    run["links"][0]["candidate"]["unwitnessed"] = []
    assert "Unwitnessed operators: none\n" in render(run)
    run["links"][0]["candidate"]["unwitnessed"] = ["GroupedMatmulV4", "Pad"]
    assert "Unwitnessed operators: GroupedMatmulV4, Pad\n" in render(run)


def test_another_day_and_machine_change_nothing():
    later = copy.deepcopy(parity.good())
    later["header"] = {
        "date": "2026-02-03 04:05:06 +0800",
        "took_seconds": 9.0,
        "machine": "other",
        "seconds": [],
    }
    assert render(later) == render(parity.good())


@pytest.mark.parametrize("words", ["long", "many"])
def test_a_run_that_went_all_wrong_still_fits_into_a_comment(words):
    judgement = judge_run(parity.good())
    (verdict,) = judgement.verdicts
    said = "&" * 10_000 if words == "long" else "no memory " * 20
    for n in range(1000):
        verdict.findings.append(Finding(f"case {n}", "error", "raised", said, 0, False, said))
        verdict.notes.append(f"note {n}: {said}")
    text = render_markdown(parity.good(), judgement)
    assert len(text) < GITHUB
    assert f"- and {1000 - LISTED} more, in verdict.json\n" in text
    assert f"- and {1000 - LISTED} more, in report.html\n" in text


def test_what_comes_from_files_is_no_markup():
    run = copy.deepcopy(parity.good())
    path = "a|b\n<img src=x> **c** [d](e) `f`"
    run["links"][0]["candidate"]["path"] = run["links"][0]["cases"][0]["name"] = run["links"][0]["candidate"][
        "runs_on"
    ] = path
    text = render(run)
    shown = " ".join(path.split())
    chain, cases = tables(text)
    assert cases[1][0] == shown and {len(row) for row in cases} == {10}
    assert ["MindSpore graphs", shown] in [row[:2] for row in chain]
    html = MarkdownIt("commonmark").enable("table").render(text)
    for tag in ("<img", "<a ", "<code>"):
        assert tag not in html
    assert html.count("<strong>") == 1  # the verdict


def test_it_ends_where_the_terminal_does():
    for run in (parity.good(), parity.bad()):
        verdict = judge_run(run)
        word, told = sentence(run, verdict).split(": ", 1)
        assert f"## Parity: {word}\n\n**{told}**\n" in render_markdown(run, verdict)
