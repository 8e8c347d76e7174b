# SPDX-License-Identifier: MIT
"""The flags of super-resolution stages: --superres, --path_stem, --up_factor, --head_layers, --train-stem-input.

A stage keeps the network in --path_stem and adds a head, so the generator's configuration is that file's with one stage
more. The head's kind of layer follows --cfg of this stage, as in StyleSAN-XL, and may differ from the stem's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch_utils.download import cached_path, is_url
from training.config import ConfigError, GeneratorConfig, SuperresConfig, TrainConfig
from training.dataset import ImageDataset
from training.network_io import BUILTIN_NETWORKS, read_network
from training.presets import PRESETS

STAGE_FLAGS = {
    "path_stem": "--path_stem",
    "up_factor": "--up_factor",
    "head_layers": "--head_layers",
    "train_stem_input": "--train-stem-input",
}
STEM_FLAGS = {"syn_layers": "--syn_layers", "cbase": "--cbase", "cmax": "--cmax", "map_depth": "--map-depth"}
DEFAULT_UP_FACTOR, DEFAULT_HEAD_LAYERS = 2, 7  # StyleGAN-XL's


def is_stage_run(flags: dict[str, Any]) -> bool:
    """True if the flags ask for a super-resolution stage: its head is trained, on a stem that stays."""
    preset = flags["preset"]
    return flags["superres"] or (preset is not None and bool(PRESETS[preset]().generator.superres))


def check_stage_flags(flags: dict[str, Any]) -> None:
    """Raise ConfigError for stage flags without a stage, a stage without a stem, or both kinds of run at once."""
    if not is_stage_run(flags):
        for name, flag in STAGE_FLAGS.items():
            if flags[name] is not None:
                raise ConfigError(
                    f"{flag} {flags[name]} belongs to a super-resolution stage; add --superres, or leave it out"
                )
        return
    what = "--superres" if flags["superres"] else f"--preset {flags['preset']}"
    if flags["stem"]:
        raise ConfigError(f"--stem and {what} contradict each other; leave one of them out")
    is_shown_only = flags["dry_run"] and not flags["superres"]
    if flags["path_stem"] is None and not is_shown_only:
        raise ConfigError(
            f"--path_stem missing; {what} trains on top of a network: give its file, such as "
            "RUN/best_model.safetensors"
        )


def add_stage_of_flags(config: TrainConfig, flags: dict[str, Any]) -> TrainConfig:
    """`config` with the stage that the flags ask for as its last, on a stem still assumed (see `put_on_stem`)."""
    generator = config.generator
    if generator.superres:
        *below, stage = generator.superres
    else:
        below, synthesis = [], generator.synthesis
        stage = SuperresConfig(
            up_factor=DEFAULT_UP_FACTOR,
            head_layers=DEFAULT_HEAD_LAYERS,
            conv_kernel=synthesis.conv_kernel,
            use_radial_filters=synthesis.use_radial_filters,
        )
    stage = replace(
        stage,
        up_factor=flags["up_factor"] or stage.up_factor,
        head_layers=flags["head_layers"] or stage.head_layers,
        conv_clamp=None if flags["fp32"] else stage.conv_clamp,
    )
    trains_stem_input = flags["train_stem_input"]
    return replace(
        config,
        generator=replace(generator, superres=(*below, stage)),
        loss_terms=replace(config.loss_terms, pl_weight=0.0),  # its mapping network is frozen
        path_stem=flags["path_stem"],
        trains_stem_input=config.trains_stem_input if trains_stem_input is None else trains_stem_input,
        embedding_source="stem",
    )


def put_on_stem(config: TrainConfig, flags: dict[str, Any], dataset: ImageDataset) -> TrainConfig:
    """The stage on the network that is in its --path_stem. Raises UserError when that, or the data, do not fit.

    In a dry run whose stem is not there, the assumed one stays (see `stage_notes`).
    """
    if assumes_stem(config, flags):
        return config
    stage = config.generator.superres[-1]
    stem = read_network(config.path_stem).generator_config
    if not isinstance(stem, GeneratorConfig):
        raise ConfigError(
            f"--path_stem {config.path_stem} is a DCGAN, and stages need StyleGAN3's layers; take another"
        )
    check_data(stem, stage, dataset, config)
    if flags["fp32"]:
        stem = replace(stem, synthesis=replace(stem.synthesis, num_fp16_res=0))
    mapping = stem.mapping
    return replace(
        config,
        generator=replace(stem, superres=(*stem.superres, stage)),
        # D's class tables may start from the stem's.
        discriminator=replace(
            config.discriminator,
            num_class_embeddings=max(config.discriminator.num_class_embeddings, mapping.num_embeddings),
            embedding_dim=mapping.embedding_dim,
        ),
    )


def check_data(
    stem: GeneratorConfig, stage: SuperresConfig, dataset: ImageDataset, config: TrainConfig
) -> None:
    """Raise ConfigError unless the data's resolution and classes are those of the stage's images."""
    path, data = config.path_stem, config.data.path
    below, resolution = stem.img_resolution, dataset.resolution
    if resolution != below * stage.up_factor:
        factor = resolution // below
        advice = (
            f"use --up_factor {factor}" if factor * below == resolution and factor > 1 else "resize the data"
        )
        raise ConfigError(
            f"{data} has {resolution}x{resolution} images, but --path_stem {path} makes {below}x{below} and "
            f"--up_factor {stage.up_factor} of it {below * stage.up_factor}x{below * stage.up_factor}; {advice}, or "
            f"take another stem"
        )
    if stem.mapping.c_dim != dataset.c_dim:
        stem_classes = f"{stem.mapping.c_dim} classes" if stem.mapping.c_dim else "no classes"
        data_classes = f"{dataset.c_dim} classes" if dataset.c_dim else "none"
        if stem.mapping.c_dim == 0:
            advice = "use --cond 0"
        elif dataset.c_dim == 0:
            advice = "add --cond 1 and a dataset.json with the labels"
        else:
            advice = "use the classes that it was trained with"
        raise ConfigError(
            f"--path_stem {path} was trained with {stem_classes}, but {data} as used here has {data_classes}; "
            f"{advice}, or take another stem"
        )


def assumes_stem(config: TrainConfig, flags: dict[str, Any]) -> bool:
    """True in a dry run whose stem is not on this machine: reading it is not worth a download."""
    path = config.path_stem
    if not flags["dry_run"]:
        return False
    if path is None:
        return True
    file = cached_path(path) if is_url(path) else Path(path)
    return path not in BUILTIN_NETWORKS and not file.exists()


def stage_notes(config: TrainConfig, flags: dict[str, Any]) -> list[str]:
    """One line for each thing about this stage that its user may not expect."""
    if not is_stage_run(flags):
        return []
    if assumes_stem(config, flags):
        return [_assumption(config)]
    given = [f"{flag} {flags[name]}" for name, flag in STEM_FLAGS.items() if flags[name] is not None]
    if flags["embedding"] is not None and config.loss == "san":
        given.append(f"--embedding {flags['embedding']}")
    if not given:
        return []
    synthesis, mapping = config.generator.synthesis, config.generator.mapping
    return [
        f"Note: no effect from {', '.join(given)}: a super-resolution stage takes these from its stem "
        f"({synthesis.num_layers} layers, channel_base {synthesis.channel_base}, channel_max {synthesis.channel_max}, "
        f"{mapping.num_layers} mapping layers)."
    ]


def _assumption(config: TrainConfig) -> str:
    generator = config.generator
    below = generator.img_resolution // generator.superres[-1].up_factor
    missing = "No --path_stem" if config.path_stem is None else f"--path_stem {config.path_stem} is not there"
    return (
        f"Note: {missing}; the configuration assumes a stem of {below}x{below} made with the same --cfg or --preset, "
        "--syn_layers, --cbase, --cmax and --map-depth."
    )


def stem_resolution(config: TrainConfig, resolution: int) -> int:
    """Side of the lowest stem's images under images of side `resolution`, for the assumed stages."""
    return resolution // math.prod(stage.up_factor for stage in config.generator.superres)
