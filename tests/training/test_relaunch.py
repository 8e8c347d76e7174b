# SPDX-License-Identifier: MIT
"""Processes that torchrun starts again find their run folder; other launches do not."""

import pytest

from training import relaunch
from training.launch import rank_variables
from training.relaunch import remember_run_folder, run_folder_of_launch


@pytest.fixture
def launched(monkeypatch):
    def set_variables(run_id: str | None, attempt: int = 0) -> None:
        for name, value in rank_variables(0, 2, 29500).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        if run_id is None:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        else:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)

    return set_variables


def test_second_attempt_goes_on(tmp_path, launched):
    run_dir = tmp_path / "00003-san"
    run_dir.mkdir()
    launched("job/17")
    assert run_folder_of_launch(tmp_path) is None
    remember_run_folder(tmp_path, run_dir)
    launched("job/17", attempt=1)
    assert run_folder_of_launch(tmp_path) == run_dir.resolve()
    launched("job/18", attempt=1)
    assert run_folder_of_launch(tmp_path) is None


def test_same_agent_goes_on_though_nothing_failed(tmp_path, launched):
    """When a machine joins, torchrun starts all processes anew and does not count it."""
    launched("job")
    remember_run_folder(tmp_path, tmp_path)
    assert run_folder_of_launch(tmp_path) == tmp_path.resolve()


def test_id_of_an_older_launch_proves_nothing(tmp_path, launched, monkeypatch):
    launched("none")  # torch's default
    monkeypatch.setattr(relaunch, "_agent", lambda: "another")
    remember_run_folder(tmp_path, tmp_path)
    monkeypatch.undo()
    launched("none")
    assert run_folder_of_launch(tmp_path) is None


def test_without_torchrun_nothing_is_written(tmp_path, launched):
    launched(None)
    remember_run_folder(tmp_path, tmp_path)
    assert run_folder_of_launch(tmp_path) is None and not list(tmp_path.iterdir())


def test_folder_that_is_gone(tmp_path, launched):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    launched("job")
    remember_run_folder(tmp_path, run_dir)
    run_dir.rmdir()
    assert run_folder_of_launch(tmp_path) is None
