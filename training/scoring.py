# SPDX-License-Identifier: MIT
"""Metrics of one network or one set of images: over seeds, with everything said that a number depends on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from metrics.detectors import MissingDetectorError, get_detector
from metrics.evaluate import MetricResult, OnUnavailable, evaluate
from metrics.feature_cache import default_cache_dir
from metrics.names import get_plan
from metrics.needs import Options, collect_real, find_needs
from metrics.plans import PAPER_FAKES
from metrics.reference_statistics import ReferenceStatistics, write_statistics
from torch_utils.distributed import is_main
from torch_utils.errors import UserError
from torch_utils.growing_file import GrowingFile
from training.metric_records import MetricRecord, metric_file
from training.score_options import ScoreOptions
from training.score_reference import Reference
from training.score_subject import Subject

Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """One metric, once for each seed."""

    metric: str
    results: tuple[MetricResult, ...]  # by seed

    def values(self) -> dict[str, list[float]]:
        """By key, in the order of the seeds."""
        return {key: [result.results[key] for result in self.results] for key in self.results[0].results}

    def means(self) -> dict[str, float]:
        """By key, over seeds."""
        return {key: math.fsum(values) / len(values) for key, values in self.values().items()}

    def spreads(self) -> dict[str, float]:
        """By key, standard deviation over seeds, of the sample (divided by K - 1); {} for one seed."""
        count, means = len(self.results), self.means()
        if count < 2:
            return {}
        return {
            key: math.sqrt(math.fsum((value - means[key]) ** 2 for value in values) / (count - 1))
            for key, values in self.values().items()
        }


@dataclass
class Scores:
    """Everything that one call has found."""

    scores: dict[str, Score] = field(default_factory=dict)  # by metric
    left_out: dict[str, str] = field(default_factory=dict)  # why, by metric
    notes: list[str] = field(default_factory=list)  # what people must know about the numbers
    seconds: float = 0.0  # that it took


def needs_reals(options: ScoreOptions) -> bool:
    """Whether anything that is asked for compares with real images."""
    plans = [get_plan(name) for name in options.metrics]
    return options.nearest_file is not None or any(plan.max_reals != 0 for plan in plans)


def score(subject: Subject, options: ScoreOptions, device: torch.device, say: Say) -> Scores:
    """All metrics, all seeds. Every process calls it and gets the same; the main process adds lines to the run's files.

    say: told what people must know, as soon as it is known. UserError if no metric could be computed.
    """
    found, start = Scores(), time.time()

    def leave_out(name: str, reason: str) -> None:
        reason = reason.removeprefix(f"{name} ")
        is_known = reason in found.left_out.values()
        found.left_out[name] = reason
        say(f"{name}: left out, {'for the same reason' if is_known else reason}")

    names = _possible(subject, options, leave_out)
    check_detector(subject.reference.statistics, options, device, names)
    if options.num_seeds > 1 and subject.num_images is not None:
        found.notes.append(
            "the images stay the same with every seed; only their order and KID's subsets change"
        )
    results: dict[str, list[MetricResult]] = {}
    for seed in range(options.seed, options.seed + options.num_seeds):
        begin = time.time()
        round_found = _score_once(names, subject, options, device, seed, leave_out)
        names = list(round_found)  # what is missing once is missing again
        for name, result in round_found.items():
            results.setdefault(name, []).append(result)
        if is_main():
            _write_records(subject, round_found, time.time() - begin, say)
    found.notes += _count_notes(names, subject, options)
    for note in found.notes:
        say(note)
    found.scores = {name: Score(name, tuple(of_seed)) for name, of_seed in results.items()}
    found.seconds = time.time() - start
    if not found.scores:
        reasons = list(dict.fromkeys(found.left_out.values()))
        more = f" (and {len(reasons) - 1} more, see above)" if len(reasons) > 1 else ""
        raise UserError(f"no metric could be computed; {next(iter(found.left_out))}: {reasons[0]}{more}")
    return found


def _possible(subject: Subject, options: ScoreOptions, leave_out: OnUnavailable) -> list[str]:
    """The metrics for which there is something to compare with; leave_out hears of the others."""
    names = []
    for name in options.metrics:
        if subject.reference.problem is not None and get_plan(name).max_reals != 0:
            leave_out(name, subject.reference.problem)
        else:
            names.append(name)
    return names


def _score_once(
    names: Sequence[str],
    subject: Subject,
    options: ScoreOptions,
    device: torch.device,
    seed: int,
    leave_out: OnUnavailable,
) -> dict[str, MetricResult]:
    """The metrics with one seed, their settings complete."""
    if not names:
        return {}
    limits = [limit for limit in (options.num_images, subject.num_images) if limit is not None]
    results = evaluate(
        names,
        subject.reference.images,
        subject.make_sources(seed),
        device,
        options=Options(seed, min(limits, default=None), options.half_distances),
        detector_paths=options.detector_paths,
        on_unavailable=leave_out,
        show_progress=options.is_verbose,
    )
    return {name: _with_settings(name, result, subject) for name, result in results.items()}


def _with_settings(name: str, result: MetricResult, subject: Subject) -> MetricResult:
    settings = dict(result.settings)
    words = list(subject.unusual)
    if "num_real" in settings:
        settings |= subject.reference.settings
        if subject.reference.statistics is not None:
            settings["num_real"] = subject.reference.statistics.num_images
    else:  # what it is not compared with does not count
        words = [word for word in words if not word.startswith("against ")]
    usual = _usual_count(name, subject.reference)
    if settings["num_generated"] != usual:
        words.insert(0, f"{settings['num_generated']:,} images")
    if settings.get("half_distances"):
        words.append("float16 distances")
    return replace(result, settings=settings | ({"variant": ", ".join(words)} if words else {}))


def _usual_count(name: str, reference: Reference) -> int:
    """Generated images that the metric's name stands for."""
    wanted = get_plan(name).num_fakes
    return min(reference.images.count, PAPER_FAKES) if wanted is None else wanted


