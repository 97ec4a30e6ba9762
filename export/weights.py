"""A bundle's weights: checked before they are used, held once for all graphs.

MindSpore checks neither length nor content of external data: it takes a flipped bit, another model's file, or a
parameter without data, and computes something. So everything here is held against the manifest.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
from tqdm import tqdm

from ..convert.checking import stored_hash
from ..convert.errors import ConversionError
from ..convert.manifest import content_hash
from ..convert.safetensors_file import SafetensorsFile
from ..convert.transforms import DTYPES
from ..modeling import running
from .bundle import MANIFEST, Bundle
from .errors import BundleError
from .verified import Claim

logger = logging.getLogger(__name__)

SMALL = (
    1 << 16
)  # bytes of a tensor whose content is always checked: norms, biases; a few ms for the largest model
SHOWN = 1 << 30  # bytes whose check takes so long that its progress is shown
READERS = 8


def check_files(directory: Path, bundle: Bundle, verify: bool) -> None:
    """Graphs and the configuration are what the manifest says; with `verify` all small files.

    Raises:
        BundleError: one is not, or is a link to a place outside the bundle.
    """
    records = {g.file: (g.nbytes, g.hash) for g in bundle.graphs.values()}
    records |= {n: (r.nbytes, r.hash) for n, r in bundle.files.items() if verify or n == "config.json"}
    for name, (nbytes, hash_) in records.items():
        content = _inside(directory, name).read_bytes()
        if len(content) != nbytes:
            raise BundleError(
                f"{directory / name}: has {len(content)} bytes, {MANIFEST} has {nbytes}; export again"
            )
        if content_hash(content) != hash_:
            raise BundleError(f"{directory / name}: is not the file that was written; export again")


def _inside(directory: Path, name: str) -> Path:
    """The path of a file of a bundle."""
    path = directory / name
    if not path.is_file():
        raise BundleError(f"{path}: is missing; export again")
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(
            f"{path}: is a link to {path.resolve()}, outside the bundle; put the file itself there"
        )
    return path


class SharedWeights:
    """The tensors that all graphs of a bundle take their parameters from.

    What is stored as the graphs take it is a view of the memory-mapped file, its pages read when a graph first touches
    them and shared with every other process; what is not is widened once, when a graph first takes it.

    On a device each is brought there once, when a graph first takes it.

    Args:
        verify: read and check all of them now (True), only the small ones (False), or those in files that were not
            checked before (None).

    Raises:
        BundleError: a file is missing, truncated, another model's, or not what the manifest describes.
    """

    def __init__(self, directory: Path, bundle: Bundle, verify: bool | None = False) -> None:
        self._directory = directory
        self._records = bundle.weights
        self._dtype = DTYPES[bundle.parameter_dtype] if bundle.parameter_dtype else None
        self._shards = {name: self._open(name, bundle) for name in bundle.shards}
        self._tensors: dict[str, ms.Tensor] = {}
        for name, record in self._records.items():
            info = self._shards[record.file].tensors.get(name)
            if info is None or (info.shape, info.dtype.name, info.offset) != (
                record.shape,
                record.dtype,
                record.offset,
            ):
                raise BundleError(
                    f"{directory / record.file}: {name} is not where {MANIFEST} says; export again"
                )
        self._check_contents(verify)
        if self._dtype and any(r.dtype != bundle.parameter_dtype for r in self._records.values()):
            logger.info(
                "weights in %s are widened to %s: this target cannot multiply them well",
                bundle.dtype,
                self._dtype,
            )

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def array(self, name: str) -> np.ndarray:
        """A tensor in the graphs' dtype, without MindSpore's hold on it. Raises KeyError."""
        stored = self._stored(name)
        if self._dtype is None or stored.dtype == self._dtype:
            return stored
        widened = stored.astype(self._dtype)
        self._shards[self._records[name].file].forget(name)  # or it would be held in both dtypes
        return widened

    def tensor(self, name: str) -> ms.Tensor:
        """A tensor in the graphs' dtype, the same one every time. Raises KeyError."""
        if name not in self._tensors:
            self._tensors[name] = running.on_device(ms.Tensor.from_numpy(self.array(name)))
        return self._tensors[name]

    def _stored(self, name: str) -> np.ndarray:
        return self._shards[self._records[name].file].array(name)

    def _open(self, name: str, bundle: Bundle) -> SafetensorsFile:
        record = bundle.shards[name]
        path = _inside(self._directory, name)
        nbytes = path.stat().st_size
        if nbytes != record.nbytes:
            raise BundleError(f"{path}: has {nbytes} bytes, {MANIFEST} has {record.nbytes}; export again")
        try:
            shard = SafetensorsFile(path)
        except ConversionError as e:
            raise BundleError(f"{path}: is damaged ({e}); export again") from None
        if content_hash(shard.head) != record.header_hash:
            raise BundleError(
                f"{path}: is another model's, or damaged: its header is not the one that was written"
            )
        return shard

    def _check_contents(self, verify: bool | None) -> None:
        """Holds tensors against their hashes, in several threads; files that are whole are remembered."""
        of: dict[str, list[str]] = {file: [] for file in self._shards}
        for name, record in self._records.items():
            of[record.file].append(name)
        claims = {
            file: Claim.of(shard.status(), [(name, self._records[name].hash) for name in of[file]])
            for file, shard in self._shards.items()
        }
        known = {file for file in of if verify is None and claims[file].is_remembered()}
        whole = {file for file in of if verify or (verify is None and file not in known)}
        names = [n for n, r in self._records.items() if r.file in whole or r.nbytes <= SMALL]
        total = sum(self._records[name].nbytes for name in names)
        show = None if total > SHOWN else True  # None: where there is a terminal
        with (
            tqdm(
                desc="checking weights", total=total, unit="B", unit_scale=True, leave=False, disable=show
            ) as bar,
            ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool,
        ):
            for name, found in zip(names, pool.map(self._content, names)):
                record = self._records[name]
                if found != record.hash:
                    pool.shutdown(cancel_futures=True)
                    raise BundleError(
                        f"{self._directory / record.file}: {name} is damaged or another model's, its content is not "
                        "what was written; convert and export again"
                    )
                bar.update(record.nbytes)
        for file in whole:
            claims[file].remember()

    def _content(self, name: str) -> str:
        """The hash of a tensor as it stands in its file."""
        record = self._records[name]
        return stored_hash(self._shards[record.file], record.offset, record.nbytes)
