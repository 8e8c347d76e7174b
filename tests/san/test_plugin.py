# SPDX-License-Identifier: MIT
"""The code of docs/plugin.md runs, section by section, on small discriminators of the shape the section speaks of.

Each section's blocks share a namespace that is prepared with what stands around them in the code base named. Then the
losses it defines must train the discriminator, directions included, and the generator.

python -m pytest tests/san/test_plugin.py
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import san
from san.layers import SANLayer

TEXT = (Path(san.__file__).parents[1] / "docs" / "plugin.md").read_text()
BATCH = 6


def blocks_by_section() -> dict[str, list[str]]:
    """Heading -> its python blocks; "" for what stands before the first one."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^##+ ", "\n" + TEXT, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        blocks = re.findall(r"^```python\n(.*?)^```", body, flags=re.DOTALL | re.MULTILINE)
        if blocks:
            found["" if part.startswith("\n") or heading.startswith("# ") else heading] = blocks
    return found


BLOCKS = blocks_by_section()
# Section -> family, names of D, of its optimizer, of D's losses, of G's loss.
TRAINING = {
    "StyleGAN2-ADA": ("stylegan2", "D", "opt", ("loss_Dgen", "loss_Dreal"), "loss_Gmain"),
    "Projected GAN": ("projected", "D", "opt", ("loss_Dgen", "loss_Dreal"), "loss_Gmain"),
    "StyleGAN-XL": ("stylegan_xl", "D", "opt", ("loss_Dgen", "loss_Dreal"), "loss_Gmain"),
    "R3GAN": ("r3gan", "D", "optimizer_D", ("loss_D",), "loss_G"),
    "BigGAN": ("biggan", "D", "D.optim", ("D_loss",), "G_loss"),
    "StudioGAN": ("studiogan", "Dis", "d_optimizer", ("dis_loss",), "gen_loss"),
    "PatchGAN and VQGAN": ("vqgan", "discriminator", "opt_disc", ("d_loss",), "g_loss"),
    "HiFi-GAN and BigVGAN": ("hifigan", "mpd", "optim_d", ("loss_disc",), "loss_gen"),
}
# Section -> family, module that the line belongs to, names of its features and class vectors, result.
LINES = {
    "StyleGAN2-ADA with labels": ("stylegan2_labels", "b4", "x", "cmap", "x"),
    "StyleGAN-XL with labels": (
        "stylegan_xl_labels",
        "discriminators.deit.mini_discs.0",
        "out",
        "cmap",
        "out",
    ),
    "R3GAN with labels": ("r3gan_labels", "", "x", "w", "x"),
}
OTHER = {"", "StyleGAN-XL with a direction per class", "Size of a step"}


def test_every_section_with_code_is_executed_here() -> None:
    assert set(BLOCKS) == set(TRAINING) | set(LINES) | OTHER


def make_namespace(families, family_name: str) -> dict[str, object]:
    """A discriminator, images of a small generator and all that the snippets take from their surroundings."""
    family = families.FAMILIES[family_name]
    D = (family.make_edited or family.make)()
    G = nn.Sequential(nn.Linear(4, int(np.prod(family.shape))), nn.Unflatten(1, family.shape))
    fake, real = G(torch.randn(BATCH, 4)), torch.randn(BATCH, *family.shape, requires_grad=True)
    label = (families.make_labels(family, BATCH) or (None,))[0]
    run = D if family.labels else lambda images, c: D(images)
    h = torch.randn(BATCH, 16, requires_grad=True)
    return {
        "torch": torch, "np": np, "D": D, "Dis": D, "discriminator": D, "G": G, "gamma": 1.0,
        "self": SimpleNamespace(run_D=run), "h": h, "y": label, "label": label, "gy": label, "dy": label,
        "gen_img": fake, "gen_c": label, "G_z": fake, "fake_samples": fake, "reconstructions": fake,
        "real_img": real, "real_c": label, "x": real, "real_samples": real, "inputs": real,
    }  # fmt: skip


def run_blocks(section: str, namespace: dict[str, object]) -> None:
    for index, block in enumerate(BLOCKS[section]):
        if section == "StudioGAN" and index == 1:  # its worker passes logits on in dictionaries
            D, label = namespace["Dis"], namespace["label"]
            real_dict, fake_dict = D(namespace["real_img"], label), D(namespace["gen_img"], label)
            namespace |= {"real_dict": real_dict, "fake_dict": fake_dict}
        exec(compile(block, f"docs/plugin.md, {section}", "exec"), namespace)


def add_surroundings(families, discriminators, section: str, namespace: dict[str, object]) -> None:
    """What only one section needs."""
    D = namespace["D"]
    if section in ("BigGAN", "StudioGAN"):
        namespace |= {
            "SNLinear": discriminators.SNLinear,
            "SNEmbedding": discriminators.SNEmbedding,
            "self": D,
        }
    elif section.startswith("HiFi"):
        namespace |= {"mpd": D, "msd": families.FAMILIES["bigvgan"].make()}
        namespace |= {"y": namespace["real_img"], "y_g_hat": namespace["gen_img"]}
        last = san.convert_layer(D.discriminators[0].conv_post)
        namespace |= {"self": SimpleNamespace(conv_post=last), "fmap": [], "x": torch.randn(2, 8, 9, 2)}


