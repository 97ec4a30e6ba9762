"""The candidate's weights, bit by bit, against the checkpoint's.

A single weight that is off by a per cent moves no logit of a large model measurably; here it is seen. What the layouts of a
converted directory mean is written down a second time, in Torch and with nothing of ``convert``: a mistake there must
not be able to cancel itself out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..convert.converted import ConvertedWeights
from ..convert.manifest import TensorRecord
from ..convert.source import Source, open_source
from ..export.bundle import MANIFEST, Bundle, WeightRecord
from ..modeling.configuration import ModelConfig
from .mindir.values import from_numpy
from .torch_weights import tensor_files

Progress = Callable[[int], None]
MAPPED = 1 << 28  # bytes that are compared before files are closed
LISTED = 20  # tensors that differ, by name


class Part(NamedTuple):
    """`make` of some published tensors is the parameter `ours`, or of a stack its element `at`."""

    ours: str
    published: tuple[str, ...]
    make: Callable[..., Tensor]
    at: int | None = None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _halves_first(rows: Tensor) -> Tensor:
    """Pairs of rows (2i, 2i + 1) of each head `[heads, d, ...]` -> the first of each pair, then the second."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every parameter, in network order."""
    yield from _vision(config)
    text = config.text
    yield _alike("language_model.model.embed_tokens.weight")
    for n in range(text.num_hidden_layers):
        layer = f"language_model.model.layers.{n}."
        yield from map(_alike, _plain_of_layer(layer))
        attention = f"{layer}self_attn."
        nope, rope, latent = text.qk_nope_head_dim, text.qk_rope_head_dim, text.kv_lora_rank

        def queries(w: Tensor, nope: int = nope, rope: int = rope) -> Tensor:
            heads = w.unflatten(0, (-1, nope + rope))
            return torch.cat((heads[:, :nope], _halves_first(heads[:, nope:])), 1).flatten(0, 1)

        def latents(w: Tensor, latent: int = latent) -> Tensor:
            return torch.cat((w[:latent], _halves_first(w[None, latent:])[0]))

        def keys(w: Tensor, each: int = nope + text.v_head_dim, nope: int = nope) -> Tensor:
            return w.unflatten(0, (-1, each))[:, :nope]

        def values(w: Tensor, each: int = nope + text.v_head_dim, nope: int = nope) -> Tensor:
            return w.unflatten(0, (-1, each))[:, nope:]

        yield _alike(f"{attention}q_proj.weight", queries)
        yield _alike(f"{attention}kv_a_proj_with_mqa.weight", latents)
        yield Part(f"{attention}k_b_proj.weight", (f"{attention}kv_b_proj.weight",), keys)
        yield Part(f"{attention}v_b_proj.weight", (f"{attention}kv_b_proj.weight",), values)
        if not text.is_moe(n):
            yield from _mlp(f"{layer}mlp.")
            continue
        yield _alike(f"{layer}mlp.gate.weight")
        yield _alike(f"{layer}mlp.gate.e_score_correction_bias")
        stack = f"{layer}mlp.experts."
        for e in range(text.n_routed_experts):
            pair = tuple(f"{stack}{e}.{name}_proj.weight" for name in ("gate", "up"))
            yield Part(f"{stack}gate_up_proj", pair, lambda gate, up: torch.cat((gate, up)).T, e)
            yield Part(f"{stack}down_proj", (f"{stack}{e}.down_proj.weight",), lambda down: down.T, e)
        if text.n_shared_experts:
            yield from _mlp(f"{layer}mlp.shared_experts.")
    yield _alike("language_model.model.norm.weight")
    yield _alike("language_model.lm_head.weight")


def _alike(name: str, make: Callable[..., Tensor] = _same) -> Part:
    return Part(name, (name,), make)


def _plain_of_layer(layer: str) -> Iterator[str]:
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.kv_a_layernorm",
        "self_attn.o_proj",
    ):
        yield f"{layer}{name}.weight"


def _mlp(mlp: str) -> Iterator[Part]:
    pair = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    yield Part(f"{mlp}gate_up_proj.weight", pair, lambda gate, up: torch.cat((gate, up)))
    yield _alike(f"{mlp}down_proj.weight")


