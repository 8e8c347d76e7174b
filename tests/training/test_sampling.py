# SPDX-License-Identifier: MIT
"""Seeds, truncation, rounding and motion by their rules; recorded numbers are in test_sampling_golden.py."""

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training import sampling
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator


@pytest.fixture(name="G")
def small_network():
    mapping = MappingConfig(z_dim=8, w_dim=16, c_dim=4, num_embeddings=4, embedding_dim=6)
    synthesis = SynthesisConfig(img_resolution=16, channel_max=12, num_layers=4, margin_size=2)
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis)).eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    return G


def assert_nearly_equal(images, expected):
    assert images.shape == expected.shape
    assert (images.int() - expected.int()).abs().max() <= 1


def test_images_do_not_depend_on_the_batch(G):
    one = sampling.images_for_seed(G, 5, 1, [0, 3])
    six = sampling.images_for_seed(G, 5, 6, [0, 3])
    assert six.shape == (2, 6, 3, 16, 16)
    assert_nearly_equal(six[:, :1], one)
    assert (six[:, 1].int() - six[:, 0].int()).abs().max() > 20


def test_classes_share_latents(G):
    both = sampling.images_for_seed(G, 5, 2, [1, 2])
    assert_nearly_equal(both[1:], sampling.images_for_seed(G, 5, 2, [2]))


def test_random_classes_are_those_of_the_seed(G):
    random = sampling.images_for_seed(G, 5, 3)
    labels = sampling.labels_for_seed(5, 3, 4)
    for index, label in enumerate(labels.tolist()):
        assert_nearly_equal(random[0, index], sampling.images_for_seed(G, 5, 3, [label])[0, index])


def test_no_psi_is_the_mean_of_the_class(G):
    z, labels = torch.randn(3, 8), torch.tensor([2, 0, 2])
    ws = sampling.style_vectors(G, z, labels, sampling.Truncation(psi=0))
    torch.testing.assert_close(ws, G.mapping.w_avg[labels].unsqueeze(1).expand(-1, G.num_ws, -1))


def test_no_psi_is_the_nearest_centroid(G):
    z, labels = torch.randn(5, 8), torch.tensor([2, 0, 2, 1, 3])
    w = sampling.style_vectors(G, z, labels)[:, 0]
    centroids = torch.stack([w[3] + 0.01, w[0] - 0.01, w.mean(dim=0) + 100])
    ws = sampling.style_vectors(G, z, labels, sampling.Truncation(psi=0, centroids=centroids))
    nearest = (w.unsqueeze(1) - centroids).square().sum(dim=2).argmin(dim=1)
    assert nearest[3] == 0 and nearest[0] == 1
    torch.testing.assert_close(ws, centroids[nearest].unsqueeze(1).expand(-1, G.num_ws, -1))


def test_cutoff_means_the_same_with_centroids(G):
    z, labels = torch.randn(3, 8), torch.tensor([2, 0, 1])
    mean = sampling.style_vectors(G, z, labels, sampling.Truncation(psi=0.3, cutoff=2))
    free = sampling.style_vectors(G, z, labels)
    assert torch.equal(mean[:, 2:], free[:, 2:]) and not torch.allclose(mean[:, :2], free[:, :2])
    for label in (0, 1, 2):  # one centroid, the mean of the class
        truncation = sampling.Truncation(psi=0.3, cutoff=2, centroids=G.mapping.w_avg[label : label + 1])
        ws = sampling.style_vectors(G, z[:1], torch.tensor([label]), truncation)
        expected = sampling.style_vectors(
            G, z[:1], torch.tensor([label]), sampling.Truncation(psi=0.3, cutoff=2)
        )
        torch.testing.assert_close(ws, expected)
    past_the_end = sampling.Truncation(psi=0.3, cutoff=99, centroids=torch.zeros(1, 16))
    torch.testing.assert_close(sampling.style_vectors(G, z, labels, past_the_end), free * 0.3)


def test_roundings_differ_by_half_a_level():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert sampling.to_uint8(x).tolist() == [0, 0, 127, 254, 255, 255]
    assert sampling.to_uint8_metrics(x).tolist() == [0, 0, 128, 255, 255, 255]


def test_rotations_add_up():
    quarter, third = sampling.motion_matrix((0, 0), 90), sampling.motion_matrix((0, 0), 30)
    torch.testing.assert_close(third @ third @ third, quarter)
    assert sampling.motion_matrix((0, 0), 0).equal(torch.eye(3, dtype=torch.float64))


