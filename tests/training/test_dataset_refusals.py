# SPDX-License-Identifier: MIT
"""Every data set that is refused: one line that names the file, what is wrong, and the fix."""

from __future__ import annotations

import io
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from torch_utils.errors import UserError
from training import dataset as dataset_module
from training.data_loader import InfiniteSampler, make_loader
from training.dataset import DatasetError, open_dataset


def grey(side: int, value: int = 0) -> np.ndarray:
    return np.full((side, side), value, dtype=np.uint8)


def rgb(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


@pytest.fixture
def large_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set counts as too large to decode when opened."""
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)


@pytest.fixture
def huge_sets(large_sets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set counts as too large even for reading its headers when opened."""
    monkeypatch.setattr(dataset_module, "MAX_HEADERS_CHECKED", 0)


def test_error_in_a_worker_process_is_one_line(huge_sets, write_dataset):
    path = write_dataset("late", {"1.png": rgb(8, 8), "2.png": b"broken"})
    loader = make_loader(open_dataset(path), InfiniteSampler(2), 2, num_workers=1)
    with pytest.raises(DatasetError) as caught:
        next(loader)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}/2.png: ")


def png_without_its_end() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        stream, "PNG"
    )
    return stream.getvalue()[:1500]


BAD_IMAGES = {  # name: (first image, second image, what the message says)
    "not an image": (rgb(8, 8), b"text", r"2\.png: not readable as an image .*replace or remove"),
    "truncated": (rgb(32, 32), png_without_its_end(), r"2\.png: not readable as an image .*truncated"),
    "first not square": (rgb(16, 8), rgb(8, 8), r"1\.png: 8x16 pixels is not square; crop or pad"),
    "first not a power of two": (rgb(24, 24), rgb(24, 24), r"1\.png: 24x24 pixels.*power of two.*to 32x32"),
    "first too small": (rgb(2, 2), rgb(2, 2), r"1\.png: 2x2 pixels.*at least 4.*to 4x4"),
    "other size": (rgb(8, 8), rgb(16, 16), r"2\.png: 16x16 pixels, but the first image has 8x8; resize"),
    "alpha": (rgb(8, 8), Image.new("RGBA", (8, 8)), r'2\.png: Pillow mode RGBA .*convert\("RGB"\)'),
    "palette": (Image.new("P", (8, 8)), rgb(8, 8), r'1\.png: Pillow mode P .*convert\("RGB"\)'),
    "16 bit": (Image.new("I;16", (8, 8)), rgb(8, 8), r'1\.png: Pillow mode I;16 .*convert\("RGB"\)'),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused_when_opened(write_dataset, case, suffix):
    first, second, message = BAD_IMAGES[case]
    path = write_dataset("bad" + suffix, {"1.png": first, "2.png": second})
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}/{message}") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [case for case in BAD_IMAGES if case != "truncated"])
def test_bad_header_is_refused_when_a_large_set_is_opened(large_sets, write_dataset, case):
    first, second, message = BAD_IMAGES[case]
    with pytest.raises(DatasetError, match=message):
        open_dataset(write_dataset("bad.zip", {"1.png": first, "2.png": second}))


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_of_a_huge_set_is_refused_at_the_latest_when_read(huge_sets, write_dataset, case):
    first, second, message = BAD_IMAGES[case]
    path = write_dataset("bad.zip", {"1.png": first, "2.png": second})
    with pytest.raises(DatasetError, match=message):
        open_dataset(path)[1]


def test_rgb_files_are_refused_for_one_channel(tiny_folder):
    with pytest.raises(DatasetError, match=r'B/5\.png: Pillow mode RGB .* only L; .*convert\("L"\)'):
        open_dataset(tiny_folder, channels=1)


def test_missing_path():
    with pytest.raises(UserError, match=r"^nowhere/set\.zip: no such file or folder; .*digits"):
        open_dataset("nowhere/set.zip")


