"""What an export would write, as a value: every graph with the shapes of its inputs and outputs, and what stands beside.

Made from headers alone and without MindSpore, so ``--dry-run`` answers at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..convert.converted import ConvertedWeights
from ..convert.planning import DTYPE_NAMES, size_text
from ..convert.source import open_source
from ..convert.transforms import DTYPES
from ..convert.weights import Source
from ..modeling.buckets import (
    LONGEST_SHAPE,
    contexts,
    fitting_limit,
    largest_image,
    patch_buckets,
    prefill_chunks,
)
from ..modeling.configuration import ModelConfig
from ..modeling.kernels import library
from ..modeling.settings import PROCESSOR, in_token_limit, with_in_token_limit
from ..modeling.shapes import (
    Ports,
    cache_of_batch,
    cache_of_slots,
    cache_per_row,
    text_inputs,
    text_outputs,
    vision_inputs,
    vision_outputs,
)
from .errors import ExportError
from .operators import GE, KBK, PRODUCTS

DEFAULT_CONTEXT = 4096
DEFAULT_TARGET = "ascend"

TAPS = "-taps"  # ends the name of a graph with more outputs than the one without
VISION, PREFILL, PREFILL_LOGITS, DECODE = "vision", "prefill", "prefill-logits", "decode"


@dataclass(frozen=True)
class Target:
    """Who runs a bundle: which module of ``modeling.kernels`` it is traced with, and what its graphs compute in.

    Attributes:
        dtype: of the graphs' numbers.
        widens: parameters are of `dtype` whatever is stored; if not, each is what is stored.
        cache_shapes: of one layer, by batch, context and width; those of the kernels.
        attention, experts, cache_write: variants of the kernels; None where there is no choice.
        runtime: of the device, see ``operators``; None for a CPU, where every operator has a kernel.
        products: of Atlas that every graph must be legal on.
        cache_writes: the choices for `cache_write`.
        files: of this package's templates, what a bundle carries for whoever runs it.
    """

    name: str
    kernels: str
    dtype: str
    widens: bool
    cache_shapes: Callable[[int, int, int], list[tuple[int, ...]]]
    attention: str | None = None
    experts: str | None = None
    runtime: str | None = None
    products: tuple[str, ...] = ()
    cache_write: str | None = None
    cache_writes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def parameter_dtype(self, stored: str) -> str:
        """What the parameter of a stored tensor is in the graphs."""
        return self.dtype if self.widens else stored

    @property
    def variants(self) -> dict[str, str]:
        """Of the kernels, by what they are of."""
        chosen = {"attention": self.attention, "experts": self.experts, "cache_write": self.cache_write}
        return {what: choice for what, choice in chosen.items() if choice}


TEMPLATES = Path(__file__).parent / "templates"
VARIANTS = ("fused", "plain")
PLAIN = "plain"  # modules of kernels: plain graphs, and
CPU_OPERATORS = "cpu"  # those that call the library, where it was built
FLAT_WRITES = ("scatter-update", "index-copy")  # take a cache parameter without an axis for the batch
CACHE_WRITES = ("scatter", "scatter-nd", *FLAT_WRITES)
TARGETS = {
    "cpu": Target("cpu", PLAIN, "float32", widens=True, cache_shapes=cache_per_row),
    "ascend": Target(
        "ascend",
        "ascend",
        "bfloat16",
        widens=False,
        cache_shapes=cache_of_batch,
        attention="fused",
        experts="fused",
        runtime=KBK,
        products=("a2", "a3"),
        cache_write="scatter",
        cache_writes=CACHE_WRITES,
    ),
}
# GE has no adapter for index_copy_.
TARGETS["lite"] = replace(
    TARGETS["ascend"],
    name="lite",
    kernels="lite",
    runtime=GE,
    cache_writes=CACHE_WRITES[:3],
    files=("lite.ini", "run_lite.py"),
)


@dataclass(frozen=True)
class GraphPlan:
    """One static graph. `tokens` and `context` are None for vision graphs, `patches` for the others."""

    kind: str
    patches: int | None
    tokens: int | None
    context: int | None
    taps: bool
    inputs: Ports
    outputs: Ports
    caches: Ports

    @property
    def name(self) -> str:
        size = f"{self.patches or self.context}"
        if self.kind in (PREFILL, PREFILL_LOGITS):
            size = f"{self.tokens}x{self.context}"
        return f"{self.kind}-{size}" + (TAPS if self.taps else "")

    @property
    def length(self) -> int:
        """Cache slots, or patches: in what it differs from others of its kind."""
        return self.patches or self.context or 0

    @property
    def all_logits(self) -> bool:
        return self.kind != PREFILL


@dataclass(frozen=True)
class ShortPlan:
    """The largest graph of each kind, of a network with few layers."""

    config: ModelConfig
    graphs: tuple[GraphPlan, ...]


@dataclass(frozen=True)
class BundlePlan:
    """See the module.

    Attributes:
        picture_limit: `in_token_limit` of the bundle's processor, where it has to be lower than the checkpoint's.
        copy: shards are copied, not linked.
        notes: what the user should know about the sizes that were chosen.
    """

    weights: ConvertedWeights
    target: Target
    dtype: str
    batch: int
    contexts: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    patches: tuple[int, ...]
    taps: bool
    graphs: tuple[GraphPlan, ...]
    notes: tuple[str, ...]
    picture_limit: int | None = None
    copy: bool = False

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @property
    def shards(self) -> dict[str, int]:
        """Files with weights, and their bytes."""
        return {name: record.nbytes for name, record in self.weights.manifest.shards.items()}

    @property
    def copied(self) -> tuple[str, ...]:
        """Configuration, tokenizer and processor files, and the target's own."""
        return (*self.weights.manifest.files, *self.target.files)

    @property
    def adjusted(self) -> dict[str, bytes]:
        """Those of them that are not as they are in the converted directory, with what they hold."""
        made = {name: (TEMPLATES / name).read_bytes() for name in self.target.files}
        if self.picture_limit is not None and PROCESSOR in self.copied:
            made[PROCESSOR] = with_in_token_limit(self.weights.directory, self.picture_limit)
        return made

    @property
    def widened(self) -> bool:
        """Whether the loader has to convert weights into what the graphs take."""
        return not all(self.as_stored(name) for name in self.weights.names())

    @property
    def weight_bytes(self) -> int:
        """Of all weights in memory, in the graphs' dtype."""
        return sum(
            math.prod(shape) * DTYPES[self.target.parameter_dtype(dtype)].itemsize
            for shape, dtype in map(self.weights.spec, self.weights.names())
        )

    @property
    def cache_bytes(self) -> int:
        """Of the caches that generating takes when all contexts were used.

        Graphs that run kernel by kernel have each its own (see ``modeling.batch_cache``); others share one of the largest
        context.
        """
        if self.target.runtime == KBK:
            slots = sum(g.context or 0 for g in self.graphs if g.kind in (PREFILL, DECODE) and not g.taps)
        else:
            slots = self.contexts[-1]
        text = self.config.text
        return (
            self.batch * slots * text.num_hidden_layers * text.latent_dim * DTYPES[self.target.dtype].itemsize
        )

    def families(self) -> Iterator[tuple[list[GraphPlan], dict[str, GraphPlan]]]:
        """Graphs that differ in length alone, ascending, and by name those that follow by leaving taps out."""
        bare = {g.name: g for g in self.graphs if not g.taps}
        tapped = [g for g in self.graphs if g.taps]
        follow = {g.name: bare.pop(name) for g in tapped if (name := g.name.removesuffix(TAPS)) in bare}
        for family in (tapped, list(bare.values())):
            for like in dict.fromkeys((g.kind, g.tokens) for g in family):
                alike = (g for g in family if (g.kind, g.tokens) == like)
                yield sorted(alike, key=lambda g: g.length), follow

    def shortened(self) -> ShortPlan:
        """The largest graph of each kind, with the first layers alone: each kind of layer, and one after it."""
        text, vision = self.config.text, self.config.vision
        layers = max(2, min(text.moe_layers, default=0) + 2)
        config = replace(
            self.config,
            text=replace(text, num_hidden_layers=min(layers, text.num_hidden_layers)),
            vision=replace(vision, num_hidden_layers=min(2, vision.num_hidden_layers)),
        )
        largest = {g.kind: g for g in self.graphs if not g.taps}  # ascending in tokens, then in length
        return ShortPlan(
            config,
            tuple(
                _vision(config, self.target, g.patches)
                if g.patches
                else _text(config, self.target, self.batch, g.kind, g.tokens or 1, g.context or 1)
                for g in largest.values()
            ),
        )

    def as_stored(self, name: str) -> bool:
        """Whether a parameter has the bytes that the weights file has."""
        stored = self.weights.spec(name)[1]
        return stored == self.target.parameter_dtype(stored)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": str(self.weights.directory),
            "target": self.target.name,
            "kernels": self.target.kernels,
            "attention": self.target.attention,
            "experts": self.target.experts,
            "products": self.target.products,
            "cache_write": self.target.cache_write,
            "dtype": self.dtype,
            "batch": self.batch,
            "contexts": self.contexts,
            "prefill_chunks": self.prefill_chunks,
            "patches": self.patches,
            "picture_limit": self.picture_limit,
            "taps": self.taps,
            "graphs": {
                g.name: {
                    side: {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in ports.items()}
                    for side, ports in (("inputs", g.inputs), ("outputs", g.outputs), ("caches", g.caches))
                }
                for g in self.graphs
            },
            "shards": self.shards,
            "copy": self.copy,
            "copied": self.copied,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        by = "by the library of CPU operators, " if self.target.kernels == CPU_OPERATORS else ""
        lines = [
            _line("graphs", f"{len(self.graphs)}, batch {self.batch}, {by}computing in {self.target.dtype}")
        ]
        lines += [_line("", f"{g.name:24} {_ports(g.inputs)} -> {_ports(g.outputs)}") for g in self.graphs]
        lines += [
            _line("copy" if self.copy else "link", f"{name}  {size_text(n)}")
            for name, n in self.shards.items()
        ]
        lines.append(_line("copy", ", ".join(self.copied)))
        held = "widened from " + self.weights.dtype if self.widened else "mapped as they are stored"
        lines.append(
            _line(
                "to run",
                f"{size_text(self.weight_bytes)} of weights ({held}), {size_text(self.cache_bytes)} of cache",
            )
        )
        return "\n".join(lines + [_line("note", note) for note in self.notes])


