# SPDX-License-Identifier: MIT
"""How calc_metrics.py shows what it found: tables for people, JSON for programs, and the list of all metrics."""

from __future__ import annotations

import json
import math
from typing import Any

from metrics.names import METRICS, is_higher_better
from metrics.plans import (
    PAPER_FAKES,
    Plan,
    density_and_coverage,
    frechet,
    frechet_per_class,
    gaussian_kernel,
    kernel,
    precision_and_recall,
    score,
)
from torch_utils.distributed import world_size
from training.durations import format_duration
from training.score_subject import Subject
from training.scoring import Scores
from training.text_table import align_columns

WORDS = {
    frechet: "Frechet distance",
    frechet_per_class: "Frechet distance within classes: mean, worst",
    kernel: "kernel distance (KID)",
    gaussian_kernel: "kernel distance (CMMD)",
    precision_and_recall: "precision and recall",
    density_and_coverage: "density and coverage",
    score: "inception score",
}
NETWORKS = {  # size of what is downloaded at the first use, if nothing is there
    "inception": "Inception (96 MB)",
    "inception_clean": "Inception (96 MB), clean resize",
    "inception_random": "random Inception (about 90 MB)",
    "vgg16": "VGG16 (553 MB)",
    "lpips": "LPIPS on VGG16 (553 MB)",
    "dinov2": "DINOv2 ViT-L/14 (about 1.2 GB)",
    "clip": "CLIP ViT-L/14 (about 1.2 GB)",
    "lite0": "EfficientNet-Lite0, installed",
    None: "none",
}


def format_table(subject: Subject, found: Scores) -> str:
    """A line for each result: its value, or over seeds mean, spread and all values."""
    num_seeds = max(len(score.results) for score in found.scores.values())
    heading = ["metric", "value"] if num_seeds == 1 else ["metric", "mean", "std", f"{num_seeds} seeds"]
    rows = [[*heading, "better", "generated", "real"]]
    for one in found.scores.values():
        settings, spreads = one.results[0].settings, one.spreads()
        variant = f" [{settings['variant']}]" if "variant" in settings else ""
        for key, mean in one.means().items():
            row = [key + variant, f"{mean:.6g}"]
            if num_seeds > 1:
                row += [f"{spreads[key]:.3g}", " ".join(f"{value:.6g}" for value in one.values()[key])]
            row.append(_better(key))
            real = settings.get("num_real", "-")
            rows.append([*row, f"{settings['num_generated']:,}", "?" if real is None else _count(real)])
        if details := one.results[0].details:
            rows += [
                [f"  {part}", f"{value:.6g}", *[""] * (len(rows[0]) - 2)] for part, value in details.items()
            ]
    origin = subject.origin
    at = f" at {origin.cur_nimg / 1000:g} kimg" if origin is not None and origin.cur_nimg is not None else ""
    against = f" against {subject.reference.name}" if subject.reference.name is not None else ""
    title = f"{subject.name}{at}{against} ({format_duration(found.seconds)})"
    return f"{title}\n{align_columns(rows)}"


def to_json(subject: Subject | None, found: Scores, files: dict[str, str]) -> str:
    """One object. files: what was written, by what it is. Numbers that JSON has not, such as nan, are null."""
    content: dict[str, Any] = {}
    if subject is not None:
        content = {
            "network" if subject.network_file is not None else "images": subject.name,
            "network_sha256": subject.network_sha256,
            "cur_nimg": subject.origin.cur_nimg if subject.origin is not None else None,
            "reference": subject.reference.name,
        }
    metrics = {
        name: {
            "results": one.means(),
            "std": one.spreads(),
            "values": one.values(),
            "seeds": [result.settings.get("seed") for result in one.results],
            "settings": one.results[0].settings,
            "details": one.results[0].details,
        }
        for name, one in found.scores.items()
    }
    content |= {
        "metrics": metrics,
        "left_out": found.left_out,
        "notes": found.notes,
        "files": files,
        "seconds": found.seconds,
        "num_gpus": world_size(),
    }
    return json.dumps(finite(content), allow_nan=False)


def finite(value: Any) -> Any:
    """The same, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def format_list() -> str:
    """All metrics: what they are, how many images they take, and the network that they need."""
    rows = [["metric", "what", "better", "network and its weights", "generated", "real"]]
    for name, plan in METRICS.items():
        generated = "as real" if plan.num_fakes is None else _count(plan.num_fakes)
        network, better = NETWORKS[plan.detector], _better(plan.keys(name)[0])
        rows.append([name, _what(plan), better, network, generated, _reals(plan)])
    return align_columns(rows, num_left=4) + (
        f"\n\nas real: as many as there are real images, at most {PAPER_FAKES:,}. Weights are looked for in the cache "
        "and downloaded at the first use; docs/metrics.md says what each number means and where files go."
    )


def _what(plan: Plan) -> str:
    if plan.motion is not None:
        return f"equivariance, {plan.motion.replace('_', ' ')}, dB"
    if plan.formula is None:
        return "perceptual path length in W"
    return WORDS[plan.formula] + {"sfid": ", spatial features"}.get(plan.tap, "")


def _reals(plan: Plan) -> str:
    if plan.max_reals == 0:
        return "-"
    text = "all" if plan.max_reals is None else f"<= {plan.max_reals:,}"
    return f"{text}, mirrored too" if plan.uses_mirrored else text


def _better(key: str) -> str:
    return "higher" if is_higher_better(key) else "lower"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
