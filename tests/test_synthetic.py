"""Synthetic checkpoints: the published layout to the byte, random numbers that depend on the seed alone."""

import base64
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import DATA, INDEX, content
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kimi_vl
from kimi_vl.convert import ConversionError, EnvironmentProblem, plan

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = Path(kimi_vl.nano_path(), "config.json")
PUBLISHED = DATA / "published/config.json"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def make(out, layers=2, vision_layers=1, config=SMALL, **options):
    """Nano's dimensions unless another configuration is given."""
    import make_synthetic

    make_synthetic.make(out, make_synthetic.configuration(config, layers, vision_layers), **options)
    return out


@pytest.fixture(scope="module")
def small(scripts_on_path, tmp_path_factory):
    return make(tmp_path_factory.mktemp("synthetic") / "small")


def weights(directory):
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_the_full_size_is_the_published_tensor_list(tmp_path):
    listed = json.loads(gzip.decompress((DATA / "published/tensors.json.gz").read_bytes()))
    make(tmp_path / "full", 27, None, PUBLISHED, header_only=True)
    index = json.loads((tmp_path / "full" / INDEX).read_text())
    assert list(index["weight_map"]) == list(listed)
    assert index["metadata"]["total_size"] == 32_815_315_552
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        path = tmp_path / "full" / file
        assert path.stat().st_blocks * 512 < path.stat().st_size / 1000, f"{file} is no sparse file"
        with safe_open(path, framework="np") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                assert index["weight_map"][name] == file
                found[name] = [f.get_slice(name).get_dtype(), *f.get_slice(name).get_shape()]
    assert found == listed
    assert len(set(index["weight_map"].values())) == 7


def test_files_are_what_safetensors_writes(small, tmp_path):
    (file,) = small.glob("*.safetensors")
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_convert_weights_accepts_it(small):
    todo = plan(small)
    assert todo.source_tensors == len(weights(small))
    assert set(todo.copied) == {p.name for p in small.iterdir()} - {INDEX} - {
        p.name for p in small.glob("*.safetensors")
    }


def test_shards_are_as_full_as_the_limit_allows(small, tmp_path):
    limit = 300_000
    make(tmp_path / "out", shard_bytes=limit)
    sizes = [
        [t.nbytes for t in load_file(f).values()] for f in sorted((tmp_path / "out").glob("*.safetensors"))
    ]
    assert len(sizes) > 3
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in sizes)
    assert all(sum(a) + sum(b) > limit for a, b in zip(sizes, sizes[1:]))
    assert all(np.array_equal(t, u) for t, u in zip(*(_sorted(d) for d in (small, tmp_path / "out"))))


def _sorted(directory):
    return [tensor for _, tensor in sorted(weights(directory).items())]


def test_the_seed_alone_decides(small, tmp_path):
    make(tmp_path / "threads", threads=5)
    assert content(tmp_path / "threads") == content(small)
    make(tmp_path / "seed", seed=1)
    a, b = weights(small), weights(tmp_path / "seed")
    assert all(np.array_equal(a[n], b[n]) == n.endswith("inv_freq") for n in a)
    make(tmp_path / "layers", 3, 2)
    more = weights(tmp_path / "layers")
    assert all(np.array_equal(a[n], more[n]) for n in a), "a tensor changes with the number of layers"


def test_no_two_spans_are_alike():
    from synthetic_kit.layout import Tensor
    from synthetic_kit.values import SPAN, draw, spans

    tensor, twin = (Tensor(f"{name}.weight", (SPAN, 3), "BF16") for name in ("one", "two"))
    assert list(spans(tensor)) == [(0, SPAN), (SPAN, SPAN), (2 * SPAN, SPAN)]
    drawn = [draw(t, *span, seed, 1e4) for t in (tensor, twin) for span in spans(t) for seed in (0, 1)]
    assert len({span.tobytes() for span in drawn}) == 12
    assert list(spans(Tensor("odd.weight", (3, 7), "BF16"))) == [(0, 21)]
    assert draw(Tensor("odd.weight", (3, 7), "BF16"), 0, 21, 0, 1e4).shape == (21,)


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("language_model.model.layers.1.mlp.experts.3.down_proj.weight", 0, 64**-0.5),
        ("language_model.lm_head.weight", 0, 128**-0.5),
        ("language_model.model.embed_tokens.weight", 0, 1),
        ("language_model.model.layers.1.input_layernorm.weight", 1, 0.05),
        ("language_model.model.layers.1.self_attn.kv_a_layernorm.weight", 1, 0.05),
        ("vision_tower.encoder.blocks.0.norm0.weight", 1, 0.05),
        ("vision_tower.encoder.blocks.0.wqkv.bias", 0, 0.02),
        ("vision_tower.patch_embed.proj.weight", 0, (3 * 14 * 14) ** -0.5),
        ("language_model.model.layers.1.mlp.gate.e_score_correction_bias", 0, 0.1),
    ],
)
def test_scales_suit_the_network(small, name, mean, deviation):
    values = weights(small)[name].astype(np.float64)
    error = 4 / np.sqrt(values.size)  # four standard errors
    assert abs(values.mean() - mean) < error * deviation + 1e-4
    assert abs(values.std() / deviation - 1) < error + 0.01