def read(namespace: dict[str, object], name: str) -> object:
    owner, _, attribute = name.partition(".")
    return getattr(namespace[owner], attribute) if attribute else namespace[owner]


def directions_of(D: nn.Module) -> list[Tensor]:
    return [m.weight for m in D.modules() if isinstance(m, SANLayer)]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("section", TRAINING)
def test_the_snippets_train_a_san(families, discriminators, section: str) -> None:
    family, D_name, optimizer_name, d_losses, g_loss = TRAINING[section]
    namespace = make_namespace(families, family)
    add_surroundings(families, discriminators, section, namespace)
    run_blocks(section, namespace)
    D, G = namespace[D_name], namespace["G"]
    assert len(directions_of(D)) == families.FAMILIES[family].num_layers
    before = [d.detach().clone() for d in directions_of(D)]

    read(namespace, g_loss).mean().backward(retain_graph=True)
    assert G[0].weight.grad.any()
    assert all(d.grad is None for d in directions_of(D))

    optimizer = read(namespace, optimizer_name)
    optimizer.zero_grad()
    sum(namespace[name] for name in d_losses).mean().backward(retain_graph=True)
    assert all(d.grad.any() for d in directions_of(D))
    optimizer.step()
    for now, then in zip(directions_of(D), before, strict=True):
        assert not torch.equal(now, then)
        norms = now.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("section", ["BigGAN", "StudioGAN"])
def test_the_product_line_is_that_of_the_forward(families, discriminators, section: str) -> None:
    namespace = make_namespace(families, TRAINING[section][0])
    add_surroundings(families, discriminators, section, namespace)
    run_blocks(section, namespace)
    D = namespace["D"]
    actual = namespace["out" if section == "BigGAN" else "adv_output"]
    torch.testing.assert_close(actual.fun, D.head(namespace["h"], namespace["label"]).fun)


@pytest.mark.parametrize("section", LINES)
def test_the_line_in_a_forward_computes_what_the_plain_one_does(families, section: str) -> None:
    family, module, features, vectors, result = LINES[section]
    D = families.FAMILIES[family].make()
    owner = D.get_submodule(module)
    width, trailing = (8, (2, 2)) if "XL" in section else (8, ())
    h, w = torch.randn(BATCH, width, *trailing), torch.randn(BATCH, width, requires_grad=True)
    namespace = {"san": san, "np": np, features: h, vectors: w, "y": w}
    namespace["self"] = SimpleNamespace(cmap_dim=getattr(owner, "cmap_dim", None), EmbeddingLayer=lambda y: y)
    expected = owner.product(h, w)
    run_blocks(section, namespace)
    actual = namespace[result]
    torch.testing.assert_close(actual.fun, expected.reshape(actual.shape))
    assert torch.autograd.grad(actual.dir.square().sum(), w)[0].any()


def test_a_direction_per_class() -> None:
    c, out = torch.eye(4)[[0, 2, 3]], torch.randn(3, 8, 2, 2)
    self = SimpleNamespace(cmap_dim=8)
    namespace = {"san": san, "np": np, "num_classes": 4, "self": self, "out": out, "c": c}
    run_blocks("StyleGAN-XL with a direction per class", namespace)
    rows = (self.embed.weight * self.embed.scale)[[0, 2, 3]]
    expected = torch.einsum("nchw,nc->nhw", out, rows)[:, None] / 8**0.5
    torch.testing.assert_close(namespace["out"].fun, expected)


def make_small_D() -> nn.Module:  # noqa: N802
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4),
    )  # fmt: skip


def test_the_introduction_trains_and_prints_the_table_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = torch.randn(2, 4, 3, 16, 16)
    namespace = {"torch": torch, "D": make_small_D(), "real": real, "fake": fake.requires_grad_()}
    run_blocks("", namespace)
    shown = re.findall(r"^```\n(layer.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)[0]
    printed = capsys.readouterr().out
    assert [line.split()[:-1] for line in printed.splitlines()] == [
        line.split()[:-1] for line in shown.splitlines()
    ]
    namespace["loss_D"].backward()
    (direction,) = directions_of(namespace["D"])
    assert direction.grad.any()
    direction.grad = None
    namespace["loss_G"].backward()
    assert direction.grad is None
    assert fake.grad.any()


def test_directions_with_their_own_learning_rate() -> None:
    D = make_small_D()
    san.sanify(D)
    namespace = {"torch": torch, "D": D}
    run_blocks("Size of a step", namespace)
    san.keep_normalized(namespace["optimizer"], D)
    others, directions = namespace["optimizer"].param_groups
    assert (len(others["params"]), others["lr"]) == (6, 2e-4)
    assert (directions["params"][0] is D[4].weight, directions["lr"]) == (True, 2e-5)


def test_the_table_of_objectives_is_complete() -> None:
    for name in [*san.OBJECTIVES, *san.PAIRED_OBJECTIVES]:
        assert f"| `{name}`" in TEXT
