"""The C++ operators as other compilers make them and another processor runs them give what NumPy gives.

No Python runs there: a small driver reads calls and writes what they gave. There is no oneDNN either, so this is the
library's own arithmetic, in fp32 throughout.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import native
import numpy as np
import pytest
from native import FP32, Numbers, array

SOURCES = sorted(Path(__file__).parents[1].glob("modeling/kernels/native/*.cc"))
DRIVER = Path(__file__).with_name("native_driver.cc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
RACES = ["-fsanitize=thread", "-g"]
NO_SUCH_ISA = 3
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]

pytestmark = pytest.mark.slow

BUILDS = [
    pytest.param((["g++"], []), id="gcc"),
    pytest.param((["clang++"], []), id="clang"),
    pytest.param((["g++", *RACES], []), id="gcc, looking for races"),
    pytest.param((["aarch64-linux-gnu-g++"], EMULATOR), id="aarch64"),
]

Case = tuple[str, list[np.ndarray], dict]


def cases() -> Iterator[Case]:
    """Each operator, with sizes that fill vectors and ones that leave a rest."""
    r = Numbers(7)
    eps = array(1e-5)
    for dtype in native.WEIGHTS:
        for t in (1, 3, 8, 21):
            for n, k in ((64, 96), (37, 33)):
                weight = r.weight(n, k, dtype=dtype, inputs=k)
                for name in ("linear", "linear_gelu_tanh", "linear_gelu_erf"):
                    yield name, [r.normal(t, k), weight, r.normal(n, dtype=dtype)], {}
                yield "linear", [r.normal(t, k), weight], {}
            ids = r.rng.integers(0, 9, t).astype(np.int32)
            yield "embedding", [r.normal(9, 35, dtype=dtype), ids], {}
            yield "rms_norm", [r.normal(t, 53), r.normal(53, dtype=dtype), eps], {}
            yield "add_rms_norm", [r.normal(t, 53), r.normal(t, 53), r.normal(53, dtype=dtype), eps], {}
            yield (
                "layer_norm",
                [r.normal(t, 53), r.normal(53, dtype=dtype), r.normal(53, dtype=dtype), eps],
                {},
            )
            affine = r.normal(53, dtype=dtype), r.normal(53, dtype=dtype)
            yield "add_layer_norm", [r.normal(t, 53), r.normal(t, 53), *affine, eps], {}
            taps = r.rng.integers(0, 12, (t, 16)).astype(np.int32)
            yield "interpolate", [r.normal(12, 35, dtype=dtype), taps, r.normal(t, 16)], {}
            for h, i in ((64, 32), (37, 19)):
                gate_up = r.weight(5, h, 2 * i, dtype=dtype, inputs=h)
                down = r.weight(5, i, h, dtype=dtype, inputs=i)
                chosen, weights = r.experts(t, 5, 2), abs(r.normal(t, 2))
                yield "experts", [r.normal(t, h), gate_up, down, chosen, weights], {}
            for start in (0, 90):
                yield (
                    "latent_attention",
                    [
                        r.normal(t, 4, 24),
                        r.normal(t, 4, 8),
                        r.normal(130, 48),
                        array(start, dtype=np.int32),
                        r.weight(4, 24, 40, dtype=dtype, inputs=40),
                        r.weight(4, 20, 40, dtype=dtype, inputs=40),
                    ],
                    {},
                )
    for t in (1, 5, 70):
        yield "split", [r.normal(t, 53)], {"first": 20}
        yield "rotate", [r.normal(t, 3, 22), r.normal(t, 11), r.normal(t, 11)], {}
        yield "swiglu", [r.normal(t, 54, scale=3)], {}
        yield "router", [r.normal(t, 40), r.weight(9, 40, inputs=40), r.normal(9), array(1, 2.446)], {"k": 3}
        for valid in {1, t // 2 + 1, t}:
            patches = r.normal(t, 3 * 3 * 18), r.normal(t, 9), r.normal(t, 9)
            yield "vision_attention", [*patches, array(valid, dtype=np.int32)], {}


def written(name: str, inputs: list[np.ndarray], outputs: list[tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """A call as the driver reads it."""
    lines = [f"{name} {len(inputs)} {len(outputs)}"]
    for shape, dtype in [(a.shape, a.dtype) for a in inputs] + outputs:
        lines.append(f"{dtype} {len(shape)} {' '.join(map(str, shape))}")
    return "\n".join(lines).encode() + b"\n" + b"".join(a.tobytes() for a in inputs)


@pytest.fixture(scope="module", params=BUILDS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs calls on this build."""
    compiler, emulator = request.param
    for tool in (compiler[0], *emulator[:1]):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    room = tmp_path_factory.mktemp("build")
    library, program = room / "library.so", room / "driver"
    subprocess.run([*compiler, *FLAGS, "-shared", *SOURCES, "-o", library, "-ldl", "-lpthread"], check=True)
    subprocess.run([*compiler, *FLAGS, DRIVER, "-o", program, "-ldl"], check=True)
    return [*emulator, str(program), str(library)]


@pytest.mark.parametrize(
    ("instructions", "threads"), [("best", 1), ("best", 3), ("plain", 3), ("avx2", 1), ("avx512", 1)]
)
def test_every_build_gives_what_numpy_gives(driver: list[str], instructions: str, threads: int) -> None:
    wanted = [(name, native.expected(name, *inputs, **options)) for name, inputs, options in cases()]
    calls = b"".join(
        written(name, inputs, native.outputs_of(results))
        for (name, inputs, _), (_, results) in zip(cases(), wanted, strict=True)
    )
    done = subprocess.run(
        [*driver, instructions, str(threads)],
        input=calls,
        capture_output=True,
        env=os.environ | {"TSAN_OPTIONS": "exitcode=66"},
    )
    if done.returncode == NO_SUCH_ISA:
        pytest.skip(f"{instructions} is not there")
    assert done.returncode == 0, done.stderr.decode()
    answers = io.BytesIO(done.stdout)
    for name, results in wanted:
        assert int(answers.readline()) == native.DONE, name
        for y, (shape, dtype) in zip(results, native.outputs_of(results), strict=True):
            found = np.frombuffer(answers.read(y.size * dtype.itemsize), dtype).reshape(shape)
            native.close(found, y, FP32)
    assert not answers.read()
