# SPDX-License-Identifier: MIT
"""How long training waits for its complete states: written while it waits, and written in the background.

    python tests/benchmarks/checkpoint_stall.py --preset quickstart --batch 32 --folder /path/on/the/disk

Iterations of G and D on random images, without pretrained weights, are timed in rounds: without a state, with one
that is written at once, with one that is written in the background. The extra time of a round over the median round
without is the stall; that of the background also counts what writing takes away from the iterations meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.kinds import new_generator
from training.loss import ProjectedGANLoss
from training.network_io import save_network
from training.presets import PRESETS
from training.run_state import RunParts, TrainState, capture, describe_data
from training.state_file import write_state
from training.state_writer import StateWriter
from training.train_step import StepContext, discriminator_step, generator_step
from training.training_loop import make_optimizer


class Run:
    """Networks of a preset in training."""

    def __init__(self, preset: str, batch_size: int, device: torch.device) -> None:
        config = replace(PRESETS[preset](), batch_size=batch_size, microbatch_size=batch_size)
        self.config = config = replace(config, san_diagnostics_interval=0)
        self.device = device
        self.G = new_generator(config.generator).to(device)
        self.D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False).to(device)
        self.D.set_trainable_(False)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        self.optimizers = (
            make_optimizer(self.G.parameters(), config.generator_optimizer),
            make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer),
        )
        self.context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
        others = {"clock": TrainState(), "stats": self.context.stats}
        data = describe_data(None, 0)
        self.parts = RunParts(config, data, self.G, self.D, self.G_ema, *self.optimizers, others)
        c_dim, side = config.generator.c_dim, config.generator.img_resolution
        labels = torch.arange(batch_size, device=device) % c_dim if c_dim else None
        images = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
        z = torch.randn(batch_size, self.G.z_dim, device=device)
        self.batch = Batch(images, labels, z, labels, Draws(0, np.arange(batch_size), device))

    def iterate(self) -> None:
        """One update of G and one of D."""
        generator_step(self.G, self.D, self.optimizers[0], self.batch, self.context)
        discriminator_step(self.G, self.D, self.optimizers[1], self.batch, self.context)

    def time_round(self, num_iterations: int, save: Callable[[], None]) -> float:
        """Seconds of a round: `save`, then iterations."""
        start = time.perf_counter()
        save()
        for _ in range(num_iterations):
            self.iterate()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quickstart", help="of the networks")
    parser.add_argument("--batch", type=int, default=32, help="images per iteration")
    parser.add_argument("--iterations", type=int, default=4, help="per round")
    parser.add_argument("--rounds", type=int, default=7, help="of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mib", type=int, default=0, help="more state, as of larger networks, MiB")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary folder")
    args = parser.parse_args()
    run = Run(args.preset, args.batch, torch.device(args.device))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(run, Path(name), args.iterations, args.rounds, args.mib)


def measure(run: Run, folder: Path, num_iterations: int, num_rounds: int, mib: int) -> None:
    """Time all kinds of rounds in turn and print the table."""
    writer, numbers, submit_seconds = StateWriter(folder, keep_last=2), itertools.count(), []

    more = torch.randn(mib << 18, device=run.device)

    def state() -> dict[str, object]:
        return {**capture(run.parts), "more": more}

    def submit() -> None:
        writer.finish()
        start = time.perf_counter()
        writer.submit(next(numbers), state())
        submit_seconds.append(time.perf_counter() - start)

    kinds = {
        "without": lambda: None,
        "waiting": lambda: write_state(folder / "waiting.pt", state()),
        "background": submit,
        "network file": lambda: save_network(
            folder / "network.safetensors", run.G_ema, G=run.G, D_state=run.D.trained_state_dict()
        ),
    }
    run.time_round(2, submit)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(num_rounds):
        for kind, save in kinds.items():
            seconds[kind].append(run.time_round(num_iterations, save))
            writer.finish()
    num_bytes = (folder / "waiting.pt").stat().st_size
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    iteration = median["without"] / num_iterations
    config = run.config
    between = 10 * config.tick_kimg * 1000 / config.batch_size * iteration  # --checkpoint 10
    print(
        f"state {num_bytes / 2**20:.1f} MiB; iteration {iteration * 1000:.0f} ms; a state every {between:.0f} s"
    )
    print(f"background: copy in memory {statistics.median(submit_seconds) * 1000:.0f} ms")
    for kind in list(kinds)[1:]:
        stall = median[kind] - median["without"]
        print(
            f"{kind:<14} stall {stall * 1000:6.0f} ms, {stall / iteration:6.2f} iterations, {stall / between:.3%}"
        )


if __name__ == "__main__":
    main()
