# SPDX-License-Identifier: MIT
"""The commands that StyleSAN-XL was published with, plus `--loss san`, run here, and presets repeat them.

Data sets stand in with four images of the right size; stems are missing, as before the stage below has been trained.
"""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import train
from training.config import TrainConfig, from_json

START = "--gpus=8 --mirror=1 --snap 10 --batch-gpu 8"
STAGE = "--superres --up_factor 2 --path_stem ./training-runs/below/best_model.pkl"
COMMANDS = {  # preset -> published command, after "python train.py"
    "cifar10-16": f"--outdir=./training-runs/cifar10 --cfg=stylegan3-r --data=./data/cifar10_16.zip {START} "
    "--batch=2048 --kimg 300000 --syn_layers 6 --cond True",
    "cifar10-32": f"--outdir=./training-runs/cifar10 --cfg=stylegan3-r --data=./data/cifar10_32.zip {START} "
    f"--batch=2048 --kimg 250000 --syn_layers 6 {STAGE} --head_layers 7 --cond True",
    "imagenet-256": f"--outdir=./training-runs/imagenet --cfg=stylegan3-t --data=./data/imagenet_256.zip {START} "
    f"--batch=256 --kimg 11000 --syn_layers 11 {STAGE} --head_layers 7 --cond True --cls_weight 8.0",
    "ffhq-16": f"--outdir=./training-runs/ffhq --cfg=stylegan3-r --data=./data/ffhq_16.zip {START} "
    "--batch=2048 --kimg 300000 --syn_layers 6",
    "ffhq-32": f"--outdir=./training-runs/ffhq --cfg=stylegan3-r --data=./data/ffhq_32.zip {START} "
    f"--batch=2048 --kimg 175000 --syn_layers 6 {STAGE} --head_layers 7",
    **{
        f"ffhq-{side}": f"--outdir=./training-runs/ffhq --cfg=stylegan3-t --data=./data/ffhq_{side}.zip {START} "
        f"--batch={batch} --kimg {kimg} --syn_layers 6 {STAGE} --head_layers 4"
        for side, batch, kimg in (
            (64, 256, 95000), (128, 256, 57000), (256, 256, 11000), (512, 128, 4000), (1024, 128, 4000)
        )
    },
}  # fmt: skip
NUM_CLASSES = {"cifar10": 10, "imagenet": 1000, "ffhq": 0}


@pytest.fixture
def make_data(write_dataset, tmp_path, monkeypatch):
    """Makes ./data/<set>_<side>.zip in an empty folder that the command runs in."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    def make(preset: str) -> str:
        name, side = preset.split("-")
        files = {
            f"{i}.png": Image.fromarray(np.full((int(side), int(side), 3), i, np.uint8)) for i in range(4)
        }
        classes = NUM_CLASSES[name]
        labels = dict(zip(files, (0, 1, 2, classes - 1), strict=True)) if classes else None
        write_dataset(f"data/{name}_{side}.zip", files, labels)
        return f"./data/{name}_{side}.zip"

    return make


def dry_run(*arguments: str) -> tuple[TrainConfig, str]:
    """The configuration that a dry run prints, and the rest of its output."""
    result = CliRunner().invoke(train.main, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end]), result.output[end:]


@pytest.mark.parametrize("preset", COMMANDS)
def test_published_command_runs_and_its_preset_is_the_same(preset, make_data, tmp_path):
    data, command = make_data(preset), shlex.split(COMMANDS[preset])
    config, notes = dry_run("--loss", "san", *command)
    assert "Dry run: nothing was trained or written." in notes
    is_stage = "--superres" in command
    stem = ["--path_stem", command[command.index("--path_stem") + 1]] if is_stage else []
    assert ("best_model.pkl is not there" in notes) == is_stage
    of_preset, _ = dry_run("--loss", "san", "--preset", preset, "--data", data, "--gpus", "8", *stem)
    # What the official code does without being told, only the presets switch on.
    assert of_preset.discriminator.official_batchnorm_statistics and of_preset.trains_stem_input == is_stage
    config = replace(
        config,
        discriminator=replace(config.discriminator, official_batchnorm_statistics=True),
        trains_stem_input=is_stage,
    )
    if is_stage:
        assert config.generator.superres[-1] == of_preset.generator.superres[-1]
        assert config.generator.img_resolution == of_preset.generator.img_resolution
        config = replace(config, generator=of_preset.generator)  # each assumes a stem until there is one
    assert config == of_preset
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_real_run_needs_the_eight_gpus(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    make_data("cifar10-16")
    result = CliRunner().invoke(train.main, shlex.split(COMMANDS["cifar10-16"]))
    assert result.exit_code == 1
    assert "--gpus 8, but PyTorch sees 2 GPUs on this machine; lower it, or add --device cpu" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--batch 2000", "--batch 2000 is not a multiple of --batch-gpu x processes = 8 x 8 = 64"),
        ("--batch-gpu 512", "--batch 2048 is not a multiple of --batch-gpu x processes = 512 x 8 = 4096"),
    ],
)
def test_a_dry_run_checks_the_batch_for_all_gpus(changes, message, make_data):
    make_data("cifar10-16")
    command = [*shlex.split(COMMANDS["cifar10-16"]), *shlex.split(changes), "--dry-run"]
    result = CliRunner().invoke(train.main, command)
    assert result.exit_code == 1 and message in result.output
