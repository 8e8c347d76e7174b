# SPDX-License-Identifier: MIT
"""Flags of super-resolution stages: what they mean, what is said about them, and every refusal in one line.

pytest tests/integration/test_superres_cli.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import train
from torch_utils.download import cached_path
from training.config import (
    GeneratorConfig,
    MappingConfig,
    SuperresConfig,
    SynthesisConfig,
    TrainConfig,
    from_json,
)
from training.generator.generator import Generator
from training.network_io import read_network, save_network
from training.superres import load_stem

DATA = Path(__file__).parents[1] / "data"
SYNTHESIS = SynthesisConfig(
    img_resolution=16, channel_base=512, channel_max=8, num_layers=6, conv_kernel=1, use_radial_filters=True
)
STEM = GeneratorConfig(
    mapping=MappingConfig(z_dim=4, w_dim=8, c_dim=3, num_embeddings=9, embedding_dim=5), synthesis=SYNTHESIS
)
COMMON = ("--cfg", "stylegan3-t", "--batch", 4, "--cond", 1, "--device", "cpu", "--metrics", "none")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """So that relative paths mean this test's own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def stem_file(tmp_path):
    path = tmp_path / "stem.safetensors"
    save_network(path, Generator(STEM))
    return path


@pytest.fixture
def write_images(write_dataset):
    """write_images(resolution, num_classes) -> path of six images or more; no classes = no labels."""

    def write(resolution: int, num_classes: int = 3):
        num_images = max(6, num_classes)
        files = {f"{i}.png": np.full((resolution, resolution, 3), i, np.uint8) for i in range(num_images)}
        labels = {name: i % num_classes for i, name in enumerate(files)} if num_classes else None
        return write_dataset(f"set{resolution}-{num_classes}", files, labels)

    return write


def invoke(*arguments: object):
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def dry_run(*arguments: object) -> tuple[TrainConfig, str]:
    """Configuration that a dry run prints, read back, and what it says after it."""
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end]), result.output[end:]


def refusal(tmp_path, *arguments: object) -> str:
    """The one error line of a command that must write nothing."""
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and result.output.splitlines()[-1] == errors[0], result.output
    assert sorted(tmp_path.rglob("*")) == before
    return errors[0]


# What the flags mean.


def test_a_stage_is_the_stems_network_with_a_head(stem_file, write_images):
    config, said = dry_run(*COMMON, "--data", write_images(32), "--superres", "--path_stem", stem_file)
    assert config.path_stem == str(stem_file) and config.trains_head_only
    assert replace(config.generator, superres=()) == STEM
    # The defaults are StyleGAN-XL's; the kind of layer is this --cfg's, not the stem's; clamp and decay are fixed.
    assert config.generator.superres == (
        SuperresConfig(up_factor=2, head_layers=7, conv_kernel=3, use_radial_filters=False),
    )
    assert config.generator.superres[0].conv_clamp == 256 and not config.trains_stem_input
    assert config.loss_terms.pl_weight == 0 and config.loss_terms.cls_weight == 0
    assert config.generator_optimizer.reg_interval == 4  # the correction of the learning rate stays
    assert config.embedding_source == "stem"
    assert config.discriminator.img_resolution == 32 and config.discriminator.c_dim == 3
    assert config.discriminator.embedding_dim == 5
    assert "Note" not in said


def test_flags_of_a_stage(stem_file, write_images):
    config, _ = dry_run(
        *("--cfg", "stylegan3-r", "--batch", 4, "--cond", 1, "--metrics", "none", "--data", write_images(64)),
        *(
            "--superres",
            "--path_stem",
            stem_file,
            "--up_factor",
            4,
            "--head_layers",
            5,
            "--train-stem-input",
            1,
        ),
    )
    (stage,) = config.generator.superres
    assert (stage.up_factor, stage.head_layers, stage.conv_kernel, stage.use_radial_filters) == (
        4,
        5,
        1,
        True,
    )
    assert config.trains_stem_input and config.generator.img_resolution == 64


def test_a_stage_is_a_stem(tmp_path, write_images):
    below = replace(STEM, superres=(SuperresConfig(up_factor=2, head_layers=4),))
    save_network(tmp_path / "below.safetensors", Generator(below))
    config, _ = dry_run(
        *COMMON, "--data", write_images(64), "--superres", "--path_stem", tmp_path / "below.safetensors"
    )
    assert replace(config.generator, superres=config.generator.superres[:1]) == below
    assert len(config.generator.superres) == 2 and config.generator.img_resolution == 64


