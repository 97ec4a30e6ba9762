"""The bundles that faults are made in: small, of two context lengths, with graphs with taps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_vl.convert import convert
from kimi_vl.export import export, plan_export
from kimi_vl.export.plan import open_converted

SIZES: dict[str, Any] = {"seq": (128, 256), "prefill_chunk": 64, "taps": True}


def export_for(published: Path, targets: list[str], room: Path) -> dict[str, Path]:
    """A bundle of a published checkpoint for each target, under `room`; and, as "converted", what they link to."""
    made = {"converted": room / "converted"}
    convert(published, made["converted"])
    source = open_converted(made["converted"])
    patches = (64, 128) if max(source.config.vision.init_pos_emb_height, 1) > 8 else (64,)
    for target in targets:
        made[target] = room / target
        export(plan_export(source, target=target, image_patches=patches, **SIZES), made[target])
    return made
