"""Named points of the network, where a candidate's graph is compared with the reference.

Stages, in the order of the data: `vision` (patches), `blocks.N`, `projector`, `embedding`, `layers.N`, `head`. `places` says
where a point is in a graph, `expected` what the reference has there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..modeling.configuration import ModelConfig

LAYER = "language_model.model.layers.{}."
BLOCK = "vision_tower.encoder.blocks.{}."


@dataclass(frozen=True)
class Point:
    """`reads` are the parameters of the operator that gives it, after the stage's prefix.

    `optional`: only one of prefill and decoding has it, or only some targets do, because the others compute in another order.
    """

    name: str
    what: str
    reads: tuple[str, ...] = ()
    optional: bool = False


_SUM = "the sum with the residual"
_MOE = (
    Point("router_logits", "the router's logits", ("mlp.gate.weight",)),
    Point("router_scores", "the router's scores with their bias", ("mlp.gate.e_score_correction_bias",)),
    Point("router_choice", "the choice of experts"),
    Point("router_weights", "the weights of the chosen experts"),
    Point("experts", "the routed experts", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    Point(
        "shared_gate_up",
        "the shared experts' gate and up projection",
        ("mlp.shared_experts.gate_up_proj.weight",),
    ),
    Point("shared_swiglu", "the shared experts' SwiGLU"),
    Point("shared_down", "the shared experts' down projection", ("mlp.shared_experts.down_proj.weight",)),
    Point("moe", "the sum of routed and shared experts"),
)
_DENSE = (
    Point("gate_up", "the gate and up projection", ("mlp.gate_up_proj.weight",)),
    Point("swiglu", "the SwiGLU"),
    Point("down", "the down projection", ("mlp.down_proj.weight",)),
)
_ATTENTION = (
    Point("input_norm", "the input norm", ("input_layernorm.weight",)),
    Point("q_proj", "the projection of the queries", ("self_attn.q_proj.weight",)),
    Point("kv_a_proj", "the projection into the latent space", ("self_attn.kv_a_proj_with_mqa.weight",)),
    Point("kv_a_norm", "the norm of the latents", ("self_attn.kv_a_layernorm.weight",)),
    Point("q_rope", "rope of the queries"),
    Point("k_rope", "rope of the keys"),
    Point("cache", "the latent cache"),
    Point("q_scaled", "the scaled queries, without rope", optional=True),
    Point("q_rope_scaled", "the scaled queries, with rope", optional=True),
    Point("k_b_proj", "keys out of the latent space, or queries into it", ("self_attn.k_b_proj.weight",)),
    Point("mask", "the mask of the slots"),
    Point("scores", "the scores of the slots"),
    Point("softmax", "the softmax of the scores"),
    Point("latents", "the sum of the latents that are attended to", optional=True),
    Point("v_b_proj", "values out of the latent space", ("self_attn.v_b_proj.weight",)),
    Point("attention", "the attention", optional=True),
    Point("o_proj", "the output projection", ("self_attn.o_proj.weight",)),
    Point("attention_sum", _SUM),
    Point("post_norm", "the norm after the attention", ("post_attention_layernorm.weight",)),
)
_BLOCK = (
    Point("norm0", "the norm before the attention", ("norm0.weight", "norm0.bias")),
    Point("wqkv", "the projection of queries, keys and values", ("wqkv.weight", "wqkv.bias")),
    Point("q_rope", "rope of the queries"),
    Point("k_rope", "rope of the keys"),
    Point("attention", "the attention"),
    Point("wo", "the output projection", ("wo.weight", "wo.bias")),
    Point("attention_sum", _SUM),
    Point("norm1", "the norm before the MLP", ("norm1.weight", "norm1.bias")),
    Point("fc0", "the MLP's first linear", ("mlp.fc0.weight", "mlp.fc0.bias")),
    Point("gelu", "the MLP's GELU"),
    Point("fc1", "the MLP's second linear", ("mlp.fc1.weight", "mlp.fc1.bias")),
    Point("output", "the block's output"),
)
_PATCHES = (
    Point("patch_embed", "the patch embedding", ("proj.weight", "proj.bias")),
    Point("pos_emb", "the position embedding", ("pos_emb.weight",)),
    Point("output", "the sum of patch and position embedding"),
)
_PROJECTOR = (
    Point("final_layernorm", "the tower's final norm", ("vision_tower.encoder.final_layernorm.weight",
                                                        "vision_tower.encoder.final_layernorm.bias")),
    Point("pre_norm", "the projector's norm", ("multi_modal_projector.pre_norm.weight",
                                               "multi_modal_projector.pre_norm.bias")),
    Point("linear_1", "the projector's first linear", ("multi_modal_projector.linear_1.weight",
                                                       "multi_modal_projector.linear_1.bias")),
    Point("gelu", "the projector's GELU"),
    Point("linear_2", "the projector's second linear", ("multi_modal_projector.linear_2.weight",
                                                        "multi_modal_projector.linear_2.bias")),
)  # fmt: skip
_EMBEDDING = (
    Point("embed_tokens", "the embedding of the tokens", ("language_model.model.embed_tokens.weight",)),
    Point("inputs_embeds", "the embeddings with pictures in their places"),
)
_HEAD = (
    Point("final_norm", "the final norm", ("language_model.model.norm.weight",)),
    Point("lm_head", "the logits", ("language_model.lm_head.weight",)),
)
_OUTPUT = (Point("output", "the layer's output"),)


@dataclass(frozen=True)
class Stage:
    """A part of the network that is given the candidate's own input and judged alone.

    Attributes:
        kind: `vision`, `block`, `projector`, `embedding`, `layer` or `head`; `number` of a block or a layer.
        points: in the order of the data.
        prefix: of its parameters' names.
    """

    name: str
    what: str
    kind: str
    points: tuple[Point, ...]
    prefix: str = ""
    number: int = 0

    @property
    def of_pictures(self) -> bool:
        return self.kind in ("vision", "block", "projector")

    def parameters(self, point: Point) -> list[str]:
        return [self.prefix + name for name in point.reads]


def stages(config: ModelConfig, pictures: bool) -> list[Stage]:
    """All of them, those of the vision tower if there are pictures."""
    found: list[Stage] = []
    if pictures:
        prefix = "vision_tower.patch_embed."
        found.append(Stage("vision", "the embedding of the patches", "vision", _PATCHES, prefix))
        found += [
            Stage(f"blocks.{n}", f"vision block {n}", "block", _BLOCK, BLOCK.format(n), n)
            for n in range(config.vision.num_hidden_layers)
        ]
        found.append(Stage("projector", "the projector", "projector", _PROJECTOR))
    found.append(Stage("embedding", "the embedding", "embedding", _EMBEDDING))
    for n in range(config.text.num_hidden_layers):
        points = _ATTENTION + (_MOE if config.text.is_moe(n) else _DENSE) + _OUTPUT
        found.append(Stage(f"layers.{n}", f"decoder layer {n}", "layer", points, LAYER.format(n), n))
    return [*found, Stage("head", "the head", "head", _HEAD)]
