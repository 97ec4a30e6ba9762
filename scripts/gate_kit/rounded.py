"""Faults of CPU bundles that MindSpore runs by C++ operators which round: judged by what rounding costs Torch.

Some of the other faults, and a whole tensor a few per cent off. What is smaller than rounding (a factor of 2.5 for
2.446) is not to be seen so; every bundle that is judged rounded is judged in fp32 too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import host, network, weights
from .fault import Fault


def tensor_off(tensors: weights.Weights) -> None:
    name = f"{weights.LAYERS}.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) * np.float32(1.06)


_KNOWN = {fault.name: fault for fault in (*weights.FAULTS, *network.FAULTS, *host.FAULTS)}
_FAULTS = (
    Fault(
        "tensor-6-percent",
        "o_proj of layer 1 too large by 6 %",
        "weights",
        "layers.1",
        tensor_off,
        model="eps",
    ),
    *(
        _KNOWN[name]
        for name in (
            "expert-neighbour",
            "kv-a-eps",
            "rms-eps",
            "final-norm-eps",
            "tower-eps",
            "late-decoding",
        )
    ),
)
FAULTS = tuple(
    replace(
        fault,
        name=f"rounded-{fault.name}",
        what=f"{fault.what}; in a rounding CPU bundle",
        target="cpu",
        through="mindspore",
        arithmetic="rounded",
    )
    for fault in _FAULTS
)
