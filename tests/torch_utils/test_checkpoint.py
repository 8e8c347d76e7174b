# SPDX-License-Identifier: MIT
"""atomic_write leaves the old file or the new one, and nothing else in the folder."""

import os

import pytest

from torch_utils.checkpoint import atomic_copy, atomic_write, remove_temporary_files


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


def test_a_copy_shares_the_space_but_not_the_future(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_text("one")
    copy.write_text("old")
    atomic_copy(source, copy)
    assert copy.read_text() == "one" and os.path.samefile(source, copy)
    with atomic_write(source) as temporary:
        temporary.write_text("two")
    assert (source.read_text(), copy.read_text()) == ("two", "one")
    assert sorted(os.listdir(tmp_path)) == ["copy", "source"]


def test_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_text("one")
    atomic_copy(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "one"
    assert not os.path.samefile(tmp_path / "source", tmp_path / "copy")


def test_file_and_rename_are_flushed_in_this_order(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def noting_replace(*paths):
        events.append("rename")
        replace(*paths)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert events == ["file", "rename", "folder"]


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".file.abc123.tmp", "file.tmp", ".hidden"):
        (tmp_path / name).write_text("")
    remove_temporary_files(tmp_path)
    remove_temporary_files(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == [".hidden", "file.tmp"]
