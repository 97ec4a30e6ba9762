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
        return x * cos + ops.concat((b, a), -1) * sin


def rotary_tables(cos, sin, heads: int):
    """[R, F] -> [R, heads, 2F], the same for every head: what is multiplied with x, and with x's swapped halves."""
    shape = (cos.shape[0], heads, 2 * cos.shape[1])
    cos = ops.broadcast_to(ops.concat((cos, cos), -1).expand_dims(1), shape)
    return cos, ops.broadcast_to(ops.concat((-sin, sin), -1).expand_dims(1), shape)
