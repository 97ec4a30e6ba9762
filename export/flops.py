"""Floating-point operations of a graph, from the shapes of its own nodes.

Counted are products of matrices, two operations per multiplication and addition: linears, batched products, grouped ones
by the rows that they are given (a token's k experts are k rows), and fused attention as two products over the whole window,
at the head dims that the node has (padding included). Not counted is what works element by element: norms, activations,
softmax, rotary products of fewer operations than that, routing, copies. It is below 1 % at the published dimensions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from .nodes import Node, Nodes, Tensor, flat


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
