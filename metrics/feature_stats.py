# SPDX-License-Identifier: MIT
"""Mean and covariance of features, gathered batch by batch in float64 on the device of the features.

Only the sums are kept, so memory does not grow with the number of images, and sums of several processes can
be merged. As in the reference implementation of FID, the covariance is divided by N, not by N - 1.
"""

from __future__ import annotations

import os
import zipfile

import numpy as np
import torch
from torch import Tensor

from torch_utils.checkpoint import atomic_write

_FORMAT = "stylesan-feature-stats-1"


class FeatureStats:
    """Running sums of features (N, D), from which `mean` (D,) and `covariance` (D, D) are read, in float64.

    max_items: features beyond this many are ignored; None = no limit.
    """

    def __init__(self, max_items: int | None = None) -> None:
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items={max_items} must be at least 1, or None for no limit")
        self.max_items = max_items
        self.num_items = 0
        self._sum: Tensor | None = None  # (D,)
        self._outer_sum: Tensor | None = None  # (D, D)

    @property
    def is_full(self) -> bool:
        """Whether `max_items` features have been taken."""
        return self.max_items is not None and self.num_items >= self.max_items

    @property
    def num_features(self) -> int | None:
        """D, or None before the first batch."""
        return None if self._sum is None else self._sum.shape[0]

    @torch.no_grad()
    def append(self, features: Tensor) -> None:
        """Add a batch of features (N, D) of any float type and device. ValueError when D changes."""
        if features.ndim != 2:
            raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
        if self.max_items is not None:
            features = features[: self.max_items - self.num_items]
        x = features.detach()
        x = (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64
        if self._sum is None or self._outer_sum is None:
            self._add(0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
        assert self._sum is not None and self._outer_sum is not None
        self._check_width(x.shape[1])
        self._sum += x.sum(dim=0)
        self._outer_sum.addmm_(x.T, x)  # in place: a sum of its own is 34 MB of Inception's, moved twice
        self.num_items += x.shape[0]

    def merge(self, other: FeatureStats) -> None:
        """Add the sums of `other`, of another process say. ValueError when that exceeds `max_items`."""
        if other._sum is None or other._outer_sum is None:
            return
        total = self.num_items + other.num_items
        if self.max_items is not None and total > self.max_items:
            raise ValueError(f"{total} merged items exceed max_items={self.max_items}; sums cannot be cut")
        self._add(other.num_items, other._sum, other._outer_sum)

    def _add(self, num_items: int, total: Tensor, outer: Tensor) -> None:
        if self._sum is None or self._outer_sum is None:
            self._sum, self._outer_sum = total.clone(), outer.clone()
        else:
            self._check_width(total.shape[0])
            self._sum += total
            self._outer_sum += outer
        self.num_items += num_items

    def _check_width(self, num_features: int) -> None:
        if self._sum is not None and self._sum.shape[0] != num_features:
            raise ValueError(f"got {num_features} features per item after {self._sum.shape[0]} before")

    def mean(self) -> Tensor:
        """Mean of the features, float64 (D,) on the CPU. ValueError when nothing was appended."""
        self._require_items()
        assert self._sum is not None
        return self._sum.cpu() / self.num_items

    def covariance(self) -> Tensor:
        """Covariance divided by N, float64 (D, D) on the CPU. ValueError when nothing was appended."""
        self._require_items()
        assert self._outer_sum is not None
        mean = self.mean()
        return self._outer_sum.cpu() / self.num_items - torch.outer(mean, mean)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sum (D,) and sum of outer products (D, D), float64 on the CPU. ValueError when nothing was appended."""
        self._require_items()
        assert self._sum is not None and self._outer_sum is not None
        return self._sum.cpu(), self._outer_sum.cpu()

    @classmethod
    def from_sums(cls, num_items: int, total: Tensor, outer: Tensor) -> FeatureStats:
        """Statistics with the sums of `num_items` features."""
        stats = cls()
        stats._add(num_items, total.double(), outer.double())
        return stats

    def _require_items(self) -> None:
        if self.num_items == 0:
            raise ValueError("no features were appended")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums as .npz, atomically; `load` reads them back."""
        total, outer = self.sums()
        arrays = {"sum": total.numpy(), "outer_sum": outer.numpy()}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, format=np.array(_FORMAT), num_items=np.array(self.num_items), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStats:
        """Read a file of `save`. FileNotFoundError when absent, ValueError when damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"its format is {file['format']}, not {_FORMAT}")
                num_items = int(file["num_items"])
                total, outer = torch.from_numpy(file["sum"]), torch.from_numpy(file["outer_sum"])
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable statistics file: {error}") from error
        if num_items < 1 or total.ndim != 1 or outer.shape != (len(total), len(total)):
            raise ValueError(f"{path} is not a readable statistics file: its arrays do not fit together")
        return cls.from_sums(num_items, total, outer)
