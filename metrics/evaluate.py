# SPDX-License-Identifier: MIT
"""Quality metrics of generated images: `evaluate(["fid50k_full", "is50k"], reference, sources)`, in one pass over them.

Knows images, not networks: the reference is a set of uint8 images with a fingerprint, generated images come from
callables that are given the images' numbers. Every process of a run calls `evaluate` and gets the same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from metrics import equivariance, perceptual_path_length
from metrics.detectors import MissingDetectorError, get_detector, get_lpips
from metrics.feature_cache import default_cache_dir
from metrics.feature_set import Features, LoadItems, Request, collect, collect_values
from metrics.names import get_plan
from metrics.needs import ImageSet, Needs, Options, collect_real, find_needs
from metrics.plans import Evidence, Findings, Plan, precision_and_recall
from torch_utils.distributed import barrier, broadcast_object, gather_objects, is_main
from torch_utils.errors import UserError

if TYPE_CHECKING:
    from metrics.features import Detector
    from metrics.lpips import Lpips

OnUnavailable = Callable[[str, str], None]  # (metric, why it cannot be computed)
ResultT = TypeVar("ResultT")
LPIPS = "lpips"  # the one network that compares two images instead of describing one


@dataclass(frozen=True)
class Sources:
    """What generates images. Image number i is the same whatever batch it is asked for in, and on every process."""

    generate: LoadItems  # int64 (n,) -> uint8 (n, C, H, W)
    labels: Callable[[np.ndarray], np.ndarray] | None = None  # class ids of those images; None = no classes
    paths: perceptual_path_length.DrawPaths | None = None  # images near each other on a path; None = cannot
    draw_moved: equivariance.DrawMoved | None = None  # images drawn moved; None = cannot
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # what else numbers depend on: JSON, for the record
    path_settings: Mapping[str, Any] | None = None  # the same for `paths`; None = as `settings`


@dataclass(frozen=True)
class MetricResult:
    """One metric's numbers, and what they depend on."""

    results: dict[str, float]  # by official key
    settings: dict[str, Any]  # JSON values
    details: dict[str, float] = field(default_factory=dict)  # more numbers, such as one per class


@dataclass(frozen=True)
class Detectors:
    """The networks of one call."""

    by_name: dict[str, Detector]  # that describe images
    lpips: Lpips | None = None  # that compares them

    def has(self, name: str | None) -> bool:
        """Whether a metric that uses the network `name` can be computed."""
        return name is None or name in self.by_name or (name == LPIPS and self.lpips is not None)

    def fingerprint(self, name: str) -> str:
        """Of the network `name`."""
        if name == LPIPS:
            assert self.lpips is not None
            return self.lpips.fingerprint
        return self.by_name[name].fingerprint


def evaluate(
    names: Sequence[str],
    reference: ImageSet,
    sources: Sources,
    device: torch.device | str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    detector_paths: Mapping[str, str | Path] | None = None,
    on_unavailable: OnUnavailable | None = None,
    show_progress: bool = True,
) -> dict[str, MetricResult]:
    """Results by metric, in the order of `names`, equal on all processes, which must all call it with equal arguments.

    cache_dir: of features of real images; None = see `default_cache_dir`. detector_paths: weights, by detector.
    on_unavailable: told, on every process, of each metric that is left out because its detector's weights are missing
    (MissingDetectorError without it) or because these sources cannot serve it (UserError). Raises UserError for unknown
    names too. All this comes before any image is made.
    """
    plans = {name: get_plan(name) for name in names}
    options, device = options or Options(), torch.device(device)

    def find_problem(name: str, plan: Plan) -> str | None:
        has_real_classes = reference.labels is not None
        return _source_problem(name, plan, has_real_classes, sources) or _statistics_problem(
            name, plan, reference
        )

    plans = _keep_possible(plans, find_problem, on_unavailable)
    needs = {name: find_needs(plan, reference, options) for name, plan in plans.items()}
    detectors = _load_detectors(plans, device, detector_paths or {}, on_unavailable)
    needs = {name: need for name, need in needs.items() if detectors.has(need.plan.detector)}
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    real = collect_real(needs.values(), reference, detectors.by_name, folder, show_progress)
    requests = [need.fake for need in needs.values() if need.fake is not None]
    used = {request.detector: detectors.by_name[request.detector] for request in requests}
    fake = collect(requests, used, sources.generate, "generated images", show_progress=show_progress)
    others = _measure_paths(needs, sources, detectors.lpips, show_progress)
    others |= _measure_motions(needs, sources, options, show_progress)

    def finish() -> dict[str, MetricResult]:
        results = {}
        for name, need in needs.items():
            if need.fake is None:
                found = _summarise(need.plan, others[name])
            else:
                found = _apply(need, fake, real, reference, sources, device, options)
            values = dict(zip(need.plan.keys(name), found.values, strict=True))
            settings = _describe(need, reference, sources, options, detectors)
            results[name] = MetricResult(values, settings, found.details)
        return results

    return _on_main(finish)


