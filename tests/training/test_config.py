# SPDX-License-Identifier: MIT
"""Configurations: JSON there and back, unknown and missing fields, batch arithmetic, lazy regularisation."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from torch_utils.errors import UserError
from training.config import (
    ConfigError,
    DiscriminatorConfig,
    GeneratorConfig,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    from_json,
    to_json,
)
from training.presets import PRESETS, quickstart, stylegan_xl

DATA = Path(__file__).parents[1] / "data"
CONFIGS = {name: preset() for name, preset in PRESETS.items()} | {
    "stylegan3-t": stylegan_xl("stylegan3-t", "a.zip", img_resolution=256, c_dim=1000),
    "stylegan3-r": stylegan_xl("stylegan3-r", "a.zip"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name):
    config = CONFIGS[name]
    text = to_json(config)
    again = from_json(TrainConfig, text)
    assert again == config
    assert isinstance(again.discriminator.backbones, tuple) and isinstance(again.metrics, tuple)
    assert to_json(again) == text
    assert from_json(GeneratorConfig, json.dumps(json.loads(text)["generator"])) == config.generator


def test_json_is_complete_and_in_the_order_of_the_fields():
    values = json.loads(to_json(quickstart()))
    assert list(values) == list(TrainConfig.__dataclass_fields__)
    assert values["resume"] is None and values["discriminator"]["backbones"] == ["tf_efficientnet_lite0"]


@pytest.mark.parametrize("path", [(), ("generator", "synthesis"), ("discriminator_optimizer",)])
def test_unknown_field_is_named(path):
    values = json.loads(to_json(quickstart()))
    inner = values
    for part in path:
        inner = inner[part]
    inner["no_such_field"] = 1
    with pytest.raises(ConfigError, match="has no field 'no_such_field'; its fields are "):
        from_dict(TrainConfig, values)


def test_missing_field_is_named():
    values = json.loads(to_json(quickstart()))
    del values["batch_size"]
    with pytest.raises(ConfigError, match=r"TrainConfig: .*batch_size"):
        from_dict(TrainConfig, values)
    values["batch_size"] = 16
    del values["generator"]["synthesis"]["img_resolution"]
    with pytest.raises(ConfigError, match=r"SynthesisConfig: .*img_resolution"):
        from_dict(TrainConfig, values)


def test_absent_fields_take_their_defaults():
    assert from_json(DiscriminatorConfig, '{"img_resolution": 8}') == DiscriminatorConfig(img_resolution=8)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        quickstart().seed = 1


@pytest.mark.parametrize(
    ("batch_size", "microbatch_size", "world_size", "message"),
    [
        (100, 8, 8, "--batch 100 is not a multiple of --batch-gpu x processes = 8 x 8 = 64"),
        (16, 3, 1, "--batch 16 is not a multiple of --batch-gpu x processes = 3 x 1 = 3"),
        (4, 8, 1, "--batch 4 is not a multiple of --batch-gpu x processes = 8 x 1 = 8"),
        (0, 8, 1, "--batch 0 and --batch-gpu 8 must be at least 1"),
        (8, 0, 1, "--batch 8 and --batch-gpu 0 must be at least 1"),
        (8, -1, 1, "--batch 8 and --batch-gpu -1 must be at least 1"),
    ],
)
def test_batch_sizes_that_do_not_fit(batch_size, microbatch_size, world_size, message):
    config = replace(quickstart(), batch_size=batch_size, microbatch_size=microbatch_size)
    with pytest.raises(ConfigError) as error:
        config.validate(world_size)
    assert str(error.value) == message
    assert isinstance(error.value, UserError)


def test_batch_sizes_that_fit():
    for batch_size, microbatch_size, world_size in ((64, 8, 8), (64, 64, 1), (64, 4, 1)):
        replace(quickstart(), batch_size=batch_size, microbatch_size=microbatch_size).validate(world_size)


def test_adjusted_matches_the_official_optimizers():
    with np.load(DATA / "d_loss_san.npz") as data:
        table = data["opt_table"]  # rows: lr, beta1, beta2 of G and of D
    config = stylegan_xl()
    for row, optimizer in zip(
        table, (config.generator_optimizer, config.discriminator_optimizer), strict=True
    ):
        lr, betas = optimizer.adjusted()
        np.testing.assert_allclose([lr, *betas], row, rtol=1e-12)


def test_without_lazy_regularisation_nothing_is_adjusted():
    optimizer = OptimizerConfig(lr=0.01, betas=(0.5, 0.9))
    assert optimizer.adjusted() == (0.01, (0.5, 0.9))
    lr, betas = replace(optimizer, reg_interval=1).adjusted()
    assert lr == pytest.approx(0.005) and betas == pytest.approx((0.5**0.5, 0.9**0.5))
