"""What holds for every C++ operator: it refuses what does not fit, and gives the same bits whoever calls it and how."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import native
import numpy as np
import pytest
from native import F32, I32, Numbers, array, call, expected, outputs_of, run, same_bits

pytestmark = pytest.mark.usefixtures("rounding")

EPS = array(1e-5)
TOKENS, MANY = 5, 37  # rows: few, which are read in fp32, and many
CASES = list(itertools.product((TOKENS, MANY), native.WEIGHTS))


def examples(t: int, dtype=F32, seed: int = 0):
    """Good arguments of t rows for every operator, and options of its formula."""
    r = Numbers(seed)

    def weight(*shape, inputs=1):
        return r.weight(*shape, dtype=dtype, inputs=inputs)

    x = r.normal(t, 64)
    linear = x, weight(70, 64, inputs=64), weight(70)
    indices, shares = r.experts(t, 6, 3), r.rng.random((t, 3), F32)
    queries = r.normal(t, 3, 12), r.normal(t, 3, 8)
    patches = r.normal(t, 3 * 2 * 12), r.normal(t, 6), r.normal(t, 6)
    start, valid = array(30, dtype=I32), array(max(1, t - 2), dtype=I32)
    return {
        "linear": (linear, {}),
        "linear_gelu_tanh": (linear, {}),
        "linear_gelu_erf": (linear, {}),
        "embedding": ((weight(9, 20), r.rng.integers(0, 9, t).astype(I32)), {}),
        "rms_norm": ((x, weight(64), EPS), {}),
        "add_rms_norm": ((x, r.normal(t, 64), weight(64), EPS), {}),
        "layer_norm": ((x, weight(64), weight(64), EPS), {}),
        "add_layer_norm": ((x, r.normal(t, 64), weight(64), weight(64), EPS), {}),
        "split": ((x,), {"first": 24}),
        "rotate": ((r.normal(t, 3, 16), r.normal(t, 8), r.normal(t, 8)), {}),
        "swiglu": ((x,), {}),
        "router": ((x, r.weight(6, 64, inputs=64), r.normal(6), array(1, 2.446)), {"k": 3}),
        "experts": ((x, weight(6, 64, 64, inputs=64), weight(6, 32, 64, inputs=32), indices, shares), {}),
        "latent_attention": (
            (
                *queries,
                r.normal(t + 40, 32),
                start,
                weight(3, 12, 24, inputs=24),
                weight(3, 10, 24, inputs=24),
            ),
            {},
        ),
        "vision_attention": ((*patches, valid), {}),
        "vision_attention_rounded": ((*patches, valid), {}),
        "interpolate": ((weight(9, 20), r.rng.integers(0, 9, (t, 4)).astype(I32), r.normal(t, 4)), {}),
    }


OPERATORS = list(examples(1))
# (argument, axis) that nothing else depends on: entries of a table, slots of a cache
FREE = {("embedding", 0, 0), ("interpolate", 0, 0), ("latent_attention", 2, 0)}
# Arguments that are bf16 or fp32 whatever the others are; the matrices of one operator are of the same dtype.
WEIGHTS = {
    ("embedding", 0),
    ("rms_norm", 1),
    ("add_rms_norm", 2),
    ("layer_norm", 1),
    ("layer_norm", 2),
    ("add_layer_norm", 2),
    ("add_layer_norm", 3),
    ("interpolate", 0),
}
# Arguments whose first axis is the rows; what attends to other rows has none.
BY_ROWS = {
    "linear": (0,),
    "linear_gelu_tanh": (0,),
    "linear_gelu_erf": (0,),
    "embedding": (1,),
    "rms_norm": (0,),
    "add_rms_norm": (0, 1),
    "layer_norm": (0,),
    "add_layer_norm": (0, 1),
    "split": (0,),
    "rotate": (0, 1, 2),
    "swiglu": (0,),
    "router": (0,),
    "experts": (0, 3, 4),
    "interpolate": (1, 2),
}


def good_call(name: str, dtype=F32, t: int = TOKENS):
    """Inputs, outputs as `call` wants them, and the shapes and dtypes of all."""
    inputs, options = examples(t, dtype)[name]
    outputs = outputs_of(expected(name, *inputs, **options))
    arrays = [(a.shape, a.dtype) for a in inputs] + outputs
    return inputs, outputs, [s for s, _ in arrays], [d for _, d in arrays]


def with_(items: list, i: int, item) -> list:
    return [*items[:i], item, *items[i + 1 :]]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_a_dimension_that_does_not_fit_the_others_is_refused(name):
    inputs, outputs, shapes, _ = good_call(name)
    for i, shape in enumerate(shapes):
        for axis, n in enumerate(shape):
            if (name, i, axis) in FREE:
                continue
            told = with_(shapes, i, with_(list(shape), axis, n - 1))
            status, _ = call(name, inputs, outputs, shapes=told)
            assert status == native.BAD_SHAPE, f"argument {i}, axis {axis}"


@pytest.mark.parametrize("name", OPERATORS)
def test_another_number_of_axes_is_refused(name):
    inputs, outputs, shapes, _ = good_call(name)
    for i, shape in enumerate(shapes):
        for other in ((*shape, 1), (1, *shape), shape[1:]):
            status, _ = call(name, inputs, outputs, shapes=with_(shapes, i, other))
            assert status == native.BAD_SHAPE, f"argument {i}: {other} for {shape}"


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_another_dtype_is_refused(name, dtype):
    inputs, outputs, _, dtypes = good_call(name, dtype)
    for i, right in enumerate(dtypes):
        taken = {"float32", "bfloat16"} if (name, i) in WEIGHTS else {str(right)}
        for wrong in {"float32", "bfloat16", "int32", "float16", "float64", "int64"} - taken:
            status, _ = call(name, inputs, outputs, dtypes=with_(dtypes, i, wrong))
            assert status == native.BAD_SHAPE, f"argument {i}: {wrong} for {right}"


@pytest.mark.parametrize("name", OPERATORS)
def test_another_number_of_arguments_is_refused(name):
    inputs, outputs, *_ = good_call(name)
    assert call(name, [*inputs, EPS], outputs)[0] == native.BAD_SHAPE
    if not name.startswith("linear"):  # which does without its bias
        assert call(name, inputs[:-1], outputs)[0] == native.BAD_SHAPE
    assert call(name, inputs, [])[0] == native.BAD_SHAPE


@pytest.mark.parametrize("name", OPERATORS)
def test_a_width_of_nothing_is_refused(name):
    """Of all arguments at once, so that they fit each other."""
    inputs, outputs, shapes, _ = good_call(name)
    told = [(s[0], *(0 for _ in s[1:])) if len(s) > 1 else (0,) for s in shapes]
    assert call(name, inputs, outputs, shapes=told)[0] == native.BAD_SHAPE


# No rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_no_rows_give_no_rows(name, dtype):
    inputs, options = examples(1, dtype)[name]
    rows = BY_ROWS.get(name, (0, 1) if name == "latent_attention" else (0, 1, 2))
    none = [a[:0] if i in rows else a for i, a in enumerate(inputs)]
    outputs = [((0, *s[1:]), d) for s, d in outputs_of(expected(name, *inputs, **options))]
    status, results = call(name, none, outputs)
    assert status == native.DONE and all(y.size == 0 for y in results)


# No memory ----------------------------------------------------------------------------------------------------------

WITHOUT_MEMORY = """
import resource
import numpy as np
import native
native.library().kimi_set_threads(2)
native.run("swiglu", np.ones((100, 1000), np.float32))  # the threads are there
qkv = np.ones((300_000, 3 * 2 * 64), np.float32)  # 77 MB for a head: a thread may hold 64 in reserve
table = np.ones((300_000, 32), np.float32)
arrays = [qkv, table, table, native.array(300_000, dtype=native.I32), np.empty((300_000, 128), np.float32)]
arguments, _alive = native.pointers(arrays, [a.shape for a in arrays], [str(a.dtype).encode() for a in arrays])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), -1))
print([native.library().kimi_vision_attention(*arguments, None, None) for _ in range(3)])
"""


def test_where_memory_is_missing_the_operator_says_so_and_the_program_goes_on():
    """Of the threads that share the work, too."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY],
        cwd=Path(__file__).parent,
        env={**os.environ, "KIMI_VL_TEST_ONEDNN": "0", "KIMI_VL_TEST_LIBRARY": str(native.path())},
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{[native.NO_MEMORY] * 3}\n", result.stderr


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets how many threads share the work."""
    before = native.library().kimi_threads()
    yield native.library().kimi_set_threads
    native.library().kimi_set_threads(before)


@cache
def calls(t: int, dtype):
    """(name, inputs, outputs) of a good call of every operator."""
    return [(name, *good_call(name, dtype, t)[:2]) for name in OPERATORS]


def results(t: int, dtype, offset: int = 1):
    return {name: call(name, inputs, outputs, offset=offset) for name, inputs, outputs in calls(t, dtype)}


def differing(a, b) -> list[str]:
    """Operators that did not give the same."""
    return [name for name in OPERATORS if a[name][0] != b[name][0] or not same_bits(a[name][1], b[name][1])]


@pytest.mark.parametrize("t", [TOKENS, 9, MANY, 150])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(isa, threads, t, dtype):
    threads(1)
    alone = results(t, dtype)
    assert all(status == native.DONE for status, _ in alone.values())
    for count in (2, 3, 5):
        threads(count)
        assert native.library().kimi_threads() == count
        assert not differing(alone, results(t, dtype)), f"{count} threads"


@pytest.mark.parametrize("t, dtype", CASES)
def test_it_does_not_matter_where_arrays_lie(isa, t, dtype):
    aligned = results(t, dtype, offset=0)
    for offset in (1, 3):
        assert not differing(aligned, results(t, dtype, offset)), f"{offset} numbers further"


@pytest.mark.parametrize("others", ["random", "nan", "inf", "huge", "denormal"])
@pytest.mark.parametrize("t, dtype", CASES)
def test_a_row_does_not_depend_on_what_the_others_hold(isa, t, dtype, others):
    """Of the same number of rows: as many take the same way."""
    values = {"nan": np.nan, "inf": -np.inf, "huge": 3e38, "denormal": 1e-41}
    before, after = examples(t, dtype), examples(t, dtype, seed=1)
    for name, by_rows in BY_ROWS.items():
        inputs, options = before[name]
        changed = list(inputs)
        for i in by_rows:
            changed[i] = after[name][0][i].copy()
            if others != "random" and changed[i].dtype == F32:
                changed[i][:] = values[others]
            for r in (0, 2, t - 1):
                changed[i][r] = inputs[i][r]
        for was, now in zip(run(name, *inputs, **options), run(name, *changed, **options), strict=True):
            for r in (0, 2, t - 1):
                assert was[r].tobytes() == now[r].tobytes(), f"{name}, row {r}"


@pytest.mark.parametrize("t, dtype", CASES)
def test_calls_from_several_threads_at_once_do_not_disturb_each_other(t, dtype):
    wanted = results(t, dtype)
    with ThreadPoolExecutor(4) as callers:
        for given in callers.map(lambda _: results(t, dtype), range(12)):
            assert not differing(wanted, given)


# Settings -----------------------------------------------------------------------------------------------------------


def test_an_unknown_instruction_set_changes_nothing():
    library = native.library()
    before = library.kimi_isa()
    assert not library.kimi_set_isa(b"avx1024")
    assert library.kimi_isa() == before


def test_there_is_at_least_one_thread(threads):
    threads(0)
    assert native.library().kimi_threads() == 1
