# SPDX-License-Identifier: MIT
"""States on disk: what comes back, every kind of damage, other formats, and which state a run goes on from."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from training import state_file
from training.state_file import (
    FOLDER,
    FORMAT,
    VERSION,
    StateFileError,
    find_damage,
    find_state,
    list_states,
    load_state,
    state_path,
    write_state,
)


def make_state(value: float = 1.0, **changes: object) -> dict[str, object]:
    tensor = torch.full((50, 4), value)
    nest = {
        "moments": {0: {"step": torch.tensor(3.0), "exp_avg": tensor.t()}},
        "list": [1, 2.5, "x", None, True],
    }
    return {"format": FORMAT, "version": VERSION, "nest": nest, **changes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state-000000016.pt"
    write_state(path, make_state())
    return path


def test_what_is_written_comes_back(path: Path) -> None:
    assert find_damage(path) is None
    state = load_state(path)
    assert state["nest"]["list"] == [1, 2.5, "x", None, True]
    assert torch.equal(state["nest"]["moments"][0]["exp_avg"], torch.ones(4, 50))
    assert os.listdir(path.parent) == [path.name]


def test_it_is_an_ordinary_file_of_torch(path: Path) -> None:
    assert torch.load(path, weights_only=True)["format"] == FORMAT
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:") and len(archive.comment) == 71


@pytest.mark.parametrize("place", ["start", "tensor", "end of the zip", "hash", "label"])
def test_a_changed_byte_is_found(path: Path, place: str) -> None:
    data = bytearray(path.read_bytes())
    offset = {"start": 0, "tensor": len(data) // 2, "end of the zip": -80, "hash": -1, "label": -71}[place]
    data[offset] ^= 1
    path.write_bytes(data)
    assert find_damage(path) is not None


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_found(path: Path, kept: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    assert "truncated" in find_damage(path)
    path.write_bytes(data + b"x")
    assert find_damage(path) is not None


def test_a_file_that_is_gone_or_a_folder_is_damage(tmp_path: Path) -> None:
    assert "cannot be read" in find_damage(tmp_path / "absent.pt")
    assert "cannot be read" in find_damage(tmp_path)


def test_the_newest_whole_state_is_found(tmp_path: Path) -> None:
    folder, warnings = tmp_path / FOLDER, []
    assert find_state(tmp_path, warnings.append) is None
    for nimg in (8, 16, 1000000016):
        write_state(state_path(folder, nimg), make_state(nimg))
    (folder / "state-x.pt").write_bytes(b"")  # not one of ours
    (folder / ".state-000000032.pt.abc.tmp").write_bytes(b"")
    assert list(list_states(folder)) == [1000000016, 16, 8]
    assert find_state(tmp_path, warnings.append) == folder / "state-1000000016.pt"
    assert warnings == []


def test_older_states_stand_in_for_damaged_ones(tmp_path: Path) -> None:
    folder, warnings = tmp_path / FOLDER, []
    for nimg in (8, 16, 24):
        write_state(state_path(folder, nimg), make_state(nimg))
    state_path(folder, 24).write_bytes(state_path(folder, 24).read_bytes()[:-100])
    assert find_state(tmp_path, warnings.append) == state_path(folder, 16)
    (warning,) = warnings
    assert "state-000000024.pt" in warning and "truncated" in warning and "\n" not in warning
    for nimg in (8, 16):
        state_path(folder, nimg).write_bytes(b"")
    with pytest.raises(StateFileError, match="none of the 3 states") as caught:
        find_state(tmp_path, warnings.append)
    assert "\n" not in str(caught.value) and len(warnings) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": VERSION + 1},
            f"has state format {VERSION + 1}, this code reads {VERSION}: go on with the code",
        ),
        ({"version": None}, "has state format None"),
        ({"format": "another"}, "is not a state of this project"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "state-000000001.pt"
    write_state(path, make_state(**changes))
    with pytest.raises(StateFileError, match=message) as caught:
        load_state(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state-000000001.pt"
    path.write_bytes(b"not a zip")
    with pytest.raises(StateFileError, match="cannot be read as a state"):
        load_state(path)


class Code:
    pass


def test_nothing_in_a_state_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "state-000000001.pt"
    write_state(path, make_state(code=Code()))
    with pytest.raises(StateFileError, match="cannot be read as a state"):
        load_state(path)


def test_older_formats_are_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state-000000001.pt"
    write_state(path, make_state(version=-1, old_name=7))
    steps = {
        -1: lambda state: {**state, "version": 0, "name": state["old_name"]},
        0: lambda state: {**state, "version": VERSION, "name": state["name"] + 1},
    }
    monkeypatch.setattr(state_file, "MIGRATIONS", steps)
    assert load_state(path)["name"] == 8
