"""Faults of a candidate's small files, and of the processor that reads them.

A wrong configuration is refused before anything runs; what the processor makes is judged at the tap `inputs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kimi_vl.modeling.image_processing import KimiVLImageProcessor

from .fault import REFUSED, Fault
from .host import instead


def edited(directory: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A JSON file of the directory, changed in place."""
    path = directory / file
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def configured(directory: Path, part: str, **values: Any) -> None:
    edited(directory, "config.json", lambda config: config[part].update(values))


def from_0_to_1(directory: Path) -> None:
    values = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    edited(directory, "preprocessor_config.json", lambda config: config.update(values))


def no_system_prompt(directory: Path) -> None:
    def cut(config: dict[str, Any]) -> None:
        _, end, rest = config["chat_template"].partition("{%- endif -%}")
        assert end, "the template begins with the system prompt"
        config["chat_template"] = rest

    edited(directory, "tokenizer_config.json", cut)


def ranks_exchanged(directory: Path) -> None:
    """Two tokens of the vocabulary have each other's number: space and e, of which every sentence has some."""
    path = directory / "tiktoken.model"
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    a, b = (next(line for line in lines if line[0] == token) for token in ("IA==", "ZQ=="))
    a[1], b[1] = b[1], a[1]
    path.write_text("".join(f"{token} {rank}\n" for token, rank in lines), encoding="utf-8")


def bgr(right: Any, self: Any, *arguments: Any, **options: Any) -> Any:
    made = right(self, *arguments, **options)
    made["pixel_values"] = np.ascontiguousarray(made["pixel_values"][:, ::-1])
    return made


def _config(name: str, what: str, **values: Any) -> Fault:
    return Fault(name, what, "files", REFUSED, partial(configured, part="text_config", **values))


def _processor(name: str, what: str, change: Callable[[Path], object]) -> Fault:
    return Fault(name, what, "files", "inputs", change, model="nano", cases=("image",))


FAULTS = (
    _config("config-theta", "rope_theta 10000 in the candidate's configuration", rope_theta=10000.0),
    _config("config-factor", "routed_scaling_factor 2.5 there", routed_scaling_factor=2.5),
    _config("config-eps", "rms_norm_eps 1e-6 there", rms_norm_eps=1e-6),
    _processor("pixels-0-1", "pixels from 0 to 1 for -1 to 1", from_0_to_1),
    _processor("no-system-prompt", "chat format without the system prompt", no_system_prompt),
    _processor("ranks-exchanged", "two tokens of the vocabulary exchanged", ranks_exchanged),
    Fault(
        "pixels-bgr",
        "the image processor gives BGR for RGB",
        "host",
        "inputs",
        instead(KimiVLImageProcessor, "__call__", bgr),
        model="nano",
        cases=("image",),
    ),
)
