"""Converting and reverting whole directories: bit for bit, readable by others, safe against bad input."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    BF16,
    DATA,
    INDEX,
    TINY,
    configuration,
    content,
    raw_file,
    same_bits,
    tensors,
    write_checkpoint,
)
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from kimi_vl.convert import (
    ConversionError,
    EnvironmentProblem,
    check,
    convert,
    converter,
    open_weights,
    plan,
    revert,
)
from kimi_vl.convert.cli import cli
from kimi_vl.convert.manifest import Manifest
from kimi_vl.convert.safetensors_file import SafetensorsFile
from kimi_vl.modeling.configuration import ConfigError

SHARD = "model-00001-of-00001.safetensors"
GATE = "language_model.model.layers.1.mlp.gate.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def tiny(tmp_path):
    """A copy of a published checkpoint in three shards that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def _converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "ckpt"
    convert(TINY, path, max_shard_size=300_000)
    return path


@pytest.fixture
def converted(_converted, tmp_path):
    """A converted copy of the same that a test may damage."""
    return Path(shutil.copytree(_converted, tmp_path / "ckpt"))


# --- there and back ---------------------------------------------------------------------------------------------


def sources(tmp_path):
    odd = configuration()
    t = tensors(odd)
    yield TINY
    yield DATA / "tiny8-fp32"
    yield write_checkpoint(tmp_path / "one-file", odd, t)
    yield write_checkpoint(tmp_path / "shards", odd, t, shards=4)
    yield write_checkpoint(tmp_path / "fp16", odd, tensors(odd, np.float16), shards=2)
    yield write_checkpoint(
        tmp_path / "no-inv-freq", odd, {n: a for n, a in t.items() if not n.endswith("inv_freq")}
    )
    mixed = {n: a.astype(np.float32) if "norm" in n or "up_proj" in n else a for n, a in t.items()}
    yield write_checkpoint(tmp_path / "mixed-dtypes", odd, mixed, shards=3)
    weird = {n: np.full_like(a, -1) if n.endswith("inv_freq") else a for n, a in t.items()}
    yield write_checkpoint(tmp_path / "unusual-inv-freq", odd, weird)


def test_the_way_back_is_bit_for_bit(tmp_path):
    for i, source in enumerate(sources(tmp_path)):
        there, back = tmp_path / f"there{i}", tmp_path / f"back{i}"
        convert(source, there, max_shard_size=20_000 if i % 2 else 10**9)
        revert(there, back)
        assert content(back) == content(source), source.name


def test_the_way_back_from_fp32_is_bit_for_bit(tmp_path):
    convert(TINY, tmp_path / "there", dtype="fp32")
    revert(tmp_path / "there", tmp_path / "back")
    assert content(tmp_path / "back") == content(TINY)


def test_tokenizer_and_other_files_come_along_and_go_back(tiny, tmp_path):
    others = {
        "tiktoken.model": b"YQ== 0\n",
        "tokenizer_config.json": b"{}",
        "LICENSE": b"free",
        "code.py": b"!",
    }
    left = {"notes.bin": b"?", ".hidden.json": b"{}"}
    for name, data in (others | left).items():
        (tiny / name).write_bytes(data)
    convert(tiny, tmp_path / "there")
    revert(tmp_path / "there", tmp_path / "back")
    want = {name: data for name, data in content(tiny).items() if name not in left}
    assert content(tmp_path / "back") == want
    assert others.items() <= content(tmp_path / "there").items()


def test_two_runs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        convert(TINY, tmp_path / name, max_shard_size=100_000)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_rounded_weights_go_back_as_rounded(tmp_path):
    """fp32 to bf16 loses bits, which the plan says; the published layout and dtypes come back all the same."""
    source = DATA / "tiny8-fp32"
    made = convert(source, tmp_path / "there", dtype="bf16")
    undone = revert(tmp_path / "there", tmp_path / "back")
    assert made.narrowed == undone.narrowed == 120 - 4  # all but the routers'
    with (
        safe_open(source / "model.safetensors", "np") as a,
        safe_open(tmp_path / "back/model.safetensors", "np") as b,
    ):
        assert list(a.keys()) == list(b.keys())
        for name in a.keys():  # noqa: SIM118
            want = a.get_tensor(name)
            if ".mlp.gate." not in name and not name.endswith("inv_freq"):
                want = want.astype(BF16).astype(np.float32)
            assert same_bits(b.get_tensor(name), want), name


