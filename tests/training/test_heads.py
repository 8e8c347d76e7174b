# SPDX-License-Identifier: MIT
"""Heads against the official mini-discriminators: values, gradients by view, and the buffers they leave behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.config import ConfigError, DiscriminatorConfig
from training.discriminator.heads import ProjectionHead, SpectralNormConv2d, plan_widths

DATA = Path(__file__).parents[1] / "data"
CASES = ["SingleDisc_128_112", "SingleDisc_16_14", "SingleDiscCond_128_112", "SingleDiscCond_16_14"]


def our_name(name: str) -> str:
    """main.0.main.1.weight, last_layer.scale, cls.weight_orig, embed.scale, embed_proj.bias, ... -> ours."""
    head, *rest = name.split(".")
    if head in ("main", "last_layer"):
        return ".".join(["trunk", rest[0], *rest[2:]]) if "main" in rest else f"last.{rest[-1]}"
    return f"last.{'conv' if head == 'cls' else head}.{rest[-1]}"


def config(c_dim: int) -> DiscriminatorConfig:
    return DiscriminatorConfig(img_resolution=256, c_dim=c_dim)


def load_case(kind: str, tag: str, draw, filled):
    """(golden arrays of the case, head, input, labels)."""
    with np.load(DATA / f"d_discriminator_{kind}.npz") as data:
        golden = {k.removeprefix(tag + "/"): data[k] for k in data.files if k.startswith(tag + "/")}
    class_name, start, feat = tag.split("_")
    num_channels = {"128": 64, "16": 256}[start]
    head = ProjectionHead(config(10 if "Cond" in tag else 0), kind, num_channels, int(start))
    values = filled(f"pub.{kind}.{class_name}{start}", json.loads(str(golden["names"])))
    missing, unexpected = head.load_state_dict({our_name(n): v for n, v in values.items()}, strict=False)
    assert not unexpected and all("num_batches_tracked" in name for name in missing)
    x = draw(f"pub:{tag}.x", (2, num_channels, int(feat), int(feat))).float()
    return golden, head, x.requires_grad_(), torch.from_numpy(golden["class_ids"])


def close(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(
        actual.detach().numpy().reshape(-1), expected.reshape(-1), rtol=rtol, atol=atol
    )


def check_sampled(golden: dict, key: str, value: torch.Tensor) -> None:
    flat, sub = value.detach().reshape(-1), golden[key + "__sub"]
    mean, rms, largest = golden[key + "__stats"]
    # Relative to the largest value, except for gradients that BatchNorm makes zero up to rounding (conv biases).
    atol = 1e-4 * min(1.0, float(largest)) if largest > 1e-4 else 1e-5
    close(flat[:: max(1, flat.numel() // len(sub))][: len(sub)], sub, atol=atol)
    wide = flat.double()
    close(
        torch.stack([wide.mean(), wide.square().mean().sqrt(), wide.abs().max()]),
        np.array([mean, rms, largest]),
    )


def check_gradients(golden: dict, phase: str, head: nn.Module, x: torch.Tensor) -> int:
    check_sampled(golden, f"{phase}_grad_x", x.grad)
    prefix, suffix = f"{phase}_grad/", "__sub"
    names = [
        k.removeprefix(prefix).removesuffix(suffix)
        for k in golden
        if k.startswith(prefix) and k.endswith(suffix)
    ]
    for name in names:
        check_sampled(golden, prefix + name, head.get_parameter(our_name(name)).grad)
    return len(names)


@pytest.mark.parametrize("tag", CASES)
@pytest.mark.parametrize("kind", ["san", "gan"])
def test_matches_official(kind, tag, draw, filled):
    golden, head, x, labels = load_case(kind, tag, draw, filled)
    with torch.no_grad():
        logits = head.eval()(x, labels)
    close(logits.fun, golden["eval"], rtol=2e-4, atol=2e-4)
    close(logits.dir, golden["eval"], rtol=2e-4, atol=2e-4)
    assert logits.shape == (2, 16)

    head.train()
    logits = head(x, labels)
    close(logits.fun, golden["train1"])
    # The official gradient of this pass flows everywhere; of a SAN head, the two views together give the same.
    r = draw(f"pub:{tag}.r", golden["train1"].shape).float().view(2, -1)
    ((logits.fun * r).sum() + (logits.dir * r).sum()).backward()
    assert check_gradients(golden, "train1", head, x) == sum(1 for _ in head.parameters())
    head.zero_grad()
    x.grad = None

    logits = head(x, labels)
    if kind == "gan":
        close(logits.fun, golden["train2"])
    else:
        close(logits.fun, golden["train2_fun"])
        close(logits.dir, golden["train2_dir"])
        r1, r2 = (draw(f"pub:{tag}.{r}", golden["train1"].shape).float().view(2, -1) for r in ("r1", "r2"))
        ((logits.fun * r1).sum() + (logits.dir * r2).sum()).backward()
        assert check_gradients(golden, "train2", head, x) == sum(1 for _ in head.parameters())
    buffers = dict(head.named_buffers())
    after = [name for name in golden if name.startswith("after2/")]
    assert after
    for name in after:
        close(buffers[our_name(name.removeprefix("after2/"))], golden[name])


@pytest.mark.parametrize("bias", [True, False])
def test_spectral_norm_matches_torch(bias):
    ours = SpectralNormConv2d(3, 5, 4, stride=2, padding=1, bias=bias)
    theirs = nn.utils.spectral_norm(nn.Conv2d(3, 5, 4, stride=2, padding=1, bias=bias))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for is_training in (True, True, False):
        ours.train(is_training), theirs.train(is_training)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        expected, actual = theirs(x), ours(x)
        weight = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((out * weight).sum(), [x, module.weight_orig])
            for module, out in ((theirs, expected), (ours, actual))
        ]
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(ours.weight_u, theirs.weight_u)
    torch.testing.assert_close(ours.weight_v, theirs.weight_v)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer_and_size",
    [((6, 5, 4), 4), ((16, 32, 4, 2, 1), 16), ((6, 5, 4), 7)],
    ids=["one position", "halved", "more"],
)
def test_training_computes_the_convolution_of_evaluation(memory_format, bias, layer_and_size):
    """Training takes faster forms of the same; evaluation is `F.conv2d`."""
    arguments, size = layer_and_size
    layer = SpectralNormConv2d(*arguments, bias=bias).to(memory_format=memory_format)
    x = torch.randn(3, arguments[0], size, size).to(memory_format=memory_format).requires_grad_()
    actual = layer.train()(x)  # a power iteration, whose vectors evaluation uses
    expected = layer.eval()(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    inputs, upstream = [x, *layer.parameters()], torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (actual, expected))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_evaluation_rounds_alike_for_any_number_of_images():
    layer = SpectralNormConv2d(128, 64, 4).to(memory_format=torch.channels_last).eval()
    x = torch.randn(9, 128, 4, 4).to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.cat([layer(image[None]) for image in x]), layer(x), rtol=1e-5, atol=1e-6)


def test_spectral_norm_bounds_the_singular_value():
    layer = SpectralNormConv2d(4, 6, 3)
    for _ in range(100):
        layer.inverse_sigma()
    weight = layer.weight_orig * layer.inverse_sigma()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_backward_survives_a_later_pass():
    """Fake and real images pass one after the other; the first graph must not notice the second's power iteration."""
    head = ProjectionHead(config(0), "gan", 64, 32)
    for mode in (True, False):
        loss = head.train(mode)(torch.randn(2, 64, 32, 32)).fun.sum()
        head.train()(torch.randn(2, 64, 32, 32))
        loss.backward()


