"""What every form of a report shows: the figures of a run and its verdict, and the words for them."""

from __future__ import annotations

import math
from typing import Any

from .judge import Finding, Verdict, describe_tap, network_order
from .runner import stages

# ---- figures --------------------------------------------------------------------------------------------------------


def summary(run: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The figures of a report, once, for every form of it."""
    cases = [_case_row(case, verdict) for case in run["cases"]]
    return {
        "verdict": verdict.to_dict(),
        "cases": cases,
        "stages": stages(run),
        "routing": _routing_rows(run),
        "perplexity": [case for case in run["cases"] if "perplexity" in case["taps"]],
        "worst": {
            "layers": _worst(run, "layers."),
            "logits": _worst(run, "logits"),
            "kl": max((c["kl"] for c in cases if c["kl"] is not None), default=None),
            "top1": _together(run, "logits", "top1_changed"),
            "routing": _together(run, "router.", "flipped"),
            "greedy": (sum(c["greedy_same"] for c in cases), sum(c["greedy_steps"] for c in cases)),
        },
    }


def _case_row(case: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    taps = case["taps"]
    layers = [(m["rel_l2"], int(tap[7:])) for tap, m in taps.items() if tap.startswith("layers.")]
    finite = [x for x in layers if x[0] is not None]
    logits, greedy = taps.get("logits", {}), taps.get("greedy")
    failures = [f for f in verdict.of_case(case["name"]) if not f.ok]
    routers = [m for tap, m in taps.items() if tap.startswith("router.")]
    return {
        "name": case["name"],
        "what": case["what"],
        "size": _size(case),
        "pictures": ", ".join(f"{h} x {w}" for h, w in case["grids"]),
        "calls": _calls(case["calls"]),
        "projector": taps.get("projector_out", {}).get("rel_l2"),
        "worst_layer": max(finite, default=None) if len(finite) == len(layers) else None,
        "has_layers": bool(layers),
        "logits": logits.get("rel_l2"),
        "max_abs": logits.get("max_abs"),
        "kl": logits.get("kl"),
        "top1": logits.get("top1"),
        "routing": min((m["agreement"] for m in routers if m["agreement"] is not None), default=None),
        "greedy_same": sum(greedy["prefix"]) if greedy else 0,
        "greedy_steps": greedy["rows"] * greedy["steps"] if greedy else 0,
        "greedy": f"{min(greedy['prefix'])}/{greedy['steps']}" if greedy else None,
        "ok": not failures,
        "failures": failures,
        "error": case["error"],
    }


def _size(case: dict[str, Any]) -> str:
    tokens = case["tokens"]
    return str(tokens[0]) if len(tokens) == 1 else ", ".join(map(str, tokens))


def _calls(calls: list[int]) -> str:
    """`28, then 16 x 1`."""
    if len(calls) == 1:
        return "one call"
    first, rest = calls[0], calls[1:]
    if len(set(rest)) == 1:
        return f"{first}, then {len(rest)} x {rest[0]}"
    return ", ".join(map(str, calls))


def _metrics_of(run: dict[str, Any], stem: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [(c["name"], t, m) for c in run["cases"] for t, m in c["taps"].items() if t.startswith(stem)]


def _worst(run: dict[str, Any], stem: str) -> dict[str, Any] | None:
    found = [(m["rel_l2"], case, tap) for case, tap, m in _metrics_of(run, stem)]
    if not found or any(value is None for value, _, _ in found):
        return None
    value, case, tap = max(found)
    return {"value": value, "case": case, "where": describe_tap(tap)}


def _together(run: dict[str, Any], stem: str, count: str) -> tuple[int, int] | None:
    """(places that agree, places) over all cases."""
    found = [m for _, _, m in _metrics_of(run, stem)]
    if not found or any(m.get(count) is None for m in found):
        return None
    places = sum(m["places"] for m in found)
    return places - sum(m[count] for m in found), places


def _routing_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for layer in run["suite"]["experts"]:
        found = [m for _, tap, m in _metrics_of(run, "router.") if tap == f"router.{layer['layer']}"]
        gaps = [m["min_gap"] for m in found if m["min_gap"] is not None]
        flips = sorted((f["gap"] for m in found for f in m["flips"]), reverse=True)
        rows.append(
            layer
            | {
                "places": sum(m["places"] for m in found),
                "flipped": sum(m["flipped"] for m in found),
                "ties": sum(m["ties"] for m in found),
                "min_gap": min(gaps, default=None),
                "max_flip": flips[0] if flips else None,
            }
        )
    return rows


# ---- words ----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """`2.1e-07`, `0`, or a dash where there is none."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """Rounded down, so that 100% means all."""
    return "-" if value is None else f"{math.floor(value * 1000) / 10:g}%"


CASE_HEAD = ("case", "tokens", "worst layer", "logits", "max abs", "KL", "top-1", "experts", "greedy", "")


def case_cells(case: dict[str, Any]) -> tuple[str, ...]:
    """A row under :data:`CASE_HEAD`, of a case of :func:`summary`."""
    worst = f"{number(case['worst_layer'][0])} ({case['worst_layer'][1]})" if case["worst_layer"] else "-"
    return (
        case["name"],
        case["size"],
        worst,
        *map(number, (case["logits"], case["max_abs"], case["kl"])),
        *map(percent, (case["top1"], case["routing"])),
        case["greedy"] or "-",
        "ok" if case["ok"] else "FAILED",
    )


def sentence(verdict: Verdict) -> str:
    """The verdict in one line; a failure names the first bad place of the network."""
    bad = verdict.first_bad
    if bad is None:
        return f"PASSED: all {len(verdict.findings)} checks of profile {verdict.profile} hold"
    more = len(verdict.failures) - 1
    return f"FAILED: first bad is {bad.where} in case {bad.case}: {finding_text(bad)}" + (
        f"; {more} more checks failed" if more else ""
    )


METRIC_WORDS = {
    "rel_l2": "relative L2 distance",
    "nmse": "error energy",
    "nmse_settled": "error energy where the experts are the same",
    "max_abs": "largest difference",
    "max_scaled": "largest difference over largest logit",
    "kl": "mean KL (nats)",
    "kl_max": "largest KL (nats)",
    "flipped": "other choices of experts",
    "top1_changed": "other best tokens",
    "wrong": "other choices of experts",
    "top1_changes": "other best tokens",
    "divergences": "rows that leave the reference",
    "excluded_share": "share of tokens not comparable",
    "norm": "largest relative difference of a norm",
    "reverse_kl": "mean KL of the candidate (nats)",
    "reverse_kl_max": "largest KL of the candidate (nats)",
    "cosine_distance": "1 - cosine",
    "log_ratio": "difference of the log of perplexities (nats)",
    "topk_changed_share": "share of other tokens among the best",
    "changed": "other best tokens",
    "left": "rows that leave the reference",
}


def finding_text(finding: Finding) -> str:
    """`relative L2 distance 3.1e-03, allowed 1.0e-05`."""
    if finding.metric in ("raised", "nonfinite", "missing", "cases"):
        return finding.says
    value = number(finding.value) if isinstance(finding.value, float) else str(finding.value)
    limit = number(finding.limit) if isinstance(finding.limit, float) else str(finding.limit)
    text = f"{METRIC_WORDS.get(finding.metric, finding.metric)} {value}, allowed {limit}"
    return f"{text} ({finding.says})" if finding.says else text


def first_failures(verdict: Verdict, cases: list[dict[str, Any]]) -> list[tuple[Finding, int]]:
    """Per failed case the failure that lies first in the network, and how many more there are."""
    of_cases = [c["failures"] for c in cases if c["failures"]]
    found = [(min(fs, key=lambda f: network_order(f.tap)), len(fs) - 1) for fs in of_cases]
    known = {id(f) for fs in of_cases for f in fs}
    return [(f, 0) for f in verdict.failures if id(f) not in known] + found
