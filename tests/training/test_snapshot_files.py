# SPDX-License-Identifier: MIT
"""Network files of a run: which are written when, that one network is stored once, and disks that refuse."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import snapshot as snapshot_module
from training.dataset import open_dataset
from training.discriminator.kinds import new_discriminator
from training.generator.kinds import new_generator
from training.network_io import read_info
from training.presets import dcgan
from training.run_log import RunLog
from training.snapshot import Snapshots

SNAPSHOT, BEST = "network-snapshot.safetensors", "best_model.safetensors"
Save = Callable[..., bool]


@pytest.fixture
def make_snapshots(tmp_path: Path) -> Callable[..., tuple[Snapshots, Save]]:
    """make_snapshots(folder, **fields) -> the snapshots of a tiny run in a folder, and save(cur_nimg, **metrics)."""

    def make(folder: Path = tmp_path, **fields: object) -> tuple[Snapshots, Save]:
        config = dcgan("nonsaturating")
        config = replace(
            config,
            generator=replace(config.generator, img_resolution=8, channel_base=8, z_dim=16),
            discriminator=replace(config.discriminator, img_resolution=8, channel_bases=(8,)),
        )
        G, D = new_generator(config.generator), new_discriminator(config.discriminator, config.loss)
        dataset, log = open_dataset("digits8"), RunLog(folder, 1.0)
        snapshots = Snapshots(config, folder, dataset, log, torch.device("cpu"), **fields)

        def save(cur_nimg: int, **metrics: float) -> bool:
            return snapshots.save(G, D, G, cur_nimg, metrics)

        return snapshots, save

    return make


def network_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_one_network_is_stored_once_and_best_stays(make_snapshots, tmp_path: Path) -> None:
    _, save = make_snapshots()
    assert save(8, fd=5.0)
    assert os.path.samefile(tmp_path / SNAPSHOT, tmp_path / BEST)
    assert save(16, fd=7.0)
    assert read_info(tmp_path / SNAPSHOT)["cur_nimg"] == 16 and read_info(tmp_path / BEST)["cur_nimg"] == 8
    assert save(24, fd=4.0)
    assert read_info(tmp_path / BEST) == read_info(tmp_path / SNAPSHOT)
    assert network_files(tmp_path) == [BEST, SNAPSHOT]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([{"fd": 5.0}, {"fd": math.nan}, {"fd": 6.0}], 8),
        ([{"fd": math.nan}, {"fd": 6.0}, {"fd": 7.0}], 16),
        ([{"fd": 5.0}, {"other": 9.0, "fd": 7.0}, {"other": 10.0}], 16),  # of another metric nothing is known
        ([{}, {}, {}], 24),
    ],
)
def test_which_network_is_best(make_snapshots, tmp_path: Path, values: list[dict], best: int) -> None:
    _, save = make_snapshots()
    for cur_nimg, metrics in zip((8, 16, 24), values, strict=True):
        save(cur_nimg, **metrics)
    assert read_info(tmp_path / BEST)["cur_nimg"] == best


def test_a_best_value_without_a_name_is_that_of_the_run(make_snapshots, tmp_path: Path) -> None:
    _, save = make_snapshots(best_value=5.0)
    save(8, fd=6.0)
    assert network_files(tmp_path) == [SNAPSHOT]


def test_networks_are_kept_at_the_first_snapshot_after_every_multiple(make_snapshots, tmp_path: Path) -> None:
    snapshots, save = make_snapshots(keep_every_kimg=0.1)
    for cur_nimg in (40, 80, 120, 160, 200, 410):
        save(cur_nimg)
    kept = [name for name in network_files(tmp_path) if name.startswith("network-0")]
    assert kept == [f"network-{nimg:09d}.safetensors" for nimg in (120, 200, 410)]
    assert [read_info(tmp_path / name)["cur_nimg"] for name in kept] == [120, 200, 410]
    assert snapshots.next_kept_nimg() == 500


def test_state(make_snapshots) -> None:
    (first, save), (second, _) = make_snapshots(keep_every_kimg=0.01), make_snapshots(keep_every_kimg=0.01)
    save(16, fd=5.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.best_name, second.best_value, second.kept_nimg) == ("fd", 5.0, 16)


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "save_network"])
def test_a_disk_that_refuses_costs_a_warning(
    make_snapshots, tmp_path: Path, monkeypatch, capsys, place: str
) -> None:
    snapshots, save = make_snapshots(keep_every_kimg=0.01)
    save(8, fd=5.0)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = f"{snapshot_module.__name__}.{place}" if place == "save_network" else place
        patch.setattr(target, refuse)
        assert not save(16, fd=4.0)
    assert "Warning" in capsys.readouterr().out and snapshots.best_value == 5.0
    assert read_info(tmp_path / SNAPSHOT)["cur_nimg"] == read_info(tmp_path / BEST)["cur_nimg"] == 8
    assert save(24, fd=4.5)
    assert network_files(tmp_path) == [BEST, "network-000000024.safetensors", SNAPSHOT]
    assert read_info(tmp_path / BEST)["cur_nimg"] == 24


def test_a_disk_that_really_is_full(make_snapshots, small_disk: Path, capsys) -> None:
    _, save = make_snapshots(small_disk)
    assert save(8, fd=5.0)
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    assert not save(16, fd=4.0)
    assert "No space left on device" in capsys.readouterr().out
    assert read_info(small_disk / SNAPSHOT)["cur_nimg"] == read_info(small_disk / BEST)["cur_nimg"] == 8
    (small_disk / "filler").unlink()
    assert save(24, fd=4.0)
    assert not list(small_disk.glob(".*"))
