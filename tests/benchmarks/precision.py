# SPDX-License-Identifier: MIT
"""What --precision and --feature-precision change: images, G's gradient, time, and what training reaches.

One step:        python tests/benchmarks/precision.py --network digits
Whole runs too:  python tests/benchmarks/precision.py --train --kimg 40 --seeds 0,1

Everything is compared with the same networks in float64, on a CPU or a GPU; modes that the device lacks are left out.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the checkout is not

import san  # noqa: E402
from torch_utils.errors import UserError  # noqa: E402
from torch_utils.ops.filtered_lrelu import filtered_lrelu  # noqa: E402
from torch_utils.ops.modulated_conv import modulated_conv2d  # noqa: E402
from training.benchmark.measure import synchronize  # noqa: E402
from training.benchmark.naive_networks import seed_backbones_  # noqa: E402
from training.benchmark.recipes import benchmark_config  # noqa: E402
from training.config import FeaturePrecision, Precision, TrainConfig  # noqa: E402
from training.discriminator.projected import ProjectedDiscriminator  # noqa: E402
from training.generator.generator import Generator  # noqa: E402
from training.network_io import load_network  # noqa: E402
from training.precision import check_precision  # noqa: E402
from training.presets import PRESETS  # noqa: E402
from training.sampling import labels_for_seed, latents_for_seed, parse_seeds, pick_device  # noqa: E402
from training.training_loop import configure_backends  # noqa: E402

SEED = 0


@dataclass(frozen=True)
class Mode:
    """A pair of flags."""

    precision: Precision = "paper"  # of G
    features: FeaturePrecision = "paper"  # of D's frozen networks

    def __str__(self) -> str:
        return f"{self.precision:6s} {self.features:6s}"


MODES = (
    Mode(),
    Mode("fp32"),
    Mode("fp16"),
    Mode("bf16"),
    Mode("fp32", "tf32"),
    Mode("fp32", "bf16"),
    Mode("bf16", "bf16"),
)


@dataclass(frozen=True)
class Scene:
    """Networks and what they are fed, on one device."""

    config: TrainConfig
    G: Generator  # with gradients
    D: ProjectedDiscriminator  # float32, as built; a mode takes a copy, since a pass moves its state
    z: Tensor  # (N, z_dim)
    labels: Tensor | None  # (N,)


@dataclass(frozen=True)
class Result:
    """One step of G: what it made, and what it was told."""

    images: Tensor  # (N, C, H, W)
    image_gradient: Tensor  # of the loss by the images, through heads and frozen features
    weight_gradient: Tensor  # of the loss by all of G's parameters, one vector


def build_scene(
    config: TrainConfig, device: torch.device, network: str | None, has_random_features: bool
) -> Scene:
    """Networks with the seed's weights; G from a file if one is given. Raises UserError for missing weights."""
    torch.manual_seed(SEED)
    G = Generator(config.generator) if network is None else load_network(network)
    if G.cfg.img_resolution != config.discriminator.img_resolution or G.c_dim != config.discriminator.c_dim:
        raise UserError(
            f"--network {network} does not fit the discriminator of --preset; give another preset"
        )
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=not has_random_features)
    if has_random_features:
        seed_backbones_(D)
    D.set_trainable_(False)
    batch_size = config.batch_size
    z = latents_for_seed(SEED, batch_size, G.z_dim).float().to(device)
    labels = labels_for_seed(SEED, batch_size, G.c_dim).to(device) if G.c_dim else None
    return Scene(config, G.to(device).train().requires_grad_(True), D.to(device), z, labels)


def float64_images(G: Generator, ws: Tensor) -> Tensor:
    """Images of style vectors (N, num_ws, w_dim), each layer in float64; its input, and styles, as in every mode."""
    first, *rest = ws.unbind(dim=1)
    x = G.synthesis.input(first).double()
    for layer, w in zip(G.synthesis.layers, rest, strict=True):
        plan, styles = layer.plan, layer.affine(w).double()
        if plan.is_torgb:
            styles = styles / math.sqrt(layer.weight[0].numel())
        gain = layer.magnitude_ema.double().rsqrt()
        is_plain = plan.is_torgb
        x = modulated_conv2d(x, layer.weight.double(), styles, not is_plain, plan.conv_kernel - 1, gain)
        x = filtered_lrelu(
            x,
            fu=layer.up_filter,
            fd=layer.down_filter,
            b=layer.bias.double(),
            up=plan.up_factor,
            down=plan.down_factor,
            padding=list(plan.padding),
            gain=1.0 if is_plain else math.sqrt(2),
            slope=1.0 if is_plain else 0.2,
            clamp=plan.conv_clamp,
        )
    return x * G.synthesis.plan.output_scale


