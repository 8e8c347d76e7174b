# SPDX-License-Identifier: MIT
"""Whole runs, a few steps long: every artefact, the same weights for the same seed, fine-tuning, GAN and SAN."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import train
from metrics import evaluate
from metrics.evaluate import MetricResult
from torch_utils.errors import UserError
from training.config import LossConfig, TrainConfig, from_json
from training.dataset import open_dataset
from training.network_io import load_network, read_network
from training.presets import quickstart
from training.run_log import create_run_dir
from training.run_options import RunOptions
from training.snapshot import SampleGrid
from training.training_loop import Trainer

pytestmark = pytest.mark.usefixtures("process_settings")
CPU = torch.device("cpu")
COMMAND = shlex.split("""--loss san --preset quickstart --device cpu --kimg 0.064 --tick 0.032 --snap 1 --batch 16
    --embedding random""")
METRIC_VALUES = (5.0, 7.0)  # of the two snapshots: the first is the better
DIGITS_HASH = "18c13031fd3cd65a"  # content hash of the built-in set


# The command line, once: all artefacts.


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(run folder, output of the command, inputs that the metric was called with)."""
    outdir, calls = tmp_path_factory.mktemp("runs"), []
    start = [50.0] if quickstart().evaluate_at_start else []
    values = iter([*start, *METRIC_VALUES])

    def cheap_metric(names, reference, sources, *_, **__):
        calls.append((reference.count, sources.generate(range(3))))
        return {name: MetricResult({name: next(values)}, {}) for name in names}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", cheap_metric)
        result = CliRunner().invoke(train.main, [*COMMAND, "--outdir", str(outdir)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (run_dir,) = outdir.iterdir()
    return run_dir, result.output, calls[len(start) :]


def test_run_folder_holds_every_artefact(command):
    run_dir, output, _ = command
    assert run_dir.name == "00000-san-quickstart-digits-gpus1-batch16"
    names = {path.name for path in run_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "training_options.json",
        "log.txt",
        "stats.jsonl",
        "reals.png",
        "fakes_init.png",
        "fakes000000.png",
        "metric-fd_lite0.jsonl",
        "best_model.safetensors",
        "network-snapshot.safetensors",
        "checkpoints",
        ".lock",
    }
    states = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert states == ["state-000000048.pt", "state-000000064.pt"]
    summary = output[output.index("Done. Results:") :]
    for name in names - events - {"network-snapshot.safetensors", "checkpoints", ".lock"}:
        assert name in summary


def test_training_options_can_be_read(command):
    config = from_json(TrainConfig, (command[0] / "training_options.json").read_text())
    assert (config.total_kimg, config.batch_size, config.loss) == (0.064, 16, "san")
    assert command[1].startswith((command[0] / "training_options.json").read_text())


def test_statistics(command):
    lines = [json.loads(line) for line in (command[0] / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"]["mean"] for line in lines] == pytest.approx([0.016, 0.048, 0.064])
    assert [line["Progress/tick"]["mean"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["timestamp"] > 1.6e9
        for name in (
            *(f"Loss/{part}" for part in ("scores/fake", "scores/real", "signs/fake", "signs/real")),
            *("Loss/G/loss", "Loss/D/loss", "Progress/tick", "Progress/kimg", "Resources/cpu_mem_gb"),
            *("Timing/total_sec", "Timing/sec_per_tick", "Timing/sec_per_kimg"),
            *("Health/nonfinite_G", "Health/nonfinite_D", "Health/gradient_norm_G", "Timing/data_wait"),
        ):
            moments = line[name]
            assert set(moments) == {"num", "mean", "std"}
            assert moments["num"] >= 1 and np.isfinite([moments["mean"], moments["std"]]).all()
        assert line["Health/nonfinite_G"]["mean"] == 0
        assert -1 <= line["Loss/signs/fake"]["mean"] <= 1
    assert [line["Loss/G/loss"]["num"] for line in lines] == [1, 2, 1]
    num_logits = [line["Loss/scores/real"]["num"] for line in lines]
    assert num_logits[1] == 2 * num_logits[0] and lines[0]["Loss/scores/fake"]["num"] == 2 * num_logits[0]


def test_tensorboard_events(command):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(command[0])).Reload()
    assert {"Loss/G/loss", "Loss/D/loss", "Metrics/fd_lite0"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("Loss/D/loss")] == [16, 48, 64]


def test_log(command):
    text = (command[0] / "log.txt").read_text()
    assert re.findall(r"^tick (\d+) ", text, flags=re.MULTILINE) == ["0", "1", "2"]
    assert (
        f"Training on digits (content {DIGITS_HASH}) on cpu.\nNetworks start from random weights." in text
        and "fd_lite0 5 at 0.048 kimg" in text
    )
    assert "Warning" not in text


def test_metric_lines(command):
    run_dir, _, calls = command
    lines = [json.loads(line) for line in (run_dir / "metric-fd_lite0.jsonl").read_text().splitlines()][-2:]
    for line, value, cur_nimg in zip(lines, METRIC_VALUES, (48, 64), strict=True):
        assert line["results"] == {"fd_lite0": value} and line["metric"] == "fd_lite0"
        assert line["cur_nimg"] == cur_nimg and line["snapshot_pkl"] == "network-snapshot.safetensors"
        assert line["total_time"] >= 0 and line["timestamp"] > 1.6e9
    assert [count for count, _ in calls] == [1797, 1797]
    for _, images in calls:
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert not torch.equal(calls[0][1], calls[1][1])


def test_the_best_network_is_kept(command):
    latest, best = (
        read_network(command[0] / name) for name in ("network-snapshot.safetensors", "best_model.safetensors")
    )
    data = {"data_name": "digits", "content_hash": DIGITS_HASH, "class_names": list("0123456789")}
    assert latest.info == {"cur_nimg": 64, "metrics": {"fd_lite0": 7.0}, **data}
    assert best.info == {"cur_nimg": 48, "metrics": {"fd_lite0": 5.0}, **data}
    assert not torch.equal(latest.G["synthesis.input.weight"], best.G["synthesis.input.weight"])
    assert latest.train_config == from_json(TrainConfig, (command[0] / "training_options.json").read_text())
    assert latest.D and not any(".backbone." in name for name in latest.D)


def test_pictures_have_a_row_per_class(command, tmp_path):
    run_dir = command[0]
    pictures = {name: load_pixels(run_dir / f"{name}.png") for name in ("reals", "fakes_init", "fakes000000")}
    assert {picture.shape for picture in pictures.values()} == {(10 * 16, 16 * 16, 3)}
    assert (pictures["fakes_init"] != pictures["fakes000000"]).any()
    dataset = open_dataset("digits", use_labels=True)
    tiles = pictures["reals"].reshape(10, 16, 16, 16, 3).transpose(0, 2, 4, 1, 3)  # row, column, C, H, W
    images, labels = dataset.batch(range(len(dataset)))
    for digit, row in enumerate(tiles):
        of_digit = {image.numpy().tobytes() for image in images[labels == digit]}
        assert all(np.ascontiguousarray(tile).tobytes() in of_digit for tile in row)
    G_ema = load_network(run_dir / "network-snapshot.safetensors")
    SampleGrid(dataset, G_ema.z_dim, CPU).save_fakes(tmp_path / "again.png", G_ema)
    np.testing.assert_array_equal(load_pixels(tmp_path / "again.png"), pictures["fakes000000"])


def load_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# The trainer on a smaller configuration.


@pytest.fixture(scope="module")
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> Callable[..., TrainConfig]:
    """tiny_config(**changes): four iterations of 8 of the digits, on tiny networks."""
    config = replace(
        quickstart(),
        generator=tiny_generator_config(10, num_fp16_res=0),
        discriminator=tiny_discriminator_config(10, max_head_channels=16),
        embedding_source="random",
        batch_size=8,
        microbatch_size=4,
        total_kimg=0.032,
        tick_kimg=0.016,
        snapshot_ticks=0,
        metrics=(),
        evaluate_at_start=False,
    )
    return lambda **changes: replace(config, **changes)


def unconditional(config: TrainConfig) -> TrainConfig:
    generator = replace(config.generator, mapping=replace(config.generator.mapping, c_dim=0))
    discriminator = replace(config.discriminator, c_dim=0)
    data = replace(config.data, use_labels=False, mirror=True)
    return replace(config, generator=generator, discriminator=discriminator, data=data)


def run(config: TrainConfig, run_dir: Path) -> Path:
    data = config.data
    dataset = open_dataset(data.path, use_labels=data.use_labels, mirror=data.mirror, seed=data.seed)
    trainer = Trainer(config, dataset, CPU, RunOptions(outdir=str(run_dir), description="test"))
    trainer.fit()
    return trainer.run_dir


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    stored = read_network(run_dir / "network-snapshot.safetensors")
    return {
        f"{kind}.{name}": value
        for kind in ("G_ema", "G", "D")
        for name, value in getattr(stored, kind).items()
    }


def losses_of(run_dir: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [(line["Loss/G/loss"]["mean"], line["Loss/D/loss"]["mean"]) for line in lines]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_config) -> Path:
    return run(tiny_config(), tmp_path_factory.mktemp("tiny") / "run")


def test_without_snapshots_there_is_one_at_the_end(tiny_run):
    assert {path.name for path in tiny_run.glob("*.png")} == {
        "reals.png", "fakes_init.png", "fakes000000.png"
    }  # fmt: skip
    assert not list(tiny_run.glob("metric-*"))
    names = ("network-snapshot", "best_model")
    assert [read_network(tiny_run / f"{n}.safetensors").info["cur_nimg"] for n in names] == [32, 32]


def test_the_same_seed_gives_the_same_weights(tiny_run, tmp_path, tiny_config):
    torch.rand(7)  # what came before does not matter
    again = run(tiny_config(), tmp_path / "again")
    expected, actual = tensors_of(tiny_run), tensors_of(again)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert losses_of(again) == losses_of(tiny_run)
    assert (again / "fakes000000.png").read_bytes() == (tiny_run / "fakes000000.png").read_bytes()


def test_another_seed_gives_others(tiny_run, tmp_path, tiny_config):
    other = run(tiny_config(seed=1, total_kimg=0.008), tmp_path / "other")
    assert losses_of(other)[0] != losses_of(tiny_run)[0]


def test_every_network_was_trained(tiny_run, tmp_path, tiny_config):
    start = run(tiny_config(total_kimg=0.008), tmp_path / "start")
    before, after = tensors_of(start), tensors_of(tiny_run)
    same = {name for name in before if torch.equal(before[name], after[name])}
    # G_ema's buffers and weights follow G; projections, filters and constants stay.
    trained = {name for name in before if name.startswith(("G.", "G_ema.")) and name.endswith("weight")}
    trained |= {name for name in before if name.startswith("D.heads.")}
    assert not trained & same
    assert all(name in same for name in before if name.startswith("D.projectors."))
    assert not torch.equal(after["G.synthesis.input.weight"], after["G_ema.synthesis.input.weight"])


def test_resume_starts_from_the_file(tiny_run, tmp_path, tiny_config):
    path = tiny_run / "network-snapshot.safetensors"
    resumed = run(tiny_config(resume=str(path), ema_rampup=None, total_kimg=0.008, seed=5), tmp_path / "run")
    assert (resumed / "fakes_init.png").read_bytes() == (tiny_run / "fakes000000.png").read_bytes()
    log = (resumed / "log.txt").read_text()
    assert f"Starting from {path}: 16x16, 10 classes, SAN discriminator." in log
    assert " loaded " in log and "converted" not in log and "re-initialised" not in log
    before, after = tensors_of(tiny_run), tensors_of(resumed)
    for name in ("D.projectors.tf_efficientnet_lite0.ccm.0.weight", "G_ema.synthesis.input.freqs"):
        assert torch.equal(before[name], after[name])  # random in a fresh run
    moved = (after["G_ema.synthesis.input.weight"] - before["G_ema.synthesis.input.weight"]).abs().max()
    assert 0 < moved < 1e-2


def test_a_plain_gan_trains_too(tiny_run, tmp_path, tiny_config):
    gan = run(tiny_config(loss="gan"), tmp_path / "gan")
    assert np.isfinite(losses_of(gan)).all()
    san_names, gan_names = tensors_of(tiny_run).keys(), tensors_of(gan).keys()
    assert {n for n in san_names if n.endswith("last.embed.scale")}
    assert not {n for n in gan_names if n.endswith("last.embed.scale")}


def test_unconditional_with_path_length_and_style_mixing(tmp_path, tiny_config):
    terms = LossConfig(pl_weight=2.0, pl_start_kimg=0.016, style_mixing_prob=0.9)
    optimizer = replace(quickstart().generator_optimizer, reg_interval=2)
    config = unconditional(tiny_config(loss_terms=terms, generator_optimizer=optimizer, total_kimg=0.048))
    run_dir = run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    # Six iterations; path length from the third on, every second one: iterations 2 and 4, two micro-batches each.
    num_updates = [line["Loss/G/reg"]["num"] if "Loss/G/reg" in line else 0 for line in lines]
    assert [line["Progress/kimg"]["mean"] for line in lines] == pytest.approx([0.008, 0.024, 0.04, 0.048])
    assert num_updates == [0, 2, 2, 0]
    columns, rows = 32, 32  # StyleGAN's grid of 16x16 images
    assert load_pixels(run_dir / "reals.png").shape == (rows * 16, columns * 16, 3)


def test_a_fault_found_while_building_leaves_no_folder(tmp_path, tiny_config):
    with pytest.raises(UserError, match="does not exist"):
        run(tiny_config(resume=str(tmp_path / "absent.safetensors")), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_missing_guidance_weights_leave_no_folder(tmp_path, monkeypatch, tiny_config):
    def pretrained():
        raise UserError("no pretrained weights")

    monkeypatch.setattr("training.initialization.GuidanceClassifier.pretrained", pretrained)
    with pytest.raises(UserError, match="no pretrained weights"):
        run(tiny_config(loss_terms=LossConfig(cls_weight=8.0)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Run folders.


def test_run_folders_are_numbered(tmp_path):
    for name in ("00000-foo", "00007-bar", "notes", "12.txt"):
        (tmp_path / name).mkdir()
    assert create_run_dir(str(tmp_path), "a b/c:d").name == "00013-a_b_c_d"
    assert create_run_dir(str(tmp_path / "new" / "deep"), "x").name == "00000-x"


def test_outdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create a run folder"):
        create_run_dir(str(tmp_path / "file"), "x")
