"""Transposing into strided memory: exact for every size, dtype, slice and bit pattern."""

import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from checkpoints import BF16

from kimi_vl.convert.transforms import scatter, stack_experts, stream
from kimi_vl.convert.transpose import ROW_BYTES, ROWS, transpose_into

SIZES = [
    (0, 5), (5, 0), (1, 1), (1, 700), (700, 1), (3, 5), (64, 48), (97, 101),
    (ROWS, ROW_BYTES // 2), (ROWS - 1, ROW_BYTES // 2 - 1), (ROWS + 1, ROW_BYTES // 2 + 1), (1408, 2048),
]  # fmt: skip
DTYPES = [np.dtype(np.uint16), np.dtype(np.float16), BF16, np.dtype(np.int32), np.dtype(np.float32)]


def random_bits(shape, dtype, seed=0):
    """Any bit pattern, so NaNs with payloads, infinities and both zeros too."""
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def bits(array):
    return array.view(f"u{array.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_target_is_the_transpose_bit_for_bit(shape, dtype):
    source, target = random_bits(shape, dtype), np.zeros(shape[::-1], dtype)
    transpose_into(source, target)
    assert np.array_equal(bits(target), bits(source).T)


@pytest.mark.parametrize("dtype", [np.dtype(np.uint16), np.dtype(np.uint32)], ids=lambda d: d.name)
def test_columns_of_a_larger_array_and_back(dtype):
    gate, up = random_bits((131, 517), dtype, 1), random_bits((131, 517), dtype, 2)
    fused = np.full((517, 1 + 2 * 131 + 2), 7, dtype)
    transpose_into(gate, fused[:, 1:132])
    transpose_into(up, fused[:, 132:-2])
    assert np.array_equal(fused[:, 1:-2], np.concatenate([gate, up]).T)
    assert (fused[:, 0] == 7).all() and (fused[:, -2:] == 7).all(), "columns beside the slice were written"

    back = np.zeros_like(up)
    transpose_into(fused[:, 132:-2], back)
    assert np.array_equal(back, up)


def test_every_16_bit_pattern_survives():
    source = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(BF16)
    target = np.zeros_like(source)
    transpose_into(source, target)
    assert np.array_equal(np.sort(bits(target), axis=None), np.arange(1 << 16))


def test_any_strides_and_a_read_only_source():
    whole = random_bits((60, 90), np.dtype(np.uint16))
    whole.flags.writeable = False
    target = np.zeros((90, 120), np.uint16)
    transpose_into(whole[::-2, ::3], target[::3, ::4])
    assert np.array_equal(target[::3, ::4], whole[::-2, ::3].T)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.zeros((2, 3), np.uint16), np.zeros((2, 3), np.uint16), "expected the transpose of"),
        (np.zeros(3, np.uint16), np.zeros(3, np.uint16), "expected the transpose of"),
        (np.zeros((2, 3), np.float16), np.zeros((3, 2), ml_dtypes.bfloat16), "expected the same"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "of 2 or 4 bytes"),
    ],
    ids=["not transposed", "a vector", "another dtype", "8 bytes an item"],
)
def test_what_does_not_fit_is_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        transpose_into(source, target)


def test_other_threads_run_meanwhile():
    # With this interval no thread is ever interrupted: another one runs only while NumPy gives the GIL up.
    before = sys.getswitchinterval()
    source, target = np.zeros((1408, 2048), np.uint16), np.zeros((2048, 1408), np.uint16)
    turns, ready, done = [], threading.Event(), threading.Event()

    def count():
        ready.set()
        while not done.is_set():
            turns.append(time.perf_counter())
            time.sleep(0.0001)

    thread = threading.Thread(target=count)
    thread.start()
    ready.wait()
    sys.setswitchinterval(1000)
    try:
        start = time.perf_counter()
        while not any(turn > start for turn in turns[-1:]) and time.perf_counter() < start + 20:
            transpose_into(source, target)
    finally:
        sys.setswitchinterval(before)
        done.set()
        thread.join()
    assert turns[-1] > start


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=lambda d: d.name)
def test_stacked_experts_are_transposed_and_come_back(dtype):
    hidden, width, experts = 96, 40, 3
    gate_up = [random_bits((width, hidden), dtype, seed) for seed in range(2 * experts)]
    blocks = stack_experts.blocks(gate_up, {"E": experts})[0]
    stacked = np.concatenate([bits(piece).copy() for piece in stream(blocks, dtype, "experts")])
    wanted = [np.concatenate([bits(g).T, bits(u).T], axis=1) for g, u in zip(gate_up[::2], gate_up[1::2])]
    assert np.array_equal(stacked, np.stack(wanted).reshape(-1))

    back = [np.zeros_like(source) for source in gate_up]
    scatter(stack_experts.blocks(back, {"E": experts})[0], stacked.view(dtype), "experts")
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(back, gate_up))