# --- what is written --------------------------------------------------------------------------------------------


def test_shards_are_read_by_the_safetensors_package(converted):
    weights, seen = open_weights(converted), set()
    weight_map = json.loads((converted / INDEX).read_text())["weight_map"]
    for path in sorted(converted.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith("__pad"):
                    continue
                assert weight_map[name] == path.name
                assert same_bits(file.get_tensor(name), weights.read(name))
                seen.add(name)
    assert seen == set(weight_map) == set(weights.names())
    assert len(list(converted.glob("*.safetensors"))) > 2


def test_shards_have_the_first_byte_and_the_alignment_of_mindir_data(converted):
    weights = open_weights(converted)
    for path in converted.glob("*.safetensors"):
        assert path.read_bytes()[0] == 1
    for name in weights.names():
        file, offset, nbytes = weights.location(name)
        assert offset % 64 == 0
        with open(converted / file, "rb") as f:
            f.seek(offset)
            assert f.read(nbytes) == weights.read(name).tobytes()


def test_mindspore_reads_a_shard_as_external_data(converted, tmp_path):
    """A graph whose weights are pointed into the shard computes with them."""
    ms = pytest.importorskip("mindspore")
    from mindspore.train.mind_ir_pb2 import ModelProto

    class Scores(ms.nn.Cell):
        def __init__(self, shape):
            super().__init__()
            self.w = ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)))

        def construct(self, x):
            return ms.ops.matmul(x, self.w.T)

    weights = open_weights(converted)
    gate = weights.read(GATE)
    x = np.arange(2 * gate.shape[1], dtype=np.float32).reshape(2, -1)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.export(Scores(gate.shape), ms.Tensor(x), file_name=str(tmp_path / "g"), file_format="MINDIR")
    graph = ModelProto()
    graph.ParseFromString((tmp_path / "g.mindir").read_bytes())
    (parameter,) = graph.graph.parameter
    parameter.ClearField("raw_data")
    file, offset, nbytes = weights.location(GATE)
    parameter.external_data.location, parameter.external_data.offset = file, offset
    parameter.external_data.length = nbytes
    (tmp_path / "g.mindir").write_bytes(graph.SerializeToString())
    os.link(converted / file, tmp_path / file)
    got = ms.nn.GraphCell(ms.load(str(tmp_path / "g.mindir")))(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(got, x @ gate.T, rtol=1e-5)


def test_published_and_converted_read_the_same(converted):
    published, ours = open_weights(TINY), open_weights(converted)
    assert published.names() == ours.names()
    assert published.dtype == ours.dtype == ours.config.dtype == "bfloat16"
    for name in ours.names():
        assert same_bits(published.read(name), ours.read(name)), name
        assert published.spec(name) == ours.spec(name) == (ours.read(name).shape, ours.read(name).dtype.name)


def test_reading_a_converted_directory_copies_nothing(converted):
    weights = open_weights(converted)
    for name in weights.names():
        array = weights.read(name)
        assert not array.flags.owndata
        assert not array.flags.writeable


@pytest.mark.parametrize(("asked", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
@pytest.mark.parametrize("source", ["tiny8-bf16", "tiny8-fp32"])
def test_dtypes(tmp_path, source, asked, name):
    source = DATA / source
    convert(source, tmp_path / "x", dtype=asked)
    weights, before = open_weights(tmp_path / "x"), open_weights(source)
    assert weights.dtype == weights.config.dtype == name
    assert weights.manifest.dtype == name
    for n in weights.names():
        router = n.endswith((".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"))
        assert weights.spec(n)[1] == ("float32" if router else name)
        assert same_bits(weights.read(n), before.read(n).astype(weights.read(n).dtype)), n


@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_mindspore_loads_its_own_format(tmp_path, dtype):
    ms = pytest.importorskip("mindspore")
    convert(TINY, tmp_path / "there", format="ckpt", dtype=dtype, max_shard_size=300_000)
    weights, plain = open_weights(tmp_path / "there"), open_weights(TINY)
    shards = sorted((tmp_path / "there").glob("*.ckpt"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "there/model.ckpt.index.json").read_text())["weight_map"]
    loaded = {}
    for shard in shards:
        for name, parameter in ms.load_checkpoint(str(shard)).items():
            assert index[name] == shard.name
            loaded[name] = parameter
    assert list(loaded) == weights.names()
    for name in weights.names():
        array = weights.read(name)
        assert loaded[name].get_bytes() == array.tobytes()
        assert same_bits(array, plain.read(name).astype(array.dtype))
        assert array.flags.aligned


def test_the_way_back_from_mindspores_format_is_bit_for_bit(tmp_path):
    convert(TINY, tmp_path / "there", format="ckpt")
    assert check(tmp_path / "there") == []
    revert(tmp_path / "there", tmp_path / "back")
    assert content(tmp_path / "back") == content(TINY)


def test_a_value_that_overflows_stops_the_conversion(tmp_path):
    raw = configuration()
    t = tensors(raw, np.float32)
    t[HEAD][3, 3] = 1e5
    source = write_checkpoint(tmp_path / "src", raw, t)
    with pytest.raises(ConversionError, match=f"{HEAD}: has values as large as 1e.05, too large for float16"):
        convert(source, tmp_path / "dst", dtype="fp16")
    assert not (tmp_path / "dst").exists()


def test_a_value_that_overflows_may_be_clipped_and_is_counted(tmp_path):
    raw = configuration()
    t = tensors(raw, np.float32)
    t[HEAD][3, 3:5] = 1e5, -1e9
    t[HEAD][4, :3] = 1e-9, 0, 1
    source = write_checkpoint(tmp_path / "src", raw, t)
    convert(source, tmp_path / "dst", dtype="fp16", allow_overflow=True)
    weights = open_weights(tmp_path / "dst")
    assert weights.read(HEAD)[3, 3:5].tolist() == [65504, -65504]
    assert weights.read(HEAD)[4, :3].tolist() == [0, 0, 1]
    losses = weights.manifest.losses[HEAD]
    assert losses.overflowed == 2
    assert losses.underflowed >= 1


def test_shards_keep_to_their_size(tmp_path):
    limit = 50_000
    made = convert(TINY, tmp_path / "x", max_shard_size=limit)
    for file in made.files:
        held = [t.nbytes for t in made.tensors if t.file == file.name]
        assert sum(held) <= limit or len(held) == 1
        assert (tmp_path / "x" / file.name).stat().st_size == file.nbytes


# --- the plan ---------------------------------------------------------------------------------------------------


def test_a_plan_is_a_value(tmp_path):
    made = plan(TINY, tmp_path / "x", dtype="fp32")
    assert made == plan(TINY, tmp_path / "x", dtype="fp32")
    assert made != plan(TINY, tmp_path / "x")
    assert json.loads(json.dumps(made.to_dict()))["dtype"] == "float32"
    assert "123 published -> 76 ours, mostly float32" in str(made)
    assert "dropped    3: language_model.model.layers.0.self_attn.rotary_emb.inv_freq" in str(made)
    assert not (tmp_path / "x").exists()


def test_a_plan_is_what_happens(tmp_path):
    planned = plan(TINY, tmp_path / "x", max_shard_size=100_000)
    done = []
    assert convert(TINY, tmp_path / "x", max_shard_size=100_000, progress=done.append) == planned
    assert sum(done) == sum(tensor.nbytes for tensor in planned.tensors)
    written = {p.name: p.stat().st_size for p in (tmp_path / "x").glob("*.safetensors")}
    assert written == {file.name: file.nbytes for file in planned.files}
    back = plan(tmp_path / "x", reverse=True)
    assert {t.name for t in back.tensors} >= {s for t in planned.tensors for s in t.sources}
    assert back.source_tensors == len(planned.tensors)


def test_a_plan_can_be_carried_out(tmp_path):
    convert(plan(TINY, tmp_path / "a", dtype="fp32", max_shard_size=100_000))
    convert(TINY, tmp_path / "b", dtype="fp32", max_shard_size=100_000)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    revert(plan(tmp_path / "a", tmp_path / "back", reverse=True))
    assert content(tmp_path / "back") == content(TINY)


def test_a_plan_that_no_longer_holds_is_refused(tiny, tmp_path):
    planned = plan(tiny, tmp_path / "x")
    (tiny / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="is not what the plan was made from"):
        convert(planned)
    with pytest.raises(ConversionError, match="dst: is not given"):
        convert(plan(tiny))
    assert not (tmp_path / "x").exists()


def test_the_manifest_tells_where_every_tensor_came_from(converted):
    manifest = Manifest.load(converted)
    record = manifest.tensors["language_model.model.layers.1.mlp.experts.down_proj"]
    assert record.transform == "stack_experts"
    assert record.sources[7] == "language_model.model.layers.1.mlp.experts.7.down_proj.weight"
    sources = {name for r in manifest.tensors.values() for name in r.sources}
    assert len(sources) + len(manifest.dropped) == 123
    assert str(converted) not in manifest.to_json()
    assert str(TINY) not in manifest.to_json()


# --- bad sources ------------------------------------------------------------------------------------------------

FILE = "model-00002-of-00003.safetensors"


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_header(directory, change, file=FILE):
    """Changes a shard's header and keeps its data."""
    data = (directory / file).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    changed = change(header)
    raw_file(directory / file, header if changed is None else changed, data[8 + n :])


def add_duplicate_name(header):
    name, entry = next((k, v) for k, v in header.items() if k != "__metadata__")
    return json.dumps(header)[:-1].encode() + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()


def overlap(header):
    header["language_model.model.layers.1.self_attn.o_proj.weight"]["data_offsets"] = header[
        "language_model.model.layers.0.self_attn.o_proj.weight"
    ]["data_offsets"]


def reach_out(header):
    last = max((e for e in header.values() if "shape" in e), key=lambda e: e["data_offsets"])
    last["shape"] = [10**9, *last["shape"]]
    last["data_offsets"][1] = last["data_offsets"][0] + 10**9 * (
        last["data_offsets"][1] - last["data_offsets"][0]
    )


def set_entry(key, value):
    def change(header):
        header["language_model.model.layers.0.self_attn.o_proj.weight"][key] = value

    return lambda d: edit_header(d, change)


def copy_tensor_to_another_shard(directory):
    extra = np.zeros((22,), BF16)
    other = directory / "model-00001-of-00003.safetensors"
    name = "language_model.model.layers.0.input_layernorm.weight"

    def change(header):
        end = max(e["data_offsets"][1] for e in header.values() if "shape" in e)
        header[name] = {"dtype": "BF16", "shape": [22], "data_offsets": [end, end + extra.nbytes]}

    edit_header(directory, change, other.name)
    with open(other, "ab") as f:
        f.write(extra.tobytes())


def only_pickles(directory):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")


BAD = {
    "missing shard": (lambda d: (d / FILE).unlink(), f"{FILE}: is not in"),
    "shard is a directory": (
        lambda d: ((d / FILE).unlink(), (d / FILE).mkdir()),
        f"{FILE}: is no ordinary file",
    ),
    "shard is a pipe": (
        lambda d: ((d / FILE).unlink(), os.mkfifo(d / FILE)),
        f"{FILE}: is no ordinary file",
    ),
    "index names an absent tensor": (
        lambda d: edit_index(d, lambda m: m.update({"language_model.extra.weight": FILE})),
        f"{INDEX}: says that 'language_model.extra.weight' is in {FILE}, but it is not",
    ),
    "index leaves a tensor out": (
        lambda d: edit_index(d, lambda m: m.pop("language_model.model.layers.0.input_layernorm.weight")),
        "holds 'language_model.model.layers.0.input_layernorm.weight', but model.safetensors.index.json does not",
    ),
    "index leads out of the directory": (
        lambda d: edit_index(d, lambda m: m.update({HEAD: "../model.safetensors"})),
        "names the file '../model.safetensors', expected a plain file name",
    ),
    "index is no JSON": (lambda d: (d / INDEX).write_text("{"), "has no readable weight_map"),
    "index is a list": (lambda d: (d / INDEX).write_text("[]"), "has no readable weight_map"),
    "index names a tensor twice": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        "it names 'a' twice",
    ),
    "one name in two shards": (copy_tensor_to_another_shard, "has it in model-00002-of-00003.safetensors"),
    "two checkpoints in one": (
        lambda d: shutil.copy(DATA / "tiny8-fp32/model.safetensors", d),
        "holds both model.safetensors and model.safetensors.index.json",
    ),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "holds neither"),
    "only pickles": (only_pickles, "pytorch_model-00001-of-00002.bin: is a pickle"),
    "wrong shape": (
        lambda d: edit_config(d, lambda c: c["text_config"].update(n_routed_experts=16)),
        f"{GATE}: shape (8, 64), expected (16, 64) from config.n_routed_experts",
    ),
    "extra tensors": (
        lambda d: edit_config(d, lambda c: c["text_config"].update(num_hidden_layers=2)),
        "'language_model.model.layers.2.",
    ),
    "missing tensors": (
        lambda d: edit_config(d, lambda c: c["vision_config"].update(num_hidden_layers=3)),
        "vision_tower.encoder.blocks.2.norm0.weight: is missing",
    ),
    "truncated": (
        lambda d: os.truncate(d / FILE, 200_000),
        f"{FILE}: is truncated, its header describes 219912 bytes, the file has 200000",
    ),
    "truncated in the header": (
        lambda d: os.truncate(d / FILE, 1000),
        f"{FILE}: is truncated, its header alone",
    ),
    "empty file": (lambda d: os.truncate(d / FILE, 0), f"{FILE}: has 0 bytes, too few"),
    "bytes behind the end": (
        lambda d: (d / FILE).open("ab").write(b"more") and None,
        f"{FILE}: has 4 bytes after its last tensor",
    ),
    "absurd header size": (
        lambda d: raw_file(d / FILE, {}, claim=2**62),
        f"{FILE}: its header claims {2**62} bytes",
    ),
    "header is no JSON": (lambda d: raw_file(d / FILE, b"{nonsense"), f"{FILE}: its header is no valid JSON"),
    "header is no text": (lambda d: raw_file(d / FILE, b"\xff\xfe"), f"{FILE}: its header is no valid JSON"),
    "header is too deep": (
        lambda d: raw_file(d / FILE, b'{"a":' + b"[" * 100_000),
        f"{FILE}: its header is no valid JSON",
    ),
    "header is a list": (lambda d: raw_file(d / FILE, []), f"{FILE}: its header is not a JSON object"),
    "entry is a list": (
        lambda d: raw_file(d / FILE, {"a": []}),
        "'a': its header entry is not of dtype, shape",
    ),
    "metadata is no map": (
        lambda d: raw_file(d / FILE, {"__metadata__": {"a": 1}}),
        f"{FILE}: its header's __metadata__ is not a map",
    ),
    "a tensor twice in one header": (lambda d: edit_header(d, add_duplicate_name), "twice"),
    "overlapping tensors": (lambda d: edit_header(d, overlap), "overlaps"),
    "tensor behind the end": (lambda d: edit_header(d, reach_out), f"{FILE}: is truncated"),
    "negative offset": (set_entry("data_offsets", [-128, 0]), "are not two positions"),
    "offset beyond any file": (set_entry("data_offsets", [0, 10**20]), "are not two positions"),
    "offsets that miss the shape": (
        set_entry("data_offsets", [0, 2]),
        "do not span the bytes of shape [64, 64]",
    ),
    "negative shape": (set_entry("shape", [-64, -64]), "is not a list of at most"),
    "shape of many axes": (set_entry("shape", [1] * 100_000), "is not a list of at most"),
    "shape of truths": (set_entry("shape", [True, True]), "is not a list of at most"),
    "unknown dtype": (set_entry("dtype", "Q4"), "dtype 'Q4' is none that this reader knows"),
    "quantised": (
        lambda d: edit_header(d, lambda h: h[GATE].update(dtype="I8", shape=[8, 128])),
        "shape (8, 128), expected (8, 64)",
    ),
    "integer weights": (
        lambda d: edit_header(d, lambda h: h[GATE].update(dtype="I16")),
        f"{GATE}: dtype int16, expected bfloat16, float16, float32",
    ),
}


def only_values(value, dtype=BF16):
    """Fills a whole tensor."""

    def change(directory):
        data = bytearray((directory / FILE).read_bytes())
        (n,) = struct.unpack("<Q", data[:8])
        begin, end = json.loads(data[8 : 8 + n])[GATE]["data_offsets"]
        data[8 + n + begin : 8 + n + end] = np.full((end - begin) // 2, value, dtype).tobytes()
        (directory / FILE).write_bytes(data)

    return change


def link(name, to):
    def change(directory):
        if (directory / name).exists():
            shutil.move(directory / name, directory.parent / "elsewhere")
        (directory / name).symlink_to(to)

    return change


BAD |= {
    "NaN-filled": (only_values(np.nan), f"{GATE}: holds 512 values that are no numbers (NaN)"),
    "NaN-filled, negative": (only_values(-np.nan), f"{GATE}: holds 512 values that are no numbers (NaN)"),
    "shard is a link that leads out": (
        link(FILE, "../elsewhere"),
        "is a link that leads out of its directory",
    ),
    "index is a link that leads out": (
        link(INDEX, "../elsewhere"),
        "is a link that leads out of its directory",
    ),
    "configuration is a link that leads out": (
        link("config.json", "../elsewhere"),
        "is a link that leads out of its directory",
    ),
    "another file is a link that leads out": (
        link("notes.txt", "/etc/hostname"),
        "notes.txt: is a link that leads out of its directory",
    ),
    "link to nowhere": (lambda d: ((d / FILE).unlink(), (d / FILE).symlink_to("gone")), f"{FILE}: is not in"),
    "link to itself": (lambda d: ((d / FILE).unlink(), (d / FILE).symlink_to(FILE)), FILE),
}
BAD_CONFIG = {
    "another model": (
        lambda d: edit_config(d, lambda c: c.update(model_type="llama")),
        "model_type is 'llama'",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("no"), "is not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "part is a list": (
        lambda d: edit_config(d, lambda c: c.update(text_config=[1])),
        "text_config is [1], expected an object",
    ),
}


@pytest.mark.parametrize(("damage", "message"), (BAD | BAD_CONFIG).values(), ids=BAD | BAD_CONFIG)
def test_a_bad_source_is_refused_in_one_sentence_and_leaves_nothing(tiny, tmp_path, damage, message):
    damage(tiny)
    with pytest.raises((ConversionError, ConfigError)) as e:
        convert(tiny, tmp_path / "dst")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600
    result = CliRunner().invoke(cli, ["--src", str(tiny), "--dst", str(tmp_path / "dst")])
    assert result.exit_code == 2
    assert result.stderr == f"convert-weights: {e.value}\n"
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("/no/such/directory", "there is no such directory"),
        (TINY / "config.json", "is a file, expected the directory"),
    ],
)
def test_a_source_that_is_none(src, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(src, tmp_path / "dst")


def test_a_revision_belongs_to_the_hub():
    with pytest.raises(ConversionError, match="is no Hub repository"):
        open_weights(TINY, revision="main")


def test_bad_arguments(tmp_path):
    with pytest.raises(ConversionError, match="--dtype: is 'int8', expected one of bf16, fp16, fp32"):
        convert(TINY, tmp_path / "dst", dtype="int8")
    with pytest.raises(ConversionError, match="--max-shard-size: is 0"):
        convert(TINY, tmp_path / "dst", max_shard_size=0)
    with pytest.raises(ConversionError, match="--format: is 'onnx', expected one of safetensors, ckpt"):
        convert(TINY, tmp_path / "dst", format="onnx")


def test_directions_are_not_mixed_up(converted, tmp_path):
    with pytest.raises(ConversionError, match="is converted already"):
        convert(converted, tmp_path / "dst")
    with pytest.raises(ConversionError, match="has no conversion.json"):
        revert(TINY, tmp_path / "dst")


# --- bad targets, and work that is cut short --------------------------------------------------------------------


def test_the_source_is_never_the_target(tiny):
    before = content(tiny)
    with pytest.raises(ConversionError, match="is the source itself"):
        convert(tiny, tiny.parent / "tiny" / ".")
    assert content(tiny) == before


def test_a_target_that_holds_something_is_left_alone(converted, tmp_path):
    before = content(converted)
    with pytest.raises(ConversionError, match="holds a converted checkpoint"):
        convert(TINY, converted)
    assert content(converted) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("precious")
    for run in (lambda d: convert(TINY, d), lambda d: revert(converted, d)):
        with pytest.raises(ConversionError, match="is not empty"):
            run(tmp_path / "full")
        with pytest.raises(ConversionError, match="is a file"):
            run(tmp_path / "full/thesis.txt")
    assert content(tmp_path / "full") == {"thesis.txt": b"precious"}


def test_a_disk_that_is_too_small_is_known_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(
        converter.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    with pytest.raises(EnvironmentProblem, match=r"needs 9\d\d\.\d\d kB, but 1.00 kB are free there"):
        convert(TINY, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# --- damage after the conversion --------------------------------------------------------------------------------


def shard_of(directory, name):
    file, offset, _ = open_weights(directory).location(name)
    return directory / file, offset


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_an_undamaged_directory_checks(converted):
    done = []
    assert check(converted, progress=done.append) == []
    weights = open_weights(converted)
    assert sum(done) == sum(weights.location(name)[2] for name in weights.names())


@pytest.mark.parametrize("name", [HEAD, GATE])
def test_a_flipped_bit_is_found_and_named(converted, tmp_path, name):
    path, offset = shard_of(converted, name)
    flip(path, offset + 17)
    assert check(converted) == [f"{path}: {name} is damaged, its content is not what was written"]
    with pytest.raises(ConversionError, match=f"{name}( is damaged|.*was it changed after the conversion)"):
        revert(converted, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_all_damage_is_found(converted):
    for name in (HEAD, GATE):
        flip(shard_of(converted, name)[0], shard_of(converted, name)[1])
    (converted / "config.json").write_text((converted / "config.json").read_text() + " ")
    (converted / "generation_config.json").unlink()
    (converted / INDEX).write_text("{}")
    found = [(Path(s.split(": ")[0]).name, s.split(": ")[1].split(" ")[0]) for s in check(converted)]
    assert found == [
        ("config.json", "was"),
        ("generation_config.json", "is"),
        (INDEX, "was"),
        (shard_of(converted, GATE)[0].name, GATE),
        (shard_of(converted, HEAD)[0].name, HEAD),
    ]


def test_only_converted_directories_are_checked(tmp_path):
    with pytest.raises(ConversionError, match="has no conversion.json"):
        check(TINY)
    with pytest.raises(ConversionError, match="is no directory"):
        check(tmp_path / "none")


def respace_header(path):
    """Another header of the same meaning and length."""
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    assert data[end - 1] == ord(" ")
    data[end - 1] = ord("\t")
    path.write_bytes(data)


def edit_manifest(directory, change):
    path = directory / "conversion.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


CHANGED = {
    "header": (
        lambda d: respace_header(shard_of(d, HEAD)[0]),
        "is not the file that conversion.json describes",
    ),
    "truncated shard": (lambda d: os.truncate(shard_of(d, HEAD)[0], 5000), "is truncated"),
    "shard of another run": (
        lambda d: shutil.copy(shard_of(d, HEAD)[0], shard_of(d, GATE)[0]),
        "is not the file that conversion.json describes",
    ),
    "shard gone": (lambda d: shard_of(d, HEAD)[0].unlink(), "is not in"),
    "configuration of another model": (
        lambda d: edit_config(d, lambda c: c["text_config"].update(moe_intermediate_size=31)),
        "which config.json asks for; was it changed after the conversion",
    ),
    "configuration with a layer less": (
        lambda d: edit_config(d, lambda c: c["text_config"].update(num_hidden_layers=2)),
        "layers.2.input_layernorm.weight: does not belong to the network",
    ),
    "manifest of a later version": (lambda d: edit_manifest(d, lambda m: m.update(schema=9)), "schema 9"),
    "manifest of something else": (lambda d: edit_manifest(d, lambda m: m.update(format="x")), "is 'x'"),
    "manifest without a field": (lambda d: edit_manifest(d, lambda m: m.pop("shards")), "is damaged"),
    "manifest that is no JSON": (lambda d: (d / "conversion.json").write_text("{"), "is damaged"),
    "manifest that leads out": (
        lambda d: edit_manifest(d, lambda m: m["files"].update({"../x": m["files"]["config.json"]})),
        "'../x' is no plain file name",
    ),
    "tensor moved": (
        lambda d: edit_manifest(d, lambda m: m["tensors"][HEAD].update(offset=64)),
        f"{HEAD} is not where it says",
    ),
    "tensor in no shard": (
        lambda d: edit_manifest(d, lambda m: m["tensors"][HEAD].update(file="x")),
        f"{HEAD} is not where it says",
    ),
    "tensor unlisted": (
        lambda d: edit_manifest(d, lambda m: m["tensors"].pop(HEAD)),
        "its shards hold 76 tensors",
    ),
    "offset that is no number": (
        lambda d: edit_manifest(d, lambda m: m["tensors"][HEAD].update(offset="64")),
        "offset is '64'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), CHANGED.values(), ids=CHANGED)
def test_a_changed_directory_is_not_opened(converted, damage, message):
    damage(converted)
    with pytest.raises(ConversionError, match=message):
        open_weights(converted)


def test_a_changed_configuration_file_is_found(converted, tmp_path):
    edit_config(converted, lambda c: c["text_config"].update(rope_theta=1.0))
    weights = open_weights(converted)
    with pytest.raises(ConversionError, match="config.json: was changed after the conversion"):
        weights.verify_files()
    with pytest.raises(ConversionError, match="config.json: was changed after the conversion"):
        revert(converted, tmp_path / "back")


REVERSE_DAMAGE = {
    "published headers": lambda m: m["published_files"][FILE].update(header="{}"),
    "a published file's hash": lambda m: m["published_files"][FILE].update(hash="00"),
    "a dropped tensor's content": lambda m: m["dropped"].popitem(),
    "its length": lambda m: next(iter(m["dropped"].values())).update(data="00"),
}


@pytest.mark.parametrize("change", REVERSE_DAMAGE.values(), ids=REVERSE_DAMAGE)
def test_the_way_back_checks_what_it_is_told(converted, tmp_path, change):
    edit_manifest(converted, change)
    with pytest.raises(ConversionError):
        revert(converted, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_mapped_tensor_can_be_forgotten_and_looked_at_again(tmp_path):
    held = np.arange(4 << 20, dtype=np.float32)
    save_file({"a": held[:1], "b": held}, tmp_path / SHARD)
    file = SafetensorsFile(tmp_path / SHARD)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) * 1024

    view, before = file.array("b"), resident()
    assert view.sum() == held.sum()
    looked_at = resident()
    file.forget("b")
    assert looked_at - before > 0.9 * held.nbytes and resident() - before < 0.1 * held.nbytes
    assert np.array_equal(view, held) and file.array("a")[0] == held[0]
