#!/usr/bin/env python
"""Greedy tokens of the bundle that this file lies in, with MindSpore Lite on Ascend.

    python run_lite.py --ids 163587,2482,163601 --new-tokens 32
    python run_lite.py --inputs inputs.npz          (with a picture)

`inputs.npz` holds what the processor gives for one prompt: numpy.savez("inputs.npz", **processor(..., return_tensors="np")).
Needs mindspore_lite with Ascend support, 2.10 or later for bf16 weights, and the package kimi_vl; not MindSpore.
This has run on no device; what its calls rest on is said in kimi_vl/export/lite.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

from kimi_vl.export.lite import LiteGraphs
from kimi_vl.modeling.engine import Engine, Row


def prompt_row(engine: Engine, ids: np.ndarray, pictures: dict[str, np.ndarray]) -> Row:
    """A prompt's tokens, and the features of its pictures in the places that wait for them.

    Raises:
        ValueError: an id is outside the vocabulary, which the device would not notice.
    """
    if ids.min() < 0 or ids.max() >= engine.config.text.vocab_size:
        raise ValueError(
            f"ids from {ids.min()} to {ids.max()}, expected 0 to {engine.config.text.vocab_size - 1}"
        )
    if not pictures:
        return Row(ids)
    features, _ = engine.encode_images(pictures["pixel_values"], pictures["image_grid_hws"])
    places = ids == engine.config.media_placeholder_token_id
    embeds = np.zeros((len(ids), engine.config.text.hidden_size), np.float32)
    embeds[places] = np.concatenate(features)
    return Row(ids, embeds, places)


def greedy(engine: Engine, row: Row, new_tokens: int) -> list[int]:
    """The prompt in chunks of the prefill graph, then token after token through the decode graph."""
    cache = engine.new_cache(1)
    tokens: list[int] = []
    for _ in range(new_tokens):
        (output,) = engine.extend(cache, [row])
        tokens.append(int(output.logits[-1][-1].argmax()))
        row = Row(np.array(tokens[-1:]))
    return tokens


@click.command(context_settings={"show_default": True})
@click.option("--ids", help="Token ids of a prompt, with commas between them.")
@click.option(
    "--inputs", type=click.Path(exists=True), help="An .npz file of the processor's output instead."
)
@click.option("--new-tokens", default=32, type=click.IntRange(min=1))
@click.option(
    "--context", type=int, help="Cache slots: one of the bundle's contexts.  [default: the largest]"
)
@click.option("--device", default=0, help="Number of the Ascend device.")
def main(ids: str | None, inputs: str | None, new_tokens: int, context: int | None, device: int) -> None:
    if (ids is None) == (inputs is None):
        raise click.UsageError("give either --ids or --inputs")
    held = (
        dict(np.load(inputs)) if inputs else {"input_ids": np.array([[int(i) for i in str(ids).split(",")]])}
    )
    graphs = LiteGraphs(Path(__file__).parent, context, device)
    engine = Engine(graphs.config, graphs)
    pictures = {k: held[k] for k in ("pixel_values", "image_grid_hws") if k in held}
    row = prompt_row(engine, held["input_ids"][0], pictures)
    print(",".join(map(str, greedy(engine, row, new_tokens))))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:  # a bundle or a prompt that does not fit
        print(f"run_lite: {e}", file=sys.stderr)
        sys.exit(2)
    except ImportError as e:
        print(f"run_lite: {e.name} is not installed", file=sys.stderr)
        sys.exit(3)