def open_converted(src: str | Path) -> ConvertedWeights:
    """A converted directory, its headers checked.

    Raises:
        ExportError: `src` is something else; the message has the command to run first.
        ConversionError, ConfigError: it is damaged.
    """
    path = Path(src)
    if (path / "bundle.json").is_file():
        raise ExportError(f"{src}: is a bundle already; give the converted directory that it was made of")
    if path.is_dir():
        weights = open_source(Source(path, path.resolve().name))
        if isinstance(weights, ConvertedWeights):
            if weights.manifest.stored != "safetensors":
                raise ExportError(
                    f"{src}: holds {weights.manifest.stored} files, which graphs cannot point into; "
                    "convert with --format safetensors"
                )
            return weights
    elif path.exists():
        raise ExportError(f"{src}: is a file, expected a converted directory")
    elif src != "nano" and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(src)):  # neither nano nor a repo id
        raise ExportError(f"{src}: there is no such directory; convert-weights makes it")
    raise ExportError(
        f"{src}: is not a converted directory; run `convert-weights --src {src} --dst ./ckpt` first, "
        "then export with --src ./ckpt"
    )


def plan_export(
    weights: ConvertedWeights,
    seq: Sequence[int] = (),
    target: str = DEFAULT_TARGET,
    batch: int = 1,
    prefill_chunk: int | Sequence[int] | None = None,
    image_patches: Sequence[int] = (),
    dtype: str | None = None,
    taps: bool = False,
    attention: str | None = None,
    experts: str | None = None,
    copy: bool = False,
    products: Sequence[str] = (),
    cache_write: str | None = None,
) -> BundlePlan:
    """The graphs of a bundle.

    For every context (see `contexts`) there is a decode graph and, for each chunk size that fits, a prefill graph that
    gives the last token's logits. Logits of all tokens, which only forward and verification ask for, come from one
    prefill graph of each size and the largest context. There is a vision graph per number of patches. With `taps` there
    is a second one, with more outputs, of each graph that forward uses.

    Args:
        seq: contexts that must be there; those up to the largest are added in steps of 2. Default: 4096, or what the
            model has positions for.
        batch: rows of every text graph.
        prefill_chunk: tokens per row of the prefill graphs, one number or several; a prompt runs in those that take
            it the least time, a long one in several of the largest. Default: 64, 256 and 1024 for a CPU with the C++ operators,
            256 for others, on which each graph takes memory; as far as the largest context holds them.
        image_patches: patches of the vision graphs. Default: up to the processor's largest picture, as far as the
            context holds it and a question. Where the graphs take less than the processor gives, the bundle's processor
            gets the limit that fits.
        dtype: "bf16", "fp16" or "fp32"; what the weights are stored in, or fp32 for weights that are widened anyway.
        attention, experts: "fused" or "plain" operators, for a target that has both. Default: fused.
        copy: the bundle gets copies of the shards, where it would have links.
        products: of Atlas that the graphs must be legal on, keys of ``operators.PRODUCTS``. Default: the target's.
        cache_write: which operator writes into the cache, one of the target's. Default: scatter.

    Raises:
        ExportError: sizes that the model or each other do not allow.
    """
    config = weights.config
    positions = config.text.max_position_embeddings
    asked = tuple(seq) or (min(DEFAULT_CONTEXT, positions),)
    for n in asked:
        if not 2 <= n <= positions:
            raise ExportError(f"--seq: {n}, expected 2 to max_position_embeddings ({positions})")
    if batch < 1:
        raise ExportError(f"--batch: {batch}, expected a positive number")
    sizes = tuple(sorted({*contexts(max(asked)), *asked}))
    patches, limit, notes = _patches(weights, sizes[-1], image_patches)
    to = _target(weights, TARGETS[target], attention, experts, products, cache_write)
    named = _dtype(weights, to, dtype)
    if to.kernels == CPU_OPERATORS and named != "bfloat16":
        to = replace(to, widens=True)  # the operators take bf16 and fp32
    chunks = (
        prefill_chunks(to.kernels == CPU_OPERATORS, sizes[-1])
        if prefill_chunk is None
        else _chunks((prefill_chunk,) if isinstance(prefill_chunk, int) else prefill_chunk, sizes[-1])
    )
    shared = (config, to, batch)
    graphs = [_vision(config, to, n, tapped) for n in patches for tapped in (False, True)[: 1 + taps]]
    graphs += [_text(*shared, PREFILL, n, context) for n in chunks for context in sizes if context >= n]
    for tapped in (False, True)[: 1 + taps]:
        graphs += [_text(*shared, PREFILL_LOGITS, n, sizes[-1], tapped) for n in chunks]
        graphs += [_text(*shared, DECODE, 1, context, tapped) for context in sizes]
    return BundlePlan(
        weights=weights,
        target=to,
        dtype=named,
        batch=batch,
        contexts=sizes,
        prefill_chunks=chunks,
        patches=patches,
        taps=taps,
        graphs=tuple(graphs),
        notes=tuple(notes),
        picture_limit=limit,
        copy=copy,
    )


