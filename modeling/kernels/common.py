"""Operators that the graph backends share: written in plain graph operators, the same on every device."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import operations as P

from ..configuration import VisionConfig


class RotateHalf(nn.Cell):
    """x [R, heads, 2F] and what :func:`rotary_tables` gives -> x rotated in half-split pairs, element by element."""

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


class ImageTables(nn.Cell):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def construct(self, cos, sin):
        return rotary_tables(cos, sin, self.heads)


class VisionAttention(nn.Cell):
    """Takes queries, keys and values apart and rotates the first two; a backend has `attend_heads` for the rest."""

    def __init__(self, config: VisionConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.split = P.Split(1, 3)
        self.rotate = RotateHalf()

    def construct(self, qkv, tables, valid):
        shape = (qkv.shape[0], self.heads, -1)
        q, k, v = self.split(qkv)
        q = self.rotate(ops.reshape(q, shape), tables[0], tables[1])
        k = self.rotate(ops.reshape(k, shape), tables[0], tables[1])
        return self.attend_heads(q, k, ops.reshape(v, shape), valid)

    def attend_heads(self, q, k, v, valid):
        """q, k, v [N, heads, head_dim], valid [1] int32 -> [N, hidden]."""
        raise NotImplementedError


class LayerNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = P.LayerNorm(-1, -1, eps)

    def construct(self, x, weight, bias):
        y, _, _ = self.norm(x, weight, bias)
        return y


class AddLayerNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(eps)

    def construct(self, x, y, weight, bias):
        x = x + y
        return x, self.norm(x, weight, bias)


class GeluTanh(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.gelu = P.GeLU()  # the tanh form

    def construct(self, x):
        return self.gelu(x)


class GeluErf(nn.Cell):
    def construct(self, x):
        g = ops.cast(x, ms.float32)
        g = 0.5 * g * (1.0 + ops.erf(g * 0.7071067811865476))
        return ops.cast(g, x.dtype)


ACTIVATIONS = {"gelu_tanh": GeluTanh, "gelu_erf": GeluErf}


def activation(name: str | None) -> nn.Cell | None:
    """What a Linear ends with."""
    return None if name is None else ACTIVATIONS[name]()


class Interpolate(nn.Cell):
    """Tap after tap, weights too: all at once would hold taps x N x D numbers."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.gather = P.Gather()
        self.split = P.Split(1, taps)

    def construct(self, table, taps, weights):
        columns, shares = self.split(taps), self.split(weights)  # `taps` x (N, 1)
        y = self._tap(table, columns[0], shares[0])
        for i in range(1, self.taps):
            y = y + self._tap(table, ops.depend(columns[i], y), ops.depend(shares[i], y))
        return y

    def _tap(self, table, column, share):
        rows = self.gather(table, ops.reshape(column, (-1,)), 0)
        return rows * ops.broadcast_to(share, rows.shape)
