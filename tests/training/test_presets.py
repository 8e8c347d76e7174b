# SPDX-License-Identifier: MIT
"""Presets: the published numbers, the switches that only paper presets set, and docstrings that can be typed."""

import re

import pytest

from metrics import evaluate
from san import OBJECTIVES
from training.config import LossConfig
from training.presets import PRESETS, stylegan3_generator, stylegan_xl

PAPER_PRESETS = {"cifar10-16", "ffhq-16"}
BACKBONES = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid(name):
    config = PRESETS[name]()
    config.validate()
    assert config.loss == "san" and config.objective in OBJECTIVES
    assert config.metrics
    for metric in config.metrics:
        evaluate.check_metric(metric)
    synthesis, discriminator = config.generator.synthesis, config.discriminator
    assert synthesis.img_resolution == discriminator.img_resolution
    assert config.generator.mapping.c_dim == discriminator.c_dim
    assert config.data.use_labels == (discriminator.c_dim > 0)
    assert config.embedding_source == "data"  # cli.adapt_to_data makes it "random" for data without classes


@pytest.mark.parametrize("function", [*PRESETS.values(), stylegan_xl], ids=lambda f: f.__name__)
def test_docstring_holds_a_command(function):
    lines = [line.strip() for line in function.__doc__.splitlines()]
    commands = [line for line in lines if line.startswith("python train.py ")]
    assert len(commands) == 1
    flags = re.findall(r"(--[\w-]+) (\S+)", commands[0])
    assert ("--loss", "san") in flags
    if function is not stylegan_xl:
        assert PRESETS[dict(flags)["--preset"]] is function


def test_only_paper_presets_shift_the_batchnorm_statistics():
    switched_on = {n for n, p in PRESETS.items() if p().discriminator.official_batchnorm_statistics}
    assert switched_on == PAPER_PRESETS
    assert not stylegan_xl().discriminator.official_batchnorm_statistics


def test_cifar_stem_has_the_published_numbers():
    """Against the configuration that the official command line makes of its published command."""
    config = PRESETS["cifar10-16"]()
    mapping, synthesis = config.generator.mapping, config.generator.synthesis
    assert (mapping.z_dim, mapping.w_dim, mapping.num_layers, mapping.c_dim) == (64, 512, 2, 10)
    assert (synthesis.channel_base, synthesis.channel_max) == (131072, 2048)
    assert synthesis.conv_kernel == 1 and synthesis.use_radial_filters
    assert synthesis.num_layers == 6 and synthesis.img_resolution == 16
    assert synthesis.magnitude_ema_beta == pytest.approx(0.9314821318134288, rel=1e-12)
    G_optimizer, D_optimizer = config.generator_optimizer, config.discriminator_optimizer
    assert (G_optimizer.lr, G_optimizer.betas, G_optimizer.eps, G_optimizer.reg_interval) == (
        0.0025, (0, 0.99), 1e-8, 4
    )  # fmt: skip
    assert (D_optimizer.lr, D_optimizer.betas, D_optimizer.eps, D_optimizer.reg_interval) == (
        0.002, (0, 0.99), 1e-8, 16
    )  # fmt: skip
    assert (config.batch_size, config.microbatch_size) == (2048, 8)
    assert (config.total_kimg, config.tick_kimg, config.snapshot_ticks) == (300000, 4, 10)
    assert config.ema_halflife_kimg == 640.0 and config.ema_rampup == 0.05
    assert config.seed == 0 and config.benchmark
    assert config.data.use_labels and config.data.mirror and config.data.num_workers == 3
    assert config.loss_terms == LossConfig(
        blur_init_sigma_px=2, blur_fade_kimg=300, pl_weight=2.0, style_mixing_prob=0.0, cls_weight=0.0
    )
    discriminator = config.discriminator
    assert discriminator.backbones == BACKBONES and discriminator.feature_resolution == 224
    assert (discriminator.projected_channels, discriminator.num_levels, discriminator.c_dim) == (64, 4, 10)
    assert discriminator.augment_policy == "color,translation,cutout"


def test_ffhq_stem_differs_from_cifar_in_classes_only():
    config = PRESETS["ffhq-16"]()
    assert config == PRESETS["ffhq-16"]()
    assert config.discriminator.c_dim == config.generator.mapping.c_dim == 0
    assert config.generator.synthesis == PRESETS["cifar10-16"]().generator.synthesis
    assert (config.batch_size, config.total_kimg, config.ema_halflife_kimg) == (2048, 300000, 640.0)


def test_defaults_of_stylegan3_t_at_256():
    """Against the configuration that the official command line makes of --cfg stylegan3-t --batch 32."""
    config = stylegan_xl("stylegan3-t", "ffhq256.zip", img_resolution=256, batch_size=32, microbatch_size=32)
    synthesis = config.generator.synthesis
    assert (synthesis.channel_base, synthesis.channel_max) == (65536, 1024)
    assert (synthesis.conv_kernel, synthesis.use_radial_filters, synthesis.num_layers) == (3, False, 14)
    assert synthesis.magnitude_ema_beta == pytest.approx(0.9988915792636801, rel=1e-12)
    assert config.discriminator.feature_resolution is None and config.discriminator.c_dim == 0
    assert config.discriminator.backbones == BACKBONES
    assert (config.total_kimg, config.tick_kimg, config.snapshot_ticks) == (25000, 4, 50)
    assert config.ema_halflife_kimg == 10.0
    assert (config.data.path, config.data.use_labels, config.data.mirror) == ("ffhq256.zip", False, False)


@pytest.mark.parametrize(("resolution", "expected"), [(16, 224), (128, 224), (256, None), (512, None)])
def test_only_small_images_are_enlarged_for_the_features(resolution, expected):
    assert stylegan_xl(img_resolution=resolution).discriminator.feature_resolution == expected


def test_r_has_twice_the_channels_of_t():
    t, r = (stylegan3_generator(kind, 32, 5, 64).synthesis for kind in ("stylegan3-t", "stylegan3-r"))
    assert (r.channel_base, r.channel_max) == (2 * t.channel_base, 2 * t.channel_max)
    assert (t.conv_kernel, r.conv_kernel) == (3, 1)
    assert (t.use_radial_filters, r.use_radial_filters) == (False, True)
    assert t.magnitude_ema_beta == r.magnitude_ema_beta == 0.5 ** (64 / 20000)
