# SPDX-License-Identifier: MIT
"""Sampling plan of the synthesis network: each layer's cutoffs, rates, sizes, filter lengths and padding.

The "flexible layer specifications" of StyleGAN3 (arXiv:2106.12423, section 3.2). Plain arithmetic in float64:
torch is not imported, so a plan can be printed and tested in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from training.config import ConfigError, SynthesisConfig

HALF_RATES = 4  # highest rates, in half precision if asked for where num_fp16_res is 0; as in StyleGAN3


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Feature maps at one point of the network. Frequencies in cycles per image width, size in pixels."""

    cutoff: float  # f_c
    stopband: float  # f_t
    sampling_rate: int  # s, samples per image width
    size: int  # side of the feature map, margins included
    channels: int

    @property
    def half_width(self) -> float:
        """Half of the low-pass filter's transition band, f_h."""
        return max(self.stopband, self.sampling_rate / 2) - self.cutoff


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: from which feature maps to which, and the resampling inside its filtered leaky ReLU."""

    name: str  # L{index}_{size}_{channels}, the module's name in the state dict
    source: LayerSpec  # what comes in
    target: LayerSpec  # what goes out
    is_torgb: bool  # the last layer: no demodulation, no nonlinearity, no filters
    is_critically_sampled: bool  # the cutoff is at the band limit: fine detail matters more than aliasing
    use_fp16: bool  # runs in half precision on CUDA
    allows_half: bool  # runs in it where a run asks for it; see HALF_RATES
    conv_kernel: int  # side of the convolution's kernel
    oversampled_rate: int  # sampling rate at which the nonlinearity is applied
    up_factor: int
    down_factor: int
    up_taps: int  # 1 = no filter
    down_taps: int  # 1 = no filter
    down_radial: bool  # the downsampling filter is radially symmetric, hence not separable
    # Oversampled pixels before and after in x, then in y; negative = crop.
    padding: tuple[int, int, int, int]
    conv_clamp: float | None  # bound on activations inside the filtered leaky ReLU; None = no bound
    magnitude_ema_beta: float  # decay of the running input magnitude, per update


def plan_layers(cfg: SynthesisConfig) -> list[LayerSpec]:
    """Feature maps after each of `cfg.num_layers + 1` layers, ToRGB last; the first are also the input's.

    Cutoffs and stopbands grow geometrically until the critically sampled layers. Raises ConfigError for
    values that give no network.
    """
    _check(cfg)
    return space_layers(
        cfg, cfg.first_cutoff, cfg.first_stopband, num_rising=cfg.num_layers - cfg.num_critical
    )


def space_layers(
    cfg: SynthesisConfig, first_cutoff: float, first_stopband: float, num_rising: int
) -> list[LayerSpec]:
    """`cfg.num_layers + 1` feature maps whose cutoffs and stopbands reach the image's after `num_rising` layers.

    Raises ConfigError for values that leave a layer without channels.
    """
    last_cutoff = cfg.img_resolution / 2
    last_stopband = last_cutoff * cfg.last_stopband_rel
    specs = []
    for index in range(cfg.num_layers + 1):
        progress = min(index / num_rising, 1)
        cutoff = first_cutoff * (last_cutoff / first_cutoff) ** progress
        stopband = first_stopband * (last_stopband / first_stopband) ** progress
        sampling_rate = 2 ** math.ceil(math.log2(min(2 * stopband, cfg.img_resolution)))
        has_margin = index < cfg.num_layers - 1  # the last two feature maps are the image's size
        channels = round(min(cfg.channel_base / 2 / cutoff, cfg.channel_max))
        spec = LayerSpec(
            cutoff=cutoff,
            stopband=stopband,
            sampling_rate=sampling_rate,
            size=sampling_rate + 2 * cfg.margin_size if has_margin else cfg.img_resolution,
            channels=channels if index < cfg.num_layers else cfg.img_channels,
        )
        if spec.channels < 1:
            raise ConfigError(
                f"channel_base={cfg.channel_base}, channel_max={cfg.channel_max} leave layer {index} without "
                f"channels; use at least {cfg.img_resolution} and 1"
            )
        specs.append(spec)
    return specs


def connect_layers(
    cfg: SynthesisConfig, specs: Sequence[LayerSpec], source: LayerSpec | None = None, first_index: int = 0
) -> list[LayerPlan]:
    """One plan per entry of `specs`: layer i leads from entry i - 1 to entry i, layer 0 from `source`.

    Without a `source`, layer 0 leads from entry 0 to itself. `first_index` is the number in layer 0's name.
    """
    last = len(specs) - 1
    return [
        _connect(
            cfg,
            before,
            after,
            name=f"L{first_index + index}_{after.size}_{after.channels}",
            is_torgb=index == last,
            is_critical=index >= last - cfg.num_critical,
        )
        for index, (before, after) in enumerate(pairwise([source or specs[0], *specs]))
    ]


def _connect(
    cfg: SynthesisConfig, source: LayerSpec, target: LayerSpec, name: str, is_torgb: bool, is_critical: bool
) -> LayerPlan:
    conv_kernel = 1 if is_torgb else cfg.conv_kernel
    oversampling = 1 if is_torgb else cfg.lrelu_upsampling
    oversampled_rate = max(source.sampling_rate, target.sampling_rate) * oversampling
    up = round(oversampled_rate / source.sampling_rate)
    down = round(oversampled_rate / target.sampling_rate)
    up_taps = cfg.filter_size * up if up > 1 and not is_torgb else 1
    down_taps = cfg.filter_size * down if down > 1 and not is_torgb else 1
    # What both filters consume, less what the convolution (padded by kernel - 1) and upsampling produce.
    total = (target.size - 1) * down + 1 - (source.size + conv_kernel - 1) * up + up_taps + down_taps - 2
    low = (total + up) // 2  # centres the samples; floors for negative totals too
    high = total - low
    return LayerPlan(
        name=name,
        source=source,
        target=target,
        is_torgb=is_torgb,
        is_critically_sampled=is_critical,
        use_fp16=target.sampling_rate * 2**cfg.num_fp16_res > cfg.img_resolution,
        allows_half=target.sampling_rate * 2 ** (cfg.num_fp16_res or HALF_RATES) > cfg.img_resolution,
        conv_kernel=conv_kernel,
        oversampled_rate=oversampled_rate,
        up_factor=up,
        down_factor=down,
        up_taps=up_taps,
        down_taps=down_taps,
        down_radial=cfg.use_radial_filters and not is_critical,
        padding=(low, high, low, high),
        conv_clamp=cfg.conv_clamp,
        magnitude_ema_beta=cfg.magnitude_ema_beta,
    )


def _check(cfg: SynthesisConfig) -> None:
    resolution = cfg.img_resolution
    if resolution < 4 or resolution & (resolution - 1):
        raise ConfigError(
            f"img_resolution={resolution} is not a power of two of at least 4; resize the images"
        )
    if not 0 <= cfg.num_critical < cfg.num_layers:
        raise ConfigError(
            f"num_layers={cfg.num_layers} must exceed num_critical={cfg.num_critical}, and that must be at "
            "least 0; use more layers"
        )
    if cfg.conv_kernel < 1 or cfg.conv_kernel % 2 == 0:
        raise ConfigError(f"conv_kernel={cfg.conv_kernel} must be odd and positive; use 3 (-t) or 1 (-r)")
    if not 0 < cfg.first_cutoff < resolution / 2:
        raise ConfigError(
            f"first_cutoff={cfg.first_cutoff} must lie between 0 and img_resolution / 2 = {resolution / 2}; "
            "change either"
        )
    if cfg.first_stopband <= cfg.first_cutoff or cfg.last_stopband_rel <= 1:
        raise ConfigError(
            f"first_stopband={cfg.first_stopband} must exceed first_cutoff={cfg.first_cutoff}, and "
            f"last_stopband_rel={cfg.last_stopband_rel} must exceed 1; raise them"
        )
    if cfg.margin_size < 0:
        raise ConfigError(
            f"margin_size={cfg.margin_size} must not be negative; use 0 or more (10 in StyleGAN3)"
        )
