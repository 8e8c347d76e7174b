# SPDX-License-Identifier: MIT
"""Labels on their way into a data set: from dataset.json, from folders, missing, bad."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from torch_utils.errors import UserError
from training.dataset import open_dataset
from training.dataset_import.convert import import_images
from training.dataset_import.plan import ImportOptions


def rgb(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def run(source: Path, dest: Path | None = None, **options):
    """The report, and the content of dataset.json."""
    dest = dest or source.with_name("out.zip")
    report = import_images(ImportOptions(source=str(source), dest=str(dest), **options))
    with zipfile.ZipFile(dest) as archive:
        return report, json.loads(archive.read("dataset.json"))


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_labels_from_folders(write_dataset, suffix):
    names = ["dog/1.png", "cat/x/1.png", "cat/2.png", "Zebra/1.png", "loose.png"]
    source = write_dataset("src" + suffix, {name: rgb(i) for i, name in enumerate(names)}, {"dog/1.png": 7})
    report, content = run(source, source.with_name("out.zip"), labels_from_folders=True)
    assert [label for _, label in content["labels"]] == [0, 1, 1, 2]
    assert content["class_names"] == ["Zebra", "cat", "dog"]
    assert report.class_counts.tolist() == [1, 2, 1]
    assert "in no class folder" in report.text() and "dataset.json was not read" in report.text()
    dataset = open_dataset(source.with_name("out.zip"), use_labels=True)
    assert dataset.class_names == ("Zebra", "cat", "dog") and dataset.c_dim == 3
    assert dataset.content_hash == report.content_hash


def test_labels_from_folders_without_classes(write_dataset):
    with pytest.raises(UserError, match=r"no folders in it, so --labels-from-folders finds no classes"):
        run(write_dataset("flat", {"a.png": rgb()}), labels_from_folders=True)
    with pytest.raises(
        UserError, match=r"everything is in the folder train, .* give that folder as --source"
    ):
        run(write_dataset("deep", {"train/a/1.png": rgb(), "train/b/1.png": rgb()}), labels_from_folders=True)


def test_one_unlabelled_image_costs_all_labels_unless_dropped(write_dataset):
    source = write_dataset(
        "src", {f"{i}.png": rgb(i) for i in range(4)}, {"0.png": 1, "1.png": 0, "3.png": 1}
    )
    report, content = run(source)
    assert content == {"labels": None}
    assert "none written, because 1 of 4 images have none (first: 2.png); --drop-unlabelled" in report.text()
    report, content = run(source, source.with_name("dropped.zip"), drop_unlabelled=True)
    assert [label for _, label in content["labels"]] == [1, 0, 1]
    assert report.dropped.counts == {"without label": 1}
    with pytest.raises(UserError, match=r"--drop-unlabelled: no image of .* has a label"):
        run(write_dataset("bare", {"a.png": rgb()}), source.with_name("bare.zip"), drop_unlabelled=True)


def test_class_names_of_the_source_are_kept(write_dataset):
    text = json.dumps({"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["cat", "dog"]})
    _, content = run(write_dataset("src", {"a.png": rgb(1), "b.png": rgb(2)}, text))
    assert content["class_names"] == ["cat", "dog"]


def test_label_vectors_are_copied(write_dataset):
    source = write_dataset("src", {"a.png": rgb()}, {"a.png": [0.5, 2]})
    report, content = run(source)
    assert content == {"labels": [["00000/img00000000.png", [0.5, 2]]]}
    assert "vectors" in report.text()
    assert open_dataset(source.with_name("out.zip")).content_hash == report.content_hash


def test_labels_of_missing_images_are_noted(write_dataset):
    report, _ = run(write_dataset("src", {"a.png": rgb()}, {"a.png": 0, "x.png": 1, "y.png": 1}))
    assert "2 labels in" in report.text() and "(first: x.png)" in report.text()


BAD_LABELS = {
    "{labels": "not of the form",
    '{"labels": 3}': "not of the form",
    '{"labels": [["a.png", "cat"]]}': r"label 'cat' of 'a\.png' is neither a whole number >= 0 nor",
    '{"labels": [["a.png", -1]]}': "label -1 of 'a\\.png'",
    '{"labels": [["a.png", true]]}': "label True of",
    '{"labels": [["a.png", 0], ["a.png", 1]]}': r"'a\.png' has two labels, 0 and 1",
    '{"labels": [["a.png", 3]], "class_names": ["x"]}': "1 class names, but labels up to 3",
    '{"labels": [["a.png", 0]], "class_names": [5]}': "not a list of names",
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("text", BAD_LABELS)
def test_bad_labels_are_refused_before_anything_is_written(write_dataset, text, suffix):
    source = write_dataset("src" + suffix, {"a.png": rgb()}, text)
    with pytest.raises(UserError, match=rf"dataset\.json: .*{BAD_LABELS[text]}") as caught:
        run(source)
    assert "\n" not in str(caught.value)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
