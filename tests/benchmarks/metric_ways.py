# SPDX-License-Identifier: MIT
"""What tests/benchmarks/metrics.py times: inputs, and ways of computing the same from them.

The official formulas are written out from their definitions, with whole matrices and SciPy's matrix square root.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are."""

    dim: int = 2048  # of Inception's features
    num_spectrum: int = 6000  # images behind a covariance of full rank
    num_few: int = 500  # images behind one that is rank deficient
    num_moments: int = 10_000  # features whose mean and covariance are taken
    num_kid: int = 5000  # features of either set
    num_subsets: int = 50  # of KID; officially 100
    subset_size: int = 1000  # likewise
    num_neighbours: int = 8_000  # features of either set, for precision, recall, density and coverage
    vgg_dim: int = 4096  # of VGG16's features
    num_probabilities: int = 50_000  # images of the inception score
    num_images: int = 50  # of either folder


QUICK = Sizes(64, 200, 30, 500, 200, 5, 100, 300, 64, 500, 12)


# Inputs, the same for all rows of a task.


def make_covariances(sizes: Sizes, num_images: int) -> Arrays:
    """Two covariances with a decaying spectrum, and the trace of their root from the factors they are made of."""
    rng = np.random.default_rng(0)
    scales = np.exp(-np.arange(sizes.dim) / (sizes.dim / 6))[:, None]
    factors = [scales * rng.standard_normal((sizes.dim, num_images)) / num_images**0.5 for _ in range(2)]
    cov1, cov2 = (factor @ factor.T for factor in factors)
    thin = [np.linalg.qr(factor.T, mode="r").T for factor in factors]  # F F^T = R^T R
    truth = np.linalg.svd(thin[0].T @ thin[1], compute_uv=False).sum()
    return {"cov1": cov1, "cov2": cov2, "truth": np.array(truth)}


def make_features(count: int, dim: int) -> Arrays:
    """Two sets of correlated, non-negative features, as networks that end in a ReLU give them."""
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((64, dim), dtype=np.float32)

    def draw(shift: float) -> np.ndarray:
        x = rng.standard_normal((count, 64), dtype=np.float32) @ mixing / 8
        return np.maximum(x + 0.3 * rng.standard_normal((count, dim), dtype=np.float32) + shift, 0)

    return {"fake": draw(0.05), "real": draw(0.0)}


def make_logits(sizes: Sizes) -> Arrays:
    rng = np.random.default_rng(2)
    return {"logits": 3 * rng.standard_normal((sizes.num_probabilities, 1008), dtype=np.float32)}


def make_images(sizes: Sizes, folder: Path) -> Arrays:
    """Two folders of smooth pictures, and random weights of Inception in torch-fidelity's format."""
    rng = np.random.default_rng(3)
    for name, level in (("fake", 90), ("real", 128)):
        (folder / name).mkdir()
        for i in range(sizes.num_images):
            coarse = rng.normal(level, 60, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(
                folder / name / f"{i:05d}.png"
            )
    torch.save(random_inception(), folder / "inception.pth")
    return {"folder": np.array(str(folder))}


def random_inception() -> dict[str, torch.Tensor]:
    from metrics.inception import InceptionTrunk, torch_layer_names

    torch.manual_seed(4)
    with torch.device("meta"):
        layers = [m for m in InceptionTrunk().modules() if isinstance(m, torch.nn.Conv2d)]
    tensors = {"fc.weight": torch.randn(1008, 2048) / 45, "fc.bias": torch.zeros(1008)}
    for name, layer in zip(torch_layer_names(), layers, strict=True):
        shape, unit = layer.weight.shape, name.removesuffix("conv")
        tensors[f"{unit}conv.weight"] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensors[f"{unit}bn.{key}"] = torch.full((shape[0],), value)
        tensors[f"{unit}bn.num_batches_tracked"] = torch.tensor(0)
    return tensors


# Ways of computing; each imports what it uses again, which `Way.needs` has loaded before the clock starts.


def trace_ours(x: Arrays, sizes: Sizes) -> float:
    from metrics.frechet import trace_of_root

    return trace_of_root(torch.from_numpy(x["cov1"]), torch.from_numpy(x["cov2"]))


def trace_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    stats = [{"mu": np.zeros(sizes.dim), "sigma": x[name]} for name in ("cov1", "cov2")]
    distance = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    return (np.trace(x["cov1"]) + np.trace(x["cov2"]) - distance) / 2


def trace_clean(x: Arrays, sizes: Sizes) -> float:
    from cleanfid.fid import frechet_distance

    zeros = np.zeros(sizes.dim)
    return (
        np.trace(x["cov1"]) + np.trace(x["cov2"]) - frechet_distance(zeros, x["cov1"], zeros, x["cov2"])
    ) / 2


def trace_naive(x: Arrays, sizes: Sizes) -> float:
    import scipy.linalg

    return float(np.real(np.trace(scipy.linalg.sqrtm(x["cov1"] @ x["cov2"]))))


def moments_ours(x: Arrays, sizes: Sizes) -> float:
    from metrics.feature_stats import FeatureStats

    stats = FeatureStats()
    for batch in torch.from_numpy(x["real"]).split(64):
        stats.append(batch)
    return float(stats.covariance().trace())


def moments_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    biased = (len(x["real"]) - 1) / len(x["real"])
    return float(np.trace(fid_features_to_statistics(torch.from_numpy(x["real"]))["sigma"])) * biased


def moments_naive(x: Arrays, sizes: Sizes) -> float:
    features, dim = x["real"], x["real"].shape[1]
    total, outer = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, len(features), 64):
        batch = features[start : start + 64].astype(np.float64)
        total += batch.sum(axis=0)
        outer += batch.T @ batch
    mean = total / len(features)
    return float(np.trace(outer / len(features) - np.outer(mean, mean)))


