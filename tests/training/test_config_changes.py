# SPDX-License-Identifier: MIT
"""Other settings for a run that goes on: every field has an effect, and each effect is told or refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest

from training.config import ConfigError, TrainConfig
from training.config_changes import EFFECTS, check_changes, compare_configs, effect_of, flatten
from training.presets import PRESETS, dcgan, quickstart


def stored(config: TrainConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("config", [quickstart(), dcgan("infogan"), dcgan("began"), PRESETS["digits-16"]()])
def test_every_field_has_an_effect_and_every_entry_a_field(config: TrainConfig) -> None:
    names = flatten(stored(config))
    for name in names:
        effect_of(name)
    if not config.is_dcgan:
        for entry in EFFECTS:
            assert any(name == entry or name.startswith(f"{entry}.") for name in names), entry
    with pytest.raises(KeyError, match="no entry for 'new_field'"):
        effect_of("new_field")


def test_the_same_settings_are_no_change() -> None:
    for config in (quickstart(), dcgan("infogan")):
        assert compare_configs(stored(config), config) == []


def test_effects_of_changes() -> None:
    config = quickstart()
    wanted = replace(
        config,
        microbatch_size=1,
        total_kimg=1.0,
        batch_size=4,
        data=replace(config.data, path="x.zip"),
        discriminator_optimizer=replace(config.discriminator_optimizer, lr=0.5),
        loss_terms=replace(config.loss_terms, blur_fade_kimg=7.0),
    )
    effects = {change.name: change.effect for change in compare_configs(stored(config), wanted)}
    assert effects == {
        "microbatch_size": "free",
        "total_kimg": "free",
        "data.path": "checked",
        "batch_size": "changes",
        "discriminator_optimizer.lr": "changes",
        "loss_terms.blur_fade_kimg": "changes",
    }
    check_changes(compare_configs(stored(config), wanted), "runs/0")


def test_a_change_is_told_in_a_line() -> None:
    config = quickstart()
    wanted = replace(
        config, tick_kimg=9.0, generator_optimizer=replace(config.generator_optimizer, lr=0.001), metrics=()
    )
    lr = config.generator_optimizer.lr
    lines = [change.describe(123_000) for change in compare_configs(stored(config), wanted)]
    assert lines == [
        f"Warning: this is no longer the same run: generator_optimizer.lr {lr} -> 0.001 from 123 kimg on",
        'Changed: metrics ["fd_lite0"] -> [] from 123 kimg on',
        f"Changed: tick_kimg {config.tick_kimg} -> 9.0 from 123 kimg on",
    ]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: replace(c, loss="gan"), "loss=san"),
        (lambda c: replace(c, data=replace(c.data, mirror=True)), "data.mirror=False"),
        (
            lambda c: replace(
                c, generator=replace(c.generator, mapping=replace(c.generator.mapping, w_dim=7))
            ),
            "generator.mapping.w_dim=",
        ),
        (
            lambda c: replace(c, discriminator=replace(c.discriminator, num_levels=1)),
            "discriminator.num_levels=",
        ),
        (
            lambda c: replace(c, discriminator_optimizer=replace(c.discriminator_optimizer, kind="rmsprop")),
            "discriminator_optimizer.kind=adam",
        ),
        (lambda c: replace(c, frozen_head_blocks=1), "frozen_head_blocks=0"),
        (lambda c: dcgan("hinge"), "discriminator.kind=none"),
    ],
)
def test_what_the_networks_cannot_follow_is_refused(change, name: str) -> None:
    config = quickstart()
    changes = compare_configs(stored(config), change(config))
    with pytest.raises(ConfigError, match="runs/0 was trained with ") as caught:
        check_changes(changes, "runs/0")
    refused = [f"{c.name}={c.before}" if c.before is not None else f"{c.name}=none" for c in changes]
    assert any(text.startswith(name) for text in refused) and "\n" not in str(caught.value)


def test_fields_that_one_side_lacks_are_left_out() -> None:
    before = stored(quickstart())
    before["of_another_version"] = before.pop("sync_batchnorm")
    assert compare_configs(before, quickstart()) == []
