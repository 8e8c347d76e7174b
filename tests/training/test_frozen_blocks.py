# SPDX-License-Identifier: MIT
"""--freezed: the first blocks of every head keep every bit, compute what they computed, and the rest is trained."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import san
from training.config import ConfigError
from training.discriminator.heads import SpectralNormConv2d
from training.discriminator.projected import ProjectedDiscriminator
from training.presets import quickstart
from training.training_loop import make_optimizer


@pytest.fixture(scope="module")
def make_discriminator(tiny_discriminator_config):
    """make_discriminator(kind) -> D with heads of 3, 2 and 1 blocks."""
    cfg = tiny_discriminator_config(
        3, feature_resolution=64, nominal_resolution=64, projected_channels=4, num_levels=3
    )
    return lambda kind="san": ProjectedDiscriminator(cfg, kind, pretrained=False)


def train(D: ProjectedDiscriminator, num_steps: int = 3) -> None:
    """Steps as the trainer makes them, on random images."""
    optimizer = make_optimizer(
        D.trainable_parameters(), replace(quickstart().discriminator_optimizer, lr=0.01)
    )
    for _ in range(num_steps):
        D.train()
        D.set_trainable_(True)
        optimizer.zero_grad(set_to_none=True)
        for sign in (1, -1):
            logits = D(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))["tf_efficientnet_lite0"]
            (sign * (logits.fun.mean() + logits.dir.mean())).backward()
        D.set_trainable_(False)
        optimizer.step()
        san.normalize_directions_(D)


def snapshot(D: ProjectedDiscriminator) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in D.trained_state_dict().items() if name.startswith("heads.")}


def is_frozen(name: str, count: int) -> bool:
    part, block = name.split(".")[3:5]
    return part == "trunk" and int(block) < count


@pytest.mark.parametrize("kind", ["san", "gan"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_frozen_blocks_keep_every_bit_and_the_rest_is_trained(kind, count, make_discriminator):
    D = make_discriminator(kind)
    train(D, 1)
    D.freeze_blocks_(count)
    before = snapshot(D)
    train(D)
    after = snapshot(D)
    assert any(is_frozen(name, count) for name in before)
    for name, value in before.items():
        is_same = torch.equal(value, after[name])
        assert is_same == is_frozen(name, count), name


def test_the_function_at_the_time_of_freezing_stays(make_discriminator):
    """Training mode still normalises by the batch: the first step's logits and gradients are as without freezing."""
    torch.manual_seed(1)
    D, frozen = make_discriminator(), make_discriminator()
    frozen.load_state_dict(D.state_dict())
    for layer in (m for m in D.modules() if isinstance(m, SpectralNormConv2d)):
        for _ in range(300):  # stored vectors are those of the weights
            layer.inverse_sigma()
    frozen.load_state_dict(D.state_dict())
    frozen.freeze_blocks_(2)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    gradients = []
    for network in (D, frozen):
        x = images.clone().requires_grad_()
        logits = network(x, labels)["tf_efficientnet_lite0"].fun
        gradients.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), x)))
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert gradients[1][1].abs().max() > 0  # the generator still learns from frozen blocks


def test_frozen_blocks_get_no_gradient_and_no_optimizer(make_discriminator):
    D = make_discriminator()
    all_parameters = sum(p.numel() for p in D.trainable_parameters())
    D.freeze_blocks_(1)
    trained = list(D.trainable_parameters())
    assert 0 < sum(p.numel() for p in trained) < all_parameters
    D.set_trainable_(True)
    names = [name for name, p in D.named_parameters() if p.requires_grad]
    assert names and not any(is_frozen(name, 1) for name in names)
    assert len(names) == len(trained)
    D(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))["tf_efficientnet_lite0"].fun.sum().backward()
    assert all(
        p.grad is None for name, p in D.named_parameters() if name.startswith("heads") and is_frozen(name, 1)
    )


def test_evaluation_mode_uses_the_stored_statistics(make_discriminator):
    D = make_discriminator()
    train(D, 2)
    D.eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    expected = D(images, labels)["tf_efficientnet_lite0"].fun
    D.train()
    D.freeze_blocks_(3)
    D.eval()
    torch.testing.assert_close(D(images, labels)["tf_efficientnet_lite0"].fun, expected)


def test_more_blocks_than_any_head_has_are_refused(make_discriminator):
    with pytest.raises(ConfigError, match="--freezed 4: the heads of D have at most 3 blocks"):
        make_discriminator().freeze_blocks_(4)
