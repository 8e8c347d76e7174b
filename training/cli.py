# SPDX-License-Identifier: MIT
"""What train.py does with its flags: flags -> TrainConfig -> a run. The flags themselves are in cli_options.py.

Flags that had no effect in StyleGAN-XL either work here or are refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from training.config import ConfigError, TrainConfig, to_json
from training.dataset import ImageDataset, open_dataset
from training.presets import PRESETS, stylegan_xl
from training.sampling import pick_device

NOT_YET = "is not in this version"
REFUSED_FLAGS = {
    "freezed": f"--freezed had no effect in StyleGAN-XL, and freezing layers of D {NOT_YET}; leave it out",
    "superres": f"--superres {NOT_YET}: it trains stems only; leave it out to train a stem",
    "path_stem": f"--path_stem {NOT_YET}: it belongs to super-resolution stages; leave it out to train a stem",
    "head_layers": f"--head_layers {NOT_YET}: it belongs to super-resolution stages; leave it out",
    "up_factor": f"--up_factor {NOT_YET}: it belongs to super-resolution stages; leave it out",
    "restart_every": f"--restart_every {NOT_YET}: it needs an exact resume; leave it out",
}


def run_training(flags: dict[str, Any]) -> None:
    """Do what the flags ask. Raises UserError for whatever the user can fix, before anything is written."""
    check_refused(flags)
    device = pick_device(flags["device"])
    config, dataset = build_config(flags)
    click.echo(to_json(config))
    if flags["dry_run"]:
        click.echo("Dry run: nothing was trained or written.")
        return
    from training.training_loop import (
        Trainer,
    )  # imports timm and friends: seconds that --dry-run need not wait

    trainer = Trainer(config, dataset, device, flags["outdir"], describe_run(flags, config, dataset))
    click.echo(summarize_run(trainer.fit()))


def check_refused(flags: dict[str, Any]) -> None:
    """Raise ConfigError for flags that cannot do here what their user means."""
    for name, reason in REFUSED_FLAGS.items():
        if flags[name]:
            raise ConfigError(reason)
    if (flags["gpus"] or 1) > 1:
        raise ConfigError(f"--gpus {flags['gpus']}: training on several GPUs {NOT_YET}; use --gpus 1")
    if flags["cfg"] in ("stylegan2", "fastgan"):
        raise ConfigError(
            f"--cfg {flags['cfg']}: only the StyleGAN3 layers are here; use stylegan3-t or stylegan3-r"
        )
    if flags["preset"] is None:
        missing = [f"--{name}" for name in ("cfg", "data", "batch") if flags[name] is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} missing; give a value, or start from --preset quickstart"
            )
    elif flags["data"] is None and not PRESETS[flags["preset"]]().data.path:
        raise ConfigError(f"--data missing; --preset {flags['preset']} needs the zip or folder of its images")
    elif flags["cfg"] is not None:
        raise ConfigError(
            f"--cfg {flags['cfg']} and --preset {flags['preset']} both choose the layers; give one of them"
        )


def build_config(flags: dict[str, Any]) -> tuple[TrainConfig, ImageDataset]:
    """The complete configuration for the given flags, and the opened data set. Raises UserError."""
    config = PRESETS[flags["preset"]]() if flags["preset"] else stylegan_xl(flags["cfg"], data=flags["data"])
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
    data = config.data
    dataset = open_dataset(data.path, data.use_labels, data.mirror, data.max_size, data.seed)
    config = override_networks(adapt_to_data(config, dataset), flags)
    config = override_schedule(config, flags)
    if config.loss_terms.cls_weight and dataset.c_dim != 1000:
        raise ConfigError(f"--cls_weight needs the 1,000 ImageNet classes; {data.path} has {dataset.c_dim}")
    if config.metrics:
        from metrics.evaluate import check_metric  # training without metrics must not need the package

        for name in config.metrics:
            check_metric(name)
    config.validate()
    return config, dataset


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
            synthesis=replace(generator.synthesis, img_resolution=dataset.resolution),
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
        loss_terms=override(config.loss_terms, cls_weight=flags["cls_weight"]),
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
        loss=flags["loss"],
        microbatch_size=flags["batch_gpu"] or flags["batch"],
        total_kimg=flags["kimg"],
        tick_kimg=flags["tick"],
        snapshot_ticks=flags["snap"],
        seed=flags["seed"],
        metrics=flags["metrics"],
        embedding_source=flags["embedding"],
        benchmark=None if flags["nobench"] is None else not flags["nobench"],
    )


def rescale_to_batch(config: TrainConfig, batch_size: int) -> TrainConfig:
    """Set the batch size and what StyleGAN-XL derives from it."""
    synthesis = replace(config.generator.synthesis, magnitude_ema_beta=0.5 ** (batch_size / 20000))
    return replace(
        config,
        batch_size=batch_size,
        ema_halflife_kimg=config.ema_halflife_kimg * batch_size / config.batch_size,
        generator=replace(config.generator, synthesis=synthesis),
    )


def describe_run(flags: dict[str, Any], config: TrainConfig, dataset: ImageDataset) -> str:
    """Name of the run folder after its number: configuration, data, processes, batch."""
    parts = [config.loss, flags["preset"] or flags["cfg"], dataset.name, "gpus1", f"batch{config.batch_size}"]
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
