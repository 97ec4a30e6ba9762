"""Static sizes: which graph serves a given length."""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALLEST_CONTEXT = 256
SMALLEST_PATCHES = 64
LONGEST_SIDE = 510  # patches; the processor refuses longer sides
PATCH, CELL = 14, 28  # pixels of a side of a patch, and of what a picture is padded to multiples of
LONGEST_SHAPE = 8  # to 1: longer pictures are not what a limit is chosen for
PREFILL_CHUNKS = (256,)
# With the C++ operators: a chunk reads most experts once, whatever its size, and what it lacks in tokens is computed too.
OPERATORS_PREFILL_CHUNKS = (64, 256, 1024)
CHUNK_OVERHEAD = 70  # tokens that could be computed in the time that a chunk takes whatever its size


class TooLongError(ValueError):
    """More tokens or patches than the largest graph takes."""


def contexts(largest: int) -> list[int]:
    """Cache lengths up to `largest`, in steps of 2."""
    sizes = []
    size = SMALLEST_CONTEXT
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def prefill_chunks(operators: bool, context: int) -> tuple[int, ...]:
    """Tokens of the prefill graphs of a network or bundle of which nobody asked for others, ascending.

    Args:
        operators: its graphs call the C++ operators.
        context: the largest cache, which no chunk exceeds.
    """
    sizes = OPERATORS_PREFILL_CHUNKS if operators else PREFILL_CHUNKS
    return tuple(sorted({min(n, context) for n in sizes}))


def quickest_chunk(tokens: int, sizes: Sequence[int]) -> int:
    """The first of the prefill chunks in which so many tokens take the least time.

    Args:
        sizes: of the chunks that there are, ascending. One that is not filled takes as long as a full one.
    """
    *smaller, size = sizes
    if smaller and tokens < size and _cost(tokens, smaller) < size + CHUNK_OVERHEAD:
        return quickest_chunk(tokens, smaller)
    return size


def _cost(tokens: int, sizes: Sequence[int]) -> int:
    """What is computed for a prompt in the best of its ways, in tokens: the largest chunks first."""
    *smaller, size = sizes
    full, rest = divmod(tokens, size)
    one = size + CHUNK_OVERHEAD
    return full * one + (min(one, _cost(rest, smaller)) if rest and smaller else one * (rest > 0))


def largest_image(in_token_limit: int) -> int:
    """Patches of the largest image a processor with this limit can give, rounded up to a bucket's top.

    Padding comes after the limit test, so a grid may exceed the limit; the published limits 4096 and 16384 give up to
    5304 and 17712 patches.
    """
    known = {4096: 5376, 16384: 18432}
    if in_token_limit in known:
        return known[in_token_limit]
    worst = max(
        (w + w % 2) * (h + h % 2)
        for w in range(1, LONGEST_SIDE + 1)
        if (h := min(LONGEST_SIDE, max(1, in_token_limit // w)))
    )
    return -(-worst // SMALLEST_PATCHES) * SMALLEST_PATCHES


def fitting_limit(patches: int) -> int:
    """The largest `in_token_limit` with which a processor gives at most so many patches (1 at least).

    For pictures up to `LONGEST_SHAPE` times as long as wide: to hold for any strip, it would have to be a third lower.
    """
    low, high = 1, max(patches, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if _padded(middle) <= patches:
            low = middle
        else:
            high = middle - 1
    return low


def _padded(limit: int) -> int:
    """A bound, within 3 % of what occurs, of the patches that a processor with this limit gives.

    The limit counts whole patches before a picture is scaled; what is left of a patch at the border is scaled too, and
    then each side is padded. A width of W = 14 a + 13 pixels and a height of 14 b + 13 are scaled by s = sqrt(limit / a b).
    If the width shall come out as k cells, W s must be at least m = 28 (k - 1) + 1, so a >= 2 k - 2, and the height comes
    out as at most (14 limit / m) (14 + 13 / a) + 13 m / (14 a + 13) pixels.
    """
    most = 0
    for k in range(1, LONGEST_SIDE // 2 + 1):
        a, m = max(1, 2 * k - 2), CELL * (k - 1) + 1
        height = PATCH * limit / m * (PATCH + 13 / a) + 13 * m / (PATCH * a + 13)
        cells = min(LONGEST_SHAPE * k, math.ceil(height / CELL), LONGEST_SIDE // 2)
        if cells >= k:  # the other shapes are these, turned
            most = max(most, 4 * k * cells)
    return most


def patch_buckets(largest: int) -> list[int]:
    """Patch counts up to `largest`: steps of 2 up to 1024, then of at most 1.5 (padding costs attention there)."""
    sizes = []
    size = SMALLEST_PATCHES
    while size < largest:
        sizes.append(size)
        size = size * 2 if size < 1024 else size * 3 // 2
    return [*sizes, largest]


def pick(buckets: Sequence[int], size: int, what: str) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        TooLongError: none does; `what` says of what there is too much.
    """
    for b in buckets:
        if size <= b:
            return b
    raise TooLongError(
        f"{what}: {size}, but the largest graph takes {max(buckets)} ({size - max(buckets)} too many)"
    )
