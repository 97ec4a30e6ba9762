"""The static-shape graphs: one vision graph per patch bucket, one text graph per (batch, tokens, context).

A graph is a small cell around the shared network: the text graphs own their cache parameters, the weights belong to
the network. The same cells are run natively and traced for export, so there is one definition of what a graph takes
and gives. Inputs are flat tensors; ``shapes`` names them.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from .configuration import ModelConfig
from .kernels import Kernels
from .language import LanguageModel
from .parameters import empty_parameter
from .vision import MoonViT, Projector


class StaticGraph(nn.Cell):
    """A cell that is compiled as a whole."""

    @property
    def compile_phase(self) -> str:
        """What MindSpore calls the compilation that the cells here are, or were last, compiled for."""
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, phase: str) -> None:
        # MindSpore 2.10 sets it at every call. Passing it on from cell to cell takes 3 ms for 27 layers, and only compiling
        # reads it.
        if phase not in self.compile_cache:
            nn.Cell.compile_phase.fset(self, phase)


class VisionGraph(StaticGraph):
    """One image -> projected features [N / 4, H] (, the tower's output [N / 4, 4, D] with taps)."""

    def __init__(self, vision_tower: MoonViT, projector: Projector, config: ModelConfig, taps: bool) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.block = config.vision.merge_kernel_size[0] * config.vision.merge_kernel_size[1]
        self.taps = taps

    def construct(self, patches, taps, tap_weights, cos, sin, valid):
        x = self.vision_tower(patches, taps, tap_weights, cos, sin, valid)
        y = self.multi_modal_projector(x)
        taps = ()
        if self.taps:
            taps = (ops.reshape(x, (-1, self.block, x.shape[-1])),)
        return (y,) + taps


class TextGraph(StaticGraph):
    """New tokens of each batch row -> logits of every token [B, T, V] (, taps). One token per row is decoding.

    With taps two more outputs: hidden_states [L, B, T, H], the layers' outputs before the final norm, and
    router_topk_indices [Lm, B, T, k], if there are MoE layers.
    """

    def __init__(
        self,
        model: LanguageModel,
        kernels: Kernels,
        config: ModelConfig,
        batch: int,
        tokens: int,
        context: int,
        dtype: ms.Type,
        taps: bool,
    ) -> None:
        super().__init__()
        text = config.text
        shapes = kernels.cache_shapes(batch, context, text.latent_dim)
        self.caches = ms.ParameterTuple(
            [
                empty_parameter(shape, dtype, f"cache.{i}.{b}")
                for i in range(text.num_hidden_layers)
                for b, shape in enumerate(shapes)
            ]
        )
        self.language_model = model
        self.slots = kernels.Slots(batch, tokens, context)
        self.window = kernels.Window(batch, tokens, context)
        self.batch, self.tokens, self.hidden = batch, tokens, text.hidden_size
        self.vocab = text.vocab_size
        self.moe_layers = len(text.moe_layers)
        self.taps = taps

    def embedded(self, input_ids, embeds, embeds_mask):
        """The first layer's input [R, H]."""
        rows = self.batch * self.tokens
        x = self.language_model.model.embed_tokens(ops.reshape(input_ids, (rows,)))
        replaced = ops.broadcast_to(ops.greater(ops.reshape(embeds_mask, (rows, 1)), 0), (rows, self.hidden))
        return ops.select(replaced, ops.reshape(embeds, (rows, self.hidden)), x)

    def layers(self, x, cos, sin, start):
        """The last layer's output [R, H] for the first one's input x, and the taps."""
        rows = self.batch * self.tokens
        cos, sin = ops.reshape(cos, (rows, -1)), ops.reshape(sin, (rows, -1))
        hidden, routing = self.language_model.model(
            x, cos, sin, self.caches, self.slots(start), self.window(start)
        )
        taps = ()
        if self.taps:
            taps += (ops.reshape(ops.stack(hidden), (-1, self.batch, self.tokens, self.hidden)),)
            if self.moe_layers > 0:
                taps += (ops.reshape(ops.stack(routing), (self.moe_layers, self.batch, self.tokens, -1)),)
        return hidden[-1], taps

    def construct(self, input_ids, embeds, embeds_mask, cos, sin, start):
        x, taps = self.layers(self.embedded(input_ids, embeds, embeds_mask), cos, sin, start)
        logits = ops.reshape(self.language_model(x), (self.batch, self.tokens, self.vocab))
        return (logits,) + taps


class LastLogitsGraph(TextGraph):
    """A chunk of tokens of each batch row -> logits of each row's last valid token [B, 1, V] (, taps)."""

    def construct(self, input_ids, embeds, embeds_mask, cos, sin, start, last):  # type: ignore[override]
        x, taps = self.layers(self.embedded(input_ids, embeds, embeds_mask), cos, sin, start)
        rows = last + ops.cast(ops.range(0, self.batch, 1), ms.int32) * self.tokens
        logits = ops.reshape(self.language_model(ops.gather(x, rows, 0)), (self.batch, 1, self.vocab))
        return (logits,) + taps


class LayersGraph(TextGraph):
    """The decoder layers alone: their input for new tokens of each batch row [B, T, H] -> the taps."""

    def construct(self, embeds, cos, sin, start):  # type: ignore[override]
        _, taps = self.layers(ops.reshape(embeds, (-1, self.hidden)), cos, sin, start)
        return taps


class HeadGraph(StaticGraph):
    """The final norm and the head alone: the last layer's output [B, T, H] -> logits [B, T, V]."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.language_model = model

    def construct(self, embeds):
        batch, tokens, hidden = embeds.shape
        logits = self.language_model(ops.reshape(embeds, (-1, hidden)))
        return (ops.reshape(logits, (batch, tokens, -1)),)
