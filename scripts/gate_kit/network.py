"""Faults of the network: cells that are wrong when a bundle's graphs are traced from them.

Each takes the tracer, whose network is built and whose graphs are not traced yet. The bundle is for Ascend unless a fault
says otherwise, so the kernels are those of ``kernels.ascend``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mindspore as ms
from mindspore import ops
from mindspore.ops import operations as P

from kimi_vl.modeling import graphs, language, vision
from kimi_vl.modeling.kernels import ascend, cache_writes, plain

from .fault import Fault

Tracer = Any


def layer(tracer: Tracer, number: int) -> Any:
    """A decoder layer that is traced for itself: by default all of a kind are one to the compiler."""
    cell = tracer.language_model.model.layers[number]
    cell.cell_init_args += " faulty"
    return cell


def layers(tracer: Tracer) -> Any:
    return tracer.language_model.model.layers


def set_eps(tracer: Tracer, norm: Any, eps: float) -> None:
    norm.norm, norm.add_norm = tracer.kernels.RMSNorm(eps), tracer.kernels.AddRMSNorm(eps)


# ---- norms ------------------------------------------------------------------------------------------------------------


def kv_a_eps(tracer: Tracer, eps: float = 1e-5) -> None:
    for cell in layers(tracer):
        set_eps(tracer, cell.self_attn.kv_a_layernorm, eps)


def rms_eps(tracer: Tracer, eps: float = 1e-6) -> None:
    set_eps(tracer, tracer.language_model.model.norm, eps)
    for cell in layers(tracer):
        set_eps(tracer, cell.input_layernorm, eps)
        set_eps(tracer, cell.post_attention_layernorm, eps)


def final_eps(tracer: Tracer, eps: float = 1e-6) -> None:
    set_eps(tracer, tracer.language_model.model.norm, eps)


def tower_eps(tracer: Tracer, eps: float = 1e-6) -> None:
    encoder = tracer.vision_tower.encoder
    norms = [encoder.final_layernorm, *(n for block in encoder.blocks for n in (block.norm0, block.norm1))]
    for norm in norms:
        norm.norm, norm.add_norm = tracer.kernels.LayerNorm(eps), tracer.kernels.AddLayerNorm(eps)


def projector_eps(tracer: Tracer, eps: float = 1e-6) -> None:
    tracer.projector.pre_norm.norm = tracer.kernels.LayerNorm(eps)


# ---- router and experts -----------------------------------------------------------------------------------------------


class BiasInWeights(ascend.Router):
    def construct(self, x, weight, bias):
        scores = self.sigmoid(self.matmul(ops.cast(x, ms.float32), weight)) + bias
        indices = self.choose(scores)
        return indices, self.shares(self.gather(scores, 1, indices))


class SoftmaxScores(ascend.Router):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sigmoid = P.Softmax(-1)


class RouterInBf16(plain.Router):
    def construct(self, x, weight, bias):
        x, weight = (ops.cast(ops.cast(t, ms.bfloat16), ms.float32) for t in (x, weight))
        logits = ops.cast(ops.cast(self.matmul(x, weight), ms.bfloat16), ms.float32)
        scores = self.sigmoid(logits)
        indices = self.choose(scores + bias)
        return indices, self.shares(self.gather(scores, 1, indices))


def router(tracer: Tracer, kind: Callable[[Any], Any], number: int = 1) -> None:
    layer(tracer, number).mlp.gate.router = kind(tracer.config.text)


def router_of(tracer: Tracer, **changed: Any) -> None:
    """All routers for a configuration that is not the checkpoint's."""
    for cell in layers(tracer):
        if cell.is_moe:
            cell.mlp.gate.router = tracer.kernels.Router(replace(tracer.config.text, **changed))


class SharedWithoutEffect(language.MoE):
    def construct(self, x):
        indices, weights = self.gate(x)
        return self.experts(x, indices, weights) + self.shared_experts(x) * 1e-30, indices


def shared_without_effect(tracer: Tracer) -> None:
    moe = SharedWithoutEffect(tracer.kernels, tracer.dtype, tracer.config.text)
    cell = layer(tracer, 2)
    cell.mlp = moe
    moe.update_parameters_name("language_model.model.layers.2.mlp.")


def shared_left_out(tracer: Tracer) -> None:
    for cell in layers(tracer):
        if cell.is_moe:
            cell.mlp.shared = False


# ---- attention --------------------------------------------------------------------------------------------------------


def scale(tracer: Tracer, number: int, prefill: bool) -> None:
    """1/sqrt of the head's dim without its rotary part; of decoding alone or also of prefill."""
    attention = layer(tracer, number).self_attn.attention
    wrong = attention.nope**-0.5
    attention.scale = wrong
    if prefill:
        qk = attention.nope + attention.rope
        attention.fused = ascend.FusedAttention(
            attention.heads, qk, attention.v, wrong, ascend.PRECISE_MASKED
        )


class SeesNext(ascend.Window):
    def construct(self, start):
        return super().construct(start + 1)


class SeesNotItself(ascend.Window):
    def construct(self, start):
        return super().construct(start - 1)


class OneSlotTooFar(cache_writes.Starts):
    def construct(self, start):
        return ops.cast(start + 1, ms.int64)


def kernel(tracer: Tracer, **changed: Any) -> None:
    """Entries of the kernels that the text graphs take."""
    for name, value in changed.items():
        setattr(tracer.kernels, name, value)


