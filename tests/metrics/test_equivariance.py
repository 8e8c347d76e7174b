# SPDX-License-Identifier: MIT
"""EQ-T and EQ-R of drawings that obey, that do not, and that a formula is worked out for by hand."""

import math

import numpy as np
import pytest
import torch

from metrics.equivariance import (
    IMAGES_PER_MOTION,
    MAX_TRANSLATION,
    as_measure,
    compare,
    masked_error,
    motion_matrix,
    num_motions,
    psnr,
)
from metrics.image_motion import Moved

SIZE = 48


def draw(items, motion, obedience=1.0):
    """Low waves that depend on the item, drawn at the places that the motion brings to each pixel."""
    ticks = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE - 0.5
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    still = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    x, y, _ = torch.lerp(still, still @ motion.inverse().T, obedience).unbind(-1)
    images = [torch.sin(12 * x + 0.3 * item) + torch.cos(15 * y - 4 * x + item) for item in items.tolist()]
    return torch.stack(images)[:, None].expand(-1, 3, -1, -1).float() / 2


@pytest.mark.parametrize("kind", ["translation_int", "translation_frac", "rotation"])
def test_obedient_drawings_score_high_and_others_low(kind):
    def score(draw_moved):
        measure = as_measure((kind,), draw_moved, num_images=12, seed=0)
        return psnr(measure(np.arange(num_motions(12))))

    good = score(draw)
    assert good > (90 if kind == "translation_int" else 35)
    for obedience in (0.9, 0.0, -1.0):  # -1: every motion goes the wrong way
        assert score(lambda items, motion, o=obedience: draw(items, motion, o)) < good - 15


def test_psnr_by_hand():
    reference = Moved(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
    mask = torch.tensor([[[[1.0, 1], [0, 0]]], [[[1, 0], [0, 0]]]])
    images = Moved(torch.full((2, 1, 2, 2), 0.2), mask)
    errors = masked_error(reference, images)
    torch.testing.assert_close(errors, torch.tensor([[0.08, 2], [0.04, 1]], dtype=torch.float64))
    assert psnr(errors) == pytest.approx(20 * math.log10(2) - 10 * math.log10(0.04), abs=1e-6)
    assert psnr(torch.tensor([[0.0, 3.0]])) == math.inf
    with pytest.raises(ValueError, match="no pixel"):
        psnr(torch.tensor([[0.0, 0.0]]))


def test_draws_reach_the_largest_motions():
    seen = []

    def watch(items, motion):
        seen.append(motion)
        return draw(items, motion)

    items = np.arange(2)
    for kind in ("translation_int", "translation_frac"):
        compare(kind, items, draw(items, torch.eye(3).double()), watch, np.array([-1.0, 0.5]))
    whole, fraction = seen
    assert fraction[:2, 2].tolist() == [-MAX_TRANSLATION, MAX_TRANSLATION / 2]
    assert (whole[:2, 2] * SIZE).tolist() == pytest.approx([-6, 3])
    torch.testing.assert_close(
        motion_matrix(0, 0, math.pi / 2)[:2, :2], torch.tensor([[0.0, 1], [-1, 0]]).double()
    )


def test_motions_depend_on_their_number_and_the_seed_alone():
    def rows(numbers, seed=0, kinds=("rotation", "translation_int")):
        return as_measure(kinds, lambda i, m: draw(i, m, 0.5), num_images=18, seed=seed)(np.array(numbers))

    whole = rows(range(num_motions(18)))
    assert num_motions(18) == 5 and IMAGES_PER_MOTION == 4 and whole.shape == (5, 4)
    torch.testing.assert_close(rows([3, 1]), whole[[3, 1]], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        rows([3, 1], kinds=("translation_int",)), whole[[3, 1], 2:], rtol=1e-12, atol=0
    )
    assert not torch.allclose(rows([3, 1], seed=1), whole[[3, 1]])
    assert whole[4, 3] < 0.6 * whole[:4, 3].min()  # the last motion has two images only
