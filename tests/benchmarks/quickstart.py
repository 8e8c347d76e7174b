# SPDX-License-Identifier: MIT
"""Does a quickstart run show what it should? Measures networks on the built-in digits, from any machine.

Measure what is there:   python tests/benchmarks/quickstart.py RUN_FOLDER (or a network file, or digits)
Train first, two seeds:  python tests/benchmarks/quickstart.py --run --seeds 0,1

Needs scikit-learn and timm. Exit code 1 when a rule is broken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the checkout is not

from metrics.evaluate import Sources, evaluate  # noqa: E402
from torch_utils import cpu  # noqa: E402
from torch_utils.errors import UserError  # noqa: E402
from training.dataset import ImageDataset, open_dataset  # noqa: E402
from training.generator.generator import Generator  # noqa: E402
from training.metric_sources import dataset_reference  # noqa: E402
from training.network_io import load_network  # noqa: E402
from training.sampling import latents_for_seed, parse_seeds, pick_device, seeded_sampler, to_uint8  # noqa: E402

IMAGES_PER_CLASS = 100
MAX_FD_RATIO = 1 / 5  # final fd_lite0 over that at initialisation
MIN_JUDGE_ACCURACY = 0.97  # of the judge, on real digits that it was not trained on
MIN_ACCURACY = 0.60  # generated images that the judge assigns to the class asked for
MIN_DIVERSITY = 0.5  # mean pairwise distance within a class, generated over real


@dataclass
class Measurement:
    """What was measured of one network; fd_init and seconds are None where no training run is known."""

    network: str
    fd: float
    fd_init: float | None
    judge_accuracy: float
    accuracy: float
    accuracy_per_class: list[float]
    diversity_per_class: list[float]
    seconds: float | None


@dataclass(frozen=True)
class Check:
    """One rule and whether it holds."""

    name: str
    value: float
    rule: str
    passed: bool


def judge_features(images: Tensor) -> np.ndarray:
    """Grey 8x8 pixels in [0, 1], (N, 64), of uint8 images (N, C, H, W)."""
    grey = images.float().mean(dim=1, keepdim=True) / 255
    return torch.nn.functional.adaptive_avg_pool2d(grey, 8).flatten(1).cpu().numpy()


def train_judge(images: Tensor, labels: Tensor, seed: int = 0) -> tuple[SVC, float]:
    """Support vector machine trained on three quarters of the images, and its accuracy on the fourth."""
    parts = train_test_split(
        judge_features(images), labels.numpy(), test_size=0.25, random_state=seed, stratify=labels.numpy()
    )
    judge = SVC(C=10.0).fit(parts[0], parts[2])
    return judge, float(judge.score(parts[1], parts[3]))


def class_accuracy(judge: SVC, images: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """Share of images that the judge assigns to their label, over all and per class."""
    hits = torch.from_numpy(judge.predict(judge_features(images)) == labels.numpy()).double()
    return float(hits.mean()), [float(hits[labels == k].mean()) for k in labels.unique()]


def diversity_per_class(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> list[float]:
    """Mean pairwise L2 distance of a class's fake images over that of its real ones, per class."""
    return [
        mean_pairwise_distance(fake[fake_labels == k]) / mean_pairwise_distance(real[real_labels == k])
        for k in fake_labels.unique()
    ]


def mean_pairwise_distance(images: Tensor) -> float:
    """Mean L2 distance over all pairs of different images (N, C, H, W)."""
    return float(torch.nn.functional.pdist(images.flatten(1).float()).mean())


