"""What the Torch reference gives at the named points of a stage when it is fed with the candidate's own input.

The modules of transformers run as they are, once in fp32 and once, as copies, in float64: the second is what is expected,
the distance of the two is what rounding costs at each point. What no module gives (rope, scores, latents) is computed
from what modules gave, with transformers' own functions where it has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.kimi_k25.modeling_kimi_k25 import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from .oracle import Oracle
from .points import Stage
from .threads import suited_to

Values = dict[str, Tensor]


class Expected:
    """For the inputs of one case. Values are [B, C, ...] of its columns, or of a picture's patches [N, ...] row by row.

    Of a decoder layer there are also `scores` and `softmax` [B, heads, C, C], `keys` and `values` [B, C, heads * D], which
    prefill expands, and `absorbed` [B, C, heads * latent], `latents`, as decoding has them.
    """

    def __init__(self, oracle: Oracle, inputs: Mapping[str, np.ndarray]) -> None:
        self.oracle, self.network = oracle, oracle.network
        self.arguments, self.mask = oracle.arguments(inputs)

    @torch.no_grad()
    def of(self, stage: Stage, given: list[np.ndarray]) -> list[tuple[Values, Values]]:
        """Expected values in fp32 and in float64: of each picture, or of the text.

        Args:
            given: the stage's input, of each picture, or of all columns of the text. The embedding is given the pictures'
                features, if there are any, the first stage of the vision tower nothing.
        """
        run: Callable[..., Values] = getattr(self, f"_{stage.kind}")
        count = len(self.arguments["image_grid_thw"]) if stage.of_pictures else 1
        with suited_to(self.oracle.config.text.hidden_size):
            return [self._both(run, stage, given[i] if given else None, i) for i in range(count)]

    def _both(
        self, run: Callable[..., Values], stage: Stage, given: np.ndarray | None, picture: int
    ) -> tuple[Values, Values]:
        results = []
        for dtype in (torch.float32, torch.float64):
            x = None if given is None else torch.from_numpy(given).to(dtype)
            results.append(run(stage, x, dtype, picture))
        return results[0], results[1]

    # Text --------------------------------------------------------------------------------------------------------------

    def _embedding(self, stage: Stage, features: Tensor | None, dtype: torch.dtype, _: int) -> Values:
        ids = self.arguments["input_ids"]
        embedded = self.network.model.language_model.embed_tokens(ids).to(dtype)
        merged = embedded.clone()
        if features is not None:
            merged[ids == self.oracle.config.media_placeholder_token_id] = features
        return {"embed_tokens": embedded, "inputs_embeds": merged}

    def _head(self, stage: Stage, x: Tensor, dtype: torch.dtype, _: int) -> Values:
        normed = _as(self.network.model.language_model.norm, dtype)(x)
        return {"final_norm": normed, "lm_head": _as(self.network.lm_head, dtype)(normed)}

    def _layer(self, stage: Stage, x: Tensor, dtype: torch.dtype, _: int) -> Values:
        text = self.network.model.language_model
        layer = _as(text.layers[stage.number], dtype)
        attention = layer.self_attn
        columns = x.shape[1]
        seen = (
            torch.ones(columns, columns, dtype=torch.bool).tril() & torch.from_numpy(self.mask)[:, None, None]
        )
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(dtype)  # (B, 1, C, C)
        cos, sin = self._text_rope(x)
        names = {
            "input_norm": layer.input_layernorm,
            "q": attention.q_proj,
            "kv": attention.kv_a_proj_with_mqa,
            "kv_a_norm": attention.kv_a_layernorm,
            "kv_b": attention.kv_b_proj,
            "o_proj": attention.o_proj,
            "self_attn": attention,
            "post_norm": layer.post_attention_layernorm,
            "mlp": layer.mlp,
        }
        moe = hasattr(layer.mlp, "gate")
        dense = layer.mlp.shared_experts if moe else layer.mlp
        names |= {"gate": dense.gate_proj, "up": dense.up_proj, "down": dense.down_proj}
        if moe:
            names |= {"router": layer.mlp.gate, "experts": layer.mlp.experts}
        with _hooked(names) as (taken, given):
            output = layer(
                x,
                attention_mask=mask,
                position_ids=self.arguments["position_ids"],
                position_embeddings=(cos, sin),
            )
        values = {name: given[name] for name in ("input_norm", "kv_a_norm", "o_proj", "post_norm")}
        values |= self._attention(attention, taken, given, cos, sin)
        values["attention_sum"] = x + given["o_proj"]
        values["output"] = output
        gate_up = torch.cat((given["gate"], given["up"]), -1)
        if not moe:
            return values | {"gate_up": gate_up, "swiglu": taken["down"], "down": given["down"]}
        logits, weights, choice = given["router"]
        chosen, order = choice.sort(-1)
        shape = (*x.shape[:2], -1)
        return values | {
            "router_logits": logits.view(shape),
            "router_scores": (logits.sigmoid() + layer.mlp.gate.e_score_correction_bias).view(shape),
            "router_choice": chosen.view(shape),
            "router_weights": weights.gather(-1, order).view(shape),
            "experts": given["experts"].view(x.shape),
            "shared_gate_up": gate_up,
            "shared_swiglu": taken["down"],
            "shared_down": given["down"],
            "moe": given["mlp"],
        }

    def _text_rope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, C, rope]; in float64 of angles in float64, because those in fp32 err by what the position is."""
        positions = self.arguments["position_ids"]
        if x.dtype == torch.float32:
            return self.network.model.language_model.rotary_emb(x, positions)
        text = self.oracle.config.text
        angles = positions[..., None] * _frequencies(text.rope_theta, text.qk_rope_head_dim)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def _attention(
        self, attention: Any, taken: dict[str, Tensor], given: dict[str, Any], cos: Tensor, sin: Tensor
    ) -> Values:
        text = self.oracle.config.text
        heads, nope, rope = text.num_attention_heads, text.qk_nope_head_dim, text.qk_rope_head_dim
        batch, columns = given["q"].shape[:2]
        q, q_turned = given["q"].view(batch, columns, heads, -1).split((nope, rope), -1)
        latent, k_turned = given["kv"].split((text.kv_lora_rank, rope), -1)
        q_rope, k_rope = apply_rotary_pos_emb_interleave(
            q_turned.transpose(1, 2), k_turned[:, None], cos, sin
        )
        q_rope, k_rope = q_rope.transpose(1, 2), k_rope[:, 0]  # (B, C, heads, rope), (B, C, rope)
        normed = given["kv_a_norm"]
        keys, values = given["kv_b"].view(batch, columns, heads, -1).split((nope, text.v_head_dim), -1)
        k_b = attention.kv_b_proj.weight.view(heads, -1, text.kv_lora_rank)[:, :nope]
        absorbed = torch.einsum("bchd,hdl->bchl", q, k_b)
        scores = torch.einsum("bchd,bshd->bhcs", q, keys) + torch.einsum("bchd,bsd->bhcs", q_rope, k_rope)
        probabilities = given["self_attn"][1]
        scale = attention.scaling
        return {
            "q_proj": torch.cat((q, _halves(q_turned)), -1).flatten(2),
            "kv_a_proj": torch.cat((latent, _halves(k_turned)), -1),
            "q_rope": q_rope.flatten(2),
            "k_rope": k_rope,
            "cache": torch.cat((normed, k_rope), -1),
            "q_scaled": (q * scale).flatten(2),
            "q_rope_scaled": (q_rope * scale).flatten(2),
            "keys": keys.flatten(2),
            "values": values.flatten(2),
            "absorbed": absorbed.flatten(2),
            "absorbed_scaled": (absorbed * scale).flatten(2),
            "scores": scores * scale,
            "softmax": probabilities,
            "latents": torch.einsum("bhcs,bsl->bchl", probabilities.to(normed.dtype), normed).flatten(2),
            "attention": taken["o_proj"],
        }

    # Pictures --------------------------------------------------------------------------------------------------------

    def _grid(self, picture: int) -> Tensor:
        return self.arguments["image_grid_thw"][picture : picture + 1]

    def _vision(self, stage: Stage, _: None, dtype: torch.dtype, picture: int) -> Values:
        patches = self.arguments["image_grid_thw"].prod(-1)
        at = int(patches[:picture].sum())
        pixels = self.arguments["pixel_values"][at : at + int(patches[picture])].to(dtype)
        embed = _as(self.network.model.vision_tower.patch_embed, dtype)
        given = embed.proj(pixels).flatten(1)
        nothing = torch.zeros_like(given)
        position = embed.pos_emb(nothing, self._grid(picture))
        return {"patch_embed": given, "pos_emb": position, "output": given + position}

    def _block(self, stage: Stage, x: Tensor, dtype: torch.dtype, picture: int) -> Values:
        tower = self.network.model.vision_tower
        block = _as(tower.layers[stage.number], dtype)
        grid = self._grid(picture)
        cos, sin = self._vision_rope(x, get_vision_position_ids(grid, spatial_merge_size=1))
        names = {
            "norm0": block.norm1,
            "q": block.attn.q_proj,
            "k": block.attn.k_proj,
            "v": block.attn.v_proj,
            "wo": block.attn.proj,
            "norm1": block.norm2,
            "fc0": block.mlp.fc1,
            "gelu": block.mlp.act,
            "fc1": block.mlp.fc2,
        }
        ends = torch.tensor([0, len(x)], dtype=torch.int32)
        with _hooked(names) as (taken, given):
            output = block(x, cu_seqlens=ends, max_seqlen=len(x), position_embeddings=(cos, sin))
        heads = self.oracle.config.vision.num_attention_heads
        q, k = (given[name].view(1, len(x), heads, -1) for name in ("q", "k"))
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        values = {name: given[name] for name in ("norm0", "wo", "norm1", "fc0", "gelu", "fc1")}
        return values | {
            "wqkv": torch.cat((given["q"], given["k"], given["v"]), -1),
            "q_rope": q[0].flatten(1),
            "k_rope": k[0].flatten(1),
            "attention": taken["wo"],
            "attention_sum": x + given["wo"],
            "output": output,
        }

    def _vision_rope(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim] of patch rows and columns; see `_text_rope`."""
        rope = self.network.model.vision_tower.rotary_emb
        if x.dtype == torch.float32:
            return rope(x, positions)
        theta = rope.config.rope_parameters["rope_theta"]
        angles = positions[..., None] * _frequencies(theta, self.oracle.config.vision.head_dim // 2)
        return rope.recomposition_frequencies(angles.cos()), rope.recomposition_frequencies(angles.sin())

    def _projector(self, stage: Stage, x: Tensor, dtype: torch.dtype, picture: int) -> Values:
        model = self.network.model
        normed = _as(model.vision_tower.final_layernorm, dtype)(x)
        _, h, w = self._grid(picture)[0].tolist()
        merged = normed[torch.from_numpy(self.merge_order(picture))]
        projector = _as(model.mm_projector, dtype)
        names = {
            "pre_norm": projector.pre_norm,
            "linear_1": projector.in_proj,
            "gelu": projector.act,
            "linear_2": projector.out_proj,
        }
        kh, kw = self.oracle.config.vision.merge_kernel_size
        with _hooked(names) as (_, given):
            projector(merged.view(h * w // (kh * kw), kh * kw, -1))
        back = np.argsort(self.merge_order(picture))
        pre_norm = given["pre_norm"].flatten(0, 1)[torch.from_numpy(back)]
        merged_values = {name: given[name].flatten(0, 1) for name in ("linear_1", "gelu", "linear_2")}
        return {"final_layernorm": normed, "pre_norm": pre_norm} | merged_values

    def merge_order(self, picture: int) -> np.ndarray:
        """Numbers of a picture's patches, so that those that are merged follow one another."""
        _, h, w = self._grid(picture)[0].tolist()
        kh, kw = self.oracle.config.vision.merge_kernel_size
        return np.arange(h * w).reshape(h // kh, kh, w // kw, kw).swapaxes(1, 2).reshape(-1)


def _as(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The module, or a copy of it in float64."""
    return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)


def _frequencies(theta: float, dim: int) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _halves(x: Tensor) -> Tensor:
    """Rotation pairs side by side -> first halves, then second, as converted weights have them."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


@contextmanager
def _hooked(modules: dict[str, torch.nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What modules take as their first argument, and what they give."""
    taken: dict[str, Tensor] = {}
    given: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            taken[name] = args[0] if args else next(iter(kwargs.values()))
            given[name] = out

        return keep

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield taken, given
    finally:
        for handle in handles:
            handle.remove()
