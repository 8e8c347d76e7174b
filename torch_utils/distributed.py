# SPDX-License-Identifier: MIT
"""Every place where the rank of a process matters, and nothing else.

One process needs no set-up: all functions are then no-ops. `init_from_environment` makes many of them one group, which
the functions act on. Small messages between the hosts go over a second group (gloo) and never wait for a GPU.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_utils.errors import UserError
from torch_utils.process_environment import ProcessEnvironment, host_name, read_environment
from torch_utils.waiting import CLOCK

TIMEOUT_VARIABLE = "STYLESAN_COLLECTIVE_TIMEOUT"  # seconds
DEFAULT_TIMEOUT_S = 600.0  # of a collective operation of the training step, and of the first meeting
CONTROL_TIMEOUT = timedelta(days=30)  # a long evaluation is no error; whether a rank lives, the watchdog sees

BUCKET_BYTES = 64 * 2**20  # of tensors that are averaged at a time
BATCHNORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)

_control_group: dist.ProcessGroup | None = None


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 without torch.distributed."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if _is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes files."""
    return rank() == 0


def describe_rank() -> str:
    """For messages: "rank 3 (host b)"."""
    return f"rank {rank()} (host {host_name()})"


def init_from_environment(
    device_kind: str, on_connect: Callable[[ProcessEnvironment], None] | None = None
) -> torch.device:
    """The device of this process, which joins the others named by torchrun's variables; alone it joins nobody.

    device_kind: cuda (nccl; the GPU number LOCAL_RANK of this machine) or cpu (gloo). on_connect: called as soon as
    the store of rank 0 answers, before anything waits for other ranks. UserError for an environment that cannot work,
    RuntimeError naming the ranks that did not come within the time limit (TIMEOUT_VARIABLE).
    """
    environment = read_environment()
    if environment is None or environment.world_size == 1:
        return torch.device(device_kind)
    if device_kind not in ("cpu", "cuda"):
        raise UserError(
            f"--device {device_kind} cannot be used by several processes; use --gpus 1 or --device cpu"
        )
    timeout = read_timeout()
    store = _open_store(environment, timeout)
    if on_connect is not None:
        on_connect(environment)
    device = torch.device(device_kind)
    if device.type == "cuda":
        device = torch.device("cuda", choose_gpu(environment, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    _meet(store, environment, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    global _control_group
    _control_group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    if device.type == "cuda":
        check_gpus_differ(gather_objects((host_name(), str(torch.cuda.get_device_properties(device).uuid))))
    return device


def shut_down() -> None:
    """Leave the group, if there is one. Every rank calls it, after its last collective operation."""
    global _control_group
    _control_group = None
    if _is_initialized():
        dist.destroy_process_group()


def read_timeout() -> timedelta:
    """Time limit of collective operations. Raises UserError for a value that is no positive number of seconds."""
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= CONTROL_TIMEOUT.total_seconds():
        raise UserError(f"{TIMEOUT_VARIABLE}={text!r} is no positive number of seconds; 600 is usual")
    return timedelta(seconds=seconds)


def choose_gpu(environment: ProcessEnvironment, num_visible: int) -> int:
    """Index of this process's GPU among those it can see. UserError when there are fewer GPUs than processes.

    Where a scheduler shows each process one GPU only, it is that one.
    """
    if num_visible >= environment.local_world_size:
        return environment.local_rank
    if num_visible == 1:
        return 0
    raise UserError(
        f"host {host_name()} has {num_visible} GPUs for {environment.local_world_size} processes; "
        f"use --gpus {max(num_visible, 1)} or torchrun --nproc-per-node={max(num_visible, 1)}"
    )


def check_gpus_differ(gpus: list[tuple[str, str]]) -> None:
    """UserError if two ranks share a GPU. gpus: (host, identifier) of each rank's."""
    for gpu, count in Counter(gpus).items():
        if count > 1:
            ranks = [str(r) for r, other in enumerate(gpus) if other == gpu]
            raise UserError(
                f"ranks {', '.join(ranks)} share one GPU of host {gpu[0]}; start one process per GPU "
                "(--gpus N, torchrun --nproc-per-node=N), and let each see its own or all"
            )


def _open_store(environment: ProcessEnvironment, timeout: timedelta) -> dist.Store:
    try:
        store = next(dist.rendezvous("env://", timeout=timeout))[0]
    except (RuntimeError, OSError) as error:  # torch's network errors are RuntimeErrors
        address = f"{environment.master_addr}:{environment.master_port}"
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{environment.describe()} cannot reach MASTER_ADDR:MASTER_PORT={address} ({line}); is rank 0 running, "
            "is the port free there, and open between the machines?"
        ) from error
    # torchrun may keep one store for all attempts of a launch (torch 2.15 does): with addresses of processes that died.
    return dist.PrefixStore(f"attempt/{environment.attempt}/{environment.world_size}", store)


def _meet(store: dist.Store, environment: ProcessEnvironment, timeout: timedelta) -> None:
    """Wait until every rank is here, so that a missing one is named rather than a connection."""
    names = [f"stylesan/here/{r}" for r in range(environment.world_size)]
    store.set(names[environment.rank], "1")
    try:
        store.wait(names, timeout)
    except RuntimeError as error:
        missing = [str(r) for r, name in enumerate(names) if not store.check([name])]
        raise RuntimeError(
            f"of {environment.world_size} ranks, {', '.join(missing)} did not start within "
            f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE}); see what they or their machines print"
        ) from error