@torch.inference_mode()
def generate_per_class(G: Generator, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`per_class` images of every class, uint8 (N, C, H, W), and their classes; no latent is used twice."""
    device = next(G.parameters()).device
    z = latents_for_seed(seed, G.c_dim * per_class, G.z_dim).float().to(device)
    labels = torch.arange(G.c_dim).repeat_interleave(per_class)
    batches = zip(z.split(per_class), labels.to(device).split(per_class), strict=True)
    return torch.cat([to_uint8(G(*batch)).cpu() for batch in batches]), labels


def measure(
    network: str, dataset: ImageDataset, device: torch.device, per_class: int = IMAGES_PER_CLASS
) -> Measurement:
    """Measure a network file or built-in network; fd_init and seconds stay None."""
    G = load_network(network, device)
    if G.c_dim != dataset.c_dim or G.img_resolution != dataset[0][0].shape[-1]:
        raise UserError(
            f"{network} was not trained on the digits: it has {G.c_dim} classes at {G.img_resolution} px"
        )
    real, real_labels = dataset.batch(range(len(dataset)))
    sources = Sources(seeded_sampler(G, seed=0, device=device))
    fd = evaluate(["fd_lite0"], dataset_reference(dataset), sources, device)["fd_lite0"].results["fd_lite0"]
    judge, judge_accuracy = train_judge(real, real_labels)
    fake, fake_labels = generate_per_class(G, per_class)
    accuracy, per_class_accuracy = class_accuracy(judge, fake, fake_labels)
    diversity = diversity_per_class(real, real_labels, fake, fake_labels)
    return Measurement(network, fd, None, judge_accuracy, accuracy, per_class_accuracy, diversity, None)


def measure_run(run_dir: Path, dataset: ImageDataset, device: torch.device) -> Measurement:
    """Measure the last network of a run folder; fd at initialisation and the time come from its log files."""
    result = measure(str(run_dir / "network-snapshot.safetensors"), dataset, device)
    result.fd_init = read_initial_fd(run_dir)
    result.seconds = read_total_seconds(run_dir)
    return result


def read_initial_fd(run_dir: Path) -> float | None:
    """fd_lite0 before training; None when the run did not evaluate itself then."""
    lines = read_jsonl(run_dir / "metric-fd_lite0.jsonl")
    return lines[0]["results"]["fd_lite0"] if lines and lines[0]["cur_nimg"] == 0 else None


def read_total_seconds(run_dir: Path) -> float | None:
    """Time up to the last progress report; None when there is none."""
    lines = read_jsonl(run_dir / "stats.jsonl")
    return lines[-1]["Timing/total_sec"]["mean"] if lines else None


def read_jsonl(path: Path) -> list[dict]:
    """Objects of a JSON lines file; empty when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(preset: str, seed: int, outdir: Path) -> tuple[Path, float]:
    """Run train.py; returns its run folder and the wall time in seconds, start of the process included."""
    outdir.mkdir(parents=True, exist_ok=True)
    before = set(outdir.iterdir())
    command = [sys.executable, str(ROOT / "train.py"), "--loss", "san", "--preset", preset]
    start = time.time()
    subprocess.run([*command, "--seed", str(seed), "--outdir", str(outdir)], check=True)
    seconds = time.time() - start
    (run_dir,) = set(outdir.iterdir()) - before
    return run_dir, seconds


def check(result: Measurement, limit_minutes: float) -> list[Check]:
    """The rules that apply to what is known."""
    checks = [
        _at_least("judge on held-out real digits", result.judge_accuracy, MIN_JUDGE_ACCURACY),
        _at_least("class accuracy", result.accuracy, MIN_ACCURACY),
        _at_least("diversity, worst class", float(np.min(result.diversity_per_class)), MIN_DIVERSITY),
    ]
    if result.fd_init is not None:
        checks.append(_at_most("fd_lite0 final / initial", result.fd / result.fd_init, MAX_FD_RATIO))
    if result.seconds is not None:
        checks.append(_at_most("wall time in minutes", result.seconds / 60, limit_minutes))
    return checks


def _at_least(name: str, value: float, bound: float) -> Check:
    return Check(name, value, f">= {bound:g}", value >= bound)


def _at_most(name: str, value: float, bound: float) -> Check:
    return Check(name, value, f"<= {bound:g}", value <= bound)


def format_table(result: Measurement, checks: list[Check]) -> str:
    """Numbers per class and the verdict per rule, for a terminal."""
    lines = [f"{result.network}", f"  fd_lite0 {result.fd:.4g}"]
    if result.fd_init is not None:
        lines[-1] += f" (at initialisation {result.fd_init:.4g})"
    lines.append("  class      " + "".join(f"{k:7d}" for k in range(len(result.accuracy_per_class))))
    lines.append("  accuracy   " + "".join(f"{v:7.2f}" for v in result.accuracy_per_class))
    lines.append("  diversity  " + "".join(f"{v:7.2f}" for v in result.diversity_per_class))
    lines += [f"  {'PASS' if c.passed else 'FAIL'}  {c.name:32s}{c.value:9.4f}  ({c.rule})" for c in checks]
    return "\n".join(lines)


@click.command()
@click.argument("networks", nargs=-1, metavar="[RUN_FOLDER|FILE|digits]...")
@click.option("--run", "trains_first", is_flag=True, help="Train the preset first, once per seed")
@click.option("--seeds", default="0,1", show_default=True, metavar="LIST", help="Seeds for --run")
@click.option("--preset", default="quickstart", show_default=True, help="Preset for --run")
@click.option(
    "--outdir", default="runs", show_default=True, metavar="DIR", help="Where --run puts its run folders"
)
@click.option("--limit-minutes", default=10.0, show_default=True, help="Longest training time that passes")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps; for measuring")
@click.option("--json", "prints_json", is_flag=True, help="Print JSON instead of a table")
def main(networks, trains_first, seeds, preset, outdir, limit_minutes, device, prints_json) -> None:
    """Measure networks on the digits and say PASS or FAIL for each rule."""
    try:
        results = measure_all(networks, pick_device(device))
        for seed in parse_seeds(seeds) if trains_first else []:
            run_dir, seconds = train(preset, seed, Path(outdir))
            results += measure_all([str(run_dir)], pick_device(device))
            results[-1].seconds = seconds
    except UserError as error:
        raise click.ClickException(str(error)) from error
    if not results:
        raise click.UsageError("give a run folder or a network file, or --run to train first")
    checks = [check(result, limit_minutes) for result in results]
    if prints_json:
        rows = [
            asdict(r) | {"checks": [asdict(c) for c in cs]} for r, cs in zip(results, checks, strict=True)
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo("\n".join(format_table(r, cs) for r, cs in zip(results, checks, strict=True)))
    sys.exit(0 if all(c.passed for cs in checks for c in cs) else 1)


def measure_all(networks: list[str] | tuple[str, ...], device: torch.device) -> list[Measurement]:
    """Measure run folders, network files and built-in networks, in their order."""
    if not networks:
        return []
    cpu.tune_for_training()  # the detector's blocks of memory are reused instead of mapped afresh
    dataset = open_dataset("digits", use_labels=True)
    return [
        measure_run(Path(name), dataset, device) if Path(name).is_dir() else measure(name, dataset, device)
        for name in networks
    ]


if __name__ == "__main__":
    main()
