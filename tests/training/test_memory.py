# SPDX-License-Identifier: MIT
"""Parameters and memory counted on the meta device, against real networks and a measured step on the CPU."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from torch_utils.ops.choice import using
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import ProjectedGANLoss
from training.memory import Footprint, count_activations, count_bytes, count_footprint, count_numbers
from training.presets import PRESETS
from training.superres import freeze_stem_

NUM_IMAGES = 4


def tiny_stage(**changes) -> TrainConfig:
    """A stage on digits with channels enough that activations outweigh what a profiler adds."""
    config = PRESETS["digits-16"]()
    synthesis = replace(config.generator.synthesis, channel_base=8192, channel_max=64)
    generator = replace(config.generator, synthesis=synthesis)
    return replace(config, generator=generator, microbatch_size=NUM_IMAGES, **changes)


cached_footprint = functools.cache(count_footprint)


def plain_footprint(config: TrainConfig, device_type: str) -> Footprint:
    """With the operators in plain PyTorch, on either device: C++ ones, on a CPU, keep less than half."""
    with using("reference"):
        return count_footprint(config, device_type)


def test_the_operators_that_a_device_uses_are_counted():
    config = tiny_stage(trains_stem_input=True)
    fused, plain = cached_footprint(config, "cpu"), plain_footprint(config, "cpu")
    assert fused.activations == plain.activations or fused.activations < 0.6 * plain.activations
    assert cached_footprint(config, "cuda").activations == plain_footprint(config, "cuda").activations


def real_networks(config: TrainConfig) -> tuple[Generator, ProjectedDiscriminator]:
    G = Generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
    D.set_trainable_(False)
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    return G, D


def test_parameters_are_those_of_the_real_networks():
    config = tiny_stage()
    (G, D), footprint = real_networks(config), cached_footprint(config, "cpu")
    assert footprint.G_parameters == count_numbers(G.parameters())
    assert (
        footprint.G_trained
        == count_numbers(p for p in G.parameters() if p.requires_grad)
        < footprint.G_parameters
    )
    assert footprint.D_trained == count_numbers(D.trainable_parameters()) < footprint.D_parameters
    assert footprint.weights == count_bytes([*G.state_dict().values(), *D.state_dict().values()])
    assert footprint.average == count_bytes(G.state_dict().values())
    assert footprint.gradients == 4 * (footprint.G_trained + footprint.D_trained)
    assert footprint.optimizers == 2 * footprint.gradients
    parts = (
        footprint.weights,
        footprint.average,
        footprint.gradients,
        footprint.optimizers,
        footprint.activations,
    )
    assert footprint.total == sum(parts)


def test_backbones_count_though_their_weights_are_buffers():
    config = replace(
        tiny_stage(), discriminator=replace(tiny_stage().discriminator, num_levels=4, head_resolution=4)
    )
    config = replace(
        config, discriminator=replace(config.discriminator, feature_resolution=64, nominal_resolution=64)
    )
    footprint = cached_footprint(config, "cpu")
    assert footprint.D_parameters - footprint.D_trained > 3_000_000  # EfficientNet-Lite0 without its head


@pytest.mark.parametrize("trains_stem_input", [False, True])
def test_activations_are_what_a_real_step_keeps(trains_stem_input, tmp_path):
    """Within a few percent of the allocator's peak in a forward and backward pass on the CPU."""
    config = tiny_stage(trains_stem_input=trains_stem_input)
    counted = cached_footprint(config, "cpu").activations
    G, D = real_networks(config)
    assert count_activations(G, D, None, config, force_fp32=True) == pytest.approx(counted, rel=0.05)
    loss, z, labels = ProjectedGANLoss(config), torch.randn(NUM_IMAGES, G.z_dim), torch.arange(NUM_IMAGES)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        images = G.synthesis(G.mapping(z, labels))
        batch = Batch(images, labels, z, labels, Draws(0, np.arange(NUM_IMAGES)))
        loss.generator_loss(D, images, batch, 0, StatsCollector()).backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    assert counted == pytest.approx(peak_bytes(tmp_path / "trace.json"), rel=0.15)


def peak_bytes(trace) -> int:
    """Most bytes allocated at once, from a profiler's trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        current += change
        peak = max(peak, current)
    return peak


def test_a_stem_that_is_left_alone_keeps_nothing():
    """Gradients for the stem's Fourier features pass through all its layers."""
    alone, along = (plain_footprint(tiny_stage(trains_stem_input=x), "cpu") for x in (False, True))
    assert alone.activations < 0.9 * along.activations
    assert alone.G_trained < along.G_trained


def test_activations_grow_with_the_micro_batch():
    """By as much with each image; what depends on weights alone does not."""
    one, two, three = (
        cached_footprint(replace(tiny_stage(), microbatch_size=n), "cpu").activations for n in (4, 8, 12)
    )
    assert three - two == pytest.approx(two - one, rel=0.02) and two > 1.5 * one


def test_half_precision_is_counted_on_cuda_only():
    config = tiny_stage(trains_stem_input=True)
    synthesis = replace(config.generator.synthesis, num_fp16_res=4)
    config = replace(config, generator=replace(config.generator, synthesis=synthesis))
    cpu, cuda = (plain_footprint(config, device) for device in ("cpu", "cuda"))
    assert cuda.activations < 0.85 * cpu.activations
    assert replace(cuda, activations=0) == replace(cpu, activations=0)


def test_guidance_counts():
    config = tiny_stage()
    guided = replace(config, loss_terms=replace(config.loss_terms, cls_weight=8.0))
    before, after = cached_footprint(config, "cpu"), cached_footprint(guided, "cpu")
    assert after.weights - before.weights > 4 * 22_000_000  # DeiT-small
    assert after.activations > before.activations
    assert (after.D_parameters, after.gradients) == (before.D_parameters, before.gradients)


def test_counting_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    count_footprint(tiny_stage(), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
