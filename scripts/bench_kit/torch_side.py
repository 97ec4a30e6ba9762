"""transformers' own classes as the other side of a comparison, with the kernels of theirs that are fastest here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kimi_vl.convert import EnvironmentProblem
from kimi_vl.convert.converter import available_memory
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.oracle import Oracle, build_network
from kimi_vl.verify.torch_weights import load_published

from .cases import ANSWER, DECODE, HEAD, NEW_TOKENS, PREFILL, VISION, Case, Clock

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Above these, a choice is left out that would need more memory than it is worth: scores of all pairs of tokens at once,
# copies of a token's experts' matrices.
EAGER_PAIRS = 2048**2
BATCHED_ROWS = 8
SLOW = 2.0  # seconds; what takes longer is tried once
MARGIN = 1.2  # of a network's weights has to be free

Run = Callable[[int], np.ndarray]


class TorchSide:
    """Prepares cases for the reference of a published directory. A prepared case takes the turn and gives fp32 results.

    Raises:
        EnvironmentProblem: not enough memory is free.
        OracleError: the directory is no published checkpoint.
    """

    def __init__(self, directory: Path, dtype: str) -> None:
        self.config = ModelConfig.from_file(directory)
        with torch.device("meta"):
            numbers = sum(p.numel() for p in build_network(self.config, DTYPES[dtype]).parameters())
        need, free = MARGIN * numbers * DTYPES[dtype].itemsize, available_memory()
        if free is not None and free < need:
            raise EnvironmentProblem(
                f"Torch in {dtype} needs {need / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free; "
                "take a checkpoint of fewer layers or leave out this --reference"
            )
        network = build_network(self.config, DTYPES[dtype])
        load_published(network, directory, self.config)
        # For a prompt's last token, a slice of a longer tensor, Torch's linear copies the whole head transposed: seconds
        # that nobody should win by. `contiguous` would leave the slice as it is.
        network.lm_head.register_forward_pre_hook(
            lambda module, args: (args[0].clone(memory_format=torch.contiguous_format),)
        )
        self.oracle = Oracle(network, self.config)
        self.network: Any = network
        self.weight_bytes = self.cache_bytes = DTYPES[dtype].itemsize
        self.name = f"Torch {dtype}"
        self.fills_cache = True

    def takes(self, case: Case) -> bool:
        return True

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def use(self, variant: str) -> None:
        """transformers' names for its implementations of attention and experts, "sdpa, eager"."""
        attention, experts = variant.split(", ")
        self.network.set_attn_implementation(attention)
        # The whole, which has no experts of its own, would refuse "grouped_mm".
        self.network.model.language_model.set_experts_implementation(experts)

    def variants(self, case: Case) -> list[str]:
        """What may be fastest for a case."""
        tokens = case.size if case.kind == VISION else case.fed
        pairs = tokens * case.size
        attentions = ["sdpa", *(["eager"] if pairs <= EAGER_PAIRS else [])]
        experts = ["grouped_mm", "eager", *(["batched_mm"] if case.batch * tokens <= BATCHED_ROWS else [])]
        if case.kind == HEAD:
            return ["sdpa, grouped_mm"]
        if case.kind == VISION:
            experts = experts[:1]
        return [f"{a}, {e}" for a in attentions for e in experts]

    def fastest(self, case: Case, run: Callable[[int], object]) -> dict[str, float]:
        """Seconds of each choice, the fastest first, which is in use from now on."""
        seconds = {}
        for variant in self.variants(case):
            self.use(variant)
            seconds[variant] = min(_trials(run))
        ranked = dict(sorted(seconds.items(), key=lambda item: item[1]))
        self.use(next(iter(ranked)))
        return ranked

    def prepare(self, case: Case) -> Run:
        """What runs `case`."""
        return {
            DECODE: self._decode, PREFILL: self._prefill, VISION: self._vision, HEAD: self._logits,
        }[case.kind](case)  # fmt: skip

    def _decode(self, case: Case) -> Run:
        t, dtype = self.config.text, self.oracle.dtype
        cache = transformers.DynamicCache(config=self.network.config)
        with torch.inference_mode():
            for layer in range(t.num_hidden_layers):
                latents = torch.from_numpy(case.latents(self.config, layer)).to(dtype)[
                    :, None
                ]  # (B, 1, S, latent)
                if case.cached:
                    cache.update(*latents.split([t.kv_lora_rank, t.qk_rope_head_dim], -1), layer)
        position_ids = torch.full((case.batch, 1), case.cached)

        @torch.inference_mode()
        def run(turn: int) -> np.ndarray:
            cache.crop(case.cached - cache.get_seq_length())
            ids = torch.from_numpy(case.tokens(self.config, turn))
            out = self.network(
                input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True
            )
            return out.logits[:, -1].float().numpy()

        return run

    def _prefill(self, case: Case) -> Run:
        @torch.inference_mode()
        def run(turn: int) -> np.ndarray:
            ids = torch.from_numpy(case.tokens(self.config, turn))
            out = self.network(input_ids=ids, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float().numpy()

        return run

    def _vision(self, case: Case) -> Run:
        pixels, grids = case.picture(self.config)
        patches = torch.from_numpy(pixels).to(self.oracle.dtype)
        grid = torch.tensor([[1, *grids[0].tolist()]])

        @torch.inference_mode()
        def run(turn: int) -> np.ndarray:
            return self.network.get_image_features(patches, grid).pooler_output[0].float().numpy()

        return run

    def _logits(self, case: Case) -> Run:
        norm, head = self.network.model.language_model.norm, self.network.lm_head

        @torch.inference_mode()
        def run(turn: int) -> np.ndarray:
            x = torch.from_numpy(case.hidden(self.config, turn)).to(self.oracle.dtype)
            return head(norm(x))[0].float().numpy()

        return run

    def answer(self, case: Case) -> Callable[[int], tuple[float, float]]:
        """Runs an answer; gives seconds to its first token, and on average for one after it."""
        assert case.kind == ANSWER

        @torch.inference_mode()
        def run(turn: int) -> tuple[float, float]:
            clock, prompt = Clock(), case.prompt(self.config, turn)
            start = time.perf_counter()
            arguments, _ = self.oracle.arguments(prompt)
            del arguments["position_ids"]  # generate makes its own
            self.network.generate(
                **arguments,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.config.pad_token_id,
                streamer=clock,
            )
            first, *_, last = clock.times[1:]  # the prompt itself comes first
            return first - start, (last - first) / (NEW_TOKENS - 1)

        return run

    @torch.inference_mode()
    def chosen_experts(self, ids: np.ndarray) -> np.ndarray:
        """The experts [Lm, n, k] that one row of ids [n] chooses in a prompt, sorted."""
        with self.oracle.recorder() as recorder:
            self.network(input_ids=torch.from_numpy(ids[None]), use_cache=False, logits_to_keep=1)
        return np.stack([indices.sort(-1).values.numpy() for _, indices, _ in recorder.routers])

    def experts_in_a_batch(self, run: Run, turns: int) -> float:
        """Different experts that a prepared decode case's tokens choose in a layer, on average over layers and turns."""
        counts = []
        for turn in range(turns):
            with self.oracle.recorder() as recorder:
                run(turn)
            counts += [indices.unique().numel() for _, indices, _ in recorder.routers]
        return float(np.mean(counts)) if counts else 0.0


def _trials(run: Callable[[int], object]) -> Iterator[float]:
    """Seconds of the first run if it is slow, and else of two more."""
    for trial in range(3):
        start = time.perf_counter()
        run(trial)
        seconds = time.perf_counter() - start
        if trial or seconds > SLOW:
            yield seconds
        if seconds > SLOW:
            return
