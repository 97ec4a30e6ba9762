"""How the next token is chosen from logits: in numpy, as transformers' logits processors and multinomial do.

A step of a decode graph leaves little time, and a vocabulary has 163840 tokens: what is done to all of them is done in
few passes, and only tokens that may come next are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .forward import InputError

_GROUP = 64  # scores of which `_top` looks at the largest first
# Weights relative to the likeliest token's, from which on `_nucleus` looks: seldom does the mass of the first not do.
_FLOORS = (2.0**-8, 2.0**-12, 2.0**-16, 2.0**-32, 0.0)
# Sums in another order differ by less. More than enough costs a few tokens to sort, and changes nothing.
_SAFELY = 1 + 1e-9


@dataclass
class Sampling:
    """How the next token is chosen."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.do_sample and not self.temperature > 0:
            raise InputError(
                f"temperature: {self.temperature}, expected a positive number; use do_sample=False for greedy"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p}, expected a number in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k}, expected 0 (all) or a positive integer")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty: {self.repetition_penalty}, expected a positive number")

    def candidates(self, logits: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids that may come next [n], ascending, and their probabilities [n]; logits [V] fp32, the row's ids so far.

        As transformers' logits processors in the order in which its `generate` applies them.

        Raises:
            ValueError: there is a NaN; or, in sampling, the largest score is infinite, so no probability is defined.
        """
        ids, probabilities = self._candidates(logits, seen)
        return np.arange(len(probabilities)) if ids is None else ids, probabilities

    def choose(self, logits: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> int:
        """The next token of one row; see `candidates`."""
        ids, probabilities = self._candidates(logits, seen)
        at = 0
        if len(probabilities) > 1:
            # As rng.choice(ids, p=probabilities) draws, which checks them for longer than it takes to make them.
            reached = np.cumsum(probabilities, out=probabilities)
            reached /= reached[-1]
            at = int(reached.searchsorted(rng.random(), side="right"))
        return at if ids is None else int(ids[at])

    def _candidates(self, logits: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """As `candidates`; ids of None are all."""
        scores = self._penalised(logits, seen)
        if not self.do_sample:
            best = scores.argmax()  # of a NaN, if there is one
            _check(scores, best, np.isnan(scores[best]))
            return np.array([best]), np.ones(1)
        if self.temperature != 1.0:
            scores = scores / np.float32(self.temperature)
        best = scores.argmax()
        _check(scores, best, not np.isfinite(scores[best]))
        largest = scores[best]
        ids = None
        if 0 < self.top_k < len(scores):
            ids = _top(scores, self.top_k)
            scores = scores[ids]
        # A new array of the vocabulary's size takes longer than what is done to it: here is one, changed in place.
        weights = np.subtract(scores, largest, dtype=np.float64)
        np.exp(weights, out=weights)
        if self.top_p < 1.0:
            kept = _nucleus(weights, self.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        weights /= weights.sum()
        return ids, weights

    def _penalised(self, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
        if self.repetition_penalty == 1.0:
            return logits
        logits, of_seen = logits.copy(), logits[seen]
        penalty = np.float32(self.repetition_penalty)
        # Of a token that was seen twice the same is written twice.
        logits[seen] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        return logits


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Places, ascending, of the k largest scores [N] and of those equal to the last of them."""
    columns = len(scores) // _GROUP
    places = None
    if columns >= k:  # k columns reach the k-th of their largest scores, so at least k scores do; few others
        largest = scores[: columns * _GROUP].reshape(_GROUP, columns).max(0)
        places = np.flatnonzero(scores >= np.partition(largest, -k)[-k])
        scores = scores[places]
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return kept if places is None else places[kept]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Places [n], ascending, of the fewest weights whose share reaches top_p: the largest, of equal ones the first.

    Args:
        weights: [N], not normalised, the largest 1.
    """
    target = top_p * weights.sum()
    for floor in _FLOORS:
        places = np.flatnonzero(weights >= floor)
        high = weights[places]
        if high.sum() >= target * _SAFELY:
            break
    falling = np.sort(high)[::-1]
    before = np.cumsum(falling)
    before -= falling
    n = int(np.searchsorted(before, target))  # as many as begin below the target
    kept = np.flatnonzero(high >= falling[n - 1])
    if len(kept) > n:
        equal = np.flatnonzero(high[kept] == falling[n - 1])
        kept = np.delete(kept, equal[n - len(kept) :])
    return places[kept]


def _check(scores: np.ndarray, token: np.intp, bad: np.bool_ | bool) -> None:
    if bad:
        raise ValueError(
            f"logits: {scores[token]} at token {token}, expected finite numbers; are the weights whole?"
        )
