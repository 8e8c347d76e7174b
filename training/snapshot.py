# SPDX-License-Identifier: MIT
"""What a run leaves behind at a snapshot: image grids, network files, metric values, the best network so far."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.config import TrainConfig
from training.dataset import ImageDataset
from training.discriminator.kinds import AnyDiscriminator
from training.generator.kinds import AnyGenerator
from training.image_grid import plan_grid, save_image_grid
from training.network_io import save_network
from training.run_log import RunLog
from training.sampling import seeded_sampler

if TYPE_CHECKING:
    from metrics.evaluate import ImageSet

SAMPLING_BATCH_SIZE = 64  # images per forward pass of G_ema outside training
GRID_SEED, METRIC_SEED = 0, 1  # of the latents: the same in every run, so that pictures and values compare


class SampleGrid:
    """Fixed latents and labels whose images are saved again and again, and the real images in the same layout."""

    def __init__(self, dataset: ImageDataset, z_dim: int, device: torch.device) -> None:
        indices, self.grid_size = plan_grid(dataset.labels, dataset.c_dim, dataset.resolution)
        self.real_images, labels = dataset.batch(indices)
        self.labels = labels.to(device) if dataset.c_dim else None
        rng = torch.Generator().manual_seed(GRID_SEED)
        self.z = torch.randn(len(indices), z_dim, generator=rng).to(device)

    def save_reals(self, path: Path) -> None:
        """Write the real images of the grid."""
        save_image_grid(self.real_images, path, drange=(0, 255), grid_size=self.grid_size)

    def save_fakes(self, path: Path, G_ema: AnyGenerator) -> None:
        """Write what G_ema makes of the grid's latents and labels."""
        save_image_grid(
            torch.cat(list(self._generate(G_ema))), path, drange=(-1, 1), grid_size=self.grid_size
        )

    @torch.inference_mode()
    def _generate(self, G_ema: AnyGenerator) -> Iterator[Tensor]:
        for start in range(0, len(self.z), SAMPLING_BATCH_SIZE):
            part = slice(start, start + SAMPLING_BATCH_SIZE)
            yield G_ema(self.z[part], None if self.labels is None else self.labels[part]).cpu()


@dataclass
class Snapshots:
    """Evaluates and writes the networks of one run, and remembers which was best."""

    config: TrainConfig
    run_dir: Path
    dataset: ImageDataset
    log: RunLog
    device: torch.device
    best_value: float | None = None  # of the first metric; lower is better

    def evaluate(self, G_ema: AnyGenerator, cur_nimg: int, snapshot: str) -> dict[str, float]:
        """Compute the run's metrics for G_ema and log them. Returns all values by name."""
        values: dict[str, float] = {}
        if not self.config.metrics:
            return values
        from metrics import evaluate  # training without metrics must not need the package

        for name in self.config.metrics:
            start = time.time()
            sampler = seeded_sampler(G_ema, METRIC_SEED, self.device)
            results = evaluate.compute(name, self._reference, sampler, device=self.device)
            seconds = time.time() - start
            self.log.write_metric(name, results, cur_nimg, snapshot, seconds)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in results.items())
            self.log.print(f"{shown} at {cur_nimg / 1000:g} kimg ({seconds:.0f} s)")
            values.update(results)
        return values

    @functools.cached_property
    def _reference(self) -> ImageSet:
        """All real images, unmirrored. Made once per run: the fingerprint of a folder reads every file."""
        from metrics.evaluate import ImageSet

        real = self.dataset.reference_set()
        return ImageSet(len(real), real.fingerprint(), real.image_batches)

    @functools.cached_property
    def _data_info(self) -> dict[str, object]:
        """Which data the networks saw: what samplers need to know a class by its name, and people to trust it."""
        info: dict[str, object] = {"data_name": self.dataset.name, "content_hash": self.dataset.content_hash}
        if self.dataset.class_names is not None:
            info["class_names"] = list(self.dataset.class_names)
        return info

    def save(
        self,
        G: AnyGenerator,
        D: AnyDiscriminator,
        G_ema: AnyGenerator,
        cur_nimg: int,
        values: dict[str, float],
        pl_mean: float = 0.0,
    ) -> None:
        """Write network-snapshot.safetensors, and best_model.safetensors if the first metric improved."""
        value = next(iter(values.values()), None)
        names = ["network-snapshot.safetensors"]
        if value is None or self.best_value is None or value < self.best_value:
            self.best_value = value
            names.append("best_model.safetensors")
        info = {"cur_nimg": cur_nimg, "metrics": values, **self._data_info}
        if self.config.loss_terms.pl_weight:
            info["pl_mean"] = pl_mean
        for name in names:
            path = self.run_dir / name
            save_network(path, G_ema, G=G, D_state=D.trained_state_dict(), config=self.config, info=info)
