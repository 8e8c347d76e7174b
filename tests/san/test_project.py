# SPDX-License-Identifier: MIT
"""san.project, the projection-conditional head, against a naive inner product and its gradient by hand.

python -m pytest tests/san/test_project.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import san


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def views() -> tuple[Tensor, san.SANEmbedding, Tensor]:
    torch.manual_seed(3)
    return torch.randn(3, 6, 2, 4, requires_grad=True), san.SANEmbedding(5, 6), torch.tensor([4, 0, 4])


def test_equals_naive_inner_product() -> None:
    h, embed, labels = views()
    with torch.no_grad():
        embed.weight.mul_(1.7)  # the output must not see the stored length
    logits = san.project(h, embed(labels))
    for n, label in enumerate(labels):
        omega = embed.weight[label] / embed.weight[label].norm() * embed.scale[label]
        naive = sum(h[n, c] * omega[c] for c in range(6))
        assert_close(logits.fun[n], naive)
    assert torch.equal(logits.fun, logits.dir)


def test_gradient_routing() -> None:
    h, embed, labels = views()
    r = torch.randn(3, 2, 4)
    logits = san.project(h, embed(labels))
    (logits.fun * r).sum().backward()
    omega = (embed.weight * embed.scale / embed.weight.norm(dim=1, keepdim=True)).detach()[labels]
    assert_close(h.grad, omega[:, :, None, None] * r[:, None])
    assert embed.weight.grad is None
    assert embed.scale.grad[labels].all()
    h.grad, embed.scale.grad = None, None
    (logits.dir * r).sum().backward()
    assert h.grad is None
    assert embed.scale.grad is None
    assert embed.weight.grad[[0, 4]].any(1).all()
    assert not embed.weight.grad[1:4].any()


def test_vectors_and_frozen_embedding() -> None:
    h, embed, labels = views()
    embed.requires_grad_(False)
    vectors = h[:, :, 0, 0]
    logits = san.project(vectors, embed(labels)) / 6**0.5
    assert logits.shape == (3,)
    assert logits.fun.requires_grad
    assert not logits.dir.requires_grad
    assert_close(logits.fun, (vectors * embed(labels).fun).sum(1) / 6**0.5)


def test_a_mapped_label_vector_is_split_into_direction_and_length() -> None:
    h, _, _ = views()
    w = torch.randn(3, 6, requires_grad=True)
    r = torch.randn(3, 2, 4)
    logits = san.project(h, w)
    assert_close(logits.fun, (h * w[:, :, None, None]).sum(1))
    assert torch.equal(logits.fun, logits.dir)
    h_grad, by_fun = torch.autograd.grad((logits.fun * r).sum(), (h, w))
    (by_dir,) = torch.autograd.grad((san.project(h, w).dir * r).sum(), w)
    whole_h, whole_w = torch.autograd.grad(((h * w[:, :, None, None]).sum(1) * r).sum(), (h, w))
    unit = (w / w.norm(dim=1, keepdim=True)).detach()
    assert_close(h_grad, whole_h)
    assert_close(by_fun + by_dir, whole_w)  # the plain gradient, in its radial and its tangential part
    assert_close(by_fun, (by_fun * unit).sum(1, keepdim=True) * unit)
    assert_close((by_dir * unit).sum(1), torch.zeros(3))
    assert torch.autograd.grad(san.project(h, w).dir.sum(), h, allow_unused=True) == (None,)


def test_a_zero_class_vector_is_finite_and_no_grad_shares_the_views() -> None:
    h, _, _ = views()
    w = torch.zeros(3, 6, requires_grad=True)
    logits = san.project(h, w)
    (logits.fun.sum() + logits.dir.sum()).backward()
    assert not logits.fun.any()
    assert w.grad.isfinite().all()
    with torch.no_grad():
        logits = san.project(h, w)
    assert logits.fun.data_ptr() == logits.dir.data_ptr()


def test_features_with_directions_are_refused() -> None:
    h, embed, labels = views()
    with pytest.raises(TypeError, match="keep the layer that makes the features a plain one"):
        san.project(san.SANLogits.plain(h[:, :, 0, 0]), embed(labels))


def test_mismatch_names_both_shapes() -> None:
    h, embed, labels = views()
    with pytest.raises(ValueError, match=r"\(3, 6, 2, 4\).*\(2, 6\)"):
        san.project(h, embed(labels[:2]))
    with pytest.raises(ValueError, match="class vectors must be"):
        san.project(h, embed(labels)[0])
