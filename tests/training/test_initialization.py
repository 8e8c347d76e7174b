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
    GeneratorConfig,
    MappingConfig,
    SynthesisConfig,
)
from training.dataset import open_dataset
from training.discriminator.feature_network import build_feature_network
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.generator import Generator
from training.initialization import (
    build_networks,
    class_mean_features,
    pooled_class_means,
    preview_start,
    set_class_embeddings_,
)
from training.network_io import save_network
from training.presets import quickstart

NUM_CLASSES, ROWS = 3, 4  # one row more than classes: it must stay as it is
CPU = torch.device("cpu")
GENERATOR = GeneratorConfig(
    mapping=MappingConfig(z_dim=4, w_dim=8, c_dim=NUM_CLASSES, num_embeddings=ROWS),
    synthesis=SynthesisConfig(img_resolution=16, channel_max=4, num_layers=3, margin_size=2),
)


@pytest.fixture(scope="module")
def make_config(tiny_discriminator_config):
    """make_config(embedding_source) -> TrainConfig of the small networks."""
    discriminator = tiny_discriminator_config(NUM_CLASSES, num_class_embeddings=ROWS)
    config = replace(quickstart(), generator=GENERATOR, discriminator=discriminator)
    return lambda embedding_source: replace(config, embedding_source=embedding_source)


@pytest.fixture(scope="module")
def make_discriminator(make_config):
    """make_discriminator(kind) -> D with heads of this kind."""
    cfg = make_config("random").discriminator
    return lambda kind: ProjectedDiscriminator(cfg, kind, pretrained=False)


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
def test_rows_from_data_fill_both_networks(kind, features, tiny_folder, make_config, make_discriminator):
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


