# SPDX-License-Identifier: MIT
"""calc_metrics.py on tiny untrained networks and a few images: numbers, records, other formats, errors of one line.

python -m pytest tests/integration/test_calc_metrics.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import calc_metrics
from metrics import detectors
from training.network_io import load_network
from training.sampling import seeded_sampler

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "tests" / "data" / "g_snapshot_xl_stem.pkl"


class ColourDetector:
    """Six numbers of each image that any change of it changes; costs nothing."""

    name, fingerprint = "lite0", "colours-1"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().expand(-1, 3, -1, -1).flatten(2) / 255
        return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)


@pytest.fixture(autouse=True)
def fast_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cheap detector for all names of lite0, caches of the test's own, and nothing to download."""
    monkeypatch.setitem(detectors.DETECTORS, "lite0", lambda device, path: ColourDetector())
    for name in ("metrics.evaluate.default_cache_dir", "training.scoring.default_cache_dir"):
        monkeypatch.setattr(name, lambda: tmp_path / "cache")
    for name in ("metrics.detectors.cache_folder", "torch_utils.download.cache_folder"):
        monkeypatch.setattr(name, lambda: tmp_path / "cache" / "downloads")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def network(tmp_path: Path, write_network: Callable[..., str], tiny_zip: Path) -> str:
    """In the folder of a run that was trained on `tiny_zip`."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    options = {"data": {"path": str(tiny_zip), "use_labels": True, "mirror": False}}
    (run_dir / "training_options.json").write_text(json.dumps(options))
    return write_network(run_dir / "best_model.safetensors", c_dim=3, info={"cur_nimg": 64000})


def invoke(*arguments: object) -> Result:
    command = [str(argument) for argument in (*arguments, "--device", "cpu")]
    return CliRunner().invoke(calc_metrics.main, command)


def call(*arguments: object) -> dict:
    """The JSON object that the command prints."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def value_of(content: dict, name: str = "fd_lite0") -> float:
    return content["metrics"][name]["results"][name]


# Networks.


def test_a_network_is_scored_against_the_data_of_its_run_and_recorded_there(network: str) -> None:
    content = call("--network", network, "--metrics", "fd_lite0,pr3_lite0")
    (line,) = lines_of(Path(network).parent / "metric-fd_lite0.jsonl")
    assert line["results"] == {"fd_lite0": value_of(content)}
    official = {"results", "metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl", "timestamp"}
    assert official <= set(line)
    assert (line["metric"], line["cur_nimg"], line["snapshot_pkl"]) == (
        "fd_lite0",
        64000,
        "best_model.safetensors",
    )
    assert line["network_sha256"] == content["network_sha256"] and len(line["network_sha256"]) == 64
    assert line["settings"]["num_generated"] == line["settings"]["num_real"] == 6
    assert "variant" not in line["settings"]
    (recall,) = lines_of(Path(network).parent / "metric-pr3_lite0.jsonl")
    assert set(recall["results"]) == {"pr3_lite0_precision", "pr3_lite0_recall"}


def test_the_number_is_that_of_the_formula(network: str, tiny_zip: Path) -> None:
    from metrics.frechet import frechet_distance_of_features
    from training.dataset import open_dataset

    fakes = seeded_sampler(load_network(network), 1, "cpu")(np.arange(6))
    reals = open_dataset(tiny_zip).batch(np.arange(6))[0]
    expected = frechet_distance_of_features(ColourDetector()(fakes), ColourDetector()(reals))
    assert value_of(call("--network", network, "--metrics", "fd_lite0")) == pytest.approx(expected, rel=1e-6)


def test_nothing_changes_with_the_batch_and_something_with_the_seed(network: str) -> None:
    common = ("--network", network, "--metrics", "fd_lite0,kd_lite0")
    first, small, other = (call(*common, *more) for more in ((), ("--batch", 1), ("--seed", 2)))
    for name in ("fd_lite0", "kd_lite0"):
        assert value_of(small, name) == pytest.approx(value_of(first, name), rel=1e-3)
        assert value_of(other, name) != pytest.approx(value_of(first, name), rel=1e-3)


