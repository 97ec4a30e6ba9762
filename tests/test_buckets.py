"""Static sizes: the steps between graphs, and the pictures that they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from kimi_vl import KimiVLImageProcessor
from kimi_vl.modeling.buckets import (
    CHUNK_OVERHEAD,
    LONGEST_SHAPE,
    contexts,
    fitting_limit,
    largest_image,
    patch_buckets,
    quickest_chunk,
)


def test_patch_buckets_cover_what_the_processor_can_give():
    assert largest_image(4096) == 5376
    assert largest_image(16384) == 18432
    for top in (5376, 18432, 128):
        sizes = patch_buckets(top)
        assert sizes[-1] == top
        assert all(b <= (2 if a < 1024 else 1.5) * a for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("largest", [2, 256, 300, 4096, 5000, 32768, 131072])
def test_contexts_grow_in_steps_of_at_most_2(largest):
    sizes = contexts(largest)
    assert sizes[-1] == largest and all(a < b <= 2 * a for a, b in zip(sizes, sizes[1:]))


@dataclass
class Outline:
    """A picture without pixels."""

    width: int
    height: int

    @property
    def size(self):
        return self.width, self.height

    def resize(self, size, _):
        return Outline(*size)

    def crop(self, box):
        return Outline(*box[2:])


@pytest.mark.parametrize("patches", [16, 64, 128, 944, 1792, 3584])
def test_a_processor_with_the_fitting_limit_gives_what_the_largest_graph_takes(patches):
    limit = fitting_limit(patches)
    processor = KimiVLImageProcessor(in_token_limit=limit)
    rng = np.random.default_rng(patches)
    width = np.exp(rng.uniform(0, np.log(2000), 3000)).astype(int) + 1
    height = (width * rng.uniform(1, LONGEST_SHAPE, 3000)).astype(int)
    most = 0
    for w, h in zip(width.tolist(), height.tolist()):
        padded = processor._pad(processor._within_limit(Outline(w, h), "picture"), "picture")
        most = max(most, padded.width // 14 * (padded.height // 14))
    assert 0.75 * patches - 4 <= most <= patches


def test_a_prompt_takes_the_chunks_that_are_quickest():
    """Against all ways to cover it."""
    sizes = (64, 256, 1024)
    least = [0]
    for tokens in range(1, 2500):
        least.append(min(n + CHUNK_OVERHEAD + least[max(0, tokens - n)] for n in sizes))
        took, left = 0, tokens
        while left > 0:
            chunk = quickest_chunk(left, sizes)
            took, left = took + chunk + CHUNK_OVERHEAD, left - chunk
        assert took == least[tokens], tokens
    assert [quickest_chunk(n, sizes) for n in (1, 129, 300, 768, 769, 5000)] == [
        64,
        256,
        256,
        256,
        1024,
        1024,
    ]
    assert quickest_chunk(7, (256,)) == 256
