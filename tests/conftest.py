"""Shared by all tests."""

import os

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
# The C++ operators do not round what they multiply, so that all is held against fp32; tests of the rounding switch it on.
os.environ.setdefault("KIMI_VL_KERNELS", "exact")


@pytest.fixture(scope="module")
def one_torch_thread():
    """Small products are quicker so, above all where other programs run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_memory_of_what_was_checked(tmp_path_factory):
    """The user's cache directory is left alone."""
    from kimi_vl.export import verified

    path = tmp_path_factory.mktemp("verified")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "directory", lambda: path)
        yield


@pytest.fixture
def untraced(monkeypatch):
    """A dry run traces no graph to find the memory that a device needs, which takes seconds; the figures are made up."""
    from kimi_vl.export.memory import DeviceMemory

    made_up = DeviceMemory(weights=1, caches=1, live=1, graph="decode")
    monkeypatch.setattr("kimi_vl.export.cli.estimate", lambda plan: made_up)
