# SPDX-License-Identifier: MIT
"""What a run takes from a checkpoint: the table, the states, and that the first images and logits are the file's."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_utils.errors import UserError
from training.config import (
    GeneratorConfig,
    MappingConfig,
    SuperresConfig,
    SynthesisConfig,
    TrainConfig,
)
from training.discriminator.projected import ProjectedDiscriminator
from training.finetune.class_sources import ClassSources, mean_of_all, same_ids
from training.finetune.transfer_plan import plan_transfer
from training.finetune.transfer_table import TransferPlan
from training.generator.generator import Generator
from training.network_file import NetworkFile, NetworkFileError
from training.presets import quickstart

CLASSES, ROWS = 3, 4
LITE0 = "tf_efficientnet_lite0"
GENERATOR = GeneratorConfig(
    mapping=MappingConfig(z_dim=4, w_dim=8, c_dim=CLASSES, num_embeddings=ROWS, embedding_dim=12),
    synthesis=SynthesisConfig(img_resolution=16, channel_max=4, num_layers=3, margin_size=2),
)
UNCONDITIONAL = "unconditional"


@pytest.fixture(scope="module")
def run_config(tiny_discriminator_config) -> Callable[..., TrainConfig]:
    """run_config(c_dim, loss, backbones, **changes): heads of two blocks and of one; three classes, unless told."""

    def make(c_dim: int = CLASSES, loss: str = "san", backbones: tuple[str, ...] = (LITE0,), **changes):
        rows = max(ROWS, c_dim)
        mapping = replace(GENERATOR.mapping, c_dim=c_dim, num_embeddings=rows)
        generator = replace(GENERATOR, mapping=mapping)
        discriminator = tiny_discriminator_config(
            c_dim, num_class_embeddings=rows, embedding_dim=12, backbones=backbones
        )
        return replace(quickstart(), loss=loss, generator=generator, discriminator=discriminator, **changes)

    return make


def build(config) -> tuple[Generator, ProjectedDiscriminator]:
    return Generator(config.generator), ProjectedDiscriminator(
        config.discriminator, config.loss, pretrained=False
    )


class Checkpoint:
    """Networks somewhere in training, and the file that holds them."""

    def __init__(self, config, has_G: bool = True, has_D: bool = True) -> None:
        (self.G, self.D), (self.G_ema, _) = build(config), build(config)
        with torch.no_grad():
            for network in (self.G, self.G_ema):
                network.mapping.w_avg.normal_()
            self.D(torch.randn(4, 3, 16, 16), torch.arange(4) % CLASSES)
        self.D.eval()
        self.file = NetworkFile(
            path=Path("net.pkl"),
            generator_config=config.generator,
            train_config_json=None,
            G_ema=self.G_ema.state_dict(),
            G=self.G.state_dict() if has_G else None,
            D=self.D.trained_state_dict() if has_D else None,
            discriminator_config=config.discriminator if has_D else None,
            head_kind=config.loss if has_D else None,
            info={},
        )


def plan(
    stored: NetworkFile, config, classes: ClassSources | None
) -> tuple[TransferPlan, Generator, ProjectedDiscriminator]:
    """The plan, and new networks with what it gives them."""
    G, D = build(config)
    result = plan_transfer(stored, config, G.state_dict(), D.trained_state_dict(), classes)
    G_ema = Generator(config.generator)
    G_ema.load_state_dict(result.G_ema)
    G.load_state_dict(result.G)
    D.load_trained_state_dict(result.D)
    D.eval()
    return result, G_ema, D


def actions(result: TransferPlan) -> dict[str, str]:
    """Network and group -> what happens, for the lines that are not plainly loaded."""
    return {f"{line.network}: {line.group}": line.action for line in result.groups if line.action != "loaded"}


def copy_backbone(D: ProjectedDiscriminator, source: ProjectedDiscriminator) -> None:
    """Feature networks are not part of a file: both must look through the same one."""
    D.feature_networks.load_state_dict(source.feature_networks.state_dict())


# Everything fits.


@pytest.mark.parametrize("loss", ["san", "gan"])
@pytest.mark.parametrize("c_dim", [0, CLASSES])
def test_a_file_of_the_same_kind_is_loaded_to_the_last_bit(loss, c_dim, run_config):
    config = run_config(c_dim, loss)
    checkpoint = Checkpoint(config)
    classes = same_ids(CLASSES, CLASSES) if c_dim else None
    result, *_ = plan(checkpoint.file, config, classes)
    assert actions(result) == {}
    for state, network in ((result.G, checkpoint.G), (result.G_ema, checkpoint.G_ema)):
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[name], x) for name, x in network.state_dict().items())
    stored = checkpoint.D.trained_state_dict()
    assert result.D.keys() == stored.keys() and all(
        torch.equal(result.D[name], x) for name, x in stored.items()
    )


def test_table_of_a_plain_gan_that_becomes_a_san(run_config):
    config = run_config(loss="gan")
    result, *_ = plan(Checkpoint(config, has_G=False).file, run_config(), same_ids(CLASSES, CLASSES))
    assert result.table() == (
        """\
