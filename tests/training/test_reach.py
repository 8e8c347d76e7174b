# SPDX-License-Identifier: MIT
"""Layers compute the pixels that an image depends on, all of them and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.benchmark.recipes import shrink
from training.generator.generator import Generator
from training.generator.network_plan import plan_network
from training.generator.reach import reached_paddings
from training.presets import PRESETS


def make_synthesis(preset: str, **changes: object):
    """Synthesis network of a recipe's tiny likeness."""
    torch.manual_seed(0)
    config = shrink(PRESETS[preset]()).generator
    config = replace(config, synthesis=replace(config.synthesis, **changes))
    return Generator(config).synthesis


def run(synthesis, ws: torch.Tensor, paddings: list):
    """Images, gradients of the parameters, and the features and their gradients after each layer."""
    synthesis._reached_paddings = paddings
    features = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: features.append(output))
        for layer in synthesis.layers
    ]
    images = synthesis(ws)
    for hook in hooks:
        hook.remove()
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((images * weights).sum(), [*synthesis.parameters(), *features])
    num_parameters = len(gradients) - len(features)
    return images, gradients[:num_parameters], features, gradients[num_parameters:]


CASES = {
    "-r": ("cifar10-16", {}),
    "-r, small margin": ("cifar10-16", {"margin_size": 2}),
    "-t": ("cifar10-16", {"conv_kernel": 3, "use_radial_filters": False}),
    "wide kernel, long filters": ("cifar10-16", {"conv_kernel": 5, "filter_size": 10}),
    "stages": ("imagenet-256", {}),
    "large margin": ("imagenet-256", {"margin_size": 12}),
}


@pytest.mark.parametrize("case", CASES)
def test_images_and_gradients_are_those_of_whole_feature_maps(case):
    preset, changes = CASES[case]
    synthesis = make_synthesis(preset, **changes)
    ws = torch.randn(2, synthesis.num_ws, synthesis.w_dim, generator=torch.Generator().manual_seed(2))
    tight = run(synthesis, ws, reached_paddings(synthesis.plan.layers))
    whole = run(synthesis, ws, [layer.padding for layer in synthesis.plan.layers])
    torch.testing.assert_close(tight[0], whole[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(tight[1], whole[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert sum(f.numel() for f in tight[2]) <= sum(f.numel() for f in whole[2])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_computed_in_vain_and_nothing_is_missing(case):
    preset, changes = CASES[case]
    synthesis = make_synthesis(preset, **changes)
    ws = torch.randn(2, synthesis.num_ws, synthesis.w_dim, generator=torch.Generator().manual_seed(2))
    _, _, tight, _ = run(synthesis, ws, reached_paddings(synthesis.plan.layers))
    _, _, whole, gradients = run(synthesis, ws, [layer.padding for layer in synthesis.plan.layers])
    for ours, theirs, gradient in zip(tight, whole, gradients, strict=True):
        is_used = (gradient != 0).any(dim=0).any(dim=0)  # (H, W)
        rows, columns = is_used.any(dim=1).nonzero().flatten(), is_used.any(dim=0).nonzero().flatten()
        used = theirs[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert ours.shape == used.shape
        torch.testing.assert_close(ours, used, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_the_published_stem_leaves_out_what_its_last_layers_do_not_reach():
    layers = plan_network(PRESETS["cifar10-16"]().generator).layers
    changed = [
        layer.name
        for layer, padding in zip(layers, reached_paddings(layers), strict=True)
        if padding != layer.padding
    ]
    assert changed == ["L4_36_2048", "L5_16_2048"]


def test_running_magnitudes_are_those_of_whole_feature_maps():
    synthesis = make_synthesis("cifar10-16", magnitude_ema_beta=0.0)
    ws = torch.randn(2, synthesis.num_ws, synthesis.w_dim, generator=torch.Generator().manual_seed(2))
    inputs = []
    for layer in synthesis.layers:
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        synthesis(ws, update_emas=True)
    sizes = [layer.source.size for layer in synthesis.plan.layers]
    assert [x.shape[2] for x in inputs] == sizes
    for layer, x in zip(synthesis.layers, inputs, strict=True):
        torch.testing.assert_close(layer.magnitude_ema, x.square().mean())
