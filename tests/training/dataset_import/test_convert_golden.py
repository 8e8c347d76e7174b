# SPDX-License-Identifier: MIT
"""Imports against the official tool's output (d_data.npz): names, order, labels, JSON text, pixels."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.dataset_import.convert import import_images
from training.dataset_import.plan import ImportOptions

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "d_data.npz")
LABELS = {"b/img2.png": 3, "a/img10.png": 0, "b/z/img1.png": 1, "B/img3.png": 3}
MAX_LEVELS = 1  # resampling differs by at most so much between versions of Pillow
CASES = {
    "folder_none": {"resolution": (16, 16)},
    "folder_center_crop": {"resolution": (16, 16), "transform": "center-crop"},
    "folder_center_crop_wide": {"resolution": (16, 12), "transform": "center-crop-wide"},
    "folder_max2": {"resolution": (16, 16), "max_images": 2},
}


def golden_tree(prefix: str, root: Path) -> Path:
    """Write the images below a key as PNG, whatever their suffix."""
    for key in GOLDEN.files:
        if key.startswith(prefix + "/"):
            file = root / key.removeprefix(prefix + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(GOLDEN[key]).save(file, format="PNG")
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = golden_tree("src", tmp_path / "src")
    (root / "dataset.json").write_text(json.dumps({"labels": [list(item) for item in LABELS.items()]}))
    return root


def run(source: Path, dest: Path, **options) -> dict[str, bytes]:
    """Name -> content of the zip, in the order of the archive."""
    import_images(ImportOptions(source=str(source), dest=str(dest), **options))
    with zipfile.ZipFile(dest) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def assert_images_match(files: dict[str, bytes], case: str) -> None:
    keys = [key for key in GOLDEN.files if key.startswith(case + "/") and key.endswith(".png")]
    assert len(keys) == len(files) - 1
    for key in keys:
        actual = pixels(files[key.removeprefix(case + "/")])
        assert actual.shape == GOLDEN[key].shape
        assert abs(actual - GOLDEN[key]).max() <= MAX_LEVELS, key


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_folder(source, tmp_path, case, num_threads):
    files = run(source, tmp_path / "o.zip", num_threads=num_threads, **CASES[case])
    assert list(files) == json.loads(str(GOLDEN[case + "/names"]))
    assert files["dataset.json"].decode() == str(GOLDEN[case + "/dataset_json"])
    assert_images_match(files, case)
    with zipfile.ZipFile(tmp_path / "o.zip") as archive:
        info = {member.filename: [member.compress_type, member.file_size] for member in archive.infolist()}
    assert info == json.loads(str(GOLDEN[case + "/info"]))


@pytest.mark.parametrize(("key", "shape"), [("rgba", (16, 16, 3)), ("gray", (16, 16))])
def test_alpha_and_grey(tmp_path, key, shape):
    (tmp_path / "src").mkdir()
    Image.fromarray(GOLDEN["src_" + key]).save(tmp_path / "src" / "x.png")
    files = run(tmp_path / "src", tmp_path / "o.zip", resolution=(16, 16))
    actual = pixels(files["00000/img00000000.png"])
    assert actual.shape == shape
    assert abs(actual - GOLDEN[key + "/out"]).max() <= MAX_LEVELS
    assert files["dataset.json"].decode() == str(GOLDEN["rgba/dataset_json"])


def test_zip_to_folder(source, tmp_path):
    run(source, tmp_path / "o.zip", **CASES["folder_none"])
    import_images(ImportOptions(source=str(tmp_path / "o.zip"), dest=str(tmp_path / "o")))
    files = {file.relative_to(tmp_path / "o").as_posix() for file in (tmp_path / "o").rglob("*.*")}
    assert sorted(files) == json.loads(str(GOLDEN["zip_to_dir/files"]))
    assert (tmp_path / "o" / "dataset.json").read_text() == str(GOLDEN["zip_to_dir/json"])


@pytest.mark.parametrize("inside", ["Data/CLS-LOC/train", "."])
def test_imagenet(tmp_path, inside):
    golden_tree("imagenet_src", tmp_path / "ILSVRC" / inside)
    options = {"resolution": (16, 16), "transform": "center-crop", "official": True}
    files = run(tmp_path / "ILSVRC", tmp_path / "o.zip", **options)
    assert list(files) == json.loads(str(GOLDEN["imagenet/names"]))
    assert files["dataset.json"].decode() == str(GOLDEN["imagenet/dataset_json"])
    assert_images_match(files, "imagenet")


@pytest.mark.parametrize("side", [16, 32])
def test_cifar10(tmp_path, side):
    base, rows = GOLDEN["cifar/base"], np.arange(20)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for batch in range(1, 6):
            table = {"data": base[(rows - batch) % 20], "labels": ((rows + batch) % 10).tolist()}
            content = pickle.dumps(table)
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{batch}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    options = {"resolution": (side, side), "max_images": 12}
    files = run(tmp_path / "cifar-10-python.tar.gz", tmp_path / "o.zip", **options)
    case = f"cifar/{side}"
    assert files.pop("dataset.json").decode() == str(GOLDEN[case + "/dataset_json"])
    actual = np.stack([pixels(content) for content in files.values()])
    assert abs(actual - GOLDEN[case + "/images"]).max() <= MAX_LEVELS


def test_the_comparison_can_fail(source, tmp_path):
    files = run(source, tmp_path / "o.zip", **CASES["folder_none"])
    with pytest.raises(AssertionError):
        assert_images_match(files, "folder_center_crop")
