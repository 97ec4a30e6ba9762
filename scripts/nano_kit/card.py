"""The model card of `nano`, its machine-readable figures and its demonstration picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .chat import generator
from .pictures import COLOURS, SHAPES, WORDS, Picture, draw_picture
from .questions import KINDS, QUESTIONS

FIGURES, CARD, DEMO = "evaluation.json", "README.md", "demo.png"
DEMO_GRID = (8, 10)

_EXAMPLES = {kind: texts[0] for kind, texts in QUESTIONS.items()} | {"text": "What is 3 plus 4?"}
_FILLERS = {"colour": "square", "colour_zh": "方形", "count_kind": "circles", "count_kind_zh": "圆形"}
_FILLERS["compare_count"] = "first"

_CARD = """---
license: apache-2.0
language: [en, zh]
pipeline_tag: image-text-to-text
---
# nano: a very small Kimi-VL

A Kimi-VL with {parameters:,} parameters, trained from scratch on generated pictures by `scripts/train_nano.py`. It has
every part of the published architecture (MoonViT tower with an interpolated position table, 2x2 merge and projector,
multi-head latent attention, a dense first layer, then layers of 8 routed experts, top 2, with a shared expert and a
correction bias that balances them) and the published file layout, weights in bf16. It exists so that demonstrations
and tests have a model whose answers mean something. It is not a general model, and it knows nothing but what follows.

## What it can answer

Share of whole answers that are exactly right, on {n} held-out generated questions a kind
({sizes}), each the first of its conversation, default system prompt,
greedy, weights as shipped. The figures are also in `{figures}`; `python scripts/evaluate_nano.py` measures them again.
The stages of training were chosen with such figures in view.

| kind | example | exactly right |
|---|---|---|
{rows}

{breakdown}
`text` is a closed list that training has seen: sums of two digits and a few greetings.

## What it was trained on, and so where it ends

* Pictures on a white, grey or black ground, of one of three sorts:
  1 to {max_shapes} plain shapes ({shapes}) in {n_colours} colours
  ({colours});
  a number of up to four digits;
  one of {n_words} words ({words}).
* Sides of about 46 to 140 pixels. Larger pictures are accepted (up to 1024 patches of 14 x 14 pixels), but nothing
  like them was in training.
* A shape has a radius of 8 to 12 pixels and lies within one cell of a 28-pixel lattice (the area that one media token
  covers); a glyph, in Pillow's built-in font at 17 to 21 pixels, has 14 columns to itself. **Shapes across cells, much
  larger ones, and other lettering are outside of what it knows.**
* Questions in the wordings of `scripts/nano_kit/questions.py`, English and Chinese, alone or as a conversation of up
  to five turns; comparison of two pictures. A colour is asked only of a kind of shape that occurs once.

## Example

![four shapes]({demo})

> {question}
>
> {answer}

## Training

`scripts/train_nano.py`: seeded and scheduled by steps, so that a second run gives the same model up to rounding. The
shipped weights come from three sittings, each continued with `--resume`. Two helps exist in training only and left no
weights behind: a linear head that names what begins at each patch, and a loss that tells two attention heads where to
look. Without the second, "What colour is the square?" stayed a guess.
"""


def demo_picture() -> Picture:
    """A picture of four different shapes in four colours, from a held-out seed."""
    for i in range(10_000):
        picture = draw_picture(generator("held out", "demo", i), DEMO_GRID, "shapes")
        if len({s.kind for s in picture.shapes}) == len({s.colour for s in picture.shapes}) == 4:
            return picture
    raise AssertionError("no seed gives four different shapes")


def write_card(directory: Path, figures: dict[str, Any], demo: Picture) -> None:
    """`figures` as JSON, the card with the same figures, and the demonstration picture."""
    write_json(directory / FIGURES, figures)
    demo.image.save(directory / DEMO, optimize=True)
    rows = []
    for kind in KINDS:
        example = _EXAMPLES[kind].format(_FILLERS.get(kind, ""))
        rows.append(f"| `{kind}` | {example} | {percent(figures['kinds'][kind])} |")
    card = _CARD.format(
        parameters=figures["parameters"],
        n=figures["questions_per_kind"],
        sizes=f"{figures['questions_per_size']} for each of {figures['sizes']} picture sizes",
        figures=FIGURES,
        rows="\n".join(rows),
        breakdown=_breakdown(figures["by_number_of_shapes"]),
        max_shapes=max(int(n) for by in figures["by_number_of_shapes"].values() for n in by),
        shapes=", ".join(SHAPES),
        n_colours=len(COLOURS),
        colours=", ".join(COLOURS),
        n_words=len(WORDS),
        words=", ".join(WORDS),
        demo=DEMO,
        question=figures["demo"]["question"],
        answer=figures["demo"]["answer"],
    )
    (directory / CARD).write_text(card, encoding="utf-8")


def read_figures(directory: Path) -> dict[str, Any]:
    return json.loads((directory / FIGURES).read_text("utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def percent(count: dict[str, int]) -> str:
    return f"{100 * count['right'] / count['of']:.1f} % ({count['right']} of {count['of']})"


def _breakdown(by_number: dict[str, dict[str, dict[str, int]]]) -> str:
    lines = ["By the number of shapes in the picture:", ""]
    numbers = sorted({n for by in by_number.values() for n in by})
    lines += ["| kind | " + " | ".join(numbers) + " |", "|---" * (1 + len(numbers)) + "|"]
    for kind, by in by_number.items():
        cells = [f"{by[n]['right']}/{by[n]['of']}" if n in by else "" for n in numbers]
        lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