def run_step(scene: Scene, make_images: Callable[[Tensor], Tensor], D: ProjectedDiscriminator) -> Result:
    """Forward and backward pass of G's step, without blur and augmentation."""
    scene.G.zero_grad(set_to_none=True)
    images = make_images(scene.G.mapping(scene.z, scene.labels))
    images.retain_grad()
    generator_loss(scene, D, images).backward()
    gradients = [p.grad.double().flatten() for p in scene.G.parameters() if p.grad is not None]
    return Result(images.detach().double(), images.grad.double(), torch.cat(gradients))


def generator_loss(scene: Scene, D: ProjectedDiscriminator, images: Tensor) -> Tensor:
    """G's adversarial loss on images."""
    objective = san.OBJECTIVES[scene.config.objective]
    return sum(san.generator_loss(objective, logits) for logits in D(images, scene.labels).values())


def run_mode(scene: Scene, mode: Mode) -> tuple[Result, ProjectedDiscriminator]:
    """A step in a mode, and the discriminator made for it. G stays in that mode."""
    D = copy.deepcopy(scene.D)
    D.set_feature_precision_(mode.features)
    scene.G.synthesis.set_precision_(mode.precision)
    return run_step(scene, scene.G.synthesis, D), D


def time_mode(scene: Scene, D: ProjectedDiscriminator, repeats: int) -> tuple[float, float]:
    """Milliseconds, medians: G's forward and backward pass, and D's with the gradient back to the images."""
    G_seconds, D_seconds = [], []
    noise = torch.randn_like(scene.G.synthesis(scene.G.mapping(scene.z, scene.labels)).detach())
    for _ in range(repeats):
        G_seconds.append(seconds_of(lambda: (scene.G(scene.z, scene.labels) * noise).sum().backward()))
        images = noise.clone().requires_grad_()
        D_seconds.append(seconds_of(lambda x=images: generator_loss(scene, D, x).backward()))
    return 1000 * statistics.median(G_seconds), 1000 * statistics.median(D_seconds)


