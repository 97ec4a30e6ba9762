"""The C++ operators for the router and the routed experts, against NumPy and against the plain graph's choice."""

from __future__ import annotations

import mindspore as ms
import native
import native_formulas as formulas
import numpy as np
import pytest
from native import BF16, F32, FP32, I32, ROUNDED, SAME_ROUNDING, Numbers, array, call, check, run

from kimi_vl.modeling.configuration import TextConfig
from kimi_vl.modeling.kernels import plain

pytestmark = pytest.mark.usefixtures("rounding")

TOKENS = (1, 2, 3, 5, 8, 9, 40)


def example(r: Numbers, t: int, h: int, i: int, e: int, k: int, dtype=F32):
    """x, gate_up, down, indices and weights."""
    gate_up, down = r.weight(e, h, 2 * i, dtype=dtype, inputs=h), r.weight(e, i, h, dtype=dtype, inputs=i)
    return r.normal(t, h), gate_up, down, r.experts(t, e, k), r.rng.random((t, k), F32)


def check_experts(*inputs):
    """In fp32, or rounded as the operator rounds now: many rows, bf16 weights, sizes that can be packed."""
    x, gate_up = inputs[:2]
    packs = gate_up.dtype == BF16 and len(x) > 8 and native.rounds()
    if packs and x.shape[1] % 32 == 0 and gate_up.shape[2] % 64 == 0:
        check("experts", *inputs, kept=formulas.in_bf16, tolerance=SAME_ROUNDING)
        check("experts", *inputs, tolerance=ROUNDED)
    else:
        check("experts", *inputs)


# [hidden, intermediate]: multiples of 32, which can be packed, and others; at 512 and more, columns are shared out
SIZES = [(64, 96), (32, 32), (7, 5), (40, 24), (33, 64), (512, 32), (32, 512)]


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("h, i", SIZES)
def test_a_token_is_the_weighted_sum_of_its_experts(isa, h, i, dtype):
    r = Numbers(h + i)
    for t in TOKENS:
        check_experts(*example(r, t, h, i, 8, 3, dtype))


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("t", [5, 40, 530])
def test_one_expert_may_take_all_tokens_and_the_others_none(isa, t, dtype):
    x, gate_up, down, indices, weights = example(Numbers(), t, 32, 64, 4, 2, dtype)
    indices[:] = 2
    check_experts(x, gate_up, down, indices[:, :1], weights[:, :1])
    check_experts(x, gate_up, down, indices, weights)  # both choices of a token are the same expert


@pytest.mark.parametrize("t", [12, 100])
def test_an_expert_larger_than_the_cache_is_packed_in_parts(isa, t):
    """Some of its rows at a time for few tokens, some of its columns for many."""
    check_experts(*example(Numbers(), t, 512, 736, 1, 1, BF16))


def test_nothing_is_rounded_when_exactness_is_asked_for(isa, exact):
    check("experts", *example(Numbers(), 40, 64, 96, 8, 3, BF16))


@pytest.mark.parametrize("t", [6, 30])
@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_nan_and_infinity_reach_those_who_chose_them(isa, t, dtype):
    x, gate_up, down, indices, weights = example(Numbers(), t, 32, 64, 6, 2, dtype)
    indices[:] = [0, 1]
    indices[3], indices[4], indices[5] = [2, 1], [0, 3], [4, 1]
    x[1, 5], weights[2, 1] = np.nan, np.inf
    gate_up[2, 0, 0], down[3, 1, 1] = np.nan, np.inf  # experts of one token each
    gate_up[5] = np.nan  # an expert of nobody
    check("experts", x, gate_up, down, indices, weights, tolerance=ROUNDED)


@pytest.mark.parametrize("t", [3, 20])
@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1, -(2**31)])
def test_an_index_that_is_no_expert_is_refused(isa, t, bad):
    inputs = example(Numbers(), t, 32, 32, 8, 2, BF16)
    inputs[3][-1, -1] = bad
    status, _ = call("experts", inputs, [((t, 32), F32)])
    assert status == native.BAD_INDEX


