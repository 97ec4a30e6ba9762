"""All faults, in the order of the table, and the operator in which each must be found."""

from __future__ import annotations

from dataclasses import replace

from . import files, host, network, nodes, rounded, weights

OPERATORS = {
    "dense-gate-up": "layers.0: gate_up",
    "expert-gate-up": "layers.1: experts",
    "shared-gate-up": "layers.2: shared_gate_up",
    "expert-neighbour": "layers.1: experts",
    "expert-down-neighbour": "layers.1: experts",
    "q-interleaved": "layers.1: q_proj",
    "k-interleaved": "layers.2: kv_a_proj",
    "kb-vb": "layers.1: k_b_proj",
    "kb-neighbour": "layers.2: k_b_proj",
    "bias-missing": "layers.1: router_scores",
    "bias-neighbour": "layers.1: router_scores",
    "layer-order": "layers.1: input_norm",
    "norms-exchanged": "layers.2: input_norm",
    "head-tied": "head: lm_head",
    "embedding-shifted": "embedding: embed_tokens",
    "weight-1-percent": "layers.1: o_proj",
    "weight-zero": "layers.2: experts",
    "expert-nan": "layers.1: experts",
    "table-transposed": "vision: pos_emb",
    "channels-reversed": "vision: patch_embed",
    "vision-interleaved": "blocks.1: wqkv",
    "truncated": "vision: patch_embed",
    "kv-a-eps": "layers.0: kv_a_norm",
    "rms-eps": "layers.0: input_norm",
    "final-norm-eps": "head: final_norm",
    "tower-eps": "blocks.0: norm0",
    "projector-eps": "projector: pre_norm",
    "bias-in-weights": "layers.1: router_weights",
    "softmax-scores": "layers.2: router_scores",
    "factor-2.5": "layers.1: router_weights",
    "not-normalised": "layers.1: router_weights",
    "scale": "layers.1: attention",  # the fused operator, which holds it
    "scale-decode": "layers.2: scores",
    "sees-next": "layers.0: mask",
    "sees-not-itself": "layers.0: mask",
    "slot-too-far": "layers.0: cache",
    "padding-attended": "blocks.0: attention",
    "erf-in-tower": "blocks.0: gelu",
    "tanh-in-projector": "projector: gelu",
    "longest-context-alone": "layers.0: mask",
    "rope-theta": "layers.0: q_rope",
    "late-decoding": "layers.0: q_rope",
    "padding-counted": "layers.0: q_rope",
    "bilinear": "vision: pos_emb",
    "bicubic-half": "vision: pos_emb",
    "rows-for-columns": "blocks.0: q_rope",
}
FAULTS = tuple(
    replace(fault, operator=OPERATORS.get(fault.name, ""))
    for faults in (weights, network, nodes, host, files, rounded)
    for fault in faults.FAULTS
)
