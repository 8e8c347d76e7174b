# SPDX-License-Identifier: MIT
"""Fine-tuning on other classes: which classes of a checkpoint each new class starts from, and the rows that follow.

A class lives in three tables: embedding rows and mean styles of G, class vectors of D's heads. All take their
rows by the same `ClassSources`, so that a new class means the same to both networks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_utils.errors import UserError
from training.network_file import NetworkFile

CHOICES = ("same", "names", "nearest", "mean")  # words that --classes-from takes beside a list or a file
FEATURE_WIDTH = 320  # pooled channels of EfficientNet-Lite0
_SHOWN_CLASSES = 6  # in a sentence


@dataclass(frozen=True)
class ClassSources:
    """For every class of a run, the classes of the checkpoint whose mean it starts from.

    An unconditional run on a conditional checkpoint counts as one class.
    """

    ids: tuple[tuple[int, ...], ...]  # class ids of the checkpoint, per class of the run
    num_stored: int  # classes of the checkpoint
    origin: str  # how they were chosen, for people: "same ids", "nearest by image features", ...

    @property
    def is_identity(self) -> bool:
        """True if class i starts as class i, and there are as many."""
        return self.ids == tuple((i,) for i in range(self.num_stored))

    def describe(self) -> str:
        """Which class starts from which, shortened."""
        if self.is_identity:
            return f"classes 0 to {self.num_stored - 1} as they are"
        if set(self.ids) == {tuple(range(self.num_stored))}:
            return f"mean of {self.num_stored} classes"
        shown = ", ".join("+".join(map(str, ids)) for ids in self.ids[:_SHOWN_CLASSES])
        more = ", ..." if len(self.ids) > _SHOWN_CLASSES else ""
        return f"{self.origin}: from class {shown}{more}"


def choose_sources(
    choice: str,
    stored: NetworkFile,
    num_classes: int,
    names: Sequence[str] | None,
    compute_features: Callable[[], Tensor],
) -> ClassSources | None:
    """Sources for the `num_classes` of a run (0 = unconditional); None if the checkpoint has no classes.

    choice: "auto", one of CHOICES, a list or a file (see `read_sources`). "auto" is the first that can be had of: the
    same names; the same ids, where there are as many classes and no names that say otherwise; nearest; mean. names: of
    the run's classes, or None. compute_features: gives mean image features of the run's classes (at least one row).
    Raises UserError when the choice cannot be had.
    """
    num_stored = stored.generator_config.mapping.c_dim
    stored_names = stored.info.get("class_names")
    if choice == "same":
        return same_ids(num_stored, num_classes) if num_stored or num_classes else None
    if num_stored == 0:
        if choice != "auto":
            raise UserError(
                f"--classes-from {choice}: {stored.path} has no classes; leave --classes-from out"
            )
        return None
    num_targets = max(num_classes, 1)
    if choice == "auto":
        choice = _best_choice(stored, num_classes, names, stored_names)
        if choice == "same":
            return same_ids(num_stored, num_classes)
    if choice == "names":
        if not names or not stored_names:
            where = "the data" if stored_names else stored.path
            raise UserError(
                f"--classes-from names: {where} has no class names; use nearest, mean or a list of ids"
            )
        return same_names(stored_names, names)
    if choice == "nearest":
        if not has_feature_rows(stored):
            raise UserError(
                f"--classes-from nearest: the class table of {stored.path} does not hold image features; "
                "use names, mean or a list of class ids"
            )
        return nearest_rows(compute_features(), stored.G_ema["mapping.embed.weight"][:num_stored])
    if choice == "mean":
        return mean_of_all(num_stored, num_targets)
    return read_sources(choice, num_stored, num_targets, stored_names)


def _best_choice(
    stored: NetworkFile, num_classes: int, names: Sequence[str] | None, stored_names: Sequence[str] | None
) -> str:
    """What "auto" means."""
    if names and stored_names:
        if set(names) <= set(stored_names):
            return "names"
    elif num_classes == stored.generator_config.mapping.c_dim:
        return "same"
    return "nearest" if num_classes > 0 and has_feature_rows(stored) else "mean"


def has_feature_rows(stored: NetworkFile) -> bool:
    """True if the class table holds raw pooled features, as official ones do and tables read from a file may."""
    if stored.generator_config.mapping.embedding_dim != FEATURE_WIDTH:
        return False
    own = json.loads(stored.train_config_json or "{}")
    return own.get("embedding_source", "official") not in ("random", "data", "stem", "checkpoint")


def mean_of_all(num_stored: int, num_classes: int) -> ClassSources:
    """Every class starts from the mean of all."""
    return ClassSources((tuple(range(num_stored)),) * num_classes, num_stored, "mean")


def same_ids(num_stored: int, num_classes: int) -> ClassSources:
    """Class i starts from class i. UserError if the numbers differ."""
    if num_stored != num_classes:
        raise UserError(
            f"--classes-from same: the checkpoint has {num_stored} classes and this run {num_classes}; "
            "use names, nearest, mean or a list of class ids"
        )
    return ClassSources(tuple((i,) for i in range(num_classes)), num_stored, "same ids")


def same_names(stored_names: Sequence[str], names: Sequence[str]) -> ClassSources:
    """Every class starts from the class of the same name. UserError naming the first that is not there."""
    ids = {name: index for index, name in enumerate(stored_names)}
    if missing := [name for name in names if name not in ids]:
        raise UserError(
            f"--classes-from names: the checkpoint has no class {missing[0]!r} ({len(missing)} in all are missing); "
            "use nearest, mean or a list of class ids"
        )
    return ClassSources(tuple((ids[name],) for name in names), len(stored_names), "same names")


def nearest_rows(features: Tensor, rows: Tensor) -> ClassSources:
    """Every class starts from the class whose embedding row has the most similar direction.

    features: mean pooled image features of the new classes (classes, width); rows: embedding rows of the
    checkpoint's classes (stored classes, width), which must be such features too.
    """
    similarity = F.normalize(features.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    ids = tuple((int(index),) for index in similarity.argmax(dim=1))
    return ClassSources(ids, len(rows), "nearest by image features")


def read_sources(
    text: str, num_stored: int, num_classes: int, stored_names: Sequence[str] | None
) -> ClassSources:
    """Sources from a list such as "207,208,12+13", or from a file with one such entry per line.

    An entry is a class id or name of the checkpoint; `+` joins several, whose mean is taken; in a file, `#`
    starts a comment. UserError for a wrong number of entries and classes that are not there.
    """
    where = f"--classes-from {text}"
    if Path(text).is_file():
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not a text file of class ids ({error}); write one per line") from error
        entries = [line.partition("#")[0].strip() for line in lines]
        entries = [entry for entry in entries if entry]
    elif Path(text).suffix in (".txt", ".csv", ".json"):
        raise UserError(f"{where}: no such file; give one source class per line, or a list such as 207,208")
    else:
        entries = [entry.strip() for entry in text.split(",")]
    if len(entries) != num_classes:
        wanted = f"{num_classes} classes" if num_classes > 1 else "one class"
        raise UserError(f"{where}: {len(entries)} source classes for {wanted} of this run; give one for each")
    ids = tuple(_parse_entry(entry, num_stored, stored_names, where) for entry in entries)
    return ClassSources(ids, num_stored, "as listed")


def _parse_entry(
    entry: str, num_stored: int, stored_names: Sequence[str] | None, where: str
) -> tuple[int, ...]:
    if stored_names is not None and entry in stored_names:  # first, as a name may hold digits or a plus
        return (list(stored_names).index(entry),)
    ids = []
    for part in entry.split("+"):
        word = part.strip()
        if stored_names is not None and word in stored_names:
            ids.append(list(stored_names).index(word))
        elif word.isdecimal() and int(word) < num_stored:
            ids.append(int(word))
        else:
            names = " or the name of one" if stored_names is not None else ""
            raise UserError(f"{where}: {word!r} is not a class id 0...{num_stored - 1}{names}; correct it")
    return tuple(ids)


# Rows of tables.


def take_rows(table: Tensor, classes: ClassSources, num_rows: int | None = None) -> Tensor:
    """Rows of the new classes, then, up to `num_rows`, the table's own rows at those places (mean rows beyond it).

    A class with one source takes its row bit for bit.
    """
    means: dict[tuple[int, ...], Tensor] = {}
    for ids in classes.ids:
        if ids not in means:
            means[ids] = table[ids[0]] if len(ids) == 1 else table[list(ids)].double().mean(0).to(table.dtype)
    rows = torch.stack([means[ids] for ids in classes.ids])
    if num_rows is None or num_rows == len(rows):
        return rows
    spare = table[len(rows) : num_rows]
    missing = num_rows - len(rows) - len(spare)
    filler = table[: classes.num_stored].double().mean(0).to(table.dtype)
    return torch.cat([rows, spare, filler.expand(missing, -1)])
