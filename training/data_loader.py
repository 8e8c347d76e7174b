# SPDX-License-Identifier: MIT
"""Batches of training images: an endless random order of a data set, and what loads it.

The order for a seed is that of StyleGAN's data loader, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from training.dataset import ImageDataset
from training.image_source import DatasetError

SAMPLER_BLOCK = 4096  # random offsets drawn at a time; does not change the sequence


class InfiniteSampler(Sampler[int]):
    """Endless random order of a data set, dealt out to `num_replicas` processes in turn.

    Each step also swaps the index just used with one at most `window_size * dataset_size` places back, so the
    order keeps changing without reshuffling (StyleGAN2-ADA's sampler). Every process runs the same generator.

    position: how many indices of the common sequence, all processes together, lie behind; iteration starts
    there. With batches of equal size this is the number of images shown, so it restores the order after a
    restart.
    """

    def __init__(
        self,
        dataset_size: int,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        window_size: float = 0.5,
        position: int = 0,
    ) -> None:
        if dataset_size < 1 or not 0 <= rank < num_replicas or not 0 <= window_size <= 1 or position < 0:
            raise ValueError(
                f"InfiniteSampler: {dataset_size=}, {rank=}, {num_replicas=}, {window_size=}, {position=}"
            )
        self.dataset_size = dataset_size
        self.seed = seed
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.window_size = window_size
        self.position = position

    def __iter__(self) -> Iterator[int]:
        random_state = np.random.RandomState(self.seed % 2**32)
        order_array = np.arange(self.dataset_size)
        window = 0
        if self.shuffle:
            random_state.shuffle(order_array)
            window = int(np.rint(self.dataset_size * self.window_size))
        order = order_array.tolist()  # a list swaps ten times faster than an array
        count, start = 0, self.position
        while True:
            offsets = [0] * SAMPLER_BLOCK
            if window >= 2:
                offsets = random_state.randint(window, size=SAMPLER_BLOCK).tolist()
            for offset in offsets:
                i = count % self.dataset_size
                if count >= start and count % self.num_replicas == self.rank:
                    yield order[i]
                j = (i - offset) % self.dataset_size
                order[i], order[j] = order[j], order[i]
                count += 1


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Endless (images uint8 (N, C, H, W), class ids int64 (N,)) on one device.

    position: the sampler's position after the last batch; build a sampler with it to continue from there.
    """

    def __init__(
        self,
        stream: Iterator[tuple[Tensor, Tensor]],
        sampler: InfiniteSampler,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._stream = stream
        self._step = batch_size * sampler.num_replicas
        self._device = device
        self.position = sampler.position

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            images, labels = next(self._stream)
        except DatasetError as error:
            # A worker process wraps the message in its traceback; the last line is what the user needs.
            raise DatasetError(str(error).strip().splitlines()[-1].rpartition("DatasetError: ")[2]) from error
        self.position += self._step
        return images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def make_loader(
    dataset: ImageDataset,
    sampler: InfiniteSampler,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Batches:
    """Batches of `batch_size` per process, in the sampler's order.

    num_workers: processes that decode; a set in memory is indexed directly and needs none. The batches do not
    depend on it, and torch's global generator is left alone.
    """
    device = torch.device(device)
    if dataset.is_in_memory or num_workers == 0:
        return Batches(_index_batches(dataset, sampler, batch_size), sampler, batch_size, device)
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the workers' seeds are drawn from the global generator
    )
    return Batches(iter(loader), sampler, batch_size, device)


def _index_batches(
    dataset: ImageDataset, sampler: InfiniteSampler, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    indices = iter(sampler)
    while True:
        yield dataset.batch([next(indices) for _ in range(batch_size)])
