# SPDX-License-Identifier: MIT
"""The alias-free synthesis network of StyleGAN3 (arXiv:2106.12423): style vectors to images.

A Fourier-feature input, then layers of modulated convolution and filtered leaky ReLU, at the sampling rates
that a `NetworkPlan` lays out. Attribute names are those of the official state dict.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils.layers import FullyConnectedLayer
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.filters import design_lowpass_filter
from torch_utils.ops.modulated_conv import modulated_conv2d
from torch_utils.recompute import recompute
from training.config import Precision
from training.generator.band_limit import interpolate, interpolation_nodes
from training.generator.layer_plan import LayerPlan
from training.generator.network_plan import NetworkPlan
from training.generator.reach import Padding, reached_paddings

Interpolation = tuple[Tensor, Tensor]
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of a run that asks for half precision


class SynthesisInput(nn.Module):
    """Fourier features, rotated and shifted by w: (N, w_dim) to (N, channels, height, width), float32.

    Frequencies are uniform on the disc of radius `bandwidth` (cycles per image width). `transform` is a
    user's 3x3 matrix on image coordinates, in image widths; write the inverse of the motion wanted.
    """

    def __init__(
        self, w_dim: int, channels: int, width: int, height: int, sampling_rate: int, bandwidth: float
    ) -> None:
        super().__init__()
        self.width = width
        self.height = height
        self.sampling_rate = sampling_rate
        self.bandwidth = bandwidth
        direction = torch.randn(channels, 2)
        radius = direction.norm(dim=1, keepdim=True)
        freqs = direction / (radius * radius.square().exp().pow(0.25)) * bandwidth
        self.weight = nn.Parameter(torch.randn(channels, channels))
        # Starts without rotation and shift.
        self.affine = FullyConnectedLayer(w_dim, 4, weight_init=0, bias_init=[1.0, 0.0, 0.0, 0.0])
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        # No buffers, which the official network does not have.
        self.row_nodes, self._row_interpolation = interpolation_nodes(height, sampling_rate, bandwidth)
        self.column_nodes, self._column_interpolation = interpolation_nodes(width, sampling_rate, bandwidth)

    def forward(self, w: Tensor) -> Tensor:
        """w: (N, w_dim), the first style vector of each image."""
        return self._at(w, self._centres(self.height), self._centres(self.width))

    def at_nodes(self, w: Tensor) -> Tensor:
        """The same, (N, channels, r, s), at those pixels alone from which `interpolation` gives the others."""
        rows, columns = self._centres(self.height), self._centres(self.width)
        return self._at(w, rows[self.row_nodes], columns[self.column_nodes])

    @property
    def interpolation(self) -> Interpolation:
        """Of rows and of columns, for `band_limit.interpolate`."""
        device = self.freqs.device
        return self._row_interpolation.to(device), self._column_interpolation.to(device)

    def is_determined_by_nodes(self) -> bool:
        """Whether `at_nodes` is enough: not if the user's matrix zooms out, which raises frequencies.

        False on a GPU as well. The answer would have to be waited for, and what it saves is not worth that there.
        """
        if self.freqs.device.type not in ("cpu", "meta") or len(self.row_nodes) == self.height:
            return False
        if self.freqs.is_meta:  # where work is counted
            return True
        freqs = self.freqs.numpy() @ self.transform[:2, :2].numpy()
        return bool(np.linalg.norm(freqs, axis=1).max() <= self.bandwidth * (1 + 1e-6))

    def _at(self, w: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """At all pairs of coordinates y (H,) and x (W,), in image widths from the middle."""
        motion = self._motion(w) @ self.transform  # (N, 2, 3)
        moved = self.freqs @ motion  # (N, C, 3): frequency in x, in y, phase
        freqs, phases = moved[:, :, :2], self.phases + moved[:, :, 2]
        # Frequencies that the feature map cannot hold (a zoom raises them) fade out.
        nyquist = self.sampling_rate / 2
        amplitudes = (1 - (freqs.norm(dim=2) - self.bandwidth) / (nyquist - self.bandwidth)).clamp(0, 1)
        # sin(a + b) with a per row and b per column: the sine of every pixel costs two products, not a sine.
        rows = y * freqs[:, :, 1:] + phases.unsqueeze(2)  # (N, C, H)
        columns = x * freqs[:, :, :1]  # (N, C, W)
        rows, columns = rows * (2 * math.pi), columns * (2 * math.pi)
        by_row = torch.stack([rows.sin(), rows.cos()], dim=3) * amplitudes[:, :, None, None]  # (N, C, H, 2)
        by_column = torch.stack([columns.cos(), columns.sin()], dim=2)  # (N, C, 2, W)
        features = by_row @ by_column  # (N, C, H, W)
        weight = self.weight * (1 / math.sqrt(self.weight.shape[1]))
        return (weight @ features.flatten(2)).unflatten(2, features.shape[2:])

    def _motion(self, w: Tensor) -> Tensor:
        """Rotation after translation, (N, 2, 3), the upper rows of the 3x3 matrix."""
        t = self.affine(w.float())
        cos, sin, shift_x, shift_y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        offset_x = sin * shift_y - cos * shift_x
        offset_y = -sin * shift_x - cos * shift_y
        return torch.stack([cos, -sin, offset_x, sin, cos, offset_y], dim=1).unflatten(1, (2, 3))

    def _centres(self, size: int) -> Tensor:
        """Pixel centres along one axis, in image widths from the middle; margins lie beyond +-0.5."""
        positions = torch.arange(size, device=self.freqs.device, dtype=torch.float32)
        return (positions + (1 - size) / 2) / self.sampling_rate


class SynthesisLayer(nn.Module):
    """Modulated convolution and filtered leaky ReLU, from feature maps `plan.source` to `plan.target`."""

    def __init__(self, plan: LayerPlan, w_dim: int) -> None:
        super().__init__()
        self.plan = plan
        self.precision: Precision = "paper"  # see SynthesisNetwork.set_precision_
        source, target, k = plan.source, plan.target, plan.conv_kernel
        self.affine = FullyConnectedLayer(w_dim, source.channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(target.channels, source.channels, k, k))
        self.bias = nn.Parameter(torch.zeros(target.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))
        fs = plan.oversampled_rate
        up_filter = design_lowpass_filter(plan.up_taps, source.cutoff, source.half_width * 2, fs)
        down_filter = design_lowpass_filter(
            plan.down_taps, target.cutoff, target.half_width * 2, fs, radial=plan.down_radial
        )
        self.register_buffer("up_filter", up_filter)  # None without a filter
        self.register_buffer("down_filter", down_filter)

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        force_fp32: bool = False,
        update_emas: bool = False,
        padding: Padding | None = None,
        interpolation: Interpolation | None = None,
    ) -> Tensor:
        """x: (N, C, H, W); w: (N, w_dim). The result is of the type that `dtype_on` names.

        padding: in place of the plan's, see `reach`. interpolation: x has values at nodes only, see `band_limit`.
        """
        plan = self.plan
        if update_emas:
            with torch.no_grad():
                magnitude = x.float().square().mean()
                self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, plan.magnitude_ema_beta))
        dtype = torch.float32 if force_fp32 else self.dtype_on(x.device)
        styles = self.affine(w)
        if plan.is_torgb:
            styles = styles * (1 / math.sqrt(self.weight[0].numel()))
        x = self.convolve(x, styles, dtype, interpolation)
        return filtered_lrelu(
            x,
            fu=self.up_filter,
            fd=self.down_filter,
            b=self.bias.to(dtype),
            up=plan.up_factor,
            down=plan.down_factor,
            padding=list(padding or plan.padding),
            gain=1.0 if plan.is_torgb else math.sqrt(2),
            slope=1.0 if plan.is_torgb else 0.2,
            clamp=plan.conv_clamp,
        )

    def convolve(
        self, x: Tensor, styles: Tensor, dtype: torch.dtype, interpolation: Interpolation | None
    ) -> Tensor:
        """The modulated convolution alone, of all pixels: x and interpolation as in `forward`, styles (N, C)."""
        plan = self.plan
        is_pointwise = plan.conv_kernel == 1 and dtype == torch.float32
        if interpolation is not None and not is_pointwise:
            x, interpolation = interpolate(x, *interpolation), None
        x = modulated_conv2d(
            x.to(dtype),
            self.weight,
            styles,
            demodulate=not plan.is_torgb,
            padding=plan.conv_kernel - 1,
            input_gain=self.magnitude_ema.rsqrt(),
        )
        # A 1x1 convolution treats all pixels alike: the nodes were enough.
        return x if interpolation is None else interpolate(x, *interpolation)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """In what the layer computes. "paper": float16 on CUDA if the plan says so, else float32.

        On the meta device as on CUDA: that is where its memory is counted.
        """
        if self.precision == "paper":
            return torch.float16 if self.plan.use_fp16 and device.type in ("cuda", "meta") else torch.float32
        return HALF_DTYPES.get(self.precision, torch.float32) if self.plan.allows_half else torch.float32


class SynthesisNetwork(nn.Module):
    """Style vectors (N, num_ws, w_dim) to images (N, img_channels, img_resolution, img_resolution), float32.

    The first vector drives the input, each further one its layer.
    """

    def __init__(self, plan: NetworkPlan, w_dim: int) -> None:
        super().__init__()
        self.plan = plan
        self.w_dim = w_dim
        self.num_ws = plan.num_ws
        self.img_resolution = plan.img_resolution
        self.img_channels = plan.img_channels
        first = plan.input
        self.input = SynthesisInput(
            w_dim,
            first.channels,
            first.size,
            first.size,
            sampling_rate=first.sampling_rate,
            bandwidth=first.cutoff,
        )
        self._reached_paddings = reached_paddings(plan.layers)
        self.recomputes = False  # the backward pass computes each layer again, from its input
        self.layer_names = [layer.name for layer in plan.layers]
        for layer in plan.layers:
            self.add_module(layer.name, SynthesisLayer(layer, w_dim))

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The layers in order, ToRGB last."""
        return [self.get_submodule(name) for name in self.layer_names]

    def set_precision_(self, precision: Precision) -> None:
        """In what the layers compute from now on: a way to run the network, of which files know nothing.

        "bf16" and "fp16": layers for which `LayerPlan.allows_half`, on any device; all other layers float32.
        """
        for layer in self.layers:
            layer.precision = precision

    def forward(self, ws: Tensor, force_fp32: bool = False, update_emas: bool = False) -> Tensor:
        """Images, nominally in [-1, 1]. `update_emas` first moves each layer's running input magnitude.

        `force_fp32` keeps all layers in float32 in this pass, whatever `set_precision_` says.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws of shape {tuple(ws.shape)} is not (N, {self.num_ws}, {self.w_dim})")
        first, *rest = ws.float().unbind(dim=1)
        # Running magnitudes are those of whole feature maps.
        paddings = [None] * len(rest) if update_emas else self._reached_paddings
        has_nodes = not update_emas and self.input.is_determined_by_nodes()
        x = self.input.at_nodes(first) if has_nodes else self.input(first)
        interpolation = self.input.interpolation if has_nodes else None
        for layer, w, padding in zip(self.layers, rest, paddings, strict=True):
            run = functools.partial(
                layer,
                force_fp32=force_fp32,
                update_emas=update_emas,
                padding=padding,
                interpolation=interpolation,
            )
            x = recompute(run, x, w) if self.recomputes and not update_emas else run(x, w)
            interpolation = None  # the first layer gives all pixels
        return (x * self.plan.output_scale).float()
