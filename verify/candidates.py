"""What is held against the reference: anything that runs the same inputs and gives named taps.

:func:`inspect` looks at a directory and says what it is, without importing MindSpore; :func:`open_candidate` loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..convert.manifest import MANIFEST as CONVERTED
from ..export.bundle import MANIFEST as BUNDLE
from ..export.bundle import Bundle
from ..modeling.buckets import contexts, largest_image
from ..modeling.configuration import ModelConfig
from ..modeling.kernels import library
from ..modeling.settings import in_token_limit
from .cases import Limits, Source

Inputs = Mapping[str, np.ndarray]
Taps = dict[str, np.ndarray]

CHUNK = 256  # tokens of a prefill graph when the network itself is the candidate
CONTEXT = 1024  # of its largest cache: three lengths, as those of a larger one


class CandidateError(ValueError):
    """A directory that is no candidate, or one that does not belong to the reference; the message says why."""


class Candidate(Protocol):
    """Runs inputs; see :class:`verify.cases.Case` for them and :class:`verify.oracle.Oracle` for the taps."""

    name: str
    limits: Limits

    def describe(self) -> dict[str, Any]:
        """What ran, for the report: `kind`, `path`, `stage`, `runs_on`, `dtype`, and `taps`, whether it has any."""

    def run(self, inputs: Inputs, calls: Sequence[int]) -> Taps:
        """The prompt in calls of so many columns, each continuing the cache of the one before.

        Returns:
            At least `logits`; what is not available is left out. `last_logits` [B, calls, V]: of each call's last
            column, by the graphs that generation runs, and on what these wrote into the cache. `tapped_logits_differ`,
            where taps come from other graphs than the logits: the largest difference between the two graphs' logits,
            which should be 0.
        """

    def greedy(self, inputs: Inputs, n: int) -> np.ndarray:
        """`n` greedy tokens `[B, n]` after the prompt, no stop token honoured."""


@dataclass(frozen=True)
class Found:
    """What :func:`inspect` saw."""

    path: Path
    kind: str  # "bundle", "converted directory" or "published directory"
    config: ModelConfig
    limits: Limits
    taps: bool = True
    target: str = ""  # of a bundle
    interpreted: bool = False
    rounded: str = (
        ""  # the dtype that operators' results or their inputs are rounded to; empty: arithmetic in fp32
    )

    @property
    def arithmetic(self) -> Literal["lifted", "rounded"]:
        return "rounded" if self.rounded else "lifted"

    @property
    def how(self) -> str:
        """Behind its kind, for a person."""
        return (", interpreted" if self.interpreted else "") + (
            f", {self.arithmetic}" if self.interpreted or self.rounded else ""
        )

    @property
    def stage(self) -> str:
        if self.interpreted:
            return "interpreter"
        return "bundle" if self.kind == "bundle" else "network"


def inspect(path: str | Path, through: str | None = None, arithmetic: str = "lifted") -> Found:
    """What kind of candidate a directory is, and what it can take.

    Args:
        through: what runs it, "mindspore" or "interpreter". Default: MindSpore, for a bundle of another target than
            this machine's CPU the interpreter.
        arithmetic: of the interpreter, "lifted" or "rounded".

    Raises:
        CandidateError, BundleError: it is none, or its manifest is damaged, or it cannot be run so.
        ConfigError: its configuration is not Kimi-VL's.
    """
    path = Path(path)
    if not path.is_dir():
        raise CandidateError(
            f"--candidate: {path} is not a directory; give a converted directory or a bundle"
        )
    config = ModelConfig.from_file(path)
    if (path / BUNDLE).is_file():
        bundle = Bundle.load(path)
        limits = Limits(bundle.contexts, bundle.prefill_chunk, bundle.patches[-1], bundle.smaller_chunks)
        here = bundle.target == "cpu"
        interpreted = through == "interpreter" or (through is None and not here)
        rounded = ""
        if arithmetic == "rounded":
            rounded = bundle.parameter_dtype or bundle.dtype
            has_operators = bundle.kernels == "cpu"
            if interpreted:  # what the CPU operators give is fp32 beside bf16 weights
                why = "its graphs compute in float32" if rounded == "float32" or has_operators else None
            else:
                why = _why_unrounded(rounded, has_operators)
            if why:
                raise CandidateError(f"--arithmetic: {path} cannot be rounded, {why}; leave it out")
        return Found(path, "bundle", config, limits, bundle.taps, bundle.target, interpreted, rounded)
    if through == "interpreter":
        raise CandidateError(
            f"--through: {path} is no bundle, and only graphs of a bundle can be interpreted"
        )
    if arithmetic == "rounded" and (why := _why_unrounded(config.dtype, library.available())):
        raise CandidateError(f"--arithmetic: {path} cannot be rounded, {why}; leave it out")
    kind = "converted directory" if (path / CONVERTED).is_file() else "published directory"
    rounded = config.dtype if arithmetic == "rounded" else ""
    return Found(path, kind, config, _network_limits(path, config), rounded=rounded)


def _why_unrounded(dtype: str, has_operators: bool) -> str | None:
    """Why graphs that MindSpore runs on a CPU compute in fp32, whatever is asked; None if they can round."""
    if dtype != "bfloat16" or not has_operators:
        return "MindSpore computes it in fp32"
    if not library.available() or not library.can_round():
        return "this machine has no instructions for bf16"
    return None


def open_candidate(found: Found) -> Candidate:
    """Loads what :func:`inspect` found; the network computes in fp32 on the weights as they are stored.

    Raises:
        ValueError: the weights or graphs are damaged; the message says how.
    """
    if found.interpreted:
        from .interpreted import InterpretedModel

        model = InterpretedModel.from_bundle(found.path, verify=True, arithmetic=found.arithmetic)
        return ModelCandidate(model, found)
    if found.kind == "bundle":
        from ..export import MindIRModel

        return ModelCandidate(MindIRModel.from_bundle(found.path, verify=True), found)
    from ..modeling.modeling_kimi_vl import KimiVLForConditionalGeneration

    model = KimiVLForConditionalGeneration.from_pretrained(
        found.path,
        max_context=found.limits.context,
        prefill_chunk=found.limits.chunk,
        max_image_patches=found.limits.patches,
    )
    return ModelCandidate(model, found)


def mindspore_on(where: str, cpu_operators: bool, rounded: str = "") -> str:
    """What a report says that MindSpore ran on, and in which arithmetic."""
    import mindspore

    text = f"MindSpore {mindspore.__version__} on {where}"
    if cpu_operators:
        how = f"inputs of products rounded to {rounded}" if rounded else "fp32"
        text += f", C++ operators ({library.isa()}), {how}"
    return text


def _in_its_arithmetic(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of :class:`ModelCandidate` while the CPU operators round, or do not, as the candidate is judged."""

    @functools.wraps(method)
    def run(self: ModelCandidate, *args: Any) -> Any:
        with library.exactly(not self.found.rounded):
            return method(self, *args)

    return run


