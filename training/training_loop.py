# SPDX-License-Identifier: MIT
"""Trainer: builds everything a run needs and holds the order of events. No arithmetic: see train_step.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from torch_utils import cpu
from torch_utils.checkpoint import atomic_write
from torch_utils.distributed import (
    average_batch_statistics_,
    broadcast_object,
    check_replicas_equal,
    describe_rank,
    is_main,
    rank,
    world_size,
)
from torch_utils.ema import ema_beta, update_ema_
from torch_utils.seeding import seed_everything
from torch_utils.stats import StatsCollector
from training.batch import Batch, Reals
from training.collapse_watch import CollapseWatch
from training.config import TrainConfig, to_json
from training.continuation import SNAPSHOT, read_continuation
from training.data_loader import Batches, InfiniteSampler, make_loader
from training.dataset import ImageDataset
from training.direction_log import make_direction_log
from training.draws import Draws
from training.health import Health, RollbackRequest
from training.initialization import build_loss, build_networks, new_networks
from training.optimizers import make_optimizer
from training.out_of_memory import advise_on_memory
from training.run_log import RunLog, claim_run_dir
from training.run_options import RunOptions
from training.run_state import RunParts, TrainState, capture, describe_data, restore_
from training.snapshot import SampleGrid, Snapshots
from training.state_file import FOLDER as STATES
from training.state_writer import StateWriter
from training.stopping import StopReason, StopRequest
from training.tick_report import TickReport
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step
from training.watchdog import activity, note_iteration, write_line

OPTIONS_FILE = "training_options.json"


class Trainer:
    """One training run, or the next part of one."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        device: torch.device,
        options: RunOptions,
        run_dir: Path | None = None,
    ) -> None:
        """Raises UserError for what cannot be built; the run folder is made only after that.

        run_dir: go on with the run in this folder, or begin it there; None = begin in the next numbered folder.
        """
        seed_everything(config.seed)
        configure_backends(config, device)
        before = None if run_dir is None else read_continuation(run_dir, config)
        if before is None:
            networks, origin = build_networks(config, dataset, device)
        else:
            networks, origin = new_networks(config, device), before.describe()
        self.G, self.D, self.G_ema = networks.G, networks.D, networks.G_ema
        self.config, self.dataset, self.device, self.options = config, dataset, device, options
        trained = [p for p in self.G.parameters() if p.requires_grad]  # all but a stage's stem
        self.G_optimizer = make_optimizer(trained, config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        self.loss = build_loss(config, device)
        self.loss.directions = make_direction_log(config, self.D)
        self.clock = TrainState(pl_mean=torch.zeros((), device=device))
        self.stats = StatsCollector()
        self.health = Health(
            options.on_nonfinite, options.nonfinite_limit, (self.G, self.D, self.G_ema), self.saved_nimg
        )
        self.parts = self.collect_parts()
        notes = [] if before is None else [*before.notes, *restore_(self.parts, before.state, before.path)]
        check_replicas_equal([*self.G.state_dict().items(), *self.D.state_dict().items()])

        self.run_dir, self.lock = claim_run_dir(options, run_dir)
        if is_main():
            with atomic_write(self.run_dir / OPTIONS_FILE) as temporary:
                temporary.write_text(to_json(config) + "\n", encoding="utf-8")
        self.log = RunLog(
            self.run_dir,
            config.total_kimg,
            self.clock.cur_nimg,
            self.clock.total_seconds,
            options.wandb_project,
        )
        self.describe_start([origin, *notes])
        self.context = StepContext(config, self.loss, self.stats, warn=self.log.print, health=self.health)
        self.local_batch_size = config.batch_size // world_size()
        self.loader = self.open_loader()
        self.labels = torch.as_tensor(dataset.labels, device=device) if dataset.c_dim else None
        self.grid = SampleGrid(dataset, self.G.z_dim, device)
        self.watch = CollapseWatch(config, self.grid.real_images, self.grid.labels, self.log.print)
        self.snapshots = Snapshots(
            config, self.run_dir, dataset, self.log, device, keep_every_kimg=options.keep_every_kimg
        )
        for name, part in {"snapshots": self.snapshots, "watch": self.watch}.items():
            self.parts.others[name] = part
            if before is not None and name in before.state["others"]:
                part.load_state_dict(before.state["others"][name])
        self.writer = StateWriter(
            self.run_dir / STATES, options.keep_last, self.log.print, before and before.cur_nimg
        )
        self.report = TickReport(self.stats, self.log)

    def collect_parts(self) -> RunParts:
        """All that moves while the run trains."""
        others = {"clock": self.clock, "stats": self.stats, "health": self.health}
        if self.loss.directions is not None:
            others["directions"] = self.loss.directions
        data = describe_data(self.dataset.content_hash, len(self.dataset))
        return RunParts(
            self.config, data, self.G, self.D, self.G_ema, self.G_optimizer, self.D_optimizer, others
        )

    def describe_start(self, notes: list[str]) -> None:
        """Say what is trained on what and from where."""
        content = self.dataset.content_hash or "not hashed, as it is a large folder"
        processes = "" if world_size() == 1 else f" with {world_size()} processes"
        self.log.print(f"Training on {self.dataset.name} (content {content}) on {self.device}{processes}.")
        for note in notes:
            self.log.print(note)

    def open_loader(self) -> Batches:
        """This process's share of the real images, from where the run is."""
        sampler = InfiniteSampler(
            len(self.dataset), self.config.seed, rank(), world_size(), position=self.clock.cur_nimg
        )
        num_workers = self.config.data.num_workers
        return make_loader(self.dataset, sampler, self.local_batch_size, num_workers, self.device, self.warn)

    def warn(self, message: str) -> None:
        """To the log; of other processes than the main one, which have none, to the terminal."""
        if is_main():
            self.log.print(message)
        else:
            write_line(f"{describe_rank()}: {message}")

    def fit(self) -> StopReason | None:
        """Train for config.total_kimg thousand images. Returns None, or why the run stopped early, its state saved.

        Raises RunError when it cannot go on; what was saved before is intact.
        """
        try:
            memory = advise_on_memory(self.config, self.device, self.describe_saved)
            with memory, StopRequest(self.options.time_limit_s) as stop:
                self.start()
                reason = self.train_until(stop)
                if reason is not None:
                    self.stop(stop.cause)
        finally:
            self.loader.close()
            self.writer.finish()
            self.log.close()
            self.lock.release()
        return reason

    def train_until(self, stop: StopRequest) -> StopReason | None:
        """The loop: iterations and what is due between them, until the end (None) or a reason to stop."""
        while True:
            if self.is_tick_due():  # also the one that a run was stopped before
                kind = "snapshot" if self.is_snapshot_due() else "tick"
                if (reason := stop.poll(kind)) is not None:
                    return reason
                with stop.timed(kind):
                    self.tick()
            if self.is_done():
                return None
            if (reason := stop.poll()) is not None:
                return reason
            with stop.timed("iteration"):
                self.iterate_safely()

    def iterate_safely(self) -> None:
        """An iteration, and what faulty gradients lead to."""
        try:
            self.iterate()
            self.health.enforce()
        except RollbackRequest as request:
            self.roll_back(str(request))

    def stop(self, cause: str) -> None:
        """Save the complete state before the end."""
        self.save_state()
        self.writer.finish()
        self.log.print(f"Stopped at {self.clock.cur_nimg / 1000:g} kimg: {cause}.")
        if is_main() and self.writer.saved_nimg != self.clock.cur_nimg:
            self.log.print("Warning: the last state could not be saved; the run goes on from an older one.")

    def roll_back(self, message: str) -> None:
        """Undo the steps since the last complete state."""
        self.log.print(message)
        before = read_continuation(self.run_dir, self.config, self.log.print)
        restore_(self.parts, before.state, before.path)
        self.log.rewind(self.clock.cur_nimg)
        self.loader.close()
        self.loader = self.open_loader()
        self.report.restart()

    def start(self) -> None:
        """Pictures and metrics before the first step; a run that goes on has them already."""
        with activity("evaluation"):
            self.snapshots.check_metrics(self.G_ema)
        if self.clock.cur_nimg == 0:
            with self.log.surviving("a picture"):
                if is_main():
                    self.grid.save_reals(self.run_dir / "reals.png")
                    self.grid.save_fakes(self.run_dir / "fakes_init.png", self.G_ema)
            if self.config.evaluate_at_start:
                self.evaluate("initialisation")
        self.report.restart()

    def iterate(self) -> None:
        """One training iteration: G, path length every few iterations, D once or more, moving average."""
        config, clock, context = self.config, self.clock, self.context
        context.cur_nimg, context.cur_iteration = clock.cur_nimg, clock.cur_iteration
        reals = self.next_reals(step=0)
        generator_step(self.G, self.D, self.G_optimizer, self.draw_batch(reals, "G"), context)
        if self.is_path_length_due():
            batch = self.draw_batch(reals, "path_length")
            clock.pl_mean = path_length_step(self.G, self.G_optimizer, batch, clock.pl_mean, context)
        for step in range(config.critic.num_steps):
            if step > 0:
                reals = self.next_reals(step)
            discriminator_step(self.G, self.D, self.D_optimizer, self.draw_batch(reals, "D"), context)
        average_batch_statistics_(self.G, self.D)
        num_images = config.nimg_per_iteration
        beta = ema_beta(num_images, clock.cur_nimg, config.ema_halflife_kimg, config.ema_rampup)
        update_ema_(self.G_ema, self.G, beta)
        clock.cur_nimg += num_images
        clock.cur_iteration += 1
        self.log.advance(num_images)
        note_iteration(clock.cur_iteration)

    def next_reals(self, step: int) -> Reals:
        """This process's share of the next real images, for step 0, 1, ... of D in the iteration."""
        images, labels = next(self.loader)
        first = self.clock.cur_nimg + step * self.config.batch_size + rank()
        places = first + world_size() * np.arange(self.local_batch_size)  # as the sampler deals them out
        draws = Draws(self.config.seed, places, self.device, self.health.draws_scope)
        return Reals(images.to(torch.float32) / 127.5 - 1, None if self.labels is None else labels, draws)

    def draw_batch(self, reals: Reals, scope: str) -> Batch:
        """The real images with latents and labels, drawn from the training set, of the step named by `scope`.

        With `--cfg dcgan` fakes have the labels of the reals, as terms that compare the two need.
        """
        draws = reals.draws.within(scope)
        fake_labels = reals.labels
        if self.labels is not None and not self.config.is_dcgan:
            fake_labels = self.labels[draws.integers("label", 0, len(self.labels))]
        return Batch(reals.images, reals.labels, draws.normal("z", self.G.z_dim), fake_labels, draws)

    def tick(self) -> None:
        """Report progress; at snapshots also write images, metrics and networks; save the complete state."""
        clock = self.clock
        self.health.report(self.stats)
        self.watch.look_at_stats(self.report.write(clock, self.loader), clock.cur_nimg)
        self.writer.poll()
        is_checkpoint = self.is_checkpoint_due()
        if self.is_snapshot_due():
            self.snapshot()
        clock.cur_tick += 1
        clock.tick_start_nimg = clock.cur_nimg
        if is_checkpoint:
            self.save_state()
        self.report.restart()

    def snapshot(self) -> None:
        """Images, metrics and networks of this moment, written by the main process."""
        kimg = self.clock.cur_nimg / 1000
        name = f"fakes{self.clock.cur_nimg // 1000:06d}.png"
        values = self.evaluate(SNAPSHOT, self.snapshot_number())
        diversity: dict[str, float] = {}
        if is_main():
            fake_images = self.grid.generate(self.G_ema)
            diversity = self.watch.look_at_images(fake_images, self.clock.cur_nimg)
            with self.log.surviving(name):
                self.grid.save(fake_images, self.run_dir / name)
            if self.snapshots.save(self.G, self.D, self.G_ema, self.clock.cur_nimg, values):
                self.log.print(f"Wrote {name} and {SNAPSHOT} at {kimg:g} of {self.config.total_kimg:g} kimg")
        for key, value in broadcast_object(diversity).items():  # all processes must report the same names
            self.stats.report(key, value)

    def evaluate(self, snapshot: str, number: int | None = None) -> dict[str, float]:
        """The metrics of G_ema that are due at this snapshot, by all processes together."""
        with activity("evaluation"):
            return self.snapshots.evaluate(self.G_ema, self.clock.cur_nimg, snapshot, number)

    def snapshot_number(self) -> int | None:
        """Which snapshot of the run this is, from 1 on; None = the last one."""
        return None if self.is_done() else self.clock.cur_tick // self.config.snapshot_ticks

    def save_state(self) -> None:
        """Begin to write the complete state, from which the run can go on exactly."""
        self.clock.total_seconds = self.log.total_seconds()
        self.writer.submit(self.clock.cur_nimg, capture(self.parts))

    def describe_saved(self) -> str:
        """For the end of a run that fails."""
        self.writer.finish()
        if (nimg := self.writer.saved_nimg) is None:
            return ""
        return f"the state at {nimg / 1000:g} kimg is saved: go on with --resume {self.run_dir}"

    def saved_nimg(self) -> int | None:
        """Images seen at the last complete state on the disk, on all processes; None = there is none."""
        self.writer.finish()
        return broadcast_object(self.writer.saved_nimg)

    def is_done(self) -> bool:
        """True once total_kimg thousand images have been seen."""
        return self.clock.cur_nimg >= self.config.total_kimg * 1000

    def is_tick_due(self) -> bool:
        """True at the end, right after the first iteration, and every tick_kimg thousand images."""
        nimg = self.clock.cur_nimg - self.clock.tick_start_nimg
        is_first = self.clock.cur_tick == 0
        return nimg > 0 and (self.is_done() or is_first or nimg >= self.config.tick_kimg * 1000)

    def is_snapshot_due(self) -> bool:
        """True at the end and every snapshot_ticks ticks, but not at the first."""
        every = self.config.snapshot_ticks
        return self.is_done() or (every > 0 and self.clock.cur_tick > 0 and self.clock.cur_tick % every == 0)

    def is_checkpoint_due(self) -> bool:
        """True at every snapshot and every checkpoint_ticks ticks, but not at the first."""
        every = self.options.checkpoint_ticks
        return self.is_snapshot_due() or (
            every > 0 and self.clock.cur_tick > 0 and self.clock.cur_tick % every == 0
        )

    def is_path_length_due(self) -> bool:
        """True every reg_interval iterations once path length has started."""
        terms, interval = self.config.loss_terms, self.config.generator_optimizer.reg_interval
        started = terms.pl_weight > 0 and self.clock.cur_nimg >= terms.pl_start_kimg * 1000
        return started and interval > 0 and self.clock.cur_iteration % interval == 0


def configure_backends(config: TrainConfig, device: torch.device) -> None:
    """Process-wide switches for speed; float32 stays float32 (no TF32), as in the published runs."""
    torch.backends.cudnn.benchmark = config.benchmark
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        cpu.tune_for_training()
