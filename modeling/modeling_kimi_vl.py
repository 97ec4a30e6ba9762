"""`KimiVLForConditionalGeneration`: the network, natively compiled, behind the API people know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from . import running
from .binding import Binding, bind
from .buckets import contexts, largest_image, patch_buckets, prefill_chunks
from .cache import CacheRow
from .configuration import ConfigError, ModelConfig
from .engine import Arrays, Engine
from .generation import KimiVLGeneration
from .graphs import LastLogitsGraph, TextGraph, VisionGraph
from .kernels import get_kernels, library
from .language import LanguageModel
from .parameters import init_parameters, no_init_parameters
from .settings import generation_settings, in_token_limit
from .shapes import Ports, text_inputs, vision_inputs
from .vision import MoonViT, Projector

logger = logging.getLogger(__name__)

DEFAULT_MAX_CONTEXT = 4096

_DTYPES = {name: running.DTYPES[name] for name in ("float32", "float16", "bfloat16")}


def mindspore_dtype(value: Any) -> ms.Type:
    """The MindSpore dtype of a name ("bfloat16", "torch.bfloat16") or a dtype.

    Raises:
        ConfigError: not a float dtype that the network takes.
    """
    if isinstance(value, str):
        value = _DTYPES.get(value.removeprefix("torch."), value)
    if value not in _DTYPES.values():
        raise ConfigError(f"dtype: {value!r}, expected one of {', '.join(_DTYPES)}")
    return value


class NativeGraphs:
    """Compiles graphs from the network when they are first needed. See `engine.Graphs`."""

    def __init__(
        self, model: KimiVLForConditionalGeneration, max_context: int, chunk: int | None, patches: int
    ) -> None:
        self._model = model
        self._cells: dict[tuple, nn.Cell] = {}
        self._caches: dict[tuple, Binding] = {}
        self.contexts: Sequence[int] = contexts(max_context)
        self.patches: Sequence[int] = patch_buckets(patches)
        chunks = (min(chunk, max_context),) if chunk else prefill_chunks(model.cpu_operators, max_context)
        self.smaller_chunks: Sequence[int] = chunks[:-1]
        self.chunk = chunks[-1]
        self.together = len(model.kernels.cache_shapes(2, 1, 1)) == 1  # one parameter for two rows

    def batch(self, rows: int) -> int:
        return rows

    def _cell(self, key: tuple, build: Callable[[], nn.Cell]) -> nn.Cell:
        if key not in self._cells:
            self._model.check_weights()
            self._cells[key] = running.prepared(build())
        return self._cells[key]

    def vision(self, patches: int, inputs: Arrays, taps: bool) -> list[np.ndarray]:
        m = self._model
        cell = self._cell(
            ("vision", patches, taps),
            lambda: VisionGraph(m.vision_tower, m.multi_modal_projector, m.model_config, taps),
        )
        return self._run(cell, vision_inputs(m.model_config, patches), inputs)

    def text(
        self,
        tokens: int,
        context: int,
        rows: Sequence[CacheRow],
        inputs: Arrays,
        all_logits: bool,
        taps: bool,
    ) -> list[np.ndarray]:
        m = self._model
        batch = len(rows)
        graph = TextGraph if all_logits else LastLogitsGraph
        key = ("text", batch, tokens, context, all_logits, taps)
        cell = self._cell(
            key,
            lambda: graph(
                m.language_model, m.kernels, m.model_config, batch, tokens, context, m.activation_dtype, taps
            ),
        )
        if key not in self._caches:
            self._caches[key] = bind(cell.caches, context, self.together)
        with self._caches[key].holding(rows, tokens):
            return self._run(cell, text_inputs(m.model_config, batch, tokens, all_logits), inputs)

    def _run(self, cell: nn.Cell, ports: Ports, inputs: Arrays) -> list[np.ndarray]:
        activation = running.name(self._model.activation_dtype)
        dtypes = {name: activation if dtype == "float" else dtype for name, (_, dtype) in ports.items()}
        return running.run_cell(cell, dtypes, inputs)


class KimiVLForConditionalGeneration(KimiVLGeneration, nn.Cell):
    """Kimi-VL: vision tower, projector, language model.

    Call it (see :meth:`KimiVLForward.forward`) or :meth:`generate`; graphs are compiled when first needed. Parameter
    names and layouts are those of a converted checkpoint.

    Args:
        config: KimiVLConfig or ModelConfig.
        dtype: what the weights are rounded to; default: the configuration's. Backends that cannot compute in it
            (a CPU with plain operators) widen the rounded weights to fp32.
        max_context: tokens of the largest cache; default min(4096, max_position_embeddings).
        prefill_chunk: tokens that one prefill graph takes; default 256, with the C++ operators for CPUs 64, 256 and 1024,
            in those of which a prompt takes the least time.
        max_image_patches: patches of the largest vision graph; default: what `in_token_limit` needs.
        kernels: backend of the operators, see `modeling.kernels`; default: that of MindSpore's device, "ascend" on
            Ascend, else "cpu" where the C++ operators are built (see `modeling.kernels.library`), else "plain".
    """

    def __init__(
        self,
        config: Any,
        dtype: Any = None,
        max_context: int | None = None,
        prefill_chunk: int | None = None,
        max_image_patches: int | None = None,
        kernels: str | None = None,
    ) -> None:
        super().__init__(auto_prefix=True)
        self.config = config
        model_config = config if isinstance(config, ModelConfig) else config.to_model_config()
        positions = model_config.text.max_position_embeddings
        if max_context is None:
            max_context = min(DEFAULT_MAX_CONTEXT, positions)
        if not 0 < max_context <= positions:
            raise ConfigError(
                f"max_context: {max_context}, expected 1 to max_position_embeddings ({positions})"
            )
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk: {prefill_chunk}, expected a positive number")
        self.dtype = mindspore_dtype(model_config.dtype if dtype is None else dtype)
        backend = _backend(kernels, self.dtype)
        self.kernels = get_kernels(backend)
        self.cpu_operators = backend == "cpu"
        held = self.kernels.parameter_dtype(self.dtype)
        self.activation_dtype = self.kernels.activation_dtype(self.dtype)
        self.vision_tower = MoonViT(self.kernels, held, model_config.vision)
        self.multi_modal_projector = Projector(self.kernels, held, model_config)
        self.language_model = LanguageModel(self.kernels, held, model_config.text)
        self.generation_config = None
        graphs = NativeGraphs(self, max_context, prefill_chunk, max_image_patches or largest_image(4096))
        self.engine = Engine(model_config, graphs)
        if init_parameters():
            self._initialise(np.random.default_rng(0), getattr(config, "initializer_range", 0.02))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`KimiVLForward.forward`."""
        return self.forward(*args, **kwargs)

    # Weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def _from_config(
        cls,
        config: Any,
        torch_dtype: Any = None,
        mindspore_dtype: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> KimiVLForConditionalGeneration:
        """A network with random weights."""
        kwargs.pop("attn_implementation", None)
        return cls(config, dtype=_one_dtype(torch_dtype, mindspore_dtype, dtype), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        src: str | Path,
        *,
        mindspore_dtype: Any = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        config: Any = None,
        max_context: int | None = None,
        prefill_chunk: int | None = None,
        max_image_patches: int | None = None,
        kernels: str | None = None,
        output_loading_info: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> Any:
        """The network with the weights of a published or converted directory, a Hub repo id, or ``nano``.

        A published directory is converted on the fly. `attn_implementation`, `trust_remote_code` and what only
        concerns Torch are accepted and change nothing: there is one implementation and no remote code.

        Raises:
            ValueError: the directory is no Kimi-VL checkpoint, or is damaged; the message names what and how.
        """
        from ..convert.source import open_weights
        from .configuration_kimi_vl import KimiVLConfig

        weights = open_weights(src, revision)
        if config is None:
            config = KimiVLConfig.from_dict(dict(weights.raw_config))
        limit = in_token_limit(weights.directory)
        with no_init_parameters():  # the weights come from the checkpoint
            model = cls(
                config,
                dtype=_one_dtype(torch_dtype, mindspore_dtype, dtype) or weights.config.dtype,
                max_context=max_context,
                prefill_chunk=prefill_chunk,
                max_image_patches=max_image_patches or largest_image(limit),
                kernels=kernels,
            )
        info = model.load_weights(weights)
        model.generation_config = generation_settings(weights.directory, model.model_config)
        return (model, info) if output_loading_info else model

    def load_weights(self, weights: Any) -> dict[str, list]:
        """Set every parameter from `weights` (see `convert.source`), one tensor at a time."""
        asked, missing, left = self.dtype, [], set(weights.names())
        widened = False
        for name, parameter in self.parameters_dict().items():
            if name not in left:
                missing.append(name)
                continue
            left.discard(name)
            array = weights.read(name)
            if tuple(array.shape) != tuple(parameter.shape):
                raise ConfigError(
                    f"{name}: shape {tuple(array.shape)}, expected {tuple(parameter.shape)} from the configuration"
                )
            if not name.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias")):
                array = array.astype(running.NUMPY[running.name(asked)], copy=False)
            held = running.name(parameter.dtype)
            widened |= array.dtype != running.NUMPY[held]
            parameter.set_data(running.tensor(array, held))
        if missing:
            raise ConfigError(
                f"{weights.directory}: has no tensor for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + "; does the configuration belong to this checkpoint?"
            )
        if widened:
            logger.info("weights in %s are widened to fp32: this backend cannot multiply them well", asked)
        return {
            "missing_keys": missing,
            "unexpected_keys": sorted(left),
            "mismatched_keys": [],
            "error_msgs": [],
        }

    def _initialise(self, rng: np.random.Generator, std: float) -> None:
        """Random weights: normal matrices, norms of 1, biases of 0."""
        for name, p in self.parameters_dict().items():
            if name.endswith("bias"):
                a = np.zeros(p.shape, np.float32)
            elif "norm" in name:
                a = np.ones(p.shape, np.float32)
            else:
                a = rng.standard_normal(p.shape, np.float32) * np.float32(std)
            if p.dtype == ms.float32:
                a = a.astype(running.NUMPY[running.name(self.dtype)])
            p.set_data(running.tensor(a, running.name(p.dtype)))

    def check_weights(self) -> None:
        """Raises ConfigError if a parameter was never filled: its memory would be arbitrary."""
        for name, p in self.parameters_dict().items():
            if not _has_data(p):
                raise ConfigError(f"{name}: has no data; load a checkpoint before running the model")

    def array(self, name: str) -> np.ndarray:
        return running.array(self.parameters_dict()[name])


def _backend(asked: str | None, dtype: ms.Type) -> str:
    """The kernels to take. Raises ConfigError: the device cannot run a model in `dtype` on them."""
    if running.device() != running.ASCEND:
        if asked is None:
            slower = not (library.available() or library.switched_off())
            logger.log(logging.WARNING if slower else logging.INFO, library.describe())
        return asked or ("cpu" if library.available() else "plain")
    if asked not in (None, "ascend"):
        raise ConfigError(
            f"kernels: {asked}, whose cache lives in host buffers, but MindSpore runs on Ascend; leave kernels out"
        )
    if dtype == ms.float32:
        raise ConfigError(
            "dtype: float32, but the fused attention on Ascend takes bf16 and fp16; "
            "load with mindspore_dtype=mindspore.bfloat16"
        )
    return "ascend"


def _one_dtype(*values: Any) -> Any:
    given = [v for v in values if v is not None and v != "auto"]
    return given[0] if given else None


def _has_data(parameter: ms.Parameter) -> bool:
    if getattr(parameter, "has_init", False):
        return False
    return str(getattr(parameter, "device", "CPU")) != "meta"
