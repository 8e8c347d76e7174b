# SPDX-License-Identifier: MIT
"""The curriculum's weights: convex, from the weakest critic to the strongest, on time."""

import pytest

from training.curriculum import curriculum_weights


@pytest.mark.parametrize("num_critics", [1, 2, 3, 5])
def test_weights_are_a_convex_combination_at_any_time(num_critics):
    before = -1.0
    for cur_nimg in range(0, 150_001, 1000):
        weights = curriculum_weights(cur_nimg, 100.0, num_critics)
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0
        assert sum(weight > 1e-12 for weight in weights) <= 2
        strength = sum(i * weight for i, weight in enumerate(weights))
        assert strength >= before - 1e-12  # it only grows
        before = strength
    assert before == pytest.approx(num_critics - 1)


def test_weights_by_hand():
    assert curriculum_weights(0, 100.0, 3) == [1, 0, 0]
    assert curriculum_weights(10_000, 100.0, 3) == pytest.approx([0.8, 0.2, 0])
    assert curriculum_weights(50_000, 100.0, 3) == pytest.approx([0, 1, 0])
    assert curriculum_weights(95_000, 100.0, 3) == pytest.approx([0, 0.1, 0.9])
    assert curriculum_weights(10**6, 100.0, 3) == [0, 0, 1]


def test_without_a_curriculum_the_last_critic_counts():
    assert curriculum_weights(0, 0.0, 2) == [0, 1]
    assert curriculum_weights(0, 0.0, 1) == [1]
