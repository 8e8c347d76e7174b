# SPDX-License-Identifier: MIT
"""--precision and --feature-precision on train.py's command line, in runs that go on, and in the benchmark's table."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from training.config import TrainConfig, from_json, to_json
from training.dataset import open_dataset
from training.discriminator import kinds
from training.network_io import read_network
from training.presets import quickstart
from training.run_options import RunOptions
from training.training_loop import Trainer

pytestmark = pytest.mark.usefixtures("process_settings")
QUICKSTART = ("--preset", "quickstart", "--embedding", "random", "--device", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(*arguments: object) -> tuple[TrainConfig, str]:
    """The configuration that is printed, and what is said after it."""
    result = CliRunner().invoke(train.main, [str(a) for a in (*arguments, "--dry-run")])
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end]), result.output[end:]


def test_the_flags_are_recorded_and_the_network_stays() -> None:
    plain, _ = dry_run(*QUICKSTART)
    assert (plain.precision, plain.feature_precision) == ("paper", "paper")
    config, _ = dry_run(*QUICKSTART, "--precision", "bf16", "--feature-precision", "bf16")
    assert config == replace(plain, precision="bf16", feature_precision="bf16")
    assert dry_run(*QUICKSTART, "--precision", "fp32")[0] == replace(plain, precision="fp32")


def test_fp32_is_precision_and_a_network_without_half_precision() -> None:
    flags = ("--cfg", "stylegan3-t", "--data", "digits", "--batch", "8", "--device", "cpu")
    for also in ((), ("--precision", "fp32")):
        config, _ = dry_run(*flags, "--fp32", "1", *also)
        assert config.precision == "fp32"
        assert (config.generator.synthesis.num_fp16_res, config.generator.synthesis.conv_clamp) == (0, None)
    config, _ = dry_run(*flags, "--precision", "fp32")  # a way to run it only
    assert (config.generator.synthesis.num_fp16_res, config.generator.synthesis.conv_clamp) == (4, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fp32", "1", "--precision", "bf16"), "--fp32 1 and --precision bf16 contradict each other"),
        (("--fp32", "0", "--precision", "fp32"), "--fp32 0 and --precision fp32 contradict each other"),
        (
            ("--precision", "fp16"),
            "--precision fp16 needs a CUDA GPU, and this run is on cpu; use --precision",
        ),
        (("--feature-precision", "tf32"), "--feature-precision tf32: --device cpu has no TF32"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], message: str, error_line) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert message in error_line(train.main, *QUICKSTART, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flag", "lack"), [("precision", "half precision"), ("feature-precision", "pretrained")]
)
def test_dcgan_has_neither(flag: str, lack: str, error_line) -> None:
    line = error_line(train.main, "--cfg", "dcgan", "--data", "digits", f"--{flag}", "bf16")
    assert f"--{flag} has no effect: --cfg dcgan has no {lack}" in line


def test_ladders_take_both() -> None:
    arguments = [
        "--ladder",
        "digits",
        "--precision",
        "bf16",
        "--feature-precision",
        "bf16",
        "--device",
        "cpu",
        "-n",
    ]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 0, result.output


# A run that goes on, and one that starts from its file.


@pytest.fixture
def train_to(tiny_generator_config, tiny_discriminator_config, monkeypatch):
    """train_to(kimg, run_dir, **modes): a run of two-image steps; feature networks have the seed's random weights."""

    def build(cfg, head_kind):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return kinds.ProjectedDiscriminator(cfg, head_kind, pretrained=False)

    monkeypatch.setattr("training.initialization.new_discriminator", build)
    dataset = open_dataset("digits", use_labels=True)

    def run(kimg: float, run_dir: Path, **modes: str) -> Path:
        config = replace(
            quickstart(),
            generator=tiny_generator_config(10, num_fp16_res=0),
            discriminator=tiny_discriminator_config(10),
            embedding_source="random",
            batch_size=4,
            microbatch_size=4,
            total_kimg=kimg,
            tick_kimg=0.004,
            metrics=(),
            evaluate_at_start=False,
            **modes,
        )
        Trainer(config, dataset, CPU, RunOptions(), run_dir).fit()
        return run_dir

    return run


