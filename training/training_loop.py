# SPDX-License-Identifier: MIT
"""Trainer: builds everything a run needs and holds the order of events. No arithmetic: see train_step.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from torch_utils import cpu
from torch_utils.distributed import rank, world_size
from torch_utils.ema import ema_beta, update_ema_
from torch_utils.seeding import seed_everything
from torch_utils.stats import StatsCollector
from training.config import OptimizerConfig, TrainConfig, to_json
from training.continuation import Progress, continue_from_snapshot_, read_progress
from training.data_loader import InfiniteSampler, make_loader
from training.dataset import ImageDataset
from training.dcgan_loss import make_dcgan_loss
from training.direction_log import make_direction_log
from training.initialization import build_networks
from training.loss import AdversarialLoss, GuidanceClassifier, ProjectedGANLoss
from training.run_log import RunLog, create_run_dir, open_run_dir
from training.snapshot import SampleGrid, Snapshots
from training.train_step import Batch, StepContext, discriminator_step, generator_step, path_length_step


@dataclass
class TrainState:
    """What moves during training besides weights and optimizers."""

    cur_nimg: int = 0  # real images seen
    cur_iteration: int = 0  # optimizer iterations done
    cur_tick: int = 0  # progress reports made
    pl_mean: Tensor = field(default_factory=lambda: torch.zeros(()))  # running mean of path lengths


class Trainer:
    """One training run. `fit` trains and returns the run folder."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        device: torch.device,
        outdir: str,
        description: str,
        run_dir: Path | None = None,
    ) -> None:
        """Raises UserError for what cannot be built; the run folder is made only after that.

        run_dir: instead of making the next numbered folder in `outdir`, train here; a snapshot in it is gone on from.
        """
        seed_everything(config.seed)
        configure_backends(config, device)
        networks, origin = build_networks(config, dataset, device)
        progress = Progress() if run_dir is None else read_progress(run_dir)
        if progress.cur_nimg:
            origin = continue_from_snapshot_(networks, run_dir)
            seed_everything(config.seed + progress.cur_nimg)  # not the numbers of the run's beginning again
        loss = build_loss(config, device)
        loss.directions = make_direction_log(config, networks.D)
        self.G, self.D, self.G_ema = networks.G, networks.D, networks.G_ema
        self.config, self.dataset, self.device = config, dataset, device
        self.run_dir = create_run_dir(outdir, description) if run_dir is None else open_run_dir(run_dir)
        self.log = RunLog(self.run_dir, config.total_kimg, progress.cur_nimg)
        content = dataset.content_hash or "not hashed, as it is a large folder"
        self.log.print(f"Training on {dataset.name} (content {content}) on {device}. {origin}")
        (self.run_dir / "training_options.json").write_text(to_json(config) + "\n", encoding="utf-8")
        trained = [p for p in self.G.parameters() if p.requires_grad]  # all but a stage's stem
        self.G_optimizer = make_optimizer(trained, config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)

        self.stats = StatsCollector()
        self.context = StepContext(config, loss, self.stats, warn=self.log.print)
        self.sampler = InfiniteSampler(
            len(dataset), config.seed, rank(), world_size(), position=progress.cur_nimg
        )
        self.local_batch_size = config.batch_size // world_size()
        self.loader = make_loader(
            dataset, self.sampler, self.local_batch_size, config.data.num_workers, device
        )
        self.labels = torch.as_tensor(dataset.labels) if dataset.c_dim else None
        self.grid = SampleGrid(dataset, self.G.z_dim, device)
        self.snapshots = Snapshots(config, self.run_dir, dataset, self.log, device, progress.best_value)
        self.state = TrainState(
            cur_nimg=progress.cur_nimg,
            cur_iteration=progress.cur_nimg // config.nimg_per_iteration,
            pl_mean=torch.tensor(progress.pl_mean, device=device),
        )

    def fit(self) -> Path:
        """Train for config.total_kimg thousand images."""
        self.start()
        while not self.is_done():
            self.iterate()
            if self.is_tick_due():
                self.tick()
        self.log.close()
        return self.run_dir

    def start(self) -> None:
        """Pictures and metrics before the first step; a run that goes on has them already."""
        if self.state.cur_nimg == 0:
            self.grid.save_reals(self.run_dir / "reals.png")
            self.grid.save_fakes(self.run_dir / "fakes_init.png", self.G_ema)
            if self.config.evaluate_at_start:
                self.snapshots.evaluate(self.G_ema, cur_nimg=0, snapshot="initialisation")
        self.tick_start_time, self.tick_start_nimg = time.time(), self.state.cur_nimg

    def iterate(self) -> None:
        """One training iteration: G, path length every few iterations, D once or more, moving average."""
        config, state, context = self.config, self.state, self.context
        context.cur_nimg = state.cur_nimg
        real_images, labels = self.next_reals()
        generator_step(self.G, self.D, self.G_optimizer, self.draw_batch(real_images, labels), context)
        if self.is_path_length_due():
            batch = self.draw_batch(real_images, labels)
            state.pl_mean = path_length_step(self.G, self.G_optimizer, batch, state.pl_mean, context)
        for step in range(config.critic.num_steps):
            if step > 0:
                real_images, labels = self.next_reals()
            batch = self.draw_batch(real_images, labels)
            discriminator_step(self.G, self.D, self.D_optimizer, batch, context)
        num_images = config.nimg_per_iteration
        beta = ema_beta(num_images, state.cur_nimg, config.ema_halflife_kimg, config.ema_rampup)
        update_ema_(self.G_ema, self.G, beta)
        state.cur_nimg += num_images
        state.cur_iteration += 1
        self.log.advance(num_images)

    def next_reals(self) -> tuple[Tensor, Tensor]:
        """The next real images, float32 in [-1, 1], and their class ids."""
        images, labels = next(self.loader)
        return images.to(torch.float32) / 127.5 - 1, labels

    def draw_batch(self, real_images: Tensor, labels: Tensor | None) -> Batch:
        """The given real images with fresh latents and fresh labels drawn from the training set.

        With `--cfg dcgan` fakes have the labels of the reals, as terms that compare the two need.
        """
        num = self.local_batch_size
        z = torch.randn(num, self.G.z_dim, device=self.device)
        if self.labels is None:
            return Batch(real_images, None, z, None)
        if self.config.is_dcgan:
            return Batch(real_images, labels, z, labels)
        fake_labels = self.labels[torch.randint(len(self.labels), (num,))].to(self.device)
        return Batch(real_images, labels, z, fake_labels)

    def tick(self) -> None:
        """Report progress; at snapshots also write images, metrics and networks."""
        state, config = self.state, self.config
        self.report_progress()
        if self.is_snapshot_due():
            kimg = state.cur_nimg / 1000
            name = f"fakes{state.cur_nimg // 1000:06d}.png"
            self.grid.save_fakes(self.run_dir / name, self.G_ema)
            values = self.snapshots.evaluate(self.G_ema, state.cur_nimg, "network-snapshot.safetensors")
            self.snapshots.save(
                self.G, self.D, self.G_ema, state.cur_nimg, values, pl_mean=state.pl_mean.item()
            )
            self.log.print(
                f"Wrote {name} and network-snapshot.safetensors at {kimg:g} of {config.total_kimg:g} kimg"
            )
        state.cur_tick += 1
        self.tick_start_time, self.tick_start_nimg = time.time(), state.cur_nimg

    def report_progress(self) -> None:
        """Write the statistics since the last tick and print one status line."""
        state = self.state
        elapsed = time.time() - self.log.start_time
        tick_seconds = time.time() - self.tick_start_time
        tick_kimg = max(state.cur_nimg - self.tick_start_nimg, 1) / 1000
        progress = {
            "Progress/tick": state.cur_tick,
            "Progress/kimg": state.cur_nimg / 1000,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": tick_seconds / tick_kimg,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        }
        for name, value in progress.items():
            self.stats.report(name, value)
        stats = self.stats.flush()
        self.log.write_stats(stats, state.cur_nimg)
        means = {
            name: stats[name]["mean"]
            for name in ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/signs/fake")
        }
        self.log.print(
            f"tick {state.cur_tick:<4d} kimg {state.cur_nimg / 1000:<8.1f} time {elapsed:<7.0f} "
            f"sec/kimg {tick_seconds / tick_kimg:<7.2f} G {means['Loss/G/loss']:<7.2f} D {means['Loss/D/loss']:<6.2f} "
            f"signs real {means['Loss/signs/real']:<5.2f} fake {means['Loss/signs/fake']:<5.2f}"
        )

    def is_done(self) -> bool:
        """True once total_kimg thousand images have been seen."""
        return self.state.cur_nimg >= self.config.total_kimg * 1000

    def is_tick_due(self) -> bool:
        """True at the end, right after the first iteration, and every tick_kimg thousand images."""
        first = self.state.cur_tick == 0
        return (
            self.is_done()
            or first
            or self.state.cur_nimg >= self.tick_start_nimg + self.config.tick_kimg * 1000
        )

    def is_snapshot_due(self) -> bool:
        """True at the end and every snapshot_ticks ticks, but not at the first."""
        every = self.config.snapshot_ticks
        return self.is_done() or (every > 0 and self.state.cur_tick > 0 and self.state.cur_tick % every == 0)

    def is_path_length_due(self) -> bool:
        """True every reg_interval iterations once path length has started."""
        terms, interval = self.config.loss_terms, self.config.generator_optimizer.reg_interval
        started = terms.pl_weight > 0 and self.state.cur_nimg >= terms.pl_start_kimg * 1000
        return started and interval > 0 and self.state.cur_iteration % interval == 0


def build_loss(config: TrainConfig, device: torch.device) -> AdversarialLoss:
    """The loss that goes with the networks. Raises UserError for an objective that does not, or missing weights."""
    if config.is_dcgan:
        return make_dcgan_loss(config)
    guidance = GuidanceClassifier.pretrained().to(device) if config.loss_terms.cls_weight else None
    return ProjectedGANLoss(config, guidance)


def make_optimizer(parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer with its learning rate and betas corrected for lazy regularisation."""
    lr, betas = config.adjusted()
    parameters = list(parameters)
    if config.kind == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, alpha=betas[1], eps=config.eps)
    is_fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over the weights instead of ten
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=config.eps, fused=is_fused)


def configure_backends(config: TrainConfig, device: torch.device) -> None:
    """Process-wide switches for speed; float32 stays float32 (no TF32), as in the published runs."""
    torch.backends.cudnn.benchmark = config.benchmark
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        cpu.tune_for_training()
