# SPDX-License-Identifier: MIT
"""Two-dimensional filters as sums of separable ones: exactness, number of terms, what is remembered."""

from __future__ import annotations

import gc

import pytest
import torch

from torch_utils.ops import separable
from torch_utils.ops.filters import design_lowpass_filter
from torch_utils.ops.separable import separable_terms

RADIAL = {"numtaps": 12, "width": 5.0, "fs": 32, "radial": True}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (12, 12), (24, 7)])
def test_terms_add_up_to_the_filter(shape):
    f = torch.randn(shape)
    terms = separable_terms(f, torch.float32)
    assert terms.y.shape[1] == shape[0] and terms.x.shape[1] == shape[1]
    torch.testing.assert_close(terms.y.t() @ terms.x, f, rtol=0, atol=1e-6 * f.abs().max().item())


@pytest.mark.parametrize("cutoff", [2.0, 4.0, 8.0])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 6e-8), (torch.float16, 2e-4), (torch.bfloat16, 1e-3)]
)
def test_radial_filters_need_few_terms(cutoff, dtype, error):
    f = design_lowpass_filter(cutoff=cutoff, **RADIAL).double()
    terms = separable_terms(f, dtype)
    residual = torch.linalg.norm(terms.y.double().t() @ terms.x.double() - f) / torch.linalg.norm(f)
    assert residual <= error + 1e-7  # the second: rounding of the terms
    assert len(terms.y) <= (6 if dtype == torch.float32 else 4)


def test_a_product_is_one_term_and_nothing_is_one_term():
    assert len(separable_terms(torch.outer(torch.rand(5), torch.rand(7)), torch.float32).y) == 1
    assert separable_terms(torch.zeros(3, 3), torch.float32).y.eq(0).all()


def test_remembered_until_the_filter_changes_or_goes(monkeypatch):
    calls = []
    decompose = separable._decompose
    monkeypatch.setattr(separable, "_decompose", lambda *a: calls.append(1) or decompose(*a))
    f = torch.rand(4, 4)
    assert separable_terms(f, torch.float32) is separable_terms(f, torch.float32)
    separable_terms(f, torch.float16)
    assert len(calls) == 2
    f.mul_(2)
    terms = separable_terms(f, torch.float32)
    assert len(calls) == 3
    torch.testing.assert_close(terms.y.t() @ terms.x, f)
    key = id(f), torch.float32
    assert key in separable._cache
    del f
    gc.collect()
    assert key not in separable._cache


def test_filters_made_in_inference_mode():
    with torch.inference_mode():
        f = torch.rand(3, 3)
        f.mul_(2)
        terms = separable_terms(f, torch.float32)
        torch.testing.assert_close(terms.y.t() @ terms.x, f)
