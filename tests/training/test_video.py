# SPDX-License-Identifier: MIT
"""Keyframes and frames of videos: order, loop, grid, batches; recorded numbers are in test_sampling_golden.py."""

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training import video
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator
from training.sampling import Truncation, labels_for_seed, latents_for_seed


def small_network(c_dim=4, img_channels=3):
    mapping = MappingConfig(z_dim=8, w_dim=16, c_dim=c_dim, num_embeddings=4, embedding_dim=6)
    synthesis = SynthesisConfig(
        img_resolution=16, img_channels=img_channels, channel_max=12, num_layers=4, margin_size=2
    )
    return Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis)).eval().requires_grad_(False)


@pytest.fixture(name="G")
def conditional_network():
    return small_network()


def test_cells_take_seeds_in_turn():
    assert video.plan_keyframes(8, 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert video.plan_keyframes(3, 2, num_keyframes=4).tolist() == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert video.plan_keyframes(9, 2, num_keyframes=1).tolist() == [[0], [1]]


def test_shuffle():
    plain = video.plan_keyframes(5, 3, num_keyframes=5)
    shuffled = video.plan_keyframes(5, 3, num_keyframes=5, shuffle_seed=1)
    assert shuffled.shape == (3, 5) and shuffled.tolist() != plain.tolist()
    assert sorted(shuffled.ravel()) == sorted(plain.ravel())
    assert shuffled.tolist() == video.plan_keyframes(5, 3, num_keyframes=5, shuffle_seed=1).tolist()
    seeds = np.arange(15) % 5 + 100  # shuffling the seeds themselves is the same thing
    np.random.RandomState(1).shuffle(seeds)
    np.testing.assert_array_equal(shuffled.ravel() + 100, seeds)


def test_uneven_seeds_are_refused():
    with pytest.raises(UserError, match=r"9 seeds do not fill 2 grid cells evenly; give a multiple of 2"):
        video.plan_keyframes(9, 2)


def test_keyframes_are_the_seeds_style_vectors(G):
    seeds, classes = [3, 1, 4], [2, 0, 2]
    keyframes = video.keyframe_ws(G, seeds, classes, Truncation(0.5))
    random = video.keyframe_ws(G, seeds)
    for index, (seed, label) in enumerate(zip(seeds, classes, strict=True)):
        z = latents_for_seed(seed, 1, 8).float()
        torch.testing.assert_close(keyframes[index], G.mapping(z, torch.tensor([label]), 0.5)[0])
        torch.testing.assert_close(random[index], G.mapping(z, labels_for_seed(seed, 1, 4))[0])


def test_unconditional_keyframes():
    G = small_network(c_dim=0)
    expected = G.mapping(latents_for_seed(7, 1, 8).float())
    torch.testing.assert_close(video.keyframe_ws(G, [7]), expected)


def test_the_spline_goes_through_the_keyframes():
    keyframes = torch.randn(5, 3, 4)
    np.testing.assert_allclose(video.interpolate(keyframes)(np.arange(5)), keyframes, atol=1e-12)


@pytest.mark.parametrize("num_keyframes", [1, 2, 3, 8])
def test_the_first_frame_continues_the_last(num_keyframes):
    """At the seam, value, speed and acceleration are as continuous as at any other keyframe."""
    spline = video.interpolate(torch.randn(num_keyframes, 6))
    end, start = np.array([num_keyframes - 1e-9]), np.array([0.0])
    free_ends = 3 * 0.268 ** (
        2 * num_keyframes * (video.NUM_WRAPS - 1)
    )  # what is left of them, by knots away
    for derivative in range(3):
        difference = np.abs(spline(end, derivative) - spline(start, derivative)).max()
        assert difference <= 20 * free_ends + 1e-6
    assert np.abs(spline(end) - spline(start)).max() < 0.01


def test_one_keyframe_stands_still(G):
    frames = list(video.render_frames(G, torch.randn(1, 1, G.num_ws, 16), 3, columns=1, batch=8))
    assert len(frames) == 3
    assert all(np.abs(frame.astype(int) - frames[0]).max() <= 1 for frame in frames)


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_frames_are_grids_of_cells(G, batch):
    """Each cell as if it were alone, whatever the batch."""
    keyframes = torch.randn(4, 3, G.num_ws, 16)
    frames = list(video.render_frames(G, keyframes, 2, columns=2, batch=batch))
    assert len(frames) == 6 and all(f.shape == (32, 32, 3) and f.dtype == np.uint8 for f in frames)
    for cell in range(4):
        row, column = divmod(cell, 2)
        alone = video.render_frames(G, keyframes[cell : cell + 1], 2, columns=1, batch=1)
        for frame, single in zip(frames, alone, strict=True):
            part = frame[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert np.abs(part.astype(int) - single).max() <= 1
    assert np.abs(frames[0].astype(int) - frames[2]).max() > 20


def test_no_more_than_a_batch_is_drawn_at_a_time(G, monkeypatch):
    sizes = []
    draw = video.draw_images
    monkeypatch.setattr(video, "draw_images", lambda G, ws: sizes.append(len(ws)) or draw(G, ws))
    frames = video.render_frames(G, torch.randn(3, 2, G.num_ws, 16), 4, columns=3, batch=2)
    next(frames)
    assert sizes == [2, 1]  # nothing of the next frame yet
    assert sum(1 for _ in frames) == 7 and max(sizes) == 2 and sum(sizes) == 24


def test_grey_frames_have_three_channels():
    G = small_network(img_channels=1)
    frame = next(video.render_frames(G, torch.randn(1, 1, G.num_ws, 16), 1, columns=1, batch=1))
    assert frame.shape == (16, 16, 3) and frame.flags.c_contiguous
    np.testing.assert_array_equal(frame[..., 0], frame[..., 2])
