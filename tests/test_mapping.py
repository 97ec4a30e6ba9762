"""The table: complete, one to one, invertible, right for any dimensions."""

import gzip
import json
import math

import ml_dtypes
import numpy as np
import pytest
from checkpoints import DATA, configuration, same_bits, tensors

from kimi_vl.convert import ConversionError, mapping, transforms
from kimi_vl.convert.mapping import Spec, entries, match, target_dtype
from kimi_vl.modeling.configuration import ModelConfig

PUBLISHED = DATA / "published"
CONFIGS = {
    "odd": configuration(),
    "no shared experts": configuration({"n_shared_experts": 0}),
    "all dense": configuration({"n_routed_experts": None, "num_experts_per_tok": 1}),
    "no dense layer": configuration({"first_k_dense_replace": 0}),
    "every second layer": configuration({"moe_layer_freq": 2, "num_hidden_layers": 5}),
    "one expert, one head": configuration(
        {"n_routed_experts": 1, "num_experts_per_tok": 1, "num_attention_heads": 1}
    ),
    "tiny8": json.loads((DATA / "tiny8-bf16" / "config.json").read_text()),
}


def model_config(raw):
    return ModelConfig.from_dict(raw)


def specs(arrays):
    return {name: Spec(a.shape, a.dtype.name) for name, a in arrays.items()}


@pytest.fixture(scope="module")
def published():
    """The published 16-billion checkpoint: its configuration, and the specs of its tensors."""
    listed = json.loads(gzip.decompress((PUBLISHED / "tensors.json.gz").read_bytes()))
    dtypes = {"BF16": "bfloat16", "F32": "float32"}
    found = {name: Spec(tuple(shape), dtypes[dtype]) for name, (dtype, *shape) in listed.items()}
    return ModelConfig.from_file(PUBLISHED), found


def test_accounts_for_every_tensor_of_the_published_checkpoint(published):
    config, listed = published
    found = match(config, listed)
    mapped = [side.name for entry in found if entry.ours for side in entry.published]
    dropped = [side.name for entry in found if not entry.ours for side in entry.published]
    assert (len(mapped), len(dropped)) == (5652, 27)
    assert sorted(mapped + dropped) == sorted(listed)
    assert all(name.endswith("self_attn.rotary_emb.inv_freq") for name in dropped)
    numbers = sum(math.prod(side.shape) for entry in found for side in entry.ours)
    assert numbers == 16_407_656_048


def test_our_layouts_at_the_published_dimensions(published):
    ours = {side.name: side.shape for entry in match(*published) for side in entry.ours}
    layer = "language_model.model.layers.26"
    assert len(ours) == 712
    assert ours["vision_tower.patch_embed.proj.weight"] == (1152, 588)
    assert ours["vision_tower.patch_embed.pos_emb.weight"] == (4096, 1152)
    assert ours["language_model.model.layers.0.mlp.gate_up_proj.weight"] == (22528, 2048)
    assert ours[f"{layer}.self_attn.k_b_proj.weight"] == (16, 128, 512)
    assert ours[f"{layer}.self_attn.v_b_proj.weight"] == (16, 128, 512)
    assert ours[f"{layer}.mlp.experts.gate_up_proj"] == (64, 2048, 2816)
    assert ours[f"{layer}.mlp.experts.down_proj"] == (64, 1408, 2048)
    assert ours[f"{layer}.mlp.shared_experts.gate_up_proj.weight"] == (5632, 2048)


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_no_name_stands_twice(raw):
    found = list(entries(model_config(raw)))
    for sides in ([s for e in found for s in e.published], [s for e in found for s in e.ours]):
        names = [side.name for side in sides]
        assert len(names) == len(set(names))
        assert not any("{" in name for name in names)


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_every_row_is_a_permutation_with_its_own_inverse(raw):
    for entry in entries(model_config(raw)):
        if not entry.ours:
            continue
        sizes = [math.prod(side.shape) for side in entry.published]
        numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
        sources = [n.reshape(side.shape) for n, side in zip(numbers, entry.published)]
        blocks = entry.blocks(sources)
        assert len(blocks) == len(entry.ours)
        targets = [
            transforms.gather(b, side.shape, transforms.FLOAT32) for b, side in zip(blocks, entry.ours)
        ]
        assert np.array_equal(np.sort(np.concatenate([t.ravel() for t in targets])), np.arange(sum(sizes)))
        back = [np.full_like(s, -1) for s in sources]
        for b, target, side in zip(entry.blocks(back), targets, entry.ours):
            transforms.scatter(b, target, side.name)
        assert all(same_bits(b, s) for b, s in zip(back, sources))


