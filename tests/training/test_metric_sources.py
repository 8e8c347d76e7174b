# SPDX-License-Identifier: MIT
"""What metrics are given: real images of a data set, and images of a generator, moved and along paths."""

import numpy as np
import pytest
import torch

from metrics import equivariance
from metrics.evaluate import Options, evaluate
from metrics.image_motion import translate_pixels
from torch_utils.errors import UserError
from training import sampling
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.dataset import open_dataset
from training.generator.generator import Generator
from training.generator.kinds import new_generator
from training.metric_sources import dataset_reference, network_sources
from training.presets import dcgan
from training.sampling import Truncation, motion_matrix


class SquaredDifference:
    """Stands for LPIPS."""

    fingerprint = "1"

    def distance(self, a, b):
        return (a - b).square().mean((1, 2, 3))


@pytest.fixture(name="G", scope="module")
def small_network() -> Generator:
    torch.manual_seed(0)
    mapping = MappingConfig(z_dim=8, c_dim=3, w_dim=16, embedding_dim=4, num_layers=2)
    synthesis = SynthesisConfig(img_resolution=32, channel_base=512, channel_max=16, num_layers=6)
    return Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis)).eval().requires_grad_(False)


def test_reference_is_the_whole_unmirrored_set(write_dataset, tiny_images):
    labels = {name: i % 2 for i, name in enumerate(sorted(tiny_images))}
    folder = write_dataset("images", tiny_images, labels)
    zipped = write_dataset("images.zip", tiny_images, labels)
    part = open_dataset(zipped, use_labels=True, mirror=True, max_size=3)
    reference = dataset_reference(part)
    assert reference.count == 6 and reference.is_mirrored and reference.labels.tolist() == [0, 1] * 3
    whole = open_dataset(folder, use_labels=True)
    assert torch.equal(reference.load(np.array([4, 1])), whole.batch([4, 1])[0])
    assert reference.fingerprint == dataset_reference(whole).fingerprint
    assert dataset_reference(open_dataset(folder)).labels is None


def test_fingerprint_knows_the_order(write_dataset, tiny_images):
    names = sorted(tiny_images)
    swapped = {**tiny_images, names[0]: tiny_images[names[1]], names[1]: tiny_images[names[0]]}
    a, b = open_dataset(write_dataset("a", tiny_images)), open_dataset(write_dataset("b", swapped))
    assert a.fingerprint() == b.fingerprint()
    assert dataset_reference(a).fingerprint != dataset_reference(b).fingerprint


def test_images_and_labels_are_those_of_the_sampler(G):
    sources = network_sources(G, 5, "cpu")
    items = np.array([6, 2])
    assert torch.equal(sources.generate(items), sampling.seeded_sampler(G, 5, "cpu")(items))
    assert sources.labels(items).tolist() == sampling.SampleStream(5, 8, 3).labels(items).tolist()


def test_settings_say_what_is_sampled(G):
    assert network_sources(G, 5, "cpu").settings == {"seed": 5, "truncation_psi": 1.0, "classes": "uniform"}
    truncation = Truncation(psi=0.5, cutoff=3, centroids=torch.zeros(7, 16))
    settings = network_sources(G, 5, "cpu", labels=np.array([0]), truncation=truncation).settings
    assert settings == {
        "seed": 5,
        "truncation_psi": 0.5,
        "truncation_cutoff": 3,
        "num_centroids": 7,
        "classes": "data set",
    }


def test_paths_know_no_truncation(G, monkeypatch, tmp_path, write_dataset, tiny_images):
    """They say so, beside metrics that do."""
    monkeypatch.setattr("metrics.evaluate.get_lpips", lambda device, path: SquaredDifference())
    truncation = Truncation(psi=0.5, cutoff=3)
    sources = network_sources(G, 5, "cpu", truncation=truncation)
    assert torch.equal(
        sources.paths(np.array([1]), 0.5)[0], network_sources(G, 5, "cpu").paths(np.array([1]), 0.5)[0]
    )
    reference = dataset_reference(open_dataset(write_dataset("images", tiny_images)))
    found = evaluate(["ppl2_wend", "eqt50k_int"], reference, sources, "cpu", tmp_path, Options(max_fakes=4))
    assert found["ppl2_wend"].settings["truncation_psi"] == 1
    assert "truncation_cutoff" not in found["ppl2_wend"].settings
    assert found["eqt50k_int"].settings["truncation_psi"] == 0.5
    assert found["eqt50k_int"].settings["truncation_cutoff"] == 3


def test_paths_start_and_go_on_within_one_class(G):
    first, second = network_sources(G, 0, "cpu").paths(np.array([3, 0]), 0.5)
    again, whole = network_sources(G, 0, "cpu").paths(np.array([0]), 1.0)
    assert first.shape == second.shape == (2, 3, 32, 32)
    torch.testing.assert_close(again[0], first[1], rtol=1e-3, atol=1e-3)
    assert (second[1] - again[0]).abs().max() > 0.01 and (whole[0] - second[1]).abs().max() > 0.01
    stream = sampling.SampleStream(2**31, 8, 3)
    ws = G.mapping(stream.latents([1]), stream.labels([0]))  # the end of path 0
    torch.testing.assert_close(whole, G.synthesis(ws), rtol=1e-3, atol=1e-3)


def test_moved_drawings_move_as_images_do_and_the_network_is_put_back(G):
    sources, items = network_sources(G, 0, "cpu"), np.arange(2)
    before = G.synthesis.input.transform.clone()
    still = sources.draw_moved(items, equivariance.motion_matrix(0, 0, 0))
    moved = sources.draw_moved(items, equivariance.motion_matrix(4 / 32, -3 / 32, 0))
    assert torch.equal(G.synthesis.input.transform, before)
    expected, others = translate_pixels(still, 4, -3), translate_pixels(still, -4, 3)
    error, other_error = (((moved - x.images) * x.mask).square().sum() for x in (expected, others))
    assert error < 0.1 * other_error
    torch.testing.assert_close(
        equivariance.motion_matrix(0.1, 0.2, 0.5), motion_matrix((0.1, 0.2), np.degrees(0.5))
    )


def test_path_length_and_equivariance_of_a_network(G, monkeypatch, tmp_path, write_dataset, tiny_images):
    monkeypatch.setattr("metrics.evaluate.get_lpips", lambda device, path: SquaredDifference())
    reference = dataset_reference(open_dataset(write_dataset("images", tiny_images)))
    wanted = ["ppl2_wend", "eqt50k_int", "eqt50k_frac", "eqr50k"]
    options = Options(max_fakes=8)
    found = evaluate(wanted, reference, network_sources(G, 0, "cpu"), "cpu", tmp_path, options)
    values = {name: found[name].results[name] for name in wanted}
    assert values["ppl2_wend"] > 0
    assert values["eqt50k_int"] > values["eqr50k"] > 0 and values["eqt50k_int"] > 15


def test_networks_without_styles_say_so():
    config = dcgan("nonsaturating").generator
    G = new_generator(config)
    sources = network_sources(G, 0, "cpu")
    assert sources.paths is None and sources.draw_moved is None
    assert sources.generate(range(2)).shape == (2, 3, config.img_resolution, config.img_resolution)
    with pytest.raises(UserError, match="truncation works on style vectors"):
        network_sources(G, 0, "cpu", truncation=Truncation(psi=0.5))
