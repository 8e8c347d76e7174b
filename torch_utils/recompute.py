# SPDX-License-Identifier: MIT
"""Activations that the backward pass computes again instead of keeping them: memory for time (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *arguments: Tensor | bool | str) -> Any:
    """`function(*arguments)`; of what it needs for its backward pass only the arguments are kept.

    function: the same result at every call, without random numbers, and without a trace but its result, since
    gradients of any order may run it again. Where no gradient is wanted, a plain call.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
