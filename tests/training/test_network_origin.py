# SPDX-License-Identifier: MIT
"""Where a network comes from: options of run folders, ours and official ones, and what files say themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torch_utils.errors import UserError
from training.network_io import resolve_path
from training.network_origin import find_origin

OFFICIAL = Path(__file__).parents[1] / "data" / "g_snapshot_xl_stem.pkl"


def test_a_file_of_ours_alone(tmp_path: Path, write_network: Callable[..., str]) -> None:
    file = Path(
        write_network(tmp_path / "n.safetensors", c_dim=0, info={"cur_nimg": 5000, "content_hash": "ab"})
    )
    origin = find_origin(file)
    assert (origin.run_dir, origin.cur_nimg, origin.data, origin.content_hash) == (None, 5000, None, "ab")


def test_the_built_in_network_says_what_it_was_trained_on() -> None:
    origin = find_origin(resolve_path("digits"))
    assert origin.data == "digits" and origin.cur_nimg == 100832 and origin.run_dir is None


@pytest.mark.parametrize(
    "options",
    [
        {"data": {"path": "a.zip", "mirror": True}},
        {"training_set_kwargs": {"path": "a.zip", "xflip": True, "use_labels": False}},
    ],
)
def test_options_of_the_run_come_first(
    tmp_path: Path, write_network: Callable[..., str], options: dict
) -> None:
    (tmp_path / "training_options.json").write_text(json.dumps(options))
    origin = find_origin(Path(write_network(tmp_path / "n.safetensors", c_dim=0)))
    assert (origin.run_dir, origin.data, origin.mirror) == (tmp_path, "a.zip", True)


def test_an_official_file_alone() -> None:
    origin = find_origin(OFFICIAL)
    assert origin.run_dir is None and origin.cur_nimg is not None


def test_damaged_options_are_refused(tmp_path: Path, write_network: Callable[..., str]) -> None:
    (tmp_path / "training_options.json").write_text('{"data":')
    with pytest.raises(UserError, match=r"training_options\.json cannot be read"):
        find_origin(Path(write_network(tmp_path / "n.safetensors", c_dim=0)))
