"""What a bundle carries to be judged on a machine that has neither Torch nor this package.

These modules are copied into bundles and run from there as plain files, so they import one another by name; numpy and,
where a graph runs, MindSpore is all that they need. ``device_pack``, ``device_play`` and ``device_report`` are used by
``verify`` too: what writes a golden pack and judges a report reads and plays it with the same code.
"""

from __future__ import annotations

from pathlib import Path

TARGETS = ("cpu", "ascend")  # whose graphs `mindspore.load` reads


def scripts(target: str) -> dict[str, Path]:
    """The files that a bundle of a target carries, by name, and where they are; `run_on_device.py` is the one to start."""
    if target not in TARGETS:
        return {}
    return {
        path.name: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name != "__init__.py"
    }
