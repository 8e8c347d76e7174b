# SPDX-License-Identifier: MIT
"""What a run takes from a checkpoint: every group of tensors loaded, converted, re-initialised or skipped, and why.

`plan_transfer` decides without touching a network. The generators must be built alike, but for their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from torch_utils.errors import UserError
from training.config import GeneratorConfig, TrainConfig
from training.finetune.class_sources import ClassSources
from training.finetune.discriminator_plan import plan_discriminator
from training.finetune.mapping_conversion import convert_mapping
from training.finetune.transfer_table import (
    DAMAGE,
    Action,
    GroupTransfer,
    State,
    TransferPlan,
    action_of,
    check_tensors,
    damaged,
    describe_group,
    select,
    without_prefix,
)
from training.network_file import NetworkFile

GENERATOR_GROUPS = {  # words for a group -> how the names of its tensors start
    "class embedding": "mapping.embed.",
    "class projection": "mapping.embed_proj.",
    "mapping layers": "mapping.fc",
    "mean styles": "mapping.w_avg",
    "synthesis input": "synthesis.input.",
    "synthesis layers": "synthesis.L",
}
# Fields on which no weight depends, or that may differ because rows are converted.
FREE_FIELDS = {"c_dim", "num_embeddings", "magnitude_ema_beta", "w_avg_beta", "num_fp16_res", "conv_clamp"}
HEAD_FIELDS = (
    "feature_resolution",
    "nominal_resolution",
    "projected_channels",
    "num_levels",
    "head_resolution",
    "max_head_channels",
    "class_dim",
    "official_batchnorm_statistics",
)


def plan_transfer(
    stored: NetworkFile,
    config: TrainConfig,
    fresh_G: Mapping[str, Tensor],
    fresh_D: Mapping[str, Tensor],
    classes: ClassSources | None,
) -> TransferPlan:
    """Decide what a run with `config` takes from `stored`. Changes nothing.

    fresh_G: state of the run's new generator, fresh_D: trained state of its new discriminator, on the CPU; they give
    what the file cannot. classes: where the run's classes come from; None if the file has none. Raises UserError as
    `check_fit` does, and for damaged files.
    """
    check_fit(stored, config)
    G_ema, groups = _plan_generator(stored, stored.G_ema, config.generator, fresh_G, classes)
    G, _ = _plan_generator(stored, stored.G or stored.G_ema, config.generator, fresh_G, classes)
    has_rows = classes is not None and config.generator.mapping.c_dim > 0
    class_rows = G_ema["mapping.embed.weight"] if has_rows else None
    D, discriminator_groups = plan_discriminator(stored, config, fresh_D, classes, class_rows)
    return TransferPlan(_headline(stored), (*groups, *discriminator_groups), G, G_ema, D)


def check_fit(stored: NetworkFile, config: TrainConfig) -> None:
    """Raise UserError if the networks of a run are built in another way than those in the file.

    Also if blocks of D would be frozen that do not come from the file. Needs no networks.
    """
    _check_generators(stored, config.generator)
    _check_discriminators(stored, config)
    _check_frozen_blocks(stored, config)


def _headline(stored: NetworkFile) -> str:
    cfg = stored.generator_config
    classes = f"{cfg.mapping.c_dim} classes" if cfg.mapping.c_dim else "no classes"
    heads = {"san": "SAN discriminator", "gan": "plain GAN discriminator", None: "no discriminator"}
    only = "" if stored.G is not None else " It holds G_ema only: G starts from that."
    resolution = f"{cfg.img_resolution}x{cfg.img_resolution}"
    return f"Starting from {stored.path}: {resolution}, {classes}, {heads[stored.head_kind]}.{only}"


def _plan_generator(
    stored: NetworkFile,
    state: State,
    cfg: GeneratorConfig,
    fresh: Mapping[str, Tensor],
    classes: ClassSources | None,
) -> tuple[State, list[GroupTransfer]]:
    """Complete state of a generator, and its lines of the table."""
    source = stored.generator_config.mapping
    try:
        mapping = convert_mapping(without_prefix(state, "mapping."), source, cfg.mapping, classes)
    except DAMAGE as error:
        raise damaged(stored.path, "mapping network", error) from error
    converted = {name: x for name, x in state.items() if not name.startswith("mapping.")}
    converted |= {f"mapping.{name}": x for name, x in mapping.items()}
    becomes_conditional = source.c_dim == 0 and cfg.mapping.c_dim > 0
    may_lack = ("mapping.embed.", "mapping.embed_proj.") if becomes_conditional else ()
    check_tensors(converted, fresh, may_lack, stored.path)
    groups = []
    for group, prefix in GENERATOR_GROUPS.items():
        action = action_of(prefix, state, converted, fresh)
        if action is not None:
            tensors = select(state if action == "skipped" else fresh, prefix)
            reason = _reason(group, action, cfg.mapping.c_dim, classes)
            groups.append(describe_group("G", group, action, tensors, reason))
    return dict(fresh) | converted, groups


def _reason(group: str, action: Action, c_dim: int, classes: ClassSources | None) -> str:
    """Why a group of the generator is as it is."""
    if action == "re-initialised":
        return "the file has no classes"
    if action == "skipped":
        return "this run has no classes"
    if group == "class embedding" and c_dim == 0:
        return "as in the file; not used without classes"
    if group == "mapping layers" and action == "converted":
        if classes is None:
            return "new inputs for the class start at zero: images stay as they are"
        return f"the bias takes the class vector: {classes.describe()}"
    if group == "mean styles" and classes is None and c_dim > 0:
        return "the same for every class"
    if group in ("class embedding", "mean styles") and classes is not None:
        return classes.describe()
    return "as in the file"


def _check_generators(stored: NetworkFile, wanted: GeneratorConfig) -> None:
    old = stored.generator_config
    parts = [("mapping", old.mapping, wanted.mapping), ("synthesis", old.synthesis, wanted.synthesis)]
    if len(old.superres) != len(wanted.superres):
        raise UserError(
            f"--resume {stored.path}: its generator has {len(old.superres)} super-resolution stages, this run "
            f"asks for {len(wanted.superres)}; use the settings it was trained with"
        )
    stages = enumerate(zip(old.superres, wanted.superres, strict=True), start=1)
    parts += [(f"stage {number}", before, now) for number, (before, now) in stages]
    for part, before, now in parts:
        before, now = asdict(before), asdict(now)
        for name in before:
            if name not in FREE_FIELDS and before[name] != now[name]:
                _refuse(stored, f"generator ({part})", name, before[name], now[name])


def _check_discriminators(stored: NetworkFile, config: TrainConfig) -> None:
    old, wanted = stored.discriminator_config, config.discriminator
    if old is None or not set(old.backbones) & set(wanted.backbones):
        return
    fields = [*HEAD_FIELDS, "embedding_dim"] if stored.head_kind == config.loss == "gan" else HEAD_FIELDS
    for name in fields:
        if getattr(old, name) != getattr(wanted, name):
            _refuse(stored, "discriminator", name, getattr(old, name), getattr(wanted, name))


def _refuse(stored: NetworkFile, network: str, field: str, before: Any, now: Any) -> None:
    raise UserError(
        f"--resume {stored.path}: its {network} was built with {field}={before}, this run asks for {now}; "
        "use the settings it was trained with"
    )


def _check_frozen_blocks(stored: NetworkFile, config: TrainConfig) -> None:
    old = stored.discriminator_config
    new = [name for name in config.discriminator.backbones if name not in (old.backbones if old else ())]
    if config.frozen_head_blocks and new:
        raise UserError(
            f"--freezed {config.frozen_head_blocks}: {stored.path} has no heads for {new[0]}, and frozen random blocks "
            "would never learn; leave --freezed out, or name only backbones of the file"
        )
