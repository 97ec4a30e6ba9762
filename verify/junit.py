"""The verdict as JUnit XML, as GitHub's actions, GitLab and Jenkins read it.

A suite per stage and case with a test per judged tap, and before them the chain: a stage that did not run is a skipped test, never
a passed one. `timestamp` of the root is the run's date; everything else repeats with the figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from .judge import ON_DEVICE, Finding, Judgement, Verdict, describe_tap
from .runs import stage_name, stages
from .summary import finding_text

FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # XML 1.0 has no form for these


def render_junit(run: dict[str, Any], judgement: Judgement) -> str:
    """The whole file."""
    root = ET.Element("testsuites", name="verify-parity", timestamp=_iso(run["header"]["date"]))
    root.append(_chain(run, judgement))
    for link, verdict in zip(run["links"], judgement.verdicts):
        _link(root, link, verdict)
    for suite in root:
        _count(suite, [suite])
    _count(root, root)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _link(root: ET.Element, link: dict[str, Any], verdict: Verdict) -> None:
    """A suite per case, its name after that of the stage."""
    stage = stage_name(link["candidate"])
    missing = {} if link["candidate"]["taps"] else {c["name"]: c["missing"] for c in link["cases"]}
    by_case: dict[str, list[Finding]] = {case["name"]: [] for case in link["cases"]}
    for finding in verdict.findings:
        by_case.setdefault(finding.case, []).append(finding)
    for name, findings in by_case.items():
        suite = ET.SubElement(
            root, "testsuite", name=_text(name if name.endswith(ON_DEVICE) else f"{stage}: {name}")
        )
        for tap in dict.fromkeys(f.tap for f in findings):
            _judged(suite, describe_tap(tap), [f for f in findings if f.tap == tap])
        for tap in missing.get(name, ()):
            _skipped(suite, describe_tap(tap), "not available in this candidate")
    for skipped in link["suite"]["skipped"]:
        suite = ET.SubElement(root, "testsuite", name=_text(f"{stage}: {skipped['name']}"))
        _skipped(suite, skipped["what"], skipped["why"])


def _chain(run: dict[str, Any], judgement: Judgement) -> ET.Element:
    """What ran where, with which versions, and the notes."""
    suite = ET.Element("testsuite", name="chain")
    told = [("profile", name) for name in judgement.profiles] + [("reference", run["reference"]["path"])]
    told += [("candidate", link["candidate"]["path"]) for link in run["links"]]
    properties = ET.SubElement(suite, "properties")
    for name, value in [*told, *run["environment"].items()]:
        ET.SubElement(properties, "property", name=name, value=_text(value or "not installed"))
    for stage in stages(run):
        if stage["ran"]:
            test = _test(suite, stage["stage"])
            ET.SubElement(test, "system-out").text = _text(stage["where"])
        else:
            _skipped(suite, stage["stage"], stage["where"])
    if judgement.notes:
        ET.SubElement(suite, "system-out").text = _text("\n".join(judgement.notes))
    return suite


def _test(suite: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"parity.{suite.get('name')}", name=_text(name))


def _judged(suite: ET.Element, name: str, findings: list[Finding]) -> None:
    """A tap's checks; readers show one failure of a test, so all that failed are in it."""
    test = _test(suite, name)
    if failed := [f for f in findings if not f.ok]:
        says = [_text(finding_text(f)) for f in failed]
        failure = ET.SubElement(test, "failure", type=failed[0].metric, message=says[0])
        failure.text = "\n".join(says)
    if held := [finding_text(f) for f in findings if f.ok]:
        ET.SubElement(test, "system-out").text = _text("\n".join(held))


def _skipped(suite: ET.Element, name: str, why: str) -> None:
    ET.SubElement(_test(suite, name), "skipped", message=_text(why))


def _count(element: ET.Element, suites: Iterable[ET.Element]) -> None:
    """The counts that readers expect as attributes."""
    tests = [test for suite in suites for test in suite.iter("testcase")]
    element.set("tests", str(len(tests)))
    element.set("failures", str(sum(test.find("failure") is not None for test in tests)))
    element.set("errors", "0")
    element.set("skipped", str(sum(test.find("skipped") is not None for test in tests)))


def _iso(date: str) -> str:
    """`2026-11-24 11:12:23 +0000`, as a run holds it, in the form of XML Schema."""
    return datetime.strptime(date, "%Y-%m-%d %H:%M:%S %z").isoformat()


def _text(value: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)
