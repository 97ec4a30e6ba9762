"""Text generation on the host: what a GenerationConfig says, sampling in numpy, one decode step per token."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from transformers.utils import ModelOutput

from .cache import LatentCache
from .engine import Row
from .forward import InputError, KimiVLForward, to_numpy

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20  # as transformers


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` gives with return_dict_in_generate=True."""

    sequences: Any = None
    past_key_values: Any = None


@dataclass
class Sampling:
    """How the next token is chosen."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.do_sample and not self.temperature > 0:
            raise InputError(
                f"temperature: {self.temperature}, expected a positive number; use do_sample=False for greedy"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p}, expected a number in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k}, expected 0 (all) or a positive integer")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty: {self.repetition_penalty}, expected a positive number")

    def choose(self, logits: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> int:
        """The next token of one row: logits [V] fp32, the row's ids so far."""
        if self.repetition_penalty != 1.0:
            logits = logits.copy()
            ids = np.unique(seen)
            picked = logits[ids]
            logits[ids] = np.where(
                picked < 0, picked * self.repetition_penalty, picked / self.repetition_penalty
            )
        if not self.do_sample:
            return int(logits.argmax())
        scores = logits / np.float32(self.temperature)
        candidates = None
        if 0 < self.top_k < len(scores):
            kth = np.partition(scores, -self.top_k)[-self.top_k]
            candidates = np.flatnonzero(scores >= kth)
            scores = scores[candidates]
        weights = np.exp(scores.astype(np.float64) - scores.max())
        if self.top_p < 1.0:
            # The smallest set of likeliest tokens whose probability reaches top_p.
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self.top_p * weights.sum()]] = 0
        total = np.cumsum(weights)
        pick = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        return pick if candidates is None else int(candidates[pick])