def test_moving_right_moves_right(G):
    """By a quarter of the image: the features that were in the middle of the map are then right of it."""
    ws = sampling.style_vectors(G, torch.randn(2, 8), torch.tensor([0, 1]))
    still = G.synthesis.input(ws[:, 0])
    sampling.move_images_(G, sampling.motion_matrix((0.25, 0), 0))
    moved = G.synthesis.input(ws[:, 0])
    shift = round(0.25 * G.synthesis.input.sampling_rate)
    assert shift >= 1
    torch.testing.assert_close(moved[..., shift:], still[..., :-shift], rtol=1e-4, atol=1e-4)
    sampling.move_images_(G, sampling.motion_matrix((0, 0), 0))
    torch.testing.assert_close(G.synthesis.input(ws[:, 0]), still)


def test_image_of_a_number_is_always_the_same(G):
    whole = sampling.seeded_sampler(G, seed=3, device="cpu")(range(9))
    sample = sampling.seeded_sampler(G, seed=3, device="cpu")
    parts = torch.cat([sample([7, 5, 8]), sample(np.arange(5))])
    assert whole.dtype == torch.uint8 and whole.shape == (9, 3, 16, 16)
    assert (whole[[7, 5, 8, 0, 1, 2, 3, 4]].int() - parts.int()).abs().max() <= 1
    assert not torch.equal(whole[:4], whole[4:8])
    assert not torch.equal(sampling.seeded_sampler(G, seed=4, device="cpu")(range(9)), whole)


def test_passes_of_the_sampler_are_bounded(G, monkeypatch):
    """Large images are made a few at a time, as 64 of 1024 x 1024 do not fit into memory."""
    whole, sizes = sampling.seeded_sampler(G, 3, "cpu")(range(7)), []
    monkeypatch.setattr(sampling, "PIXELS_PER_PASS", 3 * 16**2 + 1)
    G.synthesis.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert_nearly_equal(sampling.seeded_sampler(G, 3, "cpu")(range(7)), whole)
    assert sizes == [3, 3, 1]
    monkeypatch.setattr(sampling, "PIXELS_PER_PASS", 1)
    assert_nearly_equal(sampling.seeded_sampler(G, 3, "cpu")([4]), whole[4:5])


def test_sampler_with_truncation_and_labels(G):
    class_ids = np.array([1, 1, 1])
    whole = sampling.Truncation(psi=0.0)
    images = sampling.seeded_sampler(G, 3, "cpu", labels=class_ids, truncation=whole)(range(3))
    expected = sampling.to_uint8_metrics(G.synthesis(G.mapping.w_avg[1].expand(3, G.num_ws, -1)))
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 1, 2, 5), (3000,)])
def test_stream_is_that_of_the_legacy_generator(sizes):
    """The latents and classes that values of earlier versions were measured with."""
    stream, start, z, labels = sampling.SampleStream(3, 8, 10), 0, [], []
    for size in sizes:
        z.append(stream.latents(range(start, start + size)))
        labels.append(stream.labels(range(start, start + size)))
        start += size
    latents, classes = np.random.RandomState(3), np.random.RandomState(3)
    assert torch.equal(torch.cat(z), torch.from_numpy(latents.randn(start, 8)).float())
    assert torch.equal(torch.cat(labels), torch.from_numpy(classes.randint(0, 10, size=start)))
    assert sampling.SampleStream(3, 8, 0).labels([2]) is None


def test_classes_of_a_data_set_come_in_its_proportions():
    from_data = sampling.SampleStream(0, 4, 3, np.array([2] * 9 + [0])).labels(range(4000))
    counts = torch.bincount(from_data, minlength=3)
    assert counts[1] == 0 and 0.08 < counts[0] / 4000 < 0.12
    uniform = torch.bincount(sampling.SampleStream(0, 4, 3).labels(range(4000)))
    assert (uniform / 4000 - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize(
    ("text", "numbers"), [("7", [7]), ("1,2,5-7", [1, 2, 5, 6, 7]), (" 3 , 0 - 1 ", [3, 0, 1]), ("4-4", [4])]
)
def test_seed_lists(text, numbers):
    assert sampling.parse_seeds(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1-", "1.5", "5-1", "4294967296", "0-4294967295"])
def test_bad_seed_lists_are_refused(text):
    with pytest.raises(UserError):
        sampling.parse_seeds(text)
