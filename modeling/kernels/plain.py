"""Plain graph operators: what any MindSpore runs, on any device.

On a CPU parameters are fp32: its MatMul and Gather have no bf16 kernel, and fp16 is several times slower for the
single rows of decoding. The operators below were checked against float64 on the CPU (2.10.0): softmax 2.5e-7,
SiLU 4e-8, GELU 1e-8, LayerNorm 5e-8 relative L2; `ops.tanh` (2e-5) and `ops.exp` (1e-5) are not accurate enough.

Large operands are brought to one shape by `broadcast_to` first: the CPU's elementwise kernels keep 16 bytes of indices
per element of a broadcast result, per operator and for good, 1 GB for four biases of a [4096, 4096] activation.
Transpose keeps 8 bytes per element likewise, so heads are moved by Split and Stack, which keep nothing.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import operations as P

from .. import shapes
from ..configuration import TextConfig, VisionConfig
from . import common
from .common import RotateHalf, rotary_tables

# Numbers of a block of attention scores, heads x queries x keys: 64 MB in fp32. It bounds the memory of prefill and
# vision attention, whose whole score matrix would be gigabytes. Blocks of fewer rows than the second number would make
# the graph of a large picture too long to compile.
SCORE_BLOCK = 1 << 24
SMALLEST_BLOCK = 256
# Score of a masked place. exp(MASKED - max) is exactly 0, so what stands in masked rows changes no bit of the
# result; it is finite, so a row never turns into NaN.
MASKED = -1e30
SMALLEST_SUM = 1e-20  # added to the sum of a token's chosen scores before they are divided by it


LayerNorm = common.LayerNorm
AddLayerNorm = common.AddLayerNorm
Interpolate = common.Interpolate
ImageTables = common.ImageTables


def parameter_dtype(dtype: ms.Type) -> ms.Type:
    """fp32 whatever the model's dtype: see the module's docstring."""
    return ms.float32


activation_dtype = parameter_dtype


# One flat buffer per batch row: only then is ScatterUpdate in place and a shorter context a prefix view.
cache_shapes = shapes.cache_per_row


def query_block(heads: int, queries: int, keys: int) -> int:
    """Query rows whose scores are computed at once."""
    return min(queries, max(SMALLEST_BLOCK, SCORE_BLOCK // (heads * keys)))


def attend(batch_matmul_t, softmax, batch_matmul, q, keys, values, mask=None):
    """softmax(q keys^T (+ mask)) values in query blocks; q is scaled already.

    q [heads, T, D], keys [heads, S, D], values [heads, S, V], mask [T, S] additive -> [heads, T, V]. Each block
    waits for the one before, so that their scores share memory.
    """
    heads, tokens, context = q.shape[0], q.shape[1], keys.shape[1]
    block = query_block(heads, tokens, context)
    out = ()
    for i in range(0, tokens, block):
        if i > 0:
            q = ops.depend(q, out[-1])
        scores = ops.cast(batch_matmul_t(q[:, i : i + block], keys), ms.float32)
        if mask is not None:
            scores = scores + ops.broadcast_to(mask[i : i + block], scores.shape)
        p = softmax(scores)
        out += (batch_matmul(ops.cast(p, values.dtype), values),)
    if len(out) > 1:
        y = ops.concat(out, 1)
    else:
        y = out[0]
    return y


def scaled(x, factor: float):
    """x * factor, rounded once."""
    return ops.cast(ops.cast(x, ms.float32) * factor, x.dtype)


class Split(nn.Cell):
    """[..., first + rest] -> [..., first] and [..., rest]."""

    def __init__(self, first: int, rest: int) -> None:
        super().__init__()
        self.first = first

    def construct(self, x):
        return x[..., : self.first], x[..., self.first :]


class SplitHeads(nn.Cell):
    """[R, heads * D] -> [heads, R, D]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.split = P.Split(1, heads)
        self.stack = P.Stack(0)

    def construct(self, x):
        if self.heads == 1:
            y = x.expand_dims(0)
        else:
            y = self.stack(self.split(x))
        return y


class MergeHeads(nn.Cell):
    """[heads, R, D] -> [R, heads * D]."""

    def __init__(self) -> None:
        super().__init__()
        self.unstack = P.Unstack(0)
        self.concat = P.Concat(1)

    def construct(self, x):
        if x.shape[0] == 1:
            y = x[0]
        else:
            y = self.concat(self.unstack(x))
        return y