def average_gradients_(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes. Missing gradients stay missing."""
    average_([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def average_(tensors: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace floating-point tensors by their means over processes, all alike on all of them.

    They travel in flat buckets, each of one dtype and, if it holds more than one tensor, of `bucket_bytes` at most,
    which bounds the memory for the copies.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket) + tensor.nbytes
        if bucket and (tensor.dtype != bucket[0].dtype or size > bucket_bytes):
            _average_bucket_(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _average_bucket_(bucket)


def _average_bucket_(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    sum_over_processes(flat).div_(world_size())
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def average_batch_statistics_(*networks: torch.nn.Module) -> None:
    """Replace the running statistics of all BatchNorm layers by their means over processes: replicas stay equal."""
    layers = (m for network in networks for m in network.modules() if isinstance(m, BATCHNORMS))
    moving = (layer for layer in layers if layer.training and layer.track_running_stats)
    average_(value for layer in moving for value in (layer.running_mean, layer.running_var))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over processes; the tensor itself with one process."""
    if world_size() > 1:
        with CLOCK.waiting(tensor.device):
            dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here, however long one of them takes (an evaluation, a download)."""
    if world_size() > 1:
        with CLOCK.waiting(torch.device("cpu")):
            dist.barrier(group=_control_group)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Small things only: it is pickled."""
    if world_size() == 1:
        return value
    box = [value]
    with CLOCK.waiting(torch.device("cpu")):
        dist.broadcast_object_list(box, src=0, group=_control_group)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Everybody's `value`, by rank, on every rank. Small things only: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with CLOCK.waiting(torch.device("cpu")):
        dist.all_gather_object(values, value, group=_control_group)
    return values


def agree_max(value: int) -> int:
    """The largest `value` of any rank, on every rank. Does not wait for the GPU."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    with CLOCK.waiting(box.device):
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_control_group)
    return int(box)


def agree_any(flag: bool) -> bool:
    """Whether `flag` is true on any rank, on every rank. Does not wait for the GPU."""
    return bool(agree_max(int(flag)))


def check_replicas_equal(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """RuntimeError, naming the first tensor and the ranks that differ, unless all ranks hold the same bits.

    tensors: (name, tensor), such as `module.state_dict().items()`, in the same order on every rank. They are copied to
    the CPU one by one and hashed, about a second per gigabyte: for starts and saves rather than for every step.
    """
    if world_size() == 1:
        return
    named_hashes = [(name, _hash_tensor(tensor)) for name, tensor in tensors]
    everybody = gather_objects(named_hashes)
    lengths = [len(hashes) for hashes in everybody]
    if len(set(lengths)) > 1:
        raise RuntimeError(f"ranks hold different numbers of tensors: {lengths}")
    for index, (name, _) in enumerate(named_hashes):
        found = [hashes[index] for hashes in everybody]
        usual, count = Counter(found).most_common(1)[0]
        if count == len(found):
            continue
        odd = [str(r) for r, value in enumerate(found) if value != usual]
        others = "rank 0's" if len(odd) == len(found) - 1 else "the others'"
        raise RuntimeError(
            f"replicas differ: {name} of rank {', '.join(odd)} is not {others}; the run cannot go on, as its "
            "networks have drifted apart. Start again from the last state, and report what happened before"
        )


def _hash_tensor(tensor: Tensor) -> str:
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over processes, of which each holds a share of equal size. Without a graph."""
    return sum_over_processes(tensor.detach().clone()) / world_size()


def gather_samples(tensor: Tensor) -> Tensor:
    """All processes' rows, (N * processes, ...), of (N, ...) each: row i of rank r was sample i * processes + r.

    So they come in the order in which samples are dealt out. Without a graph.
    """
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    with CLOCK.waiting(tensor.device):
        dist.all_gather(parts, tensor.detach().contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_to_main(tensor: Tensor) -> list[Tensor]:
    """Everybody's tensor, by rank, on the main process, on the CPU; an empty list elsewhere.

    Shapes and sizes may differ; dtypes may not. They go one by one, so that no more than the result is held.
    """
    tensor = tensor.detach().cpu().contiguous()
    shapes = gather_objects(tuple(tensor.shape))
    if world_size() == 1:
        return [tensor]
    with CLOCK.waiting(tensor.device):
        if not is_main():
            if tensor.numel():
                dist.send(tensor, dst=0, group=_control_group)
            return []
        parts = [tensor, *(torch.empty(shape, dtype=tensor.dtype) for shape in shapes[1:])]
        for source, part in enumerate(parts):
            if source > 0 and part.numel():
                dist.recv(part, src=source, group=_control_group)
    return parts
