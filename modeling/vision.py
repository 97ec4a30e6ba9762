"""MoonViT vision tower and the projector into the text model's width.

One image per call, padded to a static number of patches N. The host hands in the patches in merge order (the patches
of a 2x2 block next to each other, so that merging is a reshape), the position table's taps and weights, and the rotary
tables; see `vision_inputs`. Attribute paths are the parameter names that the conversion table writes.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import lazy_inline, nn, ops
from mindspore.ops import operations as P

from .configuration import ModelConfig, VisionConfig
from .kernels import Kernels
from .language import Linear
from .parameters import empty_parameter
from .rotary import RotateHalf, rotary_tables

LAYER_NORM_EPS = 1e-5
TAPS = 16  # of a bicubic interpolation


class LayerNorm(nn.Cell):
    def __init__(self, dtype: ms.Type, size: int) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), dtype)
        self.bias = empty_parameter((size,), dtype, "bias")
        self.norm = P.LayerNorm(-1, -1, LAYER_NORM_EPS)

    def construct(self, x):
        y, _, _ = self.norm(x, self.weight, self.bias)
        return y


class PositionTable(nn.Cell):
    """Bicubic interpolation of the learned table: 16 taps and weights per patch, computed by the host."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        entries = config.init_pos_emb_height * config.init_pos_emb_width
        self.weight = empty_parameter((entries, config.hidden_size), dtype)
        self.lookup = kernels.Embedding()
        self.split = P.Split(1, TAPS)

    def construct(self, taps, weights):
        columns, shares = self.split(taps), self.split(weights)  # 16 x (N, 1)
        y = self._tap(columns[0], shares[0])
        # Tap after tap, weights too: all at once would hold 16 x N x D numbers.
        for i in range(1, TAPS):
            y = y + self._tap(ops.depend(columns[i], y), ops.depend(shares[i], y))
        return y

    def _tap(self, column, share):
        rows = self.lookup(self.weight, ops.reshape(column, (-1,)))
        return rows * ops.broadcast_to(share, rows.shape)


class PatchEmbed(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(kernels, dtype, config.patch_dim, config.hidden_size, bias=True)
        self.pos_emb = PositionTable(kernels, dtype, config)

    def construct(self, patches, taps, weights):
        return self.proj(patches) + self.pos_emb(taps, weights)


class VisionMLP(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.fc0 = Linear(kernels, dtype, config.hidden_size, config.intermediate_size, bias=True)
        self.fc1 = Linear(kernels, dtype, config.intermediate_size, config.hidden_size, bias=True)
        self.gelu = P.GeLU()  # the tanh form

    def construct(self, x):
        return self.fc1(self.gelu(self.fc0(x)))


class VisionBlock(nn.Cell):
    @lazy_inline(policy="front")
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm0 = LayerNorm(dtype, d)
        self.norm1 = LayerNorm(dtype, d)
        self.wqkv = Linear(kernels, dtype, d, 3 * d, bias=True)
        self.wo = Linear(kernels, dtype, d, d, bias=True)
        self.mlp = VisionMLP(kernels, dtype, config)
        self.rotate = RotateHalf()
        self.split = P.Split(1, 3)
        self.attention = kernels.VisionAttention(config)

    def construct(self, x, cos, sin, valid):
        shape = (x.shape[0], self.heads, -1)
        q, k, v = self.split(self.wqkv(self.norm0(x)))
        q = self.rotate(ops.reshape(q, shape), cos, sin)  # (N, heads, head_dim)
        k = self.rotate(ops.reshape(k, shape), cos, sin)
        x = x + self.wo(self.attention(q, k, ops.reshape(v, shape), valid))
        return x + self.mlp(self.norm1(x))


class Encoder(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.blocks = nn.CellList(
            [VisionBlock(kernels, dtype, config) for _ in range(config.num_hidden_layers)]
        )
        self.final_layernorm = LayerNorm(dtype, config.hidden_size)

    def construct(self, x, cos, sin, valid):
        for block in self.blocks:
            x = block(x, cos, sin, valid)
        return self.final_layernorm(x)


class MoonViT(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.patch_embed = PatchEmbed(kernels, dtype, config)
        self.encoder = Encoder(kernels, dtype, config)

    def construct(self, patches, taps, weights, cos, sin, valid):
        """patches [N, 3 * 14 * 14] in merge order -> [N, D]."""
        x = self.patch_embed(patches, taps, weights)
        cos, sin = rotary_tables(cos, sin, self.heads)
        return self.encoder(x, cos, sin, valid)


class Projector(nn.Cell):
    """LayerNorm per patch, concatenation of a merge block, linear, GELU (erf), linear."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: ModelConfig) -> None:
        super().__init__()
        merged = config.vision.merged_dim
        self.merged = merged
        self.pre_norm = LayerNorm(dtype, config.vision.hidden_size)
        self.linear_1 = Linear(kernels, dtype, merged, merged, bias=True)
        self.linear_2 = Linear(kernels, dtype, merged, config.text.hidden_size, bias=True)

    def construct(self, x):
        """[N, D] in merge order -> [N / 4, H]."""
        h = self.linear_1(ops.reshape(self.pre_norm(x), (-1, self.merged)))
        g = ops.cast(h, ms.float32)
        g = 0.5 * g * (1.0 + ops.erf(g * 0.7071067811865476))
        return self.linear_2(ops.cast(g, h.dtype))
