# SPDX-License-Identifier: MIT
"""atomic_write leaves the old file or the new one, and nothing else in the folder."""

import os

import pytest

from torch_utils.checkpoint import atomic_write


def test_writes_a_new_file_and_its_folder(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_writer_may_replace_the_temporary_file(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.unlink()
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    with atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
