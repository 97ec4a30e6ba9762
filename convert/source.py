"""Where weights come from: a published directory, a converted directory, ``nano``, a Hub repo id.

Whatever it is, :func:`open_weights` gives named arrays in our names and layouts. A published checkpoint is converted
while it is read, one tensor at a time; a converted one is mapped into memory as it is.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from . import mapping
from .errors import ConversionError
from .mapping import Entry, Spec
from .safetensors_file import SafetensorsFile, TensorInfo
from .transforms import DTYPES, gather

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_weights(src: str | Path) -> Weights:
    """The weights of SRC, checked against its configuration; nothing but headers is read yet.

    Raises:
        ConversionError: SRC is no checkpoint, or its tensors do not fit its configuration.
        ConfigError: its ``config.json`` is missing, or not Kimi-VL's.
    """
    return PublishedWeights(resolve(src))


def resolve(src: str | Path) -> Path:
    """The directory that SRC means. Raises ConversionError."""
    path = Path(src)
    if path.is_dir():
        return path
    raise ConversionError(f"--src {src}: is neither a directory, nor 'nano'")


class Weights(ABC):
    """Named arrays in our names and layouts, and the configuration that they belong to.

    Attributes:
        directory: where they are.
        config: the configuration; its `dtype` is that of the weights.
        raw_config: ``config.json`` as it is.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        config = ModelConfig.from_file(directory)
        self.raw_config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._file_config = config

    @cached_property
    def config(self) -> ModelConfig:
        return dataclasses.replace(self._file_config, dtype=self.dtype)

    @cached_property
    def dtype(self) -> str:
        """What most of the numbers are stored as."""
        sizes: Counter[str] = Counter()
        for name in self.names():
            shape, dtype = self.spec(name)
            sizes[dtype] += int(np.prod(shape, dtype=object))
        return sizes.most_common(1)[0][0]

    @abstractmethod
    def names(self) -> list[str]:
        """Our names, in the order of the table."""

    @abstractmethod
    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ("bfloat16", "float16", "float32") of a tensor. Raises KeyError."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor, bf16 as ml_dtypes.bfloat16; a read-only view of the file where that is possible. Raises KeyError."""


class PublishedWeights(Weights):
    """A checkpoint in the published layout, converted while it is read.

    Attributes:
        entries: the rows of the table that the checkpoint fills.
        specs: its tensors, published names.
        files: its safetensors files by name.
        index: the text of its index file, if it has one.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.index, self.files = open_checkpoint(directory)
        self._where = {name: file for file in self.files.values() for name in file.tensors}
        self.specs = specs({name: file.tensors[name] for name, file in self._where.items()})
        self.entries = mapping.match(self._file_config, self.specs)
        self._ours: dict[str, tuple[Entry, int]] = {
            side.name: (entry, i) for entry in self.entries for i, side in enumerate(entry.ours)
        }

    def names(self) -> list[str]:
        return list(self._ours)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        entry, i = self._ours[name]
        return entry.ours[i].shape, mapping.target_dtype(entry, self.specs, None).name

    def read(self, name: str) -> np.ndarray:
        entry, i = self._ours[name]
        shape, dtype = self.spec(name)
        blocks = entry.blocks([self.array(side.name) for side in entry.published])[i]
        return gather(blocks, shape, DTYPES[dtype], name)

    def array(self, published: str) -> np.ndarray:
        """A published tensor as it is in its file, read-only."""
        return self._where[published].array(published)


def specs(tensors: Mapping[str, TensorInfo]) -> dict[str, Spec]:
    return {name: Spec(info.shape, info.dtype.name) for name, info in tensors.items()}


def open_checkpoint(directory: Path) -> tuple[str | None, dict[str, SafetensorsFile]]:
    """The index's text (None without one) and all safetensors files of a published checkpoint.

    Raises:
        ConversionError: there are none, or index and files contradict each other.
    """
    if not (directory / INDEX).is_file():
        if (directory / SINGLE).is_file():
            return None, {SINGLE: SafetensorsFile(directory / SINGLE)}
        raise ConversionError(_no_weights(directory))
    text = (directory / INDEX).read_text(encoding="utf-8")
    weight_map = _weight_map(text)
    files = {name: SafetensorsFile(directory / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise ConversionError(
                f"{INDEX}: says that {tensor!r} is in {name}, but it is not; download both again"
            )
    for name, file in files.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != name:
                where = f"has it in {weight_map[tensor]}" if tensor in weight_map else "does not name it"
                raise ConversionError(f"{name}: holds {tensor!r}, but {INDEX} {where}; download both again")
    if SINGLE not in files and (directory / SINGLE).is_file():
        raise ConversionError(
            f"{directory}: holds both {SINGLE} and {INDEX}, which names other files; remove the one that is not meant"
        )
    return text, files


def _weight_map(text: str) -> dict[str, str]:
    try:
        index = json.loads(text)
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is empty or names something that is no file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ConversionError(f"{INDEX}: has no readable weight_map ({e}); download it again") from None
    for name in weight_map.values():
        if name != Path(name).name or name in ("", ".", ".."):
            raise ConversionError(f"{INDEX}: names the file {name!r}, expected a plain file name beside it")
    return weight_map


def _no_weights(directory: Path) -> str:
    pickles = sorted(
        p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern)
    )
    if pickles:
        return (
            f"{pickles[0]}: is a pickle, which can run code when it is opened, so it is not; "
            "save the checkpoint as safetensors (save_pretrained does) and convert that"
        )
    return f"{directory}: holds neither {INDEX} nor {SINGLE}; expected a published or converted checkpoint"
