# SPDX-License-Identifier: MIT
"""torchrun's variables: read, completed, and refused with the name and value of what is wrong."""

import pytest

from torch_utils.errors import UserError
from torch_utils.process_environment import read_environment

GOOD = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a.example.org",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}


def test_all_variables():
    found = read_environment(GOOD)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert (found.master_addr, found.master_port) == ("a.example.org", 29500)
    assert (found.attempt, found.max_restarts) == (2, 3)
    assert found.describe().startswith("rank 5 (host ")


def test_without_variables_a_process_is_alone():
    assert read_environment({}) is None
    assert read_environment({"MASTER_PORT": "29500", "RANK": ""}) is None


def test_what_a_script_may_leave_out():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = read_environment({name: GOOD[name] for name in names})
    assert (found.local_rank, found.local_world_size) == (5, 8)
    assert (found.attempt, found.max_restarts) == (0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_nonsense_is_named(change, words):
    with pytest.raises(UserError, match=words):
        read_environment({**GOOD, **change})
