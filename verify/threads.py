"""How many threads Torch computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Below this width, threads wait for each other longer than they compute; many times longer on a busy machine.
_ONE_THREAD_WIDTH = 512


@contextlib.contextmanager
def suited_to(width: int) -> Iterator[None]:
    """One thread for a network of a small hidden size, else as many as before."""
    before = torch.get_num_threads()
    if width < _ONE_THREAD_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
