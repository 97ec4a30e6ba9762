"""The call that the network and a reloaded bundle share: Hugging Face arguments in, logits and cache out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from transformers.utils import ModelOutput

from .cache import LatentCache
from .configuration import ModelConfig
from .engine import Engine, Row, RowOutput
from .positions import MAX_SIDE


class InputError(ValueError):
    """Arguments that do not fit each other or the model; the message says which and how."""


@dataclass
class KimiVLOutput(ModelOutput):
    """What a forward gives. Places that the attention mask leaves out hold zeros (-1 for experts).

    loss: mean cross entropy of the next token, if labels were given.
    logits: [B, T, V] fp32.
    past_key_values: the cache, to go on from.
    hidden_states: embeddings, each layer's output, and the last one after the final norm; L + 1 times [B, T, H].
    image_hidden_states: projected image features of all images [M, H].
    taps: with ``output_taps=True`` numpy arrays ``inputs_embeds`` [B, T, H], ``hidden_states`` [L, B, T, H] (every
        layer's output, the last *before* the final norm), ``router_topk_indices`` [Lm, B, T, k] sorted by number,
        and of images ``vision_out`` [M, 4, D] and ``projector_out`` [M, H].
    """

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    image_hidden_states: Any = None
    taps: Any = None


def to_numpy(value: Any) -> Any:
    """A numpy array of an argument that may be a MindSpore tensor (of any dtype), an array or a list; None stays."""
    if value is None:
        return None
    if isinstance(value, ms.Tensor):
        return value.float().asnumpy() if value.dtype == ms.bfloat16 else value.asnumpy()
    return np.asarray(value)


@dataclass
class Prompt:
    """A call's arguments, checked: every row's tokens without padding."""

    ids: np.ndarray  # [B, T] int64
    mask: np.ndarray  # [B, T] bool, True = a token
    rows: list[Row]
    features: np.ndarray | None  # [M, H]
    towers: np.ndarray | None  # [M, 4, D], with taps


class KimiVLForward:
    """Mixed into a class that has an `engine`, a `config`, and `array(name)` for single weights."""

    engine: Engine
    dtype: ms.Type

    def array(self, name: str) -> np.ndarray:
        """One weight, in the dtype that it is held in."""
        raise NotImplementedError

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.config

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: Any = None,
        pixel_values: Any = None,
        image_grid_hws: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_taps: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        cache_position: Any = None,
    ) -> KimiVLOutput | tuple:
        """Logits of every token.

        Args:
            input_ids: [B, T] int32 or int64, left padded.
            attention_mask: [B, T], 1 = a token. With `past_key_values` it may also cover the cached tokens.
            position_ids: [B, T]; default: each token's number in its row.
            past_key_values: the cache of an earlier call, extended in place.
            inputs_embeds: [B, T, H], instead of `input_ids`.
            pixel_values: patches of all images [N, 3, 14, 14], in row order over the batch.
            image_grid_hws: patch rows and columns of each image [n, 2].
            labels: [B, T], -100 = not counted; gives `loss`.
            use_cache: False keeps no cache.
            output_taps: see :class:`KimiVLOutput`.

        Raises:
            InputError: arguments that do not fit.
            TooLongError: the context, or the largest picture, would be exceeded.
        """
        del cache_position  # a static cache knows its own positions
        if output_attentions:
            raise InputError("output_attentions: attention weights are never materialised; leave it False")
        prompt = self.prepare(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, pixel_values, image_grid_hws,
            output_taps,
        )  # fmt: skip
        b, t = prompt.ids.shape
        cache = past_key_values or self.engine.new_cache(b)
        taps = output_taps or output_hidden_states
        rows = self.engine.extend(cache, prompt.rows, all_logits=True, taps=taps)
        logits = spread([r.logits for r in rows], prompt.mask, self.model_config.text.vocab_size)
        out = KimiVLOutput(logits=ms.Tensor(logits))
        if labels is not None:
            out.loss = ms.Tensor(np.float32(_loss(logits, to_numpy(labels), self.model_config.ignore_index)))
        if use_cache is not False:
            out.past_key_values = cache
        if taps:
            arrays = self._taps(rows, prompt)
            if output_hidden_states:
                states = arrays["hidden_states"]
                last = self._final_norm(states[-1])
                chain = [arrays["inputs_embeds"], *states[:-1], last]
                out.hidden_states = tuple(ms.Tensor(np.ascontiguousarray(a)) for a in chain)
            if output_taps:
                out.taps = arrays
        if prompt.features is not None:
            out.image_hidden_states = ms.Tensor(prompt.features)
        return out if return_dict else out.to_tuple()

    def prepare(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: LatentCache | None = None,
        inputs_embeds: Any = None,
        pixel_values: Any = None,
        image_grid_hws: Any = None,
        taps: bool = False,
    ) -> Prompt:
        """Check the arguments, encode the images, and cut the padding off each row.

        Raises:
            InputError, TooLongError: see :meth:`forward`.
        """
        text = self.model_config.text
        ids, embeds = to_numpy(input_ids), to_numpy(inputs_embeds)
        if (ids is None) == (embeds is None):
            raise InputError("input_ids, inputs_embeds: give exactly one of them")
        if ids is None:
            if embeds.ndim != 3 or embeds.shape[2] != text.hidden_size:
                raise InputError(
                    f"inputs_embeds: shape {embeds.shape}, expected (batch, tokens, {text.hidden_size})"
                )
            ids = np.full(embeds.shape[:2], self.model_config.pad_token_id)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(
                f"input_ids: {ids.dtype} of shape {ids.shape}, expected integers of shape (batch, tokens)"
            )
        ids = ids.astype(np.int64)
        batch, tokens = ids.shape
        if cache is not None and len(cache.rows) != batch:
            raise InputError(f"past_key_values: holds {len(cache.rows)} rows, but input_ids has {batch}")
        mask = _token_mask(to_numpy(attention_mask), batch, tokens)
        bad = ids[mask & ((ids < 0) | (ids >= text.vocab_size))]
        if bad.size:
            raise InputError(f"input_ids: id {bad[0]} is outside the vocabulary of {text.vocab_size}")
        if not mask.any(1).all():
            raise InputError(f"attention_mask: row {int(np.argmin(mask.any(1)))} has no token at all")
        positions = to_numpy(position_ids)
        if positions is not None:
            positions = np.broadcast_to(positions, (batch, tokens))
        features, towers = self._encode(pixel_values, image_grid_hws, ids, mask, embeds is not None, taps)
        replace = np.zeros_like(mask)
        rows_embeds: np.ndarray | None = None
        if embeds is not None:
            replace, rows_embeds = mask, embeds.astype(np.float32)
        elif features is not None:
            replace = mask & (ids == self.model_config.media_placeholder_token_id)
            rows_embeds = np.zeros((batch, tokens, text.hidden_size), np.float32)
            rows_embeds[replace] = features
        rows = [
            Row(
                ids=ids[b][mask[b]],
                embeds=None if rows_embeds is None else rows_embeds[b][mask[b]],
                embeds_mask=replace[b][mask[b]],
                positions=None if positions is None else positions[b][mask[b]],
            )
            for b in range(batch)
        ]
        return Prompt(ids, mask, rows, features, towers)

    def _encode(
        self, pixel_values: Any, grids: Any, ids: np.ndarray, mask: np.ndarray, embeds: bool, taps: bool
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Features of all images; the counts of patches and placeholders are checked before anything runs."""
        pixels, hws = to_numpy(pixel_values), to_numpy(grids)
        vision, media = self.model_config.vision, self.model_config.media_placeholder_token_id
        kh, kw = vision.merge_kernel_size
        found = 0 if embeds else int((mask & (ids == media)).sum())
        if pixels is None or len(pixels) == 0:
            if found:
                raise InputError(
                    f"pixel_values: missing, but input_ids has {found} image placeholders (id {media})"
                )
            return None, None
        if embeds:
            raise InputError(
                "pixel_values: cannot be combined with inputs_embeds, which already hold the images"
            )
        if hws is None:
            raise InputError(
                "image_grid_hws: missing; pixel_values needs the patch rows and columns of each image"
            )
        hws = hws.astype(np.int64).reshape(-1, 2)
        if (hws < 1).any() or (hws % (kh, kw)).any():
            raise InputError(
                f"image_grid_hws: {hws.tolist()}, expected sides that are multiples of {kh} and {kw}"
            )
        if (hws > MAX_SIDE).any():
            raise InputError(
                f"image_grid_hws: a side of {hws.max()} patches, but the vision tower's positions end at "
                f"{MAX_SIDE}; cut or scale the picture"
            )
        if pixels.shape[1:] != (3, vision.patch_size, vision.patch_size) or len(pixels) != hws.prod(1).sum():
            raise InputError(
                f"pixel_values: shape {pixels.shape}, but image_grid_hws {hws.tolist()} takes "
                f"({hws.prod(1).sum()}, 3, {vision.patch_size}, {vision.patch_size})"
            )
        wanted = int(hws.prod(1).sum()) // (kh * kw)
        if wanted != found:
            raise InputError(
                f"input_ids: {found} image placeholders (id {media}), but the {len(hws)} images give {wanted} features; "
                "use the processor, which writes one placeholder per feature"
            )
        features, towers = self.engine.encode_images(pixels, hws, taps)
        return np.concatenate(features), np.concatenate(towers) if taps else None

    def _taps(self, rows: list[RowOutput], prompt: Prompt) -> dict[str, np.ndarray]:
        text, mask = self.model_config.text, prompt.mask
        states = [np.concatenate(r.hidden_states, 1) for r in rows]
        out = {
            "inputs_embeds": self._embeddings(prompt),
            "hidden_states": np.stack(
                [
                    spread([[s[i]] for s in states], mask, text.hidden_size)
                    for i in range(text.num_hidden_layers)
                ]
            ),
        }
        if text.moe_layers:
            chosen = [np.sort(np.concatenate(r.router_topk_indices, 1), -1) for r in rows]
            out["router_topk_indices"] = np.stack(
                [
                    spread([[c[i]] for c in chosen], mask, text.num_experts_per_tok, fill=-1)
                    for i in range(len(text.moe_layers))
                ]
            )
        if prompt.features is not None and prompt.towers is not None:
            out |= {"vision_out": prompt.towers, "projector_out": prompt.features}
        return out

    def _embeddings(self, prompt: Prompt) -> np.ndarray:
        table = self.array("language_model.model.embed_tokens.weight")
        out = np.zeros((*prompt.ids.shape, table.shape[1]), np.float32)
        for b, row in enumerate(prompt.rows):
            x = table[row.ids].astype(np.float32)
            if row.embeds is not None and row.embeds_mask is not None:
                x = np.where(row.embeds_mask[:, None], row.embeds, x)
            out[b][prompt.mask[b]] = x
        return out

    def _final_norm(self, x: np.ndarray) -> np.ndarray:
        weight = self.array("language_model.model.norm.weight")
        wide = x.astype(np.float64)
        scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + self.model_config.text.rms_norm_eps)
        return (wide * scale * weight).astype(np.float32)


