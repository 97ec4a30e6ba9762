"""Reading a converted directory again, against its manifest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import blake3

from .converted import ConvertedWeights
from .errors import ConversionError
from .formats import FORMATS
from .manifest import MANIFEST, FileRecord, content_hash
from .mapped_file import MappedFile
from .source import open_source
from .storage import Progress
from .tensor_io import Buffers
from .transforms import PIECE_BYTES
from .weights import Source


def check(directory: str | Path, workers: int = 2, progress: Progress | None = None) -> list[str]:
    """What is wrong with a converted directory: one sentence for every file and tensor that is damaged.

    Args:
        workers: threads that read.
        progress: called with the number of tensor bytes read since its last call, by one thread at a time.

    Raises:
        ConversionError: it is no converted directory, or its files do not fit its manifest at all.
        OSError: it cannot be read.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ConversionError(f"{directory}: is no directory; expected one that convert-weights has written")
    weights = open_source(Source(path, path.resolve().name))
    if not isinstance(weights, ConvertedWeights):
        raise ConversionError(
            f"{directory}: has no {MANIFEST}; expected a directory that convert-weights has written"
        )
    manifest = weights.manifest
    small = {**manifest.files, FORMATS[manifest.stored].index: manifest.index}
    damaged = [sentence for name, record in small.items() if (sentence := _file(weights, name, record))]
    lock = Lock()

    def advance(nbytes: int) -> None:
        with lock:
            if progress:
                progress(nbytes)

    def tensor(name: str) -> str | None:
        record = manifest.tensors[name]
        if stored_hash(weights.place(name).file, record.offset, record.nbytes, advance) == record.hash:
            return None
        return f"{path / record.file}: {name} is damaged, its content is not what was written"

    with ThreadPoolExecutor(workers) as pool:
        return damaged + [sentence for sentence in pool.map(tensor, manifest.tensors) if sentence]


def stored_hash(file: MappedFile, offset: int, nbytes: int, progress: Progress | None = None) -> str:
    """BLAKE3 of a part of a file, which is read piece by piece. Raises OSError, ConversionError: it cannot be read."""
    buffers, digest = Buffers(), blake3.blake3()
    for start in range(0, nbytes, PIECE_BYTES):
        piece = buffers.take(0, min(PIECE_BYTES, nbytes - start))
        file.read(offset + start, piece.data)
        digest.update(piece.data)
        if progress:
            progress(piece.nbytes)
    return digest.hexdigest()


def _file(weights: ConvertedWeights, name: str, record: FileRecord) -> str | None:
    try:
        content = weights.source.path(name).read_bytes()
    except FileNotFoundError:
        return f"{weights.directory / name}: is gone"
    if content_hash(content) != record.hash:
        return f"{weights.directory / name}: was changed after the conversion"
    return None
