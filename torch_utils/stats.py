# SPDX-License-Identifier: MIT
"""Running count, mean and standard deviation of named scalars between two progress reports.

Values are summed where they live, so reporting inside a training step costs no synchronisation with the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_utils.distributed import sum_over_processes


class StatsCollector:
    """Collects scalars under names; `flush` returns their moments since the last flush."""

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}

    def report(self, name: str, values: Tensor | float) -> None:
        """Add every element of `values` to the statistics called `name`.

        No element adds nothing, but reserves the name: all processes must report the same names in the same order.
        """
        flat = torch.as_tensor(values, dtype=torch.float32).detach().reshape(-1)
        total = flat.sum()
        moments = torch.stack([torch.full_like(total, flat.numel()), total, flat.square().sum()])
        if name in self._moments:
            self._moments[name] += moments
        else:
            self._moments[name] = moments

    def flush(self) -> dict[str, dict[str, float]]:
        """Return {name: {num, mean, std}} over all processes, in the order of first use, and start afresh.

        Names without any element are left out.
        """
        result = {}
        for name, moments in self._moments.items():
            num, total, total_sq = sum_over_processes(moments).cpu().double().tolist()
            if num == 0:
                continue
            mean = total / num
            std = math.sqrt(max(total_sq / num - mean * mean, 0.0)) if num > 1 else 0.0
            result[name] = {"num": int(num), "mean": mean, "std": std}
        self._moments.clear()
        return result
