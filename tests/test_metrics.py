"""Distances, and what cannot be compared."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_vl.verify.metrics import (
    NOT_A_TIE,
    ROUTING_TIE,
    comparable_places,
    greedy_metrics,
    logit_metrics,
    perplexity_metrics,
    routing_metrics,
    tensor_metrics,
)

RNG = np.random.default_rng(0)


def everywhere(a):
    return np.ones(a.shape[:-1], bool)


def test_distances_are_those_of_the_formulas():
    r = RNG.standard_normal((2, 100, 7)).astype(np.float32)
    c = r + 0.01 * RNG.standard_normal(r.shape).astype(np.float32)
    c[1, 98, 3] += 1
    where = RNG.random((2, 100)) < 0.7
    where[1, 98] = True
    m = tensor_metrics(r, c, where)
    a, b = r[where].astype(np.float64), c[where].astype(np.float64)
    assert m["places"] == where.sum()
    assert m["rel_l2"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert m["nmse"] == pytest.approx(m["rel_l2"] ** 2, rel=1e-12)
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert m["cosine_distance"] == pytest.approx(1 - cosine, rel=1e-9)
    assert m["max_abs"] == np.abs(a - b).max()
    assert m["max_at"] == [1, 98, 3]
    assert m["max_scaled"] == m["max_abs"] / np.abs(a).max()


def test_distances_by_hand():
    """|r| = 5, the difference is (0, 0, 3, 4) at one place and (0, 2, 0, 0) at another."""
    r, c = np.zeros((2, 2, 4), np.float32), np.zeros((2, 2, 4), np.float32)
    r[0, 1] = c[0, 1] = [3, 0, 0, 0]
    r[1, 0] = c[1, 0] = [0, 4, 0, 0]
    c[0, 0, 2:] = [3, -4]
    c[1, 1, 1] = 2
    m = tensor_metrics(r, c, everywhere(r))
    assert m["nmse"] == pytest.approx(29 / 25, rel=1e-15) and m["rel_l2"] == math.sqrt(29 / 25)
    assert (m["max_abs"], m["max_at"], m["ref_max"], m["max_scaled"]) == (4, [0, 0, 3], 4, 1)
    assert m["cosine_distance"] == pytest.approx(1 - 25 / (5 * math.sqrt(25 + 29)), rel=1e-14)


@pytest.mark.parametrize(
    ("c", "distance"),
    [((2, 0), 0), ((1, 0), 0), ((0, 3), 1), ((-1, 0), 2), ((1, 1), 1 - 1 / math.sqrt(2)), ((0, 0), 1)],
)
def test_the_cosine_distance_is_that_of_directions(c, distance):
    r, c = np.array([[[1.0, 0.0]]]), np.array([[c]], float)
    assert tensor_metrics(r, c, everywhere(r))["cosine_distance"] == pytest.approx(distance, rel=1e-14)


def test_a_cosine_distance_far_below_1_keeps_its_digits():
    """Turned by an angle of 1e-9: 1 minus the cosine, 5e-19, would round to nothing."""
    r, c = np.array([[[1.0, 0.0]]]), np.array([[[1.0, 1e-9]]])
    assert tensor_metrics(r, c, everywhere(r))["cosine_distance"] == pytest.approx(5e-19, rel=1e-6)


def test_masked_places_do_not_count():
    r, c = np.ones((1, 3, 4), np.float32), np.ones((1, 3, 4), np.float32)
    c[0, 0] = np.nan
    m = tensor_metrics(r, c, np.array([[False, True, True]]))
    assert (m["rel_l2"], m["nonfinite"], m["places"]) == (0, 0, 2)


def test_sums_are_taken_in_float64():
    """A million squares of 1e-4 beside large ones: in fp32 they would vanish."""
    r = np.full((1, 1000, 1000), 3000, np.float32)
    c = r.copy()
    c[..., 0] += 0.25
    m = tensor_metrics(r, c, everywhere(r))
    assert m["nmse"] == pytest.approx(0.25**2 / (1000 * 3000.0**2), rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_value_is_counted_and_located(bad):
    r = np.zeros((2, 70, 3), np.float32)
    c = r.copy()
    c[1, 2, 1] = c[1, 69, 2] = bad
    m = logit_metrics(r, c, everywhere(r))
    assert (m["nonfinite"], m["nonfinite_at"]) == (2, [1, 2, 1])
    assert m["rel_l2"] is m["max_abs"] is m["kl"] is m["top1"] is None
    json.dumps(m, allow_nan=False)


def test_a_nonfinite_value_counts_where_nothing_is_compared_but_not_in_the_padding():
    c = np.zeros((1, 4, 2), np.float32)
    c[0, 0, 1] = c[0, 2, 1] = np.nan
    where, valid = np.array([[False, True, False, False]]), np.array([[False, True, True, True]])
    m = tensor_metrics(np.zeros_like(c), c, where, valid)
    assert (m["nonfinite"], m["nonfinite_at"], m["rel_l2"]) == (1, [0, 2, 1], None)
    assert tensor_metrics(np.zeros_like(c), c, where)["nonfinite"] == 0


def test_a_reference_that_is_not_finite_is_refused():
    c = np.zeros((1, 1, 2), np.float32)
    with pytest.raises(ValueError, match="the reference itself"):
        tensor_metrics(c + np.nan, c, everywhere(c))


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\), the reference \(1, 2, 4\)"):
        tensor_metrics(np.zeros((1, 2, 4)), np.zeros((1, 2, 3)), np.ones((1, 2), bool))


def test_something_where_the_reference_has_nothing_is_the_whole():
    zero = np.zeros((1, 1, 2))
    assert tensor_metrics(zero, zero, everywhere(zero))["rel_l2"] == 0
    m = tensor_metrics(zero, zero + 1, everywhere(zero))
    assert (m["rel_l2"], m["cosine_distance"], m["max_scaled"]) == (1, 1, 1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_kl_by_hand():
    """Half and half against one quarter and three quarters."""
    r, c = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
    m = logit_metrics(r, c, everywhere(r))
    assert m["kl"] == m["kl_max"] == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-14)
    assert (
        m["reverse_kl"] == m["reverse_kl_max"] == pytest.approx(math.log(3) * 0.75 - math.log(2), rel=1e-14)
    )


def test_kl_both_ways():
    r = 3 * RNG.standard_normal((1, 130, 20))
    c = r + 0.1 * RNG.standard_normal(r.shape)
    m = logit_metrics(r, c, everywhere(r))
    p, q = softmax(r), softmax(c)
    kl, reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    assert m["kl"] == pytest.approx(kl.mean(), rel=1e-9)
    assert m["kl_max"] == pytest.approx(kl.max(), rel=1e-9)
    assert m["reverse_kl"] == pytest.approx(reverse.mean(), rel=1e-9)
    assert m["reverse_kl_max"] == pytest.approx(reverse.max(), rel=1e-9)


def test_equal_logits_are_at_no_distance():
    r = RNG.standard_normal((1, 5, 20)).astype(np.float32)
    m = logit_metrics(r, r, everywhere(r))
    assert (m["kl"], m["rel_l2"], m["top1"], m["topk_overlap"], m["top1_changes"]) == (0, 0, 1, 1, [])
    assert m["cosine_distance"] == 0


def test_a_shift_of_all_logits_changes_no_distribution():
    r = RNG.standard_normal((1, 5, 20))
    m = logit_metrics(r, r + 1000, everywhere(r))
    assert m["kl_max"] < 1e-12 and m["top1"] == 1 and m["rel_l2"] > 100


def test_changed_best_tokens_are_listed_with_the_margin_they_overcame():
    r = np.zeros((1, 4, 10))
    r[0, :, :3] = [[5, 4, 0], [5, 4.9, 0], [5, 1, 0], [5, 1, 0]]
    c = r.copy()
    c[0, 0, 1] = c[0, 1, 1] = 6
    m = logit_metrics(r, c, everywhere(r))
    assert m["top1"] == 0.5 and m["top1_changed"] == 2
    assert [e["at"] for e in m["top1_changes"]] == [[0, 0], [0, 1]]
    assert [e["margin"] for e in m["top1_changes"]] == pytest.approx([1, 0.1])


def test_without_places_every_metric_is_there_and_has_no_value():
    r = np.zeros((1, 4, 10))
    some, none = (logit_metrics(r, r, np.full((1, 4), there)) for there in (True, False))
    assert none.keys() == some.keys() and (none.pop("places"), none.pop("nonfinite")) == (0, 0)
    assert set(none.values()) == {None}


def test_top_k_overlap_counts_common_tokens():
    r = np.arange(20.0)[None, None]
    c = r.copy()
    c[..., 0] = 100  # in, and the fifth best out
    m = logit_metrics(r, c, everywhere(r))
    assert (m["topk"], m["topk_overlap"]) == (5, pytest.approx(4 / 5))
    assert m["topk_changed_share"] == pytest.approx(1 / 5)


# ---- perplexity -----------------------------------------------------------------------------------------------------


def foretold(*chances):
    """Logits `[1, S, 2]` that give token 0 these chances, under any shift."""
    return np.log([[[p, 1 - p] for p in chances]]) + 7


def test_perplexity_by_hand():
    """The tokens 0 0 1: the first is foretold by nothing, the last place foretells nothing."""
    r, c = foretold(0.5, 0.5, 0.9), foretold(0.5, 0.875, 0.1)
    m = perplexity_metrics(r, c, np.array([[0, 0, 1]]), np.ones((1, 3), bool))
    assert m["places"] == 2
    assert m["reference"] == pytest.approx(2, rel=1e-14)
    assert m["candidate"] == pytest.approx(4, rel=1e-14)  # 1 / sqrt(1/2 x 1/8)
    assert m["log_ratio"] == pytest.approx(math.log(2), rel=1e-14)


def test_perplexity_counts_each_row_and_all_together():
    """Padding foretells no first token; a row of one token has nothing to count."""
    r = np.concatenate([foretold(0.1, 0.25, 0.1), foretold(0.5, 0.5, 0.1), foretold(0.3, 0.3, 0.3)])
    where = np.array([[False, True, True], [True, True, True], [False, False, True]])
    m = perplexity_metrics(r, r, np.zeros((3, 3), int), where)
    assert m["places"] == 3 and m["log_ratio"] == 0
    assert m["reference"] == m["candidate"] == pytest.approx(16 ** (1 / 3), rel=1e-14)
    assert [row["places"] for row in m["by_row"]] == [1, 2, 0]
    assert [row["reference"] for row in m["by_row"]] == [pytest.approx(4), pytest.approx(2), None]


def test_a_perplexity_beyond_any_float_can_be_written_as_json():
    r, c = foretold(0.5, 0.5), np.array([[[0.0, 2000.0], [0, 0]]])
    m = perplexity_metrics(r, c, np.array([[0, 0]]), np.ones((1, 2), bool))
    assert m["candidate"] is None and m["log_ratio"] == pytest.approx(2000 - math.log(2))
    json.dumps(m, allow_nan=False)


# ---- routing --------------------------------------------------------------------------------------------------------


def test_routing_compares_sets():
    r = np.array([[[1, 4], [0, 2], [3, 5]]])
    c = np.array([[[4, 1], [2, 7], [3, 5]]])
    gap = np.array([[0.5, 0.25, 0.125]])
    m = routing_metrics(r, c, gap, np.ones((1, 3), bool))
    assert m["agreement"] == pytest.approx(2 / 3)
    assert m["overlap"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert m["flips"] == [{"at": [0, 1], "gap": 0.25}]
    assert (m["flipped"], m["ties"], m["wrong"], m["min_gap"], m["max_flip_gap"]) == (1, 0, 1, 0.125, 0.25)


def test_a_flip_in_a_tie_is_counted_apart():
    r, c = np.array([[[1], [1], [1]]]), np.array([[[2], [2], [1]]])
    gap = np.array([[ROUTING_TIE / 2, 0.3, ROUTING_TIE / 2]])
    m = routing_metrics(r, c, gap, np.ones((1, 3), bool))
    assert (m["flipped"], m["ties"], m["wrong"]) == (2, 1, 1)


def test_routing_at_masked_places_does_not_count():
    r, c = np.array([[[-1], [1]]]), np.array([[[0], [1]]])
    m = routing_metrics(r, c, np.ones((1, 2)), np.array([[False, True]]))
    assert (m["flipped"], m["places"]) == (0, 1)


def test_an_infinite_gap_can_be_written_as_json():
    r = np.array([[[0, 1]]])
    m = routing_metrics(r, r, np.full((1, 1), np.inf), np.ones((1, 1), bool))
    assert m["min_gap"] == NOT_A_TIE
    json.dumps(m, allow_nan=False)


def test_what_follows_a_tie_is_not_comparable():
    """Row 0 flips in a tie at layer 1, token 2: from there on, later tokens of that row in that layer and after it."""
    r = np.zeros((3, 2, 4, 1), int)
    c, gap, mask = r.copy(), np.ones((3, 2, 4)), np.ones((2, 4), bool)
    c[1, 0, 2] = 5
    gap[1, 0, 2] = ROUTING_TIE / 2
    mask[1, 0] = False
    got = comparable_places(r, c, gap, mask)
    lost = np.array([[False, False, True, True], [False] * 4])
    assert np.array_equal(got[0], mask) and np.array_equal(got[1], mask)
    assert np.array_equal(got[2], mask & ~lost) and np.array_equal(got[3], mask & ~lost)


def test_a_wrong_choice_excludes_nothing():
    r = np.zeros((1, 1, 3, 1), int)
    got = comparable_places(r, r + 1, np.full((1, 1, 3), 0.1), np.ones((1, 3), bool))
    assert got.all()


# ---- greedy ---------------------------------------------------------------------------------------------------------


def greedy_run():
    return SimpleNamespace(
        tokens=np.array([[1, 2, 3], [4, 5, 6]]),
        seconds=np.array([[9, 9, 9], [9, 8, 9]]),
        margins=np.array([[0.5, 0.4, 0.3], [0.2, 0.1, 0.6]]),
    )


def test_greedy_prefix_and_divergence():
    m = greedy_metrics(greedy_run(), np.array([[1, 2, 3], [4, 8, 6]]))
    assert m["prefix"] == [3, 1] and m["min_margin"] == 0.1
    assert m["divergences"] == [{"row": 1, "step": 1, "margin": 0.1, "reference": 5, "candidate": 8}]


def test_a_token_that_is_not_the_second_best_is_never_a_tie():
    m = greedy_metrics(greedy_run(), np.array([[1, 2, 3], [4, 7, 6]]))
    assert m["divergences"][0]["margin"] == NOT_A_TIE


def test_a_candidate_that_stops_early_has_diverged():
    m = greedy_metrics(greedy_run(), np.array([[1, 2], [4, 5]]))
    assert m["prefix"] == [2, 2]
    assert [d["candidate"] for d in m["divergences"]] == [None, None]
    assert all(d["margin"] == NOT_A_TIE for d in m["divergences"])


def test_more_tokens_than_asked_for_do_not_count():
    assert greedy_metrics(greedy_run(), np.array([[1, 2, 3, 0], [4, 5, 6, 0]]))["divergences"] == []


def test_greedy_rows_must_be_those_of_the_prompt():
    with pytest.raises(ValueError, match=r"greedy tokens of shape \(1, 3\), expected \(2, 3\)"):
        greedy_metrics(greedy_run(), np.array([[1, 2, 3]]))
