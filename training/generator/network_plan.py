# SPDX-License-Identifier: MIT
"""Plan of a whole generator: the stem's layers, and those that super-resolution stages put in their place.

Each stage of StyleGAN-XL (arXiv:2202.00273, section 3.2) drops the critically sampled last layers below it and adds a
head that goes on from the last layer it kept. Like `layer_plan`, arithmetic without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.config import ConfigError, GeneratorConfig, SuperresConfig, SynthesisConfig
from training.generator.layer_plan import LayerPlan, LayerSpec, connect_layers, plan_layers, space_layers

UP_FACTORS = (2, 4, 8, 16)
HEAD_CRITICAL_LAYERS = 2  # a head's cutoffs reach the image's so many layers before ToRGB


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """All layers of a synthesis network, in order, ToRGB last."""

    input: LayerSpec  # feature maps that the Fourier features give
    kept: tuple[LayerPlan, ...]  # layers from below the last stage; empty in a stem
    head: tuple[LayerPlan, ...]  # layers of the last stage, or all layers of a stem
    img_resolution: int  # side of the images, pixels
    img_channels: int
    output_scale: float  # factor on the output of ToRGB

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """All layers in order."""
        return self.kept + self.head

    @property
    def num_ws(self) -> int:
        """Style vectors per image: one for the input and one per layer."""
        return 1 + len(self.layers)


def plan_network(cfg: GeneratorConfig) -> NetworkPlan:
    """Plan of a stem, or of a chain of super-resolution stages on one.

    Names are the official ones: a head's indices start at the number of kept layers plus one, so the first
    stage skips an index. Raises ConfigError for values that give no network.
    """
    below = cfg.synthesis
    specs = plan_layers(below)
    kept: tuple[LayerPlan, ...] = ()
    head = connect_layers(below, specs)
    for stage in cfg.superres:
        kept = tuple(layer for layer in (*kept, *head) if not layer.is_critically_sampled)
        below = head_config(below, stage)
        head = plan_head(below, kept)
    return NetworkPlan(
        input=specs[0],
        kept=kept,
        head=tuple(head),
        img_resolution=below.img_resolution,
        img_channels=below.img_channels,
        output_scale=below.output_scale,
    )


def head_config(below: SynthesisConfig, stage: SuperresConfig) -> SynthesisConfig:
    """What a stage changes, written into the configuration of the network below it.

    Raises ConfigError for a stage that gives no network.
    """
    if stage.up_factor not in UP_FACTORS:
        known = ", ".join(map(str, UP_FACTORS))
        raise ConfigError(f"up_factor={stage.up_factor} of a super-resolution stage must be one of {known}")
    if stage.head_layers <= HEAD_CRITICAL_LAYERS:
        raise ConfigError(
            f"head_layers={stage.head_layers} of a super-resolution stage must be at least "
            f"{HEAD_CRITICAL_LAYERS + 1}; use 7, as StyleGAN-XL does"
        )
    if stage.conv_kernel < 1 or stage.conv_kernel % 2 == 0:
        raise ConfigError(f"conv_kernel={stage.conv_kernel} must be odd and positive; use 3 (-t) or 1 (-r)")
    return replace(
        below,
        img_resolution=below.img_resolution * stage.up_factor,
        num_layers=stage.head_layers,
        conv_kernel=stage.conv_kernel,
        use_radial_filters=stage.use_radial_filters,
        conv_clamp=stage.conv_clamp,
        magnitude_ema_beta=stage.magnitude_ema_beta,
    )


def plan_head(cfg: SynthesisConfig, kept: tuple[LayerPlan, ...]) -> list[LayerPlan]:
    """The head's layers: cutoffs rise from those of the last kept layer to the image's, channels fall as in a stem.

    cfg: from `head_config`. The first layer works at the kept layer's sampling rate, with its channels.
    """
    source = kept[-1].target
    specs = space_layers(
        cfg,
        first_cutoff=source.cutoff,
        first_stopband=source.half_width + source.cutoff,
        num_rising=cfg.num_layers - HEAD_CRITICAL_LAYERS,
    )
    specs[0] = replace(
        specs[0],
        sampling_rate=source.sampling_rate,
        size=source.sampling_rate + 2 * cfg.margin_size,
        channels=source.channels,
    )
    return connect_layers(cfg, specs, source=source, first_index=len(kept) + 1)