class ModelCandidate:
    """The network or a bundle, reloaded or interpreted, through the call they share."""

    def __init__(self, model: Any, found: Found):
        self.model = model
        self.found = found
        self.limits = found.limits
        self.name = found.path.name or str(found.path)

    def describe(self) -> dict[str, Any]:
        import mindspore

        more: dict[str, Any] = {}
        where = str(mindspore.get_context("device_target"))
        runs_on = mindspore_on(where, getattr(self.model, "cpu_operators", False), self.found.rounded)
        if self.found.rounded:
            more = {"arithmetic": self.found.arithmetic}
        if self.found.interpreted:
            import torch

            from .mindir.witnesses import unwitnessed

            how = f"results rounded to {self.found.rounded}" if self.found.rounded else "arithmetic in fp32"
            where, runs_on = "CPU", f"node by node in Torch {torch.__version__} on CPU, {how}"
            more = {
                "arithmetic": self.found.arithmetic,
                "unwitnessed": unwitnessed(self.model.operators),
            }
        if self.found.target:
            more["target"] = self.found.target
        if self.limits.smaller_chunks:
            more["smaller_chunks"] = list(self.limits.smaller_chunks)
        return more | {
            "kind": self.found.kind,
            "stage": self.found.stage,
            "path": str(self.found.path),
            "runs_on": runs_on,
            "on_device": where != "CPU",
            "dtype": _dtype_name(self.model.dtype),
            "context": self.limits.context,
            "prefill_chunk": self.limits.chunk,
            "taps": self.found.taps,
        }

    @_in_its_arithmetic
    def run(self, inputs: Inputs, calls: Sequence[int]) -> Taps:
        logits, _ = self._calls(inputs, calls, taps=False)
        logits["last_logits"] = self._last_logits(inputs, calls)
        if not self.found.taps:
            return logits
        again, taps = self._calls(inputs, calls, taps=True)
        differ = np.abs(again["logits"].astype(np.float64) - logits["logits"]).max(initial=0.0)
        return taps | logits | {"tapped_logits_differ": np.asarray(differ)}

    @_in_its_arithmetic
    def once(self, inputs: Inputs, calls: Sequence[int]) -> Taps:
        """As :meth:`run`, by the graphs with taps alone where there are any."""
        logits, taps = self._calls(inputs, calls, taps=self.found.taps)
        return taps | logits

    def graphs(self) -> dict[str, bool]:
        """Whether each graph of a bundle ran so far, by its name."""
        bundle = getattr(self.model, "bundle", None)
        return {name: name in self.model.used for name in bundle.graphs} if bundle else {}

    def own_source(self) -> Source | None:
        """Its own processor as a source of inputs, where it has one."""
        from .prompts import ProcessorSource, has_processor

        if not has_processor(self.found.path):
            return None
        return ProcessorSource(self.found.path, self.found.config, own_pictures=True)

    @_in_its_arithmetic
    def greedy(self, inputs: Inputs, n: int) -> np.ndarray:
        ids = self.model.generate(
            **inputs, max_new_tokens=n, do_sample=False, repetition_penalty=1.0, eos_token_id=None
        )
        return _numpy(ids)[:, inputs["input_ids"].shape[1] :]

    def _last_logits(self, inputs: Inputs, calls: Sequence[int]) -> np.ndarray:
        """Continuing calls hand in rows of the embedding table, as a picture's features come: decode graphs take both."""
        cache = self.model.engine.new_cache(len(inputs["input_ids"]))
        pictures = {k: inputs[k] for k in ("pixel_values", "image_grid_hws") if k in inputs}
        several = len(calls) > 1
        table = self.model.array("language_model.model.embed_tokens.weight") if several else np.empty(0)
        at, found = 0, []
        for n in calls:
            ids, mask = inputs["input_ids"][:, at : at + n], inputs["attention_mask"][:, : at + n]
            if at == 0:
                prompt = self.model.prepare(ids, mask, cache=cache, **pictures)
            else:
                prompt = self.model.prepare(None, mask, cache=cache, inputs_embeds=table[ids])
            rows = self.model.engine.extend(cache, prompt.rows)
            found.append(np.stack([row.logits[-1][-1] for row in rows]))
            at += n
        return np.stack(found, axis=1)

    def _calls(self, inputs: Inputs, calls: Sequence[int], taps: bool) -> tuple[Taps, Taps]:
        """Logits (and the pictures' features), and the taps, of all calls, put together again."""
        cache, at = None, 0
        logits, tapped, pictures = [], [], {}
        for n in calls:
            arguments: dict[str, Any] = {
                "input_ids": inputs["input_ids"][:, at : at + n],
                "attention_mask": inputs["attention_mask"][:, : at + n],
            }
            if at == 0 and "pixel_values" in inputs:
                arguments |= {k: inputs[k] for k in ("pixel_values", "image_grid_hws")}
            if taps:
                arguments["output_taps"] = True
            out = self.model(**arguments, past_key_values=cache)
            logits.append(_numpy(out.logits))
            if taps:
                tapped.append({k: _numpy(v) for k, v in out.taps.items()})
            if at == 0 and out.image_hidden_states is not None:
                pictures["projector_out"] = _numpy(out.image_hidden_states)
            cache, at = out.past_key_values, at + n
        whole = {"logits": np.concatenate(logits, axis=1)} | pictures
        joined: Taps = {}
        if tapped:
            for name, value in tapped[0].items():
                axis = TOKEN_AXIS.get(name)
                joined[name] = value if axis is None else np.concatenate([t[name] for t in tapped], axis)
        return whole, joined


