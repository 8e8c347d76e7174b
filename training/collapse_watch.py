# SPDX-License-Identifier: MIT
"""Watches a run for the ways in which GANs fail without any number being wrong, and says so in the log.

Three sources: how much the images of G_ema differ from each other, the signs of D's logits, and SAN's conditions
(SAN/*). The thresholds come from runs of the quickstart recipe, and are quoted beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import TrainConfig

Stats = Mapping[str, Mapping[str, float]]  # as StatsCollector.flush returns them

COMPARED_RESOLUTION = 32  # images are averaged down to this side before they are compared
MAX_COMPARED = 512  # images of a class: some hundred thousand distances
SETTLING_SHARE = 0.05  # of the run: nothing is judged before, as all networks start out looking broken

# Of 63 grids of healthy runs the mean diversity was 0.56 ... 0.96 and that of the worst class 0.46; G starts at 0.3.
MIN_DIVERSITY, MIN_CLASS_DIVERSITY = 0.35, 0.2
# Healthy runs passed 0.99 in single ticks of the first tenth, where G has learned little, and stayed below 0.97 later.
WON_SIGN, EVEN_SIGN = 0.99, 0.02
# Healthy: cosine 0.57 ... 0.93 from the first thousand images on, with agreements of 0.6 and more.
MIN_COSINE, MIN_AGREEMENT = 0.1, 0.3
MIN_SCALE_RATIO = 0.01  # to the first value seen. Healthy: 0.997 ... 1.01
MIN_DRIFT_DEG = 1e-4  # per step of D. Healthy: 0.28 ... 0.46 at a learning rate of 0.001
TICKS, SNAPSHOTS = 10, 2  # a condition must hold at so many looks one after the other
ZERO_CENTRED = (
    "hinge",
    "saturating",
    "nonsaturating",
)  # objectives in which the sign of a logit is D's verdict


@dataclass(frozen=True)
class Condition:
    """Something that should not last."""

    holds: Callable[[Mapping[str, float]], bool | None]  # of the values; None = they do not say
    patience: int  # looks in a row at which it must hold
    message: str  # reason and advice; {name} stands for a value


def holds_of(*names: str, test: Callable[..., bool]) -> Callable[[Mapping[str, float]], bool | None]:
    """A test of values by name, which is silent when one of them is missing."""
    return lambda values: test(*(values[n] for n in names)) if all(n in values for n in names) else None


CONDITIONS: dict[str, Condition] = {
    "alike": Condition(
        holds_of("diversity", test=lambda diversity: diversity < MIN_DIVERSITY),
        SNAPSHOTS,
        "the images of G_ema differ among each other only {diversity:.2f} times as much as real ones: G has collapsed "
        "or is about to. Look at the last fakes*.png; go back to an earlier state, lower --glr, raise --batch, or look "
        "whether augmentation hides what tells images apart",
    ),
    "class alike": Condition(
        holds_of(
            "diversity",
            "worst_class_diversity",
            test=lambda mean, worst: mean >= MIN_DIVERSITY and worst < MIN_CLASS_DIVERSITY,
        ),
        SNAPSHOTS,
        "the images of class {worst_class:.0f} differ among each other only {worst_class_diversity:.2f} times as much "
        "as its real ones: G makes nearly one image of it. Does it have enough images? More of them, a higher --batch "
        "or a lower --glr may help",
    ),
    "D won": Condition(
        holds_of("real_sign", "fake_sign", test=lambda real, fake: real > WON_SIGN and fake < -WON_SIGN),
        TICKS,
        "D tells all real from all generated images (signs {real_sign:.3f} and {fake_sign:.3f}), so G learns little: "
        "lower --dlr, raise --glr, blur longer (--blur-kimg), or use more data or augmentation",
    ),
    "G won": Condition(
        holds_of("real_sign", "fake_sign", test=lambda real, fake: fake > WON_SIGN),
        TICKS,
        "D takes all generated images for real (sign {fake_sign:.3f}), so its verdict says nothing: raise --dlr, or "
        "lower --glr",
    ),
    "D blind": Condition(
        holds_of("real_sign", "fake_sign", test=lambda real, fake: max(abs(real), abs(fake)) < EVEN_SIGN),
        TICKS,
        "D's verdicts on real and on generated images are even (signs {real_sign:.3f} and {fake_sign:.3f}): if the "
        "images are not perfect, D has stopped learning. Raise --dlr, or look at augmentation and blur",
    ),
    "direction": Condition(
        holds_of(
            "cosine",
            "agreement",
            test=lambda cosine, agreement: agreement > MIN_AGREEMENT and cosine < MIN_COSINE,
        ),
        TICKS,
        "SAN directions are far from their optimum (SAN/cosine {cosine:.2f}, though it is well determined, "
        "SAN/agreement {agreement:.2f}): raise --dlr, and see that the directions are in D's optimizer and normalised "
        "after its step",
    ),
    "scale": Condition(
        holds_of("scale_ratio", test=lambda ratio: ratio < MIN_SCALE_RATIO),
        TICKS,
        "the scale of SAN's last layers has fallen to {scale_ratio:.4f} of what it was, so D's logits vanish: lower "
        "--dlr, or see what pulls on it",
    ),
    "drift": Condition(
        holds_of("drift", test=lambda drift: drift < MIN_DRIFT_DEG),
        TICKS,
        "SAN directions do not move (SAN/drift_deg {drift:.1e} per step): are they frozen, or missing in D's "
        "optimizer?",
    ),
}


class CollapseWatch:
    """Warns once for every condition that lasts, and again only after it was over in between."""

    def __init__(
        self, config: TrainConfig, real_images: Tensor, labels: Tensor | None, warn: Callable[[str], None]
    ) -> None:
        """real_images: those of the grid, uint8 (N, C, H, W); labels: their class ids (N,), None without classes."""
        self._config, self._warn = config, warn
        self._labels = None if labels is None else labels.cpu()
        self._real = class_distances(real_images, self._labels, are_repeated=True)
        self._looks: dict[str, int] = {}  # looks in a row at which a condition held
        self._first_scale: float | None = None

    def look_at_images(self, fake_images: Tensor, cur_nimg: int) -> dict[str, float]:
        """Diversity of G_ema's images of the grid, (N, C, H, W) in [-1, 1], for the log; warns where it is small.

        1 = images differ as much as the real ones of their class, on average over classes.
        """
        fake = class_distances(fake_images, self._labels)
        ratios = {label: fake[label] / real for label, real in self._real.items()}
        if not ratios:
            return {}
        worst = min(ratios, key=ratios.__getitem__)
        values = {"diversity": sum(ratios.values()) / len(ratios)}
        if len(ratios) > 1:
            values |= {"worst_class_diversity": ratios[worst], "worst_class": float(worst)}
        self._judge(values, cur_nimg)
        return {
            f"Health/{name}": values[name]
            for name in ("diversity", "worst_class_diversity")
            if name in values
        }

    def look_at_stats(self, stats: Stats, cur_nimg: int) -> None:
        """Warn of what the statistics of a tick show."""
        means = {name: moments["mean"] for name, moments in stats.items() if isinstance(moments, Mapping)}
        values: dict[str, float] = {}
        if self._config.objective in ZERO_CENTRED:
            values |= _pick(means, real_sign="Loss/signs/real", fake_sign="Loss/signs/fake")
        values |= _pick(means, cosine="SAN/cosine", agreement="SAN/agreement", drift="SAN/drift_deg")
        if (scale := means.get("SAN/scale")) is not None:
            self._first_scale = self._first_scale or scale
            values["scale_ratio"] = scale / self._first_scale
        self._judge(values, cur_nimg)

    def _judge(self, values: Mapping[str, float], cur_nimg: int) -> None:
        if cur_nimg < SETTLING_SHARE * self._config.total_kimg * 1000:
            return
        for name, condition in CONDITIONS.items():
            verdict = condition.holds(values)
            if verdict is None:
                continue
            self._looks[name] = self._looks.get(name, 0) + 1 if verdict else 0
            if self._looks[name] == condition.patience:
                self._warn(f"Warning at {cur_nimg / 1000:g} kimg: {condition.message.format(**values)}.")

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, as numbers."""
        return {"looks": dict(self._looks), "first_scale": self._first_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._looks, self._first_scale = dict(state["looks"]), state["first_scale"]


def _pick(means: Mapping[str, float], **names: str) -> dict[str, float]:
    return {short: means[name] for short, name in names.items() if name in means}


def class_distances(images: Tensor, labels: Tensor | None, are_repeated: bool = False) -> dict[int, float]:
    """Mean distance between two different images of each class, in units of uint8 levels; class 0 without labels.

    images: uint8, or float in [-1, 1], (N, C, H, W), averaged down to COMPARED_RESOLUTION; of a class the first
    MAX_COMPARED; labels: (N,). The distance is the root mean square over pixels and channels.
    are_repeated: pairs of equal images do not count, as a grid of real ones repeats them when a class has few. Classes
    without a pair are left out.
    """
    images = images.detach().cpu()
    pixels = images.float() if images.dtype == torch.uint8 else (images.float().clamp(-1, 1) + 1) * 127.5
    if pixels.shape[-1] > COMPARED_RESOLUTION:
        pixels = F.adaptive_avg_pool2d(pixels, COMPARED_RESOLUTION)
    rows = pixels.flatten(1)
    groups = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels
    result = {}
    for label in groups.unique().tolist():
        group = rows[groups == label][:MAX_COMPARED]
        distances = F.pdist(group) / group.shape[1] ** 0.5
        if are_repeated:
            distances = distances[distances > 0]
        if len(distances):
            result[label] = distances.mean().item()
    return result
