"""Norms, gated activations and rotary embeddings: the fused operators that are no matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import require
from .rules import FLOATS, common, rule
from .values import Value


def _normed(x: Value, *_: Any) -> tuple[torch.dtype, torch.dtype]:
    return x.dtype, torch.float32


@rule("RmsNorm", result=_normed, floats=FLOATS)
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma over gamma's dimensions, and 1 / sqrt(...). gamma may be fp32 beside a bf16 x."""
    require(0 < epsilon <= 1, f"has epsilon {epsilon}, expected (0, 1]")
    require(
        gamma.shape == x.shape[x.ndim - gamma.ndim :], f"has gamma {list(gamma.shape)} for x {list(x.shape)}"
    )
    axes = tuple(range(-gamma.ndim, 0))
    rstd = torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    return x * rstd * gamma, rstd


@rule(
    "AddRmsNorm",
    result=lambda x, y, gamma, _: (common(x, y, gamma), torch.float32, x.dtype),
    floats=FLOATS,
)
def add_rms_norm(x: Tensor, y: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """RmsNorm of the sum; the sum itself is the third result."""
    require(x.shape == y.shape, "adds tensors of two shapes")
    return *rms_norm(x + y, gamma, epsilon), x + y


def _layer_normed(x: Value, *_: Any) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return x.dtype, torch.float32, torch.float32


@rule("LayerNorm", result=_layer_normed)
def layer_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, begin_norm_axis: int, begin_params_axis: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, the mean, and 1 / sqrt(...)."""
    require(
        begin_norm_axis == begin_params_axis,
        f"begins at axis {begin_norm_axis} and {begin_params_axis}, which Ascend has to be equal",
    )
    shape = x.shape[begin_norm_axis % x.ndim :]
    require(gamma.shape == beta.shape == shape, f"has gamma {list(gamma.shape)}, expected {list(shape)}")
    y, mean, rstd = _standardised(x, len(shape), epsilon)
    return y * gamma + beta, mean, rstd


@rule("LayerNormExt", result=_layer_normed)
def layer_norm_ext(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    require(tuple(x.shape[x.ndim - len(shape) :]) == shape, f"has the shape {shape} for x {list(x.shape)}")
    y, mean, rstd = _standardised(x, len(shape), epsilon)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def _standardised(x: Tensor, dims: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    axes = tuple(range(-dims, 0))
    mean = x.mean(axes, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    return (x - mean) * rstd, mean, rstd


@rule("Swiglu", floats=FLOATS)
def swiglu(x: Tensor, dim: int) -> Tensor:
    """Swish of the first half, times the second."""
    require(x.shape[dim] % 2 == 0, f"splits {x.shape[dim]} elements, expected an even number")
    gate, up = x.chunk(2, dim)
    return F.silu(gate) * up


@rule("RotaryPositionEmbedding", floats=FLOATS)
def rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    """x * cos + rotated(x) * sin. Mode 0: (a, b) -> (-b, a) of halves; mode 1: of neighbours."""
    require(mode in (0, 1), f"has mode {mode}, expected 0 (half) or 1 (interleaved)")
    require(x.ndim == 4 and x.shape[-1] % 2 == 0 and x.shape[-1] < 896, f"takes x {list(x.shape)}")
    require(
        max(x.shape[0], x.shape[1]) < 1000,
        f"takes x {list(x.shape)}, expected fewer than 1000 rows and heads",
    )
    if mode == 0:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin
    rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + rotated * sin
