"""Real prompts and drawn pictures for the suite, through the processor of a directory that has one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from .cases import CaseError, Grid, Row, left_padded

# Asked where a prompt may have its natural length; by number of pictures.
QUESTIONS = {
    0: ("What is 3 plus 4?", "你好!", "Who are you?", "What colour is the sky?"),
    1: ("Describe the picture.", "What shape is it?", "描述图片。"),
    2: ("Which picture has more shapes?", "How many shapes are in the first picture?"),
}
# Where a length is asked for: prose, figures, code and Chinese, as much of it as needed.
TEXT = (
    "A printed page holds words in two columns and a picture with a caption below . In 1927 , 4,096 visitors paid "
    "$12.50 each for a ticket . def area(w, h): return w * h # in metres . 图中有三个红色的圆形 。 The table lists "
    "names , dates and totals ; the last row is empty . 第二行写着数字 270 。 for i in range(10): print(i) . Which of "
    "these shapes is the largest , and where does it stand ? https://example.org/a?b=c&d=%20 . naïve café Ωmega 🙂 ."
)


def has_processor(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("tiktoken.model", "tokenizer_config.json"))


class ProcessorSource:
    """Prompts in the chat format of the directory's own tokenizer; pictures of exactly the grids asked for."""

    kind = "prompts in the chat format and drawn pictures, through the directory's processor"

    def __init__(self, directory: Path, config: ModelConfig):
        from ..modeling.processing import KimiVLProcessor

        self.processor: Any = KimiVLProcessor.from_pretrained(directory)
        # A bundle's processor leaves room for padding; plans hold the exact sizes of pictures against the graphs.
        self.processor.image_processor.in_token_limit = sys.maxsize
        self.config = config

    def inputs(
        self, rows: tuple[Row, ...], rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        prompts, ids, pixels = [], [], []
        grids: list[Grid] = []
        for row in rows:
            pictures = [draw(grid, self.config.vision.patch_size, rng) for grid in row.grids]
            text, made = (
                self._natural(row, pictures, rng) if row.tokens is None else self._long(row, pictures, rng)
            )
            prompts.append(text)
            ids.append(made["input_ids"])
            if pictures:
                found = [tuple(grid) for grid in made["image_grid_hws"].tolist()]
                if found != list(row.grids):
                    raise CaseError(f"the processor makes pictures of {list(row.grids)} patches into {found}")
                pixels.append(made["pixel_values"])
                grids += row.grids
        arrays = left_padded(ids, self.config.pad_token_id)
        if grids:
            arrays["pixel_values"] = np.concatenate(pixels).astype(np.float32)
            arrays["image_grid_hws"] = np.array(grids, np.int64)
        return arrays, tuple(prompts)

    def _natural(
        self, row: Row, pictures: list[Any], rng: np.random.Generator
    ) -> tuple[str, dict[str, np.ndarray]]:
        questions = QUESTIONS[min(len(pictures), 2)]
        return self._made([], pictures, [questions[int(rng.integers(len(questions)))]])

    def _long(
        self, row: Row, pictures: list[Any], rng: np.random.Generator
    ) -> tuple[str, dict[str, np.ndarray]]:
        """A prompt cut to exactly `row.tokens`, its first picture across `row.split_at`."""
        assert row.tokens is not None
        corpus = TEXT.split()
        start = int(rng.integers(len(corpus)))
        words = [corpus[(start + i) % len(corpus)] for i in range(row.tokens)]  # a word is a token at least
        media = self.config.media_placeholder_token_id
        before = 0
        text, made = self._made([], pictures, words)
        if pictures and row.split_at is not None:
            # The last number of words that leaves the picture's first token before the border.
            for count in range(1, row.tokens):
                longer = self._made(words[:count], pictures, words)
                if int((longer[1]["input_ids"] == media).argmax()) >= row.split_at:
                    break
                before, (text, made) = count, longer
        ids = made["input_ids"][: row.tokens]
        if len(ids) < row.tokens or (made["input_ids"][row.tokens :] == media).any():
            raise CaseError(f"{row.tokens} tokens do not hold the pictures after {before} words")
        return text, made | {"input_ids": ids}

    def _made(
        self, before: list[str], pictures: list[Any], after: list[str]
    ) -> tuple[str, dict[str, np.ndarray]]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
        if before:
            content.insert(0, {"type": "text", "text": " ".join(before) + " "})
        content.append({"type": "text", "text": " ".join(after)})
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        made = dict(self.processor(text=text, images=pictures or None, return_tensors="np"))
        return text, {k: np.asarray(v) for k, v in made.items()} | {
            "input_ids": np.asarray(made["input_ids"])[0]
        }


def draw(grid: Grid, patch: int, rng: np.random.Generator) -> Any:
    """A PIL picture of exactly `grid` patches: coloured shapes on a plain ground."""
    from PIL import Image, ImageDraw

    height, width = grid[0] * patch, grid[1] * patch
    ground, *colours = ([int(c) for c in rng.integers(0, 256, 3)] for _ in range(5))
    picture = Image.new("RGB", (width, height), tuple(ground))
    pen = ImageDraw.Draw(picture)
    for i, colour in enumerate(colours):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        r = rng.uniform(0.15, 0.45) * min(width, height)
        shape = pen.ellipse if i % 2 else pen.rectangle
        shape((x - r, y - r, x + r, y + r), fill=tuple(colour))
    return picture