def test_float32_is_for_the_whole_network(stem_file, write_images):
    """The head loses its clamp; the stem keeps its own, which its weights were trained with."""
    config, _ = dry_run(
        *COMMON, "--data", write_images(32), "--superres", "--path_stem", stem_file, "--fp32", 1
    )
    assert config.generator.superres[0].conv_clamp is None
    assert config.generator.synthesis == replace(SYNTHESIS, num_fp16_res=0)


def test_a_preset_with_stages_takes_the_lower_part_from_the_file(tmp_path):
    stem = replace(STEM, mapping=replace(STEM.mapping, c_dim=10, num_embeddings=10))
    stem = replace(stem, synthesis=replace(SYNTHESIS, img_resolution=8, first_cutoff=1.0, num_layers=4))
    save_network(tmp_path / "eight.safetensors", Generator(stem))
    config, _ = dry_run("--preset", "digits-16", "--path_stem", tmp_path / "eight.safetensors")
    assert replace(config.generator, superres=()) == stem
    assert config.generator.superres[0].head_layers == 4 and config.trains_head_only


def test_an_official_file_is_a_stem(write_images):
    path = DATA / "g_snapshot_xl_stem.pkl"
    config, _ = dry_run(*COMMON, "--data", write_images(32, 10), "--superres", "--path_stem", path)
    assert replace(config.generator, superres=()) == read_network(path).generator_config
    assert config.generator.img_resolution == 32 and config.discriminator.embedding_dim == 24
    G = load_stem(config)
    assert G.img_resolution == 16 and G.c_dim == 10


def test_a_dry_run_uses_a_download_that_is_there(stem_file, write_images, tmp_path, monkeypatch):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    url = "https://example.org/stem.safetensors"
    cached_path(url).parent.mkdir(parents=True)
    shutil.copy(stem_file, cached_path(url))
    config, said = dry_run(*COMMON, "--data", write_images(32), "--superres", "--path_stem", url)
    assert replace(config.generator, superres=()) == STEM and config.path_stem == url
    assert "Note" not in said


def test_any_preset_is_a_stage_with_superres(stem_file, write_images):
    arguments = ("--preset", "quickstart", "--superres", "--path_stem", stem_file, "--data", write_images(32))
    config, _ = dry_run(*arguments, "--metrics", "none")
    assert replace(config.generator, superres=()) == STEM
    assert config.generator_optimizer.lr == 0.0056 and config.generator.superres[0].conv_kernel == 3


# What is said.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--syn_layers", 6], "--syn_layers 6"),
        (["--cbase", 1000, "--cmax", 7], "--cbase 1000, --cmax 7"),
        (["--map-depth", 3], "--map-depth 3"),
        (["--embedding", "random"], "--embedding random"),
    ],
)
def test_flags_without_effect_are_named(stem_file, write_images, arguments, named):
    common = (*COMMON, "--data", write_images(32), "--superres", "--path_stem", stem_file)
    config, said = dry_run(*common, *arguments)
    assert replace(config.generator, superres=()) == STEM
    (note,) = [line for line in said.splitlines() if line.startswith("Note")]
    assert f"no effect from {named}:" in note
    assert "6 layers, channel_base 512, channel_max 8, 2 mapping layers" in note


@pytest.mark.parametrize("path", ["absent.safetensors", "stem.pkl", "https://example.org/network.pkl"])
def test_dry_run_assumes_a_stem_that_is_not_there(write_images, path):
    common = (*COMMON, "--data", write_images(32), "--cbase", 100, "--cmax", 16, "--syn_layers", 6)
    config, said = dry_run(*common, "--superres", "--path_stem", path)
    synthesis = config.generator.synthesis
    assert (synthesis.img_resolution, synthesis.num_layers, synthesis.conv_kernel) == (16, 6, 3)
    assert (synthesis.channel_base, synthesis.channel_max) == (200, 32)
    assert config.generator.img_resolution == 32 and config.generator.mapping.c_dim == 3
    (note,) = [line for line in said.splitlines() if line.startswith("Note")]
    assert f"--path_stem {path} is not there; the configuration assumes a stem of 16x16" in note


