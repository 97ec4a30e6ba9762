"""Small cells traced for export, as bundles are: on meta tensors, so also of operators that have no kernel here."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import nn
from mindspore.common.api import _cell_graph_executor as executor

from kimi_vl.export import mindir
from kimi_vl.export.proto import pb
from kimi_vl.verify.mindir import Interpreter, read_graph

_DTYPES = {
    np.dtype(ml_dtypes.bfloat16): ms.bfloat16,
    np.dtype(np.float16): ms.float16,
    np.dtype(np.float32): ms.float32,
    np.dtype(np.int32): ms.int32,
    np.dtype(np.int64): ms.int64,
    np.dtype(np.bool_): ms.bool_,
    np.dtype(np.uint8): ms.uint8,
}


class Apply(nn.Cell):
    """A primitive or function of the inputs and then of `settings`."""

    def __init__(self, function: Any, *settings: Any) -> None:
        super().__init__()
        self.function = function
        self.settings = settings

    def construct(self, *inputs):
        return self.function(*inputs, *self.settings)


def trace(cell: nn.Cell, *arrays: np.ndarray, static: bool = True) -> Any:
    """The ModelProto of a cell for inputs like these arrays; `static`: in the form that a bundle's graphs have."""
    cell.set_train(False)
    with ms.DeviceCtx("meta") if hasattr(ms, "DeviceCtx") else nullcontext():
        tensors = [ms.Tensor(shape=a.shape, dtype=_DTYPES[a.dtype]) for a in arrays]
    phase, _ = executor.compile(cell, *tensors, phase="export.mindir", do_convert=False)
    model = pb.ModelProto()
    model.ParseFromString(executor._get_func_graph_proto(cell, phase, "mind_ir", incremental=False))
    if static:
        mindir.normalise(model)
    return model


def interpreter(cell: nn.Cell, *arrays: np.ndarray, parameters=None, arithmetic="lifted") -> Interpreter:
    return Interpreter(read_graph(trace(cell, *arrays)), parameters or {}, arithmetic)


def run(interpreter: Interpreter, *arrays: np.ndarray) -> list[np.ndarray]:
    """The outputs for inputs in order."""
    return list(interpreter(dict(zip(interpreter.graph.inputs, arrays, strict=True))).values())


def interpret(cell: nn.Cell, *arrays: np.ndarray, **options: Any) -> list[np.ndarray]:
    """What the exported graph of a cell gives for these inputs."""
    return run(interpreter(cell, *arrays, **options), *arrays)
