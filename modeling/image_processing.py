"""From a picture to patches: what the published image processor does, in PIL and numpy.

Everything happens in the picture's own mode (palette, alpha, CMYK, 16 bit) and the conversion to RGB comes last, as
published; so the pixels of a padded or resized picture are the published ones in every mode.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_kimi_vl import model_source
from .positions import MAX_SIDE
from .settings import DEFAULT_IN_TOKEN_LIMIT

_URL_TIMEOUT = 60.0  # seconds


class ImageError(ValueError):
    """A picture that cannot be read or processed; the message names it."""


def image_name(source: Any) -> str:
    """What to call a picture in an error message."""
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        return text if len(text) <= 200 and not text.startswith("data:") else f"{text[:40]}..."
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.width} x {source.height}"
    if isinstance(source, np.ndarray):
        return f"array {source.shape} {source.dtype}"
    if isinstance(source, (bytes, bytearray)):
        return f"image of {len(source)} bytes"
    return type(source).__name__


def load_image(source: Any) -> Image.Image:
    """A decoded PIL image in its own mode.

    Args:
        source: a path, a URL (http, https, or data: with base64), the bytes of an image file, a PIL image, or a uint8
            array: [H, W] grey, [H, W, 3] RGB, [H, W, 4] RGBA.

    Raises:
        ImageError: it cannot be fetched, is no image, or is damaged.
    """
    name = image_name(source)
    if isinstance(source, Image.Image):
        return _decoded(source, name)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        data = _read(source, name)
    else:
        raise ImageError(
            f"{name}: is no image; expected a path, URL, bytes, PIL image or numpy array (height, width, channels)"
        )
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: is not an image file that Pillow knows") from None
    except Exception as e:  # decoders raise anything on damaged input
        raise ImageError(f"{name}: cannot be read as an image ({e})") from None
    return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except Exception as e:  # decoders raise anything on damaged input
        raise ImageError(f"{name}: the image is damaged ({e})") from None
    return image


def _read(source: str | os.PathLike, name: str) -> bytes:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _fetch(source)
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except ValueError as e:
            raise ImageError(f"{name}: is no base64 data ({e})") from None
    try:
        return Path(source).read_bytes()
    except OSError as e:
        raise ImageError(
            f"{name}: cannot be read ({e.strerror or e}); expected an image file or URL"
        ) from None


def _fetch(url: str) -> bytes:
    import httpx

    try:
        response = httpx.get(url, follow_redirects=True, timeout=_URL_TIMEOUT)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ImageError(
            f"{url}: cannot be fetched ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
        ) from None
    return response.content


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"{name}: expected uint8 (height, width), (height, width, 3) or (height, width, 4)")
    if 0 in array.shape:
        raise ImageError(f"{name}: is empty")
    return Image.fromarray(np.ascontiguousarray(array))


def flat_images(images: Any) -> Iterator[Any]:
    """The pictures of any nesting of lists, in row order; an array of 4 dimensions is a list of pictures."""
    if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4):
        for image in images:
            yield from flat_images(image)
    elif images is not None:
        yield images


def as_tensors(features: dict[str, Any], return_tensors: Any) -> BatchFeature:
    """`features` as numpy arrays (None or "np"), MindSpore tensors ("ms") or what else transformers knows."""
    if str(return_tensors) == "ms":
        import mindspore as ms

        return BatchFeature({k: ms.Tensor(np.ascontiguousarray(v)) for k, v in features.items()})
    return BatchFeature(features, tensor_type=return_tensors)


class KimiVLImageProcessor(BaseImageProcessor):
    """Pictures to patches, as published.

    Args:
        patch_size: side of a patch in pixels.
        in_token_limit: patches (whole ones, before padding) above which a picture is scaled down.
        merge_kernel_size: patches (rows, columns) that become one token; sides are padded to multiples of it.
        image_mean, image_std: per channel, on a scale of 0 to 1.
        pad_input: must be true: the network takes no grid that does not divide by `merge_kernel_size`.
        kwargs: further fields of ``preprocessor_config.json``; kept.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]

    def __init__(
        self,
        patch_size: int = 14,
        pad_input: bool = True,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        in_token_limit: int = DEFAULT_IN_TOKEN_LIMIT,
        merge_kernel_size: Sequence[int] = (2, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not pad_input:
            raise ValueError(
                "preprocessor_config.json: pad_input is false, but only padded pictures are implemented"
            )
        self.patch_size = patch_size
        self.pad_input = pad_input
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:  # type: ignore[override]
        """From a model directory, a Hub repo id, or ``nano``.

        Raises:
            ValueError: the directory has no ``preprocessor_config.json``.
        """
        source = model_source(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir() and not any(
            (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
        ):
            raise ValueError(
                f"{folder}: there is no preprocessor_config.json; expected a Kimi-VL model directory"
            )
        kwargs.pop("trust_remote_code", None)
        return super().from_pretrained(source, **kwargs)

    @property
    def tokens_area(self) -> int:
        """Patches that become one token."""
        return self.merge_kernel_size[0] * self.merge_kernel_size[1]

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Patches of all pictures, one picture after the other.

        Args:
            images: a picture (see :func:`load_image`) or any nesting of lists of pictures.
            return_tensors: None or "np" for numpy arrays, "ms" for MindSpore tensors.

        Returns:
            pixel_values [N, 3, patch_size, patch_size] float32, image_grid_hws [n, 2] int64 (rows and columns of
            patches of each picture).

        Raises:
            ImageError: a picture cannot be read, or a side would have 512 patches or more.
        """
        patches, grids = [], []
        for source in flat_images(images):
            p, grid = self.patches(load_image(source), image_name(source))
            patches.append(p)
            grids.append(grid)
        none = np.zeros((0, 3, self.patch_size, self.patch_size), np.float32)
        features = {
            "pixel_values": np.concatenate(patches) if patches else none,
            "image_grid_hws": np.array(grids, np.int64).reshape(-1, 2),
        }
        return as_tensors(features, return_tensors)

    def patches(self, image: Image.Image, name: str = "image") -> tuple[np.ndarray, tuple[int, int]]:
        """One picture's patches [h * w, 3, P, P] float32, row-major, and its grid (h, w)."""
        image = self._pad(self._within_limit(image, name), name)
        size = self.patch_size
        h, w = image.height // size, image.width // size
        pixels = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)  # (H, W, 3)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        pixels = (pixels - mean) / std
        pixels = pixels.reshape(h, size, w, size, 3).transpose(0, 2, 4, 1, 3)  # (h, w, 3, P, P)
        return np.ascontiguousarray(pixels).reshape(h * w, 3, size, size), (h, w)

    def _within_limit(self, image: Image.Image, name: str) -> Image.Image:
        """Scaled down if it holds more patches than the limit; parts of a patch do not count."""
        width, height = image.size
        count = (width // self.patch_size) * (height // self.patch_size)
        if count <= self.in_token_limit:
            return image
        scale = sqrt(self.in_token_limit / count)
        new = (int(width * scale), int(height * scale))
        if 0 in new:
            raise ImageError(f"{name}: {width} x {height} pixels are too long and narrow; cut the picture")
        self._check_sides(*new, name)  # before the work of scaling it
        return image.resize(new, Image.Resampling.BICUBIC)

    def _pad(self, image: Image.Image, name: str) -> Image.Image:
        """With zeros at the right and bottom, so that tokens are whole; what zero is depends on the mode."""
        step_h, step_w = (self.patch_size * k for k in self.merge_kernel_size)
        width, height = -(-image.width // step_w) * step_w, -(-image.height // step_h) * step_h
        self._check_sides(width, height, name)
        return image.crop((0, 0, width, height))

    def _check_sides(self, width: int, height: int, name: str) -> None:
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows >= MAX_SIDE or columns >= MAX_SIDE:
            raise ImageError(
                f"{name}: {rows} x {columns} patches (rows x columns), but a side must have fewer than {MAX_SIDE}; "
                "cut or scale the picture"
            )
