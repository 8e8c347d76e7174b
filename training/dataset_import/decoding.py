# SPDX-License-Identifier: MIT
"""From any image file that Pillow opens to plain uint8 pixels, and a note of everything that was changed.

StyleGAN's tool takes the decoded array as it is, so palettes turn into wrong greys, CMYK and 16 bits into errors, and
photographs stay as the camera was held.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXIF_ORIENTATION = 0x0112  # tag; 1 = upright, 2 ... 8 = turned or mirrored
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
ALPHA_MODES = {"RGBA", "RGBa", "LA", "La", "PA"}


class UnusableImageError(ValueError):
    """An image that cannot be brought to 8 bits without guessing."""


class DecodedImage(NamedTuple):
    """Pixels, and what was done to get them."""

    pixels: np.ndarray  # uint8 (H, W) or (H, W, 3)
    changes: tuple[str, ...]  # one phrase for each kind of change


class EncodedImage(NamedTuple):
    """A file for the data set."""

    content: bytes
    crc: int  # CRC-32 of the content, as a zip's directory holds it
    digest: bytes  # equal for equal pixels only; the CRC of a whole PNG is not: see hash_pixels


def is_grey(image: Image.Image) -> bool:
    """True if the file's mode holds no colour (a palette may, so it counts as colour)."""
    return image.mode in GREY_MODES


def decode_image(image: Image.Image, as_rgb: bool, use_exif_rotation: bool) -> DecodedImage:
    """Pixels of an opened image: RGB, or else grey; the first frame if there are several.

    Raises UnusableImageError for floating-point and 32-bit pixels, and whatever Pillow raises for a damaged file.
    """
    changes = []
    if getattr(image, "is_animated", False):
        changes.append("several frames or pages: the first one used")
    image.load()
    if use_exif_rotation and image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        changes.append("turned upright, as their EXIF orientation says")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
        changes.append("16 bits per pixel: rounded to 8")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = _on_white(image)
        changes.append("transparency: put on white")
    if as_rgb and image.mode != "RGB":
        changes.append("grey to RGB" if is_grey(image) else f"{_name_mode(image.mode)} to RGB")
    if image.mode == "F":
        raise UnusableImageError("floating-point pixels, whose range is unknown")
    pixels = np.asarray(image.convert("RGB" if as_rgb else "L"))
    return DecodedImage(pixels, tuple(changes))


def encode_png(pixels: np.ndarray) -> EncodedImage:
    """PNG without compression: fast to read during training, and stored as it is in a zip."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png", compress_level=0, optimize=False)
    content = stream.getvalue()
    return EncodedImage(content, zlib.crc32(content), hash_pixels(pixels))


def hash_pixels(pixels: np.ndarray) -> bytes:
    """8 bytes that tell images apart.

    The CRC-32 of the file cannot: a PNG ends with a CRC-32 of its own pixels, which cancels half of the bits, so that
    equally large PNG files share some 2**16 values. Of 10,000 different images about 700 then look like repetitions.
    """
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=8).digest()


def describe_read_error(error: BaseException) -> str:
    """Why an image could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text shows a memory address
        return "its content is no image format that Pillow knows"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnusableImageError("32-bit pixels, whose range is unknown")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 -> 255, nearest


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    canvas = Image.new("RGB", picture.size, (255, 255, 255))
    canvas.paste(picture, mask=picture.getchannel("A"))
    return canvas if image.mode not in GREY_MODES else canvas.convert("L")


def _name_mode(mode: str) -> str:
    return "palette" if mode == "P" else mode
