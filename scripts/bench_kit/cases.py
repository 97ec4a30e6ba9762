"""What is measured: cases, and the inputs that both sides get.

Inputs depend on the case and the turn alone. Each turn has other tokens, because the same ones would find their experts in
the processor's cache.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kimi_vl.modeling.configuration import ModelConfig

DECODE, PREFILL, VISION, HEAD, ANSWER = "decode", "prefill", "vision", "head", "answer"
DEFAULT = (
    "decode-512", "decode-4096", "decode-32768", "decode-512x4", "head-1",
    "prefill-64", "prefill-256", "prefill-1024", "prefill-4096", "prefill-256x4",
    "vision-1024", "vision-4096", "answer-256",
)  # fmt: skip
PICTURE = (32, 32)  # patches of the picture in an answer's prompt
NEW_TOKENS = 9  # of an answer
_NAME = re.compile(rf"({DECODE}|{PREFILL}|{VISION}|{HEAD}|{ANSWER})-([1-9]\d*)(?:x([1-9]\d*))?")


@dataclass(frozen=True)
class Case:
    """One thing that both sides do.

    Attributes:
        kind: "decode", one token that sees `size` tokens, itself included; "prefill", a prompt of `size` tokens into an
            empty cache, logits of the last; "vision", a picture of `size` patches, projector included; "head", the final
            norm and the logits of `size` tokens; "answer", a prompt of `size` tokens and a picture, answered greedily
            through the public `generate`.
        batch: rows of the batch.
    """

    kind: str
    size: int
    batch: int = 1

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case that is called so, "decode-512" or with a batch "decode-512x4". Raises ValueError: there is none."""
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"--cases: {name!r} is no case; expected something like {DEFAULT[0]} or {DEFAULT[3]}"
            )
        case = cls(found[1], int(found[2]), int(found[3] or 1))
        if case.batch > 1 and case.kind not in (DECODE, PREFILL):
            raise ValueError(f"--cases: {name}: only decode and prefill take batches")
        if case.kind == VISION and case.size % 4:
            raise ValueError(f"--cases: {name}: a picture has a multiple of 4 patches")
        return case

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}" + (f"x{self.batch}" if self.batch > 1 else "")

    @property
    def cached(self) -> int:
        """Tokens in a row's cache before the case runs."""
        return self.size - 1 if self.kind == DECODE else 0

    @property
    def fed(self) -> int:
        """Tokens of each row that it runs, in a decode or prefill case."""
        return self.size - self.cached

    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's patches, as square as even numbers allow."""
        quarter = self.size // 4
        rows = max(n for n in range(1, math.isqrt(quarter) + 1) if quarter % n == 0)
        return 2 * rows, 2 * (quarter // rows)

    # Inputs ------------------------------------------------------------------------------------------------------

    def tokens(self, config: ModelConfig, turn: int) -> np.ndarray:
        """Ids [batch, fed] of a turn, without media tokens."""
        ids = self._random(turn).integers(0, config.text.vocab_size, (self.batch, self.fed))
        return np.where(ids == config.media_placeholder_token_id, 0, ids)

    def latents(self, config: ModelConfig, layer: int) -> np.ndarray:
        """A layer's cached rows [batch, cached, latent + rope]: normed latents, and keys as if rotated."""
        shape = (self.batch, self.cached, config.text.latent_dim)
        return self._random(-1 - layer).standard_normal(shape, np.float32)

    def hidden(self, config: ModelConfig, turn: int) -> np.ndarray:
        """The last layer's output [1, size, H]."""
        return self._random(turn).standard_normal((1, self.size, config.text.hidden_size), np.float32)

    def picture(self, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        """Patches [N, 3, p, p] and their grid [1, 2]."""
        h, w = PICTURE if self.kind == ANSWER else self.grid()
        p = config.vision.patch_size
        pixels = self._random(0).uniform(-1, 1, (h * w, 3, p, p)).astype(np.float32)
        return pixels, np.array([[h, w]])

    def prompt(self, config: ModelConfig, turn: int) -> dict[str, np.ndarray]:
        """An answer's inputs: the picture's media tokens, then `size` others."""
        pixels, grids = self.picture(config)
        media = len(pixels) // math.prod(config.vision.merge_kernel_size)
        ids = np.concatenate(
            [np.full((1, media), config.media_placeholder_token_id), self.tokens(config, turn)], 1
        )
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "pixel_values": pixels,
            "image_grid_hws": grids,
        }

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(str(self).encode()), what % 2**32])


def largest_context(cases: Iterable[Case], config: ModelConfig) -> int:
    """Tokens that the largest of these cases holds in a cache."""
    media = math.prod(PICTURE) // math.prod(config.vision.merge_kernel_size)
    sizes = [
        c.size + (media + NEW_TOKENS if c.kind == ANSWER else 0)
        for c in cases
        if c.kind not in (VISION, HEAD)
    ]
    return max(sizes, default=1)


def largest_picture(cases: Iterable[Case]) -> int:
    """Patches of the largest picture in these cases."""
    sizes = [math.prod(PICTURE) if c.kind == ANSWER else c.size for c in cases if c.kind in (VISION, ANSWER)]
    return max(sizes, default=4)


class Clock:
    """A streamer that notes when tokens come; both sides' `generate` take it."""

    def __init__(self) -> None:
        self.start = 0.0
        self.times: list[float] = []

    def put(self, value: object) -> None:
        import time

        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
