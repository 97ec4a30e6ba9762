"""The same cases through the reference and a candidate, as raw figures: one link of the chain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..modeling.configuration import ModelConfig
from .candidates import Candidate
from .cases import SUITE_VERSION, Case, Plan, Source, build, cover_experts, fitted, inputs_hash
from .comparison import Comparison, raised
from .inputs import TAP as INPUTS
from .inputs import compared_inputs, own_source
from .metrics import greedy_metrics
from .spool import Spool

LONGEST_COVER = 512  # tokens of the case that looks for every expert


class Reference(Protocol):
    """The oracle, as far as a run needs it."""

    config: ModelConfig

    def run(self, inputs: Any, /) -> dict[str, np.ndarray]: ...

    def greedy(self, inputs: Any, n: int) -> Any: ...


class RoundedReference(Protocol):
    """The oracle in low precision; it can be told which experts to take."""

    def run(self, inputs: Any, experts: np.ndarray | None = None, /) -> dict[str, np.ndarray]: ...


def run_suite(
    reference: Reference,
    candidate: Candidate,
    plans: Sequence[Plan],
    source: Source,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    rounded: RoundedReference | None = None,
    other: Reference | None = None,
    spool: tuple[Spool, str] | None = None,
) -> dict[str, Any]:
    """Raw figures of every plan that the candidate can run: a link of a run, without its name and files.

    A candidate that raises is recorded as the case's `error`; the reference's errors are raised.

    Args:
        rounded: the reference in the candidate's dtype; what rounding costs it is then each case's `calibration`.
        other: the reference by other kernels; how far they are apart is then each case's `noise`.
        spool: where cases are kept as soon as they are done, and the link's name there. Cases that are there are not
            run again.
    """
    config = reference.config
    used = [set[int]() for _ in config.text.moe_layers]
    graphs: dict[str, bool] = {}
    processor = own_source(candidate, source)
    cases, skipped, seconds = [], [], {}
    for plan in plans:
        plan = fitted(plan, source, seed, config, candidate.limits)
        if plan.impossible:
            skipped.append({"name": plan.name, "what": plan.what, "why": plan.impossible})
            continue
        done = spool[0].case(spool[1], plan.name) if spool else None
        progress(f"{plan.name}: {plan.what}" + (" (done before)" if done else ""))
        if done is None:
            done = _run_case(reference, candidate, plan, source, seed, rounded, other, processor)
            if spool:
                spool[0].save_case(spool[1], plan.name, done)
        for layer, experts in zip(used, done["experts"]):
            layer.update(experts)
        graphs |= {name: ran or graphs.get(name, False) for name, ran in done.get("graphs", {}).items()}
        cases.append(done["case"])
        seconds[plan.name] = done["seconds"]
    layers = [
        {"layer": n, "used": len(of), "of": config.text.n_routed_experts}
        for n, of in zip(config.text.moe_layers, used)
    ]
    suite = {"version": SUITE_VERSION, "seed": seed, "inputs": source.kind, "skipped": skipped}
    if graphs:
        suite["unused"] = [name for name, ran in graphs.items() if not ran]
    return {
        "header": {"seconds": seconds},
        "candidate": candidate.describe(),
        "suite": suite | {"experts": layers},
        "cases": cases,
    }


def _run_case(
    reference: Reference,
    candidate: Candidate,
    plan: Plan,
    source: Source,
    seed: int,
    rounded: RoundedReference | None,
    other: Reference | None,
    processor: Source | None,
) -> dict[str, Any]:
    """A case's record, the experts that the reference used in each MoE layer, the candidate's graphs and whether each ran
    so far, and the time that each side took."""
    started = time.perf_counter()
    case, taps = _reference_taps(reference, candidate, plan, source, seed)
    greedy = reference.greedy(case.inputs, case.new_tokens) if case.new_tokens else None
    halfway = time.perf_counter()
    record, chosen = _compare(case, taps, greedy, candidate, reference.config)
    if processor is not None and not plan.own:
        record["taps"] = {INPUTS: compared_inputs(plan, case, processor)} | record["taps"]
    took = {
        "reference": round(halfway - started, 3),
        "candidate": round(time.perf_counter() - halfway, 3),
    }
    if rounded is not None:
        record["calibration"] = _calibration(case, taps, rounded, chosen, reference.config)
    if other is not None:
        again = compared(case, taps, other.run(case.inputs), reference.config)[0]
        record["noise"] = {tap: m["rel_l2"] for tap, m in again.items() if m.get("rel_l2") is not None}
    used = taps.get("router_topk_indices", ())
    experts = [np.unique(of_layer[of_layer >= 0]).tolist() for of_layer in used]
    graphs = candidate.graphs() if hasattr(candidate, "graphs") else {}
    return {"case": record, "experts": experts, "graphs": graphs, "seconds": took}


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
) -> tuple[dict[str, Any], np.ndarray | None]:
    """One case's record, and the experts that the candidate chose, where it says so."""
    record = case_record(case)
    chosen = None
    try:
        taps = candidate.run(case.inputs, case.calls)
        record["taps"], record["missing"] = compared(case, reference, taps, config)
        chosen = taps.get("router_topk_indices")
        if greedy is not None:
            tokens = candidate.greedy(case.inputs, case.new_tokens)
            scale = float(np.abs(reference["logits"]).max())
            record["taps"]["greedy"] = greedy_metrics(greedy, tokens) | {"scale": scale}
    except MemoryError:
        raise
    except Exception as e:  # whatever a candidate raises, the case has failed, and the report says so
        record["error"] = raised(e)
    return record, chosen