def halves(rows, rope):
    """(…, rope/2, 2) -> (…, 2, rope/2) on the first axis, as a formula."""
    return rows.reshape(rope // 2, 2, -1).transpose(1, 0, 2).reshape(rope, -1)


def by_hand(t, raw):
    """The published tensors in our layouts, written out plainly for one dense and one expert layer."""
    c = model_config(raw)
    text, vision = c.text, c.vision
    heads, nope, rope = text.num_attention_heads, text.qk_nope_head_dim, text.qk_rope_head_dim
    want = {
        "vision_tower.patch_embed.proj.weight": t["vision_tower.patch_embed.proj.weight"].reshape(
            vision.hidden_size, -1
        ),
        "vision_tower.patch_embed.pos_emb.weight": t["vision_tower.patch_embed.pos_emb.weight"].reshape(
            -1, vision.hidden_size
        ),
    }
    block = "vision_tower.encoder.blocks.1"
    for part in ("weight", "bias"):
        wqkv = t[f"{block}.wqkv.{part}"]
        q, k, v = np.split(wqkv.reshape(len(wqkv), -1), 3)
        turned = [halves(head, vision.head_dim) for x in (q, k) for head in np.split(x, 3)]
        want[f"{block}.wqkv.{part}"] = np.concatenate([*turned, v]).reshape(wqkv.shape)
        for name in ("norm0", "norm1", "wo", "mlp.fc0", "mlp.fc1"):
            want[f"{block}.{name}.{part}"] = t[f"{block}.{name}.{part}"]
    for layer in ("language_model.model.layers.0", "language_model.model.layers.2"):
        attn = f"{layer}.self_attn"
        q = t[f"{attn}.q_proj.weight"].reshape(heads, nope + rope, -1)
        want[f"{attn}.q_proj.weight"] = np.concatenate(
            [part for head in q for part in (head[:nope], halves(head[nope:], rope))]
        )
        kv_a = t[f"{attn}.kv_a_proj_with_mqa.weight"]
        want[f"{attn}.kv_a_proj_with_mqa.weight"] = np.concatenate(
            [kv_a[: text.kv_lora_rank], halves(kv_a[text.kv_lora_rank :], rope)]
        )
        kv_b = t[f"{attn}.kv_b_proj.weight"].reshape(heads, nope + text.v_head_dim, -1)
        want[f"{attn}.k_b_proj.weight"] = kv_b[:, :nope]
        want[f"{attn}.v_b_proj.weight"] = kv_b[:, nope:]
    dense, moe = "language_model.model.layers.0.mlp", "language_model.model.layers.2.mlp"
    for mlp in (dense, f"{moe}.shared_experts"):
        want[f"{mlp}.gate_up_proj.weight"] = np.concatenate(
            [t[f"{mlp}.gate_proj.weight"], t[f"{mlp}.up_proj.weight"]]
        )
        want[f"{mlp}.down_proj.weight"] = t[f"{mlp}.down_proj.weight"]
    experts = [f"{moe}.experts.{e}" for e in range(text.n_routed_experts)]
    want[f"{moe}.experts.gate_up_proj"] = np.stack(
        [np.concatenate([t[f"{e}.gate_proj.weight"].T, t[f"{e}.up_proj.weight"].T], axis=1) for e in experts]
    )
    want[f"{moe}.experts.down_proj"] = np.stack([t[f"{e}.down_proj.weight"].T for e in experts])
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        want[f"{moe}.{name}"] = t[f"{moe}.{name}"].astype(np.float32)
    return want


@pytest.mark.parametrize("piece_bytes", [transforms.PIECE_BYTES, 100])
def test_the_layouts_are_those_written_out_by_hand(monkeypatch, piece_bytes):
    monkeypatch.setattr(transforms, "PIECE_BYTES", piece_bytes)
    raw = configuration()
    t = tensors(raw)
    got = {}
    for entry in match(model_config(raw), specs(t)):
        dtype = target_dtype(entry, specs(t))
        for blocks, side in zip(entry.blocks([t[s.name] for s in entry.published]), entry.ours):
            got[side.name] = transforms.gather(blocks, side.shape, dtype)
    for name, want in by_hand(t, raw).items():
        assert same_bits(got[name], np.ascontiguousarray(want)), name


def test_pieces_stay_small(monkeypatch):
    monkeypatch.setattr(transforms, "PIECE_BYTES", 1000)
    experts = [np.arange(600, dtype=np.float32).reshape(20, 30) for _ in range(4)]
    (blocks,) = transforms.stack_experts.blocks(experts, {"E": 2})
    pieces = [piece.nbytes for piece in transforms.stream(blocks, transforms.FLOAT32)]
    assert max(pieces) <= 1000
    assert sum(pieces) == 4 * 2400


def test_what_does_not_change_is_not_copied():
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    (blocks,) = transforms.keep.blocks([source], {})
    assert np.shares_memory(transforms.gather(blocks, (3, 4), transforms.FLOAT32), source)


def test_checkpoints_with_and_without_inv_freq_are_fine():
    raw = configuration()
    t = tensors(raw)
    without = {name: a for name, a in t.items() if not name.endswith("inv_freq")}
    full, short = (match(model_config(raw), specs(x)) for x in (t, without))
    assert [e for e in full if e.ours] == short


GATE = "language_model.model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {GATE: Spec((8, 22), "bfloat16")},
            f"{GATE}: shape (8, 22), expected (5, 22) from config.n_routed_experts; is --src another variant?",
        ),
        (
            {"language_model.model.layers.0.self_attn.q_proj.weight": Spec((39, 23), "bfloat16")},
            "q_proj.weight: shape (39, 23), expected (39, 22) from config.hidden_size",
        ),
        (
            {"language_model.model.norm.weight": Spec((22, 1), "bfloat16")},
            "language_model.model.norm.weight: shape (22, 1), expected (22,); is --src another variant?",
        ),
        (
            {"language_model.model.norm.weight": Spec((22,), "float64")},
            "language_model.model.norm.weight: dtype float64, expected bfloat16, float16, float32",
        ),
        ({"language_model.lm_head.weight": None}, "language_model.lm_head.weight: is missing"),
        (
            {"language_model.lm_head.bias": Spec((53,), "bfloat16")},
            "'language_model.lm_head.bias': no tensor of this name belongs to the network",
        ),
    ],
    ids=["wrong expert count", "wrong width", "wrong rank", "wrong dtype", "missing", "extra"],
)
def test_what_does_not_fit_is_named(change, message):
    raw = configuration()
    found = specs(tensors(raw)) | change
    found = {name: spec for name, spec in found.items() if spec is not None}
    with pytest.raises(ConversionError) as e:
        match(model_config(raw), found)
    assert message in str(e.value)


