"""A device's report, as the last link of the chain: does it belong to this bundle, and what do its figures say?

`run_on_device.py` judges itself, and writes down what it judged by. Here its verdict is not read: the arrays that it
observed are measured and judged again, with the limits of the pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..export.bundle import MANIFEST
from ..export.device import device_play, device_report
from ..export.device.device_pack import Pack, file_hash, read_pack
from .runs import file_hashes

REQUIRED = ("files", "pack")  # rungs without which nobody knows which weights ran
STAGES = ("vision", "prefill", "decode")  # rungs in whose order observations count; a later one has more

Arrays = dict[str, np.ndarray]


class DeviceError(ValueError):
    """A report that does not belong here; the message says why."""


def accept(report_path: Path, pack_path: Path, bundle: Path, reference: Path) -> dict[str, Any]:
    """What a run keeps of a device's report: where it ran, each rung's status, and figures with their limits, measured here.

    Raises:
        DeviceError, PackError, ReportError: damaged, or of another bundle, pack or reference.
    """
    report = device_report.read_report(report_path)
    pack = read_pack(pack_path)
    pack.require_bundle(bundle)
    try:
        return _accepted(report, pack, report_path, pack_path, bundle, reference)
    except (KeyError, TypeError, AttributeError) as e:
        raise DeviceError(
            f"{report_path}: lacks or misuses {e}; run the ladder of this bundle again"
        ) from None


def _accepted(
    report: dict[str, Any], pack: Pack, report_path: Path, pack_path: Path, bundle: Path, reference: Path
) -> dict[str, Any]:
    if report["pack"] != pack.digest:
        raise DeviceError(
            f"{report_path}: was made with {_short(report['pack'])}, but {pack_path} is pack {pack.digest[:12]}; give the "
            "pack that the device had"
        )
    if report["bundle"]["manifest"] != file_hash(bundle / MANIFEST):
        raise DeviceError(f"{report_path}: is of another bundle than {bundle}; run the ladder in this one")
    files = {name: found["sha256"] for name, found in file_hashes(reference).items()}
    if pack.index["reference"]["files"] != files:
        raise DeviceError(
            f"{pack_path}: was recorded against another reference than {reference}; record it again"
        )
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    device = report["device"]
    return {
        "target": device["target"],
        "name": device["name"],
        "mindspore": device["mindspore"],
        "environment": {i["item"]: i["says"] for i in rungs.get("environment", {}).get("items", ())},
        "report": report["sha256"],
        "pack": pack.digest,
        "required": list(REQUIRED),
        "rungs": [{k: rung[k] for k in ("name", "what", "status", "says")} for rung in report["rungs"]],
        "cases": [_measured(pack, case, rungs, report_path) for case in pack.cases],
    }


def _short(digest: str | None) -> str:
    return f"pack {digest[:12]}" if digest else "no pack"


def _measured(pack: Pack, case: dict[str, Any], rungs: dict[str, Any], path: Path) -> dict[str, Any]:
    """A case's figures, the limits, and the taps that it should have and does not."""
    observed: dict[str, Arrays] = {"plain": {}, "tapped": {}}
    for stage in STAGES:
        held = _item(rungs, stage, case["name"]).get("observed", {})
        for kind, arrays in observed.items():
            found = {name: device_report.decode(a) for name, a in held.get(kind, {}).items()}
            _require_like(pack, case, kind == "tapped", found, path)
            mine = ("features", "feature_norms", "vision", "vision_norms", "pictured")
            arrays.update({k: v for k, v in found.items() if (k in mine) == (stage == "vision")})
    for arrays in observed.values():
        if arrays:  # a stage that did not run gave nothing
            arrays.setdefault("pictured", np.zeros(len(case["places"]), np.int32))
            arrays.setdefault("reached", np.zeros(len(case["sampled"]), np.int32))
    tokens = _item(rungs, "tokens", case["name"]).get("observed", {}).get("tokens")
    figures = device_play.figures(
        pack,
        case,
        observed["plain"],
        observed["tapped"],
        None if tokens is None else device_report.decode(tokens),
    )
    return {
        "name": case["name"],
        "figures": figures,
        "limits": case["limits"],
        "missing": list(_missing(case, figures)),
    }


def _item(rungs: dict[str, Any], rung: str, name: str) -> dict[str, Any]:
    items = rungs.get(rung, {}).get("items", ())
    return next((item for item in items if item["item"] == name), {})


def _require_like(pack: Pack, case: dict[str, Any], tapped: bool, found: Arrays, path: Path) -> None:
    """Raises DeviceError: an array has another shape or dtype than playing the case gives."""
    wanted = device_play.unobserved(pack, case, tapped)
    for name, array in found.items():
        if name not in wanted or (wanted[name].shape, wanted[name].dtype) != (array.shape, array.dtype):
            raise DeviceError(
                f"{path}: case {case['name']} has {name} of shape {list(array.shape)}, expected what the pack's case gives; "
                "run the ladder again"
            )


def _missing(case: dict[str, Any], figures: dict[str, Any]) -> Iterator[str]:
    """Taps with a limit that were not observed at every place."""
    for tap in case["limits"]:
        places = figures.get(tap, {}).get("places", 0)
        wanted = 1
        if tap in ("vision_out", "projector_out"):
            wanted = len(case["places"])
        elif tap == "logits" or tap.startswith("layers."):
            wanted = len(case["sampled"])
        elif tap.startswith("router."):
            wanted = case["tokens"]
        if places < wanted:
            yield tap


def findings(device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each limit held against its figure; `case`, and the fields of ``device_play.judge``."""
    for case in device["cases"]:
        yield from ({"case": case["name"], **f} for f in device_play.judge(case, case["figures"]))


def where(device: dict[str, Any]) -> tuple[bool, str]:
    """Whether a device ran it, and what it was."""
    versions = f"MindSpore {device['mindspore']}"
    cann = device["environment"].get("CANN", "not found")
    if cann != "not found":
        versions += f", CANN {cann}"
    if device["target"] == "Ascend" and device["name"]:
        return True, f"{device['name']}, {versions}, report {device['report'][:12]}"
    return False, f"did not run: the device report was made on a {device['target']} ({versions})"
