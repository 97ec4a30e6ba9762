"""The configuration as a transformers class: `KimiVLConfig` with its text and vision parts.

It keeps every field of a published ``config.json``, whether the network uses it or not, and gives the network its
dimensions by :meth:`KimiVLConfig.to_model_config`. Names, defaults and checks are those of ``configuration``; what is
here is only what transformers asks for. Importing this module imports transformers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig

from .configuration import ConfigError, ModelConfig, TextConfig, VisionConfig

# Fields of the published text configuration that do not change what the network computes.
_TEXT_WITHOUT_EFFECT: dict[str, Any] = {
    "num_key_value_heads": 128,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "attention_dropout": 0.0,
}

_Part = TypeVar("_Part", bound="_KimiVLPart")


def model_source(src: str | os.PathLike) -> str:
    """Where to load from: ``nano`` is the embedded model, unless a directory has that name."""
    if str(src) == "nano" and not Path("nano").is_dir():
        from .. import nano_path

        return nano_path()
    return str(src)


def dtype_name(value: Any) -> str | None:
    """ "bfloat16" for any spelling of it: a name, a torch, MindSpore or numpy dtype."""
    if value is None:
        return None
    name = value.__name__ if isinstance(value, type) else str(value)
    return name.rpartition(".")[2].lower()


class _NamedDtype(PretrainedConfig):
    """Holds its dtype as a name, with or without Torch installed; `torch_dtype` is another word for it."""

    attribute_map = {"torch_dtype": "dtype"}

    def __init__(self, **kwargs: Any) -> None:
        dtype = kwargs.pop("dtype", None)
        torch_dtype = kwargs.pop("torch_dtype", None)
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.dtype = torch_dtype if dtype is None else dtype

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, dtype_name(value) if key in ("dtype", "torch_dtype") else value)


class _KimiVLPart(_NamedDtype):
    def _set_fields(self, defaults: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
        for name, default in defaults.items():
            value = kwargs.pop(name, default)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)  # as JSON gives it back

    @classmethod
    def of(cls: type[_Part], value: Any, name: str) -> _Part:
        """From what a caller may give as a part: nothing, a mapping, or a configuration."""
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, PretrainedConfig):
            value = value.to_dict()
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a {type(value).__name__}, expected a mapping or a {cls.__name__}")
        return cls(**value)


class KimiVLTextConfig(_KimiVLPart):
    """The text model's part; fields and defaults of :class:`configuration.TextConfig`, more are kept.

    `rope_theta` and `rope_scaling` stay the two fields of the published file; the `rope_parameters` that
    transformers 5 writes instead are read.
    """

    model_type = "deepseek_v3"
    base_config_key = "text_config"
    rope_scaling = None  # the base class makes it an alias of rope_parameters

    def __init__(self, **kwargs: Any) -> None:
        rope = kwargs.pop("rope_parameters", None) or {}
        if "rope_theta" in rope:
            kwargs.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kwargs.setdefault("rope_scaling", rope)
        self._set_fields({f.name: f.default for f in fields(TextConfig)} | _TEXT_WITHOUT_EFFECT, kwargs)
        super().__init__(**kwargs)


class KimiVLVisionConfig(_KimiVLPart):
    """The vision tower's part; fields and defaults of :class:`configuration.VisionConfig`, more are kept."""

    model_type = "moonvit"
    base_config_key = "vision_config"

    def __init__(self, **kwargs: Any) -> None:
        self._set_fields({f.name: f.default for f in fields(VisionConfig)}, kwargs)
        super().__init__(**kwargs)


class KimiVLConfig(_NamedDtype):
    """A Kimi-VL model's configuration.

    A configuration that is loaded, or made from a `text_config`, is checked against what the network implements.
    `KimiVLConfig()` alone is not: it holds the defaults of the published classes, as transformers expects of a
    configuration class, and those are of a larger text model than this network. Whatever was edited since is checked
    by :meth:`to_model_config`, which every model calls.

    Args:
        text_config, vision_config: mapping or configuration object.
        media_placeholder_token_id: the token whose places image features take.
        pad_token_id: default: the text part's.
        kwargs: further fields; kept, saved, and without effect.

    Raises:
        ConfigError: a value that the network does not implement; the message names the field.
    """

    model_type = "kimi_vl"
    # AutoTokenizer's answer where tokenizer_config.json is missing or names no class.
    tokenizer_class = "TikTokenTokenizer"
    sub_configs = {"text_config": KimiVLTextConfig, "vision_config": KimiVLVisionConfig}
    sub_configs_defaults = dict(sub_configs)  # the same under its newer name; keeps saved parts short

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        ignore_index: int = -100,
        media_placeholder_token_id: int = 163605,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vision_config = KimiVLVisionConfig.of(vision_config, "vision_config")
        self.text_config = KimiVLTextConfig.of(text_config, "text_config")
        self.ignore_index = ignore_index
        self.media_placeholder_token_id = media_placeholder_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        self.pad_token_id = (self.text_config.pad_token_id or 0) if pad_token_id is None else pad_token_id
        if text_config is not None:
            self.to_model_config()

    def to_model_config(self) -> ModelConfig:
        """The network's dimensions, checked.

        Raises:
            ConfigError: a value that the network does not implement; the message names the field.
        """
        return ModelConfig.from_dict(self.to_dict())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a parsed ``config.json``, checked; see :meth:`PretrainedConfig.from_dict` for `kwargs`."""
        ModelConfig.from_dict(config_dict)
        return super().from_dict(dict(config_dict), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:  # type: ignore[override]
        """From a model directory, a Hub repo id, or ``nano``; no code of the directory is run.

        Raises:
            ConfigError: the directory has no ``config.json``, or not one of a Kimi-VL that the network implements.
        """
        source = model_source(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir():
            ModelConfig.from_file(folder)  # its messages name the file
        kwargs.pop("trust_remote_code", None)
        return super().from_pretrained(source, **kwargs)
