# SPDX-License-Identifier: MIT
"""Detectors by name: where weights are found, what a missing or damaged file leads to, sharing."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from metrics import detectors
from metrics.detectors import (
    DETECTORS,
    MissingDetectorError,
    WeightsFile,
    detector_folder,
    find_weights,
    get_detector,
    get_inception,
    get_lpips,
)
from torch_utils.download import DownloadError, cached_path
from torch_utils.errors import UserError

CONTENT = b"weights"
HASH = hashlib.sha256(CONTENT).hexdigest()
URL = "https://example.org/net.pth"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch) -> None:
    """No network, nothing downloaded before, nothing built before."""
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(detectors, "_cache", {})


@pytest.fixture
def own_source(monkeypatch) -> None:
    """A source whose file is a few bytes long."""
    files = (WeightsFile("net.pth", URL, HASH, "7 bytes"), WeightsFile("net.pt"))
    monkeypatch.setitem(detectors.SOURCES, "inception", files)


def put(folder: Path, name: str, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", ["inception", "inception_clean", "inception_random", "vgg16"])
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(name):
    with pytest.raises(MissingDetectorError) as caught:
        get_detector(name)
    message = str(caught.value)
    files = detectors.SOURCES[name.removesuffix("_clean")]
    assert f"{files[0].url} ({files[0].size})" in message and str(detector_folder()) in message
    assert all(file.name in message for file in files)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_missing_weights_of_timm(name, monkeypatch):
    def create(*_unused: object, **_options: object) -> None:
        raise OSError("no network\nhere")

    from metrics import vision_transformers

    monkeypatch.setattr(vision_transformers.timm, "create_model", create)
    with pytest.raises(MissingDetectorError, match=f"weights of '{name}' are missing.*huggingface") as caught:
        get_detector(name)
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(UserError, match="'resnet' is not known; valid detectors: " + ", ".join(DETECTORS)):
        get_detector("resnet")
    with pytest.raises(UserError, match="resize 'nearest' is not known; valid ways: tf1, clean"):
        get_inception(resize="nearest")


@pytest.mark.usefixtures("own_source")
def test_places_are_searched_in_order(tmp_path):
    fetched = cached_path(URL)
    places = [
        put(fetched.parent, fetched.name),
        put(tmp_path / "torch" / "hub" / "checkpoints", "net.pth"),
        put(detector_folder(), "net.pt", b"anything"),
        put(detector_folder(), "net.pth"),
    ]
    own = put(tmp_path, "mine.pth", b"anything")
    for place in reversed(places):
        assert find_weights("inception") == place
        assert find_weights("inception", own) == own
        place.unlink()
    with pytest.raises(MissingDetectorError, match="downloads are off"):
        find_weights("inception")


@pytest.mark.usefixtures("own_source")
def test_published_files_are_checked(tmp_path):
    path = put(detector_folder(), "net.pth", b"damaged")
    for given in (None, path):
        with pytest.raises(
            UserError, match=rf"has the SHA-256 \w{{64}}, the published file of this name {HASH}"
        ):
            find_weights("inception", given)
    path.write_bytes(CONTENT)
    os.utime(path, ns=(1, 1))  # another time of change, whatever the clock's steps
    assert find_weights("inception") == path


@pytest.mark.usefixtures("own_source")
def test_downloads_are_checked():
    put(cached_path(URL).parent, cached_path(URL).name, b"damaged")
    with pytest.raises(MissingDetectorError, match=f"does not have the SHA-256 {HASH}; delete that file"):
        find_weights("inception")


@pytest.mark.usefixtures("own_source")
def test_addresses_are_fetched(monkeypatch, tmp_path):
    own = put(tmp_path, "fetched.pth")
    asked: list[tuple[str, str | None]] = []

    def fetch(url: str, sha256: str | None) -> Path:
        asked.append((url, sha256))
        if "gone" in url:
            raise DownloadError(f"{url}: the server answers 404")
        return own

    monkeypatch.setattr(detectors, "fetch", fetch)
    assert find_weights("inception") == own
    assert find_weights("inception", "https://example.org/mine.pth") == own
    assert asked == [(URL, HASH), ("https://example.org/mine.pth", None)]
    with pytest.raises(MissingDetectorError, match="answers 404"):
        find_weights("inception", "https://example.org/gone.pth")


def test_a_path_that_is_no_file(tmp_path):
    for name in ("inception", "vgg16", "dinov2"):
        with pytest.raises(MissingDetectorError, match=r"nothing\.pt is no file"):
            get_detector(name, path=tmp_path / "nothing.pt")


def test_detectors_are_shared_until_their_file_changes(inception_file, tmp_path):
    path = tmp_path / "own.pth"
    shutil.copyfile(inception_file, path)
    state = torch.random.get_rng_state()
    first = get_detector("inception", path=path)
    assert first is get_inception("cpu", str(path))
    assert first.name == "inception"
    clean = get_detector("inception_clean", path=path)
    assert clean is not first and clean.name == "inception_clean"
    assert torch.equal(torch.random.get_rng_state(), state)
    os.utime(path, ns=(1, 1))
    again = get_detector("inception", path=path)
    assert again is not first and again.fingerprint == first.fingerprint


def test_lite0_is_always_there(tmp_path):
    assert get_detector("lite0").name == "lite0"
    with pytest.raises(UserError, match="takes no file"):
        get_detector("lite0", path=tmp_path)


def test_lpips_names_the_missing_convolutions():
    with pytest.raises(MissingDetectorError, match="vgg16-397923af"):
        get_lpips()
