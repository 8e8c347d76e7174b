# SPDX-License-Identifier: MIT
"""BatchNorm whose batch statistics are those of all processes together, on any device and backend.

torch's own SyncBatchNorm needs GPUs and cannot be differentiated twice, which gradient penalties do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.distributed import rank, sum_over_processes, world_size


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, but for the statistics in training mode. All processes must pass as many samples, together."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        everywhere = gather_with_gradient(torch.stack([mean, variance]))  # (processes, 2, C)
        variance_between, mean = torch.var_mean(everywhere[:, 0], dim=0, correction=0)
        variance = everywhere[:, 1].mean(dim=0) + variance_between
        if self.track_running_stats:
            self._move_running_statistics(mean.detach(), variance.detach(), world_size() * x[:, 0].numel())
        gain = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul((self.bias - mean * gain)[:, None, None], x, gain[:, None, None])

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as torch's


def gather_with_gradient(x: Tensor) -> Tensor:
    """`x` of every process, stacked by rank, (processes, *x.shape); gradients flow back to all of them, twice too."""
    own = torch.arange(world_size(), device=x.device) == rank()
    return _Sum.apply(own.to(x.dtype).view(-1, *[1] * x.ndim) * x)


class _Sum(torch.autograd.Function):
    """Sum over processes. Each holds the same sum, so the gradient is that of all of them, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_processes(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def sync_batchnorm_(module: nn.Module) -> int:
    """Turn every nn.BatchNorm2d inside into a SyncBatchNorm2d in place; returns how many there were.

    Parameters, buffers and the names of the state dict stay: optimizers and files need not know. Raises ValueError for
    layers that it cannot turn (no affine parameters, cumulative averages).
    """
    count = 0
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.BatchNorm2d:  # not timm's subclasses, which are frozen
                setattr(parent, name, _converted(layer))
                count += 1
    return count


def _converted(layer: nn.BatchNorm2d) -> SyncBatchNorm2d:
    if not layer.affine or layer.momentum is None or layer.running_mean is None:
        raise ValueError(f"{layer} has no gains and shifts, or no running averages with a fixed momentum")
    twin = SyncBatchNorm2d(layer.num_features, layer.eps, layer.momentum, device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(twin, name, parameter)
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    twin.track_running_stats = layer.track_running_stats
    return twin.train(layer.training)
