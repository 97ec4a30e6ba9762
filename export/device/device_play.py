"""Plays the calls of a golden pack on graphs, whoever runs them, and measures how far the answers are from the reference.

A case of a pack (JSON; a name in quotes is an array of the pack, null stands for zeros or for nothing):

* `calls`: in order, each with `graph` (and `taps_graph`, the same with more outputs), `inputs` (port -> "array"), and of
  a text graph `rows` (which sequence each row extends, null for an idle one), `count` (new tokens of each row) and `tokens`,
  triples [n, row, t]: the token n of the case is row `row`, column t of this call. Of a vision graph instead `image`:
  [first, count] of the pictures' features that it gives.
* `expected`: "hidden" [L, P, C] (the columns `columns` of each layer's output at the tokens `sampled`) and their whole
  "norms" [L, P]; "routing" [Lm, N, k] and "gaps" [Lm, N], the distance between the last chosen and the first rejected
  expert; "logit_ids" [P, K] and "logits" [P, K], the best ones first, then some that are the same for all; "features"
  [Q, C] of the pictures' places `places`, and "feature_norms" [Q]; with taps likewise "vision" and "vision_norms".
* `greedy`: `calls`, in which `feeds` [[b, row], ...] take the last token of sequence b and `gives` yield its next; "tokens",
  "seconds" and "margins" [B, n].
* `limits`: tap -> metric -> at most; and `ties`: what is a toss-up, "router" in selection scores, "logits" in logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .device_pack import Pack

Arrays = dict[str, np.ndarray]
NEVER = 1e9  # stands for an infinite margin: JSON knows none
BEST = 16  # logits of each sampled token that are its best ones


class Sequence:
    """One sequence's cache on the host: a buffer [context, width] per layer, and how many slots hold tokens."""

    def __init__(self, layers: int, context: int, width: int) -> None:
        self.buffers = [np.zeros((context, width), np.float32) for _ in range(layers)]
        self.length = 0


Run = Callable[[str, Arrays, list], list[np.ndarray]]
"""Runs a graph, by name, on inputs and on the caches of sequences, and gives its outputs in fp32 or int32."""


def sequences(pack: Pack, rows: int) -> list[Sequence]:
    """Empty caches."""
    index = pack.index
    return [Sequence(index["layers"], index["contexts"][-1], index["width"]) for _ in range(rows)]


def inputs_of(pack: Pack, call: dict, ports: list[dict]) -> Arrays:
    """A call's inputs in the order of the graph's ports, floats in fp32."""
    made = {}
    for port in ports:
        array = pack.array(call["inputs"][port["name"]])
        dtype = np.int32 if port["dtype"] == "int32" else np.float32
        made[port["name"]] = np.zeros(port["shape"], dtype) if array is None else array
    return made


def play(
    pack: Pack,
    case: dict,
    run: Run,
    ports: Callable[[str], list[dict]],
    taps: bool = False,
    stage: str = "all",
) -> Arrays:
    """What a case's calls give.

    Args:
        ports: the inputs of a graph, by its name.
        taps: run the graphs with more outputs.
        stage: "vision" runs the pictures only, "prefill" the text up to the first decode graph, "decode" the whole text.

    Returns:
        Arrays by the names of `expected`, "best" [P], the best token, and "reached" [P] and "pictured" [Q], where 1 says
        that a graph gave this.
    """
    seen = _Observer(pack, case, taps)
    rows, idle = sequences(pack, case["rows"]), sequences(pack, 1)[0]
    for call in case["calls"]:
        if stage == "prefill" and call["kind"] == "decode":
            break
        if stage != "all" and (call["kind"] == "vision") != (stage == "vision"):
            continue
        graph = call["taps_graph"] if taps else call["graph"]
        inputs = inputs_of(pack, call, ports(graph))
        if call["kind"] == "vision":
            seen.vision(call, run(graph, inputs, []))
            continue
        idle.length = 0
        held = [idle if b is None else rows[b] for b in call["rows"]]
        seen.text(call, run(graph, inputs, held))
        for row, n in zip(held, call["count"]):
            row.length += n
    return seen.observed


def play_greedy(pack: Pack, case: dict, run: Run, ports: Callable[[str], list[dict]]) -> np.ndarray:
    """Greedy tokens [B, n], each fed back as the graphs gave it."""
    greedy = case["greedy"]
    rows, idle = sequences(pack, case["rows"]), sequences(pack, 1)[0]
    tokens: list[list[int]] = [[] for _ in rows]
    for call in greedy["calls"]:
        inputs = inputs_of(pack, call, ports(call["graph"]))
        if call["feeds"]:
            ids = inputs["input_ids"] = inputs["input_ids"].copy()
            for b, i in call["feeds"]:
                ids[i, 0] = tokens[b][-1]
        idle.length = 0
        held = [idle if b is None else rows[b] for b in call["rows"]]
        logits = run(call["graph"], inputs, held)[0]
        for row, n in zip(held, call["count"]):
            row.length += n
        for b, i in call["gives"]:
            tokens[b].append(int(np.argmax(logits[i, -1])))
    return np.array(tokens, np.int32)


