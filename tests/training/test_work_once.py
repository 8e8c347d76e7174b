# SPDX-License-Identifier: MIT
"""What a step does not compute: features twice, gradients of what is not trained, guidance without weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import LossConfig, SuperresConfig, TrainConfig
from training.discriminator.feature_network import build_feature_network
from training.discriminator.heads import SpectralNormConv2d
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.initialization import build_loss
from training.loss import ProjectedGANLoss
from training.optimizers import make_optimizer
from training.presets import quickstart
from training.superres import freeze_stem_
from training.train_step import StepContext, discriminator_step, generator_step

NUM_CLASSES, NUM_IMAGES = 3, 4
VIT = "deit_tiny_distilled_patch16_224"


@pytest.fixture(scope="module")
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> TrainConfig:
    """Two micro-batches, all augmentations."""
    return replace(
        quickstart(),
        generator=tiny_generator_config(NUM_CLASSES),
        discriminator=tiny_discriminator_config(NUM_CLASSES),
        loss_terms=LossConfig(blur_fade_kimg=0),
        batch_size=NUM_IMAGES,
        microbatch_size=NUM_IMAGES // 2,
    )


class Run:
    """Networks, and steps on one batch."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.G = Generator(config.generator)
        self.D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
        self.D.set_trainable_(False)
        if config.generator.superres:
            freeze_stem_(self.G, config.trains_stem_input)
        self.context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
        trained = [p for p in self.G.parameters() if p.requires_grad]
        self.G_optimizer = make_optimizer(trained, config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        size, draws = config.generator.img_resolution, Draws(0, np.arange(NUM_IMAGES))
        images, labels = draws.uniform("x", 3, size, size) * 2 - 1, draws.integers("y", 0, NUM_CLASSES)
        self.batch = Batch(images, labels, draws.normal("z", self.G.z_dim), labels, draws)

    def generator_step(self) -> None:
        generator_step(self.G, self.D, self.G_optimizer, self.batch, self.context)

    def discriminator_step(self) -> None:
        discriminator_step(self.G, self.D, self.D_optimizer, self.batch, self.context)


def count_calls(run: Run) -> Counter[str]:
    """Counts, from now on, passes of each part."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    run.G.synthesis.register_forward_pre_hook(count("synthesis"))
    for parts in ("feature_networks", "projectors"):
        for part in getattr(run.D, parts).values():
            part.register_forward_pre_hook(count(parts))
    for heads in run.D.heads.values():
        for head in heads:
            head.register_forward_pre_hook(count("heads"))
    return calls


def test_everything_passes_once_per_micro_batch(tiny_config):
    run = Run(tiny_config)
    calls = count_calls(run)
    run.generator_step()
    assert calls == {"synthesis": 2, "feature_networks": 2, "projectors": 2, "heads": 4}
    calls.clear()
    run.discriminator_step()  # real and generated images
    assert calls == {"synthesis": 2, "feature_networks": 4, "projectors": 4, "heads": 8}


def test_only_heads_have_a_graph_in_the_discriminators_step(tiny_config):
    run, images, maps = Run(tiny_config), [], []
    run.D.register_forward_pre_hook(lambda _, args: images.append(args[0].requires_grad))
    for network in (*run.D.feature_networks.values(), *run.D.projectors.values()):
        network.register_forward_hook(lambda _, _args, out: maps.extend(x.requires_grad for x in out))
    run.discriminator_step()
    assert images == [False] * 4 and len(maps) == 16 and not any(maps)
    images.clear(), maps.clear()
    run.generator_step()
    assert images == [True] * 2 and len(maps) == 8 and all(maps)


class WeightGradients(TorchDispatchMode):
    """Counts backward passes of convolutions that ask for the gradient of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: Counter[bool] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "convolution_backward":
            self.wanted[args[-1][1]] += 1  # output_mask: input, weight, bias
        return func(*args, **(kwargs or {}))


def test_weight_gradients_are_computed_for_trained_layers_only(tiny_config):
    run = Run(tiny_config)
    num_layers = len(run.G.synthesis.layers)
    with WeightGradients() as counted:
        run.generator_step()
    assert counted.wanted[True] == 2 * num_layers  # two micro-batches
    assert counted.wanted[False] > 20  # heads and features pass gradients on
    trained = [m for m in run.D.heads.modules() if isinstance(m, SpectralNormConv2d)]
    assert trained and all(m.weight_orig.grad is None for m in trained)
    with WeightGradients() as counted:
        run.discriminator_step()
    assert counted.wanted[True] > 0 and counted.wanted[False] == 0
    assert all(m.weight_orig.grad is not None for m in trained)


def stage(config: TrainConfig, trains_stem_input: bool) -> TrainConfig:
    head = SuperresConfig(up_factor=2, head_layers=3)
    generator = replace(config.generator, superres=(head,))
    discriminator = replace(config.discriminator, img_resolution=generator.img_resolution)
    return replace(
        config, generator=generator, discriminator=discriminator, trains_stem_input=trains_stem_input
    )


def test_a_frozen_stem_has_neither_graph_nor_gradients(tiny_config):
    run, has_graph = Run(stage(tiny_config, trains_stem_input=False)), {}
    for layer in run.G.synthesis.plan.layers:
        module = run.G.synthesis.get_submodule(layer.name)
        module.register_forward_hook(
            lambda _, _args, out, name=layer.name: has_graph.__setitem__(name, out.requires_grad)
        )
    with WeightGradients() as counted:
        run.generator_step()
    plan = run.G.synthesis.plan
    assert has_graph == {layer.name: layer in plan.head for layer in plan.layers}
    assert counted.wanted[True] == 2 * len(plan.head)
    moved = {name for name, p in run.G.named_parameters() if p.grad is not None}
    prefixes = tuple(f"synthesis.{layer.name}." for layer in plan.head)
    assert moved and all(name.startswith(prefixes) for name in moved)


def test_a_stem_below_trained_features_passes_gradients_on_but_computes_none(tiny_config):
    run = Run(stage(tiny_config, trains_stem_input=True))
    with WeightGradients() as counted:
        run.generator_step()
    assert counted.wanted[True] == 2 * len(run.G.synthesis.plan.head)
    assert run.G.synthesis.input.weight.grad is not None and run.G.mapping.fc0.weight.grad is None


def test_guidance_is_not_built_without_weight(tiny_config, monkeypatch):
    built = []
    monkeypatch.setattr(
        "training.loss.GuidanceClassifier.pretrained", lambda: built.append(1) or nn.Identity()
    )
    assert build_loss(tiny_config, torch.device("cpu")).guidance is None and not built
    terms = replace(tiny_config.loss_terms, cls_weight=8.0)
    build_loss(replace(tiny_config, loss_terms=terms), torch.device("cpu"))
    assert built


def test_transformers_use_fused_attention(monkeypatch):
    """timm decides by the installed torch; the plain form would keep every attention matrix."""
    network, calls = build_feature_network(VIT, pretrained=False), []
    attention = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    network(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(network.backbone.blocks) == 12


def test_adam_is_fused(tiny_config):
    run = Run(tiny_config)
    for optimizer in (run.G_optimizer, run.D_optimizer):
        assert optimizer.defaults["fused"]


def test_fused_adam_makes_the_plain_ones_steps(tiny_config):
    config, weights = tiny_config.generator_optimizer, []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(20, 20)
        optimizer = make_optimizer(layer.parameters(), config)
        if not fused:
            lr, betas = config.adjusted()
            optimizer = torch.optim.Adam(layer.parameters(), lr, betas, config.eps, foreach=False)
        for step in range(20):
            layer.weight.grad = torch.randn(20, 20, generator=torch.Generator().manual_seed(step))
            layer.bias.grad = None if step < 10 else layer.weight.grad[0].clone()
            optimizer.step()
        weights.append([p.detach().clone() for p in layer.parameters()])
    for fast, plain in zip(*weights, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
