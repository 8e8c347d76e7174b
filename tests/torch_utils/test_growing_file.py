# SPDX-License-Identifier: MIT
"""Lines are appended whole: after a torn one, and once a disk that refused them has room again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from torch_utils.growing_file import GrowingFile


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for lines in (["a", "b"], ["ä"]):
        file = GrowingFile(path, pytest.fail)
        for line in lines:
            file.append(line)
    assert path.read_text(encoding="utf-8") == "a\nb\nä\n"


def test_a_torn_line_is_ended_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("whole\nhal")
    file = GrowingFile(path, pytest.fail)
    assert path.read_text() == "whole\nhal"  # nothing happens before there is something to say
    file.append("next")
    file.append("last")
    assert path.read_text() == "whole\nhal\nnext\nlast\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refused_lines_wait_and_nothing_of_them_is_seen(tmp_path: Path, monkeypatch, code: int) -> None:
    path, problems = tmp_path / "log", []
    file = GrowingFile(path, problems.append)
    file.append("a")

    def refuse(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        file.append("b")
        file.append("c")
        assert path.read_text() == "a\n"
        assert len(problems) == 1 and os.strerror(code) in problems[0] and str(path) in problems[0]
    file.append("d")
    assert path.read_text() == "a\nb\nc\nd\n" and file.problem is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        file.append("e")
    file.flush()
    file.flush()
    assert path.read_text() == "a\nb\nc\nd\ne\n" and len(problems) == 2  # another trouble, another word


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    problems: list[str] = []
    file = GrowingFile(tmp_path / "absent" / "log", problems.append)
    file.append("a")
    (tmp_path / "absent").mkdir()
    file.append("b")
    assert (tmp_path / "absent" / "log").read_text() == "a\nb\n" and len(problems) == 1
