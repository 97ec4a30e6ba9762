"""Doing what a plan says: published to ours, and back.

Memory does not depend on the model: sources are memory maps, a tensor passes in pieces, targets are written at their
final offsets of files whose size is known. All checks of names, shapes and room come before the first byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import blake3
import numpy as np

from .. import __version__
from .converted import ConvertedWeights, Progress
from .errors import ConversionError, EnvironmentProblem
from .manifest import (
    MANIFEST,
    DroppedRecord,
    FileRecord,
    Manifest,
    PublishedFile,
    ShardRecord,
    TensorRecord,
    content_hash,
)
from .planning import DEFAULT_SHARD_BYTES, Plan, plan_conversion, plan_reversal
from .published import INDEX, PublishedWeights
from .source import open_source, resolve
from .storage import JOURNAL, PART, PartFile, sync_directory, write_file
from .transforms import DTYPES, scatter, stream
from .weights import Source, Weights

ROOM = 1.05  # of the target's size has to be free


def plan(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    reverse: bool = False,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
) -> Plan:
    """What :func:`convert` (or, with `reverse`, :func:`revert`) would do; reads headers, downloads nothing.

    Raises:
        ConversionError, ConfigError: as the function itself.
        EnvironmentProblem: `src` is a Hub repository that is not in the local cache.
    """
    source = resolve(src, revision, download=False)
    if reverse:
        return plan_reversal(open_for_reversal(source), dst)
    return plan_conversion(open_for_conversion(source), dst, dtype, max_shard_size)


def convert(
    src: str | Path | Plan,
    dst: str | Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Writes a published checkpoint as a converted directory `dst`, which must be new or empty.

    Args:
        src: a published directory, ``nano``, or a Hub repo id; or a plan, which says all the rest.
        dtype: "bf16", "fp16" or "fp32"; None keeps each tensor's own. The router is fp32 always.
        max_shard_size: bytes of tensors in a shard; one tensor is never split.
        progress: called with the number of tensor bytes written since its last call.

    Returns:
        The plan that was carried out.

    Raises:
        ConversionError: the checkpoint or `dst` cannot be used; nothing was written.
        ConfigError: its ``config.json`` is missing, or not Kimi-VL's.
        EnvironmentProblem, OSError: no room, no network, a failing disk.
    """
    if isinstance(src, Plan):
        dst, dtype, max_shard_size = src.target, src.asked_dtype, src.max_shard_size or DEFAULT_SHARD_BYTES
    weights = open_for_conversion(src.source if isinstance(src, Plan) else resolve(src, revision))
    todo = plan_conversion(weights, dst, dtype, max_shard_size)
    carry_out(_agreed(src, todo), weights, progress)
    return todo


def revert(
    src: str | Path | Plan, dst: str | Path | None = None, *, progress: Progress | None = None
) -> Plan:
    """Writes the published checkpoint that the converted directory `src` was made of to `dst`, bit for bit.

    Files, split, headers and order are the source's. Where the conversion rounded (`Plan.narrowed`), the rounded
    values are widened to the published dtype. `src` may be a plan, which says all the rest.

    Raises:
        ConversionError: `src` is no converted directory or is damaged, or `dst` is not new or empty.
        EnvironmentProblem, OSError: no room, a failing disk.
    """
    if isinstance(src, Plan):
        dst = src.target
    weights = open_for_reversal(src.source if isinstance(src, Plan) else resolve(src))
    todo = plan_reversal(weights, dst)
    carry_out(_agreed(src, todo), weights, progress)
    return todo


def _agreed(asked: str | Path | Plan, now: Plan) -> Plan:
    """The plan as it is now, once it is sure that it still is the one that was asked for."""
    if isinstance(asked, Plan) and asked != now:
        raise ConversionError(
            f"{now.source.directory}: is not what the plan was made from; was it changed, or is it for the other way?"
        )
    return now


def carry_out(todo: Plan, weights: Weights, progress: Progress | None = None) -> None:
    """Does what a plan says, from the weights that it was made for; raises as :func:`convert`."""
    if todo.target is None:
        raise ConversionError("dst: is not given; expected a new or an empty directory to write to")
    target = Path(todo.target)
    _check_target(todo, weights.directory, target)
    if isinstance(weights, ConvertedWeights):
        weights.verify_files()
    with _writing(todo, target):
        if isinstance(weights, ConvertedWeights):
            _revert(todo, weights, target, progress)
        elif isinstance(weights, PublishedWeights):
            _convert(todo, weights, target, progress)


def _convert(todo: Plan, weights: PublishedWeights, target: Path, progress: Progress | None) -> None:
    shards, tensors = _write_shards(todo, weights, target, progress)
    index = _index(todo)
    write_file(target / INDEX, index)
    manifest = Manifest(
        version=__version__,
        source=weights.source.name,
        revision=weights.source.revision,
        dtype=todo.dtype,
        arguments={"dtype": todo.asked_dtype, "max_shard_size": todo.max_shard_size},
        files={name: _copy(weights.directory / name, target / name) for name in todo.copied},
        index=FileRecord(len(index), content_hash(index)),
        shards=shards,
        tensors=tensors,
        dropped={
            name: DroppedRecord(reason, weights.array(name).tobytes().hex())
            for name, reason in todo.dropped.items()
        },
        published_files={
            name: PublishedFile(file.nbytes, file.head[8:].decode("utf-8"))
            for name, file in weights.files.items()
        },
        published_index=weights.index,
    )
    write_file(target / MANIFEST, manifest.to_json().encode())


