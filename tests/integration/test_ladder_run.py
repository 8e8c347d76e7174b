# SPDX-License-Identifier: MIT
"""train.py --ladder: stages train on each other, are skipped or go on, and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import train
from metrics import evaluate
from metrics.evaluate import MetricResult
from training import ladder_run
from training.config import TrainConfig, from_json
from training.generator.generator import Generator
from training.memory import Footprint
from training.network_io import load_network, read_info, read_network, save_network
from training.presets import PRESETS
from training.training_loop import Trainer

pytestmark = pytest.mark.usefixtures("process_settings")
COMMAND = ("--ladder", "digits", "--device", "cpu", "--embedding", "random", "--metrics", "none")
SIDES = (8, 16)


@pytest.fixture(autouse=True)
def tiny_stages(monkeypatch, tmp_path):
    """The stages of the digits, four iterations of 16 images long, in an empty folder."""
    for name in ("digits-8", "digits-16"):
        config = PRESETS[name]()
        generator = replace(config.generator, synthesis=replace(config.generator.synthesis, channel_max=4))
        tiny = replace(
            config,
            generator=generator,
            discriminator=replace(config.discriminator, projected_channels=4, max_head_channels=8),
            batch_size=16,
            microbatch_size=16,
            total_kimg=0.064,
            tick_kimg=0.016,
            snapshot_ticks=1,
            evaluate_at_start=False,
        )
        monkeypatch.setitem(PRESETS, name, lambda tiny=tiny: tiny)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def quick_table(request, monkeypatch):
    """Counting takes seconds; one test of the whole table does it."""
    if "dry_run_needs_no_data" not in request.node.name:
        monkeypatch.setattr(ladder_run, "count_footprint", lambda config, device_type: Footprint(*range(9)))


def run(*arguments: object, command=COMMAND):
    return CliRunner().invoke(train.main, [*command, *(str(a) for a in arguments)])


def walk(*arguments: object, command=COMMAND) -> str:
    result = run(*arguments, command=command)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(tmp_path, *arguments: object, command=COMMAND) -> str:
    """The one error line of a command that must write nothing."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run(*arguments, command=command)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    line = result.output.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


class KilledError(Exception):
    """Stands for a power cut."""


def kill_after(monkeypatch, cur_nimg: int):
    """Stop training once so many images have been seen, before the tick that would report them."""
    iterate = Trainer.iterate

    def iterate_or_die(self):
        iterate(self)
        if self.clock.cur_nimg == cur_nimg:
            raise KilledError

    monkeypatch.setattr(Trainer, "iterate", iterate_or_die)


def files_of(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events.")}


# Walking.


def test_stages_train_on_each_other_and_are_then_skipped(tmp_path):
    output = walk()
    stem, stage = (tmp_path / "runs" / "digits" / name for name in ("digits-8", "digits-16"))
    names = {"best_model.safetensors", "network-snapshot.safetensors", "training_options.json", "log.txt"}
    assert names <= files_of(stem) == files_of(stage)
    below, above = (load_network(folder / "best_model.safetensors") for folder in (stem, stage))
    assert (below.img_resolution, above.img_resolution) == SIDES
    state, kept = above.state_dict(), dict(below.named_parameters())
    kept = {name: value for name, value in kept.items() if name.startswith(("mapping.", "synthesis.L0"))}
    assert kept and all(torch.equal(state[name], value) for name, value in kept.items())
    options = from_json(TrainConfig, (stage / "training_options.json").read_text())
    assert options.path_stem == "runs/digits/digits-8/best_model.safetensors"
    assert "--network runs/digits/digits-16/best_model.safetensors" in output
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = walk()
    assert "Stage digits-8: finished, skipped." in again and "Stage digits-16: finished, skipped." in again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_killed_stage_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 48)
        assert isinstance(run().exception, KilledError)
    folder = tmp_path / "runs" / "digits" / "digits-8"
    assert read_info(folder / "network-snapshot.safetensors")["cur_nimg"] == 32
    first_images = (folder / "fakes_init.png").stat().st_mtime_ns
    log = (folder / "log.txt").read_text()
    table = walk("--dry-run")
    assert re.search(r"digits-8 .*half done, 0.032 kimg", table)
    walk()
    assert read_info(folder / "network-snapshot.safetensors")["cur_nimg"] == 64
    assert (folder / "fakes_init.png").stat().st_mtime_ns == first_images
    continued = (folder / "log.txt").read_text()
    assert continued.startswith(log)
    assert "Continued at 0.032 kimg from runs/digits/digits-8/checkpoints/state-000000032.pt" in continued
    kimg = [
        json.loads(line)["Progress/kimg"]["mean"]
        for line in (folder / "stats.jsonl").read_text().splitlines()
    ]
    assert kimg == pytest.approx([0.016, 0.032, 0.048, 0.064])
    assert (tmp_path / "runs" / "digits" / "digits-16" / "best_model.safetensors").exists()


