"""Choosing a token: candidates and probabilities are transformers', and those of a plain formulation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_vl.modeling.sampling import Sampling

SAMPLINGS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 5000},
    "top_p": {"top_p": 0.6},
    "a tiny top_p": {"top_p": 1e-6},
    "a top_p just below 1": {"top_p": 0.9999},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "a repetition reward": {"repetition_penalty": 0.6},
    "top_p after top_k": {"top_k": 20, "top_p": 0.5},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
}


def transformers_probabilities(logits, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """Of every token [V], by transformers' processors, in the order of its `generate`."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    steps = [hf.RepetitionPenaltyLogitsProcessor(repetition_penalty), hf.TemperatureLogitsWarper(temperature)]
    steps += [hf.TopKLogitsWarper(top_k)] if top_k else []
    steps += [hf.TopPLogitsWarper(top_p)]
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.from_numpy(seen)[None], scores)
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_candidates_and_probabilities_are_those_of_transformers(options, scale):
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(1000) * scale).astype(np.float32)
    seen = rng.integers(0, 1000, 60)
    want = transformers_probabilities(logits, seen, **options)
    ids, probabilities = Sampling(do_sample=True, **{"top_k": 0, **options}).candidates(logits, seen)
    assert np.array_equal(ids, np.flatnonzero(want))
    np.testing.assert_allclose(probabilities, want[ids], rtol=2e-6)


def test_equal_logits_at_the_border_of_top_k_all_stay_as_in_transformers():
    logits = np.array([1, 3, 2, 2, 0, 2], np.float32)
    ids, probabilities = Sampling(do_sample=True, top_k=2).candidates(logits, np.array([0]))
    want = transformers_probabilities(logits, np.array([0]), top_k=2)
    assert ids.tolist() == [1, 2, 3, 5] == np.flatnonzero(want).tolist()
    np.testing.assert_allclose(probabilities, want[ids], rtol=1e-6)


def test_without_sampling_the_best_is_taken_after_the_penalty_alone():
    logits = np.array([2.0, 1.9, -3, 1.0], np.float32)
    odd = {"temperature": 5.0, "top_k": 1, "top_p": 0.1}
    assert Sampling(**odd).choose(logits, np.array([0]), None) == 0
    assert Sampling(repetition_penalty=1.2, **odd).choose(logits, np.array([0, 0]), None) == 1
    assert logits.tolist() == np.array([2.0, 1.9, -3, 1.0], np.float32).tolist()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng, sampling = np.random.default_rng(0), Sampling(do_sample=True, top_k=0, top_p=0.9)
    drawn = np.bincount([sampling.choose(logits, np.array([0]), rng) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(drawn / 4000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.025)


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (0.5, 2)])
def test_a_token_without_probability_is_not_taken_at_its_border(drawn, token):
    logits = np.array([-np.inf, 0.0, 0.0], np.float32)
    rng = SimpleNamespace(random=lambda: drawn)
    assert Sampling(do_sample=True).choose(logits, np.array([0]), rng) == token


# Fast is as plain ----------------------------------------------------------------------------------------------------


def plain_candidates(sampling: Sampling, logits, seen):
    """What `Sampling.candidates` gives, in whole passes over the vocabulary and one stable sort of it."""
    scores, ids = logits.copy(), np.unique(seen)
    penalty, of_seen = np.float32(sampling.repetition_penalty), logits[ids]
    scores[ids] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    scores, ids = scores / np.float32(sampling.temperature), np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        ids = np.flatnonzero(scores >= np.sort(scores)[-sampling.top_k])
    weights = np.exp(scores[ids].astype(np.float64) - scores.max())
    if sampling.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        keep = np.sort(order[before < sampling.top_p * weights.sum()])
        ids, weights = ids[keep], weights[keep]
    return ids, weights / weights.sum()


def assert_plain(sampling: Sampling, logits, seen, seed=0):
    given_logits = logits.copy()
    ids, probabilities = sampling.candidates(logits, seen)
    plain_ids, plain = plain_candidates(sampling, logits, seen)
    assert np.array_equal(ids, plain_ids)
    np.testing.assert_allclose(probabilities, plain, rtol=1e-15)
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    for _ in range(3):  # and as many numbers are drawn for each token
        token = plain_ids[0] if len(plain_ids) == 1 else other.choice(plain_ids, p=plain)
        assert sampling.choose(logits, seen, one) == token
    assert np.array_equal(logits, given_logits)


samplings = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.sampled_from([1.0, 0.7, 0.1, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    top_p=st.sampled_from([1e-300, 1e-6, 0.1, 0.5, 0.9, 0.9999, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
# From few values, so that many are equal, and from any.
values = st.one_of(
    st.sampled_from([-np.inf, -40.0, -1.5, 0.0, 1.0, 1.25, 30.0]), st.floats(-90, 90, width=32)
)


@given(
    samplings, st.lists(values, min_size=1, max_size=80), st.floats(-90, 90, width=32), st.integers(0, 2**32)
)
@settings(max_examples=300, deadline=None)
def test_any_logits_give_what_the_plain_formulation_gives(sampling, some, one, seed):
    rng = np.random.default_rng(seed)
    logits = rng.permutation(np.array([*some, one], np.float32))  # one is finite
    assert_plain(sampling, logits, rng.integers(0, len(logits), 9), seed)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("steps", [None, 2])
def test_large_vocabularies_give_what_the_plain_formulation_gives(scale, top_p, steps):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(20000, np.float32) * np.float32(scale)
    if steps:  # so that many are equal at every border
        logits = np.round(logits * steps) / np.float32(steps)
    logits[rng.integers(0, len(logits), 50)] = -np.inf
    seen = rng.integers(0, len(logits), 4000)
    for top_k in (0, 50, 5000):
        assert_plain(Sampling(True, 0.8, top_k, top_p, repetition_penalty=1.1), logits, seen)


# Logits that are no numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"do_sample": True, "top_k": 2, "top_p": 0.5, "temperature": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("others", [[0.0, 1.0, 2.0], [-np.inf, np.inf, 1.0]], ids=str)
def test_a_nan_is_an_error_that_names_its_token(options, others):
    logits = np.array([*others, np.nan, 5.0], np.float32)
    for penalty in (1.0, 1.2):
        sampling = Sampling(**options, repetition_penalty=penalty)
        with pytest.raises(
            ValueError, match="logits: nan at token 3, expected finite numbers; are the weights"
        ):
            sampling.choose(logits, np.array([0, 3]), np.random.default_rng(0))


def test_no_probability_is_drawn_from_infinite_logits():
    for logits in ([0.0, np.inf, 1.0], [-np.inf, -np.inf]):
        logits = np.array(logits, np.float32)
        for options in ({}, {"top_k": 1}, {"top_p": 0.5}):
            with pytest.raises(ValueError, match=r"logits: -?inf at token [01], expected finite numbers"):
                Sampling(True, **options).choose(logits, np.array([0]), np.random.default_rng(0))
    assert Sampling().choose(np.array([0.0, np.inf, 1.0], np.float32), np.array([0]), None) == 1
