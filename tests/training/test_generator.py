# SPDX-License-Identifier: MIT
"""Properties of the generator that need no stored numbers, and the mistakes it refuses.

pytest tests/training/test_generator.py
"""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torch_utils.errors import UserError
from training.config import ConfigError, GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator
from training.generator.mapping import MappingNetwork, labels_to_ids
from training.generator.network_plan import plan_network
from training.generator.synthesis import SynthesisInput, SynthesisNetwork

ROOT = Path(__file__).parents[2]
SYNTHESIS = SynthesisConfig(
    img_resolution=16, channel_base=128, channel_max=8, num_layers=4, margin_size=3, num_fp16_res=0
)
MAPPING = MappingConfig(z_dim=8, w_dim=12, c_dim=5, num_embeddings=7, embedding_dim=6)
CONFIG = GeneratorConfig(mapping=MAPPING, synthesis=SYNTHESIS)
UNCONDITIONAL = replace(CONFIG, mapping=replace(MAPPING, c_dim=0))


def build(cfg=CONFIG, seed=0):
    """A generator whose input block, running means and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    G = Generator(cfg)
    with torch.no_grad():
        G.synthesis.input.affine.weight.normal_(std=0.3)
        G.mapping.w_avg.normal_()
        for layer in G.synthesis.layers:
            layer.bias.normal_(std=0.1)
    return G


def latents(num_samples, seed=1):
    return torch.randn(num_samples, MAPPING.z_dim, generator=torch.Generator().manual_seed(seed))


# Classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_one_hot_rows_equal_ids(dtype):
    ids = torch.tensor([3, 0, 4, 3])
    onehot = F.one_hot(ids, 5).to(dtype)
    assert labels_to_ids(onehot, 5, 4).tolist() == ids.tolist()
    G, z = build(), latents(4)
    assert torch.equal(G(z, ids), G(z, onehot))
    assert torch.equal(G(z, ids.int()), G(z, ids))


def test_the_class_matters_and_the_latent_too():
    G = build()
    z = latents(1).expand(5, -1)
    w = G.mapping(z, torch.arange(5))[:, 0]
    assert torch.pdist(w).min() > 1e-3
    w = G.mapping(latents(5), torch.zeros(5, dtype=torch.int64))[:, 0]
    assert torch.pdist(w).min() > 1e-3


@pytest.mark.parametrize(
    ("c", "words"),
    [
        (None, ["5 classes", "none"]),
        (torch.tensor([0, 5, 1]), ["class 5", "0...4"]),
        (torch.tensor([0, -1, 1]), ["class -1"]),
        (torch.zeros(3, 4), ["width 4", "5 classes"]),
        (torch.zeros(3, 0), ["width 0"]),
        (torch.tensor([0, 1]), ["(2,)", "3 latents"]),
        (torch.zeros(2, 5), ["(2, 5)", "3 latents"]),
        (torch.tensor(0), ["()"]),
        (torch.tensor([0.0, 1.0, 2.0]), ["float32"]),
        (torch.tensor([True, False, True]), ["bool"]),
    ],
)
def test_classes_that_do_not_fit_are_refused_in_one_line(c, words):
    with pytest.raises(UserError) as caught:
        build()(latents(3), c)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unconditional_network_takes_no_classes():
    G = build(UNCONDITIONAL)
    z = latents(2)
    assert torch.equal(G(z), G(z, torch.zeros(2, 0)))
    for c in (torch.tensor([0, 1]), torch.zeros(2, 5)):
        with pytest.raises(UserError, match="unconditional"):
            G(z, c)


def test_more_classes_than_embedding_rows_are_refused():
    with pytest.raises(ConfigError, match=r"c_dim=8.*\n?.*7"):
        MappingNetwork(replace(MAPPING, c_dim=8), num_ws=3)
    with pytest.raises(ConfigError, match="num_layers=0"):
        MappingNetwork(replace(MAPPING, num_layers=0), num_ws=3)


# Mapping


def test_running_mean_of_a_class_moves_once_per_sample_in_order():
    G = build()
    z, ids = latents(9), torch.tensor([1, 4, 1, 1, 0, 4, 2, 1, 0])
    expected = G.mapping.w_avg.clone()
    w = G.mapping(z, ids)[:, 0].detach()
    for row, label in zip(w, ids.tolist(), strict=True):
        expected[label] = row.lerp(expected[label], MAPPING.w_avg_beta)
    G.mapping(z, ids, update_emas=True)
    torch.testing.assert_close(G.mapping.w_avg, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(G.mapping.w_avg[3], expected[3])  # absent from the batch


def test_running_mean_is_the_same_in_one_batch_or_two():
    one, two = build(), build()
    z, ids = latents(6), torch.tensor([1, 4, 1, 1, 0, 4])
    one.mapping(z, ids, update_emas=True)
    two.mapping(z[:2], ids[:2], update_emas=True)
    two.mapping(z[2:], ids[2:], update_emas=True)
    torch.testing.assert_close(one.mapping.w_avg, two.mapping.w_avg, rtol=1e-5, atol=1e-6)


def test_truncation_pulls_to_the_mean_of_the_own_class():
    G = build()
    z, ids = latents(3), torch.tensor([2, 0, 2])
    ws = G.mapping(z, ids, truncation_psi=0)
    torch.testing.assert_close(ws, G.mapping.w_avg[ids].unsqueeze(1).expand_as(ws))
    full = G.mapping(z, ids)
    part = G.mapping(z, ids, truncation_psi=0.5, truncation_cutoff=2)
    assert torch.equal(part[:, 2:], full[:, 2:])
    assert not torch.equal(part[:, :2], full[:, :2])
    assert torch.equal(G.mapping(z, ids, truncation_psi=0.5, truncation_cutoff=0), full)
    beyond = G.mapping(z, ids, truncation_psi=0.5, truncation_cutoff=99)
    assert torch.equal(beyond, G.mapping(z, ids, truncation_psi=0.5))


def test_wrong_latents_and_cutoffs_are_refused():
    G = build()
    with pytest.raises(ValueError, match="8"):
        G(torch.randn(2, 9), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="truncation_cutoff=-1"):
        G(latents(2), torch.tensor([0, 1]), truncation_psi=0.5, truncation_cutoff=-1)
    with pytest.raises(ValueError, match=r"\(N, 6, 12\)"):
        G.synthesis(torch.zeros(2, 5, 12))


def test_embedding_table_learns_only_the_rows_of_the_batch():
    G = build()
    G(latents(3), torch.tensor([2, 0, 2])).sum().backward()
    has_gradient = G.mapping.embed.weight.grad.abs().sum(dim=1) > 0
    assert has_gradient.nonzero().flatten().tolist() == [0, 2]


# Synthesis


@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 1, "use_radial_filters": True}])
def test_a_sample_does_not_depend_on_its_batch(changes):
    """Up to rounding: demodulation normalises styles over the batch, which cancels but for an epsilon."""
    G = build(replace(CONFIG, synthesis=replace(SYNTHESIS, **changes)))
    z, ids = latents(4), torch.tensor([1, 1, 0, 3])
    together = G(z, ids)
    alone = torch.cat([G(z[i : i + 1], ids[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(together.detach().abs().max()))


def test_initial_state():
    torch.manual_seed(0)
    G = Generator(CONFIG)
    assert not G.mapping.w_avg.any()
    assert not G.synthesis.input.affine.weight.any()
    assert G.synthesis.input.affine.bias.tolist() == [1, 0, 0, 0]
    assert torch.equal(G.synthesis.input.transform, torch.eye(3))
    for layer in G.synthesis.layers:
        assert layer.magnitude_ema == 1
        assert not layer.bias.any()
        assert (layer.affine.bias == 1).all()
    assert G.synthesis.layers[-1].up_filter is None
    assert G.synthesis.layers[-1].down_filter is None
    images = G(latents(4), torch.arange(4))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_initial_frequencies_fill_the_disc_evenly():
    torch.manual_seed(0)
    freqs = SynthesisInput(4, 2000, 2, 2, sampling_rate=16, bandwidth=2.0).freqs
    radii = freqs.norm(dim=1)
    assert radii.max() <= 2
    # Uniform on a disc: the squared radius is uniform on [0, bandwidth^2].
    quantiles = (radii / 2).square().quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.04)


def test_a_shift_by_whole_pixels_shifts_the_features():
    torch.manual_seed(0)
    layer, w = SynthesisInput(4, 6, 20, 14, sampling_rate=16, bandwidth=2.0), torch.randn(2, 4)
    still = layer(w)
    layer.transform[0, 2], layer.transform[1, 2] = 3 / 16, -2 / 16
    torch.testing.assert_close(layer(w)[:, :, 2:, :-3], still[:, :, :-2, 3:], rtol=1e-4, atol=1e-5)


def test_running_magnitudes_move_only_when_asked():
    G = build()
    G(latents(2), torch.tensor([0, 1]))
    assert all(layer.magnitude_ema == 1 for layer in G.synthesis.layers)
    w_avg = G.mapping.w_avg.clone()
    G(latents(2), torch.tensor([0, 1]), update_emas=True)
    assert all(layer.magnitude_ema != 1 for layer in G.synthesis.layers)
    assert not torch.equal(G.mapping.w_avg, w_avg)


def test_the_clamp_holds_on_a_cpu_and_can_be_off():
    """The last layer has no filter after its clamp, so output_scale x clamp bounds the image."""
    z, ids = latents(2), torch.tensor([0, 1])
    images = {}
    for clamp in (None, 256.0, 0.1):
        images[clamp] = build(replace(CONFIG, synthesis=replace(SYNTHESIS, conv_clamp=clamp)))(z, ids)
    assert images[None].abs().max() > 0.1 * SYNTHESIS.output_scale * 2
    assert images[0.1].abs().max() <= 0.1 * SYNTHESIS.output_scale
    torch.testing.assert_close(images[256.0], images[None])


def test_layers_planned_for_half_precision_run_in_float32_on_a_cpu():
    z, ids = latents(2), torch.tensor([0, 1])
    half = build(replace(CONFIG, synthesis=replace(SYNTHESIS, num_fp16_res=4)))
    assert all(layer.plan.use_fp16 for layer in half.synthesis.layers)
    assert torch.equal(half(z, ids), build()(z, ids))


@pytest.mark.gpu
def test_half_precision_is_close_to_float32_on_cuda():
    G = build(replace(CONFIG, synthesis=replace(SYNTHESIS, num_fp16_res=4))).cuda()
    dtypes = []
    for layer in G.synthesis.layers:
        layer.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    ws = G.mapping(latents(4).cuda(), torch.arange(4, device="cuda"))
    half, full = G.synthesis(ws), G.synthesis(ws, force_fp32=True)
    num_layers = len(G.synthesis.layers)
    assert dtypes == [torch.float16] * num_layers + [torch.float32] * num_layers
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).abs().max() < 0.02 * full.abs().max()


# The whole


def test_copies_and_state_dicts_carry_everything():
    G = build()
    z, ids = latents(2), torch.tensor([0, 1])
    expected = G(z, ids, truncation_psi=0.5)
    assert torch.equal(copy.deepcopy(G)(z, ids, truncation_psi=0.5), expected)
    other = build(seed=7)
    other.load_state_dict(G.state_dict())
    assert torch.equal(other(z, ids, truncation_psi=0.5), expected)


def test_float64_latents_are_accepted():
    G = build()
    z, ids = latents(2), torch.tensor([0, 1])
    assert torch.equal(G(z.double(), ids), G(z, ids))


def test_every_parameter_is_trained_but_unused_rows():
    G = build()
    G(latents(4), torch.tensor([0, 1, 2, 3])).square().sum().backward()
    without = [name for name, p in G.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_synthesis_can_be_built_alone():
    synthesis = SynthesisNetwork(plan_network(CONFIG), w_dim=12)
    assert synthesis(torch.randn(2, synthesis.num_ws, 12)).shape == (2, 3, 16, 16)


def test_generator_imports_without_timm():
    code = (
        "import sys; sys.modules['timm'] = None; import training.generator.generator, "
        "training.generator.class_embedding; assert not any(m.startswith('timm.') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