def test_seeds_give_every_value_mean_and_spread(network: str) -> None:
    singles = [
        value_of(call("--network", network, "--metrics", "fd_lite0", "--seed", seed)) for seed in (3, 4, 5)
    ]
    content = call("--network", network, "--metrics", "fd_lite0", "--seed", 3, "--seeds", 3)["metrics"][
        "fd_lite0"
    ]
    assert content["values"]["fd_lite0"] == singles and content["seeds"] == [3, 4, 5]
    assert content["results"]["fd_lite0"] == pytest.approx(np.mean(singles))
    assert content["std"]["fd_lite0"] == pytest.approx(np.std(singles, ddof=1))
    seeds = [line["settings"]["seed"] for line in lines_of(Path(network).parent / "metric-fd_lite0.jsonl")]
    assert seeds == [3, 4, 5, 3, 4, 5]
    table = invoke("--network", network, "--metrics", "fd_lite0", "--seeds", 2).stdout
    assert all(word in table for word in ("mean", "std", "2 seeds", "64 kimg"))


def test_what_changes_the_number_is_recorded_and_shown(network: str) -> None:
    arguments = ("--network", network, "--metrics", "pr3_lite0", "--num-images", 5)
    result = invoke(*arguments, "--truncation", 0.7, "--labels", "dataset", "--half-distances")
    assert result.exit_code == 0, result.output
    assert "WARNING: pr3_lite0: 5 images instead of 6" in result.stderr
    (line,) = lines_of(Path(network).parent / "metric-pr3_lite0.jsonl")
    assert line["settings"]["variant"] == "5 images, psi 0.7, classes of the data set, float16 distances"
    assert f"pr3_lite0_recall [{line['settings']['variant']}]" in result.stdout
    assert (line["settings"]["truncation_psi"], line["settings"]["classes"]) == (0.7, "data set")


def test_centroids_count_as_what_they_are(network: str, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((2, 8), dtype=np.float32))
    common = ("--network", network, "--metrics", "fd_lite0", "--truncation", 0.5)
    plain, modes = call(*common), call(*common, "--centroids-path", tmp_path / "c.npy")
    assert modes["metrics"]["fd_lite0"]["settings"]["variant"] == "psi 0.5, 2 centroids"
    assert value_of(modes) != value_of(plain)


