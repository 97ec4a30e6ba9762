"""The layout of our shards: valid safetensors and valid MindIR external data at once.

MindSpore takes an external data file whose first byte is 1 and whose offsets are absolute. A safetensors file begins
with its header's length n, so n % 256 == 1 makes that byte; the header is padded with spaces to get there. Then the
data starts at 8 + n = 9 modulo 64 whatever n is, and U8 entries ``__padN__`` fill the gaps that put every tensor at
a multiple of 64.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

import numpy as np

from .layout import Layout
from .mapped_file import TensorInfo
from .mapping import Spec
from .safetensors_file import CODES
from .transforms import DTYPES

ALIGNMENT = 64
PAD = "__pad"


def lay_out(tensors: Mapping[str, Spec]) -> Layout:
    """The layout of a shard that holds `tensors` in this order."""
    start = 9  # modulo 64
    header: dict[str, object] = {"__metadata__": {"format": "np"}}
    places: dict[str, tuple[int, int, np.dtype]] = {}
    at = pads = 0
    for name, spec in tensors.items():
        dtype = DTYPES[spec.dtype]
        gap = -(start + at) % ALIGNMENT
        if gap:
            header[f"{PAD}{pads}__"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            pads, at = pads + 1, at + gap
        nbytes = math.prod(spec.shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype.name], "shape": spec.shape, "data_offsets": [at, at + nbytes]}
        places[name] = (at, nbytes, dtype)
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((1 - len(text)) % 256)
    head = struct.pack("<Q", len(text)) + text
    infos = {
        name: TensorInfo(tensors[name].shape, dtype, len(head) + offset, nbytes)
        for name, (offset, nbytes, dtype) in places.items()
    }
    return Layout(len(head) + at, ((0, head),), infos)
