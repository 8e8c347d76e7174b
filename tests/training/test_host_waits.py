# SPDX-License-Identifier: MIT
"""A training step waits for the device at one place, and copies nothing to it that it would wait for.

What waits on a GPU is seen on a CPU by the operators that bring values to the host.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ema import update_ema_
from torch_utils.ops.choice import using
from torch_utils.stats import StatsCollector
from torch_utils.transfer import send
from training.augment import DiffAugment, blur
from training.batch import Batch
from training.config import LossConfig, TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import GuidanceClassifier, ProjectedGANLoss
from training.optimizers import make_optimizer
from training.presets import quickstart
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES, NUM_IMAGES = 3, 4
AUGMENTATIONS = ("color", "translation", "cutout")
TO_HOST = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
    "argwhere",
)
FROM_LISTS = ("lift_fresh", "lift_fresh_copy")  # torch.tensor([...]): from pageable memory


class HostWaits(TorchDispatchMode):
    """Notes, for every operator that would make the host wait, the line of this project that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in TO_HOST or "unique" in name or name in FROM_LISTS or is_masked:
            self.places.append(f"{name} {find_place()}")
        return func(*args, **(kwargs or {}))


def find_place() -> str:
    """File and function of the innermost frame in this project, tests left out."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "tests" not in path.relative_to(ROOT).parts:
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "unknown"


THE_WAIT = "_local_scalar_dense training/train_step.py:apply_gradients"  # whether all gradients are finite
PINNED = "lift_fresh training/draws.py:_deliver"  # an array's memory, which is then pinned


@pytest.fixture(scope="module", autouse=True)
def plain_operators() -> Iterator[None]:
    """Those in plain PyTorch: what C++ and Triton do inside an operator cannot be seen here."""
    with using("reference"):
        yield


@pytest.fixture
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> Callable[..., TrainConfig]:
    def make(c_dim: int, loss: str = "san") -> TrainConfig:
        # Without a clamp: on CPUs, and only there, it looks at the largest value (filtered_lrelu_reference).
        return replace(
            quickstart(),
            loss=loss,
            generator=tiny_generator_config(c_dim, conv_clamp=None),
            discriminator=tiny_discriminator_config(c_dim),
            loss_terms=LossConfig(pl_weight=2.0, style_mixing_prob=0.5),
            batch_size=NUM_IMAGES,
            microbatch_size=NUM_IMAGES // 2,
        )

    return make


def make_batch(config: TrainConfig, scope: str) -> Batch:
    c_dim, size = config.generator.c_dim, config.generator.img_resolution
    draws = Draws(0, np.arange(NUM_IMAGES)).within(scope)
    labels = draws.integers("label", 0, c_dim) if c_dim else None
    images = draws.uniform("images", 3, size, size) * 2 - 1
    return Batch(images, labels, draws.normal("z", config.generator.mapping.z_dim), labels, draws)


def find_waits(config: TrainConfig, guidance: GuidanceClassifier | None = None) -> dict[str, list[str]]:
    """Places by step; each step's second run counts, when filters and matrices have been made."""
    torch.manual_seed(0)
    G = Generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
    D.set_trainable_(False)
    G.synthesis.recomputes = D.recomputes = config.checkpoint_activations
    average = Generator(config.generator).requires_grad_(False)
    context = StepContext(config, ProjectedGANLoss(config, guidance), StatsCollector())
    G_optimizer = make_optimizer(G.parameters(), config.generator_optimizer)
    D_optimizer = make_optimizer(D.trainable_parameters(), config.discriminator_optimizer)
    mean = torch.zeros(())
    steps = {
        "G": lambda: generator_step(G, D, G_optimizer, make_batch(config, "G"), context),
        "path length": lambda: path_length_step(G, G_optimizer, make_batch(config, "pl"), mean, context),
        "D": lambda: discriminator_step(G, D, D_optimizer, make_batch(config, "D"), context),
        "average": lambda: update_ema_(average, G, 0.9),
    }
    found = {}
    for name, step in steps.items():
        step()
        with HostWaits() as waits:
            step()
        found[name] = waits.places
    return found