def _chunks(asked: Sequence[int], context: int) -> tuple[int, ...]:
    """The chunk sizes that were asked for, ascending."""
    for n in asked:
        if n < 2:
            raise ExportError(f"--prefill-chunk: {n}, expected at least 2; decode graphs take one token")
        if n > context:
            raise ExportError(
                f"--prefill-chunk: {n}, but the largest context holds {context} tokens; reduce it or raise --seq"
            )
        if asked.count(n) > 1:
            raise ExportError(f"--prefill-chunk: {n} is given twice; name each size once")
    if not asked:
        raise ExportError("--prefill-chunk: no size is given; leave it out for the default")
    return tuple(sorted(asked))


def _target(
    weights: ConvertedWeights,
    target: Target,
    attention: str | None,
    experts: str | None,
    products: Sequence[str],
    cache_write: str | None,
) -> Target:
    """`target` with the variants and products that were asked for, computing in what it takes of the weights."""
    for option, choice, default in (
        ("--attention", attention, target.attention),
        ("--experts", experts, target.experts),
        ("--cache-write", cache_write, target.cache_write),
    ):
        if choice and not default:
            raise ExportError(
                f"{option}: {choice}, but target {target.name} has plain operators only; leave it out"
            )
    for product in products:
        if not target.products:
            raise ExportError(
                f"--product: {product}, but target {target.name} runs on any machine; leave it out"
            )
        if product not in PRODUCTS:
            raise ExportError(f"--product: {product}, expected {', '.join(PRODUCTS)}")
    if cache_write and cache_write not in target.cache_writes:
        raise ExportError(
            f"--cache-write: {cache_write}, but target {target.name} has {', '.join(target.cache_writes)}"
        )
    if target.kernels == PLAIN and library.built():
        target = replace(target, kernels=CPU_OPERATORS, widens=False)
    if target.runtime:
        if weights.dtype not in ("bfloat16", "float16"):
            raise ExportError(
                f"{weights.directory}: holds {weights.dtype}, but target {target.name} computes in bf16 or fp16 "
                "(its fused attention takes no fp32); convert the checkpoint with --dtype bf16 and export that"
            )
        target = replace(target, dtype=weights.dtype)
    write = cache_write or target.cache_write
    if write in FLAT_WRITES:
        target = replace(target, cache_shapes=cache_of_slots)
    return replace(
        target,
        attention=attention or target.attention,
        experts=experts or target.experts,
        products=tuple(sorted(set(products))) or target.products,
        cache_write=write,
    )


