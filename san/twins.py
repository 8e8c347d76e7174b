# SPDX-License-Identifier: MIT
"""The SAN twin of one layer: the same function of its input, with unit directions, scales and an input bias.

Any layer becomes a twin in three steps: read the weight that its next forward pass would use (spectral norm,
weight norm and learning-rate gains included), move the output bias to the input, compare both on random input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from san.layers import NORM_EPS, SANConv1d, SANConv2d, SANEmbedding, SANLayer, SANLinear, split_norms
from san.preserve import preserved_state

Converter = Callable[[nn.Module], nn.Module]
Converters = Mapping[type[nn.Module], Converter]

PLAIN_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
MAX_CONDITION = 1e4  # singular values of W below its norm / this count as zero when a bias moves to the input
ZERO_PADS = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}
OTHER_PADS = {
    "reflect": {1: nn.ReflectionPad1d, 2: nn.ReflectionPad2d},
    "replicate": {1: nn.ReplicationPad1d, 2: nn.ReplicationPad2d},
    "circular": {1: nn.CircularPad1d, 2: nn.CircularPad2d},
}


class SanifyError(ValueError):
    """A layer or a discriminator cannot be converted; the message says why. Nothing has been changed."""


def convert_layer(layer: nn.Module, converters: Converters | None = None) -> nn.Module:
    """The SAN twin of a last layer: `twin(x).fun` equals `layer(x)`. The layer itself stays as it is.

    Understood: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Embedding`, also under torch's spectral or weight norm
    (hooks and parametrizations), which end here: the direction is normalised, the scale takes the length over.
    In training mode a spectral norm counts as after its next power iteration, as in its next forward pass.

    Learning-rate equalised layers, as in StyleGAN2 and 3: a module that is none of the above, with a tensor
    `weight` (out, in) or (out, in, h, w), a number `weight_gain` and an `activation` of "linear" computes
    `F.linear` (or `F.conv2d` of stride 1, with its attribute `padding`) of weight * weight_gain, plus bias *
    bias_gain if there are such; `up` and `down`, if there, are 1 and `conv_clamp` is None.

    converters: for other types, type -> function(layer) that returns an equal `nn.Linear`, `nn.Conv1d`,
    `nn.Conv2d` or `nn.Embedding`. It goes before the rules above, and holds for subclasses.

    An output bias b becomes an input bias c with W c = b, the shortest one (W summed over a filter's taps).
    Padded cells need it too, but a SAN convolution pads after adding it: a padded convolution with a bias becomes
    `Sequential(padding layer, SANConv)`, and so does one that pads by anything but zeros.

    Raises SanifyError when there is no twin: groups, transposed or 3-D convolutions; a bias that no input bias
    equals; a unit of weight zero, which has no direction; a layer that computes something else.
    """
    return make_twin(layer, converters or {})[0]


def make_twin(layer: nn.Module, converters: Converters) -> tuple[nn.Module, float]:
    """The twin, and by how much its output on random input differs, relative to the largest output."""
    # A parametrized spectral norm iterates at every look at the weight; while cached, it does so once.
    with preserved_state(layer), parametrize.cached():
        source = as_plain(layer, converters)
        _refuse_unconvertible(source)
        x = probe_input(source)
        twin = build_twin(source, *read_weight(source, x))
        difference = measure_difference(layer, twin, x)
    twin.requires_grad_(any(p.requires_grad for p in layer.parameters()))
    return twin.train(layer.training), difference


def build_twin(source: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The twin of a plain layer with this weight and output bias."""
    if isinstance(source, nn.Embedding):
        twin = SANEmbedding(*weight.shape, device=weight.device, dtype=weight.dtype)
        return fill_(twin, weight, None)
    if isinstance(source, nn.Linear):
        twin = SANLinear(*weight.shape[::-1], bias is not None, device=weight.device, dtype=weight.dtype)
        return fill_(twin, weight, None if bias is None else solve_input_bias(weight, bias))
    return build_convolution(source, weight, bias)


def as_plain(layer: nn.Module, converters: Converters) -> nn.Module:
    """A layer of one of PLAIN_TYPES that computes the same: itself, or what a converter makes of it."""
    if isinstance(layer, SANLayer):
        raise SanifyError(f"it is a {type(layer).__name__} already")
    for kind, converter in converters.items():
        if isinstance(layer, kind):
            with preserved_state(layer):  # a norm of its own may count the calls
                plain = converter(layer)
            if not isinstance(plain, PLAIN_TYPES):
                raise SanifyError(
                    f"the converter of {kind.__name__} returned a {type(plain).__name__}: it must be an "
                    "nn.Linear, nn.Conv1d, nn.Conv2d or nn.Embedding"
                )
            return plain
    if not isinstance(layer, PLAIN_TYPES) and is_equalized(layer):
        return unequalize(layer)
    return layer


def is_equalized(layer: nn.Module) -> bool:
    """Looks like a learning-rate equalised layer of StyleGAN2 or 3: `weight`, `weight_gain`, `activation`."""
    weight, gain = getattr(layer, "weight", None), getattr(layer, "weight_gain", None)
    is_numeric = isinstance(gain, Real) or (isinstance(gain, Tensor) and gain.numel() == 1)
    return (
        isinstance(weight, Tensor) and weight.ndim in (2, 4) and is_numeric and hasattr(layer, "activation")
    )


def unequalize(layer: nn.Module) -> nn.Linear | nn.Conv2d:
    """The plain layer with the gains multiplied into weight and bias."""
    if layer.activation != "linear":
        raise SanifyError(f"its activation {layer.activation!r} is not 'linear': it is not a last layer")
    resampling = [getattr(layer, name, 1) for name in ("up", "down")]
    if resampling != [1, 1] or getattr(layer, "conv_clamp", None) is not None:
        raise SanifyError("it resamples or clamps its output (up, down, conv_clamp): that is not linear")
    weight = layer.weight.detach() * layer.weight_gain
    bias = getattr(layer, "bias", None)
    options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    if weight.ndim == 2:
        plain = nn.Linear(*weight.shape[::-1], **options)
    else:
        sizes = weight.shape[1], weight.shape[0], tuple(weight.shape[2:])
        plain = nn.Conv2d(*sizes, padding=getattr(layer, "padding", 0), **options)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias * getattr(layer, "bias_gain", 1))
    return plain


def _refuse_unconvertible(source: nn.Module) -> None:
    if not isinstance(source, PLAIN_TYPES):
        raise SanifyError(
            f"a {type(source).__name__} has no SAN twin: only linear layers, 1-D and 2-D convolutions, embeddings "
            "and learning-rate equalised layers have; for a type of your own pass converters={its type: "
            "function returning an equal nn.Linear, nn.Conv1d, nn.Conv2d or nn.Embedding}"
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in source.parameters()):
        raise SanifyError("its weight is lazy: run the discriminator once first")
    if getattr(source, "groups", 1) != 1:
        raise SanifyError(
            f"it has groups={source.groups}: a SAN direction spans all features, and SAN layers have no groups"
        )
    if isinstance(source, nn.Embedding):
        options = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
        odd = [
            name
            for name in options
            if getattr(source, name) is not None and getattr(source, name) is not False
        ]
        if odd:
            raise SanifyError(f"SAN embeddings have no {', '.join(odd)}: build the embedding without")


@torch.no_grad()
def read_weight(source: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the next forward pass uses, whatever normalises the weight. The layer is unchanged."""
    with preserved_state(source):
        run_alone(source, x)  # norms by hooks compute the weight in the forward pass
        weight = source.weight.detach().clone()
        bias = getattr(source, "bias", None)
        bias = None if bias is None else bias.detach().clone()
    lengths = torch.linalg.vector_norm(weight.flatten(1).double(), dim=1)
    if not (lengths > NORM_EPS).all():
        unit = int((~(lengths > NORM_EPS)).nonzero()[0])
        raise SanifyError(f"the weight of its output unit {unit} is zero or not finite: it has no direction")
    return weight, bias


def solve_input_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """The shortest c with W c = bias, where a filter is summed over its taps: shape (in,), dtype of weight.

    Raises SanifyError when there is none, or when rounding would spoil it (a W that nearly lacks full row rank).
    """
    matrix = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
    target = bias.double()
    smallest = torch.linalg.vector_norm(weight.double()) / MAX_CONDITION
    solution = torch.linalg.pinv(matrix, atol=smallest, rtol=0.0) @ target
    if (matrix @ solution - target).abs().max() > 1e-6 * target.abs().max():
        raise SanifyError(
            f"its output bias cannot move to the input: no c solves W c = b for the {tuple(matrix.shape)} matrix W "
            "(summed over a filter's taps), which lacks full row rank, exactly or nearly; build the layer with "
            "bias=False, or with fewer outputs than inputs"
        )
    return solution.to(weight.dtype)


def build_convolution(source: nn.Conv1d | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """SAN convolution; after a padding of its own if the input bias, or another mode, must reach padded cells."""
    num_dims = weight.ndim - 2
    padding = list_padding(source)
    pads_apart = any(padding) and (source.padding_mode != "zeros" or bias is not None)
    san_type = SANConv1d if num_dims == 1 else SANConv2d
    twin = san_type(
        source.in_channels,
        source.out_channels,
        source.kernel_size,
        source.stride,
        0 if pads_apart else source.padding,
        source.dilation,
        bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    fill_(twin, weight, None if bias is None else solve_input_bias(weight, bias))
    if not pads_apart:
        return twin
    if source.padding_mode == "zeros":
        return nn.Sequential(ZERO_PADS[num_dims](padding, 0.0), twin)
    return nn.Sequential(OTHER_PADS[source.padding_mode][num_dims](padding), twin)


def list_padding(source: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Cells to add before and after each axis, last axis first, as padding layers take them."""
    sides: list[int] = []
    for axis in reversed(range(len(source.kernel_size))):
        if source.padding == "same":
            total = source.dilation[axis] * (source.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if source.padding == "valid" else [source.padding[axis]] * 2
    return tuple(sides)


@torch.no_grad()
def fill_(twin: SANLayer, weight: Tensor, input_bias: Tensor | None) -> SANLayer:
    directions, norms = split_norms(weight)
    twin.weight.copy_(directions)
    twin.scale.copy_(norms.view_as(twin.scale))
    if input_bias is not None:
        twin.bias.copy_(input_bias)
    return twin


def probe_input(source: nn.Module) -> Tensor:
    """Random input for a plain layer, the same each time; every row for an embedding."""
    weight = source.weight
    if isinstance(source, nn.Embedding):
        return torch.arange(len(weight), device=weight.device)
    shape = [4, weight.shape[1]]
    for axis in range(weight.ndim - 2):
        reach = source.dilation[axis] * (source.kernel_size[axis] - 1) + 1
        shape.append(2 * reach + 2 * source.stride[axis] + max(list_padding(source)))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def run_alone(layer: nn.Module, x: Tensor) -> Tensor:
    try:
        return layer(x)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise SanifyError(
            f"its forward does not run on one tensor of shape {tuple(x.shape)}: {error}"
        ) from error


@torch.no_grad()
def measure_difference(layer: nn.Module, twin: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs over the largest output. Raises SanifyError when it is not rounding."""
    with preserved_state(layer):
        expected = run_alone(layer, x)
    actual = twin(x).fun
    if isinstance(expected, Tensor) and expected.shape == actual.shape:
        difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        tolerance = 5e-2 if actual.dtype in (torch.float16, torch.bfloat16) else 2e-3  # 1e-3 is TF32
        if difference <= tolerance:
            return difference.item()
    raise SanifyError(
        f"a {type(layer).__name__} computes something else than its weight and bias say: pass converters="
        f"{{{type(layer).__name__}: function returning an equal nn.Linear, nn.Conv1d, nn.Conv2d or nn.Embedding}}"
    )
