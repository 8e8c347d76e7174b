# SPDX-License-Identifier: MIT
"""What train.py does with its flags: flags -> TrainConfig -> a run. The flags themselves are in cli_options.py.

Flags that had no effect in StyleGAN-XL either work here or are refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from training.cli_dcgan import adapt_dcgan, check_objective_flags, check_san_form
from training.cli_superres import (
    add_stage_of_flags,
    check_stage_flags,
    is_stage_run,
    put_on_stem,
    stage_notes,
    stem_resolution,
)
from training.config import ConfigError, TrainConfig, to_json
from training.dataset import ImageDataset, open_dataset
from training.dcgan_config import DCGANGeneratorConfig
from training.finetune.settings import adapt_embedding, adopt_networks, open_data, recipe_of
from training.generator.network_plan import plan_network
from training.network_io import NetworkFile, read_network
from training.presets import PRESETS, dcgan, stylegan_xl
from training.run_options import RunOptions
from training.sampling import pick_device

NOT_YET = "is not in this version"


def run_training(flags: dict[str, Any]) -> None:
    """Do what the flags ask. Raises UserError for whatever the user can fix, before anything is written."""
    check_refused(flags)
    device = pick_device(flags["device"])
    config, dataset = build_config(flags)
    click.echo(to_json(config))
    for note in stage_notes(config, flags):
        click.echo(note)
    if flags["dry_run"]:
        if config.resume is not None:
            from training.initialization import preview_start

            click.echo(preview_start(config, dataset))
        click.echo("Dry run: nothing was trained or written.")
        return
    from training.training_loop import (
        Trainer,
    )  # imports timm and friends: seconds that --dry-run need not wait

    trainer = Trainer(config, dataset, device, flags["outdir"], describe_run(flags, config, dataset))
    click.echo(summarize_run(trainer.fit()))


def read_options(flags: dict[str, Any]) -> RunOptions:
    """How the run is carried out."""
    return override(
        RunOptions(outdir=flags["outdir"]),
        checkpoint_ticks=flags["checkpoint"],
        keep_last=flags["keep_last"],
        keep_every_kimg=flags["keep_every"],
        time_limit_s=flags["time_limit"],
        on_nonfinite=flags["on_nonfinite"],
        nonfinite_limit=flags["nonfinite_limit"],
        cache_data=flags["cache_data"] and Path(flags["cache_data"]),
        wandb_project=flags["wandb"],
    )


def check_refused(flags: dict[str, Any]) -> None:
    """Raise ConfigError for flags that cannot do here what their user means."""
    if num_processes(flags) > 1 and not flags["dry_run"]:
        raise ConfigError(f"--gpus {flags['gpus']}: training on several GPUs {NOT_YET}; use --gpus 1")
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
    check_stage_flags(flags)
    check_objective_flags(flags)


def num_processes(flags: dict[str, Any]) -> int:
    """How many processes, one per GPU, the flags ask for."""
    return flags["gpus"] or 1


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
        dataset = open_dataset(data.path, data.use_labels, data.mirror, data.max_size, data.seed)
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
    if config.metrics:
        from metrics.evaluate import check_metric  # training without metrics must not need the package

        for name in config.metrics:
            check_metric(name)
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
    return recipe_of(stored, flags)


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
        loss=flags["loss"],
        microbatch_size=flags["batch_gpu"] or whole_batch(flags),
        total_kimg=flags["kimg"],
        tick_kimg=flags["tick"],
        snapshot_ticks=flags["snap"],
        seed=flags["seed"],
        metrics=flags["metrics"],
        embedding_source=flags["embedding"],
        frozen_head_blocks=flags["freezed"],
        benchmark=None if flags["nobench"] is None else not flags["nobench"],
    )


def whole_batch(flags: dict[str, Any]) -> int | None:
    """Images per process and step, when --batch says so: the micro-batch unless --batch-gpu is given."""
    batch_size, processes = flags["batch"], num_processes(flags)
    if batch_size is None:
        return None
    if batch_size % processes:
        raise ConfigError(f"--batch {batch_size} is not a multiple of --gpus {processes}; change either")
    return batch_size // processes


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


def describe_run(flags: dict[str, Any], config: TrainConfig, dataset: ImageDataset) -> str:
    """Name of the run folder after its number: configuration, data, processes, batch."""
    parts = [config.loss, flags["preset"] or flags["cfg"] or "finetune"]
    if config.is_dcgan or flags["objective"]:
        parts.append(flags["objective"] or config.objective)
    parts += [dataset.name, f"gpus{num_processes(flags)}", f"batch{config.batch_size}"]
    return "-".join(parts + ([flags["desc"]] if flags["desc"] else []))


def summarize_run(run_dir: Path) -> str:
    """Where the results are, one line per kind of file that exists."""
    fakes = sorted(run_dir.glob("fakes[0-9]*.png"))
    entries = [
        ("images", f"{run_dir}/fakes_init.png ... {fakes[-1].name if fakes else ''} (real ones: reals.png)"),
        ("best network", f"{run_dir}/best_model.safetensors"),
        ("metrics", ", ".join(str(path) for path in sorted(run_dir.glob("metric-*.jsonl"))) or "none"),
        (
            "statistics",
            f"{run_dir}/stats.jsonl, log.txt, training_options.json; tensorboard --logdir {run_dir}",
        ),
        ("more images", f"python gen_images.py --network {run_dir}/best_model.safetensors --outdir out"),
    ]
    return "\nDone. Results:\n" + "\n".join(f"  {kind:<13} {where}" for kind, where in entries)
