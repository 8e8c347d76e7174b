# SPDX-License-Identifier: MIT
"""--cache-data: copies are whole, verified, made once per machine, and made again when the original changed."""

import multiprocessing
import os
import shutil
import time
import zipfile
from collections import namedtuple

import pytest
import torch

from torch_utils.errors import UserError
from training import data_cache
from training.data_cache import RECORD, hash_file, stage_data
from training.dataset import open_dataset


def items(path):
    dataset = open_dataset(path, use_labels=True)
    return dataset.batch(range(len(dataset)))


def count_copies(monkeypatch):
    """A list that grows by one entry with every copy that is made."""
    made, plain = [], data_cache.copy_verified
    monkeypatch.setattr(
        data_cache, "copy_verified", lambda *arguments: made.append(arguments) or plain(*arguments)
    )
    return made


def test_a_zip_is_copied_as_it_is(tiny_zip, tmp_path):
    copy = stage_data(tiny_zip, tmp_path / "cache")
    assert copy.name == tiny_zip.name and copy.is_relative_to(tmp_path / "cache")
    assert copy.read_bytes() == tiny_zip.read_bytes()
    assert [p.name for p in copy.parent.iterdir() if p.name != RECORD] == [copy.name]  # nothing is left over


def test_a_folder_becomes_an_uncompressed_zip_of_the_same_content(tiny_folder, tmp_path):
    (tiny_folder / "notes.txt").write_text("no image")
    copy = stage_data(tiny_folder, tmp_path / "cache")
    original, staged = open_dataset(tiny_folder, use_labels=True), open_dataset(copy, use_labels=True)
    assert staged.name == original.name == "tiny"
    assert staged.content_hash == original.content_hash and staged.fingerprint() == original.fingerprint()
    for mine, theirs in zip(items(copy), items(tiny_folder), strict=True):
        assert torch.equal(mine, theirs)
    with zipfile.ZipFile(copy) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert "notes.txt" not in archive.namelist()


@pytest.mark.parametrize("name", ["digits", "no/such/file.zip", "README.md"])
def test_what_needs_no_copy_or_cannot_be_opened_is_left_to_others(name, tmp_path):
    assert stage_data(name, tmp_path / "cache") == name
    assert not (tmp_path / "cache").exists()


def test_a_copy_is_used_again_until_the_original_changes(tiny_zip, tmp_path, monkeypatch):
    made = count_copies(monkeypatch)
    first = stage_data(tiny_zip, tmp_path / "cache")
    assert stage_data(tiny_zip, tmp_path / "cache") == first and len(made) == 1
    os.utime(tiny_zip, ns=(1, 1))
    second = stage_data(tiny_zip, tmp_path / "cache")
    assert len(made) == 2 and second != first and first.exists()  # another run may be reading the first


def test_a_changed_file_in_a_folder_makes_another_copy(tiny_folder, tmp_path):
    first = stage_data(tiny_folder, tmp_path / "cache")
    shutil.copy(tiny_folder / "a" / "1.png", tiny_folder / "a" / "2.png")
    second = stage_data(tiny_folder, tmp_path / "cache")
    assert second != first and not torch.equal(items(first)[0], items(second)[0])


@pytest.mark.parametrize("damage", ["truncated", "touched", "no record", "half a record"])
def test_a_copy_that_is_not_as_it_was_is_made_again(damage, tiny_zip, tmp_path, monkeypatch):
    copy = stage_data(tiny_zip, tmp_path / "cache")
    if damage == "truncated":
        copy.write_bytes(copy.read_bytes()[:-10])
    elif damage == "touched":
        os.utime(copy, ns=(1, 1))
    elif damage == "no record":
        (copy.parent / RECORD).unlink()
    else:
        (copy.parent / RECORD).write_text('{"bytes":')
    (copy.parent / ".left.over.tmp").write_bytes(b"of a killed process")
    made = count_copies(monkeypatch)
    assert stage_data(tiny_zip, tmp_path / "cache") == copy and len(made) == 1
    assert copy.read_bytes() == tiny_zip.read_bytes()
    assert not (copy.parent / ".left.over.tmp").exists()


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_disk_that_stores_something_else_is_found_out(kind, tiny_zip, tiny_folder, tmp_path, monkeypatch):
    plain = data_cache.hash_file if kind == "zip" else data_cache.hash_members

    def flip_then_hash(path, advance):
        content = bytearray(path.read_bytes())
        content[60] ^= 1  # inside the first file's pixels
        path.write_bytes(content)
        return plain(path, advance)

    monkeypatch.setattr(data_cache, plain.__name__, flip_then_hash)
    with pytest.raises(UserError, match="differs from what was written"):
        stage_data(tiny_zip if kind == "zip" else tiny_folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.zip")) and not list((tmp_path / "cache").rglob(RECORD))


def test_an_original_that_changes_meanwhile_is_refused(tiny_zip, tmp_path, monkeypatch):
    plain = data_cache.write_file

    def write_and_touch(original, target, advance):
        digest = plain(original, target, advance)
        os.utime(tiny_zip, ns=(5, 5))
        return digest

    monkeypatch.setattr(data_cache, "write_file", write_and_touch)
    with pytest.raises(UserError, match="changed while it was copied"):
        stage_data(tiny_zip, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.zip"))


def test_too_little_space_is_said_before_anything_is_copied(tiny_zip, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 1000)
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs .* GiB .* only 0\.00 GiB are free there; delete old copies"):
        stage_data(tiny_zip, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.zip"))


def test_a_place_that_cannot_be_written_is_one_line(tiny_zip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-data .*cannot be copied") as caught:
        stage_data(tiny_zip, tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def stage_slowly(path, cache_dir, results):
    plain = data_cache.write_file

    def write(original, target, advance):
        results.put("copied")
        time.sleep(0.5)
        return plain(original, target, advance)

    data_cache.write_file = write
    results.put(str(stage_data(path, cache_dir)))


def test_the_processes_of_a_machine_make_one_copy(tiny_zip, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=stage_slowly, args=(tiny_zip, tmp_path / "cache", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert got.count("copied") == 1
    (copy,) = set(got) - {"copied"}
    assert hash_file(type(tiny_zip)(copy), lambda _: None) == hash_file(tiny_zip, lambda _: None)
