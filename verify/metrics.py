"""Distances between what the reference and the candidate give, accumulated in float64.

Every function returns plain numbers and lists, ready for JSON. Positions are indices into the arrays as given,
`[row, token, component]`. A NaN or an infinity makes the distances None and is counted and located instead.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

Metrics = dict[str, Any]


class GreedyRun(Protocol):
    tokens: np.ndarray  # [B, n]
    seconds: np.ndarray
    margins: np.ndarray


# A choice between experts that are nearer than this is a toss-up, and what follows from it says nothing. Selection
# scores lie in 0..1; those of the fp32 reference on nano are up to 1.7e-6 from the same network's in fp64 (1e-7 in the
# mean), and a gap is a difference of two.
ROUTING_TIE = 4e-6

GAP_EDGES = tuple(10.0**n for n in range(-8, 1))  # of a count of gaps by size

NOT_A_TIE = 1e9  # stands for an infinite margin: JSON knows none

TOP_K = 5  # of the vocabulary, for the overlap
LISTED = 100  # flips and changes listed one by one, largest margins first; the counts are always complete
_LARGEST_EXP = 700  # nats; exp of 710 is no float64 any more
_BLOCK = 64  # places taken to float64 at a time: a vocabulary of 160k would otherwise need gigabytes


def tensor_metrics(
    reference: np.ndarray, candidate: np.ndarray, where: np.ndarray, valid: np.ndarray | None = None
) -> Metrics:
    """Distances over the places where `where` is true.

    Args:
        reference, candidate: `[..., D]`, equal shapes.
        where: `[...]` bool.
        valid: `[...]` bool, where both have to be finite, compared or not. Default: `where`.

    Returns:
        `places`, `nonfinite` (valid places of the candidate that hold a NaN or infinity) and `nonfinite_at`,
        `rel_l2` = |c - r| / |r|, `nmse` = rel_l2 squared, `cosine_distance` = 1 - cos(c, r), `max_abs`, `max_at`,
        `ref_max` = max |r|, `max_scaled` = max_abs / ref_max.

    Raises:
        ValueError: the shapes differ, or the reference itself is not finite.
    """
    _require_shape(reference, candidate)
    at = np.argwhere(where)
    metrics: Metrics = {"places": len(at)} | _nonfinite(
        reference, candidate, where if valid is None else valid
    )
    names = ("rel_l2", "nmse", "cosine_distance", "max_abs", "max_at", "ref_max", "max_scaled")
    if metrics["nonfinite"] or not len(at):
        return metrics | dict.fromkeys(names)
    error = norm_r = norm_c = growth = 0.0
    max_abs, max_at, ref_max = -1.0, None, 0.0
    for block in _blocks(at):
        r, c = reference[block].astype(np.float64), candidate[block].astype(np.float64)
        diff = np.abs(c - r)
        error += float((diff * diff).sum())
        norm_r += float((r * r).sum())
        norm_c += float((c * c).sum())
        growth += float(((c - r) * (c + r)).sum())
        ref_max = max(ref_max, float(np.abs(r).max()))
        if diff.max() > max_abs:
            row, d = np.unravel_index(int(diff.argmax()), diff.shape)
            max_abs, max_at = float(diff.max()), [*(int(i[row]) for i in block), int(d)]
    nmse = _ratio(error, norm_r)
    turned = _cosine_distance(error, growth, math.sqrt(norm_r), math.sqrt(norm_c))
    values = (math.sqrt(nmse), nmse, turned, max_abs, max_at, ref_max, _ratio(max_abs, ref_max))
    return metrics | dict(zip(names, values))


def _nonfinite(reference: np.ndarray, candidate: np.ndarray, valid: np.ndarray) -> Metrics:
    """`nonfinite`, and `nonfinite_at` where there is any."""
    count, first = 0, None
    for block in _blocks(np.argwhere(valid)):
        if not np.isfinite(reference[block]).all():
            raise ValueError("the reference itself gives NaN or infinity; are its weights whole?")
        bad = ~np.isfinite(candidate[block])
        if bad.any() and first is None:
            row, d = np.argwhere(bad)[0]
            first = [*(int(i[row]) for i in block), int(d)]
        count += int(bad.any(-1).sum())
    return {"nonfinite": count} | ({"nonfinite_at": first} if count else {})


def _cosine_distance(error: float, growth: float, norm_r: float, norm_c: float) -> float:
    """1 - cos(c, r) of `error` = |c - r|^2 and `growth` = |c|^2 - |r|^2, both summed up from differences.

    1 minus the cosine itself would lose what it asks for: at a distance of 1e-7 the two are equal in 14 digits.
    """
    if norm_r == 0 or norm_c == 0:
        return 0.0 if error == 0 else 1.0
    return max(0.0, error - (growth / (norm_r + norm_c)) ** 2) / (2 * norm_r * norm_c)


def logit_metrics(
    reference: np.ndarray, candidate: np.ndarray, where: np.ndarray, valid: np.ndarray | None = None
) -> Metrics:
    """:func:`tensor_metrics` of `[B, S, V]` logits, and what they mean as distributions.

    Returns:
        Also `kl` = mean KL(reference to candidate) in nats, `kl_max`, `reverse_kl`, `reverse_kl_max`; `top1`, the
        fraction of places whose best token is the same, `top1_changed`, the number of the others, `top1_changed_share`, and
        `top1_changes`, these with the reference's margin between its best token and the candidate's; `topk_overlap`, the mean share of common tokens among the best
        `topk` (5), and `topk_changed_share`, that of the others.
    """
    metrics = tensor_metrics(reference, candidate, where, valid)
    names = (
        *("kl", "kl_max", "reverse_kl", "reverse_kl_max"),
        *("top1", "top1_changed", "top1_changed_share", "top1_changes"),
        *("topk", "topk_overlap", "topk_changed_share"),
    )
    if metrics["nonfinite"] or not metrics["places"]:
        return metrics | dict.fromkeys(names)
    k = min(TOP_K, reference.shape[-1])
    forward, backward, overlaps = [], [], []
    changes: list[dict[str, Any]] = []
    for block in _blocks(np.argwhere(where)):
        r, c = reference[block].astype(np.float64), candidate[block].astype(np.float64)
        log_r, log_c = _log_softmax(r), _log_softmax(c)
        forward.append((np.exp(log_r) * (log_r - log_c)).sum(-1))
        backward.append((np.exp(log_c) * (log_c - log_r)).sum(-1))
        best_r, best_c = r.argmax(-1), c.argmax(-1)
        for i in np.flatnonzero(best_r != best_c):
            margin = float(r[i, best_r[i]] - r[i, best_c[i]])
            changes.append({"at": [int(j[i]) for j in block], "margin": margin})
        top_r, top_c = (np.argpartition(x, -k, axis=-1)[:, -k:] for x in (r, c))
        overlaps.append((top_r[:, :, None] == top_c[:, None, :]).sum((1, 2)) / k)
    kl, reverse, overlap = (np.concatenate(x) for x in (forward, backward, overlaps))
    # The sum of a KL is never negative, its floating-point value may be, by a rounding.
    kl, reverse = np.maximum(kl, 0), np.maximum(reverse, 0)
    changes.sort(key=lambda change: -change["margin"])
    return metrics | {
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "reverse_kl": float(reverse.mean()),
        "reverse_kl_max": float(reverse.max()),
        "top1": 1 - len(changes) / len(kl),
        "top1_changed": len(changes),
        "top1_changed_share": len(changes) / len(kl),
        "top1_changes": changes[:LISTED],
        "topk": k,
        "topk_overlap": float(overlap.mean()),
        "topk_changed_share": float(1 - overlap.mean()),
    }


def perplexity_metrics(
    reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray, where: np.ndarray
) -> Metrics:
    """How well each side foretells a text: exp of the mean negative log-likelihood of its tokens, given those before.

    Args:
        reference, candidate: finite logits `[B, S, V]`.
        ids: `[B, S]`, left-padded.
        where: `[B, S]` bool; a token is foretold at the place before it, which counts if both are true.

    Returns:
        `places`; `reference` and `candidate`, the perplexities over all rows; `log_ratio`, |ln candidate - ln reference|
        = the difference of the mean log-likelihoods in nats a token; and `by_row`, the same of each row. None where no
        token counts or, of a perplexity, where it is beyond what a float holds.
    """
    _require_shape(reference, candidate)
    counted = where[:, :-1] & where[:, 1:]
    likelihood = np.zeros((2, *counted.shape))
    for block in _blocks(np.argwhere(counted)):
        token = (np.arange(len(block[0])), ids[:, 1:][block])
        for side, logits in enumerate((reference, candidate)):
            likelihood[side][block] = _log_softmax(logits[block].astype(np.float64))[token]
    rows = [_perplexities(likelihood[:, row, of_row]) for row, of_row in enumerate(counted)]
    return _perplexities(likelihood[:, counted]) | {"by_row": rows}


def _perplexities(likelihood: np.ndarray) -> Metrics:
    """Of the log-likelihoods `[2, N]` that the reference and the candidate give to the same tokens."""
    places = likelihood.shape[1]
    if not places:
        return {"places": 0, "reference": None, "candidate": None, "log_ratio": None}
    r, c = (-likelihood.mean(1)).tolist()
    perplexity = [math.exp(nats) if nats < _LARGEST_EXP else None for nats in (r, c)]
    return {"places": places, "reference": perplexity[0], "candidate": perplexity[1], "log_ratio": abs(c - r)}


def routing_metrics(
    reference: np.ndarray, candidate: np.ndarray, gap: np.ndarray, where: np.ndarray
) -> Metrics:
    """How far one MoE layer's choices agree.

    Args:
        reference, candidate: chosen experts `[B, S, k]`, in any order.
        gap: the reference's margin `[B, S]`: last chosen minus first rejected selection score.
        where: `[B, S]` bool.

    Returns:
        `places`; `agreement`, the fraction of places with the same set of experts; `overlap`, the mean share of
        common experts; `min_gap`, the nearest decision of the reference; `flips`, places with another set, with
        their gap, largest first (at most 100), their number `flipped` and `flipped_share`, of which `ties` are nearer than
        :data:`ROUTING_TIE` and `wrong` are not; `max_flip_gap`, 0 without flips; `gaps`, how many places have a gap of up
        to 1e-8, 1e-7, ... 1 and more.
    """
    _require_shape(reference, candidate)
    r, c = np.sort(reference[where], -1), np.sort(candidate[where], -1)
    places = len(r)
    if not places:
        counts = {"flipped": 0, "ties": 0, "wrong": 0, "flips": [], "gaps": [0] * (len(GAP_EDGES) + 1)}
        names = ("agreement", "overlap", "min_gap", "max_flip_gap", "flipped_share")
        return {"places": 0, **dict.fromkeys(names), **counts}
    flipped = (r != c).any(-1)
    gaps = gap[where].astype(np.float64)
    at = np.argwhere(where)[flipped]
    flips = [{"at": a.tolist(), "gap": _finite(g)} for a, g in zip(at, gaps[flipped])]
    flips.sort(key=lambda flip: -flip["gap"])
    ties = int((gaps[flipped] < ROUTING_TIE).sum())
    common = (r[:, :, None] == c[:, None, :]).any(-1).mean(-1)
    return {
        "places": places,
        "agreement": 1 - len(flips) / places,
        "overlap": float(common.mean()),
        "min_gap": _finite(gaps.min()),
        "max_flip_gap": flips[0]["gap"] if flips else 0.0,
        "flipped": len(flips),
        "flipped_share": len(flips) / places,
        "ties": ties,
        "wrong": len(flips) - ties,
        "flips": flips[:LISTED],
        "gaps": np.bincount(np.digitize(gaps, GAP_EDGES, right=True), minlength=len(GAP_EDGES) + 1).tolist(),
    }


def tied_places(reference: np.ndarray, candidate: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Where the candidate took other experts `[..., k]` than the reference, in a tie by its `gap` `[...]`."""
    return (np.sort(reference, -1) != np.sort(candidate, -1)).any(-1) & (gap < ROUTING_TIE)


