# SPDX-License-Identifier: MIT
"""Running count, mean and standard deviation of named scalars between two progress reports.

Values are summed where they live, so reporting inside a training step costs no synchronisation with the device.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from torch_utils.distributed import gather_objects, is_main, rank, world_size

MAX_RECENT = 1024  # reports remembered for `take_faulty_names`; a step makes some ten per micro-batch


class StatsCollector:
    """Collects scalars under names; `flush` returns their moments since the last flush."""

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}
        self._recent: deque[tuple[str, Tensor]] = deque(maxlen=MAX_RECENT)  # names and sums, as reported

    def report(self, name: str, values: Tensor | float) -> None:
        """Add every element of `values` to the statistics called `name`.

        No element adds nothing, but reserves the name: all processes must report the same names in the same order.
        """
        flat = torch.as_tensor(values, dtype=torch.float32).detach().reshape(-1)
        total = flat.sum()
        self._recent.append((name, total))
        moments = torch.stack([torch.full_like(total, flat.numel()), total, flat.square().sum()])
        if name in self._moments:
            self._moments[name] = (
                self._moments[name].to(moments.device) + moments
            )  # moves after load_state_dict
        else:
            self._moments[name] = moments

    def flush(self) -> dict[str, dict[str, float]]:
        """Return {name: {num, mean, std}} over all processes, in the order of first use, and start afresh.

        Names without any element are left out.
        """
        result = {}
        state = self.state_dict()
        for name, row in zip(state["names"], state["moments"].double().sum(0).tolist(), strict=True):
            num, total, total_sq = row
            if num == 0:
                continue
            mean = total / num
            std = math.sqrt(max(total_sq / num - mean * mean, 0.0)) if num > 1 else 0.0
            result[name] = {"num": int(num), "mean": mean, "std": std}
        self._moments.clear()
        return result

    def take_faulty_names(self) -> list[str]:
        """Names of which a report since the last call was not finite, each once. Waits for the device."""
        names = [name for name, total in self._recent if not total.isfinite()]
        self._recent.clear()
        return list(dict.fromkeys(names))

    def forget_recent(self) -> None:
        """What has been reported until now was finite, or is of no interest to `take_faulty_names`."""
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has been reported since the last flush, of every process. All processes must call it together."""
        own = torch.zeros(len(self._moments), 3)  # on the CPU, wherever values are reported from
        for row, moments in zip(own, self._moments.values(), strict=True):
            row.copy_(moments)
        return {"names": list(self._moments), "moments": torch.stack(gather_objects(own))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. With another number of processes the main one takes the sum of all."""
        moments = state["moments"]
        own = torch.zeros_like(moments[0])
        if len(moments) == world_size():
            own = moments[rank()]
        elif is_main():
            own = moments.sum(0)
        self._moments = {name: row.clone() for name, row in zip(state["names"], own, strict=True)}