def test_other_kind_of_file(tmp_path):
    path = tmp_path / "images.tar"
    path.touch()
    with pytest.raises(DatasetError, match=r"images\.tar: neither a folder nor a \.zip; put"):
        open_dataset(path)


@pytest.mark.parametrize("name", ["empty", "empty.zip"])
def test_no_images(write_dataset, name):
    with pytest.raises(DatasetError, match=f"{name}: no image files found; expected"):
        open_dataset(write_dataset(name, {"readme.txt": b"no images"}))


@pytest.mark.parametrize("num_bytes", [0, 10, 600])
def test_broken_zip(tiny_zip, num_bytes):
    tiny_zip.write_bytes(tiny_zip.read_bytes()[:num_bytes])
    with pytest.raises(DatasetError, match=r"tiny\.zip: not a complete zip file .*create or copy it again"):
        open_dataset(tiny_zip)


def test_damaged_member_of_a_zip(tiny_zip):
    content = bytearray(tiny_zip.read_bytes())
    with zipfile.ZipFile(tiny_zip) as archive:
        start = archive.getinfo("a/2.png").header_offset
    content[start + 200] ^= 255
    tiny_zip.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match=r"tiny\.zip/a/2\.png: not readable as an image"):
        open_dataset(tiny_zip)


@pytest.mark.parametrize("max_size", [0, -1])
def test_empty_subset(tiny_zip, max_size):
    with pytest.raises(DatasetError, match=f"at most {max_size} images .* >= 1"):
        open_dataset(tiny_zip, max_size=max_size)


BAD_LABELS = {  # name: (labels or text of dataset.json, what the message says)
    "missing file": (
        None,
        r": no labels, as there is no dataset\.json at its root; add it, or use no --cond",
    ),
    "null": ('{"labels": null}', r"/dataset\.json: its labels are null or empty; .*--cond"),
    "empty": ('{"labels": []}', r"/dataset\.json: its labels are null or empty"),
    "not JSON": ("{labels", r"/dataset\.json: not of the form .*write it again"),
    "no labels key": ("{}", r"/dataset\.json: not of the form"),
    "a list": ("[1, 2]", r"/dataset\.json: not of the form"),
    "image without label": ({"1.png": 0}, r"/dataset\.json: 2 images have no label, the first is '2\.png'"),
    "label without image": (
        {"1.png": 0, "2.png": 1, "3.png": 0, "x.png": 0, "y.png": 0},
        r"/dataset\.json: 2 labels belong to no image, the first is 'x\.png'",
    ),
    "twice": (
        '{"labels": [["1.png", 0], ["2.png", 1], ["3.png", 1], ["1.png", 2]]}',
        r"/dataset\.json: 1 file names are listed twice",
    ),
    "negative": ({"1.png": 0, "2.png": -1, "3.png": 0}, r"label -1 of '2\.png' is not a whole number >= 0"),
    "vector": (
        {"1.png": [0.5, 1], "2.png": 0, "3.png": 0},
        r"label \[0\.5, 1\] of '1\.png'.*no label vectors",
    ),
    "text": ({"1.png": 0, "2.png": "cat", "3.png": 0}, r"label 'cat' of '2\.png' is not a whole number"),
    "truth value": ({"1.png": 0, "2.png": True, "3.png": 0}, r"label True of '2\.png' is not a whole number"),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused_only_when_used(write_dataset, case, suffix):
    labels, message = BAD_LABELS[case]
    path = write_dataset("bad" + suffix, {f"{i}.png": grey(8, i) for i in (1, 2, 3)}, labels)
    assert open_dataset(path).c_dim == 0
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        open_dataset(path, use_labels=True)
    assert "\n" not in str(caught.value)


def test_label_names_may_use_backslashes(write_dataset):
    path = write_dataset("windows", {"a/1.png": grey(8)}, {"a\\1.png": 4})
    assert open_dataset(path, use_labels=True).labels.tolist() == [4]
