"""The C++ operators that go over rows or single numbers, against NumPy."""

from __future__ import annotations

import math

import native
import numpy as np
import pytest
from native import F32, I32, Numbers, array, call, check, expected, run

WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100)
ROWS = (1, 3, 20)
SHAPES = [(t, n) for t in ROWS for n in WIDTHS] + [
    (3, 20_000),
    (700, 65),
]  # the last two: shared out over threads
EPS = array(1e-5)


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_norms(isa, dtype):
    r = Numbers()
    for t, n in SHAPES:
        x, y = r.normal(t, n, scale=3), r.normal(t, n)
        weight, bias = r.normal(n, dtype=dtype), r.normal(n, dtype=dtype)
        check("rms_norm", x, weight, EPS)
        check("add_rms_norm", x, y, weight, EPS)
        if n > 1:  # of one number, the difference from the mean is 0
            check("layer_norm", x + 10, weight, bias, EPS)
            check("add_layer_norm", x, y, weight, bias, EPS)


def test_eps_counts(isa):
    """Against numbers that are small themselves; the published model has two of them."""
    x, weight, bias = Numbers().normal(4, 48, scale=1e-3), np.ones(48, F32), np.zeros(48, F32)
    for eps in (1e-5, 1e-6):
        check("rms_norm", x, weight, array(eps))
        check("layer_norm", x, weight, bias, array(eps))
    check("rms_norm", np.zeros_like(x), weight, array(1e-6))


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_embedding_copies_rows_of_the_table(isa, dtype):
    r = Numbers()
    for n in WIDTHS:
        table, ids = r.normal(11, n, dtype=dtype), r.rng.integers(0, 11, 40).astype(I32)
        table[3, -1], table[4, 0] = np.nan, -np.inf
        check("embedding", table, ids, tolerance=0)


@pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1, -(2**31)])
def test_an_index_outside_a_table_is_refused(isa, bad):
    r = Numbers()
    ids = array(0, 10, bad, dtype=I32)
    assert call("embedding", (r.normal(11, 5), ids), [((3, 5), F32)])[0] == native.BAD_INDEX
    inputs = r.normal(11, 5), np.tile(ids, (2, 1)), r.normal(2, 3)
    assert call("interpolate", inputs, [((2, 5), F32)])[0] == native.BAD_INDEX


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
def test_interpolation_sums_weighted_entries(isa, dtype):
    r = Numbers()
    for n in WIDTHS:
        for t, taps in ((1, 1), (3, 16), (300, 5)):
            picks = r.rng.integers(0, 30, (t, taps)).astype(I32)
            check("interpolate", r.normal(30, n, dtype=dtype), picks, r.normal(t, taps))


def test_split_takes_columns_apart(isa):
    r = Numbers()
    for shape, first in (
        ((3, 5), 2),
        ((4, 33), 32),
        ((1, 2), 1),
        ((2, 3, 20), 7),
        ((17,), 9),
        ((500, 300), 100),
    ):
        check("split", r.normal(*shape), tolerance=0, first=first)


def test_rotation_turns_pairs_of_halves(isa):
    r = Numbers()
    for half in WIDTHS:
        for t, heads in ((1, 1), (3, 5), (50, 2)):
            angles = r.normal(t, half, scale=100)
            check("rotate", r.normal(t, heads, 2 * half), np.cos(angles), np.sin(angles))


# Both ends of exp's range in fp32, what lies between, and what lies beyond
EDGES = array(
    -3e38, -1e5, -104, -103.5, -90, -88.8, -88.7, -88, -87.4, -50, -20, -3, -1e-3, -1e-30, -1e-40, -0.0
)


ACTIVATIONS = ("swiglu", "linear_gelu_tanh", "linear_gelu_erf")


