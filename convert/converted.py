"""A converted directory: our names and layouts, mapped into memory as they are."""

from __future__ import annotations

import struct
from functools import cached_property

import numpy as np

from . import mapping
from .dual_format import PAD
from .errors import ConversionError
from .formats import FORMATS, Shard
from .layout import framing_hash
from .manifest import MANIFEST, Manifest, TensorRecord, content_hash
from .mapped_file import TensorInfo
from .mapping import Entry, Spec
from .safetensors_file import parse_header
from .tensor_io import Place
from .weights import Source, Weights


class ConvertedWeights(Weights):
    """A converted checkpoint. Opening it checks sizes, headers and names, not its content.

    Attributes:
        manifest: its ``conversion.json``.
        fingerprint: the hash of ``conversion.json``, which has hashes of everything else.

    Raises:
        ConversionError: files, manifest and configuration contradict each other.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self.manifest = Manifest.load(source.directory)
        self.fingerprint = content_hash((source.directory / MANIFEST).read_bytes())
        self._shards = {name: self._open(name) for name in self.manifest.shards}
        for name, record in self.manifest.tensors.items():
            self._check(name, record)
        listed = sum(not name.startswith(PAD) for shard in self._shards.values() for name in shard.tensors)
        if listed != len(self.manifest.tensors):
            raise ConversionError(
                f"{self.directory}: its shards hold {listed} tensors, {MANIFEST} has {len(self.manifest.tensors)}; "
                "convert the checkpoint again"
            )
        self._check_configuration()

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        record = self.manifest.tensors[name]
        return record.shape, record.dtype

    def read(self, name: str) -> np.ndarray:
        array = self.mapped(name)
        return array if array.flags.aligned else array.copy()  # in a .ckpt file nothing is aligned

    def mapped(self, name: str) -> np.ndarray:
        """A tensor as a view of its file's map, wherever it stands there. Raises KeyError."""
        return self._shards[self.manifest.tensors[name].file].array(name)

    def forget(self, name: str) -> None:
        """Takes a tensor's pages out of this process's memory, see `mapped_file`. Raises KeyError."""
        self._shards[self.manifest.tensors[name].file].forget(name)

    def location(self, name: str) -> tuple[str, int, int]:
        """File name, offset from the file's start (in safetensors a multiple of 64), length in bytes. Raises KeyError."""
        record = self.manifest.tensors[name]
        return record.file, record.offset, record.nbytes

    def hash(self, name: str) -> str:
        """BLAKE3 of the tensor's bytes, as it was when it was written. Raises KeyError."""
        return self.manifest.tensors[name].hash

    def verify_files(self) -> None:
        """Reads the small files (configuration, tokenizer, …). Raises ConversionError: one was changed."""
        for name, record in self.manifest.files.items():
            try:
                content = self.source.path(name).read_bytes()
            except OSError:
                raise ConversionError(
                    f"{self.directory / name}: is gone; convert the checkpoint again"
                ) from None
            if content_hash(content) != record.hash:
                raise ConversionError(
                    f"{self.directory / name}: was changed after the conversion; convert the checkpoint again"
                )

    def check_hash(self, name: str, hash_: str) -> None:
        """Raises ConversionError: a tensor's content, which `hash_` is of, is not what was written."""
        record = self.manifest.tensors[name]
        if hash_ != record.hash:
            raise ConversionError(
                f"{self.directory / record.file}: {name} is damaged, its content is not what was written; "
                "convert the checkpoint again"
            )

    def place(self, name: str) -> Place:
        """Where a tensor is in its file."""
        return self._shards[self.manifest.tensors[name].file].place(name)

    def published_head(self, file: str) -> bytes:
        """The first bytes of a published file: length field and header."""
        header = self.manifest.published_files[file].header.encode("utf-8")
        return struct.pack("<Q", len(header)) + header

    @cached_property
    def published(self) -> dict[str, dict[str, TensorInfo]]:
        """The published files, and where in them each published tensor was."""
        return {
            name: parse_header(self.published_head(name), record.nbytes, f"{MANIFEST}, {name}")
            for name, record in self.manifest.published_files.items()
        }

    @cached_property
    def published_entries(self) -> list[Entry]:
        """The rows of the table that the published checkpoint filled. Raises ConversionError: the manifest is damaged."""
        entries = mapping.match(
            self._config,
            {
                name: Spec(info.shape, info.dtype.name)
                for tensors in self.published.values()
                for name, info in tensors.items()
            },
        )
        kept = {name: len(record.data) // 2 for name, record in self.manifest.dropped.items()}
        infos = {name: info for tensors in self.published.values() for name, info in tensors.items()}
        if kept != {s.name: infos[s.name].nbytes for e in entries if not e.ours for s in e.published}:
            raise ConversionError(
                f"{self.directory / MANIFEST}: has not the content of all tensors that were dropped; "
                "convert the checkpoint again"
            )
        return entries

    def _open(self, name: str) -> Shard:
        held = {n: Spec(r.shape, r.dtype) for n, r in self.manifest.tensors.items() if r.file == name}
        shard, record = (
            FORMATS[self.manifest.stored].open(self.source.path(name), held),
            self.manifest.shards[name],
        )
        if shard.nbytes != record.nbytes or framing_hash(shard.framing) != record.header_hash:
            raise ConversionError(
                f"{self.directory / name}: is not the file that {MANIFEST} describes; convert the checkpoint again"
            )
        return shard

    def _check(self, name: str, record: TensorRecord) -> None:
        info = self._shards[record.file].tensors.get(name) if record.file in self._shards else None
        if info is None or record != _as_recorded(info, record):
            raise ConversionError(
                f"{self.directory / MANIFEST}: {name} is not where it says; convert the checkpoint again"
            )

    def _check_configuration(self) -> None:
        left = {name: record.shape for name, record in self.manifest.tensors.items()}
        mapping.plausible(self._config, sum(len(record.sources) for record in self.manifest.tensors.values()))
        for entry in mapping.entries(self._config):
            for side in entry.ours:
                if left.pop(side.name, None) != side.shape:
                    raise ConversionError(
                        f"{side.name}: is not of shape {side.shape}, which config.json asks for; "
                        "was it changed after the conversion?"
                    )
        for name in left:
            raise ConversionError(
                f"{name}: does not belong to the network that config.json describes; "
                "was it changed after the conversion?"
            )


def _as_recorded(info: TensorInfo, record: TensorRecord) -> TensorRecord:
    """`record` with what the shard's header says."""
    return TensorRecord(
        file=record.file,
        offset=info.offset,
        nbytes=info.nbytes,
        shape=info.shape,
        dtype=info.dtype.name,
        hash=record.hash,
        transform=record.transform,
        sources=record.sources,
    )
