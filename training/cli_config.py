# SPDX-License-Identifier: MIT
"""Flags of train.py -> TrainConfig and data set. The flags themselves are in cli_options.py.

Flags that had no effect in StyleGAN-XL either work here or are refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch_utils.process_environment import read_environment
from training.cli_dcgan import adapt_dcgan, check_objective_flags, check_san_form
from training.cli_superres import (
    add_stage_of_flags,
    check_stage_flags,
    is_stage_run,
    put_on_stem,
    stem_resolution,
)
from training.config import ConfigError, TrainConfig
from training.data_cache import local_path
from training.dataset import ImageDataset, open_dataset
from training.dcgan_config import DCGANGeneratorConfig
from training.finetune.settings import adapt_embedding, adopt_networks, open_data, recipe_of
from training.generator.network_plan import plan_network
from training.metric_schedule import check_best_key, parse_schedule
from training.network_io import NetworkFile, read_network
from training.presets import PRESETS, dcgan, stylegan_xl

NOT_YET = "is not in this version"


def check_refused(flags: dict[str, Any]) -> None:
    """Raise ConfigError for flags that cannot do here what their user means."""
    if flags["cfg"] in ("stylegan2", "fastgan"):
        raise ConfigError(
            f"--cfg {flags['cfg']}: only the StyleGAN3 layers are here; use stylegan3-t or stylegan3-r"
        )
    if flags["classes_from"] is not None and flags["resume"] is None:
        raise ConfigError(f"--classes-from {flags['classes_from']} belongs to --resume; add --resume FILE")
    if flags["preset"] is None and (flags["resume"] is None or flags["cfg"] is not None):
        needed = ("data",) if flags["cfg"] == "dcgan" else ("cfg", "data", "batch")
        missing = [f"--{name}" for name in needed if flags[name] is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} missing; give a value, or start from --preset quickstart"
            )
    elif flags["preset"] is None:
        pass  # the file of --resume may say the rest
    elif flags["data"] is None and not PRESETS[flags["preset"]]().data.path:
        raise ConfigError(f"--data missing; --preset {flags['preset']} needs the zip or folder of its images")
    elif flags["cfg"] is not None:
        raise ConfigError(
            f"--cfg {flags['cfg']} and --preset {flags['preset']} both choose the layers; give one of them"
        )
    if flags["fp32"] is not None and flags["precision"] not in (None, "fp32" if flags["fp32"] else "paper"):
        raise ConfigError(
            f"--fp32 {int(flags['fp32'])} and --precision {flags['precision']} contradict each other; leave one out"
        )
    check_stage_flags(flags)
    check_objective_flags(flags)


def num_processes(flags: dict[str, Any]) -> int:
    """How many processes, one per GPU: those that torchrun has started, or else as many as the flags ask for."""
    environment = read_environment()
    return (flags["gpus"] or 1) if environment is None else environment.world_size


def build_config(flags: dict[str, Any]) -> tuple[TrainConfig, ImageDataset]:
    """The complete configuration for the given flags, and the opened data set. Raises UserError."""
    stored = None if flags["resume"] is None else read_start(flags["resume"])
    config = starting_config(flags, stored)
    config = replace(
        config,
        data=override(
            config.data,
            path=flags["data"],
            use_labels=flags["cond"],
            mirror=flags["mirror"],
            num_workers=flags["workers"],
            seed=flags["seed"],
        ),
    )
    if is_stage_run(flags):
        config = add_stage_of_flags(config, flags)
    data = config.data
    if stored is None:
        dataset = open_dataset(
            local_path(data.path, flags), data.use_labels, data.mirror, data.max_size, data.seed
        )
    else:
        config = adopt_networks(config, stored, flags)
        config, dataset = open_data(config, stored, flags)
    if config.is_dcgan:
        config = adapt_dcgan(config, dataset, flags)
    else:
        config = override_networks(adapt_to_data(config, dataset), flags)
        config = override(config, objective=flags["objective"])
    config = override_schedule(config, flags)
    if is_stage_run(flags):
        config = put_on_stem(config, flags, dataset)
    if stored is not None:
        config = adapt_embedding(config, stored, flags)
    if not config.is_dcgan:
        plan_network(config.generator)  # refuses what gives no network
    check_san_form(config)
    if config.loss_terms.cls_weight and dataset.c_dim != 1000:
        raise ConfigError(f"--cls_weight needs the 1,000 ImageNet classes; {data.path} has {dataset.c_dim}")
    schedule = parse_schedule(config.metrics)
    if config.best_by is not None:
        check_best_key(config.best_by, schedule)
    config.validate(world_size=num_processes(flags))
    return config, dataset


def read_start(path: str) -> NetworkFile:
    """The network to start from. Raises UserError when it cannot be used."""
    stored = read_network(path)
    if isinstance(stored.generator_config, DCGANGeneratorConfig):
        raise ConfigError(f"--resume {path} is a DCGAN: starting from one {NOT_YET}; train it anew")
    return stored


def starting_config(flags: dict[str, Any], stored: NetworkFile | None) -> TrainConfig:
    """What the other flags override: the preset, the paper's defaults, or what goes with the file of --resume."""
    if flags["preset"]:
        return PRESETS[flags["preset"]]()
    if flags["cfg"] == "dcgan":
        return dcgan(flags["objective"] or "nonsaturating", data=flags["data"])
    if flags["cfg"] or stored is None:
        return stylegan_xl(flags["cfg"], data=flags["data"])
    recipe = recipe_of(stored, flags)  # how a run was carried out, maybe on another machine, is no part of it
    return replace(recipe, precision="paper", feature_precision="paper", checkpoint_activations=False)


