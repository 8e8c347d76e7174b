# SPDX-License-Identifier: MIT
"""`dataset.json`: which class every image of a data set belongs to, and what the classes are called.

StyleGAN's format, `{"labels": [[file name, class id], ...]}` or `{"labels": null}`, with one addition that its
reader ignores: `"class_names": [name of class 0, ...]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from torch_utils.errors import UserError

LABEL_FILE = "dataset.json"


class DatasetError(UserError):
    """A data set that cannot be used; the message names the file, what is wrong and the fix."""


class NoLabelsError(DatasetError):
    """A data set without any labels, where they were asked for."""


class Annotations(NamedTuple):
    """What `dataset.json` says about the images of a set."""

    class_ids: np.ndarray  # int64 (number of images,)
    class_names: tuple[str, ...] | None  # by class id, one for each of 0 ... max(class_ids)


def parse_annotations(text: bytes, names: Sequence[str], location: str) -> Annotations:
    """Class ids in the order of `names`, and class names if there are any.

    Raises DatasetError, beginning with `location`, unless every name has exactly one label, every label is a
    whole number >= 0, and there is a name for every class or for none.
    """
    content, labels = _read_table(text, location)
    for problem, files in (
        ("images have no label", [name for name in names if name not in labels]),
        ("labels belong to no image", sorted(set(labels).difference(names))),
    ):
        if files:
            raise DatasetError(
                f"{location}: {len(files)} {problem}, the first is {files[0]!r}; make the two agree"
            )
    for name, label in labels.items():
        if not is_class_id(label):
            raise DatasetError(
                f"{location}: label {label!r:.40} of {name!r} is not a whole number >= 0; "
                "only class ids are supported (no label vectors)"
            )
    class_ids = np.array([labels[name] for name in names], dtype=np.int64)
    class_names = parse_class_names(content, location)
    num_classes = int(class_ids.max()) + 1
    if class_names is not None and len(class_names) < num_classes:
        raise DatasetError(
            f"{location}: {len(class_names)} class names, but labels up to {num_classes - 1}; "
            "name every class, or leave class_names out"
        )
    return Annotations(class_ids, None if class_names is None else class_names[:num_classes])


def _read_table(text: bytes, location: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole content, and its label by file name with forward slashes."""
    try:
        content = json.loads(text)
        entries = content["labels"]
        labels = None if entries is None else {name.replace("\\", "/"): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f'{location}: not of the form {{"labels": [["file", class id], ...]}}; write it again ({error})'
        ) from error
    if not labels:
        raise NoLabelsError(f"{location}: its labels are null or empty; list every image, or use no --cond")
    if len(labels) < len(entries):
        raise DatasetError(
            f"{location}: {len(entries) - len(labels)} file names are listed twice; list each once"
        )
    return content, labels


def parse_class_names(content: dict[str, Any], location: str) -> tuple[str, ...] | None:
    """Class names by class id from a decoded `dataset.json`; None without the key, or if it is null.

    Takes a list, or an object `{"0": name, ...}`. Raises DatasetError unless the names are different, filled
    strings, and the keys of an object are 0, 1, 2 ... in any order.
    """
    names = content.get("class_names")
    if names is None:
        return None
    if isinstance(names, dict):
        if set(names) != {str(class_id) for class_id in range(len(names))}:
            raise DatasetError(
                f'{location}: the keys of "class_names" are not "0" ... "{len(names) - 1}"; use a list of names'
            )
        names = [names[str(class_id)] for class_id in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DatasetError(
            f'{location}: "class_names" is not a list of names; write it again or leave it out'
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(
            f"{location}: two classes are called {twice[0]!r}; rename one, or leave class_names out"
        )
    return tuple(names)


def is_class_id(label: object) -> bool:
    """True for whole numbers >= 0 (and not for True and False, which Python counts as numbers)."""
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0
