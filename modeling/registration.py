"""Makes transformers' Auto classes find ours, without remote code."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PretrainedConfig

from .configuration_kimi_vl import KimiVLConfig
from .image_processing import KimiVLImageProcessor
from .processing import KimiVLProcessor
from .tokenization import TikTokenTokenizer


class _TokenizerKey(PretrainedConfig):
    """Stands for no model.

    Under `KimiVLConfig`, AutoTokenizer would take the tokenizer for one of transformers' own and let a directory's
    `auto_map` code go first when the caller trusts remote code. Found by its class name, which is the published
    `tokenizer_class`, ours goes first. So AutoTokenizer must not find a tokenizer by `KimiVLConfig` at all.

    A limit: where ``tokenizer_config.json`` has an `auto_map` but names no class, AutoTokenizer consults nothing that
    could be registered; it refuses, or runs the directory's code if the caller trusts it. AutoProcessor and our own
    classes load such a directory and run nothing. Without an `auto_map`, `KimiVLConfig.tokenizer_class` answers.
    """

    model_type = "kimi_vl_tokenizer"


def register() -> None:
    """Register with AutoConfig, AutoTokenizer, AutoImageProcessor and AutoProcessor; again changes nothing."""
    AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
    AutoTokenizer.register(_TokenizerKey, TikTokenTokenizer, exist_ok=True)
    # One class for every backend that transformers may prefer: ours needs neither torch nor torchvision.
    backends: dict[str, type] = {"pil": KimiVLImageProcessor, "torchvision": KimiVLImageProcessor}
    AutoImageProcessor.register(KimiVLConfig, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)
