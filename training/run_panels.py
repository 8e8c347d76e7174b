# SPDX-License-Identifier: MIT
"""Which panels a plot of runs has, and which curves of a run belong in each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.run_curves import Curve, RunCurves

MAX_LAYERS = 6  # beyond this, lines of single layers would hide the others
LOG_RATIO = 8  # highest over lowest value from which a scale is logarithmic


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    title: str  # above it
    names: tuple[str, ...]  # statistics; a last "*" stands for any ending
    labels: tuple[str, ...] = ()  # of these in the legend; () = their names
    target: float | None = None  # value to compare with, drawn as a line
    has_layers: bool = False  # name/<layer> are drawn too, lightly
    omits_first: bool = False  # the first tick is not comparable, as it includes the warm-up
    is_event: bool = False  # rare: drawn as they are, and no panel while everything is 0
    starts_at_zero: bool = False  # the view holds 0, so that lengths compare
    may_be_log: bool = False  # logarithmic where values differ by more than LOG_RATIO
    is_metric: bool = False  # of evaluations, with its best value


def _san(measure: str, title: str, target: float | None = None) -> Panel:
    return Panel(f"SAN: {title}", (f"SAN/{measure}",), target=target, has_layers=True)


PANELS = (
    Panel("Loss of G", ("Loss/G/loss",)),
    Panel("Loss of D", ("Loss/D/loss",)),
    Panel("Logits of D, mean", ("Loss/scores/real", "Loss/scores/fake"), ("real", "fake")),
    Panel("Signs of D's logits, mean", ("Loss/signs/real", "Loss/signs/fake"), ("real", "fake"), target=0.0),
    Panel("Path length penalty", ("Loss/pl_penalty",)),
    Panel("Classifier guidance", ("Loss/G/guidance_loss",)),
    Panel("Gradient penalty of D", ("Loss/D/penalty",)),
    Panel("BEGAN: convergence measure", ("BEGAN/measure",)),
    Panel("BEGAN: k", ("BEGAN/k",)),
    Panel("InfoGAN: information, nats", ("InfoGAN/categorical", "InfoGAN/continuous"), ("categorical", "continuous")),
    Panel("Curriculum: weights of critics", ("Curriculum/*",)),
    _san("cosine", "cosine with the optimal direction", target=1.0),
    _san("agreement", "agreement of halves of the samples", target=1.0),
    _san("in_order", "quantiles in order, share", target=1.0),
    _san("separability_gap", "separability gap", target=0.0),
    _san("slice_distance", "distance of the slices, W1"),
    _san("mean_difference", "length of the mean difference"),
    _san("collision", "collision, smallest / median ratio"),
    _san("drift_deg", "drift of directions per step, degrees"),
    _san("scale", "scale"),
    Panel("Diversity of G_ema's images, real = 1", ("Health/diversity", "Health/worst_class_diversity"),
          ("mean of classes", "worst class"), target=1.0),
    Panel("Gradient norms", ("Health/gradient_norm_*",), may_be_log=True),
    Panel("Steps not finite, and rollbacks, so far", ("Health/nonfinite_total", "Health/rollbacks"),
          ("steps", "rollbacks"), is_event=True),
    Panel("Share of steps skipped", ("Gradients/*",), is_event=True),
    Panel("Seconds per kimg", ("Timing/sec_per_kimg",), omits_first=True, starts_at_zero=True),
    Panel("Time spent waiting for data, share", ("Timing/data_wait",), omits_first=True, starts_at_zero=True),
    Panel("Memory, GiB", ("Resources/*",), starts_at_zero=True),
)  # fmt: skip


def higher_is_better(metric: str) -> bool:
    """True for precision, recall, inception score and the like; False for distances."""
    return re.search(r"^(pr|is|eq[tr])\d|precision|recall|accuracy|coverage|density", metric) is not None


def best_point(curve: Curve, metric: str) -> int:
    """Index of the best value of a metric."""
    return int(np.argmax(curve.values) if higher_is_better(metric) else np.argmin(curve.values))


def metric_panels(runs: Sequence[RunCurves]) -> list[Panel]:
    """A panel for each result of evaluations that a run has."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    panels = []
    for name in names:
        is_high = higher_is_better(name)
        title = f"{name} ({'higher' if is_high else 'lower'} is better)"
        panels.append(Panel(title, (name,), may_be_log=not is_high, is_metric=True))
    return panels


def curves_in(panel: Panel, run: RunCurves) -> Iterator[tuple[str, Curve]]:
    """(label, curve) of a run in a panel, in the order of its names."""
    source = run.metrics if panel.is_metric else run.stats
    for i, pattern in enumerate(panel.names):
        is_open = pattern.endswith("*")
        names = [n for n in source if n.startswith(pattern[:-1])] if is_open else [pattern]
        for name in names:
            if curve := source.get(name):
                start = int(panel.omits_first and len(curve) > 2)
                label = panel.labels[i] if panel.labels else name.removeprefix(pattern.rstrip("*")) or name
                yield label, Curve(curve.kimg[start:], curve.hours[start:], curve.values[start:])


def has_data(panel: Panel, runs: Sequence[RunCurves]) -> bool:
    """True when there is something to draw."""
    curves = [curve for run in runs for _, curve in curves_in(panel, run)]
    return any(curve.values.any() for curve in curves) if panel.is_event else bool(curves)


def layers_in(panel: Panel, run: RunCurves) -> list[Curve]:
    """Curves of single layers, if there are several and few."""
    prefix = f"{panel.names[0]}/"
    layers = [curve for name, curve in run.stats.items() if name.startswith(prefix) and curve]
    return layers if panel.has_layers and 1 < len(layers) <= MAX_LAYERS else []
