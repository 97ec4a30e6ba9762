"""What a golden pack keeps of the reference's answers: samples of each layer, the best logits, the experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..export.device import device_play
from .metrics import ROUTING_TIE

COLUMNS = 64  # numbers of a hidden state, and likewise logits beside the best
SAMPLED = 16  # tokens of a case whose hidden states are kept, and features of its pictures


class PackArrays:
    """The arrays of a pack, equal ones once, by short names."""

    def __init__(self) -> None:
        self.members: dict[str, np.ndarray] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, array: np.ndarray) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = f"a{len(self._known):04}"
            self.members[self._known[key]] = np.ascontiguousarray(array)
        return self._known[key]

    def add_unless_zero(self, array: np.ndarray) -> str | None:
        return self.add(array) if array.any() else None


def columns(width: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.choice(width, min(width, COLUMNS), replace=False).tolist())


def expected_answers(
    taps: dict[str, np.ndarray],
    mask: np.ndarray,
    calls: list[dict[str, Any]],
    arrays: PackArrays,
    index: dict[str, Any],
    with_taps: bool,
    low: bool,
) -> tuple[dict[str, Any], list[int], list[int]]:
    """The arrays that a case is judged by, by name, and which tokens and which features they are of."""
    gaps = taps["router_gap"][:, mask] if "router_gap" in taps else np.zeros((0, int(mask.sum())))
    sampled = _sampled(calls, _clear(gaps) if low else _decided(taps, mask))
    logits = taps["logits"][mask][sampled]  # (P, V)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, : device_play.BEST]
    ids = np.concatenate(
        [best, np.broadcast_to(index["logit_columns"], (len(best), len(index["logit_columns"])))], 1
    )
    found = {"logit_ids": ids.astype(np.int32), "logits": np.take_along_axis(logits, ids, 1)}
    places: list[int] = []
    if "projector_out" in taps:
        features = taps["projector_out"]
        places = _spread(list(range(len(features))), SAMPLED)
        kept = {"features": (features, index["columns"])}
        if with_taps:
            kept["vision"] = (taps["vision_out"].reshape(len(features), -1), index["vision_columns"])
        for name, (x, columns) in kept.items():
            found[name] = x[places][:, columns]
            found["vision_norms" if name == "vision" else "feature_norms"] = _norms(x[places])
    if with_taps:
        hidden = taps["hidden_states"][:, mask][:, sampled]  # (L, P, H)
        found |= {"hidden": hidden[..., index["columns"]], "norms": _norms(hidden)}
        if len(gaps):
            chosen = taps["router_topk_indices"][:, mask]
            found |= {"routing": chosen.astype(np.min_scalar_type(chosen.max())), "gaps": gaps}
    return {name: arrays.add(array) for name, array in found.items()}, sampled, places


def _norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x.astype(np.float64), axis=-1).astype(np.float32)


def _decided(taps: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Tokens [N] that no toss-up between experts, of their own or of a token before them, leads elsewhere."""
    if "router_gap" not in taps:
        return np.ones(int(mask.sum()), bool)
    tie = (taps["router_gap"] < ROUTING_TIE).any(0) & mask  # (B, S)
    return ~np.logical_or.accumulate(tie, axis=1)[mask]


def _clear(gaps: np.ndarray) -> np.ndarray:
    """The half of the tokens [N] whose experts are chosen most clearly; gaps [Lm, N].

    Where rounding moves a token to another expert, its distance says nothing about the rest of the network.
    """
    least = gaps.min(0, initial=np.inf)
    return least >= np.median(least)


def _sampled(calls: list[dict[str, Any]], allowed: np.ndarray) -> list[int]:
    """Numbers of tokens, spread over the calls: half from chunks, half from single tokens, where there are both."""
    chunks: list[int] = []
    singles: list[int] = []
    for call in calls:
        numbers = [n for n, _, _ in call.get("tokens", ()) if allowed[n]]
        (singles if call["kind"] == "decode" else chunks).extend(numbers)
    half = SAMPLED // 2
    few = min(len(singles), half), min(len(chunks), half)
    return sorted(_spread(chunks, SAMPLED - few[0]) + _spread(singles, SAMPLED - few[1]))


def _spread(numbers: list[int], count: int) -> list[int]:
    """At most `count` of them, the first and the last among these."""
    if len(numbers) <= count:
        return numbers
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, count).round().astype(int)]
