# SPDX-License-Identifier: MIT
"""Frames to a video file (.mp4), an animated image (.gif, .webp, .apng) or a folder of PNG files.

The suffix decides. Output appears complete or not at all. PyAV, for .mp4, is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError

GIF_SHORTEST_MS = 20  # players take less for a mistake and show the frame much longer
X264_CRF = "16"  # constant quality; the eye sees no difference from the frames
_BT709 = 1  # FFmpeg's number of the colour matrix, primaries and transfer that players expect


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise UserError for an output that `write_video` cannot make, before any frame is rendered."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise UserError(
            f"--output {path}: {path.suffix} cannot be written; end it with .mp4, .gif, .webp or .apng, "
            "or give a folder for PNG files"
        )
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise UserError(
            f"--output {path}: .mp4 needs PyAV; run `pip install av`, or choose .gif, .webp, .apng or a folder"
        )
    if path.suffix and path.is_dir():
        raise UserError(f"--output {path} is a folder; give another name, or leave out {path.suffix}")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output {path} exists and is no empty folder; give another, or remove it")
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"--output {path} cannot be written: {parent} is no folder you may write to")
            return


def write_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames, uint8 (H, W, 3) and all of one size; an existing file is replaced.

    .mp4 and folders take the memory of one frame, animated images that of all. A GIF counts time in 1/100 s and
    shows at most 50 frames per second. Raises UserError as `check_output`, or when writing fails.
    """
    check_output(path)
    path = Path(path)
    try:
        _WRITERS[path.suffix.lower()](path, frames, fps)
    except OSError as error:  # PyAV's errors too
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


def frame_duration_ms(suffix: str, fps: float) -> float:
    """How long a frame of an animated image is shown, in milliseconds, by what its format can hold."""
    if suffix.lower() == ".gif":
        return max(GIF_SHORTEST_MS, round(100 / fps) * 10)
    return 1000 / fps if suffix.lower() == ".apng" else max(1, round(1000 / fps))


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_write(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": X264_CRF})
        stream.pix_fmt = "yuv420p"  # what every player and browser shows
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        for index, pixels in enumerate(frames):
            pixels = _pad_to_even(pixels)
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _pad_to_even(pixels: np.ndarray) -> np.ndarray:
    """yuv420p halves both sides, so they must be even: an odd one gets its last row or column twice."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")


def _write_animation(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    first, *others = (Image.fromarray(frame) for frame in frames)
    suffix = path.suffix.lower()
    options = {".webp": {"quality": 95}, ".gif": {}, ".apng": {}}[suffix]
    with atomic_write(path) as temporary:
        first.save(
            temporary,
            format={".apng": "PNG"}.get(suffix, suffix[1:].upper()),
            save_all=True,
            append_images=others,
            duration=frame_duration_ms(suffix, fps),
            loop=0,
            **options,
        )


def _write_folder(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    del fps  # a folder has no time
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(temporary / f"frame{index:06d}.png")
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, path)  # an empty folder of that name is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


_WRITERS = {
    ".mp4": _write_mp4,
    ".gif": _write_animation,
    ".webp": _write_animation,
    ".apng": _write_animation,
    "": _write_folder,
}