def _token_mask(attention_mask: np.ndarray | None, batch: int, tokens: int) -> np.ndarray:
    if attention_mask is None:
        return np.ones((batch, tokens), bool)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise InputError(f"attention_mask: shape {attention_mask.shape}, expected ({batch}, {tokens})")
    mask = attention_mask[:, -tokens:] > 0  # a longer mask also covers what the cache holds
    for b, row in enumerate(mask):
        if (np.diff(np.flatnonzero(row)) > 1).any():
            raise InputError(
                f"attention_mask: row {b} has a gap between tokens; only padding at the sides can be left out"
            )
    return mask


def spread(parts: list[list[np.ndarray]], mask: np.ndarray, width: int, fill: int = 0) -> np.ndarray:
    """Rows without padding, each in parts [n, width], back to [B, T, width]."""
    first = parts[0][0]
    out = np.full((*mask.shape, width), fill, first.dtype)
    for b, row in enumerate(parts):
        out[b][mask[b]] = np.concatenate(row)
    return out


def _loss(logits: np.ndarray, labels: np.ndarray, ignore: int) -> float:
    """Mean cross entropy of logits [B, T, V] against the next label."""
    if labels.shape != logits.shape[:2]:
        raise InputError(f"labels: shape {labels.shape}, expected {logits.shape[:2]}")
    total, count = 0.0, 0
    for row, target in zip(logits[:, :-1], labels[:, 1:]):
        keep = target != ignore
        x = row[keep].astype(np.float64)
        top = x.max(-1, initial=-np.inf, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(x - top).sum(-1))
        total += float((norm - x[np.arange(len(x)), target[keep]]).sum())
        count += int(keep.sum())
    return total / count if count else float("nan")
