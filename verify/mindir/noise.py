"""Rounding errors that an operator may have, drawn at random: what a device does inside its kernels is not known here."""

from __future__ import annotations

import torch

from . import selection, shaping
from .rules import RULES
from .values import Value

UNITS = 2  # in the last place of a result's dtype, at most
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float

EXACT = frozenset(
    {o for o, rule in RULES.items() if rule.compute.__module__ in (shaping.__name__, selection.__name__)}
    | {"Cast", "Neg", "Abs", "ReLU", "Maximum", "Minimum", "Floor", "ReduceMax", "ReduceMin"}
    | {"MoeInitRoutingV2", "MoeTokenPermute", "kimi_embedding", "kimi_split"}
)
"""Operators that give elements of their inputs, or what one rounding makes of them: nothing is computed, nothing is off."""


class Noise:
    """Moves every number that an operator computed by 1 to `UNITS` units in the last place, up or down.

    Zeros, infinities and NaN stay, and nothing changes its sign. The same seed draws the same noise for the same graphs
    in the same order.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator()
        self.restart(seed)

    def restart(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def __call__(self, value: Value) -> Value:
        """A result, rounded to its dtype, with noise; integers and bools as they are."""
        data = value.data
        if not data.is_floating_point():
            return value
        bits = data.contiguous().view(_INTEGERS[data.element_size()])  # one more is one unit further from 0
        units = torch.randint(1, UNITS + 1, bits.shape, generator=self._generator, dtype=bits.dtype)
        sign = torch.randint(0, 2, bits.shape, generator=self._generator, dtype=bits.dtype) * 2 - 1
        moved = (bits + units * sign).view(data.dtype)
        keep = (data == 0) | ~data.isfinite() | ~moved.isfinite() | (moved.sign() != data.sign())
        return Value(torch.where(keep, data, moved), value.dtype)
