"""What the static graphs take and give: names, shapes and dtypes, without MindSpore.

"float" is the dtype that a graph computes in. The graphs themselves are in ``graphs``.
"""

from __future__ import annotations

from .configuration import ModelConfig

Ports = dict[str, tuple[tuple[int, ...], str]]
"""Name -> (shape, dtype), in the order of the graph's inputs or outputs."""


def cache_per_row(batch: int, context: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of one layer's cache parameters: a flat buffer for each row of the batch."""
    return [(context, width)] * batch


def cache_of_batch(batch: int, context: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of one layer's cache parameters: one for all rows, with the axis of the (one, shared) key head."""
    return [(batch, 1, context, width)]


def cache_of_slots(batch: int, context: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of one layer's cache parameters: one for all rows, whose slots follow each other."""
    return [(batch * context, width)]


def vision_inputs(config: ModelConfig, patches: int) -> Ports:
    """Of a vision graph."""
    half = config.vision.head_dim // 2
    return {
        "patches": ((patches, config.vision.patch_dim), "float"),
        "taps": ((patches, 16), "int32"),
        "tap_weights": ((patches, 16), "float"),
        "cos": ((patches, half), "float"),
        "sin": ((patches, half), "float"),
        "valid": ((1,), "int32"),
    }


def vision_outputs(config: ModelConfig, patches: int, taps: bool) -> Ports:
    """Of a vision graph: the projected features, and with taps the tower's output."""
    block = config.vision.merge_kernel_size[0] * config.vision.merge_kernel_size[1]
    merged = patches // block
    outputs: Ports = {"features": ((merged, config.text.hidden_size), "float")}
    if taps:
        outputs["vision_out"] = ((merged, block, config.vision.hidden_size), "float")
    return outputs


def text_inputs(config: ModelConfig, batch: int, tokens: int, all_logits: bool) -> Ports:
    """Of a text graph.

    `embeds` are rows that replace token embeddings where `embeds_mask` is 1: image features, or a caller's own
    `inputs_embeds`. `last` is each row's last valid token, for graphs that give only its logits.
    """
    half = config.text.qk_rope_head_dim // 2
    inputs: Ports = {
        "input_ids": ((batch, tokens), "int32"),
        "embeds": ((batch, tokens, config.text.hidden_size), "float"),
        "embeds_mask": ((batch, tokens), "int32"),
        "cos": ((batch, tokens, half), "float"),
        "sin": ((batch, tokens, half), "float"),
        "start": ((batch,), "int32"),
    }
    if not all_logits:
        inputs["last"] = ((batch,), "int32")
    return inputs


def layers_inputs(config: ModelConfig, batch: int, tokens: int) -> Ports:
    """Of a graph of decoder layers alone: `embeds` is the first one's input, the rest as of a text graph."""
    inputs = text_inputs(config, batch, tokens, all_logits=True)
    return {name: inputs[name] for name in ("embeds", "cos", "sin", "start")}


def text_outputs(config: ModelConfig, batch: int, tokens: int, all_logits: bool, taps: bool) -> Ports:
    """Of a text graph: the logits, and with taps every layer's output and the MoE layers' chosen experts."""
    text = config.text
    outputs: Ports = {"logits": ((batch, tokens if all_logits else 1, text.vocab_size), "float")}
    if taps:
        outputs["hidden_states"] = ((text.num_hidden_layers, batch, tokens, text.hidden_size), "float")
        if text.moe_layers:
            outputs["router_topk_indices"] = (
                (len(text.moe_layers), batch, tokens, text.num_experts_per_tok),
                "int32",
            )
    return outputs
