"""Kimi-VL for MindSpore: convert, run, export and verify.

Names are imported on first use: the commands need neither MindSpore nor transformers to answer ``--help``.
Taking a public name also registers our configuration, tokenizer, image processor and processor with
transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "KimiVLConfig": "modeling.configuration_kimi_vl",
    "KimiVLTextConfig": "modeling.configuration_kimi_vl",
    "KimiVLVisionConfig": "modeling.configuration_kimi_vl",
    "KimiVLForConditionalGeneration": "modeling.modeling_kimi_vl",
    "KimiVLProcessor": "modeling.processing",
    "KimiVLImageProcessor": "modeling.image_processing",
    "TikTokenTokenizer": "modeling.tokenization",
    "MindIRModel": "export",
}

__all__ = [*_PUBLIC, "nano_path"]


def nano_path() -> str:
    """The directory of the embedded model ``nano``, in the published file layout."""
    return str(Path(__file__).parent / "nano")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.modeling.registration").register()
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