def unobserved(pack: Pack, case: dict, taps: bool) -> Arrays:
    """What :func:`play` gives where no graph ran."""
    return _Observer(pack, case, taps).observed


class _Observer:
    """Takes from each call's outputs what the pack has an answer for."""

    def __init__(self, pack: Pack, case: dict, taps: bool) -> None:
        expected = {name: pack.array(key) for name, key in case["expected"].items()}
        names = ["logits", "features", "feature_norms"]
        if taps:
            names += ["hidden", "norms", "routing", "vision", "vision_norms"]
        self.taps = taps
        self.columns = np.array(pack.index["columns"])
        self.vision_columns = np.array(pack.index["vision_columns"])
        self.place = {n: p for p, n in enumerate(case["sampled"])}
        self.feature = {m: q for q, m in enumerate(case["places"])}
        self.ids = expected["logit_ids"]
        self.observed: Arrays = {"best": np.full(len(self.place), -1, np.int32)}
        self.observed["reached"] = np.zeros(len(self.place), np.int32)
        self.observed["pictured"] = np.zeros(len(self.feature), np.int32)
        for name in names:
            like = expected.get(name)
            if like is not None:
                kind = np.int32 if name == "routing" else np.float32
                self.observed[name] = np.full(like.shape, -1, kind)

    def vision(self, call: dict, out: list[np.ndarray]) -> None:
        first, count = call["image"]
        for m, q in self.feature.items():
            if first <= m < first + count:
                self.observed["pictured"][q] = 1
                self._keep("features", "feature_norms", q, out[0][m - first], self.columns)
                if self.taps:
                    self._keep(
                        "vision", "vision_norms", q, out[1][m - first].reshape(-1), self.vision_columns
                    )

    def text(self, call: dict, out: list[np.ndarray]) -> None:
        for n, i, t in call["tokens"]:
            if "routing" in self.observed:
                self.observed["routing"][:, n] = np.sort(out[2][:, i, t], -1)
            p = self.place.get(n)
            if p is None:
                continue
            logits = out[0][i, t]
            self.observed["reached"][p] = 1
            self.observed["logits"][p] = logits[self.ids[p]]
            self.observed["best"][p] = np.argmax(logits)
            if self.taps:
                for layer, x in enumerate(out[1][:, i, t]):
                    self._keep("hidden", "norms", (layer, p), x, self.columns)

    def _keep(self, name: str, norms: str, place: int | tuple, x: np.ndarray, columns: np.ndarray) -> None:
        self.observed[name][place] = x[columns]
        self.observed[norms][place] = np.linalg.norm(x.astype(np.float64))


# ---- figures and judgement ------------------------------------------------------------------------------------------


def figures(
    pack: Pack, case: dict, plain: Arrays, tapped: Arrays, tokens: np.ndarray | None = None
) -> dict[str, dict]:
    """Distances from the reference, tap by tap in network order, over what was observed.

    Args:
        plain, tapped: what :func:`play` gave without taps, and with them; {} for what did not run.
        tokens: what :func:`play_greedy` gave.

    Returns:
        tap -> metrics: `places` compared, `rel_l2` of the samples, `norm`, the largest relative difference of a norm, `nonfinite`; of a
        router `flipped` (share of tokens with other experts), `wrong` (of these with a gap that is no tie) and
        `largest_flip`; of logits `changed` (best tokens that differ by more than a tie), `largest` difference; of greedy
        tokens `left` (sequences that leave the reference by more than a tie).
    """
    expected = {k: pack.array(v) for k, v in case["expected"].items()}
    found: dict[str, dict] = {}
    for tap, name, norms in (
        ("vision_out", "vision", "vision_norms"),
        ("projector_out", "features", "feature_norms"),
    ):
        of = tapped if name == "vision" else plain
        if name in of:
            found[tap] = _distance(expected, of, name, norms, "pictured")
    first_moe = pack.index["layers"] - len(expected.get("routing", ()))
    for n in range(pack.index["layers"]):
        if n >= first_moe and "routing" in tapped:
            found[f"router.{n}"] = _routing(expected, tapped, n - first_moe, case["ties"]["router"])
        if "hidden" in tapped:
            found[f"layers.{n}"] = _distance(expected, tapped, "hidden", "norms", "reached", n)
    if plain:
        found["logits"] = _logits(expected, plain, case["ties"]["logits"])
        if tapped:
            found["tapped_logits"] = _distance(plain, tapped, "logits", None, "reached")
    if tokens is not None and case["greedy"]:
        found["greedy"] = _greedy(pack, case["greedy"], tokens, case["ties"]["logits"])
    return {tap: metrics for tap, metrics in found.items() if metrics["places"]}