Starting from net.pkl: 16x16, 3 classes, plain GAN discriminator. It holds G_ema only: G starts from that.
network                  group              tensors  values  what       why
G                        class embedding          1      48  loaded     classes 0 to 2 as they are
G                        class projection         2      52  loaded     as in the file
G                        mapping layers           4     144  loaded     as in the file
G                        mean styles              1      24  loaded     classes 0 to 2 as they are
G                        synthesis input          6      73  loaded     as in the file
G                        synthesis layers        26     679  loaded     as in the file
D tf_efficientnet_lite0  random projection        8   1,064  loaded     as in the file: the heads know no other
D tf_efficientnet_lite0  trunks of heads         27   3,603  loaded     as in the file
D tf_efficientnet_lite0  last layers             10   1,328  converted  plain to SAN, same function"""
    )


def test_table_counts_every_tensor_of_the_run_once(run_config):
    config = run_config()
    result, G, D = plan(Checkpoint(config).file, config, same_ids(CLASSES, CLASSES))
    state = {**{f"G.{k}": x for k, x in G.state_dict().items()}, **D.trained_state_dict()}
    assert sum(line.num_tensors for line in result.groups) == len(state)
    assert sum(line.num_values for line in result.groups) == sum(x.numel() for x in state.values())


# The function of D, and the images.


@pytest.mark.parametrize(("before", "after"), list(itertools.product(("san", "gan"), repeat=2)))
@pytest.mark.parametrize("c_dim", [0, CLASSES])
def test_logits_of_the_whole_discriminator_stay(before, after, c_dim, run_config):
    checkpoint = Checkpoint(run_config(c_dim, before))
    classes = same_ids(CLASSES, CLASSES) if c_dim else None
    _, _, D = plan(checkpoint.file, run_config(c_dim, after), classes)
    copy_backbone(D, checkpoint.D)
    images, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2, 0])
    expected = checkpoint.D(images, labels)[LITE0].fun
    actual = D(images, labels)[LITE0].fun
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_first_images_of_a_run_with_the_same_classes_are_the_files(run_config):
    checkpoint = Checkpoint(run_config(loss="gan"))
    _, G_ema, _ = plan(checkpoint.file, run_config(), same_ids(CLASSES, CLASSES))
    z, c = torch.randn(3, 4), torch.arange(3)
    assert torch.equal(G_ema(z, c), checkpoint.G_ema(z, c))


@pytest.mark.parametrize("before", ["san", "gan"])
def test_other_classes_mean_the_same_to_both_networks(before, run_config):
    checkpoint = Checkpoint(run_config(loss=before))
    classes = ClassSources(((2,), (0,), (2,), (1,), (0,), (2,)), CLASSES, "as listed")
    result, G_ema, D = plan(checkpoint.file, run_config(6), classes)
    assert actions(result) == {
        "G: class embedding": "converted",
        "G: mean styles": "converted",
        f"D {LITE0}: last layers": "converted",
    }
    z, new, old = torch.randn(6, 4), torch.arange(6), torch.tensor([2, 0, 2, 1, 0, 2])
    images = G_ema(z, new, truncation_psi=0.7)
    assert torch.equal(images, checkpoint.G_ema(z, old, truncation_psi=0.7))
    copy_backbone(D, checkpoint.D)
    expected = checkpoint.D(images.detach(), old)[LITE0].fun
    torch.testing.assert_close(D(images, new)[LITE0].fun, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_conditional_to_unconditional(loss, run_config):
    checkpoint = Checkpoint(run_config(loss="gan"))
    result, G_ema, D = plan(checkpoint.file, run_config(0, loss), ClassSources(((1,),), CLASSES, "as listed"))
    changed = actions(result)
    assert (
        changed.pop(f"D {LITE0}: trunks of heads", "converted") == "converted"
    )  # plain heads: the filter's length
    assert changed == {
        "G: class projection": "skipped",
        "G: mapping layers": "converted",
        "G: mean styles": "converted",
        f"D {LITE0}: last layers": "converted",
    }
    assert "one filter for all images: as listed: from class 1" in result.table()
    assert "the bias takes the class vector: as listed: from class 1" in result.table()
    z, labels = torch.randn(4, 4), torch.ones(4, dtype=torch.int64)
    images = G_ema(z)
    torch.testing.assert_close(images, checkpoint.G_ema(z, labels), rtol=1e-4, atol=1e-5)
    copy_backbone(D, checkpoint.D)
    expected = checkpoint.D(images.detach(), labels)[LITE0].fun
    torch.testing.assert_close(D(images)[LITE0].fun, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_unconditional_to_conditional(loss, run_config):
    checkpoint = Checkpoint(run_config(0, "gan"))
    result, G_ema, D = plan(checkpoint.file, run_config(CLASSES, loss), None)
    assert actions(result) == {
        "G: class embedding": "re-initialised",
        "G: class projection": "re-initialised",
        "G: mapping layers": "converted",
        "G: mean styles": "converted",
        f"D {LITE0}: last layers": "converted",
    }
    z, labels = torch.randn(3, 4), torch.arange(3)
    images = G_ema(z, labels)
    torch.testing.assert_close(images, checkpoint.G_ema(z), rtol=1e-4, atol=1e-5)
    copy_backbone(D, checkpoint.D)
    expected = checkpoint.D(images.detach())[LITE0].fun
    torch.testing.assert_close(D(images, labels)[LITE0].fun, expected, rtol=1e-4, atol=1e-5)


# Parts that are missing.


def test_a_file_without_discriminator_leaves_it_new(run_config):
    config = run_config(loss="gan")
    checkpoint = Checkpoint(config, has_G=False, has_D=False)
    G, D = build(config)
    result = plan_transfer(
        checkpoint.file, config, G.state_dict(), D.trained_state_dict(), same_ids(CLASSES, CLASSES)
    )
    assert actions(result) == {f"D {LITE0}: projection and heads": "re-initialised"}
    assert "the file has no discriminator; class tables take G's rows" in result.table()
    tables = [name for name in result.D if name.endswith("last.embed.weight")]
    assert len(tables) == 2
    for name, x in D.trained_state_dict().items():
        expected = checkpoint.G_ema.mapping.embed.weight if name in tables else x
        assert torch.equal(result.D[name], expected)
    assert all(torch.equal(result.G[name], x) for name, x in checkpoint.G_ema.state_dict().items())


def test_a_discriminator_that_was_left_out_says_why(run_config):
    config = run_config()
    stored = replace(
        Checkpoint(config, has_D=False).file, info={"discriminator": "left out: D is an Elephant"}
    )
    assert "left out: D is an Elephant" in plan(stored, config, same_ids(CLASSES, CLASSES))[0].table()


def test_other_backbones_start_anew_and_shared_ones_stay(run_config):
    small, other = LITE0, "mobilenetv3_small_050"
    checkpoint = Checkpoint(run_config())
    result, *_ = plan(checkpoint.file, run_config(backbones=(other, small)), same_ids(CLASSES, CLASSES))
    assert actions(result) == {f"D {other}: projection and heads": "re-initialised"}
    assert "the file has no heads for this backbone" in result.table()
    stored = checkpoint.D.trained_state_dict()
    assert all(torch.equal(result.D[name], x) for name, x in stored.items())
    alone, *_ = plan(checkpoint.file, run_config(backbones=(other,)), same_ids(CLASSES, CLASSES))
    assert actions(alone)[f"D {small}: projection and heads"] == "skipped"


def test_levels_that_cannot_be_converted_are_named(run_config):
    """Without a block there is no BatchNorm to hold the scale: that level alone starts anew."""
    san, gan = run_config(0, "san"), run_config(0, "gan")
    san, gan = (replace(c, discriminator=replace(c.discriminator, head_resolution=8)) for c in (san, gan))
    result, *_ = plan(Checkpoint(san).file, gan, None)
    lines = {line.group: line for line in result.groups if line.network.startswith("D")}
    assert lines["last layers 0"].action == "converted" and lines["trunks of heads"].action == "converted"
    assert lines["last layers 1"].action == "re-initialised"
    assert "no BatchNorm comes before" in lines["last layers 1"].reason
    assert lines["trunks of heads"].reason == "last BatchNorm takes the scale of the last layer"


# Refusals.


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("mapping", {"w_dim": 16}, r"generator (mapping) was built with w_dim=8, this run asks for 16"),
        (
            "synthesis",
            {"num_layers": 4},
            r"generator (synthesis) was built with num_layers=3, this run asks for 4",
        ),
        ("synthesis", {"img_resolution": 32}, r"img_resolution=16, this run asks for 32"),
    ],
)
def test_another_generator_is_refused(part, changes, message, run_config):
    stored, config = Checkpoint(run_config()).file, run_config()
    generator = replace(config.generator, **{part: replace(getattr(config.generator, part), **changes)})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        plan(stored, replace(config, generator=generator), same_ids(CLASSES, CLASSES))
    assert "net.pkl" in str(error.value) and "\n" not in str(error.value)


def test_another_number_of_stages_is_refused(run_config):
    stored, config = Checkpoint(run_config()).file, run_config()
    stages = (SuperresConfig(up_factor=2, head_layers=3),)
    with pytest.raises(UserError, match="has 0 super-resolution stages, this run asks for 1"):
        plan(stored, replace(config, generator=replace(config.generator, superres=stages)), None)


def test_what_no_weight_depends_on_may_differ(run_config):
    stored, config = Checkpoint(run_config()).file, run_config()
    synthesis = replace(config.generator.synthesis, magnitude_ema_beta=0.5, num_fp16_res=0, conv_clamp=None)
    changed = replace(config, generator=replace(config.generator, synthesis=synthesis))
    assert actions(plan(stored, changed, same_ids(CLASSES, CLASSES))[0]) == {}


def test_another_discriminator_is_refused(run_config):
    stored, config = Checkpoint(run_config()).file, run_config()
    wider = replace(config, discriminator=replace(config.discriminator, projected_channels=16))
    with pytest.raises(
        UserError, match="its discriminator was built with projected_channels=8, this run asks for 16"
    ):
        plan(stored, wider, same_ids(CLASSES, CLASSES))


def test_freezing_new_blocks_is_refused(run_config):
    classes, config = same_ids(CLASSES, CLASSES), run_config(resume="net.pkl", frozen_head_blocks=1)
    plan(Checkpoint(run_config()).file, config, classes)
    with pytest.raises(UserError, match=f"--freezed 1: net.pkl has no heads for {LITE0}"):
        plan(Checkpoint(run_config(), has_D=False).file, config, classes)


@pytest.mark.parametrize(
    ("name", "c_dim", "message"),
    [
        ("mapping.fc0.weight", 0, "its mapping network lacks 'fc0.weight'"),
        ("mapping.fc1.weight", CLASSES, "lacks tensor 'mapping.fc1.weight'"),
        ("synthesis.input.freqs", CLASSES, "lacks tensor 'synthesis.input.freqs'"),
        (f"heads.{LITE0}.0.last.embed.weight", CLASSES, f"head 'heads.{LITE0}.0' lacks 'last.embed.weight'"),
        (f"heads.{LITE0}.1.trunk.0.1.bias", CLASSES, f"lacks tensor 'heads.{LITE0}.1.trunk.0.1.bias'"),
    ],
)
def test_damaged_files_are_refused(name, c_dim, message, run_config):
    stored = Checkpoint(run_config(loss="gan")).file
    stored = replace(
        stored,
        G_ema={key: x for key, x in stored.G_ema.items() if key != name},
        D={key: x for key, x in stored.D.items() if key != name},
    )
    with pytest.raises(NetworkFileError, match=re.escape(message)) as error:
        plan(stored, run_config(c_dim), mean_of_all(CLASSES, max(c_dim, 1)))
    assert "\n" not in str(error.value)


def test_misshapen_tensors_are_refused(run_config):
    stored = Checkpoint(run_config(loss="gan")).file
    stored = replace(stored, G_ema=stored.G_ema | {"mapping.embed_proj.weight": torch.zeros(4, 5)})
    for c_dim in (0, CLASSES):
        with pytest.raises(NetworkFileError, match="does not fit its own configuration"):
            plan(stored, run_config(c_dim), mean_of_all(CLASSES, max(c_dim, 1)))