class Linear(nn.Cell):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.matmul = P.MatMul(transpose_b=True)
        self.bias_add = P.BiasAdd()
        self.activation = common.activation(activation)

    def construct(self, x, weight, bias=None):
        y = self.matmul(x, weight)
        if bias is not None:
            y = self.bias_add(y, bias)
        if self.activation is not None:
            y = self.activation(y)
        return y


class Embedding(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.gather = P.Gather()

    def construct(self, table, ids):
        return self.gather(table, ids, 0)


class RMSNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.mean = P.ReduceMean(True)

    def construct(self, x, weight):
        y = ops.cast(x, ms.float32)
        y = y * ops.broadcast_to(ops.rsqrt(self.mean(y * y, -1) + self.eps), y.shape)
        y = y * ops.broadcast_to(ops.cast(weight, ms.float32), y.shape)
        return ops.cast(y, x.dtype)


class AddRMSNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(eps)

    def construct(self, x, y, weight):
        x = x + y
        return x, self.norm(x, weight)


class RotaryTables(nn.Cell):
    """For the queries' heads and the shared key, which is rotated as one head more."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads

    def construct(self, cos, sin):
        return rotary_tables(cos, sin, self.heads + 1)


class Rotate(nn.Cell):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.split = Split(heads * dim, dim)
        self.rotate = RotateHalf()

    def construct(self, q, k, tables):
        rows = q.shape[0]
        x = ops.reshape(ops.concat((ops.reshape(q, (rows, -1)), k), -1), (rows, -1, self.dim))
        q, k = self.split(ops.reshape(self.rotate(x, tables[0], tables[1]), (rows, -1)))
        return ops.reshape(q, (rows, self.heads, self.dim)), k


class SwiGLU(nn.Cell):
    def construct(self, gate_up):
        half = gate_up.shape[-1] // 2
        return ops.silu(gate_up[..., :half]) * gate_up[..., half:]


class Router(nn.Cell):
    """Sigmoid scores in fp32; the correction bias takes part in the choice only."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.factor = config.routed_scaling_factor
        self.matmul = P.MatMul(transpose_b=True)
        self.sigmoid = P.Sigmoid()
        self.top = P.TopK(sorted=True)
        self.gather = P.GatherD()
        self.sum = P.ReduceSum(True)

    def construct(self, x, weight, bias):
        scores = self.sigmoid(self.matmul(ops.cast(x, ms.float32), weight))  # (R, E)
        indices = self.choose(scores + bias)
        weights = self.gather(scores, 1, indices)
        if self.normalise:
            weights = self.shares(weights)
        else:
            weights = weights * self.factor
        return indices, weights

    def shares(self, weights):
        """Of their sum [R, k], times the factor."""
        return weights / (self.sum(weights, -1) + SMALLEST_SUM) * self.factor

    def choose(self, scores):
        """scores [R, E] -> the k largest of each row, int32 [R, k]."""
        return self.top(scores, self.k)[1]


class Experts(nn.Cell):
    """Routed experts without data-dependent shapes: no token is ever dropped, whatever the skew.

    Few rows (decoding): one gathered expert per row and slot, each after the product before it, so that all are copied to
    the same memory, and the processor's cache still holds them when they are multiplied. Many rows: every expert on
    every row, its activation weighted with 0 where it was not chosen, and the sum over the experts. (One product over
    experts and width at once would sum by itself, but wants `down` as a matrix: the CPU's Reshape copies a parameter,
    and the copies of all layers, which wait for nothing, would be made at the start and live at once.)
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.k = config.num_experts_per_tok
        self.experts = config.n_routed_experts
        self.gather = P.Gather()
        self.matmul = P.MatMul()
        self.batch_matmul = P.BatchMatMul()
        self.sum = P.ReduceSum()
        self.swiglu = SwiGLU()

    def construct(self, x, gate_up, down, indices, weights):
        weights = ops.cast(weights, x.dtype)
        rows = x.shape[0]
        if rows * self.k * 4 <= self.experts:
            out = ()
            done = x
            for r in range(rows):
                y = x[r : r + 1]
                total = ops.zeros_like(y)
                for s in range(self.k):
                    e = self.after(done, indices[r, s])
                    h = self.swiglu(self.matmul(y, self.gather(gate_up, e, 0)))
                    total = total + self.matmul(h, self.gather(down, self.after(h, e), 0)) * weights[r, s]
                    done = total
                out += (total,)
            result = ops.concat(out, 0)
        else:
            chosen = ops.equal(
                indices.expand_dims(-1), ops.cast(ops.range(0, self.experts, 1), ms.int32)
            )  # (R, k, E)
            share = self.sum(ops.cast(chosen, x.dtype) * weights.expand_dims(-1), 1)  # (R, E)
            h = ops.broadcast_to(x, (self.experts, rows, x.shape[1]))
            h = self.swiglu(self.batch_matmul(h, gate_up))  # (E, R, I)
            share = ops.reshape(ops.transpose(share, (1, 0)), (self.experts, rows, 1))
            h = h * ops.broadcast_to(share, h.shape)
            result = self.sum(self.batch_matmul(h, down), 0)  # (E, R, H) -> (R, H)
        return result

    def after(self, done, expert):
        """`expert`, a scalar, once `done` is computed."""
        return ops.depend(expert, done)


class Slots(nn.Cell):
    """The slots that the tokens of each batch row are written to, [T] int32 for each."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()
        self.batch = batch
        self.offsets = ms.Tensor(list(range(tokens)), ms.int32)

    def construct(self, start):
        slots = ()
        for b in range(self.batch):
            slots += (self.offsets + start[b],)
        return slots


class CacheWrite(nn.Cell):
    """Into a flat parameter per batch row."""

    def __init__(self) -> None:
        super().__init__()
        self.write = P.ScatterUpdate()

    def construct(self, caches, rows, slots):
        return self.write_rows(caches, rows, slots)

    def write_rows(self, caches, rows, slots):
        tokens = rows.shape[0] // len(slots)
        written = ()
        for b in range(len(slots)):
            at = b * tokens
            written += (self.write(caches[b], slots[b], rows[at : at + tokens]),)  # (S, lora + rope)
        return written


class Window(nn.Cell):
    """What each token sees: its own slot and every slot up to it, as a mask [T, S] for each batch row."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()
        self.batch = batch
        self.offsets = ms.Tensor(list(range(tokens)), ms.int32)
        self.slots = ms.Tensor(list(range(context)), ms.int32)

    def construct(self, start):
        masks = ()
        for b in range(self.batch):
            first = start[b]
            p = self.offsets + first  # (T,)
            shape = (self.offsets.shape[0], self.slots.shape[0])
            # slot > p, with the start added to both sides: one that depends on no input would be folded into a
            # constant of T x S numbers, held by every compiled graph and stored in every exported one.
            hidden = ops.greater(
                ops.broadcast_to(self.slots + first, shape),
                ops.broadcast_to((p + first).expand_dims(1), shape),
            )
            masks += (ops.cast(hidden, ms.float32) * MASKED,)  # (T, S), added to the scores
        return masks


class LatentAttention(nn.Cell):
    """Multi-head latent attention over a static cache of normed latents and rotated shared keys.

    One token per row attends in latent space (k_b absorbed into the query, v_b applied to the result), so the cache
    is read as it is; a chunk expands keys and values of the window once and attends in query blocks.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope = config.qk_nope_head_dim
        self.v = config.v_head_dim
        self.lora = config.kv_lora_rank
        self.scale = config.qk_head_dim**-0.5
        self.split_heads = SplitHeads(self.heads)
        self.merge_heads = MergeHeads()
        self.matmul = P.MatMul()
        self.matmul_t = P.MatMul(transpose_b=True)
        self.batch_matmul = P.BatchMatMul()
        self.batch_matmul_t = P.BatchMatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)

    def construct(self, q_nope, q_rope, caches, masks, k_b, v_b):
        tokens = q_nope.shape[0] // len(caches)
        out = ()
        for b in range(len(caches)):
            at = b * tokens
            cache = caches[b]  # (S, lora + rope)
            nope = scaled(q_nope[at : at + tokens], self.scale)
            rope = scaled(q_rope[at : at + tokens], self.scale)
            if tokens == 1:
                out += (self.decode(nope, rope, cache, masks[b], k_b, v_b),)
            else:
                out += (self.prefill(nope, rope, cache, masks[b], k_b, v_b),)
        return ops.concat(out, 0)

    def decode(self, nope, rope, cache, mask, k_b, v_b):
        """One token's scaled queries [1, heads, nope], [1, heads, rope] -> [1, heads * v]."""
        q_latent = self.batch_matmul(ops.reshape(nope, (self.heads, 1, self.nope)), k_b)  # (heads, 1, lora)
        q_latent, rope = ops.reshape(q_latent, (self.heads, -1)), ops.reshape(rope, (self.heads, -1))
        # cache x query^T, then a transposition of the small result: the fastest order on a CPU
        scores = self.matmul_t(cache, ops.concat((q_latent, rope), -1))
        scores = ops.transpose(scores, (1, 0))  # (heads, S)
        p = self.softmax(ops.cast(scores, ms.float32) + ops.broadcast_to(mask, scores.shape))
        p = ops.cast(p, cache.dtype)
        latent = self.matmul(p, cache)[:, : self.lora]
        values = self.batch_matmul_t(ops.reshape(latent, (self.heads, 1, self.lora)), v_b)  # (heads, 1, v)
        return ops.reshape(values, (1, -1))

    def prefill(self, nope, rope, cache, mask, k_b, v_b):
        """A chunk's scaled queries [T, heads, nope], [T, heads, rope] -> [T, heads * v]."""
        context = cache.shape[0]
        q = self.split_heads(ops.reshape(ops.concat((nope, rope), -1), (nope.shape[0], -1)))
        latent, k_rope = cache[:, : self.lora], cache[:, self.lora :]
        # A parameter's Reshape is a copy; one that waits for its layer shares memory with those of other layers.
        k_b, v_b = ops.depend(k_b, latent), ops.depend(v_b, latent)
        keys = self.split_heads(self.matmul_t(latent, ops.reshape(k_b, (-1, self.lora))))  # (heads, S, nope)
        k_rope = ops.broadcast_to(k_rope, (self.heads, context, k_rope.shape[1]))
        keys = ops.concat((keys, k_rope), -1)  # (heads, S, nope + rope)
        values = self.split_heads(self.matmul_t(latent, ops.reshape(v_b, (-1, self.lora))))  # (heads, S, v)
        y = attend(self.batch_matmul_t, self.softmax, self.batch_matmul, q, keys, values, mask)
        return self.merge_heads(y)  # (T, heads * v)


