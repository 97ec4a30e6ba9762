"""A stand-in for the publisher's network: its module names and calling conventions, around transformers' own network.

A decoder layer returns a tuple, a gate returns experts and weights, the projector takes a list with a tensor a picture.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from kimi_vl.verify.oracle import build_oracle

from .configuration_kimi_vl import KimiVLConfig


class Seen(nn.Module):
    """Calls a module that the publisher's way of calling is put around, and gives back what transformers expects."""

    def __init__(self, outer, back):
        super().__init__()
        self.outer, self.back = [outer], back  # a list: it is no child

    def forward(self, x, **kwargs):
        return self.back(self.outer[0](x, **kwargs))


class MoEGate(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.e_score_correction_bias = inner.weight, inner.e_score_correction_bias

    def forward(self, x):
        assert x.ndim == 3
        _, weights, experts = self.inner(x)
        return experts, weights


class DecoderLayer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.mlp = inner, nn.Module()
        if hasattr(inner.mlp, "gate"):
            self.mlp.gate = MoEGate(inner.mlp.gate)
            inner.mlp.gate = Seen(self.mlp.gate, lambda out: (None, out[1], out[0]))

    def forward(self, x, **kwargs):
        return (self.inner(x, **kwargs), None)


class Projector(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        return self.inner(torch.cat(features)).squeeze(1)


class KimiVLForConditionalGeneration(PreTrainedModel):
    config_class = KimiVLConfig

    @classmethod
    def from_pretrained(cls, directory, config, torch_dtype, output_loading_info, **kwargs):
        print("output of the checkpoint's code")
        network = cls(config)
        network.fill(build_oracle(directory, torch_dtype).network)
        return network, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def fill(self, inner):
        assert self.config.vision_config._attn_implementation == "sdpa"
        layers = [DecoderLayer(layer) for layer in inner.model.language_model.layers]
        inner.model.language_model.layers = nn.ModuleList(
            [Seen(layer, lambda out: out[0]) for layer in layers]
        )
        self.language_model, self.language_model.model = nn.Module(), nn.Module()
        self.language_model.model.layers = nn.ModuleList(layers)
        self.multi_modal_projector = Projector(inner.model.mm_projector)
        inner.model.mm_projector = Seen(self.multi_modal_projector, lambda out: out[:, None])
        give = inner.model.vision_tower.forward

        def pictures(*args, grid_thw, **kwargs):
            out = give(*args, grid_thw=grid_thw, **kwargs)
            out.pooler_output = list(out.pooler_output.split((grid_thw.prod(1) // 4).tolist()))
            return out

        inner.model.vision_tower.forward = pictures
        self.inner = [inner]

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
        pixel_values=None, image_grid_hws=None,
    ):  # fmt: skip
        grids = {}
        if pixel_values is not None:
            thw = torch.cat([torch.ones_like(image_grid_hws[:, :1]), image_grid_hws], dim=1)
            grids = {"pixel_values": pixel_values, "image_grid_thw": thw}
        return self.inner[0](
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **grids,
        )
