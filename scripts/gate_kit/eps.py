"""A checkpoint made for eps: so small are its activations that every norm's eps weighs as much as what it is added to.

At the scale of a trained network an eps of 1e-6 for 1e-5 changes the fifth digit, which is where two right
implementations differ. Here the residual stream is near 3e-3 (its mean square near 1e-5), the latents are near 1e-3
(1e-6), and so are the tower's activations: another eps changes what a norm gives by a third or more.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kimi_vl.convert import mapping
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.modeling.positions import inverse_frequencies

SEED = 7
STREAM, LATENT = 3e-3, 1e-3  # root mean squares
# What a published name ends in, and what the root mean square of its numbers is: of a table as it stands, of a linear
# for what it gives for inputs near 1. Norms are 1 and biases 0, unless said otherwise below.
TABLES = ((r"embed_tokens\.weight$", STREAM), (r"pos_emb\.weight$", STREAM / 2))
LINEARS = (
    (r"patch_embed\.proj\.weight$", STREAM),
    (r"(\.wo|fc1)\.weight$", STREAM),
    (r"linear_2\.weight$", 2 * STREAM),
    (r"(o_proj|down_proj)\.weight$", STREAM),
    (r"kv_a_proj_with_mqa\.weight$", 2 * LATENT),
)
NORMS = ((r"vision_tower\.encoder\.final_layernorm\.weight$", STREAM / 2),)


def make(directory: Path, config: Path) -> Path:
    """A published directory with the dimensions of the file `config`, in bf16; the same every time."""
    raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    parsed = ModelConfig.from_dict(raw)
    rng = np.random.default_rng(SEED)
    tensors = {}
    for entry in mapping.entries(parsed):
        for side in entry.published:
            if side.name.endswith("inv_freq"):
                text = parsed.text
                tensors[side.name] = inverse_frequencies(text.rope_theta, text.qk_rope_head_dim)
            else:
                tensors[side.name] = _values(side.name, side.shape, rng, parsed).astype(ml_dtypes.bfloat16)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator, config: ModelConfig) -> np.ndarray:
    def size(table: tuple[tuple[str, float], ...], otherwise: float) -> float:
        return next((value for ending, value in table if re.search(ending, name)), otherwise)

    if name.endswith("bias") and not name.endswith("e_score_correction_bias"):
        return np.zeros(shape)
    if re.search(r"norm\d?\.weight$", name):
        return np.full(shape, size(NORMS, 1.0))
    drawn = rng.standard_normal(shape)
    if of_table := size(TABLES, 0.0):
        return drawn * of_table
    if name.endswith("e_score_correction_bias"):
        return drawn * 0.02
    drawn *= size(LINEARS, 1.0) / np.sqrt(np.prod(shape[1:]))
    if name.endswith("kv_a_proj_with_mqa.weight"):
        drawn[config.text.kv_lora_rank :] /= 2 * LATENT  # the rotary rows have no norm behind them
    return drawn
