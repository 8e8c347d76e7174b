# SPDX-License-Identifier: MIT
"""LPIPS against its authors' package, with their weights on a random VGG16."""

from __future__ import annotations

import lpips
import pytest
import torch
from torch import Tensor

from metrics.lpips import Lpips, find_packaged_weights, read_lpips_weights
from metrics.vgg16 import VGG16Maps
from metrics.weight_layers import empty_network, group_layers, load_layers_
from torch_utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # how the package calls it


@pytest.fixture(scope="module")
def oracle() -> lpips.LPIPS:
    with torch.device("meta"):  # VGG16's 138 million initial weights take seconds
        oracle = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    oracle = oracle.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in oracle.net.state_dict().items():
            std = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1
            assert name.endswith(("weight", "bias"))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    for i, weights in enumerate(read_lpips_weights(find_packaged_weights())):
        oracle.lins[i].model[1].weight.data.copy_(weights.view(1, -1, 1, 1))
    oracle.scaling_layer = lpips.ScalingLayer()  # its buffers were emptied too
    return oracle


@pytest.fixture(scope="module")
def ours(oracle) -> Lpips:
    maps = empty_network(VGG16Maps)
    load_layers_(maps, group_layers(oracle.net.state_dict(), "oracle"), "oracle")
    return Lpips(maps, read_lpips_weights(find_packaged_weights()))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    a = torch.rand(3, 3, 34, 48) * 255
    return a, (a + torch.randn_like(a) * 20).clamp(0, 255)


def test_distance_equals_the_authors(oracle, ours, pair):
    a, b = pair
    with torch.no_grad():
        expected = oracle(a / 127.5 - 1, b / 127.5 - 1).flatten()
    assert float(expected.min()) > 1e-3
    torch.testing.assert_close(ours.distance(a, b), expected, rtol=1e-4, atol=1e-7)


def test_squared_differences_of_features_sum_to_the_distance(ours, pair):
    a, b = pair
    squares = (ours(a) - ours(b)).square().sum(dim=1)
    torch.testing.assert_close(squares, ours.distance(a, b), rtol=1e-4, atol=1e-7)
    assert torch.equal(ours.distance(a, a), torch.zeros(3))


def test_integers_count_as_floats(ours):
    a, b = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(ours.distance(a, b), ours.distance(a.float(), b.float()))


def test_weights_are_part_of_the_fingerprint(ours):
    other = Lpips(ours._maps, [torch.ones(width) for width in (64, 128, 256, 512, 512)])
    assert other.fingerprint != ours.fingerprint


def test_wrong_images_are_refused(ours, pair):
    with pytest.raises(ValueError, match="cannot be compared"):
        ours.distance(pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="sides >= 16"):
        ours(torch.zeros(1, 3, 8, 16))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [((64, 128), r"lengths \[64, 128\]"), ((64, 128, 256, 512, -512), "negative weights")],
)
def test_other_weights_are_refused(vectors, message, tmp_path):
    weights = {
        f"lin{i}": torch.full((1, abs(n), 1, 1), 1.0 if n > 0 else -1.0) for i, n in enumerate(vectors)
    }
    torch.save(weights, tmp_path / "lpips.pth")
    with pytest.raises(UserError, match=message):
        read_lpips_weights(tmp_path / "lpips.pth")
