# SPDX-License-Identifier: MIT
"""CIFAR10, CIFAR100, MNIST and LMDB: what is read, and that their pickles run nothing."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_utils.errors import UserError
from training.dataset_import.cifar import load_restricted_pickle
from training.dataset_import.sources import open_image_list


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_tar(path: Path, tables: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, table in tables.items():
            content = table if isinstance(table, bytes) else pickle.dumps(table)
            member = tarfile.TarInfo(f"some-folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def cifar10(path: Path, **changed: object) -> Path:
    tables = {f"data_batch_{i}": {"data": rows(4, i), "labels": [i, 0, 9, 2]} for i in (3, 1, 2, 5, 4)}
    names = {"label_names": [f"name {i}" for i in range(10)]}
    return write_tar(path, {"test_batch": b"ignored", **tables, "batches.meta": names, **changed})


def pixels(images, index: int) -> np.ndarray:
    with images.open(index) as image:
        return np.asarray(image)


def test_cifar10(tmp_path):
    images = open_image_list(str(cifar10(tmp_path / "cifar-10-python.tar.gz")), use_folder_labels=False)
    assert len(images) == 20 and images.labels == [x for i in range(1, 6) for x in (i, 0, 9, 2)]
    assert images.class_names == tuple(f"name {i}" for i in range(10))
    np.testing.assert_array_equal(pixels(images, 5), rows(4, 2)[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100_takes_fine_labels(tmp_path):
    train = {"data": rows(3), "fine_labels": [99, 0, 5], "coarse_labels": [1, 1, 1]}
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": ["x"] * 20}
    path = write_tar(tmp_path / "cifar-100-python.tar.gz", {"train": train, "test": b"", "meta": meta})
    images = open_image_list(str(path), use_folder_labels=False)
    assert images.labels == [99, 0, 5] and images.class_names[99] == "fine 99"
    np.testing.assert_array_equal(pixels(images, 2)[4, 7], rows(3)[2].reshape(3, 32, 32)[:, 4, 7])


def python2_pickle(content: bytes) -> bytes:
    """{"data": uint8 (1, len(content))} as numpy under Python 2 pickled it: text for bytes, protocol 2."""
    out = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
    out += b"K\x01K\x01M" + struct.pack("<H", len(content)) + b"\x86"
    out += (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    return out + b"T" + struct.pack("<i", len(content)) + content + b"tbs."


def test_pickles_of_python_2_are_read():
    content = rows(1).tobytes()
    array = load_restricted_pickle(python2_pickle(content))["data"].to_bytes_array()
    assert array.shape == (1, 3072) and array.tobytes() == content
    reference = pickle.loads(python2_pickle(content), encoding="latin1")["data"]
    np.testing.assert_array_equal(reference, array)


class Evil:
    def __init__(self, target, *args) -> None:
        self.call = (target, args)

    def __reduce__(self):
        return self.call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "call": pickle.dumps({"data": Evil(exec, touch)}),
        "nested": pickle.dumps({"data": [{"x": (Evil(eval, touch),)}]}),
        "system": f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        "state": b"\x80\x02cnumpy\nndarray\n)\x81cnumpy\ndtype\n(K\x01tRb.",
        "object array": pickle.dumps({"data": np.array([Evil(exec, touch)], dtype=object)}),
        "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "no table": pickle.dumps([1, 2]),
        "truncated": pickle.dumps({"data": rows(1)})[:-200],
        "noise": bytes(range(256)),
        "empty": b"",
    }


@pytest.mark.parametrize("case", hostile_pickles(Path("x")))
def test_a_hostile_pickle_runs_nothing(tmp_path, case):
    marker = tmp_path / "ran"
    content = hostile_pickles(marker)[case]
    path = cifar10(tmp_path / "cifar-10-python.tar.gz", data_batch_3=content)
    with pytest.raises(
        UserError, match=r"its contents are not those of CIFAR \(.*download it again"
    ) as caught:
        open_image_list(str(path), use_folder_labels=False)
    assert "\n" not in str(caught.value) and not marker.exists()


BAD_TABLES = {
    "no data": {"labels": [0]},
    "wrong size": {"data": rows(4)[:, :3000], "labels": [0] * 4},
    "too few labels": {"data": rows(4), "labels": [0]},
    "other type": {"data": rows(4).astype(np.float64), "labels": [0] * 4},
    "list": {"data": [1, 2, 3], "labels": [0]},
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_other_contents_are_refused(tmp_path, case):
    path = cifar10(tmp_path / "cifar-10-python.tar.gz", data_batch_2=BAD_TABLES[case])
    with pytest.raises(UserError, match="its contents are not those of CIFAR"):
        open_image_list(str(path), use_folder_labels=False)


def test_other_and_broken_tars(tmp_path):
    other = write_tar(tmp_path / "photos.tar.gz", {"a.png": b"x"})
    with pytest.raises(UserError, match=r"photos\.tar\.gz: holds neither CIFAR10.* unpack it"):
        open_image_list(str(other), use_folder_labels=False)
    whole = cifar10(tmp_path / "cifar-10-python.tar.gz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "half.tar.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"half\.tar\.gz: (not a complete tar file|holds neither)"):
            open_image_list(str(tmp_path / "half.tar.gz"), use_folder_labels=False)


def write_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, magic: int = 2051) -> Path:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", magic, *images.shape) + images.tobytes()))
    content = struct.pack(">2I", 2049, len(labels)) + labels.tobytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    return path


def test_mnist_is_padded(tmp_path):
    scans = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    images = open_image_list(str(write_mnist(tmp_path, scans, np.array([7, 0, 9], np.uint8))), False)
    assert images.labels == [7, 0, 9] and all(type(label) is int for label in images.labels)
    assert pixels(images, 1).shape == (32, 32)
    np.testing.assert_array_equal(pixels(images, 1)[2:-2, 2:-2], scans[1])
    assert pixels(images, 1).sum() == scans[1].sum()


def test_bad_mnist(tmp_path):
    scans, labels = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)
    path = write_mnist(tmp_path, scans, labels)
    whole = path.read_bytes()
    for content in (
        whole[:40],
        b"text",
        gzip.compress(b"short"),
        gzip.compress(struct.pack(">4I", 2051, 5, 28, 28)),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"idx3-ubyte\.gz: not a complete MNIST file .*download"):
            open_image_list(str(path), False)
    with pytest.raises(UserError, match="another kind of file"):
        open_image_list(str(write_mnist(tmp_path, scans, labels, magic=2049)), False)
    with pytest.raises(UserError, match="3 images, but 2 labels"):
        open_image_list(str(write_mnist(tmp_path, scans, labels[:2])), False)
    path.with_name("train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"labels are missing; put train-labels-idx1-ubyte\.gz"):
        open_image_list(str(path), False)


def test_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    scans = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    with (
        lmdb.open(str(tmp_path / "church_lmdb"), map_size=2**20) as environment,
        environment.begin(write=True) as t,
    ):
        for key, scan in zip((b"b", b"a", b"\xffz"), scans, strict=True):
            stream = io.BytesIO()
            Image.fromarray(scan).save(stream, "WEBP", lossless=True)
            t.put(key, stream.getvalue())
        t.put(b"broken", b"x")
    images = open_image_list(str(tmp_path / "church_lmdb") + "/", use_folder_labels=False)
    assert images.names == ["a", "b", "broken", "\\xffz"] and images.labels == [None] * 4
    np.testing.assert_array_equal(pixels(images, 0), scans[1])
    np.testing.assert_array_equal(pixels(images, 3), scans[2])
    images.close()


def test_bad_lmdb(tmp_path, monkeypatch):
    (tmp_path / "x_lmdb").mkdir()
    if pytest.importorskip("lmdb"):
        with pytest.raises(UserError, match="not a readable LMDB folder"):
            open_image_list(str(tmp_path / "x_lmdb"), False)
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        open_image_list(str(tmp_path / "x_lmdb"), False)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.zip").write_bytes(b"PK")
    for name, message in {
        "nowhere": "no such file or folder",
        "empty": "no image files in it, but nothing",
        ".": r"no image files in it, but .*1 \.pdf",
        "a.pdf": "not a folder, a .zip",
        "a.zip": "not a complete zip",
    }.items():
        with pytest.raises(UserError, match=message):
            open_image_list(str(tmp_path / name), False)
    with pytest.raises(UserError, match=r"--labels-from-folders: .* has no folders"):
        open_image_list(str(cifar10(tmp_path / "cifar-10-python.tar.gz")), use_folder_labels=True)


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "a.png")
    source = tmp_path / "src"
    (source / "inner").mkdir(parents=True)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "inner" / "loop").symlink_to(source)
    assert open_image_list(str(source), False).names == ["linked/a.png"]


def test_imagenet_beside_other_files(tmp_path):
    train = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    for name in ("n00000002", "n00000001", "other"):
        (train / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(train / name / "x.JPEG", "JPEG")
    (train.parent / "val").mkdir()
    Image.new("RGB", (8, 8)).save(train.parent / "val" / "y.JPEG", "JPEG")
    images = open_image_list(str(tmp_path / "ILSVRC"), False)
    assert images.names == ["n00000001/x.JPEG", "n00000002/x.JPEG"] and images.labels == [0, 1]
    assert images.class_names == ("n00000001", "n00000002") and images.ignored == ["other/x.JPEG"]