def test_going_on_restores_weights_counters_and_the_best_value(tmp_path, monkeypatch):
    values = iter([3.0, 5.0, 4.0, 9.0, 9.0, 9.0])

    def cheap_metric(*_, **__):
        return {"fd_lite0": MetricResult({"fd_lite0": next(values)}, {})}

    monkeypatch.setattr(evaluate, "evaluate", cheap_metric)
    command = (*COMMAND[:-1], "fd_lite0")
    with monkeypatch.context() as patch:
        kill_after(patch, 64)
        assert isinstance(run(command=command).exception, KilledError)  # two snapshots, worth 3 and 5
    folder = tmp_path / "runs" / "digits" / "digits-8"
    snapshot = read_network(folder / "network-snapshot.safetensors")
    assert (snapshot.info["cur_nimg"], snapshot.info["metrics"]) == (48, {"fd_lite0": 5.0})
    best = (folder / "best_model.safetensors").read_bytes()
    seen = {}

    def start_and_stop(self):
        seen["G"], seen["D"], seen["G_ema"] = (
            self.G.state_dict(),
            self.D.trained_state_dict(),
            self.G_ema.state_dict(),
        )
        seen["trainer"] = self
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "start", start_and_stop)
        assert isinstance(run(command=command).exception, KilledError)
    for part in ("G", "D", "G_ema"):
        expected = getattr(snapshot, part)
        assert seen[part].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in seen[part].items())
    trainer = seen["trainer"]
    assert (trainer.clock.cur_nimg, trainer.clock.cur_iteration) == (48, 3)
    assert trainer.snapshots.best_value == 3.0 and trainer.loader.position == 48
    walk(command=command)  # this stage ends with value 4
    assert read_info(folder / "network-snapshot.safetensors")["metrics"] == {"fd_lite0": 4.0}
    assert (folder / "best_model.safetensors").read_bytes() == best


def test_a_ladder_can_start_on_a_network_file(tmp_path):
    config = PRESETS["digits-8"]()
    save_network(tmp_path / "stem.safetensors", Generator(config.generator))
    output = walk("--path_stem", "stem.safetensors")
    assert not (tmp_path / "runs" / "digits" / "digits-8").exists()
    above = load_network(tmp_path / "runs" / "digits" / "digits-16" / "best_model.safetensors")
    assert above.img_resolution == 16 and "digits-8 " not in output
    message = refusal(tmp_path, "--path_stem", "runs/digits/digits-16/best_model.safetensors")
    assert "makes 16x16 images already; --ladder digits ends there" in message


def test_a_finished_ladder_needs_neither_the_stages_below_nor_their_data(tmp_path):
    walk()
    shutil.rmtree(tmp_path / "runs" / "digits" / "digits-8")
    output = walk("--data", "gone_{resolution}.zip")
    assert (
        "Stage digits-8: not needed, skipped." in output and "Stage digits-16: finished, skipped." in output
    )
    assert not (tmp_path / "runs" / "digits" / "digits-8").exists()


def test_data_of_each_resolution(tmp_path, write_dataset):
    for side in SIDES:
        write_labelled(write_dataset, f"my{side}.zip", side)
    walk("--data", "my{resolution}.zip")
    for side in SIDES:
        text = (tmp_path / "runs" / "digits" / f"digits-{side}" / "training_options.json").read_text()
        assert json.loads(text)["data"]["path"] == f"my{side}.zip"


