"""The table: published tensor names and layouts against ours. Both directions and all checks derive from it.

A row reads: published tensors, our tensors, the transform between them. Placeholders say how often the row stands:

    {layer}   every text layer           {block}   every vision block
    {dense}   text layers with one MLP   {expert}  every routed expert, all collected in the same row
    {moe}     text layers with experts   {shared}  those of {moe}, if there are shared experts
    {part}    "weight" and "bias"

Shapes are in letters; :data:`DIMS` has each with its place in ``config.json``. Dtypes are the checkpoint's, except
where a row fixes one: the router computes in fp32, and no cast may run at inference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..modeling.configuration import ModelConfig, short
from . import transforms as t
from .errors import ConversionError
from .transforms import Block, Transform


@dataclass(frozen=True)
class Row:
    """Templates ``name [shape]``; several of one side are joined by `` + ``."""

    published: str
    ours: str
    transform: Transform
    dtype: np.dtype | None = None
    optional: bool = False

    @property
    def place(self) -> str | None:
        """The placeholder that the row is repeated over."""
        return next((p for p in PLACES if f"{{{p}}}" in self.published), None)


PLACES = ("block", "layer", "dense", "moe", "shared")

# fmt: off
TABLE: tuple[Row, ...] = (
    Row("vision_tower.patch_embed.proj.weight [D, C, p, p]",
        "vision_tower.patch_embed.proj.weight [D, Cpp]",                                    t.conv_as_linear),
    Row("vision_tower.patch_embed.proj.bias [D]",
        "vision_tower.patch_embed.proj.bias [D]",                                           t.keep),
    Row("vision_tower.patch_embed.pos_emb.weight [h, w, D]",
        "vision_tower.patch_embed.pos_emb.weight [hw, D]",                                  t.table_as_rows),
    Row("vision_tower.encoder.blocks.{block}.norm0.{part} [D]",
        "vision_tower.encoder.blocks.{block}.norm0.{part} [D]",                             t.keep),
    Row("vision_tower.encoder.blocks.{block}.wqkv.weight [3D, D]",
        "vision_tower.encoder.blocks.{block}.wqkv.weight [3D, D]",                          t.deinterleave_wqkv),
    Row("vision_tower.encoder.blocks.{block}.wqkv.bias [3D]",
        "vision_tower.encoder.blocks.{block}.wqkv.bias [3D]",                               t.deinterleave_wqkv),
    Row("vision_tower.encoder.blocks.{block}.wo.weight [D, D]",
        "vision_tower.encoder.blocks.{block}.wo.weight [D, D]",                             t.keep),
    Row("vision_tower.encoder.blocks.{block}.wo.bias [D]",
        "vision_tower.encoder.blocks.{block}.wo.bias [D]",                                  t.keep),
    Row("vision_tower.encoder.blocks.{block}.norm1.{part} [D]",
        "vision_tower.encoder.blocks.{block}.norm1.{part} [D]",                             t.keep),
    Row("vision_tower.encoder.blocks.{block}.mlp.fc0.weight [M, D]",
        "vision_tower.encoder.blocks.{block}.mlp.fc0.weight [M, D]",                        t.keep),
    Row("vision_tower.encoder.blocks.{block}.mlp.fc0.bias [M]",
        "vision_tower.encoder.blocks.{block}.mlp.fc0.bias [M]",                             t.keep),
    Row("vision_tower.encoder.blocks.{block}.mlp.fc1.weight [D, M]",
        "vision_tower.encoder.blocks.{block}.mlp.fc1.weight [D, M]",                        t.keep),
    Row("vision_tower.encoder.blocks.{block}.mlp.fc1.bias [D]",
        "vision_tower.encoder.blocks.{block}.mlp.fc1.bias [D]",                             t.keep),
    Row("vision_tower.encoder.final_layernorm.{part} [D]",
        "vision_tower.encoder.final_layernorm.{part} [D]",                                  t.keep),

    Row("multi_modal_projector.pre_norm.{part} [D]",
        "multi_modal_projector.pre_norm.{part} [D]",                                        t.keep),
    Row("multi_modal_projector.linear_1.weight [G, G]",
        "multi_modal_projector.linear_1.weight [G, G]",                                     t.keep),
    Row("multi_modal_projector.linear_1.bias [G]",
        "multi_modal_projector.linear_1.bias [G]",                                          t.keep),
    Row("multi_modal_projector.linear_2.weight [H, G]",
        "multi_modal_projector.linear_2.weight [H, G]",                                     t.keep),
    Row("multi_modal_projector.linear_2.bias [H]",
        "multi_modal_projector.linear_2.bias [H]",                                          t.keep),

    Row("language_model.model.embed_tokens.weight [V, H]",
        "language_model.model.embed_tokens.weight [V, H]",                                  t.keep),
    Row("language_model.model.layers.{layer}.input_layernorm.weight [H]",
        "language_model.model.layers.{layer}.input_layernorm.weight [H]",                   t.keep),
    Row("language_model.model.layers.{layer}.self_attn.q_proj.weight [Q, H]",
        "language_model.model.layers.{layer}.self_attn.q_proj.weight [Q, H]",               t.deinterleave_q),
    Row("language_model.model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight [L+rope, H]",
        "language_model.model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight [L+rope, H]",
                                                                                            t.deinterleave_kv_a),
    Row("language_model.model.layers.{layer}.self_attn.kv_a_layernorm.weight [L]",
        "language_model.model.layers.{layer}.self_attn.kv_a_layernorm.weight [L]",          t.keep),
    Row("language_model.model.layers.{layer}.self_attn.kv_b_proj.weight [K, L]",
        "language_model.model.layers.{layer}.self_attn.k_b_proj.weight [heads, nope, L] + "
        "language_model.model.layers.{layer}.self_attn.v_b_proj.weight [heads, v, L]",      t.split_kv_b),
    Row("language_model.model.layers.{layer}.self_attn.o_proj.weight [H, O]",
        "language_model.model.layers.{layer}.self_attn.o_proj.weight [H, O]",               t.keep),
    Row("language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq [rope/2]",
        "",                                                                                 t.drop, optional=True),
    Row("language_model.model.layers.{layer}.post_attention_layernorm.weight [H]",
        "language_model.model.layers.{layer}.post_attention_layernorm.weight [H]",          t.keep),
    Row("language_model.model.layers.{dense}.mlp.gate_proj.weight [F, H] + "
        "language_model.model.layers.{dense}.mlp.up_proj.weight [F, H]",
        "language_model.model.layers.{dense}.mlp.gate_up_proj.weight [2F, H]",              t.fuse),
    Row("language_model.model.layers.{dense}.mlp.down_proj.weight [H, F]",
        "language_model.model.layers.{dense}.mlp.down_proj.weight [H, F]",                  t.keep),
    Row("language_model.model.layers.{moe}.mlp.gate.weight [E, H]",
        "language_model.model.layers.{moe}.mlp.gate.weight [E, H]",                         t.keep, t.FLOAT32),
    Row("language_model.model.layers.{moe}.mlp.gate.e_score_correction_bias [E]",
        "language_model.model.layers.{moe}.mlp.gate.e_score_correction_bias [E]",           t.keep, t.FLOAT32),
    Row("language_model.model.layers.{moe}.mlp.experts.{expert}.gate_proj.weight [I, H] + "
        "language_model.model.layers.{moe}.mlp.experts.{expert}.up_proj.weight [I, H]",
        "language_model.model.layers.{moe}.mlp.experts.gate_up_proj [E, H, 2I]",            t.stack_experts),
    Row("language_model.model.layers.{moe}.mlp.experts.{expert}.down_proj.weight [H, I]",
        "language_model.model.layers.{moe}.mlp.experts.down_proj [E, I, H]",                t.stack_experts),
    Row("language_model.model.layers.{shared}.mlp.shared_experts.gate_proj.weight [S, H] + "
        "language_model.model.layers.{shared}.mlp.shared_experts.up_proj.weight [S, H]",
        "language_model.model.layers.{shared}.mlp.shared_experts.gate_up_proj.weight [2S, H]",
                                                                                            t.fuse),
    Row("language_model.model.layers.{shared}.mlp.shared_experts.down_proj.weight [H, S]",
        "language_model.model.layers.{shared}.mlp.shared_experts.down_proj.weight [H, S]",  t.keep),
    Row("language_model.model.norm.weight [H]",
        "language_model.model.norm.weight [H]",                                             t.keep),
    Row("language_model.lm_head.weight [V, H]",
        "language_model.lm_head.weight [V, H]",                                             t.keep),
)

_Of = Callable[[ModelConfig], int]
DIMS: dict[str, tuple[str, _Of]] = {
    "V": ("vocab_size", lambda c: c.text.vocab_size),
    "H": ("hidden_size", lambda c: c.text.hidden_size),
    "F": ("intermediate_size", lambda c: c.text.intermediate_size),
    "2F": ("intermediate_size", lambda c: 2 * c.text.intermediate_size),
    "E": ("n_routed_experts", lambda c: c.text.n_routed_experts),
    "I": ("moe_intermediate_size", lambda c: c.text.moe_intermediate_size),
    "2I": ("moe_intermediate_size", lambda c: 2 * c.text.moe_intermediate_size),
    "S": ("moe_intermediate_size * n_shared_experts", lambda c: c.text.shared_intermediate_size),
    "2S": ("moe_intermediate_size * n_shared_experts", lambda c: 2 * c.text.shared_intermediate_size),
    "heads": ("num_attention_heads", lambda c: c.text.num_attention_heads),
    "nope": ("qk_nope_head_dim", lambda c: c.text.qk_nope_head_dim),
    "rope": ("qk_rope_head_dim", lambda c: c.text.qk_rope_head_dim),
    "rope/2": ("qk_rope_head_dim", lambda c: c.text.qk_rope_head_dim // 2),
    "v": ("v_head_dim", lambda c: c.text.v_head_dim),
    "L": ("kv_lora_rank", lambda c: c.text.kv_lora_rank),
    "L+rope": ("kv_lora_rank + qk_rope_head_dim", lambda c: c.text.latent_dim),
    "Q": ("num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",
          lambda c: c.text.num_attention_heads * c.text.qk_head_dim),
    "K": ("num_attention_heads * (qk_nope_head_dim + v_head_dim)",
          lambda c: c.text.num_attention_heads * (c.text.qk_nope_head_dim + c.text.v_head_dim)),
    "O": ("num_attention_heads * v_head_dim", lambda c: c.text.num_attention_heads * c.text.v_head_dim),
    "D": ("vision_config.hidden_size", lambda c: c.vision.hidden_size),
    "3D": ("vision_config.hidden_size", lambda c: 3 * c.vision.hidden_size),
    "Dheads": ("vision_config.num_attention_heads", lambda c: c.vision.num_attention_heads),
    "Dhead": ("vision_config.hidden_size / num_attention_heads", lambda c: c.vision.head_dim),
    "M": ("vision_config.intermediate_size", lambda c: c.vision.intermediate_size),
    "C": ("", lambda c: 3),
    "p": ("vision_config.patch_size", lambda c: c.vision.patch_size),
    "Cpp": ("vision_config.patch_size", lambda c: c.vision.patch_dim),
    "h": ("vision_config.init_pos_emb_height", lambda c: c.vision.init_pos_emb_height),
    "w": ("vision_config.init_pos_emb_width", lambda c: c.vision.init_pos_emb_width),
    "hw": ("vision_config.init_pos_emb_height * init_pos_emb_width",
           lambda c: c.vision.init_pos_emb_height * c.vision.init_pos_emb_width),
    "G": ("vision_config.hidden_size * merge_kernel_size", lambda c: c.vision.merged_dim),
}
# fmt: on


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and dtype (numpy's name for it)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Side:
    """A tensor of one side of an entry: its name, its shape, and the configuration's field behind each dimension."""

    name: str
    shape: tuple[int, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A row of the table at one place: the `published` tensors become `ours` by `transform`."""

    published: tuple[Side, ...]
    ours: tuple[Side, ...]
    transform: Transform
    dtype: np.dtype | None
    optional: bool
    dims: Mapping[str, int]

    def blocks(self, sources: Sequence[np.ndarray]) -> list[list[Block]]:
        """For each of `ours`, the views of the published tensors `sources` that it is made of."""
        return self.transform.blocks(sources, self.dims)


def entries(config: ModelConfig) -> Iterator[Entry]:
    """The table written out for one configuration: vision tower, projector, then the text model layer by layer."""
    text = config.text
    places: dict[str, Sequence[int]] = {
        "block": range(config.vision.num_hidden_layers),
        "layer": range(text.num_hidden_layers),
        "dense": [i for i in range(text.num_hidden_layers) if not text.is_moe(i)],
        "moe": text.moe_layers,
        "shared": text.moe_layers if text.n_shared_experts else [],
    }
    sets = {place: set(layers) for place, layers in places.items()}
    dims = {letter: of(config) for letter, (_, of) in DIMS.items()}
    for stage, group in itertools.groupby(TABLE, key=_stage):
        rows = list(group)
        for layer in places[stage] if stage else (0,):
            for row in rows:
                if row.place is None or layer in sets[row.place]:
                    yield from _entries(row, layer, dims)


def match(config: ModelConfig, published: Mapping[str, Spec]) -> list[Entry]:
    """The entries for a checkpoint, once it is sure that they and its tensors fit each other one to one.

    Raises:
        ConversionError: a tensor is missing, has a shape or dtype that was not expected, or is not in the table.
    """
    plausible(config, len(published))
    found, left = [], dict(published)
    for entry in entries(config):
        if entry.optional and entry.published[0].name not in published:
            continue
        for side in entry.published:
            spec = left.pop(side.name, None)
            if spec is None:
                raise ConversionError(
                    f"{side.name}: is missing, config.json asks for shape {side.shape}; "
                    "is the checkpoint complete, and is the configuration its own?"
                )
            _check(side, spec)
        found.append(entry)
    for name in left:
        raise ConversionError(
            f"{short(name)}: no tensor of this name belongs to the network that config.json describes"
            + (f" (nor do {len(left) - 1} others)" if len(left) > 1 else "")
            + "; is --src another variant?"
        )
    return found


def target_dtype(entry: Entry, published: Mapping[str, Spec], asked: str | None = None) -> np.dtype:
    """What an entry's tensors are stored as: the row's dtype, else the one asked for, else the sources' own.

    Sources of several dtypes meet in fp32, which holds all values of the others exactly.
    """
    if entry.dtype is not None:
        return entry.dtype
    own = {published[side.name].dtype for side in entry.published}
    return t.DTYPES[asked or (own.pop() if len(own) == 1 else "float32")]


def _stage(row: Row) -> str | None:
    return None if row.place is None else "block" if row.place == "block" else "layer"


def _entries(row: Row, layer: int, dims: Mapping[str, int]) -> Iterator[Entry]:
    parts = ("weight", "bias") if "{part}" in row.published else ("",)
    experts = range(dims["E"]) if "{expert}" in row.published else (0,)
    for part in parts:
        at = {"part": part, row.place or "layer": layer}
        yield Entry(
            tuple(_side(s, dims, at | {"expert": e}) for e in experts for s in _templates(row.published)),
            tuple(_side(s, dims, at) for s in _templates(row.ours)),
            row.transform,
            row.dtype,
            row.optional,
            dims,
        )


def _templates(side: str) -> list[str]:
    return side.split(" + ") if side else []


def _side(template: str, dims: Mapping[str, int], at: Mapping[str, object]) -> Side:
    name, letters = template[:-1].split(" [")
    axes = letters.split(", ")
    return Side(name.format(**at), tuple(dims[a] for a in axes), tuple(DIMS[a][0] for a in axes))


def plausible(config: ModelConfig, tensors: int) -> None:
    """Before the table is written out: a configuration that names a billion layers belongs to no checkpoint."""
    for field, value in (
        ("num_hidden_layers", config.text.num_hidden_layers),
        ("vision_config.num_hidden_layers", config.vision.num_hidden_layers),
        ("n_routed_experts", config.text.n_routed_experts),
    ):
        if value > tensors and (field != "n_routed_experts" or config.text.moe_layers):
            raise ConversionError(
                f"config.json: {field} is {value}, but the checkpoint has only {tensors} tensors; "
                "is it complete, and is the configuration its own?"
            )


def _check(side: Side, spec: Spec) -> None:
    if spec.shape != side.shape:
        pairs = itertools.zip_longest(side.fields, side.shape, spec.shape)
        wrong = dict.fromkeys(f"config.{field}" for field, want, got in pairs if want != got and field)
        source = f" from {' and '.join(wrong)}" if wrong else ""
        raise ConversionError(
            f"{side.name}: shape {spec.shape}, expected {side.shape}{source}; is --src another variant?"
        )
    if spec.dtype not in t.DTYPES:
        raise ConversionError(
            f"{side.name}: dtype {spec.dtype}, expected {', '.join(t.DTYPES)}; "
            "quantised checkpoints have to be widened first"
        )
