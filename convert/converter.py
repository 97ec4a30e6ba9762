"""Doing what a plan says: published to ours, and back.

Memory does not depend on the model: a tensor passes in pieces through a few buffers and lands at its final place in
files whose size is known. All checks of names, shapes and room come before the first byte. What a run has done is in
its journal, so that a run that is cut short, by whatever, is continued by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from .converted import ConvertedWeights
from .engine import Engine
from .errors import ConversionError, EnvironmentProblem
from .formats import DEFAULT_FORMAT, FORMATS
from .journal import DOWNLOADS, JOURNAL, Done, Journal
from .layout import framing_hash
from .manifest import (
    MANIFEST,
    DroppedRecord,
    FileRecord,
    LossRecord,
    Manifest,
    PublishedFile,
    ShardRecord,
    TensorRecord,
    content_hash,
    file_hash,
)
from .planning import Plan, plan_conversion, plan_reversal, size_text
from .published import INDEX, PublishedWeights
from .source import open_source, resolve
from .source_files import HubFiles, SourceFiles
from .storage import Progress, part_path, sync_directory, write_file
from .weights import Source, Weights
from .work import Unit, conversion_units, reversal_units

ROOM = 1.05  # of the target's size has to be free
WORKERS = 2  # one turns and hashes while the other waits for the disk; more help where both are fast


def plan(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    reverse: bool = False,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    format: str = DEFAULT_FORMAT,
    revision: str | None = None,
) -> Plan:
    """What :func:`convert` (or, with `reverse`, :func:`revert`) would do; reads headers, also over the Hub.

    Raises:
        ConversionError, ConfigError: as the function itself.
        EnvironmentProblem: the Hub cannot be reached, and its local cache does not hold `src`.
    """
    source = resolve(src, revision, only_headers=True)
    if reverse:
        return plan_reversal(open_for_reversal(source), dst)
    return plan_conversion(open_for_conversion(source), dst, dtype, max_shard_size, format)


def convert(
    src: str | Path | Plan,
    dst: str | Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    format: str = DEFAULT_FORMAT,
    revision: str | None = None,
    allow_overflow: bool = False,
    discard_source: bool = False,
    workers: int = WORKERS,
    resume: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Writes a published checkpoint as a converted directory `dst`; shards of the Hub while others are downloaded.

    `dst` must be new, empty, or what an earlier call with the same arguments left unfinished, which is continued.

    Args:
        src: a published directory, ``nano``, or a Hub repo id; or a plan, which says all the rest.
        dtype: "bf16", "fp16" or "fp32"; None keeps each tensor's own. The router is fp32 always.
        max_shard_size: bytes of tensors in a shard; one tensor is never split. None is 5 GB, of "ckpt" 1 GB.
        format: "safetensors" (which a bundle of ``export-mindir`` points into), or "ckpt", MindSpore's own.
        allow_overflow: make values that are too large for `dtype` its largest one, instead of refusing them.
        discard_source: keep a shard of the Hub only until it is converted. What the Hub's cache held before stays.
        workers: threads.
        resume: False starts over where an earlier call left something unfinished.
        progress: called with the number of tensor bytes written since its last call, from any thread.

    Returns:
        The plan that was carried out.

    Raises:
        ConversionError: the checkpoint or `dst` cannot be used; nothing is left of what was written.
        ConfigError: its ``config.json`` is missing, or not Kimi-VL's.
        EnvironmentProblem, OSError: no room, no network, a failing disk; the next call continues.
    """
    if isinstance(src, Plan):
        dst, dtype, max_shard_size, format = src.target, src.asked_dtype, src.max_shard_size, src.format
    weights = open_for_conversion(src.source if isinstance(src, Plan) else resolve(src, revision))
    todo = plan_conversion(weights, dst, dtype, max_shard_size, format)
    carry_out(
        _agreed(src, todo),
        weights,
        allow_overflow=allow_overflow,
        discard_source=discard_source,
        workers=workers,
        resume=resume,
        progress=progress,
    )
    return todo