class PaddingAttended(ascend.VisionAttention):
    def attend_heads(self, q, k, v, valid):
        q, k, v = self.swap(q.expand_dims(0)), self.swap(k.expand_dims(0)), self.swap(v.expand_dims(0))
        lengths = ops.cast(ops.cast(valid, ms.float32) * 0.0 + q.shape[2], ms.int64)
        y = self.fused(q, k, v, None, lengths)
        return ops.reshape(self.swap(y), (q.shape[2], -1))


def padding_attended(tracer: Tracer) -> None:
    for block in tracer.vision_tower.encoder.blocks:
        block.attention = PaddingAttended(tracer.config.vision, tracer.dtype)


# ---- activations and the projector -----------------------------------------------------------------------------------


def erf_in_tower(tracer: Tracer) -> None:
    for block in tracer.vision_tower.encoder.blocks:
        block.mlp.fc0.linear = tracer.kernels.Linear("gelu_erf")


def tanh_in_projector(tracer: Tracer) -> None:
    tracer.projector.linear_1.linear = tracer.kernels.Linear("gelu_tanh")


class NormAfterMerge(vision.Projector):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm = P.LayerNorm(-1, -1, vision.LAYER_NORM_EPS)

    def construct(self, x):
        block = self.merged // x.shape[-1]
        weight = ops.concat((self.pre_norm.weight,) * block, 0)
        bias = ops.concat((self.pre_norm.bias,) * block, 0)
        y, _, _ = self.norm(ops.reshape(x, (-1, self.merged)), weight, bias)
        return self.linear_2(self.linear_1(y))


def norm_after_merge(tracer: Tracer) -> None:
    tracer.projector = NormAfterMerge(tracer.kernels, tracer.dtype, tracer.config)


# ---- graphs -----------------------------------------------------------------------------------------------------------


class LastOfFirstRow(graphs.LastLogitsGraph):
    """Every row of the batch gets the place of its last token in the first row."""

    def construct(self, input_ids, embeds, embeds_mask, cos, sin, start, last):
        offsets = ops.cast(ops.range(0, self.batch, 1), ms.int32) * self.tokens
        return super().construct(input_ids, embeds, embeds_mask, cos, sin, start, last - offsets)


def last_of_first_row(tracer: Tracer) -> None:
    right = tracer.cell

    def cell(graph: Any) -> Any:
        made = right(graph)
        if isinstance(made, graphs.LastLogitsGraph):
            made.__class__ = LastOfFirstRow
        return made

    tracer.cell = cell


def _network(name: str, what: str, place: str, change: Callable[[Tracer], object], **more: Any) -> Fault:
    return Fault(name, what, "network", place, change, **more)


_EPS = {"model": "eps"}
FAULTS = (
    _network("kv-a-eps", "kv_a_layernorm with eps 1e-5 for 1e-6", "layers.0", kv_a_eps, **_EPS),
    _network("rms-eps", "all RMSNorms with eps 1e-6 for 1e-5", "layers.0", rms_eps, **_EPS),
    _network("final-norm-eps", "the final norm with eps 1e-6 for 1e-5", "logits", final_eps, **_EPS),
    _network("tower-eps", "LayerNorms of the tower with eps 1e-6 for 1e-5", "vision_out", tower_eps, **_EPS),
    _network(
        "projector-eps",
        "pre_norm of the projector with eps 1e-6 for 1e-5",
        "projector_out",
        projector_eps,
        **_EPS,
    ),
    _network(
        "bias-in-weights",
        "correction bias in the experts' weights too",
        "layers.1",
        partial(router, kind=BiasInWeights),
    ),
    _network(
        "softmax-scores",
        "router scores by softmax for sigmoid",
        "router.2",
        partial(router, kind=SoftmaxScores, number=2),
    ),
    _network(
        "router-bf16",
        "router in bf16",
        "layers.1",
        partial(router, kind=RouterInBf16),
        target="cpu",
        through="mindspore",
    ),
    _network(
        "factor-2.5",
        "routed_scaling_factor 2.5 for 2.446",
        "layers.1",
        partial(router_of, routed_scaling_factor=2.5),
    ),
    _network(
        "not-normalised",
        "experts' weights not divided by their sum",
        "layers.1",
        partial(router_of, norm_topk_prob=False),
    ),
    _network(
        "shared-lost", "what the shared experts of layer 2 give is lost", "layers.2", shared_without_effect
    ),
    _network("shared-left-out", "shared experts left out of all layers", "layers.1", shared_left_out),
    _network(
        "scale",
        "softmax scale 1/sqrt(nope) for 1/sqrt(nope + rope)",
        "layers.1",
        partial(scale, number=1, prefill=True),
    ),
    _network(
        "scale-decode", "the same when decoding alone", "layers.2", partial(scale, number=2, prefill=False)
    ),
    _network("sees-next", "causal mask one too far", "layers.0", partial(kernel, Window=SeesNext)),
    _network("sees-not-itself", "causal mask one short", "layers.0", partial(kernel, Window=SeesNotItself)),
    _network(
        "slot-too-far",
        "cache rows written one slot too far",
        "layers.0",
        partial(kernel, Slots=OneSlotTooFar),
    ),
    _network(
        "padding-attended", "a picture attends to the patches that pad it", "vision_out", padding_attended
    ),
    _network("erf-in-tower", "GELU by erf for tanh in the tower", "vision_out", erf_in_tower),
    _network(
        "tanh-in-projector",
        "GELU by tanh for erf in the projector",
        "projector_out",
        tanh_in_projector,
    ),
    _network(
        "norm-after-merge",
        "pre_norm after the merge",
        "projector_out",
        norm_after_merge,
    ),
    _network(
        "last-of-first-row",
        "last token of a batch row looked up in the first row",
        "last_logits",
        last_of_first_row,
        batch=2,
    ),
)
