# SPDX-License-Identifier: MIT
"""Last layers of a SAN discriminator: scale * <direction, x + bias> with directions of unit length.

Each output unit has its own unit direction (`weight`) and `scale`. Forward always returns `SANLogits`: the
`fun` view sends gradients to x, scale and bias, the `dir` view to the direction only, tangent to the sphere
(SAN, arXiv:2301.12811). State-dict keys are those of the official layers: weight, scale, bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from san.logits import SANLogits

NORM_EPS = 1e-12  # lower bound on the length that a direction is divided by


def split_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions and their former lengths: weight = directions * norms.

    weight: floating point, shape (out, ...); one direction per index of the first axis.
    Returns directions (shape of weight) and norms (out, 1, ..., 1), at least 1e-12. Norms of fp16 and bf16
    weights are computed in float32, where squares and the lower bound do not underflow.
    """
    exact = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    axes = tuple(range(1, weight.ndim))
    norms = torch.linalg.vector_norm(exact, dim=axes, keepdim=True).clamp_min(NORM_EPS)
    return (exact / norms).to(weight.dtype), norms.to(weight.dtype)


class SANLayer(nn.Module):
    """What the four layers share: the parameters, and the projection back to the sphere."""

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, plain_weight: Tensor, scale_shape: tuple[int, ...], input_bias_size: int) -> None:
        """plain_weight: of the ordinary layer that this one equals at first. input_bias_size: 0 = no bias."""
        super().__init__()
        directions, norms = split_norms(plain_weight.detach())
        self.weight = nn.Parameter(directions)
        self.scale = nn.Parameter(norms.reshape(scale_shape))
        bias = nn.Parameter(plain_weight.new_zeros(input_bias_size)) if input_bias_size else None
        self.register_parameter("bias", bias)

    @torch.no_grad()
    def normalize_directions_(self) -> None:
        """Replace the weight by its unit directions, in place. The layer's output does not change."""
        self.weight.copy_(split_norms(self.weight)[0])

    def is_frozen(self) -> bool:
        """Nothing can train the direction now (no_grad, a frozen D in the generator's step): dir comes free.

        `torch.func` puts plain tensors in the place of parameters and hides that they are differentiated, so
        only a real parameter that does not require grad counts as frozen.
        """
        is_fixed = isinstance(self.weight, nn.Parameter) and not self.weight.requires_grad
        return is_fixed or not torch.is_grad_enabled()


