"""The device report: what a ladder found, as JSON with a digest for a program and as Markdown for people."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np

FORMAT, VERSION = "kimi_vl-device-report", 1
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

# What nobody knew before a device was there (docs/ascend-operators.md), and where the answer stands.
QUESTIONS = (
    ("ms.load and GraphCell with list operands", "operators"),
    ("ms.load and GraphCell with the weights that the graphs name", "load"),
    ("KVCacheScatterUpdate writes a reloaded parameter in place, before it is read", "cache"),
    ("FusedInferAttentionScore at the bundle's head dims: accuracy, time, rows past the length", "operators"),
    ("operators without an aclnn kernel of their name (plain variants)", "operators"),
    ("which CANN has the kernels that this MindSpore calls", "environment"),
    ("GroupedMatmulV4 with an empty group, and the order of MoeInitRoutingV2", "operators"),
    ("prefill and decode share one copy of weights and caches", "sharing"),
    ("kernel-launch capture", "capture"),
    ("the network computes what the reference does", "decode"),
)


class ReportError(ValueError):
    """A device report that is damaged, or of another version."""


def encode(array: np.ndarray) -> dict:
    """An array for JSON, bit for bit."""
    array = np.ascontiguousarray(array)
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def decode(held: dict) -> np.ndarray:
    """Raises ReportError: it is no array of numbers."""
    try:
        dtype = np.dtype(held["dtype"])
        if dtype.kind not in "fiu":
            raise ValueError(f"dtype {dtype}")
        return np.frombuffer(base64.b64decode(held["base64"]), dtype).reshape(held["shape"])
    except (KeyError, TypeError, ValueError) as e:
        raise ReportError(
            f"the report holds no array where one is expected ({e}); run the ladder again"
        ) from None


def digest(report: dict) -> str:
    rest = {k: v for k, v in report.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_report(path: Path, report: dict) -> None:
    """`path` as JSON and beside it the same as Markdown; each appears whole or not at all."""
    report = {"format": FORMAT, "version": VERSION, **report}
    report["sha256"] = digest(report)
    for to, text in ((path, json.dumps(report, indent=1)), (path.with_suffix(".md"), markdown(report))):
        temporary = Path(f"{to}.part")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, to)


def read_report(path: Path) -> dict:
    """A report whose digest agrees.

    Raises:
        ReportError: it is missing, damaged, or of another version.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ReportError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise ReportError(f"{path}: is damaged or no device report: not valid JSON ({e})") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ReportError(f"{path}: is no device report; run_on_device.py in a bundle writes one")
    if report.get("version") != VERSION:
        raise ReportError(
            f"{path}: has version {report.get('version')!r}, this program reads {VERSION}; run the ladder again"
        )
    if report.get("sha256") != digest(report):
        raise ReportError(f"{path}: is damaged: its content does not have the digest it was saved with")
    return report


def status_of(items: list[dict]) -> str:
    return FAILED if any(not item["ok"] for item in items) else PASSED


def line(rung: dict) -> str:
    """`passed  decode     4 of 4, 12.3 s: nearest …`."""
    held = sum(item["ok"] for item in rung["items"])
    counted = f"{held} of {len(rung['items'])}, {rung['seconds']:.1f} s" if rung["items"] else ""
    return f"{rung['status']:8} {rung['name']:12} {counted}{': ' if counted else ''}{rung['says']}"


def answers(rungs: list[dict]) -> list[dict]:
    """Each question with its rung, that rung's status, and what its items answered."""
    by_name = {rung["name"]: rung for rung in rungs}
    found = []
    for question, name in QUESTIONS:
        rung = by_name.get(name)
        told = [
            f"{i['item']}: {i['answer']}"
            for i in (rung["items"] if rung else ())
            if isinstance(i.get("answer"), str)
        ]
        status = rung["status"] if rung else "not run"
        found.append(
            {
                "question": question,
                "rung": name,
                "status": status,
                "answers": [t.splitlines()[0] for t in told],
            }
        )
    return found


def markdown(report: dict) -> str:
    """To be pasted into an issue."""
    device = report["device"]
    bundle = report["bundle"]
    lines = [
        "# Device report",
        "",
        f"Bundle for {bundle['target']} in {bundle['dtype']}, `bundle.json` SHA-256 `{bundle['manifest'][:16]}`, pack "
        f"`{(report['pack'] or 'none')[:16]}`",
        f"Ran on: {device['target']}"
        + (f", {device['name']}" if device["name"] else ", which did not answer"),
        "",
        "| rung | status | items | what |",
        "|---|---|---|---|",
    ]
    for rung in report["rungs"]:
        held = sum(item["ok"] for item in rung["items"])
        lines.append(
            f"| {rung['name']} | {rung['status']} | {held} of {len(rung['items'])} | {_cell(rung['says'])} |"
        )
    lines += ["", "## Questions", "", "| question | rung | status | answer |", "|---|---|---|---|"]
    for entry in report["questions"]:
        told = "; ".join(entry["answers"])
        lines.append(f"| {entry['question']} | {entry['rung']} | {entry['status']} | {_cell(told)} |")
    for rung in report["rungs"]:
        lines += ["", f"## {rung['name']}: {rung['what']}", ""]
        lines += [
            f"* {'ok' if i['ok'] else '**FAILED**'} `{i['item']}`: {_cell(i['says'])}" for i in rung["items"]
        ]
        lines += [f"* {rung['says']}"] if not rung["items"] else []
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
