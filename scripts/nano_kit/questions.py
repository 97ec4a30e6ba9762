"""Questions about generated pictures with their answers, in English and Chinese, and whole conversations."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .pictures import COLOURS, MAX_SHAPES, SHAPES, WORDS, Picture, Shape, draw_picture

SIDES = (4, 6, 8, 10)
"""Patch rows and columns that pictures have after padding: sides of 56 to 140 pixels."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": ("What shape is it?", "What shape is this?"),
    "shape_zh": ("这是什么形状?", "图中是什么形状?"),
    "colour": ("What colour is the {}?", "What color is the {}?"),
    "colour_zh": ("{}是什么颜色?", "{}的颜色是什么?"),
    "count_all": ("How many shapes are there?", "How many shapes are in the picture?"),
    "count_all_zh": ("有几个图形?", "图中有几个图形?"),
    "count_kind": ("How many {} are there?", "How many {} are in the picture?"),
    "count_kind_zh": ("有几个{}?", "图中有几个{}?"),
    "number": ("What number is written?", "What number is it?"),
    "number_zh": ("图中写的数字是什么?", "这是什么数字?"),
    "word": ("What word is written?", "What word is it?"),
    "word_zh": ("图中写的单词是什么?", "这是什么单词?"),
    "describe": ("Describe the picture.", "Describe this image in detail.", "What is in the picture?"),
    "describe_zh": ("描述图片。", "请描述这张图片。"),
    "describe_text": ("Describe the picture.", "Describe this image in detail.", "What is in the picture?"),
    "compare": ("Which picture has more shapes?",),
    "compare_count": ("How many shapes are in the {} picture?",),
}
KINDS = (*QUESTIONS, "text")
"""Every kind of question; "text" needs no picture."""

ZH_COLOURS = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "粉色")))
ZH_SHAPES = dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形")))
COUNTS = ("no", "one", "two", "three", "four")[: MAX_SHAPES + 1]
ZH_COUNTS = "零一两三四"[: MAX_SHAPES + 1]
SMALL_TALK = (
    ("Who are you?", "I am a very small Kimi."),
    ("你是谁?", "我是很小的Kimi。"),
    ("Hello!", "Hello! How can I help you?"),
    ("你好!", "你好!"),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("天空是什么颜色?", "天空是蓝色的。"),
)
SUMS = tuple((a, b) for a in range(10) for b in range(10))


Cells = tuple[tuple[int, int], ...]
"""Cells of 28 x 28 pixels, (row, column)."""


class Look(NamedTuple):
    """Where in picture number `picture` one has to look to say what stands at character `at` of an answer.

    With `counts`, what is said is how many cells there are, so there may be none.
    """

    at: int
    cells: Cells
    counts: bool = False
    picture: int = 0


