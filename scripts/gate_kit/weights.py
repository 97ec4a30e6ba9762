"""Faults of single tensors, as a mistake in the conversion or a damaged file would leave them.

Names and layouts are those of a converted checkpoint; tiny8 has the dense layer 0 and the MoE layers 1 and 2, 8 experts,
4 heads of 16 + 8 rows (and as many value rows as keys have without rotation, as the published model), 2 vision blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from .fault import Fault

LAYERS = "language_model.model.layers"
EXPERTS = f"{LAYERS}.1.mlp.experts"
HEADS, NOPE, ROPE, LATENT = 4, 16, 8, 32
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TABLE = "vision_tower.patch_embed.pos_emb.weight"

Weights = Any  # name -> array, see the workshop
Change = Callable[[Weights], None]


def halves_swapped(name: str, axis: int, expert: int | None = None) -> Change:
    def change(weights: Weights) -> None:
        whole = weights[name]
        part = whole if expert is None else whole[expert]
        first, second = np.split(part.copy(), 2, axis)
        part[...] = np.concatenate((second, first), axis)
        weights[name] = whole

    return change


def exchanged(*pairs: tuple[str, str]) -> Change:
    def change(weights: Weights) -> None:
        for a, b in pairs:
            weights[a], weights[b] = weights[b], weights[a]

    return change


def rows_moved(name: str, to: int | slice, source: int | slice) -> Change:
    """Rows (or experts, or heads) `to` hold what `source` has."""

    def change(weights: Weights) -> None:
        whole = weights[name]
        whole[to] = whole[source].copy()
        weights[name] = whole

    return change


def scaled(name: str, at: tuple[int, ...], factor: float) -> Change:
    def change(weights: Weights) -> None:
        whole = weights[name]
        whole[at] = np.float32(whole[at]) * np.float32(factor)
        weights[name] = whole

    return change


def interleaved(name: str, start: int, count: int) -> Change:
    """Rows of a rotation in the published order: pairs side by side."""

    def change(weights: Weights) -> None:
        whole = weights[name]
        turned = whole[start : start + count].copy()
        whole[start : start + count] = np.stack(np.split(turned, 2), 1).reshape(turned.shape)
        weights[name] = whole

    return change


def neighbours_swapped(weights: Weights) -> None:
    for name in ("gate_up_proj", "down_proj"):
        whole = weights[f"{EXPERTS}.{name}"]
        whole[[2, 3]] = whole[[3, 2]]
        weights[f"{EXPERTS}.{name}"] = whole


def layers_swapped(weights: Weights) -> None:
    names = [name for name in weights if name.startswith(f"{LAYERS}.1.")]
    exchanged(*((name, name.replace(f"{LAYERS}.1.", f"{LAYERS}.2.")) for name in names))(weights)


def table_transposed(weights: Weights) -> None:
    table = weights[TABLE]
    side = int(len(table) ** 0.5)
    weights[TABLE] = table.reshape(side, side, -1).swapaxes(0, 1).reshape(table.shape)


def channels_reversed(weights: Weights) -> None:
    name = "vision_tower.patch_embed.proj.weight"
    kernel = weights[name]
    weights[name] = kernel.reshape(len(kernel), 3, -1)[:, ::-1].reshape(kernel.shape)


def bias_removed(weights: Weights) -> None:
    name = f"{LAYERS}.1.mlp.gate.e_score_correction_bias"
    weights[name] = np.zeros_like(weights[name])


def shifted(weights: Weights) -> None:
    weights[EMBEDDING] = np.roll(weights[EMBEDDING], 1, 0)


@contextmanager
def truncating() -> Iterator[None]:
    """fp32 becomes bf16 by dropping 16 bits, where it must be rounded."""
    from kimi_vl.convert import transforms

    right = transforms._convert

    def convert(source: np.ndarray, target: np.ndarray, losses: Any) -> None:
        if (source.dtype, target.dtype) == (transforms.FLOAT32, transforms.BFLOAT16):
            bits = np.ascontiguousarray(source).view(np.uint32) >> np.uint32(16)
            target.view(np.uint16)[...] = bits
        else:
            right(source, target, losses)

    with mock.patch.object(transforms, "_convert", convert):
        yield


def _weights(name: str, what: str, place: str, change: Change) -> Fault:
    return Fault(name, what, "weights", place, change)


FAULTS = (
    _weights(
        "dense-gate-up",
        "gate and up swapped in the dense layer",
        "layers.0",
        halves_swapped(f"{LAYERS}.0.mlp.gate_up_proj.weight", 0),
    ),
    _weights(
        "expert-gate-up",
        "gate and up swapped in one expert",
        "layers.1",
        halves_swapped(f"{EXPERTS}.gate_up_proj", 1, expert=5),
    ),
    _weights(
        "shared-gate-up",
        "gate and up swapped in the shared experts of layer 2",
        "layers.2",
        halves_swapped(f"{LAYERS}.2.mlp.shared_experts.gate_up_proj.weight", 0),
    ),
    _weights("expert-neighbour", "two neighbouring experts exchanged", "layers.1", neighbours_swapped),
    _weights(
        "expert-down-neighbour",
        "one expert with its neighbour's down projection",
        "layers.1",
        rows_moved(f"{EXPERTS}.down_proj", 6, 7),
    ),
    _weights(
        "q-interleaved",
        "rotary rows of one head's queries not de-interleaved",
        "layers.1",
        interleaved(f"{LAYERS}.1.self_attn.q_proj.weight", 2 * (NOPE + ROPE) + NOPE, ROPE),
    ),
    _weights(
        "k-interleaved",
        "rotary rows of the shared key not de-interleaved",
        "layers.2",
        interleaved(f"{LAYERS}.2.self_attn.kv_a_proj_with_mqa.weight", LATENT, ROPE),
    ),
    _weights(
        "kb-vb",
        "k_b and v_b exchanged",
        "layers.1",
        exchanged((f"{LAYERS}.1.self_attn.k_b_proj.weight", f"{LAYERS}.1.self_attn.v_b_proj.weight")),
    ),
    _weights(
        "kb-neighbour",
        "one head with its neighbour's k_b",
        "layers.2",
        rows_moved(f"{LAYERS}.2.self_attn.k_b_proj.weight", 1, 2),
    ),
    _weights("bias-missing", "correction bias of a router all zero", "router.1", bias_removed),
    _weights(
        "bias-neighbour",
        "a router with the next layer's correction bias",
        "router.1",
        lambda weights: weights.update(
            {
                f"{LAYERS}.1.mlp.gate.e_score_correction_bias": weights[
                    f"{LAYERS}.2.mlp.gate.e_score_correction_bias"
                ]
            }
        ),
    ),
    _weights("layer-order", "layers 1 and 2 exchanged", "layers.1", layers_swapped),
    _weights(
        "norms-exchanged",
        "the two norms of layer 2 exchanged",
        "layers.2",
        exchanged((f"{LAYERS}.2.input_layernorm.weight", f"{LAYERS}.2.post_attention_layernorm.weight")),
    ),
    _weights(
        "head-tied",
        "lm_head tied to the embedding",
        "logits",
        lambda weights: weights.update({HEAD: weights[EMBEDDING]}),
    ),
    _weights("embedding-shifted", "embedding one row too far", "inputs_embeds", shifted),
    _weights(
        "weight-1-percent",
        "one bf16 number of o_proj 1 % too large",
        "layers.1",
        scaled(f"{LAYERS}.1.self_attn.o_proj.weight", (5, 7), 1.01),
    ),
    _weights(
        "weight-zero",
        "one number of an expert's down projection zero",
        "layers.2",
        scaled(f"{LAYERS}.2.mlp.experts.down_proj", (3, 4, 5), 0.0),
    ),
    _weights(
        "expert-nan",
        "NaN in one expert",
        "layers.1",
        scaled(f"{EXPERTS}.gate_up_proj", (4, 0, 0), float("nan")),
    ),
    _weights("table-transposed", "position table transposed", "vision_out", table_transposed),
    _weights("channels-reversed", "patch embedding takes BGR for RGB", "vision_out", channels_reversed),
    _weights(
        "vision-interleaved",
        "rotary rows of one vision head's queries not de-interleaved",
        "vision_out",
        interleaved("vision_tower.encoder.blocks.1.wqkv.weight", 12, 12),
    ),
    Fault(
        "truncated",
        "fp32 weights truncated to bf16, where they must be rounded",
        "conversion",
        "vision_out",
        truncating,
    ),
)
