"""`KimiVLConfig`: what it reads, keeps, gives back and refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from published import DATA, write_json
from transformers import PretrainedConfig

from kimi_vl import KimiVLConfig, KimiVLTextConfig, KimiVLVisionConfig
from kimi_vl.modeling.configuration import ConfigError, ModelConfig, TextConfig, VisionConfig
from kimi_vl.modeling.configuration_kimi_vl import dtype_name

PUBLISHED = json.loads((DATA / "published" / "config.json").read_text(encoding="utf-8"))
AUTO_MAP = {
    "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
    "AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration",
}


def respelled(raw: dict, old: str, new: str) -> dict:
    """The same with a field's name replaced at every level."""
    return {
        new if k == old else k: respelled(v, old, new) if isinstance(v, dict) else v for k, v in raw.items()
    }


def without(raw: dict, *names: str) -> dict:
    return {k: without(v, *names) if isinstance(v, dict) else v for k, v in raw.items() if k not in names}


# What the three published variants and later transformers versions differ in.
VARIANTS = {
    "instruct": {**PUBLISHED, "auto_map": AUTO_MAP, "transformers_version": "4.50.3"},
    "thinking": {**without(PUBLISHED, "rope_scaling"), "auto_map": AUTO_MAP, "vocab_size": 163840},
    "thinking-2506": {**respelled(PUBLISHED, "torch_dtype", "dtype"), "transformers_version": "4.56.1"},
    "dtype in the parts only": {k: v for k, v in PUBLISHED.items() if k != "torch_dtype"},
    "transformers 5": {
        **without(PUBLISHED, "rope_scaling", "rope_theta"),
        "text_config": {
            **without(PUBLISHED["text_config"], "rope_scaling", "rope_theta"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 800000.0},
        },
    },
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return copy.deepcopy(VARIANTS[request.param])


def in_directory(path, raw: dict):
    write_json(path / "config.json", raw)
    return path


def expected() -> ModelConfig:
    text = TextConfig(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=2.446,
        q_lora_rank=None, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=800000.0,
        bos_token_id=163584, eos_token_id=163585, pad_token_id=163839,
    )  # fmt: skip
    return ModelConfig(text, VisionConfig(), pad_token_id=163839, dtype="bfloat16")


def test_every_published_variant_is_read(variant, tmp_path):
    in_directory(tmp_path, variant)
    config = KimiVLConfig.from_pretrained(tmp_path)
    assert config.to_model_config() == expected() == ModelConfig.from_file(tmp_path)
    assert config.text_config.rope_theta == 800000.0
    assert config.text_config.rope_scaling is None
    assert config.text_config.dtype == "bfloat16"


def test_saving_and_loading_again_changes_nothing(variant, tmp_path):
    variant["later_field"] = {"deep": [1, None]}
    variant["text_config"]["later_field"] = "kept"
    config = KimiVLConfig.from_dict(variant)
    config.save_pretrained(tmp_path)
    again = KimiVLConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.to_model_config() == config.to_model_config()
    assert again.later_field == {"deep": [1, None]}
    assert again.text_config.later_field == "kept"
    assert ModelConfig.from_file(tmp_path) == config.to_model_config()


def test_a_saved_file_holds_every_published_field(tmp_path):
    KimiVLConfig.from_dict(copy.deepcopy(VARIANTS["instruct"])).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    want = respelled(VARIANTS["instruct"], "torch_dtype", "dtype")
    for part in ("text_config", "vision_config"):
        assert want[part].items() <= saved[part].items()
    ignored = ("text_config", "vision_config", "transformers_version")
    assert {k: v for k, v in want.items() if k not in ignored}.items() <= saved.items()


def test_missing_fields_take_the_published_classes_defaults():
    text = KimiVLTextConfig()
    assert (text.q_lora_rank, text.n_group, text.vocab_size, text.rope_theta) == (1536, 8, 129280, 10000.0)
    assert (text.aux_loss_alpha, text.use_cache) == (0.001, True)
    vision = KimiVLVisionConfig()
    assert (vision.hidden_size, vision.merge_kernel_size) == (1152, [2, 2])
    sparse = {
        k: v for k, v in PUBLISHED["text_config"].items() if k in ("q_lora_rank", "n_group", "topk_group")
    }
    config = KimiVLConfig.from_dict({"model_type": "kimi_vl", "text_config": sparse | {"vocab_size": 163840}})
    assert config.to_model_config().text.hidden_size == 7168
    assert config.to_model_config().media_placeholder_token_id == 163605


def test_an_instance_without_arguments_serves_transformers_but_no_network():
    config = KimiVLConfig()
    assert isinstance(config, PretrainedConfig)
    assert "KimiVLConfig" in repr(config)
    with pytest.raises(ConfigError, match="q_lora_rank is 1536"):
        config.to_model_config()


def test_parts_may_be_mappings_or_configurations():
    from transformers import DeepseekV3Config

    raw = PUBLISHED["text_config"]
    want = replace(KimiVLConfig(text_config=dict(raw)).to_model_config(), dtype="bfloat16")
    assert KimiVLConfig(text_config=KimiVLTextConfig(**raw)).to_model_config() == want
    theirs = DeepseekV3Config(**raw)
    assert KimiVLConfig(text_config=theirs).to_model_config().text.rope_theta == 800000.0
    with pytest.raises(ConfigError, match="text_config is a list"):
        KimiVLConfig(text_config=[1])


def test_nested_parts_can_be_edited(tmp_path):
    in_directory(tmp_path, PUBLISHED)
    config = KimiVLConfig.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = 1
    got = config.to_model_config()
    assert (got.text.num_hidden_layers, got.vision.num_hidden_layers) == (2, 1)
    assert config._attn_implementation == "flash_attention_2"
    config.text_config.n_group = 2
    with pytest.raises(ConfigError, match=r"text_config\.n_group is 2"):
        config.to_model_config()


def test_dtype_is_a_name_however_it_was_given():
    import mindspore as ms

    for given in ("bfloat16", "torch.bfloat16", ms.bfloat16):
        config = KimiVLConfig.from_dict(dict(PUBLISHED, torch_dtype=given))
        assert config.dtype == config.torch_dtype == "bfloat16"
    config.torch_dtype = ms.float16
    assert config.dtype == "float16"
    assert config.to_model_config().dtype == "float16"
    assert dtype_name(np.float32) == dtype_name(np.dtype("float32")) == "float32"
    assert dtype_name(None) is None


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "q_lora_rank", 1536),
        ("text_config", "n_group", 8),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("text_config", "scoring_func", "softmax"),
        ("text_config", "qk_rope_head_dim", 63),
        ("text_config", "num_hidden_layers", "27"),
        ("vision_config", "hidden_size", 1136),
        ("vision_config", "merge_kernel_size", [2]),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(part, field, value, tmp_path):
    raw = copy.deepcopy(PUBLISHED)
    raw[part][field] = value
    for load in (
        lambda: KimiVLConfig(**without(raw, "model_type")),
        lambda: KimiVLConfig.from_dict(copy.deepcopy(raw)),
        lambda: KimiVLConfig.from_pretrained(in_directory(tmp_path, raw)),
    ):
        with pytest.raises(ConfigError, match=f"{part}.{field}") as e:
            load()
        assert "\n" not in str(e.value)


def test_scaled_rope_is_refused_in_the_later_spelling_too():
    raw = copy.deepcopy(VARIANTS["transformers 5"])
    raw["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 8e5, "factor": 4.0}
    with pytest.raises(ConfigError, match=r"text_config\.rope_scaling"):
        KimiVLConfig.from_dict(raw)


def test_what_is_no_kimi_vl_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no config.json"):
        KimiVLConfig.from_pretrained(tmp_path)
    in_directory(tmp_path, {"model_type": "llama", "hidden_size": 8})
    with pytest.raises(ConfigError, match="model_type is 'llama', expected 'kimi_vl'"):
        KimiVLConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="is not valid JSON"):
        KimiVLConfig.from_pretrained(tmp_path)
