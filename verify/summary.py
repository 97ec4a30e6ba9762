"""What every form of a report shows: the figures of a run and its verdict, and the words for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..convert.planning import size_text
from .judge import ON_DEVICE, WEIGHTS, Finding, Judgement, Verdict, describe_tap, network_order
from .runs import stage_name, stages

# In every report, until a golden pack of the published weights exists.
SHOWN_ON = (
    "kimi_vl itself was shown to be right on random and nano weights only: its authors had neither the published weights nor a "
    "device."
)


# ---- figures --------------------------------------------------------------------------------------------------------


def summary(run: dict[str, Any], judgement: Judgement) -> dict[str, Any]:
    """The figures of a report, once, for every form of it."""
    links = [_link(link, verdict) for link, verdict in zip(run["links"], judgement.verdicts)]
    bad = judgement.first_bad
    return {
        "verdict": {
            "passed": judgement.passed,
            "profiles": list(judgement.profiles),
            "first_bad": asdict(bad) | {"stage": links[judgement.bad_link or 0]["stage"]} if bad else None,
            "failures": [
                {"stage": link["stage"]} | asdict(f)
                for link, verdict in zip(links, judgement.verdicts)
                for f in verdict.failures
            ],
            "notes": judgement.notes,
            "checks": judgement.checks,
        },
        "links": links,
        "stages": [_stage_row(stage, links, judgement) for stage in stages(run)],
        "worst": _worst_of_links(links),
        "perplexity": perplexity_rows(run),
    }


def _worst_of_links(links: list[dict[str, Any]]) -> dict[str, Any]:
    """Of those that compute in fp32, if there are any: what rounding costs would hide what they show."""
    exact = [link["worst"] for link in links if not link["rounded"]] or [link["worst"] for link in links]
    figures = {
        name: max((worst[name] for worst in exact if worst[name]), key=_value, default=None)
        for name in ("layers", "logits")
    }
    counts = {name: _added(worst[name] for worst in exact) for name in ("top1", "routing", "greedy")}
    return figures | {"kl": max((w["kl"] for w in exact if w["kl"] is not None), default=None)} | counts


def _value(worst: dict[str, Any]) -> float:
    return worst["value"]


def _added(pairs: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    found = [pair for pair in pairs if pair]
    return (sum(a for a, _ in found), sum(b for _, b in found)) if found else None


def _link(link: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    cases = [_case_row(case, verdict) for case in link["cases"]]
    return {
        "stage": stage_name(link["candidate"]),
        "path": link["candidate"]["path"],
        "rounded": link["candidate"].get("arithmetic") == "rounded",
        "passed": verdict.passed,
        "profile": verdict.profile.name,
        "checks": len(verdict.findings),
        "failed": len(verdict.failures),
        "weights": _weights(link, verdict),
        "cases": cases,
        "routing": _routing_rows(link),
        "worst": {
            "layers": _worst(link, "layers."),
            "logits": _worst(link, "logits"),
            "kl": max((c["kl"] for c in cases if c["kl"] is not None), default=None),
            "top1": _together(link, "logits", "top1_changed"),
            "routing": _together(link, "router.", "flipped"),
            "greedy": (sum(c["greedy_same"] for c in cases), sum(c["greedy_steps"] for c in cases)),
        },
    }


def _weights(link: dict[str, Any], verdict: Verdict) -> dict[str, Any] | None:
    """How the weights' bits compare, apart from all that was computed with them."""
    found = [f for f in verdict.findings if f.tap == "weights"]
    if not found:
        return None
    weights, finding = link["weights"], found[0]
    alike = f"all {weights['parameters']} parameters ({size_text(weights['bytes'])}) are bit for bit the checkpoint's"
    if weights["rounded_to"]:
        alike += f", rounded to {weights['rounded_to']}"
    return {"ok": finding.ok, "says": alike if finding.ok else finding.says.removeprefix("weights: ")}


STAGE_HEAD = ("stage", "where it ran", "layers", "logits", "top-1", "experts", "greedy", "weights", "")


def _stage_row(stage: dict[str, Any], links: list[dict[str, Any]], judgement: Judgement) -> dict[str, Any]:
    """A stage of the chain with what was found there: `ok` is None where nothing was judged."""
    row = dict(stage, ok=None, layers=None, logits=None, top1=None, routing=None, greedy=None, weights=None)
    if "link" in stage:
        link = links[stage["link"]]
        failures = judgement.verdicts[stage["link"]].failures
        numeric = [f for f in failures if f.tap != "weights" and not f.case.endswith(ON_DEVICE)]
        worst = link["worst"]
        row |= {"ok": not numeric, "layers": worst["layers"], "logits": worst["logits"]}
        row |= {name: worst[name] for name in ("top1", "routing", "greedy")}
        row["weights"] = link["weights"]
    elif "device_of" in stage and stage["ran"]:
        findings = judgement.verdicts[stage["device_of"]].findings
        row["ok"] = all(f.ok for f in findings if f.case.endswith(ON_DEVICE))
    return row


