"""How many bytes a case has to read and how many operations it has to do, whoever does it.

Counted is what the network needs: weights once, latent cache once, products of matrices. Norms, activations and what an
implementation reads twice are not counted.
"""

from __future__ import annotations

from kimi_vl.modeling.configuration import ModelConfig

from .cases import HEAD, PREFILL, VISION, Case

FP32 = 4  # bytes; the router's weights are in fp32 in every dtype


def bytes_read(config: ModelConfig, case: Case, experts: float, weight: int, cache: int) -> float:
    """Of a decode or head case.

    Args:
        experts: different experts that the batch's tokens choose in a layer, on average.
        weight, cache: bytes of a number of the weights, of the cache.
    """
    t = config.text
    head = t.vocab_size * t.hidden_size * weight
    if case.kind == HEAD:
        return head
    layers = t.num_hidden_layers * _attention_weights(config) * weight
    dense = t.num_hidden_layers - len(t.moe_layers)
    layers += dense * 3 * t.hidden_size * t.intermediate_size * weight
    expert = 3 * t.hidden_size * t.moe_intermediate_size * weight
    router = t.hidden_size * t.n_routed_experts * FP32
    layers += len(t.moe_layers) * ((experts + t.n_shared_experts) * expert + router)
    return layers + head + t.num_hidden_layers * case.batch * case.size * t.latent_dim * cache


def operations(config: ModelConfig, case: Case) -> float:
    """Floating-point operations of a prefill or vision case, a multiply-add as two."""
    if case.kind == VISION:
        return _vision_operations(config, case.size)
    if case.kind != PREFILL:
        raise ValueError(f"{case}: its operations are not counted")
    t = config.text
    dense = t.num_hidden_layers - len(t.moe_layers)
    active = t.num_experts_per_tok + t.n_shared_experts
    per_token = t.num_hidden_layers * _attention_weights(config)
    per_token += dense * 3 * t.hidden_size * t.intermediate_size
    per_token += (
        len(t.moe_layers) * t.hidden_size * (3 * active * t.moe_intermediate_size + t.n_routed_experts)
    )
    seen = case.size * (case.size + 1) / 2  # pairs of a query and a key that it sees
    widths = t.qk_nope_head_dim + t.qk_rope_head_dim + t.v_head_dim
    attention = t.num_hidden_layers * t.num_attention_heads * widths * seen
    return 2 * case.batch * (case.size * per_token + attention + t.vocab_size * t.hidden_size)


def _attention_weights(config: ModelConfig) -> int:
    t = config.text
    heads = t.num_attention_heads
    return (
        t.hidden_size * heads * (t.qk_nope_head_dim + t.qk_rope_head_dim)
        + t.hidden_size * t.latent_dim
        + t.kv_lora_rank * heads * (t.qk_nope_head_dim + t.v_head_dim)
        + heads * t.v_head_dim * t.hidden_size
    )


def _vision_operations(config: ModelConfig, patches: int) -> float:
    v = config.vision
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + 2 * v.hidden_size * patches
    tower = patches * (v.patch_dim * v.hidden_size + v.num_hidden_layers * block)
    merged = patches * v.hidden_size // v.merged_dim
    return 2 * (tower + merged * v.merged_dim * (v.merged_dim + config.text.hidden_size))
