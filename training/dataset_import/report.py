# SPDX-License-Identifier: MIT
"""What an import or an inspection found, as text for people: counts, and the first few examples of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

NUM_EXAMPLES = 5  # files named for each kind of problem
MAX_CLASSES_LISTED = 20  # of more classes, the largest and smallest are listed


@dataclass
class Findings:
    """Files by what was found about them, in order of appearance."""

    examples: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first few files
    counts: Counter[str] = field(default_factory=Counter)  # kind -> number of files

    def add(self, kind: str, file: str) -> None:
        """Count `file`, and keep its name if it is among the first."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(file)

    @property
    def total(self) -> int:
        """Number of files counted; one that was added for two kinds counts twice."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """Two levels: a kind with its count, then its examples."""
        lines = []
        for kind, count in self.counts.most_common():
            lines.append(f"  {count:>9,}  {kind}")
            lines += [f"             {file}" for file in self.examples[kind]]
            if count > NUM_EXAMPLES:
                lines.append(f"             ... and {count - NUM_EXAMPLES:,} more")
        return lines


@dataclass
class ImportReport:
    """What an import wrote, what it changed and what it left out."""

    dest: str  # zip or folder
    side: int  # pixels
    mode: str  # "RGB" or "grey"
    num_images: int  # written
    num_seen: int  # images of the source, as far as --max-images
    num_bytes: int  # of all image files
    content_hash: str  # see training.image_source.hash_content
    class_counts: np.ndarray | None  # int64 (number of classes,); None = no class ids were written
    class_names: tuple[str, ...] | None  # by class id; None = not known
    label_text: str  # one line on the labels
    changed: Findings  # written, but not as they were
    dropped: Findings  # not written
    remarks: Sequence[str] = ()  # one line each

    def text(self) -> str:
        """The summary, several lines."""
        lines = [
            f"{self.dest}: {self.num_images:,} images, {self.side}x{self.side} {self.mode}, "
            f"{describe_size(self.num_bytes)}, content hash {self.content_hash}",
            f"Labels: {self.label_text}",
        ]
        if self.class_counts is not None:
            lines += class_lines(self.class_counts, self.class_names)
        if self.changed.total:
            lines += ["Changed:", *self.changed.lines()]
        if self.dropped.total:
            lines += [f"Dropped {self.dropped.total:,} of {self.num_seen:,} images:", *self.dropped.lines()]
        return "\n".join([*lines, *(f"Note: {remark}" for remark in self.remarks)])


def describe_size(num_bytes: int) -> str:
    """Such as "3.2 GiB"."""
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} bytes" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


def describe_classes(counts: np.ndarray) -> str:
    """One line on the classes: how many, their sizes, and which are empty. counts: images by class id."""
    sizes = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    text = f"{len(counts):,} classes with {sizes} images each"
    if empty := np.flatnonzero(counts == 0).tolist():
        shown = ", ".join(map(str, empty[:NUM_EXAMPLES])) + (", ..." if len(empty) > NUM_EXAMPLES else "")
        text += f"; {len(empty):,} of them empty: {shown}"
    return text


def class_lines(counts: np.ndarray, names: Sequence[str] | None) -> list[str]:
    """A line for every class, or for the largest and smallest of many: id, images, name."""

    def line(class_id: int) -> str:
        name = "" if names is None else f"  {names[class_id]}"
        return f"  {class_id:>9}  {counts[class_id]:>9,}{name}"

    ids: Sequence[int] = range(len(counts))
    if len(counts) <= MAX_CLASSES_LISTED:
        return [f"  {'class':>9}  {'images':>9}", *map(line, ids)]
    by_size = np.argsort(-counts, kind="stable").tolist()
    largest, smallest = by_size[:NUM_EXAMPLES], by_size[-NUM_EXAMPLES:]
    left_out = len(counts) - len(largest) - len(smallest)
    gap = f"  {'...':>9}  {left_out:,} more classes"
    return [f"  {'class':>9}  {'images':>9}", *map(line, largest), gap, *map(line, smallest)]


def describe_counts(counts: Counter[str]) -> str:
    """Such as "RGB", or "RGB (1,200), L (3)" if there are several."""
    if len(counts) <= 1:
        return "".join(counts)
    shown = [f"{kind} ({count:,})" for kind, count in counts.most_common(8)]
    return ", ".join(shown) + (f" and {len(counts) - 8:,} more" if len(counts) > 8 else "")
