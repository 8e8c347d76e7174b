# SPDX-License-Identifier: MIT
"""Does SAN help? GAN against SAN on the built-in digits, for every objective with a SAN form, and an ablation.

Everything:  python tests/benchmarks/san_evidence.py --outdir evidence
Part of it:  python tests/benchmarks/san_evidence.py --objectives hinge,wgan_gp --variants gan,san --seeds 0-4

Every run of an objective has the same networks, first weights, data order and budget; only the last layer of D and the
loss on it differ. Class-conditional 16x16 digits, small networks (`--cfg dcgan`), some 30 to 60 seconds a run on one
CPU core. Results are added to OUTDIR/runs.jsonl as they come, and a run that is there is not repeated; the tables
(evidence.md) and the plot (evidence.png) are made of that file. Needs scikit-learn and timm.

Into the documentation, with the runs themselves:  python tests/benchmarks/san_evidence.py --outdir evidence --publish
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
# A script has its own folder on the path, but not the checkout; a test that loads this file has neither.
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import san_evidence_report as report  # noqa: E402

import san  # noqa: E402
from metrics.evaluate import Sources, evaluate  # noqa: E402
from san.layers import split_norms  # noqa: E402
from torch_utils import cpu  # noqa: E402
from torch_utils.ema import ema_beta, update_ema_  # noqa: E402
from torch_utils.errors import UserError  # noqa: E402
from torch_utils.seeding import seed_everything  # noqa: E402
from torch_utils.stats import StatsCollector  # noqa: E402
from training.batch import Batch  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.data_loader import InfiniteSampler, make_loader  # noqa: E402
from training.dataset import ImageDataset, open_dataset  # noqa: E402
from training.dcgan_loss import make_dcgan_loss  # noqa: E402
from training.discriminator.dcgan import DCGANDiscriminator  # noqa: E402
from training.draws import Draws  # noqa: E402
from training.generator.dcgan import DCGANGenerator  # noqa: E402
from training.metric_sources import dataset_reference  # noqa: E402
from training.presets import RECIPES, dcgan  # noqa: E402
from training.sampling import parse_seeds, seeded_sampler  # noqa: E402
from training.train_step import StepContext, discriminator_step, generator_step  # noqa: E402
from training.training_loop import make_optimizer  # noqa: E402

OBJECTIVES = tuple(name for name in RECIPES if dcgan(name).loss == "san")
ABLATED = ("nonsaturating", "hinge")
WEIGHTED = (  # r_J is not 1
    "saturating",
    "nonsaturating",
    "soft_least_squares",
    "dragan",
    "infogan",
    "relativistic",
)
BATCH_SIZE, CHANNELS, IMAGES_PER_CLASS = 32, 32, 100
KIMG = 20.0  # real images per run, thousands; critics of five steps get CRITIC_KIMG, as G steps less often
CRITIC_KIMG, CRITIC_LR = 40.0, 0.0005  # their papers' learning rates are for runs a hundred times as long


def load_quickstart():
    """tests/benchmarks/quickstart.py, which has the judge of class accuracy."""
    spec = importlib.util.spec_from_file_location("quickstart", Path(__file__).with_name("quickstart.py"))
    module = sys.modules["quickstart"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Last layers of D. All start as the same function of the features.


class Normalized(san.SANConv2d):
    """The unit direction without the split: the GAN's loss trains direction and scale, as any weight."""

    def forward(self, x: Tensor) -> san.SANLogits:
        directions, _ = split_norms(self.weight)
        return san.SANLogits.plain(self.operate(x, directions) * self.scale.view(-1, 1, 1))


class Split(san.SANConv2d):
    """The split without the unit direction: a free weight, which the direction term alone trains."""

    def forward(self, x: Tensor) -> san.SANLogits:
        return san.SANLogits(self.operate(x, self.weight.detach()), self.operate(x.detach(), self.weight))

    def normalize_directions_(self) -> None:
        """It is none."""


def as_san(layer_type: type[san.SANConv2d], plain: nn.Conv2d, has_fixed_scale: bool) -> san.SANConv2d:
    """A layer of the given type with the weight of `plain`, which has no bias."""
    layer = layer_type(plain.in_channels, plain.out_channels, plain.kernel_size)
    directions, norms = split_norms(plain.weight.detach())
    with torch.no_grad():
        layer.weight.copy_(plain.weight if layer_type is Split else directions)
        layer.scale.copy_(norms.flatten())
    if has_fixed_scale or layer_type is Split:
        scale = layer.scale.detach()
        del layer.scale
        layer.register_buffer("scale", scale)
    return layer