def revert(
    src: str | Path | Plan,
    dst: str | Path | None = None,
    *,
    workers: int = WORKERS,
    resume: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Writes the published checkpoint that the converted directory `src` was made of to `dst`, bit for bit.

    Files, split, headers and order are the source's. Where the conversion rounded (`Plan.narrowed`), the rounded
    values are widened to the published dtype. `src` may be a plan, which says all the rest; `dst`, `workers`, `resume`
    and `progress` are as for :func:`convert`.

    Raises:
        ConversionError: `src` is no converted directory or is damaged, or `dst` cannot be used; nothing is left there.
        EnvironmentProblem, OSError: no room, a failing disk; the next call continues.
    """
    if isinstance(src, Plan):
        dst = src.target
    weights = open_for_reversal(src.source if isinstance(src, Plan) else resolve(src))
    todo = plan_reversal(weights, dst)
    carry_out(_agreed(src, todo), weights, workers=workers, resume=resume, progress=progress)
    return todo


def _agreed(asked: str | Path | Plan, now: Plan) -> Plan:
    """The plan as it is now, once it is sure that it still is the one that was asked for."""
    if isinstance(asked, Plan) and asked != now:
        raise ConversionError(
            f"{now.source.directory}: is not what the plan was made from; was it changed, or is it for the other way?"
        )
    return now


def carry_out(
    todo: Plan,
    weights: Weights,
    *,
    allow_overflow: bool = False,
    discard_source: bool = False,
    workers: int = WORKERS,
    resume: bool = True,
    progress: Progress | None = None,
    came: Progress | None = None,
) -> dict[str, LossRecord]:
    """Does what a plan says, from the weights that it was made for; raises as :func:`convert`.

    `came` is called with the number of bytes that were downloaded since its last call. Gives the tensors that lost
    values to a narrower dtype.
    """
    if todo.target is None:
        raise ConversionError("dst: is not given; expected a directory to write to")
    if workers < 1:
        raise ConversionError(f"workers: is {workers}, expected at least 1")
    target = Path(todo.target)
    _check_target(todo, weights.directory, target, workers, resume)
    if isinstance(weights, PublishedWeights) and not discard_source:
        weights.check_room(target, todo.nbytes * ROOM)
    units: Iterator[Unit]
    if isinstance(weights, ConvertedWeights):
        weights.verify_files()
        units = reversal_units(todo, weights)
    else:
        assert isinstance(weights, PublishedWeights)
        units = conversion_units(todo, weights, allow_overflow)
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    names = [*(file.name for file in todo.files), *todo.copied, FORMATS[todo.format].index, MANIFEST]
    journal = None
    losses: dict[str, LossRecord] = {}
    try:
        journal = Journal(target, _identity(todo, weights, allow_overflow), names, resume)
        sources = SourceFiles()
        if isinstance(weights, PublishedWeights) and weights.source.repository:
            directory = target / DOWNLOADS if discard_source else None
            sources = HubFiles(weights, directory, journal.done, came or _ignore)
        engine = Engine(units, target, todo.files, journal, sources, progress or _ignore)
        done = engine.run(workers)
        if isinstance(weights, ConvertedWeights):
            _finish_reversal(todo, weights, target, done)
        elif isinstance(weights, PublishedWeights):
            losses = _finish_conversion(todo, weights, target, done, allow_overflow)
        sync_directory(target)
        journal.finish()
        sync_directory(target)
    except ConversionError:  # the input's fault: there is nothing to go on with
        if journal:
            journal.clear()
        if made:
            target.rmdir()
        raise
    finally:
        if journal:
            journal.close()
    return losses


def _ignore(nbytes: int) -> None:
    pass


def _finish_conversion(
    todo: Plan, weights: PublishedWeights, target: Path, done: dict[str, Done], allow_overflow: bool
) -> dict[str, LossRecord]:
    """The files beside the shards, of the hashes of what was read and written; the manifest last."""
    index = _index(todo)
    write_file(target / FORMATS[todo.format].index, index)
    written = {name: hash_ for unit in done.values() for name, hash_ in unit.written.items()}
    read = {name: hash_ for unit in done.values() for name, hash_ in unit.read.items()}
    kept = {name: data for unit in done.values() for name, data in unit.kept.items()}
    over = {name: n for unit in done.values() for name, n in unit.overflowed.items()}
    under = {name: n for unit in done.values() for name, n in unit.underflowed.items()}
    manifest = Manifest(
        version=__version__,
        source=weights.source.name,
        revision=weights.source.revision,
        dtype=todo.dtype,
        stored=todo.format,
        arguments={
            "dtype": todo.asked_dtype,
            "max_shard_size": todo.max_shard_size,
            "allow_overflow": allow_overflow,
        },
        files={name: _copy(weights.directory / name, target / name) for name in todo.copied},
        index=FileRecord(len(index), content_hash(index)),
        shards={file.name: ShardRecord(file.nbytes, framing_hash(file.framing)) for file in todo.files},
        tensors={
            t.name: TensorRecord(
                t.file, t.offset, t.nbytes, t.shape, t.dtype, written[t.name], t.transform, t.sources
            )
            for t in todo.tensors
        },
        losses={
            t.name: LossRecord(over.get(t.name, 0), under.get(t.name, 0))
            for t in todo.tensors
            if t.name in over or t.name in under
        },
        dropped={name: DroppedRecord(reason, kept[name]) for name, reason in todo.dropped.items()},
        published_files={
            name: PublishedFile(
                file.nbytes,
                file.head[8:].decode("utf-8"),
                file_hash(file.head, file.tensors, read),
                weights.sha256(name),
            )
            for name, file in weights.files.items()
        },
        published_index=weights.index,
    )
    write_file(target / MANIFEST, manifest.to_json().encode())
    return manifest.losses


def _finish_reversal(todo: Plan, weights: ConvertedWeights, target: Path, done: dict[str, Done]) -> None:
    """The files beside the shards, once it is sure that the shards are what the source's were."""
    written = {name: hash_ for unit in done.values() for name, hash_ in unit.written.items()}
    for name, tensors in weights.published.items():
        record = weights.manifest.published_files[name]
        if not todo.narrowed and file_hash(weights.published_head(name), tensors, written) != record.hash:
            raise ConversionError(
                f"{weights.directory}: does not give {name} back as it was; convert the checkpoint again"
            )
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


def _identity(todo: Plan, weights: Weights, allow_overflow: bool) -> str:
    """What an unfinished run has to agree in with the one that continues it."""
    plan = todo.to_dict()
    del plan["source"]["directory"], plan["target"]
    if isinstance(weights, ConvertedWeights):
        content: Any = weights.fingerprint
    else:
        assert isinstance(weights, PublishedWeights)
        content = weights.fingerprint()
    everything = [__version__, plan, allow_overflow, content]
    return content_hash(json.dumps(everything, sort_keys=True).encode())


def _check_target(todo: Plan, source: Path, target: Path, workers: int, resume: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target}: is a file, expected a directory to write to")
    if target.is_dir() and target.samefile(source):
        raise ConversionError(f"{target}: is the source itself; choose another directory to write to")
    unfinished = (target / JOURNAL).exists()
    if (target / MANIFEST).exists() and not unfinished:
        raise ConversionError(
            f"{target}: holds a converted checkpoint; remove it or choose another directory"
        )
    if not unfinished and target.is_dir() and (stranger := next(target.iterdir(), None)):
        raise ConversionError(
            f"{target}: is not empty, it holds {stranger.name}; choose a new or an empty directory to write to"
        )
    there = existing_directory(target)
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{there}: cannot be written to; change its permissions or choose another")
    held = sum(_reserved(target / file.name) for file in todo.files) if unfinished else 0
    needed, free = max(0, todo.nbytes - held) * ROOM, shutil.disk_usage(there).free
    if free < needed:
        raise EnvironmentProblem(
            f"{target}: needs {size_text(needed)}, but {size_text(free)} are free there; make room, or choose another disk"
        )
    memory, available = todo.memory(workers), available_memory()
    if available is not None and available < memory:
        raise EnvironmentProblem(
            f"memory: {workers} workers need {size_text(memory)}, but {size_text(available)} are available; "
            "end other programs, or give fewer --workers"
        )


def existing_directory(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _reserved(path: Path) -> int:
    """What an earlier run has reserved on the disk for a file."""
    for found in (path, part_path(path)):
        if found.is_file():
            status = found.stat()
            return min(status.st_size, status.st_blocks * 512)
    return 0


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