@dataclass
class Settings:
    """A resolved generation configuration."""

    sampling: Sampling
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int
    eos: list[int]
    pad: int
    return_dict: bool = False

    def limit(self, prompt: int) -> int:
        """New tokens for a prompt of this many."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            if self.max_length <= prompt:
                raise InputError(
                    f"max_length: {self.max_length}, but the prompt has {prompt} tokens already; use max_new_tokens"
                )
            return self.max_length - prompt
        return _DEFAULT_NEW_TOKENS


# Options of transformers' GenerationConfig that we take, with our defaults.
_OPTIONS: dict[str, Any] = {
    "max_new_tokens": None, "max_length": None, "min_new_tokens": None, "do_sample": False, "temperature": 1.0,
    "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": None,
    "bos_token_id": None, "use_cache": True, "return_dict_in_generate": False,
}  # fmt: skip
# Options that change nothing here unless they ask for something we do not do: name -> values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "num_beams": (1, None), "num_return_sequences": (1, None), "num_beam_groups": (1, None), "penalty_alpha": (None, 0),
    "no_repeat_ngram_size": (0, None), "typical_p": (1.0, None), "min_p": (None, 0), "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None), "length_penalty": (1.0, None), "early_stopping": (False, None),
    "diversity_penalty": (0.0, None), "encoder_repetition_penalty": (1.0, None), "bad_words_ids": (None,),
    "output_scores": (False, None), "output_logits": (False, None), "output_attentions": (False, None),
    "output_hidden_states": (False, None), "stop_strings": (None,), "min_length": (0, None),
}  # fmt: skip


def resolve(base: Any, override: Any, kwargs: dict[str, Any], default_pad: int) -> Settings:
    """Settings from the model's generation config, one given to the call, and the call's own options, in that order.

    Raises:
        InputError: an option that is unknown or not implemented.
    """
    values = dict(_OPTIONS)
    for config in (base, override):
        if config is None:
            continue
        given = config if isinstance(config, dict) else config.to_diff_dict()
        for name, value in given.items():
            if name in values and value is not None:
                values[name] = value
            elif name in _NEUTRAL and value not in _NEUTRAL[name] and config is override:
                raise InputError(f"generation_config.{name}: {value!r} is not implemented; leave it out")
    for name, value in kwargs.items():
        if name in values:
            values[name] = value
        elif name not in _NEUTRAL:
            raise InputError(f"generate: there is no option {name!r}")
        elif value not in _NEUTRAL[name]:
            raise InputError(f"generate: {name}={value!r} is not implemented; leave it out")
    if "max_length" in kwargs and "max_new_tokens" not in kwargs:
        values["max_new_tokens"] = None
    if values["max_new_tokens"] is not None and values["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens: {values['max_new_tokens']}, expected a positive number")
    eos = values["eos_token_id"]
    eos = [] if eos is None else [int(e) for e in np.atleast_1d(eos)]
    pad = values["pad_token_id"]
    sampling = Sampling(
        do_sample=bool(values["do_sample"]),
        temperature=1.0 if values["temperature"] is None else float(values["temperature"]),
        top_k=int(values["top_k"] or 0),
        top_p=1.0 if values["top_p"] is None else float(values["top_p"]),
        repetition_penalty=1.0
        if values["repetition_penalty"] is None
        else float(values["repetition_penalty"]),
    )
    return Settings(
        sampling=sampling,
        max_new_tokens=values["max_new_tokens"],
        max_length=values["max_length"],
        min_new_tokens=int(values["min_new_tokens"] or 0),
        eos=eos,
        pad=default_pad if pad is None else int(pad),
        return_dict=bool(values["return_dict_in_generate"]),
    )


class KimiVLGeneration(KimiVLForward):
    """`generate`, for everything that has a forward."""

    generation_config: Any = None

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_hws: Any = None,
        past_key_values: LatentCache | None = None,
        generation_config: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        inputs: Any = None,
        **options: Any,
    ) -> Any:
        """Prompt and new tokens [B, T + n], in the dtype of `input_ids`; finished rows are filled with pad.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_hws: as the processor gives them.
            past_key_values: a cache that holds the beginning of every row of `input_ids`; extended in place.
            generation_config: transformers' GenerationConfig; `options` win over it, it wins over the model's own.
            streamer: transformers' TextStreamer or alike; one row only.
            seed: of the sampling; each row draws from its own stream.
            options: max_new_tokens (default 20), max_length, min_new_tokens, do_sample, temperature, top_k, top_p,
                repetition_penalty, eos_token_id (one id, several, or None = no stop), pad_token_id.

        Reaching the context ends a row with a warning.

        Raises:
            InputError: options or inputs that do not fit.
            TooLongError: the prompt is longer than the context; the message says by how much.
        """
        if input_ids is None:
            input_ids = inputs
        settings = resolve(self.generation_config, generation_config, options, self.model_config.pad_token_id)
        given = to_numpy(input_ids)
        if given is None or given.ndim != 2:
            raise InputError("input_ids: missing or not of shape (batch, tokens)")
        if streamer is not None and len(given) != 1:
            raise InputError(f"streamer: can show one row, but input_ids has {len(given)}")
        limit = settings.limit(given.shape[1])
        cache, rows = self._prefill(given, attention_mask, pixel_values, image_grid_hws, past_key_values)
        if streamer is not None:
            streamer.put(given)
        new = self._decode(cache, rows, limit, settings, seed, streamer)
        if streamer is not None:
            streamer.end()
        ids = np.concatenate((given, new.astype(given.dtype)), 1)
        result = ms.Tensor(ids)
        if settings.return_dict:
            return GenerateOutput(sequences=result, past_key_values=cache)
        return result

    def _prefill(
        self, given: np.ndarray, mask: Any, pixels: Any, grids: Any, cache: LatentCache | None
    ) -> tuple[LatentCache, list[tuple[np.ndarray, np.ndarray]]]:
        """Run the prompt; for each row its ids without padding and its last logits [V]."""
        if cache is not None and any(cache.lengths):
            return cache, self._continue(given, mask, pixels, grids, cache)
        prompt = self.prepare(given, mask, pixel_values=pixels, image_grid_hws=grids)
        cache = cache or self.engine.new_cache(len(given))
        outputs = self.engine.extend(cache, prompt.rows)
        return cache, [(r.ids, o.logits[-1][-1]) for r, o in zip(prompt.rows, outputs)]

    def _continue(
        self, given: np.ndarray, mask: Any, pixels: Any, grids: Any, cache: LatentCache
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `_prefill`, for rows whose beginning the cache holds already; images are those of the new part."""
        whole = np.ones(given.shape, bool) if mask is None else to_numpy(mask)[:, -given.shape[1] :] > 0
        fresh = whole.copy()
        for b, held in enumerate(cache.lengths):
            at = np.flatnonzero(whole[b])
            if len(at) <= held:
                raise InputError(
                    f"past_key_values: row {b} holds {held} tokens, but input_ids has only {len(at)} and nothing new"
                )
            fresh[b, at[:held]] = False
        prompt = self.prepare(given, fresh, cache=cache, pixel_values=pixels, image_grid_hws=grids)
        outputs = self.engine.extend(cache, prompt.rows)
        return [(given[b][whole[b]], o.logits[-1][-1]) for b, o in enumerate(outputs)]

    def _decode(
        self,
        cache: LatentCache,
        rows: list[tuple[np.ndarray, np.ndarray]],
        limit: int,
        settings: Settings,
        seed: int | None,
        streamer: Any,
    ) -> np.ndarray:
        """New tokens [B, n], n <= limit."""
        batch = len(rows)
        rngs = [np.random.default_rng(None if seed is None else [seed, b]) for b in range(batch)]
        seen = [list(ids) for ids, _ in rows]
        logits = [row_logits for _, row_logits in rows]
        finished = [False] * batch
        columns: list[list[int]] = []
        for step in range(limit):
            column = [settings.pad] * batch
            for b in range(batch):
                if finished[b]:
                    continue
                scores = logits[b]
                if step < settings.min_new_tokens and settings.eos:
                    scores = scores.copy()
                    scores[settings.eos] = -np.inf
                column[b] = settings.sampling.choose(scores, np.asarray(seen[b]), rngs[b])
                seen[b].append(column[b])
                finished[b] = column[b] in settings.eos
            columns.append(column)
            if streamer is not None:
                streamer.put(np.array(column))
            for b in range(batch):
                if not finished[b] and step + 1 < limit and cache.rows[b].length >= cache.context:
                    logger.warning(
                        "generate: row %d reached the context of %d tokens and ends here", b, cache.context
                    )
                    finished[b] = True
            if all(finished) or step + 1 == limit:
                break
            new = [Row(np.array([] if finished[b] else [column[b]], np.int64)) for b in range(batch)]
            for b, out in enumerate(self.engine.extend(cache, new)):
                if out.logits:
                    logits[b] = out.logits[-1][-1]
        return np.array(columns, np.int64).T
