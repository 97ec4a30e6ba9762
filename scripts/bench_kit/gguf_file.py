"""A published checkpoint's text model as a GGUF file for llama.cpp's architecture "deepseek2", which it is.

Tensors keep their numbers: matrices bf16, norms and the router fp32. There is no vocabulary, which no measurement needs.
The keys and the tensors' names and shapes are those that llama.cpp's loader asks for (``src/models/deepseek2.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import ml_dtypes  # noqa: F401 (gives NumPy the name bfloat16)
import numpy as np
from safetensors import safe_open

from kimi_vl.modeling.configuration import ModelConfig, TextConfig
from kimi_vl.verify.torch_weights import tensor_files

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2]
TEXT = "language_model."
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
DENSE = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
MOE = {f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}


class Made(NamedTuple):
    """A tensor of the file, read when it is written."""

    name: str
    shape: tuple[int, ...]
    wide: bool  # fp32
    read: Callable[[], np.ndarray]


def write_gguf(published: Path, path: Path) -> None:
    """Writes `path`, which is there only when it is whole; memory is one stack of experts."""
    config = ModelConfig.from_file(published)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    _keys(writer, config.text)
    made = list(_tensors(Checkpoint(published), config.text))
    for tensor in made:
        kind = gguf.GGMLQuantizationType.F32 if tensor.wide else gguf.GGMLQuantizationType.BF16
        item = 4 if tensor.wide else 2
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), int(np.prod(tensor.shape)) * item, kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in made:
        array = tensor.read()
        writer.write_tensor_data(array.astype(np.float32) if tensor.wide else array.view(np.uint16))
    writer.close()
    part.rename(path)


def _keys(writer: gguf.GGUFWriter, t: TextConfig) -> None:
    """What the loader asks for. Latent attention is one key head of the latent's width, see `*_mla` for the real ones."""
    writer.add_block_count(t.num_hidden_layers)
    writer.add_context_length(t.max_position_embeddings)
    writer.add_embedding_length(t.hidden_size)
    writer.add_feed_forward_length(t.intermediate_size)
    writer.add_head_count(t.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(t.rms_norm_eps)
    writer.add_rope_freq_base(t.rope_theta)
    writer.add_rope_dimension_count(t.qk_rope_head_dim)
    writer.add_vocab_size(t.vocab_size)
    writer.add_q_lora_rank(0)  # none; asked for unless there are 26 or 27 layers
    writer.add_kv_lora_rank(t.kv_lora_rank)
    writer.add_key_length(t.latent_dim)
    writer.add_value_length(t.kv_lora_rank)
    writer.add_key_length_mla(t.qk_nope_head_dim + t.qk_rope_head_dim)
    writer.add_value_length_mla(t.v_head_dim)
    writer.add_leading_dense_block_count(t.first_k_dense_replace)
    writer.add_expert_count(t.n_routed_experts)
    writer.add_expert_used_count(t.num_experts_per_tok)
    writer.add_expert_shared_count(t.n_shared_experts)
    writer.add_expert_feed_forward_length(t.moe_intermediate_size)
    writer.add_expert_weights_scale(t.routed_scaling_factor)
    writer.add_expert_weights_norm(t.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("none")


class Checkpoint:
    """Published tensors by name."""

    def __init__(self, directory: Path) -> None:
        self._files = tensor_files(directory)

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._files[name], framework="np") as f:
            return f.get_tensor(name)

    def kept(self, published: str, name: str, shape: tuple[int, ...], wide: bool) -> Made:
        return Made(name, shape, wide, lambda: self.read(published))


def _tensors(c: Checkpoint, t: TextConfig) -> Iterator[Made]:
    h = t.hidden_size
    yield c.kept(f"{TEXT}model.embed_tokens.weight", "token_embd.weight", (t.vocab_size, h), False)
    yield c.kept(f"{TEXT}lm_head.weight", "output.weight", (t.vocab_size, h), False)
    yield c.kept(f"{TEXT}model.norm.weight", "output_norm.weight", (h,), True)
    for layer in range(t.num_hidden_layers):
        theirs, ours = f"{TEXT}model.layers.{layer}.", f"blk.{layer}."
        moe = t.is_moe(layer)
        for published, name in (NAMES | (MOE if moe else DENSE)).items():
            shape = _shape(published, t, moe)
            yield c.kept(f"{theirs}{published}.weight", f"{ours}{name}.weight", shape, len(shape) == 1)
        yield from _kv_b(c, t, f"{theirs}self_attn.kv_b_proj.weight", ours)
        if moe:
            router = f"{theirs}mlp.gate."
            yield c.kept(f"{router}weight", f"{ours}ffn_gate_inp.weight", (t.n_routed_experts, h), True)
            bias = f"{router}e_score_correction_bias"
            yield c.kept(bias, f"{ours}exp_probs_b.bias", (t.n_routed_experts,), True)
            for part in ("gate", "up", "down"):
                yield _experts(c, t, f"{theirs}mlp.experts.{{}}.{part}_proj.weight", part, ours)


def _shape(published: str, t: TextConfig, moe: bool) -> tuple[int, ...]:
    heads, h = t.num_attention_heads, t.hidden_size
    inner = t.shared_intermediate_size if moe else t.intermediate_size
    return {
        "q_proj": (heads * (t.qk_nope_head_dim + t.qk_rope_head_dim), h),
        "kv_a_proj_with_mqa": (t.latent_dim, h),
        "kv_a_layernorm": (t.kv_lora_rank,),
        "o_proj": (h, heads * t.v_head_dim),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        "gate_proj": (inner, h),
        "up_proj": (inner, h),
        "down_proj": (h, inner),
    }[published.rpartition(".")[2]]


def _kv_b(c: Checkpoint, t: TextConfig, published: str, ours: str) -> Iterator[Made]:
    """Its halves by head, that of the keys transposed."""
    heads, nope, value, rank = t.num_attention_heads, t.qk_nope_head_dim, t.v_head_dim, t.kv_lora_rank

    def halves() -> tuple[np.ndarray, np.ndarray]:
        both = c.read(published).reshape(heads, nope + value, rank)
        return both[:, :nope].swapaxes(1, 2), both[:, nope:]

    for half, name, shape in ((0, "attn_k_b", (heads, rank, nope)), (1, "attn_v_b", (heads, value, rank))):
        yield Made(
            f"{ours}{name}.weight", shape, False, lambda half=half: np.ascontiguousarray(halves()[half])
        )


def _experts(c: Checkpoint, t: TextConfig, published: str, part: str, ours: str) -> Made:
    h, inner, count = t.hidden_size, t.moe_intermediate_size, t.n_routed_experts
    shape = (count, h, inner) if part == "down" else (count, inner, h)
    return Made(
        f"{ours}ffn_{part}_exps.weight",
        shape,
        False,
        lambda: np.stack([c.read(published.format(expert)) for expert in range(count)]),
    )
