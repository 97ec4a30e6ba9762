"""Real prompts and drawn pictures for the suite, through the processor of a directory that has one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from .cases import CaseError, Grid, Row, SeededSource, Source, left_padded
from .inputs import PlainPictures

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

# Conversations, in the form of `apply_chat_template`; pictures are drawn. Short, so that a small context holds them.
DIALOGUES: dict[str, list[dict[str, Any]]] = {
    "chinese": [{"role": "user", "content": "天空为什么是蓝色的?请用一句话回答。"}],
    "code": [
        {
            "role": "user",
            "content": "What does it print?\n\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n\nprint(f(10))",
        }
    ],
    "thinking": [  # as the Thinking models answer: the marks are ordinary text
        {"role": "user", "content": "What is 3 times 17?"},
        {"role": "assistant", "content": "◁think▷17 + 17 + 17 = 51.◁/think▷It is 51."},
        {"role": "user", "content": "And twice that?"},
    ],
    "pictures": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is it?"}]},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And in this one?"}]},
    ],
    "system": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which colour has grass?"},
    ],
}

# Whose perplexity is measured; longer than what is taken of them. Changing a letter is another version of the suite.
PASSAGES = {
    "english": (
        "A lighthouse keeper is never quite alone. Every evening he climbs the hundred and twelve steps, lights the lamp "
        "and writes the weather into a book: wind from the north-west, sea moderate, visibility nine miles. Ships pass "
        "far out, and each of them takes the same short sentence with it, one flash every seven seconds, which says no "
        "more than where it is and that somebody keeps it going. In autumn birds fly against the glass, and in the "
        "morning he gathers those that are still alive in his coat and carries them down to the grass on the side where "
        "the wind does not blow. The book has had eleven keepers before him. Their handwriting differs, but what they "
        "wrote is nearly the same, and on the first page somebody has noted that the sea does not read."
    ),
    "chinese": (
        "城外有一条小河,河边住着一位老木匠。他每天清早开门,先扫院子,再把昨天没有做完的椅子搬到树下。村里的孩子放学以后常来看他"
        "干活,问他为什么每一块木头都要先敲一敲。老人笑着说:声音清亮的可以做琴,声音沉闷的可以做桌子,没有哪一块是没有用处的。有一年"
        "夏天下了很大的雨,河水漫过石桥,冲走了他堆在岸边的木料。大家都替他难过,他却沿着河走了三天,一块一块地捡了回来。后来村口修了"
        "一座新桥,桥上的栏杆就是用那些木头做的。直到今天,走过的人还会伸手敲一敲,听一听它的声音,然后想起那位老人和他说过的话。"
        "孩子们长大以后去了很远的地方,回来的时候总要先到桥上站一会儿,看看水,也看看自己。"
    ),
    "code": (
        "def shortest_paths(graph, start):\n"
        '    """Distances from start to every node that can be reached; edges have no negative weight."""\n'
        "    distance = {start: 0}\n"
        "    queue = [(0, start)]\n"
        "    while queue:\n"
        "        so_far, node = heapq.heappop(queue)\n"
        "        if so_far > distance[node]:\n"
        "            continue  # a shorter way was found in the meantime\n"
        "        for neighbour, weight in graph[node].items():\n"
        "            candidate = so_far + weight\n"
        "            if candidate < distance.get(neighbour, math.inf):\n"
        "                distance[neighbour] = candidate\n"
        "                heapq.heappush(queue, (candidate, neighbour))\n"
        "    return distance\n\n\n"
        "if __name__ == '__main__':\n"
        "    roads = {'a': {'b': 7, 'c': 3}, 'b': {'d': 2}, 'c': {'b': 1, 'd': 8}, 'd': {}}\n"
        "    assert shortest_paths(roads, 'a') == {'a': 0, 'c': 3, 'b': 4, 'd': 6}\n"
    ),
}


def has_processor(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("tiktoken.model", "tokenizer_config.json"))


class ProcessorSource:
    """Prompts in the chat format of the directory's own tokenizer; pictures of exactly the grids asked for."""

    kind = "prompts in the chat format and drawn pictures, through the directory's processor"

    def __init__(self, directory: Path, config: ModelConfig, own_pictures: bool = False):
        """`own_pictures`: pixels are made by the directory's image processor, which is judged then, see `inputs`."""
        from ..modeling.processing import KimiVLProcessor

        self.processor: Any = KimiVLProcessor.from_pretrained(directory)
        # A bundle's processor leaves room for padding; plans hold the exact sizes of pictures against the graphs.
        self.processor.image_processor.in_token_limit = sys.maxsize
        if not own_pictures:
            self.processor.image_processor = PlainPictures(directory, config)
        self.config = config

    def inputs(
        self, rows: tuple[Row, ...], rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        prompts, ids, pixels = [], [], []
        grids: list[Grid] = []
        for row in rows:
            drawn = draw_page if row.page else draw
            pictures = [drawn(grid, self.config.vision.patch_size, rng) for grid in row.grids]
            if row.passage:
                text, made = self._passage(row)
            elif row.dialogue:
                text, made = self._conversation(DIALOGUES[row.dialogue], pictures)
            elif row.tokens is None:
                text, made = self._natural(row, pictures, rng)
            else:
                text, made = self._long(row, pictures, rng)
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

    def _passage(self, row: Row) -> tuple[str, dict[str, np.ndarray]]:
        """The text whose first `row.tokens` tokens are the prompt."""
        text = PASSAGES[row.passage]
        ids = np.asarray(self.processor.tokenizer(text)["input_ids"])
        if row.tokens is None or len(ids) < row.tokens:
            raise CaseError(
                f"the passage {row.passage!r} has {len(ids)} tokens, expected at least {row.tokens}"
            )
        return text, {"input_ids": ids[: row.tokens]}

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
        return self._conversation([{"role": "user", "content": content}], pictures)

    def _conversation(
        self, messages: list[dict[str, Any]], pictures: list[Any]
    ) -> tuple[str, dict[str, np.ndarray]]:
        text, made = conversation_inputs(self.processor, messages, pictures)
        return text, made | {"input_ids": made["input_ids"][0]}


def source_for(directory: Path, config: ModelConfig) -> Source:
    """Where a checkpoint's cases come from: its processor, or seeded ids and patches where it has none."""
    return ProcessorSource(directory, config) if has_processor(directory) else SeededSource(config)


def conversation_inputs(
    processor: Any, messages: list[dict[str, Any]], pictures: list[Any]
) -> tuple[str, dict[str, np.ndarray]]:
    """A conversation as text, and what the processor makes of it and its pictures, a batch of one row."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    made = processor(text=text, images=pictures or None, return_tensors="np")
    return text, {name: np.asarray(value) for name, value in made.items()}


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


def draw_page(grid: Grid, patch: int, rng: np.random.Generator) -> Any:
    """A PIL picture of exactly `grid` patches: a printed page of two columns of text, with a table and a figure."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = grid[0] * patch, grid[1] * patch
    page = Image.new("RGB", (width, height), (252, 250, 245))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default_imagefont()
    words = [word for word in TEXT.split() if word.isascii()]
    margin, line, row = 8, 12, 18  # pixels
    middle = width // 2
    figure, table = (
        height // 3,
        height * 2 // 3,
    )  # the end of one at the left, the top of the other at the right

    def column(left: int, right: int, top: int, bottom: int) -> None:
        for y in range(top, bottom - line, line):
            text = more = ""
            while font.getlength(more) < right - left:
                text, more = more, f"{more} {words[int(rng.integers(len(words)))]}".strip()
            pen.text((left, y), text, fill=(20, 20, 30), font=font)

    column(margin, middle - margin, figure + margin, height - margin)
    column(middle, width - margin, margin, table - margin)
    page.paste(draw((max(1, grid[0] // 3 - 1), max(1, grid[1] // 2 - 1)), patch, rng), (margin, margin))
    for y in range(table, height - margin, row):
        pen.line((middle, y, width - margin, y), fill=(90, 90, 90))
        for x in range(middle, width - margin - 2 * row, 3 * row):
            pen.text((x + 2, y + 3), str(rng.integers(10000)), fill=(20, 20, 30), font=font)
    return page
