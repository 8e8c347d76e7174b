# SPDX-License-Identifier: MIT
"""What a run goes on from: the progress that its files hold, and what is refused."""

import pytest
import torch

from torch_utils.errors import UserError
from training.continuation import read_continuation, read_progress
from training.generator.generator import Generator
from training.network_io import save_network
from training.presets import PRESETS
from training.state_file import FOLDER, state_path, write_state


def test_nothing_to_go_on_from(tmp_path):
    assert read_progress(tmp_path) == read_progress(tmp_path / "absent") == 0
    assert read_continuation(tmp_path / "absent", PRESETS["digits-8"]()) is None


def test_progress_is_that_of_the_snapshot_or_of_a_later_state(tmp_path):
    G = Generator(PRESETS["digits-8"]().generator)
    save_network(tmp_path / "network-snapshot.safetensors", G, info={"cur_nimg": 96, "metrics": {}})
    assert read_progress(tmp_path) == 96
    write_state(state_path(tmp_path / FOLDER, 48), {"x": torch.zeros(3)})
    assert read_progress(tmp_path) == 96
    write_state(state_path(tmp_path / FOLDER, 128), {"x": torch.zeros(3)})
    assert read_progress(tmp_path) == 128


def test_networks_without_a_state_are_not_overwritten(tmp_path):
    config = PRESETS["digits-8"]()
    save_network(
        tmp_path / "network-snapshot.safetensors", Generator(config.generator), info={"cur_nimg": 96}
    )
    with pytest.raises(
        UserError, match="has networks but no complete state to go on from; start from its weights"
    ):
        read_continuation(tmp_path, config)
