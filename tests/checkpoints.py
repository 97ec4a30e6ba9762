"""Small published checkpoints of any dimensions, written with safetensors' own writer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kimi_vl.convert import mapping
from kimi_vl.modeling.configuration import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny8-bf16"
INDEX = "model.safetensors.index.json"

# No dimension is a power of two, and no two that could be mistaken for each other are equal.
TEXT: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 22,
    "intermediate_size": 26,
    "moe_intermediate_size": 9,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "n_shared_experts": 2,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}
VISION: dict[str, Any] = {
    "init_pos_emb_height": 5,
    "init_pos_emb_width": 7,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "intermediate_size": 50,
    "merge_kernel_size": [2, 2],
}


def configuration(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> dict[str, Any]:
    """A ``config.json`` with some fields of the above changed."""
    return {
        "model_type": "kimi_vl",
        "media_placeholder_token_id": 52,
        "text_config": {**TEXT, **(text or {})},
        "vision_config": {**VISION, **(vision or {})},
    }


def tensors(config: dict[str, Any], dtype: Any = BF16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random published tensors for a configuration, fp32 ``inv_freq`` included."""
    rng = np.random.default_rng(seed)
    made = {}
    for entry in mapping.entries(ModelConfig.from_dict(config)):
        for side in entry.published:
            kind = np.float32 if side.name.endswith("inv_freq") else dtype
            made[side.name] = rng.standard_normal(side.shape).astype(kind)
    return made


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """A published directory: one file, or `shards` files with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def raw_file(path: Path, header: Any, data: bytes = b"", claim: int | None = None) -> None:
    """A file with any header, well formed or not; `claim` is what its length field says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data)


def content(directory: Path) -> dict[str, bytes]:
    """Everything a directory holds."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    # By name: beside ml_dtypes', MindSpore 2.7 registers a bfloat16 of its own, and packages take either.
    return a.shape == b.shape and a.dtype.name == b.dtype.name and a.tobytes() == b.tobytes()
