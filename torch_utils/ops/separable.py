# SPDX-License-Identifier: MIT
"""Two-dimensional filters as sums of separable ones, by the singular value decomposition.

The radial filters of stylegan3-r are nearly separable: two to five terms of their twelve reach float32 rounding.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

# Neglected, relative to the norm: below the rounding of half-precision taps; that of float32 taps themselves.
TOLERANCES = {torch.float16: 2.0**-13, torch.bfloat16: 2.0**-10, torch.float32: 2.0**-24}


class SeparableTerms(NamedTuple):
    """`y.T @ x` is the filter: `(terms, taps_y)` and `(terms, taps_x)`, float32, the largest term first."""

    y: Tensor
    x: Tensor


class _Entry(NamedTuple):
    source: weakref.ref  # a filter ...
    state: tuple  # ... as it was
    terms: SeparableTerms


_cache: dict[tuple[int, torch.dtype], _Entry] = {}


def separable_terms(f: Tensor, dtype: torch.dtype) -> SeparableTerms:
    """Terms of a `(taps_y, taps_x)` filter, as many as matter to images of `dtype`, on the device of `f`.

    Remembered until `f` is changed or gone: finding them waits for the GPU.
    """
    if f.is_inference():  # such tensors do not count their changes
        return _decompose(f, dtype)
    key, state = (id(f), dtype), (f._version, f.data_ptr())
    entry = _cache.get(key)
    if entry is None or entry.source() is not f or entry.state != state:
        entry = _Entry(weakref.ref(f, lambda _: _cache.pop(key, None)), state, _decompose(f, dtype))
        _cache[key] = entry
    return entry.terms


def _decompose(f: Tensor, dtype: torch.dtype) -> SeparableTerms:
    u, s, vt = torch.linalg.svd(f.detach().double().cpu(), full_matrices=False)
    neglected = s.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of the terms from each on
    num_terms = max(int((neglected > TOLERANCES[dtype] * neglected[0]).sum()), 1)
    scale = s[:num_terms].sqrt()
    factors = (u[:, :num_terms] * scale).t(), vt[:num_terms] * scale[:, None]
    return SeparableTerms(*(factor.to(f.device, torch.float32).contiguous() for factor in factors))
