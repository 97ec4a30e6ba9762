"""The Torch reference: transformers' own ``Kimi_K25ForConditionalGeneration`` with a published checkpoint's weights.

Kimi-K2.5 is the same network as Kimi-VL with other names and a time axis that a single picture does not use, so
no remote code runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.initialization import no_init_weights

from ..modeling.configuration import ModelConfig
from .reference.recording import Greedy, Recorder, Routing, Taps, as_numpy, greedy, text_arguments
from .threads import suited_to
from .torch_weights import OracleError, load_published, to_published

__all__ = ["Greedy", "Oracle", "OracleError", "build_network", "build_oracle", "to_published"]

Inputs = Mapping[str, np.ndarray]

CHOSEN = 1e6  # added to a selection score, is more than all others


def build_oracle(directory: str | Path, dtype: torch.dtype = torch.float32) -> Oracle:
    """The reference for a directory in the published layout.

    Memory is the network in `dtype` and one tensor of the file: weights are widened one by one into place.

    Raises:
        OracleError: a missing or unreadable file, or tensors that do not fit the configuration.
        ConfigError: a configuration that is not Kimi-VL's.
    """
    directory = Path(directory)
    config = ModelConfig.from_file(directory)
    network = build_network(config, dtype)
    load_published(network, directory, config)
    return Oracle(network, config)


def build_network(
    config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Kimi_K25ForConditionalGeneration:
    """The network with eager attention and eager experts, its parameters not yet filled.

    Built in `dtype` and never cast afterwards: a cast would take the rope frequencies, which stay fp32, along.

    Raises:
        OracleError: a configuration that transformers' class does not implement.
    """
    t, v = config.text, config.vision
    if t.moe_layer_freq != 1:
        raise OracleError(
            f"config.json: moe_layer_freq is {t.moe_layer_freq}, the Torch reference implements only 1"
        )
    text = {
        "model_type": "deepseek_v3",
        "num_key_value_heads": t.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": t.rope_theta},
    }
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok"),
        *("first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "hidden_act"),
        *("max_position_embeddings", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ):
        text[name] = getattr(t, name)
    if not t.n_routed_experts:
        text.update(first_k_dense_replace=t.num_hidden_layers)  # transformers knows no other way to say it
    vision = {
        "pos_emb_height": v.init_pos_emb_height,
        "pos_emb_width": v.init_pos_emb_width,
        "merge_kernel_size": tuple(v.merge_kernel_size),
    }
    for name in (
        "patch_size",
        "num_attention_heads",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
    ):
        vision[name] = getattr(v, name)
    k25 = Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=v.hidden_size,
        image_token_id=config.media_placeholder_token_id,
        video_token_id=t.vocab_size,  # no token has this id: there are no videos
        tie_word_embeddings=False,
    )
    with no_init_weights():
        network = Kimi_K25ForConditionalGeneration._from_config(
            k25, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    if v.init_pos_emb_height != v.init_pos_emb_width:
        pos_emb: Any = network.model.vision_tower.patch_embed.pos_emb
        pos_emb.forward = _interpolating_any_table(pos_emb)
    return network.eval().requires_grad_(False)


def _interpolating_any_table(module: Any) -> Callable[..., Tensor]:
    """A forward for transformers' position embedding, which takes its table for square; the published one does not."""

    def forward(hidden_states: Tensor, grid_thw: Tensor, **_: Any) -> Tensor:
        grid = module.position_embeddings.permute(2, 0, 1)[None]  # (1, D, ph, pw)
        positions = [
            torch.nn.functional.interpolate(grid, (h, w), mode="bicubic")[0].flatten(1).T  # (h * w, D)
            for _, h, w in grid_thw.tolist()
        ]
        return hidden_states + torch.cat(positions)

    return forward


