# SPDX-License-Identifier: MIT
"""Weight-modulated convolution (StyleGAN2, arXiv:1912.04958, Section 2.2; normalisation as in StyleGAN3).

Scaling the input channels of the weight is scaling the channels of the input, and demodulation scales the
channels of the output. So one ordinary convolution with a shared weight replaces one weight tensor per
sample.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops import winograd


def modulated_conv2d(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    demodulate: bool = True,
    padding: int | list[int] | tuple[int, int] = 0,
    input_gain: Tensor | None = None,
) -> Tensor:
    """Convolve (correlate) each sample with `w` scaled by its style: `(N, O, H', W')` in the dtype of `x`.

    x: `(N, I, H, W)`; w: `(O, I, kh, kw)`; s: `(N, I)`; padding: int or [height, width]; input_gain: scalar,
    `(I,)` or `(N, I)`, applied after demodulation. The scales are computed in the dtype of `w`. With
    `demodulate`, `s` is first normalised over the whole tensor, which couples the samples of a batch through
    the added 1e-8 only.
    """
    _check_shapes(x, w, s)
    if demodulate:
        w, s, output_scale = _demodulation(w, s)
    if input_gain is not None:
        s = s * input_gain
    x = x * s.to(x.dtype)[:, :, None, None]
    x = _convolve(x, w.to(x.dtype), padding)
    return x * output_scale.to(x.dtype)[:, :, None, None] if demodulate else x


def _convolve(x: Tensor, w: Tensor, padding: int | list[int] | tuple[int, int]) -> Tensor:
    if isinstance(padding, int) and winograd.pays(x, w, padding):
        return winograd.conv3x3(x, w, padding)
    return F.conv2d(x, w, padding=padding if isinstance(padding, int) else tuple(padding))


def _demodulation(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight with unit norm per output channel, style with unit mean square, and the `(N, O)` output scales.

    Unit norm (rather than unit mean square, with the factor moved into the scales) keeps the convolution's
    output as large as its input, so that half precision does not overflow before the output is scaled.
    """
    fan_in = w[0].numel()
    w = w * w.square().sum(dim=[1, 2, 3], keepdim=True).rsqrt()
    s = s * s.square().mean().rsqrt()
    energy = s.square() @ w.square().sum(dim=[2, 3]).t()  # (N, O): squared norm of each sample's own weight
    return w, s, (energy + 1e-8 / fan_in).rsqrt()


def _check_shapes(x: Tensor, w: Tensor, s: Tensor) -> None:
    if x.ndim != 4 or w.ndim != 4 or w.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight {tuple(w.shape)} does not fit input {tuple(x.shape)}: need (O, I, kh, kw), (N, I, H, W)"
        )
    if s.shape != x.shape[:2]:
        raise ValueError(f"styles {tuple(s.shape)} must be (N, I) = {tuple(x.shape[:2])}")
