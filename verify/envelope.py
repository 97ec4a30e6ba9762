"""The noise envelope of a bundle: how far 16-bit kernels may take its graphs from what they compute in fp32.

The interpreter runs the shipped graphs rounded, with 1 to 2 units in the last place of noise after every operator that
computes, for many seeds, and each run is held against the run in fp32. So limits for a device stand before one was
touched, and rest on nothing that a device gave. They are for the same suite of inputs, whose hashes are in the file.

**Margin.** A kernel that rounds once is half a unit off, one that accumulates in pieces one or two; noise of 1 to 2 units
after *every* operator is more than that. The largest of the seeds is then taken twice (a distance), four times (an energy
or a divergence, which are squares of one), or twice and one token more (a count), for two reasons: a device's run is one
more draw, which beats the largest of n with a chance of 1 in n + 1; and where a choice of experts flips, two correct
bf16 runs of the reference were seen to differ by 3.7 in energy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.manifest import content_hash
from ..export.bundle import Bundle
from .candidates import ModelCandidate, inspect
from .cases import SUITE_VERSION, Case, Plan, Source, build, inputs_hash
from .judge import Gate, Profile, network_order
from .runner import compared
from .sealed import Kind

NAME = "envelope.json"
FORMAT, VERSION = "kimi_vl-noise-envelope", 1
SEEDS = 50

# What is kept of each tap's metrics, and how many times the largest over the seeds is allowed.
FACTORS = {"rel_l2": 2, "nmse_settled": 4, "kl": 4, "flipped_share": 2, "top1_changed_share": 2}
_COUNTED = ("flipped_share", "top1_changed_share")  # one token more is allowed


class EnvelopeError(ValueError):
    """A bundle that has no envelope, or an envelope that is damaged or of another bundle."""


def measure(
    directory: Path,
    plans: Sequence[Plan],
    source: Source,
    seeds: int,
    inputs_seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The envelope of a bundle: of each case, tap and metric the value for each seed 0, 1, ...

    Raises:
        CandidateError, BundleError: it is no bundle whose graphs compute in 16 bits.
    """
    from .interpreted import InterpretedModel
    from .mindir import Noise
    from .mindir.noise import UNITS

    noise = Noise()
    found = inspect(directory, "interpreter", "rounded")
    exact = ModelCandidate(InterpretedModel.from_bundle(directory, verify=True), found)
    model = InterpretedModel.from_bundle(directory, arithmetic="rounded", noise=noise)
    noisy = ModelCandidate(model, found)
    cases, figures = [], {}
    for plan in plans:
        case = build(plan, source, inputs_seed)
        progress(f"{plan.name}: {plan.what}")
        figures[plan.name], places = _spread(case, exact, noisy, noise, seeds)
        cases.append({"name": plan.name, "inputs_sha256": inputs_hash(case.inputs), "places": places})
    return {
        "bundle": identity(Bundle.load(directory)),
        "dtype": found.rounded,
        "noise": {"units_in_the_last_place": [1, UNITS], "seeds": seeds},
        "suite": {"version": SUITE_VERSION, "seed": inputs_seed, "inputs": source.kind, "cases": cases},
        "figures": figures,
    }


