"""MindIR's protobuf messages, without MindSpore: it takes seconds to import, and a file can be read without it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..convert.errors import EnvironmentProblem

_MODULE = "mindspore.train.mind_ir_pb2"


def _load() -> Any:
    """MindSpore's own module of them; its classes are the same ones when MindSpore is imported later."""
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    package = importlib.util.find_spec("mindspore")
    if package is None or package.origin is None:
        raise EnvironmentProblem(
            "MindSpore is not installed; its description of MindIR files is needed to read them"
        )
    path = Path(package.origin).parent / "train/mind_ir_pb2.py"
    spec = importlib.util.spec_from_file_location("mind_ir_pb2", path)
    assert spec and spec.loader, "a file that ends in .py has both"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pb = _load()
