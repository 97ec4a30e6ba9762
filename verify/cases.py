"""What is asked of both sides: a fixed, seeded suite of prompts and pictures, sized for a model and a candidate.

:func:`suite` lists the plans (names, shapes, why), which needs a configuration only; :func:`build` makes a plan's
arrays. Where they come from is a `Source`: seeded ids and patches for a directory of configuration and weights
(`SeededSource`), real prompts and drawn pictures through the processor for one with a tokenizer (`ProcessorSource`,
in `prompts`).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..modeling.configuration import ModelConfig

SUITE_VERSION = 3
DEFAULT_SEED = 2025

# What shows most faults in the shortest time: few different graphs have to be compiled.
GROUPS = {"quick": ("text", "image", "steps")}
OWN = "inputs"  # the group of a user's own cases

PAGE_PATCHES = 1024  # of a page that a real network on a CPU reads within minutes
QUESTION, DIALOGUE = 64, 160  # tokens, about, of a prompt of natural length without its pictures

Grid = tuple[int, int]  # patch rows and columns


class CaseError(ValueError):
    """A case that does not exist, or one that cannot be made; the message says which and why."""


@dataclass(frozen=True)
class Limits:
    """What a candidate can take: cache lengths (ascending), tokens of a prefill graph, patches of an image.

    `smaller_chunks`: tokens of its other prefill graphs, ascending; a prompt runs in those that take it the least time.
    """

    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    chunk: int = 256
    patches: int = 4096
    smaller_chunks: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        return self.contexts[-1]

    @property
    def chunks(self) -> tuple[int, ...]:
        return (*self.smaller_chunks, self.chunk)


@dataclass(frozen=True)
class Row:
    """One prompt. `tokens` is its exact length; None leaves a natural one to the source.

    `split_at`: the first picture's tokens lie across this position.
    `passage`: the beginning of this text (see `prompts.PASSAGES`) as it stands, in no chat format.
    `dialogue`: this conversation (see `prompts.DIALOGUES`), which holds as many pictures as there are grids.
    `page`: its pictures are drawn as printed pages.
    """

    grids: tuple[Grid, ...] = ()
    tokens: int | None = None
    split_at: int | None = None
    passage: str = ""
    dialogue: str = ""
    page: bool = False

    def length(self, merged: int) -> int:
        """Its tokens, about where they are not given; `merged` patches are one token."""
        media = sum(h * w // merged for h, w in self.grids)
        return self.tokens or media + (DIALOGUE if self.dialogue else QUESTION)


@dataclass(frozen=True)
class Plan:
    """A case before its arrays exist.

    `tail` are the sizes of the calls that continue the prompt; the first call takes what is before them. `new_tokens`
    greedy tokens are generated after the whole prompt.
    """

    name: str
    what: str
    rows: tuple[Row, ...]
    tail: tuple[int, ...] = ()
    new_tokens: int = 0
    by_default: bool = True
    own: bool = False  # a user's own, not the suite's
    impossible: str = ""  # why this candidate cannot run it

    @property
    def grids(self) -> list[Grid]:
        return [grid for row in self.rows for grid in row.grids]

    @property
    def scored(self) -> bool:
        """Whether its rows are texts whose perplexity says something."""
        return any(row.passage for row in self.rows)


@dataclass(frozen=True)
class Case:
    """`inputs` as the models take them (`input_ids`, `attention_mask`, with pictures `pixel_values`, `image_grid_hws`)."""

    name: str
    what: str
    seed: int
    inputs: dict[str, np.ndarray]
    tail: tuple[int, ...] = ()
    new_tokens: int = 0
    prompts: tuple[str, ...] = field(default=())  # as text, where there is one
    scored: bool = False  # its perplexity is measured
    rows: tuple[Row, ...] = ()  # what its arrays were made of

    @property
    def calls(self) -> tuple[int, ...]:
        """Columns of `input_ids` that each call takes."""
        return (self.inputs["input_ids"].shape[1] - sum(self.tail), *self.tail)

    @property
    def ends(self) -> list[int]:
        """The last column of each call."""
        return (np.cumsum(self.calls) - 1).tolist()


def suite(config: ModelConfig, limits: Limits) -> list[Plan]:
    """Every plan of the suite, in order; one that the candidate cannot run says so in `impossible`."""
    kh, kw = config.vision.merge_kernel_size
    table_h, table_w = config.vision.init_pos_emb_height, config.vision.init_pos_emb_width

    def grid(merged_rows: int, merged_columns: int) -> Grid:
        return merged_rows * kh, merged_columns * kw

    tall, wide = grid(table_h // kh + 1, 2), grid(1, table_w // kw + 1)
    passages = tuple(Row(tokens=96, passage=name) for name in ("english", "chinese", "code"))
    chunk, context = limits.chunk, limits.context
    # The first two rows end in one call, so that a last token looked up in the wrong row shows.
    batch = (Row((grid(1, 2),)), Row(tokens=min(39, chunk)), Row((wide, grid(2, 1))))
    border = next((n for n in limits.contexts if n >= 32), context)
    # One long row makes all as wide. Where there are smaller chunks the largest is run over its border by `chunks` alone.
    sizes = {n for n in limits.chunks if n <= 512 or not limits.smaller_chunks} | {border}
    around = sorted({n + by for n in sizes for by in (-1, 0, 1) if 32 <= n + by <= context - 2})
    long = chunk + limits.chunks[0] // 2 + 5  # the rest in the smallest that there is
    full = min(limits.patches, (context - QUESTION) * kh * kw)
    page, full_page = (_page_grid(patches, kh, kw) for patches in (min(full, PAGE_PATCHES), full))
    plans = [
        Plan("text", "one text prompt", (Row(),), new_tokens=32),
        Plan("image", "one picture, not square", (Row((grid(2, 3),)),), new_tokens=32),
        Plan("images", "two unequal pictures in one prompt", (Row((grid(3, 2), grid(4, 4))),)),
        Plan("tall", "a picture with more patch rows than the position table", (Row((tall,)),)),
        Plan(
            "page",
            f"a page of text, a table and a figure, {page[0]} x {page[1]} patches",
            (Row((page,), page=True),),
        ),
        Plan(
            "full-page",
            f"the largest page that fits, {full_page[0]} x {full_page[1]} patches",
            (Row((full_page,), page=True),),
            by_default=False,
        ),
        Plan("batch", "three left-padded prompts: one picture, none, two", batch, new_tokens=32),
        Plan(
            "languages",
            "left-padded: a question in Chinese, one about code, and prose with figures",
            (Row(dialogue="chinese"), Row(dialogue="code"), Row(tokens=90)),
            new_tokens=16,
        ),
        Plan(
            "turns",
            "conversations: an answer with a thinking part, a picture in both turns, a system prompt",
            (
                Row(dialogue="thinking"),
                Row((grid(2, 2), grid(1, 3)), dialogue="pictures"),
                Row(dialogue="system"),
            ),
            new_tokens=16,
        ),
        Plan(
            "chunks",
            f"a prompt longer than the prefill chunk of {chunk}, a picture across the border",
            (Row((grid(4, 4),), long, split_at=chunk),),
            new_tokens=16,
        ),
        Plan(
            "pieces", "a prompt continued by several tokens at a time", (Row(tokens=45),), tail=(9, 2, 5, 1)
        ),
        Plan("steps", "a prompt continued token by token", (Row((grid(2, 3),), 64),), tail=(1,) * 16),
        Plan("batch-steps", "left-padded prompts continued token by token", batch, tail=(1,) * 6),
        Plan(
            "bucket",
            f"token by token across the border of the {border}-token cache",
            (Row(tokens=border + 8),),
            tail=(1,) * 16,
            impossible="" if context > border else f"the cache has only one length, {border}",
        ),
        Plan(
            "borders",
            f"left-padded prompts of {', '.join(map(str, around))} tokens, then token by token",
            tuple(Row(tokens=n + 2) for n in around),
            tail=(1, 1),
            impossible="" if around else f"the context of {context} has no border",
        ),
        Plan(
            "edge",
            f"a prompt that fills the {context}-token cache to its last slot",
            (Row(tokens=context),),
            tail=(2, 1),
            by_default=context <= 512,
        ),
        Plan(
            "last-token",
            f"a prompt of {context - 1} tokens, after which one more can be generated",
            (Row(tokens=context - 1),),
            tail=(1,),
            new_tokens=1,
            by_default=context <= 512,
        ),
        Plan("perplexity", "how well each side foretells English, Chinese and code", passages),
        Plan("experts", "as many tokens as it takes to use every expert", (Row(tokens=64),)),
        Plan(
            "long-greedy",
            "512 greedy tokens over every cache border on the way",
            (Row(),),
            new_tokens=512,
            by_default=False,
        ),
    ]
    if full_page == page:
        plans = [plan for plan in plans if plan.name != "full-page"]
    if not config.text.moe_layers:
        plans = [plan for plan in plans if plan.name != "experts"]
    return [_checked(plan, config, limits) for plan in plans]


def _page_grid(patches: int, kh: int, kw: int) -> Grid:
    """The largest grid of at most so many patches that is higher than wide as paper is."""
    cells = max(1, patches // (kh * kw))
    columns = max(1, math.isqrt(math.floor(cells / math.sqrt(2))))
    return min(cells // columns, 3 * columns // 2) * kh, columns * kw


def _checked(plan: Plan, config: ModelConfig, limits: Limits) -> Plan:
    """The plan, marked where it exceeds what the candidate takes."""
    if plan.impossible:
        return plan
    longest = max(row.length(math.prod(config.vision.merge_kernel_size)) for row in plan.rows)
    return _within(plan, longest, plan.grids, config, limits)


def _within(plan: Plan, longest: int, grids: list[Grid], config: ModelConfig, limits: Limits) -> Plan:
    needed, context = longest + plan.new_tokens, min(limits.context, config.text.max_position_embeddings)
    patches = max((h * w for h, w in grids), default=0)
    if needed > context:
        return replace(plan, impossible=f"needs a context of {needed}, there is {context}")
    if patches > limits.patches:
        return replace(plan, impossible=f"needs {patches} patches a picture, there are {limits.patches}")
    return plan


def select(plans: list[Plan], names: Iterable[str] = ()) -> list[Plan]:
    """The named plans, in the order of the suite; a name may be one of :data:`GROUPS`, or `inputs`: all own ones.

    Without names, those that are run by default.

    Raises:
        CaseError: a name that no plan has.
    """
    groups: dict[str, tuple[str, ...]] = {**GROUPS}
    if own := tuple(plan.name for plan in plans if plan.own):
        groups[OWN] = own
    names = [name for given in names for name in groups.get(given, (given,))]
    known = [plan.name for plan in plans]
    for name in names:
        if name == OWN:
            raise CaseError(f"--cases: {OWN} are the cases of --inputs DIR, which is not given")
        if name not in known:
            raise CaseError(f"--cases: there is no case {name!r}; choose from {', '.join([*known, *groups])}")
    return [plan for plan in plans if (plan.name in names if names else plan.by_default)]


class Source(Protocol):
    """Makes inputs for rows, always the same for one generator state."""

    kind: str

    def inputs(
        self, rows: tuple[Row, ...], rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """Arrays as in :class:`Case`, and the prompts as text where there is one."""


def build(plan: Plan, source: Source, seed: int = DEFAULT_SEED) -> Case:
    """The plan's arrays; its generator depends on the seed and the plan's name only.

    Raises:
        CaseError: a tail longer than the shortest prompt.
    """
    rng = np.random.default_rng([seed, zlib.crc32(plan.name.encode())])
    inputs, prompts = source.inputs(plan.rows, rng)
    shortest = int(inputs["attention_mask"].sum(1).min())
    if sum(plan.tail) >= shortest:
        raise CaseError(
            f"case {plan.name}: continues with {sum(plan.tail)} tokens, but a prompt has only {shortest}"
        )
    return Case(
        plan.name, plan.what, seed, inputs, plan.tail, plan.new_tokens, prompts, plan.scored, plan.rows
    )


def fitted(plan: Plan, source: Source, seed: int, config: ModelConfig, limits: Limits) -> Plan:
    """The plan, marked if what the source makes of it exceeds the candidate: a natural length is known only then."""
    if plan.impossible or all(row.tokens for row in plan.rows):
        return plan
    inputs = build(plan, source, seed).inputs
    grids = [(h, w) for h, w in inputs["image_grid_hws"].tolist()] if "image_grid_hws" in inputs else []
    longest = int(inputs["attention_mask"].sum(1).max())
    if plan.own:  # as many new tokens as fit
        plan = replace(plan, new_tokens=max(0, min(plan.new_tokens, limits.context - longest)))
    return _within(plan, longest, grids, config, limits)


def cover_experts(
    case_of: Callable[[int], Case], used: Callable[[Case], list[int]], experts: int, longest: int
) -> Case:
    """The shortest case, in steps of 2, in which every layer uses all `experts`; else one of `longest` tokens.

    Args:
        case_of: makes the case of a given length.
        used: experts used per layer, counted on the reference.
    """
    tokens = min(64, longest)
    while True:
        case = case_of(tokens)
        if tokens >= longest or min(used(case)) == experts:
            return case
        tokens = min(2 * tokens, longest)


def left_padded(rows: list[np.ndarray], pad: int) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask` [B, S] int64 of prompts of unequal length."""
    longest = max(map(len, rows))
    input_ids = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        input_ids[i, longest - len(ids) :] = ids
        mask[i, longest - len(ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def inputs_hash(inputs: Mapping[str, np.ndarray]) -> str:
    """A digest of names, shapes, dtypes and content."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class SeededSource:
    """Random token ids and patches: needs a configuration only."""

    kind = "seeded token ids and patches"

    def __init__(self, config: ModelConfig):
        self.config = config
        t = config.text
        eos = t.eos_token_id if isinstance(t.eos_token_id, list) else [t.eos_token_id]
        special = {
            config.media_placeholder_token_id,
            config.pad_token_id,
            t.bos_token_id,
            t.pad_token_id,
            *eos,
        }
        self.ordinary = np.array([i for i in range(t.vocab_size) if i not in special])

    def inputs(
        self, rows: tuple[Row, ...], rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        arrays = left_padded([self._ids(row, rng) for row in rows], self.config.pad_token_id)
        grids = [grid for row in rows for grid in row.grids]
        if grids:
            p = self.config.vision.patch_size
            arrays["pixel_values"] = np.concatenate([_patches(h, w, p, rng) for h, w in grids])
            arrays["image_grid_hws"] = np.array(grids, np.int64)
        return arrays, ()

    def _ids(self, row: Row, rng: np.random.Generator) -> np.ndarray:
        """Text with each picture's media tokens in it, text before, between and after."""
        kh, kw = self.config.vision.merge_kernel_size
        media = [h * w // (kh * kw) for h, w in row.grids]
        total = row.tokens or sum(media) + 24
        free = total - sum(media)
        if free <= len(media):
            raise CaseError(f"{total} tokens leave no room for text beside {sum(media)} media tokens")
        # text pieces: before the first picture, between, after the last
        cuts = [free * (i + 1) // (len(media) + 1) for i in range(len(media))]
        if media and row.split_at is not None:
            cuts[0] = row.split_at - media[0] // 2
        text = rng.choice(self.ordinary, free)
        pieces, at = [], 0
        for cut, n in zip(cuts, media):
            pieces += [text[at:cut], np.full(n, self.config.media_placeholder_token_id)]
            at = cut
        return np.concatenate([*pieces, text[at:]])


def _patches(h: int, w: int, p: int, rng: np.random.Generator) -> np.ndarray:
    """[h * w, 3, p, p] in -1..1: a smooth picture under noise, so that neighbouring patches differ but belong together."""
    y, x = np.meshgrid(np.arange(h * p) / p, np.arange(w * p) / p, indexing="ij")
    channels = []
    for _ in range(3):
        a, b, phase = rng.uniform(0.2, 1.2), rng.uniform(0.2, 1.2), rng.uniform(0, 2 * np.pi)
        channels.append(0.6 * np.sin(a * y + b * x + phase) + rng.uniform(-0.4, 0.4, y.shape))
    pixels = np.stack(channels).astype(np.float32)  # (3, h * p, w * p)
    return np.ascontiguousarray(
        pixels.reshape(3, h, p, w, p).transpose(1, 3, 0, 2, 4).reshape(h * w, 3, p, p)
    )
