"""What a run layer by layer has done so far, in its report directory: the same command goes on from there.

After each step the arrays are written, then `state.json`, which has their digest and names them; both appear under their
names when they are whole. So a kill at any time costs at most the step that was under way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from .sealed import Kind

NAME = ".stream"
Arrays = dict[str, np.ndarray]


class StreamStateError(ValueError):
    """A state that is damaged, or one of another run; the message says which."""


_FILE = Kind(
    "kimi_vl-parity-stream",
    1,
    "state",
    "the state of an unfinished run",
    "remove its directory",
    StreamStateError,
)


class StreamState:
    """The state in `report`.

    Args:
        key: what the run depends on, by the words for it; a state is continued by a run with the same one.
    """

    def __init__(self, report: Path, key: Mapping[str, Any] | None = None) -> None:
        self.path = report / NAME
        self._key = dict(key or {})

    def load(self, say: Callable[[str], None]) -> tuple[dict[str, Any], Arrays] | None:
        """The last step's record and arrays; None where there is none, or (which is said) where it is damaged.

        Raises:
            StreamStateError: it is another run's.
        """
        file = self.path / "state.json"
        if not file.exists():
            return None
        try:
            state = _FILE.load(file)
            arrays = self._arrays(state)
        except StreamStateError as e:
            say(f"{e}; the run begins again")
            return None
        for what, value in self._key.items():
            if state["key"].get(what) != value:
                raise StreamStateError(
                    f"{self.path}: holds an unfinished run with other {what}; repeat that run's command to finish it, "
                    "or remove this directory"
                )
        return state["record"], arrays

    def _arrays(self, state: dict[str, Any]) -> Arrays:
        path = self.path / state["arrays"]["file"]
        try:
            digest = _digest(path)
        except OSError as e:
            raise StreamStateError(f"{path}: cannot be read ({e.strerror})") from None
        if digest != state["arrays"]["sha256"]:
            raise StreamStateError(
                f"{path}: is damaged: its content does not have the digest it was saved with"
            )
        return load_file(path)

    def save(self, step: int, record: dict[str, Any], arrays: Arrays) -> None:
        """Takes the place of the step before. Raises OSError: it cannot be written."""
        self.path.mkdir(exist_ok=True)
        path, part = self.path / f"after-{step}.safetensors", self.path / "arrays.part"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)
        os.replace(part, path)
        content = {"key": self._key, "record": record, "arrays": {"file": path.name, "sha256": _digest(path)}}
        _FILE.save(content, self.path / "state.json")
        for other in self.path.glob("after-*.safetensors"):
            if other != path:
                other.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
