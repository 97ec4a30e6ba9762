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

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kimi_vl": "kimi_vl",
    **{room: f"kimi_vl/{room}" for room in ("modeling", "convert", "export", "verify")},
}
TORCH = ("torch", "torchgen", "functorch", "matplotlib", "tiktoken")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as by `pip install .`, from a copy: a folder `build` of an earlier version would be taken up."""
    pytest.importorskip("build")
    room = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, room / name)
    for name in ROOMS:
        shutil.copytree(ROOT / name, room / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", room / "dist", room]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (room / "dist").iterdir()
    return made


def test_a_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: Path) -> None:
    wanted = {
        f"{place}/{path.relative_to(ROOT / room).as_posix()}"
        for room, place in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "kimi_vl/nano/tiktoken.model",
        "kimi_vl/verify/templates/report.html.j2",
        "kimi_vl/export/templates/lite.ini",
    } < wanted
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert held == wanted
    for command in ("convert-weights", "export-mindir", "inspect-mindir", "verify-parity"):
        assert f"{command} = kimi_vl." in entries
    assert wheel.stat().st_size < 5e6


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
def test_what_only_verification_needs_may_be_missing(wheel: Path, tmp_path: Path) -> None:
    """As after `pip install .`, without the extra `verify`."""
    installed = Installed(wheel, tmp_path, without=TORCH)
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
