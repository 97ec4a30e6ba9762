"""Operators for the graph engine (GE), which compiles a whole graph: what MindSpore Lite runs with the provider `ge`.

GE takes an operator only if MindSpore has an adapter for it, and most of the newer operators that ``ascend`` uses have
none. The attention is fused as there; the experts use the first GroupedMatmul, the only one with an adapter, between
rows that are sorted and brought back by plain operators; its bf16 form in GE is untested by anyone we know of. Parameters
and caches are those of ``ascend``.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import auto_generate as generated
from mindspore.ops import operations as P

from ..configuration import TextConfig
from . import ascend, cache_writes, common, plain

EXACT = 1 << 24  # integers up to it are exact in fp32
ONE_OUTPUT, ALONG_ROWS = 3, 0  # split_item and group_type of GroupedMatmul

Embedding = plain.Embedding
LayerNorm = common.LayerNorm
AddLayerNorm = common.AddLayerNorm
Interpolate = common.Interpolate
ImageTables = common.ImageTables
Linear = ascend.Linear
RMSNorm = ascend.RMSNorm
AddRMSNorm = ascend.AddRMSNorm
Split = plain.Split
RotaryTables = ascend.RotaryTables
Rotate = ascend.Rotate
Router = plain.Router
Slots = ascend.Slots
CacheWrite = ascend.CacheWrite
Window = ascend.Window
cache_shapes = ascend.cache_shapes
parameter_dtype = ascend.parameter_dtype
activation_dtype = ascend.activation_dtype


class SwiGLU(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.halves = P.Split(-1, 2)

    def construct(self, gate_up):
        gate, up = self.halves(gate_up)
        return ops.silu(gate) * up


class Pad(nn.Cell):
    """`count` zeros after the last axis of [B, heads, T, D]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.pad = P.Pad(((0, 0), (0, 0), (0, 0), (0, count)))

    def construct(self, x):
        return self.pad(x) if self.count > 0 else x


class AddScaled(nn.Cell):
    """x + y * factor."""

    def construct(self, x, y, factor):
        return x + y * factor


class Experts(nn.Cell):
    """Rows sorted by expert, two grouped products, rows brought back and added up.

    They are sorted by TopK of keys that all differ (expert and place in one number, which fp32 holds exactly up to 2^24),
    so the order does not depend on what a kernel does with equal ones. Sort is documented with a loss of accuracy in fp32,
    and not for int32 by all.

    Raises:
        ValueError: there are too many rows for that.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.experts = ms.Tensor([[e] for e in range(config.n_routed_experts)], ms.int32)
        self.number = config.n_routed_experts
        self.top = P.TopK(sorted=True)
        self.gather = P.Gather()
        self.sum = P.ReduceSum()
        self.grouped = generated.GroupedMatmul(ONE_OUTPUT, ALONG_ROWS)
        self.swiglu = SwiGLU()
        self.batch_matmul = P.BatchMatMul()

    def construct(self, x, gate_up, down, indices, weights):
        rows, k = indices.shape
        flat = ops.reshape(indices, (-1,))  # (R * k,)
        places = ops.cast(ops.range(0, rows * k, 1), ms.int32)
        if rows * k * self.number > EXACT:
            raise ValueError("experts: more rows than fp32 can number; use a smaller prefill chunk")
        order = self.ascending(flat * (rows * k) + places)
        back = self.ascending(order)
        ends = self.sum(ops.cast(ops.less_equal(flat.expand_dims(0), self.experts), ms.float32), 1)
        ends = ops.cast(ends, ms.int64)  # (E,), of each expert's rows
        sorted_rows = self.gather(x, order // k, 0)  # (R * k, H)
        h = self.swiglu(self.product(sorted_rows, gate_up, ends))
        y = self.gather(self.product(h, down, ends), back, 0)
        y = ops.reshape(y, (rows, k, -1))
        weights = ops.cast(weights, x.dtype).expand_dims(1)  # (R, 1, k)
        return ops.reshape(self.batch_matmul(weights, y), (rows, -1))

    def ascending(self, keys):
        """The places of the keys [n] in their order, [n] int32."""
        return self.top(ops.cast(-keys, ms.float32), keys.shape[0])[1]

    def product(self, x, weight, ends):
        return self.grouped([x], [weight], None, None, None, None, None, ends)[0]


class FusedAttention(ascend.FusedAttention):
    pad, split = Pad, Split


class LatentAttention(ascend.LatentAttention):
    add_scaled, split, fused_attention = AddScaled, Split, FusedAttention


class PlainLatentAttention(ascend.PlainLatentAttention):
    add_scaled, split = AddScaled, Split


class VisionAttention(ascend.VisionAttention):
    fused_attention = FusedAttention


VARIANTS = {
    "attention": {
        "fused": {},
        "plain": ascend.VARIANTS["attention"]["plain"] | {"LatentAttention": PlainLatentAttention},
    },
    "experts": ascend.VARIANTS["experts"],
    "cache_write": {
        "scatter": {},
        "scatter-nd": cache_writes.SCATTER_ND,
        "scatter-update": cache_writes.SCATTER_UPDATE,
    },
}
