# SPDX-License-Identifier: MIT
"""SANLogits: every supported operation acts on both views as on tensors; every other one says what to do.

python -m pytest tests/san/test_logits.py
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san import SANLogits


def make_logits(*shape: int) -> SANLogits:
    """Views with different values, so that a mix-up of the two is seen."""
    generator = torch.Generator().manual_seed(0)
    fun, dir_ = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    return SANLogits(fun, dir_)


def accumulate(t):
    total = 0
    for part in (t, t * 2):
        total += part
        total /= 2
    return total


LEVELS = torch.tensor([1.0, 2.0, 3.0, 4.0])

# Each function runs on a tensor and on SANLogits of shape (2, 3, 1, 4).
OPERATIONS = {
    "view": lambda t: t.view(2, -1),
    "view_tuple": lambda t: t.view((6, 4)),
    "reshape": lambda t: t.reshape(2, -1),
    "flatten": lambda t: t.flatten(1),
    "flatten_keywords": lambda t: t.flatten(start_dim=1, end_dim=2),
    "squeeze": lambda t: t.squeeze(),
    "squeeze_dim": lambda t: t.squeeze(2),
    "squeeze_keyword": lambda t: t.squeeze(dim=2),
    "unsqueeze": lambda t: t.unsqueeze(-1),
    "permute": lambda t: t.permute(3, 0, 2, 1),
    "permute_tuple": lambda t: t.permute((3, 0, 2, 1)),
    "transpose": lambda t: t.transpose(1, 3),
    "transpose_contiguous_view": lambda t: t.transpose(1, 3).contiguous().view(2, -1),
    "expand": lambda t: t.expand(2, 3, 5, 4),
    "index": lambda t: t[0],
    "index_tuple": lambda t: t[:, 1:, ..., None, -1],
    "index_list": lambda t: t[[1, 0, 1]],
    "index_tensor": lambda t: t[torch.tensor([1, 0])],
    "index_mask": lambda t: t[torch.tensor([True, False])],
    "sum": lambda t: t.sum(),
    "sum_dims": lambda t: t.sum((1, 2), keepdim=True),
    "mean": lambda t: t.mean(),
    "mean_dim": lambda t: t.mean(dim=1),
    "double": lambda t: t.double(),
    "to_dtype": lambda t: t.to(torch.float64),
    "to_device_dtype": lambda t: t.to("cpu", dtype=torch.float64),
    "to_tensor": lambda t: t.to(torch.zeros(1, dtype=torch.float64)),
    "float": lambda t: t.float(),
    "cpu": lambda t: t.cpu(),
    "times_number": lambda t: 3 * t * 0.5,
    "times_tensor": lambda t: t * LEVELS,
    "tensor_times": lambda t: LEVELS * t,
    "mul": lambda t: t.mul(LEVELS),
    "times_numpy": lambda t: t * np.float32(2) * np.float64(3),
    "divide": lambda t: t / 8,
    "divide_by_tensor": lambda t: t / LEVELS,
    "div": lambda t: t.div(2.0),
    "negate": lambda t: -t,
    "add_logits": lambda t: t + 2 * t[:1],
    "add_number": lambda t: 1 + t + 2.5,
    "add_tensor": lambda t: LEVELS + t + LEVELS,
    "add_method": lambda t: t.add(1).sub(LEVELS),
    "subtract": lambda t: (t - t[:, :1]) - 3,
    "subtract_from": lambda t: 1 - (LEVELS - t),
    "builtin_sum": lambda t: sum([t, t, t]) / 3,
    "in_place_syntax": lambda t: accumulate(t),
    "torch_add": lambda t: torch.add(t, t),
    "torch_sub": lambda t: torch.sub(LEVELS, torch.sub(t, 1.0)),
    "select": lambda t: t.select(1, 2),
    "narrow": lambda t: t.narrow(3, 1, 2),
    "gather": lambda t: t.gather(1, torch.tensor([[1], [2]])[:, :, None, None].expand(2, 1, 1, 4)),
    "repeat": lambda t: t.repeat(1, 2, 1, 1),
    "clone": lambda t: t.clone(),
    "torch_flip": lambda t: torch.flip(t, (3,)),
    "torch_index_select": lambda t: torch.index_select(t, 0, torch.tensor([1])),
    "avg_pool2d": lambda t: F.avg_pool2d(t, (1, 2)),
    "avg_pool2d_module": lambda t: nn.AvgPool2d((1, 4))(t),
    "global_pool": lambda t: nn.AdaptiveAvgPool2d(1)(t),
    "interpolate": lambda t: F.interpolate(t, size=(3, 5), mode="bilinear", align_corners=False),
    "torch_cat": lambda t: torch.cat([t, t * 2], dim=1),
    "torch_cat_tuple": lambda t: torch.cat((t, t), 0),
    "torch_cat_keyword": lambda t: torch.cat(tensors=[t, t], dim=-1),
    "torch_concat": lambda t: torch.concat([t, t], dim=1),
    "torch_stack": lambda t: torch.stack([t, -t], dim=1),
    "torch_flatten": lambda t: torch.flatten(t, 1),
    "torch_reshape": lambda t: torch.reshape(t, (2, -1)),
    "torch_squeeze": lambda t: torch.squeeze(t, 2),
    "torch_unsqueeze": lambda t: torch.unsqueeze(t, 0),
    "torch_permute": lambda t: torch.permute(t, (1, 0, 2, 3)),
    "torch_transpose": lambda t: torch.transpose(t, 0, 1),
    "torch_mean": lambda t: torch.mean(t, dim=(1, 2)),
    "torch_mean_keyword": lambda t: torch.mean(input=t, dim=1),
    "torch_sum": lambda t: torch.sum(t),
    "torch_mul": lambda t: torch.mul(t, 2.0),
    "torch_mul_tensor": lambda t: torch.mul(LEVELS, t),
    "torch_div": lambda t: torch.div(t, 2.0),
    "nn_flatten": lambda t: nn.Flatten()(t),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_the_operation_on_each_view(name: str) -> None:
    operation, logits = OPERATIONS[name], make_logits(2, 3, 1, 4)
    result = operation(logits)
    assert isinstance(result, SANLogits)
    for view in ("fun", "dir"):
        source, actual = getattr(logits, view), getattr(result, view)
        expected = operation(source)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
        weight = torch.randn_like(expected)
        (actual_grad,) = torch.autograd.grad(actual, source, weight)
        (expected_grad,) = torch.autograd.grad(expected, source, weight)
        assert torch.equal(actual_grad, expected_grad)


def extend(rows, t):
    rows += t  # StyleGAN-XL's way to collect the logits of several backbones
    return rows


PARTS = {
    "iteration": lambda t: list(t),
    "unpacking": lambda t: [*t],
    "list_extension": lambda t: extend([], t),
    "unbind": lambda t: t.unbind(1),
    "split": lambda t: t.split([1, 2], dim=1),
    "chunk": lambda t: t.chunk(2),
    "torch_split": lambda t: torch.split(t, 2, dim=1),
    "torch_chunk": lambda t: torch.chunk(t, 2),
    "torch_unbind": lambda t: torch.unbind(t),
}


@pytest.mark.parametrize("name", PARTS)
def test_operation_with_several_results(name: str) -> None:
    operation, logits = PARTS[name], make_logits(2, 3, 4)
    parts = operation(logits)
    for view in ("fun", "dir"):
        expected = operation(getattr(logits, view))
        assert len(parts) == len(expected)
        assert all(torch.equal(getattr(p, view), e) for p, e in zip(parts, expected, strict=True))


@pytest.mark.parametrize("method", ["half", "bfloat16"])
def test_half_precision_and_detach(method: str) -> None:
    logits = make_logits(2, 3)
    low = getattr(logits, method)()
    assert low.dtype in (torch.float16, torch.bfloat16)
    assert torch.equal(low.dir, getattr(logits.dir, method)())
    assert not low.detach().fun.requires_grad
    assert not low.detach().dir.requires_grad


def test_size_and_type() -> None:
    logits = make_logits(2, 3, 4)
    assert logits.shape == logits.size() == (2, 3, 4)
    assert logits.size(-1) == 4
    assert logits.ndim == logits.dim() == 3
    assert (len(logits), logits.numel()) == (2, 24)
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    assert repr(logits).startswith("SANLogits(fun=tensor(")


def test_plain_head_has_no_direction_gradient() -> None:
    tensor = torch.randn(4, 1, requires_grad=True)
    logits = SANLogits.plain(tensor)
    assert logits.fun is tensor
    assert torch.equal(logits.dir, tensor)
    assert not logits.dir.requires_grad


UNSUPPORTED = {
    "relu": lambda t: t.relu(),
    "F_relu": F.relu,
    "F_softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "exp": lambda t: t.exp(),
    "max": lambda t: t.max(),
    "norm": lambda t: torch.linalg.vector_norm(t),
    "einsum": lambda t: torch.einsum("nk->n", t),
    "linear": lambda t: nn.Linear(3, 1)(t),
    "backward": lambda t: t.sum().backward(),
    "item": lambda t: t.sum().item(),
    "numpy": lambda t: t.numpy(),
    "requires_grad": lambda t: t.requires_grad,
    "add_trained_tensor": lambda t: t + nn.Parameter(torch.ones(3)),
    "add_to_trained_tensor": lambda t: nn.Parameter(torch.ones(3)) + t,
    "subtract_trained_tensor": lambda t: t - nn.Parameter(torch.ones(3)),
    "add_string": lambda t: t + "1",
    "add_with_alpha": lambda t: torch.add(t, t, alpha=2),
    "power": lambda t: t**2,
    "square": lambda t: t * t,
    "ratio": lambda t: t / t,
    "reciprocal": lambda t: 1 / t,
    "reciprocal_tensor": lambda t: torch.ones(3) / t,
    "floor_divide": lambda t: t // 2,
    "div_floor": lambda t: torch.div(t, 2, rounding_mode="floor"),
    "matmul": lambda t: t @ torch.ones(3),
    "times_list": lambda t: t * [1.0, 2.0, 3.0],
    "trained_factor": lambda t: t * nn.Parameter(torch.ones(3)),
    "trained_factor_left": lambda t: nn.Parameter(torch.ones(3)) * t,
    "trained_divisor": lambda t: t / nn.Parameter(torch.ones(3)),
    "cat_with_tensor": lambda t: torch.cat([t, torch.ones(2, 3)]),
    "stack_with_tensor": lambda t: torch.stack([torch.ones(2, 3), t]),
    "in_place": lambda t: t.mul_(2),
    "assign_item": lambda t: t.__setitem__(0, 1.0),
    "compare": lambda t: t > 0,
    "equal": lambda t: t == 0,
    "not_equal": lambda t: t != 0,
    "bool": bool,
    "float": float,
    "np_asarray": np.asarray,
    "contains": lambda t: 0 in t,
    "to_integer": lambda t: t.to(torch.int64),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_operations_raise_a_type_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        UNSUPPORTED[name](make_logits(2, 3))
    message = str(caught.value)
    assert "SANLogits" in message
    assert "\n" not in message
    assert ".fun" in message or "factor.detach()" in message or "floating-point" in message


def test_the_error_names_the_operation() -> None:
    with pytest.raises(TypeError, match=r"'softplus'.*Use \.fun.*\.dir"):
        F.softplus(make_logits(2))
    with pytest.raises(TypeError, match=r"SANLogits\.plain\(tensor\)"):
        torch.cat([make_logits(2), torch.ones(2)])
    with pytest.raises(TypeError, match=r"addition.*SANLogits\.plain\(tensor\)"):
        torch.ones(2, requires_grad=True) + make_logits(2)
    with pytest.raises(TypeError, match=r"san\.project\(features, class_vectors\)"):
        make_logits(2) * torch.ones(2, requires_grad=True)
    with pytest.raises(AttributeError, match="no attribute 'flarp'"):
        _ = make_logits(2).flarp
    assert not hasattr(make_logits(2), "sigmoid")


def test_no_unpacking_into_views_and_no_iteration_over_a_scalar() -> None:
    first, second = make_logits(2, 3)
    assert isinstance(first, SANLogits)
    assert first.shape == second.shape == (3,)
    with pytest.raises(TypeError, match="without dimensions"):
        list(make_logits())


@pytest.mark.parametrize(
    ("fun", "dir_", "error", "words"),
    [
        (torch.zeros(2), torch.zeros(3), ValueError, r"same shape.*\[2\].*\[3\]"),
        (torch.zeros(2), torch.zeros(2).double(), ValueError, "same dtype.*float32.*float64"),
        (torch.zeros(2), torch.zeros(2, device="meta"), ValueError, "same device.*cpu.*meta"),
        (torch.zeros(2), [0.0, 0.0], TypeError, r"SANLogits\.dir is list"),
        (torch.zeros(2).long(), torch.zeros(2).long(), TypeError, r"SANLogits\.fun is torch\.int64"),
    ],
)
def test_unequal_views_are_refused(fun, dir_, error, words) -> None:
    with pytest.raises(error, match=words):
        SANLogits(fun, dir_)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        make_logits(2).fun = torch.zeros(2)


def test_copy_and_pickle() -> None:
    logits = make_logits(2, 3).detach()
    for twin in (copy.copy(logits), copy.deepcopy(logits), pickle.loads(pickle.dumps(logits))):
        assert isinstance(twin, SANLogits)
        assert torch.equal(twin.fun, logits.fun)
        assert torch.equal(twin.dir, logits.dir)
    assert len({logits, copy.copy(logits)}) == 2


class MultiScaleDiscriminator(nn.Module):
    """What a stranger's forward does to its logits, unaware of what they are."""

    def __init__(self, last: type[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2)) for _ in range(2)
        )
        self.last = nn.ModuleList(last(8, 2, 3) for _ in range(2))
        self.register_buffer("level_weights", torch.tensor([1.0, 0.5]))

    def forward(self, images: Tensor) -> Tensor | SANLogits:
        logits = []
        for scale, last, level_weight in zip(self.scales, self.last, self.level_weights, strict=True):
            level = last(scale(images))
            level = level.permute(0, 2, 3, 1).contiguous().view(images.size(0), -1, 2).mean(dim=2)
            logits.append(level * level_weight / 2**0.5)
            images = F.avg_pool2d(images, 2)
        rows = [row.float() for row in torch.cat(logits, dim=1)]
        return torch.stack(rows).unsqueeze(1).squeeze(1)


def test_a_foreign_forward_works_unchanged() -> None:
    torch.manual_seed(0)
    plain = MultiScaleDiscriminator(lambda *sizes: nn.Conv2d(*sizes, bias=False))
    torch.manual_seed(0)
    D = MultiScaleDiscriminator(san.SANConv2d)
    images = torch.randn(2, 3, 16, 16)
    expected, logits = plain(images), D(images)
    assert isinstance(logits, SANLogits)
    for view in (logits.fun, logits.dir):
        torch.testing.assert_close(view, expected, rtol=1e-5, atol=1e-6)
    logits.fun.square().sum().backward()
    assert all(last.weight.grad is None and last.scale.grad.any() for last in D.last)
    assert all(scale[0].weight.grad.any() for scale in D.scales)
    D.zero_grad(set_to_none=True)
    D(images).dir.square().sum().backward()
    assert {n for n, p in D.named_parameters() if p.grad is not None} == {"last.0.weight", "last.1.weight"}
