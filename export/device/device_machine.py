"""The machine that a ladder stands on: what rungs work with, and the rungs that need no graph.

What an item of a rung gives: `ok`; `says`, one sentence; and where it has them `figures` (tap -> metric -> value), `answer`
(what a question is answered by), `milliseconds`, `memory`, `observed` (arrays, for whoever judges again).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from device_graphs import DeviceBundle, DeviceGraphs
from device_pack import Pack, PackError, file_hash, read_pack

Items = list[tuple[str, Callable[[], dict]]]


class Skipped(Exception):
    """A rung has nothing to do here; the message says why."""


class Context:
    """What rungs work on."""

    def __init__(self, directory: Path, pack: str | None, device: str) -> None:
        self.bundle = DeviceBundle(directory)
        self.device = device
        self.pack_path = pack
        self._graphs: DeviceGraphs | None = None

    def mindspore(self) -> Any:
        """MindSpore, set to the device."""
        import mindspore as ms

        if ms.get_context("device_target") != self.device:
            ms.set_device(self.device)
        return ms

    @property
    def graphs(self) -> DeviceGraphs:
        if self._graphs is None:
            self.mindspore()
            self._graphs = DeviceGraphs(self.bundle)
        return self._graphs

    def pack(self) -> Pack:
        """The pack, which must be for this bundle. Raises Skipped: there is none, or it is not."""
        if self.pack_path is None:
            raise Skipped("no golden pack was given; record one with verify-parity record and give --pack")
        try:
            pack = read_pack(Path(self.pack_path))
            pack.require_bundle(self.bundle.directory)
        except PackError as e:
            raise Skipped(f"the pack cannot be used: {e}") from None
        return pack

    def forget(self) -> None:
        """After a failed kernel: the next item loads its graphs anew."""
        if self._graphs is not None:
            self._graphs.forget()


def good(says: str, **more: Any) -> dict:
    return {"ok": True, "says": says, **more}


def bad(says: str, **more: Any) -> dict:
    return {"ok": False, "says": says, **more}


# ---- the machine ----------------------------------------------------------------------------------------------------


def environment(context: Context) -> Items:
    return [("host", _host), ("packages", _packages), ("CANN", _cann), ("driver", _driver)]


def _host() -> dict:
    memory = {line.split(":")[0]: line.split()[1] for line in _lines("/proc/meminfo")}
    total, free = (int(memory.get(k, 0)) / 1e6 for k in ("MemTotal", "MemAvailable"))
    return good(
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {total:.0f} GB of memory, "
        f"{free:.0f} GB free"
    )


def _packages() -> dict:
    found = {}
    for name in ("mindspore", "numpy", "protobuf", "ml_dtypes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return good(", ".join(f"{k} {v}" for k, v in found.items()), answer=found)


def _cann() -> dict:
    homes = [os.environ.get(k) for k in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    for home in [*filter(None, homes), "/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/latest"]:
        for place in (Path(home), *Path(home).glob("*-linux")):
            for file in ("ascend_toolkit_install.info", "version.cfg", "version.info"):
                for line in _lines(place / file):
                    if "version=" in line.lower():
                        return good(line.strip(), answer=line.strip())
    return good("not found", answer=None)


def _driver() -> dict:
    command = shutil.which("npu-smi")
    if command is None:
        return good("there is no npu-smi", answer=None)
    done = subprocess.run([command, "info"], capture_output=True, text=True, timeout=60)
    return good("npu-smi info", answer=done.stdout[-4000:])


def _lines(path: Any) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def files(context: Context) -> Items:
    """Sizes as bundle.json has them; with a pack also the content."""
    manifest = context.bundle.manifest
    sizes = {g["file"]: g["nbytes"] for g in manifest["graphs"].values()}
    sizes |= {n: r["nbytes"] for part in ("shards", "files") for n, r in manifest[part].items()}
    try:
        hashes = context.pack().index["bundle"]["files"]
    except Skipped:
        hashes = {}

    def check(name: str) -> dict:
        path = context.bundle.directory / name
        if not path.is_file():
            return bad(f"{name} is missing; copy the bundle again")
        if path.stat().st_size != sizes[name]:
            return bad(
                f"{name} has {path.stat().st_size} bytes, bundle.json has {sizes[name]}; copy the bundle again"
            )
        if hashes and file_hash(path) != hashes.get(name):
            return bad(f"{name} is not the file that the pack was recorded for; copy the bundle again")
        return good("as recorded" if hashes else "size as in bundle.json")

    return [(name, partial(check, name)) for name in sizes]


def pack(context: Context) -> Items:
    if context.pack_path is None:
        context.pack()

    def check() -> dict:
        try:
            found = context.pack()
        except Skipped as e:
            return bad(str(e))
        return good(f"{len(found.cases)} cases, digest {found.digest[:12]}", answer=found.digest)

    return [(Path(context.pack_path or "").name, check)]


def imported(context: Context) -> Items:
    def check() -> dict:
        import mindspore as ms

        made_by = context.bundle.manifest["mindspore"]
        same = "which" if ms.__version__ == made_by else f"and {made_by}"
        return good(f"MindSpore {ms.__version__} is imported, {same} wrote the graphs", answer=ms.__version__)

    return [("mindspore", check)]


def device(context: Context) -> Items:
    def check() -> dict:
        ms = context.mindspore()
        total = (
            ms.ops.Add()(ms.Tensor(np.arange(4, dtype=np.float32)), ms.Tensor(np.ones(4, np.float32)))
            .asnumpy()
            .sum()
        )
        target = str(ms.get_context("device_target"))
        name = "CPU" if target == "CPU" else str(ms.hal.get_device_name(0))
        kept = {"target": target, "name": name, "mindspore": ms.__version__}
        if total != 10:
            return bad(f"{name} adds 1 to 0, 1, 2, 3 and gives a sum of {total}", answer=kept)
        return good(f"{target}: {name}", answer=kept, memory=memory())

    return [(context.device, check)]


def memory() -> dict[str, float | None]:
    """MB: resident on the host, of that not backed by files, and allocated on the device."""
    import mindspore as ms

    found: dict[str, float | None] = {"host": None, "host_private": None, "device": None}
    for line in _lines("/proc/self/status"):
        key = {"VmRSS": "host", "RssAnon": "host_private"}.get(line.partition(":")[0])
        if key:
            found[key] = round(int(line.split()[1]) / 1e3, 1)
    if ms.get_context("device_target") != "CPU":
        found["device"] = round(ms.runtime.memory_allocated() / 1e6, 1)
    return found
