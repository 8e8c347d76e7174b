# SPDX-License-Identifier: MIT
"""The configuration of a run that starts from a checkpoint: networks as in the file, the rest from flags and recipe.

Flags that describe layers are not needed; those that contradict the file are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from training.cli_superres import is_stage_run
from training.config import ConfigError, GeneratorConfig, TrainConfig
from training.data_cache import local_path
from training.dataset import ImageDataset, open_dataset
from training.dataset_labels import NoLabelsError
from training.network_file import NetworkFile
from training.presets import stylegan_xl

STAGE_FACTORS = (2, 4, 8, 16)  # of super-resolution stages


def recipe_of(stored: NetworkFile, flags: dict[str, Any]) -> TrainConfig:
    """What a run without --preset and --cfg starts from: the settings of the run that wrote the file, or StyleGAN-XL's

    Raises ConfigError for flags that are missing then.
    """
    path = flags["resume"]
    try:
        own = stored.train_config
    except ConfigError as error:
        raise ConfigError(
            f"--resume {path}: its settings cannot be used ({error}); add --cfg and --batch"
        ) from error
    needed = ("data", "batch") if own is None else ()
    if missing := [f"--{name}" for name in needed if flags[name] is None]:
        raise ConfigError(f"{', '.join(missing)} missing; {path} does not say: give a value")
    if own is not None:
        return replace(own, resume=None, path_stem=None, trains_stem_input=False, frozen_head_blocks=0)
    return stylegan_xl(_kind_of(stored.generator_config), data=flags["data"])


def adopt_networks(config: TrainConfig, stored: NetworkFile, flags: dict[str, Any]) -> TrainConfig:
    """`config` with the generator of the file, and with its discriminator if there is one.

    A super-resolution stage keeps the generator that its flags describe, and trains its head; otherwise all of the
    file's generator is trained, whatever stages it has. Raises ConfigError for flags that contradict the file.
    """
    is_stage = is_stage_run(flags)
    if not is_stage:
        check_layer_flags(stored, flags)
        config = replace(config, generator=stored.generator_config)
    if stored.discriminator_config is not None:
        _check_statistics_flag(stored, flags)
        policy = config.discriminator.augment_policy
        config = replace(config, discriminator=replace(stored.discriminator_config, augment_policy=policy))
    if not is_stage and flags["fp32"]:
        stages = tuple(replace(stage, conv_clamp=None) for stage in config.generator.superres)
        config = replace(config, generator=replace(config.generator, superres=stages))
    classes_from = "same" if is_stage else flags["classes_from"] or "auto"
    if is_stage and flags["classes_from"] not in (None, "same"):
        raise ConfigError(
            f"--classes-from {flags['classes_from']}: a super-resolution stage keeps the classes of its stem; "
            "leave --classes-from out"
        )
    return replace(config, classes_from=classes_from)


def open_data(
    config: TrainConfig, stored: NetworkFile, flags: dict[str, Any]
) -> tuple[TrainConfig, ImageDataset]:
    """`config` with the use of labels settled, and its data set.

    Unless the flags say, labels are used if the checkpoint has classes and the data labels. Raises ConfigError when
    the images are not as large as the checkpoint's.
    """
    data = config.data
    is_told = flags["cond"] is not None or flags["preset"] is not None or is_stage_run(flags)
    use_labels = data.use_labels if is_told else stored.generator_config.mapping.c_dim > 0
    path = local_path(data.path, flags)
    try:
        dataset = open_dataset(path, use_labels, data.mirror, data.max_size, data.seed)
    except NoLabelsError:
        if is_told:
            raise
        dataset = open_dataset(path, False, data.mirror, data.max_size, data.seed)
    if not is_stage_run(flags):
        check_resolution(stored, dataset.resolution, config, flags)
    return replace(config, data=replace(data, use_labels=dataset.c_dim > 0)), dataset


def adapt_embedding(config: TrainConfig, stored: NetworkFile, flags: dict[str, Any]) -> TrainConfig:
    """Class embedding rows come from the file if it has classes. ConfigError if a flag wants others."""
    stored_c_dim, c_dim = stored.generator_config.mapping.c_dim, config.generator.mapping.c_dim
    if is_stage_run(flags) or c_dim == 0:
        return config
    if stored_c_dim > 0:
        if flags["embedding"] is not None:
            raise ConfigError(
                f"--embedding {flags['embedding']}: the class embeddings come from --resume {flags['resume']}; "
                "leave --embedding out, and see --classes-from"
            )
        return replace(config, embedding_source="checkpoint")
    if flags["embedding"] is None and flags["preset"] is None:
        return replace(config, embedding_source="data")  # the file's own run had no use for rows
    return config


def check_layer_flags(stored: NetworkFile, flags: dict[str, Any]) -> None:
    """Raise ConfigError for the first flag about layers that contradicts the generator in the file."""
    cfg = stored.generator_config
    kind, factor = (
        _kind_of(cfg),
        4 if cfg.synthesis.use_radial_filters else 2,
    )  # see override_networks in cli.py
    facts = {
        "cfg": ("--cfg", kind),
        "syn_layers": ("--syn_layers", cfg.synthesis.num_layers),
        "cbase": ("--cbase", cfg.synthesis.channel_base / factor),
        "cmax": ("--cmax", cfg.synthesis.channel_max / factor),
        "map_depth": ("--map-depth", cfg.mapping.num_layers),
    }
    for name, (flag, value) in facts.items():
        if flags[name] is not None and flags[name] != value:
            shown = value if isinstance(value, str) else f"{value:g}"
            raise ConfigError(
                f"{flag} {flags[name]} contradicts --resume {flags['resume']}, which was built with {flag} {shown}; "
                f"leave {flag} out"
            )


def check_resolution(
    stored: NetworkFile, resolution: int, config: TrainConfig, flags: dict[str, Any]
) -> None:
    """Raise ConfigError, with the command that helps, unless the data's images are of the checkpoint's size."""
    old, path, data = stored.generator_config.img_resolution, flags["resume"], config.data.path
    if resolution == old:
        return
    resize = f"python dataset_tool.py --source {data} --dest OUT.zip --resolution {old}x{old}"
    advice = f"resize the data: {resize}"
    if resolution // old in STAGE_FACTORS and resolution % old == 0:
        stage = (
            f"python train.py --superres --path_stem {path} --up_factor {resolution // old} "
            f"--cfg {_kind_of(stored.generator_config)} --data {data} --batch {flags['batch'] or 32}"
        )
        advice = f"train a super-resolution stage on it: {stage}; or {advice}"
    raise ConfigError(
        f"--resume {path} makes {old}x{old} images, and {data} has {resolution}x{resolution}; {advice}"
    )


def _check_statistics_flag(stored: NetworkFile, flags: dict[str, Any]) -> None:
    shifted = stored.discriminator_config.official_batchnorm_statistics
    if flags["official_bn"] is not None and flags["official_bn"] != shifted:
        raise ConfigError(
            f"--official-bn {int(flags['official_bn'])} contradicts --resume {flags['resume']}, whose discriminator "
            f"was trained with {int(shifted)}; leave --official-bn out"
        )


def _kind_of(cfg: GeneratorConfig) -> str:
    """The --cfg word of the last stage, which is what --cfg means for stages."""
    last = cfg.superres[-1] if cfg.superres else cfg.synthesis
    return "stylegan3-r" if last.use_radial_filters else "stylegan3-t"
