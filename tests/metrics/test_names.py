# SPDX-License-Identifier: MIT
"""Names of metrics: the official ones with their keys, and which values are better."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from metrics.detectors import DETECTORS
from metrics.evaluate import LPIPS
from metrics.names import METRICS, get_plan, is_better, is_higher_better
from torch_utils.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")


def test_all_official_names_are_there_with_their_keys():
    official = json.loads(str(GOLDEN["metric_names"]))
    assert list(METRICS)[: len(official)] == official
    assert get_plan("pr50k3_full").keys("pr50k3_full") == ("pr50k3_full_precision", "pr50k3_full_recall")
    assert get_plan("is50k").keys("is50k") == ("is50k_mean", "is50k_std")
    assert all(get_plan(name).keys(name) == (name,) for name in official if name[:2] not in ("pr", "is"))


def test_keys_and_detectors_are_known_and_keys_differ():
    keys = [key for name, plan in METRICS.items() for key in plan.keys(name)]
    assert len(set(keys)) == len(keys)
    assert {plan.detector for plan in METRICS.values()} <= {None, LPIPS, *DETECTORS}


@pytest.mark.parametrize(
    ("key", "higher"),
    [
        ("fid50k_full", False),
        ("kid50k", False),
        ("ppl2_wend", False),
        ("is50k_mean", True),
        ("pr50k3_full_recall", True),
        ("eqr50k", True),
        ("dc5_lite0_coverage", True),
        ("of no metric", False),
    ],
)
def test_which_value_is_better(key, higher):
    assert is_higher_better(key) == higher
    assert is_better(key, 2, 1) == higher and is_better(key, 1, 2) != higher and not is_better(key, 1, 1)
    assert is_better(key, 5, math.nan) and not is_better(key, math.nan, 5)
    assert not is_better(key, math.nan, math.nan)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="'fid' is not available; valid metrics: fid50k_full"):
        get_plan("fid")
