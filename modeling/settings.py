"""What a model directory says beside its weights: generation defaults and the picture limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .configuration import ConfigError, ModelConfig

DEFAULT_IN_TOKEN_LIMIT = 4096
PROCESSOR = "preprocessor_config.json"
# Ends a turn in the chat format, and must end generation too, though the published file names only eos.
END_OF_TURN = "<|im_end|>"


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path}: is not valid JSON ({e})") from None
    return value if isinstance(value, dict) else {}


def in_token_limit(directory: Path) -> int:
    """Patches above which the image processor scales a picture down."""
    return int(_read(directory, PROCESSOR).get("in_token_limit") or DEFAULT_IN_TOKEN_LIMIT)


def with_in_token_limit(directory: Path, limit: int) -> bytes:
    """A directory's ``preprocessor_config.json`` with another limit."""
    values = _read(directory, PROCESSOR) | {"in_token_limit": limit}
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def generation_settings(directory: Path, config: ModelConfig) -> Any:
    """transformers' GenerationConfig of a directory, its stop ids completed by the end of a turn."""
    from transformers import GenerationConfig

    values = _read(directory, "generation_config.json")
    eos = values.get("eos_token_id", config.text.eos_token_id)
    stops = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    added = _read(directory, "tokenizer_config.json").get("added_tokens_decoder") or {}
    for token_id, token in added.items():
        if token.get("content") == END_OF_TURN and int(token_id) not in stops:
            stops.append(int(token_id))
    values["eos_token_id"] = stops or None
    values.setdefault("pad_token_id", config.pad_token_id)
    values.setdefault("bos_token_id", config.text.bos_token_id)
    return GenerationConfig(**values)