def override(config: Any, **values: Any) -> Any:
    """`config` with those fields replaced whose value is not None."""
    return replace(config, **{name: value for name, value in values.items() if value is not None})


def adapt_to_data(config: TrainConfig, dataset: ImageDataset) -> TrainConfig:
    """Set resolution and number of classes of both networks to the data set's."""
    generator, discriminator, c_dim = config.generator, config.discriminator, dataset.c_dim
    mapping = generator.mapping
    mapping = replace(mapping, c_dim=c_dim, num_embeddings=max(mapping.num_embeddings, c_dim))
    feature_resolution = discriminator.feature_resolution
    if feature_resolution is not None and dataset.resolution >= feature_resolution:
        feature_resolution = None  # the paper resizes only what is smaller
    return replace(
        config,
        generator=replace(
            generator,
            mapping=mapping,
            synthesis=replace(
                generator.synthesis, img_resolution=stem_resolution(config, dataset.resolution)
            ),
        ),
        discriminator=replace(
            discriminator,
            img_resolution=dataset.resolution,
            c_dim=c_dim,
            num_class_embeddings=max(discriminator.num_class_embeddings, c_dim),
            feature_resolution=feature_resolution,
        ),
        embedding_source=config.embedding_source if c_dim else "random",
    )


def override_networks(config: TrainConfig, flags: dict[str, Any]) -> TrainConfig:
    """Apply the flags that change the networks, their optimizers and the loss."""
    channel_factor = (
        4 if config.generator.synthesis.use_radial_filters else 2
    )  # StyleGAN-XL doubles, -r again
    synthesis = override(
        config.generator.synthesis,
        channel_base=flags["cbase"] and flags["cbase"] * channel_factor,
        channel_max=flags["cmax"] and flags["cmax"] * channel_factor,
        num_layers=flags["syn_layers"],
    )
    if flags["fp32"]:
        synthesis = replace(synthesis, num_fp16_res=0, conv_clamp=None)
    mapping = override(config.generator.mapping, num_layers=flags["map_depth"])
    return replace(
        config,
        generator=replace(config.generator, synthesis=synthesis, mapping=mapping),
        discriminator=override(
            config.discriminator,
            backbones=flags["backbones"],
            official_batchnorm_statistics=flags["official_bn"],
        ),
        generator_optimizer=override(config.generator_optimizer, lr=flags["glr"]),
        discriminator_optimizer=override(config.discriminator_optimizer, lr=flags["dlr"]),
        loss_terms=override(
            config.loss_terms, cls_weight=flags["cls_weight"], blur_fade_kimg=flags["blur_kimg"]
        ),
    )


def override_schedule(config: TrainConfig, flags: dict[str, Any]) -> TrainConfig:
    """Apply the flags that say what is optimised, for how long, and what is reported."""
    if flags["batch"] is not None:
        config = rescale_to_batch(config, flags["batch"])
    if (
        flags["resume"] is not None
    ):  # a network that is trained already needs no ramp-up of its moving average
        config = replace(config, resume=flags["resume"], ema_rampup=None)
    return override(
        config,
        sync_batchnorm=flags["sync_bn"],
        checkpoint_activations=flags["checkpoint_activations"],
        precision="fp32" if flags["fp32"] else flags["precision"],
        feature_precision=flags["feature_precision"],
        loss=flags["loss"],
        microbatch_size=pick_microbatch(config, flags),
        total_kimg=flags["kimg"],
        tick_kimg=flags["tick"],
        snapshot_ticks=flags["snap"],
        seed=flags["seed"],
        metrics=flags["metrics"],
        best_by=flags["best_by"],
        embedding_source=flags["embedding"],
        frozen_head_blocks=flags["freezed"],
        benchmark=None if flags["nobench"] is None else not flags["nobench"],
    )


def pick_microbatch(config: TrainConfig, flags: dict[str, Any]) -> int:
    """Images per forward pass: --batch-gpu; else with --batch the process's whole share; else what the recipe says, or
    the largest part of the share below that.
    """
    processes = num_processes(flags)
    if config.batch_size % processes:
        raise ConfigError(
            f"--batch {config.batch_size} is not a multiple of --gpus {processes}, all machines together; change either"
        )
    share = config.batch_size // processes
    if isinstance(flags["batch_gpu"], int):
        return flags["batch_gpu"]
    is_auto_of_recipe = flags["batch_gpu"] == "auto" and flags["preset"] is not None
    if flags["batch"] is not None and not is_auto_of_recipe:
        return share
    return max(size for size in range(1, share + 1) if share % size == 0 and size <= config.microbatch_size)


def rescale_to_batch(config: TrainConfig, batch_size: int) -> TrainConfig:
    """Set the batch size and what StyleGAN-XL derives from it."""
    config = replace(
        config,
        batch_size=batch_size,
        ema_halflife_kimg=config.ema_halflife_kimg * batch_size / config.batch_size,
    )
    if config.is_dcgan:
        return config
    synthesis = replace(config.generator.synthesis, magnitude_ema_beta=0.5 ** (batch_size / 20000))
    return replace(config, generator=replace(config.generator, synthesis=synthesis))