def _count_notes(names: Sequence[str], subject: Subject, options: ScoreOptions) -> list[str]:
    """Where fewer images are scored than a metric's name says, or a part of those there are."""
    limits = [limit for limit in (options.num_images, subject.num_images) if limit is not None]
    fewer: dict[tuple[int, int], list[str]] = {}
    parts: dict[int, list[str]] = {}
    for name in names:
        usual = _usual_count(name, subject.reference)
        count = min([usual, *limits])
        if count < usual:
            fewer.setdefault((count, usual), []).append(name)
        if subject.num_images is not None and count < subject.num_images:
            parts.setdefault(count, []).append(name)
    notes = [
        f"WARNING: {', '.join(of_count)}: {count:,} images instead of {usual:,}. The numbers compare with others of "
        f"{count:,} images only, and are recorded as [{count:,} images]"
        for (count, usual), of_count in fewer.items()
    ]
    return notes + [
        f"{', '.join(of_count)}: a random {count:,} of the {subject.num_images:,} images"
        for count, of_count in parts.items()
    ]


def _write_records(subject: Subject, results: dict[str, MetricResult], seconds: float, say: Say) -> None:
    """A line for each metric in the folder of the network's run, if it lies in one."""
    if subject.origin is None or subject.origin.run_dir is None or subject.network_file is None:
        return
    for name, result in results.items():
        record = MetricRecord(
            metric=name,
            results=result.results,
            cur_nimg=subject.origin.cur_nimg,
            network=subject.network_file.name,
            network_sha256=subject.network_sha256,
            seconds=seconds,
            settings=result.settings,
            details=result.details,
        )
        GrowingFile(subject.origin.run_dir / metric_file(name), say).append(record.to_json())


def check_detector(
    statistics: ReferenceStatistics | None, options: ScoreOptions, device: torch.device, names: Sequence[str]
) -> None:
    """UserError if statistics were made with another network of the same name than the one they are compared with."""
    if statistics is None or statistics.detector is None or statistics.detector_fingerprint is None:
        return
    if not any(get_plan(name).detector == statistics.detector for name in names):
        return
    try:
        detector = get_detector(statistics.detector, device, options.detector_paths.get(statistics.detector))
    except MissingDetectorError:
        return  # said when the metrics are computed
    if detector.fingerprint != statistics.detector_fingerprint:
        raise UserError(
            f"--reference {options.reference} was made with other weights or another version of "
            f"{statistics.detector!r} than are here; make it again with --save-statistics"
        )


def save_reference(reference: Reference, options: ScoreOptions, device: torch.device) -> str:
    """Write the statistics of the real images that the metrics compare with; says what they are. Raises UserError.

    Every process calls it.
    """
    plans = [get_plan(name) for name in options.metrics]
    if reference.name is None or reference.statistics is not None:
        raise UserError(f"--save-statistics {options.statistics_file} needs a data set; add --data")
    name = str(plans[0].detector)
    detector = get_detector(name, device, options.detector_paths.get(name))
    needs = [find_needs(plan, reference.images, Options()) for plan in plans]
    requests = {(need.real.detector, need.real.tap): need.real for need in needs if need.real is not None}
    if len({need.real for need in needs}) > len(requests):
        raise UserError(
            "--save-statistics: these metrics compare with different real images; name one of them"
        )
    found = collect_real(needs, reference.images, {name: detector}, default_cache_dir(), options.is_verbose)
    if is_main():
        moments = {kind: found[request] for kind, request in requests.items()}
        write_statistics(
            str(options.statistics_file),
            moments,
            detector.fingerprint,
            reference.images.fingerprint,  # type: ignore[arg-type]
        )
    count = max(need.num_reals for need in needs)
    return f"Wrote {options.statistics_file}: {name!r} features of {count:,} images of {reference.name}"
