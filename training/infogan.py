# SPDX-License-Identifier: MIT
"""InfoGAN's mutual information between codes and images (arXiv:1606.03657, Eq. 4), as pure functions.

L_I = E[log Q(c | G(z, c))] + H(c) is a lower bound on I(c; G(z, c)), tight when Q is the true posterior. G and Q
maximise it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_LOG_STD = -5.0  # Q may not claim to know a continuous code better than to exp(-5) = 0.7 %


def categorical_information(codes: Tensor, logits: Tensor) -> Tensor:
    """log Q(c | x) + H(c) of each image in nats, (N,); at most H(c) = log(num_categories), and 0 for a Q that guesses.

    codes: one-hot (N, num_categories), uniformly distributed; logits: of Q, the same shape.
    """
    return (codes * F.log_softmax(logits, dim=1)).sum(1) + math.log(codes.shape[1])


def continuous_information(codes: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log Q(c | x) + H(c) of each image in nats, summed over codes, (N,). Q is a normal distribution per code.

    codes: U(-1, 1), whose entropy is log 2 each; mean, log_std: of Q. All (N, num_continuous).
    """
    log_std = log_std.clamp_min(MIN_LOG_STD)
    log_q = -0.5 * ((codes - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_q + math.log(2)).sum(1)
