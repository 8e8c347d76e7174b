# SPDX-License-Identifier: MIT
"""How gradients should be averaged over processes: in flat buckets after the backward pass, tensor by tensor,
overlapped with it, or where they are, as parts of one buffer.

    python tests/benchmarks/all_reduce.py                    two processes on this machine's CPU (gloo)
    torchrun --nproc-per-node=8 tests/benchmarks/all_reduce.py --device cuda

Prints, for three networks, the time of a backward pass with each way of averaging, and without, taken in turn.
Clearing the gradients before counts, as one buffer has to be filled with zeros.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the checkout is not

from torch_utils.distributed import average_, average_gradients_  # noqa: E402
from training.generator.generator import Generator  # noqa: E402
from training.presets import PRESETS, quickstart  # noqa: E402

WIDTH, NUM_LAYERS, NUM_ROWS = 1024, 19, 256  # of the large network: 20 million parameters
OVERLAPPED_BYTES = 8 * 2**20  # of a bucket that is sent during the backward pass
BATCH_SIZE = 8  # images of the quickstart's generator


class Overlapped:
    """Buckets of gradients that are sent as soon as they are complete, while the backward pass goes on."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(parameters):  # roughly the order in which gradients are ready
            if sum(p.nbytes for p in self.buckets[-1]) + parameter.nbytes > OVERLAPPED_BYTES:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = []
        self.is_on = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.note)

    def note(self, parameter: nn.Parameter) -> None:
        """A gradient is complete."""
        if not self.is_on:
            return
        index = self.bucket_of[parameter]
        self.missing[index] -= 1
        if self.missing[index] == 0:
            bucket = self.buckets[index]
            flat = torch.cat([p.grad.reshape(-1) for p in bucket])
            self.sent.append((dist.all_reduce(flat, async_op=True), flat, bucket))

    def finish(self) -> None:
        """After the backward pass."""
        for work, flat, bucket in self.sent:
            work.wait()
            flat /= dist.get_world_size()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        self.sent.clear()
        self.missing = [len(bucket) for bucket in self.buckets]


class OneBuffer:
    """All gradients as parts of one tensor, which is averaged without copies, but has to be zero before."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        parts = self.flat.split([p.numel() for p in parameters])
        self.views = [(p, part.view_as(p)) for p, part in zip(parameters, parts, strict=True)]

    def clear(self) -> None:
        """Before the backward pass, which then adds to the buffer instead of handing over its results."""
        self.flat.zero_()
        for parameter, view in self.views:
            parameter.grad = view

    def average(self) -> None:
        """After the backward pass."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self.flat)
            self.flat /= dist.get_world_size()


def quickstart_generator(device: torch.device) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Its parameters that get gradients, and a loss of a few images."""
    G = Generator(quickstart().generator).to(device)
    z = torch.randn(BATCH_SIZE, G.z_dim, device=device)
    labels = torch.arange(BATCH_SIZE, device=device) % G.c_dim if G.c_dim else None
    return list(G.parameters()), lambda: G(z, labels).square().mean()


def cifar10_weights(device: torch.device) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Those of a published G, with a loss whose gradient costs next to nothing."""
    parameters = list(Generator(PRESETS["cifar10-16"]().generator).to(device).parameters())
    return parameters, lambda: sum(p.square().sum() for p in parameters)


def wide_network(device: torch.device) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """20 million parameters in layers of a million, on as many rows as keep the arithmetic near the transfer."""
    layers = [layer for _ in range(NUM_LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    network = nn.Sequential(*layers).to(device)
    x = torch.randn(NUM_ROWS, WIDTH, device=device)
    return list(network.parameters()), lambda: network(x).square().mean()


NETWORKS = {
    "quickstart's G": quickstart_generator,
    "weights of cifar10-16's G": cifar10_weights,
    "wide": wide_network,
}


def time_ways(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    ways: dict[str, Callable[[], None]],
    overlapped: Overlapped,
    buffer: OneBuffer,
    num_steps: int,
) -> dict[str, list[float]]:
    """Seconds of backward passes with each way of averaging, in turn, all processes starting together."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(num_steps + 2):
        for way, average in ways.items():
            overlapped.is_on = average == overlapped.finish
            value = loss()
            synchronize(parameters[0].device)
            dist.barrier()
            start = time.perf_counter()
            for parameter in parameters:
                parameter.grad = None
            if average == buffer.average:
                buffer.clear()
            value.backward()
            average()
            synchronize(parameters[0].device)
            seconds[way].append(time.perf_counter() - start)
    return {way: values[2:] for way, values in seconds.items()}  # without those that warm up


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, num_steps: int) -> None:
    """Print the table on rank 0."""
    say = print if dist.get_rank() == 0 else lambda *_: None
    say(
        f"{dist.get_world_size()} processes, {dist.get_backend()}, {num_steps} steps; milliseconds, median and least"
    )
    for name, build in NETWORKS.items():
        parameters, loss = build(device)
        loss().backward()
        parameters = [p for p in parameters if p.grad is not None]
        count = sum(p.numel() for p in parameters)
        say(f"{name}: {count / 1e6:.1f} million parameters in {len(parameters)} tensors")
        overlapped, buffer = Overlapped(parameters), OneBuffer(parameters)
        ways: dict[str, Callable[[], None]] = {
            "no averaging": lambda: None,
            "buckets of 64 MiB": lambda p=parameters: average_gradients_(p),
            "one bucket": lambda p=parameters: average_([x.grad for x in p], bucket_bytes=2**40),
            "tensor by tensor": lambda p=parameters: average_([x.grad for x in p], bucket_bytes=1),
            "overlapped": overlapped.finish,
            "one buffer": buffer.average,
        }
        for way, seconds in time_ways(parameters, loss, ways, overlapped, buffer, num_steps).items():
            middle, least = (1000 * f(seconds) for f in (statistics.median, min))
            say(f"  {way:<18s} {middle:8.1f} {least:8.1f}")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each process.")
def main(device: str, steps: int, threads: int) -> None:
    """Measure; without torchrun's variables, start two processes that do."""
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        sys.exit(subprocess.run([*command, *sys.argv], check=False).returncode)
    torch.set_num_threads(threads)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    place = torch.device(device, int(os.environ["LOCAL_RANK"]) if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(place)
    torch.manual_seed(0)
    measure(place, steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
