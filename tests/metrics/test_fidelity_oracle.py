# SPDX-License-Identifier: MIT
"""The same features, and the same images, through torch-fidelity. Where it is not as StyleGAN, a test says how."""

import numpy as np
import pytest
import torch

from metrics.evaluate import ImageSet, Options, Sources, evaluate
from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import draw_subsets, kernel_distance
from metrics.precision_recall import precision_recall

fid = pytest.importorskip("torch_fidelity.metric_fid")
isc = pytest.importorskip("torch_fidelity.metric_isc")
kid = pytest.importorskip("torch_fidelity.metric_kid")
prc = pytest.importorskip("torch_fidelity.metric_prc")


@pytest.fixture
def pair():
    """Generated and real features."""
    mixing = torch.randn(32, 32)
    return torch.randn(500, 32) @ mixing + 0.2, torch.randn(700, 32) @ mixing


def test_fid(pair):
    statistics, moments = [], []
    for x in pair:
        stats = FeatureStats()
        stats.append(x)
        # torch-fidelity divides covariances by N - 1, StyleGAN by N.
        unbiased = stats.covariance() * len(x) / (len(x) - 1)
        statistics.append(fid.fid_features_to_statistics(x))
        moments += [stats.mean(), unbiased]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-5)


def test_kid(pair):
    expected = kid.kid_features_to_metric(
        *pair,
        kid_subsets=10,
        kid_subset_size=300,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=4,
        verbose=False,
    )["kernel_inception_distance_mean"]
    subsets = draw_subsets(500, 700, seed=4, num_subsets=10, max_subset_size=300)
    assert kernel_distance(*pair, subsets) == pytest.approx(expected, rel=1e-4)


def test_inception_score():
    logits = torch.randn(230, 20) * 3
    expected = isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    found = inception_score(logits.double().softmax(dim=1))
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-6)


@pytest.mark.parametrize("saves_memory", [False, True])
def test_precision_and_recall(pair, saves_memory):
    expected = prc.prc_features_to_metric(
        *pair, prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=saves_memory, verbose=False
    )
    found = precision_recall(*pair)
    np.testing.assert_allclose(found, [expected["precision"], expected["recall"]], atol=2.5 / 500)


@pytest.mark.slow
def test_fid_of_the_same_images_and_weights(inception_tensors, tmp_path):
    """From pixels on, with fewer images than features: covariances are rank deficient."""
    last_layers = ["1x1", "3x3_2a", "3x3_2b", "3x3dbl_3a", "3x3dbl_3b", "_pool"]
    scaled = tuple(f"Mixed_7c.branch{name}.bn.{key}" for name in last_layers for key in ("weight", "bias"))
    tensors = {name: x * 0.12 if name in scaled else x for name, x in inception_tensors.items()}
    inception_file = tmp_path / "inception.pth"
    torch.save(tensors, inception_file)
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    count, rng = 20, torch.Generator().manual_seed(0)
    levels = torch.rand(2 * count, 3, 8, 8, generator=rng) * 255
    images = torch.nn.functional.interpolate(levels, size=64, mode="bicubic").clamp(0, 255).byte()
    fake, real = images[:count] // 2 + 40, images[count:]

    extractor = inception.FeatureExtractorInceptionV3(
        "oracle", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    statistics = []
    for x in (fake, real):
        with torch.inference_mode():
            features = torch.cat([extractor(part)[0] for part in x.split(8)])
        statistics.append(fid.fid_features_to_statistics(features))
        assert 0.2 < features.mean() < 1  # as large as the published network's, about 0.4
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    shift = float(np.square(statistics[0]["mu"] - statistics[1]["mu"]).sum())

    reference = ImageSet(count, "smooth", lambda items: real[items])
    found = evaluate(
        ["fid50k_full"],
        reference,
        Sources(lambda items: fake[items]),
        "cpu",
        tmp_path,
        Options(max_fakes=count),
        {"inception": inception_file},
    )["fid50k_full"].results["fid50k_full"]
    # torch-fidelity divides both covariances by N - 1: at 50,000 images by 1.00002 less.
    unbiased = shift + (found - shift) * count / (count - 1)
    assert shift > 0.1 and unbiased - shift > 0.1
    assert unbiased == pytest.approx(expected, abs=1e-3)
    itself = evaluate(
        ["fid50k_full"],
        reference,
        Sources(lambda items: real[items]),
        "cpu",
        tmp_path,
        Options(max_fakes=count),
        {"inception": inception_file},
    )
    assert 0 <= itself["fid50k_full"].results["fid50k_full"] < 1e-6
