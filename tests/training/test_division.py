# SPDX-License-Identifier: MIT
"""However a batch of 16 is divided, over processes and micro-batches, training is the same; and draws from counters.

This file is also the program that the processes run: each trains every case with the real Trainer, and saves what it
saw and where it came. Batch statistics are frozen there, since BatchNorm does look at the micro-batch.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torch_utils.distributed import init_from_environment, rank, shut_down, world_size
from training.batch import Batch, Reals
from training.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig, from_json, to_json
from training.dataset import open_dataset
from training.discriminator.kinds import new_discriminator
from training.generator.kinds import new_generator
from training.presets import dcgan, quickstart
from training.run_options import RunOptions
from training.training_loop import Trainer

ROOT = Path(__file__).parents[2]
BATCH_SIZE, NUM_ITERATIONS, NUM_IMAGES, NUM_CLASSES = 16, 5, 25, 3
DIVISIONS = {"1x16": (1, 16), "1x4+4+4+4": (1, 4), "2x8": (2, 8), "2x4+4": (2, 4), "4x4": (4, 4)}
OTHERS = ["1x4+4+4+4", "2x8", "2x4+4", pytest.param("4x4", marks=pytest.mark.slow)]
NETWORKS = ("G", "D", "G_ema")
# Largest distance between two ends, relative to the way from the start. G of StyleGAN has activations with corners.
TOLERANCES = {"projected": 2e-3, "unconditional": 5e-3, "wgan_gp": 1e-5, "began": 1e-5, "sync_bn": 1e-5}
Results = Callable[[str], list[dict]]
CASES = ("projected", "unconditional", "wgan_gp", "began", "sync_bn", "plain_bn")
CPU = torch.device("cpu")


# What is trained.


@pytest.fixture(scope="module")
def configs(tiny_generator_config, tiny_discriminator_config, tmp_path_factory) -> dict[str, TrainConfig]:
    """Everything that draws: labels, style mixing, path length, augmentation of every pass, penalty points.

    Adam's eps is large, so that it does not turn rounding errors of vanishing gradients into steps.
    """
    folder = tmp_path_factory.mktemp("images")
    rng, labels = np.random.default_rng(0), []
    for i in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        labels.append([f"{i:02d}.png", i % NUM_CLASSES])
    (folder / "dataset.json").write_text(f'{{"labels": {labels}}}'.replace("'", '"'))
    shared = {
        "batch_size": BATCH_SIZE,
        "microbatch_size": BATCH_SIZE,
        "generator_optimizer": OptimizerConfig(lr=0.002, eps=1e-3, reg_interval=2),
        "discriminator_optimizer": OptimizerConfig(lr=0.002, eps=1e-3),
        "data": DataConfig(path=str(folder), use_labels=True, num_workers=0),
        "embedding_source": "random",
        "total_kimg": 1.0,
    }
    unlabelled = replace(shared["data"], use_labels=False)
    terms = LossConfig(blur_fade_kimg=1, pl_weight=2.0, pl_start_kimg=0, pl_decay=0.3, style_mixing_prob=0.5)

    def projected(c_dim: int, **changes: object) -> TrainConfig:
        generator = tiny_generator_config(c_dim, num_fp16_res=0)
        discriminator = tiny_discriminator_config(c_dim)
        networks = {"generator": generator, "discriminator": discriminator, "loss_terms": terms}
        return replace(quickstart(), **(shared | networks | changes))

    def small(objective: str, discriminator: dict, has_batchnorm=False, **changes: object) -> TrainConfig:
        config = dcgan(objective)
        generator = replace(
            config.generator, img_resolution=16, channel_base=8, z_dim=8, has_batchnorm=has_batchnorm
        )
        discriminator = replace(
            config.discriminator, img_resolution=16, augment_policy="translation", **discriminator
        )
        critic = replace(config.critic, num_steps=2, began_k_lr=0.1, began_gamma=3.0)
        networks = {"generator": generator, "discriminator": discriminator, "critic": critic}
        return replace(config, **(shared | {"data": unlabelled} | networks | changes))

    return {
        "projected": projected(NUM_CLASSES),
        "unconditional": projected(0, data=unlabelled, loss="gan"),
        "wgan_gp": small("wgan_gp", {"channel_bases": (8,), "has_batchnorm": False}),
        "began": small("began", {"channel_base": 8, "hidden_dim": 8}),
        "sync_bn": small("hinge", {"channel_bases": (8,)}, has_batchnorm=True, sync_batchnorm=True),
        "plain_bn": small("hinge", {"channel_bases": (8,)}, has_batchnorm=True),
    }


class Rounded(nn.Module):
    """Stands in for activations with a corner, across which rounding may carry a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(4 * x) / 4


