# SPDX-License-Identifier: MIT
"""The MNIST-sized SAN ("simple-san") built from `san` pieces, against recorded numbers of the official one.

Networks run in float64: one unit of the recorded case lies 3e-8 from the kink of its leaky ReLU, so that in
float32 the convolution algorithm decides its slope, and with it a patch of the image gradient.

python -m pytest tests/san/test_simple_san.py
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

import san
from san import OBJECTIVES, SANLogits

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_simple_san.npz")
RTOL, ATOL = 1e-4, 1e-5


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key].copy())


def assert_golden(actual: Tensor, key: str) -> None:
    """Compare with a recorded tensor, or with the strided sample and statistics kept of a large one."""
    actual = actual.detach()
    if key in GOLDEN:
        torch.testing.assert_close(actual.float(), golden(key), rtol=RTOL, atol=ATOL)
        return
    assert list(actual.shape) == GOLDEN[f"{key}__shape"].tolist()
    sample = golden(f"{key}__sub")
    stride = max(1, actual.numel() // sample.numel())
    torch.testing.assert_close(
        actual.float().flatten()[::stride][: sample.numel()], sample, rtol=RTOL, atol=ATOL
    )
    exact = actual.double()
    statistics = torch.stack([exact.mean(), exact.square().mean().sqrt(), exact.abs().max()])
    torch.testing.assert_close(statistics, golden(f"{key}__stats"), rtol=RTOL, atol=ATOL)


class SimpleDiscriminator(nn.Module):
    """MNIST-sized discriminator. One trained vector per class is both direction and, by its length, scale."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.h_function = nn.Sequential(
            nn.Conv2d(1, 128, 6, stride=2),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(128, 256, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(256, 512, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
        )
        self.fc_w = nn.Parameter(torch.randn(num_rows, 512 * 3 * 3))

    def rows(self, labels: Tensor) -> Tensor:
        return self.fc_w[labels if len(self.fc_w) > 1 else torch.zeros_like(labels)]


class SimpleGAN(SimpleDiscriminator):
    def forward(self, images: Tensor, labels: Tensor) -> SANLogits:
        return SANLogits.plain((self.h_function(images).flatten(1) * self.rows(labels)).sum(1))


class SimpleSAN(SimpleDiscriminator):
    def forward(self, images: Tensor, labels: Tensor) -> SANLogits:
        return scaled_by_own_norm(self.h_function(images).flatten(1), self.rows(labels))


def scaled_by_own_norm(h: Tensor, w: Tensor) -> SANLogits:
    """The last layer of simple-san: the length of w multiplies the features, and is trained through `fun`."""
    direction = F.normalize(w, dim=1)
    return san.project(h * w.norm(dim=1, keepdim=True), SANLogits(fun=direction.detach(), dir=direction))


def fill(D: SimpleDiscriminator, names: str) -> None:
    """Set parameters and buffers to numbers derived from their names."""
    tensors = dict(D.named_parameters()) | dict(D.named_buffers())
    assert {(n, tuple(t.shape)) for n, t in tensors.items()} == {(n, tuple(s)) for n, s in json.loads(names)}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"pub.simple:{name}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        x = rng.standard_normal(tuple(tensor.shape))
        if name.endswith(("weight_u", "weight_v")):
            x = x / np.linalg.norm(x)
        elif name.endswith("bias"):
            x = 0.1 * x
        else:
            x = x * math.sqrt(2 / math.prod(tensor.shape[1:]))
        tensor.data = torch.from_numpy(x.astype(np.float32))
    D.fc_w.data *= 0.7
    for conv in (D.h_function[2], D.h_function[4]):
        weight, u = conv.weight_orig.detach().double().flatten(1), conv.weight_u.double()
        for _ in range(10):
            v = F.normalize(weight.T @ u, dim=0)
            u = F.normalize(weight @ v, dim=0)
        conv.weight_u.data, conv.weight_v.data = u.float(), v.float()


@pytest.fixture(params=["base_uncond", "san_uncond", "base_cond", "san_cond"])
def simple(request: pytest.FixtureRequest) -> tuple[str, SimpleDiscriminator]:
    """Prefix of the recorded case, and its discriminator in eval mode."""
    kind, _, conditional = request.param.partition("_")
    D = (SimpleSAN if kind == "san" else SimpleGAN)(10 if conditional == "cond" else 1)
    fill(D, str(GOLDEN[f"simple_{request.param}/names"]))
    return f"simple_{request.param}", D.double().eval()


def losses_of(prefix: str):
    return (
        (san.san_real_loss, san.san_fake_loss)
        if "_san_" in prefix
        else (san.gan_real_loss, san.gan_fake_loss)
    )


class TestSimpleSanGolden:
    labels = golden("simple/class_ids")

    def test_logits(self, simple) -> None:
        prefix, D = simple
        logits = D(golden("simple/x").double(), self.labels)
        assert_golden(logits.fun, f"{prefix}/eval_logit")
        if "_san_" in prefix:
            assert_golden(logits.fun, f"{prefix}/eval_fun")
            assert_golden(logits.dir, f"{prefix}/eval_dir")

    def test_discriminator_losses_and_gradients(self, simple) -> None:
        prefix, D = simple
        real_images, fake_images = (
            golden("simple/x").double().requires_grad_(),
            golden("simple/x_fake").double(),
        )
        real_loss, fake_loss = losses_of(prefix)
        loss_real = real_loss(OBJECTIVES["hinge"], D(real_images, self.labels))
        loss_fake = fake_loss(OBJECTIVES["hinge"], D(fake_images, self.labels))
        assert_golden(loss_real, f"{prefix}/loss_real")
        assert_golden(loss_fake, f"{prefix}/loss_fake")
        loss_real.backward()
        loss_fake.backward()
        assert_golden(D.fc_w.grad, f"{prefix}/grad_fc_w")
        assert_golden(D.fc_w.grad.norm(dim=1), f"{prefix}/grad_fc_w_rownorm")
        assert_golden(D.h_function[0].weight.grad, f"{prefix}/grad_h0_weight")
        assert_golden(D.h_function[4].bias.grad, f"{prefix}/grad_h4_bias")
        assert_golden(real_images.grad, f"{prefix}/grad_x")

    def test_generator_loss_and_gradient(self, simple) -> None:
        prefix, D = simple
        fake_images = golden("simple/x_fake").double().requires_grad_()
        loss = san.hinge_generator_loss(D.requires_grad_(False)(fake_images, self.labels))
        assert_golden(loss, f"{prefix}/loss_g")
        loss.backward()
        assert_golden(fake_images.grad, f"{prefix}/grad_g_x")

    def test_training_forwards_move_spectral_norm(self, simple) -> None:
        prefix, D = simple
        D.train()
        for i in (1, 2):
            assert_golden(D(golden("simple/x").double(), self.labels).fun, f"{prefix}/train{i}_logit")
        for i in (2, 4):
            assert_golden(D.h_function[i].weight_u, f"{prefix}/after2/h_function.{i}.weight_u")


def test_last_layer_of_simple_san_golden() -> None:
    w, h = golden("simple_last/w").requires_grad_(), golden("simple_last/h").requires_grad_()
    logits = scaled_by_own_norm(h, w.expand(len(h), -1))
    assert_golden(logits.fun, "simple_last/fun")
    assert_golden(logits.dir, "simple_last/dir")
    ((logits.fun * golden("simple_last/r1")).sum() + (logits.dir * golden("simple_last/r2")).sum()).backward()
    assert_golden(w.grad, "simple_last/grad_w")
    assert_golden(h.grad, "simple_last/grad_h")
