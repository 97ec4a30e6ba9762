"""The C++ operators for attention: over the latent cache, and over the patches of an image, against NumPy."""

from __future__ import annotations

import native
import native_formulas as formulas
import numpy as np
import pytest
from native import BF16, F32, I32, ROUNDED, SAME_ROUNDING, Numbers, array, call, check, run, same_bits

pytestmark = pytest.mark.usefixtures("rounding")

BLOCK = 512  # keys of a block of scores: beyond it, a row's largest score may change while its sums are kept


def latent(
    r: Numbers, t: int, start: int, slots: int, *, heads=3, nope=20, rope=8, value=12, lora=40, dtype=F32
):
    """q_nope, q_rope, cache, start, k_b and v_b."""
    k_b = r.weight(heads, nope, lora, dtype=dtype, inputs=lora)
    v_b = r.weight(heads, value, lora, dtype=dtype, inputs=lora)
    queries = r.normal(t, heads, nope, scale=2), r.normal(t, heads, rope, scale=2)
    return [*queries, r.normal(slots, lora + rope), array(start, dtype=I32), k_b, v_b]


def check_latent(*inputs):
    """In fp32, or rounded as the operator rounds now: many tokens and bf16 weights."""
    t, start = len(inputs[0]), int(inputs[3][0])
    if t > 8 and inputs[4].dtype == BF16 and native.rounds():
        if start + t <= BLOCK:  # beyond it, shares are rounded before they are brought to the largest score
            check("latent_attention", *inputs, kept=formulas.in_bf16, tolerance=SAME_ROUNDING)
        check("latent_attention", *inputs, tolerance=ROUNDED)
    else:
        check("latent_attention", *inputs)


SIZES = [
    dict(heads=3, nope=20, rope=8, value=12, lora=40),
    dict(heads=1, nope=1, rope=1, value=1, lora=1),
    dict(heads=5, nope=7, rope=9, value=33, lora=17),
    dict(heads=4, nope=32, rope=16, value=32, lora=64),
]


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s.values())))
def test_a_token_attends_to_itself_and_all_before_it(isa, sizes, dtype):
    r = Numbers(sizes["lora"])
    for t, start in ((1, 0), (1, 15), (1, 16), (2, 63), (5, 200), (8, 15), (9, 0), (9, 55), (40, 77)):
        check_latent(*latent(r, t, start, start + t + 3, dtype=dtype, **sizes))


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("t, start", [(1, 1500), (7, 1100), (8, 9000), (140, 0), (130, 450), (129, 1030)])
def test_long_contexts_and_chunks_are_put_together_from_blocks(isa, t, start, dtype):
    check_latent(*latent(Numbers(t), t, start, start + t, heads=2, dtype=dtype))


def test_nothing_is_rounded_when_exactness_is_asked_for(isa, exact):
    check("latent_attention", *latent(Numbers(), 40, 77, 130, dtype=BF16))