def write_labelled(write_dataset, name: str, side: int):
    rng = np.random.default_rng(side)
    files = {
        f"{i}.png": Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for i in range(10)
    }
    return write_dataset(name, files, {file: i for i, file in enumerate(files)})


# The table alone.


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path):
    output = walk("--data", "absent_{resolution}.zip", "--dry-run", "--batch-gpu", "4", "--loss", "gan")
    assert list(tmp_path.iterdir()) == []
    assert "Ladder digits in runs/digits" in output and output.rstrip().endswith(
        "nothing was trained or written."
    )
    row = next(line for line in output.splitlines() if "digits-16" in line)
    assert re.split(r" {2,}", row)[1:4] == ["16x16", "-3 +5", "= 8"] and row.endswith("to do")
    assert re.search(r" 16  +4  +0.064  to do", row)
    along = walk("--dry-run", "--train-stem-input", "1", "--batch-gpu", "4", "--loss", "gan")
    row_along = next(line for line in along.splitlines() if "digits-16" in line)
    assert re.split(r" {2,}", row_along)[:5] == re.split(r" {2,}", row)[:5]
    assert re.split(r" {2,}", row_along)[5] != re.split(r" {2,}", row)[5]  # trained parameters


def test_a_dry_run_with_a_stem_that_is_not_there():
    output = walk("--path_stem", "imagenet128.pkl", "--dry-run")
    assert "Note: --path_stem imagenet128.pkl is not there" in output
    assert "digits-16" in output and "digits-8 " not in output


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kimg", "5"], "--kimg with --ladder: every stage has its own"),
        (["--cfg", "stylegan3-t"], "--cfg with --ladder"),
        (["--preset", "quickstart"], "--preset with --ladder"),
        (["--superres"], "--superres with --ladder"),
        (["--map-depth", "3"], "--map-depth with --ladder"),
        (["--head_layers", "3"], "--head_layers with --ladder"),
        (["--cond", "0"], "--cond with --ladder"),
        (["--batch-gpu", "5"], "--batch 16 is not a multiple of --batch-gpu x processes = 5 x 1 = 5"),
        (["--data", "digits"], "--data digits is one file, but 2 stages need images of their own size"),
        (["--data", "absent_{resolution}.zip"], "absent_8.zip: no such file or folder"),
        (["--path_stem", "absent.safetensors"], "absent.safetensors"),
        (["--metrics", "fd_lite1"], "metric 'fd_lite1' is not available"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(tmp_path, arguments, message):
    assert message in refusal(tmp_path, *arguments)


def test_data_of_another_size_is_refused_before_anything_is_trained(tmp_path, write_dataset):
    write_labelled(write_dataset, "my8.zip", 8)
    write_labelled(write_dataset, "my16.zip", 32)
    message = refusal(tmp_path, "--data", "my{resolution}.zip")
    assert (
        "my16.zip has 32x32 images, but stage digits-16 needs 16x16" in message
        and "--resolution 16x16" in message
    )


def test_another_configuration_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 48)
        run()
    message = refusal(tmp_path, "--loss", "gan")
    assert "digits-8 was trained with loss=san, and this command asks for gan" in message
    walk("--batch-gpu", "8", "--tick", "0.032")  # how it is carried out may change
    assert "loss=san" in refusal(tmp_path, "--loss", "gan")


def test_an_unknown_ladder_is_refused(tmp_path):
    result = run(command=("--ladder", "celeba"))
    assert (
        result.exit_code == 2 and "'celeba' is not one of 'digits', 'digits-16', 'cifar10'" in result.output
    )


def test_a_snapshot_without_a_state_is_not_overwritten(tmp_path):
    G = Generator(PRESETS["digits-8"]().generator)
    save_network(tmp_path / "runs/digits/digits-8/network-snapshot.safetensors", G, info={"cur_nimg": 16})
    result = run()
    assert result.exit_code == 1 and "has networks but no complete state" in result.output
