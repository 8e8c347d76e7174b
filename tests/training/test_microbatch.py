# SPDX-License-Identifier: MIT
"""--batch-gpu auto: the largest size that fits, by measured steps; and what memory there is to fit into."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from torch_utils.errors import UserError
from training import microbatch
from training.available_memory import available_memory
from training.config import TrainConfig
from training.microbatch import GIB, GPU_SHARE, HOST_SHARE, choose_microbatch, measure_on_host, run_iteration
from training.out_of_memory import microbatch_sizes
from training.presets import dcgan, quickstart

CPU = torch.device("cpu")


def config_of(batch_size: int, microbatch_size: int) -> TrainConfig:
    return replace(quickstart(), batch_size=batch_size, microbatch_size=microbatch_size)


@pytest.fixture
def in_this_process(monkeypatch):
    """Steps run here, so that tests can stand in for them."""
    monkeypatch.setattr(microbatch, "start_process", lambda: ThreadPoolExecutor(max_workers=1))


@pytest.fixture
def host(monkeypatch, in_this_process):
    """host(free, fixed, per_image): a machine with so many bytes, on which a step takes so many."""

    def set_up(free: float, fixed: float, per_image: float) -> list[int]:
        tried: list[int] = []
        monkeypatch.setattr(microbatch, "available_memory", lambda: int(free))
        monkeypatch.setattr(
            microbatch, "measure_on_host", lambda _, size: tried.append(size) or int(fixed + per_image * size)
        )
        return tried

    return set_up


# On a CPU.


def test_the_whole_share_is_taken_where_it_fits(host):
    tried = host(free=100 * GIB, fixed=GIB, per_image=GIB / 10)
    size, sentence = choose_microbatch(config_of(32, 32), CPU)
    assert size == 32 and tried == [1, 4]  # small sizes only: a large one could take the machine down
    assert sentence.startswith(
        "--batch-gpu auto: 32 images per pass, one pass per step (about 4.5 of 80.0 GiB)."
    )
    assert "BatchNorm in D normalises over these 32 images" in sentence and "give --batch-gpu 32" in sentence


@pytest.mark.parametrize("free_gib", [3, 5, 8, 13, 24])
def test_the_largest_divisor_that_fits_is_taken(host, free_gib):
    host(free=free_gib * GIB, fixed=GIB, per_image=GIB / 2)
    size, _ = choose_microbatch(config_of(24, 24), CPU)
    fitting = [s for s in (1, 2, 3, 4, 6, 8, 12, 24) if 1.5 + 0.55 * (s - 1) <= HOST_SHARE * free_gib]
    assert size == max(fitting)


def test_the_recipes_size_is_not_exceeded(host):
    host(free=1000 * GIB, fixed=GIB, per_image=1)
    size, sentence = choose_microbatch(config_of(64, 8), CPU)
    assert size == 8 and "8 passes per step" in sentence
    assert "The recipe has no more; --batch-gpu 64 would try all." in sentence


def test_processes_of_one_machine_share_its_memory(host, monkeypatch):
    host(free=8 * GIB, fixed=GIB, per_image=GIB / 2)
    alone, _ = choose_microbatch(config_of(24, 24), CPU)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert choose_microbatch(config_of(24, 24), CPU)[0] < alone


def test_nothing_that_fits_is_one_line(host):
    host(free=GIB, fixed=GIB, per_image=GIB)
    with pytest.raises(UserError, match=r"not even one image per pass fits \(it takes 2\.0 of 0\.8 GiB\)"):
        choose_microbatch(config_of(8, 8), CPU)


def test_a_step_that_the_system_kills_does_not_take_the_run_along(monkeypatch, in_this_process):
    def die(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(microbatch, "measure_on_host", die)
    with pytest.raises(UserError, match="a step was killed, with "):
        choose_microbatch(config_of(8, 8), CPU)


def test_the_rank_with_the_least_memory_decides(host, monkeypatch):
    host(free=100 * GIB, fixed=GIB, per_image=GIB / 10)
    other = microbatch.Choice(4, "about 3.0 of 3.1 GiB")
    monkeypatch.setattr(microbatch, "gather_objects", lambda own: [own, other])
    size, sentence = choose_microbatch(config_of(32, 32), CPU)
    assert size == 4 and "(about 3.0 of 3.1 GiB; rank 1 has the least memory)" in sentence


# On a GPU.


@pytest.fixture
def gpu(monkeypatch, in_this_process):
    """gpu(free, per_image): a GPU with so many bytes, of which an image takes so many."""

    def set_up(free: float, per_image: float) -> list[int]:
        tried: list[int] = []

        def try_size(_config, device_name, size):
            tried.append(size)
            assert device_name == "cuda:1"
            return (int(per_image * size) if per_image * size <= free else None), int(free)

        monkeypatch.setattr(microbatch, "try_on_gpu", try_size)
        return tried

    return set_up


def test_sizes_are_tried_from_large_to_small(gpu):
    tried = gpu(free=10 * GIB, per_image=GIB)
    size, sentence = choose_microbatch(config_of(32, 32), torch.device("cuda", 1))
    assert size == 8 and tried == [32, 16, 8] and "(8.0 of 10.0 GiB)" in sentence


def test_some_of_a_gpu_stays_free(gpu):
    tried = gpu(free=8 * GIB, per_image=GIB)
    assert GPU_SHARE < 1
    assert choose_microbatch(config_of(32, 32), torch.device("cuda", 1))[0] == 4 and tried[-2:] == [8, 4]


def test_a_gpu_that_is_too_small_is_one_line(gpu):
    gpu(free=GIB, per_image=2 * GIB)
    with pytest.raises(UserError, match=r"not even one image per pass fits \(1\.0 GiB are free\)"):
        choose_microbatch(config_of(8, 8), torch.device("cuda", 1))


@pytest.mark.gpu
def test_a_gpu_is_tried_with_real_steps():
    size, sentence = choose_microbatch(config_of(32, 32), torch.device("cuda", 0))
    assert size == 32 and "GiB" in sentence


# Real steps.


@pytest.mark.parametrize("objective", ["nonsaturating", "wgan_gp", "began"])
def test_an_iteration_of_small_networks_runs(objective):
    config = dcgan(objective, data="digits")
    run_iteration(replace(config, batch_size=4, microbatch_size=2, benchmark=False), CPU)


def test_an_iteration_with_path_length_runs(tiny_generator_config, tiny_discriminator_config, monkeypatch):
    steps = []
    plain = microbatch.path_length_step
    monkeypatch.setattr(microbatch, "path_length_step", lambda *a: steps.append(len(a[2])) or plain(*a))
    config = replace(
        quickstart(),
        generator=tiny_generator_config(3, num_fp16_res=0),
        discriminator=tiny_discriminator_config(3, augment_policy=""),
        loss_terms=replace(quickstart().loss_terms, pl_weight=2.0),
        batch_size=8,
        microbatch_size=2,
        benchmark=False,
    )
    run_iteration(config, CPU)
    assert steps == [4]  # two passes: the gradients of the first are there in the second


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    with microbatch.start_process() as process:
        small, large = (process.submit(measure_on_host, config_of(64, 64), n).result() for n in (1, 32))
    assert 0.1 * GIB < small < large < 4 * GIB
    size, _ = choose_microbatch(config_of(32, 32), CPU)
    assert size in microbatch_sizes(config_of(32, 32))


# What there is.


def make_cgroups(root: Path, v1: bool, levels: dict[str, tuple[str, int, int]]) -> tuple[Path, Path]:
    """levels: path -> (limit, used, cached). Returns the root and the file that says where this process is."""
    for path, (limit, used, cached) in levels.items():
        folder = root / ("memory" if v1 else "") / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{'total_' if v1 else ''}inactive_file {cached}\n")
    own = root / "own"
    deepest = max(levels, key=len)
    own.write_text(f"4:memory:/{deepest}\n0::/\n" if v1 else f"0::/{deepest}\n")
    return root, own


@pytest.mark.parametrize("v1", [True, False])
def test_the_tightest_control_group_counts_wherever_it_is(v1, tmp_path):
    levels = {"slurm/job": ("5000000", 1_000_000, 300_000), "slurm/job/step": ("max", 400, 0)}
    assert available_memory(*make_cgroups(tmp_path, v1, levels)) == 5_000_000 - 1_000_000 + 300_000


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_leaves_the_machines_memory(limit, tmp_path):
    got = available_memory(*make_cgroups(tmp_path, False, {"pod": (limit, 10, 0)}))
    assert got == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_system_without_control_groups(tmp_path):
    got = available_memory(tmp_path, tmp_path / "missing")
    assert got == pytest.approx(psutil.virtual_memory().available, rel=0.2)
