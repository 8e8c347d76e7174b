# SPDX-License-Identifier: MIT
"""compute(): what is compared with what, the cache of reference statistics, names, and progress reports.

The detector is a small stand-in, but for one test with the real EfficientNet-Lite0.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import evaluate, features
from metrics.evaluate import ImageSet, compute
from torch_utils.errors import UserError


class TinyDetector:
    """Four means over the image as features; counts the images it has seen."""

    name = "tiny"
    fingerprint = "weights-1"

    def __init__(self):
        self.num_seen = 0

    def __call__(self, images):
        assert images.dtype == torch.uint8
        self.num_seen += len(images)
        x = images.float() / 255
        return torch.stack(
            [x.mean((1, 2, 3)), x[:, 0].mean((1, 2)), x[..., 0].mean((1, 2)), x[:, 1, 0, 0]], dim=1
        )


@pytest.fixture
def detector(monkeypatch):
    detector = TinyDetector()
    monkeypatch.setattr(features, "lite0_detector", lambda device: detector)
    return detector


@pytest.fixture
def images():
    return torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8)


def image_set(images, fingerprint="abc", batch_size=32):
    return ImageSet(len(images), fingerprint, lambda: iter(images.split(batch_size)))


def replay(images):
    """A generator that hands out the given images in order."""
    position = 0

    def generate(n):
        nonlocal position
        position += n
        return images[position - n : position]

    return generate


def test_identical_sets_have_distance_zero(detector, images, tmp_path):
    result = compute("fd_lite0", image_set(images), replay(images), cache_dir=tmp_path)
    assert list(result) == ["fd_lite0"]
    assert result["fd_lite0"] == pytest.approx(0, abs=1e-9)


def test_batch_size_does_not_matter(detector, images, tmp_path, monkeypatch):
    fakes = torch.randint(0, 200, images.shape, dtype=torch.uint8)
    values = []
    for batch_size, fake_batch_size in ((1, 64), (32, 7), (150, 150)):
        monkeypatch.setattr(evaluate, "GENERATE_BATCH", fake_batch_size)
        reference = image_set(images, batch_size=batch_size)
        folder = tmp_path / str(batch_size)
        values.append(compute("fd_lite0", reference, replay(fakes), cache_dir=folder)["fd_lite0"])
    assert values[0] > 0.001
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_as_many_fakes_as_reals_up_to_the_limit(detector, images, tmp_path, monkeypatch):
    asked = []

    def generate(n):
        asked.append(n)
        return images[:n]

    compute("fd_lite0", image_set(images), generate, cache_dir=tmp_path)
    assert sum(asked) == 150
    asked.clear()
    monkeypatch.setattr(evaluate, "MAX_IMAGES", 100)
    compute("fd_lite0", image_set(images), generate, cache_dir=tmp_path)
    assert sum(asked) == 100


def test_reference_is_computed_once_per_content_and_detector(detector, images, tmp_path):
    def num_real_seen(reference):
        detector.num_seen = 0
        compute("fd_lite0", reference, replay(images), cache_dir=tmp_path)
        return detector.num_seen - len(images)

    assert num_real_seen(image_set(images)) == 150
    assert num_real_seen(image_set(images.clone())) == 0  # another object, the same fingerprint
    assert num_real_seen(image_set(images, fingerprint="def")) == 150
    detector.fingerprint = "weights-2"
    assert num_real_seen(image_set(images)) == 150
    assert len(list(tmp_path.iterdir())) == 3


def test_cached_and_fresh_statistics_give_the_same_value(detector, images, tmp_path):
    fakes = images.flip(1) // 2
    fresh = compute("fd_lite0", image_set(images), replay(fakes), cache_dir=tmp_path)
    cached = compute("fd_lite0", image_set(images), replay(fakes), cache_dir=tmp_path)
    assert fresh == cached


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_cache_file_is_replaced(detector, images, tmp_path, damage):
    fakes = images // 2
    expected = compute("fd_lite0", image_set(images), replay(fakes), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2] if damage is None else damage)
    assert compute("fd_lite0", image_set(images), replay(fakes), cache_dir=tmp_path) == expected
    assert len(file.read_bytes()) == len(intact)


def test_a_cache_that_cannot_be_written_costs_only_time(detector, images, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert (
        compute("fd_lite0", image_set(images), replay(images), cache_dir=blocked / "cache")["fd_lite0"] < 1e-9
    )
    assert "not cached" in capsys.readouterr().out


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    assert evaluate.default_cache_dir() == tmp_path
    monkeypatch.delenv("STYLESAN_CACHE")
    assert evaluate.default_cache_dir() == Path.home() / ".cache" / "stylesan"


def test_progress_covers_both_sets(detector, images, tmp_path):
    calls = []
    compute(
        "fd_lite0", image_set(images), replay(images), cache_dir=tmp_path, progress=lambda *x: calls.append(x)
    )
    assert calls[4] == (150, 150) and calls[-1] == (150, 150)
    assert [done for done, _ in calls] == [32, 64, 96, 128, 150, 64, 128, 150]


def test_a_reference_that_breaks_its_promise_is_refused(detector, images, tmp_path):
    reference = ImageSet(151, "abc", lambda: iter(images.split(32)))
    with pytest.raises(ValueError, match="announced 151 images and yielded 150"):
        compute("fd_lite0", reference, replay(images), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_generator_that_returns_too_few_is_refused(detector, images, tmp_path):
    with pytest.raises(ValueError, match="asked for 64 images, the generator returned 10"):
        compute("fd_lite0", image_set(images), lambda n: images[:10], cache_dir=tmp_path)


def test_unknown_metric_lists_the_valid_ones(images):
    with pytest.raises(UserError, match=r"'fd_lite' is not available; valid metrics: fd_lite0$"):
        compute("fd_lite", image_set(images), replay(images))


def test_the_papers_metric_says_why_it_is_absent(images):
    with pytest.raises(UserError, match=r"'fid50k_full' .*Inception network, .* later release; .*fd_lite0"):
        compute("fid50k_full", image_set(images), replay(images))


def test_names_are_known_without_timm():
    code = "import sys; sys.modules['timm'] = None; from metrics.evaluate import *; check_metric('fd_lite0')"
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )


def test_real_detector_tells_noise_from_stripes(tmp_path):
    stripes = torch.zeros(24, 3, 16, 16, dtype=torch.uint8)
    for i in range(24):
        stripes[i, :, :, i % 4 :: 4] = 100 + 6 * i
    noise = torch.randint(0, 256, stripes.shape, dtype=torch.uint8)
    same = compute("fd_lite0", image_set(stripes), replay(stripes), cache_dir=tmp_path)["fd_lite0"]
    other = compute("fd_lite0", image_set(stripes), replay(noise), cache_dir=tmp_path)["fd_lite0"]
    assert other > 1 and same < 1e-6 * other
