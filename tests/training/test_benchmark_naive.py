# SPDX-License-Identifier: MIT
"""The benchmark's naive form is the official one: official numbers for its operations and its generator, and the
results of our own modules for D, a step and a metric's images. So the two sides of its table do the same work.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from training.augment import DiffAugment, blur
from training.benchmark import naive_ops
from training.benchmark.agreement import find_differences, find_tolerance
from training.benchmark.naive_networks import (
    NaiveAugment,
    NaiveDiscriminator,
    NaiveGenerator,
    fourier_features,
    seed_backbones_,
)
from training.benchmark.recipes import benchmark_config
from training.benchmark.subjects import make_subject
from training.config import GeneratorConfig, MappingConfig, SuperresConfig, SynthesisConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.generator.synthesis import SynthesisInput

DATA = Path(__file__).parents[1] / "data"
GRADIENTS_AT_TINY_SIZES = 3e-3  # few corners, so that the steps' gradients agree better than at full size
OPS, OPS_INPUT, IMAGES, GRADIENTS = 1e-5, 5e-5, 1e-4, 3e-4  # tolerances of the golden files
CPU = torch.device("cpu")


@cache
def load_golden(name):
    """Arrays by case and name, and meta data."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "meta_json"}
        meta = json.loads(str(file["meta_json"]))
    return arrays, meta


def arrays_of(golden, case):
    return {k.partition("/")[2]: v for k, v in golden.items() if k.startswith(case + "/")}


def assert_close(actual, expected, tolerance, what=""):
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: {error:.2g} > {tolerance:.2g}"


def four_paddings(padding):
    if isinstance(padding, int):
        return [padding] * 4
    return padding if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]


UPFIRDN = [
    case
    for case, meta in load_golden("g_ops_upfirdn2d")[1].items()
    if meta.get("fn") == "upfirdn2d"
    and not meta.get("flip_filter")
    and isinstance(meta.get("up", 1), int)
    and isinstance(meta.get("down", 1), int)
]


@pytest.mark.parametrize("case", UPFIRDN)
def test_upfirdn2d(case):
    golden, meta = load_golden("g_ops_upfirdn2d")
    data, given = arrays_of(golden, case), meta[case]
    arguments = {name: given[name] for name in ("up", "down", "gain") if name in given}
    x = data["x"].clone().requires_grad_()
    out = naive_ops.upfirdn2d(x, data.get("f"), padding=four_paddings(given.get("padding", 0)), **arguments)
    assert_close(out, data["out"], OPS, "out")
    (dx,) = torch.autograd.grad((out * data["r"]).sum(), x)
    assert_close(dx, data["dx"], GRADIENTS, "dx")


LRELU = [
    case
    for case, meta in load_golden("g_ops_filtered_lrelu")[1].items()
    if meta["bias"] and not meta.get("flip_filter")
]


@pytest.mark.parametrize("case", LRELU)
def test_filtered_lrelu(case):
    golden, meta = load_golden("g_ops_filtered_lrelu")
    data, given = arrays_of(golden, case), meta[case]
    x, b = (data[name].clone().requires_grad_() for name in ("x", "b"))
    out = naive_ops.filtered_lrelu(
        x,
        data.get("fu"),
        data.get("fd"),
        b,
        up=given.get("up", 1),
        down=given.get("down", 1),
        padding=four_paddings(given.get("padding", 0)),
        gain=given.get("gain", math.sqrt(2)),
        slope=given.get("slope", 0.2),
        clamp=given.get("clamp"),
    )
    assert_close(out, data["out"], OPS, "out")
    for name, gradient in zip(
        ("dx", "db"), torch.autograd.grad((out * data["r"]).sum(), [x, b]), strict=True
    ):
        assert_close(gradient, data[name], GRADIENTS, name)


MODULATED = [
    case
    for case, meta in load_golden("g_ops_modconv_fc")[1].items()
    if case.startswith("mod") and meta["gain"] in ("scalar", None) and isinstance(meta["padding"], int)
]


