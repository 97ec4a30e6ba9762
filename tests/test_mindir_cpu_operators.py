"""Rules of the interpreter for the CPU operators, against the library itself, which rounds nothing here."""

from __future__ import annotations

import native
import numpy as np
import pytest
from native import BF16, F32, I32, Numbers, array

from kimi_vl.verify.mindir.errors import Refused
from kimi_vl.verify.mindir.rules import RULES
from kimi_vl.verify.mindir.values import Spec, Value, from_numpy, to_numpy
from kimi_vl.verify.mindir.witnesses import LIBRARY, WITNESSES

pytestmark = pytest.mark.usefixtures("one_torch_thread", "exact")
R = Numbers(1)
EPS = array(1e-5)


def latent(tokens, start, slots, dtype):
    """Queries, cache, start, k_b and v_b of 3 heads."""
    queries = R.normal(tokens, 3, 16, scale=2), R.normal(tokens, 3, 8, scale=2)
    heads = R.weight(3, 16, 32, dtype=dtype, inputs=32), R.weight(3, 12, 32, dtype=dtype, inputs=32)
    return *queries, R.normal(slots, 40), array(start, dtype=I32), *heads


def picture(valid):
    return R.normal(70, 3 * 3 * 24, scale=2), R.normal(70, 12), R.normal(70, 12), array(valid, dtype=I32)


def weights(*shape, dtype):
    return R.weight(*shape, dtype=dtype, inputs=shape[-1])


def calls(name, dtype):
    """Inputs of an operator with weights of a dtype, and the shapes of what it gives."""
    yes, no = array(1, 2.446), array(0, 0.5)
    linear = [
        ((R.normal(5, 48), weights(32, 48, dtype=dtype)), [(5, 32)]),
        ((R.normal(70, 48), weights(32, 48, dtype=dtype), R.normal(32, dtype=dtype)), [(70, 32)]),
    ]
    return {
        **dict.fromkeys(("linear", "linear_gelu_tanh", "linear_gelu_erf"), linear),
        "embedding": [((R.normal(20, 24, dtype=dtype), R.experts(1, 20, 7)[0]), [(7, 24)])],
        "rms_norm": [((R.normal(6, 48, scale=3), R.normal(48, dtype=dtype), EPS), [(6, 48)])],
        "add_rms_norm": [
            ((R.normal(6, 48), R.normal(6, 48), R.normal(48, dtype=dtype), EPS), [(6, 48), (6, 48)])
        ],
        "layer_norm": [
            ((R.normal(6, 48) + 3, R.normal(48, dtype=dtype), R.normal(48, dtype=dtype), EPS), [(6, 48)])
        ],
        "add_layer_norm": [
            (
                (
                    *(R.normal(6, 48) + 3, R.normal(6, 48)),
                    *(R.normal(48, dtype=dtype), R.normal(48, dtype=dtype), EPS),
                ),
                [(6, 48), (6, 48)],
            )
        ],
        "split": [
            ((R.normal(4, 3, 24),), [(4, 3, 16), (4, 3, 8)]),
            ((R.normal(4, 40),), [(4, 32), (4, 8)]),
        ],
        "rotate": [((R.normal(5, 3, 16), R.normal(5, 8), R.normal(5, 8)), [(5, 3, 16)])],
        "swiglu": [((R.normal(5, 64, scale=4),), [(5, 32)])],
        "interpolate": [((R.normal(30, 24, dtype=dtype), R.experts(9, 30, 16), R.normal(9, 16)), [(9, 24)])],
        "router": [
            ((R.normal(40, 48), weights(8, 48, dtype=F32), R.normal(8), options), [(40, 3), (40, 3)])
            for options in (yes, no)
        ],
        "experts": [
            (
                (
                    *(R.normal(t, 48), weights(8, 48, 64, dtype=dtype), weights(8, 32, 48, dtype=dtype)),
                    *(R.experts(t, 8, 3), R.normal(t, 3)),
                ),
                [(t, 48)],
            )
            for t in (1, 30)
        ],
        "latent_attention": [
            (latent(t, start, slots, dtype), [(t, 36)])
            for t, start, slots in ((1, 0, 64), (1, 63, 64), (3, 20, 64), (40, 0, 64), (40, 24, 64))
        ],
        "vision_attention": [(picture(valid), [(70, 72)]) for valid in (1, 50, 70)],
        "vision_attention_rounded": [(picture(50), [(70, 72)])],
    }[name]


