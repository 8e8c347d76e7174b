# SPDX-License-Identifier: MIT
"""Every family of discriminators turns into a SAN: same function, gradients routed, training lowers the loss.

python -m pytest tests/san/test_families.py
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import san
from san.layers import SANLayer

NAMES = [
    "stylegan2", "stylegan2_labels", "stylegan3", "projected", "stylegan_xl", "stylegan_xl_labels", "r3gan",
    "r3gan_labels", "biggan", "studiogan", "vqgan", "hifigan", "bigvgan",
]  # fmt: skip
MAPPED = {"stylegan2_labels": "mapping", "stylegan_xl_labels": "embed", "r3gan_labels": "embed"}


def make_pair(families, name: str) -> tuple[object, nn.Module, nn.Module, tuple]:
    """The family, its plain discriminator, the SAN one with the same weights, and (real, fake, labels)."""
    family = families.FAMILIES[name]
    torch.manual_seed(0)
    plain = family.make()
    torch.manual_seed(0)
    D = (family.make_edited or family.make)()
    real, fake = torch.randn(8, *family.shape), 0.5 * torch.randn(8, *family.shape) + 0.5
    data = real, fake, families.make_labels(family, 8)
    return family, plain, D, data


def make_san(families, name: str) -> tuple[object, nn.Module, tuple]:
    family, _, D, data = make_pair(families, name)
    if family.sanify is not None:
        san.sanify(D, **family.sanify)
    return family, D, data


def test_all_families_are_here(families) -> None:
    assert list(families.FAMILIES) == NAMES


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_function_does_not_change(families, name: str, is_training: bool) -> None:
    """In training mode that of the next forward pass: after one power iteration of a spectral norm."""
    family, plain, D, data = make_pair(families, name)
    plain.train(is_training)
    D.train(is_training)
    if family.sanify is not None:
        report = san.sanify(D, **family.sanify)
        assert len(report.replaced) == family.num_layers
        assert all(layer.difference < 1e-5 for layer in report.replaced)
    expected, actual = (families.list_logits(family, d, *data) for d in (plain, D))
    pairs = list(zip(expected[0], actual[0], strict=True))
    if not is_training:
        pairs += zip(expected[1], actual[1], strict=True)
    for e, a in pairs:
        assert isinstance(a, san.SANLogits)
        assert torch.equal(a.fun, a.dir)
        torch.testing.assert_close(a.fun, e, rtol=2e-5, atol=2e-5 * e.abs().max().item())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAPPED])
def test_an_example_finds_the_same_layers_and_leaves_no_trace(families, name: str) -> None:
    family, _, D, (real, fake, labels) = make_pair(families, name)
    example = (real, fake) if family.takes_pairs else (real, *labels)
    D.requires_grad_(False)
    before = {k: v.clone() for k, v in D.state_dict().items()}
    random_state = torch.get_rng_state()
    report = san.sanify(D, example=example, **family.sanify)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(report.replaced) == family.num_layers
    replaced = tuple(layer.name + "." for layer in report.replaced)
    for key, value in D.state_dict().items():
        assert key.startswith(replaced) or torch.equal(value, before[key]), key
    assert not any(p.requires_grad or p.grad is not None for p in D.parameters())


def grads(D: nn.Module, views: list[Tensor]) -> set[str]:
    D.zero_grad(set_to_none=True)
    sum((view.double() * torch.randn(view.shape)).sum() for view in views).backward()
    return {n for n, p in D.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_routed(families, name: str) -> None:
    family, D, data = make_san(families, name)
    real, fake = families.list_logits(family, D, *data)
    directions = {f"{n}.weight" for n, m in D.named_modules() if isinstance(m, SANLayer)}
    trained = {n for n, p in D.named_parameters() if p.requires_grad}
    by_dir = grads(D, [logits.dir for logits in [*real, *fake]])
    real, fake = families.list_logits(family, D, *data)
    by_fun = grads(D, [logits.fun for logits in [*real, *fake]])
    if name in MAPPED:  # a mapped label's direction and length come from the same layers
        assert by_dir
        assert all(MAPPED[name] in parameter for parameter in by_dir)
        assert by_fun <= trained
        assert {n for n in by_fun if MAPPED[name] not in n}
    else:
        assert by_dir == directions
        assert not by_fun & directions
        assert {f"{d.removesuffix('weight')}scale" for d in directions} <= by_fun
        quiet = {
            n for n in trained - directions - by_fun if not n.endswith("bias")
        }  # batch norm kills biases
        assert not quiet


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lower_the_loss(families, name: str) -> None:
    family, D, (real, fake, labels) = make_san(families, name)
    objective = {**san.OBJECTIVES, **san.PAIRED_OBJECTIVES}[family.objective]
    optimizer = torch.optim.Adam([p for p in D.parameters() if p.requires_grad], lr=2e-3, betas=(0.0, 0.99))
    if family.sanify is not None:
        san.keep_normalized(optimizer, D)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        pairs = zip(*families.list_logits(family, D, real, fake, labels), strict=True)
        loss = sum(san.san_discriminator_loss(objective, r, f) for r, f in pairs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer in (m for m in D.modules() if isinstance(m, SANLayer)):
            norms = layer.weight.detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sum(losses[-3:]) / 3 < losses[0] - 0.02 * abs(losses[0])
    assert sum(b < a for a, b in pairwise(losses)) >= 6