def make_trainer(config: TrainConfig, outdir: Path) -> Trainer:
    """Networks with the same weights everywhere, without corners; D's batch statistics frozen but in *_bn."""
    dataset = open_dataset(config.data.path, config.data.use_labels)
    trainer = Trainer(config, dataset, CPU, RunOptions(outdir=str(outdir), description="division"))
    torch.manual_seed(5)
    trainer.D.load_state_dict(new_discriminator(config.discriminator, config.loss).state_dict())
    weights = new_generator(config.generator).state_dict()
    for network in (trainer.G, trainer.G_ema):
        network.load_state_dict(weights)
    for network in (trainer.G, trainer.D):
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, (nn.LeakyReLU, nn.ReLU, nn.ReLU6)):
                    setattr(module, name, Rounded())
    trainer.D.train(config.is_dcgan and config.generator.has_batchnorm)
    return trainer


def train(config: TrainConfig, outdir: Path) -> dict:
    """What this process saw, sample by sample, and what came of it."""
    trainer, seen = make_trainer(config, outdir), {}
    draw_batch = trainer.draw_batch

    def spy(reals: Reals, scope: str) -> Batch:
        batch = draw_batch(reals, scope)
        for i, place in enumerate(batch.draws.samples.tolist()):
            labels = [None if t is None else int(t[i]) for t in (batch.labels, batch.fake_labels)]
            seen[scope, place] = (batch.images[i].double().sum().item(), *labels, *batch.z[i].tolist())
        return batch

    trainer.draw_batch = spy
    path = []
    for _ in range(NUM_ITERATIONS):
        trainer.iterate()
        path.append({name: value["mean"] for name, value in trainer.stats.flush().items()})
    trainer.log.close()
    return {"seen": seen, "path": path, "pl_mean": trainer.clock.pl_mean, **copies(trainer)}


