"""The package as others get it: what a wheel holds, and that it works where there is no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from kimi_vl.modeling.kernels import library

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kimi_vl": "kimi_vl",
    **{room: f"kimi_vl/{room}" for room in ("modeling", "convert", "export", "verify")},
}
TORCH = ("torch", "torchgen", "functorch", "matplotlib", "tiktoken")


NATIVE = "modeling/kernels/native"
DESCRIBE = "from kimi_vl.modeling.kernels import library; print(library.describe())"


def build_wheel(room: Path, **environment: str) -> Path:
    """As `pip install .` does, by way of an sdist, from a copy: a folder `build` of an earlier version would be taken up."""
    pytest.importorskip("build")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, room / name)
    for name in ROOMS:
        shutil.copytree(ROOT / name, room / name, ignore=shutil.ignore_patterns("__pycache__", "_native*"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", room / "dist", room]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (room / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no compiler works."""
    return build_wheel(tmp_path_factory.mktemp("plain_wheel"), CC="false", CXX="false")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the library of C++ operators."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C++ compiler")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def files_of_the_rooms() -> set[str]:
    """All but the sources of the library, and the library of this clone."""
    return {
        f"{place}/{path.relative_to(ROOT / room).as_posix()}"
        for room, place in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.is_relative_to(ROOT / NATIVE)
        and not path.name.startswith("_native")
    }


def test_a_wheel_holds_every_file_of_the_rooms_and_nothing_else(plain_wheel: Path) -> None:
    wanted = files_of_the_rooms()
    assert {
        "kimi_vl/nano/tiktoken.model",
        "kimi_vl/verify/templates/report.html.j2",
        "kimi_vl/export/templates/lite.ini",
    } < wanted
    assert files_in(plain_wheel) == wanted
    with zipfile.ZipFile(plain_wheel) as archive:
        (entries,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    for command in ("convert-weights", "export-mindir", "inspect-mindir", "verify-parity"):
        assert f"{command} = kimi_vl." in entries
    assert plain_wheel.stat().st_size < 5e6


@pytest.mark.slow
def test_with_a_compiler_a_wheel_holds_the_library_too(wheel: Path) -> None:
    assert files_in(wheel) - files_of_the_rooms() == {f"kimi_vl/modeling/kernels/{library.path().name}"}
    assert files_of_the_rooms() < files_in(wheel)


class Installed:
    """The wheel in an environment of its own, which borrows its dependencies from this one."""

    def __init__(self, wheel: Path, room: Path, without: Iterable[str] = ()) -> None:
        borrowed, self.cwd, self.bin = room / "borrowed", room / "elsewhere", room / "venv" / "bin"
        borrowed.mkdir()
        self.cwd.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", room / "venv"], check=True)
        ours = ("kimi_vl", "__editable__", *without)
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(tuple(ours)):
                (borrowed / path.name).symlink_to(path)
        pip = [sys.executable, "-m", "pip", "-q", "--python", self.bin / "python"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
        where = self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(where.stdout.strip(), "borrowed.pth").write_text(f"{borrowed}\n")

    def run(self, command: str, *arguments: object) -> subprocess.CompletedProcess:
        """A command of the environment, in a working directory that has nothing to do with the clone."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"GLOG_v": "3"}
        call = [self.bin / command, *map(str, arguments)]
        return subprocess.run(call, cwd=self.cwd, env=environment, capture_output=True, text=True)

    def passes(self, command: str, *arguments: object) -> str:
        done = self.run(command, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def convert_and_export(self, *more: str) -> None:
        sizes = ("--seq", 256, "--prefill-chunk", 64, "--image-patches", 128, "--target", "cpu")
        self.passes("convert-weights", "--src", "nano", "--dst", "ckpt")
        self.passes("export-mindir", "--src", "ckpt", "--dst", "mindir", *sizes, *more)


@pytest.mark.slow
def test_an_installed_wheel_converts_exports_and_verifies(wheel: Path, tmp_path: Path) -> None:
    installed = Installed(wheel, tmp_path)
    nano = installed.passes("python", "-c", "import kimi_vl; print(kimi_vl.nano_path())").strip()
    assert Path(nano).is_relative_to(tmp_path / "venv")
    assert "thread" in installed.passes("python", "-c", DESCRIBE)
    installed.convert_and_export("--taps")
    shown = installed.passes(
        "verify-parity",
        "--reference",
        "nano",
        "--candidate",
        "mindir",
        "--cases",
        "quick",
        "--report",
        "report",
    )
    assert "reference: nano\n" in shown and "PASSED" in shown
    assert (installed.cwd / "report" / "report.html").is_file()
    installed.passes("convert-weights", "--reverse", "--src", "ckpt", "--dst", "back")
    for shard in Path(nano).glob("*.safetensors"):
        assert (installed.cwd / "back" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_what_only_verification_needs_and_the_library_may_be_missing(
    plain_wheel: Path, tmp_path: Path
) -> None:
    """As after `pip install .`, without the extra `verify`, where there is no compiler."""
    installed = Installed(plain_wheel, tmp_path, without=TORCH)
    assert "not built" in installed.passes("python", "-c", DESCRIBE)
    assert installed.run("python", "-c", "import torch").returncode != 0
    installed.convert_and_export()
    question = ("--image", ROOT / "kimi_vl" / "nano" / "demo.png", "--prompt", "Describe the picture.")
    for model in ("nano", "mindir"):
        answer = installed.passes("python", ROOT / "scripts" / "generate.py", "--model", model, *question)
        assert "a yellow circle, an orange cross" in answer
    done = installed.run(
        "verify-parity", "--reference", "nano", "--candidate", "mindir", "--report", "report"
    )
    assert done.returncode == 3 and "pip install 'kimi-vl[verify]'" in done.stderr
