"""The C++ operators for CPUs as a shared library: where it is, whether it can be used, and its settings.

It is built when the package is installed (`setup.py`) and lies beside this file. Nothing is compiled or loaded by an
import: the first call that wants to know loads the library, once. `KIMI_VL_KERNELS=off` keeps it out, and with
`KIMI_VL_KERNELS=exact` no product rounds its input, see :func:`set_exact`.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .cores import thread_count

SWITCH = "KIMI_VL_KERNELS"
VERSION = 4  # of what cpu.py and the library know of each other: kimi_version() in native/operators.cc

# The library's functions beside its operators: result, arguments.
SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "threads": (ctypes.c_int, ()),
    "set_threads": (None, (ctypes.c_int,)),
    "isa": (ctypes.c_char_p, ()),
    "set_isa": (ctypes.c_int, (ctypes.c_char_p,)),
    "onednn": (ctypes.c_char_p, ()),
    "can_round": (ctypes.c_int, ()),
    "rounds": (ctypes.c_int, ()),
    "exact": (ctypes.c_int, ()),
    "set_exact": (None, (ctypes.c_int,)),
}


class Unusable(RuntimeError):
    """Why there are no operators, and what to do."""


def path() -> Path:
    """Where the library is, or would be."""
    return Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))


def built() -> bool:
    """Whether there is a library and it is not switched off; answers at once, without loading it or MindSpore.

    Raises:
        ValueError: KIMI_VL_KERNELS is none of "on", "off" and "exact".
    """
    return not switched_off() and path().exists()


def switched_off() -> bool:
    return _switch() == "off"


def available() -> bool:
    """Whether the operators can be used.

    Raises:
        ValueError: KIMI_VL_KERNELS is none of "on", "off" and "exact".
    """
    return why_not() is None


def why_not() -> str | None:
    """Why the operators cannot be used, and what to do; None if they can."""
    if switched_off():
        return f"switched off by {SWITCH}=off; plain graphs are used, which are slower"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def describe() -> str:
    """One line for the log."""
    reason = why_not()
    if reason is not None:
        return f"CPU operators: {reason}"
    return f"CPU operators: {isa()}, {onednn()}, {threads()} thread{'s' if threads() != 1 else ''}"


def threads() -> int:
    """Threads that share an operator's work."""
    return _library().kimi_threads()


def set_threads(count: int) -> None:
    if count < 1:
        raise ValueError(f"CPU operators: {count} threads were asked for, at least 1 is needed")
    _library().kimi_set_threads(count)


def isa() -> str:
    """The instruction set in use: "plain", "avx2", "avx512", "avx512_bf16" or "amx"; at first the machine's best."""
    return _library().kimi_isa().decode()


def set_isa(name: str) -> None:
    if not _library().kimi_set_isa(name.encode()):
        raise ValueError(
            f"CPU operators: this machine has no instruction set {name!r}; its best is found by itself"
        )


def onednn() -> str:
    """The version of MindSpore's oneDNN, or why none is used."""
    return _library().kimi_onednn().decode()


def can_round() -> bool:
    """Whether this machine has instructions for bf16, so that products of many rows round their input to bf16 where their
    weights are bf16, unless :func:`set_exact` forbids it.
    """
    return bool(_library().kimi_can_round())


def rounds() -> bool:
    """Whether they do so now."""
    return bool(_library().kimi_rounds())


def set_exact(exact: bool) -> None:
    """Whether products of many rows stay in fp32 where they would round their input to bf16: slower, and what is to be held
    against fp32 arithmetic on the same weights.
    """
    _library().kimi_set_exact(exact)


@contextmanager
def exactly(exact: bool) -> Iterator[None]:
    """Sets :func:`set_exact` for a while, where there is a library."""
    if not available():
        yield
        return
    before = bool(_library().kimi_exact())
    set_exact(exact)
    try:
        yield
    finally:
        set_exact(before)


def _library() -> ctypes.CDLL:
    if reason := why_not():
        raise Unusable(f"CPU operators: {reason}")
    loaded = _load()
    assert not isinstance(loaded, str)
    return loaded


def _switch() -> str:
    wanted = os.environ.get(SWITCH, "on")
    if wanted not in ("on", "off", "exact"):
        raise ValueError(f"{SWITCH} is {wanted!r}, expected on, off or exact")
    return wanted


@cache
def _load() -> ctypes.CDLL | str:
    """The library, ready for use, or why there is none."""
    file = path()
    if not file.exists():
        return (
            "not built (no C++ compiler at install); plain graphs are used, which are slower; "
            "install a compiler and reinstall"
        )
    # The library takes MindSpore's oneDNN from the process, and no other.
    import mindspore  # noqa: F401

    try:
        library = ctypes.CDLL(str(file))
        version = library.kimi_version()
    except (OSError, AttributeError) as error:
        return f"{file.name} cannot be loaded ({error}); plain graphs are used, which are slower; reinstall"
    if version != VERSION:
        return f"{file.name} has version {version}, expected {VERSION}; plain graphs are used, which are slower; reinstall"
    for name, (result, arguments) in SETTINGS.items():
        function = getattr(library, f"kimi_{name}", None)
        if function is None:
            return f"{file.name} has no kimi_{name}; plain graphs are used, which are slower; reinstall"
        function.restype, function.argtypes = result, arguments
    library.kimi_set_threads(thread_count())
    library.kimi_set_exact(_switch() == "exact")
    return library
