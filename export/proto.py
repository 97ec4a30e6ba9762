"""MindIR's protobuf messages, without MindSpore: it takes seconds to import, and a file can be read without it."""

from __future__ import annotations

import importlib.util
import os
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
    if "_descriptor.FileDescriptor(" in path.read_text(encoding="utf-8"):
        # MindSpore 2.7: made by a compiler of before protobuf 3.20, which later ones take in pure Python alone. MindSpore
        # sets the same when it is imported.
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pb = _load()
