# SPDX-License-Identifier: MIT
"""Random numbers of single samples, from counters: a pure function of the run's seed, the sample and the purpose.

No stream is shared, so a sample has the same latent, label and augmentation on whatever process and in whatever
micro-batch it is trained, and a run that goes on needs no generator's state. The counter is Philox's (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_utils.transfer import send


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws for a batch of N samples. Two calls with one purpose give the same numbers."""

    seed: int  # of the run
    samples: np.ndarray  # int64 (N,): the samples' places in the run's sequence of real images
    device: torch.device = torch.device("cpu")  # noqa: RUF009 -- where the numbers go; drawn on the CPU
    scope: str = ""  # what all purposes start with: the step that draws

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.dtype != np.int64 or (self.samples < 0).any():
            raise ValueError(f"samples must be a row of whole numbers from 0 on, int64: {self.samples}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> Draws:
        """Draws of some of the samples."""
        return replace(self, samples=self.samples[part])

    def within(self, scope: str) -> Draws:
        """The same samples for other purposes, all different from the old ones."""
        return replace(self, scope=f"{self.scope}/{scope}")

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1), float32 (N, *shape)."""
        values = np.empty((len(self), *shape), dtype=np.float32)
        for row, generator in enumerate(self._generators(purpose)):
            values[row] = generator.standard_normal(shape, dtype=np.float32)
        return self._deliver(values)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """U[0, 1), float32 (N, *shape)."""
        values = np.empty((len(self), *shape), dtype=np.float32)
        for row, generator in enumerate(self._generators(purpose)):
            values[row] = generator.random(shape, dtype=np.float32)
        return self._deliver(values)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Integers of low <= i < high, int64 (N,)."""
        values = np.empty(len(self), dtype=np.int64)
        for row, generator in enumerate(self._generators(purpose)):
            values[row] = generator.integers(low, high)
        return self._deliver(values)

    def _generators(self, purpose: str) -> Iterator[np.random.Generator]:
        """A generator for each sample in turn: the key says run and purpose, the counter the sample.

        It is one object that is set to each sample's state, which takes a sixth of the time of making new ones.
        """
        digest = hashlib.sha256(f"{self.seed}{self.scope}/{purpose}".encode()).digest()
        bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64))
        generator, state = np.random.Generator(bits), bits.state
        for sample in self.samples.tolist():
            state["state"]["counter"][3] = sample  # the highest word: the lower ones count a sample's numbers
            bits.state = state
            yield generator

    def _deliver(self, values: np.ndarray) -> Tensor:
        return send(torch.from_numpy(values), self.device)
