# SPDX-License-Identifier: MIT
"""Two processes of eight samples with synchronised BatchNorm against one of sixteen with torch's; and averages.

This file is also the program that the two processes run.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_utils.distributed import (
    average_,
    average_batch_statistics_,
    average_gradients_,
    gather_samples,
    mean_over_processes,
)
from torch_utils.sync_batch_norm import SyncBatchNorm2d, sync_batchnorm_

ROOT = Path(__file__).parents[2]
NUM_PROCESSES, NUM_SAMPLES = 2, 16


class Block(nn.Sequential):
    """Convolution, BatchNorm and an activation in place, as in D's heads."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2, inplace=True),
        )


def make_network() -> nn.Module:
    """A critic in float64, whose second block keeps its running statistics where they are."""
    torch.manual_seed(0)
    network = nn.Sequential(Block(3, 5), Block(5, 4), nn.Flatten(), nn.Linear(16, 1)).double()
    for layer in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    network[1][1].track_running_stats = False
    return network.to(memory_format=torch.channels_last)


def make_images() -> Tensor:
    """Away from mean 0, no two halves alike."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_SAMPLES, 3, 8, 8, generator=rng, dtype=torch.float64)
    scales = torch.linspace(0.5, 3, NUM_SAMPLES, dtype=torch.float64).view(-1, 1, 1, 1)
    return scales * (images + 2)


def train(network: nn.Module, images: Tensor) -> dict:
    """Two passes and an R1-like penalty, which differentiates twice: logits, gradients, statistics."""
    with torch.no_grad():
        network(images + 1)
    points = images.clone().requires_grad_()
    logits = network(points)
    (slopes,) = torch.autograd.grad(logits.sum(), points, create_graph=True)
    penalty = slopes.square().flatten(1).sum(1)
    (logits.square().mean() + penalty.mean()).backward()
    average_gradients_(network.parameters())
    network.eval()
    with torch.no_grad():
        evaluated = network(images)
    network.train()
    return {
        "logits": logits.detach(),
        "penalty": penalty.detach(),
        "image_gradients": points.grad,
        "evaluated": evaluated,
        "gradients": {name: p.grad for name, p in network.named_parameters()},
        "buffers": dict(network.named_buffers()),
    }


def average_things(rank: int) -> dict:
    """Averages over the processes, of several shapes and dtypes in buckets of all sizes; and gathered samples."""
    results = {}
    for bucket_bytes in (1, 40, 10**6):
        tensors = [torch.arange(float(n)) + 10 * n + 100 * rank for n in (3, 0, 6, 1)]
        tensors.insert(2, torch.arange(4.0, dtype=torch.float64).view(2, 2).T + rank)
        addresses = [t.data_ptr() for t in tensors]
        average_(iter(tensors), bucket_bytes)
        assert addresses == [t.data_ptr() for t in tensors]
        results[bucket_bytes] = tensors
    places = rank + NUM_PROCESSES * torch.arange(3)
    network = make_network()
    network[0][1].running_mean.fill_(rank)
    network[1][1].running_mean.fill_(rank)
    network.append(nn.BatchNorm2d(1).eval())
    network[-1].running_var.fill_(rank)
    average_batch_statistics_(network)
    return {
        "averages": results,
        "mean": mean_over_processes(torch.tensor([1.0, 3.0 * rank])),
        "gathered": gather_samples(places),
        "gathered_rows": gather_samples(places.unsqueeze(1) * torch.tensor([1.0, -1.0])),
        "statistics": [network[i][1].running_mean for i in (0, 1)] + [network[-1].running_var],
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


@pytest.fixture(scope="module")
def expected() -> dict:
    return train(make_network(), make_images())


def test_logits_penalty_and_image_gradients_are_those_of_one_batch(results, expected):
    for name, factor in (("logits", 1), ("penalty", 1), ("evaluated", 1), ("image_gradients", 1 / 2)):
        # Each process's loss is a mean over its half, so its images count twice.
        actual = factor * torch.cat([r["synced"][name] for r in results])
        torch.testing.assert_close(actual, expected[name], rtol=1e-8, atol=1e-12, msg=name)


def test_gradients_and_running_statistics_are_those_of_one_batch(results, expected):
    for part in ("gradients", "buffers"):
        assert list(results[0]["synced"][part]) == list(expected[part])
        for name, value in expected[part].items():
            for r in results:
                torch.testing.assert_close(r["synced"][part][name], value, rtol=1e-8, atol=1e-12, msg=name)
            assert torch.equal(results[0]["synced"][part][name], results[1]["synced"][part][name])
    moved = expected["buffers"]["0.1.running_var"]
    assert (moved - 1).abs().max() > 0.1
    assert not expected["buffers"]["1.1.running_mean"].any()


def test_the_comparison_can_fail(results, expected):
    """Without synchronisation logits, gradients and statistics are others."""
    plain = torch.cat([r["plain"]["logits"] for r in results])
    assert (plain - expected["logits"]).abs().max() > 0.01
    name = "0.0.weight"
    difference = results[0]["plain"]["gradients"][name] - expected["gradients"][name]
    assert difference.abs().max() > 0.1 * expected["gradients"][name].abs().max()
    statistics = [r["plain"]["buffers"]["0.1.running_var"] for r in results]
    assert not torch.allclose(*statistics)


def test_averages_do_not_depend_on_the_buckets(results):
    expected = [torch.arange(float(n)) + 10 * n + 50 for n in (3, 0, 6, 1)]
    expected.insert(2, torch.arange(4.0, dtype=torch.float64).view(2, 2).T + 0.5)
    for r in results:
        for tensors in r["averages"].values():
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
        assert r["mean"].tolist() == [1.0, 1.5]


def test_samples_are_gathered_in_the_order_in_which_they_were_dealt_out(results):
    for r in results:
        assert r["gathered"].tolist() == list(range(6))
        assert r["gathered_rows"].tolist() == [[i, -i] for i in range(6)]


def test_running_statistics_that_move_are_averaged(results):
    """Not those of frozen layers, nor of layers in evaluation mode, which no process moves."""
    for rank, r in enumerate(results):
        moving, frozen, evaluating = r["statistics"]
        assert torch.equal(moving, torch.full_like(moving, 0.5))
        assert torch.equal(frozen, torch.full_like(frozen, rank)) and evaluating.item() == rank


# One process.


def test_one_process_has_plain_batchnorm():
    network = make_network()
    twin = copy.deepcopy(network)
    names, parameters = list(network.state_dict()), [id(p) for p in network.parameters()]
    assert sync_batchnorm_(network) == 2
    assert isinstance(network[0][1], SyncBatchNorm2d) and isinstance(network[1][1], SyncBatchNorm2d)
    assert list(network.state_dict()) == names and [id(p) for p in network.parameters()] == parameters
    actual, expected = (train(n, make_images()) for n in (network, twin))
    for part in ("gradients", "buffers"):
        assert all(torch.equal(actual[part][name], value) for name, value in expected[part].items())
    assert torch.equal(actual["logits"], expected["logits"])
    twin.load_state_dict(network.state_dict())
    assert sync_batchnorm_(network) == 0  # a second time nothing is left to do
    copy.deepcopy(network)(make_images())


def test_modes_are_kept():
    network = make_network()
    network[0][1].eval()
    sync_batchnorm_(network)
    assert [network[i][1].training for i in (0, 1)] == [False, True]
    assert [network[i][1].track_running_stats for i in (0, 1)] == [True, False]


def test_layers_of_subclasses_stay():
    class Special(nn.BatchNorm2d):
        pass

    network = nn.Sequential(Special(3), nn.BatchNorm2d(3))
    assert sync_batchnorm_(network) == 1 and type(network[0]) is Special


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_layers_without_what_it_needs_are_refused(options):
    with pytest.raises(ValueError, match="has no gains and shifts, or no running averages"):
        sync_batchnorm_(nn.Sequential(nn.BatchNorm2d(3, **options)))


if __name__ == "__main__":
    process_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process_rank, world_size=NUM_PROCESSES
    )
    share = slice(process_rank * NUM_SAMPLES // 2, (process_rank + 1) * NUM_SAMPLES // 2)
    synced, plain = make_network(), make_network()
    sync_batchnorm_(synced)
    result = {
        "synced": train(synced, make_images()[share]),
        "plain": train(plain, make_images()[share]),
        **average_things(process_rank),
    }
    torch.save(result, folder / f"{process_rank}.pt")
    dist.destroy_process_group()