def stage_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row under :data:`STAGE_HEAD`."""
    result = {None: "" if row["stage"] == "Torch reference" else "-", True: "ok", False: "FAILED"}[row["ok"]]
    weights = row["weights"]
    return (
        row["stage"],
        row["where"],
        *(number(row[name]["value"] if row[name] else None) for name in ("layers", "logits")),
        *(share(row[name]) for name in ("top1", "routing", "greedy")),
        "-" if weights is None else "same bits" if weights["ok"] else "DIFFER",
        result,
    )


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


def _metrics_of(link: dict[str, Any], stem: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [(c["name"], t, m) for c in link["cases"] for t, m in c["taps"].items() if t.startswith(stem)]


def _worst(link: dict[str, Any], stem: str) -> dict[str, Any] | None:
    found = [(m["rel_l2"], case, tap) for case, tap, m in _metrics_of(link, stem)]
    if not found or any(value is None for value, _, _ in found):
        return None
    value, case, tap = max(found)
    return {"value": value, "case": case, "where": describe_tap(tap)}


def _together(link: dict[str, Any], stem: str, count: str) -> tuple[int, int] | None:
    """(places that agree, places) over all cases."""
    found = [m for _, _, m in _metrics_of(link, stem)]
    if not found or any(m.get(count) is None for m in found):
        return None
    places = sum(m["places"] for m in found)
    return places - sum(m[count] for m in found), places


def _routing_rows(link: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for layer in link["suite"]["experts"]:
        found = [m for _, tap, m in _metrics_of(link, "router.") if tap == f"router.{layer['layer']}"]
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
                "flips": flips,
                "gaps": [sum(column) for column in zip(*(m["gaps"] for m in found))],
            }
        )
    return rows


def perplexity_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each case that has one, by row and for all: the reference's perplexity, and that of each link, None where it
    has not."""
    rows: dict[tuple[str, int | str], dict[str, Any]] = {}
    for n, link in enumerate(run["links"]):
        for case in link["cases"]:
            if "perplexity" not in case["taps"]:
                continue
            figures = case["taps"]["perplexity"]
            named: list[tuple[int | str, Any]] = [*enumerate(figures["by_row"], 1)]
            if len(figures["by_row"]) > 1:
                named.append(("all", figures))
            for prompt, of in named:
                row = rows.setdefault(
                    (case["name"], prompt),
                    {
                        "case": case["name"],
                        "prompt": prompt,
                        "places": of["places"],
                        "reference": of["reference"],
                    }
                    | {"links": [None] * len(run["links"])},
                )
                row["links"][n] = of["candidate"]
    return list(rows.values())


def perplexity_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Case, text, the reference's and each link's."""
    values = (row["reference"], *row["links"])
    return (row["case"], str(row["prompt"]), *("-" if v is None else f"{v:.6g}" for v in values))


# ---- words ----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """`2.1e-07`, `0`, or a dash where there is none."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def share(pair: tuple[int, int] | None) -> str:
    """Of (how many, of how many)."""
    return percent(pair[0] / pair[1]) if pair and pair[1] else "-"


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


def sentence(run: dict[str, Any], judgement: Judgement) -> str:
    """The verdict in one line; a failure names the first bad place of the network, in the first stage that is bad."""
    named = " and ".join(judgement.profiles)
    bad = judgement.first_bad
    if bad is None or judgement.bad_link is None:
        return f"PASSED: all {judgement.checks} checks of profile {named} hold"
    stage = stage_name(run["links"][judgement.bad_link]["candidate"])
    in_stage = f"{stage}: " if len(run["links"]) > 1 else ""
    where = bad.where if bad.case in ("-", WEIGHTS) else f"{bad.where} in case {bad.case}"
    more = len(judgement.failures) - 1
    text = f"FAILED: {in_stage}first bad is {where}: {finding_text(bad)}"
    weights = [f for f in judgement.failures if f.tap == "weights" and f is not bad]
    if weights:
        more -= len(weights)
        text += f"; {finding_text(weights[0])}"
    return text + (f"; {more} more checks failed" if more else "")


METRIC_WORDS = {
    "rel_l2": "relative L2 distance",
    "nmse": "error energy",
    "nmse_settled": "error energy where the experts are the same",
    "nmse_untouched": "error energy before a row's first other choice of experts",
    "kl_untouched": "mean KL before a row's first other choice of experts (nats)",
    "top1_changed_untouched": "other best tokens before a row's first other choice of experts",
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
    "different_parameters": "parameters whose bits are not the checkpoint's",
}


def finding_text(finding: Finding) -> str:
    """`relative L2 distance 3.1e-03, allowed 1.0e-05`."""
    if finding.metric in ("raised", "nonfinite", "missing", "cases") or (
        finding.tap == "weights" and not finding.ok
    ):
        return finding.says
    value = number(finding.value) if isinstance(finding.value, float) else str(finding.value)
    limit = number(finding.limit) if isinstance(finding.limit, float) else str(finding.limit)
    text = f"{METRIC_WORDS.get(finding.metric, finding.metric)} {value}, allowed {limit}"
    return f"{text} ({finding.says})" if finding.says else text


def first_failures(run: dict[str, Any], judgement: Judgement) -> list[tuple[str, Finding, int]]:
    """Per stage and failed case: the stage, the failure that lies first in the network, and how many more there are."""
    found = []
    for link, verdict in zip(run["links"], judgement.verdicts):
        of_cases: dict[str, list[Finding]] = {}
        for f in verdict.failures:
            of_cases.setdefault(f.case, []).append(f)
        stage = stage_name(link["candidate"])
        for failures in of_cases.values():
            found.append((stage, min(failures, key=lambda f: network_order(f.tap)), len(failures) - 1))
    return found
