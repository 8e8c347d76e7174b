# SPDX-License-Identifier: MIT
"""Which metrics are computed at which snapshots, and which of their results picks best_model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from training.config import ConfigError


@dataclass(frozen=True)
class ScheduledMetric:
    """A metric of a run."""

    name: str  # in metrics.names.METRICS
    every: int = 1  # snapshots from one evaluation to the next; the last snapshot always counts


def parse_metric(text: str) -> ScheduledMetric:
    """ "fid50k_full", or "pr50k3_full:5" for every fifth snapshot. Raises ConfigError for what is neither."""
    name, colon, every = text.partition(":")
    if colon and not (every.isascii() and every.isdigit() and int(every) > 0):
        raise ConfigError(
            f"--metrics {text}: after the colon comes a number of snapshots, as in {name}:5 for every fifth"
        )
    return ScheduledMetric(name, int(every) if colon else 1)


def parse_schedule(texts: Sequence[str]) -> tuple[ScheduledMetric, ...]:
    """The metrics of a run as `TrainConfig.metrics` has them. Raises ConfigError, and UserError for unknown names."""
    if not texts:
        return ()
    from metrics.names import get_plan  # training without metrics must not need the package

    schedule = tuple(map(parse_metric, texts))
    for metric in schedule:
        get_plan(metric.name)
        if [other.name for other in schedule].count(metric.name) > 1:
            raise ConfigError(f"--metrics names {metric.name} twice; once is enough")
    return schedule


def due_metrics(schedule: Sequence[ScheduledMetric], snapshot_number: int | None) -> list[str]:
    """Names of the metrics to compute at the snapshot of this number, from 1 on; None = at all of them."""
    return [m.name for m in schedule if snapshot_number is None or snapshot_number % m.every == 0]


def check_best_key(key: str, schedule: Sequence[ScheduledMetric]) -> None:
    """Raise ConfigError unless `key` is a result of one of the metrics."""
    from metrics.names import get_plan

    keys = [key for metric in schedule for key in get_plan(metric.name).keys(metric.name)]
    if key not in keys:
        known = ", ".join(keys) or "none, as the run computes no metric"
        raise ConfigError(f"--best-by {key} is no result of the run's metrics; their results are: {known}")


def best_key(wanted: str | None, schedule: Sequence[ScheduledMetric], missing: Collection[str]) -> str | None:
    """The result that picks best_model: the wanted one, else the first of the first metric that can be computed.

    missing: names of metrics that cannot. None where no metric is left.
    """
    if not schedule:
        return None
    from metrics.names import get_plan

    keys = [get_plan(m.name).keys(m.name) for m in schedule if m.name not in missing]
    if wanted is not None and any(wanted in of_metric for of_metric in keys):
        return wanted
    return keys[0][0] if keys else None
