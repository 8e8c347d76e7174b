# SPDX-License-Identifier: MIT
"""Seeds, classes, rounding and grids: against recorded numbers of the official tools, and by their rules."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training import sampling
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_inference.npz")
META = json.loads(str(GOLDEN["meta_json"]))
SALT = "pub_pk_xl/stem/Gema/"  # of the recorded network's weights, which are drawn from their names
SEEDS = META["seeds"]


@pytest.fixture(scope="module", name="G")
def recorded_network():
    """The network of the recorded images, with its weights."""
    mapping = MappingConfig(z_dim=64, w_dim=32, c_dim=10, num_embeddings=16, embedding_dim=24)
    synthesis = SynthesisConfig(img_resolution=16, channel_base=128, channel_max=24, num_layers=6)
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis)).eval().requires_grad_(False)
    for name, tensor in G.state_dict().items():
        if name.endswith(("transform", "_filter", "magnitude_ema")):
            continue
        seed = int.from_bytes(hashlib.sha256((SALT + name).encode()).digest()[:8], "little")
        numbers = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(tensor.shape))
        scale, offset = scale_and_offset(name)
        tensor.copy_(torch.from_numpy(numbers * scale + offset))
    return G


def scale_and_offset(name):
    if name == "synthesis.input.affine.bias":
        return 0.1, np.array([1.0, 0, 0, 0])
    rules = {
        "mapping.fc": (100, 0) if name.endswith("weight") else (10, 0),
        "mapping.w_avg": (0.5, 0),
        "synthesis.input.affine.weight": (0.3, 0),
        "synthesis.input.phases": (0.3, 0),
    }
    for prefix, rule in rules.items():
        if name.startswith(prefix):
            return rule
    if name.endswith("affine.bias"):
        return 0.1, 1
    return (0.1, 0) if name.endswith("bias") else (1, 0)


def assert_same_pixels(images, expected):
    """uint8 (N, C, H, W) against (N, H, W, C): at most 0.5 % of the entries off by one, the rest equal."""
    difference = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.005


@pytest.mark.parametrize("seed", SEEDS)
def test_latents_of_a_seed(seed):
    z = sampling.latents_for_seed(seed, 1, 64)
    assert z.dtype == torch.float64
    np.testing.assert_array_equal(z, GOLDEN[f"seed{seed}/z"])
    np.testing.assert_array_equal(sampling.latents_for_seed(seed, 5, 64)[:1], z)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_class_of_a_seed(seed):
    np.testing.assert_array_equal(sampling.labels_for_seed(seed, 1, 10), GOLDEN[f"seed{seed}/random_class"])


@pytest.mark.parametrize("seed", SEEDS)
def test_images_of_a_given_class(G, seed):
    images = sampling.images_for_seed(G, seed, 1, [META["class_idx"]], META["psi"])
    assert images.shape == (1, 1, 3, 16, 16) and images.dtype == torch.uint8
    assert_same_pixels(images[0], GOLDEN[f"seed{seed}/u8_unimodal"])


@pytest.mark.parametrize("seed", SEEDS)
def test_images_of_a_random_class(G, seed):
    images = sampling.images_for_seed(G, seed, 1, None, META["psi"])
    assert_same_pixels(images[0], GOLDEN[f"seed{seed}/u8_noclass"])


def test_every_class_gets_the_same_latents(G):
    images = sampling.images_for_seed(G, 42, 2, [0, 2, 9], META["psi"])
    sheet = sampling.create_image_grid(images.flatten(0, 1), columns=4)
    assert_same_pixels(sheet[None], GOLDEN["sheet/u8"][None])


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_truncates(seed):
    images = torch.from_numpy(GOLDEN[f"seed{seed}/img_float_multimodal"])
    expected = GOLDEN[f"seed{seed}/u8_multimodal"]
    np.testing.assert_array_equal(sampling.to_uint8(images).permute(0, 2, 3, 1), expected)


def test_roundings_differ_by_half_a_level():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert sampling.to_uint8(x).tolist() == [0, 0, 127, 254, 255, 255]
    assert sampling.to_uint8_metrics(x).tolist() == [0, 0, 128, 255, 255, 255]


def test_grid_of_a_batch():
    batch = torch.from_numpy(GOLDEN["batch5/u8"]).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(sampling.create_image_grid(batch).permute(1, 2, 0), GOLDEN["batch5/grid"])


def test_sampler_continues_one_stream(G):
    whole = sampling.seeded_sampler(G, seed=3, device="cpu")(9)
    sample = sampling.seeded_sampler(G, seed=3, device="cpu")
    parts = torch.cat([sample(4), sample(5)])
    assert whole.dtype == torch.uint8 and whole.shape == (9, 3, 16, 16)
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert not torch.equal(whole[:4], whole[4:8])
    assert not torch.equal(sampling.seeded_sampler(G, seed=4, device="cpu")(9), whole)


@pytest.mark.parametrize(
    ("text", "numbers"), [("7", [7]), ("1,2,5-7", [1, 2, 5, 6, 7]), (" 3 , 0 - 1 ", [3, 0, 1]), ("4-4", [4])]
)
def test_seed_lists(text, numbers):
    assert sampling.parse_seeds(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1-", "1.5", "5-1", "4294967296"])
def test_bad_seed_lists_are_refused(text):
    with pytest.raises(UserError):
        sampling.parse_seeds(text)


def test_class_lists():
    assert sampling.parse_classes("0,3,5-7", 10) == [0, 3, 5, 6, 7]
    with pytest.raises(UserError, match="class 10 does not exist: the network has classes 0 to 9"):
        sampling.parse_classes("3,10", 10)
    with pytest.raises(UserError, match="unconditional"):
        sampling.parse_classes("0", 0)


def test_devices():
    assert sampling.pick_device("cpu") == torch.device("cpu")
    assert sampling.pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device tpu is unknown"):
        sampling.pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device():
    with pytest.raises(UserError, match="--device cuda is not available"):
        sampling.pick_device("cuda")