# Router -------------------------------------------------------------------------------------------------------------


def routed(x, weight, bias, *, k, normalise=True, factor=2.446):
    return run("router", x, weight, bias, array(float(normalise), factor), k=k)


@pytest.mark.parametrize("normalise, factor", [(True, 2.446), (False, 1.0)])
@pytest.mark.parametrize("h, e, k", [(64, 16, 4), (19, 7, 7), (33, 5, 1), (128, 64, 6)])
def test_a_router_chooses_by_scores_and_bias_and_weighs_by_scores(isa, h, e, k, normalise, factor):
    r = Numbers(h)
    for t in (1, 3, 9, 40):
        x, weight, bias = r.normal(t, h), r.weight(e, h, inputs=h), r.normal(e)
        check("router", x, weight, bias, array(float(normalise), factor), k=k)


def by_plain(x, weight, bias, *, k):
    """What the plain graph's router gives."""
    config = TextConfig(n_routed_experts=len(bias), num_experts_per_tok=k, routed_scaling_factor=2.446)
    return [y.asnumpy() for y in plain.Router(config)(*map(ms.Tensor, (x, weight, bias)))]


def test_the_plain_router_chooses_the_same(isa):
    r = Numbers()
    inputs = r.normal(12, 20), r.weight(15, 20, inputs=20), r.normal(15)
    for found, wanted in zip(routed(*inputs, k=6), by_plain(*inputs, k=6), strict=True):
        native.close(found, wanted, FP32)


@pytest.mark.parametrize("t", [2, 12])
def test_of_equal_scores_the_first_is_chosen(isa, t):
    """The plain router takes any of them, of the same scores. Whole numbers, so that sums are exact in any order."""
    r = Numbers(t)
    x, weight = (r.rng.integers(-1, 2, s).astype(F32) for s in ((t, 20), (3, 20)))
    weight = np.tile(weight, (5, 1))  # each expert five times
    x[1] = 0  # all are equal
    bias = np.zeros(15, F32)
    indices, weights = routed(x, weight, bias, k=6)
    np.testing.assert_array_equal(indices[1], np.arange(6))
    check("router", x, weight, bias, array(1, 2.446), k=6)
    native.close(weights, by_plain(x, weight, bias, k=6)[1], FP32)


def test_a_nan_counts_as_the_largest_score(isa):
    """As torch.topk has it; and all indices are different experts, so that the experts' operator can run."""
    r = Numbers()
    x, weight, bias = r.normal(4, 20), r.weight(9, 20, inputs=20), r.normal(9)
    weight[6, 3], weight[2, 0], bias[4] = np.nan, np.nan, np.nan
    x[2, 7] = np.nan  # all of this token's scores
    check("router", x, weight, bias, array(1, 2.446), k=4)
    check("router", x, weight, bias, array(0, 1), k=9)
    indices, _ = routed(x, weight, bias, k=4)
    np.testing.assert_array_equal(indices[0, :3], [2, 4, 6])
    np.testing.assert_array_equal(indices[2], np.arange(4))


def test_scores_at_the_ends_give_shares_of_nothing(isa):
    """All scores 0 in fp32, or all 1."""
    x, weight = array(-200, 200)[:, None], np.ones((5, 1), F32)
    indices, weights = routed(x, weight, np.zeros(5, F32), k=2)
    np.testing.assert_array_equal(indices, [[0, 1], [0, 1]])
    np.testing.assert_allclose(weights, [[0, 0], [1.223, 1.223]], rtol=1e-6)


def test_an_infinite_bias_forces_or_forbids_a_choice(isa):
    r = Numbers()
    bias = array(0, -np.inf, 0, np.inf, 0)
    indices, weights = routed(r.normal(3, 8), r.normal(5, 8), bias, k=4)
    assert (indices[:, 0] == 3).all() and not (indices == 1).any()
    assert np.isfinite(weights).all()
    assert indices.dtype == I32