@dataclass(frozen=True)
class Turn:
    """A question of one of `KINDS` and its answer.

    `telling` is the part of the answer, (start, end), that has to be found out; the rest follows from the question.
    """

    kind: str
    question: str
    answer: str
    telling: tuple[int, int]
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Pictures and turns about them. The pictures belong to the first turn."""

    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]


def converse(
    rng: random.Random, grid: tuple[int, int], most_turns: int = 5, level: str = "usual"
) -> Conversation:
    """A conversation for training, of a random kind; its pictures fill `grid` patches.

    Most conversations keep descriptions for the end, so that look-ups cannot be answered from their text; at level
    "full" most begin with them instead.
    """
    chance = rng.random()
    if chance < 0.04:
        return Conversation((), tuple(rng.sample(_TEXT_TURNS, 2)))
    if chance < (0.08 if level == "easy" else 0.14):
        pair = draw_picture(rng, grid, "shapes", level), draw_picture(rng, grid, "shapes", level)
        return Conversation(pair, tuple(_compare(rng, *pair)))
    picture = draw_picture(rng, grid, rng.choice(("shapes",) * 5 + ("number", "number", "word")), level)
    turns = list(turns_about(rng, picture))
    rng.shuffle(turns)
    if rng.random() < 0.6:
        turns.sort(key=lambda turn: turn.kind.startswith("describe") != (level == "full"))
    return Conversation((picture,), tuple(turns[:most_turns]))


def ask(rng: random.Random, grid: tuple[int, int], kind: str) -> Conversation:
    """A conversation of one turn, a question of `kind`."""
    if kind == "text":
        return Conversation((), (rng.choice(_TEXT_TURNS),))
    if kind.startswith("compare"):
        pair = draw_picture(rng, grid, "shapes"), draw_picture(rng, grid, "shapes")
        return Conversation(pair, tuple(turn for turn in _compare(rng, *pair) if turn.kind == kind))
    topic = kind.removesuffix("_zh")
    if topic == "describe_text":
        topic = rng.choice(("number", "word"))
    while True:
        picture = draw_picture(rng, grid, topic if topic in ("number", "word") else "shapes")
        if turns := [turn for turn in turns_about(rng, picture) if turn.kind == kind]:
            return Conversation((picture,), (rng.choice(turns),))


def fragments() -> Iterator[str]:
    """The pieces that questions and answers are put together from, each as it stands in a text.

    What answers turn on comes many times, so that a small vocabulary spends its ranks on whole such words.
    """
    telling = [" " + word for word in (*COLOURS, *SHAPES, *(_plural(kind) for kind in SHAPES), *COUNTS)]
    telling += [*ZH_COLOURS.values(), *ZH_SHAPES.values(), *ZH_COUNTS]
    yield from telling * 20
    yield from [" " + word for word in WORDS] * 10
    templates = [text for variants in QUESTIONS.values() for text in variants]
    templates += [*_ANSWERS.values(), *(text for pair in SMALL_TALK for text in pair), _SUM, _SUM_ANSWER]
    for template in templates:
        yield from template.split("{}")
    common = (" an", " and", ",", " shape", " shapes", " first", " second", " number", " word", " more")
    yield from (*common, "图形", "、", "没有") * 20


_ANSWERS = {
    "shape": "It is a {}.",
    "shape_zh": "这是{}。",
    "colour": "The {} is {}.",
    "colour_zh": "{}是{}的。",
    "count": "There are {} {}.",
    "count one": "There is one {}.",
    "count_zh": "有{}个{}。",
    "count_zh none": "没有{}。",
    "number": "The number is {}.",
    "number_zh": "数字是{}。",
    "word": "The word is {}.",
    "word_zh": "单词是{}。",
    "describe": "There are {}.",
    "describe one": "There is {}.",
    "describe_zh": "图中有{}。",
    "describe_text": "The picture shows the {} {}.",
    "more": "The {} picture has more shapes.",
    "as many": "Both pictures have the same number of shapes.",
}
_SUM, _SUM_ANSWER = "What is {} plus {}?", "{} plus {} is {}."


def _turn(rng: random.Random, kind: str, asked: tuple, template: str, *fillers: object) -> Turn:
    answer = template.format(*fillers)
    if kind.startswith(("count", "compare")):
        telling = (0, len(answer))  # "is" or "are" tells already
    elif kind.startswith("describe"):
        telling = (0, 0)  # many words and easy ones; no need to stress them
    else:
        end = len(answer) - len(template.rpartition("{}")[2])
        telling = (end - len(str(fillers[-1])), end)
    return Turn(kind, rng.choice(QUESTIONS[kind]).format(*asked), answer, telling)


_TEXT_TURNS = [Turn("text", question, answer, (0, 0)) for question, answer in SMALL_TALK] + [
    Turn("text", _SUM.format(a, b), _SUM_ANSWER.format(a, b, a + b), (0, 0)) for a, b in SUMS
]


def _plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


def turns_about(rng: random.Random, picture: Picture) -> Iterator[Turn]:
    """Every question that may be asked about one picture; look-ups by kind of shape in one language each."""
    if picture.text:
        kind, zh = ("number", "number_zh") if picture.text.isdigit() else ("word", "word_zh")
        for turn in (
            _turn(rng, kind, (), _ANSWERS[kind], picture.text),
            _turn(rng, zh, (), _ANSWERS[zh], picture.text),
            _turn(rng, "describe_text", (), _ANSWERS["describe_text"], kind, picture.text),
        ):
            yield _with_looks(turn, _glyph_looks(turn.answer, picture))
        return
    shapes, cells = picture.shapes, shape_cells(picture)
    kinds = [shape.kind for shape in shapes]
    many = "describe" if len(shapes) > 1 else "describe one"
    turn = _turn(rng, "describe", (), _ANSWERS[many], _listed(shapes))
    words = [(shape.colour, shape.kind) for shape in shapes]
    yield _with_looks(turn, _listed_looks(turn.answer, words, cells))
    words = [(ZH_COLOURS[shape.colour], ZH_SHAPES[shape.kind]) for shape in shapes]
    turn = _turn(rng, "describe_zh", (), _ANSWERS["describe_zh"], "、".join(f"{c}的{k}" for c, k in words))
    yield _with_looks(turn, _listed_looks(turn.answer, words, cells))
    if len(shapes) == 1:
        yield _looking(_turn(rng, "shape", (), _ANSWERS["shape"], kinds[0]), cells)
        yield _looking(_turn(rng, "shape_zh", (), _ANSWERS["shape_zh"], ZH_SHAPES[kinds[0]]), cells)
    for shape, cell in zip(shapes, cells):
        if kinds.count(shape.kind) == 1:
            if rng.random() < 0.5:
                turn = _turn(rng, "colour", (shape.kind,), _ANSWERS["colour"], shape.kind, shape.colour)
            else:
                name, colour = ZH_SHAPES[shape.kind], ZH_COLOURS[shape.colour]
                turn = _turn(rng, "colour_zh", (name,), _ANSWERS["colour_zh"], name, colour)
            yield _looking(turn, (cell,))
    there = sorted(set(kinds))
    absent = [kind for kind in SHAPES if kind not in kinds]
    for kind in [*rng.sample(there, min(2, len(there))), *rng.sample(absent, rng.random() < 0.4)]:
        found = tuple(cell for cell, other in zip(cells, kinds) if other == kind)
        if rng.random() < 0.5:
            turn = _turn(rng, "count_kind", (_plural(kind),), *_counted(len(found), kind, _plural(kind)))
        else:
            name = ZH_SHAPES[kind]
            turn = _turn(rng, "count_kind_zh", (name,), *_counted_zh(len(found), name))
        yield _counting(turn, found)
    if rng.random() < 0.5:
        turn = _turn(rng, "count_all", (), *_counted(len(shapes), "shape", "shapes"))
    else:
        turn = _turn(rng, "count_all_zh", (), *_counted_zh(len(shapes), "图形"))
    yield _counting(turn, cells)


def shape_cells(picture: Picture) -> Cells:
    """The cells of the picture's shapes, in their order."""
    return tuple((int(i) // 2, int(j) // 2) for i, j in np.argwhere(picture.labels[..., 0]))


def _compare(rng: random.Random, first: Picture, second: Picture) -> list[Turn]:
    a, b = len(first.shapes), len(second.shapes)
    more = (_ANSWERS["as many"],) if a == b else (_ANSWERS["more"], "first" if a > b else "second")
    which, n = rng.choice((("first", a), ("second", b)))
    counted = _turn(rng, "compare_count", (which,), *_counted(n, "shape", "shapes"))
    picture = ("first", "second").index(which)
    counted = _counting(counted, shape_cells((first, second)[picture]), picture)
    return rng.sample([_turn(rng, "compare", (), *more), counted], 2)


def _with_looks(turn: Turn, looks: Iterable[Look]) -> Turn:
    return replace(turn, looks=tuple(looks))


def _looking(turn: Turn, cells: Cells) -> Turn:
    return _with_looks(turn, [Look(turn.telling[0], cells)])


def _counting(turn: Turn, cells: Cells, picture: int = 0) -> Turn:
    """The number tells at its own place and before it, in "is" or "are", in 有 or 没有."""
    at = (0, 1)
    for beginning in ("There is ", "There are "):
        if turn.answer.startswith(beginning):
            at = (len("There "), len(beginning))
    return _with_looks(turn, [Look(i, cells, True, picture) for i in at])


def _listed_looks(answer: str, words: list[tuple[str, str]], cells: Cells) -> Iterator[Look]:
    at = 0
    for pair, cell in zip(words, cells):
        for word in pair:
            at = answer.index(word, at)
            yield Look(at, (cell,))


def _glyph_looks(answer: str, picture: Picture) -> Iterator[Look]:
    cells = tuple((int(i) // 2, int(j) // 2) for i, j in np.argwhere(picture.labels[..., 2]))
    at = answer.rindex(picture.text)
    if picture.text.isdigit():  # a token per digit
        yield from (Look(at + k, (cell,)) for k, cell in enumerate(cells))
    else:
        yield Look(at, tuple(dict.fromkeys(cells)))


def _counted(n: int, one: str, many: str) -> tuple[str, ...]:
    return (_ANSWERS["count one"], one) if n == 1 else (_ANSWERS["count"], COUNTS[n], many)


def _counted_zh(n: int, name: str) -> tuple[str, ...]:
    return (_ANSWERS["count_zh none"], name) if n == 0 else (_ANSWERS["count_zh"], ZH_COUNTS[n], name)


def _listed(shapes: tuple[Shape, ...]) -> str:
    parts = [f"{'an' if shape.colour == 'orange' else 'a'} {shape.colour} {shape.kind}" for shape in shapes]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
