# SPDX-License-Identifier: MIT
"""--precision and --feature-precision: what runs in which type, how far results move, what stays float32, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import san
from torch_utils.ops.choice import using
from training.config import ConfigError, TrainConfig
from training.discriminator.feature_network import build_feature_network
from training.discriminator.projected import ProjectedDiscriminator
from training.discriminator.reduced_precision import run_in_tf32, tf32_allowed
from training.generator.generator import Generator
from training.generator.network_plan import plan_network
from training.loss import path_lengths
from training.memory import Footprint, count_footprint
from training.precision import apply_precision_, check_precision, precision_note, product_seconds
from training.presets import PRESETS, dcgan, quickstart

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_CLASSES = 3
LITE0 = "tf_efficientnet_lite0"


@pytest.fixture
def config(tiny_generator_config, tiny_discriminator_config) -> TrainConfig:
    return replace(
        quickstart(),
        generator=tiny_generator_config(NUM_CLASSES),
        discriminator=tiny_discriminator_config(NUM_CLASSES),
    )


def build_generator(config: TrainConfig, precision: str = "paper") -> Generator:
    torch.manual_seed(0)
    G = Generator(config.generator)
    G.synthesis.set_precision_(precision)
    return G


@pytest.fixture
def D(config: TrainConfig) -> ProjectedDiscriminator:  # noqa: N802
    """Feature networks with weights that let a signal through."""
    torch.manual_seed(1)
    D = ProjectedDiscriminator(config.discriminator, "san", pretrained=False)
    for name, buffer in D.feature_networks.named_buffers():
        if name.endswith("weight"):
            buffer.normal_(std=(2 / buffer[0].numel()) ** 0.5)
    D.set_trainable_(False)
    return D


def inputs(G: Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(2)), torch.arange(count) % 3


def output_types(G: Generator, *arguments: Tensor, **options: bool) -> list[torch.dtype]:
    """Of each layer, in order."""
    seen: list[torch.dtype] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
        for layer in G.synthesis.layers
    ]
    G.synthesis(G.mapping(*arguments), **options)
    for handle in handles:
        handle.remove()
    return seen


def rms_error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).detach().norm() / exact.detach().norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm()))


# The generator.


def test_by_default_nothing_changes(config: TrainConfig, D: ProjectedDiscriminator) -> None:
    """Bit for bit: layers planned for half precision are float32 on a CPU, features have their float32 weights."""
    G, before = build_generator(config), copy.deepcopy(D)
    assert all(layer.plan.use_fp16 for layer in G.synthesis.layers)
    images = G(*inputs(G))
    apply_precision_(G, D, config, CPU)
    assert torch.equal(G(*inputs(G)), images) and torch.equal(
        G.synthesis(G.mapping(*inputs(G)), True), images
    )
    assert set(output_types(G, *inputs(G))) == {torch.float32}
    for name, value in before.state_dict().items():
        assert value.dtype == D.state_dict()[name].dtype and torch.equal(value, D.state_dict()[name])
    features = next(iter(D.feature_networks.values()))
    assert all(
        torch.equal(a, b) for a, b in zip(features(images), features.feature_maps(images), strict=True)
    )


@pytest.mark.parametrize("num_fp16_res", [0, 4])
def test_bfloat16_is_close_and_trains_float32_weights(config: TrainConfig, num_fp16_res: int) -> None:
    synthesis = replace(config.generator.synthesis, num_fp16_res=num_fp16_res)
    config = replace(config, generator=replace(config.generator, synthesis=synthesis))
    results = {}
    for precision in ("fp32", "bf16"):
        G = build_generator(config, precision)
        images = G(*inputs(G))
        assert images.dtype == torch.float32
        images.square().mean().backward()
        gradients = [p.grad for p in G.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
        results[precision] = images.detach(), torch.cat([g.flatten() for g in gradients])
    assert set(output_types(G, *inputs(G))) == {torch.bfloat16}
    assert set(output_types(G, *inputs(G), force_fp32=True)) == {torch.float32}
    (exact, exact_gradient), (images, gradient) = results["fp32"], results["bf16"]
    assert 1e-4 < rms_error(images, exact) < 0.03
    assert cosine(gradient, exact_gradient) > 0.995


@pytest.mark.parametrize(
    ("num_fp16_res", "expected"), [(0, {32, 64, 128, 256}), (4, {32, 64, 128, 256}), (1, {256})]
)
def test_the_highest_rates_are_in_half_precision(
    config: TrainConfig, num_fp16_res: int, expected: set
) -> None:
    synthesis = replace(
        config.generator.synthesis,
        img_resolution=256,
        num_layers=10,
        channel_base=1024,
        num_fp16_res=num_fp16_res,
    )
    layers = plan_network(replace(config.generator, synthesis=synthesis)).layers
    rates = {layer.target.sampling_rate for layer in layers}
    assert rates == {16, 32, 64, 128, 256}
    assert {layer.target.sampling_rate for layer in layers if layer.allows_half} == expected
    if num_fp16_res:
        assert [layer.allows_half for layer in layers] == [layer.use_fp16 for layer in layers]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_path_length_has_second_derivatives_in_bfloat16(config: TrainConfig, backend: str) -> None:
    gradients = {}
    for precision in ("fp32", "bf16"):
        G = build_generator(config, precision)
        ws = G.mapping(*inputs(G)).detach().requires_grad_()
        with using(backend):
            images = G.synthesis(ws)
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
            path_lengths(images, ws, noise, keeps_graph=True).square().sum().backward()
        gradients[precision] = torch.cat(
            [p.grad.flatten() for p in G.synthesis.parameters() if p.grad is not None]
        )
    assert gradients["bf16"].isfinite().all()
    assert cosine(gradients["bf16"], gradients["fp32"]) > 0.99


# The feature networks.


def test_bfloat16_features_are_close_and_send_gradients(
    config: TrainConfig, D: ProjectedDiscriminator
) -> None:
    before, saved = copy.deepcopy(D), copy.deepcopy(D.trained_state_dict())
    D.set_feature_precision_("bf16")
    (features,), (exact_features,) = D.feature_networks.values(), before.feature_networks.values()
    types = {tensor.dtype for tensor in [*features.backbone.buffers(), *features.backbone.parameters()]}
    assert types == {torch.bfloat16}
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    for x, exact in zip(features(images), exact_features(images), strict=True):
        assert x.dtype == torch.float32 and 1e-4 < rms_error(x, exact) < 0.03
    gradients = []
    for discriminator in (before, D):
        x = (torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1).requires_grad_()
        logits = discriminator(x, torch.arange(6) % 3)[LITE0]
        assert logits.fun.dtype == torch.float32
        san.generator_loss(san.OBJECTIVES["hinge"], logits).backward()
        gradients.append(x.grad)
    assert gradients[1].dtype == torch.float32 and cosine(*gradients) > 0.9
    state = D.trained_state_dict()
    assert all(state[name].dtype == value.dtype for name, value in saved.items())
    assert all(
        torch.equal(state[name], value) for name, value in saved.items() if name.startswith("projectors.")
    )


def test_batchnorms_that_are_not_folded_stay_exact() -> None:
    torch.manual_seed(0)
    features = build_feature_network("resnet18", pretrained=False)
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
    exact = copy.deepcopy(features)
    features.set_precision_("bf16")
    norms = [m for m in features.modules() if isinstance(m, nn.BatchNorm2d)]
    originals = [m for m in exact.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, original in zip(norms, originals, strict=True):
        assert torch.equal(norm.running_var, original.running_var)
    assert features.backbone.conv1.weight.dtype == torch.bfloat16
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    for x, y in zip(features(images), exact(images), strict=True):
        assert x.dtype == torch.float32 and rms_error(x, y) < 0.05
    features(images)[-1].sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_random_layers_of_a_vit_stay_float32() -> None:
    torch.manual_seed(0)
    features = build_feature_network("deit_tiny_distilled_patch16_224", pretrained=False, num_levels=2)
    exact = copy.deepcopy(features)
    features.set_precision_("bf16")
    for (name, value), original in zip(
        features.reassemble.state_dict().items(), exact.reassemble.state_dict().values(), strict=True
    ):
        assert torch.equal(value, original), name
    assert features.backbone.cls_token.dtype == torch.bfloat16
    images = torch.randn(1, 3, 224, 224)
    for x, y in zip(features(images), exact(images), strict=True):
        assert x.dtype == torch.float32 and rms_error(x, y) < 0.03


def test_tf32_is_on_inside_the_features_only() -> None:
    """In both passes, while all around it, on either side, has float32 proper."""

    class Probe(torch.autograd.Function):
        """The identity, which notes the switches."""

        @staticmethod
        def forward(ctx, x: Tensor, seen: list) -> Tensor:
            ctx.seen = seen
            seen.append(switches())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            ctx.seen.append(switches())
            return gradient, None

    def switches() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before, inside, outside = switches(), [], []
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        x = torch.randn(4, requires_grad=True)
        maps = run_in_tf32(
            lambda y: [Probe.apply(y * 2, inside), Probe.apply(y, inside)], Probe.apply(x, outside)
        )
        sum(Probe.apply(m, outside).square().sum() for m in maps).backward()
        assert inside == [(True, True)] * 4 and outside == [(False, False)] * 6
        torch.testing.assert_close(x.grad, 2 * x.detach() * 5)
        assert switches() == (False, False)
        with torch.no_grad():
            run_in_tf32(lambda y: [Probe.apply(y, inside)], x)
        assert inside[-1] == (True, True)
        with pytest.raises(ZeroDivisionError), tf32_allowed():
            raise ZeroDivisionError
        assert switches() == (False, False)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_features_are_the_same_graph(D: ProjectedDiscriminator) -> None:
    """Where TF32 does not exist, as on a CPU, results and gradients are those of float32, bit for bit."""
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    results = []
    for precision in ("paper", "tf32"):
        discriminator = copy.deepcopy(D)
        discriminator.set_feature_precision_(precision)
        x = images.clone().requires_grad_()
        logits = discriminator(x, torch.arange(4) % 3)[LITE0].fun
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# What a device can do.


def with_modes(config: TrainConfig, precision: str = "paper", features: str = "paper") -> TrainConfig:
    return replace(config, precision=precision, feature_precision=features)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (("fp16",), r"--precision fp16 needs a CUDA GPU, and this run is on cpu; use --precision bf16"),
        (
            ("paper", "tf32"),
            r"--feature-precision tf32: --device cpu has no TF32.*use --feature-precision paper",
        ),
    ],
)
def test_what_a_cpu_lacks_is_refused(config: TrainConfig, D, modes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_precision_(build_generator(config), D, with_modes(config, *modes), CPU)


@pytest.mark.parametrize("modes", [("paper",), ("fp32",), ("bf16",), ("paper", "bf16")])
def test_what_a_cpu_can_is_accepted(config: TrainConfig, modes: tuple[str, ...]) -> None:
    check_precision(with_modes(config, *modes), CPU)


def test_older_gpus_lack_two_modes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    check_precision(with_modes(config, "fp16"), CUDA)
    for modes in (("bf16",), ("fp32", "bf16"), ("fp32", "tf32")):
        capability[0] = (7, 5)
        with pytest.raises(ConfigError, match="Tesla T4 has no"):
            check_precision(with_modes(config, *modes), CUDA)
        capability[0] = (8, 0)
        check_precision(with_modes(config, *modes), CUDA)


@pytest.mark.parametrize("modes", [("bf16",), ("paper", "bf16")])
def test_small_networks_have_no_modes(modes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="bf16 has no effect: --cfg dcgan"):
        check_precision(with_modes(dcgan("hinge"), *modes), CPU)


@pytest.mark.parametrize(("half_seconds", "is_told"), [(2.0, True), (0.5, False)])
def test_slow_bfloat16_is_told(
    config: TrainConfig, half_seconds: float, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.bfloat16: half_seconds, torch.float32: 1.0}
    monkeypatch.setattr("training.precision.product_seconds", seconds.__getitem__)
    assert precision_note(config, CPU) is None
    note = precision_note(with_modes(config, "bf16", "bf16"), CPU)
    assert (note is not None) == is_told
    if is_told:
        assert note.startswith("Note: --precision bf16 and --feature-precision bf16: matrix products")
        assert "2.0 times as long" in note and "paper is faster" in note
    assert precision_note(with_modes(config, "bf16"), CUDA) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_timed(dtype: torch.dtype) -> None:
    assert 0 < product_seconds(dtype) < 60


# Memory.


def footprint(config: TrainConfig, device: str = "cpu", **modes: str) -> Footprint:
    with using("reference"):
        return count_footprint(replace(config, **modes), device)


def test_memory_follows_the_precision() -> None:
    config = PRESETS["digits-8"]()
    synthesis = replace(config.generator.synthesis, channel_base=8192, channel_max=64)
    config = replace(config, generator=replace(config.generator, synthesis=synthesis), microbatch_size=4)
    full = footprint(config)
    half = footprint(config, precision="bf16")
    assert half.activations < 0.85 * full.activations
    assert replace(half, activations=0) == replace(full, activations=0)  # weights and optimizers stay float32
    assert footprint(config, "cuda", precision="fp16") == footprint(config, "cuda", precision="bf16") == half
    assert (
        footprint(config, "cuda", precision="fp32") == full == footprint(config, "cuda")
    )  # num_fp16_res is 0
    features = footprint(config, feature_precision="bf16")
    assert features.activations < full.activations and features.weights < full.weights
    assert (features.gradients, features.D_parameters) == (full.gradients, full.D_parameters)
    assert footprint(config, feature_precision="tf32") == full


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_cuda(config: TrainConfig, precision: str) -> None:
    exact, G = build_generator(config, "fp32").cuda(), build_generator(config, precision).cuda()
    arguments = [x.cuda() for x in inputs(G)]
    assert set(output_types(G, *arguments)) == {torch.float16 if precision == "fp16" else torch.bfloat16}
    assert rms_error(G(*arguments), exact(*arguments)) < 0.03


@pytest.mark.gpu
def test_tf32_features_on_cuda(D: ProjectedDiscriminator) -> None:
    (features,) = D.cuda().feature_networks.values()
    exact, images = copy.deepcopy(features), torch.rand(4, 3, 32, 32, device="cuda") * 2 - 1
    features.set_precision_("tf32")
    for x, y in zip(features(images), exact(images), strict=True):
        assert rms_error(x, y) < 0.01
