"""Writes a trained `nano` in the published Kimi-VL file layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.oracle import to_published

from .card import write_json
from .chat import SPECIAL, SYSTEM_PROMPT
from .network import CONFIG

SHARDS = 2

GENERATION_CONFIG = {
    "bos_token_id": SPECIAL["[BOS]"],
    "eos_token_id": [SPECIAL["[EOS]"], SPECIAL["<|im_end|>"]],
    "pad_token_id": SPECIAL["[PAD]"],
}
PREPROCESSOR_CONFIG = {
    "image_processor_type": "KimiVLImageProcessor",
    "processor_class": "KimiVLProcessor",
    "patch_size": 14,
    "pad_input": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "in_token_limit": 1024,
    "merge_kernel_size": [2, 2],
    "num_pooled_tokens": 1024,
}
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>" + SYSTEM_PROMPT + "<|im_end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}"
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    "{%- else -%}"
    "{{- part['text'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def tokenizer_config() -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(id_): {"content": name, **flags} for name, id_ in SPECIAL.items()},
        "additional_special_tokens": [name for name in SPECIAL if name.startswith("<|")],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": CHAT_TEMPLATE,
    }


def write_model(directory: Path, state_dict: Mapping[str, Tensor], vocabulary: Path) -> None:
    """All files but the model card: weights in bf16 under published names, configurations, vocabulary.

    Args:
        state_dict: of the network that :func:`network.new_network` makes.
        vocabulary: a file in tiktoken's format.

    Raises:
        ValueError: a weight is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(CONFIG)
    tensors = {name: value.to(torch.bfloat16) for name, value in to_published(state_dict, config).items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: has weights that are not finite; the training went wrong")
    # The published checkpoint carries the rope frequencies, which every reader recomputes; so does this one.
    rope = config.text.qk_rope_head_dim
    inv_freq = 1.0 / config.text.rope_theta ** (torch.arange(0, rope, 2, dtype=torch.float32) / rope)
    for layer in range(config.text.num_hidden_layers):
        tensors[f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()
    _write_shards(directory, tensors)
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("preprocessor_config.json", PREPROCESSOR_CONFIG),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        write_json(directory / name, content)
    copyfile(vocabulary, directory / "tiktoken.model")


def _write_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, written * SHARDS // total)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{SHARDS:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors writes files that only their owner may read
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)