def comparable_places(
    reference: np.ndarray, candidate: np.ndarray, gap: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Where two runs can be compared at all, before each MoE layer and after the last: `[Lm + 1, B, S]` bool.

    Where the candidate took another expert in a tie, that token of that row and those after it (which attend to it)
    go another way from that layer on, right as they may be. Choices that differ beyond a tie exclude nothing.

    Args:
        reference, candidate: `[Lm, B, S, k]`.
        gap: `[Lm, B, S]`.
        mask: `[B, S]` bool.
    """
    tie = tied_places(reference, candidate, gap) & mask
    lost = np.logical_or.accumulate(np.logical_or.accumulate(tie, axis=-1), axis=0)
    return mask & ~np.concatenate([np.zeros_like(lost[:1]), lost])


def settled_places(reference: np.ndarray, candidate: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens that went through the same experts as the reference's so far, before each MoE layer and after the last.

    Where low precision takes another expert, the whole difference of two experts is in that token; what is left here is
    what rounding does. Arguments and result as in :func:`comparable_places`.
    """
    flipped = (np.sort(reference, -1) != np.sort(candidate, -1)).any(-1)
    gone = np.logical_or.accumulate(flipped, axis=0)
    return mask & ~np.concatenate([np.zeros_like(gone[:1]), gone])


def untouched_places(settled: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of :func:`settled_places` `[..., S]` those before the row's first token that is not: later ones attend to it."""
    return settled & ~np.logical_or.accumulate(mask & ~settled, axis=-1)


def greedy_metrics(reference: GreedyRun, candidate: np.ndarray) -> Metrics:
    """How long greedy generation stays the same.

    Args:
        reference: see `oracle.Greedy`.
        candidate: tokens `[B, n]`; fewer steps are those of a candidate that stopped.

    Returns:
        `rows`, `steps` n, `prefix` (equal first tokens, by row), `min_margin`, and `divergences`: per diverging row
        the `row`, `step`, both tokens (the candidate's None where it stopped), and the `margin`: what the reference
        saw between its best two tokens if the candidate took the second, else :data:`NOT_A_TIE`.
    """
    rows, steps = reference.tokens.shape
    if candidate.ndim != 2 or len(candidate) != rows:
        raise ValueError(f"greedy tokens of shape {candidate.shape}, expected ({rows}, {steps})")
    prefixes, divergences = [], []
    for row in range(rows):
        c = candidate[row, :steps]
        same = np.append(reference.tokens[row, : len(c)] == c, False)
        prefix = int(same.argmin())
        prefixes.append(prefix)
        if prefix < steps:
            token = int(c[prefix]) if prefix < len(c) else None
            second = token == int(reference.seconds[row, prefix])
            divergences.append(
                {
                    "row": row,
                    "step": prefix,
                    "margin": float(reference.margins[row, prefix]) if second else NOT_A_TIE,
                    "reference": int(reference.tokens[row, prefix]),
                    "candidate": token,
                }
            )
    return {
        "rows": rows,
        "steps": steps,
        "prefix": prefixes,
        "min_margin": float(reference.margins.min()),
        "divergences": divergences,
    }


def _require_shape(reference: np.ndarray, candidate: np.ndarray) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(f"the candidate gives shape {candidate.shape}, the reference {reference.shape}")


def _blocks(at: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Index tuples for `_BLOCK` places at a time."""
    return [tuple(at[i : i + _BLOCK].T) for i in range(0, len(at), _BLOCK)]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _ratio(a: float, b: float) -> float:
    """a / b, where nothing over nothing is nothing, and something over nothing the whole."""
    return 0.0 if a == 0 else a / b if b > 0 else 1.0


def _finite(x: float) -> float:
    """A layer that takes all experts has gaps of infinity."""
    return float(min(x, NOT_A_TIE))
