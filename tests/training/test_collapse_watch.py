# SPDX-License-Identifier: MIT
"""Collapse watch: silent on what healthy runs showed, one warning per failure; its diversity against plain loops."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from training.collapse_watch import (
    COMPARED_RESOLUTION,
    CONDITIONS,
    MAX_COMPARED,
    SNAPSHOTS,
    TICKS,
    CollapseWatch,
    class_distances,
)
from training.digits import open_digits
from training.presets import quickstart

NIMG = 20_000  # half of the run

# Ticks of a quickstart run of 20 kimg (SAN, hinge), at 0, 1, 2, 4, 7, 9, 11, 14 and 16 kimg.
HEALTHY = {
    "Loss/signs/real": (0.16, 0.94, 0.97, 1.00, 0.97, 0.82, 0.90, 0.87, 0.91),
    "Loss/signs/fake": (0.28, -0.93, -0.98, -1.00, -0.97, -0.89, -0.90, -0.92, -0.92),
    "SAN/cosine": (-0.040, 0.566, 0.707, 0.853, 0.903, 0.843, 0.805, 0.835, 0.868),
    "SAN/agreement": (0.423, 0.891, 0.945, 0.911, 0.912, 0.723, 0.628, 0.787, 0.796),
    "SAN/drift_deg": (0.457, 0.416, 0.367, 0.341, 0.339, 0.284, 0.358, 0.386, 0.349),
    "SAN/scale": (8.208, 8.207, 8.187, 8.176, 8.192, 8.180, 8.179, 8.184, 8.185),
}


def tick_stats(**changes: float) -> dict:
    """Statistics of a healthy tick, but for some values; None leaves one out."""
    values = {name: ticks[-1] for name, ticks in HEALTHY.items()}
    values |= {name.replace("__", "/"): value for name, value in changes.items()}
    return {
        name: {"num": 1, "mean": value, "std": 0.0} for name, value in values.items() if value is not None
    }


class Watched:
    """A watch on digits, ten of each of ten classes, and what it warned of."""

    def __init__(self, has_classes: bool = True, **changes) -> None:
        source = open_digits()
        labels = torch.from_numpy(source.labels())
        picks = torch.cat([torch.nonzero(labels == label)[:10, 0] for label in range(10)])
        images = torch.stack([torch.from_numpy(source.read(int(i))[1]) for i in picks]).permute(0, 3, 1, 2)
        self.real = images
        self.labels = labels[picks] if has_classes else None
        self.warnings: list[str] = []
        config = replace(quickstart(), **changes)
        self.watch = CollapseWatch(config, images, self.labels, self.warnings.append)

    @property
    def fakes(self) -> torch.Tensor:
        """The real images as G would make them."""
        return self.real.float() / 127.5 - 1

    def ticks(self, count: int, nimg: int = NIMG, **changes: float) -> list[str]:
        for _ in range(count):
            self.watch.look_at_stats(tick_stats(**changes), nimg)
        return self.warnings


# Diversity.


@pytest.mark.parametrize("size", [8, COMPARED_RESOLUTION])
def test_distances_are_those_of_a_plain_loop(size):
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 5])
    got = class_distances(images, labels)
    assert list(got) == [0, 2]  # class 5 has no pair
    for label in (0, 2):
        group = images[labels == label].double()
        pairs = [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(group, 2)]
        assert got[label] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_large_images_are_averaged_down_first():
    images = torch.randint(
        0, 256, (4, 3, 2 * COMPARED_RESOLUTION, 2 * COMPARED_RESOLUTION), dtype=torch.uint8
    )
    small = torch.nn.functional.avg_pool2d(images.float(), 2) / 127.5 - 1
    assert class_distances(images, None)[0] == pytest.approx(class_distances(small, None)[0], rel=1e-4)


def test_images_of_both_ranges_compare():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert class_distances(images.float() / 127.5 - 1, None)[0] == pytest.approx(
        class_distances(images, None)[0], rel=1e-5
    )


def test_repeated_real_images_do_not_count():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    repeated = images.repeat(4, 1, 1, 1)
    assert class_distances(repeated, None, are_repeated=True)[0] == pytest.approx(
        class_distances(images, None)[0], rel=1e-4
    )
    assert class_distances(images[:1].repeat(4, 1, 1, 1), None, are_repeated=True) == {}


def test_large_classes_are_cut():
    images = torch.zeros(MAX_COMPARED + 1, 1, 4, 4)
    images[-1] = 1
    assert class_distances(images, None)[0] == 0


@pytest.mark.parametrize("has_classes", [True, False])
def test_real_images_have_diversity_one(has_classes):
    watched = Watched(has_classes)
    values = watched.watch.look_at_images(watched.fakes, NIMG)
    assert values["Health/diversity"] == pytest.approx(1, rel=1e-4)
    assert ("Health/worst_class_diversity" in values) is has_classes
    assert not watched.warnings


def test_the_least_diverse_healthy_grid_is_passed():
    """Shrunk towards class means, to what the least varied of 63 trained grids had: 0.56, worst class 0.46."""
    watched = Watched()
    means = torch.stack([watched.fakes[watched.labels == i].mean(0) for i in range(10)])[watched.labels]
    factors = torch.full((10,), 0.57)
    factors[3] = 0.46
    fakes = means + (watched.fakes - means) * factors[watched.labels][:, None, None, None]
    for _ in range(5):
        values = watched.watch.look_at_images(fakes, NIMG)
    assert values["Health/diversity"] == pytest.approx(0.56, abs=0.01)
    assert values["Health/worst_class_diversity"] == pytest.approx(0.46, abs=0.01)
    assert not watched.warnings


def test_a_collapse_is_told_once_until_it_is_over():
    watched = Watched()
    collapsed = watched.fakes[:1].repeat(100, 1, 1, 1) + 0.01 * torch.randn(100, 1, 1, 1)
    for _ in range(4):
        values = watched.watch.look_at_images(collapsed, NIMG)
    assert values["Health/diversity"] < 0.1
    (warning,) = watched.warnings
    assert warning.startswith("Warning at 20 kimg: the images of G_ema differ among each other only 0.0")
    assert "\n" not in warning and "--glr" in warning
    watched.watch.look_at_images(watched.fakes, NIMG)
    for _ in range(SNAPSHOTS):
        watched.watch.look_at_images(collapsed, NIMG)
    assert len(watched.warnings) == 2


def test_one_collapsed_class_is_named():
    watched = Watched()
    fakes = watched.fakes
    fakes[watched.labels == 4] = fakes[watched.labels == 4][:1]
    for _ in range(SNAPSHOTS):
        watched.watch.look_at_images(fakes, NIMG)
    (warning,) = watched.warnings
    assert "the images of class 4 differ among each other only 0.00 times" in warning


def test_nothing_is_judged_before_a_run_has_settled():
    """An untrained G makes nearly one image: 0.26 to 0.67 in twelve runs."""
    watched = Watched()
    for _ in range(2 * SNAPSHOTS):
        watched.watch.look_at_images(torch.zeros_like(watched.fakes), cur_nimg=1000)
    assert watched.ticks(2 * TICKS, nimg=1000, Loss__signs__real=1.0, Loss__signs__fake=-1.0) == []


# Statistics.


def test_a_healthy_run_is_left_in_peace():
    watched = Watched()
    for tick in range(len(HEALTHY["SAN/scale"])):
        for _ in range(2):
            stats = {name: {"num": 1, "mean": ticks[tick], "std": 0.0} for name, ticks in HEALTHY.items()}
            watched.watch.look_at_stats({**stats, "timestamp": 1.0}, 2100 + 2000 * tick)
    assert watched.warnings == []


FAILURES = {
    "D won": ({"Loss__signs__real": 0.999, "Loss__signs__fake": -0.999}, "lower --dlr"),
    "G won": ({"Loss__signs__real": 0.5, "Loss__signs__fake": 0.999}, "raise --dlr"),
    "D blind": ({"Loss__signs__real": 0.01, "Loss__signs__fake": -0.01}, "stopped learning"),
    "direction": ({"SAN__cosine": -0.3}, "SAN/cosine -0.30"),
    "scale": ({"SAN__scale": 0.01}, "logits vanish"),
    "drift": ({"SAN__drift_deg": 0.0}, "frozen"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_that_lasts_is_told_once_until_it_is_over(name):
    changes, words = FAILURES[name]
    watched = Watched()
    watched.ticks(1)  # healthy: the first scale is what later ones are compared with
    assert watched.ticks(TICKS - 1, **changes) == []  # it may pass
    assert watched.ticks(1) == watched.ticks(TICKS - 1, **changes) == []
    assert len(watched.ticks(3 * TICKS, **changes)) == 1
    assert words in watched.warnings[0]
    watched.ticks(1)
    assert len(watched.ticks(TICKS, **changes)) == 2


def test_every_failure_of_the_statistics_is_tested():
    assert set(CONDITIONS) == {*FAILURES, "alike", "class alike"}


def test_a_direction_without_evidence_is_not_judged():
    assert Watched().ticks(2 * TICKS, SAN__cosine=-0.3, SAN__agreement=0.1) == []


def test_plain_runs_have_no_conditions_of_san():
    plain = {name.replace("/", "__"): None for name in HEALTHY if name.startswith("SAN/")}
    assert Watched().ticks(2 * TICKS, **plain) == []


@pytest.mark.parametrize("objective", ["wasserstein", "relativistic", "began", "least_squares"])
def test_signs_say_nothing_where_logits_have_no_zero(objective):
    watched = Watched(objective=objective)
    assert watched.ticks(2 * TICKS, Loss__signs__real=1.0, Loss__signs__fake=1.0) == []


def test_ticks_without_a_measurement_do_not_count():
    """SAN/* are measured every 32 steps of D: short ticks have none."""
    watched = Watched()
    for _ in range(TICKS - 1):
        watched.ticks(1, SAN__cosine=-0.3)
        watched.ticks(1, SAN__cosine=None, SAN__agreement=None)
    assert watched.warnings == []
    assert len(watched.ticks(1, SAN__cosine=-0.3)) == 1


def test_a_run_that_goes_on_watches_on():
    watched, resumed = Watched(), Watched()
    watched.ticks(1)
    watched.ticks(TICKS - 1, SAN__scale=0.01)
    resumed.watch.load_state_dict(json.loads(json.dumps(watched.watch.state_dict())))
    assert len(resumed.ticks(1, SAN__scale=0.01)) == 1