def check_available(
    names: Sequence[str],
    has_real_classes: bool,
    sources: Sources,
    device: torch.device | str,
    on_unavailable: OnUnavailable,
) -> None:
    """Tell on_unavailable now of the metrics that `evaluate` would leave out; download what the others need.

    All processes call it. has_real_classes: whether the real images have labels. Raises UserError for unknown names.
    """
    plans = {name: get_plan(name) for name in names}
    plans = _keep_possible(
        plans, lambda name, plan: _source_problem(name, plan, has_real_classes, sources), on_unavailable
    )
    _load_detectors(plans, torch.device(device), {}, on_unavailable)


def _keep_possible(
    plans: Mapping[str, Plan],
    find_problem: Callable[[str, Plan], str | None],
    on_unavailable: OnUnavailable | None,
) -> dict[str, Plan]:
    """The plans without a problem; on_unavailable hears of the others, or UserError is raised."""
    possible = {}
    for name, plan in plans.items():
        problem = find_problem(name, plan)
        if problem is None:
            possible[name] = plan
        elif on_unavailable is None:
            raise UserError(f"{problem}; leave it out")
        else:
            on_unavailable(name, problem)
    return possible


def _source_problem(name: str, plan: Plan, has_real_classes: bool, sources: Sources) -> str | None:
    """Why these sources cannot serve a metric; None if they can."""
    if plan.uses_labels and (sources.labels is None or not has_real_classes):
        return f"{name} compares class by class; it needs a network and a data set with classes"
    if plan.detector == LPIPS and sources.paths is None:
        return f"{name} walks through style vectors, and these images have none"
    if plan.motion is not None and sources.draw_moved is None:
        return f"{name} moves StyleGAN3's Fourier features, and these images have none"
    return None


def _statistics_problem(name: str, plan: Plan, reference: ImageSet) -> str | None:
    """Why a metric cannot be computed from reference statistics alone, where there is nothing else."""
    if reference.statistics is None or plan.max_reals == 0:
        return None
    if plan.keeps != "moments":
        return f"{name} compares images one by one, and reference statistics hold none"
    if (plan.detector, plan.tap) not in reference.statistics:
        return f"{name} needs statistics of {plan.detector}'s {plan.tap}, which the file does not hold"
    return None


def _load_detectors(
    plans: Mapping[str, Plan],
    device: torch.device,
    paths: Mapping[str, str | Path],
    on_unavailable: OnUnavailable | None,
) -> Detectors:
    """The networks of all plans that are there on every process; on_unavailable hears of the others."""
    by_name: dict[str, Detector] = {}
    lpips: Lpips | None = None
    for name in dict.fromkeys(plan.detector for plan in plans.values() if plan.detector is not None):
        network, problem = _load_network(name, device, paths.get(name))
        if isinstance(problem, MissingDetectorError) and on_unavailable is not None:
            for metric, plan in plans.items():
                if plan.detector == name:
                    on_unavailable(metric, str(problem))
        elif problem is not None:
            raise problem
        elif name == LPIPS:
            lpips = network  # type: ignore[assignment]
        else:
            by_name[name] = network  # type: ignore[assignment]
    return Detectors(by_name, lpips)


