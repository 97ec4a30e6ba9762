"""Calls the C++ operators by themselves, through ctypes, and holds what they give against NumPy."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import native_formulas
import numpy as np
import pytest

F32, I32, BF16 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(ml_dtypes.bfloat16)
WEIGHTS = (F32, BF16)
DONE, BAD_SHAPE, BAD_INDEX, NO_MEMORY = 0, 1, 2, 3  # what an operator returns

# Relative L2 errors that the arithmetic allows. fp32: numbers are rounded by at most 2^-24, and a sum of n of them, one
# after another, is off by about sqrt(n) / 4 such roundings; here n goes up to 736, in two products in a row.
# Rounding to bfloat16 is off by at most 2^-9 per factor; an operator rounds up to four factors in a row.
FP32 = 2.0**-20
ROUNDED = 4 * 2.0**-9
# An operator that rounds, against a formulation that rounds the same numbers. What it keeps between two products differs in
# the last fp32 bits, so that a few in ten thousand come out as the other one of two neighbours, 2^-8 apart; of a small
# result one is much. A rounding left out, or one too many, makes 2^-10 and more.
SAME_ROUNDING = 2.0**-12

GUARD = 64  # numbers before and after an output that must stay as they are


def path() -> Path:
    """The library; KIMI_VL_TEST_LIBRARY names another one, such as one with sanitizers."""
    if other := os.environ.get("KIMI_VL_TEST_LIBRARY"):
        return Path(other)
    from kimi_vl.modeling.kernels import library

    return library.path()


if not path().exists():
    pytest.skip("there was no C++ compiler at install", allow_module_level=True)


@functools.cache
def library() -> ctypes.CDLL:
    """With MindSpore's oneDNN in the process, unless KIMI_VL_TEST_ONEDNN is 0."""
    if os.environ.get("KIMI_VL_TEST_ONEDNN") != "0":
        import mindspore  # noqa: F401
    lib = ctypes.CDLL(str(path()))
    lib.kimi_isa.restype = lib.kimi_onednn.restype = ctypes.c_char_p
    return lib


def rounds() -> bool:
    """Whether products of many rows with bf16 weights round their input now."""
    return bool(library().kimi_rounds())


def has_onednn() -> bool:
    """Whether MindSpore's oneDNN is one that is used: that of 2.9 and later."""
    return library().kimi_onednn().startswith(b"oneDNN 3")


def placed(a: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts `offset` numbers into its memory, and ends where that ends."""
    memory = np.empty(offset + a.size, a.dtype)
    memory[offset:] = a.ravel()
    return memory[offset:].reshape(a.shape)


def pointers(arrays: Sequence[np.ndarray], shapes: Sequence[Sequence[int]], names: Sequence[bytes]):
    """The arguments of an operator, and what must live until it returns."""
    n = len(arrays)
    dims = [(ctypes.c_int64 * max(1, len(s)))(*s) for s in shapes]
    data = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
    ndims = (ctypes.c_int * n)(*map(len, shapes))
    return (
        n,
        data,
        ndims,
        (ctypes.c_void_p * n)(*map(ctypes.addressof, dims)),
        (ctypes.c_char_p * n)(*names),
    ), dims


def call(name: str, inputs, outputs, *, offset: int = 1, shapes=None, dtypes=None):
    """Runs an operator -> its status and its outputs, of the shapes and dtypes [(shape, dtype), ...] of `outputs`.

    Inputs must stay as they are, and so must what lies around the outputs; with a status other than 0 the outputs too.
    `shapes` and `dtypes` are what the operator is told, where that is not the truth.
    """
    held = [placed(a, offset) for a in inputs]
    memory = [
        np.full((2 * GUARD + int(np.prod(s)) + offset) * np.dtype(d).itemsize, 0xFF, np.uint8)
        for s, d in outputs
    ]
    results = []
    for m, (shape, dtype) in zip(memory, outputs, strict=True):
        size = int(np.prod(shape))
        results.append(m.view(dtype)[GUARD + offset :][:size].reshape(shape))
    arrays = held + results
    names = [str(d).encode() for d in dtypes or [a.dtype for a in arrays]]
    arguments, _alive = pointers(arrays, shapes or [a.shape for a in arrays], names)
    status = getattr(library(), f"kimi_{name}")(*arguments, None, None)
    for before, after in zip(inputs, held, strict=True):
        assert before.tobytes() == after.tobytes(), f"{name} wrote into an input"
    for m, result in zip(memory, results, strict=True):
        first = (GUARD + offset) * result.itemsize
        around = (m[:first], m[first + result.nbytes :])
        assert all((part == 0xFF).all() for part in around), f"{name} wrote beside an output"
        assert status == DONE or (m == 0xFF).all(), f"{name} failed and wrote an output"
    return status, results


def expected(name: str, *inputs, **options) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        y = getattr(native_formulas, name)(*inputs, **options)
    return list(y) if isinstance(y, tuple) else [y]


def outputs_of(results: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], np.dtype]]:
    return [(y.shape, I32 if y.dtype.kind == "i" else F32) for y in results]


def run(name: str, *inputs, offset: int = 1, **options) -> list[np.ndarray]:
    """What an operator gives for good inputs; `options` are of its formula, which tells the outputs' shapes."""
    return computed(name, inputs, expected(name, *inputs, **options), offset)


def computed(name: str, inputs, like: Sequence[np.ndarray], offset: int = 1) -> list[np.ndarray]:
    status, results = call(name, inputs, outputs_of(like), offset=offset)
    assert status == DONE, f"{name}: status {status}"
    return results


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float, absolute: float = 0.0) -> None:
    """NaN and infinity in the same places, and the rest within the tolerance (relative L2, or each number's)."""
    assert found.shape == wanted.shape
    if wanted.dtype.kind == "i":
        np.testing.assert_array_equal(found, wanted)
        return
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.where(finite, 0, found), np.where(finite, 0, wanted))
    assert np.isfinite(found[finite]).all()
    error = np.abs(found[finite].astype(np.float64) - wanted[finite])
    if (error > absolute).any():
        ratio = np.linalg.norm(error) / np.linalg.norm(wanted[finite])
        assert ratio <= tolerance, f"relative L2 error {ratio:.2e}, at most {tolerance:.2e}"


def check(name: str, *inputs, tolerance: float = FP32, absolute: float = 0.0, **options) -> None:
    """An operator gives what its formula gives."""
    formula = expected(name, *inputs, **options)
    for found, wanted in zip(computed(name, inputs, formula), formula, strict=True):
        close(found, wanted, tolerance, absolute)


def same_bits(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return [x.tobytes() for x in a] == [y.tobytes() for y in b]


class Numbers:
    """Seeded random arrays."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype=F32, scale: float = 1.0) -> np.ndarray:
        return (self.rng.standard_normal(shape) * scale).astype(dtype)

    def weight(self, *shape: int, dtype=F32, inputs: int) -> np.ndarray:
        """Of a size that keeps products with `inputs` terms around 1."""
        return self.normal(*shape, dtype=dtype, scale=inputs**-0.5)

    def experts(self, tokens: int, experts: int, k: int) -> np.ndarray:
        """k different experts for each token, int32 [tokens, k]."""
        return self.rng.permuted(np.tile(np.arange(experts, dtype=I32), (tokens, 1)), axis=1)[:, :k].copy()


def array(*values: float, dtype=F32) -> np.ndarray:
    return np.array(values, dtype)
