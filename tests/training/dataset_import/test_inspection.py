# SPDX-License-Identifier: MIT
"""What `dataset_tool.py inspect` finds, and that its verdict is that of the reader."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from training.dataset import DatasetError, open_dataset
from training.dataset_import.convert import import_images
from training.dataset_import.inspection import inspect_dataset
from training.dataset_import.plan import ImportOptions


def rgb(seed: int = 0, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SETS = {  # name: (files, verdict, part of the text)
    "good": ({"1.png": rgb(1), "2.png": rgb(2)}, True, "Pixels: 8x8; mode: RGB"),
    "grey among RGB": ({"1.png": rgb(1), "2.png": rgb(2)[..., 0]}, True, "mode: RGB (1), L (1)"),
    "identical": ({"1.png": rgb(1), "2.png": rgb(1)}, True, "2.png = 1.png"),
    "alpha": ({"1.png": rgb(1), "2.png": Image.new("RGBA", (8, 8))}, False, "mode RGBA, but only RGB and L"),
    "sizes": ({"1.png": rgb(1, 4, 4), "2.png": rgb(2), "3.png": rgb(3)}, False, "1.png: 4x4"),
    "oblong": ({"1.png": rgb(1, 8, 16)}, False, "16x8 pixels is not square"),
    "odd": ({"1.png": rgb(1, 12, 12)}, False, "12x12 pixels, but the side must be a power of two"),
    "broken": ({"1.png": rgb(1), "2.png": b"x"}, False, "2.png: its content is no image format"),
    "all broken": ({"1.png": b"x", "2.png": b"y"}, False, "Pixels: unknown"),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("case", SETS)
def test_verdict_is_that_of_the_reader(write_dataset, case, suffix):
    files, is_usable, part = SETS[case]
    path = write_dataset("set" + suffix, files)
    inspection = inspect_dataset(str(path))
    assert inspection.is_usable == is_usable and inspection.num_images == len(files)
    assert part in inspection.text()
    assert inspection.text().splitlines()[-1].startswith("Usable" if is_usable else "Not usable")
    if is_usable:
        assert inspection.content_hash == open_dataset(path).content_hash
    else:
        with pytest.raises(DatasetError):
            open_dataset(path)


def test_classes(write_dataset):
    files = {f"{i:02d}.png": rgb(i) for i in range(24)}
    labels = [[name, 0 if i < 22 else 3 if i == 22 else 4] for i, name in enumerate(files)]
    text = json.dumps({"labels": labels, "class_names": ["ant", "bee", "cat", "dog", "emu"]})
    path = write_dataset("set.zip", files, text)
    inspection = inspect_dataset(str(path))
    assert inspection.class_counts.tolist() == [22, 0, 0, 1, 1]
    assert "--cond 1 trains on 5 classes with 0 to 22 images each; 2 of them empty: 1, 2" in inspection.text()
    assert "22  ant" in inspection.text() and "the largest class has 22 times" in inspection.text()
    dataset = open_dataset(path, use_labels=True)
    assert (dataset.c_dim, dataset.class_names) == (5, ("ant", "bee", "cat", "dog", "emu"))
    assert dataset.content_hash == inspection.content_hash


def test_many_classes_are_shortened(write_dataset):
    files = {f"{i:02d}.png": rgb(i) for i in range(30)}
    text = inspect_dataset(str(write_dataset("set", files, {n: i for i, n in enumerate(files)}))).text()
    assert "20 more classes" in text and len(text.splitlines()) < 20


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (None, "--cond 1 would be refused: no labels, as there is no dataset.json"),
        ({"1.png": 0}, "1 images have no label"),
        ('{"labels": null}', "its labels are null or empty"),
        ({"1.png": 0, "2.png": 1.5}, "label 1.5 of '2.png' is not a whole number"),
        ("{", "not of the form"),
    ],
)
def test_label_problems_do_not_matter_without_cond(write_dataset, labels, part):
    inspection = inspect_dataset(str(write_dataset("set", {"1.png": rgb(1), "2.png": rgb(2)}, labels)))
    assert inspection.is_usable and inspection.class_counts is None
    assert part in inspection.text()
    assert inspection.unlabelled.counts.total() == (1 if labels == {"1.png": 0} else 0)


def test_built_in_set():
    pytest.importorskip("sklearn")
    inspection = inspect_dataset("digits")
    assert inspection.is_usable and "10 classes with 174 to 183 images each" in inspection.text()
    assert inspection.content_hash == open_dataset("digits").content_hash


def test_different_images_are_not_called_duplicates(write_dataset):
    """Checksums of PNG files collide after some hundred images (see hash_pixels); pixels must decide."""
    files = {f"{i:04d}.png": rgb(i, 4, 4) for i in range(1500)}
    path = write_dataset("set.zip", files)
    with zipfile.ZipFile(path) as archive:
        assert len({member.CRC for member in archive.infolist()}) < 1500
    assert not inspect_dataset(str(path)).duplicates.total
    report = import_images(ImportOptions(source=str(path), dest=str(path.with_name("out.zip"))))
    assert report.num_images == 1500 and "identical" not in report.text()


def test_name_twice_in_a_zip(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for seed in (1, 2):
            stream = io.BytesIO()
            Image.fromarray(rgb(seed)).save(stream, "PNG")
            archive.writestr("a.png", stream.getvalue())
    inspection = inspect_dataset(str(tmp_path / "a.zip"))
    assert inspection.num_images == 2 and "archive holds twice" in inspection.text()
    assert inspection.content_hash == open_dataset(tmp_path / "a.zip").content_hash
