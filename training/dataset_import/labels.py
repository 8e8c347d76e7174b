# SPDX-License-Identifier: MIT
"""Labels of a source before its images are read: from its `dataset.json`, or from the names of its folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from torch_utils.errors import UserError
from training.dataset_labels import is_class_id, parse_class_names

Label = int | list[float]  # class id; vectors pass through unread, as in StyleGAN's tool


@dataclass
class SourceLabels:
    """What is known about the classes of a source."""

    labels: list[Label | None]  # by image; None = this one has none
    class_names: tuple[str, ...] | None = None  # by class id
    remarks: list[str] = field(
        default_factory=list
    )  # for the summary: what was found odd, but did not matter


def labels_from_json(text: bytes, names: Sequence[str], location: str) -> SourceLabels:
    """Labels of `names` from the text of a `dataset.json`. Raises UserError for what is not one."""
    try:
        content = json.loads(text)
        entries = [(name.replace("\\", "/"), label) for name, label in content["labels"] or []]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{location}: not of the form {{"labels": [["file", class id], ...]}}; write it again or remove it '
            f"({error})"
        ) from error
    table: dict[str, Label | None] = {}
    for name, label in entries:
        if not (label is None or is_class_id(label) or _is_vector(label)):
            raise UserError(
                f"{location}: label {label!r:.40} of {name!r} is neither a whole number >= 0 nor a list of numbers; "
                "correct it"
            )
        if table.setdefault(name, label) != label:
            raise UserError(
                f"{location}: {name!r} has two labels, {table[name]!r:.40} and {label!r:.40}; keep one"
            )
    remarks = []
    if strangers := sorted(set(table).difference(names)):
        remarks.append(f"{len(strangers)} labels in {location} belong to no image (first: {strangers[0]})")
    labels = [table.get(name) for name in names]
    class_names = parse_class_names(content, location)
    last = max((label for label in labels if is_class_id(label)), default=-1)
    if class_names is not None and len(class_names) <= last:
        raise UserError(
            f"{location}: {len(class_names)} class names, but labels up to {last}; name every class"
        )
    return SourceLabels(labels, class_names, remarks)


def labels_from_folders(names: Sequence[str], location: str) -> SourceLabels:
    """Class of an image = rank of its first folder among all first folders, which also give the class names.

    Images outside of folders get no label. Raises UserError if that makes one class of a whole tree.
    """
    folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    class_names = sorted({folder for folder in folders if folder is not None})
    if not class_names:
        raise UserError(
            f"{location}: no folders in it, so --labels-from-folders finds no classes; leave it out"
        )
    if len(class_names) == 1 and None not in folders and all(name.count("/") > 1 for name in names):
        raise UserError(
            f"{location}: everything is in the folder {class_names[0]}, which would be the only class; "
            f"give that folder as --source (a zip: unpack it first)"
        )
    rank = {folder: index for index, folder in enumerate(class_names)}
    labels: list[Label | None] = [None if folder is None else rank[folder] for folder in folders]
    return SourceLabels(labels, tuple(class_names))


def _is_vector(label: object) -> bool:
    numbers = label if isinstance(label, list) else []
    return bool(numbers) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
