"""Whatever stands in a file: it is read, or refused in one sentence, at once and in little memory."""

import json
import shutil
import struct
import tracemalloc

import pytest
from checkpoints import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_vl.convert import ConversionError, convert, plan
from kimi_vl.convert.safetensors_file import DTYPES, SafetensorsFile
from kimi_vl.modeling.configuration import ConfigError

FILE = "model-00002-of-00003.safetensors"
MEMORY = 200_000_000
FUZZ = settings(
    max_examples=300,
    deadline=5_000,  # milliseconds of one example
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

sizes = st.one_of(
    st.integers(-2, 300), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", "bf16"]), st.text(max_size=5), sizes),
        "shape": st.one_of(st.lists(sizes, max_size=10), sizes),
        "data_offsets": st.one_of(
            st.lists(sizes, min_size=2, max_size=2), st.lists(sizes, max_size=4), sizes
        ),
        "more": sizes,
    },
)
anything = st.recursive(
    sizes, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4)
)
headers = st.one_of(
    st.dictionaries(st.text(max_size=20) | st.just("__metadata__"), entries | anything, max_size=6), anything
).map(lambda header: json.dumps(header).encode())


def refused(work):
    """The refusal, or None if the work was done."""
    tracemalloc.start()
    try:
        work()
        return None
    except (ConversionError, ConfigError) as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 1000
        return e
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY


@FUZZ
@given(
    header=headers | st.binary(max_size=300),
    claim=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=50),
)
def test_a_file_of_anything(tmp_path, header, claim, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if claim is None else claim) + header + data)

    def read():
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.array(name).nbytes == info.nbytes

    refused(read)


@pytest.fixture(scope="module")
def shard():
    return (TINY / FILE).read_bytes()


@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny")


@settings(FUZZ, max_examples=100)
@given(
    flips=st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 30_000),
)
def test_a_checkpoint_with_bytes_changed_at_random(tiny, shard, flips, cut):
    data = bytearray(shard if cut is None else shard[:cut])
    for at, bits in flips:
        if data:
            data[at % len(data)] ^= bits
    (tiny / FILE).write_bytes(data)
    error = refused(lambda: plan(tiny))
    if error is None:  # then it can be converted, unless there is a NaN now
        shutil.rmtree(tiny.parent / "dst", ignore_errors=True)
        refused(lambda: convert(tiny, tiny.parent / "dst"))


@FUZZ
@given(st.data())
def test_a_header_with_values_changed_at_random(tiny, shard, data):
    (n,) = struct.unpack("<Q", shard[:8])
    header = json.loads(shard[8 : 8 + n])
    name = data.draw(st.sampled_from(sorted(k for k in header if k != "__metadata__")))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    header[name][field] = data.draw(entries.map(lambda e: e.get(field)) | anything)
    if data.draw(st.booleans()):
        header[data.draw(st.text(max_size=10))] = header.pop(name)
    text = json.dumps(header).encode()
    (tiny / FILE).write_bytes(struct.pack("<Q", len(text)) + text + shard[8 + n :])
    refused(lambda: plan(tiny))


@FUZZ
@given(index=headers | st.binary(max_size=200))
def test_an_index_of_anything(tiny, index):
    (tiny / "model.safetensors.index.json").write_bytes(index)
    assert refused(lambda: plan(tiny))


@FUZZ
@given(config=anything.map(lambda c: json.dumps(c).encode()) | st.binary(max_size=200), inside=st.booleans())
def test_a_configuration_of_anything(tiny, config, inside):
    if inside:
        own = json.loads((TINY / "config.json").read_text())
        try:
            value = json.loads(config)
        except ValueError:
            value = None
        for part in ("text_config", "vision_config"):
            for field in list(own[part])[:: 1 + len(config) % 3]:
                own[part] = own[part] | {field: value}
        config = json.dumps(own).encode()
    (tiny / "config.json").write_bytes(config)
    refused(lambda: plan(tiny))
