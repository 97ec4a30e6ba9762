"""The Torch reference in parts: the same network, of which one decoder layer at a time holds weights.

The network is built without memory for its large tensors. A part's are read from the published files when its turn comes
and dropped after it; what runs is the model's own forward, with its own masks and rotary tables, over no layer or over one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..modeling.configuration import ModelConfig
from .oracle import Inputs, Oracle, build_network
from .reference.recording import Taps, as_numpy
from .threads import suited_to
from .torch_weights import PublishedTensors

EMBEDDING = "language_model.model.embed_tokens.weight"


class OracleInParts:
    """What :class:`verify.oracle.Oracle` gives, bit for bit, part by part; each holds its weights within a context.

    A state is what flows between the layers: `[B, S, H]`, also at masked places, where it is no zeros.

    Raises:
        OracleError, ConfigError: as :func:`verify.oracle.build_oracle`.
    """

    def __init__(self, directory: str | Path):
        self.config = ModelConfig.from_file(directory)
        with _WithoutMemory():
            network = build_network(self.config)
        self._published = PublishedTensors(network, directory, self.config)
        self._specs = {name: (t.shape, t.dtype) for name, t in network.state_dict().items()}
        self._oracle = Oracle(network, self.config)
        self._model: Any = network.model
        self._text: Any = network.model.language_model
        self._head, self._norm, self._layers = network.lm_head, self._text.norm, list(self._text.layers)
        self._text.embed_tokens.forward = self._embedding_rows
        self._text.norm = torch.nn.Identity()
        self._text.layers = torch.nn.ModuleList()

    @contextmanager
    def vision(self) -> Iterator[Callable[[Inputs], Taps]]:
        """Gives `inputs_embeds`, the first state, and with pictures `vision_out` and `projector_out`."""
        places = {"model.vision_tower.": "vision_tower.", "model.mm_projector.": "mm_projector."}
        with self._holding(places) as tensors:

            def embed(inputs: Inputs) -> Taps:
                arguments, mask = self._oracle.arguments(inputs)
                with self._oracle.recorder() as recorder:
                    out = functional_call(self._model, tensors, (), arguments | {"use_cache": False})
                return recorder.taps(mask) | {"inputs_embeds": as_numpy(out.last_hidden_state)}

            yield embed

    @contextmanager
    def layer(self, number: int) -> Iterator[Callable[[Inputs, np.ndarray], tuple[np.ndarray, Taps]]]:
        """Gives the state after decoder layer `number`, and its taps as :meth:`verify.oracle.Oracle.run` does, of one
        layer."""
        self._text.layers = torch.nn.ModuleList([self._layers[number]])
        try:
            with self._holding({f"model.language_model.layers.{number}.": "layers.0."}) as tensors:

                def run(inputs: Inputs, state: np.ndarray) -> tuple[np.ndarray, Taps]:
                    arguments, mask = self._oracle.arguments(inputs)
                    given = {name: arguments[name] for name in ("attention_mask", "position_ids")}
                    given |= {"inputs_embeds": torch.from_numpy(state), "use_cache": False}
                    with self._oracle.recorder() as recorder:
                        out = functional_call(self._text, tensors, (), given)
                    taps = recorder.taps(mask)
                    del taps["inputs_embeds"]  # it is the state that was given
                    return as_numpy(out.last_hidden_state), taps

                yield run
        finally:
            self._text.layers = torch.nn.ModuleList()

    @contextmanager
    def head(self) -> Iterator[Callable[[Inputs, np.ndarray], np.ndarray]]:
        """Gives the logits `[B, S, V]` of the last layer's state, zeros at masked places."""
        places = {"model.language_model.norm.": "0.", "lm_head.": "1."}
        head = torch.nn.Sequential(self._norm, self._head)
        with self._holding(places) as tensors:

            def run(inputs: Inputs, state: np.ndarray) -> np.ndarray:
                _, mask = self._oracle.arguments(inputs)
                return as_numpy(functional_call(head, tensors, torch.from_numpy(state))) * mask[..., None]

            yield run

    def _embedding_rows(self, ids: Tensor) -> Tensor:
        return self._published.rows(EMBEDDING, ids, self._oracle.dtype)

    @contextmanager
    def _holding(self, places: dict[str, str]) -> Iterator[dict[str, Tensor]]:
        """The tensors whose names begin with a key of `places`, which is its value in the names given."""
        held = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self._specs.items()
            if name.startswith(tuple(places))
        }
        self._published.fill(held)
        named = {
            ours + name.removeprefix(theirs): tensor
            for theirs, ours in places.items()
            for name, tensor in held.items()
            if name.startswith(theirs)
        }
        try:
            with torch.no_grad(), suited_to(self.config.text.hidden_size):
                yield named
        finally:
            named.clear()  # whoever still has the function that runs the part has no weights by it


class _WithoutMemory(TorchFunctionMode):
    """What is made empty, as large parameters are, has a shape and no memory; computed buffers are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
