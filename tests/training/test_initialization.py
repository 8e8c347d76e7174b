# SPDX-License-Identifier: MIT
"""Class embedding rows from data and files, and starting from the weights of a network file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torch_utils.errors import UserError
from training import initialization
from training.config import (
    ConfigError,
    DiscriminatorConfig,
    GeneratorConfig,
    MappingConfig,
    SynthesisConfig,
    TrainConfig,
)
from training.dataset import open_dataset
from training.discriminator.feature_network import build_feature_network
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.generator import Generator
from training.initialization import (
    Networks,
    build_networks,
    class_mean_features,
    set_class_embeddings_,
    start_from_network_,
)
from training.network_io import save_network
from training.presets import quickstart

NUM_CLASSES, ROWS = 3, 4  # one row more than classes: it must stay as it is
CPU = torch.device("cpu")
GENERATOR = GeneratorConfig(
    mapping=MappingConfig(z_dim=4, w_dim=8, c_dim=NUM_CLASSES, num_embeddings=ROWS),
    synthesis=SynthesisConfig(img_resolution=16, channel_max=4, num_layers=3, margin_size=2),
)
DISCRIMINATOR = DiscriminatorConfig(
    img_resolution=16,
    c_dim=NUM_CLASSES,
    backbones=("tf_efficientnet_lite0",),
    feature_resolution=32,
    nominal_resolution=32,
    projected_channels=8,
    num_levels=2,
    head_resolution=4,
    max_head_channels=8,
    class_dim=4,
    num_class_embeddings=ROWS,
)


def make_config(embedding_source: str) -> TrainConfig:
    return replace(
        quickstart(), generator=GENERATOR, discriminator=DISCRIMINATOR, embedding_source=embedding_source
    )


def make_discriminator(kind: str, cfg: DiscriminatorConfig = DISCRIMINATOR) -> ProjectedDiscriminator:
    return ProjectedDiscriminator(cfg, kind, pretrained=False)


@pytest.fixture(scope="module")
def lite0():
    return build_feature_network("tf_efficientnet_lite0", pretrained=True)


@pytest.fixture
def features(lite0, monkeypatch):
    """image uint8 (C, H, W) -> its pooled features; the module under test uses the same network, built once."""

    def build(name, pretrained):
        assert (name, pretrained) == ("tf_efficientnet_lite0", True)
        return lite0

    monkeypatch.setattr(initialization, "build_feature_network", build)
    return lambda image: lite0.pooled_features(image[None].float() / 127.5 - 1, 64)[0]


def standardized(rows: torch.Tensor) -> torch.Tensor:
    """Every feature with mean 0 and variance 1 over classes, unless it hardly varies."""
    centered = rows - rows.mean(dim=0)
    return centered / (centered.square().mean(dim=0).sqrt() + initialization.STANDARDIZING_EPS)


def tables(D: ProjectedDiscriminator) -> list[torch.Tensor]:
    return [m.weight.detach() for m in D.heads.modules() if isinstance(m, nn.Embedding)]


# Class means.


def test_rows_are_standardized_class_means(features, tiny_folder):
    dataset = open_dataset(tiny_folder, use_labels=True)
    rows = class_mean_features(dataset, CPU)
    assert rows.shape == (NUM_CLASSES, 320) and rows.dtype == torch.float32
    means = []
    for class_id in range(NUM_CLASSES):
        members = [features(image) for image, label in dataset if label == class_id]
        assert len(members) == 2
        means.append(torch.stack(members).mean(dim=0))
    torch.testing.assert_close(rows, standardized(torch.stack(means)), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(320), rtol=0, atol=1e-5)
    assert rows.std(dim=0, correction=0).max() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("resolution", "expected"), [(16, 64), (128, 128), (512, 224)])
def test_images_are_seen_at_a_reasonable_size(monkeypatch, write_dataset, resolution, expected):
    seen = []

    class Spy(nn.Module):
        channels = (320,)

        def pooled_features(self, images, resolution):
            seen.append(resolution)
            return torch.zeros(len(images), 320)

    monkeypatch.setattr(initialization, "build_feature_network", lambda name, pretrained: Spy())
    image = Image.new("RGB", (resolution, resolution))
    path = write_dataset("images", {"a.png": image, "b.png": image}, {"a.png": 0, "b.png": 1})
    rows = class_mean_features(open_dataset(path, use_labels=True), CPU)
    assert seen == [expected, expected]
    assert torch.equal(rows, torch.zeros(2, 320))  # features that do not vary give no NaN


def test_a_class_without_images_gets_the_mean_of_the_others(features, write_dataset, tiny_images):
    names = list(tiny_images)
    path = write_dataset("gap", tiny_images, {name: 2 * (i % 2) for i, name in enumerate(names)})
    rows = class_mean_features(open_dataset(path, use_labels=True), CPU)
    assert rows[0].abs().max() > 0.5
    torch.testing.assert_close(rows[1], (rows[0] + rows[2]) / 2, rtol=0, atol=1e-4)


def test_large_classes_are_sampled(features, tiny_folder, monkeypatch):
    monkeypatch.setattr(initialization, "MAX_IMAGES_PER_CLASS", 1)
    dataset = open_dataset(tiny_folder, use_labels=True)
    firsts = [next(image for image, label in dataset if label == k) for k in range(NUM_CLASSES)]
    expected = standardized(torch.stack([features(image) for image in firsts]))
    torch.testing.assert_close(class_mean_features(dataset, CPU), expected, rtol=1e-3, atol=2e-3)


# Tables.


@pytest.mark.parametrize("kind", ["san", "gan"])
def test_rows_from_data_fill_both_networks(kind, features, tiny_folder):
    dataset = open_dataset(tiny_folder, use_labels=True)
    G, D = Generator(GENERATOR), make_discriminator(kind)
    spare_row = G.mapping.embed.weight[NUM_CLASSES].clone()
    set_class_embeddings_(G, D, make_config("data"), dataset, CPU)
    rows = class_mean_features(dataset, CPU)
    assert torch.equal(G.mapping.embed.weight[:NUM_CLASSES], rows)
    assert torch.equal(G.mapping.embed.weight[NUM_CLASSES], spare_row)
    assert len(tables(D)) == (2 if kind == "gan" else 0)
    assert all(torch.equal(table[:NUM_CLASSES], rows) for table in tables(D))
    assert G.mapping.embed.weight.requires_grad


def test_rows_from_a_file(tmp_path):
    rows = np.random.default_rng(0).standard_normal((NUM_CLASSES, 320)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    G, D = Generator(GENERATOR), make_discriminator("gan")
    set_class_embeddings_(G, D, make_config(str(tmp_path / "rows.npy")), None, CPU)
    for table in (G.mapping.embed.weight.detach(), *tables(D)):
        np.testing.assert_array_equal(table[:NUM_CLASSES].numpy(), rows)


def test_random_rows_and_unconditional_networks_are_left_alone():
    G, D = Generator(GENERATOR), make_discriminator("gan")
    before = [G.mapping.embed.weight.clone(), *(table.clone() for table in tables(D))]
    set_class_embeddings_(G, D, make_config("random"), None, CPU)
    mapping = replace(GENERATOR.mapping, c_dim=0)
    unconditional = replace(make_config("data"), generator=replace(GENERATOR, mapping=mapping))
    set_class_embeddings_(G, D, unconditional, None, CPU)
    assert all(torch.equal(a, b) for a, b in zip([G.mapping.embed.weight, *tables(D)], before, strict=True))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((NUM_CLASSES, 7), dtype=np.float32))
    G, D = Generator(GENERATOR), make_discriminator("san")
    with pytest.raises(UserError, match=r"\(3, 7\) do not fit a table of width 320"):
        set_class_embeddings_(G, D, make_config(str(tmp_path / "rows.npy")), None, CPU)
    with pytest.raises(UserError, match="no such file"):
        set_class_embeddings_(G, D, make_config(str(tmp_path / "absent.npy")), None, CPU)


# Starting from a file.


@pytest.fixture
def stored(tmp_path):
    """(path, G_ema, G, D) of a network file; the last two differ from what is loaded."""
    path = tmp_path / "net.safetensors"
    G_ema, G, D = Generator(GENERATOR), Generator(GENERATOR), make_discriminator("san")
    save_network(path, G_ema, G=G, D_state=D.trained_state_dict())
    return path, G_ema, G, D


def start_from(G: Generator, D, path) -> tuple[str, Generator]:
    """What start_from_network_ says, and the moving average that it filled."""
    networks = Networks(G, D, Generator(G.cfg))
    return start_from_network_(networks, str(path)), networks.G_ema


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_network_starts_from_its_own_weights(stored):
    path, G_ema, G, D = stored
    new_G, new_D = Generator(GENERATOR), make_discriminator("san")
    message, new_G_ema = start_from(new_G, new_D, path)
    assert message == f"Started from {path}: generator and discriminator loaded."
    assert_equal_states(new_G_ema.state_dict(), G_ema.state_dict())
    assert_equal_states(new_G.state_dict(), G.state_dict())
    assert_equal_states(new_D.trained_state_dict(), D.trained_state_dict())
    assert all(p.requires_grad for p in new_G.parameters())


def test_a_file_without_discriminator(tmp_path):
    path, G_ema = tmp_path / "net.safetensors", Generator(GENERATOR)
    save_network(path, G_ema)
    G, D = Generator(GENERATOR), make_discriminator("san")
    before = {name: value.clone() for name, value in D.state_dict().items()}
    message, new_G_ema = start_from(G, D, path)
    assert "D starts fresh" in message
    assert_equal_states(G.state_dict(), G_ema.state_dict())
    assert_equal_states(new_G_ema.state_dict(), G_ema.state_dict())
    assert_equal_states(D.state_dict(), before)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("mapping", {"w_dim": 16}, "w_dim=8, this run asks for 16"),
        ("mapping", {"c_dim": 2}, "c_dim=3, this run asks for 2"),
        ("synthesis", {"num_layers": 4}, "num_layers=3, this run asks for 4"),
        ("synthesis", {"img_resolution": 32}, "img_resolution=16, this run asks for 32"),
    ],
)
def test_another_generator_is_refused(stored, part, changes, message):
    other = replace(GENERATOR, **{part: replace(getattr(GENERATOR, part), **changes)})
    G = Generator(other)
    before = {name: value.clone() for name, value in G.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        start_from(G, make_discriminator("san"), stored[0])
    assert str(stored[0]) in str(error.value) and "\n" not in str(error.value)
    assert_equal_states(G.state_dict(), before)


def test_another_discriminator_is_refused(stored):
    with pytest.raises(ConfigError, match="built from another configuration"):
        start_from(Generator(GENERATOR), make_discriminator("gan"), stored[0])
    wider = replace(DISCRIMINATOR, projected_channels=16)
    with pytest.raises(ConfigError, match="has shape"):
        start_from(Generator(GENERATOR), make_discriminator("san", wider), stored[0])


def test_missing_and_foreign_files_are_refused(tmp_path):
    G, D = Generator(GENERATOR), make_discriminator("san")
    with pytest.raises(UserError, match="does not exist"):
        start_from(G, D, tmp_path / "absent.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(UserError, match=r"foreign\.safetensors"):
        start_from(G, D, tmp_path / "foreign.safetensors")


def test_another_batch_size_is_no_reason_to_refuse(stored):
    synthesis = replace(
        GENERATOR.synthesis, magnitude_ema_beta=0.5
    )  # what --batch changes in the configuration
    message, _ = start_from(
        Generator(replace(GENERATOR, synthesis=synthesis)), make_discriminator("san"), stored[0]
    )
    assert "loaded" in message


def test_networks_are_ready_for_the_first_step(features, tiny_folder):
    dataset = open_dataset(tiny_folder, use_labels=True)
    networks, origin = build_networks(make_config("random"), dataset, CPU)
    assert origin == "Networks start from random weights."
    assert_equal_states(networks.G_ema.state_dict(), networks.G.state_dict())
    assert networks.G.training and networks.D.training and not networks.G_ema.training
    assert all(p.requires_grad for p in networks.G.parameters())
    assert not any(p.requires_grad for p in networks.G_ema.parameters())
    assert not any(
        p.requires_grad for p in networks.D.parameters()
    )  # else the first G step would fill gradients


def test_building_from_a_file(stored, tiny_folder):
    path, G_ema, G, D = stored
    config = replace(make_config("data"), resume=str(path))
    networks, origin = build_networks(config, open_dataset(tiny_folder, use_labels=True), CPU)
    assert origin.startswith(f"Started from {path}")
    # The file's class table, not the one computed from the data, stands in the end.
    assert_equal_states(networks.G.state_dict(), G.state_dict())
    assert_equal_states(networks.G_ema.state_dict(), G_ema.state_dict())
    assert_equal_states(networks.D.trained_state_dict(), D.trained_state_dict())
    assert not any(p.requires_grad for p in networks.G_ema.parameters())
