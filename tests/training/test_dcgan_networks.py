# SPDX-License-Identifier: MIT
"""The small networks: sizes, initial weights, latents and codes, heads, configurations in files."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import san
from torch_utils.conv_stacks import down_stack, init_weights_, up_stack
from torch_utils.errors import UserError
from training.config import (
    AnyDiscriminatorConfig,
    AnyGeneratorConfig,
    ConfigError,
    TrainConfig,
    from_dict,
    from_json,
    to_json,
)
from training.dcgan_config import (
    AutoencoderConfig,
    DCGANDiscriminatorConfig,
    DCGANGeneratorConfig,
    plan_channels,
)
from training.discriminator.autoencoder import AutoencoderDiscriminator
from training.discriminator.dcgan import DCGANDiscriminator
from training.generator.dcgan import DCGANGenerator, latent_inputs, to_uniform
from training.network_io import load_network, read_network, save_network
from training.presets import RECIPES, dcgan, quickstart

TINY = DCGANGeneratorConfig(img_resolution=16, channel_base=4, z_dim=8)
TINY_D = DCGANDiscriminatorConfig(img_resolution=16, channel_bases=(4,))


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("has_batchnorm", [True, False])
def test_networks_have_the_resolution_asked_for(resolution, has_batchnorm):
    sizes = {"img_resolution": resolution, "channel_max": 8, "has_batchnorm": has_batchnorm}
    G = DCGANGenerator(DCGANGeneratorConfig(channel_base=2, z_dim=5, c_dim=3, **sizes))
    D = DCGANDiscriminator(DCGANDiscriminatorConfig(channel_bases=(2, 4), c_dim=3, **sizes), "san")
    labels = torch.tensor([0, 2, 1])
    images = G(torch.randn(3, 5), labels)
    assert images.shape == (3, 3, resolution, resolution) and images.abs().max() <= 1
    logits = D(images, labels)
    assert list(logits) == ["critic0", "critic1"] and all(view.shape == (3, 1) for view in logits.values())
    norms = {type(m) for network in (G, D) for m in network.modules()} & {nn.BatchNorm2d}
    assert bool(norms) == has_batchnorm


def test_dcgan_itself_at_64_pixels():
    """Channels of the published code (ngf = ndf = 64), and no biases but the output's and the input's."""
    assert plan_channels(64, 64, 512) == [64, 128, 256, 512]
    G = DCGANGenerator(DCGANGeneratorConfig(img_resolution=64))
    weights = [p.shape for n, p in G.named_parameters() if p.ndim > 1]
    assert weights == [(512 * 16, 100), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    D = DCGANDiscriminator(DCGANDiscriminatorConfig(img_resolution=64), "gan")
    weights = [p.shape for n, p in D.named_parameters() if p.ndim == 4]
    assert weights == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]


def test_initial_weights_are_dcgans():
    G = DCGANGenerator(DCGANGeneratorConfig(img_resolution=32))
    D = DCGANDiscriminator(DCGANDiscriminatorConfig(img_resolution=32), "gan")
    for network in (G, D):
        for name, p in network.named_parameters():
            if p.ndim > 1:
                assert p.std().item() == pytest.approx(0.02, rel=0.1) and abs(p.mean().item()) < 2e-3, name
            elif name.endswith("bias"):
                assert not p.any(), name
            else:
                assert p.mean().item() == pytest.approx(1, abs=0.02) and 0 < p.std() < 0.04, name


def test_without_batchnorm_signals_keep_their_size():
    """Through four layers each way; N(0, 0.02) would shrink them hundreds of times."""
    down, up = down_stack(3, [32, 64, 128, 256], False), up_stack(100, [32, 64, 128, 256], 3, False)
    for stack in (down, up):
        init_weights_(stack, has_batchnorm=False)
    features = down(torch.randn(16, 3, 64, 64))
    assert features.shape == (16, 256, 4, 4) and 0.3 < features.std() < 2
    images = up[:-1](torch.randn(16, 100))  # before tanh
    assert images.shape == (16, 3, 64, 64) and 0.3 < images.std() < 3
    init_weights_(down, has_batchnorm=True)
    assert down(torch.randn(16, 3, 64, 64)).std() < 0.05


def test_plain_and_san_critics_start_as_one_function():
    views = {}
    for kind in ("gan", "san"):
        torch.manual_seed(0)
        D = DCGANDiscriminator(replace(TINY_D, c_dim=3), kind).eval()
        torch.manual_seed(1)
        views[kind] = D(torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 2, 1, 0]))["critic0"]
    torch.testing.assert_close(views["san"].fun, views["gan"].fun)
    layer = next(m for m in D.modules() if isinstance(m, san.SANConv2d))
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("kind", ["san", "gan"])
def test_a_conditional_critic_has_one_product_per_class(kind):
    D = DCGANDiscriminator(replace(TINY_D, c_dim=3, has_batchnorm=False), kind)
    image = torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1)
    logits = D(image, torch.tensor([0, 1, 2]))["critic0"].fun.flatten()
    assert len(set(logits.tolist())) == 3
    if kind == "san":
        D(image[:1], torch.tensor([1]))["critic0"].dir.sum().backward()
        gradient = D.critics["critic0"].last.weight.grad.flatten(1).norm(dim=1)
        assert gradient[1] > 0 and gradient[0] == gradient[2] == 0
    with pytest.raises(ValueError, match="labels are None"):
        D(image)


def test_generator_joins_latent_and_class():
    G = DCGANGenerator(replace(TINY, c_dim=3))
    z = torch.randn(2, 8)
    ws = G.mapping(z, torch.tensor([2, 0]))
    assert ws.shape == (2, 1, 11)
    torch.testing.assert_close(ws[:, 0], torch.cat([z, torch.eye(3)[[2, 0]]], dim=1))
    torch.testing.assert_close(G.mapping(z, torch.eye(3)[[2, 0]]), ws)
    G.eval()
    torch.testing.assert_close(G(z, torch.tensor([2, 0])), G.synthesis(ws))


def test_generator_refuses_what_it_cannot_do():
    G = DCGANGenerator(TINY)
    with pytest.raises(UserError, match=r"truncation psi 0\.7 .* a DCGAN has none; use 1"):
        G(torch.randn(1, 8), truncation_psi=0.7)
    with pytest.raises(ValueError, match=r"\(1, 9\) is not \(N, 8\)"):
        G(torch.randn(1, 9))
    with pytest.raises(UserError, match="unconditional"):
        G(torch.randn(1, 8), torch.tensor([1]))


@pytest.mark.parametrize("resolution", [4, 12, 24, 256])
def test_generator_refuses_other_sizes(resolution):
    with pytest.raises(ConfigError, match=f"{resolution}x{resolution} pixels do not fit --cfg dcgan"):
        DCGANGenerator(replace(TINY, img_resolution=resolution))


def test_generator_refuses_more_codes_than_latents():
    with pytest.raises(ConfigError, match="z_dim=8 is too small for 10 categories"):
        DCGANGenerator(replace(TINY, num_categories=10))


def test_codes_of_normal_latents_have_the_right_distributions():
    """10,000 draws: chances within 4 standard errors, and a uniform's first moments."""
    cfg = DCGANGeneratorConfig(
        img_resolution=16, z_dim=9, latent="uniform", num_categories=4, num_continuous=2
    )
    inputs = latent_inputs(torch.randn(10_000, 9), cfg)
    noise, categorical, continuous = inputs.split([3, 4, 2], dim=1)
    assert torch.equal(categorical.sum(1), torch.ones(10_000)) and set(categorical.unique().tolist()) == {
        0,
        1,
    }
    assert (categorical.mean(0) - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 10_000)
    for uniform in (noise, continuous):
        assert uniform.abs().max() < 1 and uniform.mean().abs() < 0.03
        assert uniform.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)
    torch.testing.assert_close(to_uniform(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 0.6826895]))


