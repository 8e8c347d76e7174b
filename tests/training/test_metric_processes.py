# SPDX-License-Identifier: MIT
"""Metrics of a real generator on a real detector: one process, two (gloo) and any batch size give the same values.

This file is also the program that the two processes run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from metrics import feature_set
from metrics.evaluate import ImageSet, Options, evaluate
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.dataset import open_dataset
from training.generator.generator import Generator
from training.metric_sources import network_sources

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2
NUM_REALS, NUM_FAKES = 60, 75
METRICS = ("fd_lite0", "kd_lite0", "pr3_lite0", "dc5_lite0", "fd_lite0_per_class")


def compute_all(cache: Path, batch_size: int = feature_set.BATCH_SIZE) -> dict[str, float]:
    """Every result of a network whose weights are drawn here."""
    torch.manual_seed(0)
    mapping = MappingConfig(z_dim=8, c_dim=10, w_dim=16, embedding_dim=4, num_layers=2)
    synthesis = SynthesisConfig(img_resolution=16, channel_base=512, channel_max=16, num_layers=6)
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis)).eval().requires_grad_(False)
    digits = open_dataset("digits", use_labels=True)
    reference = ImageSet(
        NUM_REALS, "first digits", lambda items: digits.batch(items)[0], digits.labels[:NUM_REALS]
    )
    sources, options = network_sources(G, 3, "cpu"), Options(max_fakes=NUM_FAKES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_set, "BATCH_SIZE", batch_size)
        found = evaluate(METRICS, reference, sources, "cpu", cache, options)
    return {key: value for result in found.values() for key, value in result.results.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, float]:
    return compute_all(tmp_path_factory.mktemp("one"))


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    """But for single levels of images and last digits of features, which depend on what else is in a batch."""
    assert set(found) == set(expected) and len(expected) == 8
    assert found == pytest.approx(expected, rel=1e-4)


def test_batch_size_does_not_matter(alone, tmp_path):
    assert alone["fd_lite0"] > 1  # these are no digits
    assert_same(compute_all(tmp_path, batch_size=7), alone)


def test_two_processes_give_the_values_of_one(alone, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(r), str(tmp_path)], env=environment)
        for r in range(NUM_PROCESSES)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * NUM_PROCESSES
    for r in range(NUM_PROCESSES):
        assert_same(torch.load(tmp_path / f"{r}.pt"), alone)


if __name__ == "__main__":
    process_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process_rank, world_size=NUM_PROCESSES
    )
    torch.save(compute_all(folder / "cache"), folder / f"{process_rank}.pt")
    dist.destroy_process_group()
