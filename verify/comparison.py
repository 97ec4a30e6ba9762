"""A case's metrics, tap by tap in the order of the network: of whole runs, and of parts that come one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from .metrics import (
    comparable_places,
    logit_metrics,
    perplexity_metrics,
    routing_metrics,
    settled_places,
    tensor_metrics,
    tied_places,
    untouched_places,
)


class Comparison:
    """Attributes:
    taps: metrics by tap.
    mask: `[B, S]` bool, True = a token.
    comparable: what of it can still be compared, see :func:`verify.metrics.comparable_places`.
    settled: see :func:`verify.metrics.settled_places`.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.taps: dict[str, Any] = {}
        self.mask = self.comparable = self.settled = mask.astype(bool)

    def pictures(self, name: str, reference: np.ndarray, candidate: np.ndarray) -> None:
        """What the vision tower or the projector gives."""
        where = np.ones(reference.shape[:-1], bool)
        self.taps[name] = tensor_metrics(reference, candidate, where)

    def embeddings(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        self.taps["inputs_embeds"] = tensor_metrics(reference, candidate, self.mask)

    def router(self, layer: int, reference: np.ndarray, candidate: np.ndarray, gap: np.ndarray) -> None:
        """The experts `[B, S, k]` that an MoE layer chose; to be told before its output."""
        self.taps[f"router.{layer}"] = routing_metrics(reference, candidate, gap, self.comparable)
        choices = reference[None], candidate[None]
        self.comparable = comparable_places(*choices, gap[None], self.comparable)[1]
        self.settled = settled_places(*choices, self.settled)[1]

    def forced(
        self,
        layer: int,
        reference: np.ndarray,
        candidate: np.ndarray,
        choices: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    ) -> None:
        """A layer's output `[B, S, H]` where the candidate had the reference's own input.

        Args:
            choices: of an MoE layer the reference's experts, the candidate's, and the reference's gap. A token whose
                experts differ in a tie is left out; here nothing follows from it.
        """
        where = self.mask if choices is None else self.mask & ~tied_places(*choices)
        self.taps[f"forced.{layer}"] = tensor_metrics(reference, candidate, where, self.mask)

    def layer(self, layer: int, reference: np.ndarray, candidate: np.ndarray) -> None:
        """A layer's output `[B, S, H]`."""
        metrics = tensor_metrics(reference, candidate, self.comparable, self.mask)
        settled = tensor_metrics(reference, candidate, self.comparable & self.settled)
        untouched = tensor_metrics(reference, candidate, self.comparable & self._untouched())
        more = {"nmse_settled": settled["nmse"], "nmse_untouched": untouched["nmse"]}
        self.taps[f"layers.{layer}"] = metrics | more

    def logits(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Logits `[B, S, V]`."""
        self.taps["logits"] = self._of_logits(
            reference, candidate, self.comparable, self.mask, self._untouched()
        )

    def last_logits(self, reference: np.ndarray, candidate: np.ndarray, ends: list[int]) -> None:
        """Logits of the columns `ends` alone `[B, calls, V]`, held against all of the reference's `[B, S, V]`."""
        places = (places[:, ends] for places in (self.comparable, self.mask, self._untouched()))
        self.taps["last_logits"] = self._of_logits(reference[:, ends], candidate, *places)

    def _untouched(self) -> np.ndarray:
        """What no other choice of experts can have changed so far, see :func:`verify.metrics.untouched_places`."""
        return untouched_places(self.settled, self.mask)

    @staticmethod
    def _of_logits(
        reference: np.ndarray,
        candidate: np.ndarray,
        comparable: np.ndarray,
        mask: np.ndarray,
        untouched: np.ndarray,
    ) -> dict[str, Any]:
        """The metrics of logits, and those that rounding is judged by over the `untouched` places alone."""
        metrics = logit_metrics(reference, candidate, comparable, mask)
        where = comparable & untouched
        of_these = metrics if (where == comparable).all() else logit_metrics(reference, candidate, where)
        return metrics | {f"{name}_untouched": of_these[name] for name in ("nmse", "kl", "top1_changed")}

    def perplexity(self, reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray) -> None:
        """How well the logits `[B, S, V]` foretell `ids` `[B, S]`; to be told after the logits."""
        if not self.taps["logits"]["nonfinite"]:
            self.taps["perplexity"] = perplexity_metrics(reference, candidate, ids, self.comparable)

    def left_out(self) -> None:
        """How many places could not be compared to the end."""
        places, lost = int(self.mask.sum()), int((self.mask & ~self.comparable).sum())
        self.taps["comparable"] = {"places": places, "excluded": lost, "excluded_share": lost / places}


def raised(error: Exception) -> str:
    """What a candidate raised, as a case's `error` says it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"
