# SPDX-License-Identifier: MIT
"""Joining a group by torchrun's variables, messages within it, replicas that differ. Real processes on gloo.

This file is also the program that the two processes run.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_utils import distributed
from torch_utils.distributed import check_gpus_differ, choose_gpu, init_from_environment, read_timeout
from torch_utils.errors import UserError
from torch_utils.process_environment import read_environment
from torch_utils.waiting import CLOCK
from training.launch import rank_variables

ROOT = Path(__file__).parents[2]


def run_process() -> dict:
    """What one process sees; compared by the tests."""
    connected = []
    device = init_from_environment("cpu", on_connect=connected.append)
    rank = distributed.rank()
    found = {
        "device": str(device),
        "connected": [environment.rank for environment in connected],
        "broadcast": distributed.broadcast_object({"from": rank}),
        "gathered": distributed.gather_objects(rank * 10),
        "max": distributed.agree_max(rank + 5),
        "any": distributed.agree_any(rank == 1),
        "none": distributed.agree_any(False),
        "name": distributed.describe_rank(),
    }
    same = [("a", torch.ones(3)), ("b.c", torch.zeros((), dtype=torch.bfloat16)), ("d", torch.arange(4))]
    distributed.check_replicas_equal(same)
    differing = [*same[:1], ("b.c", torch.tensor(float(rank) * 1e-7)), ("d", torch.full((2,), float(rank)))]
    try:
        distributed.check_replicas_equal(differing)
    except RuntimeError as error:
        found["differing"] = str(error)
    CLOCK.take_seconds()
    time.sleep(0.5 * rank)
    distributed.barrier()
    found["waited"] = CLOCK.take_seconds()
    start = time.perf_counter()
    for _ in range(200):
        distributed.agree_max(0)
    found["agreement_us"] = (time.perf_counter() - start) / 200 * 1e6
    distributed.shut_down()
    found["after"] = (distributed.world_size(), distributed.agree_max(3))
    return found


@pytest.fixture(scope="module")
def results() -> list[dict]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT), **rank_variables(rank, 2, store.port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_messages_reach_every_rank(results):
    for rank, found in enumerate(results):
        assert found["device"] == "cpu" and found["connected"] == [rank]
        assert found["broadcast"] == {"from": 0}
        assert found["gathered"] == [0, 10]
        assert (found["max"], found["any"], found["none"]) == (6, True, False)
        assert found["name"].startswith(f"rank {rank} (host ")
        assert found["after"] == [1, 3]


def test_first_tensor_and_rank_that_differ_are_named(results):
    for found in results:
        assert "b.c of rank 1" in found["differing"] and "d of" not in found["differing"]


def test_the_rank_that_others_wait_for_waits_least(results):
    assert results[0]["waited"] > 0.3 > results[1]["waited"]


def test_agreement_is_cheap_beside_a_training_step(results):
    assert max(found["agreement_us"] for found in results) < 20_000  # 700 on two cores under a load of 7


def test_alone_nothing_is_set_up(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init_from_environment("cpu") == torch.device("cpu")
    assert distributed.gather_objects("x") == ["x"] and distributed.broadcast_object("x") == "x"
    assert not distributed.agree_any(False) and distributed.agree_any(True)
    distributed.barrier()
    distributed.check_replicas_equal([("a", torch.ones(2))])
    distributed.shut_down()


def environment_of(monkeypatch, port: int, **changes: str):
    for name, value in {**rank_variables(0, 2, port), **changes}.items():
        monkeypatch.setenv(name, value)
    return read_environment()


def test_missing_rank_is_named_within_the_time_limit(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment_of(monkeypatch, store.port, STYLESAN_COLLECTIVE_TIMEOUT="1")
    with pytest.raises(RuntimeError, match="of 2 ranks, 1 did not start within 1 s"):
        init_from_environment("cpu")


def test_ranks_of_an_earlier_attempt_are_not_taken_for_those_of_this_one(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, rank in enumerate((1, 0)):  # as torchrun does it, which keeps its store
        environment_of(monkeypatch, store.port, STYLESAN_COLLECTIVE_TIMEOUT="1")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(RuntimeError, match=f"of 2 ranks, {1 - rank} did not start within 1 s"):
            init_from_environment("cpu")


def test_store_that_does_not_answer(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    environment_of(monkeypatch, port, STYLESAN_COLLECTIVE_TIMEOUT="1")
    with pytest.raises(UserError, match=f"cannot reach MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}"):
        init_from_environment("cpu")


def test_devices_that_cannot_be_shared(monkeypatch):
    environment_of(monkeypatch, 29500)
    with pytest.raises(UserError, match="--device mps"):
        init_from_environment("mps")


@pytest.mark.parametrize("text", ["0", "-3", "soon", "1e12"])
def test_time_limit_must_be_a_time(monkeypatch, text):
    monkeypatch.setenv("STYLESAN_COLLECTIVE_TIMEOUT", text)
    with pytest.raises(UserError, match=f"STYLESAN_COLLECTIVE_TIMEOUT='{text}'"):
        read_timeout()


def test_gpu_of_a_process(monkeypatch):
    environment = environment_of(monkeypatch, 29500, LOCAL_RANK="1", RANK="1")
    assert choose_gpu(environment, 2) == choose_gpu(environment, 8) == 1
    assert choose_gpu(environment, 1) == 0  # a scheduler shows each process its own GPU only
    with pytest.raises(UserError, match="has 2 GPUs for 4 processes; use --gpus 2"):
        choose_gpu(replace(environment, local_world_size=4), 2)
    with pytest.raises(UserError, match="has 0 GPUs"):
        choose_gpu(environment, 0)


def test_shared_gpu_is_refused():
    check_gpus_differ([("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-2")])
    with pytest.raises(UserError, match="ranks 0, 2 share one GPU of host a"):
        check_gpus_differ([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])


if __name__ == "__main__":
    print(json.dumps(run_process()))
