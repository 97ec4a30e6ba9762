"""A run: the same cases through the reference and a candidate, kept as raw figures in one JSON file.

A run holds no verdict, so that it can be judged again with other thresholds. `header` holds what differs from one run
to the next (date, times, machine); everything else repeats.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..modeling.configuration import ModelConfig
from .candidates import Candidate, Found
from .cases import SUITE_VERSION, Case, Plan, Source, build, cover_experts
from .metrics import (
    comparable_places,
    greedy_metrics,
    logit_metrics,
    perplexity_metrics,
    routing_metrics,
    settled_places,
    tensor_metrics,
)
from .sealed import Kind

FORMAT, VERSION = "kimi_vl-parity-run", 1
LONGEST_COVER = 512  # tokens of the case that looks for every expert


class RunError(ValueError):
    """A run file that is damaged or none."""


class Reference(Protocol):
    """The oracle, as far as a run needs it."""

    config: ModelConfig

    def run(self, inputs: Any) -> dict[str, np.ndarray]: ...

    def greedy(self, inputs: Any, n: int) -> Any: ...


def run_suite(
    reference: Reference,
    candidate: Candidate,
    plans: Sequence[Plan],
    source: Source,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    rounded: Reference | None = None,
) -> dict[str, Any]:
    """Raw figures of every plan that the candidate can run, without provenance (see :func:`provenance`).

    A candidate that raises is recorded as the case's `error`; the reference's errors are raised.

    Args:
        rounded: the reference in the candidate's dtype; what rounding costs it is then each case's `calibration`.
    """
    config = reference.config
    used = [set[int]() for _ in config.text.moe_layers]
    cases, skipped, seconds = [], [], {}
    for plan in plans:
        if plan.impossible:
            skipped.append({"name": plan.name, "what": plan.what, "why": plan.impossible})
            continue
        progress(f"{plan.name}: {plan.what}")
        started = time.perf_counter()
        case, taps = _reference_taps(reference, candidate, plan, source, seed)
        greedy = reference.greedy(case.inputs, case.new_tokens) if case.new_tokens else None
        halfway = time.perf_counter()
        for layer, of_layer in zip(used, taps.get("router_topk_indices", ())):
            layer.update(np.unique(of_layer[of_layer >= 0]).tolist())
        cases.append(_compare(case, taps, greedy, candidate, config))
        if rounded is not None:
            cases[-1]["calibration"] = compared(case, taps, rounded.run(case.inputs), config)[0]
        seconds[plan.name] = {
            "reference": round(halfway - started, 3),
            "candidate": round(time.perf_counter() - halfway, 3),
        }
    layers = [
        {"layer": n, "used": len(of), "of": config.text.n_routed_experts}
        for n, of in zip(config.text.moe_layers, used)
    ]
    suite = {"version": SUITE_VERSION, "seed": seed, "inputs": source.kind, "skipped": skipped}
    return {
        "header": {"seconds": seconds},
        "candidate": candidate.describe(),
        "suite": suite | {"experts": layers},
        "cases": cases,
    }


def _reference_taps(
    reference: Reference, candidate: Candidate, plan: Plan, source: Source, seed: int
) -> tuple[Case, dict[str, np.ndarray]]:
    if plan.name != "experts":
        case = build(plan, source, seed)
        return case, reference.run(case.inputs)
    done: dict[int, dict[str, np.ndarray]] = {}

    def case_of(tokens: int) -> Case:
        return build(replace(plan, rows=(replace(plan.rows[0], tokens=tokens),)), source, seed)

    def used(case: Case) -> list[int]:
        taps = done[case.inputs["input_ids"].shape[1]] = reference.run(case.inputs)
        return [len(np.unique(layer)) for layer in taps["router_topk_indices"]]

    text = reference.config.text
    longest = min(LONGEST_COVER, candidate.limits.context, text.max_position_embeddings)
    case = cover_experts(case_of, used, text.n_routed_experts, longest)
    taps = done.get(case.inputs["input_ids"].shape[1])
    return case, reference.run(case.inputs) if taps is None else taps


def _compare(
    case: Case, reference: dict[str, np.ndarray], greedy: Any, candidate: Candidate, config: ModelConfig
) -> dict[str, Any]:
    """One case's record."""
    ids = case.inputs["input_ids"]
    record: dict[str, Any] = {
        "name": case.name,
        "what": case.what,
        "seed": case.seed,
        "rows": len(ids),
        "tokens": case.inputs["attention_mask"].sum(1).tolist(),
        "grids": case.inputs["image_grid_hws"].tolist() if "image_grid_hws" in case.inputs else [],
        "calls": list(case.calls),
        "new_tokens": case.new_tokens,
        "inputs_sha256": inputs_hash(case),
        "prompts": list(case.prompts),
        "taps": {},
        "missing": [],
        "error": None,
    }
    try:
        taps = candidate.run(case.inputs, case.calls)
        record["taps"], record["missing"] = compared(case, reference, taps, config)
        if greedy is not None:
            tokens = candidate.greedy(case.inputs, case.new_tokens)
            scale = float(np.abs(reference["logits"]).max())
            record["taps"]["greedy"] = greedy_metrics(greedy, tokens) | {"scale": scale}
    except MemoryError:
        raise
    except Exception as e:  # whatever a candidate raises, the case has failed, and the report says so
        record["error"] = f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no text'])[0]}"
    return record


