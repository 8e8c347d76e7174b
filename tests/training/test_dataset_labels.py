# SPDX-License-Identifier: MIT
"""Class names in `dataset.json`, and the content hash that tells which data a run saw."""

from __future__ import annotations

import json

import numpy as np
import pytest

from training import image_source
from training.dataset import DatasetError, open_dataset


def grey(value: int) -> np.ndarray:
    return np.full((8, 8), value, dtype=np.uint8)


def text(**values: object) -> str:
    return json.dumps({"labels": [["1.png", 0], ["2.png", 2]], **values})


FILES = {"1.png": grey(1), "2.png": grey(2)}
GOOD_NAMES = {
    "list": (["ant", "bee", "cat"], ("ant", "bee", "cat")),
    "table": ({"2": "cat", "0": "ant", "1": "bee"}, ("ant", "bee", "cat")),
    "more than classes": (["ant", "bee", "cat", "dog"], ("ant", "bee", "cat")),
    "null": (None, None),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("case", GOOD_NAMES)
def test_class_names(write_dataset, case, suffix):
    given, expected = GOOD_NAMES[case]
    path = write_dataset("set" + suffix, FILES, text(class_names=given))
    dataset = open_dataset(path, use_labels=True)
    assert dataset.class_names == expected and dataset.c_dim == 3
    assert open_dataset(path, use_labels=True, max_size=1).class_names == expected
    assert open_dataset(path).class_names is None


def test_sets_without_class_names(tiny_zip):
    assert open_dataset(tiny_zip, use_labels=True).class_names is None


BAD_NAMES = {
    "too few": (["ant", "bee"], "2 class names, but labels up to 2; name every class"),
    "no names": ([0, 1, 2], '"class_names" is not a list of names'),
    "empty name": (["ant", "", "cat"], '"class_names" is not a list of names'),
    "text": ("ant", '"class_names" is not a list of names'),
    "twice": (["ant", "ant", "cat"], "two classes are called 'ant'"),
    "gap": ({"0": "ant", "2": "cat"}, 'keys of "class_names" are not "0"'),
    "by name": ({"ant": 0, "bee": 1, "cat": 2}, 'keys of "class_names" are not "0"'),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_class_names_are_refused_when_used(write_dataset, case):
    given, message = BAD_NAMES[case]
    path = write_dataset("set.zip", FILES, text(class_names=given))
    assert open_dataset(path).c_dim == 0
    with pytest.raises(DatasetError, match=rf"set\.zip/dataset\.json: .*{message}") as caught:
        open_dataset(path, use_labels=True)
    assert "\n" not in str(caught.value)


def test_content_hash_ignores_options_names_and_order(write_dataset, tiny_folder, tiny_zip, tiny_images):
    content_hash = open_dataset(tiny_zip).content_hash
    assert len(content_hash) == 16
    for options in ({"use_labels": True}, {"mirror": True}, {"max_size": 2}, {"channels": 3}):
        assert open_dataset(tiny_zip, **options).content_hash == content_hash
    assert open_dataset(tiny_folder).content_hash == content_hash
    labels = dict(zip(tiny_images, open_dataset(tiny_zip, use_labels=True).labels.tolist(), strict=True))
    renamed = {f"x/{i}.png": tiny_images[name] for i, name in enumerate(reversed(list(tiny_images)))}
    new_labels = dict(zip(renamed, reversed(list(labels.values())), strict=True))
    assert open_dataset(write_dataset("renamed", renamed, new_labels)).content_hash == content_hash


def test_content_hash_tells_images_and_labels_apart(write_dataset, tiny_images, tiny_zip):
    first = next(iter(tiny_images))
    others = [
        open_dataset(write_dataset("unlabelled.zip", tiny_images)),
        open_dataset(write_dataset("other.zip", tiny_images, dict.fromkeys(tiny_images, 0))),
        open_dataset(write_dataset("changed", {**tiny_images, first: 255 - tiny_images[first]})),
        open_dataset(tiny_zip),
    ]
    assert len({other.content_hash for other in others}) == 4


def test_a_large_folder_is_not_read_for_its_hash(monkeypatch, tiny_folder, tiny_zip):
    monkeypatch.setattr(image_source, "MAX_HASHED_FOLDER_BYTES", 100)
    assert open_dataset(tiny_folder).content_hash is None
    assert open_dataset(tiny_zip).content_hash is not None


def test_a_zip_is_hashed_without_reading_its_images(monkeypatch, tiny_zip):
    dataset = open_dataset(tiny_zip)
    names = []
    plain = image_source.ZipSource._open
    monkeypatch.setattr(
        image_source.ZipSource, "_open", lambda self, name: names.append(name) or plain(self, name)
    )
    assert dataset.content_hash and names == ["dataset.json"]