def kid_ours(x: Arrays, sizes: Sizes) -> float:
    from metrics.kernel import draw_subsets, kernel_distance

    fake, real = torch.from_numpy(x["fake"]), torch.from_numpy(x["real"])
    subsets = draw_subsets(len(fake), len(real), 0, sizes.num_subsets, sizes.subset_size)
    return kernel_distance(fake, real, subsets)


def kid_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    options |= {"kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    found = kid_features_to_metric(
        torch.from_numpy(x["fake"]),
        torch.from_numpy(x["real"]),
        kid_subsets=sizes.num_subsets,
        kid_subset_size=sizes.subset_size,
        **options,
    )
    return found["kernel_inception_distance_mean"]


def kid_clean(x: Arrays, sizes: Sizes) -> float:
    from cleanfid.fid import kernel_distance

    np.random.seed(0)
    return kernel_distance(x["real"], x["fake"], sizes.num_subsets, sizes.subset_size)


def kid_naive(x: Arrays, sizes: Sizes) -> float:
    fake, real, m, total = x["fake"], x["real"], sizes.subset_size, 0.0
    rng = np.random.RandomState(0)
    for _ in range(sizes.num_subsets):
        a, b = (features[rng.choice(len(features), m, replace=False)] for features in (fake, real))
        within = (a @ a.T / a.shape[1] + 1) ** 3 + (b @ b.T / b.shape[1] + 1) ** 3
        across = (a @ b.T / a.shape[1] + 1) ** 3
        total += (within.sum() - np.diag(within).sum()) / (m - 1) - across.sum() * 2 / m
    return float(total / sizes.num_subsets / m)


def pr_ours(x: Arrays, sizes: Sizes, half: bool = False) -> float:
    from metrics.precision_recall import precision_recall

    return precision_recall(torch.from_numpy(x["fake"]), torch.from_numpy(x["real"]), half=half).recall


def pr_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    return prc_features_to_metric(torch.from_numpy(x["fake"]), torch.from_numpy(x["real"]), **options)[
        "recall"
    ]


def pr_naive(x: Arrays, sizes: Sizes) -> float:
    """Features and distances in float16, as officially; products in float32, as a CPU has no others."""
    fake, real = (torch.from_numpy(x[name]).half() for name in ("fake", "real"))
    shares = []
    for manifold, probes in ((real, fake), (fake, real)):
        limits = torch.cdist(manifold.float(), manifold.float()).half().kthvalue(4, dim=1).values
        distances = torch.cdist(probes.float(), manifold.float()).half()
        shares.append(float((distances <= limits).any(dim=1).float().mean()))
    return shares[1]


def coverage_ours(x: Arrays, sizes: Sizes) -> float:
    from metrics.precision_recall import density_coverage

    return density_coverage(torch.from_numpy(x["fake"]), torch.from_numpy(x["real"])).coverage


def coverage_naive(x: Arrays, sizes: Sizes) -> float:
    fake, real = torch.from_numpy(x["fake"]), torch.from_numpy(x["real"])
    limits = torch.cdist(real, real).kthvalue(6, dim=1).values
    return float((torch.cdist(real, fake) < limits[:, None]).any(dim=1).float().mean())


def score_ours(x: Arrays, sizes: Sizes) -> float:
    from metrics.inception_score import inception_score

    return inception_score(torch.from_numpy(x["logits"]).softmax(dim=1)).mean


def score_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity.metric_isc import isc_features_to_metric

    return isc_features_to_metric(torch.from_numpy(x["logits"]), splits=10, shuffle=False)[
        "inception_score_mean"
    ]


