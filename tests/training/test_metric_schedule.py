# SPDX-License-Identifier: MIT
"""Which metric is computed when, and which result picks the best network."""

from __future__ import annotations

import pytest

from torch_utils.errors import UserError
from training.metric_schedule import (
    ScheduledMetric,
    best_key,
    check_best_key,
    due_metrics,
    parse_schedule,
)


def test_a_number_after_the_colon_is_an_interval() -> None:
    schedule = parse_schedule(["fid50k_full", "pr50k3_full:3", "is50k:2"])
    assert schedule == (
        ScheduledMetric("fid50k_full"),
        ScheduledMetric("pr50k3_full", 3),
        ScheduledMetric("is50k", 2),
    )
    computed = [due_metrics(schedule, number) for number in range(1, 7)]
    assert [len(names) for names in computed] == [1, 2, 2, 2, 1, 3]
    assert [number for number, names in enumerate(computed, 1) if "pr50k3_full" in names] == [3, 6]
    assert due_metrics(schedule, None) == ["fid50k_full", "pr50k3_full", "is50k"]  # at the end


@pytest.mark.parametrize(
    "text", ["fid50k_full:", "fid50k_full:0", "fid50k_full:-1", "fid50k_full:x", "fid50k_full:²"]
)
def test_an_interval_is_a_positive_number(text: str) -> None:
    with pytest.raises(UserError, match="number of snapshots"):
        parse_schedule([text])


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"fid5k.*valid metrics.*fid50k_full"):
        parse_schedule(["fid5k:2"])
    with pytest.raises(UserError, match="is50k twice"):
        parse_schedule(["is50k", "fid50k", "is50k:2"])


def test_the_best_network_follows_the_wanted_result_while_it_can_be_computed() -> None:
    schedule = parse_schedule(["fid50k_full", "pr50k3_full:3", "is50k"])
    assert best_key(None, schedule, ()) == "fid50k_full"
    assert best_key("pr50k3_full_recall", schedule, ()) == "pr50k3_full_recall"
    assert best_key("pr50k3_full_recall", schedule, {"pr50k3_full"}) == "fid50k_full"
    assert best_key(None, schedule, {"fid50k_full"}) == "pr50k3_full_precision"
    assert best_key("is50k_mean", schedule, {"fid50k_full", "pr50k3_full", "is50k"}) is None
    assert best_key(None, (), ()) is None


def test_a_result_that_no_metric_has_is_refused() -> None:
    schedule = parse_schedule(["pr50k3_full"])
    check_best_key("pr50k3_full_recall", schedule)
    with pytest.raises(
        UserError, match=r"pr50k3_full is no result.*pr50k3_full_precision, pr50k3_full_recall"
    ):
        check_best_key("pr50k3_full", schedule)
    with pytest.raises(UserError, match="computes no metric"):
        check_best_key("fid50k_full", ())
