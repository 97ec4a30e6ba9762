"""The library of C++ operators: found and loaded, or a sentence about why it is not used."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_vl.modeling.kernels import library

built = pytest.mark.skipif(not library.path().exists(), reason="there was no C++ compiler at install")


@pytest.fixture(autouse=True)
def not_loaded_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(library.SWITCH, raising=False)
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@built
def test_a_loaded_library_describes_itself(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert library.available() and library.why_not() is None
    assert re.fullmatch(
        r"CPU operators: (plain|avx2|avx512|avx512_bf16|amx), oneDNN (3[.\d]+|2 is not used), 2 threads",
        library.describe(),
    )


@built
def test_settings_are_kept_and_bad_ones_refused() -> None:
    best, threads = library.isa(), library.threads()
    try:
        library.set_threads(3)
        library.set_isa("plain")
        assert (library.threads(), library.isa(), library.rounds()) == (3, "plain", False)
        with pytest.raises(ValueError, match="no instruction set 'sse9'"):
            library.set_isa("sse9")
        with pytest.raises(ValueError, match="0 threads were asked for, at least 1 is needed"):
            library.set_threads(0)
        assert (library.threads(), library.isa()) == (3, "plain")
    finally:
        library.set_isa(best)
        library.set_threads(threads)


@built
def test_exact_arithmetic_does_not_round() -> None:
    with library.exactly(False):
        has_instructions = library.isa() in ("avx512_bf16", "amx")
        used = library.onednn().startswith("oneDNN 3")
        assert library.rounds() == library.can_round() == (has_instructions and used)
        with library.exactly(True):
            assert not library.rounds()
        assert library.rounds() == library.can_round()


@built
@pytest.mark.parametrize("value", ["on", None])
def test_the_switch_is_on_where_nobody_touched_it(monkeypatch, value: str | None) -> None:
    if value:
        monkeypatch.setenv(library.SWITCH, value)
    assert library.available()


def test_the_switch_keeps_the_library_out(monkeypatch) -> None:
    monkeypatch.setenv(library.SWITCH, "off")
    assert not library.available()
    assert library.describe() == (
        "CPU operators: switched off by KIMI_VL_KERNELS=off; plain graphs are used, which are slower"
    )
    with pytest.raises(library.Unusable, match="switched off by KIMI_VL_KERNELS=off"):
        library.isa()


@pytest.mark.parametrize("value", ["", "0", "OFF", "true"])
def test_the_switch_has_two_values(monkeypatch, value: str) -> None:
    monkeypatch.setenv(library.SWITCH, value)
    with pytest.raises(ValueError, match=f"^KIMI_VL_KERNELS is {value!r}, expected on, off or exact$"):
        library.available()


def test_without_the_library_the_line_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "path", lambda: tmp_path / "_native.so")
    assert not library.available()
    assert library.describe() == (
        "CPU operators: not built (no C++ compiler at install); plain graphs are used, which are slower; "
        "install a compiler and reinstall"
    )


def test_a_damaged_library_is_not_used(monkeypatch, tmp_path: Path) -> None:
    damaged = tmp_path / "_native.so"
    damaged.write_text("not a library")
    monkeypatch.setattr(library, "path", lambda: damaged)
    assert re.fullmatch(
        r"_native\.so cannot be loaded \(.+\); plain graphs .+; reinstall", library.why_not() or ""
    )


@built
def test_a_library_of_another_version_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    assert f"has version {library.VERSION - 1}, expected {library.VERSION}; " in (library.why_not() or "")
    with pytest.raises(library.Unusable, match="reinstall"):
        library.threads()


def test_an_import_loads_nothing() -> None:
    script = "import sys; from kimi_vl.modeling.kernels import library; print('mindspore' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