def score_naive(x: Arrays, sizes: Sizes) -> float:
    p, scores = torch.from_numpy(x["logits"]).softmax(dim=1).numpy(), []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def load_folder(folder: Path, items: np.ndarray) -> torch.Tensor:
    images = [np.array(Image.open(folder / f"{i:05d}.png")) for i in items]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def fid_ours(x: Arrays, sizes: Sizes, name: str = "fid50k_full", detector: str = "inception") -> float:
    from metrics.evaluate import ImageSet, Options, Sources, evaluate

    folder, count = Path(str(x["folder"])), sizes.num_images
    reference = ImageSet(count, "pictures", lambda items: load_folder(folder / "real", items))
    sources = Sources(lambda items: load_folder(folder / "fake", items))
    with tempfile.TemporaryDirectory() as cache:
        paths, options = {detector: folder / "inception.pth"}, Options(max_fakes=count)
        found = evaluate([name], reference, sources, "cpu", cache, options, paths, show_progress=False)
    return found[name].results[name]


def fid_fidelity(x: Arrays, sizes: Sizes) -> float:
    from torch_fidelity import calculate_metrics

    folder = str(x["folder"])
    inputs = {"input1": f"{folder}/fake", "input2": f"{folder}/real", "batch_size": 8, "cuda": False}
    weights = {"feature_extractor_weights_path": f"{folder}/inception.pth", "cache": False}
    return calculate_metrics(**inputs, **weights, fid=True, verbose=False)["frechet_inception_distance"]


def fid_clean(x: Arrays, sizes: Sizes) -> float:
    """clean-fid's resize, loader and formula around our network, as its own takes real weights only."""
    from cleanfid.fid import fid_from_feats, get_folder_features

    from metrics.inception_detectors import read_inception

    folder, network = Path(str(x["folder"])), read_inception(Path(str(x["folder"])) / "inception.pth")
    options = {"num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False}
    features = [
        get_folder_features(str(folder / name), lambda b: network((b - 128) / 128).features, **options)
        for name in ("fake", "real")
    ]
    return fid_from_feats(*features)


@dataclass(frozen=True)
class Way:
    """One row: who computes it, and how."""

    who: str
    run: Callable[[Arrays, Sizes], float]
    needs: str  # module, loaded before the clock starts


@dataclass(frozen=True)
class Task:
    """The rows that compute one thing."""

    title: str
    make: Callable[[Sizes, Path], Arrays]  # inputs; the folder is there for files
    ways: tuple[Way, ...]


def ours(run: Callable[[Arrays, Sizes], float], module: str, who: str = "ours") -> Way:
    return Way(who, run, f"metrics.{module}")


def fidelity(run: Callable[[Arrays, Sizes], float], module: str) -> Way:
    return Way("torch-fidelity", run, f"torch_fidelity.{module}")


def clean(run: Callable[[Arrays, Sizes], float]) -> Way:
    return Way("clean-fid", run, "cleanfid.fid")


def official(run: Callable[[Arrays, Sizes], float], who: str = "official formula") -> Way:
    return Way(who, run, "scipy.linalg")


CLEAN = {"name": "fid50k_full_clean", "detector": "inception_clean"}
TRACES = (
    ours(trace_ours, "frechet"),
    fidelity(trace_fidelity, "metric_fid"),
    clean(trace_clean),
    official(trace_naive, "scipy sqrtm"),
)
TASKS = (
    Task("Frechet trace, full rank", lambda s, _: make_covariances(s, s.num_spectrum), TRACES),
    Task("Frechet trace, rank deficient", lambda s, _: make_covariances(s, s.num_few), TRACES),
    Task(
        "moments",
        lambda s, _: make_features(s.num_moments, s.dim),
        (
            ours(moments_ours, "feature_stats"),
            fidelity(moments_fidelity, "metric_fid"),
            official(moments_naive),
        ),
    ),
    Task(
        "KID",
        lambda s, _: make_features(s.num_kid, s.dim),
        (
            ours(kid_ours, "kernel"),
            fidelity(kid_fidelity, "metric_kid"),
            clean(kid_clean),
            official(kid_naive),
        ),
    ),
    Task(
        "recall (with precision)",
        lambda s, _: make_features(s.num_neighbours, s.vgg_dim),
        (
            ours(pr_ours, "precision_recall"),
            ours(partial(pr_ours, half=True), "precision_recall", "ours, float16"),
            fidelity(pr_fidelity, "metric_prc"),
            official(pr_naive, "official formula, float16"),
        ),
    ),
    Task(
        "coverage (with density)",
        lambda s, _: make_features(s.num_neighbours, s.dim),
        (ours(coverage_ours, "precision_recall"), official(coverage_naive)),
    ),
    Task(
        "inception score",
        lambda s, _: make_logits(s),
        (ours(score_ours, "inception_score"), fidelity(score_fidelity, "metric_isc"), official(score_naive)),
    ),
    Task(
        "FID of two folders",
        make_images,
        (
            ours(fid_ours, "evaluate"),
            fidelity(fid_fidelity, "metrics"),
            ours(partial(fid_ours, **CLEAN), "evaluate", "ours, clean resize"),
            clean(fid_clean),
        ),
    ),
)