def _dtype(weights: ConvertedWeights, target: Target, asked: str | None) -> str:
    """What the model's dtype is; weights are never written again, so it is the stored one or a wider one."""
    name = weights.dtype if asked is None else DTYPE_NAMES.get(asked, asked)
    if name not in (weights.dtype, target.dtype):
        raise ExportError(
            f"--dtype: {asked}, but {weights.directory} holds {weights.dtype}; convert the checkpoint with "
            f"--dtype {asked} and export that"
        )
    return name


def question_room(context: int) -> int:
    """Tokens of a context that no picture may take, so that a question fits beside it, and an answer.

    The chat format around a picture and a question takes about 30 tokens, a question of a few sentences 30 more; an eighth
    of the context leaves the answer its share in the larger ones. The smallest contexts are halved.
    """
    return min(max(64, context // 8), context // 2)


def _patches(
    weights: ConvertedWeights, context: int, asked: Sequence[int]
) -> tuple[tuple[int, ...], int | None, list[str]]:
    """Patches of the vision graphs, the processor's limit if it must be lowered, and notes."""
    merge = math.prod(weights.config.vision.merge_kernel_size)
    limit = in_token_limit(weights.directory)
    wanted = largest_image(limit)
    held = max(1, context - question_room(context)) * merge
    if asked:
        for n in asked:
            if n < merge or n % merge:
                raise ExportError(f"--image-patches: {n}, expected a positive multiple of {merge}")
        sizes = tuple(sorted(set(asked)))
    else:
        sizes = tuple(patch_buckets(min(wanted, held)))
    most = min(sizes[-1], held)
    if most >= wanted:
        return sizes, None, []
    why = (
        f"a context of {context} tokens has room for a picture of {most // merge} tokens and a question"
        if most == held
        else f"the largest vision graph takes {most} patches ({most // merge} tokens)"
    )
    fits = fitting_limit(most)
    if fits >= limit:
        return (
            sizes,
            None,
            [
                f"{why}; pictures more than {LONGEST_SHAPE} times as long as wide may have up to {wanted} patches and "
                "are then refused"
            ],
        )
    if PROCESSOR not in weights.manifest.files:
        then = f"there is no {PROCESSOR} to lower it in, so larger pictures are refused"
    else:
        then = f"the bundle's processor scales pictures to {fits} (in_token_limit), so that they fit"
    return (
        sizes,
        fits,
        [
            f"{why}, but the checkpoint's processor gives up to {limit} patches ({limit // merge} tokens); {then}"
        ],
    )


def _vision(config: ModelConfig, target: Target, patches: int, taps: bool = False) -> GraphPlan:
    return GraphPlan(
        kind=VISION,
        patches=patches,
        tokens=None,
        context=None,
        taps=taps,
        inputs=_typed(vision_inputs(config, patches), target),
        outputs=_typed(vision_outputs(config, patches, taps), target),
        caches={},
    )


def _text(
    config: ModelConfig, target: Target, batch: int, kind: str, tokens: int, context: int, taps: bool = False
) -> GraphPlan:
    all_logits = kind != PREFILL
    text = config.text
    return GraphPlan(
        kind=kind,
        patches=None,
        tokens=tokens,
        context=context,
        taps=taps,
        inputs=_typed(text_inputs(config, batch, tokens, all_logits), target),
        outputs=_typed(text_outputs(config, batch, tokens, all_logits, taps), target),
        caches={
            f"cache.{layer}.{i}": (shape, target.dtype)
            for layer in range(text.num_hidden_layers)
            for i, shape in enumerate(target.cache_shapes(batch, context, text.latent_dim))
        },
    )


def _typed(ports: Ports, target: Target) -> Ports:
    return {
        name: (shape, target.dtype if dtype == "float" else dtype) for name, (shape, dtype) in ports.items()
    }


def _ports(ports: Ports) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, (shape, _) in ports.items())


def _line(label: str, text: str) -> str:
    return f"{label:<10} {text}"
