"""The reference by the publisher's own modules, which a checkpoint brings along and `config.json` names in `auto_map`.

They are somebody's code, and were written for a transformers that is older than what this package needs. So they run in a
process of their own, by a Python that may be another environment's, and arrays cross between the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..convert.errors import EnvironmentProblem
from ..modeling.configuration import ModelConfig
from .reference import worker

if TYPE_CHECKING:
    from .reference.recording import Greedy, Taps

WRITTEN_FOR = "4.48 to 4.50"
INSTALL = (
    f"it was written for transformers {WRITTEN_FOR}: python -m venv old, "
    "old/bin/pip install transformers==4.50.3 torch pillow, and give --reference-python old/bin/python"
)


class RemoteCodeError(ValueError):
    """A checkpoint that brings no code."""


def code_of(directory: Path) -> str:
    """The file of the network that `config.json` names.

    Raises:
        RemoteCodeError: it names none, or the file is not there.
    """
    named = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    name = str(named.get("AutoModelForCausalLM", ""))
    if "--" in name or "." not in name:
        raise RemoteCodeError(
            f"--reference-code: {directory} brings no code, its config.json names no file in auto_map.AutoModelForCausalLM"
        )
    file = name.split(".")[0] + ".py"
    if not (directory / file).is_file():
        raise RemoteCodeError(
            f"--reference-code: {directory} lacks {file}, which its config.json names; download the whole repository"
        )
    return file


class RemoteOracle:
    """Runs the checkpoint's code, with the calls of :class:`verify.oracle.Oracle`.

    Raises:
        RemoteCodeError: the checkpoint brings no code.
        EnvironmentProblem: the code does not run here, from the first import to the last call.
    """

    def __init__(self, directory: Path, python: str = sys.executable):
        self.directory, self.file = directory, code_of(directory)
        self.config = ModelConfig.from_file(directory)
        self._modules = tempfile.TemporaryDirectory()  # where transformers copies the code to
        environment = os.environ | {"HF_MODULES_CACHE": self._modules.name, "HF_HUB_OFFLINE": "1"}
        try:
            self._process = subprocess.Popen(
                [python, str(Path(worker.__file__)), str(directory.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except OSError as e:
            raise EnvironmentProblem(f"--reference-python: {python} cannot be run ({e.strerror})") from None
        self.versions = {name: str(value) for name, value in self._answer().items()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Taps:
        return self._ask(inputs, 0)

    def greedy(self, inputs: Mapping[str, np.ndarray], n: int) -> Greedy:
        from .reference.recording import Greedy

        return Greedy(**self._ask(inputs, n))

    def describe(self) -> dict[str, Any]:
        """For a run's `reference`: what computed it."""
        kind, torch, transformers = (self.versions[k] for k in ("kind", "torch", "transformers"))
        return {
            "class": f"{kind} of the checkpoint's {self.file}",
            "runs_on": f"Torch {torch} on CPU, by {kind} of the checkpoint's {self.file} in transformers {transformers}",
        }

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._modules.cleanup()

    def _ask(self, inputs: Mapping[str, np.ndarray], n: int) -> Taps:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            worker.write_frame(self._process.stdin, **inputs, n=np.asarray(n))
        return self._answer()

    def _answer(self) -> Taps:
        assert self._process.stdout
        answer = worker.read_frame(self._process.stdout)
        if answer is None:
            answer = {"error": np.asarray(f"its process ended with status {self._process.wait()}")}
        if "error" in answer:
            self.close()
            raise EnvironmentProblem(
                f"--reference-code: {self.directory / self.file} does not run ({answer['error']}); {INSTALL}"
            )
        return answer