@pytest.mark.parametrize("case", MODULATED)
def test_modulated_conv2d(case):
    golden, meta = load_golden("g_ops_modconv_fc")
    data = arrays_of(golden, case)
    x, w, s = (data[name].clone().requires_grad_() for name in "xws")
    gain, padding = data.get("input_gain"), meta[case]["padding"]
    out = naive_ops.modulated_conv2d(x, w, s, meta[case]["demodulate"], padding, gain)
    assert_close(out, data["out"], OPS, "out")
    gradients = torch.autograd.grad((out * data["r"]).sum(), [x, w, s])
    for name, gradient in zip(("dx", "dw", "ds"), gradients, strict=True):
        assert_close(gradient, data[name], GRADIENTS, name)


@pytest.mark.parametrize("case", ["case00", "case01", "case02"])
def test_fourier_features(case):
    golden, all_meta = load_golden("g_ops_synthesis_input")
    data, meta = arrays_of(golden, case), all_meta[case]
    width, height = (meta["size"], meta["size"]) if isinstance(meta["size"], int) else meta["size"]
    block = SynthesisInput(
        meta["w_dim"], meta["channels"], width, height, meta["sampling_rate"], meta["bandwidth"]
    )
    names = {"affine.weight": "affine_weight", "affine.bias": "affine_bias"}
    block.load_state_dict({name: data[names.get(name, name)] for name in block.state_dict()})
    assert_close(fourier_features(block, data["w"]), data["out"], OPS_INPUT)


@pytest.mark.parametrize("name", ["g_gen_t_cond", "g_gen_r_cond", "g_gen_t_uncond", "g_superres_t_up2"])
def test_generator(name, generator_fill):
    """Official images, and official gradients of z."""
    golden, meta = load_golden(name)
    kwargs = dict(meta["stem" if "stem" in meta else "kwargs"])
    sizes = {key: kwargs.pop(key) for key in ("z_dim", "w_dim", "c_dim")}
    mapping = MappingConfig(**sizes, num_layers=kwargs.pop("mapping_kwargs")["num_layers"])
    stages = (SuperresConfig(**meta["kwargs"]),) if "stem" in meta else ()
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=SynthesisConfig(**kwargs), superres=stages))
    with torch.no_grad():
        for key, tensor in G.state_dict().items():
            value = generator_fill(key, tuple(tensor.shape), meta["salt"])
            if value is not None:
                tensor.copy_(value)
    z = golden["z"].clone().requires_grad_()
    images = NaiveGenerator(G)(z, golden["labels"] if G.c_dim else None)
    assert_close(images, golden["img"], IMAGES, "img")
    (dz,) = torch.autograd.grad((images * golden["r"]).sum(), z)
    assert_close(dz, golden["dz"], GRADIENTS, "dz")


@pytest.mark.parametrize(
    ("backbone", "statistics"),
    [
        ("tf_efficientnet_lite0", True),
        ("tf_efficientnet_lite0", False),
        ("deit_tiny_distilled_patch16_224", False),
    ],
)
def test_discriminator(backbone, statistics, tiny_discriminator_config):
    """Logits and the gradient of the images, with BatchNorms that do something where statistics are official."""
    config = tiny_discriminator_config(
        3, backbones=(backbone,), num_levels=4, head_resolution=4, official_batchnorm_statistics=statistics,
        nominal_resolution=64, feature_resolution=64,
    )  # fmt: skip
    ours = ProjectedDiscriminator(config, "san", pretrained=False)
    seed_backbones_(ours)
    naive = NaiveDiscriminator(ours)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([2, 0])
    found = {}
    for side, D in (("ours", ours), ("naive", naive)):
        x = images.clone().requires_grad_()
        (logits,) = D(x, labels).values()
        noise = torch.linspace(-1, 1, logits.fun.numel()).view_as(logits.fun)
        D.heads.requires_grad_(True)
        (logits.fun * noise).sum().backward()
        found[side] = {"images: logits": logits.fun, "gradients: x": x.grad}
        found[side] = {key: value.detach().numpy() for key, value in found[side].items()}
    differences = find_differences(found["ours"], found["naive"])
    assert differences["images"] < 1e-4 and differences["gradients"] < 1e-3


