"""Long thin pictures, as far as the published processor goes, against the Torch reference."""

from __future__ import annotations

import numpy as np
import pytest
from golden import DATA, rel_l2
from PIL import Image

from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLImageProcessor
from kimi_vl.modeling.buckets import TooLongError, largest_image, patch_buckets, pick
from kimi_vl.modeling.forward import InputError

pytest.importorskip("torch")

TINY = DATA / "tiny8-fp32"
MEDIA = 765

# A limit of the published processors, pixels (width, height) of a picture, and the patches (rows, columns) it gives.
PICTURES = {
    "2x510": (4096, (510 * 14, 1), (2, 510)),
    "8x510": (4096, (510 * 14, 8 * 14), (8, 510)),
    "510x8": (4096, (8 * 14, 510 * 14), (510, 8)),
    "12x442": (4096, (6617, 152), (12, 442)),  # scaled to the limit, then padded beyond it: the most of all
    "442x12": (4096, (152, 6617), (442, 12)),
    "36x492": (16384, (6981, 485), (36, 492)),  # the most of all at that limit
}
BUCKETS = {4096: 5376, 16384: 18432}
FAST = ("510x8", "12x442")


@pytest.fixture(scope="module")
def model():
    """With the vision graphs of limit 4096. A prompt is one chunk, so there is one text graph."""
    return load(4096, context=2048, chunk=1536)


def load(limit: int, context: int, chunk: int) -> KimiVLForConditionalGeneration:
    config = KimiVLConfig.from_pretrained(TINY)
    config.text_config.max_position_embeddings = max(4096, context)
    return KimiVLForConditionalGeneration.from_pretrained(
        TINY, config=config, max_context=context, prefill_chunk=chunk, max_image_patches=largest_image(limit)
    )


@pytest.fixture(scope="module")
def oracle():
    from kimi_vl.verify.oracle import build_oracle

    oracle = build_oracle(TINY)
    # Eager attention holds all heads' scores of all patches: gigabytes.
    oracle.network.model.vision_tower.set_attn_implementation("sdpa")
    return oracle


def prompt(name: str) -> dict[str, np.ndarray]:
    """A question about a picture of noise."""
    limit, (width, height), grid = PICTURES[name]
    noise = np.random.default_rng(6).integers(0, 256, (height, width, 3), np.uint8)
    given = KimiVLImageProcessor(in_token_limit=limit)(Image.fromarray(noise))
    assert given["image_grid_hws"].tolist() == [list(grid)]
    ids = np.array([[1, 2, *[MEDIA] * (grid[0] * grid[1] // 4), 3, 4]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **given}


def check(model, oracle, name: str) -> None:
    given = prompt(name)
    want = oracle.run(given)
    out = model(**given)
    assert rel_l2(out.image_hidden_states.asnumpy(), want["projector_out"]) <= 1e-5
    assert rel_l2(out.logits.asnumpy(), want["logits"]) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in FAST else pytest.mark.slow)
        for n, (limit, *_) in PICTURES.items()
        if limit == 4096
    ],
)
def test_equals_torch(model, oracle, name):
    check(model, oracle, name)


@pytest.mark.slow
def test_equals_torch_at_the_limit_of_16384(oracle):
    check(load(16384, context=4608, chunk=4608), oracle, "36x492")


def test_padding_changes_nothing_whatever_it_holds(model):
    """In graphs whose attention runs in several blocks."""
    given, (h, w) = prompt("510x8"), (510, 8)
    engine = model.engine

    def features(bucket: int, garbage: float) -> np.ndarray:
        inputs = engine.vision_inputs(given["pixel_values"], h, w, bucket)
        for name in ("patches", "tap_weights", "cos", "sin"):
            inputs[name][h * w :] = garbage
        return engine.graphs.vision(bucket, inputs, False)[0][: h * w // 4].copy()

    clean = features(5376, 0)
    assert np.array_equal(features(5376, 1e4), clean)
    assert rel_l2(clean, features(5184, 0)) <= 1e-5


@pytest.mark.parametrize("limit", BUCKETS)
def test_the_largest_bucket_takes_what_the_limit_gives(limit):
    most = max(h * w for of, _, (h, w) in PICTURES.values() if of == limit)
    assert pick(patch_buckets(largest_image(limit)), most, "patches") == BUCKETS[limit]


def test_a_side_of_more_than_512_patches_is_refused(model):
    grid = np.array([[2, 514]])
    ids = np.array([[MEDIA] * 257])
    pixels = np.zeros((1028, 3, 14, 14), np.float32)
    with pytest.raises(InputError, match="a side of 514 patches, but .* end at 512"):
        model(input_ids=ids, pixel_values=pixels, image_grid_hws=grid)


def test_more_patches_than_the_largest_graph_takes_are_refused(model):
    ids = np.array([[MEDIA] * (74 * 74 // 4)])
    pixels = np.zeros((74 * 74, 3, 14, 14), np.float32)
    with pytest.raises(TooLongError, match="74 x 74 image: 5476, but the largest graph takes 5376"):
        model(input_ids=ids, pixel_values=pixels, image_grid_hws=np.array([[74, 74]]))
