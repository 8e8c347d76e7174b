# SPDX-License-Identifier: MIT
"""Video files: written and read back by other code; refused before rendering; complete or absent."""

import importlib.util
import os

import numpy as np
import pytest
from PIL import Image, ImageSequence

from torch_utils.errors import UserError
from training import video_file
from training.video_file import check_output, write_video

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 120), (128, 128, 128), (0, 0, 0), (255, 255, 255)]


def flat_frames(height=32, width=48):
    return [np.full((height, width, 3), colour, np.uint8) for colour in COLOURS]


def to_bt709(colour):
    """Y, Cb, Cr in 8 bits, studio range."""
    red, green, blue = np.array(colour) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748


def test_mp4(tmp_path):
    av = pytest.importorskip("av")
    write_video(tmp_path / "a.mp4", flat_frames(), fps=30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (48, 32)
        assert stream.average_rate == 30 and stream.frames == len(COLOURS)
        assert stream.codec_context.colorspace == 1  # BT.709 is written into the file, and used:
        frames = list(container.decode(video=0))
    assert len(frames) == len(COLOURS)
    for index, (frame, colour) in enumerate(zip(frames, COLOURS, strict=True)):
        assert frame.time == pytest.approx(index / 30, abs=1e-4)
        planes = [np.frombuffer(plane, np.uint8).astype(float) for plane in frame.planes]
        middle = [plane.reshape(p.height, p.line_size)[p.height // 2, p.width // 2]
                  for plane, p in zip(planes, frame.planes, strict=True)]  # fmt: skip
        np.testing.assert_allclose(middle, to_bt709(colour), atol=3)


def test_mp4_keeps_detail(tmp_path):
    """Luma of smooth noise, on average within two levels."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, size=(3, 8, 8)).astype(np.uint8)
    grey = [np.array(Image.fromarray(n).resize((64, 64), Image.Resampling.BICUBIC)) for n in noise]
    write_video(tmp_path / "a.mp4", [np.stack([g] * 3, axis=2) for g in grey], fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = [frame.planes[0] for frame in container.decode(video=0)]
        decoded = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in planes]
    assert len(decoded) == 3
    for luma, pixels in zip(decoded, grey, strict=True):
        difference = np.abs(luma - (16 + pixels.astype(float) * 219 / 255))
        assert difference.mean() < 2 and difference.max() < 16


def test_mp4_of_odd_size_is_padded(tmp_path):
    av = pytest.importorskip("av")
    write_video(tmp_path / "a.mp4", flat_frames(33, 35), fps=29.97)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (36, 34)
        assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)
        assert sum(1 for _ in container.decode(video=0)) == len(COLOURS)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".gif", 0), (".apng", 0), (".webp", 12)])
def test_animated_images(tmp_path, suffix, tolerance):
    path = tmp_path / f"a{suffix}"
    write_video(path, flat_frames(), fps=25)
    with Image.open(path) as image:
        assert image.n_frames == len(COLOURS) and image.info.get("loop") == 0
        for frame, colour in zip(ImageSequence.Iterator(image), COLOURS, strict=True):
            pixels = np.asarray(frame.convert("RGB")).astype(int)
            assert pixels.shape == (32, 48, 3)
            assert np.abs(pixels - colour).max() <= tolerance
            assert frame.info["duration"] == 40


def test_time_that_formats_can_hold():
    assert video_file.frame_duration_ms(".gif", 60) == 20  # not 10 or 16, which players show as 100
    assert video_file.frame_duration_ms(".gif", 30) == 30
    assert video_file.frame_duration_ms(".webp", 60) == 17
    assert video_file.frame_duration_ms(".apng", 60) == pytest.approx(16.667, abs=1e-3)


def test_folder_of_pngs(tmp_path):
    write_video(tmp_path / "frames", flat_frames(), fps=60)
    names = sorted(os.listdir(tmp_path / "frames"))
    assert names == [f"frame{index:06d}.png" for index in range(len(COLOURS))]
    np.testing.assert_array_equal(Image.open(tmp_path / "frames" / names[3]), flat_frames()[3])
    assert os.listdir(tmp_path) == ["frames"]
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "empty", flat_frames()[:1], fps=60)
    assert os.listdir(tmp_path / "empty") == ["frame000000.png"]
    assert (tmp_path / "empty").stat().st_mode & 0o500 == 0o500


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.apng", "frames"])
def test_a_failure_leaves_the_old_file_or_none(tmp_path, name):
    if name == "a.mp4":
        pytest.importorskip("av")

    def frames_that_fail():
        yield flat_frames()[0]
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_video(tmp_path / name, frames_that_fail(), fps=60)
    assert os.listdir(tmp_path) == []
    if name != "frames":
        (tmp_path / name).write_text("old")
        with pytest.raises(UserError, match="no more"):
            write_video(tmp_path / name, frames_that_fail(), fps=60)
        assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "old"


def test_outputs_that_cannot_be_made(tmp_path):
    for name in ("a.avi", "a.MP3", "a.npy"):
        with pytest.raises(UserError, match=r"cannot be written; end it with .mp4, .gif"):
            check_output(tmp_path / name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no empty folder"):
        check_output(tmp_path / "full")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder.gif")
    with pytest.raises(UserError, match="no folder you may write to"):
        check_output(tmp_path / "full" / "notes.txt" / "a.gif")
    check_output(tmp_path / "new" / "folders" / "a.GIF")
    assert not (tmp_path / "new").exists()


def test_missing_library_is_named(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else real(name))
    with pytest.raises(UserError, match="needs PyAV; run `pip install av`"):
        check_output(tmp_path / "a.mp4")
    check_output(tmp_path / "a.gif")
