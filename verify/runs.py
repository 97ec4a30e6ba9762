"""A run as a file: where it comes from, which links of the chain it executed, and the raw figures of each.

A run holds no verdict, so that it can be judged again with other thresholds. `header` holds what differs from one run
to the next (date, times, machine); everything else repeats.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .sealed import Kind

FORMAT, VERSION = "kimi_vl-parity-run", 2


class RunError(ValueError):
    """A run file that is damaged or none."""


# ---- where it comes from --------------------------------------------------------------------------------------------


def header(started: float) -> dict[str, Any]:
    """What differs from one run to the next; times of cases are added to it."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started)),
        "took_seconds": round(time.time() - started, 1),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
    }


def environment() -> dict[str, str | None]:
    """Versions of what takes part; None is not installed."""
    packages: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kimi-vl", "mindspore", "torch", "transformers", "numpy", "safetensors"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return packages


MODEL_FILES = (".json", ".safetensors", ".mindir", ".ckpt")


def file_hashes(directory: Path, kinds: Sequence[str] = MODEL_FILES) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of what a model is made of: configurations, indexes, manifests, weights, graphs."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix in kinds:
            digest = hashlib.sha256()
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
            found[path.relative_to(directory).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": digest.hexdigest(),
            }
    return found


def assembled(
    started: float,
    versions: dict[str, str | None],
    files: dict[str, dict[str, Any]],
    links: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The run of `links` as :func:`verify.runner.run_suite` gives them; it lacks only what the reference is called.

    Args:
        versions: see :func:`environment`.
        files: the reference's, see :func:`file_hashes`.
    """
    seconds = [link["header"]["seconds"] for link in links]
    return {
        "header": header(started) | {"seconds": seconds},
        "environment": versions,
        "reference": {
            "class": "transformers Kimi_K25ForConditionalGeneration",
            "runs_on": f"Torch {versions['torch']} on CPU",
            "dtype": "float32",
            "files": files,
        },
        "links": [{name: part for name, part in link.items() if name != "header"} for link in links],
    }


# ---- the chain ------------------------------------------------------------------------------------------------------

# Where the published model becomes the one that ships; a link of another kind has its row where it is met.
CHAIN = ("MindSpore graphs", "Reloaded CPU MindIR", "Ascend MindIR, interpreted")
LAYER_BY_LAYER = f"{CHAIN[0]}, layer by layer"
_TARGETS = {"cpu": "CPU", "ascend": "Ascend", "lite": "Lite"}


def stage_name(candidate: dict[str, Any]) -> str:
    """What a link's stage is called."""
    rounded = ", rounded" if candidate.get("arithmetic") == "rounded" else ""
    if candidate["stage"] == "network":
        return LAYER_BY_LAYER if candidate.get("streamed") else CHAIN[0] + rounded
    if candidate["stage"] == "bundle":
        return CHAIN[1] + rounded if not candidate["on_device"] else "Reloaded MindIR"
    return f"{_TARGETS[candidate['target']]} MindIR, interpreted{rounded}"


def stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The chain from Torch to the device: what this run executed, and what it did not.

    Each with `stage`, `ran`, `where` and, for what was judged, `link`: its place in the run's `links`.
    """
    found = [(stage_name(link["candidate"]), n) for n, link in enumerate(run["links"])]
    known = {name for name, _ in found}
    rows = (LAYER_BY_LAYER, *CHAIN[1:]) if LAYER_BY_LAYER in known else CHAIN
    order = {name: place for place, name in enumerate(rows)}
    names = sorted({*rows, *known}, key=lambda name: (order.get(name.removesuffix(", rounded"), 9), name))
    chain = [{"stage": "Torch reference", "ran": True, "where": f"{run['reference']['runs_on']}, fp32"}]
    for name in names:
        here = [n for stage, n in found if stage == name]
        for n in here:
            where = run["links"][n]["candidate"]["runs_on"]
            chain.append({"stage": name, "ran": True, "where": where, "link": n})
        if not here:
            chain.append({"stage": name, "ran": False, "where": "did not run"})
    devices = [_device(n, link) for n, link in enumerate(run["links"])]
    nothing = {"stage": "Ascend device", "ran": False, "where": "did not run: no Ascend device took part"}
    return chain + ([d for d in devices if d] or [nothing])


def _device(n: int, link: dict[str, Any]) -> dict[str, Any] | None:
    """The device's row of a link that has one."""
    if "device" in link:
        from .device import where  # it takes file hashes from here

        ran, said = where(link["device"])
        return {"stage": "Ascend device", "ran": ran, "where": said, "device_of": n}
    if link["candidate"]["on_device"]:
        return {"stage": "Ascend device", "ran": True, "where": link["candidate"]["runs_on"]}
    return None


# ---- files ----------------------------------------------------------------------------------------------------------


def save_run(run: dict[str, Any], path: Path) -> None:
    """Writes the run with a digest of its content; the file appears whole or not at all."""
    _FILE.save(run, path)


def load_run(path: Path) -> dict[str, Any]:
    """A saved run.

    Raises:
        RunError: the file is missing, is no run, is damaged, or comes from another version.
    """
    return _FILE.load(path)


_FILE = Kind(FORMAT, VERSION, "run", "the run.json of a report directory", "run it again", RunError)
