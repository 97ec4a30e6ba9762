"""Teaches two heads of one attention layer where to look, in training only.

Looking up "the square" among several shapes is what a small network finds last by itself: until a head looks at the
right place, its answer tells it nothing about which place that is. The generator knows the place, so training may
say it: one head shall attend to what the next token depends on, another to everything that is to be counted and, as
much as to each of those, to the first token; what share the first token keeps then tells the number.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Kimi_K25ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .chat import TokenLook

LAYER, READING_HEAD, COUNTING_HEAD = 2, 0, 1
_NAME = "taught"


class Lesson:
    """Attached to a network, adds up how far the two heads are from the looks that are wanted."""

    def __init__(self, network: Kimi_K25ForConditionalGeneration):
        text = network.model.language_model
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
        text.set_attn_implementation(_NAME)
        text.layers[LAYER].self_attn.lesson = self
        self.looks: tuple[TokenLook, ...] = ()
        self.loss = torch.zeros(())

    def give(self, looks: tuple[TokenLook, ...]) -> None:
        """The looks of the forward pass that comes; `loss` is their mean cross entropy after it."""
        self.looks, self.loss = looks, torch.zeros(())

    def judge(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """`query`, `key` [B, heads, S, D] of the taught layer."""
        if not self.looks:
            return
        places = torch.tensor([look.place for look in self.looks])
        rows = torch.tensor([look.row for look in self.looks])
        heads = torch.tensor([COUNTING_HEAD if look.counts else READING_HEAD for look in self.looks])
        wanted = torch.zeros(len(self.looks), key.shape[2])
        for i, look in enumerate(self.looks):
            keys = [*look.keys, 0] if look.counts else [*look.keys]
            wanted[i, keys] = 1 / len(keys)
        scores = torch.einsum("nd,nsd->ns", query[rows, heads, places], key[rows, heads]) * scaling
        later = torch.arange(key.shape[2]) > places[:, None]
        self.loss = F.cross_entropy(scores.masked_fill(later, -1e9), wanted)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention; rows are padded at the right, so no mask is needed."""
    if (lesson := getattr(module, "lesson", None)) is not None:
        lesson.judge(query, key, scaling)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