@pytest.mark.parametrize(
    "raw",
    [
        configuration({"num_hidden_layers": 10**9}),
        configuration({"n_routed_experts": 10**9}),
        configuration(vision={"num_hidden_layers": 10**9}),
    ],
)
def test_an_absurd_configuration_is_refused_at_once(raw):
    with pytest.raises(ConversionError, match="is 1000000000, but the checkpoint has only"):
        match(model_config(raw), specs(tensors(configuration())))


def test_dtypes_are_the_sources_but_for_the_router():
    raw = configuration()
    t = specs(tensors(raw))
    mixed = "language_model.model.layers.0.mlp.up_proj.weight"
    t[mixed] = Spec(t[mixed].shape, "float16")
    for asked in (None, "float16"):
        for entry in match(model_config(raw), t):
            if not entry.ours:
                continue
            names = [side.name for side in entry.published]
            want = asked or "bfloat16"
            if "mlp.gate." in names[0]:
                want = "float32"
            elif asked is None and mixed in names:
                want = "float32"  # holds both exactly
            assert target_dtype(entry, t, asked).name == want


SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x3F80], np.uint16)


@pytest.mark.parametrize("dtype", [transforms.BFLOAT16, transforms.FLOAT32])
def test_every_bf16_value_comes_back_from_fp32(dtype):
    values = np.concatenate([SPECIAL, np.arange(0x10000, dtype=np.uint32).astype(np.uint16)])
    source = values.view(ml_dtypes.bfloat16)
    (blocks,) = transforms.keep.blocks([source], {})
    stored = transforms.gather(blocks, source.shape, dtype)
    back = np.zeros_like(source)
    transforms.scatter(transforms.keep.blocks([back], {})[0], stored, "x")
    assert np.array_equal(back.view(np.uint16), values)


@pytest.mark.parametrize("published", [transforms.BFLOAT16, transforms.FLOAT16])
def test_a_value_that_is_not_exact_on_the_way_back_is_an_error(published):
    target = np.full((2, 3), 1 / 3, np.float32)
    back = np.zeros((2, 3), published)
    with pytest.raises(
        ConversionError, match=f"x: holds float32 values that are not exact in .* {published.name}"
    ):
        transforms.scatter(transforms.keep.blocks([back], {})[0], target, "x")


@pytest.mark.parametrize(
    ("values", "dtype", "became"),
    [
        ([7e4, -1e30, 3e-8, 1e-40, 0, 1], transforms.FLOAT16, [65504, -65504, 2.0**-25 * 2, 0, 0, 1]),
        ([3.4e38, -3.4e38, 1e-45, 0, 0, 1], transforms.BFLOAT16, [3.3895314e38, -3.3895314e38, 0, 0, 0, 1]),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_counted_and_kept_finite(values, dtype, became):
    (blocks,) = transforms.keep.blocks([np.array(values, np.float32)], {})
    losses = transforms.Losses()
    (piece,) = transforms.stream(blocks, dtype, losses)
    assert np.array_equal(piece.astype(np.float32), np.array(became, np.float32))
    assert (losses.overflowed, losses.underflowed) == (2, 1)
    assert losses.largest == np.float32(abs(np.array(values[:2], np.float32)).max())


def test_infinities_that_were_there_may_stay():
    (blocks,) = transforms.keep.blocks([np.array([np.inf, np.nan], np.float32)], {})
    got = transforms.gather(blocks, (2,), transforms.FLOAT16)
    assert np.isinf(got[0])
    assert np.isnan(got[1])


def test_the_table_has_no_letter_without_a_meaning():
    for row in mapping.TABLE:
        for side in (row.published, row.ours):
            for template in filter(None, side.split(" + ")):
                letters = template[:-1].split(" [")[1].split(", ")
                assert set(letters) <= set(mapping.DIMS), template