def test_codes_do_not_change_plain_latents():
    z = torch.randn(4, 8)
    assert torch.equal(latent_inputs(z, TINY), z)


def test_autoencoder_judges_by_reconstruction():
    D = AutoencoderDiscriminator(AutoencoderConfig(img_resolution=16, channel_base=4, hidden_dim=5))
    images = torch.randn(3, 3, 16, 16)
    logits = D(images)["autoencoder"]
    expected = torch.stack([(x - y).abs().mean() for x, y in zip(images, D.reconstruct(images), strict=True)])
    torch.testing.assert_close(logits.fun.flatten(), expected)
    assert logits.shape == (3, 1) and D.k == 0 and "k" in D.trained_state_dict()


def test_code_head_sees_the_critics_features():
    D = DCGANDiscriminator(replace(TINY_D, num_categories=5, num_continuous=2), "san").eval()
    images = torch.randn(3, 3, 16, 16)
    logits, codes = D.forward_with_codes(images)
    torch.testing.assert_close(logits["critic0"].fun, D(images)["critic0"].fun)
    assert [tuple(x.shape) for x in codes] == [(3, 5), (3, 2), (3, 2)]
    with pytest.raises(ConfigError, match="channel_bases"):
        DCGANDiscriminator(replace(TINY_D, num_categories=5, channel_bases=(2, 4)), "san")


