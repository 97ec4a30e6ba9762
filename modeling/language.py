"""The text model: DeepSeek-V3 decoder with multi-head latent attention and a mixture of experts.

Activations are rows: x [R, H] with R = batch * tokens. Attribute paths are the parameter names that the conversion
table writes; shapes and layouts are described there.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import lazy_inline, nn, ops

from .configuration import TextConfig
from .kernels import Kernels
from .parameters import empty_parameter

# The published class leaves this norm at its default; only the others follow rms_norm_eps.
KV_A_LAYERNORM_EPS = 1e-6


class Linear(nn.Cell):
    """y = x W^T (+ b), W as published [out, in]; with an activation, "gelu_tanh" or "gelu_erf", that of y."""

    def __init__(
        self,
        kernels: Kernels,
        dtype: ms.Type,
        n_in: int,
        n_out: int,
        bias: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = empty_parameter((n_out, n_in), dtype)
        self.bias = empty_parameter((n_out,), dtype, "bias") if bias else None
        self.linear = kernels.Linear(activation)

    def construct(self, x):
        return self.linear(x, self.weight, self.bias)


class RMSNorm(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), dtype)
        self.norm = kernels.RMSNorm(eps)
        self.add_norm = kernels.AddRMSNorm(eps)

    def construct(self, x, y=None):
        """The norm of x [R, H]; with y, x + y and the norm of that."""
        if y is None:
            result = self.norm(x, self.weight)
        else:
            result = self.add_norm(x, y, self.weight)
        return result


class Attention(nn.Cell):
    """Multi-head latent attention (MLA) with plain queries (no query compression)."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        nope, lora = config.qk_nope_head_dim, config.kv_lora_rank
        self.q_proj = Linear(kernels, dtype, config.hidden_size, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(kernels, dtype, config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(kernels, dtype, lora, KV_A_LAYERNORM_EPS)
        self.k_b_proj = HeadProjection(dtype, self.heads, nope, lora)
        self.v_b_proj = HeadProjection(dtype, self.heads, config.v_head_dim, lora)
        self.o_proj = Linear(kernels, dtype, self.heads * config.v_head_dim, config.hidden_size)
        self.split_q = kernels.Split(nope, config.qk_rope_head_dim)
        self.split_kv = kernels.Split(lora, config.qk_rope_head_dim)
        self.rotate = kernels.Rotate(self.heads, config.qk_rope_head_dim)
        self.write = kernels.CacheWrite()
        self.attention = kernels.LatentAttention(config)

    def construct(self, x, tables, caches, slots, window):
        rows = x.shape[0]
        q_nope, q_rope = self.split_q(ops.reshape(self.q_proj(x), (rows, self.heads, -1)))
        latent, k_rope = self.split_kv(self.kv_a_proj_with_mqa(x))
        q_rope, k_rope = self.rotate(q_rope, k_rope, tables)
        latent = ops.concat((self.kv_a_layernorm(latent), k_rope), -1)
        caches = self.write(caches, latent, slots)
        y = self.attention(q_nope, q_rope, caches, window, self.k_b_proj.weight, self.v_b_proj.weight)
        return self.o_proj(y)


class HeadProjection(nn.Cell):
    """One matrix per head, [heads, out, in]: the key or the value half of the published kv_b_proj."""

    def __init__(self, dtype: ms.Type, heads: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = empty_parameter((heads, n_out, n_in), dtype)

    def construct(self):
        return self.weight


class MLP(nn.Cell):
    """down(silu(gate(x)) * up(x)), gate and up fused into one product."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(kernels, dtype, hidden, 2 * intermediate)
        self.down_proj = Linear(kernels, dtype, intermediate, hidden)
        self.swiglu = kernels.SwiGLU()

    def construct(self, x):
        return self.down_proj(self.swiglu(self.gate_up_proj(x)))


class Gate(nn.Cell):
    """The router's parameters, fp32 in every dtype of the model because the router computes in fp32."""

    def __init__(self, kernels: Kernels, config: TextConfig) -> None:
        super().__init__()
        self.weight = empty_parameter((config.n_routed_experts, config.hidden_size), ms.float32)
        self.e_score_correction_bias = empty_parameter((config.n_routed_experts,), ms.float32)
        self.router = kernels.Router(config)

    def construct(self, x):
        return self.router(x, self.weight, self.e_score_correction_bias)


class Experts(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        e, h, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = empty_parameter((e, h, 2 * i), dtype)
        self.down_proj = empty_parameter((e, i, h), dtype)
        self.experts = kernels.Experts(config)

    def construct(self, x, indices, weights):
        return self.experts(x, self.gate_up_proj, self.down_proj, indices, weights)


class MoE(nn.Cell):
    """Routed experts plus the shared experts, which are one MLP of their summed width."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        self.gate = Gate(kernels, config)
        self.experts = Experts(kernels, dtype, config)
        self.shared = config.n_shared_experts > 0
        if self.shared:
            self.shared_experts = MLP(kernels, dtype, config.hidden_size, config.shared_intermediate_size)

    def construct(self, x):
        indices, weights = self.gate(x)
        y = self.experts(x, indices, weights)
        if self.shared:
            y = y + self.shared_experts(x)
        return y, indices


class DecoderLayer(nn.Cell):
    # All layers of a kind are one to the compiler until they are inlined: it parses and infers each kind once.
    @lazy_inline(attrs=["is_moe"], policy="front")
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.is_moe = config.is_moe(layer)
        self.input_layernorm = RMSNorm(kernels, dtype, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(kernels, dtype, config)
        self.post_attention_layernorm = RMSNorm(kernels, dtype, config.hidden_size, config.rms_norm_eps)
        if self.is_moe:
            self.mlp = MoE(kernels, dtype, config)
        else:
            self.mlp = MLP(kernels, dtype, config.hidden_size, config.intermediate_size)

    def construct(self, x, h, tables, caches, slots, window):
        """x [R, H] and h, its norm by `input_layernorm` -> two tensors whose sum is the layer's output, chosen experts.

        The sum is left to whoever takes it: the next layer's norm is made together with it.
        """
        x, h = self.post_attention_layernorm(x, self.self_attn(h, tables, caches, slots, window))
        indices = None
        if self.is_moe:
            y, indices = self.mlp(h)
        else:
            y = self.mlp(h)
        return x, y, indices


class Embedding(nn.Cell):
    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        self.weight = empty_parameter((config.vocab_size, config.hidden_size), dtype)
        self.embedding = kernels.Embedding()

    def construct(self, ids):
        return self.embedding(self.weight, ids)


class TextModel(nn.Cell):
    """Embedding, decoder layers and final norm."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(kernels, dtype, config)
        self.layers = nn.CellList(
            [DecoderLayer(kernels, dtype, config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(kernels, dtype, config.hidden_size, config.rms_norm_eps)
        self.tables = kernels.RotaryTables(config.num_attention_heads, config.qk_rope_head_dim)

    def construct(self, x, cos, sin, caches, slots, window):
        """x [R, H] -> the layers' outputs (the last before the final norm) and the MoE layers' chosen experts."""
        tables = self.tables(cos, sin)
        per_layer = len(caches) // len(self.layers)
        hidden, routing = (), ()
        h = self.layers[0].input_layernorm(x)
        for i, layer in enumerate(self.layers):
            x, y, indices = layer(x, h, tables, caches[i * per_layer : (i + 1) * per_layer], slots, window)
            if i + 1 < len(self.layers):
                x, h = self.layers[i + 1].input_layernorm(x, y)
            else:
                x = x + y
            hidden += (x,)
            if indices is not None:
                routing += (indices,)
        return hidden, routing


class LanguageModel(nn.Cell):
    """The text model and its head; `graphs.TextGraph` is what calls it."""

    def __init__(self, kernels: Kernels, dtype: ms.Type, config: TextConfig) -> None:
        super().__init__()
        self.model = TextModel(kernels, dtype, config)
        self.lm_head = Linear(kernels, dtype, config.hidden_size, config.vocab_size)

    def construct(self, x):
        """Logits [R, V] of the last layer's output x [R, H]."""
        return self.lm_head(self.model.norm(x))
