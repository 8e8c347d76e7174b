# SPDX-License-Identifier: MIT
"""Presets: the published numbers, the switches that only paper presets set, and docstrings that can be typed."""

import itertools
import re

import pytest

import train
from san import OBJECTIVES
from training.config import LossConfig
from training.generator.network_plan import plan_network
from training.metric_schedule import parse_schedule
from training.presets import PRESETS, stylegan3_generator, stylegan_xl

PAPER_PRESETS = {name for name in PRESETS if name.partition("-")[0] in ("cifar10", "ffhq", "imagenet")}
STAGES = {name for name, preset in PRESETS.items() if preset().generator.superres}
SIDES = (16, 32, 64, 128, 256, 512, 1024)
BACKBONES = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid(name):
    config = PRESETS[name]()
    config.validate()
    assert config.loss == "san" and config.objective in OBJECTIVES
    assert config.metrics
    parse_schedule(config.metrics)
    generator, discriminator = config.generator, config.discriminator
    assert generator.img_resolution == discriminator.img_resolution
    assert generator.img_resolution == plan_network(generator).img_resolution
    assert name == "quickstart" or name.endswith(f"-{generator.img_resolution}")
    assert config.generator.mapping.c_dim == discriminator.c_dim
    assert config.data.use_labels == (discriminator.c_dim > 0)
    # cli.adapt_to_data makes it "random" for data without classes
    assert config.embedding_source == ("stem" if generator.superres else "data")
    assert not (generator.superres and config.loss_terms.pl_weight)
    assert config.ema_halflife_kimg == config.batch_size * 10 / 32 or name not in PAPER_PRESETS


@pytest.mark.parametrize("function", [*PRESETS.values(), stylegan_xl], ids=lambda f: f.__name__)
def test_docstring_holds_a_command(function):
    lines = [line.strip() for line in function.__doc__.splitlines()]
    commands = [line for line in lines if line.startswith("python train.py ")]
    assert len(commands) == 1
    flags = re.findall(r"(--[\w-]+) (\S+)", commands[0])
    has_published_gan = function.__name__.startswith("imagenet_") and function is not PRESETS["imagenet-256"]
    assert ("--loss", "gan" if has_published_gan else "san") in flags
    if function is not stylegan_xl:
        name = dict(flags)["--preset"]
        assert PRESETS[name] is function
        assert ("--path_stem" in dict(flags)) == (name in STAGES)
        known = {option for parameter in train.main.params for option in parameter.opts}
        assert {flag for flag, _ in flags} <= known


@pytest.mark.parametrize("name", sorted(PAPER_PRESETS))
def test_docstring_says_how_long_and_how_good(name):
    text = PRESETS[name].__doc__
    assert re.search(r"\d+ million images|[Ll]ength (and hardware )?not reported", text)
    assert re.search(r"batch \d+", text, flags=re.IGNORECASE)
    assert re.search(r"FID: not reported|FID \d\.\d\d \((official README|SAN paper|paper)", text)


def test_only_paper_presets_shift_the_batchnorm_statistics():
    switched_on = {n for n, p in PRESETS.items() if p().discriminator.official_batchnorm_statistics}
    assert switched_on == PAPER_PRESETS
    assert {n for n, p in PRESETS.items() if p().trains_stem_input} == PAPER_PRESETS & STAGES
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


def test_imagenet_has_39_layers_at_1024():
    """11 in the stem, then 7 more and 2 less per stage, and 5 at 1024 (StyleGAN-XL), ToRGB not counted."""
    layers = [len(plan_network(PRESETS[f"imagenet-{side}"]().generator).layers) - 1 for side in SIDES]
    assert layers == [11, 16, 21, 26, 31, 36, 39]


@pytest.mark.parametrize("name", ["ffhq", "imagenet"])
def test_each_stage_stands_on_the_one_below(name):
    for below, above in itertools.pairwise(PRESETS[f"{name}-{side}"]().generator for side in SIDES):
        assert above.superres[:-1] == below.superres and above.synthesis == below.synthesis
        assert above.mapping == below.mapping and above.img_resolution == 2 * below.img_resolution


def test_ffhq_has_narrow_kernels_below_64_and_wide_ones_above():
    kernels = [stage.conv_kernel for stage in PRESETS["ffhq-1024"]().generator.superres]
    assert kernels == [1, 3, 3, 3, 3, 3]
    assert [stage.head_layers for stage in PRESETS["ffhq-1024"]().generator.superres] == [7, 4, 4, 4, 4, 4]


def test_guidance_only_for_imagenet_stages_above_32():
    guided = {name for name, preset in PRESETS.items() if preset().loss_terms.cls_weight}
    assert guided == {f"imagenet-{side}" for side in SIDES[2:]}
    assert PRESETS["imagenet-256"]().loss_terms.cls_weight == 8


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
