# SPDX-License-Identifier: MIT
"""evaluate(): one pass for all metrics, what is compared with what, the cache of real features, settings, refusals.

Detectors are small stand-ins, but for one test with the real EfficientNet-Lite0.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from metrics import detectors, evaluate, feature_cache, feature_set, features, names, needs
from metrics.detectors import MissingDetectorError
from metrics.evaluate import ImageSet, Options, Sources
from torch_utils.errors import UserError


def compute(
    name: str, reference: ImageSet, generate: feature_set.LoadItems, cache_dir: Path | None = None
) -> dict[str, float]:
    """Results of one metric that needs images alone."""
    return evaluate.evaluate([name], reference, Sources(generate), cache_dir=cache_dir)[name].results


class TinyOutputs(NamedTuple):
    features: torch.Tensor
    sfid: torch.Tensor
    probabilities: torch.Tensor


class TinyDetector:
    """Four means over the image as features; counts the images it has seen."""

    name = "tiny"

    def __init__(self, fingerprint="weights-1"):
        self.fingerprint = fingerprint
        self.num_seen = 0

    def __call__(self, images):
        return self.outputs(images).features

    def outputs(self, images):
        assert images.dtype == torch.uint8
        self.num_seen += len(images)
        x = images.float() / 255
        means = [x.mean((1, 2, 3)), x[:, 0].mean((1, 2)), x[..., 0].mean((1, 2)), x[:, 1, 0, 0]]
        found = torch.stack(means, dim=1)
        return TinyOutputs(found, x[:, :, 0].flatten(1), (found * 5).softmax(dim=1))


class TinyLpips:
    fingerprint = "lpips-1"

    def distance(self, a, b):
        return (a - b).square().mean((1, 2, 3))


@pytest.fixture
def detector(monkeypatch):
    detector = TinyDetector()
    monkeypatch.setattr(features, "lite0_detector", lambda device: detector)
    return detector


@pytest.fixture
def inception(monkeypatch):
    """Stands for all networks."""
    detector = TinyDetector()
    monkeypatch.setattr(evaluate, "get_detector", lambda name, device, path: detector)
    monkeypatch.setattr(evaluate, "get_lpips", lambda device, path: TinyLpips())
    return detector


@pytest.fixture
def images():
    return torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8)


def image_set(images, fingerprint="abc", **fields):
    return ImageSet(len(images), fingerprint, lambda items: images[items], **fields)


def replay(images):
    """A generator that hands out the given images by number, again and again."""
    return lambda items: images[items % len(images)]


def test_identical_sets_have_distance_zero(detector, images, tmp_path):
    result = compute("fd_lite0", image_set(images), replay(images), cache_dir=tmp_path)
    assert list(result) == ["fd_lite0"]
    assert result["fd_lite0"] == pytest.approx(0, abs=1e-6)
    perfect = evaluate.evaluate(
        ["pr3_lite0", "dc5_lite0", "kd_lite0"], image_set(images), Sources(replay(images)), cache_dir=tmp_path
    )
    assert set(perfect["pr3_lite0"].results.values()) == {1}
    assert list(perfect["dc5_lite0"].results.values()) == pytest.approx([1, 1])
    assert abs(perfect["kd_lite0"].results["kd_lite0"]) < 0.01


def test_batch_size_does_not_matter(detector, images, tmp_path, monkeypatch):
    fakes = torch.randint(0, 200, images.shape, dtype=torch.uint8)
    values = []
    metrics = ["fd_lite0", "kd_lite0", "pr3_lite0", "dc5_lite0"]
    for batch_size in (1, 7, 64, 150):
        monkeypatch.setattr(feature_set, "BATCH_SIZE", batch_size)
        found = evaluate.evaluate(
            metrics, image_set(images), Sources(replay(fakes)), cache_dir=tmp_path / str(batch_size)
        )
        values.append([value for result in found.values() for value in result.results.values()])
    assert values[0][0] > 0.001
    np.testing.assert_allclose(values, [values[0]] * 4, rtol=1e-6)


def test_as_many_fakes_as_reals_up_to_the_limit(detector, images, tmp_path, monkeypatch):
    asked = []

    def generate(items):
        asked.extend(items.tolist())
        return images[items]

    compute("fd_lite0", image_set(images), generate, cache_dir=tmp_path)
    assert asked == list(range(150))
    asked.clear()
    monkeypatch.setattr(needs, "PAPER_FAKES", 100)
    compute("fd_lite0", image_set(images), generate, cache_dir=tmp_path)
    assert asked == list(range(100))


def test_one_pass_serves_all_metrics(inception, images, tmp_path):
    asked = []

    def generate(items):
        asked.extend(items.tolist())
        return (images // 2)[items % 150]

    wanted = ["fid50k_full", "kid50k_full", "is50k", "sfid50k_full", "fid10k_full"]
    options = Options(max_fakes=120)
    found = evaluate.evaluate(wanted, image_set(images), Sources(generate), "cpu", tmp_path, options)
    assert list(found) == wanted and asked == list(range(120)) and inception.num_seen == 120 + 150
    keys = [key for result in found.values() for key in result.results]
    assert keys == ["fid50k_full", "kid50k_full", "is50k_mean", "is50k_std", "sfid50k_full", "fid10k_full"]
    for name in wanted:
        alone = evaluate.evaluate([name], image_set(images), Sources(generate), "cpu", tmp_path, options)
        assert alone[name] == found[name]
    assert found["fid50k_full"].results["fid50k_full"] == found["fid10k_full"].results["fid10k_full"]


def test_reals_that_count(inception, images, tmp_path):
    """All of them, the first ones, mirrored ones too, a random choice: by the name of the metric."""
    reference = image_set(images, is_mirrored=True)

    def plan(name):
        return needs.find_needs(names.get_plan(name), reference, Options())

    assert plan("fid50k_full").num_reals == 150 and plan("fid50k").num_reals == 300
    assert plan("is50k").num_reals == 0 and plan("is50k").real is None
    both = needs.load_items(reference, np.array([149, 150, 299]))
    assert torch.equal(both[0], images[149]) and torch.equal(both[1:], images[[0, 149]].flip(3))
    large = ImageSet(300_000, "abc", lambda items: images)
    chosen = needs.find_needs(names.get_plan("pr50k3_full"), large, Options()).real.selection
    assert len(chosen) == 200_000 and chosen.items.max() > 250_000 and (np.diff(chosen.items) > 0).all()


def test_kid_of_a_large_set_holds_the_drawn_images_only(monkeypatch):
    reference = ImageSet(3_000, "abc", lambda items: None)
    plan = names.get_plan("kid50k_full")
    whole = needs.find_needs(plan, reference, Options(seed=4))
    monkeypatch.setattr(needs, "MAX_ROWS", 2_000)
    monkeypatch.setattr(needs, "draw_subsets", lambda *x: [(f, r[:9]) for f, r in whole.subsets[:50]])
    drawn = needs.find_needs(plan, reference, Options(seed=4))
    assert len(drawn.real.selection) < 450 and drawn.num_reals == 3_000
    for (_, rows), (_, items) in zip(drawn.subsets, whole.subsets, strict=False):
        np.testing.assert_array_equal(drawn.real.selection.items[rows], items[:9])


def test_reference_is_computed_once_per_content_and_detector(detector, images, tmp_path):
    def num_real_seen(reference, name="fd_lite0"):
        detector.num_seen = 0
        compute(name, reference, replay(images), cache_dir=tmp_path)
        return detector.num_seen - len(images)

    for name in ("fd_lite0", "pr3_lite0"):
        assert num_real_seen(image_set(images), name) == 150
        assert num_real_seen(image_set(images.clone()), name) == 0  # another object, the same fingerprint
        assert num_real_seen(image_set(images, fingerprint="def"), name) == 150
    detector.fingerprint = "weights-2"
    assert num_real_seen(image_set(images)) == 150
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy"] * 2 + [".npz"] * 3


@pytest.mark.parametrize("name", ["fd_lite0", "pr3_lite0", "dc5_lite0", "kd_lite0"])
def test_cached_and_fresh_features_give_the_same_value(detector, images, tmp_path, name):
    fakes = images.flip(1) // 2
    fresh, cached = (compute(name, image_set(images), replay(fakes), cache_dir=tmp_path) for _ in range(2))
    assert fresh == cached


@pytest.mark.parametrize("name", ["fd_lite0", "pr3_lite0"])
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_cache_file_is_replaced(detector, images, tmp_path, name, damage):
    fakes = images // 2
    expected = compute(name, image_set(images), replay(fakes), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2] if damage is None else damage)
    assert compute(name, image_set(images), replay(fakes), cache_dir=tmp_path) == expected
    assert len(file.read_bytes()) == len(intact)


def test_rows_that_are_too_large_are_not_cached(detector, images, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "MAX_ROWS_BYTES", 150 * 4 * 4 - 1)
    compute("pr3_lite0", image_set(images), replay(images), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_costs_only_time(detector, images, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    value = compute("fd_lite0", image_set(images), replay(images), cache_dir=blocked / "cache")["fd_lite0"]
    assert value < 1e-6 and "not cached" in capsys.readouterr().out


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    assert feature_cache.default_cache_dir() == tmp_path
    monkeypatch.delenv("STYLESAN_CACHE")
    assert feature_cache.default_cache_dir() == Path.home() / ".cache" / "stylesan"


def test_classes_are_compared_one_by_one(detector, images, tmp_path):
    labels = np.arange(150) % 3
    reference = image_set(images, labels=labels)
    fakes = images.clone()
    fakes[labels == 1] //= 2
    sources = Sources(replay(fakes), labels=lambda items: labels[items % 150])
    found = evaluate.evaluate(["fd_lite0_per_class"], reference, sources, "cpu", tmp_path)[
        "fd_lite0_per_class"
    ]
    assert list(found.details) == ["class_0", "class_1", "class_2"]
    assert found.details["class_0"] < 1e-6 and found.details["class_1"] > 0.01
    assert found.results["fd_lite0_per_class_worst"] == found.details["class_1"]
    assert found.results["fd_lite0_per_class_mean"] == pytest.approx(found.details["class_1"] / 3, rel=1e-3)


def test_paths_and_motions(inception, images, tmp_path):
    images = torch.nn.functional.interpolate(images.float(), scale_factor=4).byte()

    def paths(items, epsilon):
        x = images[items % 150].float() / 127.5 - 1
        return x, x + epsilon * (1 + torch.from_numpy(items)[:, None, None, None])

    def draw_moved(items, motion):
        assert len(items) <= 4
        return images[items % 150].float() / 127.5 - 1  # stays where it is

    sources = Sources(replay(images), paths=paths, draw_moved=draw_moved)
    wanted = ["ppl2_wend", "eqt50k_int", "eqr50k"]
    found = evaluate.evaluate(wanted, image_set(images), sources, "cpu", tmp_path, Options(max_fakes=100))
    trimmed = [(127.5 * (1 + i)) ** 2 for i in range(0, 100)]
    assert found["ppl2_wend"].results["ppl2_wend"] == pytest.approx(np.mean(trimmed), rel=0.03)
    assert 0 < found["eqt50k_int"].results["eqt50k_int"] < 20
    assert list(found) == wanted and inception.num_seen == 0


def test_settings_say_what_the_number_depends_on(detector, images, tmp_path):
    sources = Sources(replay(images), settings={"truncation_psi": 0.7})
    options = Options(seed=3, max_fakes=100, half_distances=True)
    found = evaluate.evaluate(["pr3_lite0", "kd_lite0"], image_set(images), sources, "cpu", tmp_path, options)
    assert found["pr3_lite0"].settings == {
        "num_generated": 100,
        "num_real": 150,
        "real_mirrored": False,
        "data_fingerprint": "abc",
        "detector": "lite0",
        "detector_fingerprint": "weights-1",
        "half_distances": True,
        "truncation_psi": 0.7,
    }
    assert (
        found["kd_lite0"].settings["metric_seed"] == 3 and "half_distances" not in found["kd_lite0"].settings
    )


def test_settings_say_whether_mirrored_images_count(inception, images, tmp_path):
    reference = image_set(images, is_mirrored=True)
    found = evaluate.evaluate(
        ["fid50k", "fid50k_full"], reference, Sources(replay(images)), "cpu", tmp_path, Options(max_fakes=50)
    )
    settings = [found[name].settings for name in ("fid50k", "fid50k_full")]
    assert [(s["num_real"], s["real_mirrored"]) for s in settings] == [(300, True), (150, False)]


def test_seed_of_the_subsets(detector, images, tmp_path):
    def kid(seed):
        sources = Sources(replay(images // 2))
        options = Options(seed=seed, max_fakes=40)
        found = evaluate.evaluate(["kd_lite0"], image_set(images), sources, "cpu", tmp_path, options)
        return found["kd_lite0"].results["kd_lite0"]

    assert kid(0) == kid(0) != kid(1)


def test_a_missing_detector_is_an_error_or_leaves_its_metrics_out(detector, images, tmp_path, monkeypatch):
    def missing(name, path=None):
        raise MissingDetectorError(f"fetch the weights of {name}")

    monkeypatch.setattr(detectors, "find_weights", missing)
    wanted, told = ["fid50k_full", "fd_lite0", "is50k", "eqr50k"], []
    arguments = (image_set(images), Sources(replay(images)), "cpu", tmp_path)
    with pytest.raises(MissingDetectorError, match="fetch the weights of inception"):
        evaluate.evaluate(["fid50k_full"], *arguments)
    found = evaluate.evaluate(wanted, *arguments, on_unavailable=lambda *x: told.append(x))
    assert list(found) == ["fd_lite0"]
    assert [name for name, _ in told] == ["eqr50k", "fid50k_full", "is50k"] and "fetch" in told[1][1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fid50k_per_class", "classes"), ("ppl2_wend", "style vectors"), ("eqt50k_frac", "Fourier features")],
)
def test_what_these_images_cannot_serve_is_refused(images, name, reason):
    with pytest.raises(UserError, match=f"{name} .*{reason}.*; leave it out"):
        compute(name, image_set(images), replay(images))


def test_a_reference_that_breaks_its_promise_is_refused(detector, images, tmp_path):
    reference = ImageSet(150, "abc", lambda items: images[items][:3])
    with pytest.raises(ValueError, match="asked for 64 real images, got 3"):
        compute("fd_lite0", reference, replay(images), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_loading_thread_arrive(detector, images, tmp_path):
    def load(items):
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        compute("fd_lite0", ImageSet(150, "abc", load), replay(images), cache_dir=tmp_path)


def test_a_generator_that_returns_too_few_is_refused(detector, images, tmp_path):
    with pytest.raises(ValueError, match="asked for 64 generated images, got 10"):
        compute("fd_lite0", image_set(images), lambda items: images[:10], cache_dir=tmp_path)


def test_progress_has_a_bar_on_a_terminal_only(detector, images, tmp_path, monkeypatch):
    bars = []
    real_bar = feature_set.tqdm
    monkeypatch.setattr(feature_set, "tqdm", lambda **kwargs: bars.append(kwargs) or real_bar(**kwargs))
    compute("fd_lite0", image_set(images), replay(images), cache_dir=tmp_path)
    assert [(bar["desc"], bar["total"], bar["disable"]) for bar in bars] == [
        ("real images", 150, True),
        ("generated images", 150, True),
    ]


def test_unknown_metric_lists_the_valid_ones(images):
    with pytest.raises(
        UserError, match=r"'fd_lite' is not available; valid metrics: fid50k_full, .*fd_lite0"
    ):
        compute("fd_lite", image_set(images), replay(images))


def test_names_are_known_without_timm():
    code = "import sys; sys.modules['timm'] = None; from metrics.names import *; get_plan('fd_lite0')"
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