def test_values_are_normal(small):
    drawn = weights(small)["language_model.model.embed_tokens.weight"].astype(np.float64)
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((abs(drawn) <= deviations).mean() - share) < 0.005
    assert 4 < abs(drawn).max() < 4.5


def test_rotary_frequencies_are_the_published_ones(small):
    freq = weights(small)["language_model.model.layers.1.self_attn.rotary_emb.inv_freq"]
    theta, dim = 800000.0, 16
    assert freq.dtype == np.float32
    assert np.array_equal(freq, np.array([theta ** (-2 * i / dim) for i in range(8)], np.float32))


def test_the_processor_and_tiktoken_read_the_vocabulary(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    from make_synthetic import configuration
    from synthetic_kit.side_files import side_files

    from kimi_vl import KimiVLProcessor
    from kimi_vl.modeling.tokenization import SPLIT_PATTERN

    for name, text in side_files(configuration(PUBLISHED, 1), 0).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = KimiVLProcessor.from_pretrained(tmp_path).tokenizer
    assert tokenizer.vocab_size == 163_584
    assert len(tokenizer) == 163_840
    named = json.loads((DATA / "special_tokens.json").read_text())["named"]
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in named} == named
    lines = (line.split() for line in (tmp_path / "tiktoken.model").read_bytes().splitlines())
    reference = tiktoken.Encoding(
        "reference",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={},
    )
    text = "the quick brown Fox, 12345 abandoned bookkeepers;\n 图片里有什么? naïve"
    ids = tokenizer(text)["input_ids"]
    assert ids == reference.encode(text)
    assert max(ids) > 256 + 26 + 26**2, "no token of three letters was used"
    assert tokenizer.decode(ids) == text
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 163584, "eos_token_id": [163585, 163586], "pad_token_id": 163839}


def test_every_case_of_verify_parity_can_be_made_of_it(small):
    """Its vocabulary splits most words into letters, so prompts are long: a picture may not reach past the first call."""
    from kimi_vl.modeling.configuration import ModelConfig
    from kimi_vl.verify.cases import Limits, build, suite
    from kimi_vl.verify.prompts import ProcessorSource

    config = ModelConfig.from_file(small)
    source = ProcessorSource(small, config)
    for case_plan in suite(config, Limits()):
        case = build(case_plan, source)
        media = case.inputs["input_ids"] == config.media_placeholder_token_id
        assert bool(case_plan.grids) == media.any() and not media[:, case.calls[0] :].any(), case.name


def test_a_forward_pass_is_finite_and_of_a_sensible_scale(small):
    from kimi_vl import KimiVLForConditionalGeneration, KimiVLProcessor

    processor = KimiVLProcessor.from_pretrained(small)
    model = KimiVLForConditionalGeneration.from_pretrained(small, max_context=64)
    picture = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    logits = model(**processor(text=text, images=[picture], return_tensors="np")).logits.asnumpy()
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 511, "vocab_size is 511, expected at least 512"),
        ("vocab_size", 800, "media_placeholder_token_id is 533, expected 565"),
        ("q_lora_rank", 8, "q_lora_rank is 8"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(field, value, message, tmp_path):
    raw = json.loads(SMALL.read_text())
    raw["text_config"][field] = value
    raw["media_placeholder_token_id"] = min(533, raw["text_config"]["vocab_size"] - 1)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", config=tmp_path / "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_only_a_new_or_empty_directory_is_written_to(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConversionError, match="is there already"):
        make(out)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]
    (out / "mine").unlink()
    (tmp_path / "out.part").mkdir()
    with pytest.raises(ConversionError, match="left by a run that was killed"):
        make(out)
    (tmp_path / "out.part").rmdir()
    make(out, header_only=True)
    assert {"config.json", INDEX} <= {p.name for p in out.iterdir()}


def test_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**9))
    with pytest.raises(EnvironmentProblem, match=r"needs 33\.15 GB, but 5\.00 GB are free"):
        make(tmp_path / "out", 27, None, PUBLISHED)
    assert not any(tmp_path.iterdir())
    make(tmp_path / "out", 27, None, PUBLISHED, header_only=True)


def test_a_failure_leaves_nothing(tmp_path):
    def fail(nbytes):
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="on fire"):
        make(tmp_path / "out", progress=fail)
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path):
    arguments = ("--layers", "1", "--vision-layers", "1", "--config", SMALL, "--out", tmp_path / "out")
    first, again = (run(*arguments) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert {t.dtype.name for t in weights(tmp_path / "out").values()} == {"bfloat16", "float32"}
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and "is there already" in again.stderr


def run(*arguments):
    command = [sys.executable, SCRIPTS / "make_synthetic.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
