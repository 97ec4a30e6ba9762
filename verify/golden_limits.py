"""How far a device's answers may be from the reference's, per case and tap.

With arithmetic in fp32: as the profile `strict` has it. In bf16 or fp16 rounding decides, so the limits come from runs of
the same graphs in which every operator's result is rounded, in some of them with noise of 1 to 2 units in the last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..export.device.device_pack import Pack
from .metrics import ROUTING_TIE

Figures = dict[str, dict[str, Any]]
Limits = dict[str, dict[str, float]]
Ties = dict[str, float]

EXACT = 1e-5  # relative L2 distance
EXACT_MARGIN = 1.25e-5  # of the largest logit
UNIT = 2.0**-8  # of bf16: what one rounding changes at most is half of it
# Two right low-precision runs differ by up to 3.7 in squared error where a choice of experts flips.
FACTOR = 2.0
LEAST_FLIPS = 0.05  # share of tokens that may take other experts however few did in the runs


def exact_limits(pack: Pack, case: dict[str, Any]) -> tuple[Ties, Limits]:
    """(ties, limits) of a case whose graphs compute in fp32."""
    largest = float(abs(pack.arrays[case["expected"]["logits"]]).max())
    distance = {"rel_l2": EXACT, "norm": EXACT, "nonfinite": 0.0}
    limits: Limits = {}
    if "vision" in case["expected"]:
        limits["vision_out"] = dict(distance)
    if "features" in case["expected"]:
        limits["projector_out"] = dict(distance)
    layers, routing = pack.index["layers"], case["expected"].get("routing")
    first_moe = layers - (0 if routing is None else len(pack.arrays[routing]))
    for n in range(
        layers if "hidden" in case["expected"] else 0
    ):  # in network order: the first that is wrong is named
        if n >= first_moe:
            limits[f"router.{n}"] = {"wrong": 0.0}
        limits[f"layers.{n}"] = dict(distance)
    limits["logits"] = {"rel_l2": EXACT, "nonfinite": 0.0, "changed": 0.0}
    if pack.index["taps"]:
        limits["tapped_logits"] = {"rel_l2": 0.0}
    if case["greedy"]:
        limits["greedy"] = {"left": 0.0}
    return {"router": ROUTING_TIE, "logits": EXACT_MARGIN * largest}, limits


def rounding_limits(rounded: Figures, noisy: Sequence[Figures], exact: Limits) -> tuple[Ties, Limits]:
    """(ties, limits) of a case whose graphs compute in bf16 or fp16.

    Args:
        rounded: figures (see ``device_play.figures``) of a run that rounds every operator's result; it is one draw of many,
            so it counts `FACTOR` times.
        noisy: of runs with noise after every operator, which is more than a kernel rounds; the worst counts as it is.
        exact: whose taps and metrics are kept.
    """

    def allowed(tap: str, metric: str, least: float) -> float:
        if tap not in rounded:
            return least
        return max(least, FACTOR * rounded[tap][metric], *(run[tap][metric] for run in noisy))

    limits: Limits = {}
    for tap, metrics in exact.items():
        limits[tap] = dict(metrics)
        for metric in ("rel_l2", "norm"):
            if metric in metrics:
                limits[tap][metric] = allowed("logits" if tap == "tapped_logits" else tap, metric, UNIT)
        if tap.startswith("router."):
            limits[tap]["flipped"] = allowed(tap, "flipped", LEAST_FLIPS)
    routers = [tap for tap in exact if tap.startswith("router.")]
    flip = max((allowed(tap, "largest_flip", UNIT) for tap in routers), default=UNIT)
    # A margin is the difference of two logits, and each may be off.
    return {"router": flip, "logits": 2 * allowed("logits", "largest", 0.0)}, limits