@pytest.mark.parametrize("stale", [0.0, 3e38, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_what_stands_in_later_slots_changes_no_bit(isa, stale, dtype):
    for t, start in ((1, 0), (1, 70), (6, 100), (9, 50), (70, 500)):
        inputs = latent(Numbers(t), t, start, start + t + 90, dtype=dtype)
        before = run("latent_attention", *inputs)
        inputs[2][start + t :] = stale
        assert same_bits(before, run("latent_attention", *inputs))


@pytest.mark.parametrize("t", [1, 5, 30])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_scores_far_apart_neither_overflow_nor_vanish(isa, t, dtype):
    inputs = latent(Numbers(), t, 600, 600 + t, dtype=dtype)
    inputs[1][:] *= 1000  # scores of thousands: one slot takes all
    check(
        "latent_attention", *inputs, tolerance=0.03 if native.rounds() and dtype == BF16 and t > 8 else 1e-3
    )
    (y,) = run("latent_attention", *inputs)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("t", [1, 4, 20])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_nan_and_infinity_in_queries_and_slots_come_out_where_they_should(isa, t, dtype):
    r = Numbers()
    queries = latent(r, t, 30, 30 + t, dtype=dtype)
    queries[0][t - 1, 0, 3], queries[1][0, 2, 5], queries[1][t // 2, 1, 0] = np.nan, np.nan, np.inf
    check("latent_attention", *queries, tolerance=ROUNDED)

    slots = latent(r, t, 30, 30 + t, dtype=dtype)
    slots[2][7, 41] = np.inf  # of the part that is rotated: -inf as a score takes a slot away, +inf gives NaN
    check("latent_attention", *slots, tolerance=ROUNDED)
    slots[2][7, 1] = np.nan
    check("latent_attention", *slots)
    assert all(np.isnan(y).all() for y in run("latent_attention", *slots))


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("t", [1, 20])
def test_slots_taken_away_by_an_infinite_score_leave_the_others(isa, t, dtype):
    """Whole blocks of them; and where every slot is taken away, nothing is left to give: NaN."""
    inputs = latent(Numbers(), t, 700, 700 + t, rope=1, dtype=dtype)
    inputs[1][:] = 1
    for gone in (100, BLOCK, 600):
        inputs[2][:gone, 40] = -np.inf
        check("latent_attention", *inputs, tolerance=ROUNDED)
    inputs[2][:, 40] = -np.inf
    assert np.isnan(run("latent_attention", *inputs)[0]).all()


@pytest.mark.parametrize("t, start", [(1, -1), (1, 20), (3, 18), (12, 9), (1, 2**31 - 1), (3, -(2**31))])
def test_a_start_outside_the_cache_is_refused(isa, t, start):
    inputs = latent(Numbers(), t, start, 20)
    status, _ = call("latent_attention", inputs, [((t, 36), F32)])
    assert status == native.BAD_INDEX


# Vision -------------------------------------------------------------------------------------------------------------


def image(r: Numbers, n: int, heads: int, dim: int, valid: int):
    """Queries, keys and values, tables and how many patches are valid."""
    parts = r.normal(n, heads * dim, scale=2), r.normal(n, heads * dim, scale=2), r.normal(n, heads * dim)
    angles = r.normal(n, dim // 2, scale=3)
    return [np.concatenate(parts, 1), np.cos(angles), np.sin(angles), array(valid, dtype=I32)]


def check_image(*inputs):
    check("vision_attention", *inputs)
    if native.rounds():
        if inputs[3][0] <= BLOCK:
            check("vision_attention_rounded", *inputs, kept=formulas.in_bf16, tolerance=SAME_ROUNDING)
        check("vision_attention_rounded", *inputs, tolerance=ROUNDED)
    else:
        check("vision_attention_rounded", *inputs)


@pytest.mark.parametrize("heads, dim", [(3, 24), (1, 4), (2, 18), (2, 72)])
def test_every_patch_attends_to_the_valid_ones(isa, heads, dim):
    r = Numbers(dim)
    for n, valid in ((1, 1), (2, 1), (4, 4), (64, 64), (100, 65), (150, 128), (200, 133)):
        check_image(*image(r, n, heads, dim, valid))


def test_a_head_may_be_one_pair(isa):
    check("vision_attention", *image(Numbers(), 70, 3, 2, 65))


def test_a_large_image_is_attended_to_in_blocks(isa):
    check_image(*image(Numbers(), 600, 1, 24, 570))


@pytest.mark.parametrize("name", ["vision_attention", "vision_attention_rounded"])
@pytest.mark.parametrize("padding", [3e38, np.inf, np.nan], ids=str)
def test_what_padding_patches_hold_reaches_no_valid_patch(isa, name, padding):
    inputs = image(Numbers(), 200, 2, 24, 140)
    (before,) = run(name, *inputs)
    for a in inputs[:3]:  # and what is rotated with it
        a[140:] = padding
    (after,) = run(name, *inputs)
    assert before[:140].tobytes() == after[:140].tobytes()


@pytest.mark.parametrize("name", ["vision_attention", "vision_attention_rounded"])
def test_nan_and_infinity_in_patches_come_out_where_they_should(isa, name):
    r = Numbers()
    queries = image(r, 150, 2, 24, 140)
    queries[0][3, 5], queries[0][149, 24 + 2], queries[0][7, 0] = np.nan, np.inf, -np.inf
    check(name, *queries, tolerance=ROUNDED)
    keys = image(r, 150, 2, 24, 140)
    keys[0][3, 48 + 5], keys[0][20, 96 + 24 + 7], keys[0][21, 96 + 24 + 8] = np.inf, np.nan, -np.inf
    check(name, *keys, tolerance=ROUNDED)


@pytest.mark.parametrize("name", ["vision_attention", "vision_attention_rounded"])
@pytest.mark.parametrize("valid", [0, -1, 151])
def test_a_number_of_patches_that_cannot_be_is_refused(isa, name, valid):
    status, _ = call(name, image(Numbers(), 150, 2, 24, valid), [((150, 48), F32)])
    assert status == native.BAD_INDEX
