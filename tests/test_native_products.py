"""The C++ operator for products with weights: every path through it gives what NumPy gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import native
import native_formulas as formulas
import numpy as np
import pytest
from native import BF16, F32, ROUNDED, Numbers, check

pytestmark = pytest.mark.usefixtures("rounding")

FEW, MANY = (1, 2, 3, 4, 5, 8), (9, 33, 70)  # rows: read row by row in fp32, or multiplied by oneDNN

# [out, in]: multiples of every vector's width, and tails of one to fifteen numbers in both
SIZES = [(64, 96), (1, 1), (3, 7), (130, 101), (37, 33), (65, 127)]


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("n, k", SIZES)
def test_few_rows_are_multiplied_in_fp32(isa, n, k, dtype):
    r = Numbers(n)
    for t in FEW:
        weight, bias = r.weight(n, k, dtype=dtype, inputs=k), r.normal(n, dtype=dtype)
        check("linear", r.normal(t, k), weight)
        for name in ("linear", "linear_gelu_tanh", "linear_gelu_erf"):
            check(name, r.normal(t, k), weight, bias)


@pytest.mark.parametrize("n, k", SIZES)
def test_many_rows_are_multiplied_in_fp32_where_weights_are(isa, n, k):
    r = Numbers(n)
    for t in MANY:
        check("linear", r.normal(t, k), r.weight(n, k, inputs=k), r.normal(n))


@pytest.mark.parametrize("n, k", SIZES)
def test_many_rows_are_rounded_where_weights_are_bf16_and_the_machine_multiplies_bf16(isa, n, k):
    assert native.rounds() == (isa in ("avx512_bf16", "amx") and native.has_onednn())
    kept = formulas.in_bf16 if native.rounds() else formulas.as_is
    r = Numbers(n)
    for t in MANY:
        x, weight, bias = r.normal(t, k), r.weight(n, k, dtype=BF16, inputs=k), r.normal(n, dtype=BF16)
        for name in ("linear", "linear_gelu_tanh", "linear_gelu_erf"):
            check(name, x, weight, bias, kept=kept)
        check("linear", x, weight, bias, tolerance=ROUNDED)


def test_nothing_is_rounded_when_exactness_is_asked_for(isa, exact):
    assert not native.rounds()
    r = Numbers()
    for t in MANY:
        check("linear", r.normal(t, 101), r.weight(37, 101, dtype=BF16, inputs=101))


def test_rounding_is_to_the_nearest_and_to_even(isa):
    """One column of ones copies x, so that the rounded numbers themselves come out."""
    if not native.rounds():
        pytest.skip("nothing is rounded")
    ties = 1 + np.arange(-8, 9) * 2.0**-8  # every second one lies between two bfloat16 numbers
    x = np.concatenate([ties, ties + 2.0**-20, ties - 2.0**-20, -ties, [3.4e38, -3.4e38]]).astype(F32)[
        :, None
    ]
    (y,) = native.run("linear", x, np.ones((1, 1), BF16))
    np.testing.assert_array_equal(y, formulas.in_bf16(x))


@pytest.mark.parametrize("t", [3, 20])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_nan_and_infinity_come_out_where_they_should(isa, t, dtype):
    r = Numbers()
    for k in (19, 64):
        x, weight = r.normal(t, k), r.weight(33, k, dtype=dtype, inputs=k)
        x[0, k - 1], x[1, 0], x[2, 3] = np.nan, np.inf, -np.inf
        weight[5, k - 1], weight[32, 1] = np.inf, np.nan
        weight[7, :4] = 0  # infinity times 0 is NaN
        check("linear", x, weight, tolerance=ROUNDED)


@pytest.mark.parametrize("t", [3, 20])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_a_denormal_counts_as_itself_or_as_zero(isa, t, dtype):
    """Instructions for bf16 take it as zero."""
    r = Numbers()
    k = 50
    x, weight = r.normal(t, k), r.normal(33, k, dtype=dtype)
    x[0], x[1, ::2], weight[4], weight[5, ::2] = 1e-40, 1e-40, 1e-40, 1e-40
    x[2] = 1e-20  # its products with denormals vanish
    check("linear", x, weight, tolerance=ROUNDED, absolute=k * 4e-38)


ALONE = """
import native
from native import I32, Numbers, array, check
assert b"no oneDNN" in native.library().kimi_onednn() and not native.rounds()
r = Numbers()
for dtype in native.WEIGHTS:
    check("linear", r.normal(40, 101), r.weight(37, 101, dtype=dtype, inputs=101), r.normal(37, dtype=dtype))
    k_b, v_b = r.weight(3, 20, 40, dtype=dtype, inputs=40), r.weight(3, 12, 40, dtype=dtype, inputs=40)
    queries = r.normal(30, 3, 20), r.normal(30, 3, 8)
    check("latent_attention", *queries, r.normal(99, 48), array(50, dtype=I32), k_b, v_b)
check("vision_attention_rounded", r.normal(150, 72), r.normal(150, 6), r.normal(150, 6), array(140, dtype=I32))
print("checked")
"""


def test_without_onednn_the_operators_do_everything_themselves():
    result = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=Path(__file__).parent,
        env={**os.environ, "KIMI_VL_TEST_ONEDNN": "0", "KIMI_VL_TEST_LIBRARY": str(native.path())},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "checked\n", result.stderr