def _vision(config: ModelConfig) -> Iterator[Part]:
    heads = config.vision.num_attention_heads

    def joined(w: Tensor) -> Tensor:
        q, k, v = w.chunk(3)
        return torch.cat([_halves_first(x.unflatten(0, (heads, -1))).flatten(0, 1) for x in (q, k)] + [v])

    embed = "vision_tower.patch_embed."
    yield _alike(f"{embed}proj.weight", lambda w: w.flatten(1))
    yield _alike(f"{embed}proj.bias")
    yield _alike(f"{embed}pos_emb.weight", lambda w: w.flatten(0, 1))
    both = ("weight", "bias")
    for n in range(config.vision.num_hidden_layers):
        block = f"vision_tower.encoder.blocks.{n}."
        for s in both:
            yield _alike(f"{block}wqkv.{s}", joined)
            for name in ("norm0", "wo", "norm1", "mlp.fc0", "mlp.fc1"):
                yield _alike(f"{block}{name}.{s}")
    for s in both:
        yield _alike(f"vision_tower.encoder.final_layernorm.{s}")
        for name in ("pre_norm", "linear_1", "linear_2"):
            yield _alike(f"multi_modal_projector.{name}.{s}")


# ---- comparing ------------------------------------------------------------------------------------------------------


def compare(
    reference: Path, candidate: Path, config: ModelConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """How a converted directory's or a bundle's weights differ from a published checkpoint's.

    Memory is one parameter of a layer: files are mapped, and read once.

    Returns:
        `parameters` and `bytes` that were compared; `rounded_to`, the dtype where the candidate's is narrower (its numbers
        are then held against the checkpoint's rounded to it), else None; `different`, the first parameters that
        differ, each with `name`, `values` (how many) and `at` (the first), and `different_parameters`, their number;
        `missing`, parameters that the candidate lacks, and `unknown`, those that nothing of the checkpoint belongs to.

    Raises:
        OracleError: the checkpoint cannot be read.
    """
    held = _stored(candidate)
    files = tensor_files(reference)
    readers: dict[Path, Any] = {}
    different: dict[str, dict[str, Any]] = {}
    wanted: set[str] = set()
    rounded_to = None
    total = seen = 0

    def read(name: str) -> Tensor:
        path = files[name]
        if path not in readers:
            readers[path] = safe_open(path, framework="pt")
        return readers[path].get_tensor(name)

    for part in parts(config):
        wanted.add(part.ours)
        if part.ours not in held:
            continue
        ours = held[part.ours]() if part.at is None else held[part.ours]()[part.at]
        theirs = part.make(*map(read, part.published))
        if ours.dtype != theirs.dtype:
            if ours.dtype.itemsize <= theirs.dtype.itemsize:
                rounded_to = str(ours.dtype).removeprefix("torch.")
            theirs = theirs.to(ours.dtype)
        count, at = _differences(ours, theirs)
        if count:
            entry = different.setdefault(part.ours, {"name": part.ours, "values": 0, "at": None})
            entry["values"] += count
            entry["at"] = entry["at"] or ([] if part.at is None else [part.at]) + at
        nbytes = ours.numel() * ours.dtype.itemsize
        total += nbytes
        seen += nbytes
        if seen > MAPPED:  # pages of a file that was read stay until it is closed
            readers.clear()
            seen = 0
        if progress:
            progress(nbytes)
    return {
        "parameters": len(wanted & held.keys()),
        "bytes": total,
        "rounded_to": rounded_to,
        "different_parameters": len(different),
        "different": list(different.values())[:LISTED],
        "missing": sorted(wanted - held.keys()),
        "unknown": sorted(held.keys() - wanted),
    }


def _differences(ours: Tensor, theirs: Tensor) -> tuple[int, list[int]]:
    """How many values differ in a bit, and the indices of the first."""
    if ours.shape != theirs.shape:
        return max(1, ours.numel()), [0] * ours.dim()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.dtype.itemsize]
    a, b = ours.view(integer), theirs.contiguous().view(integer)
    if torch.equal(a, b):
        return 0, []
    unequal = a != b
    first = int(unequal.flatten().int().argmax())
    return int(unequal.sum()), [int(i) for i in np.unravel_index(first, tuple(a.shape))]


def _stored(candidate: Path) -> dict[str, Callable[[], Tensor]]:
    """Every parameter of a candidate, mapped when it is asked for."""
    records: Mapping[str, WeightRecord | TensorRecord]
    if (candidate / MANIFEST).is_file():
        records = Bundle.load(candidate).weights
    else:
        weights = open_source(Source(candidate, candidate.name))
        assert isinstance(weights, ConvertedWeights)
        records = weights.manifest.tensors
    return {name: partial(_mapped, candidate, record) for name, record in records.items()}


def _mapped(directory: Path, record: WeightRecord | TensorRecord) -> Tensor:
    kind = np.dtype(getattr(ml_dtypes, record.dtype, record.dtype))
    if not math.prod(record.shape):
        return from_numpy(np.empty(record.shape, kind))
    array = np.memmap(directory / record.file, kind, "r", record.offset, record.shape)
    return from_numpy(array if array.flags.aligned else array.copy())  # in a .ckpt file nothing is aligned
