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
from .transpose import transpose_into

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
DTYPES = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)}

Block = tuple[np.ndarray, ...]
Dims = Mapping[str, int]
"""Dimensions by the letters that the mapping table uses."""

Load = Callable[[np.ndarray], np.ndarray]

PIECE_BYTES = 2 << 20  # of a stream: small enough for a core's cache, large enough for one write call


class Losses:
    """What a narrower dtype could not hold.

    Attributes:
        overflowed: values too large for it; they become its largest finite one.
        underflowed: values too small for it, which become 0.
        largest: magnitude of the largest value that overflowed.
    """

    def __init__(self) -> None:
        self.overflowed = self.underflowed = 0
        self.largest = 0.0

    def count(self, source: np.ndarray, target: np.ndarray) -> None:
        """Compares values with what they became, and puts the largest finite one in the place of infinities."""
        over = np.isinf(target) & np.isfinite(source)
        lost = source[over].astype(np.float32)
        if lost.size:
            self.overflowed += lost.size
            self.largest = max(self.largest, float(np.abs(lost).max()))
            target[over] = np.copysign(np.float32(ml_dtypes.finfo(target.dtype).max), lost)
        self.underflowed += int(((target == 0) & (source != 0)).sum())


@dataclass(frozen=True)
class Transform:
    """`blocks(sources, dims)` gives for each target the list of its blocks.

    `in_order` says that the blocks are the sources one after the other, but for rows that are near each other; so they
    can pass in pieces.
    """

    name: str
    blocks: Callable[[Sequence[np.ndarray], Dims], list[list[Block]]]
    in_order: bool = False


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


keep = Transform("keep", _keep, in_order=True)
conv_as_linear = Transform(
    "conv_as_linear", _keep, in_order=True
)  # [D, C, p, p] and [D, C*p*p] are the same memory
table_as_rows = Transform("table_as_rows", _keep, in_order=True)  # [h, w, D] and [h*w, D] too
fuse = Transform("fuse", _fuse, in_order=True)
stack_experts = Transform("stack_experts", _stack_experts)
split_kv_b = Transform("split_kv_b", _split_kv_b)
deinterleave_q = Transform("deinterleave_rope of q", _rope_of_q, in_order=True)
deinterleave_kv_a = Transform("deinterleave_rope of kv_a", _rope_of_kv_a, in_order=True)
deinterleave_wqkv = Transform("deinterleave_rope of wqkv", _rope_of_wqkv, in_order=True)
drop = Transform("drop", lambda sources, d: [], in_order=True)


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def stream(
    blocks: Sequence[Block], dtype: np.dtype, losses: Losses | None = None, load: Load = _as_it_is
) -> Iterator[np.ndarray]:
    """The target's content as flat arrays in memory order, each at most about PIECE_BYTES.

    A piece is valid until the next one is taken: buffers are reused, and where nothing changes a piece is what `load`
    gave. `load` gets a view's content, `losses` counts what does not fit in `dtype`.
    """
    buffer = np.empty(0, dtype)
    for block in blocks:
        columns = sum(view.shape[1] for view in block)
        step = max(1, PIECE_BYTES // (columns * dtype.itemsize))
        for start in range(0, len(block[0]), step):
            parts = [load(view[start : start + step]) for view in block]
            if len(parts) == 1 and parts[0].dtype == dtype and parts[0].flags.c_contiguous:
                yield parts[0].reshape(-1)
                continue
            size = len(parts[0]) * columns
            if buffer.size < size:
                buffer = np.empty(size, dtype)
            piece = buffer[:size].reshape(-1, columns)
            at = 0
            for part in parts:
                _convert(part, piece[:, at : at + part.shape[1]], losses)
                at += part.shape[1]
            yield buffer[:size]


def gather(blocks: Sequence[Block], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The whole target: a view of the source where nothing changes, else a new array."""
    if len(blocks) == 1 and len(blocks[0]) == 1:
        view = blocks[0][0]
        if view.dtype == dtype and view.flags.c_contiguous:
            return view.reshape(shape)
    target = np.empty(shape, dtype)
    flat, at = target.reshape(-1), 0
    for piece in stream(blocks, dtype):
        flat[at : at + piece.size] = piece
        at += piece.size
    return target


def scatter(
    blocks: Sequence[Block],
    target: np.ndarray,
    name: str,
    load: Load = _as_it_is,
    place: Load = _as_it_is,
    flush: Callable[[], None] = lambda: None,
) -> None:
    """The way back: writes `target` into the views of `blocks`.

    `load` gets the content of a part of `target`; `place` gives the memory to fill for a view, and after `flush` that
    memory may be used again. `name` is the target's, for errors.

    Raises:
        ConversionError: a value does not fit a view's dtype exactly.
    """
    flat, at = target.reshape(-1), 0
    for block in blocks:
        columns = sum(view.shape[1] for view in block)
        step = max(1, PIECE_BYTES // (columns * target.dtype.itemsize))
        for start in range(0, len(block[0]), step):
            parts = [place(view[start : start + step]) for view in block]
            size = len(parts[0]) * columns
            piece = load(flat[at : at + size]).reshape(-1, columns)
            at, column = at + size, 0
            for part in parts:
                _restore(piece[:, column : column + part.shape[1]], part, name)
                column += part.shape[1]
            flush()


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def _transposed(view: np.ndarray) -> bool:
    return view.strides[0] < view.strides[1]


def _convert(source: np.ndarray, target: np.ndarray, losses: Losses | None) -> None:
    if source.dtype == target.dtype and _transposed(source):
        transpose_into(source.T, target)
    elif source.dtype == target.dtype:
        _bits(target)[...] = _bits(source)  # NaN payloads stay as they are
    elif (source.dtype, target.dtype) == (BFLOAT16, FLOAT32):
        np.left_shift(_bits(source), np.uint32(16), out=_bits(target), dtype=np.uint32)  # here too
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            target[...] = source
        if losses:
            losses.count(source, target)


def _restore(source: np.ndarray, target: np.ndarray, name: str) -> None:
    if source.dtype == target.dtype and _transposed(target):
        transpose_into(source, target.T)
        return
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