def compared(
    case: Case, reference: dict[str, np.ndarray], taps: dict[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """The metrics of each tap in network order, and the names of those that the candidate does not give."""
    if "logits" not in taps:
        raise ValueError("the candidate gives no logits")
    mask = case.inputs["attention_mask"].astype(bool)
    out: dict[str, Any] = {}
    missing: list[str] = []
    for name in ("vision_out", "projector_out"):
        if name in reference and name in taps:
            where = np.ones(reference[name].shape[:-1], bool)
            out[name] = tensor_metrics(reference[name], taps[name], where)
        elif name in reference:
            missing.append(name)
    if "inputs_embeds" in taps:
        out["inputs_embeds"] = tensor_metrics(reference["inputs_embeds"], taps["inputs_embeds"], mask)
    else:
        missing.append("inputs_embeds")
    moe = config.text.moe_layers
    comparable = settled = np.broadcast_to(mask, (len(moe) + 1, *mask.shape))
    has_routing = bool(moe) and "router_topk_indices" in taps
    if has_routing:
        routing = (reference["router_topk_indices"], taps["router_topk_indices"], reference["router_gap"])
        if routing[1].shape != routing[0].shape:
            raise ValueError(f"router_topk_indices of shape {routing[1].shape}, expected {routing[0].shape}")
        comparable, settled = comparable_places(*routing, mask), settled_places(*routing[:2], mask)
    elif moe:
        missing += [f"router.{n}" for n in moe]
    passed = 0  # MoE layers
    for n in range(config.text.num_hidden_layers):
        if n in moe:
            if has_routing:
                chosen, theirs, gap = (a[passed] for a in routing)
                out[f"router.{n}"] = routing_metrics(chosen, theirs, gap, comparable[passed])
            passed += 1
        if "hidden_states" in taps:
            states = reference["hidden_states"][n], taps["hidden_states"][n]
            out[f"layers.{n}"] = tensor_metrics(*states, comparable[passed], mask)
            where = comparable[passed] & settled[passed]
            out[f"layers.{n}"]["nmse_settled"] = tensor_metrics(*states, where)["nmse"]
        else:
            missing.append(f"layers.{n}")
    logits = reference["logits"], taps["logits"]
    out["logits"] = logit_metrics(*logits, comparable[-1], mask)
    if case.scored and not out["logits"]["nonfinite"]:
        out["perplexity"] = perplexity_metrics(*logits, case.inputs["input_ids"], comparable[-1])
    if "tapped_logits_differ" in taps:
        differ = float(taps["tapped_logits_differ"])
        finite = math.isfinite(differ)
        out["tapped_logits"] = {"max_abs": differ} if finite else {"max_abs": None, "nonfinite": 1}
    places, lost = int(mask.sum()), int((mask & ~comparable[-1]).sum())
    out["comparable"] = {"places": places, "excluded": lost, "excluded_share": lost / places}
    return out, missing


def inputs_hash(case: Case) -> str:
    digest = hashlib.sha256()
    for name in sorted(case.inputs):
        array = np.ascontiguousarray(case.inputs[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- provenance -----------------------------------------------------------------------------------------------------


def provenance(reference: Path, found: Found, started: float) -> dict[str, Any]:
    """Where a run comes from: the files compared with their hashes, versions, and what ran on which hardware."""
    packages: dict[str, str | None] = {}
    for package in ("kimi-vl", "mindspore", "torch", "transformers", "numpy", "safetensors"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "header": {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started)),
            "took_seconds": round(time.time() - started, 1),
            "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        },
        "environment": {"python": platform.python_version(), **packages},
        "reference": {
            "class": "transformers Kimi_K25ForConditionalGeneration",
            "runs_on": f"Torch {packages['torch']} on CPU",
            "dtype": "float32",
            "files": file_hashes(reference),
        },
        "candidate": {"files": file_hashes(found.path)},
    }


def file_hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of what a model is made of: configurations, indexes, manifests, weights, graphs."""
    kinds = (".json", ".safetensors", ".mindir", ".ckpt")
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


def stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The chain from Torch to the device: what this run executed, and what it did not."""
    candidate = run["candidate"]
    names = {
        "network": "MindSpore graphs",
        "bundle": "Reloaded CPU MindIR",
        "interpreter": "Interpreted MindIR",
    }
    ran = names.get(candidate["stage"])
    chain = [{"stage": "Torch reference", "ran": True, "where": f"{run['reference']['runs_on']}, fp32"}]
    for stage in names.values():
        here = stage == ran
        chain.append({"stage": stage, "ran": here, "where": candidate["runs_on"] if here else "did not run"})
    device = bool(candidate.get("on_device"))
    where = candidate["runs_on"] if device else "did not run: no Ascend device took part"
    if "device" in run:
        from .device import where as device_where  # it takes file hashes from here

        device, where = device_where(run["device"])
    chain.append({"stage": "Ascend device", "ran": device, "where": where})
    return chain


# ---- files ----------------------------------------------------------------------------------------------------------


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries put together, one level of nesting deep."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and isinstance(whole.get(key), dict):
                whole[key] = whole[key] | value
            else:
                whole[key] = value
    return whole


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
