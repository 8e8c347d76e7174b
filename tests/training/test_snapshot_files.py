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

from metrics import evaluate
from metrics.detectors import MissingDetectorError
from training import snapshot as snapshot_module
from training.dataset import open_dataset
from training.discriminator.kinds import new_discriminator
from training.generator.kinds import new_generator
from training.metric_records import network_hash
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
    assert save(8, fd_lite0=5.0)
    assert os.path.samefile(tmp_path / SNAPSHOT, tmp_path / BEST)
    assert save(16, fd_lite0=7.0)
    assert read_info(tmp_path / SNAPSHOT)["cur_nimg"] == 16 and read_info(tmp_path / BEST)["cur_nimg"] == 8
    assert save(24, fd_lite0=4.0)
    assert read_info(tmp_path / BEST) == read_info(tmp_path / SNAPSHOT)
    assert network_files(tmp_path) == [BEST, SNAPSHOT]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([{"fd_lite0": 5.0}, {"fd_lite0": math.nan}, {"fd_lite0": 6.0}], 8),
        ([{"fd_lite0": math.nan}, {"fd_lite0": 6.0}, {"fd_lite0": 7.0}], 16),
        ([{"fd_lite0": 5.0}, {}, {"fd_lite0": 4.0}], 24),
        ([{"fd_lite0": 5.0}, {}, {"other": 1.0}], 8),  # not computed at this snapshot
        ([{}, {"fd_lite0": 5.0}, {}], 16),  # the first one stands in until there is a value
    ],
)
def test_which_network_is_best(make_snapshots, tmp_path: Path, values: list[dict], best: int) -> None:
    _, save = make_snapshots()
    for cur_nimg, metrics in zip((8, 16, 24), values, strict=True):
        save(cur_nimg, **metrics)
    assert read_info(tmp_path / BEST)["cur_nimg"] == best


def test_without_metrics_the_last_network_is_best(make_snapshots, tmp_path: Path) -> None:
    snapshots, save = make_snapshots()
    snapshots.config = replace(snapshots.config, metrics=())
    for cur_nimg in (8, 16, 24):
        save(cur_nimg)
    assert read_info(tmp_path / BEST)["cur_nimg"] == 24


@pytest.mark.parametrize(
    ("metrics", "best_by", "best"),
    [
        (("fid50k_full", "pr3_lite0:2"), None, 8),
        (("fid50k_full", "pr3_lite0:2"), "pr3_lite0_recall", 24),
        (("eqr50k", "fid50k_full"), None, 16),
        (("eqr50k", "fid50k_full"), "fid50k_full", 8),
    ],
)
def test_the_result_that_is_named_picks_the_best(
    make_snapshots, tmp_path: Path, metrics: tuple[str, ...], best_by: str | None, best: int
) -> None:
    """More precision is better, and less distance."""
    snapshots, save = make_snapshots()
    snapshots.config = replace(snapshots.config, metrics=metrics, best_by=best_by)
    for cur_nimg, value in zip((8, 16, 24), (20.0, 30.0, 25.0), strict=True):
        save(cur_nimg, fid50k_full=value, eqr50k=value, pr3_lite0_recall=cur_nimg / 24)
    assert read_info(tmp_path / BEST)["cur_nimg"] == best


def test_a_run_with_another_metric_than_before_begins_to_compare_anew(make_snapshots, tmp_path: Path) -> None:
    snapshots, save = make_snapshots()
    save(8, fd_lite0=5.0)
    snapshots.load_state_dict({**snapshots.state_dict(), "best_name": "fid50k_full", "best_value": 2.0})
    save(16, fd_lite0=6.0)
    assert read_info(tmp_path / BEST)["cur_nimg"] == 16
    save(24, fd_lite0=7.0)
    assert read_info(tmp_path / BEST)["cur_nimg"] == 16


