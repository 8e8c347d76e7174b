# SPDX-License-Identifier: MIT
"""Which pixels of its feature maps an image depends on: what lies further out need not be computed.

Margins keep borders out of sight (StyleGAN3, arXiv:2106.12423, section 3.2), but towards the output an image reaches
less and less far into them. Arithmetic without torch, as in `layer_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.generator.layer_plan import LayerPlan

Padding = tuple[int, int, int, int]


def reached_paddings(layers: Sequence[LayerPlan]) -> list[Padding]:
    """For each layer in place of `LayerPlan.padding`: with them a layer gives only what the next ones need of it.

    The images are the same. Both axes are alike, and so are all layers' inputs but for being smaller.
    """
    first, last = 0, layers[-1].target.size - 1  # what is needed of the layer's output
    needed = [(first, last)]
    for layer in reversed(layers[1:]):
        first, last = _needed_input(layer, first, last)
        needed.append((first, last))
    needed.reverse()  # of layer i's output, the entry i
    starts = [0, *(begin for begin, _ in needed)]  # of layer i's input
    sizes = [layers[0].source.size, *(end - begin + 1 for begin, end in needed)]
    return [
        _padding(layer, window, start, size)
        for layer, window, start, size in zip(layers, needed, starts, sizes, strict=False)
    ]


def _needed_input(layer: LayerPlan, first: int, last: int) -> tuple[int, int]:
    """First and last pixel of the input that outputs `first` to `last` depend on."""
    mid_first = first * layer.down_factor
    mid_last = last * layer.down_factor + layer.down_taps - 1
    before = layer.padding[0]
    # The convolution is padded by all it can: its output o depends on inputs o - kernel + 1 to o.
    conv_first = -(-(mid_first - before) // layer.up_factor)
    conv_last = (mid_last + layer.up_taps - 1 - before) // layer.up_factor
    return max(conv_first - layer.conv_kernel + 1, 0), min(conv_last, layer.source.size - 1)


def _padding(layer: LayerPlan, window: tuple[int, int], start: int, size: int) -> Padding:
    """Padding that gives outputs `window` from inputs `start` to `start + size - 1`."""
    first, last = window
    low = layer.padding[0] - first * layer.down_factor + start * layer.up_factor
    num_mid = (last - first) * layer.down_factor + layer.down_taps
    high = num_mid + layer.up_taps - 1 - (size + layer.conv_kernel - 1) * layer.up_factor - low
    return low, high, low, high
