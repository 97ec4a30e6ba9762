"""A checkpoint in the published layout: ``config.json``, safetensors files, and their index if there are several."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from ..modeling.configuration import short
from . import hub, mapping
from .errors import ConversionError, EnvironmentProblem
from .manifest import content_hash, plain_name
from .mapping import Entry, Spec
from .safetensors_file import SafetensorsFile, strict_json
from .tensor_io import Place
from .transforms import DTYPES, Block, gather
from .weights import Source, Weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What stands beside the weights: configuration, tokenizer, processor, chat template, code, licence, model card.
OTHER_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py", ".md")
OTHER_NAMES = ("LICENSE", "NOTICE")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class PublishedWeights(Weights):
    """A published checkpoint, converted while it is read.

    Attributes:
        index: the text of its index file, or None.
        files: its safetensors files by name. Those of the Hub may be elsewhere still; see :meth:`fetch`.
        specs: its tensors by their published names.
        entries: the rows of the table that it fills.

    Raises:
        ConversionError: its files contradict each other, or its tensors do not fit its configuration.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self.index, self.files = open_checkpoint(source)
        self._file_of = {name: file for file in self.files.values() for name in file.tensors}
        self.specs = {
            name: Spec(info.shape, info.dtype.name)
            for file in self.files.values()
            for name, info in file.tensors.items()
        }
        self.entries = mapping.match(self._config, self.specs)

    @cached_property
    def _ours(self) -> dict[str, tuple[Entry, int]]:
        return {side.name: (entry, i) for entry in self.entries for i, side in enumerate(entry.ours)}

    def names(self) -> list[str]:
        return list(self._ours)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        entry, i = self._ours[name]
        return entry.ours[i].shape, mapping.target_dtype(entry, self.specs).name

    def read(self, name: str) -> np.ndarray:
        shape, dtype = self.spec(name)
        return gather(self.blocks(name), shape, DTYPES[dtype])

    def blocks(self, name: str) -> list[Block]:
        """The views of published tensors that a tensor of ours is made of."""
        entry, i = self._ours[name]
        return entry.blocks([self.array(side.name) for side in entry.published])[i]

    def array(self, published: str) -> np.ndarray:
        """A published tensor as it is in its file, read-only."""
        return self._file_of[published].array(published)

    def fetch(self) -> None:
        """Downloads all files that are not there. Raises EnvironmentProblem: they cannot be downloaded."""
        if repository := self.source.repository:
            for name, file in self.files.items():
                if not file.attached:
                    file.attach(hub.download(repository, name))

    def check_room(self, target: Path, also: float) -> None:
        """Before a download into the Hub's cache.

        Args:
            target: where `also` bytes more are going to be written.

        Raises:
            EnvironmentProblem: there is no room for it, or for both if both lie on the same disk.
        """
        repository = self.source.repository
        if repository is None:
            return
        missing = sum(file.nbytes for name, file in self.files.items() if not hub.cached(repository, name))
        there, beside = self.directory, next(p for p in (target, *target.absolute().parents) if p.is_dir())
        needed = missing + (also if there.stat().st_dev == beside.stat().st_dev else 0)
        free = shutil.disk_usage(there).free
        if missing and free < needed:
            raise EnvironmentProblem(
                f"{repository.repo}: {missing / 1e9:.2f} GB to download and what is made of it need {needed / 1e9:.2f} GB, "
                f"but {free / 1e9:.2f} GB are free on the disk of the Hub's cache; make room, or give --discard-source"
            )

    def place(self, published: str) -> Place:
        """Where a published tensor is in its file."""
        return self._file_of[published].place(published)

    def file_of(self, published: str) -> str:
        """The name of the file that holds a published tensor."""
        return self._file_of[published].name

    def sha256(self, file: str) -> str | None:
        """Of a file, where the Hub publishes it."""
        repository = self.source.repository
        return repository.file(file).sha256 if repository else None

    def fingerprint(self) -> list[tuple[str, int, str]]:
        """Tells this checkpoint from others, and from itself after a change, without reading its tensors."""
        on_hub = self.source.repository is not None  # where a commit never changes
        return [
            (name, 0 if on_hub else file.status().st_mtime_ns, content_hash(file.head))
            for name, file in self.files.items()
        ]

    def other_files(self) -> list[str]:
        """The files beside the weights that belong to the checkpoint."""
        return sorted(
            path.name
            for path in self.directory.iterdir()
            if beside_the_weights(path.name) and self.source.path(path.name).is_file()
        )


def beside_the_weights(name: str) -> bool:
    """Whether a file of this name is configuration, tokenizer, code, licence or the like."""
    return (
        (name.endswith(OTHER_SUFFIXES) or name.startswith(OTHER_NAMES))
        and not name.startswith(".")
        and not name.endswith(".index.json")
    )


def open_checkpoint(source: Source) -> tuple[str | None, dict[str, SafetensorsFile]]:
    """The index's text (None without one) and all safetensors files of a published checkpoint.

    Raises:
        ConversionError: there are none, or index and files contradict each other.
    """
    directory, repository = source.directory, source.repository
    there = repository.files if repository else {path.name for path in directory.iterdir()}
    if INDEX not in there:
        if SINGLE in there:
            return None, {SINGLE: _open(source, SINGLE)}
        raise ConversionError(_no_weights(directory, there))
    text, weight_map = _index(source.path(INDEX))
    files = {name: _open(source, name) for name in sorted(set(weight_map.values()))}
    if SINGLE not in files and SINGLE in there:
        raise ConversionError(
            f"{directory}: holds both {SINGLE} and {INDEX}, which names other files; remove the one not meant"
        )
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise ConversionError(
                f"{INDEX}: says that {short(tensor)} is in {name}, but it is not; download both again"
            )
    for name, file in files.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != name:
                says = f"has it in {weight_map[tensor]}" if tensor in weight_map else "does not name it"
                raise ConversionError(
                    f"{name}: holds {short(tensor)}, but {INDEX} {says}; download both again"
                )
    return text, files


def _open(source: Source, name: str) -> SafetensorsFile:
    repository = source.repository
    if repository is None:
        return SafetensorsFile(source.path(name))
    return SafetensorsFile.described(name, hub.read_head(repository, name), repository.file(name).nbytes)


def _index(path: Path) -> tuple[str, dict[str, str]]:
    try:
        text = path.read_bytes().decode("utf-8")
        weight_map = strict_json(text)["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is empty, or names something that is no file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ConversionError(f"{path}: has no readable weight_map ({e}); download it again") from None
    for name in weight_map.values():
        if not plain_name(name):
            raise ConversionError(
                f"{path}: names the file {short(name)}, expected a plain file name beside it"
            )
    return text, weight_map


def _no_weights(directory: Path, there: Iterable[str]) -> str:
    pickles = sorted(name for name in there if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return (
            f"{directory / pickles[0]}: is a pickle, which can run code when it is opened, so it never is; "
            "save the checkpoint as safetensors where you trust it, and convert that"
        )
    return f"{directory}: holds neither {INDEX} nor {SINGLE}; expected a published or a converted checkpoint"
