"""Pictures to patches: exactly the published processing, in every mode, from every kind of source."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps
from published import DATA, published_directory

from kimi_vl import KimiVLImageProcessor
from kimi_vl.modeling.image_processing import ImageError, flat_images, load_image

PICTURES = DATA / "imgproc"
EXPECTED = json.loads((PICTURES / "expected.json").read_text())
RGB = PICTURES / "rgb_exact_56x28.png"


def noise(mode: str, width: int, height: int) -> Image.Image:
    """A picture of random values in any mode."""
    rng = np.random.default_rng(width * 1000 + height)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(
            rng.integers(0, 256, (height, width)).astype("int32" if mode == "I" else "float32")
        )
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(32)
    if mode in ("CMYK", "YCbCr", "1"):
        return image.convert("RGB").convert(mode)
    return image.convert(mode)


def reference(image: Image.Image, limit: int) -> tuple[np.ndarray, list[int]]:
    """The published steps one by one, pixel by pixel where that is plainer."""
    w, h = image.size
    if (w // 14) * (h // 14) > limit:
        scale = (limit / ((w // 14) * (h // 14))) ** 0.5
        image = image.resize((int(w * scale), int(h * scale)), resample=Image.BICUBIC)
    right, bottom = -image.width % 28, -image.height % 28
    palette = image.getpalette() if image.mode == "P" else None
    zero = 0 if len(image.getbands()) == 1 else (0,) * len(image.getbands())
    image = ImageOps.expand(image, (0, 0, right, bottom), fill=zero)
    if palette:
        image.putpalette(palette)
    x = (np.asarray(image.convert("RGB")).astype(np.float32) / 255 - 0.5) / 0.5
    grid = [image.height // 14, image.width // 14]
    rows = [x[14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r in range(grid[0]) for c in range(grid[1])]
    return np.stack(rows).transpose(0, 3, 1, 2), grid


@pytest.mark.parametrize("case", EXPECTED, ids=[c["name"] for c in EXPECTED])
def test_patches_equal_the_published_ones(case):
    processor = KimiVLImageProcessor(in_token_limit=case["in_token_limit"])
    path = PICTURES / case["file"]
    out = processor(path, return_tensors="np")
    patches, grid = out["pixel_values"], out["image_grid_hws"]
    assert (patches.dtype, grid.dtype) == (np.float32, np.int64)
    assert grid.tolist() == [case["grid"]]
    assert len(patches) == case["tokens"] * 4
    with np.load(PICTURES / "patches.npz") as want:
        assert np.abs(patches[0] - want[f"{case['name']}_first"]).max() <= 1e-6
        assert np.abs(patches[-1] - want[f"{case['name']}_last"]).max() <= 1e-6
    assert patches.mean() == pytest.approx(case["mean"], abs=1e-6)
    if hashlib.sha256(load_image(path).tobytes()).hexdigest() == case["decoded_sha256"]:  # the same decoder
        assert hashlib.sha256(patches.tobytes()).hexdigest() == case["patches_sha256"]


@pytest.mark.parametrize("size", [(30, 50), (28, 28), (301, 203)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_is_resized_and_padded_as_published(mode, size):
    image = noise(mode, *size)
    assert image.mode == mode
    out = KimiVLImageProcessor(in_token_limit=64)(image)
    patches, grid = reference(image, 64)
    assert out["image_grid_hws"].tolist() == [grid]
    assert np.abs(out["pixel_values"] - patches).max() <= 1e-6


@pytest.mark.parametrize(
    ("limit", "size", "grid"),
    [
        (4096, (442 * 14, 9 * 14 + 13), (10, 442)),  # 3978 whole patches are within the limit, 4420 come out
        (4096, (6617, 152), (12, 442)),  # scaled to the limit, 5304 come out
        (16384, (6981, 485), (36, 492)),
        (4096, (500, 500), (36, 36)),
        (64, (500, 3), (2, 36)),  # no whole patch, so within any limit; padding counts afterwards
        (4096, (1, 1), (2, 2)),
        (16384, (510 * 14, 1), (2, 510)),
    ],
)
def test_the_limit_is_tested_before_padding(limit, size, grid):
    processor = KimiVLImageProcessor(in_token_limit=limit)
    out = processor(Image.new("RGB", size))
    assert tuple(out["image_grid_hws"][0]) == grid
    assert out["pixel_values"].shape == (grid[0] * grid[1], 3, 14, 14)


@pytest.mark.parametrize("size", [(511 * 14, 1), (14, 512 * 14), (511 * 14, 14), (30 * 14, 30000 * 14)])
def test_a_side_of_512_patches_is_refused(size):
    with pytest.raises(ImageError, match="fewer than 512"):
        KimiVLImageProcessor()(Image.new("L", size))


def test_a_picture_that_would_be_scaled_away_is_refused():
    with pytest.raises(ImageError, match="too long and narrow"):
        KimiVLImageProcessor(in_token_limit=1)(Image.new("L", (14, 14 * 300)))


@contextlib.contextmanager
def served(folder):
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: handler(*a, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_all_sources_give_the_same_patches(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    processor = KimiVLImageProcessor()
    data = RGB.read_bytes()
    image = Image.open(RGB)
    with served(PICTURES) as url:
        sources = [
            RGB,
            str(RGB),
            f"{url}/{RGB.name}",
            data,
            bytearray(data),
            f"data:image/png;base64,{base64.b64encode(data).decode()}",
            image,
            np.asarray(image),
        ]
        results = [processor(source)["pixel_values"] for source in sources]
    for result in results:
        assert np.array_equal(result, results[0])


@pytest.mark.parametrize(("channels", "mode"), [((), "L"), ((1,), "L"), ((3,), "RGB"), ((4,), "RGBA")])
def test_arrays_are_pictures_of_their_channels(channels, mode):
    array = np.random.default_rng(0).integers(0, 256, (30, 20, *channels), dtype=np.uint8)
    image = load_image(array)
    assert (image.mode, image.size) == (mode, (20, 30))
    assert np.array_equal(np.asarray(image), array[:, :, 0] if channels == (1,) else array)


def test_any_nesting_is_read_in_row_order():
    a, b, c = (noise("RGB", *size) for size in ((28, 28), (56, 28), (28, 84)))
    out = KimiVLImageProcessor()([[a], [], [b, (c,)]])
    assert out["image_grid_hws"].tolist() == [[2, 2], [2, 4], [6, 2]]
    one_by_one = [KimiVLImageProcessor()(x)["pixel_values"] for x in (a, b, c)]
    assert np.array_equal(out["pixel_values"], np.concatenate(one_by_one))
    assert len(list(flat_images(np.zeros((3, 8, 8, 3), np.uint8)))) == 3
    assert list(flat_images([None, "x"])) == ["x"]


def test_no_picture_is_no_patch():
    out = KimiVLImageProcessor()([])
    assert out["pixel_values"].shape == (0, 3, 14, 14)
    assert out["image_grid_hws"].shape == (0, 2)


def test_mindspore_tensors():
    import mindspore as ms

    out = KimiVLImageProcessor()(RGB, return_tensors="ms")
    want = KimiVLImageProcessor()(RGB, return_tensors="np")
    assert (out["pixel_values"].dtype, out["image_grid_hws"].dtype) == (ms.float32, ms.int64)
    for key in want:
        assert np.array_equal(out[key].asnumpy(), want[key])


def damaged_png() -> bytes:
    data = bytearray(RGB.read_bytes())
    data[60:90] = b"\0" * 30
    return bytes(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no image at all", "is not an image file"),
        (b"", "is not an image file"),
        (RGB.read_bytes()[:1000], "the image is damaged"),
        (damaged_png(), "damaged|cannot be read"),
        ("no/such/picture.png", r"no/such/picture\.png: cannot be read \(No such file"),
        (PICTURES, "Is a directory"),
        ("data:image/png;base64,!!", "is no base64"),
        ("http://127.0.0.1:9/x.png", r"http://127\.0\.0\.1:9/x\.png: cannot be fetched"),
        (np.zeros((4, 4, 3), np.float32), r"array \(4, 4, 3\) float32: expected uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"array \(3, 4, 5\) uint8: expected uint8"),
        (np.zeros((0, 4), np.uint8), "is empty"),
        (3, "int: is no image"),
    ],
)
def test_a_bad_picture_is_one_clear_sentence(source, message, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ImageError, match=message) as e:
        KimiVLImageProcessor()(source)
    assert "\n" not in str(e.value)
    assert isinstance(e.value, ValueError)


def test_a_truncated_file_opened_by_the_caller_is_refused():
    image = Image.open(io.BytesIO((PICTURES / "jpeg_300x200_resized.jpg").read_bytes()[:5000]))
    with pytest.raises(ImageError, match="the image is damaged"):
        KimiVLImageProcessor()(image)


def test_settings_survive_saving(tmp_path):
    directory = published_directory(tmp_path / "model")
    processor = KimiVLImageProcessor.from_pretrained(directory, in_token_limit=16384)
    assert processor.in_token_limit == 16384
    processor.save_pretrained(tmp_path / "saved")
    again = KimiVLImageProcessor.from_pretrained(tmp_path / "saved")
    assert again.to_dict() == processor.to_dict()
    assert again.num_pooled_tokens == 1024
    with pytest.raises(ValueError, match="there is no preprocessor_config.json"):
        KimiVLImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad_input is false"):
        KimiVLImageProcessor(pad_input=False)


def test_picture_and_text_need_neither_torch_nor_tiktoken(tmp_path):
    directory = published_directory(tmp_path / "model")
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "tiktoken")))
import numpy as np
import kimi_vl
from transformers import AutoImageProcessor, AutoProcessor
kimi_vl.KimiVLProcessor
image = np.zeros((40, 60, 3), np.uint8)
assert AutoImageProcessor.from_pretrained({str(directory)!r})(image)["pixel_values"].shape == (24, 3, 14, 14)
processor = AutoProcessor.from_pretrained({str(directory)!r})
inputs = processor(text="a <|media_pad|>", images=image, return_tensors="np")
assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == "a", inputs
assert kimi_vl.KimiVLConfig.from_pretrained({str(directory)!r}).dtype == "bfloat16"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
