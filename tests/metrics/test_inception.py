# SPDX-License-Identifier: MIT
"""Inception against torch-fidelity's with the same weights, sFID's maps against a naive one, and all file formats."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from metrics.inception import NUM_SFID, torch_layer_names
from metrics.inception_detectors import (
    InceptionDetector,
    RandomInceptionDetector,
    read_inception,
    read_random_inception,
)
from metrics.weight_files import read_tensors
from metrics.weight_layers import hash_weights
from torch_utils.errors import UserError

TAPS = ["64", "192", "768", "2048", "logits_unbiased", "logits"]


@pytest.fixture(scope="module")
def oracle(inception_file) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3("oracle", TAPS, feature_extractor_weights_path=str(inception_file))


@pytest.fixture(scope="module")
def detector(inception_file) -> InceptionDetector:
    return InceptionDetector(read_inception(inception_file))


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 52), dtype=torch.uint8)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_equals_torch_fidelity_at_every_tap(oracle, detector, images):
    expected = dict(zip(TAPS, oracle(images), strict=True))
    trunk, seen = detector._network.trunk, {}
    places = {"64": trunk.to_mixed_6[3], "192": trunk.to_mixed_6[6], "768": trunk.to_mixed_10[0]}
    hooks = [
        module.register_forward_hook(lambda m, inputs, x, tap=tap: seen.update({tap: x.mean(dim=(2, 3))}))
        for tap, module in places.items()
    ]
    found = detector.outputs(images)
    for hook in hooks:
        hook.remove()
    for tap in places:
        assert_near(seen[tap], expected[tap])
    assert found.features.shape == (2, 2048) and found.features.dtype == torch.float32
    assert_near(found.features, expected["2048"])
    assert_near(found.probabilities, expected["logits_unbiased"].softmax(dim=1))
    assert_near(detector._network.output(found.features), expected["logits"])
    assert float((expected["2048"][0] - expected["2048"][1]).abs().max()) > 0.1  # images do matter


def test_sfid_is_about_the_first_maps_of_mixed_6(oracle, detector, inception_tensors, images):
    seen = {}
    hook = oracle.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    oracle(images)
    hook.remove()
    unit = {
        k.removeprefix("Mixed_6d.branch1x1."): v for k, v in inception_tensors.items() if "6d.branch1x1" in k
    }
    x = F.conv2d(seen["x"], unit["conv.weight"])
    x = (x - unit["bn.running_mean"][:, None, None]) / (unit["bn.running_var"][:, None, None] + 0.001).sqrt()
    x = (x * unit["bn.weight"][:, None, None] + unit["bn.bias"][:, None, None]).relu()
    expected = torch.stack([x[:, c, i, j] for c in range(7) for i in range(17) for j in range(17)], dim=1)
    found = detector.outputs(images).sfid
    assert found.shape == (2, NUM_SFID) == (2, 2023)
    assert_near(found, expected)


def test_features_do_not_depend_on_the_batch(detector, monkeypatch):
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    whole = detector.outputs(images)
    monkeypatch.setattr(detector, "batch_size", 2)
    for found, expected in zip(detector.outputs(images), whole, strict=True):
        assert_near(found, expected)


def test_grey_images_count_as_three_equal_channels(detector, images):
    grey = images[:1, :1]
    assert_near(detector(grey), detector(grey.repeat(1, 3, 1, 1)))


def test_no_images_have_no_features(detector, images):
    assert [x.shape for x in detector.outputs(images[:0])] == [(0, 2048), (0, 2023), (0, 1008)]


def test_the_clean_resize_is_another_detector(detector, inception_file, images):
    clean = InceptionDetector(read_inception(inception_file), resize="clean")
    assert clean.name == "inception_clean" != detector.name
    assert clean.fingerprint != detector.fingerprint
    assert float((clean(images) - detector(images)).abs().max()) > 1e-3


def test_the_random_network_needs_no_last_layer(detector, inception_tensors, tmp_path, images):
    trunk = {name: tensor for name, tensor in inception_tensors.items() if not name.startswith("fc.")}
    torch.save(trunk, tmp_path / "trunk.pth")
    found = RandomInceptionDetector(read_random_inception(tmp_path / "trunk.pth"))
    assert found.name == "inception_random" and found.fingerprint != detector.fingerprint
    assert_near(found(images), detector(images))
    with pytest.raises(UserError, match="has 0 linear layers, the network 1"):
        read_inception(tmp_path / "trunk.pth")


def test_wrong_images_are_refused(detector):
    with pytest.raises(ValueError, match="expected uint8"):
        detector(torch.zeros(1, 3, 8, 8))


# Formats.


class Unit(nn.Module):
    """A convolution as in the TensorFlow graph: a weight, and a BatchNorm without a gain."""

    def __init__(self, weight: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("beta", beta)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight)


class Graph(nn.Module):
    """The weights of Inception in another hierarchy, as a TorchScript file has them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name in torch_layer_names():
            unit = name.removesuffix("conv")
            beta, mean, var = (tensors[f"{unit}bn.{key}"] for key in ("bias", "running_mean", "running_var"))
            self.layers[name.replace(".", "_")] = Unit(tensors[f"{unit}conv.weight"], beta, mean, var)
        self.output = nn.Linear(2048, 1008)
        self.output.weight, self.output.bias = (
            nn.Parameter(tensors["fc.weight"]),
            nn.Parameter(tensors["fc.bias"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x)


@pytest.fixture(scope="module")
def without_gain(inception_tensors) -> dict[str, Tensor]:
    """BatchNorms' gains are 1 in the published weights."""
    return {k: torch.ones_like(v) if k.endswith("bn.weight") else v for k, v in inception_tensors.items()}


@pytest.fixture(scope="module")
def script_bytes(without_gain) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Graph(without_gain)), file)
    return file.getvalue()


