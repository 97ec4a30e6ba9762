"""Running one graph: where, how it is compiled, and what crosses the border between NumPy and MindSpore.

The host computes in fp32. A graph takes floats in the dtype that it computes in, and what it gives is fp32 again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import nn

from .engine import Arrays

ASCEND = "Ascend"
DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16, "int32": ms.int32}
NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
}
# Kernel by kernel, as the operators in `kernels.ascend` are documented for. O1 would also fuse plain operators by itself.
ASCEND_JIT_LEVEL = "O0"


def device() -> str:
    """What MindSpore runs on, "CPU" or "Ascend"; chosen with ``mindspore.set_device``."""
    return str(ms.get_context("device_target"))


def prepared(cell: nn.Cell) -> nn.Cell:
    """`cell`, to be compiled for inference in the way that suits the device."""
    cell.set_train(False)
    if device() == ASCEND:
        cell.set_jit_config(ms.JitConfig(jit_level=ASCEND_JIT_LEVEL))
    return cell


def name(dtype: ms.Type) -> str:
    """What MindSpore's `dtype` is called here."""
    return str(dtype).lower()


def tensor(array: np.ndarray, dtype: str) -> ms.Tensor:
    """A tensor of `array`, rounded to `dtype`; it is not copied where nothing changes."""
    return ms.Tensor.from_numpy(np.ascontiguousarray(array, NUMPY[dtype]))


def on_device(value: ms.Tensor) -> ms.Tensor:
    """`value` in the device's memory, so that all graphs whose parameters it becomes find it there."""
    return value.move_to(ASCEND) if device() == ASCEND else value


def array(value: ms.Tensor) -> np.ndarray:
    """The content of a tensor; shorter floats as fp32."""
    if value.dtype == ms.bfloat16:  # NumPy may be newer than the one whose bf16 MindSpore knows
        value = value.float()
    content = value.asnumpy()
    return content.astype(np.float32) if content.dtype == np.float16 else content


def run_cell(cell: nn.Cell, dtypes: Mapping[str, str], inputs: Arrays) -> list[np.ndarray]:
    """Run a compiled or a reloaded cell in graph mode, whatever the caller's mode is.

    Args:
        dtypes: of the cell's inputs, in its order.
        inputs: arrays by name.
    """
    tensors = [tensor(inputs[name], dtype) for name, dtype in dtypes.items()]
    run: Any = cell if isinstance(cell, nn.GraphCell) else cell.compile_and_run
    out = run(*tensors)
    return [array(t) for t in (out if isinstance(out, tuple) else (out,))]
