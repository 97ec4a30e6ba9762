"""The network's dimensions as plain dataclasses, read from a published ``config.json``.

Standard library only: ``convert`` and the commands' ``--dry-run`` read configurations without importing
transformers. ``KimiVLConfig``, the transformers-style class, is in ``configuration_kimi_vl``.

Defaults are those of the published configuration classes (DeepseekV3Config, MoonViTConfig, KimiVLConfig), so a
``config.json`` that leaves a field out means here what it means there. Unknown fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that this network does not implement; the message names the field."""


@dataclass(frozen=True)
class TextConfig:
    """The DeepSeek-V3 text model (multi-head latent attention, mixture of experts)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1  # 0 (null in the file): none
    n_routed_experts: int = 256  # 0 (null in the file): every layer is dense
    num_experts_per_tok: int = 8
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers in the cache per token and layer: the normed latent and the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        return self.moe_intermediate_size * self.n_shared_experts

    def is_moe(self, layer: int) -> bool:
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.num_hidden_layers) if self.is_moe(i)]


@dataclass(frozen=True)
class VisionConfig:
    """The MoonViT vision tower."""

    patch_size: int = 14
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    merge_kernel_size: tuple[int, ...] = (2, 2)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: channels x patch height x patch width."""
        return 3 * self.patch_size * self.patch_size

    @property
    def merged_dim(self) -> int:
        return self.hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]


@dataclass(frozen=True)
class ModelConfig:
    """Kimi-VL: text model, vision tower and what joins them."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    media_placeholder_token_id: int = 163605
    ignore_index: int = -100
    pad_token_id: int = 0
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the parsed ``config.json``.

        Raises:
            ConfigError: not a Kimi-VL configuration, or a value that the network does not implement.
        """
        if raw.get("model_type") != "kimi_vl":
            raise ConfigError(
                f"config.json: model_type is {short(raw.get('model_type'))}, expected 'kimi_vl'; "
                "is this a Kimi-VL checkpoint?"
            )
        text_raw, vision_raw = _part(raw, "text_config"), _part(raw, "vision_config")
        rope = _part(text_raw, "rope_parameters")
        text_raw.pop("rope_parameters", None)
        if rope:  # transformers 5 writes both rope fields as one
            text_raw.setdefault("rope_theta", rope.get("rope_theta", TextConfig.rope_theta))
            if rope.get("rope_type", "default") != "default":
                text_raw.setdefault("rope_scaling", rope)
        if isinstance(vision_raw.get("merge_kernel_size"), list):
            vision_raw["merge_kernel_size"] = tuple(vision_raw["merge_kernel_size"])
        for name in ("n_shared_experts", "n_routed_experts"):
            if name in text_raw and text_raw[name] is None:
                text_raw[name] = 0
        text, vision = _known(TextConfig, text_raw), _known(VisionConfig, vision_raw)
        top = {f: raw[f] for f in ("media_placeholder_token_id", "ignore_index") if raw.get(f) is not None}
        pad = raw.get("pad_token_id")
        pad = text.pad_token_id if pad is None else pad
        dtype = (
            raw.get("dtype") or raw.get("torch_dtype") or text_raw.get("dtype") or text_raw.get("torch_dtype")
        )
        config = cls(text, vision, pad_token_id=pad or 0, dtype=dtype or "float32", **top)
        config.validate()
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """From a ``config.json`` or the directory that holds it.

        Raises:
            ConfigError: the file is missing, is no JSON object, or as :meth:`from_dict`.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.parent}: there is no config.json; expected a model directory") from None
        except (ValueError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: is not valid JSON ({e})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
        try:
            return cls.from_dict(raw)
        except ConfigError as e:
            raise ConfigError(str(e).replace("config.json", str(path), 1)) from None

    def validate(self) -> None:
        """Raises ConfigError for the first field whose value this network does not implement."""
        t, v = self.text, self.vision
        for name, value, wanted in (
            ("text_config.q_lora_rank", t.q_lora_rank, None),
            ("text_config.rope_scaling", t.rope_scaling, None),
            ("text_config.scoring_func", t.scoring_func, "sigmoid"),
            ("text_config.topk_method", t.topk_method, "noaux_tc"),
            ("text_config.n_group", t.n_group, 1),
            ("text_config.topk_group", t.topk_group, 1),
            ("text_config.hidden_act", t.hidden_act, "silu"),
            ("text_config.attention_bias", t.attention_bias, False),
            ("text_config.tie_word_embeddings", t.tie_word_embeddings, False),
        ):
            if value != wanted:
                raise ConfigError(
                    f"config.json: {name} is {short(value)}, but this network implements only {wanted!r}"
                )
        positive = [(f"text_config.{f.name}", getattr(t, f.name)) for f in fields(t) if f.type == "int"]
        positive += [(f"vision_config.{f.name}", getattr(v, f.name)) for f in fields(v) if f.type == "int"]
        for name, value in positive:
            least = (
                0 if name.endswith(("first_k_dense_replace", "n_shared_experts", "n_routed_experts")) else 1
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"config.json: {name} is {short(value)}, expected an integer of at least {least}"
                )
        for ok, name, found, needed in (
            (
                t.qk_rope_head_dim % 2 == 0,
                "text_config.qk_rope_head_dim",
                t.qk_rope_head_dim,
                "an even number",
            ),
            (
                v.hidden_size % v.num_attention_heads == 0,
                "vision_config.hidden_size",
                v.hidden_size,
                f"a multiple of num_attention_heads ({v.num_attention_heads})",
            ),
            (
                v.head_dim % 4 == 0,
                "vision_config.hidden_size / num_attention_heads (the head dim)",
                v.head_dim,
                "a multiple of 4 (a row and a column angle per pair)",
            ),
            (
                isinstance(v.merge_kernel_size, tuple)
                and len(v.merge_kernel_size) == 2
                and all(isinstance(k, int) and k > 0 for k in v.merge_kernel_size),
                "vision_config.merge_kernel_size",
                v.merge_kernel_size,
                "two positive integers",
            ),
            (
                t.n_routed_experts == 0 or 0 < t.num_experts_per_tok <= t.n_routed_experts,
                "text_config.num_experts_per_tok",
                t.num_experts_per_tok,
                f"at most n_routed_experts ({t.n_routed_experts})",
            ),
            (
                0 <= self.media_placeholder_token_id < t.vocab_size,
                "media_placeholder_token_id",
                self.media_placeholder_token_id,
                f"below text_config.vocab_size ({t.vocab_size})",
            ),
        ):
            if not ok:
                raise ConfigError(f"config.json: {name} is {short(found)}, expected {needed}")


def short(value: Any) -> str:
    """A stranger's value for an error message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _part(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of the configuration, empty if it is not there."""
    part = raw.get(name) or {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"config.json: {name} is {short(part)}, expected an object of fields")
    return dict(part)


def _known(cls: type, raw: Mapping[str, Any]) -> Any:
    """`cls` from the fields it knows."""
    names = {f.name for f in fields(cls)}
    return cls(**{k: v for k, v in raw.items() if k in names})
