# SPDX-License-Identifier: MIT
"""What a run leaves behind at a snapshot: image grids, network files, metric values, the best network so far."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_utils.checkpoint import atomic_copy
from torch_utils.distributed import is_main
from training.config import TrainConfig
from training.continuation import BEST_MODEL, SNAPSHOT
from training.dataset import ImageDataset
from training.discriminator.kinds import AnyDiscriminator
from training.generator.kinds import AnyGenerator
from training.image_grid import plan_grid, save_image_grid
from training.metric_records import MetricRecord, network_hash
from training.metric_schedule import ScheduledMetric, best_key, due_metrics, parse_schedule
from training.network_io import save_network
from training.run_log import RunLog

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

    def generate(self, G_ema: AnyGenerator) -> Tensor:
        """What G_ema makes of the grid's latents and labels, float (N, C, H, W) in about [-1, 1], on the CPU."""
        return torch.cat(list(self._generate(G_ema)))

    def save(self, fake_images: Tensor, path: Path) -> None:
        """Write images of `generate`."""
        save_image_grid(fake_images, path, drange=(-1, 1), grid_size=self.grid_size)

    def save_fakes(self, path: Path, G_ema: AnyGenerator) -> None:
        """Generate and write."""
        self.save(self.generate(G_ema), path)

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
    best_value: float | None = None  # of best_model
    best_name: str | None = None  # key of that result
    keep_every_kimg: float = 0.0  # also keep a network file every so many thousand images; 0 = none
    kept_nimg: int = 0  # images seen at the last of those
    _missing_metrics: set[str] = field(default_factory=set)  # that cannot be computed in this run

    @functools.cached_property
    def schedule(self) -> tuple[ScheduledMetric, ...]:
        """The run's metrics."""
        return parse_schedule(self.config.metrics)

    def evaluate(
        self, G_ema: AnyGenerator, cur_nimg: int, snapshot: str, number: int | None = None
    ) -> dict[str, float]:
        """Compute the metrics due at snapshot `number` for G_ema, in one pass, and log them. Returns all values by key.

        number: None = all metrics. All processes call it, share the work and get the same. A metric that cannot be
        computed, as its detector is missing say, is named once and left out.
        """
        names = [name for name in due_metrics(self.schedule, number) if name not in self._missing_metrics]
        if not names:
            return {}
        from metrics import evaluate  # training without metrics must not need the package
        from metrics.needs import Options
        from training.metric_sources import network_sources

        start = time.time()
        sources = network_sources(G_ema, METRIC_SEED, self.device)
        found = evaluate.evaluate(
            names,
            self._reference,
            sources,
            self.device,
            options=Options(seed=METRIC_SEED),
            on_unavailable=self._leave_out_metric,
        )
        seconds = time.time() - start
        network_sha256 = network_hash(G_ema) if is_main() else None
        for name, result in found.items():
            record = MetricRecord(
                name,
                result.results,
                cur_nimg,
                snapshot,
                network_sha256,
                seconds,
                result.settings,
                result.details,
            )
            self.log.write_metric(record, cur_nimg)
        values = {key: value for result in found.values() for key, value in result.results.items()}
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        if values:
            self.log.print(f"{shown} at {cur_nimg / 1000:g} kimg ({seconds:.0f} s)")
        return values

    def check_metrics(self, G_ema: AnyGenerator) -> None:
        """Say which metrics cannot be computed, rather than hours later; fetch what the others need. All call it."""
        if not self.schedule:
            return
        from metrics import evaluate
        from training.metric_sources import network_sources

        names, sources = due_metrics(self.schedule, None), network_sources(G_ema, METRIC_SEED, self.device)
        evaluate.check_available(names, self.dataset.c_dim > 0, sources, self.device, self._leave_out_metric)

    def _leave_out_metric(self, name: str, reason: str) -> None:
        self._missing_metrics.add(name)
        self.log.print(f"Warning: {name} is left out from here on: {reason}")

    @functools.cached_property
    def _reference(self) -> ImageSet:
        """All real images, unmirrored. Made once per run: the fingerprint of a folder reads every file."""
        from training.metric_sources import dataset_reference

        return dataset_reference(self.dataset)

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
    ) -> bool:
        """Write network-snapshot.safetensors, and the same network as best_model and network-<images seen>, if due.

        best_model is due when the result improved that picks it. False, with a warning in the log, if a file could not
        be written: those that were there stay, and what was due is so at the next snapshot. The main process writes.
        """
        if not is_main():
            return True
        snapshot = self.run_dir / SNAPSHOT
        info = {"cur_nimg": cur_nimg, "metrics": values, **self._data_info}
        with self.log.surviving(str(snapshot)):
            save_network(snapshot, G_ema, G=G, D_state=D.trained_state_dict(), config=self.config, info=info)
            name = best_key(self.config.best_by, self.schedule, self._missing_metrics)
            if self.is_best(name, values):
                atomic_copy(snapshot, self.run_dir / BEST_MODEL)
                self.best_name, self.best_value = name, None if name is None else values.get(name)
            if self.keep_every_kimg and cur_nimg >= self.next_kept_nimg():
                atomic_copy(snapshot, self.run_dir / f"network-{cur_nimg:09d}.safetensors")
                self.kept_nimg = cur_nimg
            return True
        return False

    def is_best(self, name: str | None, values: Mapping[str, float]) -> bool:
        """Whether a network with these results is to become best_model, by the result `name`.

        It is when nothing can be compared: no metric, no value yet, or one of another metric. Where the metric is not
        computed at this snapshot, the best network stays.
        """
        if name is None or not (self.run_dir / BEST_MODEL).exists():
            return True
        if name not in values:
            return False
        if self.best_value is None or self.best_name != name:
            return True
        from metrics.names import is_better

        return is_better(name, values[name], self.best_value)

    def next_kept_nimg(self) -> float:
        """Images seen from which on the next network file is kept for good: a multiple of keep_every_kimg."""
        interval = self.keep_every_kimg * 1000
        return (self.kept_nimg // interval + 1) * interval

    def state_dict(self) -> dict[str, Any]:
        """Which network was best, and which was kept last."""
        return {"best_name": self.best_name, "best_value": self.best_value, "kept_nimg": self.kept_nimg}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.best_name, self.best_value = state["best_name"], state["best_value"]
        self.kept_nimg = state["kept_nimg"]
