# SPDX-License-Identifier: MIT
"""--checkpoint-activations: the same gradients bit for bit, of first and second order, from less memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from torch_utils.ops import halving_conv
from torch_utils.recompute import recompute
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import ConfigError, LossConfig, TrainConfig
from training.config_changes import effect_of
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.initialization import new_networks
from training.loss import GuidanceClassifier, ProjectedGANLoss
from training.memory import count_activations, count_footprint
from training.presets import PRESETS, dcgan, quickstart
from training.superres import freeze_stem_
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step

NUM_CLASSES, NUM_IMAGES = 3, 4


@pytest.fixture(scope="module")
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> Callable[[int], TrainConfig]:
    """tiny_config(c_dim): 16x16 images, all augmentations and blur, two micro-batches."""

    def make(c_dim: int = NUM_CLASSES) -> TrainConfig:
        return replace(
            quickstart(),
            generator=tiny_generator_config(c_dim),
            discriminator=tiny_discriminator_config(c_dim),
            loss_terms=LossConfig(pl_weight=2.0, style_mixing_prob=0.5),
            batch_size=NUM_IMAGES,
            microbatch_size=NUM_IMAGES // 2,
        )

    return make


def make_batch(config: TrainConfig) -> Batch:
    c_dim, size = config.generator.c_dim, config.generator.img_resolution
    draws = Draws(0, np.arange(NUM_IMAGES))
    labels = draws.integers("label", 0, c_dim) if c_dim else None
    images = draws.uniform("images", 3, size, size) * 2 - 1
    return Batch(images, labels, draws.normal("z", config.generator.mapping.z_dim), labels, draws)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def run_steps(config: TrainConfig, recomputes: bool) -> dict[str, dict[str, Tensor]]:
    """Gradients of each step, and the networks after all of them."""
    torch.manual_seed(1)
    G = Generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
    D.set_trainable_(False)
    G.synthesis.recomputes = D.recomputes = recomputes
    context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
    G_optimizer = torch.optim.Adam(G.parameters(), lr=0.0025, betas=(0.0, 0.99))
    D_optimizer = torch.optim.Adam(D.trainable_parameters(), lr=0.002, betas=(0.0, 0.99))
    batch, found = make_batch(config), {}
    generator_step(G, D, G_optimizer, batch, context)
    found["G"] = gradients(G)
    pl_mean = path_length_step(G, G_optimizer, batch, torch.tensor(0.0), context)
    found["path length"] = {**gradients(G), "mean": pl_mean}
    discriminator_step(G, D, D_optimizer, batch, context)
    found["D"] = gradients(D)
    found["after"] = copy.deepcopy({**G.state_dict(prefix="G."), **D.state_dict(prefix="D.")})
    return found


@pytest.mark.parametrize("c_dim", [0, NUM_CLASSES])
def test_steps_are_the_same_bit_for_bit(c_dim, tiny_config):
    """Path length too, which differentiates twice; and the statistics of heads, which must move once per pass."""
    plain, recomputed = (run_steps(tiny_config(c_dim), recomputes) for recomputes in (False, True))
    for kind, expected in plain.items():
        assert expected.keys() == recomputed[kind].keys() and len(expected) > 5
        for name, value in expected.items():
            assert torch.equal(recomputed[kind][name], value), (kind, name)
    assert plain["path length"]["synthesis.input.weight"].any()


def test_layers_and_features_run_twice_in_the_generators_step_only(tiny_config):
    config = tiny_config()
    G = Generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
    D.set_trainable_(False)
    G.synthesis.recomputes = D.recomputes = True
    counts = {"layer": 0, "features": 0, "head": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    G.synthesis.layers[1].register_forward_pre_hook(count("layer"))
    next(iter(D.feature_networks.values())).register_forward_pre_hook(count("features"))
    next(iter(D.heads.values()))[0].register_forward_pre_hook(count("head"))
    context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
    generator_step(G, D, torch.optim.Adam(G.parameters()), make_batch(config), context)
    assert counts == {"layer": 4, "features": 4, "head": 2}
    counts.update(layer=0, features=0, head=0)
    optimizer = torch.optim.Adam(D.trainable_parameters())
    discriminator_step(G, D, optimizer, make_batch(config), context)
    assert counts == {"layer": 2, "features": 4, "head": 4}  # real and generated images, two parts each


def test_running_magnitudes_move_once_and_the_random_state_stays(tiny_config):
    torch.manual_seed(1)
    plain = Generator(tiny_config().generator)
    recomputed = copy.deepcopy(plain)
    recomputed.synthesis.recomputes = True
    z, ids, found = torch.randn(4, plain.z_dim), torch.tensor([0, 1, 2, 0]), []
    for G in (plain, recomputed):
        state = torch.random.get_rng_state()
        G(z, ids, update_emas=True).square().sum().backward()
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append({**G.state_dict(), **gradients(G)})
    assert recomputed.synthesis.layers[0].magnitude_ema != 1
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_recomputed_function_keeps_its_arguments_alone():
    kept, x = [], torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = recompute(lambda v: v.repeat(100).exp().sin().sum(), x)
    assert kept == [8]
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, 100 * x.exp().cos() * x.exp())


def test_guidance_is_computed_again_with_the_same_gradient(tiny_config):
    config, images = tiny_config(), torch.rand(2, 3, 16, 16, requires_grad=True)
    config = replace(config, loss_terms=replace(config.loss_terms, cls_weight=8.0))
    model, gradients = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, NUM_CLASSES)), []
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False).eval()
    D.set_trainable_(False)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for recomputes in (False, True):
        loss = ProjectedGANLoss(replace(config, checkpoint_activations=recomputes), GuidanceClassifier(model))
        value = loss.generator_loss(D, images, make_batch(config)[:2], 0, StatsCollector())
        gradients.append(torch.autograd.grad(value, images)[0])
    assert len(calls) == 3 and torch.equal(*gradients)


# Memory.


def large_stage() -> TrainConfig:
    """Channels enough that activations outweigh what a profiler adds."""
    config = PRESETS["digits-16"]()
    synthesis = replace(config.generator.synthesis, channel_base=8192, channel_max=64)
    generator = replace(config.generator, synthesis=synthesis)
    return replace(config, generator=generator, microbatch_size=8, trains_stem_input=True)


def test_the_estimate_follows_what_a_real_step_keeps(tmp_path, monkeypatch):
    # What an operator needs for a moment is not kept. Kernels that it transforms weigh as much as such small maps.
    monkeypatch.setattr(halving_conv, "_is_fastest", lambda x, padding: False)
    measured, counted = {}, {}
    for recomputes in (False, True):
        config = replace(large_stage(), checkpoint_activations=recomputes)
        torch.manual_seed(0)
        G = Generator(config.generator)
        freeze_stem_(G, config.trains_stem_input)
        D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
        counted[recomputes] = count_activations(G, D, None, config, force_fp32=True)
        assert count_footprint(config, "cpu").activations == pytest.approx(counted[recomputes], rel=0.05)
        z, labels, loss = torch.randn(8, G.z_dim), torch.arange(8), ProjectedGANLoss(config)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            images = G.synthesis(G.mapping(z, labels))
            batch = Batch(images, labels, z, labels, Draws(0, np.arange(8)))
            loss.generator_loss(D, images, batch, 0, StatsCollector()).backward()
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        measured[recomputes] = peak_bytes(tmp_path / "trace.json")
    assert measured[True] < 0.75 * measured[False]
    assert counted[False] == pytest.approx(measured[False], rel=0.15)
    assert counted[True] == pytest.approx(measured[True], rel=0.15)


def peak_bytes(trace: Path) -> int:
    """Most bytes allocated at once, from a profiler's trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        current += change
        peak = max(peak, current)
    return peak


# The setting.


def test_the_networks_of_a_run_follow_the_setting(tiny_config, monkeypatch):
    def random_discriminator(cfg, head_kind):
        return ProjectedDiscriminator(cfg, head_kind, pretrained=False)

    monkeypatch.setattr("training.initialization.new_discriminator", random_discriminator)
    for setting in (False, True):
        config = replace(tiny_config(), checkpoint_activations=setting)
        networks = new_networks(config, torch.device("cpu"))
        assert networks.G.synthesis.recomputes == networks.D.recomputes == setting
        assert not networks.G_ema.synthesis.recomputes


def test_a_run_may_go_on_with_the_other_setting():
    assert effect_of("checkpoint_activations") == "free"


def test_small_networks_have_no_such_setting():
    config = replace(dcgan("nonsaturating", data="digits"), checkpoint_activations=True)
    with pytest.raises(ConfigError, match="--checkpoint-activations 1 is for StyleGAN-XL's networks"):
        config.validate()