def _spread(
    case: Case, exact: ModelCandidate, noisy: ModelCandidate, noise: Any, seeds: int
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Of a case: tap -> metric -> values by seed; and how many tokens it has."""
    config = exact.found.config
    reference = exact.once(case.inputs, case.calls)
    if "router_topk_indices" in reference:  # no margin: no flip is put down to a tie
        reference["router_gap"] = np.full(reference["router_topk_indices"].shape[:-1], np.inf, np.float32)
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        noise.restart(seed)
        taps, _ = compared(case, reference, noisy.once(case.inputs, case.calls), config)
        for tap, metrics in taps.items():
            if metrics.get("nonfinite"):
                raise EnvelopeError(f"case {case.name}, {tap}: NaN or infinity with noise of seed {seed}")
            for metric in FACTORS.keys() & metrics.keys():
                value = 0.0 if metrics[metric] is None else metrics[metric]  # no token left to compare
                figures.setdefault(tap, {}).setdefault(metric, []).append(value)
    return figures, int(case.inputs["attention_mask"].sum())


def limits(envelope: dict[str, Any]) -> Profile:
    """What a device must meet, as a profile: `judge(run, limits(envelope))` of a run over the envelope's suite."""
    places = {case["name"]: case["places"] for case in envelope["suite"]["cases"]}
    found: dict[tuple[str, str], float] = {}
    for name, tap, metric, values in _figures(envelope):
        limit = FACTORS[metric] * max(values) + (1 / places[name] if metric in _COUNTED else 0)
        found[tap, metric] = max(found.get((tap, metric), 0.0), limit)
    seeds = envelope["noise"]["seeds"]
    return Profile(
        "envelope",
        f"what noise of up to {envelope['noise']['units_in_the_last_place'][1]} units in the last place of "
        f"{envelope['dtype']} after every operator does at most, over {seeds} seeds, with a margin",
        tuple(Gate(tap, metric, limit) for (tap, metric), limit in found.items()),
        "rounded",
        envelope["suite"]["version"],
    )


def _figures(envelope: dict[str, Any]) -> Iterator[tuple[str, str, str, list[float]]]:
    for name, taps in envelope["figures"].items():
        for tap in sorted(taps, key=network_order):
            for metric in FACTORS:
                if metric in taps[tap]:
                    yield name, tap, metric, taps[tap][metric]


def identity(bundle: Bundle) -> dict[str, Any]:
    """Hashes of the graphs, and one of all weights."""
    weights = json.dumps(sorted((name, record.hash) for name, record in bundle.weights.items()))
    graphs = {name: record.hash for name, record in sorted(bundle.graphs.items())}
    return {"graphs": graphs, "weights": content_hash(weights.encode())}


def save(envelope: dict[str, Any], path: Path) -> None:
    """Writes it, with a digest of its content, as a profile for ``judge`` too; the file appears whole or not at all."""
    profile = asdict(limits(envelope))
    del profile["suite_version"]  # it stands in the envelope's `suite`
    _FILE.save(profile | envelope, path)


def load(path: Path, bundle: Bundle | None = None) -> dict[str, Any]:
    """A saved envelope, of this bundle if one is given.

    Raises:
        EnvelopeError: the file is missing, is none, is damaged, comes from another version or belongs to another bundle.
    """
    envelope = _FILE.load(path)
    if bundle is not None and envelope["bundle"] != identity(bundle):
        raise EnvelopeError(f"{path}: is of another bundle: graphs or weights differ; measure this one")
    return envelope


_FILE = Kind(
    FORMAT,
    VERSION,
    "envelope",
    f"the {NAME} of a bundle",
    "measure it again",
    EnvelopeError,
    if_missing="; verify-parity envelope makes it",
)


def table(envelope: dict[str, Any]) -> str:
    """Markdown: of each tap and metric the median, the largest of all cases and seeds, and the limit."""
    together: dict[tuple[str, str], list[float]] = {}
    for _, tap, metric, values in _figures(envelope):
        together.setdefault((tap, metric), []).extend(values)
    allowed = {(gate.taps, gate.metric): gate.at_most for gate in limits(envelope).gates}
    lines = ["| place | metric | median | largest | limit |", "|---|---|---|---|---|"]
    for tap, metric in sorted(together, key=lambda key: (network_order(key[0]), list(FACTORS).index(key[1]))):
        values = sorted(together[tap, metric])
        shown = (values[math.floor(len(values) / 2)], values[-1], allowed[tap, metric])
        lines.append(f"| {tap} | {metric} | " + " | ".join(f"{v:.2g}" for v in shown) + " |")
    return "\n".join(lines)
