"""What a run has done so far, in its report directory: a run that was killed goes on where it was.

Every case's record is a sealed file of its own, written when the case is done. Where several candidates are held against
the same inputs, what the reference gives for them is kept too, so that it runs once; at the published size that is up to
350 MB a case. All of it goes when the report is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .cases import inputs_hash
from .sealed import Kind

NAME = ".unfinished"


class SpoolError(ValueError):
    """A state that is damaged or belongs to another run."""


class KeptReference:
    """A reference that is asked once for each input, however many candidates are held against it."""

    def __init__(self, reference: Any, spool: Spool, name: str) -> None:
        self.reference, self.spool, self.name = reference, spool, name
        self.config = reference.config

    def run(
        self, inputs: Mapping[str, np.ndarray], experts: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`experts`, if any, are those that the fp32 reference chooses for these inputs."""
        if experts is None:
            return self._kept("run", inputs, self.reference.run, inputs)
        return self._kept("same-experts", inputs, self.reference.run, inputs, experts)

    def greedy(self, inputs: Mapping[str, np.ndarray], n: int) -> Any:
        def arrays(*given: Any) -> dict[str, np.ndarray]:
            return vars(self.reference.greedy(*given))

        return SimpleNamespace(**self._kept(f"greedy-{n}", inputs, arrays, inputs, n))

    def _kept(
        self, what: str, inputs: Mapping[str, np.ndarray], make: Callable[..., Any], *given: Any
    ) -> dict[str, np.ndarray]:
        name = f"{self.name}-{what}-{inputs_hash(inputs)[:24]}"
        found = self.spool.arrays(name)
        if found is None:
            found = make(*given)
            self.spool.save_arrays(name, found)
        return found


class Spool:
    """The unfinished state in `directory`; one of another run (other files, versions, arguments) is removed.

    Attributes:
        found: cases that were there already.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], keep_taps: bool) -> None:
        self.path = directory / NAME
        self.keep_taps = keep_taps
        text = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        try:
            same = _KEY.load(self.path / "key.json")["key"] == digest
        except SpoolError:
            same = False
        if not same:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            _KEY.save({"key": digest}, self.path / "key.json")
        self.found = len(list(self.path.glob("case-*.json")))

    def case(self, link: str, name: str) -> dict[str, Any] | None:
        """The record of a case of a link that was done; a damaged one is as good as none."""
        try:
            return _CASE.load(self._case(link, name))["record"]
        except SpoolError:
            return None

    def save_case(self, link: str, name: str, record: dict[str, Any]) -> None:
        _CASE.save({"record": record}, self._case(link, name))

    def _case(self, link: str, name: str) -> Path:
        return self.path / f"case-{hashlib.sha256(f'{link} {name}'.encode()).hexdigest()[:24]}.json"

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """What was kept under a name, or None."""
        try:
            with np.load(self.path / f"{name}.npz") as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError):
            return None

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps them, if there is somebody who will ask."""
        if self.keep_taps:
            part = self.path / f"{name}.part"
            with open(part, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(part, self.path / f"{name}.npz")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _kind(name: str) -> Kind:
    return Kind(f"kimi_vl-parity-{name}", 1, name, "a file of an unfinished run", "run it again", SpoolError)


_KEY, _CASE = _kind("key"), _kind("case")
