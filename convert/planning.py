"""What a conversion would do, as a value: every file, every tensor's place in it, and what is dropped.

Made from headers alone. The same value serves both directions: `files` are what is written, each planned tensor says
where it goes and which tensors of the source it is made of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import mapping
from .converted import ConvertedWeights
from .errors import ConversionError
from .formats import DEFAULT_FORMAT, FORMATS
from .mapped_file import TensorInfo
from .mapping import Entry, Side, Spec
from .published import PublishedWeights
from .transforms import DTYPES, PIECE_BYTES
from .weights import Source

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PROGRAM_BYTES = 40_000_000  # Python, NumPy, and the lists of a checkpoint's tensors
RECOMPUTED = "recomputed from rope_theta, never read by the network"


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written. `framing` is what stands in it besides the tensors, (offset, bytes)."""

    name: str
    nbytes: int
    framing: tuple[tuple[int, bytes], ...] = field(repr=False)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written at `offset` of `file`, made of `sources` by `transform`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int
    transform: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """See the module. `dropped` maps names to reasons, `copied` are the files taken over as they are.

    `dtype` is what most of the target is stored as. `narrowed` counts the published tensors whose values do not all
    exist in our dtype. `largest_turned` is the size of the largest tensor that has to be held as a whole.
    """

    reverse: bool
    source: Source
    target: str | None
    dtype: str
    asked_dtype: str | None
    format: str
    max_shard_size: int | None
    files: tuple[PlannedFile, ...]
    tensors: tuple[PlannedTensor, ...]
    source_tensors: int
    dropped: Mapping[str, str]
    copied: tuple[str, ...]
    narrowed: int
    largest_turned: int

    def memory(self, workers: int) -> int:
        """Bytes that the work takes: buffers of two tensors that stand side by side and two pieces for each worker."""
        return PROGRAM_BYTES + workers * 2 * (self.largest_turned + PIECE_BYTES)

    @property
    def nbytes(self) -> int:
        """Of all weights files together."""
        return sum(file.nbytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; headers are left out, they follow from the rest."""
        fixed = replace(self, source=replace(self.source, repository=None))
        plan = asdict(fixed)
        del plan["source"]["repository"]
        plan["source"]["directory"] = str(self.source.directory)
        for file in plan["files"]:
            del file["framing"]
        return {**plan, "nbytes": self.nbytes}

    def __str__(self) -> str:
        sides = ("ours", "published") if self.reverse else ("published", "ours")
        lines = [
            f"tensors    {self.source_tensors} {sides[0]} -> {len(self.tensors)} {sides[1]}, mostly {self.dtype}"
        ]
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            kind = "put back" if self.reverse else "dropped"
            lines.append(f"{kind:<10} {len(names)}: {names[0]}{', …' if len(names) > 1 else ''} ({reason})")
        if self.narrowed:
            how = "were rounded by the conversion" if self.reverse else f"are rounded to {self.dtype}"
            lines.append(f"narrowed   {self.narrowed} published tensors: values that do not fit {how}")
        counts = {file.name: 0 for file in self.files}
        for tensor in self.tensors:
            counts[tensor.file] += 1
        lines += [f"write      {f.name}  {size_text(f.nbytes)}, {counts[f.name]} tensors" for f in self.files]
        lines.append(f"copy       {', '.join(self.copied)}")
        lines.append(f"in all     {size_text(self.nbytes)}")
        return "\n".join(lines)


def size_text(nbytes: float) -> str:
    size, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.2f} {unit}"


def plan_conversion(
    weights: PublishedWeights,
    target: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    format: str = DEFAULT_FORMAT,
) -> Plan:
    """The plan for published to ours. None keeps the source's `dtype`, is the format's own shard size.

    Raises:
        ConversionError: an argument that cannot be.
    """
    if format not in FORMATS:
        raise ConversionError(f"--format: is {format!r}, expected one of {', '.join(FORMATS)}")
    written = FORMATS[format]
    max_shard_size = written.shard_bytes if max_shard_size is None else max_shard_size
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConversionError(f"--dtype: is {dtype!r}, expected one of {', '.join(DTYPE_NAMES)}")
    if max_shard_size < 1:
        raise ConversionError(f"--max-shard-size: is {max_shard_size}, expected at least one byte")
    asked = DTYPE_NAMES[dtype] if dtype else None
    specs: dict[str, Spec] = {}
    entries: dict[str, Entry] = {}
    narrowed = 0
    for entry in weights.entries:
        stored = mapping.target_dtype(entry, weights.specs, asked).name
        narrowed += sum(
            _rounds(weights.specs[side.name].dtype, stored) for side in entry.published if entry.ours
        )
        for side in entry.ours:
            specs[side.name], entries[side.name] = Spec(side.shape, stored), entry
    shards = _shards(specs, max_shard_size)
    files, tensors = [], []
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.{written.suffix}"
        layout = written.lay_out(shard)
        files.append(PlannedFile(file, layout.nbytes, layout.framing))
        tensors += [
            _planned(name, file, info, entries[name], entries[name].published)
            for name, info in layout.places.items()
        ]
    return Plan(
        reverse=False,
        source=weights.source,
        target=None if target is None else str(target),
        dtype=asked or weights.dtype,
        asked_dtype=dtype,
        format=format,
        max_shard_size=max_shard_size,
        files=tuple(files),
        tensors=tuple(tensors),
        source_tensors=len(weights.specs),
        dropped={side.name: RECOMPUTED for e in weights.entries if not e.ours for side in e.published},
        copied=tuple(weights.other_files()),
        narrowed=narrowed,
        largest_turned=_largest_turned(weights.entries, weights.specs),
    )


def plan_reversal(weights: ConvertedWeights, target: str | Path | None = None) -> Plan:
    """The plan for ours to published, file by file as the source was. Raises ConversionError."""
    manifest = weights.manifest
    entries = {side.name: entry for entry in weights.published_entries for side in entry.published}
    tensors = [
        _planned(name, file, info, entries[name], entries[name].ours)
        for file, infos in weights.published.items()
        for name, info in infos.items()
    ]
    return Plan(
        reverse=True,
        source=weights.source,
        target=None if target is None else str(target),
        dtype=_most([(tensor.dtype, tensor.nbytes) for tensor in tensors]),
        asked_dtype=None,
        format="safetensors",
        max_shard_size=None,
        files=tuple(
            PlannedFile(name, record.nbytes, ((0, weights.published_head(name)),))
            for name, record in manifest.published_files.items()
        ),
        tensors=tuple(tensors),
        source_tensors=len(manifest.tensors),
        dropped={name: record.reason for name, record in manifest.dropped.items()},
        copied=tuple(manifest.files),
        narrowed=sum(_rounds(x.dtype, weights.spec(x.sources[0])[1]) for x in tensors if x.sources),
        largest_turned=_largest_turned(
            weights.published_entries, {t.name: Spec(t.shape, t.dtype) for t in tensors}
        ),
    )


def _planned(
    name: str, file: str, info: TensorInfo, entry: Entry, sources: tuple[Side, ...]
) -> PlannedTensor:
    return PlannedTensor(
        name,
        info.shape,
        info.dtype.name,
        file,
        info.offset,
        info.nbytes,
        entry.transform.name,
        tuple(side.name for side in sources),
    )


def _shards(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """In order, each as full as `limit` bytes of tensors allow; a tensor above the limit has a shard of its own."""
    shards: list[dict[str, Spec]] = []
    used = 0
    for name, spec in specs.items():
        nbytes = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        if not shards or used + nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += nbytes
    return shards


def _largest_turned(entries: Iterable[Entry], published: Mapping[str, Spec]) -> int:
    turned = (published[side.name] for e in entries if not e.transform.in_order for side in e.published)
    return max((math.prod(spec.shape) * DTYPES[spec.dtype].itemsize for spec in turned), default=0)


def _rounds(own: str, stored: str) -> bool:
    return stored not in ("float32", own)


def _most(sizes: Iterable[tuple[str, int]]) -> str:
    total: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        total[dtype] += nbytes
    return total.most_common(1)[0][0]
