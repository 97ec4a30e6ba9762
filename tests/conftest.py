"""Shared by all tests."""

import os

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only


@pytest.fixture(scope="module")
def one_torch_thread():
    """Small products are quicker so, above all where other programs run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
