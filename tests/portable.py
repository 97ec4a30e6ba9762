"""Ascend's kernels made of operators that a CPU has, so that graphs with its kind of cache compile, export and run here.

Each fused operator is replaced by a cell that does what its documentation says, as far as the network uses it (the
experts, which have no part in the cache, by the plain ones). Whether Ascend's own operators are used as documented is
asked elsewhere; this is for everything around them.
"""

from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops import operations as P

from kimi_vl.modeling.kernels import ascend, cache_writes, plain


class ScatterUpdate(nn.Cell):
    """cache[b, 0, start[b] + i] = rows[b, 0, i], in place; a start that does not fit ends the program."""

    def __init__(self):
        super().__init__()
        self.update = P.ScatterNdUpdate()

    def construct(self, cache, start, rows, axis, reduce):
        batch, tokens = rows.shape[0], rows.shape[2]
        slots = ops.reshape(ops.cast(start, ms.int32), (batch, 1)) + ms.Tensor(np.arange(tokens), ms.int32)
        row = ops.broadcast_to(ms.Tensor(np.arange(batch)[:, None], ms.int32), slots.shape)
        indices = ops.stack((row, ops.zeros_like(row), slots), -1)  # (B, T, 3)
        return self.update(cache, indices, ops.reshape(rows, (batch, tokens, -1)))


class FusedAttention(nn.Cell):
    """softmax(scale q k^T) v; True in the mask, or beyond the lengths, is not seen."""

    def __init__(self, scale_value, **attributes):
        super().__init__()
        self.scale = scale_value
        self.matmul, self.matmul_t = P.BatchMatMul(), P.BatchMatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)

    def construct(self, q, keys, values, shift, mask, lengths, kv_lengths):
        scores = self.matmul_t(q, keys[0]) * self.scale
        if mask is not None:
            scores = scores + ops.broadcast_to(ops.cast(mask, ms.float32) * plain.MASKED, scores.shape)
        if lengths is not None:
            unseen = ms.Tensor(np.arange(keys[0].shape[2]), ms.int32) >= ops.cast(lengths, ms.int32)
            scores = scores + ops.broadcast_to(ops.cast(unseen, ms.float32) * plain.MASKED, scores.shape)
        return self.matmul(self.softmax(scores), values[0]), scores


class RmsNorm(nn.Cell):
    def __init__(self, epsilon):
        super().__init__()
        self.norm = plain.RMSNorm(epsilon)

    def construct(self, x, weight):
        return self.norm(x, weight), x


class AddRmsNorm(nn.Cell):
    def construct(self, x, y, weight, epsilon):
        total = x + y
        scale = ops.rsqrt(ops.mean(total * total, -1, True) + epsilon)
        normed = total * ops.broadcast_to(scale, total.shape) * ops.broadcast_to(weight, total.shape)
        return normed, scale, total


class Swiglu(nn.Cell):
    def __init__(self):
        super().__init__()
        self.swiglu = plain.SwiGLU()

    def construct(self, x, axis):
        return self.swiglu(x)


class SplitWithSize(nn.Cell):
    def construct(self, x, sizes, axis):
        return x[..., : sizes[0]], x[..., sizes[0] :]


class TopkExt(nn.Cell):
    def __init__(self):
        super().__init__()
        self.top = P.TopK(sorted=True)

    def construct(self, x, k, axis, largest, ordered):
        return self.top(x, k)


class AddExt(nn.Cell):
    def construct(self, a, b, alpha):
        return a + b * alpha


class ConstantPad(nn.Cell):
    def construct(self, x, sizes, value):
        return ops.concat((x, ops.zeros(x.shape[:-1] + (sizes[1],), x.dtype)), -1)


OPERATORS = SimpleNamespace(
    KVCacheScatterUpdate=ScatterUpdate,
    FusedInferAttentionScore=FusedAttention,
    RmsNorm=RmsNorm,
    AddRmsNorm=AddRmsNorm,
    Swiglu=Swiglu,
    SplitWithSize=SplitWithSize,
    TopkExt=TopkExt,
    AddExt=AddExt,
    ConstantPadND=ConstantPad,
)


def install(monkeypatch) -> None:
    """From now on the backend `ascend` is this one."""
    for module in (ascend, cache_writes):
        monkeypatch.setattr(module, "generated", OPERATORS)
    monkeypatch.setattr(ascend, "Experts", plain.Experts)