@pytest.mark.parametrize("modes", [{"precision": "bf16"}, {"feature_precision": "bf16"}])
def test_a_run_goes_on_in_another_precision(train_to, tmp_path: Path, modes: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train_to(0.008, run_dir)
    train_to(0.016, run_dir, **modes)
    ((name, value),) = modes.items()
    log = (run_dir / "log.txt").read_text()
    assert f"Warning: this is no longer the same run: {name} paper -> {value} from 0.008 kimg on" in log
    assert from_json(TrainConfig, (run_dir / "training_options.json").read_text()).total_kimg == 0.016
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["cur_nimg"] == 16
    assert all(
        line["Health/nonfinite_G"]["mean"] == line["Health/nonfinite_D"]["mean"] == 0 for line in lines
    )
    stored = read_network(str(run_dir / "network-snapshot.safetensors"))
    tensors = [*stored.G_ema.values(), *stored.G.values(), *stored.D.values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}


def test_flags_of_a_run_that_goes_on(train_to, tmp_path: Path) -> None:
    """As the command line has it, without the whole command: the run's own precision, or a new one."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train_to(0.008, run_dir, precision="bf16")
    config, _ = dry_run("--resume", run_dir, "--device", "cpu")
    assert (config.precision, config.feature_precision) == ("bf16", "paper")
    config, _ = dry_run(
        "--resume", run_dir, "--device", "cpu", "--precision", "paper", "--feature-precision", "bf16"
    )
    assert (config.precision, config.feature_precision) == ("paper", "bf16")


def test_a_network_file_hands_no_precision_on(train_to, tmp_path: Path) -> None:
    """It may come from another machine."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train_to(0.008, run_dir, precision="bf16")
    file = run_dir / "network-snapshot.safetensors"
    assert read_network(str(file)).train_config.precision == "bf16"  # told, as a part of its history
    config, _ = dry_run("--resume", file, "--device", "cpu")
    assert config.precision == "paper"


def test_options_of_older_runs_can_be_read() -> None:
    values = json.loads(to_json(quickstart()))
    del values["precision"], values["feature_precision"]
    assert from_json(TrainConfig, json.dumps(values)) == quickstart()


# The benchmark.


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "precision.py"
    spec = importlib.util.spec_from_file_location("precision_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_table_of_modes(benchmark) -> None:
    flags = shlex.split("--preset cifar10-16 --tiny --random-features --batch 4 --repeats 1 --device cpu")
    result = CliRunner().invoke(benchmark.main, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {}
    for line in result.output.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].split()[0] in ("paper", "fp32", "bf16", "fp16"):
            rows[tuple(cells[0].split())] = [float(cell) for cell in cells[1:]]
    assert set(rows) == {
        ("paper", "paper"),
        ("fp32", "paper"),
        ("bf16", "paper"),
        ("fp32", "bf16"),
        ("bf16", "bf16"),
    }
    assert (
        "left out: --precision fp16" in result.output
        and "left out: --feature-precision tf32" in result.output
    )
    for (precision, features), (image_max, image_rms, dI, norm_dI, dG, norm_dG, ms_G, ms_D) in rows.items():
        assert (image_rms > 1e-4) == (precision == "bf16") and image_rms < image_max < 0.2
        assert (dI < 1e-6) == (dG < 1e-6) == (precision != "bf16" and features == "paper")
        assert max(dI, dG) < 0.2 and 0.8 < norm_dI < 1.2 and 0.8 < norm_dG < 1.2
        assert ms_G > 0 and ms_D > 0


def test_unknown_modes_are_refused(benchmark) -> None:
    result = CliRunner().invoke(benchmark.main, ["--modes", "bf16/fp8"])
    assert result.exit_code == 2 and "'bf16/fp8' is not one of paper/paper" in result.output
