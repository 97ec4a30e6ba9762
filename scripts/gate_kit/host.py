"""Faults of the host: what prepares a graph's inputs, keeps the cache, or puts batches and pictures together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np

from kimi_vl.export.load import BundleGraphs
from kimi_vl.modeling import binding, engine, forward, positions
from kimi_vl.modeling.forward import KimiVLForward

from .fault import Fault

Context = AbstractContextManager[Any]
Inputs = dict[str, np.ndarray]


def instead(place: Any, name: str, wrong: Callable[..., Any]) -> Callable[[], Context]:
    """`wrong` gets the right function first, then its arguments."""

    def change() -> Context:
        right = getattr(place, name)

        def replacement(*arguments: Any, **named: Any) -> Any:
            return wrong(right, *arguments, **named)

        return mock.patch.object(place, name, replacement)

    return change


def text_calls(change: Callable[[int, Inputs], object]) -> Callable[[], Context]:
    """Every call of a text graph, its inputs changed in place; `change` gets the number of tokens a row and the inputs."""

    def text(
        right: Any, self: Any, tokens: int, context: int, rows: Sequence[Any], inputs: Inputs, *rest: Any
    ) -> Any:
        change(tokens, inputs)
        return right(self, tokens, context, rows, inputs, *rest)

    return instead(BundleGraphs, "text", text)


# ---- positions and the cache -----------------------------------------------------------------------------------------


def wrong_theta(right: Any, at: np.ndarray, theta: float, dim: int) -> Any:
    return right(at, 10000.0, dim)


def late_decoding(right: Any, at: np.ndarray, theta: float, dim: int) -> Any:
    return right(at - 1 if at.shape[1] == 1 else at, theta, dim)


def padding_counted(
    right: Any,
    self: Any,
    ids: Any,
    mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    *rest: Any,
    **named: Any,
) -> Any:
    prompt = right(self, ids, mask, position_ids, cache, *rest, **named)
    if cache is None or not any(cache.lengths):
        for row, valid in zip(prompt.rows, prompt.mask):
            row.positions = np.flatnonzero(valid)
    return prompt


def all_seen(right: Any, mask: Any, batch: int, tokens: int) -> np.ndarray:
    return np.ones((batch, tokens), bool)


def slot_too_far_when_decoding(tokens: int, inputs: Inputs) -> None:
    if tokens == 1:
        inputs["start"] = inputs["start"] + 1


def chunk_at_zero(tokens: int, inputs: Inputs) -> None:
    if tokens > 1:
        inputs["start"] = np.zeros_like(inputs["start"])


def last_of_chunk_dropped(tokens: int, inputs: Inputs) -> None:
    if tokens > 1:
        inputs["input_ids"][:, -1] = 0
        inputs["embeds_mask"][:, -1] = 0


def row_before_last(tokens: int, inputs: Inputs) -> None:
    if "last" in inputs:
        inputs["last"] = np.maximum(inputs["last"] - 1, 0)


def rows_exchanged(
    right: Any, self: Any, tokens: int, context: int, rows: Sequence[Any], inputs: Inputs, *rest: Any
) -> Any:
    return right(self, tokens, context, rows[::-1] if tokens == 1 else rows, inputs, *rest)


@contextmanager
def stale_bucket() -> Iterator[None]:
    """Graphs of a longer cache have slots of their own, in which nothing is that a shorter one wrote."""
    shortest = 64

    def rebind(self: Any, rows: Any) -> None:
        if self._rows == rows:
            return
        for parameter, (_, buffer, _) in zip(self._parameters, self._pairs(rows)):
            own = buffer[: self._context]
            if self._context > shortest:
                own = np.concatenate((np.zeros_like(own[:shortest]), own[shortest:]))
            parameter.set_data(ms.Tensor.from_numpy(own))
        self._rows = rows

    with mock.patch.object(binding.CacheBinding, "_rebind", rebind):
        yield


# ---- pictures ---------------------------------------------------------------------------------------------------------


def bilinear(right: Any, size: int, table: int) -> Any:
    at = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(table / size) - 0.5
    base = np.floor(at)
    t = (at - base).astype(np.float32)
    taps = np.clip(base[:, None].astype(np.int64) + np.arange(-1, 3), 0, table - 1)
    return taps, np.stack((0 * t, 1 - t, t, 0 * t), -1)


def rows_for_columns(right: Any, h: int, w: int, head_dim: int) -> Any:
    turned = (a.reshape(w, h, -1).swapaxes(0, 1).reshape(h * w, -1) for a in right(w, h, head_dim))
    return tuple(turned)


def columns_first(right: Any, h: int, w: int, kernel: tuple[int, ...]) -> np.ndarray:
    kh, kw = kernel
    return np.arange(h * w).reshape(h // kh, kh, w // kw, kw).transpose(2, 0, 1, 3).reshape(-1)


def within_block_columns_first(right: Any, h: int, w: int, kernel: tuple[int, ...]) -> np.ndarray:
    kh, kw = kernel
    return np.arange(h * w).reshape(h // kh, kh, w // kw, kw).transpose(0, 2, 3, 1).reshape(-1)


def one_patch_too_many(right: Any, self: Any, patches: Any, h: int, w: int, bucket: int) -> Any:
    inputs = right(self, patches, h, w, bucket)
    return inputs | {"valid": np.minimum(inputs["valid"] + 1, bucket).astype(np.int32)}


def pictures_exchanged(right: Any, self: Any, pixels: Any, grids: Any, taps: bool = False) -> Any:
    """The features of all pictures in the order of the last one first."""
    features, towers = right(self, pixels, grids, taps)
    return features[::-1], towers


def features_by_last_row(right: Any, self: Any, *arguments: Any, **named: Any) -> Any:
    """Pictures go to the rows of the batch from the last one on."""
    prompt = right(self, *arguments, **named)
    if prompt.features is not None:
        at = 0
        for row in reversed(prompt.rows):
            media = np.flatnonzero(row.embeds_mask)
            row.embeds[media] = prompt.features[at : at + len(media)]
            at += len(media)
    return prompt


def media_one_off(right: Any, self: Any, *arguments: Any, **named: Any) -> Any:
    """Features stand one token behind their places."""
    prompt = right(self, *arguments, **named)
    if prompt.features is not None:
        for row in prompt.rows:
            row.embeds, row.embeds_mask = np.roll(row.embeds, 1, 0), np.roll(row.embeds_mask, 1)
    return prompt


def _host(name: str, what: str, place: str, change: Callable[[], Context], **more: Any) -> Fault:
    return Fault(name, what, "host", place, change, **more)


FAULTS = (
    _host(
        "rope-theta", "rotary base 10000 for 800000", "layers.0", instead(engine, "text_rope", wrong_theta)
    ),
    _host(
        "late-decoding",
        "decode positions one too small",
        "layers.0",
        instead(engine, "text_rope", late_decoding),
    ),
    _host(
        "padding-counted",
        "left padding counts in a prompt's positions, not when decoding",
        "layers.0",
        instead(KimiVLForward, "prepare", padding_counted),
    ),
    _host(
        "padding-seen", "left padding is attended to", "layers.0", instead(forward, "_token_mask", all_seen)
    ),
    _host(
        "decode-slot",
        "decoded tokens stored one slot too far",
        "layers.0",
        text_calls(slot_too_far_when_decoding),
    ),
    _host("chunk-at-zero", "every chunk starts in slot 0", "layers.0", text_calls(chunk_at_zero)),
    _host("chunk-cut", "last token of a whole chunk lost", "layers.0", text_calls(last_of_chunk_dropped)),
    _host(
        "row-before-last", "logits of the token before the last", "last_logits", text_calls(row_before_last)
    ),
    _host(
        "rows-exchanged",
        "rows of a batch decode with each other's cache",
        "layers.0",
        instead(BundleGraphs, "text", rows_exchanged),
        batch=2,
    ),
    _host(
        "stale-bucket",
        "the longer cache does not hold what the shorter one does",
        "layers.0",
        stale_bucket,
        target="cpu",
        through="mindspore",
    ),
    _host(
        "bilinear",
        "position table interpolated bilinearly",
        "vision_out",
        instead(positions, "_cubic", bilinear),
    ),
    _host(
        "bicubic-half",
        "bicubic with a = -0.5 for -0.75",
        "vision_out",
        partial(mock.patch.object, positions, "BICUBIC_A", -0.5),
    ),
    _host(
        "rows-for-columns",
        "rows and columns exchanged in the tower's rotation",
        "vision_out",
        instead(engine, "vision_rope", rows_for_columns),
    ),
    _host(
        "merge-order",
        "merged blocks column by column",
        "vision_out",
        instead(engine, "merge_order", columns_first),
    ),
    _host(
        "block-order",
        "patches of a merged block column by column",
        "vision_out",
        instead(engine, "merge_order", within_block_columns_first),
    ),
    _host(
        "one-patch-too-many",
        "one padding patch counts as the picture's",
        "vision_out",
        instead(engine.Engine, "vision_inputs", one_patch_too_many),
    ),
    _host(
        "pictures-exchanged",
        "pictures in reversed order",
        "projector_out",
        instead(engine.Engine, "encode_images", pictures_exchanged),
    ),
    _host(
        "features-by-last-row",
        "pictures given to the rows of a batch in reversed order",
        "inputs_embeds",
        instead(KimiVLForward, "prepare", features_by_last_row),
    ),
    _host(
        "media-one-off",
        "pictures' features one token too far",
        "inputs_embeds",
        instead(KimiVLForward, "prepare", media_one_off),
    ),
)
