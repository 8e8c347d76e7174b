# SPDX-License-Identifier: MIT
"""Columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Lines of equally wide columns; the first `num_left` begin at their left, numbers end at their right.

    >>> align_columns([["a", "1"], ["bc", "20"]]).splitlines()
    ['a    1', 'bc  20']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
