# SPDX-License-Identifier: MIT
"""How operations are compared with recorded values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def assert_near() -> Callable[[torch.Tensor | None, np.ndarray, float], None]:
    """assert_near(actual, expected, limit): max|a - b| <= limit * max|b|, same shape; None stands for zeros."""

    def check(actual: torch.Tensor | None, expected: np.ndarray, limit: float) -> None:
        values = np.zeros_like(expected) if actual is None else actual.detach().numpy()
        assert values.shape == expected.shape
        assert np.abs(values - expected).max() <= limit * np.abs(expected).max()

    return check