def test_rows_from_a_file(tmp_path, make_config, make_discriminator):
    rows = np.random.default_rng(0).standard_normal((NUM_CLASSES, 320)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    G, D = Generator(GENERATOR), make_discriminator("gan")
    set_class_embeddings_(G, D, make_config(str(tmp_path / "rows.npy")), None, CPU)
    for table in (G.mapping.embed.weight.detach(), *tables(D)):
        np.testing.assert_array_equal(table[:NUM_CLASSES].numpy(), rows)


def test_random_rows_and_unconditional_networks_are_left_alone(make_config, make_discriminator):
    G, D = Generator(GENERATOR), make_discriminator("gan")
    before = [G.mapping.embed.weight.clone(), *(table.clone() for table in tables(D))]
    set_class_embeddings_(G, D, make_config("random"), None, CPU)
    mapping = replace(GENERATOR.mapping, c_dim=0)
    unconditional = replace(make_config("data"), generator=replace(GENERATOR, mapping=mapping))
    set_class_embeddings_(G, D, unconditional, None, CPU)
    assert all(torch.equal(a, b) for a, b in zip([G.mapping.embed.weight, *tables(D)], before, strict=True))


def test_a_file_that_does_not_fit_is_refused(tmp_path, make_config, make_discriminator):
    np.save(tmp_path / "rows.npy", np.zeros((NUM_CLASSES, 7), dtype=np.float32))
    G, D = Generator(GENERATOR), make_discriminator("san")
    with pytest.raises(UserError, match=r"\(3, 7\) do not fit a table of width 320"):
        set_class_embeddings_(G, D, make_config(str(tmp_path / "rows.npy")), None, CPU)
    with pytest.raises(UserError, match="no such file"):
        set_class_embeddings_(G, D, make_config(str(tmp_path / "absent.npy")), None, CPU)


# Starting from a file. What is taken from it: test_transfer_plan.py.


@pytest.fixture
def stored(tmp_path, make_config, make_discriminator):
    """(path, G_ema, G, D) of a network file; all four differ."""
    path = tmp_path / "net.safetensors"
    G_ema, G, D = Generator(GENERATOR), Generator(GENERATOR), make_discriminator("san")
    save_network(path, G_ema, G=G, D_state=D.trained_state_dict(), config=make_config("random"))
    return path, G_ema, G, D


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_networks_are_ready_for_the_first_step(features, tiny_folder, make_config):
    dataset = open_dataset(tiny_folder, use_labels=True)
    networks, origin = build_networks(make_config("random"), dataset, CPU)
    assert origin == "Networks start from random weights."
    assert_equal_states(networks.G_ema.state_dict(), networks.G.state_dict())
    assert networks.G.training and networks.D.training and not networks.G_ema.training
    assert all(p.requires_grad for p in networks.G.parameters())
    assert not any(p.requires_grad for p in networks.G_ema.parameters())
    assert not any(
        p.requires_grad for p in networks.D.parameters()
    )  # else G's first step would fill gradients


def test_every_network_starts_from_its_own_weights(stored, tiny_folder, make_config):
    path, G_ema, G, D = stored
    config = replace(make_config("checkpoint"), resume=str(path))
    networks, origin = build_networks(config, open_dataset(tiny_folder, use_labels=True), CPU)
    assert origin.startswith(f"Starting from {path}: 16x16, 3 classes, SAN discriminator.\nnetwork ")
    assert_equal_states(networks.G.state_dict(), G.state_dict())
    assert_equal_states(networks.G_ema.state_dict(), G_ema.state_dict())
    assert_equal_states(networks.D.trained_state_dict(), D.trained_state_dict())
    assert all(p.requires_grad for p in networks.G.parameters())
    assert not any(p.requires_grad for p in networks.G_ema.parameters())
    assert not any(p.requires_grad for p in networks.D.parameters())


def test_preview_says_what_a_run_would_take(stored, tiny_folder, make_config):
    config = replace(make_config("checkpoint"), resume=str(stored[0]))
    dataset = open_dataset(tiny_folder, use_labels=True)
    assert build_networks(config, dataset, CPU)[1] == preview_start(config, dataset)
    with pytest.raises(ConfigError, match="--freezed 3: the heads of D have at most 2 blocks"):
        preview_start(replace(config, frozen_head_blocks=3), dataset)


def test_frozen_blocks_are_frozen_from_the_start(stored, tiny_folder, make_config):
    config = replace(make_config("checkpoint"), resume=str(stored[0]), frozen_head_blocks=1)
    networks, origin = build_networks(config, open_dataset(tiny_folder, use_labels=True), CPU)
    assert origin.endswith("The first 1 blocks of every head of D stay as they are.")
    networks.D.set_trainable_(True)
    first = [p for name, p in networks.D.heads.named_parameters() if ".trunk.0." in name]
    assert len(first) == 2 * 4 and not any(p.requires_grad for p in first)


@pytest.mark.parametrize("choice", ["auto", "nearest"])
def test_new_classes_start_from_those_with_the_most_similar_images(
    features, tiny_folder, tmp_path, choice, make_config
):
    """A table of raw features, as official files have: each class of the data finds the row of its own images."""
    dataset = open_dataset(tiny_folder, use_labels=True)
    rows = pooled_class_means(dataset, CPU)
    table = torch.cat([rows[[2]], torch.randn(1, 320), rows[[0]], rows[[1]]])
    generator = replace(GENERATOR, mapping=replace(GENERATOR.mapping, c_dim=4))
    G_ema = Generator(generator)
    G_ema.mapping.embed.weight.data.copy_(1.7 * table + 0.001)
    G_ema.mapping.w_avg.normal_()
    save_network(path := tmp_path / "net.safetensors", G_ema)
    config = replace(make_config("checkpoint"), resume=str(path), classes_from=choice)
    networks, origin = build_networks(config, dataset, CPU)
    assert "nearest by image features: from class 2, 3, 0" in origin
    assert torch.equal(networks.G_ema.mapping.w_avg, G_ema.mapping.w_avg[[2, 3, 0]])
    z = torch.randn(3, 4)
    expected = G_ema.requires_grad_(False)(z, torch.tensor([2, 3, 0]))
    assert torch.equal(networks.G_ema(z, torch.arange(3)), expected)


def test_a_set_without_classes_counts_as_one_class(features, tiny_folder):
    dataset = open_dataset(tiny_folder)
    expected = torch.stack([features(image) for image, _ in dataset]).mean(dim=0)
    torch.testing.assert_close(pooled_class_means(dataset, CPU)[0], expected, rtol=1e-3, atol=2e-3)


def test_missing_foreign_and_other_files_are_refused_before_anything_is_built(
    stored, tmp_path, tiny_folder, monkeypatch, make_config
):
    def fail(*_args, **_options):
        raise AssertionError("built")

    monkeypatch.setattr(initialization, "ProjectedDiscriminator", fail)
    dataset = open_dataset(tiny_folder, use_labels=True)
    (tmp_path / "foreign.safetensors").write_bytes(json.dumps({}).encode())
    config = make_config("checkpoint")
    wider = replace(
        config, discriminator=replace(config.discriminator, projected_channels=16), resume=str(stored[0])
    )
    cases = {
        "does not exist": replace(config, resume=str(tmp_path / "absent.safetensors")),
        r"foreign\.safetensors": replace(config, resume=str(tmp_path / "foreign.safetensors")),
        "projected_channels=8, this run asks for 16": wider,
    }
    for message, bad_config in cases.items():
        with pytest.raises(UserError, match=message):
            build_networks(bad_config, dataset, CPU)
