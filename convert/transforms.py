"""Named, invertible changes of layout between published tensors and ours.

A transform is *where the bytes come from*: for each of its targets it lists, in the order of the target's memory,
blocks of views of the source tensors. A block is one view or several side by side, each ``[rows, columns]`` with the
same number of rows.

    forward:   target = the blocks, one after the other
    backward:  each view = its part of the target

So one description serves both directions, and it needs no more memory than a few rows: :func:`stream` yields a
target piece by piece, :func:`scatter` writes one back. Dtypes change on the way: forward they are converted,
backward they must come back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import ConversionError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
DTYPES = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)}

Block = tuple[np.ndarray, ...]
Dims = Mapping[str, int]
"""Dimensions by the letters that the mapping table uses."""

PIECE_BYTES = 8 << 20  # of a stream: small enough for the cache hierarchy, large enough for one write call


@dataclass(frozen=True)
class Transform:
    """`blocks(sources, dims)` gives for each target the list of its blocks."""

    name: str
    blocks: Callable[[Sequence[np.ndarray], Dims], list[list[Block]]]


def _rows(tensor: np.ndarray) -> np.ndarray:
    """As [rows, columns], a vector as one column."""
    return tensor.reshape(tensor.shape[0], -1)


def _keep(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    return [[(_rows(source),)] for source in sources]


def _fuse(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    return [[(_rows(source),) for source in sources]]


def _stack_experts(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    # Published [out, in] per expert; ours multiplies from the left: [in, out], gate and up side by side.
    group = len(sources) // d["E"]
    return [[tuple(s.T for s in sources[i : i + group]) for i in range(0, len(sources), group)]]


def _split_kv_b(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    heads = sources[0].reshape(d["heads"], d["nope"] + d["v"], -1)
    return [[(head[: d["nope"]],) for head in heads], [(head[d["nope"] :],) for head in heads]]


def _deinterleave(tensor: np.ndarray, groups: int, plain: int, rope: int) -> list[list[Block]]:
    """Rows in groups of `plain` rows that stay and `rope` rows that go (rope/2, 2) -> (2, rope/2); the rest stays.

    Published rope turns neighbours (2i, 2i+1); with all even rows before all odd ones the graph turns halves.
    """
    rows, blocks = _rows(tensor), []
    for start in range(0, groups * (plain + rope), plain + rope):
        turned = rows[start + plain : start + plain + rope]
        if plain:
            blocks.append((rows[start : start + plain],))
        blocks += [(turned[0::2],), (turned[1::2],)]
    rest = rows[groups * (plain + rope) :]
    return [blocks + ([(rest,)] if len(rest) else [])]


def _rope_of_q(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    return _deinterleave(sources[0], d["heads"], d["nope"], d["rope"])


def _rope_of_kv_a(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    return _deinterleave(sources[0], 1, d["L"], d["rope"])


def _rope_of_wqkv(sources: Sequence[np.ndarray], d: Dims) -> list[list[Block]]:
    return _deinterleave(sources[0], 2 * d["Dheads"], 0, d["Dhead"])


keep = Transform("keep", _keep)
conv_as_linear = Transform("conv_as_linear", _keep)  # [D, C, p, p] and [D, C*p*p] are the same memory
table_as_rows = Transform("table_as_rows", _keep)  # [h, w, D] and [h*w, D] too
fuse = Transform("fuse", _fuse)
stack_experts = Transform("stack_experts", _stack_experts)
split_kv_b = Transform("split_kv_b", _split_kv_b)
deinterleave_q = Transform("deinterleave_rope of q", _rope_of_q)
deinterleave_kv_a = Transform("deinterleave_rope of kv_a", _rope_of_kv_a)
deinterleave_wqkv = Transform("deinterleave_rope of wqkv", _rope_of_wqkv)
drop = Transform("drop", lambda sources, d: [])


def stream(blocks: Sequence[Block], dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """The target's content as flat arrays in memory order, each at most about PIECE_BYTES.

    A piece is valid until the next one is taken: buffers are reused, and where nothing changes a piece is the
    source's own memory. `name` is the target's, for errors.

    Raises:
        ConversionError: a finite value has no finite value in `dtype`.
    """
    buffer = np.empty(0, dtype)
    for block in blocks:
        columns = sum(view.shape[1] for view in block)
        step = max(1, PIECE_BYTES // (columns * dtype.itemsize))
        for start in range(0, len(block[0]), step):
            parts = [view[start : start + step] for view in block]
            if len(parts) == 1 and parts[0].dtype == dtype and parts[0].flags.c_contiguous:
                yield parts[0].reshape(-1)
                continue
            size = len(parts[0]) * columns
            if buffer.size < size:
                buffer = np.empty(size, dtype)
            piece = buffer[:size].reshape(-1, columns)
            at = 0
            for part in parts:
                _convert(part, piece[:, at : at + part.shape[1]], name)
                at += part.shape[1]
            yield buffer[:size]


def gather(blocks: Sequence[Block], shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """The whole target: a view of the source where nothing changes, else a new array. Raises as :func:`stream`."""
    if len(blocks) == 1 and len(blocks[0]) == 1:
        view = blocks[0][0]
        if view.dtype == dtype and view.flags.c_contiguous:
            return view.reshape(shape)
    target = np.empty(shape, dtype)
    flat, at = target.reshape(-1), 0
    for piece in stream(blocks, dtype, name):
        flat[at : at + piece.size] = piece
        at += piece.size
    return target


def scatter(blocks: Sequence[Block], target: np.ndarray, name: str) -> None:
    """The way back: writes `target` into the (writable) views of `blocks`. `name` is the target's, for errors.

    Raises:
        ConversionError: a value does not fit a view's dtype exactly.
    """
    flat, at = target.reshape(-1), 0
    for block in blocks:
        columns = sum(view.shape[1] for view in block)
        step = max(1, PIECE_BYTES // (columns * target.dtype.itemsize))
        for start in range(0, len(block[0]), step):
            parts = [view[start : start + step] for view in block]
            size = len(parts[0]) * columns
            piece = flat[at : at + size].reshape(-1, columns)
            at, column = at + size, 0
            for part in parts:
                _restore(piece[:, column : column + part.shape[1]], part, name)
                column += part.shape[1]


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def _convert(source: np.ndarray, target: np.ndarray, name: str) -> None:
    if source.dtype == target.dtype:
        _bits(target)[...] = _bits(source)  # NaN payloads stay as they are
    elif (source.dtype, target.dtype) == (BFLOAT16, FLOAT32):
        np.left_shift(_bits(source), np.uint32(16), out=_bits(target), dtype=np.uint32)  # here too
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = source
        lost = int((np.isfinite(source) & ~np.isfinite(target)).sum())
        if lost:
            raise ConversionError(
                f"{name}: {lost} values are too large for {target.dtype.name}; convert to bfloat16 or float32"
            )


def _restore(source: np.ndarray, target: np.ndarray, name: str) -> None:
    if source.dtype == target.dtype:
        _bits(target)[...] = _bits(source)
        return
    if (source.dtype, target.dtype) == (FLOAT32, BFLOAT16):
        np.right_shift(_bits(source), np.uint32(16), out=_bits(target), casting="unsafe")
        exact = not (_bits(source) & np.uint32(0xFFFF)).any()
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = source
            exact = np.array_equal(target.astype(source.dtype), source, equal_nan=True)
    if not exact:
        raise ConversionError(
            f"{name}: holds {source.dtype.name} values that are not exact in the published "
            f"{target.dtype.name}; was it changed after the conversion?"
        )