def require_same_model(reference: Path, found: Found) -> ModelConfig:
    """The reference's configuration, which must be the candidate's too.

    Raises:
        CandidateError: the reference is no published checkpoint, or a field of the network differs.
        ConfigError: the reference has no configuration of Kimi-VL.
    """
    if (reference / CONVERTED).is_file():
        raise CandidateError(
            f"--reference: {reference} is a converted directory; give the published checkpoint it was made from"
        )
    config = ModelConfig.from_file(reference)
    for part in ("text", "vision"):
        ours, theirs = asdict(getattr(config, part)), asdict(getattr(found.config, part))
        for name, value in ours.items():
            if value != theirs[name]:
                raise CandidateError(
                    f"--candidate: {found.path} has {part}_config.{name} {theirs[name]!r}, the reference {value!r}; "
                    "was it made from another checkpoint?"
                )
    return config


def _dtype_name(dtype: Any) -> str:
    """`bfloat16` of `mindspore.bfloat16`, whose name is BFloat16."""
    return str(dtype).lower().rsplit(".", 1)[-1]


TOKEN_AXIS = {"inputs_embeds": 1, "hidden_states": 2, "router_topk_indices": 2}  # others: of the pictures


def _numpy(value: Any) -> np.ndarray:
    """fp32 or integers, from an array or a MindSpore tensor (numpy has no bfloat16)."""
    if hasattr(value, "asnumpy"):
        value = value.float().asnumpy() if "float" in str(value.dtype).lower() else value.asnumpy()
    return np.asarray(value)


def _network_limits(path: Path, config: ModelConfig) -> Limits:
    """Sizes for a network built for verification: a context small enough has a chunk that a prompt can exceed."""
    context = min(CONTEXT, config.text.max_position_embeddings)
    patches = largest_image(in_token_limit(path))
    return Limits(tuple(contexts(context)), max(1, min(CHUNK, context // 2)), patches)
