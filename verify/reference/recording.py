"""Records what a network's modules give, by forward hooks, and generates with its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Taps = dict[str, np.ndarray]
Routing = tuple[
    Tensor, Tensor, Tensor
]  # selection scores [R, E], chosen experts [R, k], their weights [R, k]


@dataclass(frozen=True)
class Greedy:
    """`tokens` [B, n] int64, at each step `seconds`, the second best, and `margins`, the distance of the best two
    logits; `logits_after` [B, V], when the last token was fed."""

    tokens: np.ndarray
    seconds: np.ndarray
    margins: np.ndarray
    logits_after: np.ndarray


class Recorder:
    """While it is entered, decoder layers, routers and projector are recorded.

    Args:
        layers: the decoder layers; one with experts has `mlp.gate`. Without any, pictures alone are recorded.
        projector: takes the vision tower's output, one tensor or one for each picture.
        routing: of a gate, its arguments and its output.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        projector: torch.nn.Module,
        routing: Callable[[Any, tuple, Any], Routing],
    ):
        self.layers, self.projector, self.routing = list(layers), projector, routing
        self.hidden: list[Tensor] = []
        self.routers: list[Routing] = []
        self.vision: dict[str, Tensor] = {}
        self.embeds: Tensor | None = None

    def __enter__(self) -> Recorder:
        first = self.layers[:1]
        handles = [layer.register_forward_pre_hook(self._on_embeds, with_kwargs=True) for layer in first]
        for layer in self.layers:
            handles.append(layer.register_forward_hook(self._on_layer))
            if hasattr(layer.mlp, "gate"):
                handles.append(layer.mlp.gate.register_forward_hook(self._on_router))
        handles.append(self.projector.register_forward_hook(self._on_projector))
        self.handles = handles
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _on_embeds(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.embeds = args[0] if args else kwargs["hidden_states"]

    def _on_layer(self, module: torch.nn.Module, args: tuple, out: Any) -> None:
        self.hidden.append(out[0] if isinstance(out, tuple) else out)

    def _on_router(self, module: Any, args: tuple, out: Any) -> None:
        self.routers.append(self.routing(module, args, out))

    def _on_projector(self, module: torch.nn.Module, args: tuple, out: Tensor) -> None:
        given = args[0] if isinstance(args[0], Tensor) else torch.cat(list(args[0]))
        self.vision = {"vision_out": given, "projector_out": out.flatten(0, -2)}

    def taps(self, mask: np.ndarray) -> Taps:
        """See :meth:`verify.oracle.Oracle.run`; `mask` [B, S] is True where there is a token."""
        taps = {name: as_numpy(value) for name, value in self.vision.items()}
        if self.embeds is None:
            return taps
        taps["inputs_embeds"] = as_numpy(self.embeds)
        taps["hidden_states"] = np.stack([as_numpy(h) for h in self.hidden]) * mask[..., None]
        if not self.routers:
            return taps
        chosen, chosen_weights, gaps = [], [], []
        for scores, indices, weights in self.routers:
            k = indices.shape[-1]
            indices, order = indices.sort(dim=-1)
            ranked = scores.sort(dim=-1, descending=True).values
            all_chosen = k == scores.shape[-1]
            gap = torch.full_like(ranked[:, 0], math.inf) if all_chosen else ranked[:, k - 1] - ranked[:, k]
            chosen.append(indices.view(*mask.shape, k).numpy().astype(np.int32))
            chosen_weights.append(as_numpy(weights.gather(-1, order)).reshape(*mask.shape, k))
            gaps.append(as_numpy(gap).reshape(mask.shape))
        taps["router_topk_indices"] = np.where(mask[..., None], np.stack(chosen), np.int32(-1))
        taps["router_topk_weights"] = np.stack(chosen_weights) * mask[..., None]
        taps["router_gap"] = np.where(mask, np.stack(gaps), np.float32(np.inf))
        return taps


def text_arguments(ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """`input_ids`, `attention_mask`, `position_ids` [B, S] of a left-padded batch."""
    position_ids = np.where(mask, mask.cumsum(1) - 1, 1)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask).long(),
        "position_ids": torch.from_numpy(position_ids),
    }


def greedy(network: Any, arguments: dict[str, Any], n: int, **first: Any) -> Greedy:
    """`n` cached greedy steps after the prompt of these arguments; `first` are options of the prompt's own call."""
    attention, position = arguments["attention_mask"], arguments["position_ids"][:, -1:]
    out = network(**arguments, use_cache=True, **first)
    tokens, seconds, margins = [], [], []
    for _ in range(n):
        best, ids = out.logits[:, -1].float().topk(2, dim=-1)
        tokens.append(ids[:, 0])
        seconds.append(ids[:, 1])
        margins.append(best[:, 0] - best[:, 1])
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
        position = position + 1
        out = network(
            input_ids=ids[:, :1],
            attention_mask=attention,
            position_ids=position,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return Greedy(
        tokens=torch.stack(tokens, 1).numpy(),
        seconds=torch.stack(seconds, 1).numpy(),
        margins=as_numpy(torch.stack(margins, 1)),
        logits_after=as_numpy(out.logits[:, -1]),
    )


def as_numpy(t: Tensor) -> np.ndarray:
    """fp32, whatever the network computes in."""
    return t.detach().float().numpy()
