# SPDX-License-Identifier: MIT
"""Random numbers from counters: their distributions, that nothing but seed, sample and purpose matters, that all do."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from training.draws import Draws

NUM = 4000


def make(seed: int = 0, num: int = NUM, first: int = 0) -> Draws:
    return Draws(seed, np.arange(first, first + num))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


def test_normal_numbers_are_normal():
    values = make().normal("z", 8).double()
    assert values.shape == (NUM, 8) and make().normal("z", 8).dtype == torch.float32
    bound = 4.5 / math.sqrt(values.numel())
    assert abs(values.mean().item()) < bound
    assert abs(values.var().item() - 1) < bound * math.sqrt(2)
    assert abs(values.pow(4).mean().item() - 3) < bound * math.sqrt(96)
    for limit, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        deviation = math.sqrt(share * (1 - share)) * bound
        assert abs((values.abs() < limit).double().mean().item() - share) < deviation


def test_uniform_numbers_are_uniform():
    values = make().uniform("u", 8)
    assert values.min() >= 0 and values.max() < 1
    counts = (values * 20).long().flatten().bincount(minlength=20).double()
    expected = values.numel() / 20
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_integers_are_uniform_and_within_their_bounds():
    values = make().integers("i", -3, 4)
    assert values.dtype == torch.int64 and values.shape == (NUM,)
    counts = (values + 3).bincount(minlength=7).double()
    assert len(counts) == 7
    chi_square = ((counts - NUM / 7) ** 2 / (NUM / 7)).sum().item()
    assert chi_square < 22.5  # 6 degrees of freedom, one in a thousand
    assert torch.equal(make(num=3).integers("i", 5, 6), torch.tensor([5, 5, 5]))


def test_numbers_of_neighbouring_samples_seeds_and_purposes_are_independent():
    bound = 4.5 / math.sqrt(NUM * 4)
    base = make().normal("a", 4)
    others = {
        "samples": make(first=1).normal("a", 4),
        "far samples": make(first=2**40).normal("a", 4),
        "seed": make(seed=1).normal("a", 4),
        "purpose": make().normal("b", 4),
        "scope": make().within("a").normal("a", 4),
        "other places of a sample": make().normal("a", 8)[:, 4:],
    }
    for name, other in others.items():
        assert not torch.equal(other, base), name
        assert abs(correlation(other, base)) < bound, name
    for i, j in itertools.combinations(range(4), 2):
        assert abs(correlation(base[:, i], base[:, j])) < 4.5 / math.sqrt(NUM)


def test_nearby_seeds_and_purposes_do_not_run_into_each_other():
    """Seed 1 with purpose "1/a" and seed 11 with "a" read alike only if they are joined carelessly."""
    draws = [make(1, 4).normal("1/a"), make(11, 4).normal("a"), make(1, 4).normal("1a")]
    draws += [make(1, 4).within("x").normal("y"), make(1, 4).within("y").normal("x")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_a_call_is_a_function_of_its_arguments():
    draws = make(num=5)
    first = [draws.normal("z", 3), draws.uniform("u"), draws.integers("i", 0, 1000)]
    draws.normal("something else", 100)
    again = [draws.normal("z", 3), draws.uniform("u"), draws.integers("i", 0, 1000)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_sample_has_its_numbers_in_any_company():
    draws = make(num=12)
    whole = draws.within("G").normal("z", 2, 3)
    assert torch.equal(torch.cat([draws[:5].within("G").normal("z", 2, 3), whole[5:]]), whole)
    assert torch.equal(draws.within("G")[4:7].normal("z", 2, 3), whole[4:7])
    dealt_out = draws[1::3].within("G")  # to process 1 of 3
    assert torch.equal(dealt_out.normal("z", 2, 3), whole[1::3])
    one = Draws(0, np.array([7])).within("G")
    assert torch.equal(one.normal("z", 2, 3), whole[7:8])
    assert (len(draws), len(draws[3:7]), len(draws[20:])) == (12, 4, 0)
    assert draws[20:].uniform("u", 2).shape == (0, 2)


def test_more_numbers_of_a_sample_begin_with_the_fewer():
    """Each number has a counter of its own below the sample's, so long draws do not reach the next sample's."""
    long = make(num=2).uniform("u", 100_000)
    assert torch.equal(long[:, :4], make(num=2).uniform("u", 4))
    assert not set(long[0, :1000].tolist()) >= set(long[1, :8].tolist())


def test_global_generators_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draws = make(num=3)
    draws.normal("z", 3), draws.uniform("u", 2), draws.integers("i", 0, 9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_numbers_do_not_change_between_versions():
    """A run that goes on with another version of the code must draw the same numbers."""
    draws = Draws(5, np.array([0, 1, 2**40])).within("G")
    assert draws.integers("label", 0, 2**40).tolist() == INTEGERS
    assert draws.uniform("u").tolist() == pytest.approx(UNIFORM, abs=0)
    assert draws.normal("z").tolist() == pytest.approx(NORMAL, rel=1e-6)


INTEGERS = [854449059533, 743268017688, 591943722473]
UNIFORM = [0.07376444339752197, 0.19397294521331787, 0.17021363973617554]
NORMAL = [-0.6004139184951782, 0.10523355007171631, 0.07852089405059814]


@pytest.mark.parametrize("bounds", [(3, 3), (4, 3)])
def test_no_integer_between_the_bounds(bounds):
    with pytest.raises(ValueError, match="low >= high"):
        make(num=1).integers("i", *bounds)


@pytest.mark.parametrize("samples", [np.zeros((2, 2), dtype=np.int64), np.zeros(3), np.array([-1])])
def test_samples_are_places_in_a_sequence(samples):
    with pytest.raises(ValueError, match="samples must be a row of whole numbers from 0 on"):
        Draws(0, samples)
