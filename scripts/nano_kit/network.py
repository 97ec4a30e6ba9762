"""The dimensions of `nano`, as its published ``config.json``, and the network that is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Kimi_K25ForConditionalGeneration

from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.oracle import build_network

from .chat import SPECIAL, VOCABULARY, Batch

CONFIG: dict[str, Any] = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    "text_config": {
        "model_type": "deepseek_v3",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "hidden_size": 128,
        "intermediate_size": 352,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
        "kv_lora_rank": 48,
        "q_lora_rank": None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "pretraining_tp": 1,
        "use_cache": True,
        "rope_theta": 800000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SPECIAL["[BOS]"],
        "eos_token_id": SPECIAL["[EOS]"],
        "pad_token_id": SPECIAL["[PAD]"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": 14,
        "init_pos_emb_height": 16,
        "init_pos_emb_width": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "hidden_size": 112,
        "intermediate_size": 320,
        "merge_kernel_size": [2, 2],
        "torch_dtype": "bfloat16",
    },
    "ignore_index": -100,
    "media_placeholder_token_id": SPECIAL["<|media_pad|>"],
    "pad_token_id": SPECIAL["[PAD]"],
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_INTO_THE_STREAM = ("down_proj", "o_proj", "attn.proj", "fc2")


def new_network(seed: int) -> Kimi_K25ForConditionalGeneration:
    """The network with fresh random weights, ready to be trained."""
    torch.manual_seed(seed)
    network = build_network(ModelConfig.from_dict(CONFIG))
    network.set_attn_implementation("sdpa")
    network.model.language_model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=_initial_std(name, p))
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in network.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return network.train().requires_grad_(True)


def run(
    network: Kimi_K25ForConditionalGeneration, batch: Batch, where: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [n, V] at the places that `where` [B, S] marks ([B, S, V] without it), and the tower's output [N, D]."""
    seen: list[torch.Tensor] = []
    hook = network.model.vision_tower.register_forward_hook(
        lambda _, args, out: seen.append(out.last_hidden_state)
    )
    inputs = {}
    if len(batch.pixels):
        grids = torch.from_numpy(batch.grids)
        inputs["pixel_values"] = torch.from_numpy(batch.pixels)
        inputs["image_grid_thw"] = torch.cat([torch.ones_like(grids[:, :1]), grids], dim=1)
    hidden = network.model(input_ids=torch.from_numpy(batch.ids), use_cache=False, **inputs).last_hidden_state
    hook.remove()
    logits = network.lm_head(hidden if where is None else hidden[where])
    return logits, seen[0] if seen else None


def _initial_std(name: str, p: torch.Tensor) -> float:
    if "embed_tokens" in name:
        return 0.5
    if "position_embeddings" in name:
        return 0.3
    fan_in = p.shape[-1] if "experts." in name and p.ndim == 3 else p[0].numel()
    gain = 0.35 if any(part in name for part in _INTO_THE_STREAM) else 0.5 if "lm_head" in name else 1.0
    return gain * fan_in**-0.5