def test_augmentation_and_blur():
    images = torch.randn(8, 3, 20, 16)
    for policy in (("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")):
        ours, naive = (kind(policy, Draws(1, np.arange(8))) for kind in (DiffAugment, NaiveAugment))
        for _ in range(2):  # the second call has other random numbers
            torch.testing.assert_close(naive(images), ours(images))
    for sigma in (0.2, 0.9, 2.0):
        torch.testing.assert_close(naive_ops.blur(images, sigma), blur(images, sigma))


@pytest.mark.parametrize("recipe", ["cifar10-16", "imagenet-256"])
@pytest.mark.parametrize("row", ["backward", "step", "sampling"])
def test_both_sides_of_the_table_have_the_same_results(recipe, row):
    """Images, all gradients of an iteration's steps, and pixels, on tiny likenesses of the recipes."""
    config, results = benchmark_config(recipe, batch_size=3, is_tiny=True), {}
    for side in ("ours", "naive"):
        subject = make_subject(config, row, side, CPU, num_samples=5)
        for optimizer in subject.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # each step starts from the same weights
        for _, run in subject.parts:
            run()
        results[side] = {name: value.numpy() for name, value in subject.results.items()}
    kinds = {"backward": {"images", "G"}, "sampling": {"pixels"}, "step": {"G through D", "D"}}[row]
    kinds |= {"path length"} if row == "step" and recipe == "cifar10-16" else set()
    differences = find_differences(results["ours"], results["naive"])
    assert differences.keys() == kinds
    for kind, difference in differences.items():
        tolerance = find_tolerance(kind, has_half_precision=False)
        assert difference <= min(tolerance, GRADIENTS_AT_TINY_SIZES), kind
    assert all(np.abs(values).max() > 0 for values in results["naive"].values() if values.size > 1000)


def test_a_wrong_result_is_seen():
    """The comparison can fail: for values, gradients that are missing, and pixels far off."""
    right = {"images": np.array([1.0, -2.0]), "G: a": np.array([1.0]), "G: b": np.array([1e-6])}
    assert find_differences(right, right) == {"images": 0, "G": 0}
    assert find_differences(right | {"images": np.array([1.0, -1.8])}, right)["images"] == pytest.approx(0.1)
    assert find_differences({"images": right["images"]}, right)["G"] == 1
    # What is far smaller than its network's largest gradient is rounding noise.
    assert find_differences(right | {"G: b": np.array([2e-6])}, right)["G"] == pytest.approx(1e-4)
    nan = find_differences(right | {"images": np.array([1.0, np.nan])}, right)
    assert nan["images"] > find_tolerance("images", True)
    pixels = {"pixels": np.zeros(1000, dtype=np.uint8)}
    near, far = pixels["pixels"].copy(), pixels["pixels"].copy()
    near[0], far[0] = 1, 2
    assert find_differences({"pixels": near}, pixels)["pixels"] == 0.001
    assert find_differences({"pixels": far}, pixels)["pixels"] > find_tolerance("pixels", False)


def test_gradients_may_differ_by_what_a_rounding_of_the_weights_does():
    """A few times that, and by no more; images and half precision have limits of their own."""
    for kind in ("D", "G through D"):
        assert find_tolerance(kind, False) < find_tolerance(kind, False, jump=0.01) < 0.05
        assert find_tolerance(kind, True, jump=1.0) == find_tolerance(kind, True)
    assert find_tolerance("images", False, jump=0.01) == find_tolerance("images", False)


def test_a_step_trains_on_both_sides():
    """With learning rates, weights move, and alike."""
    config = benchmark_config("cifar10-16", batch_size=3, is_tiny=True)
    config = dataclasses.replace(config, loss="gan")
    losses = {}
    for side in ("ours", "naive"):
        subject = make_subject(config, "step", side, CPU, 0)
        for _ in range(2):
            for _, run in subject.parts:
                run()
        losses[side] = np.concatenate(
            [v.numpy() for k, v in subject.results.items() if k.startswith("G through D: ")]
        )
    cosine = (losses["ours"] @ losses["naive"]) / np.prod([np.linalg.norm(v) for v in losses.values()])
    assert cosine > 0.99  # Adam turns rounding of tiny gradients into steps