def test_dry_run_shows_a_preset_with_stages_as_it_is():
    config, said = dry_run("--preset", "digits-16")
    assert config.generator.synthesis.img_resolution == 8 and config.generator.img_resolution == 16
    assert "Note: No --path_stem; the configuration assumes a stem of 8x8" in said
    assert config.loss_terms.pl_weight == 0


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superres"], "--path_stem missing; --superres trains on top of a network: give its file"),
        (["--superres", "--stem", "--path_stem", "x"], "--stem and --superres contradict each other"),
        (["--path_stem", "x.pkl"], "--path_stem x.pkl belongs to a super-resolution stage; add --superres"),
        (["--up_factor", "2"], "--up_factor 2 belongs to a super-resolution stage"),
        (["--head_layers", "7"], "--head_layers 7 belongs to a super-resolution stage"),
        (["--train-stem-input", "0"], "--train-stem-input False belongs to a super-resolution stage"),
        (["--superres", "--path_stem", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--superres", "--path_stem", "."], "is a folder; give a network file in it"),
        (["--superres", "--path_stem", ".", "--dry-run"], "is a folder; give a network file in it"),
        (["--superres", "--path_stem", "STEM", "--head_layers", "2"], "head_layers=2"),
        (["--superres", "--path_stem", "STEM", "--up_factor", "1"], "1 is not in the range x>=2"),
        (
            ["--superres", "--path_stem", "STEM", "--up_factor", "4"],
            "has 32x32 images, but --path_stem STEM makes 16x16 and --up_factor 4 of it 64x64; use --up_factor 2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(tmp_path, stem_file, write_images, arguments, message):
    arguments = [str(stem_file) if a == "STEM" else a for a in arguments]
    data = write_images(32)
    said = refusal(tmp_path, *COMMON, "--data", data, *arguments)
    assert message.replace("STEM", str(stem_file)) in said


def test_data_of_the_stems_own_size_is_refused(tmp_path, stem_file, write_images):
    data = write_images(16)
    said = refusal(tmp_path, *COMMON, "--data", data, "--superres", "--path_stem", stem_file)
    assert f"{data} has 16x16 images" in said and "makes 16x16" in said and "resize the data" in said


def test_a_factor_that_is_none_is_refused(tmp_path, write_images):
    stem = replace(STEM, synthesis=replace(SYNTHESIS, img_resolution=4, first_cutoff=1.0))
    path = tmp_path / "four.safetensors"
    save_network(path, Generator(stem))
    flags = (*COMMON, "--data", write_images(128), "--superres", "--path_stem", path, "--up_factor", 32)
    assert "up_factor=32 of a super-resolution stage must be one of 2, 4, 8, 16" in refusal(tmp_path, *flags)


@pytest.mark.parametrize(
    ("stem_classes", "data_classes", "cond", "message"),
    [
        (3, 2, 1, "trained with 3 classes, but DATA as used here has 2 classes; use the classes"),
        (3, 3, 0, "trained with 3 classes, but DATA as used here has none; add --cond 1"),
        (3, 0, 0, "trained with 3 classes, but DATA as used here has none; add --cond 1"),
        (0, 3, 1, "trained with no classes, but DATA as used here has 3 classes; use --cond 0"),
    ],
)
def test_other_classes_are_refused(tmp_path, write_images, stem_classes, data_classes, cond, message):
    path = tmp_path / "stem.safetensors"
    save_network(path, Generator(replace(STEM, mapping=replace(STEM.mapping, c_dim=stem_classes))))
    data = write_images(32, data_classes)
    flags = ("--data", data, "--superres", "--path_stem", path, "--cond", cond)
    assert message.replace("DATA", str(data)) in refusal(tmp_path, *COMMON, *flags)


def test_a_preset_with_stages_needs_a_stem_and_is_none(tmp_path):
    assert "--path_stem missing; --preset digits-16" in refusal(tmp_path, "--preset", "digits-16")
    message = refusal(tmp_path, "--preset", "digits-16", "--path_stem", "x", "--stem")
    assert "--stem and --preset digits-16 contradict each other" in message
    assert "x does not exist" in refusal(tmp_path, "--preset", "digits-16", "--path_stem", "x")