def numbers(name, x):
    """Inputs with which an operator gives its activation of the numbers x [t, n]; of up, where there is one, times 0.75.

    A linear has them as its weights, of one input that is 1.
    """
    if name == "swiglu":
        return (np.concatenate([x, np.full_like(x, 0.75)], 1),)
    return np.ones((1, 1), F32), x.reshape(-1, 1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(isa, name):
    r = Numbers()
    for t, n in SHAPES:
        check(name, *numbers(name, r.normal(t, n, scale=5)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_number_by_itself(isa, name):
    """Each within an fp32 rounding or so of itself where it is not all but cancelled, nowhere off by more than 1e-6."""
    gates = np.concatenate([EDGES, -EDGES, np.linspace(-12, 12, 999, dtype=F32)])[None]
    (y,), (wanted,) = run(name, *numbers(name, gates)), expected(name, *numbers(name, gates))
    relative = 1e-6 if name == "swiglu" else 2e-6
    np.testing.assert_allclose(y[gates < -1], wanted[gates < -1], rtol=relative, atol=1e-6)
    np.testing.assert_allclose(y[gates >= -1], wanted[gates >= -1], rtol=relative, atol=1e-37)


def test_gelu_by_the_error_function_cancels_nowhere(isa):
    """Of each number, against its size, to 3e-7; and against the result where it is small, as far as e^(-x^2 / 2) is rounded."""
    sizes = np.concatenate([np.linspace(0, 14, 20_001), np.logspace(-44, 38, 2000)]).astype(F32)
    x = np.concatenate([sizes, -sizes])
    (y,) = run("linear_gelu_erf", *numbers("linear_gelu_erf", x))
    wanted = 0.5 * x.astype(np.float64) * np.array([math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    error, least = np.abs(y[0] - wanted), 2.0**-148  # two of fp32's smallest steps
    assert (error <= 3e-7 * np.abs(x) + least).all()
    assert (error <= (4e-7 + 2.0**-23 * x.astype(np.float64) ** 2) * np.abs(wanted) + 16 * least).all()


@pytest.mark.parametrize("n", [1, 7, 40])
def test_nan_and_infinity_come_out_where_they_should(isa, n):
    """One of them in each row, at the start and at the end."""
    r = Numbers()
    bad = array(np.nan, np.inf, -np.inf, np.nan, np.inf, -np.inf, 1)
    x = r.normal(7, 2 * n)
    x[:3, 0], x[3:, -1] = bad[:3], bad[3:]
    weight, other = r.normal(2 * n), r.normal(7, 2 * n)
    other[6, 0] = np.inf
    for name in ACTIVATIONS:
        check(name, *numbers(name, x))
    check("rms_norm", x, weight, EPS)
    check("add_rms_norm", x, other, weight, EPS)
    check("layer_norm", x, weight, weight, EPS)
    check("add_layer_norm", x, other, weight, weight, EPS)
    check("split", x, tolerance=0, first=n)
    check("rotate", x[:, None], r.normal(7, n), r.normal(7, n))
    weight[0] = np.nan
    check("rms_norm", r.normal(3, 2 * n), weight, EPS)
    taps = r.rng.integers(0, 7, (20, 3)).astype(I32)
    check("interpolate", x, taps, r.normal(20, 3))


def test_denormals_are_kept(isa):
    """They have few bits, hence the tolerance."""
    tiny = np.full((3, 37), 1e-40, F32)
    check("split", tiny, tolerance=0, first=5)
    check("embedding", tiny, array(2, 0, dtype=I32), tolerance=0)
    check("interpolate", tiny, array(1, 2, dtype=I32)[None], array(0.5, 0.25)[None], tolerance=1e-4)
    check("swiglu", np.concatenate([np.full((1, 37), 4, F32), tiny[:1]], 1), tolerance=1e-4)
    check("linear_gelu_erf", *numbers("linear_gelu_erf", tiny), tolerance=1e-4)
    check("add_rms_norm", tiny, tiny, np.ones(37, F32), EPS, tolerance=1e-4)