@pytest.mark.parametrize(
    ("start", "head_resolution", "expected"),
    [
        (128, 8, [9, 64, 128, 256, 512]),
        (16, 8, [9, 512]),
        (8, 8, [9]),
        (100, 8, [9, 64, 128, 256, 512]),  # snapped to 128
        (32, 4, [9, 256, 512, 512]),
    ],
)
def test_depth_follows_the_nominal_size(start, head_resolution, expected):
    cfg = DiscriminatorConfig(img_resolution=64, head_resolution=head_resolution)
    assert plan_widths(cfg, 9, start) == expected


def test_channels_are_bounded():
    cfg = DiscriminatorConfig(img_resolution=64, max_head_channels=100)
    assert plan_widths(cfg, 9, 128) == [9, 64, 100, 100, 100]


def test_last_convolution_sees_the_whole_map_at_head_resolution_4():
    cfg = DiscriminatorConfig(img_resolution=64, c_dim=0, head_resolution=4)
    head = ProjectionHead(cfg, "san", 8, 16)
    assert head(torch.randn(3, 8, 16, 16)).shape == (3, 1)
    assert head.final_size(16) == 1 and head.final_size(14) == 0


def test_conditional_head_needs_labels():
    head = ProjectionHead(config(3), "san", 8, 8)
    with pytest.raises(ValueError, match="labels are None"):
        head(torch.randn(2, 8, 8, 8))


def test_class_table_must_hold_the_classes():
    cfg = DiscriminatorConfig(img_resolution=64, c_dim=11, num_class_embeddings=10)
    with pytest.raises(ConfigError, match=r"num_class_embeddings=10.*c_dim=11"):
        ProjectionHead(cfg, "san", 8, 8)
