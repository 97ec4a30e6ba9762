"""Rotary embedding of half-split pairs, element by element."""

from __future__ import annotations

from mindspore import nn, ops
from mindspore.ops import operations as P


class RotateHalf(nn.Cell):
    """x [R, heads, 2F] and what :func:`rotary_tables` gives -> x rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = P.Split(-1, 2)

    def construct(self, x, cos, sin):
        a, b = self.halves(x)
        return ops.concat((a * cos - b * sin, b * cos + a * sin), -1)


def rotary_tables(cos, sin, heads: int):
    """[R, F] -> [R, heads, F], the same for every head."""
    shape = (cos.shape[0], heads, cos.shape[1])
    return ops.broadcast_to(cos.expand_dims(1), shape), ops.broadcast_to(sin.expand_dims(1), shape)
