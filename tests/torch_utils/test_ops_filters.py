# SPDX-License-Identifier: MIT
"""Low-pass design against recorded filters and scipy, and the properties a low-pass filter must have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

from torch_utils.ops.filters import design_lowpass_filter

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_filters.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))["filters"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_golden_filters(case):
    f = design_lowpass_filter(
        case["numtaps"], case["cutoff"], case["width"], case["fs"], radial=case["radial"]
    )
    if case["none"]:
        assert f is None
        return
    expected = GOLDEN[case["key"]]
    assert f.dtype == torch.float32
    assert f.shape == expected.shape
    assert np.abs(f.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("numtaps", [2, 7, 12, 33])
@pytest.mark.parametrize(("cutoff", "width"), [(2.0, 4.5), (7.9, 0.5), (1.0, 20.0)])
def test_agrees_with_scipy(numtaps, cutoff, width):
    expected = scipy.signal.firwin(numtaps, cutoff, width=width, fs=32.0)
    f = design_lowpass_filter(numtaps, cutoff, width, 32.0)
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("numtaps", [6, 12, 13])
def test_radial_filter_is_symmetric_and_sums_to_one(numtaps):
    f = design_lowpass_filter(numtaps, 3.0, 5.0, 32.0, radial=True)
    assert f.isfinite().all()
    torch.testing.assert_close(f.sum(), torch.ones(()))
    for other in (f.t(), f.flip(0), f.flip(1)):
        torch.testing.assert_close(f, other)


@pytest.mark.parametrize("radial", [False, True])
def test_passes_low_and_stops_high_frequencies(radial):
    f = design_lowpass_filter(48, 4.0, 2.0, 32.0, radial=radial).numpy()
    f = f.sum(axis=0) if radial else f  # a sum over rows is the response along x
    response = np.abs(np.fft.rfft(f, 1024))
    frequency = np.fft.rfftfreq(1024, 1 / 32)
    assert np.abs(response[frequency < 2.5] - 1).max() < 0.03
    assert response[frequency > 6].max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 8), "numtaps=0"),
        ((6, 5, 1, 8), "cutoff=5.*fs=8"),
        ((6, 0, 1, 8), "cutoff=0"),
        ((6, 1, 0, 8), "width=0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        design_lowpass_filter(*arguments)
