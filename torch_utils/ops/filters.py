# SPDX-License-Identifier: MIT
"""Low-pass filter design for alias-free networks (StyleGAN3, arXiv:2106.12423, Section 3 and Appendix C).

Two families: the Kaiser-windowed sinc, applied along each axis in turn, and the radially symmetric "jinc"
with the same window, which is a two-dimensional filter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def design_lowpass_filter(
    numtaps: int, cutoff: float, width: float, fs: float, radial: bool = False
) -> Tensor | None:
    """Taps of a low-pass filter that sum to one: float32 `(numtaps,)`, or `(numtaps, numtaps)` if `radial`.

    `cutoff`, `width` (transition band) and `fs` (sampling rate) share one unit, e.g. cycles per image width.
    One tap means no filter: None. Designed in float64. Raises ValueError for impossible arguments.
    """
    if numtaps < 1:
        raise ValueError(f"numtaps={numtaps} must be at least 1")
    if numtaps == 1:
        return None
    if not 0 < cutoff < fs / 2:
        raise ValueError(
            f"cutoff={cutoff} must lie between 0 and half the sampling rate fs={fs}, i.e. {fs / 2}"
        )
    if width <= 0:
        raise ValueError(f"width={width} of the transition band must be positive")
    taps = _radial_jinc(numtaps, cutoff, width, fs) if radial else _windowed_sinc(numtaps, cutoff, width, fs)
    return torch.from_numpy(taps / taps.sum()).to(torch.float32)


def _windowed_sinc(numtaps: int, cutoff: float, width: float, fs: float) -> np.ndarray:
    """Unnormalised sinc low-pass, `(numtaps,)`."""
    position = np.arange(numtaps) - (numtaps - 1) / 2
    return np.sinc(cutoff / (fs / 2) * position) * _kaiser_window(numtaps, width, fs)


def _radial_jinc(numtaps: int, cutoff: float, width: float, fs: float) -> np.ndarray:
    """Unnormalised circular low-pass, `(numtaps, numtaps)`; its centre is a tap only for odd `numtaps`."""
    from scipy.special import j1  # imported here: only stylegan3-r needs scipy

    position = (np.arange(numtaps) - (numtaps - 1) / 2) / fs
    radius = np.hypot(*np.meshgrid(position, position))
    with np.errstate(divide="ignore", invalid="ignore"):
        jinc = j1(2 * np.pi * cutoff * radius) / (np.pi * radius)
    jinc[radius == 0] = cutoff  # the limit of J1(2 pi c r) / (pi r) at r = 0
    window = _kaiser_window(numtaps, width, fs)
    return jinc * np.outer(window, window)


def _kaiser_window(numtaps: int, width: float, fs: float) -> np.ndarray:
    """Kaiser window whose transition band is `width`, by Kaiser's formulas for attenuation and beta."""
    attenuation_db = 2.285 * (numtaps - 1) * np.pi * width / (fs / 2) + 7.95
    if attenuation_db > 50:
        beta = 0.1102 * (attenuation_db - 8.7)
    elif attenuation_db > 21:
        beta = 0.5842 * (attenuation_db - 21) ** 0.4 + 0.07886 * (attenuation_db - 21)
    else:
        beta = 0.0
    return np.kaiser(numtaps, beta)