def judge(case: dict, found: dict[str, dict]) -> list[dict]:
    """One finding per limit of the case that there is a figure for: `tap`, `metric`, `value`, `limit`, `ok`."""
    findings = []
    for tap, limits in case["limits"].items():
        for metric, limit in limits.items():
            if tap in found and metric in found[tap]:
                value = found[tap][metric]
                findings.append(
                    {"tap": tap, "metric": metric, "value": value, "limit": limit, "ok": value <= limit}
                )
    return findings


def _distance(
    expected: dict, observed: Arrays, name: str, norms: str | None, mask: str, layer: int | None = None
) -> dict:
    reached = observed[mask] > 0
    r, c = (
        (a[name] if layer is None else a[name][layer])[reached].astype(np.float64)
        for a in (expected, observed)
    )
    out: dict = {"places": int(reached.sum()), "nonfinite": int((~np.isfinite(c)).any(-1).sum())}
    if out["nonfinite"]:
        return out | {"rel_l2": NEVER}
    size, error = float(np.linalg.norm(r)), float(np.linalg.norm(c - r))
    out["rel_l2"] = error / size if size else (NEVER if error else 0.0)
    if norms is not None:
        ours, theirs = (
            (a[norms] if layer is None else a[norms][layer])[reached] for a in (expected, observed)
        )
        with np.errstate(invalid="ignore"):
            out["norm"] = _finite(
                np.abs(theirs / np.maximum(ours.astype(np.float64), 1e-30) - 1).max(initial=0.0)
            )
    return out


def _routing(expected: dict, observed: Arrays, layer: int, tie: float) -> dict:
    chosen, theirs, gaps = expected["routing"][layer], observed["routing"][layer], expected["gaps"][layer]
    reached = (theirs >= 0).all(-1)
    flipped = (np.sort(chosen, -1) != np.sort(theirs, -1)).any(-1) & reached
    places = int(reached.sum())
    return {
        "places": places,
        "flipped": float(flipped.sum() / places) if places else 0.0,
        "wrong": int((flipped & (gaps >= tie)).sum()),
        "largest_flip": _finite(gaps[flipped].max(initial=0.0)),
    }


def _logits(expected: dict, observed: Arrays, tie: float) -> dict:
    ids, logits, best = expected["logit_ids"], expected["logits"].astype(np.float64), observed["best"]
    out = _distance(expected, observed, "logits", None, "reached")
    reached = observed["reached"] > 0
    changed = 0
    for p in np.flatnonzero(reached & (best != ids[:, 0])):
        at = np.flatnonzero(ids[p] == best[p])
        other = logits[p, at[0]] if len(at) else logits[p, min(BEST, len(logits[p])) - 1]
        changed += bool(logits[p, 0] - other >= tie)
    out["changed"] = changed
    out["largest"] = _finite(np.abs(logits - observed["logits"])[reached].max(initial=0.0))
    return out


def _greedy(pack: Pack, greedy: dict, tokens: np.ndarray, tie: float) -> dict:
    expected, seconds, margins = (pack.arrays[greedy[name]] for name in ("tokens", "seconds", "margins"))
    if tokens.shape != expected.shape:
        return {"places": int(expected.size), "left": len(expected), "same": 0}
    left = same = 0
    for r, c, second, margin in zip(expected, tokens, seconds, margins):
        step = int(np.append(r != c, True).argmax())
        same += step
        if step < len(r):
            left += not (c[step] == second[step] and margin[step] < tie)
    return {"places": int(expected.size), "left": left, "same": same}


def _finite(value: float) -> float:
    """A number for JSON."""
    return float(value) if np.isfinite(value) else NEVER


def layer_distance(pack: Pack, case: dict, call: dict, layer: int, hidden: np.ndarray) -> float:
    """Relative L2 distance of one layer's output [B, T, H] in one call, over its sampled tokens."""
    expected = pack.array(case["expected"]["hidden"])[layer]
    place = {n: p for p, n in enumerate(case["sampled"])}
    kept = [(place[n], i, t) for n, i, t in call["tokens"] if n in place]
    r = np.stack([expected[p] for p, _, _ in kept]).astype(np.float64)
    c = np.stack([hidden[i, t][pack.index["columns"]] for _, i, t in kept])
    return _finite(float(np.linalg.norm(c - r)) / max(float(np.linalg.norm(r)), 1e-30))