def by_rule(name, inputs, shapes):
    dtypes = (I32, F32) if name == "router" else (F32,) * len(shapes)
    torch_dtypes = [from_numpy(np.empty(0, d)).dtype for d in dtypes]
    specs = tuple(Spec(s, d) for s, d in zip(shapes, torch_dtypes))
    values = tuple(Value(data, data.dtype) for data in map(from_numpy, inputs))
    data, dtypes = RULES[f"kimi_{name}"](values, {}, specs if len(specs) > 1 else specs[0])
    parts = data if isinstance(data, tuple) else (data,)
    each = dtypes if isinstance(dtypes, tuple) else (dtypes,) * len(parts)
    return [to_numpy(part.to(dtype)) for part, dtype in zip(parts, each, strict=True)]


NAMES = sorted(name.removeprefix("kimi_") for name, witness in WITNESSES.items() if witness == LIBRARY)


@pytest.mark.parametrize("dtype", native.WEIGHTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_gives_what_the_library_gives(name, dtype):
    for inputs, shapes in calls(name, dtype):
        wanted = by_rule(name, inputs, shapes)
        assert [w.shape for w in wanted] == shapes
        for found, want in zip(native.computed(name, inputs, wanted), wanted, strict=True):
            native.close(found, want, native.FP32)


def test_every_operator_of_the_library_has_a_rule_that_was_held_against_it():
    assert {f"kimi_{name}" for name in NAMES} == {name for name in RULES if name.startswith("kimi_")}


@pytest.mark.parametrize("stale", [0.0, 3e38, np.inf, np.nan], ids=str)
def test_what_stands_in_slots_after_the_last_token_changes_no_bit(stale):
    for tokens, start in ((1, 0), (1, 50), (30, 20)):
        inputs = latent(tokens, start, 90, BF16)
        before = by_rule("latent_attention", inputs, [(tokens, 36)])
        inputs[2][start + tokens :] = stale
        assert native.same_bits(before, by_rule("latent_attention", inputs, [(tokens, 36)]))


def changed(name, number, value):
    """The first call of an operator, with another input."""
    inputs, shapes = calls(name, F32)[0]
    return name, (*inputs[:number], value, *inputs[number + 1 :]), shapes


REFUSED = {
    "an id past the table": (changed("embedding", 1, array(3, 20, dtype=I32)), "ids that are not int32 from 0 to 19"),
    "a negative tap": (changed("interpolate", 1, np.full((9, 16), -1, I32)), "taps that are not int32 from 0 to 29"),
    "an expert that does not exist": (changed("experts", 3, array(0, 1, 8, dtype=I32)[None]), "from 0 to 7"),
    "a token past the cache": (changed("latent_attention", 3, array(64, dtype=I32)), "starts at 64 with 1 tokens in a cache of 64"),
    "a picture without patches": (changed("vision_attention", 3, array(0, dtype=I32)), "has 0 valid patches of 70"),
    "a picture's tables of another width": (changed("vision_attention", 1, R.normal(70, 11)), r"tables \[70, 11\]"),
    "parts of another width": (changed("split", 0, R.normal(4, 3, 25)), r"splits \[4, 3, 25\] into parts of \[16, 8\]"),
    "a weight of another width": (changed("linear", 1, R.normal(32, 47)), "multiplies"),
    "a weight in fp16": (changed("linear", 1, R.normal(32, 48, dtype=np.float16)), "takes float16, expected bfloat16 or float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_library_refuses_the_rule_refuses(case):
    (name, inputs, shapes), message = REFUSED[case]
    with pytest.raises(Refused, match=message):
        by_rule(name, inputs, shapes)