def _load_network(
    name: str, device: torch.device, path: str | Path | None
) -> tuple[Detector | Lpips | None, UserError | None]:
    """The network, or the first process's problem with it. The main process goes first: it may have to download."""
    network, problem = None, None
    for is_mains_turn in (True, False):
        if is_main() == is_mains_turn:
            try:
                network = get_lpips(device, path) if name == LPIPS else get_detector(name, device, path)
            except UserError as error:
                problem = error
        barrier()
    return network, next((found for found in gather_objects(problem) if found is not None), None)


def _measure_paths(
    needs: Mapping[str, Needs], sources: Sources, lpips: Lpips | None, show_progress: bool
) -> dict[str, Tensor]:
    """Distances along paths, on the main process."""
    found = {}
    for name, need in needs.items():
        if need.plan.detector == LPIPS:
            assert sources.paths is not None and lpips is not None
            measure = perceptual_path_length.as_measure(sources.paths, lpips.distance)
            found[name] = collect_values(need.num_fakes, measure, "paths", show_progress)
    return {name: distances for name, distances in found.items() if distances is not None}


def _measure_motions(
    needs: Mapping[str, Needs], sources: Sources, options: Options, show_progress: bool
) -> dict[str, Tensor]:
    """Errors of equivariance, all in one pass, on the main process."""
    kinds = {name: need.plan.motion for name, need in needs.items() if need.plan.motion is not None}
    if not kinds:
        return {}
    assert sources.draw_moved is not None
    num_images = max(needs[name].num_fakes for name in kinds)
    measure = equivariance.as_measure(tuple(kinds.values()), sources.draw_moved, num_images, options.seed)
    errors = collect_values(equivariance.num_motions(num_images), measure, "motions", show_progress)
    return {} if errors is None else dict(zip(kinds, errors.split(2, dim=1), strict=True))


def _summarise(plan: Plan, values: Tensor) -> Findings:
    """The result of a metric that is no function of features, from what its pass gave."""
    if plan.motion is not None:
        return Findings((equivariance.psnr(values),))
    return Findings((perceptual_path_length.trimmed_mean(values[:, 0].numpy()),))


def _apply(
    need: Needs,
    fake: Mapping[Request, Features],
    real: Mapping[Request, Features],
    reference: ImageSet,
    sources: Sources,
    device: torch.device,
    options: Options,
) -> Findings:
    """The formula of a metric of features."""
    assert need.plan.formula is not None and need.fake is not None
    fake_labels = real_labels = None
    if need.plan.uses_labels:
        assert sources.labels is not None and reference.labels is not None and need.real is not None
        fake_labels = sources.labels(need.fake.selection.items)
        real_labels = reference.labels[need.real.selection.items % reference.count]
    return need.plan.formula(
        Evidence(
            fake=fake[need.fake],
            real=None if need.real is None else real[need.real],
            subsets=need.subsets,
            fake_labels=fake_labels,
            real_labels=real_labels,
            device=device,
            half=options.half_distances,
        )
    )


def _describe(
    need: Needs, reference: ImageSet, sources: Sources, options: Options, detectors: Detectors
) -> dict[str, Any]:
    """What a result depends on beside the network."""
    settings: dict[str, Any] = {"num_generated": need.num_fakes}
    if need.num_reals:
        is_mirrored = need.plan.uses_mirrored and reference.is_mirrored
        settings |= {"num_real": need.num_reals, "real_mirrored": is_mirrored}
        settings["data_fingerprint"] = reference.fingerprint
    if need.plan.detector is not None:
        name = need.plan.detector
        settings |= {"detector": name, "detector_fingerprint": detectors.fingerprint(name)}
    if need.subsets or need.plan.motion is not None:
        settings["metric_seed"] = options.seed
    if need.plan.formula is precision_and_recall:
        settings["half_distances"] = options.half_distances
    if need.plan.detector == LPIPS and sources.path_settings is not None:
        return settings | dict(sources.path_settings)
    return settings | dict(sources.settings)


def _on_main(work: Callable[[], ResultT]) -> ResultT:
    """What `work` gives or raises on the main process, on every process."""
    outcome: ResultT | Exception | None = None
    if is_main():
        try:
            outcome = work()
        except Exception as error:  # it is raised below, everywhere: nobody is left waiting
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
