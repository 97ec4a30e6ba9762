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


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request, rounding):
    """An instruction set that the C++ operators use during the test; skipped where the machine lacks it."""
    import native

    library = native.library()
    before = library.kimi_isa()
    if not library.kimi_set_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.kimi_set_isa(before)


def _exactly(exact: bool):
    import native

    before = native.library().kimi_exact()
    native.library().kimi_set_exact(exact)
    yield
    native.library().kimi_set_exact(before)


@pytest.fixture
def exact():
    """The C++ operators round no input during the test."""
    yield from _exactly(True)


@pytest.fixture
def rounding():
    """The C++ operators round their inputs during the test, as they do by default."""
    yield from _exactly(False)