class VisionAttention(common.VisionAttention):
    """Full attention within one image, in query blocks; patches from `valid` on are padding and not seen.

    A key has one more number, MASKED if it is padding and else 0, which every query takes with weight 1. So scores come
    out masked, and no mask is brought to the shape of a block and added, which would hold four blocks instead of two.
    """

    def __init__(self, config: VisionConfig, dtype: ms.Type) -> None:
        super().__init__(config, dtype)
        self.scale = config.head_dim**-0.5
        self.split_heads = SplitHeads(self.heads)
        self.merge_heads = MergeHeads()
        self.batch_matmul = P.BatchMatMul()
        self.batch_matmul_t = P.BatchMatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)

    def attend_heads(self, q, k, v, valid):
        n = q.shape[0]
        padding = ops.greater_equal(ops.cast(ops.range(0, n, 1), ms.int32), valid)
        mask = ops.cast(ops.cast(padding, ms.float32) * MASKED, k.dtype)
        mask = ops.broadcast_to(ops.reshape(mask, (n, 1, 1)), (n, self.heads, 1))
        k = self._by_head(ops.concat((k, mask), -1))  # (heads, N, head_dim + 1)
        # 1 that depends on an input: where NumPy is newer than MindSpore's own, no constant can be cast to bf16.
        ones = ops.broadcast_to(ops.cast(ops.greater(valid, 0), q.dtype), mask.shape)
        q = self._by_head(ops.concat((scaled(q, self.scale), ones), -1))
        v = self._by_head(v)  # (heads, N, head_dim)
        y = attend(self.batch_matmul_t, self.softmax, self.batch_matmul, q, k, v)
        return self.merge_heads(y)

    def _by_head(self, x):
        return self.split_heads(ops.reshape(x, (x.shape[0], -1)))