def seconds_of(run: Callable[[], object]) -> float:
    """Time of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def compare(result: Result, exact: Result) -> list[str]:
    """Cells of the table: images, then both gradients, each beside float64."""
    rms = exact.images.square().mean().sqrt()
    difference = result.images - exact.images
    cells = [
        f"{float(difference.abs().max() / rms):.1e}",
        f"{float(difference.square().mean().sqrt() / rms):.1e}",
    ]
    for kind in ("image_gradient", "weight_gradient"):
        mine, right = getattr(result, kind).flatten(), getattr(exact, kind).flatten()
        cosine = float(torch.dot(mine, right) / (mine.norm() * right.norm()))
        cells += [f"{1 - cosine:.1e}", f"{float(mine.norm() / right.norm()):.4f}"]
    return cells


def parse_modes(_context: click.Context, _param: click.Parameter, value: str | None) -> tuple[Mode, ...]:
    """Pairs such as fp32/bf16; all without the flag."""
    if value is None:
        return MODES
    modes = {f"{mode.precision}/{mode.features}": mode for mode in MODES}
    if unknown := [pair for pair in value.split(",") if pair not in modes]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(modes)}")
    return tuple(modes[pair] for pair in value.split(","))


def find_modes(wanted: tuple[Mode, ...], config: TrainConfig, device: torch.device) -> list[Mode]:
    """Those that the device can do; says why others are left out."""
    modes = []
    for mode in wanted:
        try:
            check_precision(
                replace(config, precision=mode.precision, feature_precision=mode.features), device
            )
            modes.append(mode)
        except UserError as error:
            click.echo(f"left out: {error}")
    return modes


def print_steps(scene: Scene, modes: list[Mode], repeats: int) -> None:
    """The table of one step in each mode."""
    exact = run_step(scene, lambda ws: float64_images(scene.G, ws), copy.deepcopy(scene.D).double())
    head = [
        "G      features",
        "image max",
        "image rms",
        "1-cos dI",
        "norm dI",
        "1-cos dG",
        "norm dG",
        "ms G",
        "ms D",
    ]
    click.echo("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for mode in modes:
        result, D = run_mode(scene, mode)
        times = [f"{value:.1f}" for value in time_mode(scene, D, repeats)]
        click.echo("| " + " | ".join([str(mode), *compare(result, exact), *times]) + " |")


def print_runs(
    modes: list[Mode], preset: str, kimg: float, seeds: list[int], outdir: Path, device: str
) -> None:
    """Train in each mode, and print what the last network reaches."""
    values: dict[Mode, list[float]] = {mode: [] for mode in modes}
    jobs = [(seed, mode) for seed in seeds for mode in modes]
    for seed, mode in tqdm(jobs, desc="runs"):
        values[mode].append(train(mode, preset, kimg, seed, outdir, device))
    click.echo(f"fd_lite0 of --preset {preset} after {kimg:g} kimg, seeds {', '.join(map(str, seeds))}")
    click.echo("| G      features | mean | spread | each |\n|---|---|---|---|")
    for mode, fds in values.items():
        each = ", ".join(f"{fd:.1f}" for fd in fds)
        click.echo(f"| {mode} | {np.mean(fds):.1f} | {max(fds) - min(fds):.1f} | {each} |")


def train(mode: Mode, preset: str, kimg: float, seed: int, outdir: Path, device: str) -> float:
    """fd_lite0 of a run's last network; the run's output goes to a file beside its folder."""
    folder = outdir / f"{mode.precision}-{mode.features}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"preset": preset, "kimg": kimg, "seed": seed, "device": device, "outdir": folder, "snap": 0}
    flags |= {"precision": mode.precision, "feature-precision": mode.features, "metrics": "fd_lite0"}
    command = [sys.executable, str(ROOT / "train.py"), "--loss", "san"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with (folder / "output.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    newest = max(folder.glob("*/metric-fd_lite0.jsonl"))
    return json.loads(newest.read_text().splitlines()[-1])["results"]["fd_lite0"]


@click.command()
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="quickstart", show_default=True)
@click.option("--width", default=1.0, show_default=True, help="Factor on the channels of G")
@click.option("--batch", default=32, show_default=True, help="Images in a pass")
@click.option("--network", metavar="FILE|digits", help="G from this network file  [default: random weights]")
@click.option("--random-features", is_flag=True, help="Feature networks with random weights")
@click.option("--tiny", is_flag=True, help="Networks that take milliseconds, to see that it works")
@click.option("--repeats", default=5, show_default=True, help="Timed passes")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps")
@click.option(
    "--modes",
    metavar="G/FEATURES,..",
    callback=parse_modes,
    help="Such as paper/paper,bf16/bf16 [default: all]",
)
@click.option("--train", "trains", is_flag=True, help="Train the preset in each mode as well")
@click.option("--kimg", default=40.0, show_default=True, help="Length of the runs, thousands of images")
@click.option("--seeds", default="0,1", show_default=True, metavar="LIST", help="Seeds of the runs")
@click.option("--outdir", default="runs/precision", show_default=True, metavar="DIR", help="Where they go")
def main(
    preset, width, batch, network, random_features, tiny, repeats, device, modes, trains, kimg, seeds, outdir
) -> None:
    """Compare the modes of --precision (G) and --feature-precision with float64.

    dI: the gradient at the images; dG: of all of G's weights; 1 - cosine and relative norm. ms: forward and backward.
    """
    try:
        where = pick_device(device)
        config = benchmark_config(preset, batch, width, tiny)
        configure_backends(config, where)
        modes = find_modes(modes, config, where)
        print_steps(build_scene(config, where, network, random_features), modes, repeats)
        if trains:
            print_runs(modes, preset, kimg, parse_seeds(seeds), Path(outdir), where.type)
    except UserError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
