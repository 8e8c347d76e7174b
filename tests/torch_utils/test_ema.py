# SPDX-License-Identifier: MIT
"""Moving average of weights: the official decay table, the half-life it is named after, parameters and buffers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_utils.ema import ema_beta, update_ema_

DATA = Path(__file__).parents[1] / "data"


def test_decay_matches_the_official_table():
    with np.load(DATA / "d_loss_san.npz") as data:
        table = data["ema_beta_table"]
    assert len(table) == 18
    for batch_size, cur_nimg, with_rampup, without in table:
        halflife_kimg = batch_size * 10 / 32
        arguments = (int(batch_size), int(cur_nimg), halflife_kimg)
        np.testing.assert_allclose(ema_beta(*arguments, rampup=0.05), with_rampup, rtol=1e-12)
        np.testing.assert_allclose(ema_beta(*arguments, rampup=None), without, rtol=1e-12)


def test_half_of_a_weight_is_forgotten_after_one_half_life():
    decays = [ema_beta(batch_size=100, cur_nimg=n, halflife_kimg=2, rampup=None) for n in range(0, 2000, 100)]
    assert np.prod(decays) == pytest.approx(0.5)


def test_first_update_copies():
    live, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    update_ema_(ema, live, ema_beta(batch_size=4, cur_nimg=0, halflife_kimg=1, rampup=0.05))
    assert torch.equal(ema.weight, live.weight) and torch.equal(ema.bias, live.bias)


def test_parameters_move_and_buffers_are_copied():
    live, ema = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        live.weight.fill_(5.0)
    live(torch.randn(8, 3) + 7)
    update_ema_(ema, live, 0.75)
    torch.testing.assert_close(ema.weight, torch.full((3,), 0.75 * 1 + 0.25 * 5).requires_grad_())
    assert torch.equal(ema.running_mean, live.running_mean) and ema.num_batches_tracked == 1
    assert ema.running_mean.data_ptr() != live.running_mean.data_ptr()
    torch.testing.assert_close(live.weight.detach(), torch.full((3,), 5.0))


def test_frozen_average_of_a_trained_network():
    live, ema = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    before = ema.weight.clone()
    update_ema_(ema, live, 0.5)
    torch.testing.assert_close(ema.weight, (before + live.weight).detach() / 2)
    assert not ema.weight.requires_grad and ema.weight.grad_fn is None


def test_networks_that_differ_are_refused():
    with pytest.raises(ValueError, match="zip"):
        update_ema_(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)


def test_all_parameters_at_once_move_as_each_would():
    torch.manual_seed(0)
    live = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    ema = copy.deepcopy(live).requires_grad_(False)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.normal_()
    expected = [a.lerp(b.detach(), 1 - 0.9) for a, b in zip(ema.parameters(), live.parameters(), strict=True)]
    update_ema_(ema, live, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), expected, strict=True))
