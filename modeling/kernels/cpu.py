"""Custom operators in C++ (`native`) for CPUs: weights are read where they lie, in bf16 or fp32, activations are fp32.

MindSpore's own CPU kernels cannot multiply bf16 and copy the weights of chosen experts. These read bf16 weights from a
memory-mapped file; products of few rows are computed in fp32, those of more than 8 rows round their input to
bf16 where the machine has instructions for that and :func:`library.set_exact` does not forbid it.

The library's path is part of a traced graph. Bundles hold the operators' names alone, see ``export.mindir``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import nn, ops

from ..configuration import TextConfig, VisionConfig
from . import library, plain

Slots = plain.Slots
cache_shapes = plain.cache_shapes


def parameter_dtype(dtype: ms.Type) -> ms.Type:
    """bf16 and fp32 as they are; fp16, which has no operators, as fp32."""
    return dtype if dtype == ms.bfloat16 else ms.float32


def activation_dtype(dtype: ms.Type) -> ms.Type:
    """fp32 whatever the model's dtype."""
    return ms.float32


def operator(name: str, shapes: Callable[..., Any], dtypes: Any = ms.float32) -> ops.Custom:
    """The library's operator of this name.

    Args:
        shapes: of its outputs, for the shapes of its inputs.
        dtypes: of its outputs.
    """
    outputs = dtypes if callable(dtypes) else lambda *_: dtypes
    return ops.Custom(f"{library.path()}:kimi_{name}", shapes, outputs, func_type="aot")


class Linear(nn.Cell):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        name = "linear" if activation is None else f"linear_{activation}"
        self.linear = operator(name, lambda x, w: [x[0], w[0]])
        self.biased = operator(name, lambda x, w, b: [x[0], w[0]])

    def construct(self, x, weight, bias=None):
        if bias is None:
            y = self.linear(x, weight)
        else:
            y = self.biased(x, weight, bias)
        return y


class Embedding(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = operator("embedding", lambda table, ids: [ids[0], table[1]])

    def construct(self, table, ids):
        return self.embedding(table, ids)


class RMSNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = ms.Tensor([eps], ms.float32)
        self.norm = operator("rms_norm", lambda x, w, eps: x)

    def construct(self, x, weight):
        return self.norm(x, weight, self.eps)


class AddRMSNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = ms.Tensor([eps], ms.float32)
        self.norm = operator("add_rms_norm", lambda x, y, w, eps: (x, x), lambda *_: (ms.float32, ms.float32))

    def construct(self, x, y, weight):
        return self.norm(x, y, weight, self.eps)


class LayerNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = ms.Tensor([eps], ms.float32)
        self.norm = operator("layer_norm", lambda x, w, b, eps: x)

    def construct(self, x, weight, bias):
        return self.norm(x, weight, bias, self.eps)


class AddLayerNorm(nn.Cell):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = ms.Tensor([eps], ms.float32)
        self.norm = operator(
            "add_layer_norm", lambda x, y, w, b, eps: (x, x), lambda *_: (ms.float32, ms.float32)
        )

    def construct(self, x, y, weight, bias):
        return self.norm(x, y, weight, bias, self.eps)


class Split(nn.Cell):
    """One operator for both parts."""

    def __init__(self, first: int, rest: int) -> None:
        super().__init__()
        self.split = operator(
            "split",
            lambda x: (x[:-1] + [first], x[:-1] + [rest]),
            lambda *_: (ms.float32, ms.float32),
        )

    def construct(self, x):
        return self.split(x)


class ImageTables(nn.Cell):
    """The operator takes them as they are."""

    def __init__(self, heads: int) -> None:
        super().__init__()

    def construct(self, cos, sin):
        return cos, sin


class RotaryTables(ImageTables):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads)


class Rotate(nn.Cell):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.rotate = operator("rotate", lambda x, cos, sin: x)

    def construct(self, q, k, tables):
        cos, sin = tables
        return self.rotate(q, cos, sin), ops.reshape(self.rotate(k.expand_dims(1), cos, sin), k.shape)


class SwiGLU(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.swiglu = operator("swiglu", lambda x: [x[0], x[1] // 2])

    def construct(self, gate_up):
        return self.swiglu(gate_up)


class Interpolate(nn.Cell):
    def __init__(self, taps: int) -> None:
        super().__init__()
        self.interpolate = operator("interpolate", lambda table, taps, weights: [taps[0], table[1]])

    def construct(self, table, taps, weights):
        return self.interpolate(table, taps, weights)


class Router(nn.Cell):
    """Sigmoid scores in fp32; the correction bias takes part in the choice only."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        k = config.num_experts_per_tok
        self.options = ms.Tensor([float(config.norm_topk_prob), config.routed_scaling_factor], ms.float32)
        self.router = operator(
            "router",
            lambda x, w, b, options: ([x[0], k], [x[0], k]),
            lambda *_: (ms.int32, ms.float32),
        )

    def construct(self, x, weight, bias):
        return self.router(x, weight, bias, self.options)


class Experts(nn.Cell):
    """Each chosen expert's weights are read once and where they lie, for however many tokens chose it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.experts = operator("experts", lambda x, *_: x)

    def construct(self, x, gate_up, down, indices, weights):
        return self.experts(x, gate_up, down, indices, weights)


class CacheWrite(plain.CacheWrite):
    """Without a slice where there is one row."""

    def construct(self, caches, rows, slots):
        if len(slots) == 1:
            written = (self.write(caches[0], slots[0], rows),)
        else:
            written = self.write_rows(caches, rows, slots)
        return written


class Window(nn.Cell):
    """The slot of each row's first token says all."""

    def __init__(self, batch: int, tokens: int, context: int) -> None:
        super().__init__()

    def construct(self, start):
        return start


class LatentAttention(nn.Cell):
    """Reads the slots that are seen, not the whole cache: what a token costs follows its position, not the context.

    A few tokens attend in latent space, more expand keys and values of what they see, as in the other backends.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = operator(
            "latent_attention",
            lambda q_nope, q_rope, cache, start, k_b, v_b: [q_nope[0], v_b[0] * v_b[1]],
        )

    def construct(self, q_nope, q_rope, caches, start, k_b, v_b):
        batch = len(caches)
        if batch == 1:
            y = self.attention(q_nope, q_rope, caches[0], start, k_b, v_b)
        else:
            tokens = q_nope.shape[0] // batch
            out = ()
            for b in range(batch):
                at = b * tokens
                q = q_nope[at : at + tokens], q_rope[at : at + tokens]
                out += (self.attention(q[0], q[1], caches[b], start[b : b + 1], k_b, v_b),)
            y = ops.concat(out, 0)
        return y


class VisionAttention(nn.Cell):
    """Full attention within one image, in blocks; patches from `valid` on are padding and not seen."""

    def __init__(self, config: VisionConfig, dtype: ms.Type) -> None:
        super().__init__()
        name = "vision_attention_rounded" if dtype == ms.bfloat16 else "vision_attention"
        self.attention = operator(name, lambda qkv, cos, sin, valid: [qkv[0], qkv[1] // 3])

    def construct(self, qkv, tables, valid):
        return self.attention(qkv, tables[0], tables[1], valid)
