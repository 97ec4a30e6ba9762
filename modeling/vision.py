"""MoonViT vision tower and the projector into the text model's width.

One image per call, padded to a static number of patches N. The host hands in the patches in merge order (the patches
of a 2x2 block next to each other, so that merging is a reshape), the position table's taps and weights, and the rotary
tables; see `vision_inputs`. Attribute paths are the parameter names that the conversion table writes.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import lazy_inline, nn, ops

from .configuration import ModelConfig, VisionConfig
from .kernels import Kernels
from .language import Linear
from .parameters import empty_parameter

LAYER_NORM_EPS = 1e-5
TAPS = 16  # of a bicubic interpolation


class LayerNorm(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, size: int) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), dtype)
        self.bias = empty_parameter((size,), dtype, "bias")
        self.norm = kernels.LayerNorm(LAYER_NORM_EPS)
        self.add_norm = kernels.AddLayerNorm(LAYER_NORM_EPS)

    def construct(self, x, y=None):
        """The norm of x [N, D]; with y, x + y and the norm of that."""
        if y is None:
            result = self.norm(x, self.weight, self.bias)
        else:
            result = self.add_norm(x, y, self.weight, self.bias)
        return result


class PositionTable(nn.Cell):
    """Bicubic interpolation of the learned table: 16 taps and weights per patch, computed by the host."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        entries = config.init_pos_emb_height * config.init_pos_emb_width
        self.weight = empty_parameter((entries, config.hidden_size), dtype)
        self.interpolate = kernels.Interpolate(TAPS)

    def construct(self, taps, weights):
        return self.interpolate(self.weight, taps, weights)


class PatchEmbed(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(kernels, dtype, config.patch_dim, config.hidden_size, bias=True)
        self.pos_emb = PositionTable(kernels, dtype, config)

    def construct(self, patches, taps, weights):
        """Two tensors [N, D] whose sum is the embedding: the first block's norm is made together with it."""
        return self.proj(patches), self.pos_emb(taps, weights)


class VisionMLP(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.fc0 = Linear(kernels, dtype, d, wide, bias=True, activation="gelu_tanh")
        self.fc1 = Linear(kernels, dtype, wide, d, bias=True)

    def construct(self, x):
        return self.fc1(self.fc0(x))


class VisionBlock(nn.Cell):
    @lazy_inline(policy="front")
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm0 = LayerNorm(kernels, dtype, d)
        self.norm1 = LayerNorm(kernels, dtype, d)
        self.wqkv = Linear(kernels, dtype, d, 3 * d, bias=True)
        self.wo = Linear(kernels, dtype, d, d, bias=True)
        self.mlp = VisionMLP(kernels, dtype, config)
        self.attention = kernels.VisionAttention(config, dtype)

    def construct(self, x, y, tables, valid):
        """x, y [N, D], whose sum is the block's input -> two tensors whose sum is its output."""
        x, h = self.norm0(x, y)
        x, h = self.norm1(x, self.wo(self.attention(self.wqkv(h), tables, valid)))
        return x, self.mlp(h)


class Encoder(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.blocks = nn.CellList(
            [VisionBlock(kernels, dtype, config) for _ in range(config.num_hidden_layers)]
        )
        self.final_layernorm = LayerNorm(kernels, dtype, config.hidden_size)

    def construct(self, x, y, tables, valid):
        for block in self.blocks:
            x, y = block(x, y, tables, valid)
        return self.final_layernorm(x + y)


class MoonViT(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: VisionConfig) -> None:
        super().__init__()
        self.tables = kernels.ImageTables(config.num_attention_heads)
        self.patch_embed = PatchEmbed(kernels, dtype, config)
        self.encoder = Encoder(kernels, dtype, config)

    def construct(self, patches, taps, weights, cos, sin, valid):
        """patches [N, 3 * 14 * 14] in merge order -> [N, D]."""
        x, y = self.patch_embed(patches, taps, weights)
        return self.encoder(x, y, self.tables(cos, sin), valid)


class Projector(nn.Cell):
    """LayerNorm per patch, concatenation of a merge block, linear, GELU (erf), linear."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: ModelConfig) -> None:
        super().__init__()
        merged = config.vision.merged_dim
        self.merged = merged
        self.pre_norm = LayerNorm(kernels, dtype, config.vision.hidden_size)
        self.linear_1 = Linear(kernels, dtype, merged, merged, bias=True, activation="gelu_erf")
        self.linear_2 = Linear(kernels, dtype, merged, config.text.hidden_size, bias=True)

    def construct(self, x):
        """[N, D] in merge order -> [N / 4, H]."""
        return self.linear_2(self.linear_1(ops.reshape(self.pre_norm(x), (-1, self.merged))))
