"""Our engine as one side of a comparison: the network of a converted directory, or a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from kimi_vl import KimiVLForConditionalGeneration
from kimi_vl.export import MindIRModel
from kimi_vl.modeling import running
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.modeling.engine import Row
from kimi_vl.modeling.graphs import HeadGraph

from .cases import ANSWER, DECODE, HEAD, NEW_TOKENS, PREFILL, VISION, Case, Clock

HEAD_WEIGHT = "language_model.lm_head.weight"

Run = Callable[[int], np.ndarray]


class OurSide:
    """Prepares cases for a model. A prepared case takes the turn and gives fp32 results.

    Args:
        model: of either kind.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config: ModelConfig = model.engine.config
        self._head: Any = None

    @classmethod
    def of_network(
        cls, directory: Path, kernels: str | None, context: int, patches: int, chunk: int
    ) -> OurSide:
        """The network with a converted directory's weights, in the dtype that they are stored in."""
        return cls(
            KimiVLForConditionalGeneration.from_pretrained(
                directory,
                kernels=kernels,
                max_context=context,
                max_image_patches=patches,
                prefill_chunk=chunk,
            )
        )

    @classmethod
    def of_bundle(cls, directory: Path) -> OurSide:
        return cls(MindIRModel.from_bundle(directory))

    @property
    def versions(self) -> dict[str, str]:
        return {"mindspore": ms.__version__, "numpy": np.__version__}

    @property
    def name(self) -> str:
        if isinstance(self.model, MindIRModel):
            return f"bundle, weights in {self._held}"
        kernels = self.model.kernels.__name__.rpartition(".")[2]
        return f"{kernels} kernels, weights in {self._held}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a number of the weights as they are read."""
        return running.NUMPY[self._held].itemsize

    @property
    def _held(self) -> str:
        """The dtype of the weights in memory."""
        if isinstance(self.model, MindIRModel):
            bundle = self.model.bundle
            return bundle.parameter_dtype or bundle.weights[HEAD_WEIGHT].dtype
        return running.name(self.model.parameters_dict()[HEAD_WEIGHT].dtype)

    @property
    def cache_bytes(self) -> int:
        """Bytes of a number in the cache."""
        return self.model.engine.new_cache(1).rows[0].buffers[0].itemsize

    def prepare(self, case: Case) -> Run:
        """What runs `case`. Raises ValueError: the model cannot."""
        return {
            DECODE: self._decode, PREFILL: self._prefill, VISION: self._vision, HEAD: self._logits,
        }[case.kind](case)  # fmt: skip

    def _decode(self, case: Case) -> Run:
        engine = self.model.engine
        cache = engine.new_cache(case.batch)
        for layer in range(self.config.text.num_hidden_layers):
            for row, latents in zip(cache.rows, case.latents(self.config, layer)):
                row.buffers[layer][: case.cached] = latents

        def run(turn: int) -> np.ndarray:
            for row in cache.rows:
                row.length = case.cached
            rows = [Row(ids) for ids in case.tokens(self.config, turn)]
            return np.stack([out.logits[-1][-1] for out in engine.extend(cache, rows)])

        return run

    def _prefill(self, case: Case) -> Run:
        engine = self.model.engine

        def run(turn: int) -> np.ndarray:
            rows = [Row(ids) for ids in case.tokens(self.config, turn)]
            return np.stack([out.logits[-1][-1] for out in engine.extend(engine.new_cache(case.batch), rows)])

        return run

    def _vision(self, case: Case) -> Run:
        pixels, grids = case.picture(self.config)
        return lambda turn: self.model.engine.encode_images(pixels, grids)[0][0]

    def _logits(self, case: Case) -> Run:
        if isinstance(self.model, MindIRModel):
            raise ValueError(f"--cases: {case}: a bundle has no graph of the head alone; leave it out")
        if self._head is None:
            self.model.check_weights()
            self._head = running.prepared(HeadGraph(self.model.language_model))
        dtypes = {"embeds": running.name(self.model.activation_dtype)}
        return lambda turn: running.run_cell(self._head, dtypes, {"embeds": case.hidden(self.config, turn)})[
            0
        ][0]

    def answer(self, case: Case) -> Callable[[int], tuple[float, float]]:
        """Runs an answer; gives seconds to its first token, and on average for one after it."""
        assert case.kind == ANSWER
        pad = self.config.pad_token_id

        def run(turn: int) -> tuple[float, float]:
            clock, prompt = Clock(), case.prompt(self.config, turn)
            start = time.perf_counter()
            self.model.generate(
                **prompt,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=pad,
                streamer=clock,
            )
            first, *_, last = clock.times[1:]  # the prompt itself comes first
            return first - start, (last - first) / (NEW_TOKENS - 1)

        return run

    def chosen_experts(self, ids: np.ndarray) -> np.ndarray | None:
        """The experts [Lm, n, k] that one row of ids [n] chooses in a prompt, sorted; None: a bundle without taps."""
        engine = self.model.engine
        if isinstance(self.model, MindIRModel) and not any(g.taps for g in self.model.bundle.graphs.values()):
            return None
        (out,) = engine.extend(engine.new_cache(1), [Row(ids)], taps=True)
        return np.sort(np.concatenate(out.router_topk_indices, 1), -1)