class Oracle:
    """Runs the reference: numpy in, numpy out (fp32 whatever the network computes in)."""

    def __init__(self, network: Kimi_K25ForConditionalGeneration, config: ModelConfig):
        self.network = network
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self.network.lm_head.weight.dtype

    @torch.no_grad()
    def run(self, inputs: Inputs, experts: np.ndarray | None = None) -> Taps:
        """One forward over the whole prompt.

        Args:
            inputs: `input_ids`, `attention_mask` [B, S] (left padded); with pictures `pixel_values` [N, 3, p, p] and
                `image_grid_hws` [n, 2].
            experts: `[Lm, B, S, k]`, as `router_topk_indices` below, which every token takes whatever the routers prefer.

        Returns:
            With pictures `vision_out` [N/4, 4, D] (grouped, before the projector) and `projector_out` [N/4, H];
            `inputs_embeds` [B, S, H]; `hidden_states` [L, B, S, H], every decoder layer's output, the last before
            the final norm; `router_topk_indices` [Lm, B, S, k] int32 sorted by number, `router_topk_weights` in that
            order, `router_gap` [Lm, B, S], the distance between the last chosen and the first rejected selection
            score (inf when all are chosen); `logits` [B, S, V].
            Masked places hold zeros, -1 in `router_topk_indices`, inf in `router_gap`; `inputs_embeds` is as it is.
        """
        arguments, mask = self.arguments(inputs)
        with (
            suited_to(self.config.text.hidden_size),
            self._choosing(experts),
            self.recorder() as recorder,
        ):
            logits = self.network(**arguments, use_cache=False).logits
        return recorder.taps(mask) | {"logits": as_numpy(logits) * mask[..., None]}

    @contextmanager
    def _choosing(self, experts: np.ndarray | None) -> Iterator[None]:
        """By the routers' correction bias, which takes part in the choice only: weights are their own scores."""
        model: Any = self.network.model
        gates = [layer.mlp.gate for layer in model.language_model.layers if hasattr(layer.mlp, "gate")]
        before = [gate.e_score_correction_bias for gate in gates]
        try:
            for gate, of_layer in zip(gates, () if experts is None else experts):
                chosen = torch.from_numpy(of_layer).long().flatten(0, -2)  # (B * S, k)
                preferred = torch.zeros(len(chosen), gate.num_experts)
                preferred.scatter_(
                    1, chosen.clamp(min=0), (chosen >= 0).float()
                )  # -1 where there is no token
                gate.e_score_correction_bias = gate.e_score_correction_bias + CHOSEN * preferred
            yield
        finally:
            for gate, bias in zip(gates, before):
                gate.e_score_correction_bias = bias

    def recorder(self) -> Recorder:
        """Records the layers that the network has."""
        model: Any = self.network.model
        return Recorder(model.language_model.layers, model.mm_projector, _routing)

    @torch.no_grad()
    def greedy(self, inputs: Inputs, n: int) -> Greedy:
        """`n` cached greedy steps after the prompt; no stop token is honoured."""
        with suited_to(self.config.text.hidden_size):
            return greedy(self.network, self.arguments(inputs)[0], n, logits_to_keep=1)

    def arguments(self, inputs: Inputs) -> tuple[dict[str, Any], np.ndarray]:
        """The network's arguments for `inputs`, and the attention mask as bool. Raises OracleError: they do not fit."""
        ids = np.asarray(inputs["input_ids"]).astype(np.int64)
        given = inputs.get("attention_mask")
        mask = np.ones_like(ids, bool) if given is None else np.asarray(given).astype(bool)
        arguments = text_arguments(ids, mask)
        pixels = inputs.get("pixel_values")
        n_media = int((ids == self.config.media_placeholder_token_id).sum())
        n_features = 0
        if pixels is not None and len(pixels):
            grids = torch.from_numpy(np.asarray(inputs["image_grid_hws"]).astype(np.int64))
            arguments["pixel_values"] = torch.from_numpy(np.asarray(pixels)).to(self.dtype)
            arguments["image_grid_thw"] = torch.cat([torch.ones_like(grids[:, :1]), grids], dim=1)
            n_features = len(pixels) // math.prod(self.config.vision.merge_kernel_size)
        if n_media != n_features:
            raise OracleError(
                f"input_ids: {n_media} media tokens, but the pictures give {n_features}; they must be equal"
            )
        return arguments, mask


class OtherKernels:
    """The same network by Torch's other kernels: attention by `scaled_dot_product_attention`, experts in batched products.

    Correct as well, it differs by the order of sums alone: how far it is from the eager run is the noise below which
    nothing can be told.
    """

    def __init__(self, oracle: Oracle):
        self.oracle = oracle
        self.config = oracle.config

    def run(self, inputs: Inputs) -> Taps:
        self._use("sdpa", "batched_mm")
        try:
            return self.oracle.run(inputs)
        finally:
            self._use("eager", "eager")

    def greedy(self, inputs: Inputs, n: int) -> Greedy:
        self._use("sdpa", "batched_mm")
        try:
            return self.oracle.greedy(inputs, n)
        finally:
            self._use("eager", "eager")

    def _use(self, attention: str, experts: str) -> None:
        network: Any = self.oracle.network
        network.set_attn_implementation(attention)
        network.set_experts_implementation(experts)


def _routing(gate: Any, args: tuple, out: tuple[Tensor, Tensor, Tensor]) -> Routing:
    logits, weights, indices = out
    return logits.sigmoid() + gate.e_score_correction_bias, indices, weights