def _revert(todo: Plan, weights: ConvertedWeights, target: Path, progress: Progress | None) -> None:
    _write_published(todo, weights, target, progress)
    if weights.manifest.published_index is not None:
        write_file(target / INDEX, weights.manifest.published_index.encode("utf-8"))
    for name in todo.copied:
        _copy(weights.directory / name, target / name)


def open_for_conversion(source: Source) -> PublishedWeights:
    """Raises ConversionError: it is no published checkpoint."""
    weights = open_source(source)
    if not isinstance(weights, PublishedWeights):
        raise ConversionError(
            f"{source.directory}: is converted already; give the published checkpoint, or --reverse for the way back"
        )
    return weights


def open_for_reversal(source: Source) -> ConvertedWeights:
    """Raises ConversionError: it is no converted directory."""
    weights = open_source(source)
    if not isinstance(weights, ConvertedWeights):
        raise ConversionError(f"{source.directory}: has no {MANIFEST}; --reverse needs a converted directory")
    return weights


def _check_target(todo: Plan, source: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target}: is a file, expected a directory to write to")
    if target.is_dir() and target.samefile(source):
        raise ConversionError(f"{target}: is the source itself; choose another directory to write to")
    if (target / MANIFEST).exists():
        raise ConversionError(
            f"{target}: holds a converted checkpoint; remove it or choose another directory"
        )
    _remove_leftovers(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target}: is not empty; choose a new or an empty directory to write to")
    there = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < todo.nbytes * ROOM:
        raise EnvironmentProblem(
            f"{target}: needs {todo.nbytes * ROOM / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there"
        )


def _remove_leftovers(target: Path) -> None:
    """Of a run that was killed: its journal names the files that it meant to write, and nothing else is touched."""
    journal = target / JOURNAL
    journal.with_name(JOURNAL + PART).unlink(missing_ok=True)
    if not journal.is_file():
        return
    try:
        names = json.loads(journal.read_text(encoding="utf-8"))["files"]
        mine = [target / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError):
        raise ConversionError(f"{journal}: is damaged; empty the directory or choose another one") from None
    for path in mine:
        path.unlink(missing_ok=True)
        path.with_name(path.name + PART).unlink(missing_ok=True)
    journal.unlink()


@contextmanager
def _writing(todo: Plan, target: Path) -> Iterator[None]:
    """Marks `target` as unfinished, and empties it again if the work fails."""
    made = not target.exists()
    names = [*(file.name for file in todo.files), *todo.copied, INDEX, MANIFEST]
    target.mkdir(parents=True, exist_ok=True)
    try:
        write_file(target / JOURNAL, json.dumps({"files": names}, indent=1).encode())
        yield
        sync_directory(target)
    except BaseException:
        _remove_leftovers(target)
        if made:
            target.rmdir()
        raise
    (target / JOURNAL).unlink()
    sync_directory(target)


def _write_shards(
    todo: Plan, weights: PublishedWeights, target: Path, progress: Progress | None
) -> tuple[dict[str, ShardRecord], dict[str, TensorRecord]]:
    shards, tensors = {}, {}
    for file in todo.files:
        with PartFile(target / file.name, file.nbytes) as part:
            part.write(0, file.head)
            for tensor in todo.tensors:
                if tensor.file != file.name:
                    continue
                offset, digest = tensor.offset, blake3.blake3()
                for piece in stream(weights.blocks(tensor.name), DTYPES[tensor.dtype], tensor.name):
                    data = piece.view(np.uint8).data
                    digest.update(data)
                    part.write(offset, data)
                    offset += len(data)
                    if progress:
                        progress(len(data))
                tensors[tensor.name] = TensorRecord(
                    tensor.file,
                    tensor.offset,
                    tensor.nbytes,
                    tensor.shape,
                    tensor.dtype,
                    digest.hexdigest(),
                    tensor.transform,
                    tensor.sources,
                )
            part.finish()
        shards[file.name] = ShardRecord(file.nbytes, content_hash(file.head))
    return shards, tensors


def _write_published(todo: Plan, weights: ConvertedWeights, target: Path, progress: Progress | None) -> None:
    places = {tensor.name: tensor for tensor in todo.tensors}
    with ExitStack() as stack:
        parts = {f.name: stack.enter_context(PartFile(target / f.name, f.nbytes)) for f in todo.files}
        for file in todo.files:
            parts[file.name].write(0, file.head)
        for name, record in weights.manifest.dropped.items():
            parts[places[name].file].write(places[name].offset, bytes.fromhex(record.data))
            if progress:
                progress(places[name].nbytes)
        for entry in weights.published_entries:
            if not entry.ours:
                continue
            planned = [places[side.name] for side in entry.published]
            views = [
                parts[p.file].array(weights.published[p.file][p.name].dtype, p.shape, p.offset)
                for p in planned
            ]
            for side, blocks in zip(entry.ours, entry.blocks(views)):
                scatter(blocks, weights.verified(side.name), side.name)
            if progress:
                progress(sum(p.nbytes for p in planned))
        for part in parts.values():
            part.finish()


def _copy(source: Path, target: Path) -> FileRecord:
    content = source.read_bytes()
    write_file(target, content)
    return FileRecord(len(content), content_hash(content))


def _index(todo: Plan) -> bytes:
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in todo.tensors)},
        "weight_map": {tensor.name: tensor.file for tensor in todo.tensors},
    }
    return (json.dumps(index, indent=2) + "\n").encode()
