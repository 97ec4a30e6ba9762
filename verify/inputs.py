"""Whether a candidate's own processor makes of a prompt what the reference's does.

Both sides of a case get the reference's inputs, so that the network alone is judged by them. What the candidate's
tokenizer, chat format and picture settings make of the same prompts and pictures is held against these here.

The reference's pixels come from :class:`PlainPictures`, not from the image processor, so a mistake in that shows too. The
suite's pictures have the size of whole blocks: scaling and padding take no part in them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from ..modeling.settings import PROCESSOR
from .cases import Case, CaseError, Plan, Source, build

TAP = "inputs"
# Of pixels near 1 that three operations in fp32 made. One step of a picture's 255 is 8e-3.
ROUNDING = 1e-6


def own_source(candidate: Any, reference: Source) -> Source | None:
    """What makes the suite's inputs with the candidate's processor; None where either side's come from none.

    Raises:
        CaseError: the reference has a processor and the candidate, which should, has not.
    """
    reference = getattr(reference, "others", reference)  # a user's own prompts are not the suite's
    if not hasattr(candidate, "own_source") or not hasattr(reference, "processor"):
        return None
    own = candidate.own_source()
    if own is None:
        raise CaseError(
            f"--candidate: {candidate.name} has no tokenizer files, the reference has; convert the checkpoint again"
        )
    return own


def compared_inputs(plan: Plan, case: Case, own: Source) -> dict[str, Any]:
    """How the inputs of a case differ from what `own` makes of its rows.

    Returns:
        `places`, tokens and patches; `wrong`, the differing ones, of which `tokens_wrong` (ids or mask) and
        `patches_wrong` (a pixel by more than :data:`ROUNDING`, or a grid); all of a kind whose number differs.
        `raised` is the message of a processor that refused.
    """
    tokens, patches = case.inputs["input_ids"].size, len(case.inputs.get("pixel_values", ()))
    try:
        made = build(replace(plan, rows=case.rows), own, case.seed).inputs
        tokens_wrong, patches_wrong, raised = _tokens(case.inputs, made), _patches(case.inputs, made), None
    except ValueError as e:
        tokens_wrong, patches_wrong, raised = tokens, patches, str(e)
    return {
        "places": tokens + patches,
        "wrong": tokens_wrong + patches_wrong,
        "tokens_wrong": tokens_wrong,
        "patches_wrong": patches_wrong,
        "raised": raised,
    }


def _tokens(reference: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> int:
    names = ("input_ids", "attention_mask")
    if any(reference[name].shape != own[name].shape for name in names):
        return reference["input_ids"].size
    return int(np.logical_or.reduce([reference[name] != own[name] for name in names]).sum())


def _patches(reference: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> int:
    if "pixel_values" not in reference:
        return 0
    pixels = reference["pixel_values"]
    same = np.array_equal(reference["image_grid_hws"], own["image_grid_hws"])
    if not same or own["pixel_values"].shape != pixels.shape:
        return len(pixels)
    return int((np.abs(own["pixel_values"] - pixels) > ROUNDING).any((1, 2, 3)).sum())


class PlainPictures:
    """What the published image processor makes of pictures that need neither scaling nor padding, patch by patch in fp64.

    Raises:
        CaseError: a picture does need it.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        settings = json.loads((directory / PROCESSOR).read_text(encoding="utf-8"))
        self.mean, self.std = (np.array(settings[name]) for name in ("image_mean", "image_std"))
        self.patch, self.block = config.vision.patch_size, config.vision.merge_kernel_size
        self.tokens_area = self.block[0] * self.block[1]  # patches of a token, as the processor asks for it

    def __call__(self, pictures: Sequence[Any]) -> dict[str, np.ndarray]:
        patches, grids = [], []
        for picture in pictures:
            (h, over_h), (w, over_w) = divmod(picture.height, self.patch), divmod(picture.width, self.patch)
            if over_h or over_w or h % self.block[0] or w % self.block[1]:
                raise CaseError(f"a picture of {picture.size} pixels is not of whole blocks of patches")
            colours = (np.asarray(picture.convert("RGB")) / 255 - self.mean) / self.std  # (h * p, w * p, 3)
            for top in range(0, h * self.patch, self.patch):
                for left in range(0, w * self.patch, self.patch):
                    patch = colours[top : top + self.patch, left : left + self.patch]
                    patches.append(np.moveaxis(patch, 2, 0))
            grids.append((h, w))
        return {
            "pixel_values": np.array(patches, np.float32),
            "image_grid_hws": np.array(grids, np.int64),
        }
