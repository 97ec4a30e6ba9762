"""llama.cpp as the other side of a comparison: one row of text, weights in bf16, by its C interface.

Its cache cannot be filled from outside, so that decoding goes on after a prompt of other tokens than the other sides have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp as llama
import numpy as np

from kimi_vl.modeling.configuration import ModelConfig

from .cases import DECODE, PREFILL, Case
from .gguf_file import write_gguf

BATCH = 512  # tokens that it takes at once, its default


class LlamaSide:
    """Prepares cases for llama.cpp with a published directory's text model; its file is made beside that directory.

    Raises:
        ValueError: llama.cpp does not load the file.
    """

    name = "llama.cpp"
    weight_bytes = 2
    cache_bytes = 2  # fp16, its default
    fills_cache = False
    versions = {"llama-cpp-python": llama.__version__}

    def __init__(self, published: Path, context: int, threads: int) -> None:
        self.config = ModelConfig.from_file(published)
        path = published.with_name("text-bf16.gguf")
        if not path.exists():
            write_gguf(published, path)
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: C holds it
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it; remove it, so that it is made anew")
        settings = llama.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, settings)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def use(self, variant: str) -> None:
        """It has no choice of kernels."""

    def fastest(self, case: Case, run: Callable[[int], object]) -> dict[str, float]:
        run(0)
        return {"": 0.0}

    def experts_in_a_batch(self, run: Callable[[int], np.ndarray], turns: int) -> float:
        """Of one row."""
        return self.config.text.num_experts_per_tok

    def chosen_experts(self, ids: np.ndarray) -> None:
        """It does not tell."""

    def takes(self, case: Case) -> bool:
        """Those that have nothing to do with pictures, one row, and more than the head."""
        return case.kind in (DECODE, PREFILL) and case.batch == 1

    def prepare(self, case: Case) -> Callable[[int], np.ndarray]:
        """What runs `case`; as another case may have used the cache since, a decode case fills it where it is short."""
        before = Case(PREFILL, max(1, case.cached)).tokens(self.config, 0)[0]

        def run(turn: int) -> np.ndarray:
            llama.llama_memory_seq_rm(self._memory, 0, case.cached, -1)
            return self._extend(case.tokens(self.config, turn)[0], case.cached)[None]

        llama.llama_memory_clear(self._memory, True)
        if case.cached:
            self._extend(before, 0)
        return run

    def _extend(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Logits [V] of the last of ids [n], which follow `start` cached tokens."""
        batch = self._batch
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH].tolist()
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + first + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i == len(part) - 1
            status = llama.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode: ended with {status} at token {start + first}")
        logits = llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.config.text.vocab_size,)).copy()
