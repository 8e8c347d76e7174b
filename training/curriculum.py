# SPDX-License-Identifier: MIT
"""The curriculum of critics of growing strength (arXiv:1807.09295): whom the generator listens to, and when."""

from __future__ import annotations


def curriculum_weights(cur_nimg: int, curriculum_kimg: float, num_critics: int) -> list[float]:
    """Weight of each critic in the generator's convex combination, weakest first; they add up to 1.

    The weight moves evenly from the first critic to the last within `curriculum_kimg` thousand images, and at any time
    at most two neighbours share it. cur_nimg: images seen.

    >>> curriculum_weights(25_000, 100.0, num_critics=3)
    [0.5, 0.5, 0.0]
    """
    progress = min(cur_nimg / (curriculum_kimg * 1000), 1.0) if curriculum_kimg > 0 else 1.0
    position = progress * (num_critics - 1)
    return [max(0.0, 1.0 - abs(position - i)) for i in range(num_critics)]
