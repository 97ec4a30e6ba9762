"""Text generation on the host: what a GenerationConfig says, one decode step per token."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from transformers.utils import ModelOutput

from .cache import LatentCache
from .engine import Row
from .forward import InputError, KimiVLForward, to_numpy
from .sampling import Sampling

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20  # as transformers


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` gives with return_dict_in_generate=True."""

    sequences: Any = None
    past_key_values: Any = None


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


# Options of transformers' GenerationConfig that we take, with transformers' defaults.
_OPTIONS: dict[str, Any] = {
    "max_new_tokens": None, "max_length": None, "min_new_tokens": None, "do_sample": False, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": None,
    "return_dict_in_generate": False,
}  # fmt: skip
# Options that choose no token: where a cache lives, how a graph is compiled, what belongs to a mode that we refuse.
_WITHOUT_EFFECT = {
    "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "compile_config", "disable_compile", "low_memory", "prefill_chunk_size", "continuous_batching_config",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "renormalize_logits",
    "remove_invalid_values", "transformers_version", "_from_model_config",
}  # fmt: skip
# All others are not implemented; beside None these values ask for nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "penalty_alpha": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1, "min_p": 0, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "length_penalty": 1, "early_stopping": False, "diversity_penalty": 0, "encoder_repetition_penalty": 1,
    "output_scores": False, "output_logits": False, "output_attentions": False, "output_hidden_states": False,
    "min_length": 0, "guidance_scale": 1, "token_healing": False, "use_mtp": False,
}  # fmt: skip


@functools.cache
def _known_options() -> frozenset[str]:
    """Every option of transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict()) | _OPTIONS.keys() | _NEUTRAL.keys()


def resolve(base: Any, override: Any, kwargs: dict[str, Any], default_pad: int) -> Settings:
    """Settings from the model's generation config, one given to the call, and the call's own options, in that order.

    Raises:
        InputError: an option that is unknown or not implemented.
    """
    values, asked = dict(_OPTIONS), dict[str, Any]()
    for given in (_given(base), _given(override), kwargs):
        if given.get("max_length") is not None and given.get("max_new_tokens") is None:
            values["max_new_tokens"] = None  # of two limits the one given last counts
        values |= {name: value for name, value in given.items() if name in _OPTIONS}
        asked |= {name: value for name, value in given.items() if name not in _OPTIONS}
    for name, value in asked.items():
        if name not in _known_options():
            if name in kwargs:
                raise InputError(f"generate: there is no option {name!r}")
        elif name not in _WITHOUT_EFFECT and value is not None and value != _NEUTRAL.get(name):
            raise InputError(f"generate: {name}={value!r} is not implemented; leave it out")
    if values["max_new_tokens"] is not None and values["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens: {values['max_new_tokens']}, expected a positive number")
    eos, pad = values["eos_token_id"], values["pad_token_id"]

    def number(name: str) -> float:
        return 1.0 if values[name] is None else float(values[name])

    sampling = Sampling(
        do_sample=bool(values["do_sample"]),
        temperature=number("temperature"),
        top_k=int(values["top_k"] or 0),
        top_p=number("top_p"),
        repetition_penalty=number("repetition_penalty"),
    )
    return Settings(
        sampling=sampling,
        max_new_tokens=values["max_new_tokens"],
        max_length=values["max_length"],
        min_new_tokens=int(values["min_new_tokens"] or 0),
        eos=[] if eos is None else [int(e) for e in np.atleast_1d(eos)],
        pad=default_pad if pad is None else int(pad),
        return_dict=bool(values["return_dict_in_generate"]),
    )


def _given(config: Any) -> dict[str, Any]:
    """What a generation config says; its absent options are None."""
    if config is None:
        return {}
    values = config if isinstance(config, dict) else config.to_diff_dict()
    return {name: value for name, value in values.items() if value is not None}


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
            seed: of the sampling; each row draws from its own stream. Default: drawn from numpy's global generator,
                which `mindspore.set_seed` and `transformers.set_seed` seed.
            options: max_new_tokens (default 20), max_length, min_new_tokens, do_sample, temperature, top_k (default 50),
                top_p, repetition_penalty, eos_token_id (one id, several, or None = no stop), pad_token_id,
                return_dict_in_generate. Options of transformers that are not implemented are errors.

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
        if seed is None:
            seed = int(np.random.randint(2**63, dtype=np.int64)) if settings.sampling.do_sample else 0
        rngs = [np.random.default_rng([seed, b]) for b in range(batch)]
        seen = [ids for ids, _ in rows]
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
                    scores[[e for e in settings.eos if 0 <= e < len(scores)]] = -np.inf
                column[b] = settings.sampling.choose(scores, seen[b], rngs[b])
                seen[b] = np.append(seen[b], column[b])
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