def test_saved_discriminator_of_another_size_is_refused():
    D, other = (DCGANDiscriminator(replace(TINY_D, channel_bases=(b,)), "san") for b in (4, 8))
    with pytest.raises(ConfigError, match="another configuration"):
        D.load_trained_state_dict(other.trained_state_dict())
    with pytest.raises(ConfigError, match="another configuration"):
        D.load_trained_state_dict({})


# Configurations in files.


@pytest.mark.parametrize("objective", RECIPES)
def test_recipe_survives_json(objective):
    config = dcgan(objective, "digits")
    assert from_json(TrainConfig, to_json(config)) == config


def test_configurations_without_a_kind_are_stylegan_xls():
    config = quickstart()
    assert "kind" not in to_json(config.generator)
    assert from_json(AnyGeneratorConfig, to_json(config.generator)) == config.generator
    assert from_json(AnyDiscriminatorConfig, to_json(config.discriminator)) == config.discriminator
    old = to_json(config).replace('"kind": "adam",', "")  # as it was before there were kinds of optimizers
    assert from_json(TrainConfig, old) == config


def test_unknown_kind_is_refused():
    with pytest.raises(
        ConfigError, match="networks of kind 'biggan' are unknown here; this code knows 'dcgan'"
    ):
        from_dict(AnyGeneratorConfig, {"kind": "biggan"})
    with pytest.raises(ConfigError, match="DCGANGeneratorConfig has no field 'mapping'"):
        from_dict(AnyGeneratorConfig, {"kind": "dcgan", "mapping": {}})


@pytest.mark.parametrize("objective", ["nonsaturating", "infogan", "curriculum", "began"])
def test_network_file_round_trip(objective, tmp_path):
    config = dcgan(objective, "digits")
    config = replace(config, generator=replace(config.generator, channel_base=4))
    if objective == "began":
        D = AutoencoderDiscriminator(replace(config.discriminator, channel_base=4))
        D.k.fill_(0.25)
    else:
        D = DCGANDiscriminator(replace(config.discriminator, channel_max=8), "san")
    config = replace(config, discriminator=D.cfg)
    G = DCGANGenerator(config.generator)
    z = torch.randn(5, G.z_dim)
    G(z)  # moves the running statistics
    path = tmp_path / "network.safetensors"
    save_network(path, G.eval(), G=G, D_state=D.trained_state_dict(), config=config)
    loaded = load_network(path)
    assert loaded.cfg == config.generator and not loaded.training
    assert torch.equal(loaded(z), G(z))
    stored = read_network(path)
    assert stored.train_config == config and stored.discriminator_config == config.discriminator
    D2 = type(D)(stored.discriminator_config, *([] if objective == "began" else ["san"]))
    D2.load_trained_state_dict(stored.D)
    for name, value in D.trained_state_dict().items():
        assert torch.equal(value, D2.trained_state_dict()[name]), name
