"""Parameters that own no memory until weights are set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms


@contextmanager
def no_init_parameters() -> Iterator[None]:
    """As ``mindspore.nn.no_init_parameters``, which cannot be nested: it ends with initialisation switched on."""
    before = init_parameters()
    ms.Parameter.init_param = False
    try:
        yield
    finally:
        ms.Parameter.init_param = before


def init_parameters() -> bool:
    """Whether a network made now is to have initial values."""
    return getattr(ms.Parameter, "init_param", True)


def empty_parameter(shape: tuple[int, ...], dtype: ms.Type, name: str = "weight") -> ms.Parameter:
    """A parameter with a shape and a dtype but no data.

    A network is always built from these, then filled (``set_data``) or only traced: so neither loading nor export
    holds the weights a second time.
    """
    if hasattr(ms, "DeviceCtx"):
        with ms.DeviceCtx("meta"):
            return ms.Parameter(ms.Tensor(shape=tuple(shape), dtype=dtype), name=name, requires_grad=False)
    from mindspore.common.initializer import initializer  # MindSpore before 2.10

    with no_init_parameters():
        return ms.Parameter(initializer("zeros", tuple(shape), dtype), name=name, requires_grad=False)
