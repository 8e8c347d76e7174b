# SPDX-License-Identifier: MIT
"""The sampling tools against recorded outputs of the official ones: latents, w, images, rounding, sheets, videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gen_class_samplesheet
from training import sampling, video
from training.network_io import load_network

DATA = Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "g_inference.npz")
META = json.loads(str(GOLDEN["meta_json"]))
SEEDS, LABEL, PSI = META["seeds"], META["class_idx"], META["psi"]
UNIMODAL = sampling.Truncation(PSI)
MULTIMODAL = sampling.Truncation(PSI, centroids=torch.from_numpy(GOLDEN["centroids"]))

each_seed = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(scope="module", name="G")
def recorded_network():
    return load_network(DATA / META["network"])


def assert_same_pixels(images, expected):
    """uint8 (N, C, H, W) against (N, H, W, C): at most 0.5 % of the entries off by one, the rest equal."""
    difference = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.005


def assert_close(actual, expected, limit):
    """Largest difference, relative to the largest number."""
    expected = np.asarray(expected, dtype=np.float64)
    assert tuple(actual.shape) == expected.shape
    error = np.abs(np.asarray(actual, dtype=np.float64) - expected).max() / np.abs(expected).max()
    assert error <= limit, error


def draw(G, seed, labels, truncation, batch=1):
    """ws and uint8 images of one seed."""
    ws = sampling.style_vectors(G, sampling.latents_for_seed(seed, batch, G.z_dim), labels, truncation)
    return ws, sampling.to_uint8(sampling.draw_images(G, ws))


@each_seed
def test_latents_of_a_seed(seed):
    z = sampling.latents_for_seed(seed, 1, 64)
    assert z.dtype == torch.float64
    np.testing.assert_array_equal(z, GOLDEN[f"seed{seed}/z"])
    np.testing.assert_array_equal(sampling.latents_for_seed(seed, 5, 64)[:1], z)


@each_seed
def test_random_class_of_a_seed(seed):
    np.testing.assert_array_equal(sampling.labels_for_seed(seed, 1, 10), GOLDEN[f"seed{seed}/random_class"])


@each_seed
def test_truncation_to_the_mean_of_a_class(G, seed):
    ws, images = draw(G, seed, torch.tensor([LABEL]), UNIMODAL)
    assert_close(ws, GOLDEN[f"seed{seed}/w_unimodal"], 3e-6)
    assert_same_pixels(images, GOLDEN[f"seed{seed}/u8_unimodal"])
    tool = sampling.images_for_seed(G, seed, 1, [LABEL], UNIMODAL)
    assert tool.shape == (1, 1, 3, 16, 16) and tool.dtype == torch.uint8
    assert torch.equal(tool[0], images)


@each_seed
def test_truncation_of_a_random_class(G, seed):
    ws, _ = draw(G, seed, sampling.labels_for_seed(seed, 1, 10), UNIMODAL)
    assert_close(ws, GOLDEN[f"seed{seed}/w_noclass"], 3e-6)
    tool = sampling.images_for_seed(G, seed, 1, None, UNIMODAL)
    assert_same_pixels(tool[0], GOLDEN[f"seed{seed}/u8_noclass"])


@each_seed
def test_truncation_to_the_nearest_centroid(G, seed):
    ws, images = draw(G, seed, torch.tensor([LABEL]), MULTIMODAL)
    assert_close(ws, GOLDEN[f"seed{seed}/w_multimodal"], 3e-6)
    assert_close(sampling.draw_images(G, ws), GOLDEN[f"seed{seed}/img_float_multimodal"], 1e-4)
    assert_same_pixels(images, GOLDEN[f"seed{seed}/u8_multimodal"])


def test_centroids_are_chosen_per_sample(G):
    ws, images = draw(G, SEEDS[1], torch.full((5,), LABEL), MULTIMODAL, batch=5)
    assert_close(ws, GOLDEN["batch5/w"], 3e-6)
    assert_same_pixels(images, GOLDEN["batch5/u8"])
    assert_same_pixels(sampling.create_image_grid(images)[None], GOLDEN["batch5/grid"][None])


@each_seed
def test_rounding_truncates(seed):
    images = torch.from_numpy(GOLDEN[f"seed{seed}/img_float_multimodal"])
    expected = GOLDEN[f"seed{seed}/u8_multimodal"]
    np.testing.assert_array_equal(sampling.to_uint8(images).permute(0, 2, 3, 1), expected)


def test_grid_of_a_batch():
    batch = torch.from_numpy(GOLDEN["batch5/u8"]).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(sampling.create_image_grid(batch).permute(1, 2, 0), GOLDEN["batch5/grid"])


def test_motion(G):
    motion = sampling.motion_matrix((0.1, -0.2), 30)
    np.testing.assert_allclose(motion, GOLDEN["transform/forward"], rtol=0, atol=1e-15)
    still = G.synthesis.input.transform.clone()
    try:
        sampling.move_images_(G, motion)
        assert_close(G.synthesis.input.transform, GOLDEN["transform/inverse"], 1e-7)
        ws, images = draw(G, SEEDS[0], torch.tensor([LABEL]), sampling.NO_TRUNCATION)
        assert_close(sampling.draw_images(G, ws), GOLDEN["transform/img"], 1e-4)
        assert_same_pixels(images, GOLDEN["transform/u8"])
    finally:
        G.synthesis.input.transform.copy_(still)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_sheet_of_classes(G, batch):
    images = gen_class_samplesheet.sheet_images(G, 42, 2, [0, 2, 9], UNIMODAL, batch)
    columns = gen_class_samplesheet.sheet_columns(5, 2, len(images))  # 5 is reduced to 4
    sheet = sampling.create_image_grid(images, columns)
    assert_same_pixels(sheet[None], GOLDEN["sheet/u8"][None])


def test_video(G):
    keyframes = video.keyframe_ws(G, SEEDS, [LABEL] * 3, UNIMODAL)
    assert_close(keyframes, GOLDEN["video/keyframes"], 3e-6)
    ws = torch.from_numpy(video.interpolate(keyframes)(GOLDEN["video/t"])).float()
    assert_close(ws, GOLDEN["video/w"], 3e-6)
    frames = sampling.to_uint8_metrics(sampling.draw_images(G, ws))
    assert_same_pixels(sampling.create_image_grid(frames, columns=3)[None], GOLDEN["video/u8"][None])


def test_recorded_frames_are_among_the_rendered_ones(G):
    keyframes = torch.from_numpy(GOLDEN["video/keyframes"])[None]  # one cell
    w_frames = 120
    times = [time for time in GOLDEN["video/t"] if round(time * w_frames) <= 80]
    frames = []
    for index, frame in enumerate(video.render_frames(G, keyframes, w_frames, columns=1, batch=8)):
        if index in [round(time * w_frames) for time in times]:
            frames.append(frame)
        if index == 80:
            break
    recorded = GOLDEN["video/u8"].reshape(2, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4).reshape(6, 16, 16, 3)
    assert len(frames) == len(times) >= 3
    actual = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    assert_same_pixels(actual, recorded[: len(times)])
