"""Generated pictures: a few coloured shapes, or a number or word, on a plain ground.

A picture has cells of 28 x 28 pixels, what one media token of the network sees. A shape lies within one cell, and a
glyph has 14 columns to itself. That is what makes the pictures learnable in half an hour on two processor cores.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PATCH = 14
CELL = 2 * PATCH

Rgb = tuple[int, int, int]

COLOURS: dict[
    str, tuple[Rgb, Rgb]
] = {  # a fill lies between the two, so that a paint program's colours do too
    "red": ((220, 40, 40), (255, 0, 0)),
    "green": ((40, 160, 60), (0, 128, 0)),
    "blue": ((40, 80, 220), (0, 0, 255)),
    "yellow": ((240, 215, 30), (255, 255, 0)),
    "purple": ((135, 50, 180), (128, 0, 128)),
    "orange": ((245, 135, 20), (255, 150, 0)),
    "pink": ((250, 150, 190), (255, 180, 200)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
WORDS = (
    *("cat", "dog", "sun", "car", "tree", "fish", "bird", "moon", "star", "milk"),
    *("rain", "book", "blue", "home", "ship", "king", "lamp", "ring", "frog", "wolf"),
)
SHAPE_COUNTS = {"easy": (1, 2, 2), "usual": (1, 2, 2, 3, 3, 4), "full": (1, 2, 3, 3, 4, 4)}
MAX_SHAPES = 4
GROUNDS = ((255, 255, 255), (215, 215, 215), (50, 50, 50), (0, 0, 0))
DARK_INKS = ((20, 20, 20), (190, 30, 30), (30, 60, 180))
LIGHT_INKS = ((255, 255, 255), (250, 220, 60), (120, 230, 140))
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"
FONTS = tuple(ImageFont.load_default(size) for size in range(17, 22))

LABELS = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(GLYPHS))
"""Classes of the three label planes of :class:`Picture`; class 0 is "nothing here"."""


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str


@dataclass(frozen=True)
class Picture:
    """`image` with what it shows: shapes in reading order, or `text` (digits or a word).

    `labels` [grid rows, grid columns, 3] int64 says what begins at each patch of the padded picture: shape kind and
    colour at the first patch of its cell, a glyph at its upper patch. They are for training only.
    """

    image: Image.Image
    shapes: tuple[Shape, ...]
    text: str
    labels: np.ndarray


def draw_picture(rng: random.Random, grid: tuple[int, int], shows: str, level: str = "usual") -> Picture:
    """A picture that fills `grid` (patch rows, patch columns; even) once it is padded.

    Args:
        shows: "shapes", "number" or "word".
        level: one of `SHAPE_COUNTS`; an "easy" number has at most two digits.
    """
    rows, columns = grid[0] * PATCH, grid[1] * PATCH
    height, width = rows, columns
    if rng.random() < 0.4:  # to be padded
        height, width = (max(46, side - rng.randrange(CELL)) for side in (rows, columns))
    ground = rng.choice(GROUNDS)
    image = Image.new("RGB", (width, height), _near(rng, ground))
    draw = ImageDraw.Draw(image)
    labels = np.zeros((*grid, len(LABELS)), np.int64)
    if shows == "shapes":
        return Picture(image, _draw_shapes(rng, draw, labels, (height, width), level), "", labels)
    ink = rng.choice(DARK_INKS if ground[0] > 100 else LIGHT_INKS)
    most = width // PATCH
    if shows == "word":
        text = rng.choice([word for word in WORDS if len(word) <= most])
    else:
        digits = min(rng.choice([1, 1, 2] if level == "easy" else [1, 2, 2, 3, 3, 4, 4]), most)
        text = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    _draw_text(rng, draw, labels, (height, width), text, ink)
    return Picture(image, (), text, labels)


def patches(picture: Picture) -> np.ndarray:
    """The picture as the published image processing hands it on: [rows * columns, 3, 14, 14] float32.

    Zeros at the right and the bottom up to a multiple of 28 pixels, then (x / 255 - 0.5) / 0.5, row-major patches.
    """
    rows, columns = picture.labels.shape[:2]
    pixels = np.zeros((rows * PATCH, columns * PATCH, 3), np.uint8)
    pixels[: picture.image.height, : picture.image.width] = np.asarray(picture.image)
    cut = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH)
    return (cut.astype(np.float32) / 255 - 0.5) / 0.5


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, fill: Rgb) -> None:
    """One shape of `kind` around (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        draw.ellipse(box, fill=fill)
    elif kind == "square":
        draw.rectangle(box, fill=fill)
    elif kind == "cross":
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=fill)
        draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=fill)
    else:
        spokes = [radius] * 3 if kind == "triangle" else [radius, 0.42 * radius] * 5
        angles = [2 * math.pi * i / len(spokes) for i in range(len(spokes))]
        draw.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(spokes, angles)], fill=fill)


def _draw_shapes(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    labels: np.ndarray,
    size: tuple[int, int],
    level: str,
) -> tuple[Shape, ...]:
    cells = [(i, j) for i in range(size[0] // CELL) for j in range(size[1] // CELL)]
    n = min(rng.choice(SHAPE_COUNTS[level]), len(cells))
    if rng.random() < 0.5:
        kinds = rng.sample(SHAPES, n)  # all differ: colours can be asked by shape
    else:
        pool = rng.sample(SHAPES, rng.choice([1, 2, 2, 3]))
        kinds = [rng.choice(pool) for _ in range(n)]
    shapes = []
    for kind, (i, j) in zip(kinds, sorted(rng.sample(cells, n))):
        colour = rng.choice(list(COLOURS))
        radius = rng.uniform(8, 12)
        slack = min(4, CELL / 2 - radius)
        x, y = (CELL * k + CELL / 2 + rng.uniform(-slack, slack) for k in (j, i))
        share = rng.random()
        mixed = [round(a + share * (b - a)) for a, b in zip(*COLOURS[colour])]
        draw_shape(draw, kind, x, y, radius, _near(rng, (mixed[0], mixed[1], mixed[2])))
        labels[2 * i, 2 * j, :2] = 1 + SHAPES.index(kind), 1 + list(COLOURS).index(colour)
        shapes.append(Shape(kind, colour))
    return tuple(shapes)


def _draw_text(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    labels: np.ndarray,
    size: tuple[int, int],
    text: str,
    ink: Rgb,
) -> None:
    i, j = rng.randrange(size[0] // CELL), rng.randrange(size[1] // PATCH - len(text) + 1)
    font, shift = rng.choice(FONTS), rng.uniform(-2, 2)
    for k, glyph in enumerate(text, j):
        x, y = PATCH * k + PATCH / 2 + rng.uniform(-1, 1), CELL * i + CELL / 2 + shift
        draw.text((x, y), glyph, fill=ink, font=font, anchor="mm")
        labels[2 * i, k, 2] = 1 + GLYPHS.index(glyph)


def _near(rng: random.Random, colour: Rgb) -> Rgb:
    r, g, b = (min(255, max(0, value + rng.randint(-12, 12))) for value in colour)
    return r, g, b
