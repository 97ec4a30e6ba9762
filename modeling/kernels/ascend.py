"""Ascend operators: fused where CANN has a kernel for what the network needs, plain ones around them.

For Atlas A2 and A3, kernel by kernel (``jit_level`` O0 or O1), parameters in bf16 or fp16 as they are stored. The graphs
are traced on a CPU host, which has no kernel for the fused operators and never runs them. Limits that the front end
does not check are kept here as far as padding can: FusedInferAttentionScore takes head dims that are multiples of 16 and
the same for keys and values (zero columns change nothing: a zero in q and k adds nothing to a score, one in v is sliced
off); GroupedMatmul takes int64 counts. What it cannot mend is refused at export, by ``export.legality``. Sources for each
choice are in ``docs/ascend-operators.md``.

At one token per row each operator costs about its launch, so decoding is written for few operators.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import auto_generate as generated
from mindspore.ops import operations as P

from .. import shapes
from ..configuration import TextConfig, VisionConfig
from . import cache_writes, common, plain

HEAD_DIM_STEP = 16  # of FusedInferAttentionScore
# inner_precise of FusedInferAttentionScore: accumulate in fp32, and for text also treat rows that are masked whole.
PRECISE, PRECISE_MASKED = 0, 2
COUNTS = 2  # MoeInitRoutingV2 gives how many rows each expert has, not their running sum
# GroupedMatmulV4: groups along the rows of x, their sizes as counts, one output for all of them
GROUPS = {"split_item": 3, "group_type": 0, "group_list_type": 1}

Embedding = plain.Embedding
LayerNorm = common.LayerNorm
AddLayerNorm = common.AddLayerNorm
Interpolate = common.Interpolate
ImageTables = common.ImageTables
Slots = cache_writes.Starts
CacheWrite = cache_writes.KVCacheScatterWrite
cache_shapes = shapes.cache_of_batch


def parameter_dtype(dtype: ms.Type) -> ms.Type:
    """As the model's: nothing is widened."""
    return dtype


activation_dtype = parameter_dtype


class Linear(nn.Cell):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.matmul = P.MatMul(transpose_b=True)
        self.activation = common.activation(activation)

    def construct(self, x, weight, bias=None):
        y = self.matmul(x, weight)
        if bias is not None:
            y = y + bias
        if self.activation is not None:
            y = self.activation(y)
        return y


class RMSNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = generated.RmsNorm(eps)

    def construct(self, x, weight):
        return self.norm(x, weight)[0]


class AddRMSNorm(nn.Cell):
    """One operator for both; its norm is that of the sum before it is rounded."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = generated.AddRmsNorm()

    def construct(self, x, y, weight):
        normed, _, x = self.norm(x, y, weight, self.eps)
        return x, normed


class Split(nn.Cell):
    """One operator for both parts, where two slices would be two."""

    def __init__(self, first: int, rest: int) -> None:
        super().__init__()
        self.sizes = (first, rest)
        self.split = generated.SplitWithSize()

    def construct(self, x):
        return self.split(x, self.sizes, -1)


class Pad(nn.Cell):
    """`count` zeros after the last axis of [B, heads, T, D]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.pad = generated.ConstantPadND()

    def construct(self, x):
        return self.pad(x, (0, self.count), 0.0) if self.count > 0 else x


class AddScaled(nn.Cell):
    """x + y * factor, as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.add = generated.AddExt()

    def construct(self, x, y, factor):
        return self.add(x, y, factor)


class RotaryTables(nn.Cell):
    """A rotation matrix per row [R, D, D]: with it, each layer rotates in one product for queries and one for keys.

    A column has two numbers that are not 0, so the product is x cos + x' sin, summed in fp32 and rounded once.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.same = ms.Tensor([[[float(i == j) for j in range(dim)] for i in range(dim)]], ms.float32)
        self.swapped = ms.Tensor(
            [[[float(i == (j + half) % dim) for j in range(dim)] for i in range(dim)]], ms.float32
        )

    def construct(self, cos, sin):
        cos, sin = ops.cast(ops.concat((cos, cos), -1), ms.float32), ops.concat((-sin, sin), -1)
        turn = self.same * cos.expand_dims(1) + self.swapped * ops.cast(sin, ms.float32).expand_dims(1)
        return ops.cast(turn, sin.dtype)


class Rotate(nn.Cell):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.batch_matmul = P.BatchMatMul()

    def construct(self, q, k, tables):
        return self.batch_matmul(q, tables), ops.reshape(self.batch_matmul(k.expand_dims(1), tables), k.shape)


