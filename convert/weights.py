"""What every source of weights offers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from .errors import ConversionError
from .hub import HubRepository


@dataclass(frozen=True)
class Source:
    """A SRC that was found: its directory and its name without machine paths.

    If it is the Hub's, also its commit and its repository; then the weights may not be in the directory yet.
    """

    directory: Path
    name: str
    revision: str | None = None
    repository: HubRepository | None = field(default=None, repr=False, compare=False)

    def path(self, name: str) -> Path:
        """A file of the directory.

        Raises:
            ConversionError: it is a link that leads out of the directory (of the Hub's cache, out of its repository).
        """
        path, home = self.directory / name, self.directory.resolve()
        if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
            home = home.parent.parent
        # realpath, because resolve() raises where a link leads to itself
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            raise ConversionError(
                f"{path}: is a link that leads out of its directory; put the file itself there, if you trust it"
            )
        return path


class Weights(ABC):
    """Named arrays in our names and layouts, and the configuration that they belong to.

    Attributes:
        source: what SRC meant.
        raw_config: ``config.json`` as it is.
    """

    def __init__(self, source: Source):
        self.source = source
        path = source.path("config.json")
        self._config = ModelConfig.from_file(source.directory)
        self.raw_config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    @property
    def directory(self) -> Path:
        return self.source.directory

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration; its `dtype` is that of the weights, whatever the file says."""
        return dataclasses.replace(self._config, dtype=self.dtype)

    @cached_property
    def dtype(self) -> str:
        """What most of the numbers are stored as."""
        numbers: Counter[str] = Counter()
        for name in self.names():
            shape, dtype = self.spec(name)
            numbers[dtype] += math.prod(shape)
        return numbers.most_common(1)[0][0]

    @abstractmethod
    def names(self) -> list[str]:
        """Our names, in the order of the table."""

    @abstractmethod
    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ("bfloat16", "float16", "float32") of a tensor. Raises KeyError."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor, bf16 as ml_dtypes.bfloat16; a read-only view of the file where nothing changes. Raises KeyError."""
