# SPDX-License-Identifier: MIT
"""--resume auto and --resume RUN_FOLDER: which run goes on, with which settings, and that it is the same run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import train
from training.config import ConfigError
from training.durations import parse_duration
from training.resume import Resume, newest_run, parse_resume
from training.run_log import claim_run_dir
from training.run_options import RunOptions

pytestmark = pytest.mark.usefixtures("process_settings")
COMMAND = shlex.split("""--cfg dcgan --objective hinge --data digits --cond 1 --cbase 4 --cmax 8 --batch 16 --tick 0.032
    --checkpoint 1 --snap 2 --metrics none --workers 0 --device cpu --outdir runs""")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*flags: str, command: list[str] = COMMAND) -> Result:
    return CliRunner().invoke(train.main, [*command, *flags])


def finish(*flags: str, command: list[str] = COMMAND) -> str:
    result = run(*flags, command=command)
    assert result.exit_code == 0, result.output
    return result.output


def stop_early(*flags: str) -> str:
    """Stops before the first iteration, as no time is left for one."""
    result = run("--kimg", "0.128", "--time-limit", "0.01", *flags)
    assert result.exit_code == 75, result.output
    return result.output


def images_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["cur_nimg"] for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def states_of(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("state-*.pt"))


def moving_parts(run_dir: Path) -> dict:
    state = torch.load(states_of(run_dir)[-1], weights_only=True)
    state["others"]["clock"].pop("total_seconds")
    return {name: state[name] for name in ("networks", "optimizers", "others")}


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_longer_run_in_two_parts_is_the_run_in_one() -> None:
    finish("--kimg", "0.128", "--desc", "whole")
    finish("--kimg", "0.08", "--desc", "parts")
    output = finish("--kimg", "0.128", "--desc", "parts", "--resume", "auto")
    whole, parts = sorted(Path("runs").iterdir())
    assert "Continued at 0.08 kimg from" in output and "total_kimg 0.08 -> 0.128" in output
    assert_equal(moving_parts(whole)["networks"], moving_parts(parts)["networks"])
    assert_equal(moving_parts(whole)["optimizers"], moving_parts(parts)["optimizers"])
    assert images_of(parts) == [16, 48, 80, 112, 128]


def test_auto_starts_a_run_and_then_goes_on_with_it() -> None:
    stop_early("--resume", "auto")
    (run_dir,) = Path("runs").iterdir()
    finish("--kimg", "0.128", "--resume", "auto")
    assert list(Path("runs").iterdir()) == [run_dir] and images_of(run_dir)[-1] == 128
    again = finish("--kimg", "0.128", "--resume", "auto")  # it has ended: nothing is left to do
    assert images_of(run_dir)[-1] == 128 and "tick" not in again.partition("Continued")[2]
    finish("--kimg", "0.032", "--resume", "auto", "--seed", "1", "--desc", "other")
    assert len(list(Path("runs").iterdir())) == 2


def test_a_run_folder_needs_no_other_flags() -> None:
    stop_early("--kimg", "0.064")
    (run_dir,) = Path("runs").iterdir()
    output = finish(command=["--resume", str(run_dir), "--device", "cpu"])
    assert images_of(run_dir) == [16, 48, 64] and "Warning" not in output
    changed = finish(
        command=["--resume", str(run_dir), "--device", "cpu", "--kimg", "0.096", "--glr", "0.0001"]
    )
    assert (
        "this is no longer the same run: generator_optimizer.lr 0.0002 -> 0.0001 from 0.064 kimg on"
        in changed
    )
    stored = json.loads((run_dir / "training_options.json").read_text())
    assert stored["generator_optimizer"]["lr"] == 0.0001 and images_of(run_dir)[-1] == 96


def test_refusals_leave_everything_as_it_was() -> None:
    stop_early()
    (run_dir,) = Path("runs").iterdir()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for flags, message in (
        (["--resume", str(run_dir), "--cbase", "8"], "networks or data do not fit"),
        (["--resume", str(run_dir), "--loss", "gan"], "was trained with loss=san"),
        (["--resume", str(run_dir), "--data", "digits8"], "do not fit"),
        (["--resume", "runs"], "runs is a folder without training_options.json, so not of a run"),
    ):
        result = run("--kimg", "0.128", *flags)
        assert result.exit_code == 1 and message in result.output, result.output
        assert "Traceback" not in result.output
    result = run("--resume", str(run_dir), "--cbase", "8", command=[])
    assert result.exit_code == 1 and "cbase=8 with --resume" in result.output
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_all_states_damaged_is_said() -> None:
    stop_early()
    (run_dir,) = Path("runs").iterdir()
    for path in states_of(run_dir):
        path.write_bytes(b"nothing")
    result = run("--kimg", "0.128", "--resume", "auto")
    assert result.exit_code == 1 and "none of the 1 states in it can be used" in result.output


def test_two_runs_in_one_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run_log.LOCK_TIMEOUT_S", 0.1)
    stop_early()
    (run_dir,) = Path("runs").iterdir()
    _, lock = claim_run_dir(RunOptions(outdir="runs"), run_dir)
    result = run("--kimg", "0.128", "--resume", str(run_dir))
    assert result.exit_code == 1 and "another process trains in this folder" in result.output
    lock.release()
    finish("--kimg", "0.128", "--resume", str(run_dir))


def test_dry_run_says_which_run_would_go_on() -> None:
    stop_early()
    (run_dir,) = Path("runs").iterdir()
    assert f"Would go on with {run_dir}." in finish("--kimg", "0.128", "--resume", "auto", "--dry-run")


def test_what_a_value_means(tmp_path: Path) -> None:
    assert parse_resume(None) == Resume()
    assert parse_resume("auto") == Resume(is_auto=True)
    assert parse_resume("auto,a.pkl") == Resume(is_auto=True, network="a.pkl")
    assert parse_resume("a.pkl") == parse_resume("a.pkl") == Resume(network="a.pkl")
    (tmp_path / "digits").mkdir()  # the built-in network, even beside a folder of that name
    assert parse_resume("digits") == Resume(network="digits")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="not of a run"):
        parse_resume("run")
    (tmp_path / "run" / "training_options.json").write_text("{}")
    assert parse_resume("run") == Resume(run_dir=Path("run"))


def test_the_newest_run_of_a_command_whatever_the_processes(tmp_path: Path) -> None:
    for name in (
        "00001-san-x-gpus1-batch8",
        "00004-san-x-gpus8-batch8",
        "00005-gan-x-gpus1-batch8",
        "00006-san-x",
    ):
        (tmp_path / name).mkdir()
        if "00006" not in name:
            (tmp_path / name / "training_options.json").write_text("{}")
    assert newest_run(str(tmp_path), "san-x-gpus2-batch8").name == "00004-san-x-gpus8-batch8"
    assert newest_run(str(tmp_path), "san-y-gpus2-batch8") is None
    assert newest_run(str(tmp_path / "absent"), "san-x") is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("90m", 5400), ("1d", 86400), ("45", 45), ("1h1s", 3601)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3x", "m", "-5", "1.5.5h", "0m"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        parse_duration(text)
