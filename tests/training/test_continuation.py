# SPDX-License-Identifier: MIT
"""What a run goes on from: the progress that its files hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from training.continuation import Progress, read_progress
from training.dataset import open_dataset
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.generator import Generator
from training.network_io import read_info, save_network
from training.presets import PRESETS
from training.snapshot import Snapshots


def test_nothing_to_go_on_from(tmp_path):
    assert read_progress(tmp_path) == read_progress(tmp_path / "absent") == Progress()


def test_progress_is_that_of_the_snapshot_and_the_best_network(tmp_path):
    G = Generator(PRESETS["digits-8"]().generator)
    latest = {"cur_nimg": 96, "metrics": {"fd_lite0": 7.0}, "pl_mean": 0.25}
    save_network(tmp_path / "network-snapshot.safetensors", G, info=latest)
    assert read_progress(tmp_path) == Progress(96, 0.25, None)
    save_network(tmp_path / "best_model.safetensors", G, info={"cur_nimg": 48, "metrics": {"fd_lite0": 5.0}})
    assert read_progress(tmp_path) == Progress(96, 0.25, 5.0)
    save_network(tmp_path / "best_model.safetensors", G, info={"cur_nimg": 48, "metrics": {}})
    assert read_progress(tmp_path).best_value is None


@pytest.mark.parametrize("pl_weight", [0.0, 2.0])
def test_snapshots_hold_the_mean_path_length_if_there_is_one(tmp_path, pl_weight):
    config = PRESETS["digits-8"]()
    config = replace(config, loss_terms=replace(config.loss_terms, pl_weight=pl_weight))
    G, D = Generator(config.generator), ProjectedDiscriminator(config.discriminator, "san", pretrained=False)
    log = SimpleNamespace(print=print)
    snapshots = Snapshots(config, tmp_path, open_dataset("digits8"), log, torch.device("cpu"))
    snapshots.save(G, D, G, cur_nimg=32, values={}, pl_mean=0.5)
    assert read_progress(tmp_path).pl_mean == (0.5 if pl_weight else 0.0)
    assert ("pl_mean" in read_info(tmp_path / "network-snapshot.safetensors")) == bool(pl_weight)
