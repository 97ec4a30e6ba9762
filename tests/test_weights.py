"""The candidate's weights, bit by bit: what the numbers cannot show is seen, by name and place."""

from __future__ import annotations

import json

import bundles
import ml_dtypes
import numpy as np
import parity
import pytest
from golden import DATA

from kimi_vl.convert import convert
from kimi_vl.convert.manifest import MANIFEST, content_hash
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.judge import judge_run
from kimi_vl.verify.summary import sentence
from kimi_vl.verify.weights import compare

TINY = DATA / "tiny8-bf16"
CONFIG = ModelConfig.from_file(TINY)


@pytest.fixture
def ckpt(tmp_path):
    convert(TINY, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def change(directory, name, index, by):
    """Multiplies one number, and makes the hashes right again."""
    manifest = json.loads((directory / MANIFEST).read_text())
    record = manifest["tensors"][name]
    path = directory / record["file"]
    content = bytearray(path.read_bytes())
    kind = ml_dtypes.bfloat16 if record["dtype"] == "bfloat16" else np.dtype(record["dtype"])
    count = int(np.prod(record["shape"]))
    values = np.frombuffer(content, kind, count, record["offset"]).reshape(record["shape"])
    before = values[index]
    values[index] = before * np.asarray(by, kind)
    assert values[index] != before
    record["hash"] = content_hash(bytes(content[record["offset"] : record["offset"] + record["nbytes"]]))
    path.write_bytes(content)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("checkpoint", ["tiny8-bf16", "tiny8-fp32"])
@pytest.mark.parametrize("kind", [bundles.converted, bundles.bundle])
def test_a_conversion_and_a_bundle_hold_the_checkpoints_bits(checkpoint, kind):
    found = compare(DATA / checkpoint, kind(checkpoint), CONFIG)
    assert found["different"] == found["missing"] == found["unknown"] == []
    assert found["parameters"] == 76 and found["rounded_to"] is None
    assert found["bytes"] > 800_000


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("language_model.model.layers.2.mlp.experts.gate_up_proj", (5, 7, 3)),
        ("language_model.model.layers.0.self_attn.q_proj.weight", (11, 2)),
        ("vision_tower.encoder.blocks.1.wqkv.bias", (4,)),
        ("language_model.model.layers.1.mlp.gate.weight", (3, 9)),
    ],
)
def test_one_weight_that_is_off_is_named(ckpt, name, index):
    change(ckpt, name, index, 1.02)
    found = compare(TINY, ckpt, CONFIG)
    assert found["different"] == [{"name": name, "values": 1, "at": list(index)}]


def test_another_dtype_is_held_against_the_checkpoint_rounded_to_it(tmp_path):
    convert(DATA / "tiny8-fp32", tmp_path / "ckpt", dtype="bf16")
    found = compare(DATA / "tiny8-fp32", tmp_path / "ckpt", CONFIG)
    assert found["rounded_to"] == "bfloat16" and found["different"] == []


def test_parameters_that_lack_or_belong_to_nothing_are_named(ckpt):
    fewer = ModelConfig.from_dict(json.loads((TINY / "config.json").read_text()))
    object.__setattr__(fewer.text, "num_hidden_layers", 2)
    found = compare(TINY, ckpt, fewer)
    assert "language_model.model.layers.2.input_layernorm.weight" in found["unknown"]
    object.__setattr__(fewer.text, "num_hidden_layers", 4)
    found = compare(TINY, ckpt, fewer)
    assert "language_model.model.layers.3.input_layernorm.weight" in found["missing"]


def test_the_weights_are_a_verdict_of_their_own(ckpt):
    name = "language_model.model.layers.2.mlp.experts.down_proj"
    change(ckpt, name, (0, 0, 0), 1.02)
    link = {k: v for k, v in parity.good()["links"][0].items()} | {"weights": compare(TINY, ckpt, CONFIG)}
    run = parity.whole(link)
    judgement = judge_run(run)
    assert not judgement.passed and [f.tap for f in judgement.failures] == ["weights"]
    told = sentence(run, judgement)
    assert told.startswith(
        "FAILED: first bad is the weights: weights: 1 of 76 parameters are not bit for bit"
    )
    assert f"{name} (1 values, first at [0, 0, 0])" in told
    parity.schema().validate(
        json.loads(json.dumps(run)) | {"format": "kimi_vl-parity-run", "version": 2} | {"sha256": "0" * 64}
    )
