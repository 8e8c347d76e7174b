# SPDX-License-Identifier: MIT
"""Statistics between two reports: moments against NumPy, one value, order, starting afresh, no graph kept."""

import numpy as np
import pytest
import torch

from torch_utils.stats import StatsCollector


def test_moments_of_everything_reported():
    stats, parts = StatsCollector(), [torch.randn(3, 4), torch.randn(()), torch.randn(5)]
    for part in parts:
        stats.report("a", part)
    expected = torch.cat([part.reshape(-1) for part in parts]).numpy()
    (result,) = stats.flush().values()
    assert result["num"] == 18
    np.testing.assert_allclose(result["mean"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["std"], expected.std(), rtol=1e-5)


def test_numbers_and_other_types():
    stats = StatsCollector()
    for value in (2, 3.0, torch.tensor([4, 5]), torch.tensor(True), torch.tensor(6.0, dtype=torch.float64)):
        stats.report("a", value)
    assert stats.flush()["a"]["mean"] == pytest.approx(21 / 6)


def test_one_value_has_no_deviation_and_equal_values_a_zero_one():
    stats = StatsCollector()
    stats.report("one", 0.1)
    for _ in range(1000):
        stats.report("equal", 0.1)
    result = stats.flush()
    assert result["one"] == {"num": 1, "mean": pytest.approx(0.1), "std": 0.0}
    assert result["equal"]["std"] == pytest.approx(0, abs=2e-3)  # float32 moments


def test_flush_starts_afresh_and_keeps_the_order_of_first_use():
    stats = StatsCollector()
    for name in ("b", "a", "b"):
        stats.report(name, 1)
    assert list(stats.flush()) == ["b", "a"]
    assert stats.flush() == {}
    stats.report("a", 2)
    assert stats.flush() == {"a": {"num": 1, "mean": 2.0, "std": 0.0}}


def test_reporting_keeps_no_graph_and_leaves_the_values_alone():
    stats, x = StatsCollector(), torch.ones(3, requires_grad=True)
    y = 2 * x
    stats.report("a", y)
    stats.report("a", y)
    assert all(not moments.requires_grad for moments in stats._moments.values())
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_values_that_are_not_finite_show():
    stats = StatsCollector()
    stats.report("a", torch.tensor([1.0, float("nan")]))
    assert np.isnan(stats.flush()["a"]["mean"])


def test_nothing_reserves_the_name_and_is_left_out():
    stats = StatsCollector()
    stats.report("a", torch.tensor([]))
    stats.report("b", 1.0)
    assert list(stats.flush()) == ["b"]
    stats.report("a", torch.tensor([]))
    stats.report("b", 1.0)
    stats.report("a", torch.tensor([2.0, 4.0]))
    result = stats.flush()
    assert list(result) == ["a", "b"]
    assert result["a"] == {"num": 2, "mean": 3.0, "std": 1.0}


def test_a_state_takes_unflushed_values_along():
    stats, other = StatsCollector(), StatsCollector()
    stats.report("b", torch.tensor([1.0, 2.0]))
    stats.report("a", torch.tensor([]))
    other.report("of before", 1.0)
    other.load_state_dict(stats.state_dict())
    for collector in (stats, other):
        collector.report("b", 0.1)
        collector.report("c", 7)
    assert stats.state_dict()["names"] == ["b", "a", "c"]
    assert stats.flush() == other.flush() != {}
    other.load_state_dict(StatsCollector().state_dict())
    assert other.flush() == {}


def test_a_state_of_several_processes_is_summed_by_one():
    moments = torch.tensor([[[2.0, 3.0, 5.0]], [[1.0, 10.0, 100.0]]])  # (processes, names, 3)
    stats = StatsCollector()
    stats.load_state_dict({"names": ["a"], "moments": moments})
    assert stats.flush()["a"] == {"num": 3, "mean": 13 / 3, "std": pytest.approx((35 - (13 / 3) ** 2) ** 0.5)}