def assert_one_wait_each(found: dict[str, list[str]]) -> None:
    found = {name: [place for place in places if place != PINNED] for name, places in found.items()}
    assert found.pop("average") == []
    assert all(places == [THE_WAIT] for places in found.values()), found


@pytest.mark.parametrize(("c_dim", "loss"), [(0, "san"), (NUM_CLASSES, "san"), (NUM_CLASSES, "gan")])
def test_a_step_waits_once(c_dim, loss, tiny_config):
    assert_one_wait_each(find_waits(tiny_config(c_dim, loss=loss)))


POLICIES = [names for count in range(1, 4) for names in combinations(AUGMENTATIONS, count)]


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentations_and_blur_do_not_wait(policy):
    draws = Draws(0, np.arange(NUM_IMAGES))
    images = (draws.uniform("images", 3, 16, 16) * 2 - 1).requires_grad_()
    with HostWaits() as waits:
        DiffAugment(policy, draws)(blur(images, 1.5)).square().sum().backward()
    assert images.grad.any() and set(waits.places) == {PINNED}


def test_guidance_does_not_wait(tiny_config):
    config = tiny_config(NUM_CLASSES)
    config = replace(config, loss_terms=replace(config.loss_terms, cls_weight=8.0))
    classes = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, NUM_CLASSES)
    )
    assert_one_wait_each(find_waits(config, GuidanceClassifier(classes)))


def test_recomputed_activations_do_not_wait(tiny_config):
    assert_one_wait_each(find_waits(replace(tiny_config(NUM_CLASSES), checkpoint_activations=True)))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: x * torch.tensor([1.0, 2.0]),
    ],
)
def test_waits_are_seen(wait):
    with HostWaits() as waits:
        wait(torch.tensor([1.0, -1.0]))
    assert len(waits.places) > 1  # the argument is made from a list, too


def test_styles_of_known_classes_are_those_of_the_mapping_network(tiny_config):
    torch.manual_seed(0)
    G, z, ids = Generator(tiny_config(NUM_CLASSES).generator), torch.randn(3, 4), torch.tensor([2, 0, 1])
    assert torch.equal(G.styles_of(z, ids), G.mapping(z, ids))
    unconditional = Generator(tiny_config(0).generator)
    assert torch.equal(unconditional.styles_of(z, None), unconditional.mapping(z))


@pytest.mark.gpu
def test_steps_wait_once_on_a_gpu_too(tiny_config):
    """CUDA itself warns of every wait."""
    import warnings

    device, config = torch.device("cuda"), tiny_config(NUM_CLASSES)
    torch.manual_seed(0)
    G = Generator(config.generator).to(device)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False).to(device)
    D.set_trainable_(False)
    context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
    optimizer = make_optimizer(G.parameters(), config.generator_optimizer)

    def step() -> None:
        draws = Draws(0, np.arange(NUM_IMAGES), device).within("G")
        labels, images = draws.integers("label", 0, NUM_CLASSES), draws.uniform("images", 3, 16, 16)
        generator_step(G, D, optimizer, Batch(images, labels, draws.normal("z", 4), labels, draws), context)

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1 and "train_step.py" in waits[0].filename


def test_memory_is_pinned_before_it_goes_to_a_gpu(monkeypatch):
    """Without one: what is asked of the tensor."""
    calls = []

    class Recorder:
        def is_pinned(self) -> bool:
            return "pin" in calls

        def pin_memory(self) -> Recorder:
            calls.append("pin")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> Recorder:
            calls.append((device.type, non_blocking))
            return self

    send(Recorder(), torch.device("cuda"))
    send(Recorder(), torch.device("cuda"))  # pinned already
    assert calls == ["pin", ("cuda", True), ("cuda", True)]
    values = torch.arange(3)
    assert torch.equal(send(values, torch.device("cpu")), values)