VARIANTS: dict[
    str, tuple[str, Callable[[nn.Conv2d], nn.Module]]
] = {  # name -> loss, what replaces D's last layer
    "gan": ("gan", lambda plain: plain),
    "san": ("san", lambda plain: as_san(san.SANConv2d, plain, has_fixed_scale=False)),
    "normalized": ("gan", lambda plain: as_san(Normalized, plain, has_fixed_scale=False)),
    "normalized, fixed scale": ("gan", lambda plain: as_san(Normalized, plain, has_fixed_scale=True)),
    "split": ("san", lambda plain: as_san(Split, plain, has_fixed_scale=True)),
    "san, fixed scale": ("san", lambda plain: as_san(san.SANConv2d, plain, has_fixed_scale=True)),
    "san, weights of mean 1": ("san", lambda plain: as_san(san.SANConv2d, plain, has_fixed_scale=False)),
}
WITH_MEAN_1 = "san, weights of mean 1"  # r_J as probability measures


def make_config(objective: str, loss: str, c_dim: int, kimg_factor: float) -> TrainConfig:
    """The objective's own configuration with networks and learning rates for runs of a minute."""
    config = dcgan(objective, "digits")
    is_slow = config.critic.num_steps > 1
    kimg = (CRITIC_KIMG if is_slow else KIMG) * kimg_factor
    optimizers = config.generator_optimizer, config.discriminator_optimizer
    if is_slow:
        optimizers = tuple(replace(optimizer, lr=CRITIC_LR) for optimizer in optimizers)
    bases = tuple(base * CHANNELS // 64 for base in config.discriminator.channel_bases)
    return replace(
        config,
        loss=loss,
        generator=replace(config.generator, channel_base=CHANNELS, c_dim=c_dim),
        discriminator=replace(config.discriminator, channel_bases=bases, c_dim=c_dim),
        generator_optimizer=optimizers[0],
        discriminator_optimizer=optimizers[1],
        critic=replace(config.critic, curriculum_kimg=kimg / 2 if config.critic.curriculum_kimg else 0.0),
        batch_size=BATCH_SIZE,
        microbatch_size=BATCH_SIZE,
        total_kimg=kimg,
        ema_halflife_kimg=config.ema_halflife_kimg * BATCH_SIZE / config.batch_size,
    )


def train(
    config: TrainConfig, variant: str, dataset: ImageDataset, seed: int
) -> tuple[DCGANGenerator, float]:
    """G_ema after the whole budget, and the direction cosine of the last G and D."""
    seed_everything(seed)
    G = DCGANGenerator(config.generator)
    D = DCGANDiscriminator(config.discriminator, "gan")
    for critic in D.critics.values():
        critic.last = VARIANTS[variant][1](critic.last)
    D.set_trainable_(False)
    seed_everything(seed)  # so that latents and data do not depend on how the last layer was made
    G_ema = DCGANGenerator(config.generator).eval().requires_grad_(False)
    G_ema.load_state_dict(G.state_dict())
    G_optimizer = make_optimizer(G.parameters(), config.generator_optimizer)
    D_optimizer = make_optimizer(D.parameters(), config.discriminator_optimizer)
    has_mean_1 = variant == WITH_MEAN_1
    config = replace(config, normalizes_san_weights=has_mean_1)
    context = StepContext(config, make_dcgan_loss(config), StatsCollector(), warn=click.echo)
    loader = make_loader(dataset, InfiniteSampler(len(dataset), seed), BATCH_SIZE)

    def draw() -> Batch:
        places = loader.position + np.arange(BATCH_SIZE)
        images, labels = next(loader)
        z = torch.randn(BATCH_SIZE, G.z_dim)
        return Batch(images.float() / 127.5 - 1, labels, z, labels, Draws(seed, places))

    while context.cur_nimg < config.total_kimg * 1000:
        generator_step(G, D, G_optimizer, draw(), context)
        for _ in range(config.critic.num_steps):
            discriminator_step(G, D, D_optimizer, draw(), context)
        nimg = config.nimg_per_iteration
        update_ema_(G_ema, G, ema_beta(nimg, context.cur_nimg, config.ema_halflife_kimg, config.ema_rampup))
        context.cur_nimg += nimg
    return G_ema, direction_cosine(G, D, context.loss.objective, dataset, has_mean_1)


@torch.no_grad()
def direction_cosine(
    G: DCGANGenerator,
    D: DCGANDiscriminator,
    objective: san.Objective | san.PairedObjective,
    dataset: ImageDataset,
    has_mean_1: bool,
) -> float:
    """Cosine between the strongest critic's directions and the optimal ones, mean over classes.

    Estimated with all real images and as many generated ones, in training mode; sampling noise lowers it.
    """
    images, labels = dataset.batch(range(len(dataset)))
    critic = list(D.critics.values())[-1]
    sides = {}
    for name, x in {
        "real": images.float() / 127.5 - 1,
        "fake": G(torch.randn(len(labels), G.z_dim), labels),
    }.items():
        features = critic.trunk(x)
        sides[name] = features.flatten(1), critic.judge(features, labels).fun
    reals = sides["real"][1] if objective.is_paired else None
    weighted = {}
    for side, (h, f) in sides.items():
        r = san.direction_weights(objective, f, reals)
        weighted[side] = h * (r / r.mean() if has_mean_1 else r)
    cosines = [
        torch.cosine_similarity(
            critic.last.weight[k].flatten(),
            weighted["real"][labels == k].mean(0) - weighted["fake"][labels == k].mean(0),
            dim=0,
        )
        for k in labels.unique()
    ]
    return torch.stack(cosines).mean().item()


def measure(G: DCGANGenerator, dataset: ImageDataset, quickstart) -> dict[str, float]:
    """fd_lite0, class accuracy and diversity, as quickstart.py measures them."""
    real, real_labels = dataset.batch(range(len(dataset)))
    reference = dataset_reference(dataset)
    device = torch.device("cpu")
    sources = Sources(seeded_sampler(G, 0, device))
    judge, _ = quickstart.train_judge(real, real_labels)
    fake, labels = quickstart.generate_per_class(G, IMAGES_PER_CLASS)
    diversity = quickstart.diversity_per_class(real, real_labels, fake, labels)
    return {
        "fd": evaluate(["fd_lite0"], reference, sources, device)["fd_lite0"].results["fd_lite0"],
        "accuracy": quickstart.class_accuracy(judge, fake, labels)[0],
        "diversity": statistics.mean(diversity),
    }


def plan_runs(objectives: list[str], variants: list[str], seeds: list[int]) -> list[tuple[str, str, int]]:
    """All runs, seed by seed, so that what is there at any time is balanced; the ablation only for some objectives."""
    return [
        (objective, variant, seed)
        for seed in seeds
        for objective in objectives
        for variant in variants
        if variant in ("gan", "san") or objective in (WEIGHTED if variant == WITH_MEAN_1 else ABLATED)
    ]


def publish_report(folder: Path, docs: Path) -> None:
    """Tables into docs/evidence.md, the plot and the runs beside it."""
    report.put_tables(docs / "evidence.md", (folder / "evidence.md").read_text(encoding="utf-8"))
    shutil.copy(folder / "evidence.png", docs / "evidence.png")
    shutil.copy(folder / "runs.jsonl", docs / "evidence.jsonl")


@click.command()
@click.option("--outdir", default="evidence", show_default=True, metavar="DIR", help="Where results go")
@click.option(
    "--objectives", default=",".join(OBJECTIVES), metavar="NAME,..", help="Default: all with a SAN form"
)
@click.option("--variants", default="|".join(VARIANTS), metavar="NAME|..", help="Last layers, separated by |")
@click.option("--seeds", default="0-2", show_default=True, metavar="LIST", help="Random seeds")
@click.option(
    "--kimg-factor", default=1.0, show_default=True, help="Length of every run, relative to the default"
)
@click.option("--report", "only_reports", is_flag=True, help="Train nothing; make tables and plot again")
@click.option("--publish", is_flag=True, help="Train nothing; put tables, plot and runs into docs/")
def main(outdir, objectives, variants, seeds, kimg_factor, only_reports, publish) -> None:
    """Train, measure, and write evidence.md and evidence.png."""
    folder = Path(outdir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        numbers, names = parse_seeds(seeds), [name.strip() for name in objectives.split(",")]
    except UserError as error:
        raise click.ClickException(str(error)) from error
    chosen = [name.strip() for name in variants.split("|")]
    for name, known in [*((n, OBJECTIVES) for n in names), *((v, VARIANTS) for v in chosen)]:
        if name not in known:
            raise click.ClickException(f"{name!r} is not one of {', '.join(known)}")
    results = report.read_results(folder / "runs.jsonl")
    if not (only_reports or publish):
        cpu.tune_for_training()
        dataset, quickstart = open_dataset("digits", use_labels=True), load_quickstart()
        done = {(r.objective, r.variant, r.seed) for r in results}
        todo = [run for run in plan_runs(names, chosen, numbers) if run not in done]
        for number, (objective, variant, seed) in enumerate(todo, start=1):
            config = make_config(objective, VARIANTS[variant][0], dataset.c_dim, kimg_factor)
            start = time.time()
            G_ema, cosine = train(config, variant, dataset, seed)
            seconds = time.time() - start
            values = measure(G_ema, dataset, quickstart)
            result = report.Result(objective, variant, seed, cosine=cosine, seconds=seconds, **values)
            with open(folder / "runs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            results.append(result)
            click.echo(f"{number}/{len(todo)} {result}")
    click.echo(report.write_report(results, OBJECTIVES, tuple(VARIANTS), folder))
    if publish:
        publish_report(folder, ROOT / "docs")


if __name__ == "__main__":
    main()