class _SANProduct(SANLayer):
    """Forward pass of the linear and convolutional layers; a subclass supplies the operator itself."""

    num_spatial_dims: int  # axes after the channel axis

    def operate(self, x: Tensor, directions: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> SANLogits:
        channel_last_axes = (1,) * self.num_spatial_dims
        scale = self.scale.view(-1, *channel_last_axes)
        if self.bias is not None:
            x = x + self.bias.view(-1, *channel_last_axes)
        directions, _ = split_norms(self.weight)
        fun = self.operate(x, directions.detach()) * scale
        if self.is_frozen():
            return SANLogits(fun, fun.detach())
        return SANLogits(fun, self.operate(x.detach(), directions) * scale.detach())


class SANLinear(_SANProduct):
    """Linear SAN head: (..., in_features) -> SANLogits of (..., out_features).

    Starts as `nn.Linear(in_features, out_features, bias=False)` with its default initialisation.
    `input_bias` adds a trained vector (in_features,), zero at first, to the INPUT: a constant added to the
    output would not be part of <direction, features>. The parameter is called `bias`, as in official layers.

    Parameters: weight (out_features, in_features), scale (out_features,), bias (in_features,) or None.

    >>> head = SANLinear(128, 1)
    >>> logits = head(torch.randn(16, 128))
    >>> logits.shape, torch.equal(logits.fun, logits.dir)
    (torch.Size([16, 1]), True)
    """

    num_spatial_dims = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        input_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plain = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        super().__init__(plain.weight, (out_features,), in_features if input_bias else 0)
        self.in_features, self.out_features = in_features, out_features

    def operate(self, x: Tensor, directions: Tensor) -> Tensor:
        return F.linear(x, directions)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, input_bias={self.bias is not None}"


class _SANConv(_SANProduct):
    """Constructor arguments of the convolutions; their meaning is torch's."""

    plain_type: type[nn.Conv1d] | type[nn.Conv2d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        input_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plain = self.plain_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=False,
            device=device,
            dtype=dtype,
        )
        super().__init__(plain.weight, (out_channels,), in_channels if input_bias else 0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = plain.kernel_size, plain.stride
        self.padding, self.dilation = plain.padding, plain.dilation

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, input_bias={self.bias is not None}"
        )


class SANConv1d(_SANConv):
    """Convolutional SAN head: (N, in_channels, L) -> SANLogits of (N, out_channels, L_out).

    Starts as `nn.Conv1d(..., bias=False)`; a direction is a whole filter, all channels and taps.
    Zero padding, no groups. The optional input bias (in_channels,) is added before the padding.

    Parameters: weight (out_channels, in_channels, k), scale (out_channels,), bias (in_channels,) or None.

    >>> SANConv1d(64, 1, kernel_size=3, padding=1)(torch.randn(2, 64, 100)).shape
    torch.Size([2, 1, 100])
    """

    num_spatial_dims = 1
    plain_type = nn.Conv1d

    def operate(self, x: Tensor, directions: Tensor) -> Tensor:
        return F.conv1d(x, directions, None, self.stride, self.padding, self.dilation)


class SANConv2d(_SANConv):
    """Convolutional SAN head: (N, in_channels, H, W) -> SANLogits of (N, out_channels, H_out, W_out).

    Starts as `nn.Conv2d(..., bias=False)`; a direction is a whole filter, all channels and taps.
    Zero padding, no groups. The optional input bias (in_channels,) is added before the padding.

    Parameters: weight (out_channels, in_channels, h, w), scale (out_channels,), bias (in_channels,) or None.

    >>> SANConv2d(512, 1, kernel_size=4)(torch.randn(2, 512, 7, 7)).flatten(1).shape
    torch.Size([2, 16])
    """

    num_spatial_dims = 2
    plain_type = nn.Conv2d

    def operate(self, x: Tensor, directions: Tensor) -> Tensor:
        return F.conv2d(x, directions, None, self.stride, self.padding, self.dilation)


class SANEmbedding(SANLayer):
    """One direction and one scale per class: int64 (...) -> SANLogits of (..., embedding_dim).

    The two views are class vectors rather than logits; `san.project` turns them and the features into logits.
    Starts as `nn.Embedding`, rows N(0, 1). Parameters: weight (num_embeddings, embedding_dim),
    scale (num_embeddings, 1).

    >>> class_vectors = SANEmbedding(10, 64)(torch.tensor([0, 9, 3, 3]))
    >>> class_vectors.shape
    torch.Size([4, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plain = nn.Embedding(num_embeddings, embedding_dim, device=device, dtype=dtype)
        super().__init__(plain.weight, (num_embeddings, 1), input_bias_size=0)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, labels: Tensor) -> SANLogits:
        scale = F.embedding(labels, self.scale)  # (..., 1)
        rows = F.embedding(labels, self.weight)  # looked up first: only the rows in use are normalised
        directions = split_norms(rows.reshape(-1, self.embedding_dim))[0].view_as(rows)
        fun = directions.detach() * scale
        if self.is_frozen():
            return SANLogits(fun, fun.detach())
        return SANLogits(fun, directions * scale.detach())

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def normalize_directions_(module: nn.Module) -> int:
    """Project the directions of all SAN layers in `module` back to the unit sphere, in place.

    Call after every optimizer step of the discriminator (SAN, arXiv:2301.12811). It changes no output, and
    only keeps the stored lengths, and with them the effective learning rate, from drifting. Scale, bias and
    optimizer state are not touched.

    Returns the number of SAN layers found: 0 for a discriminator without any, which is not an error.

    >>> normalize_directions_(nn.Sequential(nn.Linear(8, 8), SANLinear(8, 1)))
    1
    """
    layers = [m for m in module.modules() if isinstance(m, SANLayer)]
    for layer in layers:
        layer.normalize_directions_()
    return len(layers)


def keep_normalized(optimizer: torch.optim.Optimizer, D: nn.Module) -> RemovableHandle:
    """Call `normalize_directions_(D)` after every step of D's optimizer from now on.

    Returns the handle of the step hook; `handle.remove()` ends it. A step that a GradScaler skips is followed
    by nothing.

    Raises ValueError when D has no SAN layer, or when the optimizer does not hold D's directions, as happens
    when it was built before `sanify`.

    >>> D = nn.Sequential(nn.Linear(8, 8), SANLinear(8, 1))
    >>> handle = keep_normalized(torch.optim.Adam(D.parameters()), D)
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = {name: m for name, m in D.named_modules() if isinstance(m, SANLayer)}
    if not layers:
        raise ValueError("keep_normalized() found no SAN layer in D: call san.sanify(D) first")
    for name, layer in layers.items():
        if id(layer.weight) not in held:
            raise ValueError(
                f"the optimizer does not hold the direction of {name or 'D'}: build it after san.sanify(D), "
                "from D.parameters()"
            )
    return optimizer.register_step_post_hook(lambda *_: normalize_directions_(D))
