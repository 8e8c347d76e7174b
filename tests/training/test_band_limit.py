# SPDX-License-Identifier: MIT
"""Fourier features at nodes determine the whole feature map, in values and gradients, unless a user zooms out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from training.benchmark.recipes import shrink
from training.generator.band_limit import interpolation_nodes
from training.generator.generator import Generator
from training.generator.synthesis import SynthesisInput
from training.presets import PRESETS
from training.sampling import motion_matrix, move_images_


@pytest.mark.parametrize(
    ("size", "rate", "bandwidth"), [(36, 16, 2.0), (52, 32, 2.0), (20, 16, 1.0), (36, 16, 4.0)]
)
def test_waves_up_to_the_bandwidth_are_interpolated(size, rate, bandwidth):
    nodes, matrix = interpolation_nodes(size, rate, bandwidth)
    assert matrix.shape == (size, len(nodes)) and nodes.tolist() == sorted(set(nodes.tolist()))
    torch.testing.assert_close(
        matrix[nodes], torch.eye(len(nodes)), rtol=0, atol=1e-6
    )  # nodes keep their values
    positions = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / rate
    frequencies, phases = torch.rand(2, 500, dtype=torch.float64)
    waves = torch.sin(2 * math.pi * (positions[:, None] * frequencies * bandwidth + phases))
    error = matrix.double() @ waves[nodes] - waves
    assert error.abs().max() < 2e-6
    fast = torch.sin(2 * math.pi * positions * (bandwidth + 1))
    assert (matrix.double() @ fast[nodes] - fast).abs().max() > 1e-3  # which is why zooming needs all pixels


def test_number_of_nodes():
    assert len(interpolation_nodes(36, 16, 2.0)[0]) == 20
    nodes, matrix = interpolation_nodes(
        12, 4, 2.0
    )  # at the limit of the sampling rate nothing can be left out
    assert nodes.tolist() == list(range(12)) and torch.equal(matrix, torch.eye(12))


def make_generator(preset: str, **changes: object) -> Generator:
    """Tiny, with the recipe's own input, which turns and shifts with w."""
    torch.manual_seed(0)
    config = shrink(PRESETS[preset]()).generator
    G = Generator(replace(config, synthesis=replace(config.synthesis, **changes)))
    torch.nn.init.normal_(G.synthesis.input.affine.weight)
    return G


def run(G: Generator, monkeypatch: pytest.MonkeyPatch, whole: bool):
    """Images and all gradients."""
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(SynthesisInput, "is_determined_by_nodes", lambda self: False)
        ws = torch.randn(2, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(2)).requires_grad_()
        images = G.synthesis(ws)
        weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        return images, torch.autograd.grad((images * weights).sum(), [ws, *G.synthesis.parameters()])


CASES = {
    "-r": ("cifar10-16", {}),  # the first convolution sees nodes
    "-t": ("cifar10-16", {"conv_kernel": 3, "use_radial_filters": False}),  # it needs whole maps
    "stages": ("imagenet-256", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_moved", [False, True])
def test_images_and_gradients_are_those_of_whole_feature_maps(case, is_moved, monkeypatch):
    G = make_generator(CASES[case][0], **CASES[case][1])
    assert len(G.synthesis.input.row_nodes) < G.synthesis.input.height
    if is_moved:
        move_images_(G, motion_matrix((0.7, -0.2), 30))
    assert G.synthesis.input.is_determined_by_nodes()
    images, gradients = run(G, monkeypatch, whole=False)
    whole_images, whole_gradients = run(G, monkeypatch, whole=True)
    torch.testing.assert_close(images, whole_images, rtol=1e-5, atol=2e-6)
    for ours, other in zip(gradients, whole_gradients, strict=True):
        assert (ours - other).abs().max() <= 1e-4 * other.abs().max() + 1e-8


def test_running_magnitudes_are_of_whole_maps():
    G = make_generator("cifar10-16")
    layer = G.synthesis.layers[0]
    ws = torch.randn(2, G.num_ws, G.w_dim)
    expected = G.synthesis.input(ws[:, 0]).square().mean().lerp(torch.ones([]), layer.plan.magnitude_ema_beta)
    G.synthesis(ws, update_emas=True)
    torch.testing.assert_close(layer.magnitude_ema, expected)


def test_zooming_out_takes_whole_maps():
    G = make_generator("cifar10-16")
    G.synthesis.input.transform[:2, :2] *= 1.5  # 1.5 times the frequencies
    assert not G.synthesis.input.is_determined_by_nodes()
    G.synthesis.input.transform[:2, :2] /= 3
    assert G.synthesis.input.is_determined_by_nodes()


def test_work_can_be_counted_without_memory():
    synthesis = make_generator("cifar10-16").synthesis.to("meta")
    assert synthesis.input.is_determined_by_nodes()
    assert synthesis(torch.zeros(2, synthesis.num_ws, synthesis.w_dim, device="meta")).shape == (2, 3, 16, 16)


@pytest.mark.gpu
def test_a_gpu_takes_whole_maps():
    assert not make_generator("cifar10-16").cuda().synthesis.input.is_determined_by_nodes()
