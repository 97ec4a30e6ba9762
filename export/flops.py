"""Floating-point operations of a graph, from the shapes of its own nodes.

Counted are products of matrices, two operations per multiplication and addition: linears, batched products, grouped ones
by the rows that they are given (a token's k experts are k rows), and fused attention as two products over the whole window,
at the head dims that the node has (padding included), though the CPU operators stop at the last slot that is seen. Not
counted is what works element by element: norms, activations, softmax, rotary products of fewer operations than that,
routing, copies. It is below 1 % at the published dimensions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from .nodes import Node, Nodes, Tensor, flat

FEW_ROWS = (
    8  # up to so many tokens attend in latent space on a CPU: kFewRows of modeling/kernels/native/products.h
)


def _product(node: Node, operands: list[Tensor]) -> int:
    """[..., M, K] x [..., K, N], either of them perhaps transposed."""
    (result,) = flat(node.kind)
    a = operands[0].shape
    inner = a[-1] * a[-2] // result.shape[-2] if len(a) > 1 else a[-1]
    return 2 * math.prod(result.shape) * inner


def _dense(node: Node, operands: list[Tensor]) -> int:
    """[..., K] x [N, K] (+ bias)."""
    (result,) = flat(node.kind)
    return 2 * math.prod(result.shape) * operands[0].shape[-1]


def _grouped(node: Node, operands: list[Tensor]) -> int:
    """Rows [M, K] by groups, each with a matrix [K, N] of its own."""
    return sum(2 * math.prod(result.shape) * operands[0].shape[-1] for result in flat(node.kind))


def _attention(node: Node, operands: list[Tensor]) -> int:
    """Queries, keys and values with the heads first [B, heads, T, D]."""
    q, k, v = (t.shape for t in operands[:3])
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _routed(node: Node, operands: list[Tensor]) -> int:
    """Rows [R, H] to experts [E, H]."""
    return 2 * math.prod(operands[1].shape) * operands[0].shape[0]


def _experts(node: Node, operands: list[Tensor]) -> int:
    """Rows [R, H] through down [E, I, H] and twice as much before it, for each of `indices` [R, k]."""
    down, indices = operands[2].shape, operands[3].shape
    return 6 * math.prod(indices) * down[1] * down[2]


def _latent_attention(node: Node, operands: list[Tensor]) -> int:
    """Queries [T, heads, nope] and [T, heads, rope] over a cache [S, lora + rope]; k_b and v_b [heads, ..., lora]."""
    (tokens, heads, nope), rope, slots = operands[0].shape, operands[1].shape[2], operands[2].shape[0]
    value, lora = operands[-1].shape[1:]
    if tokens <= FEW_ROWS:  # queries into the latent space, and what is attended to out of it
        return 2 * tokens * heads * (lora * (nope + value) + slots * (lora + rope + lora))
    return 2 * slots * heads * (lora * (nope + value) + tokens * (nope + rope + value))


def _vision_attention(node: Node, operands: list[Tensor]) -> int:
    """Queries, keys and values [N, 3 * heads * D]."""
    return 4 * operands[0].shape[0] * math.prod(operands[0].shape) // 3


PRODUCTS: dict[str, Callable[[Node, list[Tensor]], int]] = {
    "BatchMatMul": _product,
    "BatchMatMulExt": _product,
    "Dense": _dense,
    "FlashAttentionScore": _attention,
    "FusedInferAttentionScore": _attention,
    "GroupedMatmul": _grouped,
    "GroupedMatmulV2": _grouped,
    "GroupedMatmulV4": _grouped,
    "IncreFlashAttention": _attention,
    "MatMul": _product,
    "MatMulExt": _product,
    "PromptFlashAttention": _attention,
    "kimi_experts": _experts,
    "kimi_latent_attention": _latent_attention,
    "kimi_linear": _dense,
    "kimi_linear_gelu_erf": _dense,
    "kimi_linear_gelu_tanh": _dense,
    "kimi_router": _routed,
    "kimi_vision_attention": _vision_attention,
    "kimi_vision_attention_rounded": _vision_attention,
}


def flops(graph: Nodes) -> Counter[str]:
    """By operator. Shapes that are not known, or attention in another layout, count as nothing and have a count of 0."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.operator in PRODUCTS:
            found[node.operator] += _of(graph, node)
    return found


def _of(graph: Nodes, node: Node) -> int:
    operands = [t for value in node.inputs for t in flat(graph.kind(value))]
    shapes = [t.shape for t in (*operands[:3], *flat(node.kind))]
    if not operands or any(n < 0 for shape in shapes for n in shape):
        return 0
    layouts = [v for v in map(graph.constants.get, node.inputs) if isinstance(v, str)]
    if PRODUCTS[node.operator] is _attention and (layouts[:1] not in ([], ["BNSD"]) or len(shapes[0]) != 4):
        return 0
    return PRODUCTS[node.operator](node, operands)
