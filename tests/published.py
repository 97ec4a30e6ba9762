"""Directories in the published file layout, small: the fixtures' vocabulary and configuration, made on the fly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
TOKENIZER = DATA / "tokenizer"
CASES = json.loads((TOKENIZER / "cases.json").read_text(encoding="utf-8"))
PREPROCESSOR = {
    "image_processor_type": "KimiVLImageProcessor",
    "processor_class": "KimiVLProcessor",
    "patch_size": 14,
    "pad_input": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "in_token_limit": 4096,
    "merge_kernel_size": [2, 2],
    "num_pooled_tokens": 1024,
}


def named_specials() -> dict[str, int]:
    """The special tokens that ``tokenizer_config.json`` names: all but the reserved ones."""
    return {n: i for n, i in CASES["special"].items() if not n.startswith("<|reserved_token_")}


def tokenizer_config(**more: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": n, **flags} for n, i in named_specials().items()},
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|media_pad|>"],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "tokenizer_class": "TikTokenTokenizer",
        **more,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def published_directory(path: Path, checkpoint: str = "tiny8-bf16") -> Path:
    """All files of a published model but the weights."""
    path.mkdir(exist_ok=True)
    shutil.copyfile(DATA / checkpoint / "config.json", path / "config.json")
    shutil.copyfile(TOKENIZER / "tiktoken.model", path / "tiktoken.model")
    write_json(path / "tokenizer_config.json", tokenizer_config())
    write_json(path / "preprocessor_config.json", PREPROCESSOR)
    return path
