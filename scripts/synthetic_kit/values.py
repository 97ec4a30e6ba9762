"""Random numbers that a network can compute with, at the speed of a disk.

Every number is drawn from 65536 equally likely values of a normal distribution, so a number costs 16 random bits and
one look into a table. A span of a tensor depends on the seed, the tensor's name and the span's place alone: not on the
number of threads, nor on which other tensors there are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import ml_dtypes
import numpy as np

from kimi_vl.modeling.positions import inverse_frequencies

from .layout import Tensor

SPAN = (
    1 << 18
)  # numbers that are drawn at once: with the indices that NumPy makes of them, they fit a 4 MB cache
VALUES = 1 << 16

# What a tensor's name ends in, and its mean and standard deviation. All other tensors are weights of linear layers,
# with 1/sqrt(fan-in), which keeps the variance of what passes through.
SCALES = (
    (re.compile(r"norm\d?\.weight$"), 1.0, 0.05),
    # Makes the load of experts as uneven as that of trained routers: of 64, the busiest gets about 4 times the mean.
    (re.compile(r"e_score_correction_bias$"), 0.0, 0.1),
    (re.compile(r"bias$"), 0.0, 0.02),
    (re.compile(r"(embed_tokens|pos_emb)\.weight$"), 0.0, 1.0),
)


def spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The spans of a tensor: first number and how many."""
    size = math.prod(tensor.shape)
    return ((start, min(SPAN, size - start)) for start in range(0, size, SPAN))


def draw(tensor: Tensor, start: int, count: int, seed: int, rope_theta: float) -> np.ndarray:
    """The numbers of one span: fp32 rotary frequencies, or random bf16 as its bits in uint16."""
    if tensor.name.endswith("inv_freq"):
        return inverse_frequencies(rope_theta, 2 * tensor.shape[0])[start : start + count]
    name = int.from_bytes(hashlib.blake2b(tensor.name.encode(), digest_size=16).digest(), "little")
    words = np.random.SFC64(np.random.SeedSequence([seed, name, start])).random_raw(math.ceil(count / 4))
    # mode: "raise" would copy the result once more, and 16 bits are always a place in the table
    return np.take(_table(*scale(tensor)), words.view(np.uint16)[:count], mode="clip")


def scale(tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    for ending, mean, deviation in SCALES:
        if ending.search(tensor.name):
            return mean, deviation
    return 0.0, 1 / math.sqrt(math.prod(tensor.shape[1:]))


@lru_cache
def _table(mean: float, deviation: float) -> np.ndarray:
    """The bits of 65536 bf16 numbers; NumPy would take items of ml_dtypes one by one."""
    return (mean + deviation * _quantiles()).astype(ml_dtypes.bfloat16).view(np.uint16)


@lru_cache
def _quantiles() -> np.ndarray:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / VALUES) for i in range(VALUES // 2, VALUES)])
    return np.concatenate([-upper[::-1], upper])
