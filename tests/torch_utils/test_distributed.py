# SPDX-License-Identifier: MIT
"""Two real processes on gloo against the same computation in one; and that one process needs no set-up.

This file is also the program that the two processes run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torch_utils.distributed import average_gradients_, is_main, rank, sum_over_processes, world_size
from torch_utils.seeding import seed_everything
from torch_utils.stats import StatsCollector

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2


def make_gradients(process: int) -> list[torch.nn.Parameter]:
    """Parameters of several shapes with a gradient that depends on the process; the last one has none."""
    shapes = [(2, 3), (), (4,), (1, 2, 2)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for index, parameter in enumerate(parameters[:-1]):
        count = parameter.numel()
        parameter.grad = (torch.arange(count).float() + 10 * index + 100 * process).view(parameter.shape)
    return parameters


def run_process() -> dict:
    """What one process sees; saved and compared by the test."""
    parameters = make_gradients(rank())
    addresses = [p.grad.data_ptr() for p in parameters[:-1]]
    average_gradients_(iter(parameters))
    stats = StatsCollector()
    stats.report("a", torch.tensor([1.0, 2.0]) + 10 * rank())
    continued = StatsCollector()
    continued.load_state_dict(stats.state_dict())
    seed_everything(1)
    return {
        "rank": rank(),
        "world_size": world_size(),
        "is_main": is_main(),
        "gradients": [None if p.grad is None else p.grad for p in parameters],
        "in_place": addresses == [p.grad.data_ptr() for p in parameters[:-1]],
        "sum": sum_over_processes(torch.tensor([1.0, rank()])),
        "stats": stats.flush(),
        "own_moments": continued._moments["a"].tolist(),
        "continued_stats": continued.flush(),
        "random": torch.rand(()).item(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(r), str(folder)], env=environment)
        for r in range(NUM_PROCESSES)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * NUM_PROCESSES
    return [torch.load(folder / f"{r}.pt") for r in range(NUM_PROCESSES)]


def test_ranks(results):
    assert [r["rank"] for r in results] == [0, 1]
    assert [r["world_size"] for r in results] == [2, 2]
    assert [r["is_main"] for r in results] == [True, False]


def test_statistics_that_go_on_are_those_of_each_process(results):
    assert [r["own_moments"] for r in results] == [[2, 3, 5], [2, 23, 265]]
    assert all(r["continued_stats"] == r["stats"] for r in results)


def test_gradients_are_averaged_in_place_and_missing_ones_stay_missing(results):
    expected = [
        None if a.grad is None else (a.grad + b.grad) / 2
        for a, b in zip(make_gradients(0), make_gradients(1), strict=True)
    ]
    assert expected[-1] is None
    for result in results:
        assert result["in_place"]
        for actual, wanted in zip(result["gradients"], expected, strict=True):
            assert (actual is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_sums_and_statistics_cover_all_processes(results):
    for result in results:
        assert result["sum"].tolist() == [2.0, 1.0]
        moments = result["stats"]["a"]
        assert moments["num"] == 4 and moments["mean"] == pytest.approx(6.5)
        assert moments["std"] == pytest.approx(torch.tensor([1.0, 2, 11, 12]).std(correction=0).item())


def test_processes_draw_the_same_numbers(results):
    assert results[0]["random"] == results[1]["random"]


def test_one_process_needs_no_set_up():
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    parameters = make_gradients(0)
    before = [p.grad.clone() for p in parameters[:-1]]
    average_gradients_(parameters)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters[:-1], before, strict=True))
    average_gradients_([])
    x = torch.tensor([3.0])
    assert sum_over_processes(x) is x and x.item() == 3


if __name__ == "__main__":
    process_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process_rank, world_size=NUM_PROCESSES
    )
    torch.save(run_process(), folder / f"{process_rank}.pt")
    dist.destroy_process_group()
