"""The Torch reference against the golden files, and the table of its weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from golden import CASES, CHECKPOINTS, DATA, inputs, load_case, rel_l2
from safetensors.torch import load_file, save_file

from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.oracle import OracleError, build_network, build_oracle, to_published

TINY = DATA / "tiny8-fp32"


@pytest.fixture(scope="module")
def oracles():
    return {name: build_oracle(DATA / name) for name in CHECKPOINTS}


def tensors(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_gives_the_golden_taps_on(oracles, checkpoint, name):
    case = load_case(checkpoint, name)
    taps = oracles[checkpoint].run(inputs(case))
    mask = case["attention_mask"].astype(bool)
    for key in ("hidden_states", "logits", "router_topk_weights"):
        assert rel_l2(taps[key], case[key]) <= 3e-6, key
    assert rel_l2(taps["inputs_embeds"][mask], case["inputs_embeds"][mask]) <= 3e-6
    for key in ("vision_out", "projector_out"):
        assert (key in taps) == bool(len(case["pixel_values"]))
        if key in taps:
            assert rel_l2(taps[key], case[key]) <= 3e-6, key
    assert np.array_equal(taps["router_topk_indices"], case["router_topk_indices"])
    assert taps["router_gap"].min() == pytest.approx(float(case["router_min_gap"]), abs=1e-6)


@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_generates_the_golden_tokens_on(oracles, checkpoint, name):
    case = load_case(checkpoint, name)
    greedy = oracles[checkpoint].greedy(inputs(case), 32)
    assert np.array_equal(greedy.tokens, case["greedy_tokens"])
    assert np.abs(greedy.margins - case["greedy_margins"]).max() <= 2e-5
    assert rel_l2(greedy.logits_after, case["greedy_logits_after"]) <= 3e-6
    assert (greedy.seconds != greedy.tokens).all()


def test_bf16_is_as_noisy_as_the_golden_bf16():
    oracle = build_oracle(DATA / "tiny8-bf16", torch.bfloat16)
    assert oracle.network.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    for name in ("text", "image", "bigimage"):
        case = load_case("tiny8-bf16", name)
        logits = oracle.run(inputs(case))["logits"]
        assert rel_l2(logits, case["logits_bf16"]) <= 2e-3
        assert rel_l2(logits, case["logits"]) ** 2 == pytest.approx(float(case["bf16_nmse"]), rel=0.2)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_published_tensors_come_back_bit_for_bit(oracles, checkpoint):
    oracle = oracles[checkpoint]
    state = oracle.network.state_dict()
    back = to_published(state, oracle.config)
    published = {k: v for k, v in tensors(DATA / checkpoint).items() if not k.endswith("inv_freq")}
    assert sorted(back) == sorted(published)
    for name, value in published.items():
        assert torch.equal(back[name].to(value.dtype), value), name
    owned = {t.data_ptr() for t in state.values()}
    assert all(t.is_contiguous() and t.data_ptr() not in owned for t in back.values())


def test_a_saved_network_is_read_back_as_it_was(tmp_path):
    config = ModelConfig.from_file(TINY)
    network = build_network(config)
    for i, p in enumerate(network.state_dict().values()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    save_file(to_published(network.state_dict(), config), tmp_path / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    again = build_oracle(tmp_path).network.state_dict()
    assert all(torch.equal(again[k], v) for k, v in network.state_dict().items())


def test_a_position_table_that_is_not_square(tmp_path):
    """transformers takes it for square; ours interpolates it as the published network does."""
    published = tensors(TINY)
    name = "vision_tower.patch_embed.pos_emb.weight"
    published[name] = published[name][:, :6].contiguous()
    config = json.loads((TINY / "config.json").read_text())
    config["vision_config"]["init_pos_emb_width"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(published, tmp_path / "model.safetensors")
    embed = build_oracle(tmp_path).network.model.vision_tower.patch_embed
    pixels, grid = torch.zeros(48 + 16, 3, 14, 14), torch.tensor([[1, 8, 6], [1, 4, 4]])
    got = embed(pixels, grid) - embed.proj.bias
    table = published[name]
    assert torch.allclose(got[:48], table.flatten(0, 1), atol=1e-6)
    smaller = torch.nn.functional.interpolate(table.permute(2, 0, 1)[None], (4, 4), mode="bicubic")
    assert torch.allclose(got[48:], smaller[0].flatten(1).T, atol=1e-6)


def damaged(directory, change):
    """A copy of the tiny checkpoint with its tensors changed."""
    published = tensors(TINY)
    change(published)
    shutil.copy(TINY / "config.json", directory)
    save_file(published, directory / "model.safetensors")
    return directory


def test_a_missing_tensor_is_named(tmp_path):
    name = "vision_tower.encoder.final_layernorm.bias"
    with pytest.raises(OracleError, match=f"lacks {name}"):
        build_oracle(damaged(tmp_path, lambda t: t.pop(name)))


def test_an_extra_tensor_is_named(tmp_path):
    with pytest.raises(OracleError, match="holds language_model.extra"):
        build_oracle(damaged(tmp_path, lambda t: t.update({"language_model.extra": torch.zeros(1)})))


def test_a_wrong_shape_is_named(tmp_path):
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(
        OracleError, match=r"experts.3.up_proj.weight has shape \(31, 64\), expected \(32, 64\)"
    ):
        build_oracle(damaged(tmp_path, lambda t: t.update({name: t[name][:31].clone()})))


def test_a_missing_shard_is_named(tmp_path):
    shutil.copytree(DATA / "tiny8-bf16", tmp_path / "m", copy_function=shutil.copyfile)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(OracleError, match="model-00002-of-00003.safetensors: is missing"):
        build_oracle(tmp_path / "m")


def test_a_truncated_shard_is_named(tmp_path):
    shutil.copytree(DATA / "tiny8-bf16", tmp_path / "m", copy_function=shutil.copyfile)
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OracleError, match="model-00002-of-00003.safetensors: cannot be read"):
        build_oracle(tmp_path / "m")


def test_no_weights_at_all(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(OracleError, match="holds no"):
        build_oracle(tmp_path)


def test_media_tokens_must_fit_the_pictures(oracles):
    case = inputs(load_case("tiny8-fp32", "image"))
    ids = case["input_ids"].copy()
    ids[0, -1] = oracles["tiny8-fp32"].config.media_placeholder_token_id
    with pytest.raises(OracleError, match="7 media tokens, but the pictures give 6"):
        oracles["tiny8-fp32"].run(case | {"input_ids": ids})


def test_takes_the_experts_that_it_is_given(oracles):
    oracle, case = oracles["tiny8-bf16"], inputs(load_case("tiny8-bf16", "batch"))
    free = oracle.run(case)
    own = free["router_topk_indices"]
    same = oracle.run(case, own)
    assert all(np.array_equal(same[k], free[k]) for k in free if k != "router_gap")
    others = np.where(own < 0, own, np.sort((own + 1) % oracle.config.text.n_routed_experts))
    got = oracle.run(case, others)
    assert np.array_equal(got["router_topk_indices"], others)
    weights = got["router_topk_weights"].sum(-1)[:, case["attention_mask"].astype(bool)]
    assert weights == pytest.approx(oracle.config.text.routed_scaling_factor, rel=1e-5)
    assert rel_l2(got["logits"], free["logits"]) > 0.01
    assert all(np.array_equal(oracle.run(case)[k], free[k]) for k in free)


def with_text(**fields):
    raw = json.loads((TINY / "config.json").read_text())
    raw["text_config"] |= fields
    return raw


def test_what_the_reference_does_not_implement_is_refused():
    with pytest.raises(OracleError, match="moe_layer_freq is 2"):
        build_network(ModelConfig.from_dict(with_text(moe_layer_freq=2)))


def test_without_shared_experts_only_the_routed_ones_count(tmp_path, oracles):
    """As if the shared experts' last projection were zero."""
    case = inputs(load_case("tiny8-fp32", "text"))
    damaged(tmp_path, lambda t: [t.pop(k) for k in list(t) if "shared_experts" in k])
    (tmp_path / "config.json").write_text(json.dumps(with_text(n_shared_experts=None)))
    got = build_oracle(tmp_path).run(case)["logits"]
    silent = build_oracle(TINY)
    for name, p in silent.network.state_dict().items():
        if "shared_experts.down_proj" in name:
            p.zero_()
    assert rel_l2(got, silent.run(case)["logits"]) <= 1e-6
    assert rel_l2(got, oracles["tiny8-fp32"].run(case)["logits"]) > 1e-2