def test_a_network_outside_of_a_run_is_only_shown(
    tmp_path: Path, write_network: Callable[..., str], tiny_zip
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    network = write_network(folder / "net.safetensors", c_dim=0)
    assert "does not say what it was trained on; add --data" in error_of(
        "--network", network, "--metrics", "fd_lite0"
    )
    content = call("--network", network, "--metrics", "fd_lite0", "--data", tiny_zip)
    assert content["cur_nimg"] is None and value_of(content) > 0
    assert [file.name for file in folder.iterdir()] == ["net.safetensors"]


def test_an_official_pickle_and_its_run_folder(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    resolution = load_network(OFFICIAL).img_resolution
    rng = np.random.default_rng(0)
    images = {f"{i}.png": rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8) for i in range(5)}
    data = write_dataset("real.zip", images)
    run_dir = tmp_path / "official"
    run_dir.mkdir()
    (run_dir / "network-snapshot.pkl").write_bytes(OFFICIAL.read_bytes())
    options = {"training_set_kwargs": {"path": str(data), "xflip": True, "use_labels": True}}
    (run_dir / "training_options.json").write_text(json.dumps(options))
    content = call("--network", run_dir / "network-snapshot.pkl", "--metrics", "fd_lite0")
    assert content["metrics"]["fd_lite0"]["settings"]["num_real"] == 5
    (line,) = lines_of(run_dir / "metric-fd_lite0.jsonl")
    assert line["cur_nimg"] == content["cur_nimg"] and line["snapshot_pkl"] == "network-snapshot.pkl"


def test_a_detector_that_is_missing_costs_its_metrics_only(network: str) -> None:
    result = invoke("--network", network, "--metrics", "fid50k_full,fd_lite0,is50k")
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Note: fid50k_full: left out")]
    assert "weights-inception-2015-12-05-6726825d.pth" in said and "put it into" in said
    assert "Note: is50k: left out, for the same reason" in result.stderr
    assert "fd_lite0" in result.stdout and "fid50k_full" not in result.stdout
    assert "no metric could be computed; fid50k_full: the weights of 'inception' are missing" in error_of(
        "--network", network
    )


# Images and statistics.


@pytest.fixture
def samples(write_dataset: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(5)
    return write_dataset(
        "samples", {f"{i}.png": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(9)}
    )


def test_images_against_a_data_set_and_its_statistics_are_the_same(
    samples: Path, tiny_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metrics.reference_statistics.NUM_FEATURES", {("lite0", "features"): 6})
    images = call("--images", samples, "--data", tiny_zip, "--metrics", "fd_lite0")
    made = call("--data", tiny_zip, "--metrics", "fd_lite0", "--save-statistics", tmp_path / "ref.npz")
    assert made["files"] == {"statistics": str(tmp_path / "ref.npz")}
    stored = call("--images", samples, "--reference", tmp_path / "ref.npz", "--metrics", "fd_lite0,pr3_lite0")
    assert value_of(stored) == pytest.approx(value_of(images), rel=1e-9)
    assert "hold none" in stored["left_out"]["pr3_lite0"]
    with np.load(tmp_path / "ref.npz") as file:  # as EDM, ADM and clean-fid read it
        assert file["mu"].shape == (6,) and file["sigma"].shape == (6, 6)


def test_what_needs_a_network_is_left_out_by_name(samples: Path, tiny_zip: Path) -> None:
    names = "ppl2_wend,eqr50k,eqt50k_int,fd_lite0"
    content = call("--images", samples, "--data", tiny_zip, "--metrics", names)
    assert set(content["metrics"]) == {"fd_lite0"}
    assert set(content["left_out"]) == {"ppl2_wend", "eqr50k", "eqt50k_int"}


def test_more_images_than_the_name_says_are_a_random_part(samples: Path, tiny_zip: Path) -> None:
    common = ("--images", samples, "--data", tiny_zip, "--metrics", "fd_lite0")
    first, other = call(*common), call(*common, "--seed", 2)
    assert "fd_lite0: a random 6 of the 9 images" in first["notes"]
    assert "variant" not in first["metrics"]["fd_lite0"]["settings"]
    assert value_of(first) != value_of(other)


def test_images_need_not_be_square(write_dataset: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    wide = {f"{i}.png": rng.integers(0, 256, (10, 24, 3), dtype=np.uint8) for i in range(5)}
    folder = write_dataset("wide", wide)
    content = call("--images", folder, "--data", folder, "--metrics", "fd_lite0")
    assert value_of(content) == pytest.approx(0, abs=1e-9)
    odd = write_dataset("odd", {**wide, "9.png": np.zeros((10, 10, 3), np.uint8)})
    assert "9.png: 10x10 pixels, but the first image has 24x10" in error_of(
        "--images", odd, "--data", folder, "--metrics", "fd_lite0"
    )


def test_nearest_training_images(samples: Path, tiny_zip: Path, tmp_path: Path) -> None:
    picture = tmp_path / "near.png"
    arguments = ("--nearest", picture, "--nearest-samples", 4, "--nearest-k", 3)
    result = invoke("--images", samples, "--data", tiny_zip, *arguments)
    assert result.exit_code == 0, result.output
    assert f"Wrote {picture}: 4 samples" in result.stdout
    width, height = Image.open(picture).size
    assert width >= 4 * 72 and height >= 4 * 72
    copies = invoke("--images", tiny_zip, "--data", tiny_zip, *arguments).stdout
    assert "at distances 0 to 0 (median 0)" in copies


# Processes.


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(network: str, tmp_path: Path) -> None:
    """With the true lite0, as these are processes of their own."""
    environment = {**os.environ, "STYLESAN_CACHE": str(tmp_path / "cache"), "STYLESAN_OPS": "reference"}
    found = []
    for gpus in ("1", "2"):
        arguments = [
            "--network",
            network,
            "--metrics",
            "fd_lite0,kd_lite0",
            "--gpus",
            gpus,
            "--json",
            "--device",
            "cpu",
        ]
        done = subprocess.run(
            [sys.executable, ROOT / "calc_metrics.py", *arguments, "--json", "--device", "cpu"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [content["num_gpus"] for content in found] == [1, 2]
    for name in ("fd_lite0", "kd_lite0"):
        assert value_of(found[1], name) == pytest.approx(value_of(found[0], name), rel=1e-3)
    assert len(lines_of(Path(network).parent / "metric-fd_lite0.jsonl")) == 2  # the main process alone writes


# Runs.


def test_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, values in (("a", (30.0, 10.0, 12.0)), ("b", (28.0, 14.0, 13.0))):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"results": {"pr3_lite0_recall": v / 100, "fd_lite0": v}, "cur_nimg": 1000 * k})
            for k, v in enumerate(values)
        ]
        (tmp_path / name / "metric-fd_lite0.jsonl").write_text("\n".join(lines) + '\n{"results": {"fd_l')
    result = CliRunner().invoke(calc_metrics.main, ["compare", "a", "b"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["fd_lite0", "a", "2", "10", "1", "12", "*", "lower", "is", "better"] in rows
    assert ["fd_lite0", "b", "2", "13", "2", "13"] in rows
    assert ["pr3_lite0_recall", "a", "2", "0.3", "0", "0.12", "*", "higher", "is", "better"] in rows
    assert "cut short" in result.stderr
    assert Image.open(tmp_path / "metrics.png").size[0] > 300
    content = json.loads(CliRunner().invoke(calc_metrics.main, ["compare", "a", "b", "--json"]).stdout)
    assert content["picture"] == "metrics.png" and len(content["metrics"]) == 4


# The command line.


def test_the_list_names_every_metric() -> None:
    from metrics.names import METRICS

    result = CliRunner().invoke(calc_metrics.main, ["--list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1 : 1 + len(METRICS)]] == list(METRICS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to score"),
        (("--network", "digits", "--images", "x"), "--network and --images both say what to score"),
        (
            ("--network", "digits", "--metrics", "fid"),
            "metric 'fid' is not available; valid metrics: fid50k_full",
        ),
        (("--network", "digits", "--metrics", "none"), "--metrics none leaves nothing to do"),
        (("--network", "digits", "--data", "a", "--reference", "b"), "both say what to compare with"),
        (("--network", "absent.pkl"), "absent.pkl does not exist"),
        (("--network", "digits", "--data", "absent.zip"), "absent.zip: no such file"),
        (("--network", "digits", "--reference", "absent.npz"), "absent.npz does not exist"),
        (("--network", "digits", "--truncation", "nan"), "--trunc nan is not a number"),
        (("--network", "digits", "--detector", "x=y"), "no detector 'x' takes a file"),
        (("--network", "digits", "--detector", "absent.pth"), "absent.pth is no file"),
        (("--network", "digits", "--nearest", "a.jpg"), "a.jpg does not end in .png"),
        (("--images", "absent", "--data", "digits"), "absent: no such file or folder"),
        (("--images", "digits", "--truncation", "0.5"), "--truncation belongs to --network"),
        (
            ("--data", "digits", "--save-statistics", "s.npz", "--metrics", "pr3_lite0"),
            "compares no mean and cov",
        ),
        (("--network", "digits", "--seed", str(2**32 - 1), "--seeds", "2"), "go beyond the largest seed"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in error_of(*arguments)


def test_a_data_set_of_another_resolution_is_refused(network: str) -> None:
    assert "has images of 8 px, the network makes 16 px" in error_of(
        "--network", network, "--data", "digits8", "--metrics", "fd_lite0"
    )
    assert not list(Path(network).parent.glob("metric-*"))
