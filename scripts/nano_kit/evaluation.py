"""Judges a network on held-out questions: the share of whole answers that are exactly right, per kind.

In the Torch reference one forward pass over question and answer replaces the generation: greedy generation gives the
right answer exactly when the most likely token is the right one at every place of the answer and its end mark.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Kimi_K25ForConditionalGeneration

from .chat import Encode, generator, load_vocabulary, make_batch
from .network import run
from .questions import KINDS, SIDES, Conversation, ask

Jobs = list[tuple[str, tuple[int, int]]]
Judge = Callable[[list[Conversation]], np.ndarray]
"""Which of the conversations, of one turn each and equal picture sizes, are answered exactly right, [B] bool."""


def jobs() -> Jobs:
    """Every kind of question with every size of picture."""
    return [(kind, (h, w)) for kind in KINDS for h, w in itertools.product(SIDES, SIDES)]


def held_out(kind: str, grid: tuple[int, int], n: int) -> list[Conversation]:
    """`n` single questions; their random generators are never those of training."""
    return [ask(generator("held out", kind, grid, i), grid, kind) for i in range(n)]


@torch.no_grad()
def right_answers(
    network: Kimi_K25ForConditionalGeneration, encode: Encode, conversations: list[Conversation]
) -> np.ndarray:
    """Which of the conversations' answers are exactly right, [B] bool; all pictures are of one size."""
    batch = make_batch(encode, conversations)
    best = run(network, batch)[0].argmax(-1).numpy()
    asked = batch.weights[:, 1:] > 0
    return ((best[:, :-1] == batch.ids[:, 1:]) | ~asked).all(1)


def torch_judge(directory: Path) -> Judge:
    """A model directory in the Torch reference."""
    from kimi_vl.verify.oracle import build_oracle

    network, encode = build_oracle(directory).network, load_vocabulary(directory / "tiktoken.model")
    return lambda conversations: right_answers(network, encode, conversations)


def mindspore_judge(directory: Path, most_tokens: int = 80) -> Judge:
    """A model directory in this project's own network: processor, greedy generation, decoding."""
    from kimi_vl import KimiVLForConditionalGeneration, KimiVLProcessor

    model = KimiVLForConditionalGeneration.from_pretrained(str(directory))
    processor = KimiVLProcessor.from_pretrained(str(directory))

    def answer(conversation: Conversation) -> str:
        content = [{"type": "image"} for _ in conversation.pictures]
        content.append({"type": "text", "text": conversation.turns[0].question})
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [picture.image for picture in conversation.pictures] or None
        inputs = processor(text=text, images=images, return_tensors="np")
        ids = model.generate(**inputs, max_new_tokens=most_tokens, do_sample=False)
        return processor.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return lambda conversations: np.array([answer(c) == c.turns[0].answer for c in conversations])