class SwiGLU(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.swiglu = generated.Swiglu()

    def construct(self, gate_up):
        return self.swiglu(gate_up, -1)


class Router(plain.Router):
    """TopkExt has an aclnn kernel; TopK would be compiled as a single-operator model.

    The factor is in what the weights are divided by, (sum + 1e-20) / factor, which is one addition.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.top = generated.TopkExt()
        self.add_scaled = generated.AddExt()
        self.smallest = ms.Tensor([[plain.SMALLEST_SUM / self.factor]], ms.float32)

    def shares(self, weights):
        return weights / self.add_scaled(self.smallest, self.sum(weights, -1), 1.0 / self.factor)

    def choose(self, scores):
        return ops.cast(self.top(scores, self.k, -1, True, True)[1], ms.int32)


class Experts(nn.Cell):
    """Rows sorted by expert, two grouped products, rows added up again: only the chosen experts' weights are read.

    The operator that adds up takes fp32 probabilities beside rows in half precision: they are not rounded. It is called by
    its inner name, because MoeTokenUnpermute of two dtypes would be traced with casts of all rows.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.experts = config.n_routed_experts
        self.sort = generated.MoeInitRoutingV2()
        self.grouped = generated.GroupedMatmulV4()
        self.swiglu = SwiGLU()
        self.unsort = generated.InnerMoeTokenUnpermute()

    def construct(self, x, gate_up, down, indices, weights):
        rows, places, counts, _ = self.sort(x, indices, 0, 0, self.experts, 0, COUNTS, False)  # (R * k, H)
        counts = ops.cast(counts, ms.int64)
        h = self.swiglu(self.grouped([rows], [gate_up], group_list=counts, **GROUPS)[0])
        y = self.grouped([h], [down], group_list=counts, **GROUPS)[0]
        return self.unsort(y, places, weights, False, None)


class Window(nn.Cell):
    """The slots that the tokens do not see.

    For one token per row a mask in fp32 [B, 1, S], added to the scores; for a chunk bool [B, 1, T, S]. It says chunk and
    length at once and needs no assumption about how an operator aligns a causal mask.
    """

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()
        self.batch, self.context = batch, context
        self.added = tokens == 1
        self.offsets = ms.Tensor([[[[i] for i in range(tokens)]]], ms.int32)
        self.slots = ms.Tensor([[[list(range(context))]]], ms.int32)

    def construct(self, start):
        last = self.offsets + ops.reshape(start, (self.batch, 1, 1, 1))  # (B, 1, T, 1)
        mask = ops.greater(self.slots, last)  # (B, 1, T, S)
        if self.added:
            mask = ops.cast(ops.reshape(mask, (self.batch, -1, self.context)), ms.float32) * plain.MASKED
        return mask


class AddedWindow(Window):
    """For plain attention: fp32 [B, T, S] for a chunk too."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__(batch, tokens, context)
        self.added = True


class FusedAttention(nn.Cell):
    """softmax(scale q k^T) v of q [B, heads, T, qk], k [B, heads, S, qk], v [B, heads, S, v] -> [B, heads, T, v]."""

    pad, split = Pad, Split  # a backend may have others

    def __init__(self, heads: int, qk: int, v: int, scale: float, precision: int) -> None:
        super().__init__()
        self.v = v
        self.width = -(-max(qk, v) // HEAD_DIM_STEP) * HEAD_DIM_STEP
        self.pad_keys = self.pad(self.width - qk)
        self.pad_values = self.pad(self.width - v)
        self.unpad = self.split(v, self.width - v)
        self.attention = generated.FusedInferAttentionScore(
            num_heads=heads,
            num_key_value_heads=heads,
            scale_value=scale,
            input_layout="BNSD",
            sparse_mode=0,
            inner_precise=precision,
        )

    def construct(self, q, k, v, mask=None, lengths=None):
        """mask [B, 1, T, S] is True where a key is not seen; lengths [B] int64 of queries and keys alike."""
        q, k, v = self.pad_keys(q), self.pad_keys(k), self.pad_values(v)
        y = self.attention(q, [k], [v], None, mask, lengths, lengths)[0]
        if self.width > self.v:
            y = self.unpad(y)[0]
        return y


class HeadsFirst(nn.Cell):
    """[B, T, heads, D] -> [B, heads, T, D], and back."""

    def construct(self, x):
        return ops.transpose(x, (0, 2, 1, 3))


class BatchAttention(plain.LatentAttention):
    """One cache for all rows of the batch."""

    add_scaled, split = AddScaled, Split  # a backend may have others

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.mask_scaled = self.add_scaled()
        self.rope = config.qk_rope_head_dim
        self.split_latent = self.split(self.lora, self.rope)

    def construct(self, q_nope, q_rope, caches, mask, k_b, v_b):
        batch = mask.shape[0]
        cache = ops.reshape(caches[0], (batch, -1, self.lora + self.rope))  # (B, S, lora + rope)
        if q_nope.shape[0] == batch:
            y = self.decode(q_nope, q_rope, cache, mask, k_b, v_b)
        else:
            y = self.prefill_batch(q_nope, q_rope, cache, mask, k_b, v_b)
        return y

    def decode(self, q_nope, q_rope, cache, mask, k_b, v_b):
        """One token of each row: queries [B, heads, nope], [B, heads, rope] -> [B, heads * v]."""
        q_latent = self._swapped(self.batch_matmul(self._swapped(q_nope), k_b))  # (B, heads, lora)
        scores = self.batch_matmul_t(ops.concat((q_latent, q_rope), -1), cache)  # (B, heads, S)
        p = self.softmax(self.mask_scaled(mask, ops.cast(scores, ms.float32), self.scale))
        latent = self.split_latent(self.batch_matmul(ops.cast(p, cache.dtype), cache))[0]  # (B, heads, lora)
        values = self._swapped(self.batch_matmul_t(self._swapped(latent), v_b))  # (B, heads, v)
        return ops.reshape(values, (values.shape[0], -1))

    def _swapped(self, x):
        """[a, b, D] -> [b, a, D]; for one of one it is a reshape, which costs nothing."""
        shape = (x.shape[1], x.shape[0], x.shape[2])
        return ops.reshape(x, shape) if 1 in shape[:2] else ops.transpose(x, (1, 0, 2))


class LatentAttention(BatchAttention):
    """Chunks expand keys and values of the window and attend in one operator."""

    fused_attention = FusedAttention

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.swap = HeadsFirst()
        qk = config.qk_head_dim
        self.fused = self.fused_attention(self.heads, qk, self.v, qk**-0.5, PRECISE_MASKED)

    def prefill_batch(self, q_nope, q_rope, cache, mask, k_b, v_b):
        """A chunk of each row: queries [R, heads, nope], [R, heads, rope] -> [R, heads * v]."""
        batch, context = cache.shape[0], cache.shape[1]
        q = ops.reshape(ops.concat((q_nope, q_rope), -1), (batch, -1, self.heads, self.nope + self.rope))
        latent, k_rope = self.split_latent(cache)
        k_rope = ops.broadcast_to(k_rope.expand_dims(2), (batch, context, self.heads, self.rope))
        keys = ops.concat((self._expand(latent, k_b), k_rope), -1)  # (B, S, heads, nope + rope)
        y = self.fused(self.swap(q), self.swap(keys), self.swap(self._expand(latent, v_b)), mask)
        return ops.reshape(self.swap(y), (q_nope.shape[0], -1))

    def _expand(self, latent, weight):
        """[B, S, lora] x [heads, D, lora] -> [B, S, heads, D]."""
        y = self.matmul_t(ops.reshape(latent, (-1, self.lora)), ops.reshape(weight, (-1, self.lora)))
        return ops.reshape(y, (latent.shape[0], latent.shape[1], self.heads, -1))


class PlainLatentAttention(BatchAttention):
    """Chunks attend with plain operators, row after row of the batch."""

    def prefill_batch(self, q_nope, q_rope, cache, mask, k_b, v_b):
        batch = cache.shape[0]
        tokens = q_nope.shape[0] // batch
        out = ()
        for b in range(batch):
            at = b * tokens
            nope = plain.scaled(q_nope[at : at + tokens], self.scale)
            rope = plain.scaled(q_rope[at : at + tokens], self.scale)
            out += (self.prefill(nope, rope, cache[b], mask[b], k_b, v_b),)
        return ops.concat(out, 0)


class PlainExperts(plain.Experts):
    """In no order of their own: that is for a processor's cache."""

    def after(self, done, expert):
        return expert


class VisionAttention(common.VisionAttention):
    """One image per call; what its patches from `valid` on attend to is not defined, and nobody attends to them."""

    fused_attention = FusedAttention

    def __init__(self, config: VisionConfig, dtype: ms.Type) -> None:
        super().__init__(config, dtype)
        d = config.head_dim
        self.swap = HeadsFirst()
        self.fused = self.fused_attention(config.num_attention_heads, d, d, d**-0.5, PRECISE)

    def attend_heads(self, q, k, v, valid):
        q, k, v = self.swap(q.expand_dims(0)), self.swap(k.expand_dims(0)), self.swap(v.expand_dims(0))
        y = self.fused(q, k, v, None, ops.cast(valid, ms.int64))  # (1, heads, N, head_dim)
        return ops.reshape(self.swap(y), (q.shape[2], -1))


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "fused": {},
        "plain": {
            "Window": AddedWindow,
            "LatentAttention": PlainLatentAttention,
            "VisionAttention": plain.VisionAttention,
        },
    },
    "experts": {"fused": {}, "plain": {"Experts": PlainExperts}},
    "cache_write": {
        "scatter": {},
        "scatter-nd": cache_writes.SCATTER_ND,
        "scatter-update": cache_writes.SCATTER_UPDATE,
        "index-copy": cache_writes.INDEX_COPY,
    },
}
