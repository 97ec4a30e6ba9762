"""What the host computes about places: rotary tables, merge order, taps into the vision tower's position table.

Angles are fp32 products of fp32 frequencies, as in the reference, because at large positions a more exact angle
would be a different one.
"""

from __future__ import annotations

import numpy as np

VISION_ROPE_THETA = 10000.0
MAX_SIDE = 512  # patches; the published tower's rotary table ends here
BICUBIC_A = -0.75


def inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    """theta^(-2i / dim) for i < dim / 2, fp32."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def _cos_sin(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def text_rope(positions: np.ndarray, theta: float, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [..., dim / 2] of token positions [...]."""
    return _cos_sin(positions.astype(np.float32)[..., None] * inverse_frequencies(theta, dim))


def merge_order(h: int, w: int, kernel: tuple[int, ...]) -> np.ndarray:
    """Row-major patch numbers [h * w], reordered so that the patches of a merge block follow one another."""
    kh, kw = kernel
    grid = np.arange(h * w).reshape(h // kh, kh, w // kw, kw)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


def vision_rope(h: int, w: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [h * w, head_dim / 2] in row-major order; even pairs turn with the column, odd ones with the row."""
    freq = (1.0 / VISION_ROPE_THETA ** (np.arange(0, head_dim, 4, dtype=np.float64) / head_dim)).astype(
        np.float32
    )
    row, col = (a.reshape(-1, 1).astype(np.float32) for a in np.mgrid[:h, :w])
    angles = np.stack((col * freq, row * freq), -1)  # (h w, head_dim / 4, 2)
    return _cos_sin(angles.reshape(h * w, -1))


def _cubic(size: int, table: int) -> tuple[np.ndarray, np.ndarray]:
    """Taps and weights [size, 4] along one side (half-pixel centres, borders repeated)."""
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(table / size) - np.float32(0.5)
    base = np.floor(at)
    t = at - base
    taps = np.clip(base[:, None].astype(np.int64) + np.arange(-1, 3), 0, table - 1)
    a = np.float32(BICUBIC_A)

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return taps, np.stack((far(t + 1), near(t), near(1 - t), far(2 - t)), -1).astype(np.float32)


def position_taps(h: int, w: int, table: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the flattened table and weights, both [h * w, 16], row-major: bicubic resize of table to (h, w)."""
    rows, row_weights = _cubic(h, table[0])
    cols, col_weights = _cubic(w, table[1])
    index = rows[:, None, :, None] * table[1] + cols[None, :, None, :]
    weight = row_weights[:, None, :, None] * col_weights[None, :, None, :]
    return index.reshape(h * w, 16).astype(np.int32), weight.reshape(h * w, 16)
