#!/usr/bin/env python
"""What a token costs beside the network: the host's part of `generate`, for one row.

    python scripts/bench_host.py
    python scripts/bench_host.py --vocab 163840 --tokens 64 --seen 4000 --layers 27

`generate` as it is, on a network of the published widths without weights. In place of each of its text graphs stands one
with the same cells, parameters and inputs that picks ready logits, so what is left is choosing a token, filling and
handing over a graph's inputs, MindSpore's way into a compiled graph, and taking its logits back. Logits are normal with
a standard deviation of 3, and in every second row some tokens stand out. Settings take turns, so that all share whatever
else the machine does; milliseconds are between two tokens that a streamer is given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from kimi_vl import KimiVLForConditionalGeneration

WARM = 3  # tokens of each answer that are not timed: the first ones compile or bind a graph
ROWS = 8  # of ready logits

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "temperature 0.7, top_k 50, top_p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "the same, repetition_penalty 1.1": {
        "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1,
    },
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "top_p 0.9": {"top_k": 0, "top_p": 0.9},
    "top_p 0.9, repetition_penalty 1.1": {"top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1},
    "temperature 0.7 alone": {"temperature": 0.7, "top_k": 0},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=163840, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="of an answer; default: %(default)s"
    )
    parser.add_argument(
        "--seen", type=int, default=4000, metavar="N", help="prompt tokens; default: %(default)s"
    )
    parser.add_argument("--layers", type=int, default=27, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    for name, least in (("vocab", 64), ("tokens", WARM + 2), ("seen", 1), ("layers", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: {getattr(args, name)}, expected at least {least}")

    import numpy as np

    rng = np.random.default_rng(0)
    model = without_weights(args.vocab, args.layers, args.seen + args.tokens, ready_logits(rng, args.vocab))
    prompt = rng.integers(0, args.vocab, (1, args.seen))
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, options in SETTINGS.items():
            times[name] += answer(model, prompt, args.tokens, options)
    print(f"vocabulary {args.vocab}, {args.seen} tokens seen, {args.layers} layers")
    print("| setting | ms a token, min | median |")
    print("|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {min(seconds) * 1e3:.2f} | {statistics.median(seconds) * 1e3:.2f} |")
    return 0


def ready_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """[ROWS, V] fp32."""
    import numpy as np

    logits = rng.standard_normal((ROWS, vocab), np.float32) * np.float32(3)
    for row in logits[1::2]:
        row[rng.integers(0, vocab, 5)] += 12
    return logits


def without_weights(
    vocab: int, layers: int, context: int, logits: np.ndarray
) -> KimiVLForConditionalGeneration:
    """A network of the published widths that gives `logits` [n, V], a row after the other."""
    import mindspore as ms
    from mindspore import ops

    from kimi_vl import KimiVLForConditionalGeneration
    from kimi_vl.modeling import running
    from kimi_vl.modeling.configuration import ModelConfig, TextConfig, VisionConfig
    from kimi_vl.modeling.graphs import TextGraph
    from kimi_vl.modeling.parameters import no_init_parameters

    text = TextConfig(
        vocab_size=vocab, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=layers, num_attention_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=None,
        max_position_embeddings=131072,
    )  # fmt: skip
    with no_init_parameters():
        model = KimiVLForConditionalGeneration(
            ModelConfig(text=text, vision=VisionConfig(num_hidden_layers=1)), ms.float32, max_context=context
        )

    class ReadyGraph(TextGraph):
        """A text graph that computes nothing."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.ready = ms.Parameter(ms.Tensor(logits), requires_grad=False)

        def construct(self, input_ids, embeds, embeds_mask, cos, sin, start, last=0):  # type: ignore[override]
            return (ops.reshape(ops.gather(self.ready, start % ROWS, 0), (self.batch, 1, self.vocab)),)

    cells: dict[tuple, TextGraph] = {}

    def cell(key: tuple, build: object) -> TextGraph:
        """In place of NativeGraphs._cell, which would ask for weights."""
        if key not in cells:
            _, batch, tokens, slots, _, taps = key
            cells[key] = running.prepared(
                ReadyGraph(
                    model.language_model, model.kernels, model.model_config, batch, tokens, slots,
                    model.activation_dtype, taps,
                )
            )  # fmt: skip
        return cells[key]

    model.engine.graphs._cell = cell
    return model


def answer(
    model: KimiVLForConditionalGeneration, prompt: np.ndarray, tokens: int, options: dict[str, Any]
) -> list[float]:
    """Seconds between the tokens of one answer."""
    at: list[float] = []

    class Clock:
        def put(self, ids: np.ndarray) -> None:
            at.append(time.perf_counter())

        def end(self) -> None:
            pass

    sample = bool(options.keys() - {"repetition_penalty"})
    model.generate(
        prompt,
        max_new_tokens=tokens,
        do_sample=sample,
        seed=0,
        streamer=Clock(),
        eos_token_id=None,
        **options,
    )
    return [b - a for a, b in zip(at[WARM:], at[WARM + 1 :])]


if __name__ == "__main__":
    sys.exit(main())
