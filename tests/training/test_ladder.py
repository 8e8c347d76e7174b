# SPDX-License-Identifier: MIT
"""Ladders: which stages, what their folders say, when another configuration is refused, and the table."""

import re
from dataclasses import replace

import pytest

from training.config import ConfigError, TrainConfig, to_json
from training.generator.generator import Generator
from training.ladder import (
    LADDER_NAMES,
    LADDERS,
    Ladder,
    StageState,
    check_unchanged,
    find_ladder,
    read_state,
    read_states,
    stage_folder,
    stage_resolution,
)
from training.ladder_table import StageRow, count_layers, format_table
from training.memory import Footprint
from training.network_io import NetworkFileError, save_network
from training.presets import PRESETS

FOOTPRINT = Footprint(
    G_parameters=2_500_000,
    G_trained=70_000,
    D_parameters=118_700_000,
    D_trained=20_700_000,
    weights=2**30,
    average=2**29,
    gradients=2**28,
    optimizers=2**29,
    activations=2**31,
)


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
def test_stages_stand_on_each_other(ladder):
    resolutions = [stage_resolution(stage) for stage in ladder.stages]
    assert resolutions == [resolutions[0] * 2**index for index in range(len(resolutions))]
    for index, stage in enumerate(ladder.stages):
        generator = PRESETS[stage]().generator
        assert len(generator.superres) == index
        assert generator.synthesis == PRESETS[ladder.stages[0]]().generator.synthesis
    assert {PRESETS[stage]().loss for stage in ladder.stages} == {"san"}


def test_every_preset_with_a_stage_is_in_a_ladder():
    in_ladders = [stage for ladder in LADDERS for stage in ladder.stages]
    assert sorted(in_ladders) == sorted(set(PRESETS) - {"quickstart"})


def test_a_stage_names_the_ladder_up_to_it():
    assert find_ladder("ffhq").stages[-1] == "ffhq-1024"
    part = find_ladder("ffhq-64")
    assert part == Ladder("ffhq", ("ffhq-16", "ffhq-32", "ffhq-64"))
    assert part.above(16).stages == ("ffhq-32", "ffhq-64") and part.above(64).stages == ()
    assert "ffhq-16" not in LADDER_NAMES  # one stage is no ladder
    with pytest.raises(ConfigError, match="--ladder celeba is not one of digits, digits-16, cifar10"):
        find_ladder("celeba")


# What folders say.


@pytest.fixture
def digits(tmp_path):
    """(outdir, ladder) of the digits, without any folder yet."""
    return str(tmp_path), find_ladder("digits")


def write_snapshot(outdir, ladder, stage, kimg, names=("network-snapshot", "best_model"), **info):
    G_ema = Generator(PRESETS["digits-8"]().generator)
    for name in names:
        path = stage_folder(outdir, ladder, stage) / f"{name}.safetensors"
        save_network(path, G_ema, info={"cur_nimg": round(kimg * 1000), **info})


def test_states(digits):
    outdir, ladder = digits
    total = PRESETS["digits-8"]().total_kimg
    assert read_states(outdir, ladder) == dict.fromkeys(ladder.stages, StageState("to do"))
    write_snapshot(outdir, ladder, "digits-8", total / 2)
    half = StageState("half done", round(total * 500))
    assert read_states(outdir, ladder)["digits-8"] == half and not half.is_over
    assert half.describe() == f"half done, {total / 2:g} kimg"
    write_snapshot(outdir, ladder, "digits-8", total)
    assert [state.kind for state in read_states(outdir, ladder).values()] == ["finished", "to do"]


def test_a_stage_below_a_finished_one_is_not_needed(digits):
    outdir, ladder = digits
    write_snapshot(outdir, ladder, "digits-16", PRESETS["digits-16"]().total_kimg)
    states = read_states(outdir, ladder)
    assert [state.kind for state in states.values()] == ["not needed", "finished"]
    assert all(state.is_over for state in states.values())


def test_a_folder_without_a_snapshot_has_yet_to_start(tmp_path):
    (tmp_path / "log.txt").write_text("")
    assert read_state(tmp_path, 1.0) == StageState("to do")


def test_without_the_best_network_a_stage_is_not_finished(digits):
    outdir, ladder = digits
    write_snapshot(outdir, ladder, "digits-8", 1000, names=["network-snapshot"])
    assert read_states(outdir, ladder)["digits-8"].kind == "half done"


def test_a_damaged_snapshot_is_named(digits):
    outdir, ladder = digits
    path = stage_folder(outdir, ladder, "digits-8") / "network-snapshot.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no network")
    with pytest.raises(NetworkFileError, match="network-snapshot"):
        read_states(outdir, ladder)


# Another configuration.


def write_options(folder, config: TrainConfig):
    (folder / "training_options.json").write_text(to_json(config))


def test_the_same_configuration_passes(tmp_path):
    config = PRESETS["digits-16"]()
    check_unchanged(tmp_path, config)  # nothing there yet
    write_options(tmp_path, config)
    check_unchanged(tmp_path, config)
    free = replace(
        config, microbatch_size=1, path_stem="x", tick_kimg=9, data=replace(config.data, num_workers=9)
    )
    check_unchanged(tmp_path, free)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, loss="gan"), "loss=san, and this command asks for gan"),
        (
            lambda c: replace(c, data=replace(c.data, path="x.zip")),
            "data.path=digits, and this command asks for x.zip",
        ),
        (lambda c: replace(c, generator=replace(c.generator, superres=())), r"generator.superres=\[\{"),
        (lambda c: replace(c, seed=3), "seed=0, and this command asks for 3"),
    ],
)
def test_a_changed_field_is_named(tmp_path, change, message):
    config = PRESETS["digits-16"]()
    write_options(tmp_path, config)
    with pytest.raises(ConfigError, match=message) as caught:
        check_unchanged(tmp_path, change(config))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_options_are_named(tmp_path):
    (tmp_path / "training_options.json").write_text("{")
    with pytest.raises(ConfigError, match=r"training_options\.json cannot be read"):
        check_unchanged(tmp_path, PRESETS["digits-8"]())


# The table.


@pytest.mark.parametrize(
    ("stage", "layers"),
    [
        ("cifar10-16", (0, 7, 7)),
        ("cifar10-32", (3, 8, 12)),
        ("ffhq-64", (3, 5, 14)),
        ("imagenet-1024", (3, 6, 40)),
    ],
)
def test_layers(stage, layers):
    assert count_layers(PRESETS[stage]()) == layers


def test_table():
    rows = [
        StageRow("cifar10-16", PRESETS["cifar10-16"](), FOOTPRINT, StageState("finished", 300_000_000)),
        StageRow("cifar10-32", PRESETS["cifar10-32"](), FOOTPRINT, StageState("half done", 1_500)),
    ]
    header, first, second, *_ = format_table(rows).splitlines()
    assert re.split(r" {2,}", first) == [
        *("cifar10-16", "16x16", "+7", "= 7", "2.5M", "0.070M", "118.7M", "20.7M"),
        *("4.25", "1", "0.5", "0.25", "0.5", "2", "2048", "8", "300000", "finished"),
    ]
    assert re.split(r" {2,}", second)[2:4] == ["-3 +8", "= 12"]
    assert second.endswith("half done, 1.5 kimg")
    for word in ("stage", "layers", "G params", "memory/GiB", "state"):
        assert word in header
    assert first.index("16x16") == second.index("32x32")