def copies(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the networks as they are now."""
    return {
        name: {key: value.clone() for key, value in getattr(trainer, name).state_dict().items()}
        for name in NETWORKS
    }


# Running it.


@pytest.fixture(scope="module")
def results(configs, tmp_path_factory) -> Results:
    """results(division) -> [result of rank 0, ...]; a result is {case: what `train` returns}."""
    folder = tmp_path_factory.mktemp("division")
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(to_json(config))

    @functools.cache
    def run(num_processes: int) -> None:
        divisions = [f"{name}={size}" for name, (n, size) in DIVISIONS.items() if n == num_processes]
        run_processes(num_processes, folder, divisions)

    @functools.cache
    def load(division: str) -> list[dict]:
        num_processes = DIVISIONS[division][0]
        run(num_processes)
        return [torch.load(folder / f"{division}-{r}.pt", weights_only=False) for r in range(num_processes)]

    return load


def run_processes(num_processes: int, folder: Path, divisions: list[str]) -> None:
    """This file as a program, so many times; fails with the first error text if one fails."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    processes = []
    for r in range(num_processes):
        variables = shared | {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": num_processes}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, __file__, str(folder), *divisions]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, "\n".join(errors)


# What must agree.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("division", OTHERS)
def test_images_labels_and_latents_are_the_same(results, division, case):
    """Exactly, and every process has its share: sample p of the sequence is with rank p % processes."""
    expected = results("1x16")[0][case]["seen"]
    steps = {scope for scope, _ in expected}
    assert steps == ({"G", "D", "path_length"} if "path_length" in steps else {"G", "D"})
    shares = [r[case]["seen"] for r in results(division)]
    for r, share in enumerate(shares):
        assert {place % len(shares) for _, place in share} == {r}
    assert sum(len(share) for share in shares) == len(expected)
    assert {key: value for share in shares for key, value in share.items()} == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("division", OTHERS)
def test_the_trajectory_is_the_same(results, division, case):
    """Weights and buffers of all networks; losses of every iteration; running means of w and of path lengths."""
    if case == "plain_bn" or (case == "sync_bn" and "+" in division):
        pytest.skip("BatchNorm looks at the micro-batch: docs/fidelity.md#micro-batches")
    (expected, start), actual = reference(results, case), results(division)[0][case]
    for network in NETWORKS:
        way = distance(expected[network], start[network])
        assert distance(actual[network], expected[network]) <= TOLERANCES[case] * way, network
    if "mapping.w_avg" in expected["G"]:
        torch.testing.assert_close(
            actual["G"]["mapping.w_avg"], expected["G"]["mapping.w_avg"], rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(actual["pl_mean"], expected["pl_mean"], rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(actual["path"], expected["path"], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            if not name.startswith("SAN/"):  # measured on what each process sees
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def reference(results: Results, case: str) -> tuple[dict, dict]:
    """What came of one process with the whole batch, and the networks that it started from."""
    (result,) = results("1x16")
    return result[case], result[case + " start"]


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """L2 norm of the difference of all tensors together, counters aside."""
    names = [name for name, value in second.items() if value.is_floating_point()]
    return sum((first[name] - second[name]).double().square().sum().item() for name in names) ** 0.5


def test_the_comparison_can_fail(results):
    """What plain BatchNorm does with two processes is far from what it does with one."""
    expected, start = reference(results, "plain_bn")
    actual, way = results("2x8")[0]["plain_bn"], distance(expected["D"], start["D"])
    assert distance(actual["D"], expected["D"]) > 0.005 * way


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("division", OTHERS[1:])
def test_all_processes_hold_the_same_bits(results, division, case):
    first, *others = (r[case] for r in results(division))
    assert others
    for other in others:
        for network in NETWORKS:
            for name, value in first[network].items():
                assert torch.equal(other[network][name], value), (network, name)
        assert torch.equal(other["pl_mean"], first["pl_mean"])


@pytest.mark.parametrize("case", CASES)
def test_the_case_trains_what_it_is_about(results, case):
    """The comparisons above compare things that move."""
    result, start = reference(results, case)
    for network in NETWORKS:
        moved = {
            name for name, value in result[network].items() if not torch.equal(value, start[network][name])
        }
        assert len(moved) >= 4
    if case in ("projected", "unconditional"):
        assert not torch.equal(result["G"]["mapping.w_avg"], start["G"]["mapping.w_avg"])
        assert result["pl_mean"] > 0
    if case == "began":
        assert result["D"]["k"] != start["D"]["k"]
    assert result["path"][0]["Loss/G/loss"] != result["path"][-1]["Loss/G/loss"]


# Nothing draws from a global stream.


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_leaves_the_global_generators_alone(configs, case, tmp_path):
    trainer = make_trainer(configs[case], tmp_path)
    trainer.D.train()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(3):
        trainer.iterate()
    trainer.log.close()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_another_seed_draws_other_numbers(configs, tmp_path):
    batches = []
    for seed in (0, 1):
        trainer = make_trainer(replace(configs["projected"], seed=seed), tmp_path / str(seed))
        batches.append(trainer.draw_batch(trainer.next_reals(step=0), "G"))
        trainer.log.close()
    assert not torch.equal(batches[0].z, batches[1].z)
    assert not torch.equal(batches[0].fake_labels, batches[1].fake_labels)


def main(folder: Path, divisions: list[str]) -> None:
    """Train all cases in the given divisions, {name}={micro-batch}, as the process that the environment says."""
    torch.set_num_threads(1)
    init_from_environment("cpu")
    for division in divisions:
        name, microbatch_size = division.split("=")
        assert world_size() == DIVISIONS[name][0]
        result = {}
        for case in CASES:
            config = from_json(TrainConfig, (folder / f"{case}.json").read_text())
            config = replace(config, microbatch_size=int(microbatch_size))
            outdir = folder / f"{name}-{case}-{rank()}"
            if division == "1x16=16":
                trainer = make_trainer(config, outdir / "start")
                result[case + " start"] = copies(trainer)
                trainer.log.close()
            result[case] = train(config, outdir)
        torch.save(result, folder / f"{name}-{rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