def test_every_metric_is_computed_when_it_is_due(make_snapshots, tmp_path: Path, monkeypatch) -> None:
    snapshots, _ = make_snapshots()
    snapshots.config = replace(snapshots.config, metrics=("fd_lite0", "is50k:2", "fid50k_full:3"))
    asked = []

    def computed(names: list[str], *_args: object, **_kwargs: object) -> dict[str, evaluate.MetricResult]:
        asked.append(list(names))
        return {name: evaluate.MetricResult({name: 1.0}, {"seed": 1}) for name in names}

    monkeypatch.setattr(evaluate, "evaluate", computed)
    G = new_generator(snapshots.config.generator)
    for number in (1, 2, 3, 4, None):
        snapshots.evaluate(G, 8, SNAPSHOT, number)
    assert [len(names) for names in asked] == [1, 2, 2, 2, 3] and asked[2] == ["fd_lite0", "fid50k_full"]
    line = json.loads((tmp_path / "metric-is50k.jsonl").read_text().splitlines()[0])
    assert line["settings"] == {"seed": 1} and line["network_sha256"] == network_hash(G)


def test_metrics_are_computed_in_one_pass_and_the_impossible_ones_named_once(
    make_snapshots, tmp_path: Path, monkeypatch, capsys
) -> None:
    snapshots, _ = make_snapshots()
    snapshots.config = replace(snapshots.config, metrics=("fid50k_full", "fd_lite0", "pr3_lite0", "eqr50k"))
    images = []

    class Detector:
        name, fingerprint = "tiny", "1"

        def __call__(self, batch: torch.Tensor) -> torch.Tensor:
            images.extend(batch)
            return batch.float().mean(1).flatten(1)[:, ::9] / 255

    def get_detector(name: str, device: object, path: object) -> Detector:
        if name == "inception":
            raise MissingDetectorError("fetch its weights")
        return Detector()

    monkeypatch.setattr(evaluate, "get_detector", get_detector)
    monkeypatch.setattr(evaluate, "default_cache_dir", lambda: tmp_path / "cache")
    G = new_generator(snapshots.config.generator)
    snapshots.check_metrics(G)
    said = capsys.readouterr().out
    assert said.count("fid50k_full is left out") == said.count("eqr50k is left out") == 1
    assert "fetch its weights" in said and not images
    first = snapshots.evaluate(G, 8, SNAPSHOT)
    assert list(first) == ["fd_lite0", "pr3_lite0_precision", "pr3_lite0_recall"]
    assert len(images) == 2 * 1797
    assert snapshots.evaluate(G, 16, SNAPSHOT) == first
    assert len(images) == 3 * 1797  # real features are kept
    assert "left out" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metric-pr3_lite0.jsonl").read_text().splitlines()]
    assert [line["cur_nimg"] for line in lines] == [8, 16]
    assert not (tmp_path / "metric-fid50k_full.jsonl").exists()


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
    save(16, fd_lite0=5.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.best_name, second.best_value, second.kept_nimg) == ("fd_lite0", 5.0, 16)


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "save_network"])
def test_a_disk_that_refuses_costs_a_warning(
    make_snapshots, tmp_path: Path, monkeypatch, capsys, place: str
) -> None:
    snapshots, save = make_snapshots(keep_every_kimg=0.01)
    save(8, fd_lite0=5.0)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = f"{snapshot_module.__name__}.{place}" if place == "save_network" else place
        patch.setattr(target, refuse)
        assert not save(16, fd_lite0=4.0)
    assert "Warning" in capsys.readouterr().out and snapshots.best_value == 5.0
    assert read_info(tmp_path / SNAPSHOT)["cur_nimg"] == read_info(tmp_path / BEST)["cur_nimg"] == 8
    assert save(24, fd_lite0=4.5)
    assert network_files(tmp_path) == [BEST, "network-000000024.safetensors", SNAPSHOT]
    assert read_info(tmp_path / BEST)["cur_nimg"] == 24


def test_a_disk_that_really_is_full(make_snapshots, small_disk: Path, capsys) -> None:
    _, save = make_snapshots(small_disk)
    assert save(8, fd_lite0=5.0)
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    assert not save(16, fd_lite0=4.0)
    assert "No space left on device" in capsys.readouterr().out
    assert read_info(small_disk / SNAPSHOT)["cur_nimg"] == read_info(small_disk / BEST)["cur_nimg"] == 8
    (small_disk / "filler").unlink()
    assert save(24, fd_lite0=4.0)
    assert not list(small_disk.glob(".*"))