def _calibration(
    case: Case,
    reference: dict[str, np.ndarray],
    rounded: RoundedReference,
    chosen: np.ndarray | None,
    config: ModelConfig,
) -> dict[str, Any]:
    """What rounding costs the reference itself, by tap.

    Places differ by a factor of ten in what rounding costs there, so figures `*_untouched` of both sides are over the
    same: those before the candidate's first other choice of experts in a row. The reference's own rounded run may have
    gone another way there, so they are of a second one, which is given the experts of the exact run.

    Args:
        chosen: the candidate's experts; None, where it does not say which: both sides are then compared everywhere, each
            with the experts of its own choice.
    """
    own = _with_last(case, rounded.run(case.inputs))
    calibration = compared(case, reference, own, config)[0]
    routing = "router_topk_indices"
    if routing not in reference:
        return calibration
    if chosen is None:
        del own[routing]
    else:
        own = _with_last(case, rounded.run(case.inputs, reference[routing])) | {routing: chosen}
    for tap, metrics in compared(case, reference, own, config)[0].items():
        calibration[tap] |= {name: value for name, value in metrics.items() if name.endswith("_untouched")}
    return calibration


def _with_last(case: Case, taps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return taps | {"last_logits": taps["logits"][:, case.ends]}


def case_record(case: Case) -> dict[str, Any]:
    """A case's record, still without figures."""
    ids = case.inputs["input_ids"]
    return {
        "name": case.name,
        "what": case.what,
        "seed": case.seed,
        "rows": len(ids),
        "tokens": case.inputs["attention_mask"].sum(1).tolist(),
        "grids": case.inputs["image_grid_hws"].tolist() if "image_grid_hws" in case.inputs else [],
        "calls": list(case.calls),
        "new_tokens": case.new_tokens,
        "inputs_sha256": inputs_hash(case.inputs),
        "prompts": list(case.prompts),
        "taps": {},
        "missing": [],
        "error": None,
    }


def compared(
    case: Case, reference: dict[str, np.ndarray], taps: dict[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """The metrics of each tap in network order, and the names of those that the candidate does not give."""
    if "logits" not in taps:
        raise ValueError("the candidate gives no logits")
    done = Comparison(case.inputs["attention_mask"])
    missing: list[str] = []
    for name in ("vision_out", "projector_out"):
        if name in reference and name in taps:
            done.pictures(name, reference[name], taps[name])
        elif name in reference:
            missing.append(name)
    if "inputs_embeds" in taps:
        done.embeddings(reference["inputs_embeds"], taps["inputs_embeds"])
    else:
        missing.append("inputs_embeds")
    moe = config.text.moe_layers
    has_routing = bool(moe) and "router_topk_indices" in taps
    if has_routing:
        routing = (reference["router_topk_indices"], taps["router_topk_indices"], reference["router_gap"])
        if routing[1].shape != routing[0].shape:
            raise ValueError(f"router_topk_indices of shape {routing[1].shape}, expected {routing[0].shape}")
    elif moe:
        missing += [f"router.{n}" for n in moe]
    for n in range(config.text.num_hidden_layers):
        if n in moe and has_routing:
            done.router(n, *(a[moe.index(n)] for a in routing))
        if "hidden_states" in taps:
            done.layer(n, reference["hidden_states"][n], taps["hidden_states"][n])
        else:
            missing.append(f"layers.{n}")
    done.logits(reference["logits"], taps["logits"])
    if "last_logits" in taps:
        done.last_logits(reference["logits"], taps["last_logits"], case.ends)
    else:
        missing.append("last_logits")
    if case.scored:
        done.perplexity(reference["logits"], taps["logits"], case.inputs["input_ids"])
    if "tapped_logits_differ" in taps:
        differ = float(taps["tapped_logits_differ"])
        finite = math.isfinite(differ)
        done.taps["tapped_logits"] = {"max_abs": differ} if finite else {"max_abs": None, "nonfinite": 1}
    done.left_out()
    return done.taps, missing
