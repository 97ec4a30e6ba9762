"""Static sizes: which graph serves a given length."""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST_CONTEXT = 256
SMALLEST_PATCHES = 64


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


def largest_image(in_token_limit: int) -> int:
    """Patches of the largest image a processor with this limit can give, rounded up to a bucket's top.

    Padding comes after the limit test, so a grid may exceed the limit; the published limits 4096 and 16384 give up to
    5304 and 17712 patches.
    """
    known = {4096: 5376, 16384: 18432}
    if in_token_limit in known:
        return known[in_token_limit]
    side = 510  # patches; the processor refuses longer sides
    worst = max(
        (w + w % 2) * (h + h % 2) for w in range(1, side + 1) if (h := min(side, max(1, in_token_limit // w)))
    )
    return -(-worst // SMALLEST_PATCHES) * SMALLEST_PATCHES


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
