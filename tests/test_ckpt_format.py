"""The layout of a .ckpt file: MindSpore's own bytes, read by it bit for bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import nn
from mindspore.train.checkpoint_pb2 import Checkpoint

from kimi_vl.convert import ConversionError
from kimi_vl.convert.ckpt_format import MAX_FILE_BYTES, CkptFile, lay_out
from kimi_vl.convert.mapping import Spec
from kimi_vl.convert.storage import PartFile
from kimi_vl.convert.transforms import DTYPES

SPECS = {
    "language.embed_tokens.weight": Spec((300, 7), "bfloat16"),
    "language.layers.0.mlp.gate.weight": Spec((5, 130), "float32"),
    "language.layers.0.mlp.experts.gate_up": Spec((3, 10, 128), "float16"),
    "norm": Spec((1,), "bfloat16"),
    "scale": Spec((), "float32"),
    "a" * 200: Spec((2, 1, 1, 1, 3), "bfloat16"),
}


def contents(specs=SPECS):
    """Bytes for each tensor: every bit pattern may occur, NaNs with payloads too."""
    rng = np.random.default_rng(0)
    return {
        name: rng.bytes(math.prod(spec.shape) * DTYPES[spec.dtype].itemsize) for name, spec in specs.items()
    }


def write(path, specs, data):
    """The file, its pieces written in an order in which they do not stand in it."""
    layout = lay_out(specs)
    part = PartFile(path, layout.nbytes)
    for name in reversed(specs):
        part.write(layout.places[name].offset, data[name])
    for offset, piece in layout.framing:
        part.write(offset, piece)
    part.finish()
    return path


def test_it_is_what_mindspore_saves(tmp_path):
    """But for bf16, which it cannot save with a current NumPy."""
    specs = {name: spec for name, spec in SPECS.items() if spec.dtype != "bfloat16"}
    data = contents(specs)
    arrays = {name: np.frombuffer(data[name], spec.dtype).reshape(spec.shape) for name, spec in specs.items()}
    parameters = {name: ms.Parameter(ms.Tensor(array), name=name) for name, array in arrays.items()}
    ms.save_checkpoint(parameters, str(tmp_path / "theirs.ckpt"))
    ours = write(tmp_path / "ours.ckpt", specs, data)
    assert ours.read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_it_is_mindspores_message(tmp_path):
    data, message = contents(), Checkpoint()
    for name, spec in SPECS.items():
        value = message.value.add()
        value.tag = name
        value.tensor.dims.extend(spec.shape)
        value.tensor.tensor_type = str(getattr(ms, spec.dtype))
        value.tensor.tensor_content = data[name]
    ours = write(tmp_path / "ours.ckpt", SPECS, data)
    assert ours.read_bytes() == message.SerializeToString()


def test_mindspore_reads_it_bit_for_bit(tmp_path):
    data = contents()
    read = ms.load_checkpoint(str(write(tmp_path / "a.ckpt", SPECS, data)))
    assert list(read) == list(SPECS)
    for name, spec in SPECS.items():
        assert read[name].shape == spec.shape
        assert read[name].dtype == getattr(ms, spec.dtype)
        assert read[name].get_bytes() == data[name]


def test_it_is_read_again_and_damage_between_the_tensors_is_found(tmp_path):
    data = contents()
    path = write(tmp_path / "a.ckpt", SPECS, data)
    file = CkptFile(path, SPECS)
    for name, spec in SPECS.items():
        assert (file.array(name).shape, file.array(name).dtype.name) == (spec.shape, spec.dtype)
        assert file.array(name).tobytes() == data[name]
    offset, _ = file.framing[2]
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=f"a.ckpt: is damaged at byte {offset}"):
        CkptFile(path, SPECS)
    path.write_bytes(content[:-1])
    with pytest.raises(
        ConversionError, match=f"a.ckpt: has {len(content) - 1} bytes, expected {len(content)}"
    ):
        CkptFile(path, SPECS)
    with pytest.raises(ConversionError, match="b.ckpt: is not in"):
        CkptFile(tmp_path / "b.ckpt", SPECS)


def test_it_fills_a_network(tmp_path):
    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.half = ms.Parameter(ms.Tensor(np.zeros((4, 3), np.float16)))
            self.brain = ms.Parameter(ms.Tensor.from_numpy(np.zeros((2, 5), ml_dtypes.bfloat16)))
            self.full = ms.Parameter(ms.Tensor(np.zeros(6, np.float32)))

    specs = {
        "half": Spec((4, 3), "float16"),
        "brain": Spec((2, 5), "bfloat16"),
        "full": Spec((6,), "float32"),
    }
    data = contents(specs)
    net = Net()
    path = write(tmp_path / "net.ckpt", specs, data)
    assert ms.load_param_into_net(net, ms.load_checkpoint(str(path)), strict_load=True) == ([], [])
    assert {name: p.get_bytes() for name, p in net.parameters_dict().items()} == data


def test_framing_and_tensors_fill_the_file():
    layout = lay_out(SPECS)
    spans = [(offset, len(piece)) for offset, piece in layout.framing]
    spans += [(info.offset, info.nbytes) for info in layout.places.values()]
    end = 0
    for offset, nbytes in sorted(spans):
        assert offset == end
        end += nbytes
    assert end == layout.nbytes
    assert layout == lay_out(SPECS)


def largest():
    """Specs of a file of just the size that is allowed."""
    specs = {f"t{i}": Spec((1 << 28,), "bfloat16") for i in range(3)}
    rest = (MAX_FILE_BYTES - lay_out(specs).nbytes) // 2
    for last in ("last", "last_"):  # one of them makes the size odd
        for n in range(rest - 40, rest):
            full = {**specs, last: Spec((n,), "bfloat16")}
            if lay_out(full).nbytes == MAX_FILE_BYTES:
                return full
    raise AssertionError("no such file")


def test_a_file_that_is_too_large_is_refused():
    *specs, (last, spec) = largest().items()
    assert lay_out(dict([*specs, (last, spec)])).nbytes == 2**31 - 1
    with pytest.raises(
        ConversionError, match=r"a .ckpt file from t0 on would have 2147483648 bytes, .* a smaller one"
    ):
        lay_out(dict([*specs, (last + "_", spec)]))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["python", "upb"])
def test_the_largest_file_is_read(tmp_path, implementation):
    """By either implementation of protobuf, from a file that is mostly holes; takes 5 GB of memory."""
    if implementation == "upb" and tuple(map(int, ms.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("this MindSpore's messages cannot be made by a current upb")
    specs = largest()
    layout, path, last = lay_out(specs), tmp_path / "large.ckpt", list(specs)[-1]
    with open(path, "wb") as f:
        f.truncate(layout.nbytes)
        for offset, piece in layout.framing:
            os.pwrite(f.fileno(), piece, offset)
        end = layout.places[last]
        os.pwrite(f.fileno(), b"the end!", end.offset + end.nbytes - 8)
    script = (
        "import sys, mindspore as ms\n"
        "from mindspore.train import serialization\n"
        # 2.10 asks for as much free memory as the file has, and a page cache leaves little free
        "serialization._get_available_memory = lambda: None\n"
        "read = ms.load_checkpoint(sys.argv[1], choice_func=sys.argv[2].__eq__)\n"
        "print(list(read), read[sys.argv[2]].get_bytes()[-8:])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), last],
        env=os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation},
        capture_output=True,
        text=True,
    )
    path.unlink()
    assert result.stdout.splitlines()[-1:] == [f"['{last}'] b'the end!'"], result.stderr