class Wrapper:
    """Holds TorchScript's bytes between other things."""

    def __init__(self, content: bytes) -> None:
        self.before, self.content, self.after = "x" * 1000, content, list(range(5000))


@pytest.fixture(scope="module")
def expected_hash(without_gain, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "expected.pth"
    torch.save(without_gain, path)
    return hash_weights(read_inception(path), "")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["script", "script in a pickle", "file in another order"])
def test_formats_give_the_same_network(kind, without_gain, script_bytes, expected_hash, tmp_path):
    path = tmp_path / "found.pkl"
    if kind == "script":
        path.write_bytes(script_bytes)
    elif kind == "script in a pickle":
        path.write_bytes(pickle.dumps(Wrapper(script_bytes), protocol=4))
    else:
        torch.save(reordered(without_gain), path)
    assert hash_weights(read_inception(path), "") == expected_hash


def reordered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers in the order of their names."""
    units = sorted({name.rsplit(".", 2)[0] for name in tensors if ".conv." in name})
    keys = [key for unit in units for key in tensors if key.startswith(f"{unit}.")]
    return {key: tensors[key] for key in [*keys, "fc.weight", "fc.bias"]}


def test_another_network_is_refused_by_its_first_layer(inception_tensors, tmp_path):
    path: Path = tmp_path / "other.pth"
    torch.save({**inception_tensors, "Mixed_5b.branch5x5_2.conv.weight": torch.zeros(64, 48, 3, 3)}, path)
    with pytest.raises(UserError) as caught:
        read_inception(path)
    message = str(caught.value)
    assert "convolution 8, Mixed_5b.branch5x5_2.conv, has shapes [64, 48, 3, 3] + [64]" in message
    assert "[64, 48, 5, 5] + [64]" in message and "\n" not in message


def test_the_reader_keeps_names(inception_file, inception_tensors):
    assert list(read_tensors(inception_file)) == list(inception_tensors)
